//! The command as a shell sees it: what it prints, its exit codes, and that a failure changes nothing.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use common::serve::sealblk_path;
use sealblk::storage::{Access, Backing};
use serde_json::Value;
use tempfile::TempDir;

const HEADER_LEN: u64 = 16 << 20;
const DISK_LEN: u64 = 1 << 20;

// Exit codes, as `sealblk --help` lists them.
const HOST: i32 = 1;
const USAGE: i32 = 2;
const VOLUME: i32 = 3;
const KEY: i32 = 4;
const IN_USE: i32 = 5;
const STORAGE: i32 = 6;
const ASKED: i32 = 7;

#[test]
fn first_disk_takes_one_command() {
    let bench = Bench::empty();
    let create = [
        "create",
        "vm.luks",
        "--size",
        "1M",
        "--label",
        "web",
        "--recovery-key",
        "vm.key",
    ];
    let made = bench.succeeds(&create);
    assert!(
        made.err.contains("added key provider \"native\"") && made.err.contains("provider backup native"),
        "{made:?}"
    );
    assert!(
        made.out.contains("a disk of 1 MiB") && made.out.contains("recovery key  written to vm.key"),
        "{made:?}"
    );
    assert_eq!(
        fs::metadata(bench.path("vm.luks")).unwrap().len(),
        HEADER_LEN + DISK_LEN
    );
    assert_eq!(mode(&bench.path("vm.luks")), 0o600);
    assert_eq!(mode(&bench.path("state")), 0o700);

    let again = bench.succeeds(&["create", "vm2.luks", "--size", "1M"]);
    // The provider is there now, and nothing else opens this one.
    assert!(
        !again.err.contains("added") && again.err.contains("and it has no backup"),
        "{again:?}"
    );
    assert!(again.out.contains("recovery key  none"), "{again:?}");
    let list = bench.succeeds(&["provider", "list"]).out;
    assert!(list.contains("native  native  yes      usable"), "{list}");
}

#[test]
fn info_needs_neither_key_nor_state_and_tells_of_disks_in_use() {
    let bench = Bench::with_volume();
    fs::remove_dir_all(bench.path("state")).unwrap();
    let _attached = Backing::claimed(&bench.path("vm.luks"), Access::ReadWrite).unwrap();
    let text = bench.succeeds(&["info", "vm.luks"]).out;
    for part in [
        "LUKS2",
        "1 MiB",
        "aes-xts-plain64",
        "by provider native",
        "recovery key",
        "argon2id",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// The fields that docs/info-json.md promises, no more and no fewer.
#[test]
fn json_has_the_documented_fields() {
    let bench = Bench::with_volume();
    let json: Value = serde_json::from_str(&bench.succeeds(&["info", "--json", "vm.luks"]).out).unwrap();
    let mut fields = Vec::new();
    paths(&json, String::new(), &mut fields);
    fields.sort();
    fields.dedup();
    let documented: Vec<_> = include_str!("../../docs/info-json.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .filter(|field| !["header.copy", "header.damage"].contains(field))
        .map(str::to_owned)
        .collect();
    let mut sorted = documented.clone();
    sorted.sort();
    assert_eq!(fields, sorted);
    assert_eq!(json["capacity"], DISK_LEN);
    assert_eq!(json["tokens"][0]["provider"], "native");
}

#[test]
fn cryptsetup_takes_the_recovery_key_as_file_and_as_passphrase() {
    let bench = Bench::with_volume();
    let key = fs::read(bench.path("vm.key")).unwrap();
    assert_eq!(mode(&bench.path("vm.key")), 0o600);
    assert!(!key.ends_with(b"\n"));
    let opens = |args: &[&str], input: &[u8]| {
        let mut command = Command::new("cryptsetup");
        command
            .current_dir(bench.dir.path())
            .args(["open", "--test-passphrase"])
            .args(args)
            .arg("vm.luks");
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        // It may have read its key elsewhere and be gone.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait().unwrap().success()
    };
    assert!(opens(&["--key-file", "vm.key"], b""));
    assert!(opens(&[], &[&key[..], b"\n"].concat()), "as typed at the prompt");
}

#[test]
fn recovery_keys_are_added_tested_and_removed() {
    let bench = Bench::with_volume();
    let added = bench.succeeds(&["recovery", "add", "vm.luks", "--recovery-key", "second.key"]);
    assert!(added.out.contains("made and added, in keyslot 2"), "{added:?}");
    let tested = bench.succeeds(&["recovery", "test", "vm.luks", "--recovery-key", "second.key"]);
    assert!(tested.out.contains("opens keyslot 2"), "{tested:?}");
    bench.succeeds(&["recovery", "remove", "vm.luks", "--keyslot", "2"]);
    bench.fails(
        &["recovery", "test", "vm.luks", "--recovery-key", "second.key"],
        KEY,
        &["no keyslot opens"],
    );
    bench.fails(
        &["recovery", "remove", "vm.luks", "--keyslot", "0"],
        USAGE,
        &["keyslot 0", "does not belong to a recovery key"],
    );
    bench.fails(
        &["recovery", "remove", "vm.luks", "--keyslot", "9"],
        USAGE,
        &["keyslot 9 does not exist"],
    );
    let same = [
        "recovery",
        "remove",
        "vm.luks",
        "--keyslot",
        "1",
        "--unlock-key",
        "vm.key",
    ];
    bench.fails(&same, USAGE, &["the volume was opened by keyslot 1 itself"]);
}

#[test]
fn a_recovery_key_is_added_once_and_removed_for_good() {
    let bench = Bench::with_volume();
    bench.fails(
        &["recovery", "add", "vm.luks", "--recovery-key", "vm.key"],
        USAGE,
        &["already opens the volume, by keyslot 1"],
    );
    let again = Command::new("cryptsetup")
        .current_dir(bench.dir.path())
        .args([
            "luksAddKey",
            "--batch-mode",
            "--pbkdf-force-iterations",
            "4",
            "--pbkdf-memory",
            "32",
        ])
        .args(["--key-file", "vm.key", "vm.luks", "vm.key"])
        .status()
        .unwrap();
    assert!(again.success());
    let removed = bench.succeeds(&["recovery", "remove", "vm.luks", "--recovery-key", "vm.key"]);
    assert!(
        removed.out.contains("keyslot 1\n") && removed.out.contains("keyslot 2\n"),
        "{removed:?}"
    );
    bench.fails(
        &["recovery", "test", "vm.luks", "--recovery-key", "vm.key"],
        KEY,
        &["no keyslot opens"],
    );
}

/// The file of another volume, named by mistake, was served, and its header overwritten by the guest.
#[test]
fn a_payload_that_is_a_volume_itself_is_refused() {
    let bench = Bench::with_volume();
    bench.succeeds(&["create", "data", "--size", "1M", "--header", "head"]);
    let args = [
        "serve",
        "--blk-file",
        "vm.luks",
        "--header",
        "head",
        "--socket-path",
        "sock",
    ];
    bench.fails(&args, USAGE, &["vm.luks", "holds a LUKS volume itself"]);
}

#[test]
fn a_volume_that_cannot_be_overwritten_stays() {
    let bench = Bench::with_volume();
    let before = fs::read(bench.path("vm.luks")).unwrap();
    let args = ["create", "vm.luks", "--force", "--size", "16777215T"];
    bench.fails(&args, STORAGE, &["its size cannot be set"]);
    assert!(fs::read(bench.path("vm.luks")).unwrap() == before);
}

#[test]
fn a_recovery_key_is_added_beside_a_payload_that_others_read() {
    let bench = Bench::with_volume();
    bench.succeeds(&["create", "data", "--size", "1M", "--header", "head"]);
    let _reader =
        sealblk::storage::Backing::claimed(&bench.path("data"), sealblk::storage::Access::ReadOnly).unwrap();
    bench.succeeds(&[
        "recovery",
        "add",
        "data",
        "--header",
        "head",
        "--recovery-key",
        "data.key",
    ]);
}

/// `rekey --unlock-key` and `recovery test` took a newline off a key, whatever key it was, and no key was read beyond 1 MiB.
#[test]
fn key_file_that_cryptsetup_takes_opens_by_every_verb() {
    let mut long = common::pattern(3, 8 << 20);
    *long.last_mut().unwrap() = b'\n';
    let keys = [
        ("ends in a newline", [&common::pattern(1, 31)[..], b"\n"].concat()),
        (
            "holds zeros",
            [&[0; 7][..], b"\n", &common::pattern(2, 24), &[0]].concat(),
        ),
        ("8 MiB", long),
        ("text", b"open sesame, and close again".to_vec()),
        ("text and a newline", b"open sesame, and close again\n".to_vec()),
    ];
    for (what, key) in keys {
        let bench = Bench::empty();
        fs::write(bench.path("key"), &key).unwrap();
        bench.cryptsetup_formats("vm.luks", "key");
        for verb in [
            &["recovery", "test", "vm.luks", "--recovery-key", "key"][..],
            &["rekey", "vm.luks", "--unlock-key", "key"],
            &["recovery", "test", "vm.luks", "--recovery-key", "-"],
        ] {
            let mut command = bench.command(verb);
            command.stdin(File::open(bench.path("key")).unwrap());
            if verb[0] == "rekey" {
                bench.succeeds(&["provider", "add", "native", "--no-backup"]);
            }
            let done = outcome(command);
            assert_eq!(done.code, 0, "{what}: {verb:?}: {done:?}");
        }
        for option in ["--passphrase-file", "--key-file"] {
            // It is read and taken; there is no place for the socket.
            let args = [
                "serve",
                "--blk-file",
                "vm.luks",
                "--socket-path",
                "none/sock",
                option,
                "key",
            ];
            let served = outcome(bench.command(&args));
            assert!(
                !served.err.contains("no keyslot opens"),
                "{what}: {option}: {served:?}"
            );
        }
    }
    let bench = Bench::empty();
    fs::write(bench.path("key"), vec![7; (8 << 20) + 1]).unwrap();
    File::create(bench.path("vm.luks")).unwrap();
    bench.cryptsetup_formats("vm.luks", "key");
    let test = ["recovery", "test", "vm.luks", "--recovery-key", "key"];
    bench.fails(&test, KEY, &["key", "longer than"]);
}

/// What opens a volume that sealblk makes: a text as it is typed, anything else as cryptsetup reads the file.
#[test]
fn own_recovery_key_opens_in_cryptsetup_as_it_was_given() {
    let binary = [&common::pattern(4, 31)[..], b"\n"].concat();
    let typed = b"a sentence that nobody else thinks of";
    for (given, opens) in [
        (&binary[..], &binary[..]),
        (&[&typed[..], b"\n"].concat(), &typed[..]),
    ] {
        let bench = Bench::empty();
        fs::write(bench.path("vm.key"), given).unwrap();
        fs::write(bench.path("opens"), opens).unwrap();
        bench.succeeds(&["create", "vm.luks", "--size", "1M", "--recovery-key", "vm.key"]);
        let opened = Command::new("cryptsetup")
            .current_dir(bench.dir.path())
            .args(["open", "--test-passphrase", "--key-file", "opens", "vm.luks"])
            .status()
            .unwrap();
        assert!(opened.success());
        bench.succeeds(&["recovery", "test", "vm.luks", "--recovery-key", "vm.key"]);
    }
}

/// A volume that sealblk made before, which took the newline off any key.
#[test]
fn key_whose_newline_was_taken_off_still_opens() {
    let bench = Bench::empty();
    let key = [&common::pattern(5, 31)[..], b"\n"].concat();
    fs::write(bench.path("without"), &key[..31]).unwrap();
    fs::write(bench.path("key"), &key).unwrap();
    bench.cryptsetup_formats("vm.luks", "without");
    bench.succeeds(&["recovery", "test", "vm.luks", "--recovery-key", "key"]);
    fs::write(bench.path("key"), [&key[..], b"\n"].concat()).unwrap();
    bench.fails(
        &["recovery", "test", "vm.luks", "--recovery-key", "key"],
        KEY,
        &["no keyslot opens"],
    );
}

/// One of eight characters was taken without a word.
#[test]
fn secrets_that_are_easily_guessed_are_refused_or_warned_of() {
    let bench = Bench::with_volume();
    fs::write(bench.path("weak"), "sesame12\n").unwrap();
    fs::write(bench.path("fair"), "open sesame, please\n").unwrap();
    fs::write(bench.path("good"), "open sesame, and close again\n").unwrap();
    let create = |key: &'static str| ["create", "new.luks", "--size", "1M", "--recovery-key", key];
    let add = |key: &'static str| ["recovery", "add", "vm.luks", "--recovery-key", key];
    let backup = |key: &'static str| {
        [
            "provider",
            "backup",
            "native",
            "--to",
            "backup",
            "--passphrase-file",
            key,
        ]
    };
    for refused in [&create("weak")[..], &add("weak"), &backup("weak")] {
        bench.fails(
            refused,
            USAGE,
            &["weak is too weak", "counts as 7 characters", "--weak"],
        );
    }
    let warning = bench.succeeds(&create("fair")).err;
    assert!(
        warning.contains("the secret in fair is weak: it counts as 19"),
        "{warning}"
    );
    let silent = bench.succeeds(&add("good")).err;
    assert!(!silent.contains("weak"), "{silent}");
    let insisted = bench.succeeds(&[&backup("weak")[..], &["--weak"]].concat()).err;
    assert!(insisted.contains("counts as 7 characters"), "{insisted}");
}

/// A path with a newline and an escape sequence came out as it was.
#[test]
fn names_are_shown_on_one_line_and_control_no_terminal() {
    let bench = Bench::with_volume();
    let odd = "a\nsealblk: b\x1b[2Jc\u{202e}";
    fs::rename(bench.path("vm.luks"), bench.path(odd)).unwrap();
    fs::rename(bench.path("vm.key"), bench.path("odd\nkey")).unwrap();
    fs::write(bench.path("x\ny"), "").unwrap();
    let verbs = [
        &["info", odd][..],
        &["info", "odd\x1b[1m\nmissing"],
        &["info", "x\ny"],
        &["recovery", "test", odd, "--recovery-key", "odd\nkey"],
        &["recovery", "test", odd, "--recovery-key", "x\ny"],
        &["recovery", "add", odd, "--recovery-key", "new\nkey"],
        &["rekey", odd],
        &["rekey", "--control-socket", "x\ny"],
        &["create", odd, "--size", "1M"],
        &[
            "create",
            "new\x1bdisk",
            "--size",
            "1M",
            "--recovery-key",
            "third\nkey",
        ],
        &["key", "where-used", "--provider", "na\ntive"],
        &["key", "where-used", "--provider", "native"],
        &["key", "scan", "x\ny"],
        &["audit", "verify", "x\ny"],
        &["erase", odd, "--confirm", "no\nbody"],
        &["provider", "add", "native", "--name", "x\ny"],
        &["provider", "check", "x\ny"],
        &["serve", "--blk-file", "x\ny", "--socket-path", "none/sock"],
        &["serve", "--blk-file", odd, "--socket-path", "none/so\nck"],
        &["x\ny"],
        &["info", odd, "x\ny"],
        &["--config", "x\ny", "key", "list"],
        &["--state-dir", "x\nz", "provider", "list"],
    ];
    for verb in verbs {
        let Outcome { out, err, .. } = outcome(bench.command(verb));
        let all = format!("{out}{err}");
        let steers = |c: char| c != '\n' && c.is_control() || c == '\u{202e}';
        assert!(!all.chars().any(steers), "{verb:?}: {all:?}");
        // What was behind a newline in a name begins no line.
        for line in all.lines() {
            for begin in ["key", "y", "missing", "sealblk: b", "body", "tive", "z", "ck"] {
                let rest = line.strip_prefix(begin);
                assert!(
                    rest.is_none_or(|rest| rest.starts_with(char::is_alphabetic)),
                    "{verb:?}: {line:?} in {all}"
                );
            }
        }
    }
}

/// An agent that was silent gave 4, a control socket 1; a passphrase file that was missing 4, a disk 6.
#[test]
fn one_exit_code_has_one_meaning() {
    let bench = Bench::with_volume();
    fs::write(
        bench.path("config.toml"),
        "[agent]\nsocket = \"/nonexistent/agent\"",
    )
    .unwrap();
    let silent = |verb: &[&str]| {
        let mut command = Command::new(sealblk_path());
        command
            .current_dir(bench.dir.path())
            .env_remove("SEALBLK_STATE_DIR");
        outcome_of(command.args(["--config", "config.toml"]).args(verb))
    };
    for verb in [
        &["rekey", "vm.luks"][..],
        &["create", "new.luks", "--size", "1M"],
        &["provider", "list"],
        &["list", "--keys"],
        &["events"],
        &["status", "--control-socket", "nowhere"],
        &["lock", "--control-socket", "nowhere"],
        &["events", "--control-socket", "nowhere"],
    ] {
        assert_eq!(silent(verb).code, ASKED, "{verb:?}");
    }
    for verb in [
        &["info", "missing"][..],
        &["recovery", "test", "vm.luks", "--recovery-key", "missing"],
        &["rekey", "vm.luks", "--unlock-key", "missing"],
        &["create", "missing/vm.luks", "--size", "1M"],
        &["provider", "restore", "missing", "--passphrase-file", "vm.key"],
        &[
            "serve",
            "--blk-file",
            "vm.luks",
            "--socket-path",
            "s",
            "--passphrase-file",
            "missing",
        ],
        &["serve", "--blk-file", "vm.luks", "--socket-path", "missing/s"],
        &["audit", "verify", "missing"],
        &["audit", "verify"],
        &["--config", "missing", "key", "list"],
        &["--config", "missing", "broker", "resource", "list"],
    ] {
        assert_eq!(outcome(bench.command(verb)).code, STORAGE, "{verb:?}");
    }
}

/// `keyId` was `key_id` elsewhere.
#[test]
fn fields_of_all_json_are_spelled_one_way() {
    let bench = Bench::with_volume();
    let info = bench.succeeds(&["info", "--json", "vm.luks"]).out;
    let uuid = serde_json::from_str::<Value>(&info).unwrap()["uuid"]
        .as_str()
        .unwrap()
        .to_owned();
    bench.succeeds(&["create", "with.luks", "--size", "1M"]);
    let answers = [
        info,
        bench.succeeds(&["provider", "list", "--json"]).out,
        bench.succeeds(&["key", "list", "--json"]).out,
        bench
            .succeeds(&["key", "where-used", "--provider", "native", "--json"])
            .out,
        bench.succeeds(&["key", "due", "--max-age", "1ns", "--json"]).out,
        bench
            .succeeds(&["erase", "vm.luks", "--confirm", &uuid, "--revoke-key"])
            .out,
        fs::read_to_string(bench.path("state/audit.log")).unwrap(),
    ];
    for answer in answers {
        let values: Vec<Value> = serde_json::Deserializer::from_str(&answer)
            .into_iter()
            .collect::<Result<_, _>>()
            .unwrap();
        let mut fields = Vec::new();
        for value in &values {
            paths(value, String::new(), &mut fields);
        }
        let wrong: Vec<_> = fields.iter().filter(|field| field.contains(['_', '-'])).collect();
        assert!(wrong.is_empty() && !fields.is_empty(), "{wrong:?} in {answer}");
    }
}

#[test]
fn recovery_key_is_not_removed_when_the_provider_cannot_open_the_volume() {
    let bench = Bench::with_volume();
    fs::remove_dir_all(bench.path("state")).unwrap();
    let remove = ["recovery", "remove", "vm.luks", "--keyslot", "1"];
    bench.fails(&remove, KEY, &["native", "no such key provider", "provider list"]);
}

#[test]
fn secrets_come_by_descriptor_and_credential() {
    let bench = Bench::with_volume();
    let test = |source: &str| ["recovery", "test", "vm.luks", "--recovery-key", source].map(str::to_owned);
    let mut by_stdin = bench.command(&test("-"));
    by_stdin.stdin(File::open(bench.path("vm.key")).unwrap());
    assert_eq!(outcome(by_stdin).code, 0);
    let mut by_credential = bench.command(&test("cred:vm.key"));
    by_credential.env("CREDENTIALS_DIRECTORY", bench.dir.path());
    assert_eq!(outcome(by_credential).code, 0);

    bench.fails(&test("cred:vm.key"), USAGE, &["CREDENTIALS_DIRECTORY is not set"]);
    bench.fails(&test("cred:../vm.key"), USAGE, &["cred:"]);
    bench.fails(&test("fd:99"), STORAGE, &["descriptor 99"]);
    bench.fails(&test("nowhere"), STORAGE, &["nowhere", "No such file"]);
    File::create(bench.path("empty")).unwrap();
    bench.fails(&test("empty"), KEY, &["empty"]);
    fs::write(bench.path("wrong"), "wrong").unwrap();
    bench.fails(&test("wrong"), KEY, &["no keyslot opens with this passphrase"]);
}

#[test]
fn wrong_arguments_are_refused_with_the_right_ones() {
    let bench = Bench::empty();
    bench.fails::<&str>(&[], USAGE, &["Usage"]);
    bench.fails(&["explode"], USAGE, &["explode"]);
    bench.fails(&["create"], USAGE, &["DISK"]);
    bench.fails(&["create", "vm.luks"], USAGE, &["vm.luks is a file", "--size"]);
    bench.fails(&["create", "vm.luks", "--size", "big"], USAGE, &["20G"]);
    bench.fails(
        &["create", "vm.luks", "--size", "1M", "--sector-size", "1024"],
        USAGE,
        &["512", "4096"],
    );
    bench.fails(
        &["create", "vm.luks", "--size", "1M", "--provider", "kms"],
        KEY,
        &["kms", "no such key provider"],
    );
    bench.fails(&["provider", "add", "magic"], USAGE, &["magic", "provider add"]);
    bench.fails(
        &["provider", "add", "native", "--name", "../x"],
        USAGE,
        &["../x", "lower-case"],
    );
    bench.succeeds(&["provider", "add", "native", "--no-backup"]);
    bench.fails(
        &["provider", "add", "native"],
        USAGE,
        &["native", "already", "another name"],
    );
    bench.fails(&["recovery", "remove", "vm.luks"], USAGE, &["--keyslot"]);
}

#[test]
fn provider_that_does_not_work_is_added_by_insistence_alone_and_found_wanting_by_the_list() {
    let bench = Bench::empty();
    let add = |server: &str| {
        let files = ["--ca", "ca.pem", "--certificate", "host.pem", "--key", "host.key"];
        let add = ["provider", "add", "kmip", "--server", server, "--wrap", "server"];
        [&add[..], &files[..]]
            .concat()
            .iter()
            .map(|s| s.to_string())
            .collect::<Vec<_>>()
    };
    bench.fails(&add("https://kms1"), USAGE, &["servers: number 1", "HOST:PORT"]);
    assert!(!bench.path("state/providers.toml").exists());
    // Success was told of what cannot work.
    bench.fails(
        &add("[2001:db8::7]:99"),
        KEY,
        &["ca.pem", "was not added", "--no-check"],
    );
    let mut insisting = add("[2001:db8::7]:99");
    insisting.push("--no-check".to_owned());
    bench.succeeds(&insisting);
    let settings = fs::read_to_string(bench.path("state/providers.toml")).unwrap();
    // A path holds wherever sealblk is started.
    let key = format!("key = {:?}", bench.path("host.key"));
    for line in [
        "servers = [\"[2001:db8::7]:99\"]",
        "wrap = \"server\"",
        "timeout = 10",
        &key,
    ] {
        assert!(settings.lines().any(|l| l == line), "{line}:\n{settings}");
    }
    for args in [&["provider", "list"][..], &["provider", "list", "--json"]] {
        let list = outcome(bench.command(args));
        assert_eq!(list.code, KEY, "{list:?}");
        assert!(list.out.contains("[2001:db8::7]:99"), "{list:?}");
        assert!(
            list.err.contains("the keys of \"kmip\" cannot be used"),
            "{list:?}"
        );
    }
    bench.fails(
        &["create", "vm.luks", "--size", "1M"],
        KEY,
        &["ca.pem", "cannot be read"],
    );
    assert!(!bench.path("vm.luks").exists());
}

#[test]
fn impossible_disks_are_refused_and_leave_nothing() {
    let bench = Bench::empty();
    bench.succeeds(&["provider", "add", "native", "--no-backup"]);
    let create = |more: &[&str]| {
        [&["create", "vm.luks"], more]
            .concat()
            .iter()
            .map(|s| s.to_string())
            .collect::<Vec<_>>()
    };
    bench.fails(
        &create(&["--size", "1000"]),
        USAGE,
        &["1000", "multiple of the sector size, 512"],
    );
    bench.fails(
        &create(&["--size", "512", "--sector-size", "4096"]),
        USAGE,
        &["multiple of the sector size, 4096"],
    );
    bench.fails(&create(&["--size", "0"]), USAGE, &["0 bytes"]);
    bench.fails(&create(&["--size", "16777215T"]), STORAGE, &["vm.luks"]);
    bench.fails(
        &create(&["--size", "1M", "--label", &"x".repeat(48)]),
        USAGE,
        &["47 bytes"],
    );
    bench.fails(
        &create(&["--size", "1M", "--recovery-key", "no/dir/key"]),
        STORAGE,
        &["no/dir/key", "No such file"],
    );
    bench.fails(
        &create(&["--size", "1M", "--recovery-key", "vm.luks"]),
        KEY,
        &["vm.luks is empty"],
    );
    bench.fails(
        &create(&["--size", "1M", "--header", "vm.luks"]),
        IN_USE,
        &["vm.luks"],
    );
    bench.fails(
        &["create", "no/dir/vm.luks", "--size", "1M"],
        STORAGE,
        &["no/dir/vm.luks", "No such file"],
    );
    bench.fails(&["create", "state", "--size", "1M"], STORAGE, &["state"]);
}

#[test]
fn disk_without_space_is_refused_and_leaves_nothing() {
    let bench = Bench::empty();
    bench.succeeds(&["provider", "add", "native", "--no-backup"]);
    let before = bench.snapshot();
    // 8 MiB, in the middle of the header.
    let mut limited = Command::new("sh");
    limited.args([
        "-c",
        "ulimit -f 8192; exec \"$@\"",
        "sh",
        sealblk_path(),
        "--state-dir",
        "state",
    ]);
    limited.current_dir(bench.dir.path()).args([
        "create",
        "vm.luks",
        "--size",
        "1M",
        "--recovery-key",
        "vm.key",
    ]);
    let limited = outcome(limited);
    assert_eq!(limited.code, STORAGE, "{limited:?}");
    assert!(
        limited.err.contains("vm.luks") && limited.err.contains("File too large"),
        "{limited:?}"
    );
    assert_eq!(bench.snapshot(), before);
}

/// As above, on a file system that is full; where the test may mount one.
#[test]
fn disk_on_a_full_file_system_is_refused_and_leaves_nothing() {
    let bench = Bench::empty();
    bench.succeeds(&["provider", "add", "native", "--no-backup"]);
    fs::create_dir(bench.path("full")).unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4M", "none"])
        .arg(bench.path("full"))
        .status();
    if !mount.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no permission to mount a file system");
        return;
    }
    let refused = outcome(bench.command(&["create", "full/vm.luks", "--size", "1M"]));
    let left = fs::read_dir(bench.path("full")).unwrap().count();
    assert!(
        Command::new("umount")
            .arg(bench.path("full"))
            .status()
            .unwrap()
            .success()
    );
    assert_eq!((refused.code, left), (STORAGE, 0), "{refused:?}");
    assert!(refused.err.contains("No space left on device"), "{refused:?}");
}

#[test]
fn what_exists_is_overwritten_by_force_alone() {
    let bench = Bench::empty();
    bench.succeeds(&["provider", "add", "native", "--no-backup"]);
    fs::write(bench.path("vm.luks"), [7; 64 << 10]).unwrap();
    bench.fails(
        &["create", "vm.luks", "--size", "1M"],
        IN_USE,
        &["vm.luks holds data", "--force"],
    );
    bench.fails(
        &["create", "new", "--size", "1M", "--header", "vm.luks"],
        IN_USE,
        &["vm.luks holds data"],
    );
    bench.fails(
        &["create", "vm.luks", "--size", "1000", "--force"],
        USAGE,
        &["multiple of the sector size"],
    );
    bench.fails(
        &[
            "create",
            "vm.luks",
            "--size",
            "1M",
            "--force",
            "--provider",
            "kms",
        ],
        KEY,
        &["kms"],
    );
    bench.succeeds(&["create", "vm.luks", "--size", "1M", "--force"]);
    bench.fails(
        &["create", "vm.luks", "--size", "1M"],
        IN_USE,
        &["vm.luks holds a LUKS2 volume"],
    );
    let stored = fs::read(bench.path("vm.luks")).unwrap();
    assert!(
        !stored.windows(64).any(|window| window == [7; 64]),
        "nothing of the old data is left"
    );
}

/// On a loop device, where the test may make one.
#[test]
fn block_device_is_taken_whole_and_what_it_holds_is_noticed() {
    let bench = Bench::empty();
    bench.succeeds(&["provider", "add", "native", "--no-backup"]);
    File::create(bench.path("backing"))
        .unwrap()
        .set_len(HEADER_LEN + DISK_LEN)
        .unwrap();
    let Some(device) = LoopDevice::new(&bench.path("backing")) else {
        eprintln!("skipped: no permission to make a loop device");
        return;
    };
    let disk = device.0.as_str();
    let made = bench.succeeds(&["create", disk]);
    assert!(made.out.contains("a disk of 1 MiB"), "{made:?}");
    bench.fails(&["create", disk], IN_USE, &[disk, "holds a LUKS2 volume"]);
    bench.fails(
        &["create", disk, "--force", "--size", "2M"],
        STORAGE,
        &[disk, "too few"],
    );
    bench.succeeds(&["create", disk, "--force", "--sector-size", "4096"]);

    let claimed = Backing::claimed(Path::new(disk), Access::ReadWrite).unwrap();
    bench.fails(&["create", disk, "--force"], IN_USE, &[disk, "in use"]);
    assert!(bench.succeeds(&["info", disk]).out.contains("1 MiB"));
    drop(claimed);

    // Nothing but a mark at the very end, as a backup partition table leaves it.
    let file = File::options().write(true).open(disk).unwrap();
    file.write_all_at(&vec![0; HEADER_LEN as usize + DISK_LEN as usize], 0)
        .unwrap();
    file.write_all_at(b"EFI PART", HEADER_LEN + DISK_LEN - 512)
        .unwrap();
    drop(file);
    bench.fails(&["create", disk], IN_USE, &[disk, "holds data"]);
}

#[test]
fn disk_in_use_is_left_alone_even_by_force() {
    let bench = Bench::with_volume();
    let _attached = Backing::claimed(&bench.path("vm.luks"), Access::ReadWrite).unwrap();
    std::os::unix::fs::symlink("vm.luks", bench.path("link")).unwrap();
    for disk in ["vm.luks", "link"] {
        bench.fails(
            &["create", disk, "--size", "1M", "--force"],
            IN_USE,
            &[disk, "in use", "detach"],
        );
        bench.fails(
            &["recovery", "add", disk, "--recovery-key", "new.key"],
            IN_USE,
            &[disk, "in use"],
        );
        bench.fails(
            &["recovery", "remove", disk, "--keyslot", "1"],
            IN_USE,
            &[disk, "in use"],
        );
    }
    bench.succeeds(&["recovery", "test", "link", "--recovery-key", "vm.key"]);
}

#[test]
fn detached_header_opens_its_disk() {
    let bench = Bench::empty();
    bench.succeeds(&["provider", "add", "native", "--no-backup"]);
    bench.succeeds(&[
        "create",
        "disk",
        "--size",
        "1M",
        "--header",
        "head",
        "--sector-size",
        "4096",
    ]);
    assert_eq!(fs::metadata(bench.path("disk")).unwrap().len(), DISK_LEN);
    let info = bench.succeeds(&["info", "disk", "--header", "head"]).out;
    assert!(
        info.contains("detached") && info.contains("sectors of 4096 bytes"),
        "{info}"
    );
    bench.fails(&["info", "disk"], VOLUME, &["disk", "LUKS"]);
}

#[test]
fn what_is_no_volume_is_told_so() {
    let bench = Bench::empty();
    File::create(bench.path("empty")).unwrap();
    fs::write(bench.path("noise"), common::pattern(1, 1 << 20)).unwrap();
    fs::write(bench.path("zeros"), [0; 1 << 16]).unwrap();
    fs::write(
        bench.path("luks1"),
        [b"LUKS\xba\xbe\x00\x01".as_slice(), &[0; 4096]].concat(),
    )
    .unwrap();
    fs::write(bench.path("key"), "key").unwrap();
    for file in ["empty", "noise", "zeros", "luks1"] {
        bench.fails(&["info", file], VOLUME, &[file, "LUKS"]);
        bench.fails(
            &["recovery", "test", file, "--recovery-key", "key"],
            VOLUME,
            &[file, "LUKS"],
        );
        bench.fails(
            &["recovery", "add", file, "--recovery-key", "key"],
            VOLUME,
            &[file, "LUKS"],
        );
    }
    bench.fails(&["info", "nowhere"], STORAGE, &["nowhere", "No such file"]);
    bench.fails(&["info", "/dev/null"], STORAGE, &["/dev/null", "regular file"]);
    bench.fails(&["info", "."], STORAGE, &["."]);
}

#[test]
fn damaged_copy_of_the_header_is_told_and_repaired_by_the_next_change() {
    for (copy, offset) in [("primary", 0), ("secondary", 16 << 10)] {
        let bench = Bench::with_volume();
        bench.damage(offset + 4096 + 100);
        let before = bench.snapshot();
        let info = bench.succeeds(&["info", "vm.luks"]).out;
        assert!(info.contains(&format!("the {copy} copy is damaged")), "{info}");
        bench.succeeds(&["recovery", "test", "vm.luks", "--recovery-key", "vm.key"]);
        assert_eq!(bench.snapshot(), before, "who only reads repairs nothing");

        // Opened for writing, and refused for another reason.
        let refused = outcome(bench.command(&["recovery", "remove", "vm.luks", "--keyslot", "9"]));
        assert_eq!(refused.code, USAGE, "{refused:?}");
        let info = bench.succeeds(&["info", "vm.luks"]).out;
        assert!(!info.contains("damaged"), "{info}");
    }
}

#[test]
fn volume_without_a_sound_header_is_refused() {
    let bench = Bench::with_volume();
    bench.damage(4096 + 100);
    bench.damage((16 << 10) + 4096 + 100);
    bench.fails(&["info", "vm.luks"], VOLUME, &["vm.luks", "header"]);
    bench.fails(
        &["recovery", "test", "vm.luks", "--recovery-key", "vm.key"],
        VOLUME,
        &["vm.luks"],
    );
    bench.fails(
        &["recovery", "add", "vm.luks", "--recovery-key", "new.key"],
        VOLUME,
        &["vm.luks"],
    );
}

#[test]
fn truncated_volume_is_refused() {
    let bench = Bench::with_volume();
    File::options()
        .write(true)
        .open(bench.path("vm.luks"))
        .unwrap()
        .set_len(HEADER_LEN + DISK_LEN - 512)
        .unwrap();
    let info = bench.succeeds(&["info", "vm.luks"]).out;
    assert!(info.contains("servable   no"), "{info}");
    bench.fails(
        &["recovery", "test", "vm.luks", "--recovery-key", "vm.key"],
        VOLUME,
        &["vm.luks"],
    );

    File::options()
        .write(true)
        .open(bench.path("vm.luks"))
        .unwrap()
        .set_len(8192)
        .unwrap();
    bench.fails(&["info", "vm.luks"], VOLUME, &["vm.luks"]);
}

#[test]
fn missing_keys_are_told_from_exposed_and_damaged_ones() {
    let bench = Bench::with_volume();
    let add = ["recovery", "add", "vm.luks", "--recovery-key", "new.key"];
    let primary = bench.path("state/providers/native/primary.key");
    let key = fs::read(&primary).unwrap();

    fs::set_permissions(&primary, Permissions::from_mode(0o644)).unwrap();
    bench.fails(&add, KEY, &["primary.key", "0644", "chmod"]);
    fs::set_permissions(&primary, Permissions::from_mode(0o600)).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&primary, Some(65534), None).unwrap();
        bench.fails(&add, KEY, &["primary.key", "belongs to user 65534", "chown"]);
        std::os::unix::fs::chown(&primary, Some(0), None).unwrap();
    }

    fs::write(&primary, [&key[..30], b"?", &key[31..]].concat()).unwrap();
    bench.fails(&add, KEY, &["native", "primary.key", "damaged"]);

    fs::remove_file(&primary).unwrap();
    bench.fails(&add, KEY, &["native", "no such key", "primary.key"]);

    fs::remove_dir_all(bench.path("state")).unwrap();
    bench.fails(&add, KEY, &["native", "no such key provider", "--state-dir"]);

    bench.succeeds(&["provider", "add", "native", "--no-backup"]);
    bench.fails(&add, KEY, &["native", "no such key", "primary key"]);

    fs::write(bench.path("state/providers.toml"), "default = 1").unwrap();
    bench.fails(&add, USAGE, &["providers.toml"]);
}

/// A token that was taken out of another volume's header and put into this one's.
#[test]
fn token_of_another_volume_opens_nothing() {
    let bench = Bench::with_volume();
    bench.succeeds(&["create", "other.luks", "--size", "1M"]);
    let token = |args: &[&str]| {
        let mut command = Command::new("cryptsetup");
        assert!(
            command
                .current_dir(bench.dir.path())
                .arg("token")
                .args(args)
                .status()
                .unwrap()
                .success()
        );
    };
    token(&[
        "export",
        "--token-id",
        "0",
        "--json-file",
        "token.json",
        "other.luks",
    ]);
    token(&["remove", "--token-id", "0", "vm.luks"]);
    token(&[
        "import",
        "--token-id",
        "0",
        "--json-file",
        "token.json",
        "vm.luks",
    ]);
    let add = ["recovery", "add", "vm.luks", "--recovery-key", "new.key"];
    bench.fails(&add, KEY, &["another volume", "recovery key"]);
}

#[test]
fn closed_and_full_outputs_are_no_panic() {
    let bench = Bench::with_volume();
    let mut closed = bench.command(&["info", "vm.luks"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    closed.stdout(writer);
    let closed = closed.output().unwrap();
    assert!(closed.status.success() && closed.stderr.is_empty(), "{closed:?}");

    let mut full = bench.command(&["info", "vm.luks"]);
    full.stdout(File::options().write(true).open("/dev/full").unwrap());
    let full = full.output().unwrap();
    assert_eq!(full.status.code(), Some(STORAGE));
    assert!(
        String::from_utf8_lossy(&full.stderr).contains("No space left"),
        "{full:?}"
    );
}

/// As a process that may lock no memory and is not exempt from the limit.
#[test]
fn memory_that_cannot_be_locked_is_told_with_the_remedy() {
    let bench = Bench::empty();
    let mut limited = Command::new("setpriv");
    limited.args([
        "--bounding-set",
        "-ipc_lock",
        "prlimit",
        "--memlock=4096",
        sealblk_path(),
        "--state-dir",
        "state",
    ]);
    limited
        .current_dir(bench.dir.path())
        .args(["provider", "add", "native"]);
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give up a capability that root has");
        return;
    }
    let limited = outcome(limited);
    assert_eq!(limited.code, HOST, "{limited:?}");
    for part in [
        "RLIMIT_MEMLOCK is 4096 bytes",
        "LimitMEMLOCK=infinity",
        "ulimit -l unlimited",
    ] {
        assert!(limited.err.contains(part), "{limited:?}");
    }
}

#[test]
fn help_tells_exit_codes_and_examples() {
    let bench = Bench::empty();
    let help = bench.succeeds(&["--help"]).out;
    for part in [
        "Exit codes",
        "Examples",
        "sealblk create",
        "recovery",
        "provider",
        "SEALBLK_STATE_DIR",
    ] {
        assert!(help.contains(part), "{part}: {help}");
    }
    for verb in ["create", "recovery", "provider"] {
        assert!(bench.succeeds(&[verb, "--help"]).out.contains("Usage"));
    }
    assert_eq!(
        bench.succeeds(&["--version"]).out,
        format!("sealblk {}\n", env!("CARGO_PKG_VERSION"))
    );
}

/// As QEMU and libvirt call it, by the name in the descriptor that says what it can do.
#[test]
fn executable_of_qemus_conventions_serves() {
    let second_name = Path::new(sealblk_path()).with_file_name("vhost-user-sealblk");
    let mut command = Command::new(&second_name);
    command.arg("--print-capabilities");
    let told = outcome(command);
    let capabilities: Value = serde_json::from_str(&told.out).unwrap();
    assert_eq!(capabilities["type"], "block", "{told:?}");

    // Its help named a verb that nobody may give with it.
    let mut command = Command::new(&second_name);
    command.arg("--help");
    let help = outcome(command).out;
    assert!(help.contains("Usage: vhost-user-sealblk [OPTIONS]\n"), "{help}");
}

/// A directory to work in, with a state directory of its own.
struct Bench {
    dir: TempDir,
}

#[derive(Debug)]
struct Outcome {
    code: i32,
    out: String,
    err: String,
}

impl Bench {
    fn empty() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// With the volume `vm.luks`, its recovery key `vm.key`, and the provider that it is bound to.
    fn with_volume() -> Self {
        static MADE: OnceLock<PathBuf> = OnceLock::new();
        let made = MADE.get_or_init(|| {
            let bench = Bench::empty();
            bench.succeeds(&["create", "vm.luks", "--size", "1M", "--recovery-key", "vm.key"]);
            // Where the next run replaces it: nothing drops a static.
            let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-volume");
            let _ = fs::remove_dir_all(&kept);
            common::volume::run(Command::new("cp").arg("-a").arg(bench.dir.path()).arg(&kept));
            kept
        });
        let copy = Bench::empty();
        common::volume::run(
            Command::new("cp")
                .arg("-a")
                .arg(made.join("."))
                .arg(copy.dir.path()),
        );
        copy
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(sealblk_path());
        command
            .current_dir(self.dir.path())
            .env_remove("CREDENTIALS_DIRECTORY");
        command
            .args(["--state-dir", "state"])
            .args(args.iter().map(AsRef::as_ref));
        command
    }

    #[track_caller]
    fn succeeds<S: AsRef<str>>(&self, args: &[S]) -> Outcome {
        let outcome = outcome(self.command(args));
        assert_eq!(outcome.code, 0, "{outcome:?}");
        outcome
    }

    /// Fails with this exit code, says all of `parts`, and changes no byte of anything.
    #[track_caller]
    fn fails<S: AsRef<str>>(&self, args: &[S], code: i32, parts: &[&str]) {
        let before = self.snapshot();
        let outcome = outcome(self.command(args));
        assert_eq!(outcome.code, code, "{outcome:?}");
        assert_eq!(outcome.out, "");
        for part in parts {
            assert!(outcome.err.contains(part), "{part:?} is not in {outcome:?}");
        }
        assert!(!outcome.err.contains("panicked"), "{outcome:?}");
        assert!(self.snapshot() == before, "it changed something: {outcome:?}");
    }

    /// A volume of stock cryptsetup that the file `key` opens, byte for byte as far as cryptsetup reads it, and fast.
    fn cryptsetup_formats(&self, disk: &str, key: &str) {
        File::create(self.path(disk)).unwrap().set_len(20 << 20).unwrap();
        let formatted = Command::new("cryptsetup")
            .current_dir(self.dir.path())
            .args([
                "luksFormat",
                "--batch-mode",
                "--key-size",
                "512",
                "--pbkdf",
                "pbkdf2",
            ])
            .args(["--pbkdf-force-iterations", "1000", "--keyfile-size"])
            .arg(
                fs::metadata(self.path(key))
                    .unwrap()
                    .len()
                    .min(8 << 20)
                    .to_string(),
            )
            .args([disk, key])
            .status()
            .unwrap();
        assert!(formatted.success());
    }

    /// Every file below the directory.
    fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut dirs = vec![self.dir.path().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    dirs.push(entry.path());
                } else if !entry.path().starts_with(self.path("state/volumes")) {
                    // That a volume was opened is noted there, whatever else fails.
                    files.insert(entry.path(), fs::read(entry.path()).unwrap());
                }
            }
        }
        files
    }

    /// Flips a bit of `vm.luks`.
    fn damage(&self, offset: u64) {
        let file = File::options()
            .read(true)
            .write(true)
            .open(self.path("vm.luks"))
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    }
}

/// A block device over a file, let go when dropped.
struct LoopDevice(String);

impl LoopDevice {
    fn new(file: &Path) -> Option<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .ok()?;
        let device = made
            .status
            .success()
            .then(|| String::from_utf8(made.stdout).unwrap())?;
        Some(Self(device.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

fn outcome(mut command: Command) -> Outcome {
    outcome_of(&mut command)
}

fn outcome_of(command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    Outcome {
        code: output.status.code().unwrap_or_else(|| panic!("{output:?}")),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// The paths of all values in `json`, with `[]` for the elements of a list.
fn paths(json: &Value, prefix: String, found: &mut Vec<String>) {
    match json {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if prefix.is_empty() {
                    name.clone()
                } else {
                    format!("{prefix}.{name}")
                };
                let nested = value.is_object() || value[0].is_object();
                if !nested {
                    found.push(path.clone());
                }
                paths(value, path, found);
            }
        }
        Value::Array(elements) => elements
            .iter()
            .for_each(|element| paths(element, format!("{prefix}[]"), found)),
        _ => {}
    }
}

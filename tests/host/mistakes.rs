//! What is said of mistakes: of arguments, files, rights, storage, front-ends, the agent and the broker, each word for word and
//! with its exit code in `tests/mistakes`. Those of key servers are made in tests/providers.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use common::DEADLINE;
use common::frontend::Frontend;
use common::mistakes::{Mistakes, STRANGER};
use common::process::Process;
use sealblk::storage::{Access, Backing};

const HEADER_LEN: u64 = 16 << 20;

/// With a provider, the volume `vm.luks` and its recovery key `vm.key`.
fn with_volume(section: &'static str) -> Mistakes {
    let mistakes = Mistakes::of(section);
    mistakes.does("sealblk provider add native --no-backup");
    // Its recovery key costs nothing to try: what is said of it is the same.
    mistakes.write("vm.key", "the recovery key of this disk");
    let vm = File::create(mistakes.path("vm.luks")).unwrap();
    vm.set_len(HEADER_LEN + (1 << 20)).unwrap();
    mistakes.does(
        "cryptsetup luksFormat --batch-mode --cipher aes-xts-plain64 --key-size 512 --sector-size 512 --pbkdf pbkdf2 \
         --pbkdf-force-iterations 1000 vm.luks vm.key",
    );
    mistakes.does("sealblk rekey vm.luks --unlock-key vm.key");
    for private in ["vm.luks", "vm.key"] {
        fs::set_permissions(mistakes.path(private), Permissions::from_mode(0o600)).unwrap();
    }
    mistakes
}

#[test]
fn arguments() {
    let mut m = with_volume("arguments");
    m.does("sealblk create other.luks --size 1M");
    m.does("sealblk create data --size 1M --header head");
    m.write("weak", "sesame12");
    m.write("pass", "a passphrase of some length");

    m.mistake("sealblk extend vm.luks");
    m.mistake("sealblk help create serve");
    m.mistake("sealblk provider add vault");
    m.mistake("sealblk key delete 4711");
    m.mistake("sealblk info vm.luks other.luks");
    m.mistake("sealblk create");
    m.mistake("sealblk create new.luks");
    m.mistake("sealblk create new.luks --size 10GB");
    m.mistake("sealblk create new.luks --size 1000");
    m.mistake("sealblk create new.luks --size 0");
    m.mistake("sealblk create new.luks --size 1M --sector-size 1024");
    m.mistake("sealblk create new.luks --size 1M --recovery-kye vm.key");
    m.mistake("sealblk create new.luks --size 1M --provider kms");
    m.mistake("sealblk create new.luks --size 1M --recovery-key weak");
    m.mistake(
        "sealblk create new.luks --size 1M --label 'a label that is longer than the header has room for it'",
    );
    m.mistake("sealblk create vm.luks --size 1M");
    m.mistake("sealblk recovery add vm.luks --recovery-key weak");
    m.mistake("sealblk recovery add vm.luks --recovery-key vm.key");
    m.mistake("sealblk recovery remove vm.luks");
    m.mistake("sealblk recovery remove vm.luks --keyslot 1");
    m.mistake("sealblk recovery remove vm.luks --keyslot 9");
    m.mistake("sealblk recovery remove vm.luks --keyslot 0 --unlock-key vm.key");
    m.mistake("sealblk recovery test vm.luks --recovery-key cred:vm.key");
    m.mistake("sealblk recovery test vm.luks --recovery-key fd:vm");
    m.mistake("sealblk recovery test vm.luks --recovery-key fd:99");
    m.mistake("sealblk rekey vm.luks other.luks");
    m.mistake("sealblk rekey vm.luks --if-due");
    m.mistake("sealblk rekey vm.luks --if-due --max-age soon");
    m.mistake("sealblk rekey vm.luks --provider kms");
    m.mistake("sealblk resize --size 2M");
    m.mistake("sealblk resize other.luks --size 512K");
    m.mistake("sealblk resize other.luks --size 1000 --shrink");
    m.mistake("sealblk resize other.luks --shrink");
    m.mistake("sealblk erase vm.luks");
    m.mistake("sealblk erase vm.luks --confirm vm.luks");
    m.mistake("sealblk erase vm.luks --confirm 3b5b5f0e-2f5d-4c53-9d2a-5a3c1f0f7d11");
    m.mistake("sealblk key revoke 4711 --provider native");
    m.mistake("sealblk key revoke 4711 --provider native --force --confirm 4712");
    m.mistake("sealblk key where-used");
    m.mistake("sealblk provider remove native");
    m.mistake("sealblk provider remove native --force");
    m.mistake("sealblk provider remove native --force --confirm kms");
    m.mistake("sealblk provider remove kms");
    m.mistake("sealblk provider check kms");
    m.mistake("sealblk provider add native");
    m.mistake("sealblk provider add native --name ../x");
    m.mistake("sealblk provider backup native --to native.backup --passphrase-file weak");
    m.mistake("sealblk provider backup native");
    m.mistake("sealblk provider enrol native --host node1");
    m.mistake("sealblk provider backup native --to vm.luks --passphrase-file pass");
    m.mistake("sealblk provider restore vm.luks --passphrase-file pass");
    m.mistake("sealblk list --keys");
    m.mistake("sealblk events");
    m.mistake("sealblk serve --blk-file vm.luks");
    m.mistake("sealblk serve --socket-path sock");
    m.mistake("sealblk serve --blk-file vm.luks --socket-path sock --fd 3");
    m.mistake("sealblk serve --blk-file vm.luks --fd 77");
    m.mistake("sealblk serve --blk-file vm.luks --fd 3 --passphrase-file fd:3");
    m.mistake("sealblk serve --blk-file vm.luks --socket-path sock --num-queues 65");
    m.mistake("sealblk serve --blk-file vm.luks --socket-path sock --sector-size 512");
    m.mistake("sealblk serve --blk-file vm.luks --socket-path sock --pool-size 4K");
    m.mistake("sealblk serve --null-storage 1000 --socket-path sock");
    m.mistake("sealblk serve --null-storage 1M --socket-path sock --on-full wait");
    m.mistake("sealblk status");
    m.mistake("sealblk audit verify");
    m.check();
}

#[test]
fn files() {
    let mut m = with_volume("files");
    m.does("sealblk create data --size 1M --header head");
    m.does("sealblk create other.luks --size 1M");
    m.write("empty", "");
    m.write("zeros", [0; 1 << 16]);
    m.write("text", "this is no volume\n".repeat(1000));
    m.write("wrong.key", "not the key of this disk");
    let vm = fs::read(m.path("vm.luks")).unwrap();
    m.write("truncated.luks", &vm[..8192]);
    let other = fs::read(m.path("other.luks")).unwrap();
    m.write("short.luks", &other[..HEADER_LEN as usize + 4096]);
    m.write("damaged.luks", &vm);
    for at in [4096 + 100, (16 << 10) + 4096 + 100] {
        let damaged = File::options().write(true).open(m.path("damaged.luks")).unwrap();
        damaged.write_all_at(b"?", at).unwrap();
    }
    m.write("copy.head", &vm[..HEADER_LEN as usize]);
    m.write("luks1", [b"LUKS\xba\xbe\x00\x01".as_slice(), &[0; 4096]].concat());
    m.write(
        "disk.qcow2",
        [b"QFI\xfb\x00\x00\x00\x03".as_slice(), &[0; 65528]].concat(),
    );
    m.does("mkfifo fifo");
    m.does("mkdir dir");
    symlink("nowhere", m.path("dangling")).unwrap();

    m.mistake("sealblk info missing");
    m.mistake("sealblk info dir");
    m.mistake("sealblk info fifo");
    m.mistake("sealblk info /dev/null");
    m.mistake("sealblk info empty");
    m.mistake("sealblk info zeros");
    m.mistake("sealblk info text");
    m.mistake("sealblk info luks1");
    m.mistake("sealblk info disk.qcow2");
    m.mistake("sealblk info truncated.luks");
    m.mistake("sealblk info damaged.luks");
    m.mistake("sealblk info data");
    m.mistake("sealblk serve --blk-file short.luks --socket-path sock");
    m.mistake("sealblk serve --blk-file damaged.luks --socket-path sock");
    m.mistake("sealblk serve --blk-file data --socket-path sock");
    m.mistake("sealblk serve --blk-file vm.luks --header head --socket-path sock");
    m.mistake("sealblk serve --blk-file disk.qcow2 --socket-path sock");
    m.mistake(
        "sealblk serve --blk-file zeros --allow-unencrypted --passphrase-file vm.key --socket-path sock",
    );
    m.mistake("sealblk serve --blk-file vm.luks --socket-path missing/sock");
    m.mistake("sealblk serve --blk-file vm.luks --socket-path text");
    m.mistake("sealblk serve --blk-file vm.luks --socket-path sock --passphrase-file missing");
    m.mistake("sealblk serve --blk-file vm.luks --socket-path sock --passphrase-file wrong.key");
    m.mistake("sealblk create missing/vm.luks --size 1M");
    m.mistake("sealblk create dir --size 1M");
    m.mistake("sealblk create text --size 1M");
    m.mistake("sealblk create dangling --size 1M");
    m.mistake("sealblk create new.luks --size 1M --recovery-key missing/key");
    m.mistake("sealblk recovery test vm.luks --recovery-key missing");
    m.mistake("sealblk recovery test vm.luks --recovery-key empty");
    m.mistake("sealblk recovery test vm.luks --recovery-key dir");
    m.mistake("sealblk recovery test vm.luks --recovery-key wrong.key");
    m.mistake("sealblk recovery add vm.luks --header copy.head --recovery-key new.key");
    m.mistake("sealblk provider restore text --passphrase-file vm.key");
    m.mistake("sealblk audit verify text");
    m.mistake("sealblk audit verify missing");

    // A token out of another volume's header.
    m.does("cryptsetup token export --token-id 0 --json-file token.json other.luks");
    m.does("cryptsetup token remove --token-id 0 vm.luks");
    m.mistake("sealblk rekey vm.luks");
    m.does("cryptsetup token import --token-id 0 --json-file token.json vm.luks");
    m.mistake("sealblk rekey vm.luks --provider native");
    m.write("vm.luks", &vm);

    let primary = m.path("state/providers/native/primary.key");
    let key = fs::read(&primary).unwrap();
    fs::write(&primary, [&key[..30], b"?", &key[31..]].concat()).unwrap();
    m.mistake("sealblk provider check native");
    fs::remove_file(&primary).unwrap();
    m.mistake("sealblk serve --blk-file vm.luks --socket-path sock --no-wait");
    let settings = m.path("state/providers.toml");
    fs::write(&settings, "default = \"kms\"\n").unwrap();
    m.mistake("sealblk provider list");
    fs::write(
        &settings,
        "[provider.kms]\nkind = \"kmip\"\nsevrers = [\"kms1\"]\n",
    )
    .unwrap();
    m.mistake("sealblk key list");
    m.env("SEALBLK_STATE_DIR", Some("elsewhere"));
    m.mistake("sealblk create new.luks --size 1M");
    m.mistake("sealblk recovery add vm.luks --recovery-key new.key");

    m.mistake("sealblk --config missing.toml key list");
    m.write("config.toml", "[agent]\nsokcet = \"/run/agent.sock\"\n");
    m.mistake("sealblk --config config.toml key list");
    m.write(
        "config.toml",
        "[[grant]]\nuser = \"nobody-of-that-name\"\nprivileges = [\"Access\"]\n",
    );
    m.mistake("sealblk --config config.toml key due");
    m.write("config.toml", "[[grant]]\nprivileges = [\"Access\"]\n");
    m.mistake("sealblk --config config.toml key due --max-age 1d");
    m.check();
}

#[test]
fn rights() {
    let mut m = with_volume("rights");
    fs::set_permissions(m.path("."), Permissions::from_mode(0o755)).unwrap();
    m.does("sealblk create shared.luks --size 1M");
    fs::set_permissions(m.path("shared.luks"), Permissions::from_mode(0o666)).unwrap();
    fs::set_permissions(m.path("vm.key"), Permissions::from_mode(0o644)).unwrap();

    m.stranger("sealblk info vm.luks");
    m.stranger("sealblk create new.luks --size 1M");
    m.stranger("sealblk provider list");
    m.stranger("sealblk provider add native --name mine");
    m.stranger("sealblk erase vm.luks --confirm 3b5b5f0e-2f5d-4c53-9d2a-5a3c1f0f7d11");
    m.stranger("sealblk serve --blk-file shared.luks --socket-path sock --no-wait");
    m.stranger("sealblk recovery test vm.luks --recovery-key vm.key");
    m.stranger("sealblk audit verify");
    m.write("config.toml", "[agent]\nsocket = \"/proc/agent/agent.sock\"\n");
    m.does("mkdir --mode 0777 own");
    m.stranger("sealblk --config config.toml --state-dir own agent");

    let primary = m.path("state/providers/native/primary.key");
    fs::set_permissions(&primary, Permissions::from_mode(0o644)).unwrap();
    m.mistake("sealblk provider check native");
    fs::set_permissions(&primary, Permissions::from_mode(0o600)).unwrap();
    let settings = m.path("state/providers.toml");
    fs::set_permissions(&settings, Permissions::from_mode(0o666)).unwrap();
    m.mistake("sealblk provider list");
    m.check();
}

#[test]
fn storage() {
    let mut m = with_volume("storage");
    // In use, as by `sealblk serve`.
    {
        let _attached = Backing::claimed(&m.path("vm.luks"), Access::ReadWrite).unwrap();
        m.mistake("sealblk recovery add vm.luks --recovery-key new.key");
        m.mistake("sealblk rekey vm.luks");
        m.mistake("sealblk create vm.luks --size 1M --force");
        m.mistake("sealblk erase vm.luks --confirm 3b5b5f0e-2f5d-4c53-9d2a-5a3c1f0f7d11");
        m.mistake("sealblk serve --blk-file vm.luks --socket-path sock");
    }
    m.mistake("sealblk create new.luks --size 16777215T");
    m.mistake("sh -c 'ulimit -f 8192; exec sealblk create new.luks --size 1M'");
    m.mistake("sh -c 'sealblk info vm.luks >/dev/full'");

    let locks_little = "setpriv --bounding-set -ipc_lock prlimit --memlock=4096 sealblk recovery test vm.luks --recovery-key vm.key";
    let full = "sealblk create full/new.luks --size 1M";
    let devices = ["sealblk create LOOP --force --size 2M", "sealblk create LOOP"];
    if !rustix::process::geteuid().is_root() {
        for done in [locks_little, full].into_iter().chain(devices) {
            m.skip(&format!("$ {done}"));
        }
        return m.check();
    }
    m.mistake(locks_little);
    m.does("mkdir full");
    m.does("mount -t tmpfs -o size=4M none full");
    m.mistake(full);
    m.does("umount full");
    m.write("backing", vec![0; HEADER_LEN as usize + (1 << 20)]);
    let device = m.does("losetup --find --show backing").trim().to_owned();
    m.name(&device, "LOOP");
    m.mistake(&devices[0].replace("LOOP", &device));
    m.does(&format!("sealblk create {device}"));
    m.mistake(&devices[1].replace("LOOP", &device));
    m.does(&format!("losetup --detach {device}"));
    m.check();
}

#[test]
fn front_ends() {
    let mut m = with_volume("front-ends");
    m.write(
        "config.toml",
        "[[grant]]\nuser = 1\nprivileges = [\"RegisterVM\"]\n",
    );
    let line =
        "sealblk --config config.toml serve --blk-file vm.luks --socket-path sock --control-socket control";
    let mut serve = Process::spawn(&mut m.command(line));
    await_socket(&m.path("control"), &mut serve);
    await_socket(&m.path("sock"), &mut serve);

    // What a front-end does is told by the log.
    let log = |m: &mut Mistakes, what: &str, before: usize| {
        let start = Instant::now();
        let told = loop {
            let told: String = serve.stderr()[before..]
                .lines()
                .filter(|line| line.contains(" WARN ") || line.contains("ERROR "))
                .map(|line| format!("{line}\n"))
                .collect();
            if !told.is_empty() {
                break told;
            }
            assert!(start.elapsed() < DEADLINE, "{what}: nothing is told");
            std::thread::sleep(std::time::Duration::from_millis(2));
        };
        m.add(&format!("a front-end {what}"), &told);
    };
    let before = serve.stderr().len();
    let mut stream = UnixStream::connect(m.path("sock")).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    log(&mut m, "speaks HTTP", before);
    drop(stream);

    let before = serve.stderr().len();
    let first = Frontend::connect(&m.path("sock"));
    let second = UnixStream::connect(m.path("sock")).unwrap();
    log(&mut m, "comes while another is served", before);
    drop((first, second));

    // It printed the path that `serve` was given, whoever asked from wherever.
    let status = m.does("sealblk status --control-socket control");
    assert!(status.contains(m.path("vm.luks").to_str().unwrap()), "{status}");
    m.mistake("sealblk serve --blk-file vm.luks --socket-path other");
    m.mistake("sealblk rekey vm.luks");
    m.mistake("sealblk status --control-socket sock.control");
    m.mistake("sealblk lock --control-socket vm.luks");
    m.mistake("sealblk rekey --control-socket control --provider kms");
    m.does("sealblk lock --control-socket control");
    m.mistake("sealblk rekey --control-socket control");
    m.does("sealblk unlock --control-socket control");
    m.does("sealblk create second.luks --size 1M");
    m.mistake("sealblk serve --blk-file second.luks --socket-path sock");
    m.mistake("sealblk serve --blk-file second.luks --socket-path sock2 --control-socket control");
    serve.signal(rustix::process::Signal::TERM);
    assert!(serve.wait().status.success());
    m.check();
}

#[test]
fn disks() {
    let mut m = with_volume("disks");
    m.write("config.toml", "");
    m.env("SEALBLK_CONFIG", Some("config.toml"));
    m.mistake("sealblk define vm/7 --blk-file vm.luks");
    m.mistake("sealblk define vm7");
    m.mistake("sealblk define vm7 --num-queues 4");
    m.mistake("sealblk define vm7 --blk-file missing.luks");
    m.mistake("sealblk define vm7 --blk-file vm.luks --incoming");
    m.mistake("sealblk define vm7 --blk-file vm.luks --num-queues 65");
    m.mistake("sealblk define vm7 --blk-file vm.luks --read-only --discard");
    m.does("sealblk define vm7 --blk-file vm.luks");
    m.mistake("sealblk define vm7 --blk-file vm.luks");
    m.mistake("sealblk start vm8");
    m.mistake("sealblk undefine vm8");
    m.mistake("sealblk status");
    m.mistake("sealblk status a-disk-that-no-test-serves");
    m.mistake("sealblk status vm7 --control-socket sock");
    m.mistake("sealblk rekey vm7 --header vm.luks");
    m.write("vm7", "");
    m.mistake("sealblk rekey vm7");
    m.write("disks.d/vm8.toml", "blk-file = \"vm.luks\"\n");
    m.mistake("sealblk start --foreground vm8");
    m.write("disks.d/vm8.toml", "blk-file = \"/vm.luks\"\nnum-queue = 4\n");
    m.mistake("sealblk resize vm8");
    m.check();
}

#[test]
fn agent() {
    let mut m = with_volume("agent");
    m.mistake("sealblk key push 4711 --provider kms --key-file vm.key");
    m.write(
        "config.toml",
        "[agent]\nsocket = \"agent.sock\"\n[[grant]]\nuser = 4200042\nprivileges = [\"ReadKeyServersInfo\"]\n",
    );
    m.mistake("sealblk --config config.toml --state-dir missing/state agent");
    m.mistake("sealblk --config config.toml agent --socket-path /proc/agent/agent.sock");
    // Verbs ask the agent where no state directory is named.
    m.env("SEALBLK_STATE_DIR", None);
    m.env("SEALBLK_CONFIG", Some("config.toml"));
    for verb in [
        "sealblk rekey vm.luks",
        "sealblk create new.luks --size 1M",
        "sealblk provider list",
        "sealblk list --keys",
        "sealblk events",
        "sealblk serve --blk-file vm.luks --socket-path sock --no-wait",
    ] {
        m.mistake(verb);
    }

    let mut agent = Process::spawn(&mut m.command("sealblk --state-dir state agent"));
    await_socket(&m.path("agent.sock"), &mut agent);
    fs::set_permissions(m.path("."), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(m.path("agent.sock"), Permissions::from_mode(0o666)).unwrap();
    m.mistake("sealblk --state-dir state agent");
    m.mistake("sealblk create new.luks --size 1M --provider kms");
    m.mistake("sealblk key revoke 4711 --provider native");
    m.mistake("sealblk provider remove native");
    if rustix::process::geteuid().is_root() {
        chown(m.path("vm.luks"), Some(STRANGER), Some(STRANGER)).unwrap();
    }
    m.stranger("sealblk rekey vm.luks");
    m.stranger("sealblk key revoke 4711 --provider native");
    m.stranger("sealblk serve --blk-file vm.luks --socket-path sock --no-wait");
    agent.signal(rustix::process::Signal::TERM);
    assert!(agent.wait().status.success());

    let log = m.path("state/audit.log");
    let text = fs::read_to_string(&log).unwrap();
    fs::write(&log, text.replacen("AgentStarted", "AgentStopped", 1)).unwrap();
    m.mistake("sealblk --state-dir ./state agent");
    m.mistake("sealblk audit verify state/audit.log");
    fs::write(&log, &text).unwrap();
    m.mistake("sealblk audit verify state/audit.log --head 4711");
    m.mistake("sealblk audit verify state/audit.log --receipt vm.key");
    m.check();
}

#[test]
fn broker() {
    let mut m = Mistakes::of("broker");
    m.env("SEALBLK_CONFIG", Some("broker.toml"));
    m.mistake("sealblk --config missing.toml broker serve");
    m.write(
        "broker.toml",
        "listen = \"[::1]:8700\"\ncertificate = \"a.pem\"\nkey = \"a.key\"\nstate-dir = \"state\"\n",
    );
    m.mistake("sealblk broker serve");
    let dir = m.path("broker").display().to_string();
    m.write(
        "broker.toml",
        format!(
            "listen = \"[::1]:0\"\ncertificate = \"{dir}.pem\"\nkey = \"{dir}.key\"\nstate-dir = \"{dir}\"\n"
        ),
    );
    m.mistake("sealblk broker serve --once");
    m.mistake("sealblk broker resource add kek");
    m.does("sealblk broker resource add sealblk/kek/1");
    m.mistake("sealblk broker resource add sealblk/kek/1");
    m.mistake("sealblk broker resource remove sealblk/kek/1 --confirm sealblk/kek/2");
    m.mistake("sealblk broker resource remove sealblk/kek/2 --confirm sealblk/kek/2");
    m.mistake("sealblk broker reference set node --pcr 7=abc");
    m.mistake("sealblk broker reference set 'a node' --pcr 7=abc");
    m.mistake(
        "sealblk broker host enrol node1 --reference node --resource sealblk/kek/1 --token-file node1.token",
    );
    m.mistake("sealblk broker host enrol node1 --reference node --resource sealblk/kek/1");
    m.mistake("sealblk broker host remove node1");
    fs::set_permissions(m.path("broker/master.key"), Permissions::from_mode(0o644)).unwrap();
    m.mistake("sealblk broker resource list");
    m.check();
}

/// All sections together, with that of the key servers.
#[test]
fn there_are_enough_of_them() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mistakes");
    let texts = fs::read_dir(dir)
        .unwrap()
        .map(|file| fs::read_to_string(file.unwrap().path()).unwrap());
    let rows = texts.map(|text| {
        text.lines()
            .filter(|line| line.starts_with(|c: char| !c.is_whitespace()))
            .count()
    });
    assert!(rows.sum::<usize>() >= 60);
}

fn await_socket(path: &Path, process: &mut Process) {
    let start = Instant::now();
    while !path.exists() {
        assert!(
            process.is_running() && start.elapsed() < DEADLINE,
            "{}",
            process.stderr()
        );
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

//! The host's key agent, as its callers see it: users who have neither the state directory nor a provider's credentials.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::agent::Agent;
use common::fuse::Fuse;
use common::process::Process;
use common::secrets::as_user;
use common::serve::{Server, install, sealblk_path};
use common::volume::run;
use sealblk::keys::RequestPurpose;
use sealblk::keys::{Binding, KeyError, KeyId, KeyReason, Providers};
use sealblk_secmem::arena::SecretBytes;
use serde_json::Value;
use uuid::Uuid;

/// A user whom no host has, and who is granted nothing unless a test does.
const SOMEBODY: u32 = 4_000_001;
/// A group, and a user of the same number.
const GROUP: u32 = 4_100_000;

fn binding(key_id: &KeyId) -> Binding<'_> {
    Binding {
        volume: Uuid::from_u128(7),
        provider: "native",
        key_id,
        keyslot: 0,
    }
}

#[test]
fn disks_are_made_opened_and_rekeyed_without_the_state_directory() {
    let mut agent = Agent::new("");
    run(&mut agent.verb(&["create", "vm.luks", "--size", "1M"]));
    run(&mut agent.verb(&["recovery", "add", "vm.luks", "--recovery-key", "vm.key"]));
    run(&mut agent.verb(&["rekey", "vm.luks"]));
    agent.restart();
    run(&mut agent.verb(&["rekey", "vm.luks"]));
    let listed = String::from_utf8(run(&mut agent.verb(&["provider", "list"])).stdout).unwrap();
    assert!(listed.contains("native") && listed.contains("usable"), "{listed}");

    let events: Vec<_> = agent
        .audit()
        .iter()
        .map(|record| record["event"].clone())
        .collect();
    let expected = [
        // create, recovery add
        "AgentStarted",
        "KeyCreated",
        "KeyBound",
        "KeyReleased",
        // rekey: opened, bound, read back
        "KeyReleased",
        "KeyCreated",
        "KeyBound",
        "KeyLookedUp",
        "KeyReleased",
        "AgentStarted",
        "KeyReleased",
        "KeyCreated",
        "KeyBound",
        "KeyLookedUp",
        "KeyReleased",
        // provider list
        "ProviderChecked",
    ];
    assert_eq!(events, expected);
    let released = |record: &Value| record["event"] == "KeyReleased";
    let last = agent.audit().into_iter().rfind(released).unwrap();
    assert_eq!(
        (&last["purpose"], &last["user"], &last["keyslot"]),
        (&"recrypt".into(), &0.into(), &0.into())
    );

    agent.stop();
    let refused = agent.verb(&["rekey", "vm.luks"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(7));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("agent does not answer") && said.contains("agent.sock"),
        "{said}"
    );
    agent.start();
}

/// Settings of a KMIP provider whose certificates of authorities are there.
fn kmip_with(ca: &Path) -> String {
    format!(
        "\n[provider.kms]\nkind = \"kmip\"\nservers = [\"127.0.0.1:1\"]\nca = {ca:?}\ncertificate = {ca:?}\nkey = {ca:?}\n"
    )
}

// One certificate on storage that did not answer held up the thread that accepts callers: no provider's key was to be had, and
// the agent did not end.
#[test]
fn a_certificate_that_does_not_answer_holds_up_no_other_provider_and_not_the_end() {
    let mut agent = Agent::new("");
    let Some(fuse) = Fuse::mount() else {
        eprintln!("skipped: no FUSE file system can be mounted here");
        return;
    };
    fuse.ignore_all();
    agent.stop();
    let mut settings = fs::OpenOptions::new()
        .append(true)
        .open(agent.path("state/providers.toml"))
        .unwrap();
    settings.write_all(kmip_with(&fuse.path()).as_bytes()).unwrap();
    agent.start();
    let started = Instant::now();
    while !fuse.is_asked() {
        assert!(started.elapsed() < DEADLINE, "nobody looks at the certificate");
        thread::sleep(Duration::from_millis(10));
    }
    run(&mut agent.verb(&["create", "vm.luks", "--size", "1M", "--provider", "native"]));
    // Whoever asks for the other one's keys learns why there are none.
    let refused = agent.verb(&["provider", "list"]).output().unwrap();
    let said = String::from_utf8([refused.stdout, refused.stderr].concat()).unwrap();
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(
        said.contains("usable") && said.contains("does not answer"),
        "{said}"
    );
    // A process whose thread the kernel has wait is there until the answer comes, and holds nothing that the next one needs.
    agent.terminate();
    let ending = Instant::now();
    while agent.path("agent.sock").exists() {
        assert!(ending.elapsed() < DEADLINE, "the agent goes on");
        thread::sleep(Duration::from_millis(10));
    }
    let mut first = agent.replace();
    run(&mut agent.verb(&["rekey", "vm.luks"]));
    fuse.answer();
    assert!(first.wait().unwrap().success());
}

// A FIFO in a certificate's, key's or token's place was waited for, for ever.
#[test]
fn what_settings_name_is_read_only_if_it_is_a_file() {
    let agent = Agent::new("");
    let fifo = agent.path("fifo");
    run(Command::new("mkfifo").arg(&fifo));
    let mut settings = fs::OpenOptions::new()
        .append(true)
        .open(agent.path("state/providers.toml"))
        .unwrap();
    settings.write_all(kmip_with(&fifo).as_bytes()).unwrap();
    let refused = agent.verb(&["provider", "check", "kms"]).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(
        said.contains("fifo") && said.contains("is not a regular file"),
        "{said}"
    );
}

/// Every privilege against every call that takes one, by a real user who has that privilege and no other.
#[test]
fn a_privilege_allows_its_calls_and_no_others() {
    let privileges = [
        "Access",
        "EncryptNew",
        "ManageKeys",
        "Migrate",
        "ReadKeyServersInfo",
        "Recrypt",
        "RegisterVM",
    ];
    let grants: String = (privileges.iter().zip(SOMEBODY..))
        .map(|(privilege, user)| format!("[[grant]]\nuser = {user}\nprivileges = [{privilege:?}]\n"))
        .collect();
    let agent = Agent::new(&grants);
    let secret = SecretBytes::random(32).unwrap();
    let key_id = agent.provider(RequestPurpose::Recrypt).create_kek().unwrap();
    let wrapped = agent
        .provider(RequestPurpose::Recrypt)
        .wrap(&binding(&key_id), &secret)
        .unwrap();

    type Call<'c> = Box<dyn Fn() -> Result<(), KeyError> + Sync + 'c>;
    let on = |purpose| agent.provider(purpose);
    let unwrap = |purpose| -> Call<'_> {
        let (key_id, wrapped) = (&key_id, &wrapped);
        let provider = on(purpose);
        Box::new(move || provider.unwrap(&binding(key_id), wrapped).map(drop))
    };
    let wrap = |purpose| -> Call<'_> {
        let (key_id, secret) = (&key_id, &secret);
        let provider = on(purpose);
        Box::new(move || {
            // A key is one user's and one volume's: each gets one of its own, as CreateKek names it.
            let (identity, _) = key_id.0.split_once('.').unwrap();
            let own = KeyId(format!("{identity}.{}", Uuid::new_v4()));
            provider.wrap(&binding(&own), secret).map(drop)
        })
    };
    let create = |purpose| -> Call<'_> {
        let provider = on(purpose);
        Box::new(move || provider.create_kek().map(drop))
    };
    let (list, state, check) = (
        agent.client(RequestPurpose::Check),
        on(RequestPurpose::Access),
        on(RequestPurpose::Check),
    );
    let create_client = agent.client(RequestPurpose::Create);
    let created = create_client
        .clone()
        .at(Path::new("/nowhere"))
        .provider("native")
        .unwrap();
    let calls: Vec<(&str, &[&str], Call<'_>)> = vec![
        (
            "Unwrap to attach",
            &["RegisterVM"],
            unwrap(RequestPurpose::Attach),
        ),
        ("Unwrap to migrate", &["Migrate"], unwrap(RequestPurpose::Migrate)),
        ("Unwrap to access", &["Access"], unwrap(RequestPurpose::Access)),
        ("Unwrap to recrypt", &["Recrypt"], unwrap(RequestPurpose::Recrypt)),
        ("Wrap to create", &["EncryptNew"], wrap(RequestPurpose::Create)),
        ("Wrap to recrypt", &["Recrypt"], wrap(RequestPurpose::Recrypt)),
        (
            "CreateKek to create",
            &["EncryptNew"],
            create(RequestPurpose::Create),
        ),
        (
            "CreateKek to recrypt",
            &["Recrypt"],
            create(RequestPurpose::Recrypt),
        ),
        (
            "GetKekState",
            &["Access", "ManageKeys", "Recrypt"],
            Box::new(|| state.state(&key_id).map(drop)),
        ),
        (
            "CheckProvider",
            &["ReadKeyServersInfo"],
            Box::new(|| check.check()),
        ),
        (
            "ListProviders",
            &["ReadKeyServersInfo"],
            Box::new(|| list.list().map(drop)),
        ),
        (
            "ListDisks",
            &["ReadKeyServersInfo"],
            Box::new(|| list.disks().map(drop)),
        ),
        (
            "GetDefaultProvider to check",
            &["ReadKeyServersInfo"],
            Box::new(|| list.default_name().map(drop)),
        ),
        (
            "GetDefaultProvider to create",
            &["EncryptNew"],
            Box::new(|| create_client.default_name().map(drop)),
        ),
        (
            "SettleBinding to create",
            &["EncryptNew"],
            Box::new(|| created.settle(&binding(&key_id), true)),
        ),
        (
            "PushKek",
            &["ManageKeys"],
            Box::new(|| list.push("native", &key_id, &secret)),
        ),
    ];
    let mut refusals = 0;
    for (name, takes, call) in &calls {
        for (privilege, user) in privileges.iter().zip(SOMEBODY..) {
            let result = as_user(user, call);
            match takes.contains(privilege) {
                true => result.unwrap_or_else(|error| panic!("{name} with {privilege}: {error}")),
                false => {
                    let error = result.expect_err(&format!("{name} with {privilege}"));
                    assert_eq!(
                        error.reason,
                        KeyReason::NotPermitted,
                        "{name} with {privilege}: {error}"
                    );
                    refusals += 1;
                }
            }
        }
        call().unwrap_or_else(|error| panic!("{name} by root: {error}"));
    }
    let refused = agent
        .audit()
        .into_iter()
        .filter(|record| record["event"] == "KeyRefused");
    assert_eq!(refused.count(), refusals);

    // What a purpose is not for, its privilege is not good for either.
    for wrong in [
        unwrap(RequestPurpose::Create),
        wrap(RequestPurpose::Attach),
        create(RequestPurpose::Access),
    ] {
        let error = wrong().unwrap_err();
        assert_eq!(error.reason, KeyReason::Failed);
        assert!(
            std::error::Error::source(&error)
                .unwrap()
                .to_string()
                .contains("WrongPurpose")
        );
    }
}

// Whoever may serve disks could have the key of any volume whose header it could read.
#[test]
fn a_grant_for_some_volumes_opens_no_others() {
    let volumes = [7, 8].map(Uuid::from_u128);
    let agent = Agent::new(&format!(
        "[[grant]]\nuser = {SOMEBODY}\nprivileges = [\"RegisterVM\", \"Recrypt\"]\nvolumes = [\"{}\"]\n\
         [[grant]]\ngroup = {GROUP}\nprivileges = [\"RegisterVM\"]\n",
        volumes[0]
    ));
    let provider = |purpose| agent.provider(purpose);
    let secret = SecretBytes::random(32).unwrap();
    let keys = volumes.map(|volume| {
        let creator = provider(RequestPurpose::Create);
        let key_id = creator.create_kek().unwrap();
        let binding = Binding {
            volume,
            ..binding(&key_id)
        };
        let wrapped = creator.wrap(&binding, &secret).unwrap();
        (volume, key_id, wrapped)
    });
    let unwrap = |purpose, named: Uuid, (_, key_id, wrapped): &(Uuid, KeyId, Vec<u8>)| {
        let binding = Binding {
            volume: named,
            ..binding(key_id)
        };
        provider(purpose).unwrap(&binding, wrapped).map(drop)
    };
    let [own, other] = &keys;
    let not_permitted = |result: Result<(), KeyError>, volume| {
        let error = result.unwrap_err();
        assert_eq!(error.reason, KeyReason::NotPermitted, "{error}");
        std::error::Error::source(&error)
            .unwrap()
            .to_string()
            .contains(&format!("for volume {volume}"))
    };
    as_user(SOMEBODY, || {
        for purpose in [RequestPurpose::Attach, RequestPurpose::Recrypt] {
            unwrap(purpose, own.0, own).unwrap();
            assert!(not_permitted(unwrap(purpose, other.0, other), other.0));
            // Under the name of its own, it does not open.
            let error = unwrap(purpose, own.0, other).unwrap_err();
            assert_eq!(error.reason, KeyReason::Unauthentic, "{error}");
        }
        assert!(!not_permitted(unwrap(RequestPurpose::Access, own.0, own), own.0));
        let recrypt = provider(RequestPurpose::Recrypt);
        let key_id = recrypt.create_kek().unwrap();
        let wrap = |volume| {
            let binding = Binding {
                volume,
                ..binding(&key_id)
            };
            recrypt.wrap(&binding, &secret).map(drop)
        };
        assert!(not_permitted(wrap(other.0), other.0));
        wrap(own.0).unwrap();
    });
    as_user(GROUP, || unwrap(RequestPurpose::Attach, other.0, other)).unwrap();
}

#[test]
fn members_of_a_group_have_its_privileges_and_strangers_are_told_what_they_lack() {
    let agent = Agent::new(&format!(
        "[[grant]]\ngroup = {GROUP}\nprivileges = [\"EncryptNew\"]"
    ));
    let create = || agent.provider(RequestPurpose::Create).create_kek();
    as_user(GROUP, create).unwrap();
    let error = as_user(SOMEBODY, create).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, format!("user {SOMEBODY} lacks the privilege EncryptNew"));
    let record = agent.audit().pop().unwrap();
    assert_eq!(record["event"], "KeyRefused");
    assert_eq!(record["user"], SOMEBODY);
    assert_eq!(record["process"], std::process::id());
}

#[test]
fn the_audit_log_tells_what_was_changed_and_an_agent_does_not_go_on_with_it() {
    let mut agent = Agent::new("");
    for _ in 0..3 {
        agent.provider(RequestPurpose::Create).create_kek().unwrap();
    }
    let verify = |args: &[&str]| {
        let mut command = Command::new(sealblk_path());
        command
            .current_dir(agent.path(""))
            .args(["--state-dir", "state", "audit", "verify"])
            .args(args);
        command.output().unwrap()
    };
    let sound = verify(&[]);
    assert!(sound.status.success());
    let said = String::from_utf8(sound.stdout).unwrap();
    let head = said.split_whitespace().last().unwrap().to_owned();
    agent.provider(RequestPurpose::Create).create_kek().unwrap();
    assert!(verify(&["--head", &head]).status.success());

    let log = agent.path("state/audit.log");
    let whole = fs::read_to_string(&log).unwrap();
    let cut = whole
        .lines()
        .take(3)
        .map(|line| format!("{line}\n"))
        .collect::<String>();
    fs::write(&log, cut).unwrap();
    let refused = verify(&["--head", &head]);
    assert_eq!(refused.status.code(), Some(3));
    assert!(
        String::from_utf8(refused.stderr)
            .unwrap()
            .contains("was truncated")
    );

    agent.stop();
    fs::write(&log, whole.replacen("KeyCreated", "KeyRemoved", 1)).unwrap();
    let refused = Command::new(sealblk_path())
        .current_dir(agent.path(""))
        .args(["--state-dir", "state", "--config", "config.toml", "agent"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(3));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("line 3"));
    fs::write(&log, whole).unwrap();
    agent.start();
}

/// Nothing is given out that cannot be logged.
#[test]
fn keys_wait_while_the_audit_log_cannot_be_written() {
    let agent = Agent::new("");
    let key_id = agent.provider(RequestPurpose::Create).create_kek().unwrap();
    let secret = SecretBytes::random(32).unwrap();
    let wrapped = agent
        .provider(RequestPurpose::Create)
        .wrap(&binding(&key_id), &secret)
        .unwrap();
    // As on a full disk: the agent may write no byte more to a file.
    let pid = rustix::process::Pid::from_child(&agent.child);
    let limit = |bytes| {
        let limit = rustix::process::Rlimit {
            current: bytes,
            maximum: None,
        };
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Fsize, limit).unwrap()
    };
    let len = fs::metadata(agent.path("state/audit.log")).unwrap().len();
    limit(Some(len + 20));
    let unwrap = || {
        agent
            .provider(RequestPurpose::Attach)
            .unwrap(&binding(&key_id), &wrapped)
    };
    let refused = |why: &str| {
        let error = unwrap().unwrap_err();
        assert_eq!(error.reason, KeyReason::Failed);
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("audit log") && cause.contains(why), "{cause}");
    };
    for _ in 0..2 {
        refused("cannot be written");
    }
    limit(None);
    assert!(unwrap().unwrap().ct_eq(&secret));
    // A log that somebody has moved would be read by nobody.
    let (log, moved) = (agent.path("state/audit.log"), agent.path("moved"));
    fs::rename(&log, &moved).unwrap();
    refused("moved");
    assert!(!log.exists());
    fs::rename(&moved, &log).unwrap();
    assert!(unwrap().unwrap().ct_eq(&secret));
    assert_eq!(agent.audit().pop().unwrap()["event"], "KeyReleased");
}

#[test]
fn callers_that_send_nonsense_or_nothing_keep_nobody_out() {
    let agent = Agent::new("");
    let connect = || UnixStream::connect(agent.path("agent.sock")).unwrap();
    for nonsense in [
        &b"\0"[..],
        b"{}\0",
        b"[1]\0",
        b"{\"method\":1}\0",
        b"\xff\xfe\0",
        b"GET / HTTP/1.1\r\n\r\n\0",
    ] {
        let mut stream = connect();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(nonsense).unwrap();
        // It hangs up, or, where it is a call, says what is wrong with it.
        let mut said = Vec::new();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.read_to_end(&mut said).unwrap();
        assert!(
            said.is_empty() || String::from_utf8_lossy(&said).contains("error"),
            "{said:?}"
        );
    }
    // A user takes all places that one user gets, and more.
    let silent: Vec<_> = as_user(SOMEBODY, || (0..700).map(|_| connect()).collect());
    let mut last = &silent[699];
    last.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(last.read(&mut [0]).unwrap_or(0), 0, "it is turned away");
    let listed = run(&mut agent.verb(&["provider", "list"])).stdout;
    assert!(String::from_utf8(listed).unwrap().contains("usable"));
}

/// The kernel tells when a process has ended, whatever ended it. Guests outlive the agent, which knows of them when it is back.
#[test]
fn served_volumes_are_known_until_their_processes_end() {
    let mut agent = Agent::new("kek-grace = 0\n");
    let [one, two] = [(); 2].map(|()| Server::of(agent.volume(), &[]));
    let before = list(&agent);
    agent.restart();
    let listed = || list(&agent);
    assert_eq!(listed(), before);
    let disks = before["disks"].as_array().unwrap().clone();
    let processes: Vec<_> = disks
        .iter()
        .map(|disk| disk["process"].as_u64().unwrap())
        .collect();
    assert_eq!(processes.len(), 2, "{disks:?}");
    for server in [&one, &two] {
        assert!(processes.contains(&u64::from(server.process.pid())));
    }
    one.process.signal(rustix::process::Signal::KILL);
    drop(two);
    let started = Instant::now();
    while listed() != serde_json::json!({ "disks": [] }) {
        assert!(started.elapsed() < common::DEADLINE, "{}", listed());
        thread::sleep(Duration::from_millis(50));
    }
    let ended: Vec<_> = agent
        .audit()
        .into_iter()
        .filter(|record| record["event"] == "DiskUnregistered")
        .collect();
    assert!(
        ended.len() == 2 && ended.iter().all(|record| record["keyDropped"] == true),
        "{ended:?}"
    );
    let text = String::from_utf8(run(&mut agent.verb(&["list", "--keys"])).stdout).unwrap();
    assert_eq!(text, "no volume with a key from the agent is being served\n");
}

/// A volume that is rekeyed while it is served is listed under its new key, and the agent lets go of the old one.
#[test]
fn served_volume_that_is_rekeyed_is_listed_under_its_new_key() {
    let agent = Agent::new("");
    let volume = agent.volume();
    let control = volume.beside("control").display().to_string();
    let server = Server::of(volume, &["--control-socket", &control]);
    let key = || list(&agent)["disks"][0]["keyId"].clone();
    let before = key();
    run(&mut agent.verb(&["rekey", "--control-socket", &control]));
    let disk = server.volume().path.display().to_string();
    let info: Value =
        serde_json::from_slice(&run(&mut agent.verb(&["info", "--json", &disk])).stdout).unwrap();
    assert_ne!(key(), before);
    assert!(info.to_string().contains(&key().to_string()), "{info}");
}

/// As on a large host: more than one answer has room for.
#[test]
fn a_thousand_served_volumes_are_listed() {
    let mut agent = Agent::new("");
    let one = Server::of(agent.volume(), &[]);
    let files = fs::read_dir(agent.path("state/served")).unwrap();
    let file = files.map(|file| file.unwrap().path()).next().unwrap();
    agent.stop();
    let mut filed: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for n in 1..1000 {
        let volume = Uuid::from_u128(n);
        filed["volume"] = volume.to_string().into();
        filed["keyId"] = format!("{n}:{}", "x".repeat(1000)).into();
        let name = format!("{volume}.{}.json", one.process.pid());
        fs::write(file.with_file_name(name), filed.to_string()).unwrap();
    }
    agent.start();
    let disks = list(&agent)["disks"].as_array().unwrap().clone();
    let volumes: std::collections::BTreeSet<_> =
        disks.iter().map(|disk| disk["volume"].to_string()).collect();
    assert_eq!((disks.len(), volumes.len()), (1000, 1000));
}

/// What nobody has must not fill the log, and who asks for it again and again must not either.
#[test]
fn names_that_cannot_be_and_endless_failures_do_not_fill_the_log() {
    let agent = Agent::new(&format!(
        "[[grant]]\nuser = {SOMEBODY}\nprivileges = [\"RegisterVM\"]\n"
    ));
    let before = agent.audit().len();
    as_user(SOMEBODY, || {
        let provider = agent.provider(RequestPurpose::Attach);
        for key_id in ["\u{1}".repeat(100), "k".repeat(5000), "\u{e4}".into()] {
            let error = provider.unwrap(&binding(&KeyId(key_id)), &[0; 64]).unwrap_err();
            assert_eq!(error.reason, KeyReason::Missing);
        }
        for n in 0..300 {
            let key_id = KeyId(format!("no-key-{n}"));
            provider.unwrap(&binding(&key_id), &[0; 64]).unwrap_err();
        }
        // Of each disk it is told, however many there are.
        for n in 0..200 {
            let volume = Uuid::from_u128(1000 + n);
            let key_id = KeyId("no-key".into());
            let binding = Binding {
                volume,
                ..binding(&key_id)
            };
            provider.unwrap(&binding, &[0; 64]).unwrap_err();
        }
    });
    let after = agent.audit();
    let failed = after.iter().filter(|record| record["event"] == "KeyMissing");
    assert_eq!((failed.count(), after.len()), (210, before + 210));
}

fn list(agent: &Agent) -> Value {
    serde_json::from_slice(&run(&mut agent.verb(&["list", "--keys", "--json"])).stdout).unwrap()
}

/// As after a reboot of a host. `ATTACHES` asks for more than the few that there is time for.
#[test]
fn a_storm_of_attaches_is_answered() {
    let attaches: u32 = std::env::var("ATTACHES").map_or(200, |attaches| attaches.parse().unwrap());
    let agent = Agent::new("");
    let key_id = agent.provider(RequestPurpose::Create).create_kek().unwrap();
    let secret = SecretBytes::random(32).unwrap();
    let wrapped = agent
        .provider(RequestPurpose::Create)
        .wrap(&binding(&key_id), &secret)
        .unwrap();
    let (before, started) = (agent.memory_kib(), Instant::now());
    thread::scope(|scope| {
        for _ in 0..attaches {
            scope.spawn(|| {
                let unwrapped = agent
                    .provider(RequestPurpose::Attach)
                    .unwrap(&binding(&key_id), &wrapped);
                assert!(unwrapped.unwrap().ct_eq(&secret));
            });
        }
    });
    let (took, after) = (started.elapsed(), agent.memory_kib());
    println!("{attaches} attaches: {took:?}, the agent's memory {before} KiB before, {after} KiB after");
    let released = agent
        .audit()
        .into_iter()
        .filter(|record| record["event"] == "KeyReleased");
    assert_eq!(released.count(), attaches as usize);
    assert!(
        after < before + 64 * 1024,
        "{before} KiB before, {after} KiB after"
    );
}

/// The agent has the primary key in memory: what is bound to it then opens until the agent ends, and never again.
#[test]
fn no_disk_is_bound_to_a_primary_key_whose_file_is_gone() {
    let agent = Agent::new("");
    run(&mut agent.verb(&["create", "vm", "--size", "1M", "--recovery-key", "vm.key"]));
    let file = agent.path("state/providers/native/primary.key");
    let content = fs::read(&file).unwrap();
    let mut damaged = content.clone();
    damaged[20] ^= 1;
    for broken in [None, Some(damaged)] {
        let _ = fs::remove_file(&file);
        if let Some(content) = broken {
            fs::write(&file, content).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        }
        for verb in [
            &["create", "new", "--size", "1M"][..],
            &["rekey", "vm"],
            &["provider", "check", "native"],
            &["recovery", "remove", "vm", "--recovery-key", "vm.key"],
        ] {
            let output = agent.verb(verb).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(
                !output.status.success() && stderr.contains("native/primary.key"),
                "{verb:?}: {stderr}"
            );
        }
    }
    fs::write(&file, &content).unwrap();
    run(&mut agent.verb(&["rekey", "vm"]));
    run(&mut agent.verb(&["recovery", "remove", "vm", "--recovery-key", "vm.key"]));
}

/// The agent's unit has a user of its own, and root sets its providers up: what root made, the agent could not read.
#[test]
fn root_sets_up_the_state_directory_of_an_agent_that_runs_as_another_user() {
    const USER: u32 = 4242;
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root makes files for others");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    chown(dir.path(), Some(USER), Some(USER)).unwrap();
    fs::create_dir(path("state")).unwrap();
    fs::set_permissions(path("state"), fs::Permissions::from_mode(0o700)).unwrap();
    chown(path("state"), Some(USER), Some(USER)).unwrap();
    fs::write(
        path("config.toml"),
        format!("[agent]\nsocket = {:?}\n", path("agent.sock")),
    )
    .unwrap();
    let sealblk = install(dir.path());
    let verb = |args: &[&str]| {
        let mut command = Command::new(&sealblk);
        command
            .current_dir(&dir)
            .args(["--config", "config.toml"])
            .args(args);
        command
    };
    let set_up = |args: &[&str]| run(&mut verb(&[&["--state-dir", "state", "provider"], args].concat()));
    set_up(&["add", "native", "--no-backup"]);
    set_up(&["add", "native", "--name", "other", "--no-backup"]);
    set_up(&["remove", "other", "--force", "--confirm", "other"]);
    let mut found = vec![path("state")];
    while let Some(at) = found.pop() {
        let metadata = fs::symlink_metadata(&at).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (USER, USER), "{}", at.display());
        if metadata.is_dir() {
            found.extend(fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().path()));
        }
    }

    let mut agent = verb(&["--state-dir", "state", "agent"]);
    let mut agent = Process::spawn(agent.uid(USER).gid(USER));
    agent.wait_stderr("the agent answers");
    run(&mut verb(&["create", "vm", "--size", "1M"]));
    run(&mut verb(&["rekey", "vm"]));
    agent.signal(rustix::process::Signal::TERM);
    assert!(agent.wait().status.success());
    // Others' files in it are not root's to use, be the directory whose it may.
    chown(path("state/providers/native/primary.key"), Some(USER + 1), None).unwrap();
    let refused = verb(&["--state-dir", "state", "provider", "check", "native"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("belongs to user 4243"),
        "{said}"
    );
}

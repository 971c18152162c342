//! A served disk and its key: taken away and brought back under load, missing at the start, changed while a driver is at
//! work. The driver's requests wait meanwhile; none fails, and none is lost.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use common::driver::{Data, Driver, S_IOERR, S_OK, T_IN, T_OUT};
use common::frontend::{SET_CONFIG, VERSION};
use common::pattern;
use common::process::Process;
use common::secrets::{Core, Search, core, readable_memory, slot_secret, volume_key, without_secret_memory};
use common::serve::{Server, sealblk_path, serve, serve_fails};
use common::storage::LoopDevice;
use common::volume::{MIB, Volume, run};
use sealblk::providers::registry::Registry;
use serde_json::Value;

/// Long enough for a request to be answered, if it were to be.
const A_WHILE: Duration = Duration::from_millis(300);

#[test]
fn requests_wait_while_the_disk_is_locked_and_go_on_when_it_is_unlocked() {
    let disk = Served::new();
    let mut driver = disk.server.connect();
    let bytes = pattern(1, 64 * 1024);
    driver.write(0, &bytes);
    for _ in 0..3 {
        disk.does("lock");
        assert_eq!(disk.status()["state"], "locked");
        assert_eq!(disk.status()["lock"]["by"], "operator");
        let read = driver.submit(0, T_IN, 0, Data::In(bytes.len()));
        let write = driver.submit(0, T_OUT, 1000, Data::Out(&bytes));
        thread::sleep(A_WHILE);
        assert!(driver.queue().poll_used().is_none(), "a locked disk answered");
        // What needs no key is answered.
        assert_eq!(driver.capacity(), 64 * MIB / 512);
        disk.does("lock");

        disk.does("unlock");
        assert_eq!(disk.status()["state"], "open");
        assert_eq!(disk.status()["lock"], Value::Null);
        let mut done = driver.queue().wait_used_many(2);
        done.sort_by_key(|used| used.head != read.head);
        let read = driver.outcome(&read, done[0]);
        assert_eq!((read.status, read.data == bytes), (S_OK, true));
        assert_eq!(driver.outcome(&write, done[1]).status, S_OK);
        assert!(driver.read(1000, bytes.len()) == bytes);
        disk.does("unlock");
    }
    disk.server.still_serves_both(driver);
}

/// A lock in the middle of requests: those in flight end, the others wait.
#[test]
fn a_lock_under_load_loses_nothing() {
    let disk = Served::new();
    let mut driver = disk.server.connect();
    let bytes: Vec<Vec<u8>> = (0..64).map(|seed| pattern(seed, 4096)).collect();
    for round in 0..20_u64 {
        let sector = |n: usize| 8 * (64 * (round % 8) + n as u64);
        let submit = |driver: &mut Driver, n: usize| driver.submit(0, T_OUT, sector(n), Data::Out(&bytes[n]));
        let mark = driver.memory.mark();
        let early: Vec<_> = (0..16).map(|n| submit(&mut driver, n)).collect();
        disk.does("lock");
        let late: Vec<_> = (16..32).map(|n| submit(&mut driver, n)).collect();
        disk.does("unlock");
        let used = driver.queue().wait_used_many(32);
        for pending in early.iter().chain(&late) {
            let used = used.iter().find(|used| used.head == pending.head).unwrap();
            assert_eq!(driver.outcome(pending, *used).status, S_OK);
        }
        driver.memory.free_to(mark);
        for (n, bytes) in bytes.iter().enumerate().take(32) {
            assert!(
                driver.read(sector(n), 4096) == *bytes,
                "round {round}, request {n}"
            );
        }
    }
}

#[test]
fn front_ends_come_and_go_while_the_disk_is_locked() {
    let disk = Served::new();
    disk.server.connect().still_serves();
    disk.does("lock");
    for _ in 0..3 {
        let mut driver = disk.server.connect();
        let pending = driver.submit(0, T_IN, 0, Data::In(4096));
        thread::sleep(A_WHILE / 3);
        assert!(driver.queue().poll_used().is_none());
        // The ring is given back as it was: the chain was not taken.
        assert_eq!(driver.frontend.stop_vring(0), 0);
        let _ = pending;
    }
    disk.server.wait_idle();
    disk.does("unlock");
    disk.server.still_serves();
    disk.does("lock");
    assert!(disk.server.stop().stderr.contains("locked"));
}

/// A header of the same UUID and passphrase that has another volume key: what the guest wrote before would be noise to it, and
/// what it writes from then on would be under a key of somebody else's choice.
#[test]
fn a_header_with_another_volume_key_is_not_gone_on_with() {
    let volume = Volume::cryptsetup(4 * MIB, 512);
    let info = |volume: &Volume| -> Value {
        let output = run(Command::new(sealblk_path())
            .args(["info", "--json"])
            .arg(&volume.path));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let other = Volume::cryptsetup(4 * MIB, 512);
    let uuid = info(&volume)["uuid"].as_str().unwrap().to_owned();
    run(Command::new("cryptsetup")
        .args(["luksUUID", "--batch-mode", "--uuid", &uuid])
        .arg(&other.path));
    let (path, len) = (volume.path.clone(), 16 * MIB as usize);
    let (header, others) = (volume.stored(0, len), other.stored(0, len));
    let overwrite = |header: &[u8]| {
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(header, 0).unwrap();
        file.sync_all().unwrap();
    };
    let disk = Served::of(volume);
    disk.server.still_serves();
    disk.does("lock");
    overwrite(&others);
    let output = disk.run("unlock");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && stderr.contains("its volume key has changed"),
        "{stderr}"
    );
    assert_eq!(disk.status()["state"], "locked");
    overwrite(&header);
    disk.does("unlock");
    disk.server.still_serves();
}

/// The disk stayed locked, and who did as the error said put an old header back, without the keys of today.
#[test]
fn a_disk_that_has_become_longer_is_unlocked_and_a_shorter_one_is_not() {
    let volume = Volume::cryptsetup(4 * MIB, 512);
    let path = volume.path.clone();
    let len = fs::metadata(&path).unwrap().len();
    let set_len = |len| {
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(len)
            .unwrap()
    };
    let disk = Served::of(volume);
    let mut driver = disk.server.connect();
    let bytes = pattern(1, 64 * 1024);
    driver.write(0, &bytes);
    for longer in [MIB, 3 * MIB + 512] {
        disk.does("lock");
        set_len(len + longer);
        disk.does("unlock");
        assert_eq!(disk.status()["capacity"], 4 * MIB);
        assert!(driver.read(0, bytes.len()) == bytes);
        let beyond = driver.run(T_IN, 4 * MIB / 512, Data::In(512));
        assert_eq!(beyond.status, S_IOERR);
    }

    disk.does("lock");
    set_len(len - MIB);
    let output = disk.run("unlock");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = "had 4194304 bytes when it was attached, and now has 3145728";
    assert!(!output.status.success() && stderr.contains(said), "{stderr}");
    set_len(len);
    disk.does("unlock");
    assert!(driver.read(0, bytes.len()) == bytes);
    disk.server.still_serves_both(driver);
}

// Each piece of a message had a time of its own: a front-end that sent a byte every few seconds kept its rings, and the key
// with them, for hours.
#[test]
fn a_front_end_in_the_middle_of_a_message_delays_no_lock_and_is_left_when_its_time_is_over() {
    let disk = Served::new();
    let driver = disk.server.connect();
    let header = [SET_CONFIG, VERSION, 4000].map(u32::to_ne_bytes).concat();
    driver.frontend.send_bytes(&header, &[]);
    let drips = thread::spawn(move || {
        while driver.frontend.try_send_bytes(&[0], &[]).is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    for _ in 0..3 {
        disk.does("lock");
        disk.does("unlock");
    }
    assert!(!drips.is_finished(), "the lock has waited for the message");
    drips.join().unwrap();
    disk.server.still_serves();
    let told = disk.server.stop().stderr;
    assert!(told.contains("a message that has begun does not end"), "{told}");
}

/// The process is searched without the memory that hides keys from those who look, so that what is found before the lock
/// shows that the search finds: by the process's memory, and by a core dump.
#[test]
fn a_disk_locked_under_load_has_no_key_in_memory_nor_in_a_core_dump() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to look");
        return;
    }
    let volume = Volume::new();
    let registry = Registry::open(&volume.beside("state")).unwrap();
    let search = Search::default()
        .xts_key("volume key", &volume_key(&volume))
        .key("slot secret", &slot_secret(&volume.path, &registry));
    let control = volume.beside("control");
    let socket = volume.beside("vhost.sock");
    let mut command = serve(&volume, &socket, &["--control-socket", control.to_str().unwrap()]);
    without_secret_memory(&mut command);
    let process = Process::spawn(&mut command);
    let start = Instant::now();
    while !socket.exists() {
        assert!(start.elapsed() < Duration::from_secs(30), "{}", process.stderr());
        thread::sleep(Duration::from_millis(5));
    }
    let mut driver = Driver::connect(&socket);
    driver.still_serves();
    for memory in [
        readable_memory(process.pid()),
        core(process.pid(), Core::Everything),
    ] {
        let found = search.found(&memory);
        let data = (0..28).map(|n| format!("volume key, round key {n} for data"));
        let tweak = (0..15).map(|n| format!("volume key, round key {n} for tweak"));
        for round_key in data.chain(tweak) {
            assert!(
                found.contains(round_key.as_str()),
                "{round_key} is there, and not found"
            );
        }
    }
    search.assert_absent(
        &core(process.pid(), Core::AsTheKernel),
        "a core dump of an open disk",
    );

    let verb = |name: &str| {
        let mut command = Command::new(sealblk_path());
        run(command.args([name, "--control-socket"]).arg(&control));
    };
    for round in 0..3 {
        let contents: Vec<_> = (0..40).map(|n| pattern(100 * round + n, 4096)).collect();
        let mark = driver.memory.mark();
        let write =
            |driver: &mut Driver, n: usize| driver.submit(0, T_OUT, 8 * n as u64, Data::Out(&contents[n]));
        let mut pending: Vec<_> = (0..28).map(|n| write(&mut driver, n)).collect();
        verb("lock");
        pending.extend((28..40).map(|n| write(&mut driver, n)));
        search.assert_absent(&readable_memory(process.pid()), "memory");
        search.assert_absent(&core(process.pid(), Core::Everything), "a core dump");
        let mut used = Vec::new();
        while let Some(done) = driver.queue().poll_used() {
            used.push(done);
        }
        assert!(used.len() <= 28, "a locked disk answered");
        verb("unlock");
        used.extend(driver.queue().wait_used_many(40 - used.len()));
        for pending in &pending {
            let used = used.iter().find(|used| used.head == pending.head).unwrap();
            assert_eq!(driver.outcome(pending, *used).status, S_OK);
        }
        driver.memory.free_to(mark);
        for (n, content) in contents.iter().enumerate() {
            assert!(
                driver.read(8 * n as u64, 4096) == *content,
                "round {round}, request {n}"
            );
        }
    }
}

#[test]
fn a_disk_whose_key_is_away_is_locked_with_the_reason_and_unlocks_by_itself() {
    let volume = Volume::new();
    let primary = volume.beside("state/providers/native/primary.key");
    let away = volume.beside("away");
    fs::rename(&primary, &away).unwrap();
    let disk = Served::of(volume);
    let status = disk.status();
    assert_eq!(status["state"], "locked");
    let lock = &status["lock"];
    assert_eq!(
        (&lock["by"], &lock["reason"]),
        (&"no_key".into(), &"missing".into())
    );
    assert_eq!(lock["provider"], "native");
    assert_eq!(lock["hop"], primary.to_str().unwrap());
    assert!(
        disk.verb("status").contains("no such key"),
        "{}",
        disk.verb("status")
    );

    let mut driver = disk.server.connect();
    assert_eq!(driver.capacity(), 64 * MIB / 512);
    let read = driver.submit(0, T_IN, 0, Data::In(4096));
    let refused = disk.run("unlock");
    assert_eq!(refused.status.code(), Some(4));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("no such key"));
    assert!(driver.queue().poll_used().is_none());

    fs::rename(&away, &primary).unwrap();
    let used = driver.queue().wait_used();
    assert_eq!(driver.outcome(&read, used).status, S_OK);
    driver.still_serves();
    assert_eq!(disk.status()["state"], "open");
}

/// A guest whose QEMU could not connect hung, and the status was as with one that runs.
#[test]
fn status_tells_whether_a_front_end_is_connected() {
    let disk = Served::of(Volume::new());
    assert_eq!(disk.status()["frontEnd"]["connected"], false);
    assert!(disk.verb("status").contains("not connected"));
    let driver = disk.server.connect();
    let told = disk.status();
    assert_eq!(told["frontEnd"]["connected"], true, "{told}");
    let since = told["frontEnd"]["since"].as_str().unwrap();
    let text = disk.verb("status");
    assert!(text.contains(&format!("connected since {since}")), "{text}");
    drop(driver);
    disk.server.wait_idle();
    assert_eq!(
        disk.status()["frontEnd"],
        serde_json::json!({ "connected": false, "since": null })
    );
}

#[test]
fn an_operators_lock_stands_when_the_key_comes_back() {
    let volume = Volume::new();
    let primary = volume.beside("state/providers/native/primary.key");
    let away = volume.beside("away");
    fs::rename(&primary, &away).unwrap();
    let disk = Served::of(volume);
    disk.does("lock");
    fs::rename(&away, &primary).unwrap();
    thread::sleep(Duration::from_secs(3));
    assert_eq!(disk.status()["lock"]["by"], "operator");
    disk.does("unlock");
    disk.server.still_serves();
}

#[test]
fn a_key_that_cannot_come_back_or_that_nobody_waits_for_ends_the_process() {
    let volume = Volume::new();
    let primary = volume.beside("state/providers/native/primary.key");
    fs::rename(&primary, volume.beside("away")).unwrap();
    let ended = serve_fails(&volume, &["--no-wait"]);
    assert_eq!(ended.status.code(), Some(4), "{}", ended.stderr);
    fs::remove_file(volume.beside("state/providers.toml")).unwrap();
    let ended = serve_fails(&volume, &[]);
    assert_eq!(ended.status.code(), Some(4), "{}", ended.stderr);
    assert!(ended.stderr.contains("no such key provider"), "{}", ended.stderr);
}

#[test]
fn a_served_disk_is_rekeyed_and_the_driver_does_not_notice() {
    let disk = Served::new();
    let volume = disk.server.volume();
    let mut driver = disk.server.connect();
    let token = |volume: &Volume| {
        let mut dump = Command::new("cryptsetup");
        let dump = run(dump.args(["luksDump", "--dump-json-metadata"]).arg(&volume.path)).stdout;
        let metadata: Value = serde_json::from_slice(&dump).unwrap();
        let tokens = metadata["tokens"].as_object().unwrap();
        assert_eq!(tokens.len(), 1);
        tokens.values().next().unwrap()["key_id"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let bytes = pattern(3, 4096);
    let mut before = token(volume);
    thread::scope(|scope| {
        let rekeys = scope.spawn(|| (0..5).map(|_| disk.verb("rekey")).collect::<Vec<_>>());
        let mut n = 0;
        while !rekeys.is_finished() {
            driver.write(8 * (n % 1000), &bytes);
            assert!(driver.read(8 * (n % 1000), 4096) == bytes);
            n += 1;
        }
        for told in rekeys.join().unwrap() {
            let after = told
                .split("key ")
                .nth(1)
                .unwrap()
                .split_whitespace()
                .next()
                .unwrap();
            assert!(
                told.contains(&format!("no longer     provider \"native\", key {before}")),
                "{told}"
            );
            before = after.to_owned();
        }
    });
    assert_eq!(token(volume), before);
    disk.does("lock");
    let refused = disk.run("rekey");
    assert_eq!(refused.status.code(), Some(7));
    assert!(
        String::from_utf8(refused.stderr)
            .unwrap()
            .contains("unlock it first")
    );
    disk.does("unlock");
    disk.server.still_serves_both(driver);
}

/// The key came into force for a moment after somebody had locked the disk, and the guest's requests were served.
#[test]
fn a_key_that_was_asked_for_before_a_lock_does_not_come_into_force() {
    let mut volume = Volume::cryptsetup(8 * MIB, 512);
    let (passphrase, pipe) = (
        fs::read(volume.beside("passphrase")).unwrap(),
        volume.beside("pipe"),
    );
    run(Command::new("mkfifo").arg(&pipe));
    volume.open = vec!["--passphrase-file".into(), pipe.display().to_string()];
    // Opened when somebody reads it.
    let answer = || fs::File::options().write(true).open(&pipe).unwrap();
    let disk = thread::scope(|scope| {
        scope.spawn(|| answer().write_all(&passphrase).unwrap());
        Served::of(volume)
    });
    let mut driver = disk.server.connect();
    driver.still_serves();
    disk.does("lock");
    let read = driver.submit(0, T_IN, 0, Data::In(4096));
    thread::scope(|scope| {
        let unlock = scope.spawn(|| disk.run("unlock"));
        let mut asked = answer();
        let lock = scope.spawn(|| disk.run("lock"));
        let begun = Instant::now();
        while disk.status()["state"] != "locking" {
            assert!(begun.elapsed() < Duration::from_secs(30), "{}", disk.status());
            thread::sleep(Duration::from_millis(5));
        }
        asked.write_all(&passphrase).unwrap();
        drop(asked);
        assert!(lock.join().unwrap().status.success());
        let refused = unlock.join().unwrap();
        assert_eq!(refused.status.code(), Some(7));
        let told = String::from_utf8(refused.stderr).unwrap();
        assert!(
            told.contains("the disk was locked while its key was fetched"),
            "{told}"
        );
    });
    assert_eq!(disk.status()["state"], "locked");
    thread::sleep(A_WHILE);
    assert!(driver.queue().poll_used().is_none(), "a locked disk answered");
    thread::scope(|scope| {
        scope.spawn(|| answer().write_all(&passphrase).unwrap());
        disk.does("unlock");
    });
    let used = driver.queue().wait_used();
    assert_eq!(driver.outcome(&read, used).status, S_OK);
    disk.server.still_serves_both(driver);
}

/// A header was read from this host's page cache, from before another host that has the same LUN changed it, and written
/// back: that undid the other's change.
#[test]
fn a_rekey_keeps_what_another_host_has_changed() {
    let mut volume = Volume::new();
    let file = volume.path.clone();
    let Some(here) = LoopDevice::over(&file, 512) else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    volume.path = here.path().to_owned();
    let disk = Served::of(volume);
    // Two devices over one file have each a page cache, as two hosts have. It comes second: a file with two would not be served.
    let there = LoopDevice::over(&file, 512).unwrap();
    let cryptsetup = |args: &[&str]| run(Command::new("cryptsetup").args(args).arg(there.path())).stdout;
    let labelled = |label: &str| {
        let dump = String::from_utf8(cryptsetup(&["luksDump"])).unwrap();
        dump.lines()
            .any(|line| line.starts_with("Label:") && line.ends_with(label))
    };
    for label in ["one", "two"] {
        cryptsetup(&["config", "--label", label]);
        disk.does("rekey");
        assert!(labelled(label), "{label:?} was undone");
    }
    disk.does("lock");
    disk.does("unlock");
    disk.server.still_serves();
    disk.server.stop();
}

#[test]
fn strangers_may_look_and_not_lock() {
    let config = |grants: &str, volume: &Volume| {
        let path = volume.beside("config.toml");
        fs::write(&path, grants).unwrap();
        path.display().to_string()
    };
    let volume = Volume::new();
    let mut granted = String::new();
    for (user, privilege) in [(4_000_001, "RegisterVM"), (4_000_002, "Recrypt")] {
        granted += &format!("[[grant]]\nuser = {user}\nprivileges = [{privilege:?}]\n");
    }
    let info = run(Command::new(sealblk_path())
        .args(["info", "--json"])
        .arg(&volume.path));
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    let other = Value::from(uuid::Uuid::nil().to_string());
    for (user, volume) in [(4_000_004, &info["uuid"]), (4_000_005, &other)] {
        granted +=
            &format!("[[grant]]\nuser = {user}\nprivileges = [\"RegisterVM\"]\nvolumes = [{volume}]\n");
    }
    let config = config(&granted, &volume);
    let disk = Served::with(volume, &["--config", &config, "--control-socket-mode", "666"]);
    for (user, verb, allowed) in [
        (4_000_001, "lock", true),
        (4_000_001, "unlock", true),
        (4_000_001, "rekey", false),
        (4_000_002, "rekey", true),
        (4_000_002, "lock", false),
        (4_000_002, "unlock", false),
        (4_000_003, "lock", false),
        (4_000_003, "unlock", false),
        (4_000_003, "rekey", false),
        (4_000_003, "status", true),
        (4_000_004, "lock", true),
        (4_000_004, "unlock", true),
        (4_000_005, "lock", false),
    ] {
        let socket = disk.control.clone();
        let result = common::secrets::as_user(user, move || {
            let method = match verb {
                "status" => "GetStatus".to_owned(),
                verb => verb[..1].to_uppercase() + &verb[1..],
            };
            let stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
            let mut connection = sealblk::control::wire::Connection::new(stream, Duration::from_secs(30));
            let method = format!("org.sealblk.Disk.{method}");
            let parameters = serde_json::json!({});
            sealblk::control::varlink::call::<Value>(&mut connection, &method, parameters, &[])
                .map(drop)
                .map_err(|error| error.to_string())
        });
        match allowed {
            true => result.unwrap_or_else(|error| panic!("{user} {verb}: {error}")),
            false => {
                let error = result.expect_err(verb);
                assert!(error.contains("NotPermitted"), "{user} {verb}: {error}");
            }
        }
    }
    disk.server.still_serves();
}

/// It was locked, and then nothing could unlock it.
#[test]
fn a_disk_whose_passphrase_can_be_read_once_is_not_locked() {
    let volume = Volume::cryptsetup(MIB, 512);
    let disk = Served::with_standard_input(&volume, "-");
    let refused = disk.run("lock");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("end `sealblk serve` (SIGTERM)"),
        "{said}"
    );
    assert_eq!(disk.status()["state"], "open");
    disk.server.still_serves();
}

/// The key helper had another standard input.
#[test]
fn a_key_file_that_is_standard_input_is_read_again_after_a_lock() {
    let volume = Volume::cryptsetup(MIB, 512);
    let disk = Served::with_standard_input(&volume, "/dev/stdin");
    assert_eq!(disk.status()["state"], "open");
    disk.does("lock");
    disk.does("unlock");
    disk.server.still_serves();
}

/// A volume that is served with a control socket.
struct Served {
    server: Server,
    control: PathBuf,
}

impl Served {
    fn new() -> Self {
        Self::of(Volume::new())
    }

    fn of(volume: Volume) -> Self {
        Self::with(volume, &[])
    }

    fn with(volume: Volume, args: &[&str]) -> Self {
        let control = volume.beside("control");
        let socket = control.display().to_string();
        let args = [&["--control-socket", &socket], args].concat();
        Self {
            server: Server::of(volume, &args),
            control,
        }
    }

    /// With the passphrase's file as standard input, which `source` names.
    fn with_standard_input(volume: &Volume, source: &str) -> Self {
        let (socket, control) = (volume.beside("sock"), volume.beside("control"));
        let direct = serve(volume, &socket, &["--control-socket", control.to_str().unwrap()]);
        let passphrase = &volume.open[1];
        let args = direct.get_args().map(|arg| match arg == passphrase.as_str() {
            true => source.as_ref(),
            false => arg,
        });
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$@" <"$0""#, passphrase]);
        command.arg(direct.get_program()).args(args);
        Self {
            server: Server::at(&mut command, socket),
            control,
        }
    }

    fn run(&self, verb: &str) -> Output {
        let mut command = Command::new(sealblk_path());
        command.args([verb, "--control-socket"]).arg(&self.control);
        command.output().unwrap()
    }

    /// What the verb says.
    fn verb(&self, verb: &str) -> String {
        let output = self.run(verb);
        assert!(
            output.status.success(),
            "{verb}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn does(&self, verb: &str) {
        self.verb(verb);
    }

    fn status(&self) -> Value {
        let mut command = Command::new(sealblk_path());
        let output = run(command
            .args(["status", "--json", "--control-socket"])
            .arg(&self.control));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

//! What can be had of the programs from outside: no secret.
//!
//! Known keys are planted, and looked for wherever they might be: in all that `/proc/PID/mem` gives of a process, which is what a
//! debugger would get, in its core dump and in what the kernel swaps out of it; in its arguments and environment; in every
//! file that the programs wrote, their logs among them; in all that they said. It takes root to look.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::aes::{ROUNDS, inverse_mix_columns, round_keys};
use common::driver::{Data, Driver, T_IN, T_OUT};
use common::pattern;
use common::secrets::{
    Core, Search, core, readable_memory, slot_secret, swapped_out, token, volume_key_by,
    without_secret_memory,
};
use common::serve::{Server, sealblk_path};
use common::volume::{MIB, PASSPHRASE, Volume, passphrase_file, run};
use hkdf::Hkdf;
use sealblk::providers::registry::Registry;
use sha2::Sha256;

#[test]
fn volume_key_and_passphrase_are_nowhere_in_readable_memory() {
    let volume = Volume::cryptsetup(4 * MIB, 512);
    let Some(memory) = memory_after_use(&volume) else {
        return;
    };
    let search = Search::default()
        .xts_key(
            "volume key",
            &volume_key_by(&volume, &volume.beside("passphrase")),
        )
        .text("passphrase", PASSPHRASE.as_bytes());
    search.assert_absent(&memory, "memory");
}

/// A page of guest memory that is missing interrupts a kernel, and the signal puts its registers on the stack.
#[test]
fn volume_key_is_nowhere_in_readable_memory_after_guest_memory_was_taken_away() {
    let volume = Volume::cryptsetup(4 * MIB, 512);
    let key = volume_key_by(&volume, &volume.beside("passphrase"));
    for write in [false, true] {
        let memory = memory_after(&volume, |driver| {
            let bytes = [7; 64 * 1024];
            let (kind, data) = match write {
                true => (T_OUT, Data::Out(&bytes)),
                false => (T_IN, Data::In(bytes.len())),
            };
            let (_, buffers) = driver.build(kind, 0, data);
            let head = driver.queue().chain(&buffers);
            // The region with the buffers, from their middle on.
            let file = &driver.memory.regions()[2].file;
            rustix::fs::ftruncate(file, 32 * 1024).unwrap();
            driver.queue().offer(&[head]);
            driver.queue().kick();
            driver.queue().watch_used();
        });
        let Some(memory) = memory else { return };
        Search::default()
            .xts_key("volume key", &key)
            .assert_absent(&memory, "memory");
    }
}

#[test]
fn primary_key_and_slot_secret_are_nowhere_in_readable_memory() {
    let volume = Volume::new();
    let primary = fs::read(volume.beside("state/providers/native/primary.key")).unwrap();
    let registry = Registry::open(&volume.beside("state")).unwrap();
    let search = Search::default()
        .key("primary key", &primary[16..48])
        .key("slot secret", &slot_secret(&volume.path, &registry));
    let Some(memory) = memory_after_use(&volume) else {
        return;
    };
    search.assert_absent(&memory, "memory");
}

/// Section A.3, and the judgement of the crate that others use: the last round key decrypts.
#[test]
fn round_keys_are_those_of_fips_197() {
    let key = [
        0x60, 0x3d, 0xeb, 0x10, 0x15, 0xca, 0x71, 0xbe, 0x2b, 0x73, 0xae, 0xf0, 0x85, 0x7d, 0x77, 0x81, 0x1f,
        0x35, 0x2c, 0x07, 0x3b, 0x61, 0x08, 0xd7, 0x2d, 0x98, 0x10, 0xa3, 0x09, 0x14, 0xdf, 0xf4,
    ];
    let rounds = round_keys(&key);
    assert_eq!(rounds.len(), 28);
    assert_eq!(rounds[0], key[..16]);
    let last = [
        0xfe, 0x48, 0x90, 0xd1, 0xe6, 0x18, 0x8d, 0x0b, 0x04, 0x6d, 0xf3, 0x44, 0x70, 0x6c, 0x63, 0x1e,
    ];
    assert_eq!(rounds[ROUNDS], last);
    // Section 5.1.3's matrix times its inverse.
    assert_eq!(
        inverse_mix_columns([0x8e, 0x4d, 0xa1, 0xbc, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])[..4],
        [0xdb, 0x13, 0x53, 0x45]
    );
}

/// A user's whole day with keys that are known: an agent, volumes that are made, bound, served, locked and rekeyed.
#[test]
fn secrets_are_in_no_file_log_argument_answer_core_dump_or_swap() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to look");
        return;
    }
    for hidden in [true, false] {
        let host = Host::new(hidden);
        host.plant();
        let _watcher = host.watch("agent.events", &["events"]);
        let mut said = Vec::new();
        for verb in [
            &["rekey", "planted", "--unlock-key", "passphrase"][..],
            &["rekey", "planted"],
            &["create", "made", "--size", "1M", "--recovery-key", "recovery"],
            &["recovery", "test", "planted", "--recovery-key", "passphrase"],
            &["info", "planted", "--json"],
            &["provider", "list"],
            &["key", "list"],
            &["key", "where-used", "--provider", "native"],
            &["--state-dir", "state", "audit", "verify"],
        ] {
            let output = host.verb(verb);
            assert!(
                output.status.success(),
                "{verb:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            said.extend([output.stdout, output.stderr].concat());
        }
        let serve = host.serve();
        let _watcher = host.watch("disk.events", &["events", "--control-socket", "control"]);
        let mut driver = Driver::connect(&host.path("vhost.sock"));
        let bytes = pattern(9, 64 * 1024);
        driver.write(0, &bytes);
        let before = host.search();
        for verb in ["status", "lock", "unlock", "rekey", "status"] {
            let json: &[&str] = if verb == "status" { &["--json"] } else { &[] };
            let output = host.verb(&[&[verb, "--control-socket", "control"], json].concat());
            assert!(
                output.status.success(),
                "{verb}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            said.extend([output.stdout, output.stderr].concat());
        }
        assert!(driver.read(0, bytes.len()) == bytes);

        // What was told is in the files that are looked through.
        for (events, last) in [("agent.events", "KeyBound"), ("disk.events", "DiskRekeyed")] {
            let told = fs::read_to_string(host.path(events)).unwrap();
            assert!(told.contains(last), "{events}: {told}");
        }
        // The slot secret and KEK that came by the rekey, and those of before.
        for search in [before, host.search()] {
            search.assert_absent(&said, "what the programs said");
            // What an operator keeps secrets in, and what is told to be one.
            let secret = ["primary.key", "volume.key", "passphrase", "recovery"];
            search.assert_absent_under(host.dir.path(), &secret);
            for process in [&host.agent, &serve] {
                let pid = process.0.id();
                for file in ["cmdline", "environ"] {
                    let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap();
                    assert!(!bytes.is_empty());
                    search.assert_absent(&bytes, file);
                }
                // What is in memory at any rate, and so is found if the search works.
                let known = Search::default().text("arguments", b"--config\0config.toml");
                let known = |bytes: &[u8]| !known.found(bytes).is_empty();
                let mut places = vec![("a core dump", core(pid, Core::AsTheKernel))];
                if hidden {
                    places.push(("memory", readable_memory(pid)));
                    places.push(("a core dump of everything", core(pid, Core::Everything)));
                }
                for (place, bytes) in &places {
                    assert!(known(bytes), "{place} has what is known to be in memory");
                    search.assert_absent(bytes, place);
                }
                if let Some(swapped) = swapped_out(pid, Path::new(env!("CARGO_TARGET_TMPDIR"))) {
                    assert!(known(&swapped), "swap has what is known to be in memory");
                    search.assert_absent(&swapped, "swap");
                }
            }
        }
        // In locked memory, root finds them; so the search finds them where they are.
        if !hidden {
            let found = host.search();
            let found = found.found(&core(serve.0.id(), Core::Everything)).len();
            assert!(found >= 43, "of the schedules of an open disk, {found} are found");
        }
    }
}

/// Programs that end soon are stopped again and again on their way, and looked at.
#[test]
fn short_programs_show_no_secret_either() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to look");
        return;
    }
    let host = Host::new(true);
    host.plant();
    let search = host.search_of_planted();
    for verb in [
        &["rekey", "planted", "--unlock-key", "passphrase"][..],
        &["create", "made", "--size", "1M", "--recovery-key", "recovery"],
    ] {
        let mut command = host.command(verb);
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let (mut looked, mut with_keys) = (0, 0);
        let mut memory = Vec::new();
        while child.try_wait().unwrap().is_none() && looked < 10 {
            thread::sleep(Duration::from_millis(15));
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
            let maps = fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap_or_default();
            with_keys += u32::from(maps.contains("/secretmem"));
            memory.push(readable_memory(child.id()));
            rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
            looked += 1;
        }
        assert!(child.wait().unwrap().success(), "{verb:?}");
        assert!(with_keys > 0, "{verb:?}: of {looked} looks, none was at keys");
        // Of what `create` made, too.
        let made = fs::read(host.path("recovery")).unwrap_or_else(|_| PASSPHRASE.into());
        for bytes in memory {
            search.assert_absent(&bytes, verb[0]);
            Search::default()
                .text("recovery key", made.trim_ascii())
                .assert_absent(&bytes, verb[0]);
        }
    }
}

/// A directory with an agent, and in it all that its user has.
struct Host {
    dir: tempfile::TempDir,
    agent: Ended,
    /// Whether there is memfd_secret(2).
    hidden: bool,
}

/// A process that ends with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Host {
    fn new(hidden: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(
            path("config.toml"),
            format!("[agent]\nsocket = {:?}\n", path("agent.sock")),
        )
        .unwrap();
        let mut add = Command::new(sealblk_path());
        run(add
            .arg("--state-dir")
            .arg(path("state"))
            .args(["provider", "add", "native", "--no-backup"]));
        let mut agent = program(
            &dir,
            hidden,
            &["--state-dir", "state", "--config", "config.toml", "agent"],
        );
        let agent = Ended(
            agent
                .stderr(File::create(path("agent.log")).unwrap())
                .spawn()
                .unwrap(),
        );
        let host = Self { dir, agent, hidden };
        host.wait_for("agent.sock");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn wait_for(&self, socket: &str) {
        let started = Instant::now();
        while !self.path(socket).exists() {
            assert!(
                started.elapsed() < Duration::from_secs(30),
                "there is no {socket}"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// "planted", a volume of a known key, and "passphrase", which opens it.
    fn plant(&self) {
        fs::write(self.path("volume.key"), key_of(64)).unwrap();
        passphrase_file(self.dir.path());
        File::create(self.path("planted"))
            .unwrap()
            .set_len(20 * MIB)
            .unwrap();
        let mut format = Command::new("cryptsetup");
        format.current_dir(&self.dir);
        format.args([
            "luksFormat",
            "--batch-mode",
            "--type",
            "luks2",
            "--cipher",
            "aes-xts-plain64",
            "--key-size",
            "512",
        ]);
        format.args([
            "--pbkdf",
            "pbkdf2",
            "--pbkdf-force-iterations",
            "100000",
            "--volume-key-file",
            "volume.key",
        ]);
        run(format.args(["--key-file", "passphrase", "planted"]));
    }

    fn command(&self, args: &[&str]) -> Command {
        program(
            &self.dir,
            self.hidden,
            &[&["--config", "config.toml"], args].concat(),
        )
    }

    fn verb(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Writes the events from now on to a file.
    fn watch(&self, file: &str, verb: &[&str]) -> Ended {
        let file = self.path(file);
        let mut command = self.command(verb);
        command.stdout(File::create(&file).unwrap()).stderr(Stdio::null());
        let watcher = Ended(command.spawn().unwrap());
        // It has no word for having begun; what comes by then is told by others.
        thread::sleep(Duration::from_millis(500));
        watcher
    }

    fn serve(&self) -> Ended {
        let args = [
            "serve",
            "--blk-file",
            "planted",
            "--socket-path",
            "vhost.sock",
            "--control-socket",
            "control",
        ];
        let mut command = self.command(&args);
        let serve = Ended(
            command
                .stderr(File::create(self.path("serve.log")).unwrap())
                .spawn()
                .unwrap(),
        );
        self.wait_for("vhost.sock");
        serve
    }

    /// What was planted, and opens more than one volume.
    fn search_of_planted(&self) -> Search {
        let primary = &fs::read(self.path("state/providers/native/primary.key")).unwrap()[16..48];
        Search::default()
            .xts_key("volume key", &fs::read(self.path("volume.key")).unwrap())
            .text("passphrase", PASSPHRASE.as_bytes())
            .key("primary key", primary)
    }

    /// All that opens "planted" now.
    fn search(&self) -> Search {
        let registry = Registry::open(&self.path("state")).unwrap();
        let primary = &fs::read(self.path("state/providers/native/primary.key")).unwrap()[16..48];
        let token = token(&self.path("planted"));
        let key_id = token["key_id"].as_str().unwrap().as_bytes();
        let mut kek = [0; 32];
        let derive = Hkdf::<Sha256>::new(None, primary);
        derive
            .expand_multi_info(&[b"sealblk native KEK\0", key_id], &mut kek)
            .unwrap();
        self.search_of_planted()
            .text(
                "recovery key",
                fs::read(self.path("recovery")).unwrap().trim_ascii(),
            )
            .key("slot secret", &slot_secret(&self.path("planted"), &registry))
            .key("KEK", &kek)
    }
}

/// The program, which tells all that it may.
fn program(dir: &tempfile::TempDir, hidden: bool, args: &[&str]) -> Command {
    let mut command = Command::new(sealblk_path());
    command
        .current_dir(dir)
        .args(args)
        .env("SEALBLK_LOG", "trace")
        .stdin(Stdio::null());
    if !hidden {
        without_secret_memory(&mut command);
    }
    command
}

fn key_of(len: usize) -> Vec<u8> {
    let mut key = vec![0; len];
    getrandom::fill(&mut key).unwrap();
    key
}

/// The memory of a server that has read and written, if it can be had.
fn memory_after_use(volume: &Volume) -> Option<Vec<u8>> {
    memory_after(volume, |driver| {
        driver.write(0, &common::pattern(7, 4096));
        assert_eq!(driver.read(0, 4096), common::pattern(7, 4096));
    })
}

/// The memory of a server that `work` was done with, if it can be had. Nothing is done with the driver's after that.
fn memory_after(volume: &Volume, work: impl FnOnce(&mut Driver)) -> Option<Vec<u8>> {
    let server = Server::start(volume);
    let mut driver = server.connect();
    work(&mut driver);
    let hidden = fs::read_to_string(format!("/proc/{}/maps", server.process.pid()))
        .is_ok_and(|maps| maps.contains("/secretmem"));
    if !hidden || !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to look, and a kernel with memfd_secret(2) to hide from root");
        return None;
    }
    let memory = readable_memory(server.process.pid());
    let path = Search::default().text("path", volume.path.to_str().unwrap().as_bytes());
    assert!(!path.found(&memory).is_empty(), "what is there is found");
    std::mem::forget(driver);
    server.stop();
    Some(memory)
}

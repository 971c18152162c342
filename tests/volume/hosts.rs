//! A volume on a LUN: the header says which host has it attached, since locks do not reach the others.
//!
//! The hosts are mount namespaces with a machine ID, a boot ID and a name of their own. The LUN is a loop device for each host, over one
//! file that has no name any more: so no lock is shared, as the kernels of two hosts share none.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::driver::{Data, Driver, S_OK, Setup, T_IN, T_OUT};
use common::frontend::Frontend;
use common::fuse::{Fault, Fuse, Operation};
use common::pattern;
use common::process::{Ended, Process, children_of};
use common::serve::{Server, sealblk_path, serve};
use common::storage::LoopDevice;
use common::volume::{MIB, Volume, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use uuid::Uuid;

const IN_USE: i32 = 5;
const STORAGE: i32 = 6;
const HOST: i32 = 1;

/// A host, by the files that tell it from others.
struct Host {
    name: &'static str,
    dir: tempfile::TempDir,
}

impl Host {
    fn new(name: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let id = Uuid::new_v4().simple();
        fs::write(dir.path().join("machine-id"), format!("{id}\n")).unwrap();
        let host = Host { name, dir };
        host.boot();
        host
    }

    fn boot(&self) {
        fs::write(self.dir.path().join("boot_id"), format!("{}\n", Uuid::new_v4())).unwrap();
    }

    /// Its file `id` says nothing from now on.
    fn forget(&self, id: &str) {
        fs::write(self.dir.path().join(id), "").unwrap();
    }

    /// The same command, on this host.
    fn runs(&self, command: &Command) -> Command {
        const ENTER: &str = "mount --bind \"$1\"/machine-id /etc/machine-id &&
            mount --bind \"$1\"/boot_id /proc/sys/kernel/random/boot_id && hostname \"$2\" && shift 2 && exec \"$@\"";
        let mut on_host = Command::new("unshare");
        on_host.args(["--mount", "--uts", "sh", "-c", ENTER, "sh"]);
        on_host.arg(self.dir.path()).arg(self.name);
        on_host.arg(command.get_program()).args(command.get_args());
        on_host
    }
}

/// A volume on storage that two hosts have, each by a device of its own.
struct Lun {
    here: Volume,
    there: Volume,
    _devices: [LoopDevice; 2],
}

impl Lun {
    /// Nothing if this machine gives no loop devices.
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lun");
        fs::File::create(&file).unwrap().set_len(24 * MIB).unwrap();
        let devices = [LoopDevice::over(&file, 512)?, LoopDevice::over(&file, 512)?];
        fs::remove_file(&file).unwrap();
        let [here, there] = [0, 1].map(|device: usize| devices[device].path().to_owned());
        let key = dir.path().join("key");
        let args = ["--size", "1M", "--recovery-key", key.to_str().unwrap()];
        let here = Volume::created_at(dir, here, &args);
        let there = Volume::at(tempfile::tempdir().unwrap(), there, here.open.clone());
        Some(Lun {
            here,
            there,
            _devices: devices,
        })
    }

    /// What the header says, as cryptsetup reads it.
    fn token(&self) -> Value {
        let mut export = Command::new("cryptsetup");
        let told = run(export
            .args(["token", "export", "--token-id", "1"])
            .arg(&self.here.path));
        let token: Value = serde_json::from_slice(&told.stdout).unwrap();
        assert_eq!(token["type"], "sealblk-host");
        token
    }
}

/// A `sealblk serve` on a host.
pub(super) struct Side {
    pub(super) server: Server,
    control: PathBuf,
}

impl Side {
    fn start(host: &Host, volume: &Volume, args: &[&str]) -> Self {
        Side::by(volume, args, |command| host.runs(&command))
    }

    /// By the command that `on_host` makes of that of this machine.
    pub(super) fn by(volume: &Volume, args: &[&str], on_host: impl FnOnce(Command) -> Command) -> Self {
        let (socket, control) = (volume.beside("sock"), volume.beside("control"));
        let args = [args, &["--control-socket", control.to_str().unwrap()]].concat();
        let server = Server::at(&mut on_host(serve(volume, &socket, &args)), socket);
        server.process.wait_stderr("serving");
        Side { server, control }
    }

    pub(super) fn wait_claim(&self, state: &str) -> Value {
        self.wait_claim_of(&[state])
    }

    /// Waits until the claim is in one of these states.
    pub(super) fn wait_claim_of(&self, states: &[&str]) -> Value {
        let start = Instant::now();
        loop {
            let told = run(self.verb("status").arg("--json"));
            let status: Value = serde_json::from_slice(&told.stdout).unwrap();
            let claim = status["claim"].clone();
            if states.contains(&claim["state"].as_str().unwrap()) {
                return claim;
            }
            assert!(start.elapsed() < DEADLINE, "it is none of {states:?} but {claim}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// A verb for this side.
    fn verb(&self, verb: &str) -> Command {
        let mut command = Command::new(sealblk_path());
        command.arg(verb).arg("--control-socket").arg(&self.control);
        command
    }

    /// Ends the process that serves since an upgrade.
    fn end_upgraded(&self) {
        let told = run(self.verb("status").arg("--json"));
        let status: Value = serde_json::from_slice(&told.stdout).unwrap();
        let process = Pid::from_raw(status["process"].as_i64().unwrap() as i32).unwrap();
        kill_process(process, Signal::TERM).unwrap();
    }

    /// Begins a rekey that gets no key until the key helper goes on, which is what comes with it.
    fn begin_rekey(&self) -> (Child, Pid) {
        let [helper] = children_of(self.server.process.pid())[..] else {
            panic!("there is not one helper");
        };
        let helper = Pid::from_raw(helper.cast_signed()).unwrap();
        kill_process(helper, Signal::STOP).unwrap();
        let rekey = self.verb("rekey").stderr(Stdio::piped()).spawn().unwrap();
        self.server.process.wait_stderr("PrivilegeUsed");
        thread::sleep(Duration::from_millis(300));
        (rekey, helper)
    }

    pub(super) fn crash(mut self) {
        self.server.process.signal(Signal::KILL);
        self.server.process.wait();
    }
}

fn serve_fails(host: &Host, volume: &Volume, args: &[&str]) -> Ended {
    let socket = volume.beside("refused.sock");
    let ended = Process::spawn(&mut host.runs(&serve(volume, &socket, args))).wait();
    assert!(!ended.status.success(), "it served: {}", ended.stderr);
    ended
}

/// As QEMU does when its guest stops, and when it continues.
pub(super) fn stop(driver: &mut Driver) -> Vec<u16> {
    let queues: Vec<_> = driver.queues.iter().map(|queue| queue.index).collect();
    queues
        .iter()
        .for_each(|&queue| driver.frontend.enable(queue, false));
    queues
        .iter()
        .map(|&queue| driver.frontend.stop_vring(queue))
        .collect()
}

pub(super) fn go_on(driver: &mut Driver, bases: &[u16]) {
    for (queue, base) in bases.iter().enumerate() {
        driver.restart(queue, *base);
    }
}

/// The text that names another host, and how to take the volume over from it.
fn names(attachment: u64) -> [String; 2] {
    ["\"node-a\"".to_owned(), format!("--take-over {attachment}")]
}

fn assert_refused(ended: &Ended, attachment: u64) {
    let names = names(attachment);
    ended.assert_says(IN_USE, &[&names[0], &names[1]]);
}

#[test]
fn a_lun_is_attached_by_one_host_and_after_a_crash_by_the_same_host() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    let at_a = Side::start(&a, &lun.here, &[]);
    let bytes = pattern(1, 4096);
    at_a.server.connect().write(0, &bytes);
    let token = lun.token();
    assert_eq!(
        (&token["sequence"], &token["name"]),
        (&"1".into(), &"node-a".into())
    );
    let machine_id = fs::read_to_string(a.dir.path().join("machine-id")).unwrap();
    let hidden = Uuid::try_parse(machine_id.trim()).unwrap().to_string();
    assert!(!token.to_string().contains(machine_id.trim()) && !token.to_string().contains(&hidden));

    let info = run(Command::new(sealblk_path())
        .args(["info", "--json"])
        .arg(&lun.there.path));
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(
        (&info["attached"]["name"], &info["attached"]["attachment"]),
        (&"node-a".into(), &1.into())
    );
    // Other programs open it, also with the token in the header.
    let (device, key) = (&lun.there.path, lun.here.beside("key"));
    run(Command::new("cryptsetup")
        .args(["open", "--test-passphrase", "--key-file"])
        .args([&key, device]));
    assert_refused(&serve_fails(&b, &lun.there, &[]), 1);
    assert_refused(&serve_fails(&b, &lun.there, &["--read-only"]), 1);
    assert_refused(&serve_fails(&b, &lun.there, &["--header-claim", "off"]), 1);
    let uuid = Command::new("cryptsetup")
        .arg("luksUUID")
        .arg(device)
        .output()
        .unwrap()
        .stdout;
    let uuid = String::from_utf8(uuid).unwrap();
    let verb = |args: &[&str]| -> Output {
        let mut verb = Command::new(sealblk_path());
        verb.args(&lun.here.open).args(args).arg(device);
        b.runs(&verb).stdin(Stdio::null()).output().unwrap()
    };
    let new_key = lun.here.beside("new-key");
    let verbs: [&[&str]; 5] = [
        &["rekey"],
        &["recovery", "add", "--recovery-key", new_key.to_str().unwrap()],
        &["resize"],
        &["create", "--force"],
        &["erase", "--confirm", uuid.trim()],
    ];
    let before = lun.here.stored(0, 16 * MIB as usize);
    for args in verbs {
        let refused = verb(args);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(IN_USE), "{args:?}: {said}");
        assert!(
            names(1).iter().all(|text| said.contains(text)),
            "{args:?}: {said}"
        );
    }
    assert!(lun.here.stored(0, 16 * MIB as usize) == before);

    // The host reboots, or only the process ends.
    at_a.crash();
    assert_refused(&serve_fails(&b, &lun.there, &[]), 1);
    a.boot();
    let at_a = Side::start(&a, &lun.here, &[]);
    assert_eq!(lun.token()["sequence"], "2");
    at_a.crash();
    assert_refused(&serve_fails(&b, &lun.there, &["--take-over", "1"]), 2);
    run(&mut b.runs(
        Command::new(sealblk_path())
            .args(&lun.here.open)
            .args(["rekey", "--take-over", "2"])
            .arg(device),
    ));
    assert_eq!(lun.token()["name"], "node-a", "a change takes nothing over");
    let at_b = Side::start(&b, &lun.there, &["--take-over", "2"]);
    assert!(
        at_b.server
            .process
            .stderr()
            .contains("taken over from another host")
    );
    assert!(at_b.server.connect().read(0, bytes.len()) == bytes);
    assert_eq!(lun.token()["name"], "node-b");
    serve_fails(&a, &lun.here, &[]).assert_says(IN_USE, &["\"node-b\"", "--take-over 3"]);

    // The end of the process gives it back, and others then attach it without a word.
    at_b.server.stop();
    assert_eq!(lun.token().get("host"), None);
    let at_a = Side::start(&a, &lun.here, &[]);
    assert!(!at_a.server.stop().stderr.contains("taken over"));
    run(Command::new(sealblk_path())
        .args(&lun.here.open)
        .arg("rekey")
        .arg(device));
}

#[test]
fn a_guest_migrates_over_a_lun_and_cannot_go_on_where_it_ran_before() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    let source = Side::start(&a, &lun.here, &[]);
    let mut there = source.server.connect();
    let bytes = pattern(2, 4096);
    there.write(0, &bytes);
    let destination = Side::start(&b, &lun.there, &["--incoming"]);
    // It looks for what has changed, and leaves no trace: the guest has not run there.
    destination.wait_claim("released");
    let bases = stop(&mut there);
    assert_eq!(lun.token().get("host"), None);
    go_on(&mut there, &bases);
    there.still_serves();
    assert_eq!(lun.token()["name"], "node-a");

    // The destination starts before the source has stopped.
    let mut here = destination.server.connect();
    let read = here.submit(0, T_IN, 0, Data::In(bytes.len()));
    destination.wait_claim("waiting");
    thread::sleep(Duration::from_millis(300));
    assert!(here.queue().poll_used().is_none(), "both serve");
    let bases = stop(&mut there);
    let used = here.queue().wait_used();
    let done = here.outcome(&read, used);
    assert!(done.status == S_OK && done.data == bytes);
    assert_eq!(lun.token()["name"], "node-b");
    here.write(8, &bytes);

    // It runs there; then it has run there.
    go_on(&mut there, &bases);
    let write = there.submit(0, T_OUT, 0, Data::Out(&pattern(3, 4096)));
    let refused = source.wait_claim("refused");
    assert!(
        refused["message"].as_str().unwrap().contains("\"node-b\""),
        "{refused}"
    );
    drop(here);
    destination.server.stop();
    let bases = stop(&mut there);
    go_on(&mut there, &bases);
    let refused = source.wait_claim("refused");
    assert!(
        refused["message"].as_str().unwrap().contains("has run elsewhere"),
        "{refused}"
    );
    assert!(there.queue().poll_used().is_none());
    let _ = write;
    // Another guest begins with what is there.
    drop(there);
    let mut anew = source.server.connect();
    assert!(anew.read(0, bytes.len()) == bytes);
    assert_eq!(lun.token()["name"], "node-a");
    drop(anew);
    source.server.stop();
}

/// Both may find the disk free.
#[test]
fn of_two_hosts_that_start_at_one_moment_never_two_serve() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let hosts = ["node-a", "node-b"].map(Host::new);
    let mut served = 0;
    for _ in 0..6 {
        let mut sides = [(&hosts[0], &lun.here), (&hosts[1], &lun.there)].map(|(host, volume)| {
            let socket = volume.beside("sock");
            Process::spawn(&mut host.runs(&serve(volume, &socket, &[])))
        });
        let start = Instant::now();
        let serves = sides.each_mut().map(|side| {
            while side.is_running() && !side.stderr().contains("serving disk") {
                assert!(start.elapsed() < DEADLINE, "{}", side.stderr());
                thread::sleep(Duration::from_millis(10));
            }
            side.is_running()
        });
        assert_ne!(serves, [true; 2], "both serve: {}", sides[1].stderr());
        for (side, serves) in sides.iter_mut().zip(serves) {
            if serves {
                side.signal(Signal::TERM);
                served += 1;
            }
            assert_eq!(side.wait().status.success(), serves);
        }
    }
    assert!(served > 0, "neither host ever serves");
}

/// The first process has ended before a guest ran, and its number was given out a second time, to an attachment that is not over.
#[test]
fn a_take_over_that_was_left_in_a_unit_takes_no_later_attachment_over() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    Side::start(&a, &lun.here, &[]).server.stop();
    let at_a = Side::start(&a, &lun.here, &[]);
    at_a.server.connect().still_serves();
    assert_refused(&serve_fails(&b, &lun.there, &["--take-over", "1"]), 2);
    at_a.server.stop();
}

/// All hosts without one were taken for the same host.
#[test]
fn a_host_without_a_boot_id_is_told_from_others_and_one_without_any_id_attaches_nothing() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    for host in [&a, &b] {
        host.forget("boot_id");
    }
    let at_a = Side::start(&a, &lun.here, &[]);
    assert!(at_a.server.process.stderr().contains("the boot ID"));
    at_a.server.connect().still_serves();
    assert_refused(&serve_fails(&b, &lun.there, &[]), 1);
    b.forget("machine-id");
    assert_refused(&serve_fails(&b, &lun.there, &[]), 1);
    at_a.server.stop();
    serve_fails(&b, &lun.there, &[]).assert_says(HOST, &["/etc/machine-id", "systemd-machine-id-setup"]);
    let at_b = Side::start(&b, &lun.there, &["--header-claim", "off"]);
    at_b.server.connect().still_serves();
    at_b.server.stop();
}

/// It said nothing, or told the operator to take the disk from the host that has it.
#[test]
fn a_host_whose_disk_was_taken_over_says_so_at_its_end() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    for (number, ends_before) in [(1, false), (3, true)] {
        let at_a = Side::start(&a, &lun.here, &[]);
        at_a.server.connect().still_serves();
        let at_b = Side::start(&b, &lun.there, &["--take-over", &number.to_string()]);
        at_b.server.connect().still_serves();
        let (said, at_b) = match ends_before {
            true => {
                at_b.server.stop();
                (at_a.server.stop().stderr, None)
            }
            false => (at_a.server.stop().stderr, Some(at_b)),
        };
        assert!(
            said.contains("has taken the volume over while this host had it"),
            "{said}"
        );
        assert!(said.contains("check the file system"), "{said}");
        assert_eq!(said.contains("\"node-b\""), !ends_before, "{said}");
        assert!(
            !said.contains("needs --take-over") && !said.contains("--take-over 2"),
            "{said}"
        );
        if let Some(at_b) = at_b {
            assert_eq!(lun.token()["name"], "node-b");
            at_b.server.stop();
        }
    }
}

/// It wrote to the header, by a lock that does not reach the host whose header it is.
#[test]
fn a_host_that_is_refused_repairs_nothing() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    let at_a = Side::start(&a, &lun.here, &[]);
    at_a.server.connect().still_serves();
    // Its secondary copy is being written.
    let device = fs::File::options().write(true).open(&lun.there.path).unwrap();
    device.write_all_at(&[0; 512], 16 << 10).unwrap();
    device.sync_all().unwrap();
    let state = || {
        let info = run(Command::new(sealblk_path())
            .args(["info", "--json"])
            .arg(&lun.there.path));
        let info: Value = serde_json::from_slice(&info.stdout).unwrap();
        info["header"]["state"].as_str().unwrap().to_owned()
    };
    assert_refused(&serve_fails(&b, &lun.there, &[]), 1);
    assert_eq!(state(), "needs-repair");
    at_a.server.stop();
    assert_eq!(state(), "sound");
}

/// What had come through of a claim that failed was taken for a guest that has run elsewhere.
#[test]
fn a_guest_goes_on_after_storage_that_failed_in_the_middle_of_a_claim() {
    const EIO: i32 = 5;
    let mut volume = Volume::created(MIB, 4096);
    let Some(fuse) = Fuse::over(volume.file()) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    volume.path = fuse.path();
    let a = Host::new("node-a");
    let side = Side::start(&a, &volume, &["--header-claim", "on"]);
    let mut driver = side.server.connect();
    driver.still_serves();
    // The primary copy is written, or both are.
    for writes in [1, 2] {
        let bases = stop(&mut driver);
        side.wait_claim("released");
        match writes {
            1 => fuse.fail(Operation::Write, Fault::Error(EIO), 16 << 10),
            _ => fuse.fail(Operation::Sync, Fault::Error(EIO), 0),
        }
        go_on(&mut driver, &bases);
        let read = driver.submit(0, T_IN, 0, Data::In(4096));
        side.wait_claim("refused");
        assert!(driver.queue().poll_used().is_none());
        fuse.heal();
        assert_eq!(token_of(&volume.path).unwrap()["name"], "node-a");
        let bases = stop(&mut driver);
        go_on(&mut driver, &bases);
        let used = driver.queue().wait_used();
        assert_eq!(
            driver.outcome(&read, used).status,
            S_OK,
            "{}",
            side.server.process.stderr()
        );
    }
    drop(driver);
    side.server.stop();
}

/// The migration has priority. The source kept the claim in the header for the rekey: the locks do not say that another host is there.
#[test]
fn a_guest_leaves_a_lun_in_the_middle_of_a_rekey_which_fails() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    let source = Side::start(&a, &lun.here, &[]);
    let mut there = source.server.connect();
    there.still_serves();
    let destination = Side::start(&b, &lun.there, &["--incoming"]);
    let (rekey, helper) = source.begin_rekey();
    stop(&mut there);
    source.wait_claim("released");
    assert_eq!(lun.token().get("host"), None);
    let mut here = destination.server.connect();
    here.still_serves();
    let before = lun.here.stored(0, 16 * MIB as usize);
    kill_process(helper, Signal::CONT).unwrap();
    let refused = rekey.wait_with_output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && said.contains("where the guest runs"),
        "{said}"
    );
    assert!(lun.here.stored(0, 16 * MIB as usize) == before);
    run(&mut destination.verb("rekey"));
}

/// A rekey claimed the disk while the guest was under way, and the destination refused its guest.
#[test]
fn a_volume_on_a_lun_is_not_rekeyed_where_no_guest_runs_any_more() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let a = Host::new("node-a");
    let side = Side::start(&a, &lun.here, &[]);
    // No guest has come yet, and the header says that this host has the disk.
    run(&mut side.verb("rekey"));
    let mut driver = side.server.connect();
    driver.still_serves();
    let bases = stop(&mut driver);
    side.wait_claim("released");
    let refused = side.verb("rekey").output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && said.contains("locks do not tell"),
        "{said}"
    );
    go_on(&mut driver, &bases);
    driver.still_serves();
    run(&mut side.verb("rekey"));
}

/// The claim stayed in the header, and nothing said so.
#[test]
fn the_end_of_a_process_in_the_middle_of_a_rekey_gives_a_lun_back() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    let side = Side::start(&a, &lun.here, &[]);
    let mut driver = side.server.connect();
    driver.still_serves();
    let (mut rekey, helper) = side.begin_rekey();
    let ended = side.server.terminate();
    // It may have ended with its parent.
    let _ = kill_process(helper, Signal::CONT);
    assert!(!rekey.wait().unwrap().success());
    assert_eq!(lun.token().get("host"), None, "{}", ended.stderr);
    let side = Side::start(&b, &lun.there, &[]);
    side.server.connect().still_serves();
}

/// The next process took the guest of a front-end that had started nothing yet for one that had run here.
#[test]
fn a_guest_that_comes_back_after_an_upgrade_is_served() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    let here = Side::start(&a, &lun.here, &[]);
    let mut driver = here.server.connect();
    driver.still_serves();
    stop(&mut driver);
    here.wait_claim("released");
    drop(driver);
    let there = Side::start(&b, &lun.there, &[]);
    there.server.connect().still_serves();
    there.server.stop();

    // QEMU waits for the guest.
    let mut driver = Driver::unstarted(Frontend::connect(here.server.socket()), Setup::default());
    run(&mut a.runs(&here.verb("upgrade")));
    go_on(&mut driver, &[0]);
    here.wait_claim("held");
    driver.still_serves();
    drop(driver);
    here.end_upgraded();
}

/// Storage that takes no write of the header: nothing is served by a claim that is not there.
#[test]
fn a_claim_that_cannot_be_entered_is_refused_and_one_that_cannot_be_removed_stays() {
    const EIO: i32 = 5;
    let mut volume = Volume::created(MIB, 4096);
    let Some(fuse) = Fuse::over(volume.file()) else {
        eprintln!("skipped: nothing can be mounted here");
        return;
    };
    volume.path = fuse.path();
    let a = Host::new("node-a");
    fuse.fail(Operation::Write, Fault::Error(EIO), 0);
    let args = ["--header-claim", "on"];
    serve_fails(&a, &volume, &args).assert_says(STORAGE, &["cannot be written"]);
    fuse.heal();
    let side = Side::start(&a, &volume, &args);
    let mut driver = side.server.connect();
    driver.still_serves();
    fuse.fail(Operation::Write, Fault::Error(EIO), 0);
    let bases = stop(&mut driver);
    side.wait_claim("released");
    let said = side.server.process.stderr();
    assert!(said.contains("another host needs --take-over"), "{said}");
    go_on(&mut driver, &bases);
    let read = driver.submit(0, T_IN, 0, Data::In(4096));
    side.wait_claim("refused");
    assert!(driver.queue().poll_used().is_none());
    // The guest continues when the storage does.
    fuse.heal();
    let bases = stop(&mut driver);
    go_on(&mut driver, &bases);
    let used = driver.queue().wait_used();
    assert_eq!(driver.outcome(&read, used).status, S_OK);
    drop(driver);
    side.server.stop();
}

/// A header without room for it: on a device the disk is served as it was before there were such claims.
#[test]
fn a_header_without_room_is_served_unless_the_claim_is_demanded() {
    let Some(lun) = Lun::new() else {
        eprintln!("skipped: no loop device can be had here");
        return;
    };
    let a = Host::new("node-a");
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    for _ in 1..32 {
        fs::write(&token, r#"{"type":"filler","keyslots":[]}"#).unwrap();
        let mut import = Command::new("cryptsetup");
        run(import
            .args(["token", "import", "--json-file"])
            .args([&token, &lun.here.path]));
    }
    serve_fails(&a, &lun.here, &["--header-claim", "on"]).assert_says(3, &["all 32 tokens are in use"]);
    let side = Side::start(&a, &lun.here, &[]);
    assert!(
        side.server
            .process
            .stderr()
            .contains("no other host is kept from it")
    );
    side.server.connect().still_serves();
    side.server.stop();
}

fn token_of(path: &Path) -> Option<Value> {
    let dump = run(Command::new("cryptsetup")
        .args(["luksDump", "--dump-json-metadata"])
        .arg(path));
    let metadata: Value = serde_json::from_slice(&dump.stdout).unwrap();
    let tokens = metadata["tokens"].as_object().unwrap().clone();
    tokens
        .into_iter()
        .map(|(_, token)| token)
        .find(|token| token["type"] == "sealblk-host")
}

/// Locks of files reach other hosts where the file system has them. What a copy of a LUN says is looked at, and goes.
#[test]
fn a_file_gets_no_claim_unless_it_is_demanded_and_loses_one_that_is_over() {
    let volume = Volume::created(MIB, 512);
    let [a, b] = ["node-a", "node-b"].map(Host::new);
    Side::start(&a, &volume, &[]).server.stop();
    assert_eq!(token_of(&volume.path), None);
    let side = Side::start(&a, &volume, &["--header-claim", "on"]);
    assert_eq!(token_of(&volume.path).unwrap()["name"], "node-a");

    // An upgrade hands it over.
    let mut upgrade = Command::new(sealblk_path());
    upgrade.args(["upgrade", "--control-socket"]).arg(&side.control);
    run(&mut a.runs(&upgrade));
    let token = token_of(&volume.path).unwrap();
    assert_eq!(
        (&token["name"], &token["sequence"]),
        (&"node-a".into(), &"1".into())
    );
    side.end_upgraded();
    let start = Instant::now();
    while token_of(&volume.path).unwrap().get("host").is_some() {
        assert!(start.elapsed() < DEADLINE, "the claim stays");
        thread::sleep(Duration::from_millis(20));
    }

    let side = Side::start(&a, &volume, &["--header-claim", "on"]);
    side.crash();
    assert_refused(&serve_fails(&b, &volume, &[]), 2);
    let side = Side::start(&b, &volume, &["--take-over", "2"]);
    assert_eq!(token_of(&volume.path).unwrap().get("host"), None);
    side.server.stop();
    // No host has it.
    let ended = Side::start(&b, &volume, &["--take-over", "2"]).server.terminate();
    assert!(ended.stderr.contains("was not needed"), "{}", ended.stderr);
}

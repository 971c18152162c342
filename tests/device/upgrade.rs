//! `sealblk upgrade`: another process continues to serve a disk, and the guest notices nothing but a pause.

use super::killed::{Guest, kills};
use common::DEADLINE;
use common::driver::Driver;
use common::frontend::{Frontend, Message};
use common::memory::{END as END_OF_MEMORY, Log};
use common::process::{Process, children_of, facts_of};
use common::serve::{install, sealblk_path, serve, serve_fails};
use common::volume::{Volume, run};
use rustix::process::{Pid, Signal, kill_process};
use sealblk::control::varlink::{CallError, begin, call, reply};
use sealblk::control::wire::Connection;
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A disk that one process after another serves.
struct Served {
    volume: Volume,
    socket: PathBuf,
    control: PathBuf,
    /// The first process, whose log is that of the others as well.
    first: Process,
}

impl Served {
    fn new() -> Self {
        Served::with(&[])
    }

    fn with(args: &[&str]) -> Self {
        Served::of(Volume::new(), args)
    }

    fn of(volume: Volume, args: &[&str]) -> Self {
        let socket = volume.beside("vhost.sock");
        let control = volume.beside("control.sock");
        let first = start(&volume, &socket, &control, args);
        first.wait_stderr("serving");
        Served {
            volume,
            socket,
            control,
            first,
        }
    }

    fn status(&self) -> Value {
        let mut status = Command::new(sealblk_path());
        let told = run(status
            .args(["status", "--json", "--control-socket"])
            .arg(&self.control));
        serde_json::from_slice(&told.stdout).unwrap()
    }

    /// The process that serves by now.
    fn process(&self) -> u32 {
        self.status()["process"].as_u64().unwrap() as u32
    }

    fn upgrade(&self) -> Command {
        upgrade(Path::new(sealblk_path()), &self.control)
    }

    /// Upgrades under a guest that continues meanwhile.
    fn upgrade_under(&self, guest: &mut Guest, command: &mut Command) -> Output {
        let mut child = spawn(command);
        while child.try_wait().unwrap().is_none() {
            guest.run(Duration::from_millis(2));
        }
        child.wait_with_output().unwrap()
    }

    /// Ends the process that serves by now.
    fn stop(self) {
        let process = self.process();
        signal(process, Signal::TERM);
        wait_ended(process);
        assert!(
            !self.socket.exists() && !self.control.exists(),
            "sockets are left"
        );
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // The first process has ended long since; others are not this test's children.
        let control = self.control.to_str().unwrap().to_owned();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(process) = process.file_name().to_string_lossy().parse() else {
                continue;
            };
            let arguments = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&arguments).contains(&control) {
                signal(process, Signal::KILL);
            }
        }
    }
}

pub(super) fn start(volume: &Volume, socket: &Path, control: &Path, args: &[&str]) -> Process {
    let with_control = [args, &["--control-socket", control.to_str().unwrap()]].concat();
    Process::spawn(&mut serve(volume, socket, &with_control))
}

pub(super) fn upgrade(sealblk: &Path, control: &Path) -> Command {
    let mut command = Command::new(sealblk);
    command.args(["upgrade", "--control-socket"]).arg(control);
    command
}

pub(super) fn spawn(command: &mut Command) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

pub(super) fn signal(process: u32, signal: Signal) {
    let process = Pid::from_raw(process.cast_signed()).unwrap();
    let _ = kill_process(process, signal);
}

/// Whether a process has ended, reaped or not.
fn has_ended(process: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{process}/stat")) else {
        return true;
    };
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.trim_start().starts_with('Z')
}

pub(super) fn wait_ended(process: u32) {
    let start = Instant::now();
    while !has_ended(process) {
        assert!(start.elapsed() < DEADLINE, "process {process} does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn succeeded(output: &Output, served: &Served) {
    assert!(
        output.status.success(),
        "{}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr),
        served.first.stderr()
    );
}

#[test]
fn upgraded_under_load_it_answers_each_request_once() {
    let served = Served::new();
    let mut guest = Guest::new(&served.socket);
    let mut processes = vec![served.process()];
    let mut facts = Vec::new();
    for round in 0..5 {
        let output = served.upgrade_under(&mut guest, &mut served.upgrade());
        succeeded(&output, &served);
        let status = served.status();
        let process = status["process"].as_u64().unwrap() as u32;
        let before = *processes.last().unwrap();
        assert_ne!(process, before);
        assert_eq!(status["before"]["process"], before);
        assert_eq!(status["frontEnd"]["connected"], true);
        assert_eq!(status["claim"]["state"], "held");
        wait_ended(before);
        processes.push(process);
        guest.run(Duration::from_millis(50));
        if round % 2 == 0 {
            guest.settle();
            guest.check_content();
            facts.push(facts_of(process));
            guest.ask_all();
        }
    }
    guest.settle();
    guest.check_content();
    // Nothing adds up from process to process.
    let (first, last) = (&facts[0], facts.last().unwrap());
    assert_eq!(
        (first.descriptors, first.threads),
        (last.descriptors, last.threads)
    );
    let said = served.first.stderr();
    assert_eq!(said.matches("a front-end has connected").count(), 1, "{said}");
    assert!(!said.contains("sandbox has refused"), "{said}");
    served.stop();
}

/// Copies of both executables, where the one that serves can be replaced.
struct Installed {
    dir: TempDir,
    sealblk: PathBuf,
}

impl Installed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sealblk = install(dir.path());
        Installed { dir, sealblk }
    }

    /// Has this script serve disks.
    fn with_script(&self, script: &str) {
        let path = self.dir.path().join("vhost-user-sealblk");
        fs::remove_file(&path).unwrap();
        // By another process: this one may just be starting others, which would have the file open for writing.
        run(Command::new("sh")
            .args([
                "-c",
                "printf '%s' \"$1\" > \"$2\" && chmod 755 \"$2\"",
                "sh",
                script,
            ])
            .arg(&path));
    }
}

/// The exit code of an upgrade that must fail, and what it says.
fn failed(output: &Output) -> (i32, String) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it succeeded");
    assert!(!said.contains("panicked"), "{said}");
    (output.status.code().unwrap(), said)
}

#[test]
fn an_upgrade_that_fails_leaves_all_as_it_was() {
    let served = Served::new();
    let mut guest = Guest::new(&served.socket);
    let process = served.process();
    let mut fails = |command: &mut Command, code: i32, says: &str| {
        let output = served.upgrade_under(&mut guest, command);
        let (failed_with, said) = failed(&output);
        assert_eq!(failed_with, code, "{said}");
        assert!(said.contains(says), "{said}");
        assert_eq!(served.process(), process);
        guest.settle();
        guest.check_content();
        guest.ask_all();
    };

    // The new process does not start, ends at once, says something else, or never is ready.
    let installed = Installed::new();
    let mut command = upgrade(&installed.sealblk, &served.control);
    installed.with_script("#!/bin/nothing\n");
    fails(&mut command, 1, "cannot execute");
    installed.with_script("#!/bin/sh\nexit 3\n");
    fails(&mut command, 3, "the new process has ended (exit status: 3)");
    installed.with_script("#!/bin/sh\necho no; kill -9 $$\n");
    fails(&mut command, 1, "no");
    installed.with_script("#!/bin/sh\nexec sleep 1000\n");
    fails(command.args(["--timeout", "1"]), 7, "was ended");
    fs::remove_file(installed.dir.path().join("vhost-user-sealblk")).unwrap();
    fails(&mut command, 1, "cannot find the executable vhost-user-sealblk");

    // It does not get the key.
    let (state, moved) = (served.volume.beside("state"), served.volume.beside("moved"));
    fs::rename(&state, &moved).unwrap();
    fails(&mut served.upgrade(), 4, "");
    fs::rename(&moved, &state).unwrap();

    // Nothing of that keeps a good one from success.
    succeeded(&served.upgrade_under(&mut guest, &mut served.upgrade()), &served);
    assert_ne!(served.process(), process);
    guest.settle();
    guest.check_content();
    served.stop();
}

/// What a guest has seen of its disk stays: it would read and write beyond the end, or not reach it.
#[test]
fn a_disk_that_has_become_another_one_for_the_guest_is_not_upgraded() {
    // Its size is that of its file.
    let served = Served::of(Volume::cryptsetup(1 << 20, 512), &[]);
    let mut driver = Driver::connect(&served.socket);
    let process = served.process();
    let file = served.volume.file();
    let len = file.metadata().unwrap().len();
    file.set_len(len + (1 << 20)).unwrap();
    let (code, said) = failed(&served.upgrade().output().unwrap());
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("the capacity"), "{said}");
    assert_eq!(served.process(), process);
    driver.still_serves();
    file.set_len(len).unwrap();
    succeeded(&served.upgrade().output().unwrap(), &served);
    driver.still_serves();
    served.stop();
}

/// A copy of the disk came to its path, as an editor or `mv` puts it there: the new process served that, with the locks of the other one.
#[test]
fn a_path_that_names_another_file_by_now_is_not_upgraded() {
    let header = "--header";
    let dir = tempfile::tempdir().unwrap();
    let (disk, detached) = (dir.path().join("disk"), dir.path().join("header"));
    let args = ["--size", "16M", header, detached.to_str().unwrap()];
    let volume = Volume::created_at(dir, disk.clone(), &args);
    let served = Served::of(volume, &args[2..]);
    let mut driver = Driver::connect(&served.socket);
    let process = served.process();
    for path in [&disk, &detached] {
        let (copy, moved) = (path.with_extension("copy"), path.with_extension("moved"));
        fs::copy(path, &copy).unwrap();
        fs::rename(path, &moved).unwrap();
        fs::rename(&copy, path).unwrap();
        let (code, said) = failed(&served.upgrade().output().unwrap());
        assert_eq!(code, 2, "{said}");
        let says = format!("{} names another file", path.display());
        assert!(said.contains(&says), "{said}");
        assert_eq!(served.process(), process);
        driver.still_serves();
        fs::rename(&moved, path).unwrap();
    }
    succeeded(&served.upgrade().output().unwrap(), &served);
    driver.still_serves();
    served.stop();
}

/// The new process waits for its key, perhaps for long, and knew the disk as it was before: it served the old size, and was known to the
/// agent under a key that had been retired.
#[test]
fn a_disk_that_is_changed_while_the_new_process_starts_is_not_handed_over() {
    let served = Served::new();
    let mut driver = Driver::connect(&served.socket);
    let process = served.process();
    let len = served.volume.file().metadata().unwrap().len();
    let refused = |verb: &[&str]| {
        let upgrade = served.prepare();
        run(Command::new(sealblk_path())
            .args(verb)
            .arg("--control-socket")
            .arg(&served.control));
        let mut handover = served.hand_over_for(&upgrade);
        // An earlier release of the other side sends all.
        let error = match reply::<Value>(&mut handover.connection) {
            Err(CallError::Method(error)) => error.to_string(),
            other => panic!("{other:?}"),
        };
        assert!(error.contains("was resized or rekeyed"), "{error}");
        assert_eq!(served.process(), process);
    };
    served.volume.file().set_len(len + (1 << 20)).unwrap();
    refused(&["resize", "--size", "65M"]);
    refused(&["rekey"]);
    driver.still_serves();
    succeeded(&served.upgrade().output().unwrap(), &served);
    driver.still_serves();
    served.stop();
}

/// The socket of a handover, and the call that waits for its end.
struct Handover {
    connection: Connection,
    socket: Frontend,
}

impl Served {
    fn call(&self, method: &str, parameters: Value) -> Result<Value, String> {
        let mut connection = Connection::to(&self.control, DEADLINE).unwrap();
        let method = format!("org.sealblk.Upgrade.{method}");
        match call::<Value>(&mut connection, &method, parameters, &[]) {
            Ok((answer, _)) => Ok(answer),
            Err(CallError::Method(error)) => Err(error.name),
            Err(error) => panic!("{error}"),
        }
    }

    /// Asks for the disk, as the next process does.
    fn hand_over(&self) -> Handover {
        self.hand_over_for(&self.prepare())
    }

    /// Begins an upgrade, and asks for what the next process needs at its start.
    fn prepare(&self) -> Value {
        let begun = self.call("Begin", json!({})).unwrap();
        let upgrade = begun["upgrade"].clone();
        let prepared = self.call("Prepare", json!({ "upgrade": upgrade, "versions": [1] }));
        assert_eq!(prepared.unwrap()["version"], 1);
        upgrade
    }

    fn hand_over_for(&self, upgrade: &Value) -> Handover {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut connection = Connection::to(&self.control, DEADLINE).unwrap();
        let parameters = json!({ "upgrade": upgrade, "version": 1 });
        begin(
            &mut connection,
            "org.sealblk.Upgrade.HandOver",
            parameters,
            &[theirs.as_fd()],
        )
        .unwrap();
        Handover {
            connection,
            socket: Frontend::over(ours),
        }
    }
}

/// The numbers of messages of a handover.
const END: u32 = 0x5ea1_0006;
const READY: u32 = 0x5ea1_0007;
const GO: u32 = 0x5ea1_0008;

impl Handover {
    /// Receives all.
    fn receive(&self) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            let message = self.socket.receive().expect("a whole handover");
            if message.request == END {
                return messages;
            }
            messages.push(message);
        }
    }

    fn say(&self, number: u32) {
        let next = json!({ "process": std::process::id() }).to_string();
        self.socket.send(number, 0, next.as_bytes(), &[]);
    }

    /// The error that the call has in the end.
    fn error(mut self) -> String {
        drop(self.socket);
        match reply::<Value>(&mut self.connection) {
            Err(CallError::Method(error)) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }
}

/// The next process is killed, or is defective, at each step before the disk is its own.
#[test]
fn the_old_process_continues_if_the_new_one_ends_in_the_handover() {
    let served = Served::new();
    let mut guest = Guest::new(&served.socket);
    let process = served.process();
    let steps: [&dyn Fn(&Handover); 5] = [
        &|_| {},
        &|handover| drop(handover.socket.receive()),
        &|handover| drop(handover.receive()),
        &|handover| {
            handover.receive();
            handover.say(GO);
        },
        &|handover| {
            handover.receive();
            handover.socket.send_bytes(&[0x55; 64], &[]);
        },
    ];
    for (step, until) in steps.iter().enumerate() {
        guest.run(Duration::from_millis(20));
        let handover = served.hand_over();
        until(&handover);
        let error = handover.error();
        assert!(
            error.contains("the new process was not ready"),
            "step {step}: {error}"
        );
        assert_eq!(served.process(), process);
        guest.settle();
        guest.check_content();
        guest.ask_all();
    }
    let status = served.status();
    assert_eq!(status["claim"]["state"], "held");
    assert!(
        served.first.stderr().contains("UpgradeFailed"),
        "{}",
        served.first.stderr()
    );
    // What was given away for a while is not given back twice: others stay out.
    serve_fails(&served.volume, &[]).assert_says(5, &["in use"]);
    guest.settle();
    served.stop();
}

/// The next process has the disk, and is killed before it does anything with it: that is a kill as any other.
#[test]
fn a_new_process_that_is_killed_once_it_has_the_disk_loses_nothing() {
    let mut served = Served::new();
    let mut guest = Guest::new(&served.socket);
    guest.run(Duration::from_millis(20));
    let handover = served.hand_over();
    let messages = handover.receive();
    handover.say(READY);
    assert_eq!(handover.socket.receive().unwrap().request, GO);
    assert!(served.first.wait().status.success());
    // Both have ended, but for the descriptors that this process has.
    serve_fails(&served.volume, &[]).assert_says(5, &["in use"]);
    drop((messages, handover));
    served.first = start(&served.volume, &served.socket, &served.control, &[]);
    // A process that another test is about to start can have the listener of before for a moment.
    served.first.wait_stderr("serving");
    guest.driver.reconnect(&served.socket);
    guest.settle();
    guest.check_content();
    served.first.signal(Signal::TERM);
    assert!(served.first.wait().status.success());
}

/// One of both is killed, whenever that is: the disk is served by the other one, or by the next that is started.
#[test]
fn killed_at_any_moment_of_an_upgrade_neither_process_loses_anything() {
    let mut served = Served::new();
    let mut guest = Guest::new(&served.socket);
    let mut outcomes = [0; 3];
    let kills = kills(12);
    for kill in 0..kills {
        let old = served.process();
        // The last requests of before are in flight meanwhile.
        guest.run(Duration::from_millis(5));
        let seen = served.first.stderr().matches("DiskUnlocked").count();
        let mut child = spawn(&mut served.upgrade());
        let new = loop {
            if let Some(&new) = children_of(child.id()).first() {
                break new;
            }
            assert!(child.try_wait().unwrap().is_none(), "{}", served.first.stderr());
        };
        // When it has got its key, which takes most of the time.
        while served.first.stderr().matches("DiskUnlocked").count() == seen {
            std::thread::sleep(Duration::from_micros(200));
            assert!(!has_ended(new), "{}", served.first.stderr());
        }
        let time = guest.random.below(60_000);
        std::thread::sleep(Duration::from_micros(time));
        let victim = if kill % 2 == 0 { old } else { new };
        signal(victim, Signal::KILL);
        while child.try_wait().unwrap().is_none() {
            guest.run(Duration::from_millis(1));
        }
        let survivor = if victim == old { new } else { old };
        wait_ended(victim);
        let succeeded = child.wait_with_output().unwrap().status.success();
        // The new process may have been killed after it took the disk over, and the old one before it gave it away.
        let is_served = match succeeded {
            true => victim == old,
            false => victim == new && !has_ended(old),
        };
        if is_served {
            outcomes[usize::from(victim == old)] += 1;
            assert_eq!(served.process(), survivor, "kill {kill}");
        } else {
            outcomes[2] += 1;
            wait_ended(survivor);
            served.first = start(&served.volume, &served.socket, &served.control, &[]);
            // Before that, the socket's name may be that of the processes that were killed.
            served.first.wait_stderr("serving");
            guest.driver.reconnect(&served.socket);
        }
        guest.settle();
        guest.check_content();
        guest.ask_all();
    }
    println!(
        "{kills} kills: the old process continued {}, the new one {}, neither {}",
        outcomes[0], outcomes[1], outcomes[2]
    );
    guest.settle();
    served.stop();
}

#[test]
fn a_handover_that_is_out_of_date_or_of_another_version_or_user_is_refused() {
    let served = Served::with(&["--control-socket-mode", "666"]);
    let begun = served.call("Begin", json!({})).unwrap();
    let first = begun["upgrade"].clone();
    let arguments: Vec<_> = begun["arguments"].as_array().unwrap().iter().collect();
    assert!(!arguments.is_empty());
    let prepare = |upgrade: &Value, versions: Value| {
        served.call("Prepare", json!({ "upgrade": upgrade, "versions": versions }))
    };
    // A release that knows a later version as well, and more than this one.
    let prepared = served.call(
        "Prepare",
        json!({ "upgrade": first, "versions": [1, 2, 3], "whatComesLater": {} }),
    );
    assert_eq!(prepared.unwrap()["version"], 1);
    assert_eq!(
        prepare(&first, json!([2, 3])).unwrap_err(),
        "org.sealblk.Upgrade.NoCommonVersion"
    );
    let second = served.call("Begin", json!({})).unwrap()["upgrade"].clone();
    let out_of_date = "org.sealblk.Upgrade.OutOfDate";
    assert_eq!(prepare(&first, json!([1])).unwrap_err(), out_of_date);
    served.call("End", json!({ "upgrade": second })).unwrap();
    assert_eq!(prepare(&second, json!([1])).unwrap_err(), out_of_date);
    assert_eq!(
        served.call("End", json!({ "upgrade": second })).unwrap_err(),
        out_of_date
    );

    if rustix::process::geteuid().is_root() {
        let installed = Installed::new();
        for directory in [installed.dir.path(), served.control.parent().unwrap()] {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let mut command = upgrade(&installed.sealblk, &served.control);
        let output = command.uid(4_200_100).gid(4_200_100).output().unwrap();
        let (code, said) = failed(&output);
        assert_eq!(code, 7, "{said}");
        assert!(said.contains("the disk is served as user 0"), "{said}");
    }
    Driver::connect(&served.socket).still_serves();
    served.stop();
}

/// Whoever has made a control socket tells what to start: root started a process with arguments and an environment of a stranger's choice.
#[test]
fn a_control_socket_of_another_user_is_told_nothing() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let socket = dir.path().join("control.sock");
    let bind = socket.clone();
    // The user of this thread alone.
    let stranger = std::thread::spawn(move || {
        let user = rustix::process::Uid::from_raw(4_200_100);
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        UnixListener::bind(bind).unwrap()
    });
    let listener = stranger.join().unwrap();
    let (code, said) = failed(&upgrade(Path::new(sealblk_path()), &socket).output().unwrap());
    assert_eq!(code, 7, "{said}");
    assert!(said.contains("the disk is served as user 4200100"), "{said}");
    let (mut caller, _) = listener.accept().unwrap();
    let mut heard = Vec::new();
    caller.read_to_end(&mut heard).unwrap();
    assert!(heard.is_empty(), "{}", String::from_utf8_lossy(&heard));
}

/// It was said that the storage may hang.
#[test]
fn a_front_end_in_the_middle_of_a_message_is_named_as_the_cause() {
    let served = Served::new();
    let mut driver = Driver::connect(&served.socket);
    driver.frontend.send_bytes(&[1, 0, 0, 0], &[]);
    let (code, said) = failed(&served.upgrade().output().unwrap());
    assert_eq!(code, 7, "{said}");
    assert!(
        said.contains("the front-end is just asking for something"),
        "{said}"
    );
    // GET_FEATURES goes on.
    driver.frontend.send_bytes(&[1, 0, 0, 0, 0, 0, 0, 0], &[]);
    driver.frontend.receive().unwrap();
    driver.still_serves();
    served.stop();
}

#[test]
fn a_disk_without_a_front_end_is_upgraded_and_front_ends_connect_to_the_new_process() {
    let served = Served::new();
    for _ in 0..2 {
        succeeded(&served.upgrade().output().unwrap(), &served);
        let mut driver = Driver::connect(&served.socket);
        driver.still_serves();
        drop(driver);
    }
    served.stop();
}

#[test]
fn a_locked_disk_stays_locked_and_its_requests_wait_in_the_new_process() {
    let served = Served::new();
    let mut guest = Guest::new(&served.socket);
    let control = |verb: &str| {
        run(Command::new(sealblk_path())
            .args([verb, "--control-socket"])
            .arg(&served.control))
    };
    guest.run(Duration::from_millis(10));
    control("lock");
    succeeded(&served.upgrade().output().unwrap(), &served);
    let status = served.status();
    assert_eq!(
        (&status["state"], &status["lock"]["by"]),
        (&json!("locked"), &json!("operator"))
    );
    guest.run(Duration::from_millis(100));
    let answered = guest.answered;
    guest.run(Duration::from_millis(100));
    assert_eq!(guest.answered, answered);
    control("unlock");
    guest.settle();
    guest.check_content();
    served.stop();
}

/// What a front-end can set in the middle: more memory, and a log of a migration.
#[test]
fn memory_that_was_added_and_a_log_go_over_to_the_new_process() {
    let served = Served::new();
    let mut driver = Driver::connect(&served.socket);
    let regions = driver.memory.regions();
    let last = regions.last().unwrap();
    driver.frontend.remove_region(last);
    driver.frontend.add_region(last);
    let log = Log::of_memory(END_OF_MEMORY);
    driver.frontend.set_log(&log);
    driver.log_all(true);
    driver.still_serves();
    succeeded(&served.upgrade().output().unwrap(), &served);
    let before = log.pages();
    assert!(!before.is_empty());
    let words = log.words();
    words.take(0..8 * log.len);
    driver.still_serves();
    assert!(!log.pages().is_empty(), "the new process marks nothing");
    served.stop();
}

#[test]
fn a_passphrase_that_can_be_read_once_is_given_again() {
    let volume = Volume::cryptsetup(1 << 20, 512);
    let (socket, control) = (volume.beside("vhost.sock"), volume.beside("control.sock"));
    let passphrase = volume.beside("passphrase");
    let mut command = serve(&volume, &socket, &["--control-socket", control.to_str().unwrap()]);
    // In place of the file that the volume comes with.
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_owned()).collect();
    command = Command::new(sealblk_path());
    command.args(
        arguments
            .into_iter()
            .map(|argument| match argument == *passphrase {
                true => "-".into(),
                false => argument,
            }),
    );
    let first = Process::spawn_with_stdin(&mut command, fs::File::open(&passphrase).unwrap().into());
    first.wait_stderr("serving");
    let served = Served {
        volume,
        socket,
        control,
        first,
    };
    let mut driver = Driver::connect(&served.socket);
    driver.still_serves();
    let (code, said) = failed(&served.upgrade().output().unwrap());
    assert_eq!(code, 7, "{said}");
    assert!(said.contains("--passphrase-file"), "{said}");
    for _ in 0..2 {
        let mut command = served.upgrade();
        command.arg("--passphrase-file").arg(&passphrase);
        succeeded(&command.output().unwrap(), &served);
        driver.still_serves();
    }
    // The new process can read it again.
    succeeded(&served.upgrade().output().unwrap(), &served);
    driver.still_serves();
    served.stop();
}

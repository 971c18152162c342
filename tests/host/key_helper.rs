//! The process that gets a served disk's keys, and the one that serves the disk: what each of them has, what the one gives the
//! other, and what becomes of one without the other.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::DEADLINE;
use common::agent::Agent;
use common::driver::Driver;
use common::pattern;
use common::process::children_of;
use common::secrets::{Search, binding, readable_memory, slot_secret, token, without_secret_memory};
use common::serve::{Server, sealblk_path, serve};
use common::volume::{MIB, PASSPHRASE, Volume, run};
use hkdf::Hkdf;
use rustix::process::{Pid, Signal};
use sealblk::control::varlink::{CallError, call};
use sealblk::control::wire::{self, Connection};
use sealblk::providers::registry::Registry;
use serde_json::{Value, json};
use sha2::Sha256;

/// A compromised `serve` speaks to a helper as it likes.
#[test]
fn a_helper_gets_the_keys_of_the_first_volume_that_it_is_shown_and_no_others() {
    let [own, other] = [(); 2].map(|()| Volume::new());
    // Both are of the same providers: nothing but the helper keeps the one from the other.
    let state = other.beside("state");
    fs::remove_dir_all(&state).unwrap();
    run(Command::new("cp").arg("-r").arg(own.beside("state")).arg(&state));
    let other = other.beside("disk");
    run(Command::new(sealblk_path())
        .args(["--state-dir".as_ref(), own.beside("state").as_os_str()])
        .args(["create", "--force", "--size", "1M"].map(AsRef::<std::ffi::OsStr>::as_ref))
        .arg(&other));

    let helper = Helper::start(&own);
    let unwrap = |disk: &Path, purpose: &str| {
        let (binding, wrapped) = binding(disk);
        json!({ "binding": binding, "purpose": purpose, "wrapped": wrapped })
    };
    // Nothing, before it has read a header.
    helper.refuses(AGENT, "Unwrap", unwrap(&own.path, "attach"), "NotThisVolume");
    helper.refuses(OWN, "ReadPassphrase", json!({}), "NotOpened");
    let group = json!({ "name": "root" });
    let (number, _) = helper.call(OWN, "GetGroup", group.clone(), &[]).unwrap();
    assert_eq!(number, json!({ "number": 0 }));
    let nobodys = json!({ "name": "no-such-group" });
    helper.refuses(OWN, "GetGroup", nobodys, "Failed");
    helper.refuses(OWN, "GetGrants", json!({}), "NotOpened");
    helper.open(&own.path).unwrap();
    // What the host is like, it tells no process that has read something of a disk.
    helper.refuses(OWN, "GetGroup", group, "AlreadyOpened");

    let (answer, descriptors) = helper
        .call(AGENT, "Unwrap", unwrap(&own.path, "attach"), &[])
        .unwrap();
    let secret = wire::take(&descriptors[answer["secret"].as_u64().unwrap() as usize]).unwrap();
    let registry = Registry::open(&own.beside("state")).unwrap();
    assert!(secret.ct_eq(&slot_secret(&own.path, &registry)));
    // The provider would unwrap it.
    slot_secret(&other, &registry);
    for purpose in ["attach", "recrypt"] {
        helper.refuses(AGENT, "Unwrap", unwrap(&other, purpose), "NotThisVolume");
    }
    let (foreign, _) = binding(&other);
    let settle = json!({ "binding": foreign, "purpose": "recrypt", "stored": false });
    helper.refuses(AGENT, "SettleBinding", settle, "NotThisVolume");
    let wrap = json!({ "binding": foreign, "purpose": "recrypt", "secret": 0 });
    helper.refuses(AGENT, "Wrap", wrap, "NotThisVolume");
    let told = helper.open(&other).unwrap_err();
    assert!(told.contains("NotThisVolume"), "{told}");
    helper.refuses(AGENT, "Unwrap", unwrap(&other, "attach"), "NotThisVolume");

    // Nor what a disk that is served does not need.
    for purpose in ["access", "create", "check"] {
        helper.refuses(AGENT, "Unwrap", unwrap(&own.path, purpose), "WrongPurpose");
        let create = json!({ "provider": "native", "purpose": purpose });
        helper.refuses(AGENT, "CreateKek", create, "WrongPurpose");
    }
    for method in [
        "ListProviders",
        "ListVolumes",
        "RevokeKek",
        "PushKek",
        "RemoveProvider",
    ] {
        helper.refuses(AGENT, method, json!({}), "MethodNotFound");
    }
    helper.refuses(OWN, "ReadPassphrase", json!({}), "NotOpened");
}

/// With the arena where it can be read, so that a search that finds nothing shows that nothing is there. The volume key is there:
/// the search finds.
#[test]
fn the_serving_process_has_no_way_to_a_key_and_its_helper_no_key() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to look");
        return;
    }
    let volume = Volume::new();
    let state = volume.beside("state");
    let primary = fs::read(state.join("providers/native/primary.key")).unwrap()[16..48].to_vec();
    let key_id = token(&volume.path)["key_id"].as_str().unwrap().to_owned();
    let mut kek = [0; 32];
    Hkdf::<Sha256>::new(None, &primary)
        .expand_multi_info(&[b"sealblk native KEK\0", key_id.as_bytes()], &mut kek)
        .unwrap();
    let slot_secret = slot_secret(&volume.path, &Registry::open(&state).unwrap());
    let search = Search::default()
        .key("primary key", &primary)
        .key("KEK", &kek)
        .key("slot secret", &slot_secret);
    let disk = Disk::readable(volume, |_| {});
    for round in 0..3 {
        for process in [disk.server.process.pid(), disk.helper()] {
            search.assert_absent(
                &readable_memory(process),
                &format!("round {round}, process {process}"),
            );
        }
        disk.does("lock");
        disk.does("unlock");
        disk.does("rekey");
    }
    for path in open_files(disk.server.process.pid()) {
        assert!(!path.starts_with(&state), "{path:?}");
    }

    let mut volume = Volume::cryptsetup(MIB, 512);
    let passphrase = std::mem::replace(&mut volume.open[1], "fd:7".into());
    let search = Search::default().text("passphrase", PASSPHRASE.as_bytes());
    let disk = Disk::readable(volume, |command| {
        let direct = std::mem::replace(command, Command::new("sh"));
        command.args(["-c", r#"exec "$@" 7<"$0""#, &passphrase]);
        command.arg(direct.get_program()).args(direct.get_args());
    });
    let (serving, helper) = (disk.server.process.pid(), disk.helper());
    for process in [serving, helper] {
        search.assert_absent(&readable_memory(process), &format!("process {process}"));
    }
    let has_it = |process| open_files(process).contains(&PathBuf::from(&passphrase));
    assert_eq!((has_it(serving), has_it(helper)), (false, true));
}

/// The descriptors of its parent would keep a front-end's connection, or the claim on the disk, alive.
#[test]
fn a_helper_has_its_socket_and_nothing_else_of_the_serving_process() {
    let disk = Disk::new(Volume::new());
    let mut files = open_files(disk.helper());
    files.retain(|path| !path.starts_with("/dev/null") && !path.to_string_lossy().starts_with("pipe:"));
    assert!(
        matches!(&*files, [socket] | [socket, _] if socket.to_string_lossy().starts_with("socket:"))
            && files
                .iter()
                .all(|path| path.to_string_lossy().starts_with("socket:")),
        "{files:?}"
    );
    let status = fs::read_to_string(format!("/proc/{}/limits", disk.helper())).unwrap();
    let core = status
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
}

#[test]
fn a_disk_whose_helper_was_killed_is_served_on_and_says_what_it_cannot_do() {
    let disk = Disk::new(Volume::new());
    let mut driver = disk.server.connect();
    let bytes = pattern(1, 4096);
    driver.write(0, &bytes);
    let helper = disk.helper();
    kill(helper, Signal::KILL);
    disk.server.process.wait_stderr("the key helper has ended");
    assert!(
        !Path::new(&format!("/proc/{helper}")).exists(),
        "a zombie is left"
    );
    for (verb, says) in [
        ("lock", "sealblk could not unlock the disk again"),
        ("rekey", "the process that gets this disk's keys has ended"),
    ] {
        let refused = disk.run(verb);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(7), "{said}");
        assert!(
            said.contains(says) && said.contains("end `sealblk serve` (SIGTERM)"),
            "{said}"
        );
    }
    assert_eq!(disk.status()["state"], "open");
    assert!(driver.read(0, bytes.len()) == bytes);
    driver.still_serves();
    disk.server.still_serves_both(driver);

    let locked = Disk::new(Volume::new());
    let driver = locked.server.connect();
    locked.does("lock");
    kill(locked.helper(), Signal::KILL);
    locked.server.process.wait_stderr("the key helper has ended");
    let refused = locked.run("unlock");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(7), "{said}");
    assert!(
        said.contains("the process that gets this disk's keys has ended"),
        "{said}"
    );
    assert_eq!(locked.status()["state"], "locked");
    assert_eq!(driver.capacity(), 64 * MIB / 512);
    locked.server.stop();
}

#[test]
fn an_agent_that_was_restarted_is_found_again() {
    let mut agent = Agent::new("");
    let disk = Disk::new(agent.volume());
    for _ in 0..2 {
        disk.does("lock");
        agent.stop();
        let refused = disk.run("unlock");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains("this host's key agent does not answer"), "{said}");
        assert!(said.contains("agent.sock"), "{said}");
        agent.start();
        disk.does("unlock");
        disk.does("rekey");
    }
    disk.server.still_serves();
}

/// Ctrl-C in a terminal goes to both, and so does what a service manager sends.
#[test]
fn a_helper_outlives_signals_and_ends_with_the_process_that_serves() {
    for how in [Signal::TERM, Signal::KILL] {
        let disk = Disk::new(Volume::new());
        let helper = disk.helper();
        for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
            kill(helper, signal);
        }
        disk.does("lock");
        disk.does("unlock");
        disk.server.process.signal(how);
        gone(helper);
    }
    // Also while it waits for a passphrase.
    let mut volume = Volume::cryptsetup(MIB, 512);
    let pipe = volume.beside("pipe");
    run(Command::new("mkfifo").arg(&pipe));
    volume.open[1] = pipe.display().to_string();
    let socket = volume.beside("sock");
    let mut process = common::process::Process::spawn(&mut serve(&volume, &socket, &[]));
    let start = Instant::now();
    while !socket.exists() {
        assert!(start.elapsed() < DEADLINE, "{}", process.stderr());
        thread::sleep(Duration::from_millis(5));
    }
    let helper = child_of(process.pid());
    process.signal(Signal::TERM);
    assert!(process.wait().status.success());
    gone(helper);
}

/// The key of a disk that is not encrypted is no one's to get.
#[test]
fn a_disk_that_is_no_volume_has_no_helper() {
    let volume = Volume::plain(MIB);
    let server = Server::start(&volume);
    assert!(children_of(server.process.pid()).is_empty());
    let server = Server::null("64M", &[]);
    assert!(children_of(server.process.pid()).is_empty());
}

const OWN: &str = "org.sealblk.KeyHelper";
const AGENT: &str = "org.sealblk.Agent";

/// A helper that this process has started in the place of `serve`.
struct Helper {
    child: Child,
    connection: std::cell::RefCell<Connection>,
}

impl Helper {
    fn start(volume: &Volume) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let child = Command::new(sealblk_path())
            .args(&volume.open)
            .arg("key-helper")
            .arg(format!("--fd={}", theirs.as_raw_fd()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            child,
            connection: Connection::new(ours, DEADLINE).into(),
        }
    }

    fn call(
        &self,
        interface: &str,
        method: &str,
        parameters: Value,
        descriptors: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<(Value, Vec<std::os::fd::OwnedFd>), CallError> {
        let method = format!("{interface}.{method}");
        call(
            &mut self.connection.borrow_mut(),
            &method,
            parameters,
            descriptors,
        )
    }

    fn open(&self, disk: &Path) -> Result<Value, String> {
        let file = File::open(disk).unwrap();
        let parameters = json!({ "header": 0, "path": disk });
        let opened = self.call(OWN, "Open", parameters, &[file.as_fd()]);
        opened
            .map(|(answer, _)| answer)
            .map_err(|error| error.to_string())
    }

    fn refuses(&self, interface: &str, method: &str, parameters: Value, error: &str) {
        match self.call(interface, method, parameters, &[]) {
            Err(CallError::Method(told)) => {
                let name = told.name.rsplit('.').next().unwrap().to_owned();
                assert_eq!(name, error, "{method}: {told}");
            }
            other => panic!("{method}: {other:?}"),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A volume that is served with a control socket.
struct Disk {
    server: Server,
    control: PathBuf,
    _volume: Option<Volume>,
}

impl Disk {
    fn new(volume: Volume) -> Self {
        let control = volume.beside("control");
        let args = ["--control-socket", control.to_str().unwrap()];
        Self {
            server: Server::of(volume, &args),
            control: control.clone(),
            _volume: None,
        }
    }

    /// One whose processes keep keys where they can be read; `alter` has the last word on how it is started.
    fn readable(volume: Volume, alter: impl FnOnce(&mut Command)) -> Self {
        let (control, socket) = (volume.beside("control"), volume.beside("sock"));
        let args = ["--control-socket", control.to_str().unwrap()];
        let mut command = serve(&volume, &socket, &args);
        alter(&mut command);
        without_secret_memory(&mut command);
        let server = Server::at(&mut command, socket);
        server.process.wait_stderr("serving");
        Driver::connect(server.socket()).still_serves();
        Self {
            server,
            control,
            _volume: Some(volume),
        }
    }

    fn helper(&self) -> u32 {
        child_of(self.server.process.pid())
    }

    fn run(&self, verb: &str) -> Output {
        let mut command = Command::new(sealblk_path());
        command.args([verb, "--control-socket"]).arg(&self.control);
        command.output().unwrap()
    }

    fn does(&self, verb: &str) {
        let output = self.run(verb);
        assert!(
            output.status.success(),
            "{verb}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn status(&self) -> Value {
        let mut command = Command::new(sealblk_path());
        let output = run(command
            .args(["status", "--json", "--control-socket"])
            .arg(&self.control));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn child_of(process: u32) -> u32 {
    match children_of(process)[..] {
        [child] => child,
        ref others => panic!("{others:?}"),
    }
}

fn open_files(process: u32) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    entries
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .collect()
}

fn kill(process: u32, signal: Signal) {
    rustix::process::kill_process(Pid::from_raw(process as i32).unwrap(), signal).unwrap();
}

fn gone(process: u32) {
    let start = Instant::now();
    while fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(start.elapsed() < DEADLINE, "process {process} lives on");
        thread::sleep(Duration::from_millis(5));
    }
}

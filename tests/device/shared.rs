//! What a front-end shares with the device, and goes on to have in its hands: descriptors, their flags, the files behind them,
//! and the guest's memory. None of it may hold up `lock` or the end of the process, whatever becomes of it.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::driver::{Data, Driver, S_IOERR, S_OK, SECTOR, Setup, T_IN};
use common::frontend::*;
use common::fuse::Fuse;
use common::memory::{HOLE, Region};
use common::process::Process;
use common::queue::{readable, writable};
use common::serve::{Server, sealblk_path, serve};
use common::volume::Volume;
use common::{DEADLINE, driver};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::MemfdFlags;
use rustix::process::Signal;

/// A disk that can be locked.
struct Lockable {
    server: Server,
    control: PathBuf,
}

impl Lockable {
    fn new() -> Self {
        let volume = Volume::new();
        let control = volume.beside("control");
        let server = Server::of(volume, &["--control-socket", &control.display().to_string()]);
        Lockable { server, control }
    }

    fn verb(&self, verb: &str) {
        verb_on(&self.control, verb);
    }
}

fn verb_on(control: &PathBuf, verb: &str) {
    let mut command = Command::new(sealblk_path());
    command.args([verb, "--control-socket"]).arg(control);
    let ended = Process::spawn(&mut command).wait();
    assert!(ended.status.success(), "{verb}: {}", ended.stderr);
}

/// O_NONBLOCK was looked at when a ring started. A front-end that cleared it later and filled the counter had the worker
/// wait in write(2), with the key in memory.
#[test]
fn a_call_that_is_made_to_block_later_delays_neither_lock_nor_the_end() {
    let disk = Lockable::new();
    let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let mut driver = disk.server.connect();
    driver
        .frontend
        .tell(SET_VRING_CALL, &0u64.to_ne_bytes(), &[call.as_fd()]);
    let fill = || {
        rustix::io::ioctl_fionbio(&call, true).unwrap();
        let _ = rustix::io::read(&call, &mut [0; 8]);
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        rustix::io::ioctl_fionbio(&call, false).unwrap();
    };
    let read = |driver: &mut Driver| {
        let queue = driver.queue();
        let index = queue.used_index();
        queue.set_used_event(index);
        driver.submit(0, T_IN, 0, Data::In(SECTOR));
        driver.queue().watch_used();
    };
    for _ in 0..2 {
        fill();
        read(&mut driver);
        disk.verb("lock");
        disk.verb("unlock");
    }
    // A call that has room is signalled as ever.
    let _ = rustix::io::read(&call, &mut [0; 8]);
    read(&mut driver);
    let deadline = Timespec::try_from(DEADLINE).unwrap();
    assert_eq!(
        poll(&mut [PollFd::new(&call, PollFlags::IN)], Some(&deadline)),
        Ok(1)
    );
    fill();
    read(&mut driver);
    disk.server.stop();
}

#[test]
fn descriptors_of_another_kind_than_a_message_has_end_the_session() {
    let server = Server::new();
    let pipe = || -> OwnedFd { std::io::pipe().unwrap().1.into() };
    let socket = || -> OwnedFd { UnixStream::pair().unwrap().0.into() };
    let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let cases = [
        (SET_VRING_CALL, pipe(), "an eventfd"),
        (SET_VRING_CALL, socket(), "an eventfd"),
        (SET_VRING_KICK, pipe(), "an eventfd"),
        (SET_VRING_ERR, socket(), "an eventfd"),
        (SET_BACKEND_REQ_FD, event(), "a Unix stream socket"),
        (
            GET_FEATURES,
            event(),
            "GET_FEATURES of the front-end is not valid",
        ),
    ];
    for (request, fd, said) in cases {
        let driver = Driver::unstarted(Frontend::connect(server.socket()), Setup::default());
        let body = if [SET_BACKEND_REQ_FD, GET_FEATURES].contains(&request) {
            vec![]
        } else {
            vec![0; 8]
        };
        driver.frontend.send(request, NEED_REPLY, &body, &[fd.as_fd()]);
        driver.frontend.wait_closed();
        server.process.wait_stderr(said);
        server.still_serves();
    }
    server.stop();
}

/// A file of FUSE has a daemon that can be the front-end itself. fstat(2), fstatfs(2), mmap(2), a page fault and close(2) ask it,
/// and waited for ever.
#[test]
fn files_whose_file_system_never_answers_delay_no_lock() {
    let Some(fuse) = Fuse::mount() else {
        eprintln!("skipped: FUSE cannot be mounted");
        return;
    };
    let disk = Lockable::new();
    fuse.ignore(disk.server.process.pid());
    let table = mem_table(&[Region::create(0, 4096)]);
    for request in [
        SET_MEM_TABLE,
        SET_VRING_KICK,
        SET_VRING_CALL,
        SET_VRING_ERR,
        SET_BACKEND_REQ_FD,
        GET_FEATURES,
    ] {
        let mut driver = disk.server.connect();
        driver.still_serves();
        let body = match request {
            SET_MEM_TABLE => table.clone(),
            SET_BACKEND_REQ_FD | GET_FEATURES => vec![],
            _ => vec![0; 8],
        };
        let file = fuse.open();
        driver.frontend.send(request, NEED_REPLY, &body, &[file.as_fd()]);
        driver.frontend.wait_closed();
        disk.verb("lock");
        disk.verb("unlock");
        disk.server.still_serves();
    }
    // The key is gone then, too. Only the kernel's own close, at the very end, waits for the daemon.
    disk.server.process.signal(Signal::TERM);
    disk.server.process.wait_stderr("stopping");
    fuse.answer();
    disk.server.stop();
}

/// Behind one that cannot be closed, all others stayed open, until there was none left for who wanted to lock the disk.
#[test]
fn front_ends_whose_descriptors_cannot_be_closed_are_turned_away() {
    let Some(fuse) = Fuse::mount() else {
        eprintln!("skipped: FUSE cannot be mounted");
        return;
    };
    let disk = Lockable::new();
    fuse.ignore(disk.server.process.pid());
    let pass = |fds: &[BorrowedFd<'_>]| {
        let frontend = Frontend::over(UnixStream::connect(disk.server.socket()).unwrap());
        frontend.send(SET_VRING_KICK, 0, &[0; 8], fds);
        frontend.wait_closed();
    };
    pass(&[fuse.open().as_fd()]);
    let zero = File::open("/dev/zero").unwrap();
    let many = [zero.as_fd(); 250];
    pass(&many);
    pass(&many);
    let turned_away = Frontend::over(UnixStream::connect(disk.server.socket()).unwrap());
    turned_away.wait_closed();
    disk.server
        .process
        .wait_stderr("descriptors that cannot be closed");
    let open = disk.server.facts().descriptors;
    assert!(open < 1000, "{open} descriptors are open");
    disk.verb("lock");
    disk.verb("unlock");
    fuse.answer();
    disk.server.wait_idle();
    disk.server.still_serves();
    disk.server.stop();
}

/// A TCP socket that lingers, in a message that nobody reads, is closed with the connection that it came by. The thread that
/// does that waited for the peer of that socket.
#[test]
fn sockets_that_linger_in_unread_messages_delay_no_end() {
    let server = Server::new();
    let _driver = server.connect();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let lingering = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let _unread = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&lingering, Some(Duration::from_secs(3600))).unwrap();
    lingering.set_nonblocking(true).unwrap();
    while (&lingering).write(&[0; 65536]).is_ok() {}
    // The message is there before the connection is accepted, and turned away.
    server.process.signal(Signal::STOP);
    let turned_away = Frontend::over(UnixStream::connect(server.socket()).unwrap());
    turned_away.send_bytes(&[0], &[lingering.as_fd()]);
    // The last one, which is closed by whoever closes that message.
    drop(lingering);
    server.process.signal(Signal::CONT);
    server.process.wait_stderr("a second front-end is turned away");
    // Nor of the next one that is turned away.
    Frontend::over(UnixStream::connect(server.socket()).unwrap()).wait_closed();
    server.stop();
}

/// Any file was mapped: /dev/zero grew the process by what was written to it.
#[test]
fn guest_memory_is_in_files_of_memory_only() {
    let server = Server::new();
    let ram = tempfile::tempfile_in("/dev/shm").unwrap();
    ram.set_len(4096).unwrap();
    let on_disk = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    on_disk.as_file().set_len(4096).unwrap();
    let zero = || File::options().read(true).write(true).open("/dev/zero").unwrap();
    let read_only = {
        let (file, path) = tempfile::NamedTempFile::new_in("/dev/shm").unwrap().into_parts();
        file.set_len(4096).unwrap();
        File::open(&path).unwrap()
    };
    let name = on_disk.path().display().to_string();
    let cases: [(File, Option<&str>); 4] = [
        (ram, None),
        (on_disk.reopen().unwrap(), Some(&name)),
        (
            zero(),
            Some("guest memory is in /dev/zero, which is neither a memfd"),
        ),
        (read_only, Some("read-only")),
    ];
    for (file, refused) in cases {
        let region = Region {
            guest: HOLE,
            len: 4096,
            user: 0x7f00_0000_0000,
            file: file.into(),
        };
        let mut driver = server.connect();
        driver.frontend.send(
            ADD_MEM_REG,
            NEED_REPLY,
            &single_region(&region),
            &[region.file.as_fd()],
        );
        match refused {
            None => {
                assert_eq!(driver.frontend.receive().unwrap().u64(), 0);
                driver.still_serves();
            }
            Some(said) => {
                driver.frontend.wait_closed();
                server.process.wait_stderr(said);
                server.process.wait_stderr("share=on");
            }
        }
    }
    server.still_serves();
    server.stop();
}

/// The page that was put in the place of a missing one had 4096 bytes, which cannot replace a part of a huge page: the access
/// was repeated and ended the process. With missing pages here and there it ended too, for want of mappings.
#[test]
fn huge_pages_that_are_taken_away_end_the_session_and_nothing_else() {
    const PAGE: u64 = 2 << 20;
    let Some(_pages) = HugePages::reserve(4) else {
        eprintln!("skipped: no huge pages can be had");
        return;
    };
    let server = Server::new();
    for left in [0, PAGE] {
        let mut driver = server.connect();
        let file =
            rustix::fs::memfd_create("sealblk-test-huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).unwrap();
        rustix::fs::ftruncate(&file, 2 * PAGE).unwrap();
        let region = Region {
            guest: HOLE,
            len: 2 * PAGE,
            user: 0x7f00_0000_0000,
            file: File::from(file).into(),
        };
        driver.frontend.add_region(&region);
        let header = driver.memory.filled(&driver::header(T_IN, 0));
        let status = driver.memory.buffer(1);
        let at = HOLE + PAGE;
        let buffers = [readable(header, 16), writable(at, SECTOR), writable(status, 1)];
        driver.run_chain(&buffers);
        assert_eq!(driver.memory.read(status, 1), [S_OK]);

        rustix::fs::ftruncate(&region.file, left).unwrap();
        let head = driver.queue().chain(&buffers);
        driver.queue().offer(&[head]);
        driver.queue().kick();
        driver.frontend.wait_closed();
        server.process.wait_stderr("guest memory is gone");
        server.still_serves();

        // What is not made of whole huge pages could not be unmapped.
        rustix::fs::ftruncate(&region.file, PAGE).unwrap();
        let mut driver = server.connect();
        driver.still_serves();
        let part = Region {
            len: PAGE / 2,
            ..region
        };
        driver.frontend.send(
            ADD_MEM_REG,
            NEED_REPLY,
            &single_region(&part),
            &[part.file.as_fd()],
        );
        driver.frontend.wait_closed();
        server.still_serves();
    }
    server.stop();
}

/// Huge pages that were not there before, until this is dropped.
struct HugePages(String);

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn reserve(pages: u32) -> Option<Self> {
        let before = fs::read_to_string(NR_HUGEPAGES).ok()?;
        let had: u32 = before.trim().parse().ok()?;
        fs::write(NR_HUGEPAGES, (had + pages).to_string()).ok()?;
        let reserved = HugePages(before);
        let now: u32 = fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse().ok()?;
        (now >= had + pages).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, &self.0);
    }
}

/// A pipe that nobody reads blocked whichever thread had something to say to it.
#[test]
fn a_log_that_nobody_reads_delays_neither_lock_nor_the_end() {
    let volume = Volume::new();
    let (control, socket) = (volume.beside("control"), volume.beside("vhost"));
    let (_unread, stderr) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&stderr, true).unwrap();
    while (&stderr).write(&[b'\n'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&stderr, false).unwrap();
    let mut command = serve(
        &volume,
        &socket,
        &["--control-socket", &control.display().to_string()],
    );
    let command = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(OwnedFd::from(stderr));
    let mut child = command.spawn().unwrap();
    let mut driver = Driver::connect(&socket);
    driver.still_serves();
    verb_on(&control, "lock");
    verb_on(&control, "unlock");
    driver.still_serves();
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).unwrap();
    let start = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if start.elapsed() < DEADLINE => std::thread::sleep(Duration::from_millis(5)),
            None => {
                child.kill().unwrap();
                panic!("it does not end");
            }
        }
    };
    assert!(status.success(), "{status}");
}

// ---- memory that is not shared

/// Nobody was told why a guest hung or saw errors, or it was "message 12 is not valid".
#[test]
fn a_request_in_memory_that_was_not_shared_is_told_with_a_remedy() {
    let server = Server::new();
    let mut driver = server.connect();
    // As of a DIMM that was plugged in without share=on: QEMU leaves it out.
    let header = driver.memory.filled(&driver::header(T_IN, 0));
    let status = driver.memory.buffer(1);
    driver.run_chain(&[readable(header, 16), writable(HOLE, SECTOR), writable(status, 1)]);
    assert_eq!(driver.memory.read(status, 1), [S_IOERR]);
    server
        .process
        .wait_stderr("a buffer of the chain is not in memory that the front-end has shared");
    server.process.wait_stderr("share=on for each NUMA node and DIMM");
    server.process.wait_stderr("<access mode='shared'/>");
    server.still_serves_both(driver);
}

#[test]
fn qemu_with_memory_that_is_not_shared_is_told_what_to_do() {
    let memory = "memory-backend-memfd,id=m,size=128M,share=";
    let cases: [(&[&str], &str); 3] = [
        (
            &["-machine", "q35", "-m", "128M"],
            "a queue does not lie in guest memory that the front-end has shared",
        ),
        (
            &[
                "-machine",
                "q35,memory-backend=m",
                "-m",
                "128M",
                "-object",
                &format!("{memory}off"),
            ],
            "the guest's memory may be private to the front-end",
        ),
        (
            &[
                "-machine",
                "q35",
                "-m",
                "256M",
                "-object",
                &format!("{memory}on"),
                "-object",
                "memory-backend-ram,id=n,size=128M",
                "-numa",
                "node,memdev=m",
                "-numa",
                "node,memdev=n",
            ],
            "a queue does not lie in guest memory that the front-end has shared",
        ),
    ];
    for (args, said) in cases {
        let server = Server::new();
        let _qemu = qemu(&server, args);
        server.process.wait_stderr(said);
        server.process.wait_stderr("share=on");
    }
}

/// QEMU, whose firmware tries to boot from the disk.
fn qemu(server: &Server, args: &[&str]) -> Process {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg", "-display", "none", "-nodefaults"])
        .args(args)
        .arg("-chardev")
        .arg(format!(
            "socket,id=c,path={},reconnect=1",
            server.socket().display()
        ))
        .args(["-device", "vhost-user-blk-pci,chardev=c,num-queues=1"]);
    Process::spawn(&mut command)
}

/// What is done right is not complained of.
#[test]
fn a_guest_that_does_nothing_wrong_is_not_warned_of() {
    let server = Server::new();
    let mut driver = server.connect();
    // The front-end's own kick, at the start.
    driver.queue().kick();
    for _ in 0..3 {
        driver.still_serves();
    }
    drop(driver);
    server.still_serves();
    let ended = server.stop();
    assert!(!ended.stderr.contains("WARN"), "{}", ended.stderr);
}

//! Front-ends come and go, any number of times and in any way, and leave the server as it was.

use common::driver::{Data, Driver, S_OK, SECTOR, Setup, T_IN};
use common::frontend::{ADD_MEM_REG, Frontend, NEED_REPLY, single_region};
use common::memory::Region;
use common::pattern;
use common::process::Process;
use common::serve::{Server, serve};
use common::volume::Volume;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

/// One session in one of the ways in which sessions end.
fn session(server: &Server, way: usize) {
    match way % 5 {
        0 => {
            let read = server.connect().run(T_IN, 0, Data::In(SECTOR));
            assert_eq!(read.status, S_OK);
        }
        // Requests are in flight.
        1 => {
            let mut driver = server.connect_with(Setup {
                queues: 2,
                ..Setup::default()
            });
            for queue in [0, 1, 0, 1] {
                driver.submit(queue, T_IN, 0, Data::In(16 * SECTOR));
            }
        }
        // In the handshake.
        2 => drop(Driver::unstarted(
            Frontend::connect(server.socket()),
            Setup::default(),
        )),
        // In the middle of a message.
        3 => Frontend::connect(server.socket()).send_bytes(&[1, 0, 0, 0, 1, 0, 0, 0, 200, 0, 0, 0, 7], &[]),
        // Without a word.
        _ => drop(UnixStream::connect(server.socket()).unwrap()),
    }
}

#[test]
fn a_hundred_sessions_and_a_thousand_leave_the_server_as_it_was() {
    let server = Server::new();
    (0..100).for_each(|way| session(&server, way));
    server.wait_idle();
    let hundred = server.facts();
    (0..1000).for_each(|way| session(&server, way));
    server.wait_idle();
    let thousand = server.facts();
    assert!(
        thousand.resident_kib <= hundred.resident_kib + 1024,
        "grew from {hundred:?} to {thousand:?}"
    );
    assert_eq!(thousand.locked_kib, hundred.locked_kib);
    server.still_serves();
    server.stop();
}

#[test]
fn second_front_end_is_turned_away_and_the_first_goes_on() {
    let server = Server::new();
    let mut first = server.connect();
    for _ in 0..10 {
        let second = Frontend::over(UnixStream::connect(server.socket()).unwrap());
        second.wait_closed();
        first.still_serves();
    }
    server.process.wait_stderr("second front-end");
    server.still_serves_both(first);
}

#[test]
fn front_end_that_comes_while_another_leaves_is_served() {
    let server = Server::new();
    for _ in 0..50 {
        let mut leaving = server.connect();
        for _ in 0..20 {
            leaving.submit(0, T_IN, 0, Data::In(64 * SECTOR));
        }
        drop(leaving);
        server.still_serves();
    }
}

#[test]
fn server_on_a_socket_that_it_was_given_serves_it() {
    let volume = Volume::new();
    let path = volume.beside("given.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut process = spawn_with_fd(&volume, listener.into());
    for _ in 0..3 {
        Driver::connect(&path).still_serves();
    }
    process.signal(rustix::process::Signal::TERM);
    assert!(process.wait().status.success());
}

#[test]
fn server_on_a_connection_that_it_was_given_ends_with_it() {
    let volume = Volume::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut process = spawn_with_fd(&volume, theirs.into());
    let mut driver = Driver::unstarted(Frontend::over(ours), Setup::default());
    driver.frontend.start_vring(&driver.queues[0], &driver.memory, 0);
    driver.frontend.enable(0, true);
    driver.still_serves();
    driver.write(800, &pattern(1, 4096));
    drop(driver);
    let ended = process.wait();
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn no_thread_of_an_idle_server_runs() {
    let server = Server::new();
    let idle = |time| {
        // A second after the last request, a worker has polled and put the kernel's threads for it to rest; on a busy
        // machine a little later. A thread that still runs now and then never gets as far as the second half.
        let settled = Instant::now();
        let mut before = server.process.threads();
        loop {
            std::thread::sleep(Duration::from_millis(1500));
            let now = server.process.threads();
            if now == before {
                break;
            }
            assert!(
                settled.elapsed() < Duration::from_secs(20),
                "never idle: {before:?}, then {now:?}"
            );
            before = now;
        }
        std::thread::sleep(time);
        assert_eq!(server.process.threads(), before);
    };
    idle(Duration::from_secs(1));
    let mut driver = server.connect_with(Setup {
        queues: 4,
        ..Setup::default()
    });
    driver.still_serves();
    idle(Duration::from_secs(6));
    drop(driver);
    idle(Duration::from_secs(1));
}

#[test]
fn sixty_four_queues_are_served() {
    let server = Server::of(Volume::new(), &["--num-queues", "64"]);
    let setup = Setup {
        queues: 64,
        queue_size: 16,
        ..Setup::default()
    };
    for _ in 0..2 {
        let mut driver = server.connect_with(setup);
        for queue in 0..64 {
            driver.submit(queue, T_IN, queue as u64, Data::In(SECTOR));
        }
        for queue in 0..64 {
            assert_eq!(driver.queues[queue].wait_used().len, SECTOR as u32 + 1);
        }
        drop(driver);
        server.wait_idle();
    }
}

#[test]
fn little_locked_memory_costs_speed_and_not_service() {
    let volume = Volume::new();
    let socket = volume.beside("limited.sock");
    let command = serve(&volume, &socket, &[]);
    // As root, without the capability that lifts the limit.
    let as_root = r#"ulimit -l 2048; exec setpriv --bounding-set=-ipc_lock "$@""#;
    let as_user = r#"ulimit -l 2048; exec "$@""#;
    let script = if rustix::process::geteuid().is_root() {
        as_root
    } else {
        as_user
    };
    let mut limited = Command::new("sh");
    limited
        .args(["-c", script, "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    let mut process = Process::spawn(&mut limited);
    Driver::with(
        &socket,
        Setup {
            queues: 4,
            ..Setup::default()
        },
    )
    .still_serves();
    process.wait_stderr("locked-memory limit");
    process.signal(rustix::process::Signal::TERM);
    assert!(process.wait().status.success());
}

/// `sealblk serve --fd 9`, where 9 is the given descriptor: it is passed as standard input and put there by a shell.
fn spawn_with_fd(volume: &Volume, fd: OwnedFd) -> Process {
    let direct = serve(volume, "unused".as_ref(), &[]);
    let mut args: Vec<_> = direct.get_args().collect();
    let at = args.iter().position(|arg| *arg == "--socket-path").unwrap();
    args.splice(at..at + 2, ["--fd".as_ref(), "9".as_ref()]);
    let mut command = Command::new("sh");
    command.args(["-c", r#"exec "$@" 9<&0 </dev/null"#, "sh"]);
    command.arg(direct.get_program()).args(args);
    Process::spawn_with_stdin(&mut command, fd.into())
}

/// The message was taken for one that has fewer descriptors.
#[test]
fn a_message_whose_descriptors_do_not_all_come_ends_the_session() {
    let server = Server::new();
    let mut frontend = Frontend::connect(server.socket());
    frontend.negotiate(!0, !0);
    let process = Pid::from_raw(server.process.pid().cast_signed());
    // All numbers below are in use, and it can still wait for two descriptors.
    let few = Rlimit {
        current: Some(3),
        maximum: rustix::process::getrlimit(Resource::Nofile).maximum,
    };
    let before = prlimit(process, Resource::Nofile, few).unwrap();
    let region = Region::create(0, 4096);
    let fds = [region.file.as_fd()];
    frontend.send(ADD_MEM_REG, NEED_REPLY, &single_region(&region), &fds);
    frontend.wait_closed();
    let _ = prlimit(process, Resource::Nofile, before).unwrap();
    server.connect().still_serves();
    let said = server.stop().stderr;
    assert!(said.contains("the kernel did not give them all"), "{said}");
}

//! A front-end's dirty log, for a driver that has none: it stands between libblkio and the server, and says to the server what QEMU says
//! while it migrates a guest. All that the server writes to guest memory is then marked; requests do not pass here.

use common::frontend::{
    ADD_MEM_REG, F_LOG_ALL, Frontend, Message, PROTOCOL_LOG_SHMFD, SET_FEATURES, SET_MEM_TABLE,
    SET_PROTOCOL_FEATURES, SET_VRING_ADDR, VERSION,
};
use common::memory::Log;
use rustix::event::{PollFd, PollFlags, poll};
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

/// In SET_VRING_ADDR's flags: writes to the used ring are logged (VHOST_VRING_F_LOG).
const LOG_USED_RING: u32 = 1;
/// Where a memory table's regions begin, and where ADD_MEM_REG's does; and the length of a region.
const TABLE_REGIONS: usize = 8;
const REGION: usize = 32;

/// Listens beside the socket of `server`, for one driver; gives the socket to connect to, and what ends when the driver has left.
pub(crate) fn before(server: &Path) -> (PathBuf, JoinHandle<()>) {
    let socket = server.with_extension("logged");
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).expect("a socket for the driver");
    let server = server.to_owned();
    let session = thread::spawn(move || {
        let (driver, _) = listener.accept().expect("a driver");
        Session {
            driver: Frontend::over(driver),
            server: Frontend::connect(&server),
            features: 0,
            memory_end: 0,
            log: None,
        }
        .pass_on();
    });
    (socket, session)
}

struct Session {
    driver: Frontend,
    server: Frontend,
    /// What the driver has agreed to.
    features: u64,
    /// Where its memory ends.
    memory_end: u64,
    log: Option<Log>,
}

impl Session {
    /// Until one of the two leaves. By then something must be marked.
    fn pass_on(mut self) {
        while self.pass_one_on() {}
        let log = self.log.expect("a ring was set up");
        // libblkio's memory has addresses as high as its own process's, so the log is long, and almost all of it a hole. The used rings are
        // marked in its first page, and data far behind that.
        let log = log.file.metadata().expect("the log's size");
        assert!(
            log.blocks() * 512 > 4096,
            "the server does not log what it writes to the guest"
        );
    }

    /// Waits for the next messages and passes them on; false if there will be none.
    fn pass_one_on(&mut self) -> bool {
        let mut both = [&self.driver, &self.server].map(|end| PollFd::new(end, PollFlags::IN));
        poll(&mut both, None).expect("both connections");
        let [from_driver, from_server] = both.map(|end| !end.revents().is_empty());
        if from_server {
            match self.server.receive() {
                Some(message) => send(&self.driver, &message),
                None => return false,
            }
        }
        if from_driver {
            match self.driver.receive() {
                Some(mut message) => {
                    self.change(&mut message);
                    send(&self.server, &message);
                }
                None => return false,
            }
        }
        true
    }

    /// Has the server log: the log comes with the first ring, when all memory is known.
    fn change(&mut self, message: &mut Message) {
        match message.request {
            SET_PROTOCOL_FEATURES => {
                let features = message.u64() | PROTOCOL_LOG_SHMFD;
                message.payload = features.to_ne_bytes().to_vec();
            }
            SET_FEATURES => self.features = message.u64(),
            SET_MEM_TABLE | ADD_MEM_REG => {
                let regions = message.payload[TABLE_REGIONS..].chunks_exact(REGION);
                let end = |region: &[u8]| u64_at(region, 0) + u64_at(region, 8);
                self.memory_end = regions.map(end).fold(self.memory_end, u64::max);
            }
            SET_VRING_ADDR => {
                if self.log.is_none() {
                    let log = Log::of_memory(self.memory_end);
                    self.server.set_log(&log);
                    let features = self.features | F_LOG_ALL;
                    self.server.send(SET_FEATURES, 0, &features.to_ne_bytes(), &[]);
                    self.log = Some(log);
                }
                message.payload[4..8].copy_from_slice(&LOG_USED_RING.to_ne_bytes());
                // The log's own address of the used ring is any that the log covers.
                message.payload[32..40].copy_from_slice(&0_u64.to_ne_bytes());
            }
            _ => {}
        }
    }
}

fn send(to: &Frontend, message: &Message) {
    let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    // Whoever has left hears no more.
    let _ = to.try_send_bytes(
        &common::frontend::message(message.request, VERSION | message.flags, &message.payload),
        &fds,
    );
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

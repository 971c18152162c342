//! Ports for servers that have to be told theirs.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// A port on which nobody listens. It is below those that the kernel gives out to whoever asks for any, so that no other
/// test's connection has it by the time that the server takes it; and nobody in this process is given it again.
pub(crate) fn free_port(host: &str) -> u16 {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    static GIVEN: AtomicU16 = AtomicU16::new(0);
    // Test processes that run at the same time begin elsewhere.
    let start = (std::process::id() % 100) as u16 * (COUNT / 100);
    let mut ports = (0..COUNT).map(|_| FIRST + (start + GIVEN.fetch_add(1, Ordering::Relaxed)) % COUNT);
    ports
        .find(|port| TcpListener::bind((host, *port)).is_ok())
        .expect("of 12000 ports, one is free")
}

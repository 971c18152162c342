//! libblkio's client, a virtio-blk driver that is not ours, agrees with a model of the disk.

// Unsafe for one thing: libblkio hands completions out in memory that it says is filled.
#![allow(unsafe_code)]

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags, iovec};
use common::serve::Server;
use common::volume::{MIB, Volume};
use common::{DEADLINE, Random, pattern};
use std::fs::{File, OpenOptions};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;

const QUEUES: usize = 4;
/// Requests that a queue has in flight at a time, and the bytes that each has a part of the disk and of memory for.
const DEPTH: usize = 8;
const SLOT: usize = 256 * 1024;

struct Client {
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    /// The region's memory, read and written through its descriptor.
    memory: File,
    // Dropped last: the queues work on its memory.
    blkio: Blkio,
}

impl Client {
    fn connect(socket: &Path) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", socket.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        assert_eq!(blkio.get_u64("capacity").unwrap(), 64 * MIB);
        assert!(blkio.get_i32("max-queues").unwrap() >= QUEUES as i32);
        blkio.set_i32("num-queues", QUEUES as i32).unwrap();
        let queues = blkio.start().unwrap().queues;
        let region = blkio.alloc_mem_region(QUEUES * DEPTH * SLOT).unwrap();
        blkio.map_mem_region(&region).unwrap();
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", region.fd))
            .unwrap();
        Client {
            queues,
            region,
            memory,
            blkio,
        }
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at as u64).unwrap();
    }

    fn got(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, at as u64).unwrap();
        bytes
    }

    fn address(&self, at: usize) -> *mut u8 {
        (self.region.addr + at) as *mut u8
    }

    /// Cuts memory into pieces of sectors, for the scattered requests.
    fn vector(&self, random: &mut Random, at: usize, len: usize) -> Vec<iovec> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < len {
            let piece = (512 * (1 + random.below(64)) as usize).min(len - done);
            pieces.push(iovec {
                iov_base: self.address(at + done).cast(),
                iov_len: piece,
            });
            done += piece;
        }
        pieces
    }

    /// Waits for `count` completions of a queue; all must be good.
    fn complete(&mut self, queue: usize, count: usize) {
        let mut completions: [MaybeUninit<Completion>; DEPTH] = [const { MaybeUninit::uninit() }; DEPTH];
        let mut timeout = DEADLINE;
        let done = self.queues[queue]
            .do_io(&mut completions[..count], count, Some(&mut timeout), None)
            .unwrap();
        assert_eq!(done, count, "queue {queue}: no completion");
        for completion in &completions[..count] {
            // SAFETY: libblkio fills as many elements as it returns, which is `count`.
            let completion = unsafe { completion.assume_init_ref() };
            assert_eq!(
                completion.ret, 0,
                "queue {queue}: request {}",
                completion.user_data
            );
        }
    }
}

enum Check {
    Nothing,
    /// The slot's memory must be what the model has at this place.
    Read {
        at: usize,
        disk: usize,
        len: usize,
    },
}

fn random_requests(client: &mut Client, model: &mut [u8], random: &mut Random, rounds: usize, discard: bool) {
    let mut unknown = Vec::new();
    for round in 0..rounds {
        let mut checks = Vec::new();
        let mut vectors = Vec::new();
        for queue in 0..QUEUES {
            for slot in 0..DEPTH {
                let at = (queue * DEPTH + slot) * SLOT;
                // Whole slots of the disk, so that requests in flight do not overlap; anywhere within.
                let start = 512 * random.below(SLOT as u64 / 512) as usize;
                let len = 512 * (1 + random.below((SLOT - start) as u64 / 512)) as usize;
                let disk = at + start;
                let (offset, user) = (disk as u64, slot);
                let flags = ReqFlags::empty();
                let fua = if random.below(4) == 0 {
                    ReqFlags::FUA
                } else {
                    flags
                };
                let mut check = Check::Nothing;
                match random.below(8) {
                    kind @ 0..=2 => {
                        let bytes = pattern(random.number(), len);
                        client.put(at, &bytes);
                        model[disk..disk + len].copy_from_slice(&bytes);
                        if kind == 0 {
                            let vector = client.vector(random, at, len);
                            client.queues[queue].writev(
                                offset,
                                vector.as_ptr(),
                                vector.len() as u32,
                                user,
                                fua,
                            );
                            vectors.push(vector);
                        } else {
                            let address = client.address(at);
                            client.queues[queue].write(offset, address, len, user, fua);
                        }
                    }
                    kind @ 3..=5 => {
                        client.put(at, &vec![0xee; len]);
                        if kind == 3 {
                            let vector = client.vector(random, at, len);
                            client.queues[queue].readv(
                                offset,
                                vector.as_ptr(),
                                vector.len() as u32,
                                user,
                                flags,
                            );
                            vectors.push(vector);
                        } else {
                            let address = client.address(at);
                            client.queues[queue].read(offset, address, len, user, flags);
                        }
                        check = Check::Read { at, disk, len };
                    }
                    6 if discard && random.below(2) == 0 => {
                        client.queues[queue].discard(offset, len as u64, user, flags);
                        unknown.push((disk, len));
                    }
                    6 => {
                        let keep = if random.below(2) == 0 {
                            ReqFlags::NO_UNMAP
                        } else {
                            flags
                        };
                        client.queues[queue].write_zeroes(offset, len as u64, user, keep);
                        model[disk..disk + len].fill(0);
                    }
                    _ => client.queues[queue].flush(user, flags),
                }
                checks.push(check);
            }
        }
        (0..QUEUES).for_each(|queue| client.complete(queue, DEPTH));
        for check in &checks {
            if let Check::Read { at, disk, len } = *check {
                assert!(
                    client.got(at, len) == model[disk..disk + len],
                    "round {round}: read of {len} at {disk}"
                );
            }
        }
        // What a discarded range holds is the device's choice: make it known again.
        for (disk, len) in unknown.drain(..) {
            client.queues[0].write_zeroes(disk as u64, len as u64, 0, ReqFlags::empty());
            client.complete(0, 1);
            model[disk..disk + len].fill(0);
        }
    }
}

/// Makes the model and the disk the same.
fn zero_all(client: &mut Client) {
    for slot in 0..QUEUES * DEPTH {
        client.queues[0].write_zeroes((slot * SLOT) as u64, SLOT as u64, 0, ReqFlags::empty());
        client.complete(0, 1);
    }
}

#[test]
fn random_requests_of_libblkio_agree_with_a_model_over_reconnects() {
    let server = Server::of(Volume::new(), &["--discard"]);
    let mut random = Random::new(1);
    let mut model = vec![0; QUEUES * DEPTH * SLOT];
    zero_all(&mut Client::connect(server.socket()));
    for _ in 0..4 {
        let mut client = Client::connect(server.socket());
        random_requests(&mut client, &mut model, &mut random, 8, true);
    }
    server.still_serves();
    server.stop();
}

#[test]
fn random_requests_of_libblkio_agree_with_a_model_without_discard() {
    let server = Server::of(Volume::cryptsetup(64 * MIB, 512), &[]);
    let mut model = vec![0; QUEUES * DEPTH * SLOT];
    let mut client = Client::connect(server.socket());
    zero_all(&mut client);
    random_requests(&mut client, &mut model, &mut Random::new(2), 8, false);
}

#[test]
fn libblkio_sees_a_disk_of_4096_byte_sectors() {
    let server = Server::of(Volume::created(64 * MIB, 4096), &[]);
    let mut client = Client::connect(server.socket());
    assert_eq!(client.blkio.get_i32("request-alignment").unwrap(), 4096);
    let bytes = pattern(3, 64 * 4096);
    client.put(0, &bytes);
    let address = client.address(0);
    client.queues[1].write(4096 * 5, address, bytes.len(), 0, ReqFlags::FUA);
    client.complete(1, 1);
    client.put(0, &vec![0; bytes.len()]);
    client.queues[2].read(4096 * 5, address, bytes.len(), 0, ReqFlags::empty());
    client.complete(2, 1);
    assert!(client.got(0, bytes.len()) == bytes);
}

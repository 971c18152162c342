//! What lies on storage is right by a judge that shares no code with us: Python's `cryptography` (OpenSSL) with the
//! volume key that cryptsetup hands out. It judges each cipher kernel that this processor can run.

use common::pattern;
use common::serve::Server;
use common::volume::{MIB, PASSPHRASE, Volume, run};
use sealblk::cipher::{KEY_LEN, KernelChoice, SectorCipher, SectorSize};
use sealblk_secmem::arena::SecretBytes;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Encrypts or decrypts standard input by XTS-AES-256, sector by sector. The tweak counts 512-byte units whatever the
/// sector size, as dm-crypt's plain64 does.
const JUDGE: &str = r#"
import sys
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
verb, key_file, first, sector_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
key = open(key_file, "rb").read()
data = sys.stdin.buffer.read()
for at in range(0, len(data), sector_size):
    tweak = (first + at // 512).to_bytes(16, "little")
    cipher = Cipher(algorithms.AES(key), modes.XTS(tweak))
    context = cipher.encryptor() if verb == "encrypt" else cipher.decryptor()
    sys.stdout.buffer.write(context.update(data[at:at + sector_size]) + context.finalize())
"#;

fn judge(verb: &str, key_file: &Path, first_sector: u64, sector_size: u32, data: &[u8]) -> Vec<u8> {
    // Debian's own, which is the one that its package `python3-cryptography` is for.
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", JUDGE, verb])
        .arg(key_file)
        .args([first_sector.to_string(), sector_size.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 with the module `cryptography` (Debian: python3-cryptography)");
    let mut stdin = child.stdin.take().unwrap();
    let data = data.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&data).unwrap());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "is Python's module `cryptography` there (Debian: python3-cryptography)?"
    );
    feeder.join().unwrap();
    output.stdout
}

/// Writes the volume key, which cryptsetup gives to one with the passphrase, to a file.
fn volume_key(volume: &Volume) -> std::path::PathBuf {
    let (passphrase, key) = (volume.beside("judge-passphrase"), volume.beside("volume-key"));
    fs::write(&passphrase, PASSPHRASE).unwrap();
    run(Command::new("cryptsetup")
        .args(["luksDump", "--batch-mode", "--dump-volume-key", "--key-file"])
        .arg(&passphrase)
        .arg("--volume-key-file")
        .arg(&key)
        .arg(&volume.path));
    assert_eq!(fs::metadata(&key).unwrap().len(), 64);
    key
}

/// The kernels that this processor can run, by the names of `--cipher-kernel`.
fn kernels() -> Vec<String> {
    let runs_here = |kernel: &KernelChoice| {
        let mut key: Vec<u8> = (0..KEY_LEN as u8).collect();
        let key = SecretBytes::take(&mut key).unwrap();
        match SectorCipher::new(&key, SectorSize::B512, *kernel) {
            Ok(_) => true,
            Err(error) => {
                eprintln!("skipped: {error}");
                false
            }
        }
    };
    let kernels = KernelChoice::ALL.into_iter().filter(runs_here);
    kernels.map(|kernel| kernel.to_string()).collect()
}

#[test]
fn what_the_device_writes_with_any_kernel_an_independent_xts_decrypts() {
    for sector_size in [512, 4096] {
        let volume = Volume::cryptsetup(64 * MIB, sector_size);
        let (key, payload) = (volume_key(&volume), volume.payload_offset());
        for (seed, kernel) in (1..).zip(kernels()) {
            let server = Server::with(&volume, &["--cipher-kernel", &kernel]);
            let mut driver = server.connect();
            let last = driver.capacity() - 2048;
            let bytes = pattern(seed, MIB as usize);
            for sector in [0, 8 * 1001, last] {
                driver.write(sector, &bytes);
            }
            drop(driver);
            server.stop();
            for sector in [0, 8 * 1001, last] {
                let stored = volume.stored(payload + sector * 512, bytes.len());
                assert!(
                    judge("decrypt", &key, sector, sector_size, &stored) == bytes,
                    "{kernel}, {sector_size}: at {sector}"
                );
            }
        }
    }
}

#[test]
fn what_an_independent_xts_encrypts_the_device_reads_with_any_kernel() {
    for sector_size in [512, 4096] {
        let volume = Volume::cryptsetup(64 * MIB, sector_size);
        let (key, payload) = (volume_key(&volume), volume.payload_offset());
        let bytes = pattern(2, MIB as usize);
        for sector in [0, 8 * 777, 129_024] {
            let stored = judge("encrypt", &key, sector, sector_size, &bytes);
            volume
                .file()
                .write_all_at(&stored, payload + sector * 512)
                .unwrap();
        }
        for kernel in kernels() {
            let server = Server::with(&volume, &["--cipher-kernel", &kernel]);
            let mut driver = server.connect();
            for sector in [0, 8 * 777, 129_024] {
                assert!(
                    driver.read(sector, bytes.len()) == bytes,
                    "{kernel}, {sector_size}: at {sector}"
                );
            }
            server.stop();
        }
    }
}

#[test]
fn known_text_is_nowhere_in_the_file() {
    let text = b"The quick brown fox jumps over the lazy dog. ".repeat(2000);
    for volume in [Volume::new(), Volume::created(64 * MIB, 4096)] {
        let server = Server::with(&volume, &[]);
        let mut driver = server.connect();
        for sector in (0..32_768).step_by(1024) {
            driver.write(sector, &text[..4096 * 20]);
        }
        driver.write(0, &text[..512].repeat(160));
        driver.flush();
        drop(driver);
        server.stop();
        let stored = volume.bytes();
        assert!(
            !stored.windows(16).any(|window| window == &text[..16]),
            "the text is in the file"
        );
        // Sectors of the same text are not the same on storage.
        let payload = volume.payload_offset() as usize;
        let sectors: std::collections::HashSet<&[u8]> = stored[payload..][..4096 * 20].chunks(512).collect();
        assert_eq!(sectors.len(), 160);
    }
}

#[test]
fn zeros_on_storage_are_not_zeros_and_differ_from_volume_to_volume() {
    let written = |volume: &Volume| {
        let server = Server::with(volume, &[]);
        server.connect().write(0, &[0; 4096]);
        server.stop();
        volume.stored(volume.payload_offset(), 4096)
    };
    let (one, two) = (written(&Volume::new()), written(&Volume::new()));
    assert!(one != two && one != [0; 4096] && two != [0; 4096]);
}

/// What root can read of a process' memory, but for the guest's.
fn memory_of_its_own(pid: u32) -> Vec<u8> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut bytes = Vec::new();
    for line in maps.lines().filter(|line| !line.contains("sealblk-test-guest")) {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let address = |text| u64::from_str_radix(text, 16).unwrap();
        let mut mapping = vec![0; (address(end) - address(start)) as usize];
        // What cannot be read is left out: guard pages, and the key arena.
        if memory.read_exact_at(&mut mapping, address(start)).is_ok() {
            bytes.extend(mapping);
        }
    }
    bytes
}

#[test]
fn plaintext_is_nowhere_in_the_servers_own_memory() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to look");
        return;
    }
    let server = Server::new();
    let mut driver = server.connect();
    // 16 bytes that are nowhere else, again and again; also in the pieces that a descriptor may cut.
    let mark = pattern(0xc0ffee, 16);
    let text = mark.repeat(80 * 512 / 16);
    for sector in [64, 1000] {
        driver.write(sector, &text);
        assert!(driver.read(sector, text.len()) == text);
    }
    let memory = memory_of_its_own(server.process.pid());
    let finds = |wanted: &[u8]| {
        // By the first byte first: there is much to look through.
        let mut starts = memory.iter().enumerate().filter(|(_, byte)| **byte == wanted[0]);
        starts.any(|(at, _)| memory[at..].starts_with(wanted))
    };
    assert!(
        finds(server.volume().path.to_str().unwrap().as_bytes()),
        "what is there is found"
    );
    assert!(!finds(&mark), "plaintext outside of the guest's memory");
}

//! Looking for secrets: in a process, in what it leaves on disk and in swap, in all the forms that a secret may take there.
//! And being somebody who may not.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD};
use sealblk::keys::{Binding, KeyId, Providers};
use serde_json::{Value, json};

use super::aes::round_keys;
use super::serve::sealblk_path;
use super::volume::{Volume, run};

/// Every mapping of a process that can be read, one after the other: what a debugger would get.
pub fn readable_memory(pid: u32) -> Vec<u8> {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut bytes = Vec::new();
    for mapping in mappings(pid) {
        let mut read = vec![0; mapping.len];
        if memory.read_exact_at(&mut read, mapping.start as u64).is_ok() {
            bytes.append(&mut read);
        }
    }
    bytes
}

struct Mapping {
    start: usize,
    len: usize,
}

/// Those that are readable.
fn mappings(pid: u32) -> Vec<Mapping> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mapping = |line: &str| {
        let mut fields = line.split(' ');
        let (start, end) = fields.next().unwrap().split_once('-').unwrap();
        let address = |hex| usize::from_str_radix(hex, 16).unwrap();
        let (start, end) = (address(start), address(end));
        let readable = fields.next().unwrap().starts_with('r');
        readable.then_some(Mapping {
            start,
            len: end - start,
        })
    };
    maps.lines().filter_map(mapping).collect()
}

/// How much of a process a core dump is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Core {
    /// What the kernel would write as well.
    AsTheKernel,
    /// Also what the process wants to be left out.
    Everything,
}

/// A core dump of a running process, by gdb's `gcore`.
pub fn core(pid: u32, which: Core) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let mut gcore = Command::new("gcore");
    if which == Core::Everything {
        gcore.arg("-a");
    }
    run(gcore.arg("-o").arg(dir.path().join("core")).arg(pid.to_string()));
    fs::read(dir.path().join(format!("core.{pid}"))).unwrap()
}

/// Has the kernel swap out what it may of a process, and gives all that is in the swap file then, if this machine lets us
/// have one. The swap file is under `dir`, which must not be in memory, as /tmp may be.
pub fn swapped_out(pid: u32, dir: &Path) -> Option<Vec<u8>> {
    const LEN: usize = 64 << 20;
    let dir = tempfile::tempdir_in(dir).unwrap();
    let swap = Swap(dir.path().join("swap"));
    let mut zeros = File::create(&swap.0).unwrap();
    zeros.write_all(&vec![0; LEN]).unwrap();
    zeros.sync_all().unwrap();
    fs::set_permissions(&swap.0, fs::Permissions::from_mode(0o600)).unwrap();
    run(Command::new("mkswap").arg(&swap.0));
    let on = Command::new("swapon").arg(&swap.0).output();
    if !on.is_ok_and(|on| on.status.success()) {
        eprintln!("skipped: no swap file can be used here");
        return None;
    }
    // At once, for all processes of the machine may fill it.
    page_out(pid);
    let swapped = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmSwap:"));
        line.unwrap().split_whitespace().next().unwrap() != "0"
    };
    assert!(swapped(), "nothing of process {pid} was swapped out");
    // Past the page cache, which does not know what the kernel writes there.
    let mut read = Command::new("dd");
    let input = format!("if={}", swap.0.display());
    Some(run(read.args([&input, "bs=1M", "iflag=direct", "status=none"])).stdout)
}

/// In use until this goes.
struct Swap(PathBuf);

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(&self.0).output();
    }
}

#[allow(unsafe_code)] // The two system calls have no safe wrappers.
fn page_out(pid: u32) {
    // SAFETY: this takes numbers alone.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    assert!(process >= 0);
    for mapping in mappings(pid) {
        let range = libc::iovec {
            iov_base: mapping.start as *mut libc::c_void,
            iov_len: mapping.len,
        };
        let (range, advice) = (&raw const range, libc::MADV_PAGEOUT);
        // SAFETY: the range is one of the other process, whose content this does not change. Locked memory stays.
        unsafe { libc::syscall(libc::SYS_process_madvise, process, range, 1, advice, 0) };
    }
    // SAFETY: the descriptor was opened above, and is used no more.
    unsafe { libc::close(process as libc::c_int) };
}

/// Has the program run as on a kernel without memfd_secret(2): keys are in locked memory then, which root can read.
pub fn without_secret_memory(command: &mut Command) {
    without_call(command, libc::SYS_memfd_secret, libc::ENOSYS);
}

/// Has the program run where a system call fails, as a container's seccomp profile has it.
#[allow(unsafe_code)] // A filter on system calls has no safe wrapper.
pub fn without_call(command: &mut Command, call: libc::c_long, errno: libc::c_int) {
    const ALLOW: u32 = 0x7fff_0000;
    let error = 0x0005_0000 | errno as u32;
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let filter = [
        // The number of the call is the first of what is looked at.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, error),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_ptr().cast_mut(),
        };
        // SAFETY: a number for a switch.
        let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: the program lives as long as the call, which copies it.
        let filtered = unsafe { libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program) };
        match done | filtered {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: what runs between fork and exec makes two system calls and allocates nothing.
    unsafe { command.pre_exec(install) };
}

const ZEROS: [u8; 4096] = [0; 4096];

/// Secrets, in all the forms in which they might be somewhere.
#[derive(Debug, Default)]
pub struct Search {
    forms: Vec<(String, Vec<u8>)>,
    /// The forms that begin with these bytes.
    starts: HashMap<[u8; 4], Vec<usize>>,
}

impl Search {
    /// Also looks for a key: any 16 bytes of it that begin at a multiple of 16, and what programs print of bytes.
    pub fn key(mut self, what: &str, key: &[u8]) -> Self {
        assert!(
            key.len() >= 16 && key.iter().any(|byte| *byte != key[0]),
            "{what} is a key"
        );
        for (n, part) in key.chunks_exact(16).enumerate() {
            let at = 16 * n;
            self.add(format!("{what}, from byte {at}"), part);
            let hex: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
            self.add(format!("{what}, from byte {at}, in hexadecimal"), hex.as_bytes());
            self.add(
                format!("{what}, from byte {at}, in capital hexadecimal"),
                hex.to_uppercase().as_bytes(),
            );
            let list = format!("{part:?}");
            self.add(
                format!("{what}, from byte {at}, as a list"),
                list.trim_matches(['[', ']']).as_bytes(),
            );
        }
        self.base64(what, key);
        self
    }

    /// Also looks for a passphrase, token or the like.
    pub fn text(mut self, what: &str, text: &[u8]) -> Self {
        assert!(text.len() >= 16, "{what} is long enough to be known");
        self.add(what.to_owned(), text);
        self.base64(what, text);
        self
    }

    /// Also looks for a key of XTS-AES-256 and for the round keys of its two halves.
    pub fn xts_key(self, what: &str, key: &[u8]) -> Self {
        assert_eq!(key.len(), 64);
        let mut search = self.key(what, key);
        for (half, key) in ["data", "tweak"].iter().zip(key.chunks_exact(32)) {
            for (n, round) in round_keys(key).iter().enumerate() {
                search.add(format!("{what}, round key {n} for {half}"), round);
            }
        }
        search
    }

    /// Whatever is before and after it in what was encoded.
    fn base64(&mut self, what: &str, secret: &[u8]) {
        for skipped in 0..3 {
            let rest = &secret[skipped..];
            let whole = &rest[..rest.len() / 3 * 3];
            for text in [
                BASE64_STANDARD_NO_PAD.encode(whole),
                BASE64_URL_SAFE_NO_PAD.encode(whole),
            ] {
                self.add(format!("{what}, in base64"), text.as_bytes());
            }
        }
    }

    fn add(&mut self, what: String, bytes: &[u8]) {
        let start: [u8; 4] = bytes[..4].try_into().unwrap();
        assert_ne!(start, [0; 4]);
        self.starts.entry(start).or_default().push(self.forms.len());
        self.forms.push((what, bytes.to_vec()));
    }

    /// What of all this is in there.
    pub fn found(&self, bytes: &[u8]) -> BTreeSet<&str> {
        let mut found = BTreeSet::new();
        // Nearly all places are passed over by their first two bytes.
        let mut begins = vec![false; 1 << 16];
        for start in self.starts.keys() {
            begins[usize::from(start[0]) << 8 | usize::from(start[1])] = true;
        }
        let mut at = 0;
        while at + 4 <= bytes.len() {
            // Most of a process's memory is pages of zeros; no form begins with four.
            if at % ZEROS.len() == 0 && bytes[at..].starts_with(&ZEROS) {
                at += ZEROS.len() - 3;
                continue;
            }
            let start = &bytes[at..at + 4];
            if begins[usize::from(start[0]) << 8 | usize::from(start[1])] {
                for form in self.starts.get(start).into_iter().flatten() {
                    let (what, wanted) = &self.forms[*form];
                    if bytes[at..].starts_with(wanted) {
                        found.insert(what.as_str());
                    }
                }
            }
            at += 1;
        }
        found
    }

    #[track_caller]
    pub fn assert_absent(&self, bytes: &[u8], place: &str) {
        let found = self.found(bytes);
        assert!(found.is_empty(), "{place}: {found:#?}");
    }

    /// Looks into all files under a directory, but for those of the given names, which are there to hold secrets.
    #[track_caller]
    pub fn assert_absent_under(&self, dir: &Path, but: &[&str]) {
        // This would not be known if the search passed something over.
        let mut planted = tempfile::NamedTempFile::new_in(dir).unwrap();
        planted.write_all(&self.planted()).unwrap();
        let mut found = Vec::new();
        for file in files(dir) {
            if !but.contains(&file.file_name().unwrap().to_str().unwrap()) {
                let in_it = self.found(&fs::read(&file).unwrap()).len();
                if in_it > 0 {
                    found.push((file, in_it));
                }
            }
        }
        let expected = [(planted.path().to_owned(), self.count())];
        let all = |(file, _): &(PathBuf, usize)| fs::read(file).unwrap();
        let named: Vec<_> = found
            .iter()
            .map(|file| format!("{:#?}", self.found(&all(file))))
            .collect();
        assert_eq!(found, expected, "{named:#?}");
    }

    /// All that is looked for, in some bytes.
    fn planted(&self) -> Vec<u8> {
        let forms = self
            .forms
            .iter()
            .flat_map(|(_, bytes)| [&b"\n"[..], bytes].concat());
        forms.collect()
    }

    /// How many different things are looked for.
    fn count(&self) -> usize {
        self.forms
            .iter()
            .map(|(what, _)| what)
            .collect::<BTreeSet<_>>()
            .len()
    }
}

/// All regular files under a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            all.append(&mut files(&entry.path()));
        } else if kind.is_file() {
            all.push(entry.path());
        }
    }
    all
}

/// Whether some bytes are among others; for more than a few of them there is [`Search`].
pub fn finds(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes
        .windows(wanted.len())
        .any(|window| window[0] == wanted[0] && window == wanted)
}

/// What the only sealblk token of a volume wraps.
pub fn slot_secret(disk: &Path, providers: &dyn Providers) -> Vec<u8> {
    let token = token(disk);
    let field = |name: &str| token[name].as_str().unwrap();
    let key_id = KeyId(field("key_id").to_owned());
    let uuid = String::from_utf8(run(Command::new("cryptsetup").arg("luksUUID").arg(disk)).stdout).unwrap();
    let keyslot = token["keyslots"][0].as_str().unwrap();
    let binding = Binding {
        volume: uuid.trim().parse().unwrap(),
        provider: field("provider"),
        key_id: &key_id,
        keyslot: keyslot.parse().unwrap(),
    };
    let wrapped = BASE64_STANDARD.decode(field("wrapped_slot_secret")).unwrap();
    let provider = providers.provider(field("provider")).unwrap();
    provider.unwrap(&binding, &wrapped).unwrap().to_vec()
}

/// The volume key, by cryptsetup, with a recovery key that is added for it.
pub fn volume_key(volume: &Volume) -> Vec<u8> {
    let recovery = volume.beside("recovery");
    run(Command::new(sealblk_path())
        .args(&volume.open)
        .args(["recovery", "add"])
        .arg(&volume.path)
        .arg("--recovery-key")
        .arg(&recovery));
    volume_key_by(volume, &recovery)
}

/// The volume key, by cryptsetup and what opens a keyslot.
pub fn volume_key_by(volume: &Volume, opens: &Path) -> Vec<u8> {
    let key = volume.beside("volume.key");
    let mut dump = Command::new("cryptsetup");
    dump.args([
        "luksDump",
        "--batch-mode",
        "--dump-volume-key",
        "--volume-key-file",
    ]);
    run(dump.arg(&key).arg("--key-file").arg(opens).arg(&volume.path));
    let key = fs::read(&key).unwrap();
    assert_eq!(key.len(), 64);
    key
}

/// A volume's only token, as cryptsetup shows it.
pub fn token(disk: &Path) -> Value {
    let dump = run(Command::new("cryptsetup")
        .args(["luksDump", "--dump-json-metadata"])
        .arg(disk));
    let metadata: Value = serde_json::from_slice(&dump.stdout).unwrap();
    let tokens = metadata["tokens"].as_object().unwrap();
    assert_eq!(tokens.len(), 1);
    tokens.values().next().unwrap().clone()
}

/// Does `work` as a user whose group has the same number, which the kernel tells whoever is asked; nobody else in this
/// process is that user.
#[allow(unsafe_code)] // A thread of another user than its process has no safe wrapper.
pub fn as_user<R: Send>(user: u32, work: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // The raw calls change this thread alone, which ends with it.
            let keep: libc::c_long = -1;
            let no_groups: [libc::gid_t; 0] = [];
            // SAFETY: a list of no groups.
            let groups = unsafe { libc::syscall(libc::SYS_setgroups, 0, no_groups.as_ptr()) };
            // SAFETY: this takes numbers alone.
            let group = unsafe { libc::syscall(libc::SYS_setresgid, keep, user, keep) };
            assert_eq!((groups, group), (0, 0));
            // SAFETY: as above.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, keep, user, keep) }, 0);
            work()
        });
        thread.join().unwrap()
    })
}

/// What a volume's token binds, as the interface has it, and what it wraps.
pub fn binding(disk: &Path) -> (Value, Value) {
    let token = token(disk);
    let uuid = String::from_utf8(run(Command::new("cryptsetup").arg("luksUUID").arg(disk)).stdout).unwrap();
    let keyslot: u32 = token["keyslots"][0].as_str().unwrap().parse().unwrap();
    let binding = json!({
        "volume": uuid.trim(),
        "provider": token["provider"],
        "keyId": token["key_id"],
        "keyslot": keyslot,
    });
    (binding, token["wrapped_slot_secret"].clone())
}

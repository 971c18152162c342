//! The arguments of `sealblk serve`.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use sealblk_command::secret::SecretSource;
use sealblk_command::size::{NotASize, Size};
use sealblk_command::socket_args::{Group, parse_mode};
use uuid::Uuid;

use crate::attachment::Choice as HeaderClaimChoice;
use crate::cipher::{KernelChoice, SectorSize};
use crate::device::{DEFAULT_POLL_MAX, DEFAULT_STOP_LIMIT};
use crate::sandbox::Choice;
use crate::storage::{Answer, PAGE};

const AFTER_HELP: &str = "\
Example, with a directory for the sockets of this disk alone:
  mkdir -m 750 /run/vm7
  sealblk serve --blk-file vm7.luks --volume UUID --socket-path /run/vm7/disk.sock

Then start QEMU with shared memory and the disk (libvirt: docs/libvirt.md):
  qemu-system-x86_64 -accel kvm -m 2G \\
    -object memory-backend-memfd,id=mem,size=2G,share=on \\
    -machine q35,memory-backend=mem \\
    -chardev socket,id=disk0,path=SOCK,reconnect=1 \\
    -device vhost-user-blk-pci,chardev=disk0

In production, always give --volume: an attacker with write access to the storage
could put the header of a disk of his own there, and then read what your guest writes.
`sealblk create` prints the UUID: keep it with the settings of the VM. A UUID that
you read from the disk later may already be the attacker's.

With --allow-unencrypted, sealblk still recognises a volume by its header, and
encrypts as usual. It refuses a volume whose header is damaged in part; if the
header was wiped completely, it takes the disk for an unencrypted one. It refuses
images (qcow2, VMDK, ...) and members of LVM, ZFS or a RAID, unless you also give
--format raw.

A process that connects to SOCK can read and write the disk. Only root and the owner
of SOCK can connect, unless you set its group or mode. If QEMU runs as another user,
give --socket-group with a group of that user. sealblk must then run as root or as a
member of that group, and QEMU must be able to enter the directory of SOCK.

If the key is not available, the disk is locked: the guest sees the disk, and its
requests wait, without an error. sealblk tries again at least every 30 seconds; with
--no-wait it ends instead. A disk that you locked by `sealblk lock` stays locked
until `sealblk unlock`.

While sealblk serves a disk, no other process can use the disk. For a migration, start
sealblk at the destination with --incoming: it accepts the other sealblk. The guest at
the destination gets the disk when the guest at the source has stopped. If it has not
stopped within 10 seconds, the requests of the guest at the destination wait, and the
log and `sealblk status` say why. With --incoming, sealblk ends if the key is not
available, and the agent asks for the privilege Migrate in place of RegisterVM. Two
readers (--read-only) need no --incoming.

Locks do not reach the other hosts of a LUN. So on a block device sealblk enters in
the header that this host has the disk attached, and removes that at its end. If
another host has it attached, sealblk refuses the disk and names that host. After a
crash, the same host attaches the disk again, also after a boot; another host needs
--take-over. This does not stop a host that still writes: it is no fencing
(docs/durability.md).

While requests wait for the storage (--on-full, --on-error), the guest gets no answer to
them; others continue. They wait also over a restart of `sealblk serve`. If QEMU stops,
saves, migrates or resets the guest meanwhile, they are answered with an error: QEMU
could not take them along. sealblk never repeats a flush that failed: the data before it
may be lost, and a second flush would not say so.

On SIGTERM sealblk finishes the requests in flight and ends. You can stop and start
it while the guest runs, and it can be killed: QEMU connects again (because of
`reconnect`), and the requests wait. Start it again with --incoming if the disk is
being migrated. One QEMU can be connected at a time. `sealblk upgrade` has another
release serve the disk, and QEMU stays connected.";

/// The most queues: one for each virtual CPU of a large guest. A queue takes 20 KiB until a driver uses it.
const MAX_QUEUES: i64 = 64;

/// Serve a disk to QEMU
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(group = ArgGroup::new("endpoint").required(true).args(["socket_path", "fd", "print_capabilities"]))]
pub struct Serve {
    /// The disk: a file or block device that holds a LUKS2 volume
    #[arg(long, value_name = "DISK", required_unless_present_any = ["print_capabilities", "null_storage"])]
    pub(super) blk_file: Option<PathBuf>,
    /// The socket to listen on; sealblk replaces a stale socket
    #[arg(long, value_name = "SOCK")]
    pub(super) socket_path: Option<PathBuf>,
    /// Give that socket to a group, by name or number: the group of QEMU, as 'libvirt-qemu'. All its members can read and
    /// write the disk
    #[arg(long, value_name = "GROUP", requires = "socket_path")]
    pub(super) socket_group: Option<Group>,
    /// The mode of that socket; the umask does not change it [default: 600, with --socket-group 660]
    #[arg(long, value_name = "MODE", value_parser = parse_mode, requires = "socket_path")]
    pub(super) socket_mode: Option<u32>,
    /// Accept only the front-end that FILE registers by its user, security label and control group, where QEMUs of several guests run as
    /// one user; without FILE, none. libvirt's hook writes it (docs/libvirt.md)
    #[arg(long, value_name = "FILE")]
    pub(super) peer_file: Option<PathBuf>,
    /// An inherited socket that listens, or is connected to QEMU
    #[arg(long, value_name = "N")]
    pub(super) fd: Option<RawFd>,
    /// Print the capabilities of this back-end in the form of QEMU's conventions, and end
    #[arg(long)]
    pub(super) print_capabilities: bool,
    /// Refuse writes; several processes can serve one disk with this option
    #[arg(long)]
    pub(super) read_only: bool,
    /// Serve a disk that another `sealblk serve` serves until its guest has migrated here. sealblk reads the header and gets the key at
    /// once, and takes the disk over when the guest starts here (see below)
    #[arg(long, conflicts_with_all = ["null_storage", "read_only"])]
    pub(super) incoming: bool,
    /// Answer the verbs for a served disk on this socket: `sealblk status`, `events`, `lock`, `unlock`, `rekey`, `resize`, `resume` and
    /// `upgrade`. Without it the disk has none of them
    #[arg(long, value_name = "SOCK", conflicts_with_all = ["null_storage", "allow_unencrypted"])]
    pub(super) control_socket: Option<PathBuf>,
    /// Give the control socket to a group, by name or number. Its members can connect and ask for the status; they can do more only
    /// if [[grant]] in the configuration allows it
    #[arg(long, value_name = "GROUP", requires = "control_socket")]
    pub(super) control_socket_group: Option<Group>,
    /// The mode of the control socket; the umask does not change it [default: 660]
    #[arg(long, value_name = "MODE", value_parser = parse_mode, requires = "control_socket")]
    pub(super) control_socket_mode: Option<u32>,
    /// End at once if the key is not available, instead of serving a locked disk
    #[arg(long)]
    pub(super) no_wait: bool,
    /// The maximum number of queues for QEMU
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUES as u16,
          value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES))]
    pub(super) num_queues: u16,
    /// The file that holds the volume's header, if it is detached
    #[arg(long, value_name = "FILE")]
    pub(super) header: Option<PathBuf>,
    /// Serve only the volume with this UUID, and refuse the header of another volume: an attacker could have put it there (see
    /// below). `sealblk create` prints the UUID
    #[arg(long, value_name = "UUID", conflicts_with_all = ["null_storage", "allow_unencrypted"])]
    pub(super) volume: Option<Uuid>,
    /// Open the volume with a passphrase, recovery key or key file instead of a key provider. sealblk can read `-`, fd:N
    /// and a shell's `<(...)` only once: for these it refuses `sealblk lock`
    #[arg(long, value_name = "FILE|-|fd:N|cred:NAME", visible_alias = "key-file")]
    pub(super) passphrase_file: Option<SecretSource>,
    /// Also serve a disk that is not a LUKS2 volume, without encryption. Do not use this for encrypted disks: an attacker
    /// who wipes the header turns such a disk into an unencrypted one
    #[arg(long, conflicts_with = "header")]
    pub(super) allow_unencrypted: bool,
    /// Serve the disk as 'raw' bytes even if its content looks like an image, a member of a pool or a LUKS1 volume. Use this only
    /// if the guest itself wrote that content. sealblk never interprets the content
    #[arg(long, value_name = "FORMAT", requires = "allow_unencrypted", value_parser = ["raw"])]
    pub(super) format: Option<String>,
    /// The block size of a disk that is not a volume, 512 or 4096 [default: 512]
    #[arg(long, value_name = "BYTES", value_parser = parse_sector_size)]
    pub(super) sector_size: Option<SectorSize>,
    /// Serve a test disk without storage, for benchmarks: writes are discarded, reads return noise. Data are encrypted under
    /// a random key unless --allow-unencrypted is given
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["blk_file", "header", "passphrase_file"])]
    pub(super) null_storage: Option<Size>,
    /// Pass the guest's discards to the storage. An observer of the storage then sees which blocks are in use
    #[arg(long, conflicts_with = "read_only")]
    pub(super) discard: bool,
    /// What happens to a read or write when the storage has no space, or the user's quota is exhausted: 'stop' has it wait, without an error
    /// for the guest, until there is space; 'report' gives the guest an error
    #[arg(long, value_name = "WHAT", default_value = "stop", value_parser = parse_answer)]
    pub(super) on_full: Answer,
    /// What happens to a read or write that the storage fails for another reason: 'report' gives the guest an error; 'stop' has it wait until
    /// `sealblk resume`. A flush or discard that fails is always reported (see below)
    #[arg(long, value_name = "WHAT", default_value = "report", value_parser = parse_answer)]
    pub(super) on_error: Answer,
    /// How many seconds a stop of the guest, a lock or SIGTERM waits for requests that the storage does not answer. Then they are left in
    /// flight; if QEMU stops the guest, they are answered with an error
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u16).range(1..),
        default_value_t = DEFAULT_STOP_LIMIT.as_secs() as u16
    )]
    pub(super) stop_timeout: u16,
    /// The disk's serial for the guest [default: the first 20 digits of the volume's UUID; for an unencrypted disk, of
    /// the SHA-256 of its absolute path]
    #[arg(long, value_name = "TEXT", value_parser = parse_serial)]
    pub(super) serial: Option<String>,
    /// How long a queue polls for work before it sleeps; a longer time lowers latency and takes more CPU, 0 turns polling off
    #[arg(
        long,
        value_name = "MICROSECONDS",
        value_parser = clap::value_parser!(u16).range(..=1000),
        default_value_t = DEFAULT_POLL_MAX.as_micros() as u16
    )]
    pub(super) poll_max: u16,
    /// Locked memory of each queue in use, for data between the guest and storage: 1M to 64M (LimitMEMLOCK must allow the sum). A
    /// smaller pool allows fewer large requests in flight [default: 8M]
    #[arg(long, value_name = "SIZE", value_parser = parse_pool_size)]
    pub(super) pool_size: Option<u32>,
    /// Confine the process before it reads anything of a guest: 'prefer' takes the measures that this kernel has, 'require' ends
    /// if it does not have all, 'off' takes none. `sealblk status` shows the measures in force
    #[arg(long, value_name = "WHEN", default_value = "prefer", value_enum)]
    pub(super) sandbox: Choice,
    /// When sealblk enters in the volume's header that this host has the disk attached, which keeps other hosts out where locks do not
    /// reach them (see below): 'auto' does it on a block device, 'on' always, 'off' never
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = true,
        conflicts_with = "null_storage"
    )]
    pub(super) header_claim: HeaderClaimChoice,
    /// Attach the disk although another host has it attached, by attachment N, as the refusal said. Do this only if that host cannot write
    /// to the storage any more
    #[arg(long, value_name = "N", conflicts_with = "null_storage")]
    pub(super) take_over: Option<u64>,
    /// Take the disk over from the process that answers on the control socket: an attempt of `sealblk upgrade`, which adds this
    #[arg(long, value_name = "N", hide = true, requires = "control_socket")]
    pub(super) upgrade: Option<u64>,
    /// The implementation of the cipher: 'fastest' on this machine, or 'avx512', 'avx2', 'aes-ni' (x86-64) or
    /// 'portable'
    #[arg(long, value_name = "NAME", default_value_t)]
    pub(super) cipher_kernel: KernelChoice,
}

fn parse_sector_size(text: &str) -> Result<SectorSize, String> {
    let size = text.parse().ok().and_then(SectorSize::from_bytes);
    size.ok_or_else(|| "a sector has 512 or 4096 bytes".into())
}

fn parse_answer(text: &str) -> Result<Answer, String> {
    match text {
        "stop" => Ok(Answer::Stop),
        "report" => Ok(Answer::Report),
        _ => Err("it is 'stop' or 'report'".into()),
    }
}

/// In pages.
fn parse_pool_size(text: &str) -> Result<u32, String> {
    let Size(bytes) = text.parse().map_err(|error: NotASize| error.to_string())?;
    // A place for each page, and io_uring has 32768.
    let allowed = (1 << 20..=64 << 20).contains(&bytes) && bytes.is_multiple_of(PAGE as u64);
    let pages = u32::try_from(bytes / PAGE as u64).ok().filter(|_| allowed);
    pages.ok_or_else(|| "a pool has 1M to 64M, in whole pages of 4K".into())
}

fn parse_serial(text: &str) -> Result<String, String> {
    if (1..=20).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("a serial has 1 to 20 printable ASCII characters and no blanks".into())
    }
}

//! The filter of system calls: a list of those that a served disk makes. All others fail with EPERM, and the log names them.
//!
//! In Firecracker and Cloud Hypervisor a call outside the list ends the process. Their lists are for one C library, which is linked
//! statically; sealblk uses the host's. If a new version of the library makes a call that is not in the list, the guest keeps its disk, and
//! the operator can report the call. For an attacker both are the same: the call has no effect.
//!
//! So the kernel raises SIGSYS (`SECCOMP_RET_TRAP`). The handler records the number of the call for a thread that writes it to the log, and
//! makes the call fail. If a thread blocks the signal, the kernel kills the process.
//!
//! The filter costs nothing on the path of a request: the kernel caches which calls pass with any arguments.
//!
//! x86-64 kernels can have system calls twice: the numbers of the x32 ABI are not in the list. A call of another architecture ends the
//! process.

#![allow(unsafe_code)] // A signal handler.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_long, c_void};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter_all_threads,
};

use super::NotTaken;

/// Calls that pass whatever their arguments are, by what they are for.
const CALLS: &[&[c_long]] = &[
    // Requests: the rings, and what a queue does beside them.
    &[
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_fallocate,
        libc::SYS_fdatasync,
        libc::SYS_fsync,
        libc::SYS_sync_file_range,
    ],
    // Headers, and the files of this process in /proc.
    &[
        libc::SYS_fadvise64,
        libc::SYS_flock,
        libc::SYS_fstat,
        libc::SYS_fstatfs,
        libc::SYS_ftruncate,
        libc::SYS_lseek,
        libc::SYS_mkdirat,
        libc::SYS_newfstatat,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_readlinkat,
        libc::SYS_statx,
        libc::SYS_unlinkat,
    ],
    // Descriptors of any kind.
    &[
        libc::SYS_close,
        // For a thread with a table of its own.
        libc::SYS_close_range,
        libc::SYS_dup,
        libc::SYS_dup3,
        libc::SYS_eventfd2,
        libc::SYS_pipe2,
        // A kick is read, and a call is written, without waiting.
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_read,
        libc::SYS_readv,
        // Secrets go from pipe to pipe.
        libc::SYS_splice,
        libc::SYS_write,
        libc::SYS_writev,
    ],
    // Front-ends, callers of the control socket, and the key helper.
    &[
        libc::SYS_accept4,
        libc::SYS_getpeername,
        libc::SYS_getsockname,
        libc::SYS_getsockopt,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_setsockopt,
        libc::SYS_shutdown,
        // It is reaped.
        libc::SYS_wait4,
        libc::SYS_waitid,
    ],
    // Waiting.
    &[
        libc::SYS_clock_nanosleep,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_pwait,
        libc::SYS_futex,
        libc::SYS_nanosleep,
        libc::SYS_ppoll,
        libc::SYS_restart_syscall,
    ],
    // Memory: of guests, for keys, and the heap.
    &[
        libc::SYS_brk,
        libc::SYS_madvise,
        // What tracks requests in flight.
        libc::SYS_memfd_create,
        libc::SYS_memfd_secret,
        libc::SYS_mlock,
        libc::SYS_mlock2,
        libc::SYS_mremap,
        libc::SYS_munlock,
        libc::SYS_munmap,
    ],
    // Threads: of queues, sessions and callers.
    &[
        // Its other filter answers that there is no such call.
        libc::SYS_clone3,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_rseq,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        libc::SYS_set_robust_list,
        libc::SYS_sigaltstack,
    ],
    // What the host is, and random numbers.
    &[
        libc::SYS_clock_gettime,
        libc::SYS_getcwd,
        libc::SYS_geteuid,
        libc::SYS_getrandom,
        libc::SYS_getuid,
    ],
];

/// The older forms of the above, which only x86-64 has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_stat,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[];

/// Commands of fcntl(2) and ioctl(2) that libc does not have for every target.
const F_OFD_GETLK: c_int = 36;
const F_OFD_SETLK: c_int = 37;
const BLKDISCARD: c_int = 0x1277;
const BLKGETSIZE64: c_int = 0x8008_1272_u32.cast_signed();
const FIONBIO: c_int = 0x5421;

/// What fcntl(2) is called for: duplicates, flags, locks, the kind of a front-end's memory, and the size of a pipe.
const FCNTL: &[c_int] = &[
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    F_OFD_GETLK,
    F_OFD_SETLK,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
    libc::F_GETPIPE_SZ,
    libc::F_SETPIPE_SZ,
];

/// Calls that pass with some arguments.
fn conditional(link: usize) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    // Each call passes if one of its rules holds, and a rule holds if all its conditions do.
    type Condition = (u8, SeccompCmpArgLen, SeccompCmpOp, u64);
    let all_of = |conditions: &[Condition]| {
        let conditions = conditions
            .iter()
            .map(|(argument, len, operator, value)| {
                SeccompCondition::new(*argument, len.clone(), operator.clone(), *value)
            })
            .collect::<Result<_, _>>()?;
        SeccompRule::new(conditions)
    };
    let any_of = |argument, values: &[c_int]| -> Result<Vec<SeccompRule>, BackendError> {
        let rule = |value: &c_int| all_of(&[(argument, Dword, Eq, u64::from(value.cast_unsigned()))]);
        values.iter().map(rule).collect()
    };
    let not_executable = || -> Result<_, BackendError> {
        Ok(vec![all_of(&[(
            2,
            Dword,
            MaskedEq(u64::from(libc::PROT_EXEC.cast_unsigned())),
            0,
        )])?])
    };
    let thread = u64::from(libc::CLONE_THREAD.cast_unsigned());
    let path = u64::from(libc::O_PATH.cast_unsigned());
    let stream = u64::from((libc::SOCK_STREAM | libc::SOCK_CLOEXEC).cast_unsigned());
    let unix = u64::from(libc::AF_UNIX.cast_unsigned());
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
    let mut rules = BTreeMap::from([
        // Threads, and no processes.
        (
            libc::SYS_clone,
            vec![all_of(&[(0, Qword, MaskedEq(thread), thread)])?],
        ),
        // Signals to this process: the end by a panic.
        (
            libc::SYS_tgkill,
            vec![all_of(&[(0, Dword, Eq, u64::from(std::process::id()))])?],
        ),
        // Names of threads.
        (libc::SYS_prctl, any_of(0, &[libc::PR_SET_NAME])?),
        // The limits of this process.
        (
            libc::SYS_prlimit64,
            vec![all_of(&[(0, Dword, Eq, 0), (2, Qword, Eq, 0)])?],
        ),
        // No code.
        (libc::SYS_mmap, not_executable()?),
        (libc::SYS_mprotect, not_executable()?),
        // Files, and no descriptors that name a file without Landlock's being asked.
        (libc::SYS_openat, vec![all_of(&[(2, Dword, MaskedEq(path), 0)])?]),
        (libc::SYS_fcntl, any_of(1, FCNTL)?),
        (libc::SYS_ioctl, any_of(1, &[FIONBIO, BLKDISCARD, BLKGETSIZE64])?),
        // A session connects to its protocol handler, whose address is shorter than that of any other socket.
        (
            libc::SYS_socket,
            vec![all_of(&[(0, Dword, Eq, unix), (1, Dword, Eq, stream)])?],
        ),
        (libc::SYS_connect, vec![all_of(&[(2, Dword, Eq, link as u64)])?]),
        // To the other end of a socket that is connected.
        (libc::SYS_sendto, vec![all_of(&[(4, Qword, Eq, 0)])?]),
    ]);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, vec![all_of(&[(1, Dword, MaskedEq(path), 0)])?]);
    Ok(rules)
}

/// Filters the system calls of all threads. PR_SET_NO_NEW_PRIVS is set, without which no filter is taken. `link` is the length of the
/// one address that the process connects to.
pub(super) fn filter(link: usize) -> Result<(), NotTaken> {
    let no_clone3 = program(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        // It has its flags in memory, where no filter looks. Without it the C library takes clone(2).
        SeccompAction::Errno(libc::ENOSYS.cast_unsigned()),
    )?;
    let mut rules = conditional(link)?;
    // Without a condition: always.
    let others = CALLS.iter().copied().flatten().chain(OLDER);
    rules.extend(others.map(|&call| (call, Vec::new())));
    let listed = program(rules, SeccompAction::Trap, SeccompAction::Allow)?;
    catch().map_err(NotTaken::Kernel)?;
    apply_filter_all_threads(&no_clone3)?;
    Ok(apply_filter_all_threads(&listed)?)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    then: SeccompAction,
) -> Result<BpfProgram, NotTaken> {
    let filter = SeccompFilter::new(rules, otherwise, then, std::env::consts::ARCH.try_into()?)?;
    Ok(filter.try_into()?)
}

/// The calls that were refused, by number: all, and those that the log was not told of.
static REFUSED: [AtomicU64; NUMBERS / 64] = [const { AtomicU64::new(0) }; NUMBERS / 64];
static UNTOLD: [AtomicU64; NUMBERS / 64] = [const { AtomicU64::new(0) }; NUMBERS / 64];
/// More than an architecture has. What is beyond is told as the last.
const NUMBERS: usize = 1024;
/// Signalled when there is one to be told.
static TELL: OnceLock<OwnedFd> = OnceLock::new();

/// Has SIGSYS call [`refuse`].
fn catch() -> io::Result<()> {
    let tell = eventfd(0, EventfdFlags::CLOEXEC)?;
    TELL.get_or_init(|| tell);
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = refuse;
    // SAFETY: all zeros is a valid sigaction: an empty mask, and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the action is valid, and its handler calls nothing but what a signal handler may.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The signal handler: takes note of the call, and has it fail.
extern "C" fn refuse(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: with SA_SIGINFO the kernel passes the registers of the interrupted thread, which are its alone until the handler returns.
    let registers = unsafe { &mut (*context).uc_mcontext };
    // The number is still where the call had it, and there the kernel looks for its result.
    #[cfg(target_arch = "x86_64")]
    let number = registers.gregs[libc::REG_RAX as usize];
    #[cfg(target_arch = "aarch64")]
    let number = registers.regs[8].cast_signed();
    note(usize::try_from(number).unwrap_or(usize::MAX));
    #[cfg(target_arch = "x86_64")]
    {
        registers.gregs[libc::REG_RAX as usize] = (-libc::EPERM).into();
    }
    #[cfg(target_arch = "aarch64")]
    {
        registers.regs[0] = i64::from(-libc::EPERM).cast_unsigned();
    }
}

fn note(number: usize) {
    let number = number.min(NUMBERS - 1);
    let (Some(refused), Some(untold)) = (REFUSED.get(number / 64), UNTOLD.get(number / 64)) else {
        return;
    };
    let bit = 1 << (number % 64);
    if refused.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
        untold.fetch_or(bit, Ordering::Release);
        if let Some(tell) = TELL.get() {
            // A raw call, since errno belongs to the code that was interrupted. An eventfd takes it without waiting.
            let _ = rustix::io::write(tell, &1_u64.to_ne_bytes());
        }
    }
}

/// Starts the thread that tells the log of calls that were refused.
pub(super) fn tell() -> io::Result<()> {
    let Some(fd) = TELL.get() else { return Ok(()) };
    let teller = thread::Builder::new().name("sandbox".into()).stack_size(STACK);
    teller.spawn(move || {
        while rustix::io::read(fd, &mut [0; 8]).is_ok() {
            for (word, untold) in UNTOLD.iter().enumerate() {
                let bits = untold.swap(0, Ordering::Acquire);
                for number in (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| 64 * word + bit) {
                    tracing::error!(
                        system_call = number,
                        architecture = std::env::consts::ARCH,
                        "the sandbox has refused a system call, and the disk continues; please report its number. If the disk does not \
                         work as it should, serve it with --sandbox=off"
                    );
                }
            }
        }
    })?;
    Ok(())
}

/// It formats lines, and does little else.
const STACK: usize = 256 << 10;

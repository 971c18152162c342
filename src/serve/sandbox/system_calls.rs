//! The filter of system calls.

use std::collections::BTreeMap;

use seccompiler::BackendError;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

use super::NotTaken;

/// Filters the system calls of all threads, and sets PR_SET_NO_NEW_PRIVS first, without which no filter is taken.
pub(super) fn filter() -> Result<(), NotTaken> {
    apply_filter_all_threads(&no_clone3()?)?;
    Ok(apply_filter_all_threads(&refused()?)?)
}

/// Calls that fail whatever their arguments are.
const REFUSED: &[libc::c_long] = &[
    // Another program or process.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_process_mrelease,
    libc::SYS_shmat,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    // Other users, name spaces and file systems.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_capset,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    // The kernel itself.
    libc::SYS_bpf,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_fanotify_init,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_quotactl,
    libc::SYS_personality,
];

/// Commands of fcntl(2) and ioctl(2) that libc does not have for every target.
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const TIOCSTI: libc::c_int = 0x5412;
const TIOCLINUX: libc::c_int = 0x541c;

/// Those of x86-64 alone.
#[cfg(target_arch = "x86_64")]
const REFUSED_HERE: &[libc::c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_mknod,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_HERE: &[libc::c_long] = &[];

/// The bit of a number of the x32 ABI, and the numbers that are that ABI's own (arch/x86/entry/syscalls/syscall_64.tbl): to the end of
/// their range.
#[cfg(target_arch = "x86_64")]
const X32_BIT: libc::c_long = 0x4000_0000;
#[cfg(target_arch = "x86_64")]
const X32_OWN: std::ops::RangeInclusive<libc::c_long> = 512..=547;

fn refused() -> Result<BpfProgram, NotTaken> {
    use SeccompCmpArgLen::{Dword, Qword};
    let own = u64::from(std::process::id());
    let exec = libc::PROT_EXEC as u64;
    let thread = libc::CLONE_THREAD as u64;
    let unix = libc::AF_UNIX as u64;
    let when = |argument, len, operator, value| -> Result<Vec<SeccompRule>, BackendError> {
        let condition = SeccompCondition::new(argument, len, operator, value)?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    };
    let any_of = |argument, values: &[libc::c_int]| -> Result<Vec<SeccompRule>, BackendError> {
        let rule = |value: &libc::c_int| {
            let condition =
                SeccompCondition::new(argument, Dword, SeccompCmpOp::Eq, u64::from(value.unsigned_abs()))?;
            SeccompRule::new(vec![condition])
        };
        values.iter().map(rule).collect()
    };
    let executable = || when(2, Dword, SeccompCmpOp::MaskedEq(exec), exec);
    let mut rules = BTreeMap::from([
        (libc::SYS_socket, when(0, Dword, SeccompCmpOp::Ne, unix)?),
        (libc::SYS_tgkill, when(0, Dword, SeccompCmpOp::Ne, own)?),
        // Limits of another process, by which it can be ended.
        (libc::SYS_prlimit64, when(0, Dword, SeccompCmpOp::Ne, 0)?),
        // A signal that the kernel sends to another process when something happens to a descriptor.
        (
            libc::SYS_fcntl,
            any_of(1, &[libc::F_SETOWN, F_SETSIG, F_SETOWN_EX])?,
        ),
        // Input that another program reads from this process' terminal.
        (libc::SYS_ioctl, any_of(1, &[TIOCSTI, TIOCLINUX])?),
        // Memory that others of the same user can read and write.
        (libc::SYS_prctl, any_of(0, &[libc::PR_SET_DUMPABLE])?),
        (
            libc::SYS_clone,
            when(0, Qword, SeccompCmpOp::MaskedEq(thread), 0)?,
        ),
        (libc::SYS_mmap, executable()?),
        (libc::SYS_mprotect, executable()?),
        (libc::SYS_pkey_mprotect, executable()?),
    ]);
    // Without a condition: always.
    rules.extend(REFUSED.iter().chain(REFUSED_HERE).map(|&call| (call, Vec::new())));
    #[cfg(target_arch = "x86_64")]
    {
        let known: Vec<_> = rules.keys().copied().collect();
        let x32 = known
            .into_iter()
            .chain([libc::SYS_clone3])
            .chain(X32_OWN)
            .map(|call| call | X32_BIT);
        rules.extend(x32.map(|call| (call, Vec::new())));
    }
    program(rules, libc::EPERM)
}

/// clone3(2) has its flags in memory, where no filter looks. Without it the C library takes clone(2).
fn no_clone3() -> Result<BpfProgram, NotTaken> {
    program(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), libc::ENOSYS)
}

fn program(rules: BTreeMap<i64, Vec<SeccompRule>>, errno: libc::c_int) -> Result<BpfProgram, NotTaken> {
    let refuse = SeccompAction::Errno(errno.unsigned_abs());
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        refuse,
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}

//! System calls in another process: what code of an attacker could do that runs in it.
//!
//! The process is stopped by ptrace(2), and its main thread is made to execute one instruction, `syscall`, with arguments of the
//! test's choice. So the process is the released program, as it is when it serves a disk, and has no code for tests. It takes
//! root, and x86-64.

#![allow(unsafe_code)] // ptrace(2) has no safe wrapper.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use libc::{c_long, pid_t, user_regs_struct};

/// A process that is stopped, until this is dropped.
#[derive(Debug)]
pub struct Inside {
    pid: pid_t,
    registers: user_regs_struct,
    memory: File,
}

/// An argument of a system call.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    Number(i64),
    /// The address of these bytes.
    Bytes(&'a [u8]),
}

impl From<i64> for Arg<'_> {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<i32> for Arg<'_> {
    fn from(number: i32) -> Self {
        Self::Number(number.into())
    }
}

impl<'a> From<&'a [u8]> for Arg<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Arg<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        Self::Bytes(bytes)
    }
}

/// Below what the thread has on its stack, and below what the ABI lets it have under that.
const SCRATCH: u64 = 64 << 10;
/// `syscall`, by which the thread has entered the kernel, is that long.
const INSTRUCTION: u64 = 2;

impl Inside {
    /// Stops the main thread of a process, which waits in a system call.
    pub fn of(pid: u32) -> Self {
        let pid = pid as pid_t;
        ptrace(libc::PTRACE_SEIZE, pid, 0);
        ptrace(libc::PTRACE_INTERRUPT, pid, 0);
        wait(pid);
        let registers = registers(pid);
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .unwrap();
        let mut instruction = [0; INSTRUCTION as usize];
        memory
            .read_exact_at(&mut instruction, registers.rip - INSTRUCTION)
            .unwrap();
        assert_eq!(
            instruction,
            [0x0f, 0x05],
            "the main thread waits in no system call"
        );
        Self {
            pid,
            registers,
            memory,
        }
    }

    /// Makes a system call.
    pub fn call(&self, number: c_long, arguments: &[Arg<'_>]) -> io::Result<i64> {
        let mut scratch = self.registers.rsp - SCRATCH;
        let mut values = [0; 6];
        for (value, argument) in values.iter_mut().zip(arguments) {
            *value = match argument {
                Arg::Number(number) => number.cast_unsigned(),
                Arg::Bytes(bytes) => {
                    let at = scratch;
                    self.memory.write_all_at(bytes, at).unwrap();
                    scratch += (bytes.len() as u64).next_multiple_of(16);
                    at
                }
            };
        }
        let [rdi, rsi, rdx, r10, r8, r9] = values;
        let call = user_regs_struct {
            rip: self.registers.rip - INSTRUCTION,
            rax: number.cast_unsigned(),
            // Not in a system call: the kernel restarts none.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.registers
        };
        ptrace(libc::PTRACE_SETREGS, self.pid, (&raw const call).addr());
        let mut signal = self.step(0);
        // The process has a handler for calls that its filter refuses: it decides on the result.
        while signal != libc::SIGTRAP || registers(self.pid).rip != self.registers.rip {
            signal = self.step(if signal == libc::SIGSYS { signal } else { 0 });
        }
        let result = registers(self.pid).rax.cast_signed();
        match result {
            -4095..0 => Err(io::Error::from_raw_os_error(-result as i32)),
            result => Ok(result),
        }
    }

    /// Executes one instruction; gives the signal that it brings.
    fn step(&self, signal: i32) -> i32 {
        ptrace(libc::PTRACE_SINGLESTEP, self.pid, signal as usize);
        wait(self.pid)
    }

    /// Sends a message by a socket of the process, and gives the answer, which ends with a zero byte.
    pub fn exchange(&self, socket: i32, message: &[u8]) -> Vec<u8> {
        let len = message.len() as i64;
        let send = [
            socket.into(),
            message.into(),
            len.into(),
            0.into(),
            0.into(),
            0.into(),
        ];
        assert_eq!(self.call(libc::SYS_sendto, &send).unwrap(), len);
        let mut answer = Vec::new();
        while answer.last() != Some(&0) {
            let buffer = [0; 4096];
            let receive = [
                socket.into(),
                (&buffer).into(),
                4096.into(),
                0.into(),
                0.into(),
                0.into(),
            ];
            let received = self.call(libc::SYS_recvfrom, &receive).unwrap() as usize;
            assert!(received > 0, "nobody answers");
            let mut part = vec![0; received];
            self.memory
                .read_exact_at(&mut part, self.registers.rsp - SCRATCH)
                .unwrap();
            answer.append(&mut part);
        }
        answer
    }

    /// Makes a system call that must be refused.
    pub fn refused(&self, what: &str, errno: i32, number: c_long, arguments: &[Arg<'_>]) {
        let error = match self.call(number, arguments) {
            Ok(result) => panic!("{what}: it works: {result}"),
            Err(error) => error,
        };
        assert_eq!(error.raw_os_error(), Some(errno), "{what}: {error}");
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        ptrace(libc::PTRACE_SETREGS, self.pid, (&raw const self.registers).addr());
        // What it waited for is waited for again.
        ptrace(libc::PTRACE_DETACH, self.pid, 0);
    }
}

fn registers(pid: pid_t) -> user_regs_struct {
    // SAFETY: the structure is numbers alone.
    let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, pid, (&raw mut registers).addr());
    registers
}

fn ptrace(request: libc::c_uint, pid: pid_t, data: usize) {
    // SAFETY: `data` is a number, or the address of registers that live longer than the call; the address is no use to any request here.
    let result = unsafe { libc::ptrace(request, pid, 0, data) };
    assert_eq!(result, 0, "ptrace {request}: {}", io::Error::last_os_error());
}

/// Waits for a stop; gives the signal that stopped it.
fn wait(pid: pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: writes the status, which lives longer than the call.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
    assert_eq!(waited, pid, "{}", io::Error::last_os_error());
    assert!(libc::WIFSTOPPED(status), "it ended: {status:x}");
    libc::WSTOPSIG(status)
}

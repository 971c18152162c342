//! A child process whose end is awaited with a deadline, whose standard error is kept, and whose state is read
//! from `/proc`.

use super::DEADLINE;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub struct Process {
    child: Child,
    stderr: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    /// Whether the test makes it do what its sandbox refuses.
    pub is_taken_over: bool,
}

/// How a process ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stderr: String,
}

impl Ended {
    /// It ended with this exit code, by no panic, and has said all of this.
    pub fn assert_says(&self, code: i32, says: &[&str]) {
        let Ended { status, stderr } = self;
        assert_eq!(status.code(), Some(code), "{status}: {stderr}");
        for text in says {
            assert!(stderr.contains(text), "nothing of {text:?} in: {stderr}");
        }
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

/// What must be the same before and after something that should leave nothing behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub descriptors: usize,
    pub threads: usize,
    /// Mappings of a front-end's guest memory.
    pub guest_mappings: usize,
    pub resident_kib: u64,
    pub locked_kib: u64,
}

/// The children of a process, those included that have ended and are not reaped.
pub fn children_of(process: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap();
    let numbers = processes.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u32>().ok());
    let parent = |number: &u32| {
        let stat = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        fields.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    numbers.filter(|number| parent(number) == Some(process)).collect()
}

/// As [`Process::threads`], of any process.
pub fn threads_of(pid: u32) -> Vec<Thread> {
    let thread = |task: PathBuf| {
        let read = |name: &str| fs::read_to_string(task.join(name)).ok();
        let number = |text: &str| text.split_whitespace().next()?.parse().ok();
        let status = read("status")?;
        let switches = status
            .lines()
            .filter_map(|line| line.split_once("ctxt_switches:"));
        Some(Thread {
            id: number(task.file_name()?.to_str()?)?,
            name: read("comm")?.trim().to_owned(),
            ran_ns: number(&read("schedstat")?)?,
            switches: switches.filter_map(|(_, count)| number(count)).sum(),
        })
    };
    let tasks = fs::read_dir(format!("/proc/{}/task", pid)).unwrap();
    // One that ends meanwhile is not there.
    tasks.filter_map(|task| thread(task.unwrap().path())).collect()
}

/// What a thread has done so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    pub id: u64,
    pub name: String,
    pub ran_ns: u64,
    /// How often it was taken off a processor, of its own accord or not.
    pub switches: u64,
}

/// The facts of any process.
pub fn facts_of(pid: u32) -> Facts {
    let proc = |name: &str| format!("/proc/{}/{name}", pid);
    let status = fs::read_to_string(proc("status")).unwrap();
    let field = |name: &str| -> u64 {
        let line = status
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or("0 0");
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let maps = fs::read_to_string(proc("maps")).unwrap();
    Facts {
        descriptors: fs::read_dir(proc("fd")).unwrap().count(),
        threads: field("Threads:") as usize,
        guest_mappings: maps
            .lines()
            .filter(|line| line.contains("sealblk-test-guest"))
            .count(),
        resident_kib: field("VmRSS:"),
        locked_kib: field("VmLck:"),
    }
}

impl Process {
    pub fn spawn(command: &mut Command) -> Self {
        Process::spawn_with_stdin(command, Stdio::null())
    }

    pub fn spawn_with_stdin(command: &mut Command, stdin: Stdio) -> Self {
        let mut child = command
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let stderr = Arc::new(Mutex::new(String::new()));
        let (pipe, kept) = (child.stderr.take().unwrap(), stderr.clone());
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                let mut kept = kept.lock().unwrap();
                kept.push_str(&String::from_utf8_lossy(&line));
                kept.push('\n');
            }
        });
        Process {
            child,
            stderr,
            reader: Some(reader),
            is_taken_over: false,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Waits until it has said something.
    pub fn wait_stderr(&self, text: &str) {
        let start = Instant::now();
        while !self.stderr().contains(text) {
            assert!(
                start.elapsed() < DEADLINE,
                "it did not say {text:?} but:\n{}",
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn wait(&mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                start.elapsed() < DEADLINE,
                "process {} does not end; it said:\n{}",
                self.pid(),
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(2));
        };
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        Ended {
            status,
            stderr: self.stderr(),
        }
    }

    /// The facts once they have stopped to change, as they do while a process starts.
    pub fn settled_facts(&self) -> Facts {
        let start = Instant::now();
        let mut facts = self.facts();
        loop {
            std::thread::sleep(Duration::from_millis(5));
            let now = self.facts();
            if now == facts {
                return facts;
            }
            assert!(
                start.elapsed() < DEADLINE,
                "process {} does not settle: {now:?}",
                self.pid()
            );
            facts = now;
        }
    }

    /// Processor time used so far, in clock ticks.
    pub fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        // User and system time are fields 14 and 15; the second, the name in parentheses, is passed over.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// How long and how often each of its threads has run so far, those included that the kernel runs for it.
    pub fn threads(&self) -> Vec<Thread> {
        threads_of(self.pid())
    }

    pub fn facts(&self) -> Facts {
        facts_of(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let state = match ended {
                Ok(Some(status)) => status.to_string(),
                _ => "still running".to_owned(),
            };
            eprintln!(
                "---- process {}, {state}; it said:\n{}",
                self.child.id(),
                self.stderr()
            );
        } else if !self.is_taken_over {
            let said = self.stderr();
            assert!(!said.contains("the sandbox has refused"), "{said}");
        }
    }
}

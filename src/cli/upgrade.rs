//! `sealblk upgrade`: starts a process that continues to serve a disk, in the place of the one that serves it.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use base16ct::lower;
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use sealblk_base::blame::Blame;
use sealblk_command::executable;
use sealblk_serve::command::{NAME, TAKEN_OVER, UPGRADE};
use serde_json::{Value, json};

use super::failure::Failure;
use super::secret::SecretSource;
use super::target::served_names;
use super::{absolute, output, served, text, units};
use crate::control::varlink::{CallError, call};
use crate::disks::{DiskName, Sockets};
use crate::upgrade::{Begun, ConnectError, ENVIRONMENT, INTERFACE, connect};

const AFTER_HELP: &str = "\
The executable vhost-user-sealblk beside this `sealblk` serves the disk afterwards. So install the new release, then run its
`sealblk upgrade`. To return to the release before, run the `sealblk upgrade` of that. The new process is started with the options and
in the directory of the old process, and writes to the same log. It gets the key itself.

The guest's requests wait for some hundredths of a second. QEMU stays connected. If the new process does not start, does not get the key, or
is not ready in time, the old process continues.

Run it as the user that the disk is served as. For a disk with a name whose unit runs as another user, root has systemd run it as that
user (`systemctl reload sealblk@NAME`). With --all, sealblk continues after a failure; the exit code is that of the last failure.";

/// Have another release serve a disk, while its guest runs
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Upgrade {
    #[command(flatten)]
    which: Which,
    /// The passphrase, recovery key or key file of the disk, if `sealblk serve` read it from a source that can be read only once
    #[arg(long, value_name = "FILE|-|fd:N|cred:NAME", visible_alias = "key-file")]
    passphrase_file: Option<SecretSource>,
    /// How long the new process may take until it is ready; it asks key servers
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=30))]
    timeout: u64,
}

/// Which disks.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The disk's name on this host (`sealblk define`)
    #[arg(value_name = "NAME")]
    name: Option<DiskName>,
    /// The control socket of `sealblk serve`, for a disk without a name
    #[arg(long, value_name = "SOCK")]
    control_socket: Option<PathBuf>,
    /// All disks with names that are being served
    #[arg(long, conflicts_with = "passphrase_file")]
    all: bool,
}

/// An upgrade under way.
struct Attempt {
    control_socket: PathBuf,
    passphrase_file: Option<SecretSource>,
    timeout: u64,
}

/// How long a process that serves the disk may take to say so, or one that does not to end; and how often that is checked.
const LAST_WORD: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(10);

impl Upgrade {
    pub(super) fn run(self) -> Result<(), Failure> {
        let Which {
            name, control_socket, ..
        } = self.which;
        let attempt = |control_socket| Attempt {
            control_socket,
            passphrase_file: self.passphrase_file.clone(),
            timeout: self.timeout,
        };
        match (name, control_socket) {
            (Some(name), _) => upgrade_by_name(&name, attempt),
            (None, Some(socket)) => attempt(socket).run(),
            (None, None) => {
                let mut failed: Option<Failure> = None;
                for name in served_names() {
                    if let Err(failure) = upgrade_by_name(&name, attempt)
                        && let Some(earlier) = failed.replace(failure)
                    {
                        output::complain_with(&earlier, &earlier.list());
                    }
                }
                failed.map_or(Ok(()), Err)
            }
        }
    }
}

/// By this process if it can, else by the disk's unit.
fn upgrade_by_name(name: &DiskName, attempt: impl Fn(PathBuf) -> Attempt) -> Result<(), Failure> {
    let control = Sockets::of(name).control;
    let is_others = matches!(connect(&control, LAST_WORD), Err(ConnectError::OtherUser { .. }));
    match is_others && units::is_active(name) {
        true => units::reload_service(name),
        false => attempt(control).run(),
    }
}

impl Attempt {
    fn run(self) -> Result<(), Failure> {
        let (begun, stderr) = self.ask::<Begun>("Begin", json!({}))?;
        if begun.reads_once && self.passphrase_file.is_none() {
            return Err(self.refuse(
                "the passphrase of this disk was read from a source that can be read only once: give it again with \
                 --passphrase-file"
                    .to_owned(),
            ));
        }
        let executable = executable::find(NAME)?;
        let mut command = self.command(&executable, &begun)?;
        if let Some(stderr) = stderr {
            command.stderr(Stdio::from(stderr));
        }
        let child = command.spawn().map_err(|source| Failure::Execute {
            path: executable.clone(),
            source,
        })?;
        let process = child.id();
        self.wait(child, &begun)?;
        output::print(&format!(
            "{}: served by process {process}, release {}; before by process {}, release {}\n",
            text::shown(&self.control_socket),
            env!("CARGO_PKG_VERSION"),
            begun.process,
            text::printable(&begun.version),
        ))
    }

    /// The new process, as the old one was started.
    fn command(&self, executable: &Path, begun: &Begun) -> Result<Command, Failure> {
        let decode = |text: &String| lower::decode_vec(text).map(OsString::from_vec);
        let arguments: Result<Vec<_>, _> = begun.arguments.iter().map(decode).collect();
        let environment: Result<Vec<_>, _> = begun.environment.iter().map(lower::decode_vec).collect();
        let (Ok(arguments), Ok(environment), Ok(directory)) =
            (arguments, environment, decode(&begun.directory))
        else {
            return Err(self.refuse("its answer makes no sense".to_owned()));
        };
        let mut command = Command::new(executable);
        // By its own name, the verb is not among the arguments.
        let mut arguments = arguments.into_iter();
        let name = arguments.next().unwrap_or_default();
        let is_own = Path::new(&name).file_name().is_some_and(|name| name == NAME);
        std::os::unix::process::CommandExt::arg0(&mut command, if is_own { NAME } else { "sealblk" });
        command.args(arguments).current_dir(directory);
        command.arg(format!("{UPGRADE}{}", begun.upgrade));
        if let Some(source) = &self.passphrase_file {
            // Its descriptors go with the process, and its directory is another one.
            source.inherited()?;
            let source = match source {
                SecretSource::File(path) => SecretSource::File(absolute(path.clone())?),
                other => other.clone(),
            };
            let mut option = OsString::from("--passphrase-file=");
            option.push(source.argument());
            command.arg(option);
        }
        for name in ENVIRONMENT {
            command.env_remove(name);
        }
        for variable in environment {
            let mut parts = variable.splitn(2, |byte| *byte == b'=');
            let mut part = || OsString::from_vec(parts.next().unwrap_or_default().to_vec());
            let (name, value) = (part(), part());
            if ENVIRONMENT.iter().any(|known| name == *known) {
                command.env(name, value);
            }
        }
        let stdin = match self.passphrase_file {
            Some(SecretSource::Descriptor(libc::STDIN_FILENO)) => Stdio::inherit(),
            _ => Stdio::null(),
        };
        command.stdin(stdin).stdout(Stdio::piped());
        Ok(command)
    }

    /// Waits until the new process serves the disk.
    fn wait(&self, mut child: Child, begun: &Begun) -> Result<(), Failure> {
        let (tell, told) = sync_channel(1);
        let stdout = child.stdout.take();
        thread::spawn(move || {
            let mut said = Vec::new();
            if let Some(stdout) = stdout {
                let mut stdout = stdout.take(MOST_SAID);
                let mut byte = [0];
                while !is_taken_over(&said) && matches!(stdout.read(&mut byte), Ok(1)) {
                    said.push(byte[0]);
                }
            }
            let _ = tell.send(said);
        });
        let limit = Duration::from_secs(self.timeout);
        let said = match told.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) => self.cancel(&mut child, begun, &told)?,
            said => said.unwrap_or_default(),
        };
        if is_taken_over(&said) {
            return Ok(());
        }
        let ended = child.wait().map_err(Failure::Host)?;
        Err(self.did_not_take_over(ended, &String::from_utf8_lossy(&said)))
    }

    /// Cancels the upgrade, and ends the new process, unless it has taken the disk over meanwhile; then: what it has said.
    fn cancel(&self, child: &mut Child, begun: &Begun, told: &Receiver<Vec<u8>>) -> Result<Vec<u8>, Failure> {
        let reason = match self.ask::<Value>("End", json!({ "upgrade": begun.upgrade })) {
            // It cannot take the disk over any more.
            Ok(_) => {
                end(child);
                format!(
                    "the new process was not ready after {} seconds, and was ended",
                    self.timeout
                )
            }
            Err(_) => match told.recv_timeout(LAST_WORD) {
                Ok(said) => return Ok(said),
                Err(_) => "neither process answers; see `sealblk status`".to_owned(),
            },
        };
        Err(Failure::NotUpgraded {
            socket: self.control_socket.clone(),
            reason,
            blame: Blame::Process,
        })
    }

    fn did_not_take_over(&self, ended: ExitStatus, said: &str) -> Failure {
        let reason = match said.trim() {
            "" => format!("the new process has ended ({ended}); the log of the disk may say why"),
            said => said.to_owned(),
        };
        let code = ended.code().and_then(|code| u8::try_from(code).ok());
        Failure::NotUpgraded {
            socket: self.control_socket.clone(),
            reason,
            blame: code
                .filter(|code| *code > 0)
                .map_or(Blame::Host, Blame::of_exit_code),
        }
    }

    /// Calls a method of the process that serves the disk; the first descriptor of the answer.
    fn ask<T: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        parameters: Value,
    ) -> Result<(T, Option<std::os::fd::OwnedFd>), Failure> {
        let socket = &self.control_socket;
        let mut connection = connect(socket, served::TIMEOUT).map_err(|error| match error {
            ConnectError::Io(error) => served::failure(socket, error.into()),
            other @ ConnectError::OtherUser { .. } => self.refuse(other.to_string()),
        })?;
        match call(&mut connection, &format!("{INTERFACE}.{method}"), parameters, &[]) {
            Ok((answer, descriptors)) => Ok((answer, descriptors.into_iter().next())),
            Err(CallError::Method(error)) if error.name.ends_with(".InterfaceNotFound") => Err(self.refuse(
                "the release that serves this disk cannot be upgraded while the guest runs: end `sealblk serve` (SIGTERM), and start \
                 the new one; the guest's requests wait meanwhile"
                    .to_owned(),
            )),
            Err(error) => Err(served::failure(socket, error)),
        }
    }

    fn refuse(&self, message: String) -> Failure {
        Failure::Refused {
            socket: self.control_socket.clone(),
            message,
            reason: None,
        }
    }
}

/// Has a process end, which tells the agent of it if it can: the agent keeps the key of one that is killed for a while.
fn end(child: &mut Child) {
    let start = Instant::now();
    let _ = kill_process(Pid::from_child(child), Signal::TERM);
    while start.elapsed() < LAST_WORD {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(TICK);
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// The most that the new process says to this one.
const MOST_SAID: u64 = 64 << 10;

fn is_taken_over(said: &[u8]) -> bool {
    said.strip_suffix(b"\n") == Some(TAKEN_OVER.as_bytes())
}

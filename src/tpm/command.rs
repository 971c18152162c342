//! One command and its answer (TPM 2.0 Library, part 1, 18).
//!
//! Handles come first, then the sessions that authorise their use, then parameters. Handles in answers are objects
//! and sessions, which stay in the TPM until they are flushed: [`Tpm::flush`].

use std::thread;
use std::time::Duration;

use tpm2_protocol::data::TpmCc;
use zeroize::{Zeroize, Zeroizing};

use super::codec::{Marshal, Reader};
use super::device::{HEADER, MAX_MESSAGE};
use super::session::Session;
use super::{Code, Tpm, TpmError, TpmFailure};
use sealblk_secmem::arena::SecretBytes;

/// TPM_ST_NO_SESSIONS and TPM_ST_SESSIONS.
const NO_SESSIONS: u16 = 0x8001;
const SESSIONS: u16 = 0x8002;
/// TPM_RS_PW: no session, but a password in its place; ours are empty.
const PASSWORD: u32 = 0x4000_0009;

/// How often a TPM that has no time just now is asked again.
const RETRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(100);
/// TPM_RC_YIELDED, TESTING, RETRY, NV_RATE: the same command works later.
const LATER: [u32; 4] = [0x908, 0x90a, 0x922, 0x920];

/// A command that is being put together.
pub(super) struct Command<'s> {
    pub(super) code: TpmCc,
    pub(super) name: &'static str,
    handles: Vec<(u32, Vec<u8>)>,
    auths: Vec<Auth<'s>>,
    parameters: Vec<u8>,
    answered_handles: usize,
}

/// What authorises the use of a handle, or encrypts a parameter.
pub(super) enum Auth<'s> {
    /// The empty password.
    Password,
    /// A session, whose attributes for this command are these.
    Session(&'s mut Session, u8),
}

/// The answer to a command.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) handles: Vec<u32>,
    parameters: Vec<u8>,
    at: usize,
    command: &'static str,
}

impl<'s> Command<'s> {
    pub(super) fn new(code: TpmCc, name: &'static str) -> Self {
        Self {
            code,
            name,
            handles: Vec::new(),
            auths: Vec::new(),
            parameters: Vec::new(),
            answered_handles: 0,
        }
    }

    /// A permanent handle, or one of an object without a name of its own: its number is its name.
    pub(super) fn handle(self, handle: u32) -> Self {
        self.object(handle, &handle.to_be_bytes())
    }

    /// The handle of an object of this Name.
    pub(super) fn object(mut self, handle: u32, name: &[u8]) -> Self {
        self.handles.push((handle, name.to_vec()));
        self
    }

    pub(super) fn auth(mut self, auth: Auth<'s>) -> Self {
        self.auths.push(auth);
        self
    }

    pub(super) fn parameters(mut self, parameters: Vec<u8>) -> Self {
        self.parameters = parameters;
        self
    }

    /// The answer begins with a handle.
    pub(super) fn answers_handle(mut self) -> Self {
        self.answered_handles = 1;
        self
    }
}

impl Tpm {
    /// Has a command carried out.
    pub(super) fn run(&mut self, mut command: Command<'_>) -> Result<Response, TpmError> {
        let name = command.name;
        let names: Vec<u8> = command
            .handles
            .iter()
            .flat_map(|(_, name)| name.clone())
            .collect();
        let code = command.code as u32;
        for auth in &mut command.auths {
            if let Auth::Session(session, attributes) = auth {
                session
                    .begin(*attributes, &mut command.parameters)
                    .map_err(|e| self.failed(e))?;
            }
        }
        let mut sessions = Vec::new();
        for auth in &command.auths {
            match auth {
                Auth::Password => {
                    sessions.u32(PASSWORD);
                    sessions.sized(&[]);
                    sessions.push(0);
                    sessions.sized(&[]);
                }
                Auth::Session(session, attributes) => {
                    let hmac = session.authorise(code, &names, &command.parameters, *attributes);
                    sessions.u32(session.handle);
                    sessions.sized(session.nonce_caller());
                    sessions.push(*attributes);
                    sessions.sized(&hmac);
                }
            }
        }
        let mut bytes = Vec::with_capacity(MAX_MESSAGE);
        bytes.u16(if sessions.is_empty() {
            NO_SESSIONS
        } else {
            SESSIONS
        });
        bytes.u32(0);
        bytes.u32(code);
        command.handles.iter().for_each(|(handle, _)| bytes.u32(*handle));
        if !sessions.is_empty() {
            bytes.u32(sessions.len() as u32);
            bytes.extend_from_slice(&sessions);
        }
        bytes.extend_from_slice(&command.parameters);
        let len = bytes.len() as u32;
        bytes[2..6].copy_from_slice(&len.to_be_bytes());

        let raw = self.transmit(&bytes, name)?;
        let garbled = |what| TpmFailure::Garbled { command: name, what };
        let mut reader = Reader(&raw[HEADER..]);
        let read = |reader: &mut Reader<'_>| -> Option<Response> {
            let handles = (0..command.answered_handles).map(|_| reader.u32());
            let handles = handles.collect::<Option<Vec<u32>>>()?;
            let parameters = match sessions.is_empty() {
                true => std::mem::take(&mut reader.0),
                false => {
                    let len = reader.u32()?;
                    reader.take(usize::try_from(len).ok()?)?
                }
            };
            Some(Response {
                handles,
                parameters: parameters.to_vec(),
                at: 0,
                command: name,
            })
        };
        let mut answer = read(&mut reader).ok_or_else(|| self.failed(garbled("it is too short")))?;
        for auth in &mut command.auths {
            let fields = || -> Option<(&[u8], u8, &[u8])> {
                let nonce = reader.sized()?;
                let [attributes] = reader.take(1)? else {
                    return None;
                };
                Some((nonce, *attributes, reader.sized()?))
            };
            let mut fields = fields;
            let (nonce, attributes, hmac) =
                fields().ok_or_else(|| self.failed(garbled("a session is missing")))?;
            if let Auth::Session(session, _) = auth
                && session
                    .end(code, &mut answer.parameters, nonce, attributes, hmac)
                    .is_none()
            {
                // Somebody sits between us and the TPM.
                return Err(self.failed(garbled("it is not authentic")));
            }
        }
        match reader.0.is_empty() {
            true => Ok(answer),
            false => Err(self.failed(garbled("it is too long"))),
        }
    }

    /// Lets an object or a session go. Where even that fails, the kernel's resource manager does it when the device is closed.
    pub(super) fn flush(&mut self, handle: u32) {
        let command = Command::new(TpmCc::FlushContext, "TPM2_FlushContext");
        let _ = self.run(command.parameters(handle.to_be_bytes().to_vec()));
    }

    fn transmit(&mut self, bytes: &[u8], command: &'static str) -> Result<Vec<u8>, TpmError> {
        for _ in 0..RETRIES {
            let answer = self.stream.transmit(bytes).map_err(|e| self.failed(e))?;
            let code = u32::from_be_bytes(answer[6..HEADER].try_into().expect("it is as long"));
            match code {
                0 => return Ok(answer),
                code if LATER.contains(&code) => thread::sleep(PAUSE),
                code => {
                    let code = Code(code);
                    return Err(self.failed(TpmFailure::Refused { command, code }));
                }
            }
        }
        Err(self.failed(std::io::Error::from(std::io::ErrorKind::TimedOut)))
    }
}

impl Response {
    /// Reads parameters.
    pub(super) fn read<'a, T>(
        &'a mut self,
        read: impl FnOnce(&mut Reader<'a>) -> Option<T>,
    ) -> Result<T, TpmFailure> {
        let mut reader = Reader(&self.parameters[self.at..]);
        let value = read(&mut reader);
        self.at = self.parameters.len() - reader.0.len();
        value.ok_or(TpmFailure::Garbled {
            command: self.command,
            what: "a parameter is missing",
        })
    }

    pub(super) fn sized(&mut self) -> Result<Vec<u8>, TpmFailure> {
        self.read(|reader| reader.sized().map(<[u8]>::to_vec))
    }

    /// A parameter that is secret.
    pub(super) fn secret(&mut self) -> Result<SecretBytes, TpmFailure> {
        let bytes = Zeroizing::new(self.sized()?);
        let mut secret = SecretBytes::zeroed(bytes.len()).map_err(|e| TpmFailure::Host(e.into()))?;
        secret.copy_from_slice(&bytes);
        self.parameters.zeroize();
        Ok(secret)
    }

    pub(super) fn handle(&self) -> u32 {
        self.handles[0]
    }
}

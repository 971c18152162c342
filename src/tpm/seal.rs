//! A secret under a TPM's storage key, bound to registers: only this TPM unseals it, and only while the registers hold the
//! same values.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tpm2_protocol::data::TpmCc;

use super::attest;
use super::command::{Auth, Command, Marshal};
use super::pcr::Selection;
use super::session::{CONTINUE, DECRYPT, ENCRYPT, Kind, Session};
use super::{Code, Tpm, TpmError, TpmFailure};
use crate::keys::arena::SecretBytes;

/// TPM_RH_OWNER.
const OWNER: u32 = 0x4000_0001;
/// TPM_RC_POLICY_FAIL, TPM_RC_INTEGRITY: the registers, or the TPM, are others than those that it was sealed to.
const POLICY_FAIL: u32 = 0x09d;
pub(super) const INTEGRITY: u32 = 0x09f;
/// TPM_RC_PCR_CHANGED: a register, whichever, was extended after the policy had looked at its own.
const PCR_CHANGED: u32 = 0x128;
/// How often the policy is asked for anew then. Some registers are extended all the time.
const TRIES: usize = 20;

/// The key under which a TPM keeps what is ours. It is made anew from the TPM's own seed whenever it is needed, the same each
/// time.
pub(super) struct StorageKey {
    pub(super) handle: u32,
    pub(super) name: Vec<u8>,
    pub(super) x: Vec<u8>,
    pub(super) y: Vec<u8>,
}

/// A sealed secret. Whoever has it has nothing without the TPM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sealed {
    /// The registers that it is bound to.
    pub pcrs: Selection,
    /// The Name of the storage key, which tells one TPM from another.
    #[serde(with = "text")]
    parent: Vec<u8>,
    /// TPM2B_PUBLIC and TPM2B_PRIVATE, without their lengths.
    #[serde(with = "text")]
    public: Vec<u8>,
    #[serde(with = "text")]
    private: Vec<u8>,
}

impl Tpm {
    /// Seals a secret of up to 128 bytes to what the registers hold now.
    ///
    /// # Errors
    /// If the TPM does not do it.
    pub fn seal(&mut self, secret: &SecretBytes, pcrs: Selection) -> Result<Sealed, TpmError> {
        self.with_storage_key(|tpm, parent| {
            let policy = policy(pcrs, &pcrs.digest(&tpm.read_pcrs()?));
            let mut public = Vec::new();
            // A keyed hash that signs nothing, with a policy in the place of a password: it stays in this TPM.
            public.u16(0x0008);
            public.u16(0x000b);
            public.u32(0x0000_0412);
            public.sized(&policy);
            public.u16(0x0010);
            public.sized(&[]);

            let mut parameters = Vec::with_capacity(512);
            parameters.u16(4 + secret.len() as u16);
            parameters.sized(&[]);
            parameters.sized(secret);
            parameters.sized(&public);
            parameters.sized(&[]);
            parameters.u32(0);
            tpm.with_session(Kind::Hmac, parent, |tpm, session| {
                let command = Command::new(TpmCc::Create, "TPM2_Create")
                    .object(parent.handle, &parent.name)
                    .auth(Auth::Password)
                    .auth(Auth::Session(session, CONTINUE | DECRYPT))
                    .parameters(parameters);
                let mut answer = tpm.run(command)?;
                let mut sized = || answer.sized().map_err(|e| tpm.failed(e));
                let (private, public) = (sized()?, sized()?);
                Ok(Sealed {
                    pcrs,
                    parent: parent.name.clone(),
                    public,
                    private,
                })
            })
        })
    }

    /// Gives a sealed secret back.
    ///
    /// # Errors
    /// [`TpmFailure::Changed`], if this is another TPM, or the registers hold something else, or what is sealed was altered; else,
    /// if the TPM does not do it.
    pub fn unseal(&mut self, sealed: &Sealed) -> Result<SecretBytes, TpmError> {
        self.with_storage_key(|tpm, parent| {
            let other = TpmFailure::Changed(
                "another TPM sealed the key, or this TPM was cleared, or the sealed key is damaged",
            );
            if parent.name != sealed.parent {
                return Err(tpm.failed(other));
            }
            let (handle, name) = match tpm.load(parent, &sealed.private, &sealed.public) {
                Err(error) if error.refusal().is_some_and(Code::is_about_parameter) => {
                    return Err(tpm.failed(other));
                }
                loaded => loaded?,
            };
            let mut unseal = || {
                tpm.with_session(Kind::Policy, parent, |tpm, session| {
                    tpm.policy_pcr(session, sealed.pcrs)?;
                    let command = Command::new(TpmCc::Unseal, "TPM2_Unseal")
                        .object(handle, &name)
                        .auth(Auth::Session(session, CONTINUE | ENCRYPT));
                    let mut answer = tpm.run(command)?;
                    answer.secret().map_err(|e| tpm.failed(e))
                })
            };
            let mut unsealed = unseal();
            for _ in 1..TRIES {
                match unsealed {
                    Err(error) if error.is_refusal(PCR_CHANGED) => unsealed = unseal(),
                    _ => break,
                }
            }
            tpm.flush(handle);
            match unsealed {
                Err(error) if error.is_refusal(POLICY_FAIL) => Err(tpm.failed(TpmFailure::Changed(
                    "its registers have changed since the key was sealed: the host has booted other software",
                ))),
                unsealed => unsealed,
            }
        })
    }

    /// Loads a key or a sealed object under the storage key; gives its handle and Name.
    pub(super) fn load(
        &mut self,
        parent: &StorageKey,
        private: &[u8],
        public: &[u8],
    ) -> Result<(u32, Vec<u8>), TpmError> {
        let mut parameters = Vec::new();
        parameters.sized(private);
        parameters.sized(public);
        let command = Command::new(TpmCc::Load, "TPM2_Load")
            .object(parent.handle, &parent.name)
            .auth(Auth::Password)
            .parameters(parameters)
            .answers_handle();
        let mut answer = self.run(command)?;
        let name = answer.sized().map_err(|e| self.failed(e))?;
        Ok((answer.handle(), name))
    }

    /// Works with the storage key (TCG TPM v2.0 Provisioning Guidance, 7.5.1: ECC P-256).
    pub(super) fn with_storage_key<T>(
        &mut self,
        work: impl FnOnce(&mut Self, &StorageKey) -> Result<T, TpmError>,
    ) -> Result<T, TpmError> {
        let mut public = Vec::new();
        public.u16(0x0023);
        public.u16(0x000b);
        public.u32(0x0003_0472);
        public.sized(&[]);
        // AES, 128 bits, CFB; no scheme; P-256; no KDF.
        for value in [0x0006, 0x0080, 0x0043, 0x0010, 0x0003, 0x0010] {
            public.u16(value);
        }
        public.sized(&[0; 32]);
        public.sized(&[0; 32]);
        let (handle, public, name) = self.create_primary(OWNER, &public)?;
        let key = point(&public).map(|(x, y)| StorageKey { handle, name, x, y });
        let done = match key {
            Some(key) => work(self, &key),
            None => Err(self.failed(TpmFailure::Garbled {
                command: "TPM2_CreatePrimary",
                what: "the key is not a P-256 key",
            })),
        };
        self.flush(handle);
        done
    }

    /// TPM2_CreatePrimary of a template: the handle, TPMT_PUBLIC and Name.
    ///
    /// No HMAC covers this answer. That the Name is that of the public part binds what is encrypted to the key to a Name that
    /// was stored earlier: an interposer who gives a key of its own has to give its Name as well.
    pub(super) fn create_primary(
        &mut self,
        hierarchy: u32,
        template: &[u8],
    ) -> Result<(u32, Vec<u8>, Vec<u8>), TpmError> {
        const NAME: &str = "TPM2_CreatePrimary";
        let mut parameters = Vec::new();
        parameters.u16(4);
        parameters.sized(&[]);
        parameters.sized(&[]);
        parameters.sized(template);
        parameters.sized(&[]);
        parameters.u32(0);
        let command = Command::new(TpmCc::CreatePrimary, NAME)
            .handle(hierarchy)
            .auth(Auth::Password)
            .parameters(parameters)
            .answers_handle();
        let mut answer = self.run(command)?;
        let handle = answer.handle();
        let read = answer.read(|reader| {
            let public = reader.sized()?.to_vec();
            // Creation data, their hash, and a ticket for them.
            reader.sized()?;
            reader.sized()?;
            reader.take(6)?;
            reader.sized()?;
            Some((public, reader.sized()?.to_vec()))
        });
        let checked = read.and_then(|(public, name)| match name == attest::name(&public) {
            true => Ok((handle, public, name)),
            false => Err(TpmFailure::Garbled {
                command: NAME,
                what: "the Name does not belong to the key",
            }),
        });
        checked.map_err(|error| {
            self.flush(handle);
            self.failed(error)
        })
    }

    pub(super) fn with_session<T>(
        &mut self,
        kind: Kind,
        parent: &StorageKey,
        work: impl FnOnce(&mut Self, &mut Session) -> Result<T, TpmError>,
    ) -> Result<T, TpmError> {
        let mut session = Session::start(self, kind, parent)?;
        let done = work(self, &mut session);
        self.flush(session.handle);
        done
    }

    fn policy_pcr(&mut self, session: &Session, pcrs: Selection) -> Result<(), TpmError> {
        let mut parameters = Vec::new();
        parameters.sized(&[]);
        parameters.extend_from_slice(&pcrs.marshal());
        let command = Command::new(TpmCc::PolicyPcr, "TPM2_PolicyPCR")
            .handle(session.handle)
            .parameters(parameters);
        self.run(command).map(drop)
    }
}

/// The policy that registers hold what `digest` stands for (part 3, 23.7).
fn policy(pcrs: Selection, digest: &[u8; 32]) -> [u8; 32] {
    Sha256::new()
        .chain_update([0; 32])
        .chain_update((TpmCc::PolicyPcr as u32).to_be_bytes())
        .chain_update(pcrs.marshal())
        .chain_update(digest)
        .finalize()
        .into()
}

/// The point of a TPMT_PUBLIC of P-256, whose coordinates end it.
fn point(public: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut reader = super::command::Reader(public);
    reader.take(8)?;
    reader.sized()?;
    reader.take(12)?;
    let coordinate = |bytes: &[u8]| {
        let mut padded = vec![0; 32_usize.checked_sub(bytes.len())?];
        padded.extend_from_slice(bytes);
        Some(padded)
    };
    let point = (coordinate(reader.sized()?)?, coordinate(reader.sized()?)?);
    reader.0.is_empty().then_some(point)
}

/// Bytes as base64.
pub(super) mod text {
    use super::{BASE64_STANDARD, Engine};
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::parsing::{broken, rule};

    pub(in crate::tpm) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub(in crate::tpm) fn deserialize<'d, D: Deserializer<'d>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map_err(|_| broken(rule::BASE64))
    }
}

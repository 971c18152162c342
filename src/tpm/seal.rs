//! A secret under a TPM's storage key, bound to registers: only this TPM unseals it, and only while the registers hold the
//! same values.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tpm2_protocol::data::{
    Tpm2bDigest, TpmAlgId, TpmCc, TpmaObject, TpmsKeyedhashParms, TpmtKeyedhashScheme, TpmtPublic,
    TpmuKeyedhashScheme, TpmuPublicId, TpmuPublicParms,
};

use super::codec::{Marshal, marshalled, text};
use super::command::{Auth, Command};
use super::pcr::Selection;
use super::session::{CONTINUE, DECRYPT, ENCRYPT, Kind, Session};
use super::{Code, Tpm, TpmError, TpmFailure};
use sealblk_secmem::arena::SecretBytes;

/// TPM_RC_POLICY_FAIL, TPM_RC_INTEGRITY: the registers, or the TPM, are others than those that it was sealed to.
const POLICY_FAIL: u32 = 0x09d;
pub(super) const INTEGRITY: u32 = 0x09f;
/// TPM_RC_PCR_CHANGED: a register, whichever, was extended after the policy had looked at its own.
const PCR_CHANGED: u32 = 0x128;
/// How often the policy is asked for anew then. Some registers are extended all the time.
const TRIES: usize = 20;

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
            let mut parameters = Vec::with_capacity(512);
            parameters.u16(4 + secret.len() as u16);
            parameters.sized(&[]);
            parameters.sized(secret);
            parameters.sized(&marshalled(&template(&policy)));
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

    fn policy_pcr(&mut self, session: &Session, pcrs: Selection) -> Result<(), TpmError> {
        let mut parameters = Vec::new();
        parameters.sized(&[]);
        parameters.put(&pcrs.list());
        let command = Command::new(TpmCc::PolicyPcr, "TPM2_PolicyPCR")
            .handle(session.handle)
            .parameters(parameters);
        self.run(command).map(drop)
    }
}

/// A keyed hash that signs nothing, with a policy in the place of a password: it stays in this TPM.
fn template(policy: &[u8; 32]) -> TpmtPublic {
    TpmtPublic {
        object_type: TpmAlgId::KeyedHash,
        name_alg: TpmAlgId::Sha256,
        object_attributes: TpmaObject::FIXED_TPM | TpmaObject::FIXED_PARENT | TpmaObject::NO_DA,
        auth_policy: Tpm2bDigest::try_from(&policy[..]).expect("it has room for more"),
        parameters: TpmuPublicParms::KeyedHash(TpmsKeyedhashParms {
            scheme: TpmtKeyedhashScheme {
                scheme: TpmAlgId::Null,
                details: TpmuKeyedhashScheme::Null,
            },
        }),
        unique: TpmuPublicId::KeyedHash(Tpm2bDigest::new()),
    }
}

/// The policy that registers hold what `digest` stands for (part 3, 23.7).
fn policy(pcrs: Selection, digest: &[u8; 32]) -> [u8; 32] {
    Sha256::new()
        .chain_update([0; 32])
        .chain_update((TpmCc::PolicyPcr as u32).to_be_bytes())
        .chain_update(marshalled(&pcrs.list()))
        .chain_update(digest)
        .finalize()
        .into()
}

//! Keys that only this TPM has, their quotes of its registers, and the verification of quotes.
//!
//! The endorsement key (EK) is the TPM's identity, with a certificate of its maker; it signs nothing. The attestation
//! key (AK) signs quotes. A credential proves that both are in one TPM: a verifier encrypts a secret to the EK and the AK's
//! Name, and the TPM decrypts it only if it has both (part 1, 24).

use serde::{Deserialize, Serialize};
use tpm2_protocol::TpmUnmarshal;
use tpm2_protocol::basic::{TpmUint16, TpmUint32};
use tpm2_protocol::data::{
    Tpm2bDigest, Tpm2bNvPublic, Tpm2bPublicKeyRsa, TpmAlgId, TpmCc, TpmaObject, TpmsAttest, TpmsRsaParms,
    TpmsSchemeHash, TpmtPublic, TpmtRsaScheme, TpmtSignature, TpmuAsymScheme, TpmuAttest, TpmuPublicId,
    TpmuPublicParms, TpmuSignature,
};

use super::codec::{Marshal, marshalled, text};
use super::command::{Auth, Command};
use super::pcr::{COUNT, Selection, Value};
use super::session::{AES_128_CFB, CONTINUE, ENCRYPT, Kind, NO_CIPHER};
use super::{Tpm, TpmError, TpmFailure};
use sealblk_secmem::arena::SecretBytes;

/// TPM_RH_ENDORSEMENT.
const ENDORSEMENT: u32 = 0x4000_000b;
/// The certificate of the RSA endorsement key (TCG EK Credential Profile 2.5, 2.2.1.4).
const CERTIFICATE: u32 = 0x01c0_0002;
/// TPM_RC_HANDLE: there is none.
const NO_HANDLE: u32 = 0x08b;
/// PolicySecret(TPM_RH_ENDORSEMENT), which the EK takes (the same, B.3.3).
const EK_POLICY: [u8; 32] = [
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24, 0xfd,
    0x52, 0xd7, 0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
];
/// Longest certificate, and how much of it a TPM gives at once.
const MAX_CERTIFICATE: u16 = 8192;
const PIECE: u16 = 512;
/// How often a quote is asked for anew, if registers were changed between it and reading them.
const TRIES: usize = 5;

/// The public part of a TPM's endorsement key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndorsementKey {
    /// TPMT_PUBLIC.
    pub public: Vec<u8>,
    /// The maker's certificate in DER, if the TPM has one.
    pub certificate: Option<Vec<u8>>,
}

/// An attestation key, as it is kept outside its TPM: nobody else can use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttestationKey {
    /// TPMT_PUBLIC.
    #[serde(with = "text")]
    pub public: Vec<u8>,
    /// TPM2B_PRIVATE, without its length.
    #[serde(with = "text")]
    private: Vec<u8>,
}

/// Registers, signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quote {
    /// TPMS_ATTEST: what is signed.
    pub message: Vec<u8>,
    /// RSASSA-PKCS1-v1_5 with SHA-256 over it.
    pub signature: Vec<u8>,
    /// What all registers hold; those that were chosen are what `message` has a digest of.
    pub pcrs: [Value; COUNT as usize],
}

impl Tpm {
    /// The endorsement key, by template L-1: RSA of 2048 bits.
    ///
    /// # Errors
    /// If the TPM does not give it.
    pub fn endorsement_key(&mut self) -> Result<EndorsementKey, TpmError> {
        let certificate = self.certificate()?;
        self.with_endorsement_key(|_, _, public, _| {
            Ok(EndorsementKey {
                public: public.to_vec(),
                certificate,
            })
        })
    }

    /// Makes an attestation key: RSA of 2048 bits, which signs what the TPM itself has made and nothing else.
    ///
    /// # Errors
    /// If the TPM does not do it.
    pub fn create_attestation_key(&mut self) -> Result<AttestationKey, TpmError> {
        let public = marshalled(&attestation_template());
        self.with_storage_key(|tpm, parent| {
            let mut parameters = Vec::new();
            parameters.u16(4);
            parameters.sized(&[]);
            parameters.sized(&[]);
            parameters.sized(&public);
            parameters.sized(&[]);
            parameters.u32(0);
            let command = Command::new(TpmCc::Create, "TPM2_Create")
                .object(parent.handle, &parent.name)
                .auth(Auth::Password)
                .parameters(parameters);
            let mut answer = tpm.run(command)?;
            let mut sized = || answer.sized().map_err(|e| tpm.failed(e));
            let (private, public) = (sized()?, sized()?);
            Ok(AttestationKey { public, private })
        })
    }

    /// Has registers signed, together with up to 64 bytes of the verifier's.
    ///
    /// # Errors
    /// If the TPM does not do it; [`TpmFailure::Refused`] with TPM_RC_INTEGRITY, if the key is another TPM's.
    pub fn quote(
        &mut self,
        key: &AttestationKey,
        qualifying: &[u8],
        pcrs: Selection,
    ) -> Result<Quote, TpmError> {
        const NAME: &str = "TPM2_Quote";
        self.with_attestation_key(key, |tpm, handle, name| {
            for _ in 0..TRIES {
                let mut parameters = Vec::new();
                parameters.sized(qualifying);
                // The key's own scheme.
                parameters.put(&TpmAlgId::Null);
                parameters.put(&pcrs.list());
                let command = Command::new(TpmCc::Quote, NAME)
                    .object(handle, name)
                    .auth(Auth::Password)
                    .parameters(parameters);
                let mut answer = tpm.run(command)?;
                let message = answer.sized().map_err(|e| tpm.failed(e))?;
                let signature = answer.read(|reader| match reader.get::<TpmtSignature>()?.signature {
                    TpmuSignature::Rsassa(rsa) if rsa.hash == TpmAlgId::Sha256 => Some(rsa.sig.to_vec()),
                    _ => None,
                });
                let signature = signature.map_err(|e| tpm.failed(e))?;
                let values = tpm.read_pcrs()?;
                let signed = Attested::parse(&message).map_err(|_| {
                    let what = "it signs something else";
                    tpm.failed(TpmFailure::Garbled { command: NAME, what })
                })?;
                if signed.digest == pcrs.digest(&values) {
                    return Ok(Quote {
                        message,
                        signature,
                        pcrs: values,
                    });
                }
            }
            Err(tpm.failed(TpmFailure::Changed("its registers change constantly")))
        })
    }

    /// Opens a credential: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET, without their lengths, that were made for this TPM's
    /// endorsement key and for `key`.
    ///
    /// # Errors
    /// If they were made for others.
    pub fn activate(
        &mut self,
        key: &AttestationKey,
        credential: &[u8],
        secret: &[u8],
    ) -> Result<SecretBytes, TpmError> {
        self.with_attestation_key(key, |tpm, handle, name| {
            tpm.with_endorsement_key(|tpm, ek, _, ek_name| {
                tpm.with_storage_key(|tpm, parent| {
                    tpm.with_session(Kind::Policy, parent, |tpm, session| {
                        tpm.policy_secret(session.handle)?;
                        let mut parameters = Vec::new();
                        parameters.sized(credential);
                        parameters.sized(secret);
                        let command = Command::new(TpmCc::ActivateCredential, "TPM2_ActivateCredential")
                            .object(handle, name)
                            .object(ek, ek_name)
                            .auth(Auth::Password)
                            .auth(Auth::Session(session, CONTINUE | ENCRYPT))
                            .parameters(parameters);
                        let mut answer = tpm.run(command)?;
                        answer.secret().map_err(|e| tpm.failed(e))
                    })
                })
            })
        })
    }

    fn policy_secret(&mut self, session: u32) -> Result<(), TpmError> {
        let mut parameters = Vec::new();
        parameters.sized(&[]);
        parameters.sized(&[]);
        parameters.sized(&[]);
        parameters.u32(0);
        let command = Command::new(TpmCc::PolicySecret, "TPM2_PolicySecret")
            .handle(ENDORSEMENT)
            .handle(session)
            .auth(Auth::Password)
            .parameters(parameters);
        self.run(command).map(drop)
    }

    /// Works with the endorsement key: its handle, TPMT_PUBLIC and Name.
    fn with_endorsement_key<T>(
        &mut self,
        work: impl FnOnce(&mut Self, u32, &[u8], &[u8]) -> Result<T, TpmError>,
    ) -> Result<T, TpmError> {
        let (handle, public, name) = self.create_primary(ENDORSEMENT, &endorsement_template())?;
        let done = work(self, handle, &public, &name);
        self.flush(handle);
        done
    }

    fn with_attestation_key<T>(
        &mut self,
        key: &AttestationKey,
        work: impl FnOnce(&mut Self, u32, &[u8]) -> Result<T, TpmError>,
    ) -> Result<T, TpmError> {
        // The parent goes before the work begins: TPMs have room for three objects.
        let (handle, name) =
            self.with_storage_key(|tpm, parent| tpm.load(parent, &key.private, &key.public))?;
        let done = work(self, handle, &name);
        self.flush(handle);
        done
    }

    fn certificate(&mut self) -> Result<Option<Vec<u8>>, TpmError> {
        let command = Command::new(TpmCc::NvReadPublic, "TPM2_NV_ReadPublic").handle(CERTIFICATE);
        let mut answer = match self.run(command) {
            Err(error) if error.is_refusal(NO_HANDLE) => return Ok(None),
            answer => answer?,
        };
        let read = answer.read(|reader| {
            let public: Tpm2bNvPublic = reader.get()?;
            Some((public.data_size.value(), reader.sized()?.to_vec()))
        });
        let (size, name) = read.map_err(|e| self.failed(e))?;
        let mut certificate = Vec::new();
        while certificate.len() < size.min(MAX_CERTIFICATE).into() {
            let at = certificate.len() as u16;
            let mut parameters = Vec::new();
            parameters.u16(PIECE.min(size - at));
            parameters.u16(at);
            let command = Command::new(TpmCc::NvRead, "TPM2_NV_Read")
                .object(CERTIFICATE, &name)
                .object(CERTIFICATE, &name)
                .auth(Auth::Password)
                .parameters(parameters);
            let mut answer = self.run(command)?;
            let piece = answer.sized().map_err(|e| self.failed(e))?;
            if piece.is_empty() {
                break;
            }
            certificate.extend_from_slice(&piece);
        }
        // The index may be longer than what is in it, which tells its own length.
        if let [0x30, 0x82, high, low, ..] = certificate[..] {
            certificate.truncate(4 + usize::from(u16::from_be_bytes([high, low])));
        }
        Ok(Some(certificate))
    }
}

/// Made in its TPM, which it cannot leave, and it decides alone what the key is used for.
fn of_this_tpm_alone() -> TpmaObject {
    TpmaObject::FIXED_TPM
        | TpmaObject::FIXED_PARENT
        | TpmaObject::SENSITIVE_DATA_ORIGIN
        | TpmaObject::RESTRICTED
}

/// The endorsement key, by template L-1 (TCG EK Credential Profile 2.5, B.3.3).
fn endorsement_template() -> TpmtPublic {
    TpmtPublic {
        object_type: TpmAlgId::Rsa,
        name_alg: TpmAlgId::Sha256,
        object_attributes: of_this_tpm_alone() | TpmaObject::ADMIN_WITH_POLICY | TpmaObject::DECRYPT,
        auth_policy: Tpm2bDigest::try_from(&EK_POLICY[..]).expect("it has room for more"),
        parameters: TpmuPublicParms::Rsa(TpmsRsaParms {
            symmetric: AES_128_CFB,
            scheme: TpmtRsaScheme::default(),
            key_bits: TpmUint16::new(2048),
            exponent: TpmUint32::new(0),
        }),
        unique: TpmuPublicId::Rsa(Tpm2bPublicKeyRsa::try_from(&[0; 256][..]).expect("it has as much room")),
    }
}

fn attestation_template() -> TpmtPublic {
    TpmtPublic {
        object_type: TpmAlgId::Rsa,
        name_alg: TpmAlgId::Sha256,
        // NO_DA: its password is empty, so there is nothing to guess, and a TPM that is locked out by what others have guessed
        // still signs. Nor does a power cut after a quote count as a guess then.
        object_attributes: of_this_tpm_alone()
            | TpmaObject::USER_WITH_AUTH
            | TpmaObject::NO_DA
            | TpmaObject::SIGN_ENCRYPT,
        auth_policy: Tpm2bDigest::new(),
        parameters: TpmuPublicParms::Rsa(TpmsRsaParms {
            symmetric: NO_CIPHER,
            scheme: TpmtRsaScheme {
                scheme: TpmAlgId::Rsassa,
                details: TpmuAsymScheme::Hash(TpmsSchemeHash {
                    hash_alg: TpmAlgId::Sha256,
                }),
            },
            key_bits: TpmUint16::new(2048),
            exponent: TpmUint32::new(0),
        }),
        unique: TpmuPublicId::Rsa(Tpm2bPublicKeyRsa::new()),
    }
}

/// What cannot be believed of a stranger's TPM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotAttested(&'static str);

/// What a TPM has signed in a quote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attested {
    /// What the verifier had sent to be signed.
    pub qualifying: Vec<u8>,
    /// The registers.
    pub pcrs: Selection,
    /// The digest of what they hold: [`Selection::digest`].
    pub digest: [u8; 32],
    /// How often the TPM was reset, and restarted since: a host's boots.
    pub resets: u32,
    /// See [`Attested::resets`].
    pub restarts: u32,
}

impl Attested {
    /// Reads TPMS_ATTEST, which has to be a quote of registers of SHA-256 that a TPM has made.
    ///
    /// # Errors
    /// [`NotAttested`].
    pub fn parse(message: &[u8]) -> Result<Self, NotAttested> {
        let (attest, rest) =
            TpmsAttest::unmarshal(message).map_err(|_| NotAttested("it is not a TPMS_ATTEST"))?;
        let TpmuAttest::Quote(quote) = &attest.attested else {
            return Err(NotAttested("it is not a quote"));
        };
        let [bank] = quote.pcr_select[..] else {
            return Err(NotAttested("it does not cover exactly one bank of registers"));
        };
        let pcrs = (bank.hash == TpmAlgId::Sha256)
            .then(|| Selection::from_bits(&bank.pcr_select))
            .flatten()
            .ok_or(NotAttested("it does not cover the SHA-256 bank"))?;
        let digest = <[u8; 32]>::try_from(&quote.pcr_digest[..]);
        if !rest.is_empty() {
            return Err(NotAttested("extra bytes follow it"));
        }
        Ok(Self {
            qualifying: attest.extra_data.to_vec(),
            pcrs,
            digest: digest.map_err(|_| NotAttested("its digest is not SHA-256"))?,
            resets: attest.clock_info.reset_count.value(),
            restarts: attest.clock_info.restart_count.value(),
        })
    }
}

/// An RSA key of a TPM's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RsaPublic {
    /// Big-endian.
    pub modulus: Vec<u8>,
    /// What it is raised to.
    pub exponent: u32,
}

impl RsaPublic {
    /// Reads the TPMT_PUBLIC of an attestation key: restricted, for signing by RSASSA with SHA-256 alone.
    ///
    /// # Errors
    /// [`NotAttested`], if it is another kind of key.
    pub fn attestation(public: &[u8]) -> Result<Self, NotAttested> {
        Self::parse(public, TpmaObject::SIGN_ENCRYPT, TpmaObject::DECRYPT, |scheme| {
            scheme.scheme == TpmAlgId::Rsassa
                && matches!(scheme.details, TpmuAsymScheme::Hash(hash) if hash.hash_alg == TpmAlgId::Sha256)
        })
        .ok_or(NotAttested(
            "the key is not an attestation key for RSASSA with SHA-256",
        ))
    }

    /// Reads the TPMT_PUBLIC of an endorsement key of template L-1.
    ///
    /// # Errors
    /// [`NotAttested`], if it is another kind of key.
    pub fn endorsement(public: &[u8]) -> Result<Self, NotAttested> {
        Self::parse(public, TpmaObject::DECRYPT, TpmaObject::SIGN_ENCRYPT, |_| true)
            .ok_or(NotAttested("the key is not an RSA endorsement key"))
    }

    fn parse(
        public: &[u8],
        has: TpmaObject,
        lacks: TpmaObject,
        fits: impl Fn(&TpmtRsaScheme) -> bool,
    ) -> Option<Self> {
        let (key, rest) = TpmtPublic::unmarshal(public).ok()?;
        let (TpmuPublicParms::Rsa(parameters), TpmuPublicId::Rsa(modulus)) = (&key.parameters, &key.unique)
        else {
            return None;
        };
        let sound = rest.is_empty()
            && key.name_alg == TpmAlgId::Sha256
            && key.object_attributes.contains(of_this_tpm_alone() | has)
            && !key.object_attributes.contains(lacks)
            && parameters.key_bits.value() >= 2048
            && modulus.len() * 8 == usize::from(parameters.key_bits.value())
            && fits(&parameters.scheme);
        // Zero stands for the usual one.
        let exponent = match parameters.exponent.value() {
            0 => 65537,
            other => other,
        };
        sound.then(|| Self {
            modulus: modulus.to_vec(),
            exponent,
        })
    }
}

/// Whether the TPM refuses a key since it is another TPM's.
pub fn is_of_another_tpm(error: &TpmError) -> bool {
    error.is_refusal(super::seal::INTEGRITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_quote_is_not_believed() {
        for bytes in [&b""[..], b"\xff\x54\x43\x47", &[0; 200]] {
            assert!(Attested::parse(bytes).is_err());
            assert!(RsaPublic::attestation(bytes).is_err());
            assert!(RsaPublic::endorsement(bytes).is_err());
        }
    }
}

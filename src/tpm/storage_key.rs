//! The key under which a TPM keeps what is ours, and what works with it: objects that are loaded under it, and sessions whose
//! salt is encrypted to it.

use tpm2_protocol::data::{
    Tpm2bDigest, Tpm2bEccParameter, TpmAlgId, TpmCc, TpmEccCurve, TpmaObject, TpmsEccParms, TpmsEccPoint,
    TpmtEccScheme, TpmtKdfScheme, TpmtPublic, TpmuPublicId, TpmuPublicParms,
};

use super::codec::{Marshal, Reader, marshalled, object_name};
use super::command::{Auth, Command};
use super::session::{AES_128_CFB, Kind, Session, Start};
use super::{Tpm, TpmError, TpmFailure};

/// TPM_RH_OWNER.
const OWNER: u32 = 0x4000_0001;

/// The key under which a TPM keeps what is ours. It is made anew from the TPM's own seed whenever it is needed, the same each
/// time.
pub(super) struct StorageKey {
    pub(super) handle: u32,
    pub(super) name: Vec<u8>,
    pub(super) x: Vec<u8>,
    pub(super) y: Vec<u8>,
}

impl Tpm {
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
        let (handle, public, name) = self.create_primary(OWNER, &template())?;
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
        template: &TpmtPublic,
    ) -> Result<(u32, Vec<u8>, Vec<u8>), TpmError> {
        const NAME: &str = "TPM2_CreatePrimary";
        let mut parameters = Vec::new();
        parameters.u16(4);
        parameters.sized(&[]);
        parameters.sized(&[]);
        parameters.sized(&marshalled(template));
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
        let checked = read.and_then(|(public, name)| match name == object_name(&public) {
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
        // TPM_RH_NULL: bound to nothing.
        const NULL: u32 = 0x4000_0007;
        let start = Start::new(kind, &parent.x, &parent.y).map_err(|e| self.failed(e))?;
        let command = Command::new(TpmCc::StartAuthSession, "TPM2_StartAuthSession")
            .handle(parent.handle)
            .handle(NULL)
            .parameters(start.parameters())
            .answers_handle();
        let mut answer = self.run(command)?;
        let nonce = answer.sized().map_err(|e| self.failed(e))?;
        let mut session = start.answered(answer.handle(), nonce);
        let done = work(self, &mut session);
        self.flush(session.handle);
        done
    }
}

/// The storage key as the TPM makes it from its seed. Another template would be another key.
fn template() -> TpmtPublic {
    let zeros = || Tpm2bEccParameter::try_from(&[0; 32][..]).expect("it has room for more");
    TpmtPublic {
        object_type: TpmAlgId::Ecc,
        name_alg: TpmAlgId::Sha256,
        object_attributes: TpmaObject::FIXED_TPM
            | TpmaObject::FIXED_PARENT
            | TpmaObject::SENSITIVE_DATA_ORIGIN
            | TpmaObject::USER_WITH_AUTH
            | TpmaObject::NO_DA
            | TpmaObject::RESTRICTED
            | TpmaObject::DECRYPT,
        auth_policy: Tpm2bDigest::new(),
        parameters: TpmuPublicParms::Ecc(TpmsEccParms {
            symmetric: AES_128_CFB,
            scheme: TpmtEccScheme::default(),
            curve_id: TpmEccCurve::NistP256,
            kdf: TpmtKdfScheme::default(),
        }),
        unique: TpmuPublicId::Ecc(TpmsEccPoint {
            x: zeros(),
            y: zeros(),
        }),
    }
}

/// The point of a TPMT_PUBLIC of P-256.
fn point(public: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut reader = Reader(public);
    let TpmuPublicId::Ecc(point) = reader.get::<TpmtPublic>()?.unique else {
        return None;
    };
    let coordinate = |bytes: &[u8]| {
        let mut padded = vec![0; 32_usize.checked_sub(bytes.len())?];
        padded.extend_from_slice(bytes);
        Some(padded)
    };
    let point = (coordinate(&point.x)?, coordinate(&point.y)?);
    reader.0.is_empty().then_some(point)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_storage_key_is_the_one_under_which_earlier_versions_have_sealed() {
        let expected = [
            &[
                0, 0x23, 0, 0x0b, 0, 3, 4, 0x72, 0, 0, 0, 6, 0, 0x80, 0, 0x43, 0, 0x10, 0, 3, 0, 0x10,
            ][..],
            &[&[0, 32][..], &[0; 32]].concat().repeat(2),
        ];
        assert_eq!(marshalled(&template()), expected.concat());
    }
}

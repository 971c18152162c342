//! One release: the host proves its state, and gets the resource (`crate::kbs` has the messages).

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::Trusted;
use crate::harmless::harmless;
use crate::kbs::enrolment::{ACTIVATE, Activate, Challenge as Credential, ENROL, Enrol};
use crate::kbs::jwe::{JweError, OneTimeKey, Response};
use crate::kbs::{
    ATTEST, AUTH, Attestation, Challenge, CompositeEvidence, ErrorInformation, Evidence, RESOURCE, Request,
    RuntimeData, TEE, VERSION,
};
use crate::keys::KeyReason;
use crate::parsing;
use crate::providers::wrap::Kek;
use crate::providers::{https::Body, https::Failure, https::Server};
use crate::tpm::attest::{AttestationKey, RsaPublic, is_of_another_tpm};
use crate::tpm::pcr::Selection;
use crate::tpm::{Tpm, TpmError, TpmFailure};
use sealblk_secmem::arena::SecretBytes;

/// What is refused: the broker's own words, bounded and without control characters.
#[derive(Debug, thiserror::Error)]
#[error("the broker answers to {what} with the HTTP status {status}{words}")]
struct Refusal {
    what: &'static str,
    status: u16,
    words: String,
}

/// What a broker must not answer.
#[derive(Debug, thiserror::Error)]
enum Nonsense {
    #[error("the broker opens no session")]
    NoSession,
    #[error("the broker requires a hash that this host does not support")]
    Hash,
    #[error("the broker's credential is not base64")]
    Credential,
}

impl Refusal {
    fn new(what: &'static str, status: u16, body: &[u8]) -> Self {
        const SHOWN: usize = 256;
        let words = match parsing::json::<ErrorInformation>(body) {
            Ok(error) => format!(": {}", harmless(&error.detail, SHOWN)),
            // A proxy's page, or nothing.
            Err(_) => String::new(),
        };
        Self { what, status, words }
    }
}

/// What an operator would act on, if that was refused.
fn refused(what: &'static str) -> impl FnOnce(u16, &[u8]) -> Failure {
    move |status, body| {
        let reason = match status {
            401 => KeyReason::Attestation,
            403 => KeyReason::Refused,
            404 => KeyReason::Missing,
            _ => KeyReason::Failed,
        };
        Failure::new(reason, Refusal::new(what, status, body))
    }
}

impl From<Nonsense> for Failure {
    fn from(cause: Nonsense) -> Self {
        Self::new(KeyReason::Garbled, cause)
    }
}

impl From<JweError> for Failure {
    fn from(cause: JweError) -> Self {
        let reason = match cause {
            JweError::Form(_) | JweError::Unauthentic => KeyReason::Garbled,
            JweError::Random | JweError::Arena(_) => KeyReason::Host,
        };
        Self::new(reason, cause)
    }
}

impl Trusted {
    /// What the host's own TPM did not do.
    fn tpm_failure(&self, cause: TpmError) -> Failure {
        let reason = match &cause.what {
            _ if is_of_another_tpm(&cause) => KeyReason::Attestation,
            TpmFailure::Changed(_) => KeyReason::Attestation,
            _ => KeyReason::Host,
        };
        Failure::new(reason, cause).at(&self.settings.tpm)
    }

    /// Has the resource released by one broker.
    pub(super) fn release(&self, server: &Server<'_>) -> Result<Kek, Failure> {
        let request = Request {
            version: VERSION.to_owned(),
            tee: TEE.to_owned(),
            extra_params: "".into(),
        };
        let answer = server.post(AUTH, &[], &request)?;
        let cookie = answer.cookie.clone();
        let body = answer.success(refused("a request for a challenge"))?;
        let challenge: Challenge = body.parse()?;
        let mut cookie = cookie.ok_or(Nonsense::NoSession)?;
        cookie.set_sensitive(true);
        let headers = [("Cookie", cookie)];

        let key = OneTimeKey::new()?;
        let evidence = self.evidence(challenge, &key)?;
        let attested = server.post(ATTEST, &headers, &evidence)?;
        attested.success(refused("the attestation"))?;

        let path = format!("{RESOURCE}/{}", self.settings.resource);
        let body = server
            .get(&path, &headers)?
            .success(refused("a request for the resource"))?;
        let resource = key.open(&body.parse::<Response>()?)?;
        Kek::new(resource).map_err(|e| Failure::new(KeyReason::Garbled, e))
    }

    fn evidence(&self, challenge: Challenge, key: &OneTimeKey) -> Result<Attestation, Failure> {
        let runtime_data = RuntimeData {
            nonce: challenge.nonce,
            tee_pubkey: key.public().clone(),
        };
        let report_data = runtime_data
            .report_data(&challenge.extra_params)
            .ok_or(Nonsense::Hash)?;
        // All registers: which of them count is the broker's affair.
        let quote = Tpm::open(&self.settings.tpm)
            .and_then(|mut tpm| tpm.quote(&self.key, &report_data, Selection::ALL))
            .map_err(|e| self.tpm_failure(e))?;
        Ok(Attestation {
            init_data: None,
            runtime_data,
            tee_evidence: CompositeEvidence {
                primary_evidence: Evidence::new(&quote, &report_data, &self.spki),
                additional_evidence: "{}".to_owned(),
            },
        })
    }

    /// Makes this host's attestation key known to one broker of ours.
    pub(super) fn enrol_at(
        &self,
        server: &Server<'_>,
        host: &str,
        token: Option<&SecretBytes>,
    ) -> Result<(), Failure> {
        let tpm = Tpm::open(&self.settings.tpm);
        let mut tpm = tpm.map_err(|e| self.tpm_failure(e))?;
        let endorsement = tpm.endorsement_key().map_err(|e| self.tpm_failure(e))?;
        let token = token.map(|token| std::str::from_utf8(token)).transpose();
        let request = Enrol {
            host: host.to_owned(),
            token: token
                .map_err(|e| Failure::new(KeyReason::Invalid, e))?
                .map(str::trim_end),
            endorsement_key: BASE64_STANDARD.encode(&endorsement.public),
            endorsement_certificate: endorsement.certificate.map(|der| BASE64_STANDARD.encode(der)),
            attestation_key: BASE64_STANDARD.encode(&self.key.public),
        };
        let answer = server.post(ENROL, &[], &request)?;
        let body: Body = answer.success(refused("the enrolment"))?;
        let challenge: Credential = body.parse()?;
        let decode = |text: &str| BASE64_STANDARD.decode(text).map_err(|_| Nonsense::Credential);
        let (credential, secret) = (decode(&challenge.credential)?, decode(&challenge.secret)?);
        let opened = tpm
            .activate(&self.key, &credential, &secret)
            .map_err(|e| self.tpm_failure(e))?;
        let mut text = SecretBytes::zeroed(opened.len().div_ceil(3) * 4)?;
        BASE64_STANDARD
            .encode_slice(&*opened, &mut text)
            .expect("it is as long");
        let request = Activate {
            session: challenge.session,
            secret: std::str::from_utf8(&text).expect("base64 is ASCII"),
        };
        let answer = server.post(ACTIVATE, &[], &request)?;
        answer.success(refused("the credential")).map(drop)
    }
}

/// The key's SubjectPublicKeyInfo.
pub(super) fn spki(key: &AttestationKey) -> Result<Vec<u8>, crate::tpm::attest::NotAttested> {
    RsaPublic::attestation(&key.public).map(|key| key.spki())
}

//! Evidence that strangers send to a broker: `ci/campaign fuzz`.
//!
//! The input is taken for each thing that a broker reads: an attestation, evidence, a quote, the keys of an enrolment. Nobody
//! has signed what is made up here, so that none of it may be believed.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sealblk::broker::evidence;
use sealblk::broker::state::Reference;
use sealblk::kbs::{Attestation, Evidence};
use sealblk::tpm::attest::{Attested, RsaPublic};
use sealblk::tpm::credential;

fuzz_target!(|input: &[u8]| {
    if let Ok(attestation) = serde_json::from_slice::<Attestation>(input) {
        let _ = attestation.runtime_data.report_data(&serde_json::Value::Null);
    }
    if let Ok(evidence) = serde_json::from_slice::<Evidence>(input) {
        let _ = evidence.spki();
        evidence::check(&evidence, &[0; 32], input, &Reference::default()).unwrap_err();
    }
    if let Ok(attested) = Attested::parse(input) {
        assert!(attested.pcrs.registers().count() <= 24);
    }
    if let Ok(key) = RsaPublic::attestation(input) {
        key.spki();
    }
    if let Ok(key) = RsaPublic::endorsement(input) {
        let _ = credential::make(&key, &[0; 34], &[0; 32]);
    }
});

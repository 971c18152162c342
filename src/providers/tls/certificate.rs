//! The content of a certificate (RFC 5280), for error messages; webpki decides whether to trust it.
//!
//! All texts are untrusted, and are escaped for display.

use std::fmt;
use std::net::IpAddr;

use rustls::pki_types::CertificateDer;
use x509_cert::certificate::{CertificateInner, Raw, Version};
use x509_cert::der::Decode;
use x509_cert::der::asn1::{AnyRef, ObjectIdentifier, UintRef};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use crate::harmless::harmless;
use crate::timestamp::Timestamp;

/// A certificate that could be read. What RFC 5280 forbids, as a long serial number, is in none's way.
#[derive(Clone)]
pub(in crate::providers) struct Certificate(CertificateInner<Raw>);

/// What its key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyKind {
    /// With so many bits.
    Rsa(usize),
    Ec(ObjectIdentifier),
    Ed25519,
    Other(ObjectIdentifier),
}

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
/// The names of what is not supported.
const NAMES: [(&str, &str); 10] = [
    ("1.3.132.0.35", "ECDSA with the curve P-521"),
    ("1.3.132.0.10", "ECDSA with the curve secp256k1"),
    ("1.3.101.113", "Ed448"),
    ("1.2.840.10040.4.1", "DSA"),
    ("1.2.840.113549.1.1.10", "RSA for PSS only"),
    ("1.2.840.113549.1.1.4", "RSA with MD5"),
    ("1.2.840.113549.1.1.5", "RSA with SHA-1"),
    ("1.2.840.10045.4.1", "ECDSA with SHA-1"),
    ("1.2.840.10045.4.3.4", "ECDSA with SHA-512"),
    ("1.2.840.10040.4.3", "DSA with SHA-1"),
];

impl Certificate {
    pub(in crate::providers) fn parse(der: &CertificateDer<'_>) -> Option<Self> {
        CertificateInner::from_der(der).ok().map(Self)
    }

    /// Whom it is for.
    pub(in crate::providers) fn subject(&self) -> String {
        harmless(&self.0.tbs_certificate().subject().to_string(), 128)
    }

    /// Who has signed it.
    pub(super) fn issuer(&self) -> String {
        harmless(&self.0.tbs_certificate().issuer().to_string(), 128)
    }

    /// Its first second, and its last.
    pub(in crate::providers) fn validity(&self) -> (Timestamp, Timestamp) {
        let validity = self.0.tbs_certificate().validity();
        let [from, until] = [&validity.not_before, &validity.not_after]
            .map(|time| Timestamp::from_unix(time.to_unix_duration().as_secs()));
        (from, until)
    }

    /// Whether `other` can be who has signed it, by the name.
    pub(super) fn names_as_issuer(&self, other: &Self) -> bool {
        self.0.tbs_certificate().issuer() == other.0.tbs_certificate().subject()
    }

    /// The version, as X.509 counts: 1, 2 or 3.
    pub(super) fn version(&self) -> u8 {
        match self.0.tbs_certificate().version() {
            Version::V1 => 1,
            Version::V2 => 2,
            Version::V3 => 3,
        }
    }

    /// The names and addresses that it is for: its subject alternative names.
    pub(super) fn names(&self) -> Vec<String> {
        let names = self.0.tbs_certificate().get_extension::<SubjectAltName>();
        let Ok(Some((_, SubjectAltName(names)))) = names else {
            return Vec::new();
        };
        let shown = |name: &GeneralName| match name {
            GeneralName::DnsName(name) => harmless(name.as_str(), 64),
            GeneralName::IpAddress(bytes) => {
                let bytes = bytes.as_bytes();
                let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
                let ip = v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
                ip.map_or_else(|_| "no IP address".to_owned(), |ip| ip.to_string())
            }
            _ => "a name of another kind".to_owned(),
        };
        names.iter().map(shown).collect()
    }

    /// The critical extensions that webpki does not know.
    pub(super) fn unknown_critical(&self) -> Vec<String> {
        // keyUsage, subjectAltName, basicConstraints, nameConstraints, cRLDistributionPoints, extKeyUsage.
        const KNOWN: [&str; 6] = ["15", "17", "19", "30", "31", "37"];
        let is_known = |id: &str| id.strip_prefix("2.5.29.").is_some_and(|id| KNOWN.contains(&id));
        let extensions = self.0.tbs_certificate().extensions().into_iter().flatten();
        let critical = extensions.filter(|extension| extension.critical);
        let ids = critical.map(|extension| extension.extn_id.to_string());
        ids.filter(|id| !is_known(id)).collect()
    }

    /// How it was signed.
    pub(super) fn signature(&self) -> String {
        named(self.0.signature_algorithm().oid)
    }

    pub(super) fn key(&self) -> KeyKind {
        let key = self.0.tbs_certificate().subject_public_key_info();
        match key.algorithm.oid {
            RSA => KeyKind::Rsa(modulus_bits(key.subject_public_key.raw_bytes()).unwrap_or(0)),
            EC => {
                let curve = key.algorithm.parameters.as_ref();
                let curve = curve.and_then(|curve| curve.decode_as::<ObjectIdentifier>().ok());
                curve.map_or(KeyKind::Other(EC), KeyKind::Ec)
            }
            ED25519 => KeyKind::Ed25519,
            other => KeyKind::Other(other),
        }
    }
}

/// How long the modulus in an RSAPublicKey is.
fn modulus_bits(key: &[u8]) -> Option<usize> {
    let key = AnyRef::from_der(key).ok()?;
    let modulus = key.sequence(|reader| {
        let modulus = UintRef::decode(reader)?;
        UintRef::decode(reader)?;
        Ok::<_, x509_cert::der::Error>(modulus)
    });
    let bytes = modulus.ok()?.as_bytes();
    Some(8 * bytes.len() - bytes.first()?.leading_zeros() as usize)
}

fn named(id: ObjectIdentifier) -> String {
    let id = id.to_string();
    match NAMES.into_iter().find(|(known, _)| *known == id) {
        Some((_, name)) => name.to_owned(),
        None => format!("the algorithm {id}"),
    }
}

impl KeyKind {
    /// Whether signatures by such a key are checked here.
    pub(super) fn is_supported(self) -> bool {
        matches!(
            self,
            Self::Rsa(2048..=8192) | Self::Ec(P256 | P384) | Self::Ed25519
        )
    }

    /// Whether this host can sign by such a key.
    pub(super) fn can_be_own(self) -> bool {
        self.is_supported() && !matches!(self, Self::Rsa(4097..))
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rsa(bits) => write!(f, "RSA with {bits} bits"),
            Self::Ec(P256) => f.write_str("ECDSA with the curve P-256"),
            Self::Ec(P384) => f.write_str("ECDSA with the curve P-384"),
            Self::Ed25519 => f.write_str("Ed25519"),
            Self::Ec(id) | Self::Other(id) => f.write_str(&named(*id)),
        }
    }
}

//! TLS failures for operators: a reason, and a text with the problem and its remedy.
//!
//! The errors of rustls are made for programmers, and some contain data of the peer. Only this module translates them; none
//! leaves `keys::tls`.

use std::path::Path;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription as Alert, CertificateError, Error, InconsistentKeys, OtherError};

use super::Identity;
use super::certificate::Certificate;
use crate::keys::KeyReason;
use crate::timestamp::Timestamp;

/// Why a connection with TLS is none, or cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub(in crate::providers) struct TlsFailure {
    pub(in crate::providers) reason: KeyReason,
    text: String,
}

/// What is known when a connection fails.
pub(super) struct Circumstances<'a> {
    /// The certificates that the server has shown, its own first.
    pub(super) shown: &'a [CertificateDer<'static>],
    /// What the server is called in the settings.
    pub(super) name: Option<&'a ServerName<'static>>,
    /// The file of the authorities that are believed, and what is in it.
    pub(super) ca: &'a Path,
    pub(super) roots: &'a [CertificateDer<'static>],
    /// What this host shows.
    pub(super) own: Option<(&'a Identity, &'a CertificateDer<'static>)>,
}

/// What keys are supported, for who makes one.
const KEYS: &str = "RSA with 2048 to 8192 bits, ECDSA with P-256 or P-384, and Ed25519";
const MAKE_KEY: &str = "`openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out KEY`";

impl TlsFailure {
    fn new(reason: KeyReason, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { reason, text }
    }

    /// A connection to a server.
    pub(super) fn of_connection(error: &Error, at: &Circumstances<'_>) -> Self {
        let (reason, text) = match error {
            Error::InvalidCertificate(error) => (KeyReason::Untrusted, of_server(error, at)),
            Error::NoCertificatesPresented => {
                (KeyReason::Untrusted, "the server shows no certificate".into())
            }
            Error::AlertReceived(alert) => of_alert(*alert, at),
            Error::PeerIncompatible(_) => (KeyReason::Failed, nothing_in_common()),
            Error::FailedToGetRandomBytes => (KeyReason::Host, "this host has no random numbers".into()),
            Error::FailedToGetCurrentTime => (KeyReason::Host, "this host has no clock".into()),
            Error::InvalidMessage(_) | Error::PeerSentOversizedRecord => (
                KeyReason::Garbled,
                "the server at this address does not speak TLS; correct the address or the port".into(),
            ),
            Error::InappropriateMessage { .. }
            | Error::InappropriateHandshakeMessage { .. }
            | Error::PeerMisbehaved(_)
            | Error::DecryptError => (
                KeyReason::Garbled,
                "the server violates the TLS protocol, or a device between alters its messages".into(),
            ),
            _ => (
                KeyReason::Garbled,
                "a connection by TLS 1.2 or 1.3 is not possible".into(),
            ),
        };
        Self::new(reason, text)
    }

    /// A certificate and a key that are not taken for this host's own.
    pub(super) fn of_identity(error: &Error, identity: &Identity, own: &CertificateDer<'_>) -> Self {
        let (certificate, key) = (identity.certificate.display(), identity.key.display());
        let kind = Certificate::parse(own).map(|own| own.key());
        let text = match error {
            Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => format!(
                "it is not the key of the first certificate in {certificate}: `openssl x509 -in {certificate} -noout -pubkey` and \
                 `openssl pkey -in {key} -pubout` must print the same; give files that belong together, with this host's own \
                 certificate first"
            ),
            Error::InvalidCertificate(error) => {
                format!(
                    "{certificate}: {}",
                    of_certificate("this host's", error, own, None)
                )
            }
            _ => match kind.filter(|kind| !kind.can_be_own()) {
                Some(kind) => format!(
                    "the key is {kind}, but only RSA with 2048 to 4096 bits, ECDSA with P-256 or P-384, and Ed25519 are supported; \
                     make a new key with {MAKE_KEY}, and request a certificate for it"
                ),
                None => format!(
                    "the private key is damaged, or of an unsupported kind; supported are {KEYS}; check it with `openssl pkey -in {key} \
                     -noout -check`"
                ),
            },
        };
        Self::new(KeyReason::Invalid, text)
    }

    /// A certificate that cannot be one of an authority that is believed.
    pub(super) fn of_authority(error: &Error, der: &CertificateDer<'_>) -> Self {
        let text = match error {
            Error::InvalidCertificate(error) => of_certificate("an authority's", error, der, None),
            _ => "an authority's certificate in it cannot be used".to_owned(),
        };
        Self::new(KeyReason::Invalid, text)
    }
}

/// The server's chain is not believed.
fn of_server(error: &CertificateError, at: &Circumstances<'_>) -> String {
    let [own, ..] = at.shown else {
        return "the server's certificate is not trusted".to_owned();
    };
    let chain: Vec<_> = at.shown.iter().filter_map(Certificate::parse).collect();
    let ca = at.ca.display();
    let unhandled = CertificateError::UnhandledCriticalExtension;
    let error = match error {
        CertificateError::Other(OtherError(cause))
            if is(cause, |e| *e == webpki::Error::UnsupportedCriticalExtension) =>
        {
            &unhandled
        }
        error => error,
    };
    // A key that is not supported shows as a bad signature, or as an issuer that is not known.
    let roots: Vec<_> = at.roots.iter().filter_map(Certificate::parse).collect();
    let signers = chain.iter().chain(&roots);
    let unsupported = signers.clone().find(|signer| {
        let signs = chain.iter().any(|signed| signed.names_as_issuer(signer));
        (signs || chain.first().is_some_and(|own| own.subject() == signer.subject()))
            && !signer.key().is_supported()
    });
    match error {
        CertificateError::UnknownIssuer
        | CertificateError::BadSignature
        | CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
            if let Some(signer) = unsupported =>
        {
            format!(
                "the key of the certificate {:?} is {}, but only {KEYS} are supported; make a new key with {MAKE_KEY}, and \
                 request a new certificate for it",
                signer.subject(),
                signer.key()
            )
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            let Some(first) = chain.first() else {
                return "the server's certificate cannot be read".to_owned();
            };
            // As far up as what was shown goes.
            let mut last = first;
            for _ in &chain {
                match chain
                    .iter()
                    .find(|next| last.names_as_issuer(next) && !last.names_as_issuer(last))
                {
                    Some(next) => last = next,
                    None => break,
                }
            }
            let (subject, issuer) = (first.subject(), last.issuer());
            if roots.iter().any(|root| last.names_as_issuer(root)) {
                format!(
                    "the server's certificate {subject:?} names the issuer {issuer:?}, but the key of the certificate that {ca} has for \
                     that authority did not sign it; put the authority's current certificate there"
                )
            } else if matches!(error, CertificateError::BadSignature) {
                of_certificate("the server's", error, own, at.name)
            } else if first.names_as_issuer(first) {
                format!(
                    "the server's certificate {subject:?} is self-signed, and not in {ca}; put it there, or better let an authority \
                     whose certificate is there sign it"
                )
            } else {
                format!(
                    "the server's certificate {subject:?} was issued by {issuer:?}, for which {ca} has no certificate; if that is an \
                     intermediate authority, configure the server to send its certificate too (append it to the server's own in \
                     the server's certificate file), else put the authority's certificate into {ca}"
                )
            }
        }
        // Any of the chain may be too old, or too new.
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => {
            let now = Timestamp::now();
            let outside = |der: &&CertificateDer<'_>| {
                Certificate::parse(der).is_some_and(|certificate| {
                    let (from, until) = certificate.validity();
                    now < from || now > until
                })
            };
            let at_fault = at.shown.iter().find(outside).unwrap_or(own);
            of_certificate("the server's", error, at_fault, at.name)
        }
        CertificateError::UnhandledCriticalExtension => {
            let at_fault = at.shown.iter().find(|der| {
                Certificate::parse(der).is_some_and(|certificate| !certificate.unknown_critical().is_empty())
            });
            of_certificate("the server's", error, at_fault.unwrap_or(own), at.name)
        }
        CertificateError::Other(OtherError(cause))
            if is(cause, |e| *e == webpki::Error::UnsupportedCertVersion) =>
        {
            let at_fault = at
                .shown
                .iter()
                .find(|der| Certificate::parse(der).is_some_and(|certificate| certificate.version() != 3));
            of_certificate("the server's", error, at_fault.unwrap_or(own), at.name)
        }
        error => of_certificate("the server's", error, own, at.name),
    }
}

fn is(
    cause: &std::sync::Arc<dyn std::error::Error + Send + Sync>,
    what: impl Fn(&webpki::Error) -> bool,
) -> bool {
    cause.downcast_ref::<webpki::Error>().is_some_and(what)
}

/// What is wrong with this certificate.
fn of_certificate(
    whose: &str,
    error: &CertificateError,
    der: &CertificateDer<'_>,
    name: Option<&ServerName<'static>>,
) -> String {
    let Some(certificate) = Certificate::parse(der) else {
        return format!(
            "{whose} certificate is not a readable X.509 certificate; it is damaged: make or copy it again"
        );
    };
    let (from, until) = certificate.validity();
    let what = match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!(
                "has expired, at {until}; this host's clock says {}; renew it",
                Timestamp::now()
            )
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => format!(
            "is not valid before {from}, but this host's clock says {}; correct the wrong clock",
            Timestamp::now()
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            let names = certificate.names();
            let wanted = name.map(|name| name.to_str().into_owned()).unwrap_or_default();
            match names.is_empty() {
                true => format!(
                    "has no subject alternative name, and sealblk ignores its common name; {}",
                    make(name)
                ),
                false => {
                    let shown: Vec<_> = names.iter().take(8).map(String::as_str).collect();
                    format!(
                        "is for {}, but the settings name the server {wanted}; use the name of the certificate in the settings, or: {}",
                        shown.join(", "),
                        make(name)
                    )
                }
            }
        }
        CertificateError::UnhandledCriticalExtension => critical(&certificate),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => String::from(
            "is not for servers: its extended key usage lacks serverAuth; request a new one with `extendedKeyUsage=serverAuth`, or \
             without that extension",
        ),
        CertificateError::BadSignature => format!(
            "is not signed by the key of {:?}: it is damaged or forged; copy it again, or request a new one",
            certificate.issuer()
        ),
        CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => format!(
            "is signed with {}, which is not supported; request a new one, signed with SHA-256 or SHA-384 by a supported key \
             ({KEYS})",
            certificate.signature()
        ),
        CertificateError::Revoked => "is revoked; request a new one".to_owned(),
        CertificateError::BadEncoding => "violates X.509; request a new one".to_owned(),
        CertificateError::Other(OtherError(cause)) => match cause.downcast_ref::<webpki::Error>() {
            Some(webpki::Error::CaUsedAsEndEntity) => {
                let signed = match certificate.names_as_issuer(&certificate) {
                    true => "is self-signed and belongs to an authority (CA:TRUE)",
                    false => "belongs to an authority (CA:TRUE)",
                };
                format!("{signed}, but a server needs a certificate with CA:FALSE; {}", make(name))
            }
            Some(webpki::Error::UnsupportedCriticalExtension) => critical(&certificate),
            Some(webpki::Error::EndEntityUsedAsCa) => {
                "is signed by a certificate that does not belong to an authority (CA:FALSE); let an authority sign it".to_owned()
            }
            Some(webpki::Error::UnsupportedCertVersion) => format!(
                "has X.509 version {}, but version 3 is required; `openssl x509 -req` makes version 3 only with -extfile; {}",
                certificate.version(),
                make(name)
            ),
            Some(webpki::Error::NameConstraintViolation) => {
                "has a name that its authority is not allowed to sign (name constraints); request a new one"
                    .to_owned()
            }
            Some(webpki::Error::PathLenConstraintViolated) => {
                "has more authorities above it than they allow (path length); let a higher authority sign it"
                    .to_owned()
            }
            _ => "violates X.509 (RFC 5280); request a new one".to_owned(),
        },
        _ => "is not trusted; request a new one".to_owned(),
    };
    format!("{whose} certificate {:?} {what}", certificate.subject())
}

fn critical(certificate: &Certificate) -> String {
    format!(
        "has unknown critical extensions ({}); request one without them, or with them not critical",
        certificate.unknown_critical().join(", ")
    )
}

/// How a server's certificate is made.
fn make(name: Option<&ServerName<'static>>) -> String {
    let alternative = match name {
        Some(ServerName::IpAddress(_)) => format!("IP:{}", name.map(ServerName::to_str).unwrap_or_default()),
        Some(name) => format!("DNS:{}", name.to_str()),
        None => "DNS:NAME".to_owned(),
    };
    format!(
        "let an authority make a new one with `openssl x509 -req -in REQUEST -CA CA -CAkey CAKEY -days 365 -extfile EXT -out NEW`, \
         where EXT has the lines `basicConstraints=CA:FALSE` and `subjectAltName={alternative}`"
    )
}

fn nothing_in_common() -> String {
    format!(
        "the server and this host have no TLS parameters in common: this host supports TLS 1.2 and 1.3, and certificates with \
         keys of {KEYS}; a server with another key, such as P-521, causes this error: make a new key with {MAKE_KEY}, and \
         request a certificate for it"
    )
}

/// What the server says before it hangs up.
fn of_alert(alert: Alert, at: &Circumstances<'_>) -> (KeyReason, String) {
    let Some((identity, der)) = at.own else {
        return match alert {
            Alert::CertificateRequired | Alert::NoCertificate | Alert::BadCertificate => (
                KeyReason::Untrusted,
                "the server requires a certificate of this host, but the settings name none".into(),
            ),
            other => of_other_alert(other),
        };
    };
    let file = identity.certificate.display();
    let own = Certificate::parse(der);
    let (subject, issuer) = own
        .as_ref()
        .map(|own| (own.subject(), own.issuer()))
        .unwrap_or_default();
    let refused = format!("the server rejects this host's certificate {subject:?} in {file}");
    let (from, until) = own.as_ref().map(Certificate::validity).unzip();
    let now = Timestamp::now();
    let text = match alert {
        // Many servers have the same alert for all that is wrong with a certificate: this host can look for itself.
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateExpired
        | Alert::CertificateUnknown
        | Alert::UnknownCA
        | Alert::DecryptError
        | Alert::AccessDenied
            if until.is_some_and(|until| now > until) =>
        {
            format!("{refused}: it has expired, at {}; renew it", until.unwrap_or(now))
        }
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateExpired
        | Alert::CertificateUnknown
        | Alert::UnknownCA
            if from.is_some_and(|from| now < from) =>
        {
            format!(
                "{refused}: it is not valid before {}; correct the wrong clock",
                from.unwrap_or(now)
            )
        }
        Alert::CertificateExpired => {
            format!("{refused}: it has expired by the server's clock; check both clocks, or renew it")
        }
        Alert::UnknownCA => format!(
            "{refused}: the server does not know its issuer {issuer:?}; make that authority known to the server, or let an \
             authority that the server knows sign it"
        ),
        Alert::CertificateRevoked => format!("{refused}: it is revoked; request a new one"),
        Alert::CertificateRequired | Alert::NoCertificate => {
            format!("the server requires a certificate of this host, and did not accept {file}")
        }
        Alert::BadCertificate | Alert::UnsupportedCertificate | Alert::CertificateUnknown => format!(
            "{refused}; an authority that the server trusts must have signed it (its issuer is {issuer:?}), and it must be for TLS \
             clients (`extendedKeyUsage=clientAuth`)"
        ),
        Alert::DecryptError => format!("{refused}: the server cannot check a signature of its key"),
        other => return of_other_alert(other),
    };
    (KeyReason::Untrusted, text)
}

fn of_other_alert(alert: Alert) -> (KeyReason, String) {
    match alert {
        Alert::HandshakeFailure | Alert::InsufficientSecurity => (KeyReason::Failed, nothing_in_common()),
        Alert::ProtocolVersion => (
            KeyReason::Failed,
            "the server supports neither TLS 1.2 nor TLS 1.3; enable one of them at the server".into(),
        ),
        Alert::AccessDenied => (
            KeyReason::Refused,
            "the server accepts this host's certificate, but gives it no access; grant access at the server".into(),
        ),
        Alert::UnrecognisedName => (
            KeyReason::Failed,
            "the server does not have the name that the settings give it; correct the settings, or the server's name"
                .into(),
        ),
        Alert::BadCertificate
        | Alert::UnsupportedCertificate
        | Alert::CertificateRevoked
        | Alert::CertificateExpired
        | Alert::CertificateUnknown
        | Alert::UnknownCA
        | Alert::CertificateRequired
        | Alert::NoCertificate
        | Alert::DecryptError => (
            KeyReason::Untrusted,
            "the server rejects a certificate, although this host sends none".into(),
        ),
        other => (
            KeyReason::Failed,
            format!(
                "the server ends the connection (TLS alert {}); its log says why",
                u8::from(other)
            ),
        ),
    }
}

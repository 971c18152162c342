//! PEM files (RFC 7468): the certificates and the private key in them, and the problem of a file without them.
//!
//! The library's errors hold lines of the file. None of them leaves this module: it inspects the file again to find the
//! problem, and reports it without a byte of the file.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Why there is in a file not what is wanted of it, and how to make a right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::providers) enum BadPem {
    #[error("it is empty")]
    Empty,
    #[error("it is UTF-16, but PEM is ASCII; convert it: `iconv -f UTF-16 -t ASCII FILE > NEW`")]
    Utf16,
    #[error("it is DER, but must be PEM; convert it: `openssl {} -inform DER -in FILE -out NEW`", .0.command())]
    Der(Wanted),
    #[error(
        "it is PKCS#12, but must be PEM; convert it: `openssl pkcs12 -in FILE {} -out NEW`",
        match .0 { Wanted::Certificates => "-nokeys", Wanted::PrivateKey => "-nocerts -nodes" }
    )]
    Pkcs12(Wanted),
    #[error("it has no line '-----BEGIN ...-----', so it is not a PEM file")]
    NoPem,
    #[error(
        "its line breaks were lost: in PEM, BEGIN and END are on separate lines; restore them: `sed -e \
         's/-----BEGIN [A-Z0-9 ]*-----/&\\n/g' -e 's/-----END/\\n&/g' FILE > NEW`"
    )]
    NoLineBreaks,
    #[error(
        "its line breaks are written as '\\n', two characters; convert them to line breaks: `sed 's/\\\\n/\\n/g' FILE > NEW`"
    )]
    EscapedLineBreaks,
    #[error(
        "its lines begin with blanks, perhaps because it was pasted from another file; remove them: `sed 's/^[ \\t]*//' FILE > NEW`"
    )]
    Indented,
    #[error("it ends in the middle: an END line is missing; copy it again")]
    Truncated,
    #[error("the text between BEGIN and END is not base64: the file is damaged; copy it again")]
    Damaged,
    #[error(
        "the private key in it is encrypted, and sealblk cannot ask for the passphrase; write the key without a passphrase with \
         `openssl pkey -in FILE -out NEW` (after `umask 077`, so that only its owner can read NEW)"
    )]
    Encrypted,
    #[error("it has several private keys; keep only the one that belongs to the certificate")]
    SeveralKeys,
    #[error(
        "it has a certificate and no private key; name the file of the certificate's key here, which contains \
         PRIVATE KEY"
    )]
    CertificateForKey,
    #[error(
        "it has a private key and no certificate; name the file here that contains CERTIFICATE, and keep the key in a file \
         that only its owner can read"
    )]
    KeyForCertificate,
    #[error("it has a public key instead of {}", .0.name())]
    PublicKey(Wanted),
    #[error("it has a request for a certificate instead of {}", .0.name())]
    Request(Wanted),
    #[error(
        "the key in it is in OpenSSH's form; convert it: `ssh-keygen -p -m PKCS8 -f FILE`, with an empty new passphrase"
    )]
    OpenSsh,
    #[error("its certificate is in a form of OpenSSL's own; convert it: `openssl x509 -in FILE -out NEW`")]
    OpenSslTrusted,
    #[error("it is PKCS#7; convert it: `openssl pkcs7 -in FILE -print_certs -out NEW`")]
    Pkcs7,
    #[error("it has no {}", .0.name())]
    Nothing(Wanted),
}

/// What a file is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::providers) enum Wanted {
    Certificates,
    PrivateKey,
}

impl Wanted {
    fn name(self) -> &'static str {
        match self {
            Self::Certificates => "certificate",
            Self::PrivateKey => "private key",
        }
    }

    /// OpenSSL's for it.
    fn command(self) -> &'static str {
        match self {
            Self::Certificates => "x509",
            Self::PrivateKey => "pkey",
        }
    }
}

/// All certificates in a file, of which there is one at least.
pub(super) fn certificates(file: &[u8]) -> Result<Vec<CertificateDer<'static>>, BadPem> {
    let pem = without_mark(file);
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        // Of a bundle, the library passes over what does not begin a line.
        Ok(read) if !read.is_empty() && blocks(pem).iter().all(|block| block.begins_line) => Ok(read),
        _ => Err(diagnose(pem, Wanted::Certificates)),
    }
}

/// The one private key in a file, which may hold certificates too.
pub(super) fn private_key(file: &[u8]) -> Result<PrivateKeyDer<'static>, BadPem> {
    let pem = without_mark(file);
    let mut keys = PrivateKeyDer::pem_slice_iter(pem);
    match (keys.next(), keys.next()) {
        (Some(Ok(key)), None) => Ok(key),
        (Some(Ok(_)), Some(Ok(_))) => Err(BadPem::SeveralKeys),
        _ => Err(diagnose(pem, Wanted::PrivateKey)),
    }
}

/// Without the byte order mark that some editors begin UTF-8 with.
fn without_mark(file: &[u8]) -> &[u8] {
    file.strip_prefix(b"\xef\xbb\xbf").unwrap_or(file)
}

/// A place where a block of PEM begins.
struct Block<'a> {
    label: &'a [u8],
    begins_line: bool,
    /// Blanks alone stand before it on its line.
    is_indented: bool,
    /// Nothing stands behind the label on its line.
    ends_line: bool,
    has_end: bool,
}

fn blocks(pem: &[u8]) -> Vec<Block<'_>> {
    const BEGIN: &[u8] = b"-----BEGIN ";
    let is_break = |byte: &u8| matches!(byte, b'\r' | b'\n');
    let starts = pem.windows(BEGIN.len()).enumerate();
    let starts = starts.filter(|(_, text)| *text == BEGIN).map(|(at, _)| at);
    let block = |at: usize| {
        let (before, rest) = (&pem[..at], &pem[at + BEGIN.len()..]);
        let line = before.rsplit(is_break).next().unwrap_or_default();
        let len = find(rest, b"-----").unwrap_or(rest.len());
        let (label, rest) = rest.split_at(len);
        let behind = rest.split(is_break).next().unwrap_or_default();
        Block {
            label,
            begins_line: line.is_empty(),
            is_indented: line.iter().all(u8::is_ascii_whitespace),
            ends_line: behind.trim_ascii_end().len() <= 5,
            has_end: find(rest, b"-----END ").is_some(),
        }
    };
    starts.map(block).collect()
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|part| part == wanted)
}

/// What is wrong with a file that was not read.
fn diagnose(pem: &[u8], wanted: Wanted) -> BadPem {
    if pem.trim_ascii().is_empty() {
        return BadPem::Empty;
    }
    if pem.starts_with(b"\xff\xfe") || pem.starts_with(b"\xfe\xff") {
        return BadPem::Utf16;
    }
    // A SEQUENCE, as all of these are; PKCS#12 begins with the version 3.
    if let [0x30, length, rest @ ..] = pem
        && !length.is_ascii()
    {
        let content = rest.get(usize::from(length & 0x7f)..).unwrap_or_default();
        return match content.starts_with(&[2, 1, 3]) {
            true => BadPem::Pkcs12(wanted),
            false => BadPem::Der(wanted),
        };
    }
    let blocks = blocks(pem);
    let all = |what: fn(&Block<'_>) -> bool| blocks.iter().all(what);
    let has = |label: &[u8]| blocks.iter().any(|block| block.label == label);
    let has_like = |label: &[u8]| blocks.iter().any(|block| block.label.ends_with(label));
    let key = has_like(b"PRIVATE KEY");
    match wanted {
        _ if blocks.is_empty() => BadPem::NoPem,
        _ if !all(|block| block.begins_line && block.ends_line) => match () {
            () if find(pem, b"-\\n").is_some() => BadPem::EscapedLineBreaks,
            () if all(|block| block.is_indented && block.ends_line) => BadPem::Indented,
            () => BadPem::NoLineBreaks,
        },
        Wanted::PrivateKey if has(b"ENCRYPTED PRIVATE KEY") => BadPem::Encrypted,
        Wanted::PrivateKey if key && find(pem, b"Proc-Type: 4,ENCRYPTED").is_some() => BadPem::Encrypted,
        Wanted::PrivateKey if has(b"OPENSSH PRIVATE KEY") => BadPem::OpenSsh,
        Wanted::Certificates if has(b"TRUSTED CERTIFICATE") => BadPem::OpenSslTrusted,
        Wanted::Certificates if has(b"PKCS7") => BadPem::Pkcs7,
        _ if !all(|block| block.has_end) => BadPem::Truncated,
        Wanted::PrivateKey if key => BadPem::Damaged,
        Wanted::Certificates if has(b"CERTIFICATE") => BadPem::Damaged,
        Wanted::PrivateKey if has(b"CERTIFICATE") => BadPem::CertificateForKey,
        Wanted::Certificates if key => BadPem::KeyForCertificate,
        _ if has_like(b"PUBLIC KEY") => BadPem::PublicKey(wanted),
        _ if has_like(b"CERTIFICATE REQUEST") => BadPem::Request(wanted),
        _ => BadPem::Nothing(wanted),
    }
}

//! An RSA key of a TPM in the form of X.509: SubjectPublicKeyInfo in DER (RFC 5280, 4.1; RFC 8017, A.1.1).

use super::attest::RsaPublic;

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const SEQUENCE: u8 = 0x30;
/// rsaEncryption, 1.2.840.113549.1.1.1, with NULL for its parameters.
const RSA_ENCRYPTION: [u8; 13] = [
    0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00,
];

impl RsaPublic {
    /// The key as SubjectPublicKeyInfo, in DER.
    pub fn spki(&self) -> Vec<u8> {
        let exponent = self.exponent.to_be_bytes();
        let key = tagged(SEQUENCE, &[integer(&self.modulus), integer(&exponent)].concat());
        // No bits of the last byte are unused.
        let key = tagged(BIT_STRING, &[&[0], &key[..]].concat());
        tagged(SEQUENCE, &[tagged(SEQUENCE, &RSA_ENCRYPTION), key].concat())
    }
}

/// A number that is not negative.
fn integer(big_endian: &[u8]) -> Vec<u8> {
    let zeros = big_endian.iter().take_while(|byte| **byte == 0).count();
    let digits = &big_endian[zeros..];
    // The first bit is the sign.
    let sign = match digits.first() {
        Some(first) if first & 0x80 == 0 => &[][..],
        _ => &[0],
    };
    tagged(INTEGER, &[sign, digits].concat())
}

fn tagged(tag: u8, content: &[u8]) -> Vec<u8> {
    let len = content.len();
    let mut bytes = vec![tag];
    match len {
        0..0x80 => bytes.push(len as u8),
        0x80..0x100 => bytes.extend([0x81, len as u8]),
        _ => bytes.extend([0x82, (len >> 8) as u8, len as u8]),
    }
    bytes.extend_from_slice(content);
    bytes
}

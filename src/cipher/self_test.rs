//! Known answers for every kernel of this machine, before it touches anybody's data.

use sha2::{Digest, Sha256};
use vm_memory::VolatileSlice;

use super::kernel::running_here;
use super::{CipherError, KEY_LEN, Reader, Sector, SectorCipher, SectorSize};
use crate::keys::arena::SecretBytes;

/// The key of IEEE 1619-2007, appendix B, vector 10.
pub(super) const KEY: [u8; KEY_LEN] = *b"\x27\x18\x28\x18\x28\x45\x90\x45\x23\x53\x60\x28\x74\x71\x35\x26\
    \x62\x49\x77\x57\x24\x70\x93\x69\x99\x59\x57\x49\x66\x96\x76\x27\
    \x31\x41\x59\x26\x53\x58\x97\x93\x23\x84\x62\x64\x33\x83\x27\x95\
    \x02\x88\x41\x97\x16\x93\x99\x37\x51\x05\x82\x09\x74\x94\x45\x92";

/// The first sector: a number that uses all eight bytes of the tweak.
const FIRST: Sector = Sector(0x0123_4567_89ab_cdef);

/// SHA-256 of three encrypted sectors of [`plaintext`], as OpenSSL 3 computes it.
const ANSWERS: [(SectorSize, [u8; 32]); 2] = [
    (
        SectorSize::B512,
        *b"\x1a\xe6\xc3\x52\x6b\x1c\xe1\x10\x80\xc5\x58\xd5\x5c\x65\x1b\x4e\
        \xc2\x17\x34\x86\x0a\x21\x24\x74\x7a\x33\x61\x37\xb2\x0c\x37\x2e",
    ),
    (
        SectorSize::B4096,
        *b"\x6e\xea\xb4\xa9\x1b\x79\xbc\xe9\xa3\x32\xb5\xca\x46\x41\x65\xb0\
        \x37\x11\x1a\xfe\x5f\x45\x9e\xcd\x06\x0b\xe7\x42\x41\x59\xe0\x3f",
    ),
];

fn plaintext(size: SectorSize) -> Vec<u8> {
    (0..3 * size.bytes()).map(|i| (i % 251) as u8).collect()
}

/// Encrypts and decrypts known sectors of both sizes with every kernel. To be called when the process starts.
///
/// # Errors
/// [`CipherError::SelfTest`] names the kernel that computes wrongly: a defect of the machine or of the build.
pub fn self_test() -> Result<(), CipherError> {
    for candidate in running_here() {
        for (size, answer) in ANSWERS {
            let key = SecretBytes::take(&mut KEY.clone())?;
            let cipher = SectorCipher {
                kernel: (candidate.expand)(&key)?,
                name: candidate.name,
                sector_size: size,
            };
            check(&cipher, answer).map_err(|operation| CipherError::SelfTest {
                kernel: candidate.name,
                sector_size: size.bytes(),
                operation,
            })?;
        }
    }
    Ok(())
}

/// The operation that gives a wrong answer, if one does.
fn check(cipher: &SectorCipher, answer: [u8; 32]) -> Result<(), &'static str> {
    let mut plain = plaintext(cipher.sector_size());
    let mut encrypted = vec![0; plain.len()];
    for reader in [Reader::Device, Reader::Processor] {
        let plain = [VolatileSlice::from(&mut plain[..])];
        cipher.encrypt(FIRST, &plain, &mut encrypted, reader);
        if <[u8; 32]>::from(Sha256::digest(&encrypted)) != answer {
            return Err("encrypted");
        }
    }
    plain.fill(0);
    cipher.decrypt(FIRST, &encrypted, &[VolatileSlice::from(&mut plain[..])]);
    if plain != plaintext(cipher.sector_size()) {
        return Err("decrypted");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cipher::KernelChoice;

    #[test]
    fn known_answers_hold_on_this_machine() {
        self_test().unwrap();
    }

    #[test]
    fn wrong_answer_is_noticed() {
        let other = SecretBytes::random(KEY_LEN).unwrap();
        let cipher = SectorCipher::new(&other, SectorSize::B512, KernelChoice::Portable).unwrap();
        assert_eq!(check(&cipher, ANSWERS[0].1), Err("encrypted"));
    }
}

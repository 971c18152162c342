//! Known-answer tests of every kernel of this machine, before the kernel processes any data.

use sha2::{Digest, Sha256};
use vm_memory::VolatileSlice;

use super::choice::running_here;
use super::{CipherError, KEY_LEN, Reader, Sector, SectorCipher, SectorSize, Workspace};
use sealblk_secmem::arena::SecretBytes;

/// The key of IEEE 1619-2007, appendix B, vector 10.
pub(super) const KEY: [u8; KEY_LEN] = *b"\x27\x18\x28\x18\x28\x45\x90\x45\x23\x53\x60\x28\x74\x71\x35\x26\
    \x62\x49\x77\x57\x24\x70\x93\x69\x99\x59\x57\x49\x66\x96\x76\x27\
    \x31\x41\x59\x26\x53\x58\x97\x93\x23\x84\x62\x64\x33\x83\x27\x95\
    \x02\x88\x41\x97\x16\x93\x99\x37\x51\x05\x82\x09\x74\x94\x45\x92";

/// The first sector: a number that uses all eight bytes of the tweak, and carries from the lower four soon.
const FIRST: Sector = Sector(0x0123_4567_ffff_fff0);

/// SHA-256 of so many encrypted sectors of [`plaintext`], as OpenSSL 3 computes it. The first are more than any kernel
/// works on at a time.
const ANSWERS: [(SectorSize, usize, [u8; 32]); 2] = [
    (
        SectorSize::B512,
        130,
        *b"\xf6\x34\x7a\x5f\xfa\xc8\xb2\x69\xf6\x94\x03\xc6\x1d\xdc\xe5\xbe\
        \xaf\x69\xee\xfb\xa5\xab\x5d\x88\xb7\xb7\x98\x81\x6a\x77\xcc\xd0",
    ),
    (
        SectorSize::B4096,
        3,
        *b"\x3a\x66\x17\x91\xea\xf8\xc6\xaf\x29\xf0\x82\x31\x1b\xdb\x09\x1d\
        \x1f\x83\x80\x49\x90\x84\x30\xc7\xeb\x1a\x94\xfa\x3a\x31\x4d\x26",
    ),
];

/// A line of the cache, and the longest vector, in bytes.
const LINE: usize = 64;

fn plaintext(len: usize) -> Vec<u8> {
    (0..251).cycle().take(len).collect()
}

/// Encrypts and decrypts known sectors of both sizes with every kernel. To be called when the process starts.
///
/// # Errors
/// [`CipherError::SelfTest`] names the kernel that computes wrongly: a defect of the machine or of the build.
pub fn self_test() -> Result<(), CipherError> {
    let mut workspace = Workspace::new()?;
    for candidate in running_here() {
        for (size, sectors, answer) in ANSWERS {
            let key = SecretBytes::take(&mut KEY.clone())?;
            let cipher = SectorCipher {
                kernel: (candidate.expand)(&key)?,
                name: candidate.name,
                sector_size: size,
            };
            check(&cipher, &mut workspace, sectors, answer).map_err(|operation| CipherError::SelfTest {
                kernel: candidate.name,
                sector_size: size.bytes(),
                operation,
            })?;
        }
    }
    Ok(())
}

/// The operation that gives a wrong answer, if one does.
fn check(
    cipher: &SectorCipher,
    workspace: &mut Workspace,
    sectors: usize,
    answer: [u8; 32],
) -> Result<(), &'static str> {
    let len = sectors * cipher.sector_size().bytes();
    let mut plain = plaintext(len);
    // Aligned, since stores past the cache want to be.
    let mut encrypted = vec![0; len + LINE];
    let start = encrypted.as_ptr().align_offset(LINE);
    let encrypted = &mut encrypted[start..start + len];
    for reader in [Reader::Device, Reader::Processor] {
        let plain = [VolatileSlice::from(&mut plain[..])];
        cipher.encrypt(FIRST, &plain, encrypted, reader, workspace);
        if <[u8; 32]>::from(Sha256::digest(&*encrypted)) != answer {
            return Err("encrypted");
        }
    }
    plain.fill(0);
    cipher.decrypt(
        FIRST,
        encrypted,
        &[VolatileSlice::from(&mut plain[..])],
        workspace,
    );
    if plain != plaintext(len) {
        return Err("decrypted");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KernelChoice;

    #[test]
    fn known_answers_hold_on_this_machine() {
        self_test().unwrap();
    }

    #[test]
    fn wrong_answer_is_noticed() {
        let other = SecretBytes::random(KEY_LEN).unwrap();
        let cipher = SectorCipher::new(&other, SectorSize::B512, KernelChoice::Portable).unwrap();
        assert_eq!(
            check(
                &cipher,
                &mut Workspace::new().unwrap(),
                ANSWERS[0].1,
                ANSWERS[0].2
            ),
            Err("encrypted")
        );
    }
}

//! The portable kernel: `xts-mode` over `aes`, one sector at a time. It is the oracle for tests of the faster kernels.
#![allow(unsafe_code)] // Copies from and to guest memory, which must not be borrowed.

use aes::Aes256;
use aes::cipher::KeyInit;
use xts_mode::Xts128;

use super::kernel::{Kernel, Reader, Units, Workspace};
use super::{KEY_LEN, Scratch};
use sealblk_secmem::arena::{ArenaError, SecretBox, SecretBytes, on_wiped_stack};

/// The key schedules.
struct Portable(SecretBox<Xts128<Aes256>>);

pub(super) fn expand(key: &SecretBytes) -> Result<Box<dyn Kernel>, ArenaError> {
    let schedule = |half: &[u8]| Aes256::new_from_slice(half).expect("the caller checked the key's length");
    let (data, tweak) = key.split_at(KEY_LEN / 2);
    Ok(Box::new(Portable(SecretBox::new(|| {
        Xts128::new(schedule(data), schedule(tweak))
    })?)))
}

impl Kernel for Portable {
    unsafe fn encrypt(&self, units: Units, source: *const u8, target: *mut u8, _: Reader, _: &mut Workspace) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            each_copied(units, source, target, |unit, tweak| {
                self.0.encrypt_sector(unit, tweak.into())
            })
        }
    }

    unsafe fn decrypt(&self, units: Units, source: *const u8, target: *mut u8, _: &mut Workspace) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            each_copied(units, source, target, |unit, tweak| {
                self.0.decrypt_sector(unit, tweak.into())
            })
        }
    }
}

/// Copies each unit to a scratch buffer, lets `work` change it in place there, and copies it on.
///
/// # Safety
/// As for [`Kernel::encrypt`].
unsafe fn each_copied(units: Units, source: *const u8, target: *mut u8, work: impl Fn(&mut [u8], [u8; 16])) {
    // `aes` copies round keys out of the arena into vectors on the stack, and leaves them there.
    on_wiped_stack(|| {
        let mut scratch = Scratch::new();
        let unit = &mut scratch.0[..units.size];
        for (offset, tweak) in units.each() {
            // SAFETY: the unit lies within the source and the target, by the caller's promise.
            let (source, target) = (unsafe { source.add(offset) }, unsafe { target.add(offset) });
            // SAFETY: as above. Copying raw bytes that a guest may write to meanwhile yields some bytes; which ones
            // is the guest's own affair.
            unsafe { source.copy_to_nonoverlapping(unit.as_mut_ptr(), units.size) };
            work(unit, tweak);
            // SAFETY: as above.
            unsafe { target.copy_from_nonoverlapping(unit.as_ptr(), units.size) };
        }
    })
}

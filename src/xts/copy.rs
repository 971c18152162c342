//! Unencrypted sectors: they are copied to the memory of their reader.
#![allow(unsafe_code)] // Stores past the cache, from memory that must not be borrowed.

use vm_memory::VolatileSlice;

use super::Reader;

/// Copies what `plain` holds into `target`.
pub fn copy(plain: &[VolatileSlice<'_>], target: &mut [u8], reader: Reader) {
    let mut rest = target;
    for piece in plain {
        let (head, tail) = rest.split_at_mut(piece.len().min(rest.len()));
        match reader {
            #[cfg(target_arch = "x86_64")]
            Reader::Device if head.as_ptr().addr().is_multiple_of(LINE) => copy_past_the_cache(piece, head),
            _ => {
                piece.copy_to(head);
            }
        }
        rest = tail;
    }
}

/// A line of the cache, in bytes.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

#[cfg(target_arch = "x86_64")]
fn copy_past_the_cache(piece: &VolatileSlice<'_>, target: &mut [u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    let (lines, rest) = target.as_chunks_mut::<LINE>();
    let guard = piece.ptr_guard();
    for (i, line) in lines.iter_mut().enumerate() {
        let source: *const __m128i = guard.as_ptr().wrapping_add(i * LINE).cast();
        let target: *mut __m128i = line.as_mut_ptr().cast();
        for quarter in 0..LINE / size_of::<__m128i>() {
            // SAFETY: the piece is mapped for its length, and is as long as the target.
            let bytes = unsafe { _mm_loadu_si128(source.wrapping_add(quarter)) };
            // SAFETY: it lies within the line, which is aligned: the caller looked at where the first one lies.
            unsafe { _mm_stream_si128(target.wrapping_add(quarter), bytes) };
        }
    }
    // What went past the cache is there before whatever hands the buffer over.
    // SAFETY: every x86-64 has it.
    unsafe { _mm_sfence() };
    if let Ok(last) = piece.offset(lines.len() * LINE) {
        last.copy_to(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_length_are_copied_to_any_place_for_either_reader() {
        #[repr(align(64))]
        struct Lines([u8; 512]);
        let mut plain: Vec<u8> = (0..512).map(|i| (i % 251) as u8).collect();
        let expected = plain.clone();
        for reader in [Reader::Device, Reader::Processor] {
            for start in [0, 1, 16, 64] {
                for cut in 0..=400 {
                    let mut target = Lines([0xee; 512]);
                    let (one, two) = plain[..400].split_at_mut(cut);
                    let pieces = [VolatileSlice::from(one), VolatileSlice::from(two)];
                    copy(&pieces, &mut target.0[start..start + 400], reader);
                    assert_eq!(target.0[start..start + 400], expected[..400]);
                    assert!(target.0[..start].iter().all(|&byte| byte == 0xee));
                    assert!(target.0[start + 400..].iter().all(|&byte| byte == 0xee));
                }
            }
        }
    }
}

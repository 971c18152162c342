//! The anti-forensic splitter `luks1` (LUKS2 1.1, "Keyslots Object"; LUKS1 1.2 "AFsplit").
//!
//! The splitter expands a key to `stripes` times its length, so that the loss of any small part (a wiped or
//! remapped sector) loses the key. All stripes but the last are random; the last is chosen so that the chain
//! `state = diffuse(state ^ stripe)` over all others, exclusive-or the last, gives the key.

use zeroize::Zeroize;

use crate::hash::Hash;

/// Fills `material` with the split form of `key`. The front of `material` must hold random bytes already: all of it
/// but the last `key.len()` bytes, which are computed.
pub(crate) fn split(hash: Hash, key: &[u8], material: &mut [u8]) {
    let last = material.len() - key.len();
    let (random, last) = material.split_at_mut(last);
    let mut state = chain(hash, key.len(), random);
    for ((out, state), key) in last.iter_mut().zip(&state).zip(key) {
        *out = state ^ key;
    }
    state.zeroize();
}

/// Recovers into `key` what [`split`] made `material` of. Any material gives some key: a digest tells whether it is
/// the right one.
pub(crate) fn merge(hash: Hash, material: &[u8], key: &mut [u8]) {
    let (random, last) = material.split_at(material.len() - key.len());
    let mut state = chain(hash, key.len(), random);
    for ((out, state), last) in key.iter_mut().zip(&state).zip(last) {
        *out = state ^ last;
    }
    state.zeroize();
}

fn chain(hash: Hash, key_len: usize, random: &[u8]) -> Vec<u8> {
    let mut state = vec![0; key_len];
    for stripe in random.chunks_exact(key_len) {
        for (state, stripe) in state.iter_mut().zip(stripe) {
            *state ^= stripe;
        }
        diffuse(hash, &mut state);
    }
    state
}

/// Replaces each digest-sized block by the hash of its number and itself; a shorter last block keeps its length.
fn diffuse(hash: Hash, state: &mut [u8]) {
    let mut digest = [0; 64];
    for (number, block) in (0u32..).zip(state.chunks_mut(hash.len())) {
        let digest = &mut digest[..block.len()];
        hash.digest_into(&[&number.to_be_bytes(), block], digest);
        block.copy_from_slice(digest);
    }
    digest.zeroize();
}

/// Number of stripes that LUKS2 writes, and the only one that is accepted.
pub(crate) const STRIPES: u32 = 4000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_back_from_its_split_form() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            for len in [32, 64] {
                let key: Vec<u8> = (0..len).collect();
                let mut material: Vec<u8> = (0..usize::from(len) * 50).map(|i| (i * 31 + 7) as u8).collect();
                split(hash, &key, &mut material);
                let mut merged = vec![0; key.len()];
                merge(hash, &material, &mut merged);
                assert_eq!(merged, key);
            }
        }
    }

    #[test]
    fn one_changed_bit_changes_the_whole_digest_block_of_the_key_that_it_is_in() {
        let key = [5; 64];
        let mut material: Vec<u8> = (0..64 * 50).map(|i| (i * 31 + 7) as u8).collect();
        split(Hash::Sha256, &key, &mut material);
        material[64 * 20 + 3] ^= 0x10;
        let mut merged = [0; 64];
        merge(Hash::Sha256, &material, &mut merged);
        let same = |range: std::ops::Range<usize>| {
            let pairs = merged[range.clone()].iter().zip(&key[range]);
            pairs.filter(|(a, b)| a == b).count()
        };
        assert!(same(0..32) < 8);
        assert_eq!(same(32..64), 32);
    }
}

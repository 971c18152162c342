//! What AES-256 makes of a key, written down again from FIPS 197: the round keys by which a key can be known in memory even
//! where the key itself is gone.

/// One less than there are round keys.
pub const ROUNDS: usize = 14;

/// The round keys of encryption, and those of the equivalent inverse cipher, which differ in all but the first and the last.
pub fn round_keys(key: &[u8]) -> Vec<[u8; 16]> {
    let encrypt = expand(key);
    let inverse = encrypt[1..ROUNDS].iter().map(|round| inverse_mix_columns(*round));
    let inverse: Vec<_> = inverse.collect();
    [encrypt, inverse].concat()
}

/// Section 5.2.
fn expand(key: &[u8]) -> Vec<[u8; 16]> {
    let mut words: Vec<[u8; 4]> = key.chunks_exact(4).map(|word| word.try_into().unwrap()).collect();
    assert_eq!(words.len(), 8, "a key of AES-256");
    let mut constant = 1;
    for i in 8..4 * (ROUNDS + 1) {
        let mut word = words[i - 1];
        if i % 8 == 0 {
            word.rotate_left(1);
            word = word.map(substitute);
            word[0] ^= constant;
            constant = times(constant, 2);
        } else if i % 8 == 4 {
            word = word.map(substitute);
        }
        words.push(std::array::from_fn(|n| word[n] ^ words[i - 8][n]));
    }
    words
        .chunks_exact(4)
        .map(|round| round.concat().try_into().unwrap())
        .collect()
}

/// Section 5.3.3.
pub fn inverse_mix_columns(round: [u8; 16]) -> [u8; 16] {
    std::array::from_fn(|i| {
        let column = &round[i / 4 * 4..][..4];
        let factors = [14, 11, 13, 9];
        (0..4).fold(0, |sum, n| sum ^ times(column[n], factors[(n + 4 - i % 4) % 4]))
    })
}

/// The S-box, section 5.1.1: the inverse in the field, then an affine map.
fn substitute(byte: u8) -> u8 {
    // The multiplicative group has 255 elements.
    let inverse = (0..254).fold(1, |power, _| times(power, byte));
    (0..5).fold(0x63, |sum, n| sum ^ inverse.rotate_left(n))
}

/// Multiplication in the field, section 4.2.
fn times(mut a: u8, b: u8) -> u8 {
    let mut product = 0;
    for bit in 0..8 {
        if (b >> bit) & 1 == 1 {
            product ^= a;
        }
        a = (a << 1) ^ ((a >> 7) * 0x1b);
    }
    product
}

//! The strength of a secret that an operator chose: a recovery key, or the passphrase of a backup.
//!
//! The measure is the length without predictable characters: a character that continues a run (`aaa`, `abc`, `321`) or
//! a repetition of three characters or more counts zero, a digit counts half, and a byte of a key that is not text counts
//! double. sealblk refuses fewer than [`LEAST`] characters, and warns below [`ADVISED`]. It uses no dictionary: a secret that
//! passes can still be bad, but a secret that fails is bad.

use std::fmt;

use super::secret::{SecretSource, is_text};
use super::stderr;

/// What is taken without --weak. argon2id makes each guess cost a second; twelve letters at random are 56 bits.
const LEAST: usize = 12;
/// What is taken without a warning.
const ADVISED: usize = 20;
/// The number of bytes that are measured: a strong secret is strong within these.
const LOOKED_AT: usize = 4096;

/// A secret that is easy to guess.
#[derive(Debug, thiserror::Error)]
#[error("the secret in {location} is too weak: {why}; use a longer one, or --weak to accept this one")]
pub struct WeakSecret {
    location: String,
    why: Weakness,
}

/// The measure of a weak secret.
#[derive(Debug)]
struct Weakness {
    counts: usize,
}

impl fmt::Display for Weakness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "it counts as {} characters (repetitions and runs as in 'abc' do not count, a digit counts half); at least {LEAST} are \
             required, and {ADVISED} are recommended",
            self.counts
        )
    }
}

/// Warns about a weak `secret`, or refuses it, unless `insisted`.
///
/// # Errors
/// [`WeakSecret`].
pub(super) fn demand(secret: &[u8], source: &SecretSource, insisted: bool) -> Result<(), WeakSecret> {
    let why = Weakness {
        counts: characters(secret),
    };
    let location = source.to_string();
    match why.counts {
        ..LEAST if !insisted => return Err(WeakSecret { location, why }),
        ..ADVISED => stderr::note(&format!("the secret in {location} is weak: {why}")),
        _ => {}
    }
    Ok(())
}

/// How many characters `secret` counts as.
fn characters(secret: &[u8]) -> usize {
    let is_text = is_text(secret);
    let secret = &secret[..secret.len().min(LOOKED_AT)];
    let worth = |byte: u8| match byte {
        _ if !is_text => 4,
        b'0'..=b'9' => 1,
        // The rest of a character of several bytes.
        0x80..0xc0 => 0,
        _ => 2,
    };
    let (mut halves, mut at) = (0, 0);
    while at < secret.len() && halves < 2 * ADVISED {
        let repeated = repeated(secret, at);
        if repeated >= 3 {
            at += repeated;
            continue;
        }
        if !continues_run(secret, at) {
            halves += worth(secret[at]);
        }
        at += 1;
    }
    halves / 2
}

/// How many bytes from `at` on are as they were somewhere before.
fn repeated(secret: &[u8], at: usize) -> usize {
    let same = |from: usize| {
        secret[from..]
            .iter()
            .zip(&secret[at..])
            .take_while(|(before, now)| before == now)
            .count()
    };
    (0..at).map(same).max().unwrap_or(0)
}

/// Whether the byte `at` continues the two before it, by the same step of one or zero.
fn continues_run(secret: &[u8], at: usize) -> bool {
    let [a, b, c] = match secret.get(at.wrapping_sub(2)..=at) {
        Some(&[a, b, c]) => [a, b, c].map(i16::from),
        _ => return false,
    };
    c - b == b - a && (-1..=1).contains(&(c - b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_counts_and_what_is_foreseen_does_not() {
        for (secret, counts) in [
            (&b""[..], 0),
            (b"hunter2", 6),
            (b"secret78", 7),
            (b"aaaaaaaaaaaaaaaaaaaaaaaa", 1),
            (b"abcdefghijklmnopqrstuvwxyz", 2),
            (b"98765432109876543210", 1),
            (b"19850317", 4),
            (b"passwordpasswordpassword", 8),
            (b"correct horse", 13),
            ("größer als gedacht".as_bytes(), 18),
            (b"correct horse battery staple", ADVISED),
            (&[0; 64], 2),
            (&[0x8f, 3, 0x51, 0xc2, 9, 0x77, 0xe0, 0x31, 0x90, 0xaa], ADVISED),
            (&[0x8f, 3, 0x51, 0xc2, 9], 10),
        ] {
            assert_eq!(characters(secret), counts, "{secret:?}");
        }
    }

    #[test]
    fn measuring_takes_no_time_whatever_is_measured() {
        let mut secret = vec![0; 8 << 20];
        for (i, byte) in secret.iter_mut().enumerate() {
            *byte = b"ab"[i / 1000 % 2];
        }
        assert!(characters(&secret) < LEAST);
    }
}

//! Sizes as people write and read them: in binary units, in upper or lower case.

use std::fmt;
use std::str::FromStr;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// What a size looks like.
#[derive(Debug, thiserror::Error)]
#[error("a size is a whole number of bytes, or of K, M, G or T for powers of 1024, as in '20G'")]
pub struct NotASize;

const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl FromStr for Size {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        let unit = UNITS
            .iter()
            .find(|(letter, _)| text.ends_with([*letter, letter.to_ascii_lowercase()]));
        let (digits, shift) = match unit {
            Some((_, shift)) => (&text[..text.len() - 1], *shift),
            None => (text, 0),
        };
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(NotASize);
        }
        let number: u64 = digits.parse().map_err(|_| NotASize)?;
        number.checked_mul(1 << shift).map(Self).ok_or(NotASize)
    }
}

/// In the largest unit that gives a whole number, else in bytes.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS
            .iter()
            .find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift)
        {
            Some((letter, shift)) => write!(f, "{} {letter}iB", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_binary_units() {
        let size = |text: &str| text.parse::<Size>().map(|size| size.0).ok();
        assert_eq!(size("4096"), Some(4096));
        assert_eq!(size("10G"), Some(10 << 30));
        assert_eq!(size("512k"), Some(512 << 10));
        assert_eq!(size("16777215T"), Some(16777215 << 40));
        for wrong in [
            "",
            "G",
            "-1",
            "+1",
            "1.5G",
            "10GB",
            "1 G",
            "16777216T",
            "99999999999999999999",
            "٣",
        ] {
            assert_eq!(size(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_are_shown_without_rounding() {
        assert_eq!(Size(10 << 30).to_string(), "10 GiB");
        assert_eq!(Size(1536 << 20).to_string(), "1536 MiB");
        assert_eq!(Size(513).to_string(), "513 bytes");
        assert_eq!(Size(0).to_string(), "0 bytes");
    }
}

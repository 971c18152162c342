//! Platform configuration registers: measurements of the booted software, in 24 registers of the SHA-256 bank.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tpm2_protocol::data::{TpmAlgId, TpmCc, TpmlDigest, TpmlPcrSelection, TpmsPcrSelect, TpmsPcrSelection};

use super::codec::marshalled;
use super::command::Command;
use super::{Tpm, TpmError, TpmFailure};
use crate::parsing::rule;

/// How many registers there are.
pub const COUNT: u8 = 24;

/// What a register holds.
pub type Value = [u8; 32];

/// Reads a register's value from 64 hexadecimal digits of either case; `None` if `digits` is anything else.
pub fn parse_value(digits: &str) -> Option<Value> {
    let mut value = Value::default();
    let len = base16ct::mixed::decode(digits, &mut value).ok()?.len();
    (len == value.len()).then_some(value)
}

/// Some of the registers, as in `0,2,4,7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Selection(u32);

/// What tells who has signed what was booted, and lasts through updates of it: register 7.
impl Default for Selection {
    fn default() -> Self {
        Self(1 << 7)
    }
}

/// A text that names no registers.
#[derive(Debug, thiserror::Error)]
#[error("{}", rule::REGISTERS)]
pub struct SelectionError;

impl Selection {
    /// All of them.
    pub const ALL: Self = Self((1 << COUNT) - 1);

    /// Their numbers, in order.
    pub fn registers(self) -> impl Iterator<Item = u8> {
        (0..COUNT).filter(move |register| self.0 & (1 << register) != 0)
    }

    /// Whether this register is one of them.
    pub fn contains(self, register: u8) -> bool {
        self.registers().any(|other| other == register)
    }

    /// Registers by the bits of a TPMS_PCR_SELECT, if there are such.
    pub(super) fn from_bits(select: &[u8]) -> Option<Self> {
        let mut bits = [0; 4];
        bits.get_mut(..select.len())?.copy_from_slice(select);
        let selection = Self(u32::from_le_bytes(bits));
        (selection.0 & !Self::ALL.0 == 0).then_some(selection)
    }

    /// TPML_PCR_SELECTION of these registers of the SHA-256 bank.
    pub(super) fn list(self) -> TpmlPcrSelection {
        let pcr_select = TpmsPcrSelect::try_from(&self.0.to_le_bytes()[..3]);
        let bank = TpmsPcrSelection {
            hash: TpmAlgId::Sha256,
            pcr_select: pcr_select.expect("it has room for more"),
        };
        let mut list = TpmlPcrSelection::new();
        list.try_push(bank).expect("it has room for more");
        list
    }

    /// The digest that stands for `values` of these registers, one for each.
    pub fn digest(self, values: &[Value; COUNT as usize]) -> [u8; 32] {
        let mut hash = Sha256::new();
        for register in self.registers() {
            hash.update(values[usize::from(register)]);
        }
        hash.finalize().into()
    }
}

impl FromStr for Selection {
    type Err = SelectionError;

    fn from_str(text: &str) -> Result<Self, SelectionError> {
        let mut registers = 0;
        for part in text.split(',') {
            match part.trim().parse::<u8>() {
                Ok(register) if register < COUNT => registers |= 1 << register,
                _ => return Err(SelectionError),
            }
        }
        Ok(Self(registers))
    }
}

impl TryFrom<String> for Selection {
    type Error = SelectionError;

    fn try_from(text: String) -> Result<Self, SelectionError> {
        text.parse()
    }
}

impl From<Selection> for String {
    fn from(selection: Selection) -> Self {
        selection.to_string()
    }
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, register) in self.registers().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            write!(f, "{comma}{register}")?;
        }
        Ok(())
    }
}

impl Tpm {
    /// What all registers of the SHA-256 bank hold.
    ///
    /// # Errors
    /// If the TPM has no such bank, or does not answer.
    pub fn read_pcrs(&mut self) -> Result<[Value; COUNT as usize], TpmError> {
        const NAME: &str = "TPM2_PCR_Read";
        let mut values = [Value::default(); COUNT as usize];
        let mut wanted = Selection::ALL;
        // A TPM answers with a few at a time.
        while wanted.0 != 0 {
            let command = Command::new(TpmCc::PcrRead, NAME).parameters(marshalled(&wanted.list()));
            let mut answer = self.run(command)?;
            let read = answer.read(|reader| {
                reader.u32()?;
                let (banks, digests): (TpmlPcrSelection, TpmlDigest) = (reader.get()?, reader.get()?);
                let [bank] = banks[..] else {
                    return None;
                };
                let read = Selection(Selection::from_bits(&bank.pcr_select)?.0 & wanted.0);
                if bank.hash != TpmAlgId::Sha256 || digests.len() != read.registers().count() {
                    return None;
                }
                for (register, digest) in read.registers().zip(&digests[..]) {
                    values[usize::from(register)] = digest[..].try_into().ok()?;
                }
                Some(read)
            });
            let read = read.map_err(|e| self.failed(e))?;
            if read.0 == 0 {
                return Err(self.failed(TpmFailure::Changed("it has no SHA-256 bank of registers")));
            }
            wanted.0 &= !read.0;
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_are_written_as_operators_write_them() {
        let selection: Selection = "7, 0,4,7".parse().unwrap();
        assert_eq!(selection.to_string(), "0,4,7");
        assert_eq!(
            marshalled(&selection.list()),
            [0, 0, 0, 1, 0, 0x0b, 3, 0x91, 0, 0]
        );
        for wrong in ["", "24", "a", "1,,2", "-1", "0-7"] {
            wrong.parse::<Selection>().unwrap_err();
        }
    }
}

//! Prints what opens a LUKS2 volume, and with a passphrase on standard input, opens it:
//!
//!     cargo run -p sealblk-luks2 --example luks2 -- DISK < PASSPHRASE_FILE

use std::error::Error;
use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;

use sealblk_luks2::metadata::Keyslot;
use sealblk_luks2::{HeaderFile, Locked};
use sealblk_secmem::arena::SecretBytes;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("luks2: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let disk = std::env::args_os()
        .nth(1)
        .ok_or("usage: luks2 DISK < PASSPHRASE_FILE")?;
    let file = HeaderFile::open(&PathBuf::from(disk), false)?;
    let locked = Locked::open(&file, None)?;
    println!("volume {}, a disk of {} bytes", locked.uuid(), locked.capacity());
    let metadata = locked.header().metadata();
    for (id, slot) in &metadata.keyslots {
        let kind = match slot {
            Keyslot::Luks2(slot) => slot.kdf.name(),
            Keyslot::Other(slot) => &slot.kind,
        };
        let mut tokens = metadata
            .tokens
            .values()
            .filter(|token| token.keyslots.contains(id));
        match tokens.next() {
            Some(token) => println!("keyslot {}: {kind}, for a token of type {}", id.0, token.kind),
            None => println!("keyslot {}: {kind}, for a passphrase", id.0),
        }
    }
    if io::stdin().is_terminal() {
        return Ok(());
    }
    let mut passphrase = Vec::new();
    io::stdin().read_to_end(&mut passphrase)?;
    if passphrase.last() == Some(&b'\n') {
        passphrase.pop();
    }
    let volume = locked.unlock_with_passphrase(&SecretBytes::take(&mut passphrase)?)?;
    println!("the passphrase opens keyslot {}", volume.keyslot());
    Ok(())
}

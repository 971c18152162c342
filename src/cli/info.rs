//! `sealblk info`: the content of a volume's header, read without a key. Its JSON form is documented in docs/info-json.md.

use std::path::PathBuf;

use clap::Args;

use super::failure::Failure;
use super::key::age_text;
use super::output;
use super::size::Size;
use super::text::{self, printable};
use crate::keys::binding::{
    CopiesInfo, Info as VolumeInfo, KdfInfo, KeyslotInfo, Purpose, SegmentInfo, TokenInfo,
};
use crate::storage::{Access, Backing};

/// Show the properties of a disk, and the keyslots that open it; needs no key
#[derive(Debug, Args)]
pub(super) struct Info {
    /// The disk's file or device; it can be in use
    disk: PathBuf,
    /// The file that holds the header, if it is detached
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// Print JSON with stable fields (docs/info-json.md)
    #[arg(long)]
    json: bool,
}

impl Info {
    pub(super) fn run(self) -> Result<(), Failure> {
        let disk = Backing::open(&self.disk, Access::Inspect)?;
        let info = match &self.header {
            Some(header) => VolumeInfo::read(&Backing::open(header, Access::Inspect)?, Some(&disk))?,
            None => VolumeInfo::read(&disk, None)?,
        };
        if self.json {
            output::print_json(&info)
        } else {
            output::print(&text(&self.disk.display().to_string(), &info))
        }
    }
}

fn text(disk: &str, info: &VolumeInfo) -> String {
    let mut rows: Vec<[String; 2]> = Vec::new();
    let mut row = |what: &str, value: String| rows.push([what.to_owned(), value]);
    row("disk", printable(disk));
    row("volume", format!("LUKS2 {}", info.uuid));
    if !info.label.is_empty() {
        row("label", printable(&info.label));
    }
    if !info.subsystem.is_empty() {
        row("subsystem", printable(&info.subsystem));
    }
    if let Some(capacity) = info.capacity {
        row("capacity", Size(capacity).to_string());
    }
    match &info.refusal {
        Some(refusal) => row("servable", format!("no: {}", printable(refusal))),
        None => row("servable", "yes".to_owned()),
    }
    let place = if info.detached_header {
        "detached"
    } else {
        "with the payload"
    };
    row(
        "header",
        format!(
            "{place}, {}, written {} times",
            Size(info.header_size),
            info.sequence
        ),
    );
    if let CopiesInfo::NeedsRepair { copy, damage } = &info.header {
        row("", format!("the {copy} copy is damaged: {}", printable(damage)));
        row(
            "",
            "sealblk repairs it when it next opens the volume for writing".to_owned(),
        );
    }
    for segment in &info.segments {
        row(&format!("segment {}", segment.segment), segment_text(segment));
    }
    for keyslot in &info.keyslots {
        row(&format!("keyslot {}", keyslot.keyslot), keyslot_text(keyslot));
    }
    for token in &info.tokens {
        row(&format!("token {}", token.token), token_text(token));
    }
    if let Some(attached) = &info.attached {
        row(
            "attached",
            format!(
                "by host {} since {} (attachment {})",
                printable(&attached.name),
                attached.since,
                attached.attachment
            ),
        );
    }
    if !info.flags.is_empty() {
        row("flags", printable(&info.flags.join(", ")));
    }
    if !info.requirements.is_empty() {
        row("requirements", printable(&info.requirements.join(", ")));
    }
    text::table(&rows)
}

fn segment_text(segment: &SegmentInfo) -> String {
    let mut parts = vec![printable(&segment.kind)];
    if let Some(encryption) = &segment.encryption {
        let bits = segment
            .key_bits
            .map(|bits| format!(" with {bits} key bits"))
            .unwrap_or_default();
        parts.push(printable(encryption) + &bits);
    }
    parts.extend(segment.sector_size.map(|size| format!("sectors of {size} bytes")));
    parts.extend(segment.offset.map(|offset| format!("from {}", Size(offset))));
    parts.push(
        segment
            .size
            .map_or("to the end".to_owned(), |size| format!("{} long", Size(size))),
    );
    parts.join(", ")
}

fn keyslot_text(keyslot: &KeyslotInfo) -> String {
    let purpose = match keyslot.purpose {
        Purpose::Provider => "opened by a key provider",
        Purpose::ForeignToken => "opened by another program's token",
        Purpose::Passphrase => "opened by a recovery key or passphrase",
        Purpose::Unbound => "opens no segment",
    };
    let mut text = purpose.to_owned();
    if let Some(kdf) = &keyslot.kdf {
        text = format!("{text}, {}", kdf_text(kdf));
    }
    if keyslot.priority != "normal" {
        text = format!("{text}, priority {}", keyslot.priority);
    }
    text
}

fn kdf_text(kdf: &KdfInfo) -> String {
    let mut text = printable(&kdf.kind);
    if let Some(hash) = &kdf.hash {
        text = format!("{text}-{}", printable(hash));
    }
    if let Some(iterations) = kdf.iterations {
        text = format!("{text}, {iterations} iterations");
    }
    if let (Some(time), Some(memory), Some(lanes)) = (kdf.time, kdf.memory_kib, kdf.lanes) {
        text = format!(
            "{text}, {time} passes over {}, {lanes} lanes",
            Size(u64::from(memory) << 10)
        );
    }
    text
}

fn token_text(token: &TokenInfo) -> String {
    let slots: Vec<_> = token.keyslots.iter().map(u32::to_string).collect();
    let opens = match slots.as_slice() {
        [] => "opens no keyslot".to_owned(),
        [slot] => format!("opens keyslot {slot}"),
        slots => format!("opens keyslots {}", slots.join(", ")),
    };
    match (&token.provider, &token.key_id, &token.broken) {
        (_, _, Some(why)) => format!("{opens}; broken: {}", printable(why)),
        (Some(provider), Some(key_id), _) => {
            let rekey = match token.replaces.is_empty() {
                true => "",
                false => "; the rekey that added it is unfinished: run `sealblk rekey` again",
            };
            let age = age_text(token.bound);
            format!(
                "{opens} by provider {}, key {}, age {age}{rekey}",
                printable(provider),
                printable(key_id)
            )
        }
        _ => format!("{opens}, of type {}", printable(&token.kind)),
    }
}

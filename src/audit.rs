//! The audit log: a line of JSON for each use of a key, each refusal and each failure, chained by hashes.
//!
//! Every record holds `prev`, the SHA-256 of the line before it, so that a line that was changed, removed or put in
//! shows. Who can write to the file can also write a new chain, or cut its end: keep the head that `sealblk audit verify`
//! prints somewhere else, or have the journal keep it.
//!
//! A record is on stable storage before what it tells of is done.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::control::events::Event;

/// The record behind a line that a crash has left by half.
const RECOVERED: &str = "LogRecovered";
/// What stands for the line before the first.
const NO_LINE: [u8; 32] = [0; 32];
/// The longest line: what comes from callers is bounded by the length of a message.
const MAX_LINE: u64 = 4 << 20;

/// The log of a running agent or broker.
#[derive(Debug)]
pub(crate) struct AuditLog {
    path: PathBuf,
    end: Mutex<End>,
}

#[derive(Debug)]
struct End {
    file: File,
    len: u64,
    records: u64,
    last: [u8; 32],
    /// Half a line is there that could not be taken back.
    poisoned: bool,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The file system.
    #[error("the audit log {} cannot be {action}", path.display())]
    Io {
        /// "opened", "written" …
        action: &'static str,
        /// The log.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// Another agent or broker writes it.
    #[error("another process writes the audit log {}; give each its own state directory", path.display())]
    InUse {
        /// The log.
        path: PathBuf,
    },
    /// It was tampered with, or is no audit log.
    #[error("{}: line {line} {what}", path.display())]
    Broken {
        /// The log.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The end is not what it was.
    #[error("{}: no line has the hash {head}: the log was cut, or this head is another log's", path.display())]
    HeadNotFound {
        /// The log.
        path: PathBuf,
        /// What was looked for.
        head: String,
    },
}

/// A log whose chain holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The number of its lines.
    pub records: u64,
    /// The hash of its last line, which tells it from any other.
    pub head: String,
}

impl AuditLog {
    /// Goes on with the log at `path`, or begins it. Its chain is verified first.
    pub(crate) fn open(path: &Path) -> Result<Self, AuditError> {
        let error = |action| {
            move |source| AuditError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(error("opened"))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| AuditError::InUse {
            path: path.to_owned(),
        })?;
        let chain = Chain::read(&file, path)?;
        let len = file.metadata().map_err(error("read"))?.len();
        let log = Self {
            path: path.to_owned(),
            end: Mutex::new(End {
                file,
                len,
                records: chain.lines,
                last: chain.last,
                poisoned: false,
            }),
        };
        if chain.torn || chain.crashed {
            // A crash in the middle of a line. It stays as it is, and the next record says so; its end and that record are
            // one write, and where that fails, they are written at the next start.
            let end = if chain.torn { &b"\n"[..] } else { b"" };
            log.append(end, RECOVERED, &json!({}))?;
        }
        Ok(log)
    }

    /// Adds a record. It is on stable storage when this returns.
    pub(crate) fn record(&self, event: Event, fields: &Value) -> Result<(), AuditError> {
        self.append(b"", &event.to_string(), fields)
    }

    fn append(&self, before: &[u8], event: &str, fields: &Value) -> Result<(), AuditError> {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |source| AuditError::Io {
            action: "written",
            path: self.path.clone(),
            source,
        };
        if end.poisoned {
            return Err(failed(io::Error::other(
                "an earlier record is there by half; start anew",
            )));
        }
        let mut record = Map::new();
        record.insert("seq".into(), (end.records + 1).into());
        let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        record.insert("time".into(), time.into());
        record.insert("event".into(), event.into());
        if let Value::Object(fields) = fields {
            record.extend(fields.clone());
        }
        record.insert("prev".into(), hex(&end.last).into());
        let record = Value::Object(record).to_string();
        let last = Sha256::digest(&record).into();
        let line = [before, record.as_bytes(), b"\n"].concat();
        let written = end.file.write_all(&line).and_then(|()| end.file.sync_data());
        if let Err(source) = written {
            // On a full disk half a line may be there, behind which no other must come.
            end.poisoned = end.file.set_len(end.len).is_err();
            return Err(failed(source));
        }
        end.len += line.len() as u64;
        (end.records, end.last) = (end.records + 1, last);
        Ok(())
    }
}

/// Reads the log at `path` and checks every link of its chain. With `head`, that line has to be there.
///
/// # Errors
/// [`AuditError`], with the first line that is not what was written.
pub fn verify(path: &Path, head: Option<&str>) -> Result<Verified, AuditError> {
    verify_each(path, head, |_| {})
}

/// The same, for who wants to see the records. What they say is worth something only if this does not fail.
///
/// # Errors
/// As for [`verify`].
pub fn verify_each(
    path: &Path,
    head: Option<&str>,
    mut see: impl FnMut(&Map<String, Value>),
) -> Result<Verified, AuditError> {
    let file = File::open(path).map_err(|source| AuditError::Io {
        action: "opened",
        path: path.to_owned(),
        source,
    })?;
    let mut found = head.is_none();
    let chain = Chain::walk(&file, path, |hash, record| {
        found |= head == Some(&hex(hash));
        record.into_iter().for_each(&mut see);
    })?;
    if chain.torn || chain.crashed {
        return Err(AuditError::Broken {
            path: path.to_owned(),
            line: chain.lines,
            what: "is there by half: its writer crashed while it wrote it, or the log was cut",
        });
    }
    match head {
        Some(head) if !found => Err(AuditError::HeadNotFound {
            path: path.to_owned(),
            head: head.to_owned(),
        }),
        _ => Ok(Verified {
            records: chain.lines,
            head: hex(&chain.last),
        }),
    }
}

/// What is known of a log after it was read.
struct Chain {
    lines: u64,
    last: [u8; 32],
    /// The last line has no end.
    torn: bool,
    /// It is no record.
    crashed: bool,
}

impl Chain {
    fn read(file: &File, path: &Path) -> Result<Self, AuditError> {
        Self::walk(file, path, |_, _| {})
    }

    fn walk(
        mut file: &File,
        path: &Path,
        mut seen: impl FnMut(&[u8; 32], Option<&Map<String, Value>>),
    ) -> Result<Self, AuditError> {
        let io_error = |source| AuditError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        };
        file.seek(SeekFrom::Start(0)).map_err(io_error)?;
        let mut reader = BufReader::new(file);
        let mut chain = Self {
            lines: 0,
            last: NO_LINE,
            torn: false,
            crashed: false,
        };
        // A line that is no record is what a crash left, if the next one says so.
        loop {
            let mut line = Vec::new();
            let mut bounded = (&mut reader).take(MAX_LINE);
            if bounded.read_until(b'\n', &mut line).map_err(io_error)? == 0 {
                break;
            }
            chain.lines += 1;
            let broken = |what| AuditError::Broken {
                path: path.to_owned(),
                line: chain.lines,
                what,
            };
            chain.torn = line.pop_if(|byte| *byte == b'\n').is_none();
            if chain.torn && line.len() as u64 == MAX_LINE {
                return Err(broken("is longer than any record"));
            }
            let record: Option<Map<String, Value>> = serde_json::from_slice(&line).ok();
            match &record {
                Some(record) => {
                    if record.get("prev") != Some(&hex(&chain.last).into()) {
                        return Err(broken(
                            "does not follow the one before it: one of them was changed, or lines are missing",
                        ));
                    }
                    if record.get("seq") != Some(&chain.lines.into()) {
                        return Err(broken("has not its number"));
                    }
                    if chain.crashed && record.get("event") != Some(&RECOVERED.into()) {
                        return Err(broken("follows one that is no record"));
                    }
                }
                None if chain.crashed => return Err(broken("is no record, and follows one that is none")),
                None => {}
            }
            chain.crashed = record.is_none();
            chain.last = Sha256::digest(&line).into();
            seen(&chain.last, record.as_ref());
        }
        Ok(chain)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn log_of(dir: &tempfile::TempDir, records: u64) -> PathBuf {
        let path = dir.path().join("audit.log");
        let log = AuditLog::open(&path).unwrap();
        for n in 0..records {
            log.record(Event::KeyReleased, &json!({"n": n, "text": "a \"quoted\" text"}))
                .unwrap();
        }
        path
    }

    #[test]
    fn a_log_goes_on_where_it_was_and_verifies() {
        let dir = tempfile::tempdir().unwrap();
        let path = log_of(&dir, 3);
        let before = verify(&path, None).unwrap();
        assert_eq!(before.records, 3);
        log_of(&dir, 2);
        let after = verify(&path, Some(&before.head)).unwrap();
        assert_eq!(after.records, 5);
        assert_ne!(after.head, before.head);
        let elsewhere = "0".repeat(64);
        assert!(matches!(
            verify(&path, Some(&elsewhere)),
            Err(AuditError::HeadNotFound { .. })
        ));
    }

    #[test]
    fn every_changed_byte_and_every_missing_line_shows() {
        let dir = tempfile::tempdir().unwrap();
        let path = log_of(&dir, 4);
        let whole = fs::read(&path).unwrap();
        let head = verify(&path, None).unwrap().head;
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            assert!(verify(&path, Some(&head)).is_err(), "byte {at}");
        }
        let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
        for missing in 0..lines.len() {
            let mut kept = lines.clone();
            kept.remove(missing);
            fs::write(&path, kept.concat()).unwrap();
            assert!(verify(&path, Some(&head)).is_err(), "line {missing}");
        }
    }

    #[test]
    fn a_line_that_a_crash_has_torn_stays_and_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = log_of(&dir, 2);
        let whole = fs::read(&path).unwrap();
        for cut in 1..80 {
            fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            assert!(
                matches!(verify(&path, None), Err(AuditError::Broken { line: 2, .. })),
                "{cut}"
            );
            log_of(&dir, 1);
            assert_eq!(verify(&path, None).unwrap().records, 4, "{cut}");

            // And where a recovery came no further than the end of that line.
            fs::write(&path, [&whole[..whole.len() - cut], b"\n"].concat()).unwrap();
            if cut > 1 {
                assert!(verify(&path, None).is_err(), "{cut}");
                log_of(&dir, 1);
                assert_eq!(verify(&path, None).unwrap().records, 4, "{cut}");
            }
        }
    }

    #[test]
    fn a_log_that_was_tampered_with_is_not_gone_on_with_and_has_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = log_of(&dir, 2);
        let log = AuditLog::open(&path).unwrap();
        assert!(matches!(AuditLog::open(&path), Err(AuditError::InUse { .. })));
        drop(log);
        let text = fs::read_to_string(&path)
            .unwrap()
            .replacen("KeyReleased", "KeyDestroyed", 1);
        fs::write(&path, text).unwrap();
        assert!(matches!(
            AuditLog::open(&path),
            Err(AuditError::Broken { line: 2, .. })
        ));
    }
}

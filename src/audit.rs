//! The audit log: a line of JSON for each use of a key, each refusal and each failure, chained by hashes.
//!
//! Every record holds `prev`, the SHA-256 of the line before it, so that a line that was changed, removed or put in
//! shows. Who can write to the file can also write a new chain, or cut its end: keep the head that `sealblk audit verify`
//! prints somewhere else, or have the journal keep it.
//!
//! A record is on stable storage before what it tells of is done.
//!
//! Several processes may write a log, as a broker and the verbs that change what it knows: each takes the file's lock for a
//! record, and goes on from what the others have written meanwhile, whose links it checks.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::control::events::Event;

/// The record behind a line that a crash has left by half.
const RECOVERED: &str = "LogRecovered";
/// The longest line: what comes from callers is bounded by the length of a message.
const MAX_LINE: u64 = 4 << 20;

/// A log that is written.
#[derive(Debug)]
pub(crate) struct AuditLog {
    path: PathBuf,
    end: Mutex<End>,
}

#[derive(Debug)]
struct End {
    file: File,
    /// What is known of the first so many bytes.
    len: u64,
    chain: Chain,
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
        let end = End {
            file,
            len: 0,
            chain: Chain::default(),
        };
        let log = Self {
            path: path.to_owned(),
            end: Mutex::new(end),
        };
        log.locked(|_| Ok(()))?;
        Ok(log)
    }

    /// Adds a record. It is on stable storage when this returns.
    pub(crate) fn record(&self, event: Event, fields: &Value) -> Result<(), AuditError> {
        self.locked(|end| self.append(end, &event.to_string(), fields))
    }

    /// Does `work` at the end of the log, which no other process changes meanwhile.
    fn locked<T>(&self, work: impl FnOnce(&mut End) -> Result<T, AuditError>) -> Result<T, AuditError> {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match flock(&end.file, FlockOperation::LockExclusive) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.failed("locked")(error.into())),
                Ok(()) => break,
            }
        }
        let done = self.catch_up(&mut end).and_then(|()| work(&mut end));
        // It goes with the descriptor at the latest.
        let _ = flock(&end.file, FlockOperation::Unlock);
        done
    }

    /// Reads what others have written, and mends what one of them has left by half.
    fn catch_up(&self, end: &mut End) -> Result<(), AuditError> {
        let len = end.file.metadata().map_err(self.failed("read"))?.len();
        if len < end.len {
            return Err(AuditError::Broken {
                path: self.path.clone(),
                line: end.chain.lines,
                what: "and perhaps others are gone: the log was cut while it was written",
            });
        }
        if len > end.len {
            // What was read stays known, should this fail.
            let mut chain = end.chain.clone();
            chain.walk(&end.file, end.len, &self.path, |_, _| {})?;
            (end.chain, end.len) = (chain, len);
        }
        if end.chain.torn || end.chain.crashed {
            // A crash in the middle of a line. It stays as it is, and the next record says so.
            self.append(end, RECOVERED, &json!({}))?;
        }
        Ok(())
    }

    fn append(&self, end: &mut End, event: &str, fields: &Value) -> Result<(), AuditError> {
        let mut record = Map::new();
        let seq = end.chain.lines + 1;
        record.insert("seq".into(), seq.into());
        let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        record.insert("time".into(), time.into());
        record.insert("event".into(), event.into());
        if let Value::Object(fields) = fields {
            record.extend(fields.clone());
        }
        record.insert("prev".into(), hex(&end.chain.last).into());
        let record = Value::Object(record).to_string();
        let last = Sha256::digest(&record).into();
        // The end of a torn line is one write with the record behind it.
        let before = if end.chain.torn { &b"\n"[..] } else { b"" };
        let line = [before, record.as_bytes(), b"\n"].concat();
        let written = end.file.write_all(&line).and_then(|()| end.file.sync_data());
        if let Err(source) = written {
            // On a full disk half a line may be there. If it stays, it is found by who comes next.
            let _ = end.file.set_len(end.len);
            return Err(self.failed("written")(source));
        }
        end.len += line.len() as u64;
        end.chain = Chain {
            lines: seq,
            last,
            torn: false,
            crashed: false,
        };
        Ok(())
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> AuditError {
        let path = self.path.clone();
        move |source| AuditError::Io { action, path, source }
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
    // A record that is being written is not there by half.
    let _ = flock(&file, FlockOperation::LockShared);
    let mut found = head.is_none();
    let mut chain = Chain::default();
    chain.walk(&file, 0, path, |hash, record| {
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

/// What is known of a log that was read up to here.
#[derive(Clone, Debug, Default)]
struct Chain {
    lines: u64,
    /// The hash of the last line; zeros before the first.
    last: [u8; 32],
    /// The last line has no end.
    torn: bool,
    /// It is no record.
    crashed: bool,
}

impl Chain {
    /// Reads on from the byte `at`.
    fn walk(
        &mut self,
        mut file: &File,
        at: u64,
        path: &Path,
        mut seen: impl FnMut(&[u8; 32], Option<&Map<String, Value>>),
    ) -> Result<(), AuditError> {
        let io_error = |source| AuditError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        };
        file.seek(SeekFrom::Start(at)).map_err(io_error)?;
        let mut reader = BufReader::new(file);
        // A line that is no record is what a crash left, if the next one says so.
        loop {
            let mut line = Vec::new();
            let mut bounded = (&mut reader).take(MAX_LINE);
            if bounded.read_until(b'\n', &mut line).map_err(io_error)? == 0 {
                break;
            }
            self.lines += 1;
            let broken = |what| AuditError::Broken {
                path: path.to_owned(),
                line: self.lines,
                what,
            };
            self.torn = line.pop_if(|byte| *byte == b'\n').is_none();
            if self.torn && line.len() as u64 == MAX_LINE {
                return Err(broken("is longer than any record"));
            }
            let record: Option<Map<String, Value>> = serde_json::from_slice(&line).ok();
            match &record {
                Some(record) => {
                    if record.get("prev") != Some(&hex(&self.last).into()) {
                        return Err(broken(
                            "does not follow the one before it: one of them was changed, or lines are missing",
                        ));
                    }
                    if record.get("seq") != Some(&self.lines.into()) {
                        return Err(broken("has not its number"));
                    }
                    if self.crashed && record.get("event") != Some(&RECOVERED.into()) {
                        return Err(broken("follows one that is no record"));
                    }
                }
                None if self.crashed => return Err(broken("is no record, and follows one that is none")),
                None => {}
            }
            self.crashed = record.is_none();
            self.last = Sha256::digest(&line).into();
            seen(&self.last, record.as_ref());
        }
        Ok(())
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
    fn a_log_that_was_tampered_with_is_not_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = log_of(&dir, 2);
        let text = fs::read_to_string(&path)
            .unwrap()
            .replacen("KeyReleased", "KeyDestroyed", 1);
        fs::write(&path, text).unwrap();
        assert!(matches!(
            AuditLog::open(&path),
            Err(AuditError::Broken { line: 2, .. })
        ));
    }

    fn note(log: &AuditLog, n: u64) -> Result<(), AuditError> {
        log.record(Event::HostEnrolled, &json!({ "n": n }))
    }

    #[test]
    fn several_write_one_log_and_each_sees_what_another_did_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = log_of(&dir, 1);
        let logs = [(); 4].map(|()| AuditLog::open(&path).unwrap());
        std::thread::scope(|scope| {
            for log in &logs {
                scope.spawn(move || (0..50).for_each(|n| note(log, n).unwrap()));
            }
        });
        assert_eq!(verify(&path, None).unwrap().records, 201);

        // One of them is killed in the middle of a line.
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"seq\":202,").unwrap();
        note(&logs[0], 1).unwrap();
        note(&logs[1], 1).unwrap();
        assert_eq!(verify(&path, None).unwrap().records, 205);

        // And what is no record of the chain is not gone on with.
        file.write_all(b"{\"seq\":206,\"prev\":\"00\"}\n").unwrap();
        for log in &logs {
            assert!(matches!(note(log, 2), Err(AuditError::Broken { line: 206, .. })));
        }
        file.set_len(100).unwrap();
        assert!(matches!(note(&logs[2], 2), Err(AuditError::Broken { .. })));
    }
}

//! The audit log: a line of JSON for each use of a key, each refusal and each failure, chained by hashes.
//!
//! Every record holds `prev`, the SHA-256 of the previous line, so that a changed, removed or inserted line is
//! detected. A user with write access to the file can also write a new chain, or cut off its end: keep the head that
//! `sealblk audit verify` prints elsewhere, or let the journal keep it.
//!
//! A record is on stable storage before its action is done.
//!
//! Several processes can write a log, for instance a broker and the verbs that change its state: each takes the file's lock
//! for a record, checks the links of records that other processes have added, and continues after them.
//!
//! A crash in the middle of a line leaves a truncated line, which proves nothing about the lines before it. So the next
//! record, `LogRecovered`, has the hash of the last complete record in `prev`, and the hash of the truncated line in `torn`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use base16ct::lower;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sealblk_base::blame::Blame;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::control::events::Event;
use crate::error_chain::remedy;
use crate::parsing;
use sealblk_secmem::private_file;

/// The record behind what a crash has left by half.
const RECOVERED: &str = "LogRecovered";
/// How many lines one after the other may be no records: a crash may come again while the record of it is written.
const MAX_TORN: u32 = 16;
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
    known: Known,
}

/// The part of a log that was read, or written: it ends with a whole record.
#[derive(Clone, Debug, Default)]
struct Known {
    /// In bytes.
    len: u64,
    chain: Chain,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The file system.
    #[error("the audit log {} cannot be {action}{}", path.display(), remedy(source))]
    Io {
        /// "opened", "written" …
        action: &'static str,
        /// The log.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// There is none.
    #[error(
        "{}: this audit log does not exist: `sealblk agent`, `sealblk erase` and `sealblk broker` write one in their state \
         directory; give that directory with --state-dir, or name the log itself",
        path.display()
    )]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// It was tampered with, or is no audit log.
    #[error(
        "{}: line {line} {what}; move the file away for the investigation, so that its writer begins a new log",
        path.display()
    )]
    Broken {
        /// The log.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// What is written is not what is read.
    #[error(
        "{}: the log was moved or removed while it was in use; put it back, or first end its writer (the agent, the broker)",
        path.display()
    )]
    Moved {
        /// Where it was.
        path: PathBuf,
    },
    /// The end is not what it was.
    #[error("{}: no line has the hash {head}: the log was truncated, or this head belongs to another log; keep the file for the investigation", path.display())]
    HeadNotFound {
        /// The log.
        path: PathBuf,
        /// What was looked for.
        head: String,
    },
}

impl AuditError {
    /// Where the cause lies.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Io { .. } | Self::Missing { .. } => Blame::Storage,
            Self::Broken { .. } | Self::Moved { .. } | Self::HeadNotFound { .. } => Blame::Content,
        }
    }
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
        // It is there after a crash of the host, too.
        private_file::sync_dir_of(path).map_err(error("opened"))?;
        // A long log is read while others may write; what they add is little, and is read under the lock.
        let len = settled_len(&file).map_err(error("read"))?;
        let mut known = Known::default();
        known.read_on(&file, len, path, |_, _| {})?;
        let known = match known.chain.is_whole() {
            true => known,
            false => Known::default(),
        };
        let log = Self {
            path: path.to_owned(),
            end: Mutex::new(End { file, known }),
        };
        log.locked(|_| Ok(()))?;
        Ok(log)
    }

    /// Adds a record. It is on stable storage when this returns.
    pub(crate) fn record(&self, event: Event, fields: &Value) -> Result<(), AuditError> {
        self.locked(|end| self.append(&mut end.file, &mut end.known, &event.to_string(), fields))
    }

    /// Does `work` at the end of the log, which no other process changes meanwhile.
    fn locked<T>(&self, work: impl FnOnce(&mut End) -> Result<T, AuditError>) -> Result<T, AuditError> {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        claim(&end.file).map_err(|error| self.failed("locked")(error.into()))?;
        let done = self
            .is_in_place(&end.file)
            .and_then(|()| self.catch_up(&mut end))
            .and_then(|()| work(&mut end));
        // It goes with the descriptor at the latest.
        let _ = flock(&end.file, FlockOperation::Unlock);
        done
    }

    /// A record in a file that has lost its name would be read by nobody.
    fn is_in_place(&self, file: &File) -> Result<(), AuditError> {
        let ours = file.metadata().map_err(self.failed("read"))?;
        match fs::metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => Ok(()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed("read")(error)),
            _ => Err(AuditError::Moved {
                path: self.path.clone(),
            }),
        }
    }

    /// Reads what others have written, and mends what one of them has left by half.
    fn catch_up(&self, end: &mut End) -> Result<(), AuditError> {
        let len = end.file.metadata().map_err(self.failed("read"))?.len();
        if len < end.known.len {
            return Err(AuditError::Broken {
                path: self.path.clone(),
                line: end.known.chain.lines,
                what: "and perhaps more lines are missing: the log was truncated while it was in use",
            });
        }
        // What was known stays so, should this fail.
        let mut known = end.known.clone();
        known.read_on(&end.file, len, &self.path, |_, _| {})?;
        if !known.chain.is_whole() {
            // A crash in the middle of a line. It stays as it is, and the next record says so.
            self.append(&mut end.file, &mut known, RECOVERED, &json!({}))?;
        }
        end.known = known;
        Ok(())
    }

    fn append(
        &self,
        file: &mut File,
        known: &mut Known,
        event: &str,
        fields: &Value,
    ) -> Result<(), AuditError> {
        let chain = &known.chain;
        // The end of a torn line is one write with the record behind it.
        let before = if chain.open { &b"\n"[..] } else { b"" };
        let mut record = Map::new();
        let seq = chain.lines + 1;
        record.insert("seq".into(), seq.into());
        let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        record.insert("time".into(), time.into());
        record.insert("event".into(), event.into());
        if let Value::Object(fields) = fields {
            record.extend(fields.clone());
        }
        if event == RECOVERED {
            let mut torn = chain.torn.clone();
            if chain.torn_lines > 0 {
                torn.update(before);
            }
            record.insert("torn".into(), lower::encode_string(&torn.finalize()).into());
        }
        record.insert("prev".into(), lower::encode_string(&chain.last).into());
        let record = Value::Object(record).to_string();
        let last = Sha256::digest(&record).into();
        let line = [before, record.as_bytes(), b"\n"].concat();
        let written = file.write_all(&line).and_then(|()| file.sync_data());
        if let Err(source) = written {
            // On a full disk half a line may be there. If it stays, it is found by who comes next.
            let _ = file.set_len(known.len);
            return Err(self.failed("written")(source));
        }
        known.len += line.len() as u64;
        known.chain = Chain {
            lines: seq,
            last,
            ..Chain::default()
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
    let file = File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => AuditError::Missing {
            path: path.to_owned(),
        },
        _ => AuditError::Io {
            action: "opened",
            path: path.to_owned(),
            source,
        },
    })?;
    let len = settled_len(&file).map_err(|source| AuditError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    let mut found = head.is_none();
    let mut known = Known::default();
    known.read_on(&file, len, path, |hash, record| {
        found |= head == Some(&lower::encode_string(hash));
        see(record);
    })?;
    let chain = known.chain;
    if !chain.is_whole() {
        return Err(AuditError::Broken {
            path: path.to_owned(),
            line: chain.lines,
            what: "is truncated: its writer crashed during the write, or the log was truncated",
        });
    }
    match head {
        Some(head) if !found => Err(AuditError::HeadNotFound {
            path: path.to_owned(),
            head: head.to_owned(),
        }),
        _ => Ok(Verified {
            records: chain.lines,
            head: lower::encode_string(&chain.last),
        }),
    }
}

/// How long the log is while no record is being written: so much of it does not change any more. Nobody has to wait while it is
/// read.
fn settled_len(file: &File) -> io::Result<u64> {
    // A copy may lie where there are no locks, or be locked by who has made it, and nobody writes it.
    for _ in 0..WRITES {
        match flock(file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::AGAIN | Errno::INTR) => thread::sleep(WRITE),
            Ok(()) | Err(_) => break,
        }
    }
    let len = file.metadata().map(|metadata| metadata.len());
    let _ = flock(file, FlockOperation::Unlock);
    len
}

/// How long a record takes to be written, with the sync of a slow disk; and how many are waited for.
const WRITE: Duration = Duration::from_millis(10);
const WRITES: u32 = 200;

/// Waits for the file's lock, behind those who came before. All who take it have it for a moment.
fn claim(file: &File) -> rustix::io::Result<()> {
    rustix::io::retry_on_intr(|| flock(file, FlockOperation::LockExclusive))
}

/// A chain, up to somewhere in a log.
#[derive(Clone, Debug, Default)]
struct Chain {
    lines: u64,
    /// The hash of the last record; zeros before the first.
    last: [u8; 32],
    /// What follows it and is no record: its hash, and how many lines it is.
    torn: Sha256,
    torn_lines: u32,
    /// The last line has no end.
    open: bool,
}

impl Chain {
    /// Whether it ends with a whole record.
    fn is_whole(&self) -> bool {
        self.torn_lines == 0 && !self.open
    }

    /// Goes on by a line, with the end that it may have; gives what it is, if it is a record.
    fn follow(&mut self, line: &[u8]) -> Result<Option<Map<String, Value>>, &'static str> {
        self.lines += 1;
        let text = line.strip_suffix(b"\n");
        self.open = text.is_none();
        let text = text.unwrap_or(line);
        if self.open && line.len() as u64 == MAX_LINE {
            return Err("is longer than any record");
        }
        let Ok(record) = parsing::json::<Map<String, Value>>(text) else {
            // What a crash left, if the next record says so.
            self.torn.update(line);
            self.torn_lines += 1;
            return match self.torn_lines {
                ..=MAX_TORN => Ok(None),
                _ => Err("is not a record, like many lines before it: this is not an audit log"),
            };
        };
        let is = |name: &str, value: Value| record.get(name) == Some(&value);
        if !is("prev", lower::encode_string(&self.last).into()) {
            return Err("does not follow the previous line: one of them was changed, or lines are missing");
        }
        if !is("seq", self.lines.into()) {
            return Err("has the wrong number");
        }
        let recovers = is("event", RECOVERED.into());
        if recovers && !is("torn", lower::encode_string(&self.torn.clone().finalize()).into()) {
            return Err("has the hash of another truncated line than the one before it");
        }
        if self.torn_lines > 0 && !recovers {
            return Err("follows a line that is not a record");
        }
        self.last = Sha256::digest(text).into();
        (self.torn, self.torn_lines) = (Sha256::new(), 0);
        Ok(Some(record))
    }
}

impl Known {
    /// Reads on, up to the byte `len`; shows each record, and its hash.
    fn read_on(
        &mut self,
        mut file: &File,
        len: u64,
        path: &Path,
        mut see: impl FnMut(&[u8; 32], &Map<String, Value>),
    ) -> Result<(), AuditError> {
        let io_error = |source| AuditError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        };
        file.seek(SeekFrom::Start(self.len)).map_err(io_error)?;
        let mut reader = BufReader::new(file.take(len.saturating_sub(self.len)));
        let mut line = Vec::new();
        loop {
            line.clear();
            let mut bounded = (&mut reader).take(MAX_LINE);
            let read = bounded.read_until(b'\n', &mut line).map_err(io_error)?;
            if read == 0 {
                return Ok(());
            }
            self.len += read as u64;
            let followed = self.chain.follow(&line).map_err(|what| AuditError::Broken {
                path: path.to_owned(),
                line: self.chain.lines,
                what,
            })?;
            if let Some(record) = followed {
                see(&self.chain.last, &record);
            }
        }
    }
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

    /// Whoever had made the copy could have kept who verified it waiting for ever.
    #[test]
    fn a_copy_that_somebody_keeps_locked_is_verified() {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("copy");
        fs::copy(log_of(&dir, 3), &copy).unwrap();
        let keeper = File::open(&copy).unwrap();
        flock(&keeper, FlockOperation::LockExclusive).unwrap();
        assert_eq!(verify(&copy, None).unwrap().records, 3);
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
            let recovered = fs::read(&path).unwrap();

            // And where a recovery came no further than the end of that line, or into its own.
            fs::write(&path, [&whole[..whole.len() - cut], b"\n"].concat()).unwrap();
            if cut > 1 {
                assert!(verify(&path, None).is_err(), "{cut}");
                log_of(&dir, 1);
                assert_eq!(verify(&path, None).unwrap().records, 4, "{cut}");
                fs::write(&path, &recovered[..whole.len() - cut + 1 + cut]).unwrap();
                assert!(verify(&path, None).is_err(), "{cut}");
                log_of(&dir, 1);
                assert_eq!(verify(&path, None).unwrap().records, 5, "{cut}");
            }
        }
    }

    /// The records before a torn line hang on those behind it by nothing but what the next one tells.
    #[test]
    fn what_was_before_a_crash_cannot_be_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = log_of(&dir, 3);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 20]).unwrap();
        log_of(&dir, 1);
        let whole = fs::read(&path).unwrap();
        let head = verify(&path, None).unwrap().head;
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            assert!(verify(&path, Some(&head)).is_err(), "byte {at}");
        }
        let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
        fs::remove_file(&path).unwrap();
        let forged = AuditLog::open(&path).unwrap();
        (7..9).for_each(|n| note(&forged, n).unwrap());
        let forged = fs::read(&path).unwrap();
        assert_eq!(forged.iter().filter(|byte| **byte == b'\n').count(), 2);
        fs::write(&path, [&forged, &lines[2..].concat()[..]].concat()).unwrap();
        assert!(matches!(
            verify(&path, Some(&head)),
            Err(AuditError::Broken { line: 4, .. })
        ));
    }

    #[test]
    fn what_is_no_audit_log_is_not_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        fs::write(&path, "a line\n".repeat(100)).unwrap();
        assert!(matches!(AuditLog::open(&path), Err(AuditError::Broken { .. })));
    }

    #[test]
    fn a_log_that_is_somewhere_else_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let log = AuditLog::open(&path).unwrap();
        note(&log, 1).unwrap();
        let moved = dir.path().join("audit.log.1");
        fs::rename(&path, &moved).unwrap();
        assert!(matches!(note(&log, 2), Err(AuditError::Moved { .. })));
        // Nor is it where another has begun one.
        note(&AuditLog::open(&path).unwrap(), 3).unwrap();
        assert!(matches!(note(&log, 4), Err(AuditError::Moved { .. })));
        fs::rename(&moved, &path).unwrap();
        note(&log, 5).unwrap();
        assert_eq!(verify(&path, None).unwrap().records, 2);
    }

    /// Who only reads holds up nobody.
    #[test]
    fn a_log_is_written_while_it_is_verified() {
        let dir = tempfile::tempdir().unwrap();
        let path = log_of(&dir, 1);
        let log = AuditLog::open(&path).unwrap();
        let mut seen = 0;
        let verified = verify_each(&path, None, |_| {
            seen += 1;
            note(&log, seen).unwrap();
        });
        assert_eq!((seen, verified.unwrap().records), (1, 1));
        assert_eq!(verify(&path, None).unwrap().records, 2);
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

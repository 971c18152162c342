//! A table of mistakes: what an operator does wrong, and the whole of what sealblk says to that.
//!
//! The expected answers are in `tests/mistakes/SECTION.txt`, word for word; a run with `SEALBLK_BLESS=1` writes them anew. What
//! differs from run to run is shown by a name in capitals. A text has to say what failed, where, and what to do: read it before
//! it is put there.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::DEADLINE;
use super::serve::sealblk_path;
use tempfile::TempDir;

/// The mistakes of one section, made in a directory of their own.
#[derive(Debug)]
pub struct Mistakes {
    section: &'static str,
    dir: TempDir,
    /// What the environment of each command has.
    env: Vec<(String, String)>,
    /// What stands for what differs from run to run, the longest first.
    names: Vec<(String, String)>,
    rows: Vec<Row>,
    /// Rows that cannot be tried here.
    skipped: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    /// The command line, with who types it.
    done: String,
    said: String,
}

/// A user whom no host has.
pub const STRANGER: u32 = 4_200_042;

impl Mistakes {
    pub fn of(section: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut mistakes = Self {
            section,
            env: vec![("SEALBLK_STATE_DIR".into(), "state".into())],
            names: Vec::new(),
            rows: Vec::new(),
            skipped: Vec::new(),
            dir,
        };
        let place = mistakes.dir.path().display().to_string();
        mistakes.name(&place, "DIR");
        mistakes
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    /// Shows `text` by a name.
    pub fn name(&mut self, text: &str, name: &str) {
        self.names.push((text.to_owned(), name.to_owned()));
        self.names.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
    }

    /// Sets a variable for the commands that come.
    pub fn env(&mut self, name: &str, value: Option<&str>) {
        self.env.retain(|(other, _)| other != name);
        self.env
            .extend(value.map(|value| (name.to_owned(), value.to_owned())));
    }

    /// A command line, in words, some of them in single quotes; `sealblk` is the real one.
    pub fn command(&self, line: &str) -> Command {
        let words = words(line);
        let mut command = match words[0].as_str() {
            "sealblk" => Command::new(sealblk_path()),
            other => Command::new(other),
        };
        command.args(&words[1..]);
        // Also for who runs it from a shell.
        let dir = Path::new(sealblk_path()).parent().unwrap().display();
        command.env("PATH", format!("{dir}:{}", std::env::var("PATH").unwrap()));
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        for name in [
            "SEALBLK_LOG",
            "SEALBLK_CONFIG",
            "CREDENTIALS_DIRECTORY",
            "COLUMNS",
            "NO_COLOR",
        ] {
            command.env_remove(name);
        }
        command.env_remove("SEALBLK_STATE_DIR");
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs what is no mistake, and gives what it printed.
    #[track_caller]
    pub fn does(&self, line: &str) -> String {
        let output = self.command(line).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Makes a mistake.
    #[track_caller]
    pub fn mistake(&mut self, line: &str) {
        let command = self.command(line);
        self.run(format!("$ {line}"), command);
    }

    /// Makes one as a user who owns nothing; not here, if this is no root.
    #[track_caller]
    pub fn stranger(&mut self, line: &str) {
        let done = format!("stranger$ {line}");
        if !rustix::process::geteuid().is_root() {
            return self.skip(&done);
        }
        let mut command = self.command(line);
        command.uid(STRANGER).gid(STRANGER);
        self.run(done, command);
    }

    #[track_caller]
    fn run(&mut self, done: String, mut command: Command) {
        // What is said fits into the pipes.
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{done}: {error}"));
        let start = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if start.elapsed() > DEADLINE {
                child.kill().unwrap();
                panic!("{done}: it goes on: {:?}", child.wait_with_output());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success(), "{done}: it was none");
        let code = output
            .status
            .code()
            .unwrap_or_else(|| panic!("{done}: {output:?}"));
        let stderr = String::from_utf8(output.stderr).unwrap();
        self.add(&done, &format!("{stderr}exit code {code}\n"));
    }

    /// Adds what was said elsewhere, as in a log.
    #[track_caller]
    pub fn add(&mut self, done: &str, said: &str) {
        let (done, said) = (self.show(done), self.show(said));
        assert!(!said.contains("panicked"), "{done}: {said}");
        self.rows.push(Row { done, said });
    }

    /// What cannot be tried here stays as it is.
    pub fn skip(&mut self, done: &str) {
        eprintln!("skipped: {done}");
        self.skipped.push(self.show(done));
    }

    /// As it is on each run.
    fn show(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (real, name) in &self.names {
            text = text.replace(real, name);
        }
        text = times_named(&wrapped_named(&uuids_named(&text)));
        text.lines()
            .filter_map(|line| match line.split_once("Z ") {
                // A record of the log. What goes well is no part of it, nor what depends on where the test runs.
                Some((time, record)) if time.len() > 20 && time.starts_with("20") => {
                    let told = !record.contains(" INFO ") && !record.contains("direct I/O");
                    told.then(|| format!("TIME {record}\n"))
                }
                _ => Some(format!("{line}\n")),
            })
            .collect::<String>()
            .trim_end()
            .to_owned()
    }

    /// Compares with what is expected.
    pub fn check(self) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../mistakes")
            .join(format!("{}.txt", self.section));
        let expected = parse(&fs::read_to_string(&path).unwrap_or_default());
        let twice: Vec<_> = self.rows.iter().map(|row| &row.done).collect();
        let mut once = twice.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), twice.len(), "a mistake is made twice: {twice:?}");
        if std::env::var_os("SEALBLK_BLESS").is_some() {
            assert_eq!(
                self.skipped, [""; 0],
                "where not all can be tried, nothing can be blessed"
            );
            let text: Vec<_> = self
                .rows
                .iter()
                .map(|row| format!("{}\n\n{}\n", row.done, indented(&row.said)))
                .collect();
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text.join("\n")).unwrap();
            return;
        }
        let mut expected: BTreeMap<_, _> = expected.into_iter().map(|row| (row.done, row.said)).collect();
        let mut differ = String::new();
        for Row { done, said } in self.rows {
            match expected.remove(&done) {
                Some(wanted) if wanted == said => {}
                Some(wanted) => differ += &format!("{done}\nexpected:\n{wanted}\nsaid:\n{said}\n\n"),
                None => differ += &format!("{done}\nis not in the table; said:\n{said}\n\n"),
            }
        }
        for done in expected.keys().filter(|done| !self.skipped.contains(done)) {
            differ += &format!("{done}\nis in the table, and was not tried\n\n");
        }
        assert!(
            differ.is_empty(),
            "{}:\n{differ}read what differs, then run with SEALBLK_BLESS=1",
            path.display()
        );
    }
}

fn indented(text: &str) -> String {
    text.lines()
        .map(|line| match line {
            "" => "\n".to_owned(),
            line => format!("    {line}\n"),
        })
        .collect::<String>()
        .trim_end()
        .to_owned()
}

/// The rows of a table.
fn parse(text: &str) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix("    "), rows.last_mut()) {
            (Some(said), Some(row)) => row.said += &format!("{said}\n"),
            (None, Some(row)) if line.is_empty() && !row.said.is_empty() => row.said += "\n",
            _ if line.is_empty() => {}
            _ => rows.push(Row {
                done: line.to_owned(),
                said: String::new(),
            }),
        }
    }
    for row in &mut rows {
        row.said = row.said.trim_end().to_owned();
    }
    rows
}

fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().unwrap().push(c),
        }
    }
    words
}

/// Each point in time, as in 2026-11-23T10:44:14Z, as TIME.
fn times_named(text: &str) -> String {
    const FORM: &str = "0000-00-00T00:00:00Z";
    let is_time = |piece: &str| {
        piece.len() == FORM.len()
            && piece.bytes().zip(FORM.bytes()).all(|(byte, form)| match form {
                b'0' => byte.is_ascii_digit(),
                form => byte == form,
            })
    };
    let mut named = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if rest.get(..FORM.len()).is_some_and(is_time) {
            named += "TIME";
            rest = &rest[FORM.len()..];
        } else {
            named.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    named
}

/// What a Transit engine has wrapped, which is another text each time, as WRAPPED.
fn wrapped_named(text: &str) -> String {
    const VERSION: &str = "vault:v1:";
    let mut pieces = text.split(VERSION);
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |named, piece| {
        let rest = piece.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "+/=".contains(c));
        format!("{named}{VERSION}WRAPPED{rest}")
    })
}

/// Each UUID as UUID, and the native provider's key IDs, which have one, as KEY.
fn uuids_named(text: &str) -> String {
    const FORM: &str = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
    let is_uuid = |piece: &str| {
        piece.len() == FORM.len()
            && piece.bytes().zip(FORM.bytes()).all(|(byte, form)| match form {
                b'-' => byte == b'-',
                _ => byte.is_ascii_hexdigit(),
            })
    };
    let mut named = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if rest.get(..FORM.len()).is_some_and(is_uuid) {
            let before = named.len().checked_sub(17).and_then(|at| named.get(at..));
            let is_key = before.is_some_and(|before| {
                let (digits, dot) = before.split_at(16);
                dot == "." && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
            });
            match is_key {
                true => {
                    named.truncate(named.len() - 17);
                    named += "KEY";
                }
                false => named += "UUID",
            }
            rest = &rest[FORM.len()..];
        } else {
            named.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    named
}

//! The texts that users and newcomers read are free of phrases that were hard to read: `tests/sources/banned.txt` has them.
//!
//! What is read: README.md and docs/, the varlink interfaces, the `--help` of each verb, and of each source file the module header
//! and the string literals, except those of its unit tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const BANNED: &str = "tests/sources/banned.txt";

/// A phrase, and what to write instead.
struct Phrase {
    words: Vec<String>,
    instead: String,
}

/// A text, and the line that it begins in.
type Piece = (usize, String);

fn phrases(list: &str) -> Vec<Phrase> {
    let lines = list.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (phrase, instead) = line.split_once("=>").expect("a phrase and its replacement");
            Phrase {
                words: words(phrase).map(|(_, word)| word).collect(),
                instead: instead.trim().to_owned(),
            }
        })
        .collect()
}

/// The words of a text in lower case, each with the number of line breaks before it. Anything but letters, digits and
/// underscores separates words; a full stop, a colon and the like become words of their own, so that no phrase spans them.
fn words(text: &str) -> impl Iterator<Item = (usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let (mut line, mut inside) = (0, false);
    for c in text.chars() {
        if c.is_alphanumeric() || c == '_' {
            match found.last_mut() {
                Some((_, word)) if inside => word.extend(c.to_lowercase()),
                _ => found.push((line, c.to_lowercase().collect())),
            }
            inside = true;
            continue;
        }
        inside = false;
        line += usize::from(c == '\n');
        if ".,:;!?()|".contains(c) {
            found.push((line, c.to_string()));
        }
    }
    found.into_iter()
}

/// Where a text has a banned phrase: `FILE:LINE: "PHRASE"; write: ...`.
fn faults(file: &str, pieces: &[Piece], banned: &[Phrase]) -> Vec<String> {
    let mut faults = Vec::new();
    for (first, text) in pieces {
        let words: Vec<_> = words(text).collect();
        for phrase in banned {
            let here = |at: &[(usize, String)]| at.iter().map(|(_, word)| word).eq(&phrase.words);
            for at in words.windows(phrase.words.len()).filter(|at| here(at)) {
                let (line, phrase_text) = (first + at[0].0, phrase.words.join(" "));
                faults.push(format!(
                    "{file}:{line}: {phrase_text:?}; write: {}",
                    phrase.instead
                ));
            }
        }
    }
    faults
}

/// The module header and the string literals of a source file, up to its unit tests. Literals come without the backslashes that
/// break their lines.
fn pieces_of_source(source: &str) -> Vec<Piece> {
    let end = source.find("#[cfg(test)]\nmod tests").unwrap_or(source.len());
    let source = &source[..end];
    let mut pieces = Vec::new();
    let header: Vec<_> = source
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .collect();
    pieces.push((1, header.join("\n")));

    let line_of = |at: usize| source[..at].matches('\n').count() + 1;
    let bytes = source.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &source[at..];
        if rest.starts_with("//") {
            at += rest.find('\n').unwrap_or(rest.len());
        } else if let Some(hashes) = raw_string(rest, at.checked_sub(1).map(|before| bytes[before])) {
            let begin = at + hashes + 2;
            let close = format!("\"{}", "#".repeat(hashes));
            let len = source[begin..].find(&close).expect("a literal ends");
            pieces.push((line_of(at), source[begin..begin + len].to_owned()));
            at = begin + len + close.len();
        } else if let Some(literal) = rest.strip_prefix('"') {
            let len = literal_len(literal);
            pieces.push((
                line_of(at),
                literal[..len].replace("\\\n", "\n").replace("\\n", "\n"),
            ));
            at += len + 2;
        } else if rest.starts_with("'\"'") {
            at += 3;
        } else if let Some(escaped) = rest.strip_prefix("'\\") {
            at += 2 + escaped.chars().next().map_or(0, char::len_utf8);
        } else {
            at += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    pieces
}

/// How many `#` a raw string literal has that begins here.
fn raw_string(rest: &str, before: Option<u8>) -> Option<usize> {
    let begins = before
        .is_none_or(|before| !before.is_ascii_alphanumeric() && before != b'_' || b"bc".contains(&before));
    let marks = rest.strip_prefix('r').filter(|_| begins)?;
    let hashes = marks.bytes().take_while(|byte| *byte == b'#').count();
    marks[hashes..].starts_with('"').then_some(hashes)
}

/// The length of a literal up to its closing quote.
fn literal_len(text: &str) -> usize {
    let mut escaped = false;
    text.bytes()
        .position(|byte| {
            let ends = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            ends
        })
        .expect("a literal ends")
}

fn files(dir: &Path, extension: &str, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, extension, found);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.insert(path);
        }
    }
}

/// All files that end so under `dirs` of the repository, by their paths in it.
fn repository(dirs: &[&str], extension: &str) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    for dir in dirs {
        files(&root.join(dir), extension, &mut found);
    }
    assert!(!found.is_empty(), "{dirs:?} has files that end in {extension}");
    let read = |path: PathBuf| {
        let name = path.strip_prefix(root).unwrap().display().to_string();
        (name, fs::read_to_string(&path).unwrap())
    };
    found.into_iter().map(read).collect()
}

fn banned() -> Vec<Phrase> {
    phrases(&fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(BANNED)).unwrap())
}

fn assert_free(faults: &[String]) {
    assert!(faults.is_empty(), "{BANNED} bans:\n{}", faults.join("\n"));
}

#[test]
fn pages_and_interfaces_have_no_banned_phrase() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let mut texts = vec![("README.md".to_owned(), readme)];
    texts.extend(repository(&["docs"], "md"));
    texts.extend(repository(&["src"], "varlink"));
    let banned = banned();
    let faults: Vec<_> = texts
        .into_iter()
        .flat_map(|(file, text)| faults(&file, &[(1, text)], &banned))
        .collect();
    assert_free(&faults);
}

#[test]
fn messages_and_module_headers_have_no_banned_phrase() {
    let banned = banned();
    let sources = repository(&["src"], "rs").into_iter();
    let faults: Vec<_> = sources
        .flat_map(|(file, source)| faults(&file, &pieces_of_source(&source), &banned))
        .collect();
    assert_free(&faults);
}

/// Programs that use the package have other verbs, or none: the command itself adds which of its verbs helps.
#[test]
fn messages_of_the_luks2_package_name_no_verb_of_the_command() {
    for (file, source) in repository(&["src/luks2"], "rs") {
        for (line, text) in pieces_of_source(&source) {
            assert!(!text.contains("`sealblk "), "{file}:{line}: {text}");
        }
    }
}

#[test]
fn help_has_no_banned_phrase() {
    let banned = banned();
    let mut left = vec![Vec::new()];
    let mut seen = 0;
    let mut all = Vec::new();
    while let Some(verb) = left.pop() {
        let mut command = Command::new(common::serve::sealblk_path());
        let output = command.args(&verb).arg("--help").output().unwrap();
        assert!(output.status.success(), "{verb:?}: {output:?}");
        let help = String::from_utf8(output.stdout).unwrap();
        all.extend(faults(
            &format!("sealblk {} --help", verb.join(" ")),
            &[(1, help.clone())],
            &banned,
        ));
        seen += 1;
        let verbs = help.split("\nCommands:\n").nth(1).unwrap_or_default();
        let verbs = verbs.lines().take_while(|line| !line.is_empty());
        // A verb is indented by two; the rest of its description by more.
        let names = verbs.filter_map(|line| {
            line.strip_prefix("  ")?
                .split_whitespace()
                .next()
                .filter(|_| !line.starts_with("   "))
        });
        left.extend(names.filter(|name| *name != "help").map(|name| {
            let mut path = verb.clone();
            path.push(name.to_owned());
            path
        }));
    }
    assert!(seen > 30, "{seen} verbs were found");
    assert_free(&all);
}

/// The checker itself: what it finds, and where.
#[test]
fn phrases_are_found_by_file_and_line() {
    let banned = phrases(
        "# a comment\n\nto be had => available\nnobody => name the actor\nplain disk => unencrypted disk\n",
    );
    let page = "A key is to be\nhad here.\n\nNobody's key; not a plain\tDisk. To be. Had.";
    assert_eq!(
        faults("page.md", &[(1, page.to_owned())], &banned),
        [
            "page.md:1: \"to be had\"; write: available",
            "page.md:4: \"nobody\"; write: name the actor",
            "page.md:4: \"plain disk\"; write: unencrypted disk",
        ]
    );
    let source = "//! Nobody reads this.\n\nuse a::b;\n// nobody\nconst QUOTE: char = '\"';\n\
        /// nobody\nfn f() { g(\"x \\\"nobody\\\"\", '\\'', r#\"not \"nobody\"\n and nobody\"#); }\n\
        const LONG: &str = \"a key is to \\\n    be had\";\n\
        #[cfg(test)]\nmod tests { const T: &str = \"nobody\"; }\n";
    let found = faults("a.rs", &pieces_of_source(source), &banned);
    let lines: Vec<_> = found
        .iter()
        .map(|fault| fault.split(';').next().unwrap())
        .collect();
    assert_eq!(
        lines,
        [
            "a.rs:1: \"nobody\"",
            "a.rs:7: \"nobody\"",
            "a.rs:7: \"nobody\"",
            "a.rs:8: \"nobody\"",
            "a.rs:9: \"to be had\"",
        ]
    );
}

//! Messages about wrong arguments.

use std::ffi::OsString;
use std::io::Write;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, Error};

use crate::text::{self, printable};
use sealblk_base::blame::Blame;

/// Prints why the arguments `given` to `root` are wrong, or the help that they ask for. Gives the exit code.
pub fn refuse(mut refusal: Error, root: &Command, given: impl Iterator<Item = OsString>) -> u8 {
    if !refusal.use_stderr() {
        // A failure cannot be reported.
        let _ = refusal.print();
        return 0;
    }
    if let (ErrorKind::InvalidSubcommand, Some(ContextValue::String(wrong))) =
        (refusal.kind(), refusal.get(ContextKind::InvalidSubcommand))
    {
        let text = no_such_verb(wrong, root, given);
        let _ = write!(std::io::stderr(), "sealblk: {text}");
        return Blame::Operator.exit_code();
    }
    // Arguments may hold anything: they come from scripts, too.
    let texts: Vec<_> = refusal
        .context()
        .filter_map(|(kind, value)| match value {
            ContextValue::String(text) => Some((kind, printable(text))),
            _ => None,
        })
        .collect();
    for (kind, text) in texts {
        refusal.insert(kind, ContextValue::String(text));
    }
    let _ = refusal.print();
    Blame::Operator.exit_code()
}

/// All verbs that there are, and no guess: the nearest by its letters may be one that destroys.
pub fn no_such_verb(wrong: &str, root: &Command, given: impl Iterator<Item = OsString>) -> String {
    let (mut command, mut path) = (root, root.get_name().to_owned());
    for argument in given.skip(1) {
        if let Some(verb) = command.find_subcommand(&argument) {
            command = verb;
            path = format!("{path} {}", verb.get_name());
        } else if argument.to_str() == Some(wrong) {
            break;
        }
    }
    if !command.has_subcommands() {
        return format!("`{path}` has no verbs, so {wrong:?} is not valid; see `{path} --help`\n");
    }
    let about = |verb: &Command| verb.get_about().map(ToString::to_string).unwrap_or_default();
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    let rows: Vec<_> = verbs
        .map(|verb| [format!("  {}", verb.get_name()), about(verb)])
        .collect();
    format!("`{path}` has no verb {wrong:?}; it has:\n{}", text::table(&rows))
}

//! Messages about wrong arguments.

use std::ffi::OsString;
use std::io::Write;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory, Error};

use super::text::{self, printable};
use super::{Cli, arguments, failure};

/// Prints why the arguments are wrong, or the help that they ask for. Gives the exit code.
pub(super) fn refuse(mut refusal: Error) -> u8 {
    if !refusal.use_stderr() {
        // A failure cannot be reported.
        let _ = refusal.print();
        return 0;
    }
    if let (ErrorKind::InvalidSubcommand, Some(ContextValue::String(wrong))) =
        (refusal.kind(), refusal.get(ContextKind::InvalidSubcommand))
    {
        let text = no_such_verb(wrong, arguments(std::env::args_os()));
        let _ = write!(std::io::stderr(), "sealblk: {text}");
        return failure::USAGE;
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
    failure::USAGE
}

/// All verbs that there are, and no guess: the nearest by its letters may be one that destroys.
fn no_such_verb(wrong: &str, arguments: impl Iterator<Item = OsString>) -> String {
    let root = Cli::command();
    let (mut command, mut path) = (&root, root.get_name().to_owned());
    for argument in arguments.skip(1) {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// `resize` was answered with "a similar subcommand exists: 'erase'".
    #[test]
    fn wrong_verb_is_answered_with_those_that_there_are() {
        let said = |wrong: &str, given: &[&str]| no_such_verb(wrong, given.iter().map(OsString::from));
        let top = said("resize", &["sealblk", "--state-dir", "x", "resize", "erase"]);
        assert!(
            top.starts_with("`sealblk` has no verb \"resize\"; it has:\n  create "),
            "{top}"
        );
        // The list of the verbs was empty.
        let none = said("serve", &["sealblk", "help", "create", "serve"]);
        let expected =
            "`sealblk create` has no verbs, so \"serve\" is not valid; see `sealblk create --help`\n";
        assert_eq!(none, expected);
        let kinds = said("vault", &["sealblk", "provider", "add", "vault"]);
        assert!(
            kinds.starts_with("`sealblk provider add` has no verb \"vault\""),
            "{kinds}"
        );
        assert!(
            kinds.contains("  transit  The Transit secrets engine of OpenBao or HashiCorp Vault"),
            "{kinds}"
        );
    }
}

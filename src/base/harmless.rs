//! Untrusted text as it is shown to people: on one line, and without what steers a terminal.

/// The first `limit` characters of what others wrote. Characters that end a line, control a terminal or turn the direction of
/// writing are shown as escapes.
pub fn harmless(text: &str, limit: usize) -> String {
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let shown = text.chars().take(limit).map(|c| match steers(c) {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    });
    let more = text.chars().nth(limit).map(|_| "…".to_owned());
    shown.chain(more).collect()
}

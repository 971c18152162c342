//! Text as it is shown to a user: on one line, without control characters.
//!
//! Names, paths and the texts of servers are untrusted.

use std::path::Path;

use sealblk_base::harmless::harmless;

/// Untrusted text, for instance from a header: control characters are escaped.
pub fn printable(text: &str) -> String {
    harmless(text, usize::MAX)
}

/// The same of a path.
pub fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// Rows of text as columns, each as wide as its widest cell.
pub fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| row.each_ref().map(|cell| printable(cell)))
        .collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let line = |row: &[String; COLUMNS]| {
        let cells: String = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        cells.trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_is_shown_harmlessly() {
        assert_eq!(printable("vm\x1b[2J\nü"), "vm\\u{1b}[2J\\nü");
    }

    #[test]
    fn columns_line_up() {
        let rows = [["NAME", "KIND"], ["a", "native"], ["native", "x"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "NAME    KIND\na       native\nnative  x\n");
    }
}

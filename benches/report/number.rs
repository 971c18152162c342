//! Numbers as a person reads them: three digits that matter, and no more.

/// A value with its unit, if it has one: `77.3 k IOPS`, `1.05 M IOPS`, `3850 MB/s`, `4.81 µs`.
pub(super) fn with_unit(value: f64, unit: &str) -> String {
    let number = match unit {
        "IOPS" if value >= 1e6 => format!("{} M", rounded(value / 1e6)),
        "IOPS" if value >= 1e4 => format!("{} k", rounded(value / 1e3)),
        "" => return rounded(value),
        _ => rounded(value),
    };
    format!("{number} {unit}")
}

/// Three significant digits, two of a small fraction, but no digit before the point lost.
pub(super) fn rounded(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        size if size == 0.0 || size >= 0.0995 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

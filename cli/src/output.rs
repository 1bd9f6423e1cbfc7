//! What people see: tables, sizes, times.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// Prints rows under headings, columns aligned.
pub fn table(headings: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = headings.iter().map(|heading| heading.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(&format!("{cell:width$}   "));
        }
        println!("{}", text.trim_end());
    };
    line(&mut headings.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
}

/// Prints a table of rows: the heading of each column, and the field that is in it.
pub fn columns(columns: &[(&str, &str)], rows: &[Value]) {
    let headings: Vec<&str> = columns.iter().map(|(heading, _)| *heading).collect();
    let cell = |row: &Value, key: &str| {
        row.get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| columns.iter().map(|(_, key)| cell(row, key)).collect())
        .collect();
    table(&headings, &cells);
}

/// Prints a line where nobody may listen any more: what was done is done.
pub fn say(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Prints each row as JSON on a line.
pub fn lines(rows: &[Value]) {
    for row in rows {
        println!("{row}");
    }
}

/// The status of a command: its own, or this one and a sentence on standard error.
pub fn ended_with(result: anyhow::Result<ExitCode>, failed: u8) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("picovm: {}", sentence(&error));
        ExitCode::from(failed)
    })
}

/// Bytes in the unit that fits, 1,024 to the next.
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 100.0);
    format!("{value:.digits$} {}", units.get(unit).copied().unwrap_or("B"))
}

/// Bytes as Docker tells them: three digits, 1,000 to the next unit.
pub fn docker_size(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        0.0..9.995 => 2,
        9.995..99.95 => 1,
        _ => 0,
    };
    let number = format!("{value:.digits$}");
    let number = match number.contains('.') {
        true => number.trim_end_matches('0').trim_end_matches('.'),
        false => &number,
    };
    format!("{number}{}", units.get(unit).copied().unwrap_or("B"))
}

/// How long ago a time was, as Docker tells it.
pub fn since(time: chrono::DateTime<chrono::Utc>) -> String {
    ago((chrono::Utc::now() - time).num_seconds())
}

fn ago(seconds: i64) -> String {
    format!("{} ago", span(seconds))
}

/// How long something took, as Docker tells it.
pub fn span(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let days = hours / 24;
    match seconds {
        ..1 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        2..60 => format!("{seconds} seconds"),
        60..120 => "About a minute".to_owned(),
        120..3600 => format!("{minutes} minutes"),
        3600..7200 => "About an hour".to_owned(),
        _ if hours < 48 => format!("{hours} hours"),
        _ if days < 14 => format!("{days} days"),
        _ if days < 60 => format!("{} weeks", days / 7),
        _ if days < 730 => format!("{} months", days / 30),
        _ => format!("{} years", days / 365),
    }
}

/// How long ago a time in seconds since 1970 was.
pub fn age(seconds: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let ago = now.saturating_sub(seconds);
    match ago {
        0..60 => format!("{ago} s ago"),
        60..3600 => format!("{} min ago", ago / 60),
        3600..86400 => format!("{} h ago", ago / 3600),
        _ => format!("{} d ago", ago / 86400),
    }
}

/// An error for people: what was attempted and why it failed, each said once. Most messages name their cause themselves.
pub fn sentence(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |told, cause| {
        let cause = cause.to_string();
        if told.contains(&cause) {
            told
        } else {
            format!("{told}: {cause}")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_fits() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(170 << 20), "170 MiB");
    }

    #[test]
    fn sizes_and_times_are_told_as_docker_tells_them() {
        for (bytes, told) in [
            (0, "0B"),
            (999, "999B"),
            (1500, "1.5kB"),
            (74_830_000, "74.8MB"),
            (124_000_000, "124MB"),
            (7_048_576, "7.05MB"),
            (5_000_000_000, "5GB"),
        ] {
            assert_eq!(docker_size(bytes), told);
        }
        for (seconds, told) in [
            (0, "Less than a second ago"),
            (59, "59 seconds ago"),
            (90, "About a minute ago"),
            (7000, "About an hour ago"),
            (3 * 86400, "3 days ago"),
            (20 * 86400, "2 weeks ago"),
            (100 * 86400, "3 months ago"),
            (1000 * 86400, "2 years ago"),
        ] {
            assert_eq!(ago(seconds), told);
        }
    }

    #[test]
    fn an_error_says_each_cause_once() {
        #[derive(Debug)]
        struct Failed(std::io::Error);
        impl std::fmt::Display for Failed {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "cannot read x: {}", self.0)
            }
        }
        impl std::error::Error for Failed {
            fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
                Some(&self.0)
            }
        }
        let error = anyhow::Error::from(Failed(std::io::Error::other("no such thing")));
        assert_eq!(sentence(&error), "cannot read x: no such thing");
        let error = error.context("cannot start");
        assert_eq!(sentence(&error), "cannot start: cannot read x: no such thing");
    }
}

//! Text of a guest or of another process, made fit for a terminal. What a container writes to its own streams is its
//! user's to judge and passes through untouched; what picovm says in its own name must not be commands to a terminal, nor
//! look as if picovm had said something else.

// What a guest or a file says must not end this process.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

/// Characters that are shown of one text at most. The last 8 KiB of a console fit.
const SHOWN_MAX: usize = 16 << 10;

/// Whether a character acts on a terminal, or on how what is around it looks, rather than being shown.
fn acts(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            // Marks, embeddings, overrides and isolates of direction, and separators of lines (Unicode 9, UAX #9).
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{61c}'
        )
}

fn escape(text: &str, out: &mut String) {
    for character in text.chars() {
        if acts(character) && character != '\t' {
            out.extend(character.escape_default());
        } else {
            out.push(character);
        }
    }
}

fn shown(text: &str) -> (&str, &'static str) {
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => (text.get(..end).unwrap_or_default(), "..."),
        None => (text, ""),
    }
}

/// A text within a sentence: on one line, with every character that acts on a terminal escaped as in Rust (`\u{1b}`), and cut
/// off if it is very long.
///
/// ```
/// assert_eq!(picovm_engine::printable("no\x1b[2J such\nfile"), r"no\u{1b}[2J such\nfile");
/// ```
#[must_use]
pub fn printable(text: &str) -> String {
    let (text, rest) = shown(text);
    let mut out = String::with_capacity(text.len());
    escape(text, &mut out);
    out.push_str(rest);
    out
}

/// A text of lines, likewise: lines stay lines.
#[must_use]
pub fn printable_text(text: &str) -> String {
    lines(text, "")
}

/// A text of lines, likewise, each set off by two spaces from what picovm says itself.
#[must_use]
pub fn printable_lines(text: &str) -> String {
    lines(text, "  ")
}

fn lines(text: &str, before: &str) -> String {
    let (text, rest) = shown(text.trim_end());
    let mut out = String::with_capacity(text.len());
    for (number, line) in text.split('\n').enumerate() {
        if number > 0 {
            out.push('\n');
        }
        out.push_str(before);
        // A serial console ends its lines by both.
        escape(line.strip_suffix('\r').unwrap_or(line), &mut out);
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_stays_as_it_is() {
        for text in ["", "exec /bin/x: No such file", "äöü 日本語 🐧 \t \\ '\""] {
            assert_eq!(printable(text), text);
        }
    }

    #[test]
    fn what_acts_on_a_terminal_is_escaped() {
        assert_eq!(printable("\x1b]0;t\x07"), "\\u{1b}]0;t\\u{7}");
        assert_eq!(printable("a\rb\nc\x08d\x7f"), "a\\rb\\nc\\u{8}d\\u{7f}");
        // One-byte commands of an 8-bit terminal, and a text that runs backwards.
        assert_eq!(printable("\u{9b}1m \u{202e}txt"), "\\u{9b}1m \\u{202e}txt");
        for byte in (0..=0xffu8).filter(|byte| *byte != b'\t') {
            let safe = printable(&String::from_utf8_lossy(&[byte]));
            assert!(!safe.chars().any(char::is_control), "{byte:#x}");
        }
    }

    #[test]
    fn lines_stay_lines_and_are_set_off() {
        assert_eq!(
            printable_lines("one\r\ntwo\rpicovm: all is well\n\x1b[2Jthree\n\n"),
            "  one\n  two\\rpicovm: all is well\n  \\u{1b}[2Jthree"
        );
    }

    #[test]
    fn what_was_made_printable_before_stays_so() {
        let once = format!("the clone ended:\n{}", printable_lines("\x1b[2J\r\nlast"));
        assert_eq!(printable_text(&once), once);
    }

    #[test]
    fn a_very_long_text_is_cut_between_characters() {
        let long = "ä".repeat(SHOWN_MAX + 1);
        assert_eq!(printable(&long), format!("{}...", "ä".repeat(SHOWN_MAX)));
        assert!(printable_lines(&long).ends_with("ä..."));
        assert_eq!(printable(&"x".repeat(SHOWN_MAX)).len(), SHOWN_MAX);
    }
}

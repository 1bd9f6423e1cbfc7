//! Every `unsafe` of the sources is in the table of `docs/unsafe.md`, with the number there is and a reason.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// How often the keyword is in Rust source, outside comments, strings and characters.
fn count(source: &str) -> usize {
    let bytes = source.as_bytes();
    let (mut at, mut found) = (0, 0);
    let find = |from: usize, what: &str| {
        source[from..]
            .find(what)
            .map_or(bytes.len(), |offset| from + offset + what.len())
    };
    while at < bytes.len() {
        let rest = &bytes[at..];
        at = match rest {
            [b'/', b'/', ..] => find(at, "\n"),
            [b'/', b'*', ..] => find(at, "*/"),
            [b'r', b'"', ..] => find(at + 2, "\""),
            [b'r', b'#', b'"', ..] => find(at + 3, "\"#"),
            [b'"', ..] => {
                let mut end = at + 1;
                while end < bytes.len() && bytes[end] != b'"' {
                    end += if bytes[end] == b'\\' { 2 } else { 1 };
                }
                end + 1
            }
            // A character, and not a lifetime.
            [b'\'', b'\\', ..] => find(at + 3, "'"),
            [b'\'', _, b'\'', ..] => at + 3,
            [first, ..] if first.is_ascii_alphabetic() || *first == b'_' => {
                let word = rest
                    .iter()
                    .take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_');
                let end = at + word.count();
                found += usize::from(&source[at..end] == "unsafe");
                end
            }
            _ => at + 1,
        };
        // On to where a character begins.
        while at < bytes.len() && !source.is_char_boundary(at) {
            at += 1;
        }
    }
    found
}

#[test]
fn the_keyword_is_told_from_what_looks_like_it() {
    assert_eq!(count("unsafe { a() }; unsafe fn b() {}"), 2);
    assert_eq!(
        count("// unsafe\n/* unsafe */ \"unsafe \\\" unsafe\" 'u' '\"' unsafe_op r\"unsafe\""),
        0
    );
    assert_eq!(count("r#\"unsafe \" unsafe\"# '\\'' '\\\\' &'a unsafe {}"), 1);
    assert_eq!(count("let é = 'é'; unsafe {}"), 1);
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            if name != "target" && !name.starts_with('.') {
                sources(&path, found);
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_unsafe_is_in_the_table_with_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = Vec::new();
    sources(root, &mut files);
    let found: BTreeMap<String, usize> = files
        .iter()
        .map(|file| {
            let name = file.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            (name, count(&fs::read_to_string(file).unwrap()))
        })
        .filter(|(_, count)| *count > 0)
        .collect();
    assert!(
        found.contains_key("vmm/src/memory.rs"),
        "no sources under {}",
        root.display()
    );

    let table = fs::read_to_string(root.join("docs/unsafe.md")).unwrap();
    let mut listed = BTreeMap::new();
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, file, number, why, _] = cells.as_slice() else {
            panic!("docs/unsafe.md: a row has three cells: {row}");
        };
        assert!(why.len() > 5, "docs/unsafe.md: no reason: {row}");
        let before = listed.insert(file.trim_matches('`').to_owned(), number.parse().unwrap());
        assert!(before.is_none(), "docs/unsafe.md: twice: {row}");
    }
    let differences: Vec<String> = found
        .keys()
        .chain(listed.keys())
        .filter(|file| found.get(*file) != listed.get(*file))
        .map(|file| {
            let number = |map: &BTreeMap<String, usize>| map.get(file).copied().unwrap_or(0);
            format!(
                "{file}: {} in the source, {} in docs/unsafe.md",
                number(&found),
                number(&listed)
            )
        })
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

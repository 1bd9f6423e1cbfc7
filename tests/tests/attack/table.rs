//! `docs/attacks.md` lists every attack, with the test that makes it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Names of the tests in the sources of this program.
fn tests() -> BTreeSet<String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/attack");
    let mut names: BTreeSet<String> = crate::hostile_init::ATTACKS
        .iter()
        .map(|(test, _)| format!("hostile_init::{test}"))
        .collect();
    for module in ["container", "others", "share"] {
        let source = fs::read_to_string(directory.join(module).with_extension("rs")).unwrap();
        let mut lines = source.lines();
        while let Some(line) = lines.next() {
            if line == "#[test]" {
                let name = lines.next().unwrap();
                let name = name.strip_prefix("fn ").unwrap().split('(').next().unwrap();
                names.insert(format!("{module}::{name}"));
            }
        }
    }
    names
}

#[test]
fn the_table_of_attacks_is_that_of_the_tests() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/attacks.md");
    let table = fs::read_to_string(path).unwrap();
    let mut listed = BTreeSet::new();
    for row in table
        .lines()
        .filter(|line| line.starts_with("| ") && line.contains("::"))
    {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, what, expected, test, _] = cells.as_slice() else {
            panic!("docs/attacks.md: a row has three cells: {row}");
        };
        assert!(what.len() > 5 && expected.len() > 5, "docs/attacks.md: {row}");
        assert!(
            listed.insert(test.trim_matches('`').to_owned()),
            "docs/attacks.md: twice: {row}"
        );
    }
    let tests = tests();
    assert!(tests.len() > 40, "{tests:?}");
    assert_eq!(
        listed, tests,
        "docs/attacks.md on the left, the tests on the right"
    );
}

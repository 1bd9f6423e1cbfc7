//! Each command of docs/containers.md, docs/volumes.md and docs/templates.md, in its order.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{stderr, stdout, store};

/// A command of a page, and what the page says that it prints, if there is nothing in that that differs from one time to the next.
struct Example {
    command: String,
    output: Vec<String>,
}

/// Lines of a page that begin with `$ ` in a block, without that, and the lines behind them.
fn examples(page: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if inside && let Some(command) = line.strip_prefix("$ ") {
            examples.push(Example {
                command: command.to_owned(),
                output: Vec::new(),
            });
        } else if inside && let Some(example) = examples.last_mut() {
            example.output.push(line.to_owned());
        }
    }
    examples
}

#[test]
fn every_command_of_the_page_about_containers_works() {
    assert!(run_page("containers.md") > 40);
}

#[test]
fn every_command_of_the_page_about_volumes_works() {
    assert!(run_page("volumes.md") > 12);
}

#[test]
fn every_command_of_the_page_about_templates_works() {
    assert!(run_page("templates.md") > 9);
}

/// Runs the commands of a page, and tells how many they are.
fn run_page(name: &str) -> usize {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    let page = std::fs::read_to_string(page).expect("the page");
    let examples = examples(&page);
    let count = examples.len();
    let here = tempfile::tempdir().expect("a directory");
    let path = std::env::var_os("PATH").expect("PATH");
    let mut path: Vec<PathBuf> = std::env::split_paths(&path).collect();
    path.insert(
        0,
        picovm_tests::binary().parent().expect("a directory").to_owned(),
    );
    for Example {
        command,
        output: expected,
    } in examples
    {
        // Other tests make containers in the same store, and prune would remove those that do not run.
        let typed = match command.as_str() {
            "picovm container prune -f" => "picovm rm never",
            "picovm volume prune -f" => "true",
            other => other,
        };
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", typed])
            .current_dir(here.path())
            .env("PICOVM_HOME", store().path())
            .env("PICOVM_POOL_IDLE", "0")
            .env("PATH", std::env::join_paths(&path).expect("a path"))
            .stdin(Stdio::null())
            .output()
            .expect("bash starts");
        assert!(output.status.success(), "{command}: {}", stderr(&output));
        // One line without dots is what is printed; tables and ids are only how it looks.
        if let [line] = expected.as_slice()
            && !line.contains("...")
        {
            assert_eq!(stdout(&output), *line, "{command}");
        }
    }
    count
}

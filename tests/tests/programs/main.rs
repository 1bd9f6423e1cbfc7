//! Real programs in containers of Debian's packages: the commands of docs/programs.md, by its headings. A command succeeds only if
//! all that it checks is as it should be.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use picovm_tests::OwnStore;

const PAGE: &str = "../docs/programs.md";
const IMAGES: [&str; 4] = ["debian-python", "debian-redis", "debian-nginx", "debian-tools"];

/// The store of all these tests.
fn store() -> &'static OwnStore {
    static STORE: OnceLock<OwnStore> = OnceLock::new();
    STORE.get_or_init(|| OwnStore::with(&IMAGES).expect("a store with the images"))
}

/// The commands that a page has under a heading: lines that begin with `$ `.
fn commands<'a>(page: &'a str, heading: &str) -> Vec<&'a str> {
    page.lines()
        .skip_while(|line| line.strip_prefix("## ").is_none_or(|title| title != heading))
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
        .filter_map(|line| line.strip_prefix("$ "))
        .collect()
}

/// Runs what the page has under a heading, from the top of the sources.
fn all_under(heading: &str) {
    all_with(store(), heading);
}

/// The same with a store.
fn all_with(store: &OwnStore, heading: &str) {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE)).expect("the page");
    let commands = commands(&page, heading);
    assert!(!commands.is_empty(), "{PAGE} has no command under {heading}");
    for command in commands {
        run(store, &top, command);
    }
}

fn run(store: &OwnStore, top: &Path, command: &str) {
    let binary = picovm_tests::binary();
    let beside = binary.parent().unwrap_or(Path::new("")).to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::iter::once(beside).chain(std::env::split_paths(&path));
    let begun = Instant::now();
    let output = Command::new("sh")
        .args(["-c", command])
        .current_dir(top)
        .env("PICOVM_HOME", store.path())
        .env("PICOVM_POOL_IDLE", "0")
        .env("PATH", std::env::join_paths(directories).expect("a path"))
        .stdin(Stdio::null())
        .output()
        .expect("sh starts");
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{command}: {}\n{stdout}\n{stderr}",
        output.status
    );
    println!("{command}: {:.1} s\n{stdout}", begun.elapsed().as_secs_f64());
}

#[test]
fn python_passes_its_own_tests_of_memory_maps_and_threads() {
    all_under("Python: memory maps and threads");
}

#[test]
fn python_passes_its_own_tests_of_processes() {
    all_under("Python: processes");
}

#[test]
fn python_passes_its_own_tests_of_sockets() {
    all_under("Python: sockets");
}

#[test]
#[ignore = "it takes some twelve minutes in the emulated host; `make programs` runs it"]
fn python_passes_its_own_tests_of_event_loops() {
    all_under("Python: event loops");
}

#[test]
fn redis_serves_pipelines_and_keeps_its_data() {
    all_under("Redis");
}

#[test]
fn nginx_serves_many_clients_and_large_files() {
    all_under("nginx");
}

#[test]
fn sqlite_survives_processes_that_write_at_once_and_one_that_is_killed() {
    all_under("SQLite");
}

#[test]
fn gcc_compiles_a_program_with_threads() {
    all_under("gcc");
}

#[test]
fn perl_does_what_its_core_is_for() {
    all_under("Perl");
}

#[test]
fn openssl_serves_tls_and_checks_certificates() {
    all_under("OpenSSL");
}

#[test]
#[ignore = "its image is large; `make programs` makes it and runs this"]
fn a_warm_jvm_answers_in_each_clone_of_it() {
    let store = OwnStore::with(&["debian-java"]).expect("a store with the image");
    all_with(&store, "Java");
}

#[test]
fn fsx_finds_in_a_volume_what_it_has_written() {
    all_under("Files of a volume: fsx");
}

#[test]
fn pjdfstest_finds_system_calls_about_files_as_posix_has_them() {
    all_under("Files of a volume: pjdfstest");
}

#[test]
fn a_mapped_file_of_a_volume_is_shared_and_written() {
    all_under("Files of a volume: mapped files");
}

//! Containers as people use them: by the command line, from one command to the next.

mod calls;
mod docs;
mod exec;
mod faults;
mod file_system;
mod files;
mod lifecycle;
mod limits;
mod logs;
mod look;
mod pool;
mod pool_unasked;
mod refused;
mod shared_files;
mod storage;
mod terminal;
mod volumes;
mod warm;

use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use picovm_tests::OwnStore;

/// How long what takes a moment may take where every instruction is emulated.
const PATIENCE: Duration = Duration::from_secs(60);

/// The store of all these tests.
fn store() -> &'static OwnStore {
    static STORE: OnceLock<OwnStore> = OnceLock::new();
    STORE.get_or_init(|| {
        let store = OwnStore::new().expect("a store with the image");
        let built = store
            .picovm()
            .args(["template", "build", "debian"])
            .output()
            .expect("picovm starts");
        assert!(built.status.success(), "{}", stderr(&built));
        store
    })
}

/// `picovm ARGUMENTS...` on that store.
fn picovm(arguments: &[&str]) -> Command {
    let mut command = store().picovm();
    command.args(arguments).stdin(Stdio::null());
    command
}

fn output(arguments: &[&str]) -> Output {
    picovm(arguments).output().expect("picovm starts")
}

/// What a command that has to succeed prints.
fn told(arguments: &[&str]) -> String {
    let output = output(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// What a command that has to fail with this status says.
fn refused(arguments: &[&str], status: i32) -> String {
    let output = output(arguments);
    assert_eq!(
        output.status.code(),
        Some(status),
        "{arguments:?}: {}{}",
        stdout(&output),
        stderr(&output)
    );
    stderr(&output)
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim_end().to_owned()
}

/// A container, removed at the end of a test however that ends.
struct Container(String);

impl Container {
    /// `picovm run -d OPTIONS... debian COMMAND...`.
    fn run(options: &[&str], command: &[&str]) -> Self {
        Self(told(&[&["run", "-d"], options, &["debian"], command].concat()))
    }

    /// One that does nothing and ends at once when it is stopped.
    fn sleeping(options: &[&str]) -> Self {
        Self::run(options, &["sleep", "1000"])
    }

    fn id(&self) -> &str {
        &self.0
    }

    /// What `inspect` says of it.
    fn inspect(&self, format: &str) -> String {
        told(&["inspect", "--format", format, self.id()])
    }

    fn status(&self) -> String {
        self.inspect("{{.State.Status}}")
    }

    /// `picovm exec` of a shell in it.
    fn shell(&self, script: &str) -> String {
        told(&["exec", self.id(), "sh", "-c", script])
    }

    /// Waits until `inspect` says this.
    fn until(&self, format: &str, expected: &str) {
        until(
            || self.inspect(format) == expected,
            || format!("{format} is {}", self.inspect(format)),
        );
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = picovm(&["rm", "-f", &self.0]).output();
    }
}

/// Waits until something holds.
fn until(holds: impl Fn() -> bool, otherwise: impl Fn() -> String) {
    let give_up = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < give_up, "{}", otherwise());
        std::thread::sleep(Duration::from_millis(50));
    }
}

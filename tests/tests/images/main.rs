//! Images from end to end: made of layers of GNU tar, brought into Debian's `docker-registry` by `skopeo`, pulled, loaded,
//! saved, run. Only what is in `run` needs KVM.

mod archives;
mod docs;
mod fixtures;
mod pull;
mod registry;
mod run;
mod server;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// A store of its own, and a directory without credentials.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().expect("a directory"),
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn store(&self) -> picovm_engine::Store {
        picovm_engine::Store::open(&self.path("store")).expect("the store opens")
    }

    fn picovm(&self, arguments: &[&str]) -> Command {
        let mut command = picovm_tests::picovm_in(&self.path("store"));
        command
            .args(arguments)
            .env("DOCKER_CONFIG", self.path("docker"))
            .stdin(Stdio::null());
        command
    }

    /// What a command that works prints.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.picovm(arguments).output().expect("picovm starts");
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        stdout(&output)
    }

    /// What a command that fails says.
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.picovm(arguments).output().expect("picovm starts");
        assert_eq!(
            output.status.code(),
            Some(1),
            "{arguments:?}: {}",
            stdout(&output)
        );
        stderr(&output)
    }

    /// Every file of the store but empty ones, which are locks.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        let mut pending = vec![self.path("store")];
        while let Some(directory) = pending.pop() {
            for entry in std::fs::read_dir(directory).expect("the store is there") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    pending.push(path);
                } else if std::fs::metadata(&path).expect("a file").len() > 0 {
                    let inside = path.strip_prefix(self.path("store")).expect("inside");
                    files.push(inside.display().to_string());
                }
            }
        }
        files.sort();
        files
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim_end().to_owned()
}

/// Runs a tool that must not fail.
fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; `make setup` installs it"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        stderr(&output)
    );
    stdout(&output)
}

/// The file of an image, mounted where it can be looked at.
struct Mounted(TempDir);

impl Mounted {
    fn new(file: &Path) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path().display().to_string();
        tool(
            "mount",
            &["-t", "erofs", "-o", "loop,ro", &file.display().to_string(), &at],
        );
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

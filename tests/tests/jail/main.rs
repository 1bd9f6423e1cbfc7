//! The jail, attacked from inside, and what it leaves behind. It needs root, a full kernel and cgroups: `make test` runs it in the
//! emulated host where there is none.

mod attacks;
mod legacy;
mod lifetime;
mod program;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Tests that look at all the cgroups and processes of the host run one at a time.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A program that was built with this one.
fn built(name: &str) -> PathBuf {
    let beside = std::env::current_exe().unwrap();
    // A test lies in `deps/`.
    let place = beside.ancestors().nth(2).unwrap().join(name);
    assert!(place.is_file(), "{} is not built: make build", place.display());
    place
}

/// `picovm-jailer --policy POLICY ARGUMENTS...`, with the policy in a file of this directory.
fn jailer(directory: &Path, policy: &str, arguments: &[&str]) -> Command {
    let file = directory.join("policy.json");
    std::fs::write(&file, policy).unwrap();
    let mut command = Command::new(built("picovm-jailer"));
    command.arg("--policy").arg(file).args(arguments);
    command
}

/// A policy with a shell in the root and nothing else, and more members.
fn with_shell(members: &str) -> String {
    format!(
        r#"{{ "root": [
            {{ "path": "/bin", "source": "{}", "access": "execute" }},
            {{ "path": "/dev/null", "access": "device" }}
        ] {members} }}"#,
        shell_directory().display()
    )
}

/// A directory with a static shell and its tools.
fn shell_directory() -> PathBuf {
    let directory = std::env::temp_dir().join("picovm-jail-shell");
    if !directory.join("sh").exists() {
        std::fs::create_dir_all(&directory).unwrap();
        for name in [
            "busybox", "sh", "sleep", "id", "ls", "cat", "kill", "dd", "unshare", "touch",
        ] {
            let new = directory.join(format!(".{name}"));
            std::fs::copy("/bin/busybox", &new).expect("busybox-static is installed");
            std::fs::rename(new, directory.join(name)).unwrap();
        }
    }
    directory
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}

fn output(mut command: Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    (status.code(), text(&stdout), text(&stderr))
}

/// Cgroups of jails that there are.
fn cgroups() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir("/sys/fs/cgroup/picovm-jail") else {
        return Vec::new();
    };
    let all = entries.flatten().map(|entry| entry.path());
    all.filter(|path| path.is_dir()).collect()
}

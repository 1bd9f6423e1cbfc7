//! Hooks of a container: programs of its own that make a clone of a warm machine different from the others, run before the
//! container goes on.

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

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use picovm_guest_protocol::{ProcessSpec, StartFailure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid};

use super::process::told_failure;
use crate::container::Ground;
use crate::start::failure;
use crate::stub::{self, Pipes};

/// Where they are.
const DIRECTORY: &str = "/etc/picovm/on-clone.d";
/// How long all of them together may take.
const TIME_MAX: Duration = Duration::from_secs(30);
/// What is kept of what they write, in bytes: less than a stream may send at once.
const OUTPUT_MAX: usize = 64 << 10;

/// Runs them, each in a process of its own in the control group of `ground`, one after the other, as root with the variables of
/// `process`. Gives what they have written, and why it is not to go on: the first failure ends it.
pub fn run(process: &ProcessSpec, ground: &Ground) -> (Vec<u8>, Result<(), StartFailure>) {
    let mut said = Vec::new();
    let deadline = Instant::now().checked_add(TIME_MAX);
    let ran = find(Path::new(DIRECTORY)).and_then(|hooks| {
        hooks
            .iter()
            .try_for_each(|hook| run_one(hook, process, ground, deadline, &mut said))
    });
    (said, ran)
}

/// The executable files of a directory, in the order of their names; none if there is no such directory.
fn find(directory: &Path) -> Result<Vec<PathBuf>, StartFailure> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            let attempted = format!("look for hooks in {}", directory.display());
            return Err(failure(attempted, error.raw_os_error().unwrap_or(0), error));
        }
    };
    let mut hooks: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| !entry.file_name().as_bytes().starts_with(b"."))
        .map(|entry| entry.path())
        .filter(|path| {
            fs::metadata(path)
                .is_ok_and(|status| status.is_file() && status.permissions().mode() & 0o111 != 0)
        })
        .collect();
    hooks.sort();
    Ok(hooks)
}

fn run_one(
    hook: &Path,
    process: &ProcessSpec,
    ground: &Ground,
    deadline: Option<Instant>,
    said: &mut Vec<u8>,
) -> Result<(), StartFailure> {
    let attempted = || format!("run the hook {}", hook.display());
    let because = |error: Errno| failure(attempted(), error.raw_os_error(), error);
    let spec = ProcessSpec {
        args: vec![hook.as_os_str().as_bytes().to_vec()],
        env: process.env.clone(),
        drop_capabilities: process.drop_capabilities,
        no_new_privileges: process.no_new_privileges,
        ..ProcessSpec::default()
    };
    let (pipes, ends) = stub::pipes().map_err(|error| failure(attempted(), 0, error))?;
    let pid = stub::begin_other(&spec, &ends, ground, None).map_err(because)?;
    drop(ends);
    let in_time = follow(pid, &pipes, deadline, said).map_err(because);
    // Whatever it has left, and itself if it has not ended.
    if let Some(group) = &ground.cgroup {
        let _ = group.kill();
    }
    if !in_time.as_ref().is_ok_and(|in_time| *in_time) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    let status = loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            waited => break waited.map_err(because)?,
        }
    };
    for output in [&pipes.stdout, &pipes.stderr] {
        while take(output, said) {}
    }
    if let Some(failed) = told_failure(&pipes.failure, &mut [0; 8192]) {
        return Err(failure(
            attempted(),
            failed.errno,
            format!("{}: {}", failed.attempted, failed.message),
        ));
    }
    if !in_time? {
        let message = format!("it did not end within {} s", TIME_MAX.as_secs());
        return Err(failure(attempted(), 0, message));
    }
    match status.map(|(_, status)| (status.exit_status(), status.terminating_signal())) {
        Some((Some(0), _)) => Ok(()),
        Some((Some(code), _)) => Err(failure(attempted(), 0, format!("it ended with status {code}"))),
        Some((None, Some(signal))) => Err(failure(attempted(), 0, format!("signal {signal} ended it"))),
        _ => Err(failure(attempted(), 0, "it is not known how it ended")),
    }
}

/// Takes what a hook writes until it has ended; whether it has in time.
fn follow(
    pid: Pid,
    pipes: &Pipes,
    deadline: Option<Instant>,
    said: &mut Vec<u8>,
) -> rustix::io::Result<bool> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let mut outputs = vec![&pipes.stdout, &pipes.stderr];
    loop {
        let left = deadline.map_or(TIME_MAX, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = vec![PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
        fds.extend(
            outputs
                .iter()
                .map(|output| PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN)),
        );
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let mut ready = fds.iter().map(|fd| fd.revents());
        let ended = ready.next().is_some_and(|events| !events.is_empty());
        let ready: Vec<PollFlags> = ready.collect();
        if ended {
            return Ok(true);
        }
        let mut ready = ready.into_iter();
        outputs.retain(|output| match ready.next() {
            Some(events) if events.contains(PollFlags::IN) => take(output, said),
            Some(events) => events.is_empty(),
            None => true,
        });
    }
}

/// Takes what is in a pipe; whether there may be more.
fn take(output: &OwnedFd, said: &mut Vec<u8>) -> bool {
    let mut bytes = [0; 4096];
    match rustix::io::read(output, &mut bytes) {
        Ok(0) => false,
        Ok(count) => {
            let room = OUTPUT_MAX.saturating_sub(said.len()).min(count);
            said.extend_from_slice(bytes.get(..room).unwrap_or_default());
            true
        }
        Err(Errno::INTR) => true,
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn hooks_are_the_executable_files_in_the_order_of_their_names() {
        let directory = tempfile::tempdir().unwrap();
        for (name, mode) in [
            ("20-b", 0o755),
            ("10-a", 0o755),
            ("30-data", 0o644),
            (".hidden", 0o755),
        ] {
            let path = directory.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(directory.path().join("15-directory")).unwrap();
        let found = find(directory.path()).unwrap();
        let names: Vec<_> = found.iter().filter_map(|path| path.file_name()).collect();
        assert_eq!(names, ["10-a", "20-b"]);
        assert_eq!(
            find(&directory.path().join("none")).unwrap(),
            Vec::<PathBuf>::new()
        );
    }
}

//! Cloud Hypervisor's way to a running guest from a saved one: a new process that loads a snapshot and resumes it, until the
//! guest's first byte comes out.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use picovm_engine::Prompt;
use picovm_engine::figures::ms;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;

use crate::boot::MEMORY_MIB;
use crate::guest;
use crate::peer::{ANSWER_MAX, Peer, Process};

/// Between two looks whether the guest that is to be saved has written something.
const LOOK: Duration = Duration::from_millis(5);

/// How the memory of a snapshot gets into a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// All of it is read before the guest runs: what Cloud Hypervisor does unless it is told otherwise.
    Copied,
    /// Each page at its first access (`userfaultfd(2)`).
    OnDemand,
}

/// A snapshot of a guest that writes to its console without a pause.
pub struct Snapshot {
    program: PathBuf,
    directory: PathBuf,
    log: PathBuf,
}

impl Snapshot {
    /// Boots `kernel` with `initramfs`, whose program writes [`guest::MARK`] again and again, and saves the guest into
    /// `directory` while it does so.
    pub fn take(
        program: &Path,
        kernel: &Path,
        (initramfs, cmdline): (&Path, &str),
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let snapshot = Self {
            program: program.to_owned(),
            directory: directory.join("cloud-hypervisor-snapshot"),
            log: directory.join("cloud-hypervisor-log"),
        };
        let socket = directory.join("cloud-hypervisor-socket");
        let console = directory.join("cloud-hypervisor-console");
        // What an attempt that failed has left.
        for file in [&socket, &console] {
            if file.exists() {
                fs::remove_file(file).with_context(|| format!("cannot remove {}", file.display()))?;
            }
        }
        if snapshot.directory.exists() {
            fs::remove_dir_all(&snapshot.directory)
                .with_context(|| format!("cannot remove {}", snapshot.directory.display()))?;
        }
        fs::create_dir(&snapshot.directory)
            .with_context(|| format!("cannot create {}", snapshot.directory.display()))?;
        let output =
            File::create(&console).with_context(|| format!("cannot create {}", console.display()))?;

        let mut command = Command::new(program);
        command.arg("--api-socket").arg(&socket);
        command.arg("--kernel").arg(kernel);
        command.arg("--initramfs").arg(initramfs);
        command.args(["--cmdline", cmdline, "--cpus", "boot=1", "--memory"]);
        command.arg(format!("size={MEMORY_MIB}M"));
        // The serial port is standard output, also of the process that loads the snapshot.
        command.args(["--serial", "tty", "--console", "off"]);
        let mut process = Process::start(
            Peer::CloudHypervisor,
            &mut command,
            Some(output.into()),
            &snapshot.log,
        )?;
        let saved = snapshot.save(&mut process, &socket, &console);
        process.explain(saved).map(|()| snapshot)
    }

    fn save(&self, process: &mut Process, socket: &Path, console: &Path) -> anyhow::Result<()> {
        let mut api = process.connect(socket)?;
        wait_for_mark(process, console)?;
        api.request("PUT", "/api/v1/vm.pause", None)?;
        let to = json!({ "destination_url": self.url().to_string_lossy() });
        api.request("PUT", "/api/v1/vm.snapshot", Some(&to))
    }

    /// From spawning a process to the first byte that the resumed guest writes, in milliseconds.
    ///
    /// The guest was saved while its program wrote single bytes to the console of the serial port as fast as they are taken, so it
    /// writes as soon as it runs. What is measured is all of this: the process's start, loading the snapshot, resuming by its own
    /// option (no API is asked), the guest's way to its next byte (its kernel's interrupt for a port that is ready, or the
    /// rest of a system call, with the page faults of both), and the byte's way out through the emulated port and a pipe.
    pub fn restore(&self, memory: Memory) -> anyhow::Result<[f64; 1]> {
        let mut command = Command::new(&self.program);
        command.arg("--restore").arg(self.restore_option(memory));
        first_byte(&mut command, &self.log)
    }

    fn url(&self) -> OsString {
        let mut url = OsString::from("file://");
        url.push(&self.directory);
        url
    }

    fn restore_option(&self, memory: Memory) -> OsString {
        let mut option = OsString::from("source_url=");
        option.push(self.url());
        option.push(",resume=true");
        if memory == Memory::OnDemand {
            option.push(",memory_restore_mode=ondemand");
        }
        option
    }
}

/// Waits until a guest has written its mark to `console`.
fn wait_for_mark(process: &mut Process, console: &Path) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let output = fs::read(console).with_context(|| format!("cannot read {}", console.display()))?;
        if output.contains(&guest::MARK) {
            return Ok(());
        }
        process
            .must_run()
            .context("the guest's program cannot be reached")?;
        if start.elapsed() > ANSWER_MAX {
            bail!(
                "the guest's program has written nothing in {} s; its console says {:?}",
                ANSWER_MAX.as_secs(),
                String::from_utf8_lossy(&output)
            );
        }
        std::thread::sleep(LOOK);
    }
}

/// From spawning a process to the first byte of a guest in its output, in milliseconds. The process is ended then.
fn first_byte(command: &mut Command, log: &Path) -> anyhow::Result<[f64; 1]> {
    let start = Instant::now();
    let mut process = Process::start(Peer::CloudHypervisor, command, Some(Stdio::piped()), log)?;
    let prompt = Prompt::begin();
    let seen = process.output().and_then(|mut output| read_mark(&mut output));
    let end = Instant::now();
    drop(prompt);
    process.explain(seen).map(|()| [ms(start, end)])
}

/// Reads what comes first from a guest, which must be its mark and nothing else.
fn read_mark(output: &mut ChildStdout) -> anyhow::Result<()> {
    let mut fds = [PollFd::new(output, PollFlags::IN)];
    if poll(&mut fds, Some(&Timespec::try_from(ANSWER_MAX)?))? == 0 {
        bail!(
            "the guest has written nothing in {} s after it was to be restored",
            ANSWER_MAX.as_secs()
        );
    }
    let mut bytes = [0u8; 4096];
    let count = output.read(&mut bytes)?;
    let bytes = bytes.get(..count).unwrap_or_default();
    if bytes.is_empty() {
        bail!("Cloud Hypervisor closed its output before the restored guest wrote to it");
    }
    if bytes.iter().any(|byte| *byte != guest::MARK) {
        bail!(
            "what came out first is not the guest's: {:?}",
            String::from_utf8_lossy(bytes)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn a_guest_is_paused_when_its_program_writes_and_saved_then() {
        let directory = tempfile::tempdir().unwrap();
        let (socket, console) = (directory.path().join("socket"), directory.path().join("console"));
        fs::write(&console, "a message of a kernel\n").unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn({
            let console = console.clone();
            move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                let mut bytes = [0u8; 4096];
                assert!(
                    stream.read(&mut bytes).is_err(),
                    "asked before the guest is there"
                );
                fs::write(&console, [b'.', guest::MARK]).unwrap();
                stream.set_read_timeout(Some(ANSWER_MAX)).unwrap();
                for expected in [
                    "PUT /api/v1/vm.pause HTTP/1.1\r\n",
                    "PUT /api/v1/vm.snapshot HTTP/1.1\r\n",
                ] {
                    let count = stream.read(&mut bytes).unwrap();
                    let asked = String::from_utf8_lossy(&bytes[..count]).into_owned();
                    assert!(asked.starts_with(expected), "{asked}");
                    stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
                }
                String::from_utf8_lossy(&bytes).into_owned()
            }
        });
        let snapshot = Snapshot {
            program: "/bin/false".into(),
            directory: "/run/snapshot".into(),
            log: directory.path().join("log"),
        };
        let mut command = Command::new("/bin/sleep");
        let mut process =
            Process::start(Peer::CloudHypervisor, command.arg("60"), None, &snapshot.log).unwrap();
        snapshot.save(&mut process, &socket, &console).unwrap();
        let last = server.join().unwrap();
        assert!(
            last.contains(r#"{"destination_url":"file:///run/snapshot"}"#),
            "{last}"
        );
    }

    fn of_shell(script: &str) -> anyhow::Result<[f64; 1]> {
        let directory = tempfile::tempdir().unwrap();
        first_byte(
            Command::new("/bin/sh").args(["-c", script]),
            &directory.path().join("log"),
        )
    }

    #[test]
    fn the_first_byte_of_a_guest_is_waited_for_and_its_process_not() {
        let [took] = of_shell(r"sleep 0.1; printf '\006'; exec sleep 60").unwrap();
        assert!((100.0..20_000.0).contains(&took), "{took}");
    }

    #[test]
    fn a_restore_that_fails_is_an_error_with_the_end_of_its_log() {
        let error = of_shell("echo there is no such snapshot >&2; exit 1").unwrap_err();
        assert_eq!(
            error.to_string(),
            "Cloud Hypervisor closed its output before the restored guest wrote to it. The end of its log:\n\
             there is no such snapshot"
        );
    }

    #[test]
    fn output_that_is_not_the_guests_is_not_taken_for_it() {
        let error = of_shell(r"printf 'version 1\006'; exec sleep 60").unwrap_err();
        assert_eq!(
            error.to_string(),
            "what came out first is not the guest's: \"version 1\\u{6}\"; its log is empty"
        );
    }

    #[test]
    fn a_program_that_is_not_cloud_hypervisor_gives_no_snapshot() {
        let directory = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let nowhere = Path::new("/nonexistent");
            let taken = Snapshot::take(
                Path::new("/bin/false"),
                nowhere,
                (nowhere, "quiet"),
                directory.path(),
            );
            let error = taken.map(|_| ()).unwrap_err().to_string();
            assert!(
                error.contains("Cloud Hypervisor ended with exit status: 1"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_snapshot_is_restored_and_resumed_at_once() {
        let snapshot = Snapshot {
            program: "/bin/false".into(),
            directory: "/run/of bench".into(),
            log: "/dev/null".into(),
        };
        assert_eq!(
            snapshot.restore_option(Memory::Copied),
            "source_url=file:///run/of bench,resume=true"
        );
        assert_eq!(
            snapshot.restore_option(Memory::OnDemand),
            "source_url=file:///run/of bench,resume=true,memory_restore_mode=ondemand"
        );
    }
}

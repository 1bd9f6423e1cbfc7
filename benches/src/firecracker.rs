//! Firecracker's way to a running guest from a saved one: a new process, its API's socket, loading a snapshot, resuming.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use picovm_engine::Prompt;
use picovm_engine::figures::ms;
use serde_json::{Value, json};

use crate::boot::MEMORY_MIB;

/// A request that takes longer has gone wrong.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// By then a guest is in user space and sleeps.
const BOOT: Duration = Duration::from_secs(2);
/// Between two looks whether the socket is there.
const RETRY: Duration = Duration::from_micros(100);

/// A snapshot of a guest that sleeps.
pub struct Snapshot {
    program: PathBuf,
    state: PathBuf,
    memory: PathBuf,
    socket: PathBuf,
}

impl Snapshot {
    /// Boots `kernel` with `initramfs`, whose program sleeps, and saves the guest into `directory`.
    pub fn take(
        program: &Path,
        kernel: &Path,
        (initramfs, cmdline): (&Path, &str),
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let snapshot = Self {
            program: program.to_owned(),
            state: directory.join("firecracker-state"),
            memory: directory.join("firecracker-memory"),
            socket: directory.join("firecracker-socket"),
        };
        let mut process = snapshot.spawn()?;
        let saved = snapshot.save(kernel, initramfs, cmdline);
        end(&mut process);
        saved.map(|()| snapshot)
    }

    fn save(&self, kernel: &Path, initramfs: &Path, cmdline: &str) -> anyhow::Result<()> {
        let mut api = self.connect()?;
        let boot = json!({ "kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": cmdline });
        request(&mut api, "PUT", "/boot-source", &boot)?;
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB });
        request(&mut api, "PUT", "/machine-config", &machine)?;
        request(
            &mut api,
            "PUT",
            "/actions",
            &json!({ "action_type": "InstanceStart" }),
        )?;
        std::thread::sleep(BOOT);
        request(&mut api, "PATCH", "/vm", &json!({ "state": "Paused" }))?;
        let files =
            json!({ "snapshot_type": "Full", "snapshot_path": self.state, "mem_file_path": self.memory });
        request(&mut api, "PUT", "/snapshot/create", &files)
    }

    /// From spawning a process to its answer that the guest runs again.
    pub fn restore(&self) -> anyhow::Result<[f64; 1]> {
        let files = json!({
            "snapshot_path": self.state,
            "mem_backend": { "backend_type": "File", "backend_path": self.memory },
            "resume_vm": true,
        });
        let start = Instant::now();
        let mut process = self.spawn()?;
        let prompt = Prompt::begin();
        let restored = self
            .connect()
            .and_then(|mut api| request(&mut api, "PUT", "/snapshot/load", &files));
        let end_of_it = Instant::now();
        drop(prompt);
        end(&mut process);
        restored.map(|()| [ms(start, end_of_it)])
    }

    fn spawn(&self) -> anyhow::Result<Child> {
        if self.socket.exists() {
            std::fs::remove_file(&self.socket)
                .with_context(|| format!("cannot remove {}", self.socket.display()))?;
        }
        Command::new(&self.program)
            .arg("--api-sock")
            .arg(&self.socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))
    }

    fn connect(&self) -> anyhow::Result<UnixStream> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(api) => {
                    api.set_read_timeout(Some(ANSWER_MAX))?;
                    return Ok(api);
                }
                Err(_) if start.elapsed() < ANSWER_MAX => std::thread::sleep(RETRY),
                Err(error) => {
                    return Err(error).context("Firecracker's API cannot be reached");
                }
            }
        }
    }
}

/// A request of its API, which is HTTP; that it is refused is an error.
fn request(api: &mut UnixStream, method: &str, path: &str, body: &Value) -> anyhow::Result<()> {
    let body = body.to_string();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    api.write_all((head + &body).as_bytes())
        .with_context(|| format!("cannot ask Firecracker for {path}"))?;
    let mut answer = [0u8; 4096];
    let count = api
        .read(&mut answer)
        .with_context(|| format!("Firecracker did not answer to {path}"))?;
    let answer = String::from_utf8_lossy(answer.get(..count).unwrap_or_default());
    if answer.starts_with("HTTP/1.1 20") {
        return Ok(());
    }
    bail!("Firecracker refused {method} {path}: {answer}");
}

fn end(process: &mut Child) {
    // It has nothing to lose; one that has ended already is what is wanted.
    let _ = process.kill();
    let _ = process.wait();
}

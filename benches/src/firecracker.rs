//! Firecracker's way to a running guest from a saved one: a new process, its API's socket, loading a snapshot, resuming.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use picovm_engine::Prompt;
use picovm_engine::figures::ms;
use serde_json::json;

use crate::boot::MEMORY_MIB;
use crate::peer::{Peer, Process};

/// By then a guest is in user space and sleeps.
const BOOT: Duration = Duration::from_secs(2);

/// A snapshot of a guest that sleeps.
pub struct Snapshot {
    program: PathBuf,
    state: PathBuf,
    memory: PathBuf,
    socket: PathBuf,
    log: PathBuf,
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
            log: directory.join("firecracker-log"),
        };
        let mut process = snapshot.start(None)?;
        let saved = snapshot.save(&mut process, kernel, initramfs, cmdline);
        process.explain(saved).map(|()| snapshot)
    }

    fn save(
        &self,
        process: &mut Process,
        kernel: &Path,
        initramfs: &Path,
        cmdline: &str,
    ) -> anyhow::Result<()> {
        let mut api = process.connect(&self.socket)?;
        let boot = json!({ "kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": cmdline });
        api.request("PUT", "/boot-source", Some(&boot))?;
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB });
        api.request("PUT", "/machine-config", Some(&machine))?;
        let start = json!({ "action_type": "InstanceStart" });
        api.request("PUT", "/actions", Some(&start))?;
        std::thread::sleep(BOOT);
        api.request("PATCH", "/vm", Some(&json!({ "state": "Paused" })))?;
        let files =
            json!({ "snapshot_type": "Full", "snapshot_path": self.state, "mem_file_path": self.memory });
        api.request("PUT", "/snapshot/create", Some(&files))
    }

    /// From spawning a process to its answer that the guest runs again, in milliseconds.
    pub fn restore(&self) -> anyhow::Result<[f64; 1]> {
        let files = json!({
            "snapshot_path": self.state,
            "mem_backend": { "backend_type": "File", "backend_path": self.memory },
            "resume_vm": true,
        });
        let start = Instant::now();
        let mut process = self.start(Some(Stdio::null()))?;
        let prompt = Prompt::begin();
        let restored = process
            .connect(&self.socket)
            .and_then(|mut api| api.request("PUT", "/snapshot/load", Some(&files)));
        let end = Instant::now();
        drop(prompt);
        process.explain(restored).map(|()| [ms(start, end)])
    }

    fn start(&self, output: Option<Stdio>) -> anyhow::Result<Process> {
        if self.socket.exists() {
            std::fs::remove_file(&self.socket)
                .with_context(|| format!("cannot remove {}", self.socket.display()))?;
        }
        let mut command = Command::new(&self.program);
        command.arg("--api-sock").arg(&self.socket);
        Process::start(Peer::Firecracker, &mut command, output, &self.log)
    }
}

//! What the end-to-end tests and the demo share: a store to work in, containers whose output is kept, and counting
//! what they leave behind.
//!
//! All of it needs KVM and the Debian image that `make image` puts into the store.

pub mod attacks;

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;
use picovm_engine::{Container, ContainerExit, ContainerOptions, Image, Interruption, Stdio, Store, Wake};
use picovm_vmm::Template;

/// Name of the image that everything runs on.
pub const IMAGE: &str = "debian";

/// A store of its own that shares the image's file and content with the common one: templates and names are not shared.
pub struct OwnStore {
    directory: tempfile::TempDir,
    /// The store.
    pub store: Store,
}

impl OwnStore {
    /// Makes it with the image [`IMAGE`].
    ///
    /// # Errors
    /// If the common store has no such image.
    pub fn new() -> anyhow::Result<Self> {
        Self::with(&[IMAGE])
    }

    /// Makes it with these images.
    ///
    /// # Errors
    /// If the common store has no image of such a name.
    pub fn with(images: &[&str]) -> anyhow::Result<Self> {
        let common = Store::open_default()?;
        let directory = tempfile::tempdir()?;
        let store = Store::open(directory.path())?;
        for name in images {
            let image = common
                .image(name)
                .with_context(|| format!("there is no image {name}; `make images` puts it into the store"))?;
            let file = image.file.file_name().context("the image has no file name")?;
            std::os::unix::fs::symlink(&image.file, directory.path().join("images/files").join(file))?;
            let content = directory.path().join("images/blobs/sha256");
            fs::create_dir_all(&content)?;
            for blob in image.content()? {
                let name = blob.file_name().context("content has no name")?;
                std::os::unix::fs::symlink(&blob, content.join(name))?;
            }
            let record = Path::new("images/names").join(format!("{name}.json"));
            fs::copy(common.root().join(&record), directory.path().join(&record))?;
        }
        Ok(Self { directory, store })
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The image.
    ///
    /// # Errors
    /// As [`Store::image`].
    pub fn image(&self) -> anyhow::Result<Image> {
        Ok(self.store.image(IMAGE)?)
    }

    /// The `picovm` command on this store.
    #[must_use]
    pub fn picovm(&self) -> Command {
        picovm_in(self.path())
    }
}

/// The `picovm` command on a store. It begins no pool by itself: each container of a test starts as the test says, and nothing stays.
#[must_use]
pub fn picovm_in(store: &Path) -> Command {
    let mut command = Command::new(binary());
    command.env("PICOVM_HOME", store).env("PICOVM_POOL_IDLE", "0");
    command
}

/// The `picovm` binary that was built with this program.
#[must_use]
pub fn binary() -> PathBuf {
    let beside = std::env::current_exe().unwrap_or_default();
    // A test lies in `deps/`, a program beside `picovm`.
    beside
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join("picovm"))
        .find(|path| path.is_file())
        .unwrap_or_else(|| "picovm".into())
}

/// Ids of the processes that a process has started and that are there.
#[must_use]
pub fn children(process: u32) -> Vec<u32> {
    fs::read_to_string(format!("/proc/{process}/task/{process}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|child| child.parse().ok())
        .collect()
}

/// Kills a process, unless it has ended.
pub fn kill(process: u32) {
    if let Some(process) = rustix::process::Pid::from_raw(process.cast_signed()) {
        let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
    }
}

/// The monitor of the container that this `picovm run` has started, and its VMM process.
///
/// # Errors
/// If there are not just these two.
pub fn monitor_and_vmm(picovm: u32) -> anyhow::Result<(u32, u32)> {
    let only = |process: u32, what: &str| match children(process).as_slice() {
        [child] => Ok(*child),
        others => Err(anyhow::anyhow!("{process} has {others:?} for its {what}")),
    };
    let monitor = only(picovm, "monitor")?;
    Ok((monitor, only(monitor, "VMM process")?))
}

/// What a container did.
#[derive(Debug)]
pub struct Captured {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub exit: ContainerExit,
    /// From the request to the clone being forked and running.
    pub forked: Duration,
    /// From the request to the first byte of output, if there was any.
    pub first_byte: Option<Duration>,
    /// From the request to the exit status.
    pub exited: Duration,
}

impl Captured {
    /// Standard output as text, without white space at its end.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }
}

/// Runs a container to its end and keeps its output.
///
/// # Errors
/// As [`Container::start`] and [`Container::attach`]; a container that runs longer than two minutes is killed.
pub fn capture(template: &Template, options: &ContainerOptions) -> anyhow::Result<Captured> {
    let start = Instant::now();
    let container = Container::start(template, options)?;
    let forked = start.elapsed();
    let (stdin, stdin_end) = rustix::pipe::pipe()?;
    drop(stdin_end);
    let (stdout, stdout_end) = rustix::pipe::pipe()?;
    let (stderr, stderr_end) = rustix::pipe::pipe()?;
    let reader = |fd: rustix::fd::OwnedFd| {
        std::thread::spawn(move || -> std::io::Result<(Vec<u8>, Option<Instant>)> {
            let mut file = fs::File::from(fd);
            let mut first = [0u8; 4096];
            let count = file.read(&mut first)?;
            let at = (count > 0).then(Instant::now);
            let mut bytes = first.get(..count).unwrap_or_default().to_vec();
            file.read_to_end(&mut bytes)?;
            Ok((bytes, at))
        })
    };
    let (out, err) = (reader(stdout), reader(stderr));
    let stdio = Stdio {
        stdin: stdin.as_fd(),
        stdout: stdout_end.as_fd(),
        stderr: stderr_end.as_fd(),
        wake: None,
        deadline: Instant::now().checked_add(Duration::from_secs(120)),
    };
    let exit = container.attach(stdio, &mut |_: Wake| Some(Interruption::Kill(9)));
    let exited = start.elapsed();
    drop((stdout_end, stderr_end));
    let join = |reader: std::thread::JoinHandle<std::io::Result<(Vec<u8>, Option<Instant>)>>| {
        reader
            .join()
            .map_err(|_| anyhow::anyhow!("a reader panicked"))?
            .map_err(anyhow::Error::from)
    };
    let ((stdout, out_at), (stderr, err_at)) = (join(out)?, join(err)?);
    let first = [out_at, err_at].into_iter().flatten().min();
    Ok(Captured {
        stdout,
        stderr,
        exit: exit?,
        forked,
        first_byte: first.map(|at| at.duration_since(start)),
        exited,
    })
}

/// Options for a shell script.
#[must_use]
pub fn script(text: &str) -> ContainerOptions {
    ContainerOptions::command(["sh", "-c", text])
}

/// What this process holds that a clone could have left: descriptors, threads, mappings of template memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors, by what they lead to, sockets and pipes without their number.
    pub descriptors: Vec<String>,
    /// Threads.
    pub threads: usize,
    /// Mappings of files named `memory`.
    pub mappings: usize,
}

impl Holdings {
    /// Counts now.
    #[must_use]
    pub fn now() -> Self {
        let mut descriptors: Vec<String> = fs::read_dir("/proc/self/fd")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|link| {
                link.to_string_lossy()
                    .split(":[")
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            })
            .collect();
        descriptors.sort();
        let threads = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let mappings = maps.lines().filter(|line| line.ends_with("/memory")).count();
        Self {
            descriptors,
            threads,
            mappings,
        }
    }
}

/// Memory of the clones in this process, from `/proc/self/smaps`: bytes that they own (written pages) and bytes that
/// they share with their template and each other.
#[must_use]
pub fn clone_memory() -> (u64, u64) {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let (mut owned, mut shared, mut ours) = (0, 0, false);
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            ours = line.ends_with("/memory");
            continue;
        }
        let kib: u64 = line
            .split_whitespace()
            .nth(1)
            .and_then(|value| value.parse().ok())
            .unwrap_or(0);
        match first {
            "Anonymous:" if ours => owned += kib << 10,
            "Rss:" if ours => shared += kib << 10,
            _ => {}
        }
    }
    (owned, shared.saturating_sub(owned))
}

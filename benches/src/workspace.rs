//! The directory in which everything is measured: copies of all files that are read while the clock runs, and a store
//! of its own.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use picovm_engine::{GuestFiles, Image, Store};

use crate::boot::MEMORY_MIB;
use crate::guest::Program;
use crate::peer::Peer;

/// A real distribution, in the store that `make image` fills.
pub const DISTRIBUTION: &str = "debian";
/// An image with nothing but one static program, as `sh` and `echo`.
pub const SMALL: &str = "bench";

/// The binary of a VMM that is compared with.
pub struct Binary {
    pub path: PathBuf,
    /// What it says its version is.
    pub version: String,
}

/// The directory and what is where in it.
pub struct Workspace {
    directory: tempfile::TempDir,
    /// The pico kernel.
    pub kernel: PathBuf,
    /// The initramfs with `init`.
    pub initramfs: PathBuf,
    /// An initramfs whose `/init` resets the machine.
    pub reset: PathBuf,
    /// An initramfs whose `/init` sleeps for ever.
    pub asleep: PathBuf,
    /// An initramfs whose `/init` writes to the console again and again.
    pub writing: PathBuf,
    /// An initramfs whose `/init` writes to Firecracker's boot timer.
    pub boot_timer: PathBuf,
    /// An initramfs whose `/init` is at the freeze point at once.
    pub at_once: PathBuf,
    /// The real initramfs with that program in it as `/at-once`.
    pub at_once_beside_init: PathBuf,
    /// This program.
    pub bench: PathBuf,
    /// The command.
    pub picovm: PathBuf,
    /// The static program that is measured, under the name `echo`.
    pub echo: PathBuf,
    /// The store.
    pub store: Store,
    /// The image [`DISTRIBUTION`], if the store that this was started with has it.
    pub distribution: Option<Image>,
    /// The image [`SMALL`].
    pub small: Image,
    /// Whether its `sh` is a shell.
    pub has_shell: bool,
    /// The VMMs to compare with.
    pub peers: BTreeMap<Peer, Binary>,
}

impl Workspace {
    /// Copies and makes what measuring needs.
    pub fn prepare() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("picovm-bench-")
            .tempdir()
            .context("cannot make a working directory; set TMPDIR to a place with 1 GiB, best a tmpfs")?;
        let at = |name: &str| directory.path().join(name);
        for name in ["guest", "image", "image/bin"] {
            fs::create_dir(at(name)).with_context(|| format!("cannot create {}", at(name).display()))?;
        }

        // Beside the programs, where they look for them.
        let guest = GuestFiles::find()?;
        let kernel = copy(&guest.kernel, at("guest/vmlinux"))?;
        let initramfs = copy(&guest.initramfs, at("guest/initramfs.cpio"))?;
        let reset = write(at("reset.cpio"), &Program::Reset.initramfs("init"))?;
        let asleep = write(at("asleep.cpio"), &Program::Sleep.initramfs("init"))?;
        let writing = write(at("writing.cpio"), &Program::Write.initramfs("init"))?;
        let boot_timer = write(at("boot-timer.cpio"), &Program::BootTimer.initramfs("init"))?;
        let at_once = write(at("at-once.cpio"), &Program::FreezePoint.initramfs("init"))?;
        let mut both =
            fs::read(&initramfs).with_context(|| format!("cannot read {}", initramfs.display()))?;
        both.extend(Program::FreezePoint.initramfs("at-once"));
        let at_once_beside_init = write(at("at-once-beside-init.cpio"), &both)?;

        let this = std::env::current_exe().context("cannot find out where this program lies")?;
        let bench = copy(&this, at("picovm-bench"))?;
        let command = this.with_file_name("picovm");
        let picovm = copy(&command, at("picovm")).context("`make build` puts picovm beside picovm-bench")?;
        copy(&this.with_file_name("picovm-vmm"), at("picovm-vmm"))
            .context("`make build` puts picovm-vmm beside picovm-bench")?;
        let mut peers = BTreeMap::new();
        for peer in Peer::ALL {
            if let Some(given) = peer.given() {
                let binary = copy(&given, at(peer.key())).and_then(|path| {
                    let version = version(&path)?;
                    Ok(Binary { path, version })
                });
                let what = || format!("{} names no binary of {}", peer.variable(), peer.name());
                peers.insert(peer, binary.with_context(what)?);
            }
        }

        let busybox = static_busybox();
        let has_shell = busybox.is_some();
        let program = busybox.unwrap_or(this);
        let echo = copy(&program, at("image/bin/echo"))?;
        symlink("echo", at("image/bin/sh")).context("cannot make the image's sh")?;
        let store = Store::open(&at("store"))?;
        let small = store.build_image(SMALL, &at("image"), &mut |_| {})?;
        let distribution = take_image(&store, DISTRIBUTION)?;
        Ok(Self {
            kernel,
            initramfs,
            reset,
            asleep,
            writing,
            boot_timer,
            at_once,
            at_once_beside_init,
            bench,
            picovm,
            echo,
            store,
            distribution,
            small,
            has_shell,
            peers,
            directory,
        })
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `picovm` with a store. It begins no pool by itself.
    pub fn picovm(&self, store: &Path) -> Command {
        let mut command = Command::new(&self.picovm);
        command
            .env("PICOVM_HOME", store)
            .env("PICOVM_POOL_IDLE", "0")
            .env_remove("PICOVM_GUEST");
        command
    }

    /// The same with a subcommand, for containers that machines of the size that is measured serve.
    pub fn picovm_sized(&self, store: &Path, subcommand: &[&str]) -> Command {
        let mut command = self.picovm(store);
        command
            .args(subcommand)
            .args(["--memory", &format!("{}m", MEMORY_MIB - 32)]);
        command
    }

    /// Copies an image of the store that this was started with into this one, if it is there.
    pub fn take_image(&self, name: &str) -> anyhow::Result<Option<Image>> {
        take_image(&self.store, name)
    }

    /// The binary of a VMM, if it is to be compared with.
    pub fn peer(&self, peer: Peer) -> Option<&Path> {
        self.peers.get(&peer).map(|binary| binary.path.as_path())
    }

    /// The image that boots are measured with.
    pub fn boot_image(&self) -> &Image {
        self.distribution.as_ref().unwrap_or(&self.small)
    }
}

/// Copies a file, its mode included.
fn copy(from: &Path, to: PathBuf) -> anyhow::Result<PathBuf> {
    fs::copy(from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(to)
}

fn write(path: PathBuf, bytes: &[u8]) -> anyhow::Result<PathBuf> {
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Copies an image of the default store into `store`, if it is there.
fn take_image(store: &Store, name: &str) -> anyhow::Result<Option<Image>> {
    let common = Store::open_default()?;
    let Ok(image) = common.image(name) else {
        eprintln!(
            "no image {name} in {}: measuring without it; `make images` makes it",
            common.root().display()
        );
        return Ok(None);
    };
    let inside = |path: &Path| -> anyhow::Result<PathBuf> {
        let inside = path
            .strip_prefix(common.root())
            .context("an image lies outside its store")?;
        Ok(store.root().join(inside))
    };
    copy(&image.file, inside(&image.file)?)?;
    // Its layers are not read.
    for path in image.content()? {
        let link = inside(&path)?;
        fs::create_dir_all(link.parent().context("content has no directory")?)?;
        std::os::unix::fs::symlink(path, link)?;
    }
    let record = Path::new("images/names").join(format!("{name}.json"));
    copy(&common.root().join(&record), store.root().join(&record))?;
    Ok(Some(store.image(name)?))
}

/// Busybox, if there is one that needs no libraries.
fn static_busybox() -> Option<PathBuf> {
    let directories = std::env::var_os("PATH")?;
    let busybox = std::env::split_paths(&directories)
        .map(|directory| directory.join("busybox"))
        .find(|path| path.is_file())?;
    // A dynamic one names its loader at the start of the file.
    let elf = fs::read(&busybox).ok()?;
    let dynamic = elf
        .iter()
        .take(4096)
        .copied()
        .collect::<Vec<u8>>()
        .windows(5)
        .any(|bytes| bytes == b"ld-li");
    (!dynamic).then_some(busybox)
}

/// What a program answers to `--version`, its first line.
fn version(program: &Path) -> anyhow::Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or("unknown").trim().to_owned())
}

/// Is `echo` or `sh` if started under one of these names, where there is no static busybox. Gives the exit status.
pub fn as_static_program() -> Option<i32> {
    let mut arguments = std::env::args_os();
    let name = arguments.next()?;
    let name = Path::new(&name).file_name()?;
    if name != OsStr::new("echo") && name != OsStr::new("sh") {
        return None;
    }
    let words: Vec<String> = arguments
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    println!("{}", words.join(" "));
    Some(0)
}

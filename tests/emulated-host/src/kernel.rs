//! The emulated host's kernel: Debian's own, unpacked from its package and kept in the cache. Nothing is installed.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::FlockOperation;

use crate::modules::{Index, ModInfo};

/// Packages that name the newest suitable kernel, best first. KVM of 6.12 is what the project is measured on.
const PACKAGES: [&str; 2] = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];

/// The oldest kernel that has all that the host needs (KVM_PRE_FAULT_MEMORY came with 6.11).
const OLDEST: (u32, u32) = (6, 12);

/// Changes whenever this program unpacks a kernel in another way.
const LAYOUT: &str = "v2";

/// An unpacked kernel in the cache.
#[derive(Clone, Debug)]
pub struct Kernel {
    dir: PathBuf,
}

impl Kernel {
    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The uncompressed image.
    pub fn image(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// Its modules and their index, as found in `/lib/modules/<release>`.
    pub fn modules(dir: &Path) -> PathBuf {
        dir.join("modules")
    }

    /// The cached kernel; on first use it is fetched and unpacked.
    pub fn get() -> Result<Self> {
        let cache = cache_dir()?.join("host-kernel").join(LAYOUT);
        if let Some(kernel) = newest(&cache)? {
            return Ok(kernel);
        }
        fs::create_dir_all(&cache)
            .with_context(|| format!("cannot make the cache directory {}", cache.display()))?;
        let lock = File::create(cache.join("lock"))
            .with_context(|| format!("cannot make the lock in {}", cache.display()))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).context("cannot lock the kernel cache")?;
        // Somebody else may have fetched it while we waited.
        if let Some(kernel) = newest(&cache)? {
            return Ok(kernel);
        }
        fetch(&cache).context("cannot get a kernel for the emulated host")
    }
}

/// Where the project keeps what is costly to make again.
pub fn cache_dir() -> Result<PathBuf> {
    let var = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let dir = var("PICOVM_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("picovm")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/picovm")))
        .context("no place for the cache: none of PICOVM_CACHE, XDG_CACHE_HOME and HOME is set")?;
    std::path::absolute(&dir).with_context(|| format!("cannot use the cache directory {}", dir.display()))
}

/// The most recently unpacked kernel. A directory appears by `rename`, so one that is there is complete.
fn newest(cache: &Path) -> Result<Option<Kernel>> {
    let entries = match fs::read_dir(cache) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => {
            return Err(e).with_context(|| format!("cannot read the cache directory {}", cache.display()));
        }
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("cannot read {}", cache.display()))?
            .path();
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if !name.starts_with("linux-image-") {
            continue;
        }
        if let Ok(meta) = fs::metadata(path.join("vmlinux")) {
            found.push((meta.modified().ok(), path));
        }
    }
    found.sort();
    Ok(found.pop().map(|(_, dir)| Kernel { dir }))
}

/// Runs a program of the packaging tools and returns what it printed.
fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}: the emulated host needs a Debian machine"))?;
    if !output.status.success() {
        bail!(
            "{name} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The major and minor number in a package name such as `linux-image-6.12.1+deb13-cloud-amd64`.
fn version(package: &str) -> Option<(u32, u32)> {
    let mut numbers = package
        .strip_prefix("linux-image-")?
        .split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The package that a meta package depends on, from the output of `apt-cache depends`.
fn dependency(text: &str) -> Option<&str> {
    text.lines()
        .filter_map(|l| l.trim().strip_prefix("Depends: "))
        .find(|p| version(p).is_some_and(|v| v >= OLDEST))
}

fn resolve() -> Result<String> {
    for meta in PACKAGES {
        // An unknown package is an error of apt-cache, and a reason to try the next.
        let Ok(text) = run(Command::new("apt-cache").args(["depends", "--important", meta])) else {
            continue;
        };
        if let Some(package) = dependency(&text) {
            return Ok(package.to_owned());
        }
    }
    bail!(
        "apt knows no package {} with a kernel of {}.{} or later: run `apt-get update`, then `make setup`",
        PACKAGES.join(" or "),
        OLDEST.0,
        OLDEST.1
    )
}

fn fetch(cache: &Path) -> Result<Kernel> {
    let package = resolve()?;
    eprintln!("emulated host: fetching {package} (once, about 35 MB)");
    let work = tempfile::Builder::new()
        .prefix("unpack-")
        .tempdir_in(cache)
        .with_context(|| format!("cannot make a directory in {}", cache.display()))?;
    run(Command::new("apt-get")
        // Without it apt warns that its unprivileged user cannot write here.
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", &package])
        .current_dir(work.path()))
    .with_context(|| format!("cannot download {package}: run `apt-get update` and try again"))?;
    let deb = only_entry(work.path(), |name| name.ends_with(".deb"))?;
    let tree = work.path().join("tree");
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
    let name = deb.file_stem().context("a package without a name")?.to_owned();

    eprintln!("emulated host: unpacking the kernel and its modules");
    let ready = work.path().join("ready");
    let modules = Kernel::modules(&ready);
    fs::create_dir_all(&modules)?;
    let image = only_entry(&tree.join("boot"), |n| n.starts_with("vmlinuz-"))?;
    let vmlinux =
        uncompressed(&fs::read(&image)?).with_context(|| format!("cannot unpack {}", image.display()))?;
    fs::write(ready.join("vmlinux"), vmlinux).context("cannot write the kernel")?;
    // Newer packages have /usr/lib/modules, older ones /lib/modules.
    let lib = ["usr/lib/modules", "lib/modules"]
        .map(|d| tree.join(d))
        .into_iter()
        .find(|d| d.is_dir());
    let release = only_entry(&lib.context("no modules in the package")?, |_| true)?;
    let mut index = Index::default();
    unpack_modules(&release, &release, &modules, &mut index)?;
    for file in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        if release.join(file).exists() {
            fs::copy(release.join(file), modules.join(file))
                .with_context(|| format!("cannot copy {file}"))?;
        }
    }
    index.save(&modules)?;

    let dir = cache.join(name);
    // An incomplete directory of this name can only be left from a damaged disk: make room.
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot replace {}", dir.display()))?;
    }
    // After a power cut the name must not be there without the content.
    let opened = File::open(&ready)?;
    rustix::fs::syncfs(&opened).context("cannot write the kernel cache to disk")?;
    fs::rename(&ready, &dir).with_context(|| format!("cannot move the kernel to {}", dir.display()))?;
    Ok(Kernel { dir })
}

fn only_entry(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.file_name().is_some_and(|n| wanted(&n.to_string_lossy())))
        .ok_or_else(|| {
            anyhow!(
                "the kernel package is not made as expected: nothing suitable in {}",
                dir.display()
            )
        })
}

/// The ELF image inside a bzImage (Linux x86 boot protocol, `payload_offset` and `payload_length`).
///
/// QEMU starts an ELF kernel through its PVH entry, which spares every start the unpacking by an emulated CPU.
fn uncompressed(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .context("the image is cut short")?;
        Ok(u32::from_le_bytes(bytes) as usize)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        bail!("not a Linux bzImage");
    }
    // 0 means 4 for historical reasons.
    let sectors = match image[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    let payload = image
        .get(start..)
        .and_then(|p| p.get(..word(0x24c).ok()?))
        .context("the image is cut short")?;
    let mut vmlinux = Vec::new();
    if payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        ruzstd::decoding::StreamingDecoder::new(payload)?.read_to_end(&mut vmlinux)?;
    } else if payload.starts_with(b"\xfd7zXZ") {
        lzma_rs::xz_decompress(&mut &payload[..], &mut vmlinux)?;
    } else {
        bail!("the image is compressed in an unknown way");
    }
    if !vmlinux.starts_with(b"\x7fELF") {
        bail!("the image holds no ELF file");
    }
    Ok(vmlinux)
}

/// Copies all modules below `dir`, uncompressed: an emulated CPU would take its time for that at every start.
fn unpack_modules(root: &Path, dir: &Path, to: &Path, index: &mut Index) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            unpack_modules(root, &path, to, index)?;
            continue;
        }
        let plain = match path.extension().and_then(|e| e.to_str()) {
            Some("xz") => path.with_extension(""),
            Some("ko") => path.clone(),
            _ => continue,
        };
        let file = plain.strip_prefix(root).context("a module outside its tree")?;
        let packed = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let module = if plain == path {
            packed
        } else {
            let mut module = Vec::new();
            lzma_rs::xz_decompress(&mut packed.as_slice(), &mut module)
                .with_context(|| format!("cannot unpack {}", path.display()))?;
            module
        };
        index.add(
            file,
            ModInfo::of_module(&module).with_context(|| format!("cannot read {}", path.display()))?,
        );
        let target = to.join(file);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&target, without_signature(&module))
            .with_context(|| format!("cannot write {}", target.display()))?;
    }
    Ok(())
}

/// A module without the signature appended to it (Linux, `include/linux/module_signature.h`).
///
/// apt has verified the package; an emulated CPU would spend 0.3 s of every start on verifying KVM again.
fn without_signature(module: &[u8]) -> &[u8] {
    /// `struct module_signature`, of which the last word is the signature's length, big-endian.
    const TRAILER: usize = 12;
    let unsigned = || {
        let body = module.strip_suffix(b"~Module signature appended~\n")?;
        let (body, trailer) = body.split_at_checked(body.len().checked_sub(TRAILER)?)?;
        let length = u32::from_be_bytes(trailer[8..].try_into().ok()?);
        body.get(..body.len().checked_sub(length as usize)?)
    };
    unsigned().unwrap_or(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_taken_off_and_nothing_else() {
        let signed = b"code....SIGN\0\0\0\0\0\0\0\0\0\0\0\x04~Module signature appended~\n";
        assert_eq!(without_signature(signed), b"code....");
        assert_eq!(without_signature(b"code"), b"code");
        assert_eq!(
            without_signature(b"\xff\xff\xff\xff~Module signature appended~\n").len(),
            32
        );
    }

    #[test]
    fn the_newest_kernel_is_what_the_meta_package_depends_on() {
        let text = "linux-image-6.12-cloud-amd64\n  Depends: linux-image-6.12.9+deb12-cloud-amd64\n";
        assert_eq!(dependency(text), Some("linux-image-6.12.9+deb12-cloud-amd64"));
    }

    #[test]
    fn a_kernel_that_is_too_old_is_passed_over() {
        assert_eq!(
            dependency("linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n"),
            None
        );
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(uncompressed(b"").is_err());
        assert!(uncompressed(&[0; 4096]).is_err());
        let mut image = vec![0; 4096];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x250].fill(0xff);
        assert!(uncompressed(&image).is_err());
    }
}

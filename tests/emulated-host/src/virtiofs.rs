//! The machine's directories, served to the emulated host by virtiofsd.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What is served, and how fresh the host must see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The root: read only, taken as unchanging while the host runs, so that everything is asked for once.
    Root,
    /// A shared directory: written, and changes made outside are seen within a second.
    Share,
}

/// Where virtiofsd is installed: not on PATH, and elsewhere in each Debian.
const PLACES: [&str; 4] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/local/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
];

/// The virtiofsd program.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    /// The C program of QEMU up to 7.x (Debian 12) takes other options than its successor in Rust.
    old: bool,
}

impl Program {
    /// Finds it, and which of the two it is.
    pub fn find() -> Result<Self> {
        let Some(path) = PLACES.iter().map(Path::new).find(|p| p.exists()) else {
            bail!(
                "virtiofsd is not installed (looked at {}): run `make setup`, or `apt-get install virtiofsd` \
                 (on Debian 12 `apt-get install qemu-system-common`)",
                PLACES.join(", ")
            );
        };
        let output = Command::new(path)
            .arg("--help")
            .output()
            .with_context(|| format!("cannot run {} --help", path.display()))?;
        let old = !String::from_utf8_lossy(&output.stdout).contains("--shared-dir");
        Ok(Self {
            path: path.to_owned(),
            old,
        })
    }

    /// The command that serves `dir` on `listener`. The listener must stay open, under its number, in the new process.
    pub fn command(&self, dir: &Path, listener: &UnixListener, purpose: Use) -> Command {
        let mut command = Command::new(&self.path);
        command.arg(format!("--fd={}", listener.as_raw_fd()));
        if self.old {
            let mut source = OsString::from("source=");
            source.push(escape(dir));
            command.arg("-f").arg("-o").arg(source);
            // With `sandbox=chroot` it stays one process, which is what the death signal can reach.
            command.args(["-o", "sandbox=chroot", "-o", "log_level=warn"]);
            command.args(match purpose {
                Use::Root => ["-o", "cache=always", "-o", "no_xattr"],
                Use::Share => ["-o", "cache=auto", "-o", "xattr"],
            });
        } else {
            command
                .arg("--shared-dir")
                .arg(dir)
                .args(["--sandbox", "chroot", "--log-level", "warn"]);
            match purpose {
                Use::Root => command.args(["--cache", "always"]),
                Use::Share => command.args(["--cache", "auto", "--xattr"]),
            };
        }
        command
    }
}

/// A path as an option of libfuse, where a comma ends the option and a backslash takes the meaning of what follows.
fn escape(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut escaped = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b',' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(*byte);
    }
    OsString::from_vec(escaped)
}

/// A socket for one virtiofsd: it listens before anybody is started, so that nobody need wait for anybody.
pub fn listen(dir: &Path, tag: &str) -> Result<(PathBuf, UnixListener)> {
    let path = dir.join(tag);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("cannot make the socket {}", path.display()))?;
    Ok((path, listener))
}

/// The descriptor of a listener, to be inherited.
pub fn into_fd(listener: UnixListener) -> OwnedFd {
    listener.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_a_path_do_not_end_the_option() {
        assert_eq!(escape(Path::new(r"/a,b\c")), OsString::from(r"/a\,b\\c"));
    }
}

//! The files that tell a container its own name and those of others: `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf`. As
//! with Docker they are the machine's, whatever the image has in their place, and no part of the writable layer.
//!
//! They are made before the freeze, so that a clone has only its name to write. None stays open: a root file system that somebody
//! writes to cannot be made read-only.

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

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use picovm_guest_protocol::StartFailure;

use crate::console;
use crate::mounts::PLACEHOLDER_HOSTNAME;
use crate::start::failure;

/// What holds for every machine.
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
                     fe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n";

/// The files into which a clone writes its name.
pub struct NameFiles {
    hostname: Option<PathBuf>,
    hosts: Option<PathBuf>,
}

impl NameFiles {
    /// Makes the files. Where that fails, or the image has no `/etc`, the container goes without.
    pub fn make() -> Self {
        let etc = Path::new("/etc");
        if !etc.is_dir() {
            return Self {
                hostname: None,
                hosts: None,
            };
        }
        let make = |name: &str, content: &str| {
            let path = etc.join(name);
            let made = make_file(&path, content);
            if let Err(error) = &made {
                console::report(&format!("write {}: {error}", path.display()));
            }
            made.ok().map(|_| path)
        };
        // Nobody answers for names without a network; a resolver that finds this file empty says so at once.
        make("resolv.conf", "");
        Self {
            hostname: make("hostname", ""),
            hosts: make("hosts", HOSTS),
        }
    }

    /// Writes a name once before the freeze and takes it back, so that all that does it is warm.
    pub fn rehearse(&self) -> Result<(), StartFailure> {
        self.write(PLACEHOLDER_HOSTNAME)?;
        let shorten = |path: &Option<PathBuf>, length: usize| match path {
            Some(path) => open(path)?.set_len(length as u64),
            None => Ok(()),
        };
        shorten(&self.hostname, 0)
            .and_then(|()| shorten(&self.hosts, HOSTS.len()))
            .map_err(|error| because("/etc/hostname and /etc/hosts", &error))
    }

    /// Writes a clone's own name.
    pub fn write(&self, hostname: &str) -> Result<(), StartFailure> {
        if let Some(path) = &self.hostname {
            open(path)
                .and_then(|file| file.write_all_at(format!("{hostname}\n").as_bytes(), 0))
                .map_err(|error| because("/etc/hostname", &error))?;
        }
        if let Some(path) = &self.hosts {
            open(path)
                .and_then(|file| file.write_all_at(own_line(hostname).as_bytes(), HOSTS.len() as u64))
                .map_err(|error| because("/etc/hosts", &error))?;
        }
        Ok(())
    }
}

/// Gives a running container another name: it was frozen as it ran, and these files may be the container's by now. What it has
/// removed stays away, and of a root file system that nobody can write to the files stay as they were.
pub fn rename(hostname: &str) -> Result<(), StartFailure> {
    rename_in(Path::new("/etc"), hostname)
}

fn rename_in(etc: &Path, hostname: &str) -> Result<(), StartFailure> {
    let rewrite = |name: &str, change: &dyn Fn(&str) -> String| {
        let path = etc.join(name);
        let written = fs::read_to_string(&path).and_then(|before| fs::write(&path, change(&before)));
        match written {
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::InvalidData
                ) =>
            {
                Err(because(&path.to_string_lossy(), &error))
            }
            _ => Ok(()),
        }
    };
    rewrite("hostname", &|_| format!("{hostname}\n"))?;
    rewrite("hosts", &|before| {
        let others = before.lines().filter(|line| !line.starts_with(OWN_ADDRESS));
        let others: String = others.flat_map(|line| [line, "\n"]).collect();
        others + &own_line(hostname)
    })
}

fn open(path: &Path) -> io::Result<File> {
    File::options().write(true).open(path)
}

fn because(path: &str, error: &io::Error) -> StartFailure {
    failure(
        format!("write the host name into {path}"),
        error.raw_os_error().unwrap_or(0),
        error,
    )
}

/// Debian's for a machine that has none of its own.
const OWN_ADDRESS: &str = "127.0.1.1";

/// The line by which a machine finds itself; with the short name, too, where a domain follows that.
fn own_line(hostname: &str) -> String {
    match hostname.split_once('.') {
        Some((short, _)) => format!("{OWN_ADDRESS}\t{hostname} {short}\n"),
        None => format!("{OWN_ADDRESS}\t{hostname}\n"),
    }
}

/// A new file in the place of whatever is there.
fn make_file(path: &Path, content: &str) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = File::options().write(true).create_new(true).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all_at(content.as_bytes(), 0)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_a_domain_is_found_by_its_short_form_too() {
        assert_eq!(own_line("web"), "127.0.1.1\tweb\n");
        assert_eq!(own_line("web.example.org"), "127.0.1.1\tweb.example.org web\n");
    }

    #[test]
    fn a_container_that_runs_gets_another_name_and_keeps_what_it_has_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        fs::write(path("hostname"), "a-long-name\n").unwrap();
        fs::write(path("hosts"), "1.1.1.1\tx\n127.0.1.1\ta-long-name\n2.2.2.2\ty\n").unwrap();
        rename_in(directory.path(), "b").unwrap();
        assert_eq!(fs::read_to_string(path("hostname")).unwrap(), "b\n");
        assert_eq!(
            fs::read_to_string(path("hosts")).unwrap(),
            "1.1.1.1\tx\n2.2.2.2\ty\n127.0.1.1\tb\n"
        );
        fs::remove_file(path("hosts")).unwrap();
        rename_in(directory.path(), "c").unwrap();
        assert!(!path("hosts").exists());
    }

    #[test]
    fn a_name_is_written_after_the_rehearsal_as_if_there_had_been_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        std::os::unix::fs::symlink("/nowhere", &path).unwrap();
        let hostname = directory.path().join("hostname");
        make_file(&hostname, "").unwrap();
        make_file(&path, HOSTS).unwrap();
        let names = NameFiles {
            hostname: Some(hostname),
            hosts: Some(path.clone()),
        };
        names.rehearse().unwrap();
        names.write("a").unwrap();
        let hosts = fs::read_to_string(path).unwrap();
        assert_eq!(hosts.strip_prefix(HOSTS), Some("127.0.1.1\ta\n"));
        let hostname = fs::read_to_string(directory.path().join("hostname")).unwrap();
        assert_eq!(hostname, "a\n");
    }
}

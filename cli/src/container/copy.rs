//! `picovm cp`: files between a container and this machine, as tar archives, by the rules of `docker cp`.
//!
//! What a container sends is not to be trusted: it is unpacked by rules that let nothing out of the directory that was asked for.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use picovm_engine::containers::{ClientNews, Containers, Idle, Record};
use picovm_engine::{ContainerExit, EngineError, Helper, PathStatus, Store, printable_text};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::de::DeserializeOwned;

use super::arguments::CopyOptions;
use super::run;

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Stream,
    Here(PathBuf),
    There { container: String, path: Vec<u8> },
}

impl Place {
    /// `-`, a path, or `CONTAINER:PATH`. A path with a colon begins with `/` or `.`.
    fn parse(text: &OsStr) -> anyhow::Result<Self> {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        match colon {
            Some(at) if !matches!(bytes.first(), Some(b'/' | b'.')) => {
                let (container, path) = bytes.split_at(at);
                let path = path.get(1..).unwrap_or_default();
                let container = std::str::from_utf8(container)
                    .ok()
                    .filter(|name| !name.is_empty())
                    .with_context(|| format!("{:?} names no container", text.display().to_string()))?;
                if path.is_empty() {
                    bail!("there is no path behind {container}:");
                }
                let mut absolute = path.to_vec();
                if !path.starts_with(b"/") {
                    absolute.insert(0, b'/');
                }
                Ok(Self::There {
                    container: container.to_owned(),
                    path: absolute,
                })
            }
            _ if bytes.is_empty() => bail!("a path to copy from or to is empty"),
            _ => Ok(Self::Here(PathBuf::from(text))),
        }
    }
}

pub fn copy(options: &CopyOptions) -> anyhow::Result<ExitCode> {
    let (source, destination) = (
        Place::parse(&options.source)?,
        Place::parse(&options.destination)?,
    );
    match (&source, &destination) {
        (Place::There { container, path }, Place::Here(_) | Place::Stream) => {
            let mut files = Files::open(container)?;
            out(&mut files, path, &destination, options)?;
        }
        (Place::Here(_) | Place::Stream, Place::There { container, path }) => {
            let mut files = Files::open(container)?;
            into(&mut files, &source, path, options)?;
            files.keep()?;
        }
        (Place::There { .. }, Place::There { .. }) => {
            bail!("copying from one container to another is not possible: copy by way of `-`")
        }
        _ => bail!("neither side is in a container: write CONTAINER:PATH for the one that is"),
    }
    if !options.quiet && io::stderr().is_terminal() && destination != Place::Stream {
        eprintln!(
            "Copied {} to {}",
            options.source.display(),
            options.destination.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// The files of a container, whether it runs or not.
pub enum Files {
    Live {
        containers: Containers,
        record: Box<Record>,
    },
    Idle {
        idle: Box<Idle>,
        name: String,
    },
}

impl Files {
    /// Those of a container by name.
    fn open(name: &str) -> anyhow::Result<Self> {
        let store = Store::open_default()?;
        let containers = store.containers()?;
        let record = containers.find(name)?;
        Self::of(&store, containers, record)
    }

    /// Those of a container.
    pub fn of(store: &Store, containers: Containers, record: Record) -> anyhow::Result<Self> {
        if record.state.status.is_live() {
            return Ok(Self::Live {
                containers,
                record: Box::new(record),
            });
        }
        let template = run::template(store, &record)?;
        let idle = containers.open_idle(&record, &template)?;
        Ok(Self::Idle {
            idle: Box::new(idle),
            name: record.name,
        })
    }

    fn name(&self) -> &str {
        match self {
            Self::Live { record, .. } => &record.name,
            Self::Idle { name, .. } => name,
        }
    }

    /// Asks the agent something.
    pub fn query<T: DeserializeOwned>(
        &mut self,
        attempted: &'static str,
        helper: Helper,
    ) -> Result<T, EngineError> {
        match self {
            Self::Live { containers, record } => containers.connect(record)?.query(attempted, helper),
            Self::Idle { idle, .. } => idle.query(attempted, &helper),
        }
    }

    /// Has the agent do something, and waits until it has.
    pub fn help(&mut self, helper: Helper, streams: [BorrowedFd<'_>; 3]) -> anyhow::Result<ContainerExit> {
        match self {
            Self::Idle { idle, .. } => Ok(idle.help(&helper, streams)?),
            Self::Live { containers, record } => {
                let client = containers.connect(record)?;
                client.help(helper, streams)?;
                loop {
                    match client.news()? {
                        ClientNews::Exited(exit) => return Ok(exit),
                        ClientNews::Started => {}
                        ClientNews::Ended(_) | ClientNews::Gone => {
                            bail!("container {} has ended meanwhile", record.name)
                        }
                    }
                }
            }
        }
    }

    /// Keeps what was changed.
    fn keep(self) -> anyhow::Result<()> {
        match self {
            Self::Live { .. } => Ok(()),
            Self::Idle { idle, .. } => Ok(idle.save()?),
        }
    }

    /// Has an archive written to a stream.
    fn pack(&mut self, helper: Helper, attempted: &str, to: BorrowedFd<'_>) -> anyhow::Result<()> {
        let null = File::open("/dev/null").context("cannot open /dev/null")?;
        self.done(helper, attempted, null.as_fd(), to)
    }

    fn done(
        &mut self,
        helper: Helper,
        attempted: &str,
        stdin: BorrowedFd<'_>,
        stdout: BorrowedFd<'_>,
    ) -> anyhow::Result<()> {
        let mut told = tempfile::tempfile().context("cannot make a temporary file")?;
        let exit = self.help(helper, [stdin, stdout, told.as_fd()])?;
        if exit == ContainerExit::Code(0) {
            return Ok(());
        }
        let mut text = String::new();
        io::Seek::rewind(&mut told)?;
        // What a guest writes may be anything, and any length.
        let mut bytes = Vec::new();
        told.take(4096).read_to_end(&mut bytes)?;
        text.push_str(&String::from_utf8_lossy(&bytes));
        let reason = match exit {
            _ if !text.trim().is_empty() => printable_text(text.trim()).to_string(),
            ContainerExit::NotStarted(failure) => printable_text(&failure.message).to_string(),
            ContainerExit::Code(code) => format!("the container's agent ended it with status {code}"),
            ContainerExit::Signal(signal) => format!("it was ended by signal {signal}"),
        };
        bail!("cannot {attempted} container {}: {reason}", self.name())
    }

    fn status(&mut self, path: &[u8]) -> Result<PathStatus, EngineError> {
        self.query("look at the file", Helper::Stat { path: path.to_vec() })
    }

    /// Whether there is a directory, or a link to one.
    fn is_directory(&mut self, path: &[u8]) -> Result<bool, EngineError> {
        let followed = [path, b"/."].concat();
        match self.status(&followed) {
            Ok(status) => Ok(status.mode & S_IFMT == S_IFDIR),
            Err(EngineError::Agent { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn exists(&mut self, path: &[u8]) -> Result<bool, EngineError> {
        match self.status(path) {
            Ok(_) => Ok(true),
            Err(EngineError::Agent { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Type bits of `st_mode`, and those of a directory.
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;

/// What an archive's first names become.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Top {
    /// They stay.
    Keep,
    /// Another name in its place.
    Named(OsString),
    /// It goes: what is in it comes to where it would be.
    Gone,
}

impl Top {
    /// A path of an archive, with its first name changed; nothing if nothing of it is left.
    fn of(&self, path: &Path) -> Option<PathBuf> {
        let mut parts = path.components();
        let renamed = match self {
            Self::Keep => return Some(path.to_owned()),
            Self::Named(name) => {
                // Of the root directory, that is `.`.
                parts.next();
                let mut renamed = PathBuf::from(name);
                renamed.extend(parts);
                renamed
            }
            Self::Gone => {
                parts.next();
                parts.collect()
            }
        };
        (!renamed.as_os_str().is_empty()).then_some(renamed)
    }
}

/// From a container to this machine.
fn out(files: &mut Files, path: &[u8], destination: &Place, options: &CopyOptions) -> anyhow::Result<()> {
    let contents = path.ends_with(b"/.");
    let plain = path.strip_suffix(b"/.").unwrap_or(path);
    let plain: &[u8] = if plain.is_empty() { b"/" } else { plain };
    let helper = Helper::Pack {
        path: plain.to_vec(),
        follow: options.follow_link || contents || plain.ends_with(b"/"),
    };
    let shown = String::from_utf8_lossy(path).into_owned();
    let status = files
        .status(path)
        .with_context(|| format!("cannot copy {shown}"))?;
    let Place::Here(target) = destination else {
        if io::stdout().is_terminal() {
            bail!("an archive is not for a terminal: give a file by >, or a pipe");
        }
        return files.pack(helper, &format!("copy {shown} from"), rustix::stdio::stdout());
    };
    let is_directory =
        status.mode & S_IFMT == S_IFDIR || (options.follow_link && files.is_directory(plain)?);
    let (directory, top) = placed(target, is_directory, contents)?;
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).context("cannot make a pipe")?;
    std::thread::scope(|scope| {
        let unpacking = scope.spawn(|| unpack(File::from(read), &directory, &top, options.archive));
        let packed = files.pack(helper, &format!("copy {shown} from"), write.as_fd());
        drop(write);
        let unpacked = unpacking
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("unpacking has failed")));
        // Which of both is the cause: an archive that is not whole, or one that could not be taken.
        match (packed, unpacked) {
            (Ok(()), unpacked) => unpacked,
            (Err(packed), Err(unpacked)) if is_full(&unpacked) => Err(unpacked.context(packed.to_string())),
            (Err(packed), _) => Err(packed),
        }
    })
    .with_context(|| format!("cannot copy to {}", target.display()))
}

/// Whether this machine is the reason.
fn is_full(error: &anyhow::Error) -> bool {
    let kinds = [
        io::ErrorKind::StorageFull,
        io::ErrorKind::PermissionDenied,
        io::ErrorKind::ReadOnlyFilesystem,
        io::ErrorKind::QuotaExceeded,
    ];
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| kinds.contains(&cause.kind()))
}

/// Where on this machine an archive is unpacked, and what becomes of its first name.
fn placed(target: &Path, is_directory: bool, contents: bool) -> anyhow::Result<(PathBuf, Top)> {
    let shown = target.display();
    let ends_as_directory =
        target.as_os_str().as_bytes().ends_with(b"/") || target.as_os_str().as_bytes().ends_with(b"/.");
    match fs::metadata(target) {
        Ok(metadata) if metadata.is_dir() => {
            Ok((target.to_owned(), if contents { Top::Gone } else { Top::Keep }))
        }
        Ok(_) if is_directory => bail!("{shown} is a file, and a directory cannot be copied to its place"),
        Ok(_) if ends_as_directory => bail!("{shown} is no directory"),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot look at {shown}"))
        }
        Err(_) if ends_as_directory && !is_directory => bail!("there is no directory {shown}"),
        _ => {
            let name = target
                .file_name()
                .with_context(|| format!("{shown} names no file"))?
                .to_owned();
            let parent = match target.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
                _ => PathBuf::from("."),
            };
            if !parent.is_dir() {
                bail!("there is no directory {}", parent.display());
            }
            Ok((parent, Top::Named(name)))
        }
    }
}

/// Unpacks an archive, whose first names are changed on the way. Two archives, one read out of the other, so that the one that is
/// unpacked is unpacked by the rules of its crate, which keep it in its directory.
fn unpack(from: File, directory: &Path, top: &Top, keep_owners: bool) -> anyhow::Result<()> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).context("cannot make a pipe")?;
    std::thread::scope(|scope| {
        let renaming = scope.spawn(|| rename(from, File::from(write), top));
        let unpacked = unpack_here(File::from(read), directory, keep_owners);
        let renamed = renaming
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("reading the archive has failed")));
        unpacked?;
        renamed.context("cannot read the container's archive")
    })
}

fn unpack_here(from: File, directory: &Path, keep_owners: bool) -> anyhow::Result<()> {
    let mut archive = tar::Archive::new(from);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(keep_owners);
    archive.set_overwrite(true);
    // Directories last: one that cannot be written to is filled before it is made so.
    let mut directories = Vec::new();
    for entry in archive.entries().context("cannot read the archive")? {
        let mut entry = entry.context("cannot read the archive")?;
        let shown = entry
            .path()
            .map(|path| path.display().to_string())
            .unwrap_or_default();
        if entry.header().entry_type().is_dir() {
            // Made now with what it takes to fill it.
            if let Some(inside) = inside(&entry.path()?) {
                let place = directory.join(&inside);
                if !place.is_dir()
                    && entry
                        .unpack_in(directory)
                        .with_context(|| format!("cannot make {shown}"))?
                {
                    let mode = entry.header().mode().unwrap_or(0o755) & 0o7777;
                    if mode & 0o300 != 0o300 {
                        use std::os::unix::fs::PermissionsExt;
                        let _ = fs::set_permissions(&place, fs::Permissions::from_mode(mode | 0o700));
                        directories.push((place, mode));
                    }
                }
            }
            continue;
        }
        // `false` is one that would lie elsewhere: it is none that an honest agent sends.
        if !entry
            .unpack_in(directory)
            .with_context(|| format!("cannot write {shown}"))?
        {
            bail!("the container's archive has an entry outside of the directory: {shown}");
        }
    }
    for (place, mode) in directories.into_iter().rev() {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&place, fs::Permissions::from_mode(mode))
            .with_context(|| format!("cannot set the permissions of {}", place.display()))?;
    }
    Ok(())
}

/// A path that stays inside, without what says nothing.
fn inside(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir | Component::RootDir => {}
            _ => return None,
        }
    }
    (!plain.as_os_str().is_empty()).then_some(plain)
}

/// Copies an archive with its first names changed.
fn rename(from: File, to: File, top: &Top) -> io::Result<()> {
    let mut archive = tar::Archive::new(from);
    let mut renamed = tar::Builder::new(to);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let Some(path) = top.of(&entry.path()?) else {
            continue;
        };
        let mut header = entry.header().clone();
        let link = entry.link_name()?.map(|link| link.into_owned());
        match link {
            Some(link) if header.entry_type().is_hard_link() => {
                let link = top.of(&link).unwrap_or(link);
                renamed.append_link(&mut header, path, link)?;
            }
            Some(link) if header.entry_type().is_symlink() => renamed.append_link(&mut header, path, link)?,
            _ => {
                header.set_size(entry.size());
                renamed.append_data(&mut header, path, &mut entry)?;
            }
        }
    }
    renamed.into_inner()?.flush()
}

/// From this machine into a container.
fn into(files: &mut Files, source: &Place, path: &[u8], options: &CopyOptions) -> anyhow::Result<()> {
    let shown = String::from_utf8_lossy(path).into_owned();
    let attempted = format!("copy to {shown} of");
    let Place::Here(source) = source else {
        if io::stdin().is_terminal() {
            bail!("there is no archive: standard input is a terminal");
        }
        if !files.is_directory(path)? {
            bail!("container {} has no directory {shown}", files.name());
        }
        let helper = unpacking(path, options.archive);
        let null = File::options()
            .write(true)
            .open("/dev/null")
            .context("cannot open /dev/null")?;
        return files.done(helper, &attempted, rustix::stdio::stdin(), null.as_fd());
    };
    let bytes = source.as_os_str().as_bytes();
    let contents = bytes.ends_with(b"/.") || bytes == b".";
    let follow = options.follow_link || contents || bytes.ends_with(b"/");
    let metadata = match follow {
        true => fs::metadata(source),
        false => fs::symlink_metadata(source),
    }
    .with_context(|| format!("cannot copy {}", source.display()))?;
    if bytes.ends_with(b"/") && !metadata.is_dir() {
        bail!("{} is no directory", source.display());
    }
    let (directory, name) = if files.is_directory(path)? {
        let name = match contents {
            true => None,
            false => Some(name_of(source)?),
        };
        (path.to_vec(), name)
    } else {
        if files.exists(path)? && metadata.is_dir() {
            bail!(
                "{shown} of container {} is a file, and a directory cannot be copied to its place",
                files.name()
            );
        }
        if path.ends_with(b"/") && !metadata.is_dir() {
            bail!("container {} has no directory {shown}", files.name());
        }
        let plain = Path::new(OsStr::from_bytes(path));
        let parent = plain
            .parent()
            .unwrap_or(Path::new("/"))
            .as_os_str()
            .as_bytes()
            .to_vec();
        if !files.is_directory(&parent)? {
            bail!(
                "container {} has no directory {}",
                files.name(),
                String::from_utf8_lossy(&parent)
            );
        }
        let name = plain
            .file_name()
            .with_context(|| format!("{shown} names no file"))?;
        (parent, Some(name.to_owned()))
    };
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).context("cannot make a pipe")?;
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .context("cannot open /dev/null")?;
    let helper = unpacking(&directory, options.archive);
    std::thread::scope(|scope| {
        let packing = scope.spawn(|| pack(write, source, name.as_deref(), follow));
        let unpacked = files.done(helper, &attempted, read.as_fd(), null.as_fd());
        // Whoever still writes hears that nobody reads.
        drop(read);
        let packed = packing
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("packing has failed")));
        match (unpacked, packed) {
            (Ok(()), packed) => packed,
            (Err(unpacked), Err(packed)) if !is_broken_pipe(&packed) => {
                Err(packed.context(unpacked.to_string()))
            }
            (Err(unpacked), _) => Err(unpacked),
        }
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

fn unpacking(path: &[u8], keep_owners: bool) -> Helper {
    Helper::Unpack {
        path: path.to_vec(),
        keep_owners,
    }
}

/// The last name of a path, also of one that ends with `..`.
fn name_of(path: &Path) -> anyhow::Result<OsString> {
    if let Some(name) = path.file_name() {
        return Ok(name.to_owned());
    }
    let whole = fs::canonicalize(path).with_context(|| format!("cannot tell where {} is", path.display()))?;
    Ok(whole.file_name().unwrap_or(OsStr::new("root")).to_owned())
}

/// Writes a file, or a directory with all that is in it, as an archive; without a name, what is in it.
fn pack(to: OwnedFd, source: &Path, name: Option<&OsStr>, follow: bool) -> anyhow::Result<()> {
    let failed = || format!("cannot read {}", source.display());
    let mut archive = tar::Builder::new(File::from(to));
    archive.follow_symlinks(false);
    // With what is behind a link that is followed.
    let place = match follow {
        true => fs::canonicalize(source).with_context(failed)?,
        false => source.to_owned(),
    };
    match name {
        None => archive.append_dir_all("", &place).with_context(failed)?,
        Some(name) if place.symlink_metadata().with_context(failed)?.is_dir() => {
            archive.append_dir_all(name, &place).with_context(failed)?;
        }
        Some(name) => archive.append_path_with_name(&place, name).with_context(failed)?,
    }
    archive
        .into_inner()
        .and_then(|mut to| to.flush())
        .with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart_as_docker_does() {
        let parse = |text: &str| Place::parse(OsStr::new(text)).unwrap();
        let there = |container: &str, path: &str| Place::There {
            container: container.into(),
            path: path.as_bytes().to_vec(),
        };
        assert_eq!(parse("-"), Place::Stream);
        assert_eq!(parse("web:/etc"), there("web", "/etc"));
        assert_eq!(parse("web:etc/."), there("web", "/etc/."));
        assert_eq!(parse("./a:b"), Place::Here("./a:b".into()));
        assert_eq!(parse("/a:b"), Place::Here("/a:b".into()));
        assert_eq!(parse("a"), Place::Here("a".into()));
        assert!(Place::parse(OsStr::new("web:")).is_err() && Place::parse(OsStr::new(":/x")).is_err());
    }

    #[test]
    fn first_names_are_changed_also_where_they_are_a_dot() {
        let of = |top: &Top, path: &str| top.of(Path::new(path)).map(|path| path.display().to_string());
        let named = Top::Named("n".into());
        assert_eq!(of(&named, "d/a/b").as_deref(), Some("n/a/b"));
        assert_eq!(of(&named, "d/").as_deref(), Some("n"));
        assert_eq!(of(&named, "./etc/x").as_deref(), Some("n/etc/x"));
        assert_eq!(of(&Top::Gone, "./etc/x").as_deref(), Some("etc/x"));
        assert_eq!(of(&Top::Gone, "d/a").as_deref(), Some("a"));
        assert_eq!(of(&Top::Gone, "d/"), None);
        assert_eq!(of(&Top::Keep, "d/a").as_deref(), Some("d/a"));
    }

    #[test]
    fn a_copy_comes_to_where_docker_puts_it() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("file"), "x").unwrap();
        let keep = placed(&at("dir"), false, false).unwrap();
        assert_eq!(keep, (at("dir"), Top::Keep));
        assert_eq!(placed(&at("dir"), true, true).unwrap(), (at("dir"), Top::Gone));
        let named = |name: &str| (directory.path().to_owned(), Top::Named(name.into()));
        assert_eq!(placed(&at("new"), true, false).unwrap(), named("new"));
        assert_eq!(placed(&at("new"), true, true).unwrap(), named("new"));
        assert_eq!(placed(&at("file"), false, false).unwrap(), named("file"));
        assert!(placed(&at("file"), true, false).is_err());
        assert!(placed(&at("new/"), false, false).is_err());
        assert!(placed(&at("no/new"), false, false).is_err());
    }

    fn archive(entries: &[(&str, Option<&str>)]) -> File {
        let mut archive = tar::Builder::new(tempfile::tempfile().unwrap());
        for (path, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(if content.is_some() { 0o640 } else { 0o555 });
            match content {
                Some(content) => {
                    header.set_size(content.len() as u64);
                    // As bytes: the crate refuses to write what must be refused when it is read.
                    let name = header.as_gnu_mut().unwrap();
                    name.name[..path.len()].copy_from_slice(path.as_bytes());
                    header.set_cksum();
                    archive.append(&header, content.as_bytes()).unwrap();
                }
                None => {
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_size(0);
                    archive.append_data(&mut header, path, io::empty()).unwrap();
                }
            }
        }
        let mut file = archive.into_inner().unwrap();
        io::Seek::rewind(&mut file).unwrap();
        file
    }

    #[test]
    fn the_first_name_of_an_archive_is_changed() {
        let packed = || archive(&[("d", None), ("d/a", Some("one")), ("d/b/c", Some("two"))]);
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        for (top, first) in [(Top::Keep, "d/"), (Top::Named("e".into()), "e/"), (Top::Gone, "")] {
            let directory = tempfile::tempdir().unwrap();
            unpack(packed(), directory.path(), &top, false).unwrap();
            assert_eq!(read(directory.path().join(format!("{first}a"))), "one");
            assert_eq!(read(directory.path().join(format!("{first}b/c"))), "two");
        }
    }

    #[test]
    fn nothing_of_a_hostile_archive_gets_out_of_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("inside");
        fs::create_dir(&inside).unwrap();
        for path in ["../out", "d/../../out", "d/../../../out"] {
            let _ = unpack(archive(&[(path, Some("x"))]), &inside, &Top::Keep, false);
            assert!(!directory.path().join("out").exists(), "{path}");
        }
        // By way of a link that the archive itself brings.
        let mut hostile = tar::Builder::new(tempfile::tempfile().unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        hostile
            .append_link(&mut header, "link", directory.path())
            .unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(0o644);
        hostile.append_data(&mut header, "link/out", &b"x"[..]).unwrap();
        let mut file = hostile.into_inner().unwrap();
        io::Seek::rewind(&mut file).unwrap();
        assert!(unpack(file, &inside, &Top::Keep, false).is_err());
        assert!(!directory.path().join("out").exists());
    }

    #[test]
    fn files_of_this_machine_are_packed_under_the_name_they_get() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("d")).unwrap();
        fs::write(directory.path().join("d/a"), "x").unwrap();
        let names = |name: Option<&str>| {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            pack(write, &directory.path().join("d"), name.map(OsStr::new), false).unwrap();
            let mut archive = tar::Archive::new(File::from(read));
            let mut names: Vec<String> = archive
                .entries()
                .unwrap()
                .map(|entry| entry.unwrap().path().unwrap().display().to_string())
                .collect();
            names.sort();
            names
        };
        assert!(names(Some("e")).contains(&"e/a".to_owned()));
        assert!(names(None).contains(&"a".to_owned()));
    }
}

//! The writable layer of a container: all that it has changed of its image's files.
//!
//! It is the upper directory of an overlay. The switch of the root has put that and the image out of everybody's sight; a
//! descriptor of each, opened before, still leads there.

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

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use picovm_guest_protocol::frame::{INITIAL_CREDIT, LAYER};
use picovm_guest_protocol::{Change, ChangeKind, Frame, StartFailure, Stream};
use rustix::fs::{AtFlags, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::archive::unpack::{Manner, unpack};
use crate::archive::write::Packer;
use crate::archive::{OPAQUE, WHITEOUT};
use crate::error::{Attempt, InitError};
use crate::start::failure;
use crate::stub::{receive_frame, send_frame};

/// What the agent itself writes for each container, and Docker has outside of the layer, too.
const NOT_THE_CONTAINERS: [&str; 3] = ["etc/hosts", "etc/hostname", "etc/resolv.conf"];
/// The upper directory, in the file system in memory.
const UPPER: &str = "upper";
/// Bytes of the layer that are taken before credit is given back for them.
const CREDIT_STEP: u32 = INITIAL_CREDIT / 4;
/// Frames for the agent that may come while the layer does.
const EARLY_MAX: usize = 1024;

/// When something of a file was changed last.
type Changed = (i64, i64);

/// A container's image and its writable layer.
#[derive(Debug)]
pub struct Layers {
    image: OwnedFd,
    /// The file system in memory, which has the upper directory, or the one on which storage is mounted that has it.
    scratch: OwnedFd,
    /// The way from there. Of a container with storage its stub sets it, in the memory that it shares with the agent.
    upper: Cell<&'static str>,
    /// What was in the upper directory before the container: made by init, and the container's only once it changes.
    made_before: RefCell<BTreeMap<PathBuf, Changed>>,
}

/// A file of the upper directory.
struct Item {
    path: PathBuf,
    kind: ChangeKind,
    /// A directory that hides what the image has in its place.
    is_opaque: bool,
}

impl Layers {
    /// Opens both, while they are still in sight; the upper directory by that which it lies in.
    pub fn open(image: &str, scratch: &str) -> Result<Self, InitError> {
        let open = |path: &str| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).attempt(|| format!("open {path}"))
        };
        Ok(Self {
            image: open(image)?,
            scratch: open(scratch)?,
            upper: Cell::new(UPPER),
            made_before: RefCell::default(),
        })
    }

    /// A way to the image.
    pub fn image(&self) -> PathBuf {
        way_to(&self.image)
    }

    /// A way to something in the file system that the upper directory is made in.
    pub fn scratch(&self, path: &str) -> PathBuf {
        // Not by way of the working directory, which is init's own.
        way_to(&self.scratch).join(path)
    }

    /// Remembers what is there by now. To be called last before the container.
    pub fn remember(&self) -> Result<(), InitError> {
        let mut found = BTreeMap::new();
        remember(&self.scratch(self.upper.get()), Path::new(""), &mut found)
            .attempt(|| "look at the upper directory".into())?;
        self.made_before.replace(found);
        Ok(())
    }

    /// The upper directory is this one from now on. What of `made` is there is no change of the container's until it changes, as long
    /// as it is what the image has, but for the time.
    pub fn move_to(&self, upper: &'static str, made: &[&str]) -> io::Result<()> {
        self.upper.set(upper);
        let mut found = BTreeMap::new();
        for name in made {
            let metadata = match fs::symlink_metadata(self.scratch(upper).join(name)) {
                Ok(metadata) if metadata.is_dir() => metadata,
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let image = self.in_image(Path::new(name))?;
            if image.is_none_or(|image| same_owner_and_mode(&metadata, &image)) {
                found.insert(PathBuf::from(name), changed(&metadata));
            }
        }
        self.made_before.replace(found);
        Ok(())
    }

    /// Makes the upper directory this process's working directory.
    pub fn enter(&self) -> rustix::io::Result<()> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let upper = rustix::fs::openat(&self.scratch, self.upper.get(), flags, Mode::empty())?;
        rustix::process::fchdir(upper)
    }

    /// Waits until all that is in the upper directory is where it lies, if that is not memory.
    pub fn sync(&self) -> rustix::io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let upper = rustix::fs::openat(&self.scratch, self.upper.get(), flags, Mode::empty())?;
        rustix::fs::syncfs(upper)
    }

    /// What the container has changed, by path. The upper directory is at `upper`.
    pub fn changes(&self, upper: &Path) -> io::Result<Vec<Change>> {
        let mut changes = Vec::new();
        for item in self.items(upper)? {
            if item.is_opaque {
                self.hidden(upper, &item.path, &mut changes)?;
            }
            changes.push(Change {
                kind: item.kind,
                path: absolute(&item.path),
            });
        }
        changes.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(changes)
    }

    /// What of an image's directory is gone because the container has made it anew.
    fn hidden(&self, upper: &Path, directory: &Path, changes: &mut Vec<Change>) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let image = match rustix::fs::openat(&self.image, directory, flags, Mode::empty()) {
            Ok(image) => image,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for entry in rustix::fs::Dir::read_from(&image)? {
            let entry = entry?;
            let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let path = directory.join(name);
            if fs::symlink_metadata(upper.join(&path)).is_err() {
                changes.push(Change {
                    kind: ChangeKind::Deleted,
                    path: absolute(&path),
                });
            }
        }
        Ok(())
    }

    /// Writes the layer as an archive. The upper directory is at `upper`.
    pub fn save(&self, upper: &Path, writer: impl Write) -> io::Result<()> {
        let mut archive = Packer::new(writer);
        for item in self.items(upper)? {
            let path = upper.join(&item.path);
            let saved = if item.kind == ChangeKind::Deleted {
                let name = item.path.file_name().unwrap_or_default().as_bytes();
                let whiteout = OsString::from(std::ffi::OsStr::from_bytes(&[WHITEOUT, name].concat()));
                archive.marker(item.path.with_file_name(whiteout).as_os_str().as_bytes())
            } else {
                archive.append(&path, item.path.as_os_str().as_bytes())
            };
            match saved {
                Ok(()) if item.is_opaque => {
                    let marker = item.path.join(std::ffi::OsStr::from_bytes(OPAQUE));
                    archive.marker(marker.as_os_str().as_bytes())?;
                }
                // Gone meanwhile, while the container runs.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
        archive.finish()
    }

    /// What of the upper directory is the container's, each directory before what is in it.
    fn items(&self, upper: &Path) -> io::Result<Vec<Item>> {
        let mut items = Vec::new();
        self.walk(upper, Path::new(""), &mut items)?;
        Ok(items)
    }

    fn walk(&self, upper: &Path, directory: &Path, items: &mut Vec<Item>) -> io::Result<()> {
        for name in names(&upper.join(directory))? {
            let path = directory.join(name);
            if NOT_THE_CONTAINERS.iter().any(|not| path == Path::new(not)) {
                continue;
            }
            let here = upper.join(&path);
            let metadata = match fs::symlink_metadata(&here) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let is_old = self.made_before.borrow().get(&path) == Some(&changed(&metadata));
            let in_image = self.in_image(&path)?;
            if is_whiteout(&here, &metadata) {
                // One without anything to hide is what a file that came and went has left.
                if in_image.is_some() && !is_old {
                    items.push(Item {
                        path,
                        kind: ChangeKind::Deleted,
                        is_opaque: false,
                    });
                }
                continue;
            }
            let kind = match in_image {
                Some(_) => ChangeKind::Modified,
                None => ChangeKind::Added,
            };
            if !metadata.is_dir() {
                if !is_old {
                    items.push(Item {
                        path,
                        kind,
                        is_opaque: false,
                    });
                }
                continue;
            }
            let place = items.len();
            self.walk(upper, &path, items)?;
            let has_changes = items.len() > place;
            let is_opaque = is_opaque(&here);
            let differs = is_opaque || in_image.is_none_or(|image| !same_directory(&metadata, &image));
            if has_changes || (differs && !is_old) {
                let item = Item {
                    path,
                    kind,
                    is_opaque,
                };
                items.insert(place, item);
            }
        }
        Ok(())
    }

    fn in_image(&self, path: &Path) -> io::Result<Option<Stat>> {
        match rustix::fs::statat(&self.image, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn way_to(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

fn absolute(path: &Path) -> Vec<u8> {
    [b"/", path.as_os_str().as_bytes()].concat()
}

fn changed(metadata: &Metadata) -> Changed {
    (metadata.ctime(), metadata.ctime_nsec())
}

/// Names in a directory, sorted.
fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names: Vec<OsString> = entries
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn remember(root: &Path, directory: &Path, found: &mut BTreeMap<PathBuf, Changed>) -> io::Result<()> {
    for name in names(&root.join(directory))? {
        let path = directory.join(name);
        let metadata = fs::symlink_metadata(root.join(&path))?;
        if metadata.is_dir() {
            remember(root, &path, found)?;
        }
        found.insert(path, changed(&metadata));
    }
    Ok(())
}

fn is_whiteout(path: &Path, metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
        || metadata.is_file() && has_attribute(path, c"trusted.overlay.whiteout")
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0; 8];
    let read = rustix::fs::lgetxattr(path, c"trusted.overlay.opaque", value.as_mut_slice());
    read.is_ok_and(|count| value.get(..count) == Some(b"y"))
}

fn has_attribute(path: &Path, name: &std::ffi::CStr) -> bool {
    rustix::fs::lgetxattr(path, name, [0u8; 8].as_mut_slice()).is_ok()
}

/// Whether a directory of the upper directory is what the image has: it is there only for what is in it.
fn same_directory(here: &Metadata, image: &Stat) -> bool {
    same_owner_and_mode(here, image)
        && here.mtime() == image.st_mtime
        && u64::try_from(here.mtime_nsec()) == Ok(image.st_mtime_nsec)
}

fn same_owner_and_mode(here: &Metadata, image: &Stat) -> bool {
    here.mode() == image.st_mode && here.uid() == image.st_uid && here.gid() == image.st_gid
}

/// Receives the layer and unpacks it at `root`: frames of process [`LAYER`] until its standard input is closed, and not a
/// byte of what follows. Gives the frames for the agent that came in between.
pub fn receive(control: BorrowedFd<'_>, root: &Path) -> Result<Vec<(u16, Frame)>, StartFailure> {
    let mut layer = Incoming {
        control,
        bytes: VecDeque::new(),
        owed: 0,
        is_over: false,
        early: Vec::new(),
    };
    let failed = |message: String| failure("unpack the writable layer", 0, message);
    unpack(&mut layer, root, Manner::Layer).map_err(failed)?;
    // What fills up the last block of the archive.
    io::copy(&mut layer, &mut io::sink()).map_err(|error| failed(error.to_string()))?;
    Ok(layer.early)
}

/// The layer, as it comes in.
struct Incoming<'a> {
    control: BorrowedFd<'a>,
    bytes: VecDeque<u8>,
    /// Bytes taken for which no credit was given.
    owed: u32,
    is_over: bool,
    early: Vec<(u16, Frame)>,
}

impl Incoming<'_> {
    fn next_frame(&mut self) -> io::Result<()> {
        if self.owed >= CREDIT_STEP {
            let credit = Frame::Credit(Stream::Stdin, std::mem::take(&mut self.owed));
            send_frame(self.control, LAYER, &credit)?;
        }
        match receive_frame(self.control.as_fd())? {
            (LAYER, Frame::Data(Stream::Stdin, bytes)) => {
                let count = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                self.owed = self
                    .owed
                    .checked_add(count)
                    .filter(|&owed| owed <= INITIAL_CREDIT)
                    .ok_or_else(|| io::Error::other("the host sent more of it than it had credit for"))?;
                self.bytes.extend(bytes);
            }
            (LAYER, Frame::Close(Stream::Stdin)) => self.is_over = true,
            (LAYER, _) => return Err(io::Error::other("the host sent another frame")),
            early if self.early.len() < EARLY_MAX => self.early.push(early),
            _ => return Err(io::Error::other("the host sent too much else meanwhile")),
        }
        Ok(())
    }
}

impl Read for Incoming<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.bytes.is_empty() && !self.is_over {
            self.next_frame()?;
        }
        self.bytes.read(to)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use picovm_guest_protocol::frame::{DATA_MAX, HEADER_SIZE, MAIN};
    use rustix::fs::{CWD, FileType, XattrFlags};

    use super::*;
    use crate::rehearsal::control_pair;

    /// An image and what a container has made of it, as an overlay's upper directory has it.
    struct Example {
        directory: tempfile::TempDir,
        layers: Layers,
    }

    impl Example {
        /// `None` where devices and attributes of the system cannot be made.
        fn new() -> Option<Self> {
            let directory = tempfile::tempdir().unwrap();
            let path = |name: &str| directory.path().join(name);
            for made in ["image/etc", "image/full/below", "upper/etc", "upper/run"] {
                fs::create_dir_all(path(made)).unwrap();
            }
            for (name, content) in [
                ("image/etc/gone", "1"),
                ("image/etc/changed", "1"),
                ("image/full/a", "1"),
                ("image/full/below/b", "1"),
                ("upper/etc/hosts", "by init"),
            ] {
                fs::write(path(name), content).unwrap();
            }
            let text = |name: &str| path(name).to_str().unwrap().to_owned();
            let layers = Layers::open(&text("image"), &text("")).unwrap();
            layers.remember().unwrap();

            // The container's life.
            fs::write(path("upper/etc/changed"), "2").unwrap();
            let node = |name: &str, kind, device| {
                rustix::fs::mknodat(CWD, path(name), kind, Mode::from_raw_mode(0o600), device)
            };
            node("upper/etc/gone", FileType::CharacterDevice, 0).ok()?;
            fs::create_dir(path("upper/full")).unwrap();
            let opaque = c"trusted.overlay.opaque";
            rustix::fs::lsetxattr(path("upper/full"), opaque, b"y", XattrFlags::empty()).ok()?;
            fs::create_dir(path("upper/new")).unwrap();
            fs::write(path("upper/new/tool"), vec![7; 100_000]).unwrap();
            let capability = [1, 0, 0, 2, 10, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            let name = c"security.capability";
            rustix::fs::lsetxattr(path("upper/new/tool"), name, &capability, XattrFlags::empty()).ok()?;
            std::os::unix::fs::chown(path("upper/new/tool"), Some(77), Some(78)).unwrap();
            fs::set_permissions(path("upper/new/tool"), PermissionsExt::from_mode(0o6755)).unwrap();
            rustix::fs::lsetxattr(path("upper/new/tool"), name, &capability, XattrFlags::empty()).ok()?;
            fs::hard_link(path("upper/new/tool"), path("upper/new/again")).unwrap();
            symlink("x".repeat(150), path("upper/new/soft")).unwrap();
            node("upper/new/fifo", FileType::Fifo, 0).unwrap();
            node(
                "upper/new/null",
                FileType::CharacterDevice,
                rustix::fs::makedev(1, 3),
            )
            .unwrap();
            std::os::unix::net::UnixListener::bind(path("upper/new/socket")).unwrap();
            Some(Self { directory, layers })
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn saved(&self) -> Vec<u8> {
            let mut archive = Vec::new();
            self.layers.save(&self.path("upper"), &mut archive).unwrap();
            archive
        }
    }

    #[test]
    fn changes_are_those_of_the_container_and_not_of_init() {
        let Some(example) = Example::new() else { return };
        let changes = example.layers.changes(&example.path("upper")).unwrap();
        let texts: Vec<String> = changes
            .iter()
            .map(|change| format!("{:?} {}", change.kind, String::from_utf8_lossy(&change.path)))
            .collect();
        assert_eq!(
            texts,
            [
                "Modified /etc",
                "Modified /etc/changed",
                "Deleted /etc/gone",
                "Modified /full",
                "Deleted /full/a",
                "Deleted /full/below",
                "Added /new",
                "Added /new/again",
                "Added /new/fifo",
                "Added /new/null",
                "Added /new/socket",
                "Added /new/soft",
                "Added /new/tool",
            ]
        );
    }

    #[test]
    fn on_disk_what_init_makes_for_each_start_is_no_change() {
        let Some(example) = Example::new() else { return };
        for made in ["disk/etc", "disk/run", "disk/full"] {
            fs::create_dir_all(example.path(made)).unwrap();
        }
        fs::write(example.path("disk/etc/hosts"), "by init").unwrap();
        fs::set_permissions(example.path("disk/full"), fs::Permissions::from_mode(0o700)).unwrap();
        example
            .layers
            .move_to("disk", &["etc", "run", "full", "none"])
            .unwrap();
        let changes = |example: &Example| -> Vec<String> {
            let changes = example.layers.changes(&example.path("disk")).unwrap();
            let text = |change: &Change| String::from_utf8_lossy(&change.path).into_owned();
            changes.iter().map(text).collect()
        };
        // Of that it has another mode than the image's, init is not the cause.
        assert_eq!(changes(&example), ["/full"]);
        fs::write(example.path("disk/etc/new"), "").unwrap();
        assert_eq!(changes(&example), ["/etc", "/etc/new", "/full"]);
        example.layers.sync().unwrap();
    }

    #[test]
    fn a_layer_makes_of_the_image_what_the_container_had_made_of_it() {
        let Some(example) = Example::new() else { return };
        let archive = example.saved();
        let root = example.path("image");
        unpack(archive.as_slice(), &root, Manner::Layer).unwrap();
        let path = |name: &str| root.join(name);
        assert_eq!(fs::read(path("etc/changed")).unwrap(), b"2");
        assert!(!path("etc/gone").exists() && !path("etc/hosts").exists() && !path("run").exists());
        assert_eq!(fs::read_dir(path("full")).unwrap().count(), 0);
        let tool = fs::symlink_metadata(path("new/tool")).unwrap();
        assert_eq!((tool.uid(), tool.gid(), tool.mode() & 0o7777), (77, 78, 0o6755));
        let before = fs::symlink_metadata(example.path("upper/new/tool")).unwrap();
        assert_eq!(tool.mtime(), before.mtime());
        assert_eq!(tool.ino(), fs::symlink_metadata(path("new/again")).unwrap().ino());
        let mut capability = [0; 20];
        rustix::fs::lgetxattr(
            path("new/tool"),
            c"security.capability",
            capability.as_mut_slice(),
        )
        .unwrap();
        assert_eq!(capability[4..6], [10, 10]);
        assert_eq!(fs::read_link(path("new/soft")).unwrap().as_os_str().len(), 150);
        assert!(
            fs::symlink_metadata(path("new/fifo"))
                .unwrap()
                .file_type()
                .is_fifo()
        );
        let null = fs::symlink_metadata(path("new/null")).unwrap();
        assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
        assert!(!path("new/socket").exists());
        let (new, before) = (path("new"), example.path("upper/new"));
        let modified = |path| fs::metadata(path).unwrap().mtime();
        assert_eq!(modified(new), modified(before));
    }

    /// Frames of a layer, and what comes behind it.
    fn frames(archive: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, part) in archive.chunks(DATA_MAX).enumerate() {
            if number == 1 {
                Frame::Signal(15).encode(MAIN, &mut bytes).unwrap();
            }
            let data = Frame::Data(Stream::Stdin, part.to_vec());
            data.encode(LAYER, &mut bytes).unwrap();
        }
        Frame::Close(Stream::Stdin).encode(LAYER, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn of_the_connection_nothing_is_taken_but_the_layer() {
        let root = tempfile::tempdir().unwrap();
        let mut archive = Vec::new();
        let mut packer = Packer::new(&mut archive);
        let big = root.path().join("big");
        fs::write(&big, vec![3; 120_000]).unwrap();
        packer.append(&big, b"copy").unwrap();
        packer.finish().unwrap();
        archive.resize(archive.len() + 100_000, 0);

        let (host, guest) = control_pair().unwrap();
        let mut bytes = frames(&archive);
        Frame::Signal(9).encode(MAIN, &mut bytes).unwrap();
        let mut writer = fs::File::from(host.try_clone().unwrap());
        rustix::io::ioctl_fionbio(&writer, false).unwrap();
        let sender = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
        let early = receive(guest.as_fd(), root.path()).unwrap();
        sender.join().unwrap();
        assert_eq!(early, [(MAIN, Frame::Signal(15))]);
        assert_eq!(fs::read(root.path().join("copy")).unwrap(), vec![3; 120_000]);
        // What is left is the agent's.
        let rest = receive_frame(guest.as_fd()).unwrap();
        assert_eq!(rest, (MAIN, Frame::Signal(9)));
        // Credit came back, for less than a quarter not.
        rustix::io::ioctl_fionbio(&host, false).unwrap();
        let mut credit = 0;
        let mut left = rustix::io::ioctl_fionread(&host).unwrap() as usize / (HEADER_SIZE + 4);
        while left > 0 {
            let (LAYER, Frame::Credit(Stream::Stdin, bytes)) = receive_frame(host.as_fd()).unwrap() else {
                panic!("not credit");
            };
            credit += bytes as usize;
            left -= 1;
        }
        assert!(
            credit > archive.len() - CREDIT_STEP as usize - DATA_MAX,
            "{credit}"
        );
    }

    #[test]
    fn what_is_no_layer_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let refused = |bytes: Vec<u8>| {
            let (host, guest) = control_pair().unwrap();
            let mut writer = fs::File::from(host);
            rustix::io::ioctl_fionbio(&writer, false).unwrap();
            let sender = std::thread::spawn(move || {
                // Its reader goes away in the middle.
                let _ = writer.write_all(&bytes);
            });
            let failed = receive(guest.as_fd(), root.path()).unwrap_err();
            drop(guest);
            sender.join().unwrap();
            failed.message
        };
        assert!(!refused(frames(&[7; 2000])).is_empty());
        assert!(refused(Vec::new()).contains("gone"));
        let mut bytes = Vec::new();
        Frame::Signal(1).encode(LAYER, &mut bytes).unwrap();
        assert!(refused(bytes).contains("another frame"));
        let mut bytes = Vec::new();
        for _ in 0..=INITIAL_CREDIT as usize / DATA_MAX {
            // A header that promises a long content, so that nothing is done with it yet.
            let data = Frame::Data(Stream::Stdin, vec![0xff; DATA_MAX]);
            data.encode(LAYER, &mut bytes).unwrap();
        }
        assert!(!refused(bytes).is_empty());
    }
}

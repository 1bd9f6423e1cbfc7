//! The file system that is served: what the crate `fuse-backend-rs` passes through, and what a guest must not ask of it.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, ROOT_ID, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use rustix::fs::{AtFlags, CWD, XattrFlags};

use crate::numbers::Numbers;

/// How long a guest may believe what it was told of a file. The host and other containers change files too.
const BELIEVED: Duration = Duration::from_secs(1);
/// Longest value and list of extended attributes (xattr(7)).
const XATTR_MAX: usize = 64 << 10;

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;

/// Everything below the root of this process, for one guest.
pub struct Directories {
    files: PassthroughFs,
    numbers: Numbers,
}

impl Directories {
    /// To be called where `/proc` of this very process can be reached, which need not be so any more afterwards: by what is opened
    /// there, files are opened that were found before. What is served is what `/` is at the guest's first request.
    ///
    /// # Errors
    /// As opening files of `/proc`.
    pub fn new() -> io::Result<Self> {
        let config = Config {
            root_dir: "/".into(),
            entry_timeout: BELIEVED,
            attr_timeout: BELIEVED,
            // Written through, and read again by who opens a file: others have the same files.
            cache_policy: CachePolicy::Auto,
            writeback: false,
            xattr: true,
            killpriv_v2: true,
            ..Config::default()
        };
        Ok(Self {
            files: PassthroughFs::new(config)?,
            numbers: Numbers::default(),
        })
    }

    /// What has to stay open.
    #[must_use]
    pub fn descriptors(&self) -> Vec<std::os::fd::RawFd> {
        self.files.keep_fds()
    }

    /// What was found, under the guest's number of it.
    fn numbered(&self, mut entry: Entry) -> Entry {
        self.number(&mut entry.attr);
        entry
    }

    fn number(&self, attributes: &mut stat64) {
        attributes.st_ino = self.numbers.of(attributes.st_dev, attributes.st_ino);
    }

    /// Where a file is, below the root. There is no descriptor by which extended attributes could be reached without `/proc`.
    /// Whoever moves the file meanwhile moves it within what is shared. A file that has no name any more is nowhere: `/proc` tells
    /// its last one with ` (deleted)` behind it, which may be the name of another.
    fn path(&self, inode: Inode) -> io::Result<std::path::PathBuf> {
        let path = self.files.readlinkat_proc_file(inode)?;
        let (file, _) = self.files.getattr(&Context::default(), inode, None)?;
        let there = rustix::fs::lstat(&path)?;
        if (there.st_dev, there.st_ino) == (file.st_dev, file.st_ino) {
            Ok(path)
        } else {
            Err(error(libc::ENOENT))
        }
    }
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// A name of a directory's entry, and no way to another directory: none that a guest's kernel would ask for is refused.
fn plain(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(error(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// A value of this size for a guest with so much room: it may ask for the size alone, by room for nothing.
fn fitting(mut value: Vec<u8>, length: usize, room: u32) -> io::Result<Result<Vec<u8>, u32>> {
    let count = u32::try_from(length).map_err(|_| error(libc::E2BIG))?;
    if room == 0 {
        return Ok(Err(count));
    }
    if count > room {
        return Err(error(libc::ERANGE));
    }
    value.truncate(length);
    Ok(Ok(value))
}

impl FileSystem for Directories {
    type Inode = Inode;
    type Handle = Handle;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let more = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::ASYNC_DIO;
        let mut options = self.files.init(capable)? | more;
        // No file is mapped into the guest from here.
        options.remove(FsOptions::PERFILE_DAX);
        let (root, _) = self.files.getattr(&Context::default(), ROOT_ID, None)?;
        self.numbers.set_root(root.st_dev);
        Ok(options)
    }

    fn destroy(&self) {
        self.files.destroy();
    }

    fn lookup(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        plain(name)?;
        Ok(self.numbered(self.files.lookup(ctx, parent, name)?))
    }

    fn forget(&self, ctx: &Context, inode: Inode, count: u64) {
        self.files.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(Inode, u64)>) {
        self.files.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: &Context, inode: Inode, handle: Option<Handle>) -> io::Result<(stat64, Duration)> {
        let (mut attributes, believed) = self.files.getattr(ctx, inode, handle)?;
        self.number(&mut attributes);
        Ok((attributes, believed))
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: Inode,
        attr: stat64,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (mut attributes, believed) = self.files.setattr(ctx, inode, attr, handle, valid)?;
        self.number(&mut attributes);
        Ok((attributes, believed))
    }

    fn readlink(&self, ctx: &Context, inode: Inode) -> io::Result<Vec<u8>> {
        self.files.readlink(ctx, inode)
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: Inode, name: &CStr) -> io::Result<Entry> {
        plain(name)?;
        Ok(self.numbered(self.files.symlink(ctx, target, parent, name)?))
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        plain(name)?;
        // A device node of the host is nothing that a guest may leave there for others to open.
        if matches!(mode & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK) {
            return Err(error(libc::EPERM));
        }
        Ok(self.numbered(self.files.mknod(ctx, parent, name, mode, rdev, umask)?))
    }

    fn mkdir(&self, ctx: &Context, parent: Inode, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        plain(name)?;
        Ok(self.numbered(self.files.mkdir(ctx, parent, name, mode, umask)?))
    }

    fn unlink(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        plain(name)?;
        self.files.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: Inode, name: &CStr) -> io::Result<()> {
        plain(name)?;
        self.files.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        from: Inode,
        old: &CStr,
        to: Inode,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        plain(old)?;
        plain(new)?;
        // A whiteout is a device node.
        if flags & libc::RENAME_WHITEOUT != 0 {
            return Err(error(libc::EINVAL));
        }
        self.files.rename(ctx, from, old, to, new, flags)
    }

    fn link(&self, ctx: &Context, inode: Inode, parent: Inode, name: &CStr) -> io::Result<Entry> {
        plain(name)?;
        match self.files.link(ctx, inode, parent, name) {
            // Without CAP_DAC_READ_SEARCH, by which every file of the host could be opened, a file that is only held open has no
            // links made to it: before Linux 6.10 never, and then not once the thread has acted for a user.
            Err(refused) if refused.raw_os_error() == Some(libc::ENOENT) => {
                let place = self.path(parent)?.join(OsStr::from_bytes(name.to_bytes()));
                rustix::fs::linkat(CWD, self.path(inode)?, CWD, place, AtFlags::empty())?;
                self.lookup(ctx, parent, name)
            }
            made => made.map(|entry| self.numbered(entry)),
        }
    }

    fn open(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions, Option<u32>)> {
        self.files.open(ctx, inode, flags, fuse_flags)
    }

    fn create(
        &self,
        ctx: &Context,
        parent: Inode,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions, Option<u32>)> {
        plain(name)?;
        let (entry, handle, options, passthrough) = self.files.create(ctx, parent, name, args)?;
        Ok((self.numbered(entry), handle, options, passthrough))
    }

    fn read(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.files
            .read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.files.write(
            ctx,
            inode,
            handle,
            r,
            size,
            offset,
            lock_owner,
            delayed_write,
            flags,
            fuse_flags,
        )
    }

    fn flush(&self, ctx: &Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()> {
        match self.files.flush(ctx, inode, handle, lock_owner) {
            // It closes a copy of the descriptor, for what the host has to tell then. Who closes a file has written it all the same.
            Err(full) if matches!(full.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => Ok(()),
            flushed => flushed,
        }
    }

    fn fsync(&self, ctx: &Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.files.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.files.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: Inode,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.files
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: &Context, inode: Inode) -> io::Result<statvfs64> {
        self.files.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        _ctx: &Context,
        inode: Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let flags = XattrFlags::from_bits(flags).ok_or_else(|| error(libc::EINVAL))?;
        Ok(rustix::fs::lsetxattr(self.path(inode)?, name, value, flags)?)
    }

    fn getxattr(&self, _ctx: &Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let mut value = vec![0u8; XATTR_MAX];
        let length = rustix::fs::lgetxattr(self.path(inode)?, name, value.as_mut_slice())?;
        Ok(match fitting(value, length, size)? {
            Ok(value) => GetxattrReply::Value(value),
            Err(count) => GetxattrReply::Count(count),
        })
    }

    fn listxattr(&self, _ctx: &Context, inode: Inode, size: u32) -> io::Result<ListxattrReply> {
        let mut names = vec![0u8; XATTR_MAX];
        let length = rustix::fs::llistxattr(self.path(inode)?, names.as_mut_slice())?;
        Ok(match fitting(names, length, size)? {
            Ok(names) => ListxattrReply::Names(names),
            Err(count) => ListxattrReply::Count(count),
        })
    }

    fn removexattr(&self, _ctx: &Context, inode: Inode, name: &CStr) -> io::Result<()> {
        Ok(rustix::fs::lremovexattr(self.path(inode)?, name)?)
    }

    fn opendir(&self, ctx: &Context, inode: Inode, flags: u32) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.files.opendir(ctx, inode, flags)
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        // The crate gives numbers of its own here, which are those of no file's attributes.
        let mut add_plain = |mut one: DirEntry<'_>, found: Entry| {
            one.ino = self.numbers.of(found.attr.st_dev, found.attr.st_ino);
            let added = add(one);
            // It was looked up for its attributes. What did not fit is forgotten there.
            if !matches!(added, Ok(0)) {
                self.files.forget(ctx, found.inode, 1);
            }
            added
        };
        self.files
            .readdirplus(ctx, inode, handle, bounded(size), offset, &mut add_plain)
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut add_numbered = |mut one: DirEntry<'_>, found: Entry| {
            let found = self.numbered(found);
            one.ino = found.attr.st_ino;
            add(one, found)
        };
        self.files
            .readdirplus(ctx, inode, handle, bounded(size), offset, &mut add_numbered)
    }

    fn fsyncdir(&self, ctx: &Context, inode: Inode, datasync: bool, handle: Handle) -> io::Result<()> {
        self.files.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()> {
        self.files.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: &Context, inode: Inode, mask: u32) -> io::Result<()> {
        self.files.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: Inode,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.files.lseek(ctx, inode, handle, offset, whence)
    }
}

/// What a list of a directory may take: a buffer of this size is made for it.
fn bounded(size: u32) -> u32 {
    size.min(crate::server::DATA_MAX as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_way_to_another_directory() {
        for name in [c"", c".", c"..", c"a/b", c"/", c"../x"] {
            assert!(plain(name).is_err(), "{name:?}");
        }
        for name in [c"a", c"...", c"..a", c" ", c"\xff"] {
            assert!(plain(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn an_attribute_fits_or_its_size_is_told() {
        let value = || vec![7; 10];
        assert_eq!(fitting(value(), 4, 0).unwrap(), Err(4));
        assert_eq!(fitting(value(), 4, 4).unwrap(), Ok(vec![7; 4]));
        assert_eq!(
            fitting(value(), 4, 3).unwrap_err().raw_os_error(),
            Some(libc::ERANGE)
        );
    }
}

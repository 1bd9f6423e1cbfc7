//! Layers of directories and archives, and what is unpacked of them.

use std::io::Seek;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::process::Command;

use rustix::fs::{CWD, FileType, XattrFlags};
use tempfile::TempDir;

use super::*;
use crate::tree::attributes;
use crate::unpack::Layers;

/// `CAP_NET_BIND_SERVICE`, effective and permitted, and a bit whose byte is a line end.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn made(source: &Path) -> (Vec<u8>, Made) {
    let mut bytes = Vec::new();
    let made = make(source, &mut bytes, &Limits::default(), &mut |_| {}).unwrap();
    (bytes, made)
}

fn refused(source: &Path) -> String {
    make(source, &mut Vec::new(), &Limits::default(), &mut |_| {})
        .unwrap_err()
        .to_string()
}

fn node(path: &Path, kind: FileType, device: u64) {
    rustix::fs::mknodat(CWD, path, kind, 0o640.into(), device).unwrap();
}

/// A directory with all that one can hold, but for what takes root.
fn sample() -> TempDir {
    let tree = TempDir::new().unwrap();
    let at = |name: &str| tree.path().join(name);
    fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir_all(at("z/deep").join("directory/".repeat(20))).unwrap();
    fs::write(
        at("z/deep").join("directory/".repeat(20)).join("n".repeat(250)),
        "long",
    )
    .unwrap();
    fs::write(at("z/tool"), "tool").unwrap();
    fs::set_permissions(at("z/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::hard_link(at("z/tool"), at("a-tool")).unwrap();
    fs::write(at("odd \n\u{e9} name"), "odd").unwrap();
    fs::write(
        tree.path().join(std::ffi::OsStr::from_bytes(b"no \xff UTF-8")),
        "odd",
    )
    .unwrap();
    symlink("t".repeat(300), at("link")).unwrap();
    fs::hard_link(at("link"), at("same-link")).unwrap();
    node(&at("pipe"), FileType::Fifo, 0);
    let sparse = File::create(at("sparse")).unwrap();
    for at in [5 << 20, 9 << 20] {
        sparse.write_all_at(b"here", at).unwrap();
    }
    sparse.set_len(12 << 20).unwrap();
    fs::write(at("old"), "").unwrap();
    let times = |seconds, nanoseconds| {
        let time = rustix::fs::Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        };
        rustix::fs::Timestamps {
            last_access: time,
            last_modification: time,
        }
    };
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(CWD, at("old"), &times(-2, 750_000_000), flags).unwrap();
    rustix::fs::utimensat(CWD, at("link"), &times(1_000_000, 1), flags).unwrap();
    tree
}

/// What is in a tree: names, types, modes, owners, devices, sizes, links, times, and bytes of files.
fn listing(root: &Path) -> String {
    let script = "cd \"$1\" && find . -type d -printf '%p %y %m %U:%G %n %T@\\n' && \
                  find . ! -type d -printf '%p %y %m %U:%G %s %l %n %T@\\n' | sort && \
                  find . -type f -print0 | sort -z | xargs -0 sha256sum && find . -type c -exec stat -c '%n %t %T' {} +";
    let output = Command::new("sh")
        .args(["-ec", script, "sh"])
        .arg(root)
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut listing = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        for (name, value) in attributes::of(&path).unwrap() {
            let inside = path.strip_prefix(root).unwrap().display();
            listing += &format!("{inside} {name:?} {}\n", value.escape_ascii());
        }
        if path.is_dir() && !path.is_symlink() {
            let entries = fs::read_dir(path).unwrap();
            pending.extend(entries.map(|entry| entry.unwrap().path()));
        }
    }
    let mut lines: Vec<&str> = listing.lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

fn unpacked(bytes: &[u8], made: &Made) -> TempDir {
    let place = TempDir::new().unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    let mut layers = Layers::new(place.path(), &Limits::default()).unwrap();
    layers.add(file, &made.diff_id, &mut |_, _| {}).unwrap();
    layers.finish().unwrap();
    place
}

#[test]
fn a_directory_becomes_a_layer_and_that_the_same_directory() {
    let tree = sample();
    let (bytes, of) = made(tree.path());
    assert!(bytes.len() < 4 << 20, "the holes are stored: {}", bytes.len());
    let again = unpacked(&bytes, &of);
    assert_eq!(listing(again.path()), listing(tree.path()));
    // The same bytes wherever it lies, and whatever holes its file system keeps.
    let copy = TempDir::new().unwrap();
    let copied = Command::new("cp")
        .args(["-a", "--sparse=never"])
        .args([tree.path().join("."), copy.path().join(".")])
        .status()
        .unwrap();
    assert!(copied.success());
    assert_eq!(made(copy.path()), (bytes, of));
}

#[test]
fn owners_attributes_and_devices_are_kept() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let tree = sample();
    let at = |name: &str| tree.path().join(name);
    std::os::unix::fs::chown(at("old"), Some(4_000_000_000), Some(44)).unwrap();
    node(&at("null"), FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    let set = |name: &str, attribute: &str, value: &[u8]| {
        rustix::fs::lsetxattr(at(name), attribute, value, XattrFlags::empty()).unwrap();
    };
    set("z/tool", "user.note", b"kept\n= too");
    set("z/tool", "security.capability", &CAPABILITY);
    set("z", "user.of-a-directory", b"");
    set("link", "trusted.of-a-link", b"kept");
    set("z", "trusted.overlay.opaque", b"y");
    let (bytes, of) = made(tree.path());
    let again = unpacked(&bytes, &of);
    rustix::fs::removexattr(at("z"), "trusted.overlay.opaque").unwrap();
    assert_eq!(listing(again.path()), listing(tree.path()));
    let mut value = [0; 64];
    let size = rustix::fs::getxattr(again.path().join("a-tool"), "security.capability", &mut value).unwrap();
    assert_eq!(value[..size], CAPABILITY);
    assert_eq!(
        fs::metadata(again.path().join("old")).unwrap().uid(),
        4_000_000_000
    );
    // And GNU tar reads it, too.
    let place = TempDir::new().unwrap();
    let mut tar = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpC"])
        .arg(place.path())
        .stdin(std::process::Stdio::piped())
        // It warns of a time before 1970.
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert!(tar.wait().unwrap().success());
    assert_eq!(listing(place.path()), listing(tree.path()));
}

#[test]
fn sockets_are_left_out_and_told() {
    let tree = TempDir::new().unwrap();
    fs::create_dir(tree.path().join("run")).unwrap();
    node(&tree.path().join("run/socket"), FileType::Socket, 0);
    fs::write(tree.path().join("run/file"), "").unwrap();
    let (bytes, of) = made(tree.path());
    assert_eq!(of.left_out, [Path::new("run/socket")]);
    let again = unpacked(&bytes, &of);
    assert_eq!(fs::read_dir(again.path().join("run")).unwrap().count(), 1);
}

#[test]
fn an_archive_stays_as_it_is_but_for_xz() {
    let (plain, of) = made(sample().path());
    let place = TempDir::new().unwrap();
    let path = place.path().join("archive");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let gzip = gzip.finish().unwrap();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let zstd = ruzstd::encoding::compress_to_vec(&plain[..], level);
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
    xz.write_all(&plain).unwrap();
    let xz = xz.finish().unwrap();
    for (archive, layer) in [(&plain, &plain), (&gzip, &gzip), (&zstd, &zstd), (&xz, &plain)] {
        fs::write(&path, archive).unwrap();
        let (bytes, same) = made(&path);
        assert_eq!(same.diff_id, of.diff_id);
        assert!(bytes == *layer, "{} bytes of {}", bytes.len(), layer.len());
    }
    // Through a pipe, of which there is no size.
    let pipe = place.path().join("pipe");
    node(&pipe, FileType::Fifo, 0);
    let bytes = std::thread::scope(|scope| {
        let writer = scope.spawn(|| fs::write(&pipe, &gzip));
        let bytes = made(&pipe).0;
        writer.join().unwrap().unwrap();
        bytes
    });
    assert!(bytes == gzip);
}

#[test]
fn names_that_would_take_something_away_are_refused() {
    for name in [".wh.file", "etc/.wh..wh..opq", "etc/.wh.directory/file"] {
        let tree = TempDir::new().unwrap();
        let path = tree.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
        let archive = tempfile::NamedTempFile::new().unwrap();
        let tar = Command::new("tar")
            .arg("-cf")
            .arg(archive.path())
            .arg("-C")
            .args([tree.path(), Path::new(".")])
            .status();
        assert!(tar.unwrap().success());
        let refused_name = name.trim_end_matches("/file");
        for (source, entry) in [
            (tree.path(), refused_name.to_owned()),
            (archive.path(), format!("./{refused_name}")),
        ] {
            let error = refused(source);
            let begin = format!("unpack {}: refused entry {entry}", source.display());
            assert!(error.starts_with(&begin) && error.contains(".wh."), "{error}");
        }
    }
}

#[test]
fn what_cannot_be_written_is_told_from_what_cannot_be_read() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let tree = sample();
    let archive = tempfile::NamedTempFile::new().unwrap();
    fs::write(archive.path(), made(tree.path()).0).unwrap();
    for source in [tree.path(), archive.path()] {
        let error = make(source, &mut Full, &Limits::default(), &mut |_| {})
            .unwrap_err()
            .to_string();
        let begin = format!("write the layer made of {}: ", source.display());
        assert!(error.starts_with(&begin) && error.contains("no "), "{error}");
    }
}

#[test]
fn what_is_larger_than_an_image_may_be_is_refused_where_it_gets_so() {
    let archive = tempfile::NamedTempFile::new().unwrap();
    fs::write(archive.path(), made(sample().path()).0).unwrap();
    let of = |limits: Limits| {
        make(archive.path(), &mut io::sink(), &limits, &mut |_| {})
            .unwrap_err()
            .to_string()
    };
    let bytes = of(Limits {
        bytes: 8 << 20,
        ..Limits::default()
    });
    assert!(
        bytes.contains("refused at entry sparse: with it, the image has more than 8388608 bytes"),
        "{bytes}"
    );
    let entries = of(Limits {
        entries: 2,
        ..Limits::default()
    });
    assert!(entries.contains("more than 2 entries"), "{entries}");
}

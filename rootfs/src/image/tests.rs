//! Images of trees and archives, honest and hostile.

use super::*;
use crate::layer;
use std::io::{Seek, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Output;

use tempfile::TempDir;

/// Makes the layer of a source, and an image of that.
fn build_quietly(source: &Path, destination: &Path) -> Result<ImageInfo, ImageError> {
    let mut layer = tempfile::tempfile().unwrap();
    let made = layer::make(source, &mut layer, &Limits::default(), &mut |_| {})?;
    layer.rewind().unwrap();
    let layer = Layer {
        name: source.display().to_string(),
        file: layer,
        diff_id: made.diff_id,
    };
    build_layers(vec![layer], destination, &Limits::default(), &mut |_| {})
}

fn output(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

/// What `dump.erofs` says of a path in an image.
fn dump(image: &Path, path: &str) -> String {
    let shown = output(
        "dump.erofs",
        &[&format!("--path={path}"), image.to_str().unwrap()],
    );
    String::from_utf8(shown.stdout).unwrap()
}

/// The mode in the inode that `dump.erofs` has shown; it and `fsck.erofs` leave the set-uid bit out.
fn mode(image: &Path, shown: &str) -> u16 {
    let (_, number) = shown.split_once("NID: ").unwrap();
    let number: u64 = number.split_whitespace().next().unwrap().parse().unwrap();
    let mut mode = [0; 2];
    let inode = File::open(image).unwrap();
    inode.read_exact_at(&mut mode, 32 * number + 4).unwrap();
    u16::from_le_bytes(mode)
}

/// Unpacks an image.
fn extract(image: &Path, to: &Path) {
    let argument = format!("--extract={}", to.display());
    let checked = output("fsck.erofs", &[&argument, image.to_str().unwrap()]);
    assert!(checked.status.success(), "{checked:?}");
}

fn sample_tree() -> TempDir {
    let tree = TempDir::new().unwrap();
    let at = |name: &str| tree.path().join(name);
    fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir_all(at("etc/deep/er")).unwrap();
    fs::create_dir(at("bin")).unwrap();
    fs::write(at("etc/hostname"), "box\n").unwrap();
    fs::write(at("bin/tool"), vec![7; 10_000]).unwrap();
    fs::set_permissions(at("bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::hard_link(at("bin/tool"), at("bin/same-tool")).unwrap();
    symlink("/etc/hostname", at("etc/deep/link")).unwrap();
    symlink("../../../outside", at("etc/deep/er/dangling")).unwrap();
    let long_ago = rustix::fs::Timespec {
        tv_sec: 1_000_000,
        tv_nsec: 0,
    };
    let times = rustix::fs::Timestamps {
        last_access: long_ago,
        last_modification: long_ago,
    };
    for name in [
        "etc/hostname",
        "etc/deep/link",
        "etc/deep/er/dangling",
        "etc/deep/er",
        "etc/deep",
        "etc",
        "bin/tool",
        "bin",
        "",
    ] {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(rustix::fs::CWD, at(name), &times, flags).unwrap();
    }
    tree
}

/// Archive of a tree as GNU tar makes it.
fn tar_of(tree: &Path, extra: &[&str]) -> Vec<u8> {
    let mut arguments = vec!["-C", tree.to_str().unwrap(), "--sort=name", "-c"];
    arguments.extend(extra);
    arguments.push(".");
    let made = output("tar", &arguments);
    assert!(made.status.success(), "{made:?}");
    made.stdout
}

fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Builds from these bytes in an otherwise empty directory; what is left there is the second result.
fn build_from(bytes: &[u8]) -> (Result<ImageInfo, ImageError>, Vec<String>) {
    let directory = TempDir::new().unwrap();
    let archive = directory.path().join("archive");
    fs::write(&archive, bytes).unwrap();
    let result = build_quietly(&archive, &directory.path().join("image"));
    (result, names_in(directory.path()))
}

struct Made {
    kind: tar::EntryType,
    name: &'static str,
    link: &'static str,
    content: &'static [u8],
}

const FILE: tar::EntryType = tar::EntryType::Regular;
const LINK: tar::EntryType = tar::EntryType::Symlink;
const HARD: tar::EntryType = tar::EntryType::Link;
const DIRECTORY: tar::EntryType = tar::EntryType::Directory;

fn made(kind: tar::EntryType, name: &'static str, link: &'static str) -> Made {
    let content: &[u8] = if kind == FILE { b"hello" } else { b"" };
    Made {
        kind,
        name,
        link,
        content,
    }
}

/// An archive with entries that no tar would make.
fn archive(entries: &[Made]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(entry.kind);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(entry.content.len() as u64);
        // Written raw: the library itself would refuse the hostile ones.
        let raw = header.as_old_mut();
        raw.name[..entry.name.len()].copy_from_slice(entry.name.as_bytes());
        raw.linkname[..entry.link.len()].copy_from_slice(entry.link.as_bytes());
        header.set_cksum();
        builder.append(&header, entry.content).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn a_directory_becomes_an_image_that_fsck_accepts() {
    let tree = sample_tree();
    let place = TempDir::new().unwrap();
    let image = place.path().join("image");
    let mut seen = Vec::new();
    let info = build_directory(tree.path(), &[], &image, &mut |progress| seen.push(progress)).unwrap();
    assert_eq!(info.size, fs::metadata(&image).unwrap().len());
    assert_eq!(info.size % BLOCK_SIZE, 0);
    assert_eq!(info.digest, digest(&image).unwrap());
    assert_eq!((info.entries, info.content), (9, 10_004));
    assert_eq!(seen.first(), Some(&Progress::Scanning));
    assert_eq!(seen.last(), Some(&Progress::Digesting { size: info.size }));
    assert_eq!(names_in(place.path()), ["image"]);
    assert_eq!(fs::metadata(&image).unwrap().mode() & 0o777, 0o644);

    let out = place.path().join("out");
    extract(&image, &out);
    assert_eq!(fs::read(out.join("etc/hostname")).unwrap(), b"box\n");
    assert_eq!(
        fs::read_link(out.join("etc/deep/link")).unwrap(),
        Path::new("/etc/hostname")
    );
    let tool = dump(&image, "/bin/tool");
    assert!(tool.contains("Links: 2"), "{tool}");
    assert_eq!(mode(&image, &tool), 0o104_755);
    assert!(tool.contains("1970-01-12"), "{tool}");
}

#[test]
fn the_same_content_gives_the_same_digest_from_a_directory_and_an_archive() {
    let place = TempDir::new().unwrap();
    let image = |name: &str| place.path().join(name);
    let tree = sample_tree();
    let first = build_quietly(tree.path(), &image("one")).unwrap();
    let second = build_quietly(sample_tree().path(), &image("two")).unwrap();
    assert_eq!(first, second);
    let (third, _) = build_from(&tar_of(tree.path(), &[]));
    let (fourth, _) = build_from(&tar_of(tree.path(), &["--format=posix"]));
    assert_eq!(third.unwrap(), first);
    assert_eq!(fourth.unwrap(), first);
}

#[test]
fn a_directory_gives_the_image_that_its_layer_gives() {
    let tree = sample_tree();
    let socket = tree.path().join("etc/deep/socket");
    let kind = rustix::fs::FileType::Socket;
    rustix::fs::mknodat(rustix::fs::CWD, &socket, kind, 0o600.into(), 0).unwrap();
    let place = TempDir::new().unwrap();
    let of_layer = build_quietly(tree.path(), &place.path().join("one")).unwrap();
    let left_out = [PathBuf::from("etc/deep/socket")];
    let directly = build_directory(tree.path(), &left_out, &place.path().join("two"), &mut |_| {});
    assert_eq!(directly.unwrap(), of_layer);
}

#[test]
fn every_compression_is_known_by_its_content() {
    let tree = sample_tree();
    let plain = tar_of(tree.path(), &[]);
    let digest = build_from(&plain).0.unwrap().digest;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let gzip = gzip.finish().unwrap();
    let (front, back) = plain.split_at(plain.len() / 2);
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let zstd = [
        ruzstd::encoding::compress_to_vec(front, level),
        ruzstd::encoding::compress_to_vec(back, level),
    ]
    .concat();
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
    xz.write_all(&plain).unwrap();
    let xz = xz.finish().unwrap();
    for (name, archive) in [("gzip", &gzip), ("zstd", &zstd), ("xz", &xz)] {
        let (result, left) = build_from(archive);
        assert_eq!(result.unwrap().digest, digest, "{name}");
        assert_eq!(left, ["archive", "image"], "{name}");
        // Cut anywhere, it is an error and never half an image.
        for keep in [archive.len() - 3, archive.len() / 2, 20] {
            let (result, left) = build_from(&archive[..keep]);
            assert!(result.is_err(), "{name} cut to {keep}");
            assert_eq!(left, ["archive"], "{name} cut to {keep}");
        }
    }
}

#[test]
fn a_truncated_archive_is_refused_wherever_it_is_cut() {
    let plain = archive(&[
        made(DIRECTORY, "d/", ""),
        made(FILE, "d/a", ""),
        made(FILE, "d/b", ""),
    ]);
    for keep in (1..5)
        .map(|blocks| blocks * 512)
        .chain([100, 700, 1025, 1536 + 3])
    {
        let (result, left) = build_from(&plain[..keep]);
        assert!(result.is_err(), "cut to {keep}");
        assert_eq!(left, ["archive"], "cut to {keep}");
    }
    let error = build_from(&plain[..512]).0.unwrap_err().to_string();
    assert!(error.contains("truncated"), "{error}");
    assert!(build_from(&plain).0.is_ok());
}

#[test]
fn hostile_entries_are_refused_by_name_and_touch_nothing() {
    let outside = TempDir::new().unwrap();
    let target: &'static str = Box::leak(outside.path().to_str().unwrap().to_owned().into_boxed_str());
    let cases = [
        ("../escape", vec![made(FILE, "../escape", "")]),
        ("d/../../escape", vec![made(FILE, "d/../../escape", "")]),
        (
            "out/file",
            vec![made(LINK, "out", target), made(FILE, "out/file", "")],
        ),
        (
            "up/file",
            vec![made(LINK, "up", "../.."), made(FILE, "up/file", "")],
        ),
        (
            "out/dir/",
            vec![made(LINK, "out", target), made(DIRECTORY, "out/dir/", "")],
        ),
        ("grab", vec![made(HARD, "grab", "../archive")]),
        (
            "taken",
            vec![made(LINK, "out", "/etc"), made(HARD, "taken", "out/passwd")],
        ),
        (
            "loop/file",
            vec![made(LINK, "loop", "loop"), made(FILE, "loop/file", "")],
        ),
    ];
    for (name, entries) in cases {
        let (result, left) = build_from(&archive(&entries));
        let error = result.unwrap_err();
        assert!(
            matches!(
                &error,
                ImageError::Unpack { source: UnpackError::Hostile { entry, .. }, .. }
                | ImageError::Layer { source: UnpackError::Hostile { entry, .. }, .. } if entry == name
            ),
            "{name}: {error}"
        );
        assert_eq!(left, ["archive"], "{name}");
        assert_eq!(names_in(outside.path()), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn unusual_but_honest_archives_are_unpacked() {
    let entries = [
        // Absolute names are the image's own.
        made(FILE, "/etc/absolute", ""),
        // A link that stays inside may be on the way.
        made(DIRECTORY, "usr/bin/", ""),
        made(LINK, "bin", "usr/bin"),
        made(FILE, "bin/tool", ""),
        // The later of two entries counts, also through a link of the same name.
        made(LINK, "twice", "/etc/passwd"),
        made(FILE, "twice", ""),
        made(HARD, "again", "./bin/tool"),
        // Parents that have no entry.
        made(FILE, "made/on/the/way", ""),
        made(tar::EntryType::Fifo, "pipe", ""),
    ];
    let place = TempDir::new().unwrap();
    let source = place.path().join("archive");
    let image = place.path().join("image");
    fs::write(&source, archive(&entries)).unwrap();
    build_quietly(&source, &image).unwrap();
    let out = place.path().join("out");
    extract(&image, &out);
    for name in [
        "etc/absolute",
        "usr/bin/tool",
        "twice",
        "again",
        "made/on/the/way",
    ] {
        assert_eq!(fs::read(out.join(name)).unwrap(), b"hello", "{name}");
    }
    assert!(!out.join("twice").is_symlink());
    assert!(dump(&image, "/again").contains("Links: 2"));
    assert!(
        dump(&image, "/pipe").contains("FIFO"),
        "{}",
        dump(&image, "/pipe")
    );
}

#[test]
fn owners_devices_and_attributes_are_kept() {
    if !rustix::process::geteuid().is_root() {
        // Then they cannot be, and it is said why.
        let mut bytes = archive(&[made(FILE, "x", "")]);
        bytes[116..124].copy_from_slice(b"0000000\0");
        let error = build_from(&bytes).0.unwrap_err().to_string();
        assert!(error.contains("needs root"), "{error}");
        return;
    }
    let tree = TempDir::new().unwrap();
    let at = |name: &str| tree.path().join(name);
    fs::write(at("owned"), "x").unwrap();
    std::os::unix::fs::chown(at("owned"), Some(70_000), Some(44)).unwrap();
    rustix::fs::lsetxattr(at("owned"), "user.note", b"kept", rustix::fs::XattrFlags::empty()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("null"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::from_raw_mode(0o666),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    let place = TempDir::new().unwrap();
    let source = place.path().join("archive");
    let image = place.path().join("image");
    fs::write(&source, tar_of(tree.path(), &["--xattrs", "--format=posix"])).unwrap();
    build_quietly(&source, &image).unwrap();
    let owned = dump(&image, "/owned");
    assert!(
        owned.contains("Uid: 70000") && owned.contains("Gid: 44"),
        "{owned}"
    );
    assert!(owned.contains("Xattr size: "), "{owned}");
    assert!(!owned.contains("Xattr size: 0"), "{owned}");
    assert!(
        dump(&image, "/null").contains("char dev"),
        "{}",
        dump(&image, "/null")
    );
}

#[test]
fn what_is_no_source_is_refused_with_its_name() {
    let place = TempDir::new().unwrap();
    let image = place.path().join("image");
    let refused = |source: &Path| {
        let error = build_quietly(source, &image).unwrap_err().to_string();
        assert!(error.contains(source.to_str().unwrap()), "{error}");
        assert!(!image.exists());
        error
    };
    assert!(refused(Path::new("/no/such/tree")).contains("No such file"));
    assert!(refused(Path::new("/dev/null")).contains("neither a directory nor"));
    let source = place.path().join("source");
    fs::create_dir(&source).unwrap();
    assert!(refused(&source).contains("is empty"));
    fs::remove_dir(&source).unwrap();
    for content in [&b""[..], b"hello", &[b'x'; 5000]] {
        fs::write(&source, content).unwrap();
        let error = refused(&source);
        assert!(
            error.contains("neither") || error.contains("truncated"),
            "{error}"
        );
    }
    fs::write(&source, [0; 10_240]).unwrap();
    assert!(refused(&source).contains("is empty"));
    assert_eq!(names_in(place.path()), ["source"]);
}

#[test]
fn a_destination_that_cannot_be_written_is_an_error() {
    let tree = sample_tree();
    let refused = |destination: &Path| build_quietly(tree.path(), destination).unwrap_err().to_string();
    assert!(refused(Path::new("/no/such/place/image")).contains("/no/such/place/image"));
    let place = TempDir::new().unwrap();
    fs::create_dir(place.path().join("image")).unwrap();
    assert!(refused(&place.path().join("image")).contains("directory"));
    assert_eq!(names_in(place.path()), ["image"]);
}

#[test]
fn an_older_image_is_replaced_by_a_build_and_kept_by_a_failure() {
    let place = TempDir::new().unwrap();
    let image = place.path().join("image");
    fs::write(&image, "old").unwrap();
    build_quietly(Path::new("/no/such/tree"), &image).unwrap_err();
    assert_eq!(fs::read(&image).unwrap(), b"old");
    build_quietly(sample_tree().path(), &image).unwrap();
    assert_ne!(fs::read(&image).unwrap(), b"old");
}

#[test]
fn a_full_disk_leaves_nothing() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let place = TempDir::new().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
        .arg(place.path())
        .status()
        .unwrap();
    assert!(mounted.success());
    let tree = TempDir::new().unwrap();
    fs::write(tree.path().join("large"), vec![1; 300_000]).unwrap();
    let from_tree = build_quietly(tree.path(), &place.path().join("image"));
    let archive = tree.path().join("archive");
    fs::write(&archive, tar_of(tree.path(), &["--exclude=./archive"])).unwrap();
    let from_archive = build_quietly(&archive, &place.path().join("image"));
    let left = names_in(place.path());
    let unmounted = Command::new("umount").arg(place.path()).status().unwrap();
    assert!(unmounted.success());
    for result in [from_tree, from_archive] {
        let error = result.unwrap_err().to_string();
        assert!(error.to_lowercase().contains("no space"), "{error}");
    }
    assert_eq!(left, Vec::<String>::new());
}

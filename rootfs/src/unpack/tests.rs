//! Archives and layers as tools make them, and as no tool would.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;

use tar::EntryType;
use tempfile::TempDir;

use super::*;

/// An archive that is put together entry by entry, names unchecked.
struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn entry(mut self, kind: EntryType, name: &str, link: &str, content: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        let id = rustix::process::geteuid().as_raw().into();
        header.set_uid(id);
        header.set_gid(rustix::process::getegid().as_raw().into());
        header.set_mtime(1);
        header.set_size(content.len() as u64);
        let raw = header.as_old_mut();
        raw.name[..name.len()].copy_from_slice(name.as_bytes());
        raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, name, "", content.as_bytes())
    }

    fn directory(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, target, b"")
    }

    /// A PAX header for the next entry.
    fn pax(self, key: &str, value: &[u8]) -> Self {
        let rest = key.len() + value.len() + 3;
        let digits = |length: usize| length.to_string().len();
        let length = rest + digits(rest + digits(rest));
        let record = [format!("{length} {key}=").as_bytes(), value, b"\n"].concat();
        assert_eq!(record.len(), length);
        self.entry(EntryType::XHeader, "header", "", &record)
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file
}

fn digest(bytes: &[u8]) -> String {
    sha256(Sha256::new_with_prefix(bytes))
}

/// Unpacks one layer.
fn unpack(bytes: &[u8], root: &Path, limits: &Limits) -> Result<(), UnpackError> {
    let mut plain = Vec::new();
    decompress(BufReader::new(file_of(bytes)))?
        .read_to_end(&mut plain)
        .unwrap();
    let mut layers = Layers::new(root, limits)?;
    layers.add(file_of(bytes), &digest(&plain), &mut |_, _| {})?;
    layers.finish()
}

/// Unpacks layers beside nothing else.
fn layered(layers: &[Vec<u8>]) -> (TempDir, Result<(), UnpackError>) {
    let place = TempDir::new().unwrap();
    let root = place.path().join("root");
    fs::create_dir(&root).unwrap();
    let mut unpacked = Layers::new(&root, &Limits::default()).unwrap();
    let result = layers
        .iter()
        .try_for_each(|layer| unpacked.add(file_of(layer), &digest(layer), &mut |_, _| {}))
        .and_then(|()| unpacked.finish());
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    (place, result)
}

fn refused(layers: &[Vec<u8>]) -> String {
    layered(layers).1.unwrap_err().to_string()
}

/// Names below a directory.
fn tree(place: &TempDir) -> Vec<String> {
    fn walk(directory: PathBuf, root: &Path, names: &mut Vec<String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            names.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            if path.is_dir() && !path.is_symlink() {
                walk(path, root, names);
            }
        }
    }
    let root = place.path().join("root");
    let mut names = Vec::new();
    walk(root.clone(), &root, &mut names);
    names.sort();
    names
}

#[test]
fn whiteouts_take_away_what_is_below_and_nothing_of_their_own_layer() {
    let lower = Archive::new()
        .file("gone", "1")
        .file("kept", "1")
        .directory("tree/")
        .file("tree/a", "1")
        .file("tree/deep/b", "1")
        .file("opaque/old", "1")
        .file("opaque/sub/old", "1")
        .file("renewed", "1")
        .file(".wh.nothing-is-below", "")
        .bytes();
    let upper = Archive::new()
        .file(".wh.gone", "")
        .file(".wh.never-was", "")
        .file("no/such/.wh.directory", "")
        .file(".wh.tree", "")
        // What stands before the mark stays as well as what stands behind it.
        .file("opaque/sub/new", "2")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "2")
        .file("renewed", "2")
        .file(".wh.renewed", "")
        .file(".wh..wh.plnk", "")
        .bytes();
    let (place, result) = layered(&[lower, upper]);
    result.unwrap();
    assert_eq!(
        tree(&place),
        [
            "kept",
            "opaque",
            "opaque/new",
            "opaque/sub",
            "opaque/sub/new",
            "renewed"
        ]
    );
    assert_eq!(fs::read(place.path().join("root/renewed")).unwrap(), b"2");
}

#[test]
fn an_upper_layer_replaces_whatever_has_its_name() {
    let lower = Archive::new()
        .file("tree/deep/file", "1")
        .file("file", "1")
        .symlink("link", "tree")
        .file("linked", "1")
        .hard_link("same", "linked")
        .directory("mode/")
        .file("mode/kept", "1")
        .bytes();
    let upper = Archive::new()
        .file("tree", "2")
        .file("file/now/a/directory", "2")
        .directory("link/")
        .file("link/own", "2")
        .file("linked", "2")
        .hard_link("across", "same")
        .bytes();
    let refusal = refused(&[lower.clone(), upper.clone()]);
    // A file is no directory; only an entry says that it is to be one.
    assert!(refusal.contains("file/now/a/directory"), "{refusal}");
    let upper = [Archive::new().directory("file/").bytes()[..512].to_vec(), upper].concat();
    let (place, result) = layered(&[lower, upper]);
    result.unwrap();
    let root = place.path().join("root");
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert_eq!(
        (read("tree"), read("file/now/a/directory")),
        ("2".into(), "2".into())
    );
    assert!(!root.join("link").is_symlink());
    assert_eq!(
        (read("linked"), read("same"), read("across")),
        ("2".into(), "1".into(), "1".into())
    );
    assert_eq!(read("mode/kept"), "1");
}

#[test]
fn an_absolute_link_means_a_directory_of_the_image() {
    let lower = Archive::new()
        .directory("run/")
        .symlink("var/run", "/run")
        .symlink("usr/lib/deep", "../../var/run/../run")
        .bytes();
    let upper = Archive::new()
        .file("var/run/one", "2")
        .file("usr/lib/deep/two", "2")
        .hard_link("three", "var/run/one")
        .bytes();
    let (place, result) = layered(&[lower.clone(), upper]);
    result.unwrap();
    let root = place.path().join("root");
    for name in ["run/one", "run/two", "three"] {
        assert_eq!(fs::read(root.join(name)).unwrap(), b"2", "{name}");
    }
    let removing = Archive::new().file("var/run/.wh..wh..opq", "").bytes();
    let filled = Archive::new().file("run/one", "2").bytes();
    let (place, result) = layered(&[lower, filled, removing]);
    result.unwrap();
    assert!(!tree(&place).contains(&"run/one".to_owned()));
}

#[test]
fn hostile_layers_are_refused_by_the_entry_and_touch_nothing() {
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("precious"), "1").unwrap();
    let target = outside.path().to_str().unwrap();
    let link = Archive::new()
        .symlink("out", target)
        .symlink("up", "../../../../../..")
        .file("etc/passwd", "1")
        .bytes();
    let cases = [
        (".wh..", Archive::new().file(".wh..", "")),
        (".wh...", Archive::new().file(".wh...", "")),
        ("etc/.wh...", Archive::new().file("etc/.wh...", "")),
        ("../.wh.etc", Archive::new().file("../.wh.etc", "")),
        ("out/.wh.precious", Archive::new().file("out/.wh.precious", "")),
        ("out/.wh..wh..opq", Archive::new().file("out/.wh..wh..opq", "")),
        ("up/.wh.tmp", Archive::new().file("up/.wh.tmp", "")),
        ("out/new", Archive::new().file("out/new", "2")),
        ("up/new", Archive::new().file("up/new", "2")),
        ("taken", Archive::new().hard_link("taken", "out/precious")),
        ("taken", Archive::new().hard_link("taken", "../outside")),
        ("taken", Archive::new().hard_link("taken", "/")),
        (".", Archive::new().symlink(".", "/tmp")),
        ("odd", Archive::new().entry(EntryType::new(b'Z'), "odd", "", b"")),
    ];
    for (name, upper) in cases {
        let error = refused(&[link.clone(), upper.bytes()]);
        assert!(
            error.starts_with(&format!("refused entry {name}: ")),
            "{name}: {error}"
        );
        let left: Vec<_> = fs::read_dir(outside.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{name}");
    }
}

#[test]
fn no_tree_becomes_too_deep_to_be_walked() {
    let error = refused(&[Archive::new()
        .pax("path", "d/".repeat(1000).as_bytes())
        .directory("x")
        .bytes()]);
    assert!(error.contains("too deep"), "{error}");
    // A link leads back to where the path was short.
    let steps = "d/".repeat(90);
    let mut archive = Archive::new().pax("path", steps.as_bytes()).directory("x");
    for round in 0..4 {
        let (link, next) = (format!("l{round}"), format!("l{}", round + 1));
        let onward = if round == 0 {
            steps.clone()
        } else {
            format!("{link}/{steps}")
        };
        archive = archive
            .pax("path", onward.as_bytes())
            .directory("x")
            .pax("linkpath", onward.trim_end_matches('/').as_bytes())
            .symlink(&next, "x");
    }
    let error = refused(&[archive.bytes()]);
    assert!(error.contains("too deep"), "{error}");
}

#[test]
fn what_is_larger_than_allowed_is_refused_where_it_gets_too_large() {
    let limits = Limits {
        bytes: 1000,
        entries: 3,
    };
    let unpacked = |bytes: &[u8]| {
        let place = TempDir::new().unwrap();
        unpack(bytes, place.path(), &limits)
            .map_err(|error| error.to_string())
            .map(|()| place)
    };
    let files = |names: &[&str], size: usize| {
        names
            .iter()
            .fold(Archive::new(), |archive, name| {
                archive.file(name, &"x".repeat(size))
            })
            .bytes()
    };
    unpacked(&files(&["a", "b"], 500)).unwrap();
    assert_eq!(
        unpacked(&files(&["a", "b"], 501)).unwrap_err(),
        "refused at entry b: with it, the image has more than 1000 bytes"
    );
    assert_eq!(
        unpacked(&files(&["a", "b", "c", "d"], 1)).unwrap_err(),
        "refused at entry d: with it, the image has more than 3 entries"
    );
    // A few bytes that say they are many.
    let bomb = Archive::new()
        .pax("GNU.sparse.map", b"0,1")
        .pax("GNU.sparse.size", b"1")
        .file("never", "")
        .bytes();
    assert!(
        unpacked(&bomb).unwrap_err().contains("pieces"),
        "two headers, the later one counts"
    );
    let record = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n40 GNU.sparse.realsize=1000000000000000\n";
    let bomb = Archive::new()
        .entry(EntryType::XHeader, "header", "", record)
        .file("sparse", &format!("0\n{}", "\0".repeat(510)))
        .bytes();
    assert_eq!(
        unpacked(&bomb).unwrap_err(),
        "refused at entry sparse: with it, the image has more than 1000 bytes"
    );
    // What has no end, behind the end mark.
    let mut endless = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    endless.write_all(&files(&["a"], 1)).unwrap();
    endless.write_all(&vec![0; 1 << 20]).unwrap();
    let error = unpacked(&endless.finish().unwrap()).unwrap_err();
    assert!(error.contains("larger than an image may be"), "{error}");
}

#[test]
fn a_layer_must_be_what_the_configuration_says() {
    let layer = Archive::new().file("a", "1").bytes();
    let place = TempDir::new().unwrap();
    let mut layers = Layers::new(place.path(), &Limits::default()).unwrap();
    let expected = digest(b"something else");
    let error = layers
        .add(file_of(&layer), &expected, &mut |_, _| {})
        .unwrap_err();
    assert!(
        matches!(&error, UnpackError::Digest { actual, expected: said } if *actual == digest(&layer) && *said == expected),
        "{error}"
    );
    // Compressed, it is the same layer, and padding is part of it.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&layer).unwrap();
    layers
        .add(file_of(&gzip.finish().unwrap()), &digest(&layer), &mut |_, _| {})
        .unwrap();
    // Without an end mark, and even without the padding of the last file.
    let cut = &layer[..512 + 1];
    layers.add(file_of(cut), &digest(cut), &mut |_, _| {}).unwrap();
    layers
        .add(file_of(&layer[..512]), &digest(&layer[..512]), &mut |_, _| {})
        .unwrap_err();
    // A layer of nothing is one, with and without an end mark.
    for empty in [&[0; 1024][..], &[]] {
        layers
            .add(file_of(empty), &digest(empty), &mut |_, _| {})
            .unwrap();
    }
    layers.finish().unwrap();
}

#[test]
fn a_directory_has_no_content_whatever_its_size() {
    let mut archive = Archive::new().directory("d/").bytes();
    archive[124..136].copy_from_slice(b"00000010000\0");
    let sum: u32 = archive[..512]
        .iter()
        .enumerate()
        .map(|(at, byte)| {
            if (148..156).contains(&at) {
                32
            } else {
                u32::from(*byte)
            }
        })
        .sum();
    archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    archive.truncate(512);
    archive.extend(Archive::new().file("d/a", "1").bytes());
    let (place, result) = layered(&[archive]);
    result.unwrap();
    assert_eq!(tree(&place), ["d", "d/a"]);
}

#[test]
fn zstd_frames_that_are_to_be_skipped_are() {
    let layer = Archive::new().file("a", "1").bytes();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let (front, back) = layer.split_at(700);
    let skipped = [&0x184d_2a50u32.to_le_bytes()[..], &5u32.to_le_bytes(), b"aside"].concat();
    let archive = [
        ruzstd::encoding::compress_to_vec(front, level),
        skipped.clone(),
        ruzstd::encoding::compress_to_vec(back, level),
        skipped,
    ]
    .concat();
    let place = TempDir::new().unwrap();
    unpack(&archive, place.path(), &Limits::default()).unwrap();
    assert_eq!(fs::read(place.path().join("a")).unwrap(), b"1");
    let cut = &archive[..archive.len() - 2];
    let place = TempDir::new().unwrap();
    Layers::new(place.path(), &Limits::default())
        .unwrap()
        .add(file_of(cut), &digest(&layer), &mut |_, _| {})
        .unwrap_err();
}

#[test]
fn sparse_files_and_long_names_are_as_gnu_tar_means_them() {
    let source = TempDir::new().unwrap();
    let sparse = File::create(source.path().join("sparse")).unwrap();
    for (at, byte) in [
        (0, 1u8),
        (70_000, 2),
        (900_000, 3),
        (2_000_000, 4),
        (5_000_000, 5),
        (9_000_000, 6),
    ] {
        std::os::unix::fs::FileExt::write_all_at(&sparse, &[byte; 3000], at).unwrap();
    }
    sparse.set_len(10_000_000).unwrap();
    File::create(source.path().join("hole"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let long = source.path().join("directory/".repeat(20));
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join("n".repeat(200)), "long").unwrap();
    std::os::unix::fs::symlink("t".repeat(300), source.path().join("link")).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ] {
        let made = Command::new("tar")
            .arg("-C")
            .arg(source.path())
            .args(["-cS"])
            .args(format)
            .arg(".")
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        assert!(made.stdout.len() < 200_000, "tar stored the holes");
        let place = TempDir::new().unwrap();
        unpack(&made.stdout, place.path(), &Limits::default()).unwrap();
        let same = Command::new("diff")
            .args(["-r", "--no-dereference"])
            .args([source.path(), place.path()])
            .output()
            .unwrap();
        assert!(same.status.success(), "{format:?}: {same:?}");
        let blocks = fs::metadata(place.path().join("sparse")).unwrap().blocks();
        assert!(blocks * 512 < 200_000, "{format:?}: the holes were filled");
    }
}

#[test]
fn capabilities_and_times_are_kept_and_what_is_the_building_machine_s_is_not() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // Version 2, with bits whose byte is a line end.
    let capability = [1, 0, 0, 2, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let archive = Archive::new()
        .pax("SCHILY.xattr.security.capability", &capability)
        .file("ping", "1")
        .pax("mtime", b"1700000000.25")
        .file("timed", "1")
        .pax("SCHILY.xattr.trusted.overlay.opaque", b"y")
        .directory("directory/")
        .pax("SCHILY.xattr.user.note", b"1")
        .symlink("link", "ping")
        .bytes();
    let (place, result) = layered(&[archive, Archive::new().directory("directory/").bytes()]);
    result.unwrap();
    let at = |name: &str| place.path().join("root").join(name);
    let mut value = [0; 64];
    let size = rustix::fs::lgetxattr(at("ping"), "security.capability", &mut value).unwrap();
    assert_eq!(value[..size], capability);
    let timed = fs::metadata(at("timed")).unwrap();
    assert_eq!((timed.mtime(), timed.mtime_nsec()), (1_700_000_000, 250_000_000));
    assert_eq!(
        fs::metadata(at("ping")).unwrap().permissions().mode() & 0o7777,
        0o755
    );
    let size = rustix::fs::llistxattr(at("directory"), &mut value).unwrap();
    let names = value[..size].to_vec();
    assert!(
        !names.windows(7).any(|part| part == b"overlay"),
        "{}",
        std::ffi::OsStr::from_bytes(&names).display()
    );
}

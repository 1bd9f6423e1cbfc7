//! What the store does with images that are built.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use super::super::{LoadOptions, LoadSource};
use super::*;
use crate::ImagesError;

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    (directory, store)
}

fn tree(directory: &Path, content: &str) -> PathBuf {
    let tree = directory.join("tree");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::write(tree.join("bin/file"), content).unwrap();
    tree
}

/// An archive of a directory, as GNU tar makes it.
fn tar(directory: &Path, options: &[&str]) -> PathBuf {
    let archive = directory.with_extension("tar");
    let made = std::process::Command::new("tar")
        .arg("-C")
        .arg(directory)
        .args(options)
        .arg("-cf")
        .args([&archive, Path::new(".")])
        .status()
        .unwrap();
    assert!(made.success());
    archive
}

fn build(store: &Store, name: &str, source: &Path) -> Result<Image, EngineError> {
    store.build_image(name, source, &mut |_| {})
}

/// Files of the store's content, and of images.
fn content(store: &Store) -> (usize, usize) {
    let count = |directory: PathBuf| fs::read_dir(directory).map_or(0, Iterator::count);
    (count(store.blobs_directory()), count(store.files()))
}

#[test]
fn an_image_that_is_built_has_one_layer_and_is_the_same_again() {
    let (directory, store) = store();
    let source = tree(directory.path(), "one");
    let first = build(&store, "first", &source).unwrap();
    let config = first.config().unwrap();
    assert_eq!(first.id(), first.config_digest.clone().unwrap());
    assert_eq!(
        (config.os.as_str(), config.architecture.as_str()),
        ("linux", "amd64")
    );
    assert_eq!(config.rootfs.diff_ids, [format!("sha256:{}", first.digest)]);
    assert_eq!((config.created, config.history.len()), (None, 1));
    assert_eq!(first.content().unwrap().len(), 3);
    let second = build(&store, "second", &source).unwrap();
    assert_eq!((second.id(), &second.manifest), (first.id(), &first.manifest));
    assert_eq!(content(&store), (3, 2));
    store.remove_image("first", false).unwrap();
    assert!(second.file.is_file());
    store.remove_image("second", false).unwrap();
    assert_eq!(content(&store), (0, 0));
}

#[test]
fn building_again_replaces_and_an_error_keeps_the_old_one() {
    let (directory, store) = store();
    let old = build(&store, "name", &tree(directory.path(), "old")).unwrap();
    assert!(build(&store, "name", Path::new("/nowhere")).is_err());
    assert_eq!(store.image("name").unwrap(), old);
    let new = build(&store, "name", &tree(directory.path(), "new")).unwrap();
    assert_ne!(new.digest, old.digest);
    assert!(!old.file.exists());
    assert_eq!(content(&store), (3, 2));
}

#[test]
fn an_archive_is_the_layer_compressed_or_not() {
    let (directory, store) = store();
    let source = tree(directory.path(), "one");
    let plain = build(&store, "name", &tar(&source, &[])).unwrap();
    let types = |image: &Image| {
        let manifest: serde_json::Value =
            serde_json::from_slice(&image.manifest_bytes().unwrap().unwrap()).unwrap();
        manifest["layers"][0]["mediaType"].as_str().unwrap().to_owned()
    };
    assert_eq!(types(&plain), "application/vnd.oci.image.layer.v1.tar");
    let gzip = build(&store, "name", &tar(&source, &["--gzip"])).unwrap();
    assert_eq!(types(&gzip), "application/vnd.oci.image.layer.v1.tar+gzip");
    // The same image, of another layer; what was plain is gone.
    assert_eq!((gzip.id(), &gzip.digest), (plain.id(), &plain.digest));
    assert_eq!(content(&store), (3, 2));
}

#[test]
fn what_is_refused_is_named_and_leaves_nothing() {
    let (directory, store) = store();
    let source = tree(directory.path(), "one");
    let archive = directory.path().join("hostile.tar");
    let mut builder = ::tar::Builder::new(File::create(&archive).unwrap());
    let mut header = ::tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(rustix::process::geteuid().as_raw().into());
    header.set_gid(rustix::process::getegid().as_raw().into());
    header.set_entry_type(::tar::EntryType::Symlink);
    builder.append_link(&mut header, "out", "/etc").unwrap();
    header.set_entry_type(::tar::EntryType::Regular);
    builder.append_data(&mut header, "out/passwd", &b""[..]).unwrap();
    builder.into_inner().unwrap();
    let error = build(&store, "name", &archive).unwrap_err().to_string();
    assert!(
        error.contains(&format!(
            "unpack {}: refused entry out/passwd: ",
            archive.display()
        )),
        "{error}"
    );
    fs::write(source.join("bin/.wh.file"), "").unwrap();
    for source in [source.clone(), tar(&source, &[])] {
        let error = build(&store, "name", &source).unwrap_err().to_string();
        assert!(
            error.contains(&source.display().to_string()) && error.contains("bin/.wh.file"),
            "{error}"
        );
    }
    // Truncated at the end of an entry, as no digest tells.
    let whole = fs::read(tar(&source, &["--exclude=.wh.*"])).unwrap();
    fs::write(&archive, &whole[..512]).unwrap();
    let error = build(&store, "name", &archive).unwrap_err().to_string();
    assert!(error.contains("truncated"), "{error}");
    assert_eq!(content(&store), (0, 0));
    assert_eq!(store.images().unwrap(), []);
}

#[test]
fn an_image_without_layers_is_told_to_be_built_again() {
    let (directory, store) = store();
    let built = build(&store, "name", &tree(directory.path(), "one")).unwrap();
    // As older versions have kept it.
    let record = store.names().join("name.json");
    let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    let fields = old.as_object_mut().unwrap();
    assert!(fields.remove("manifest").is_some() && fields.remove("config_digest").is_some());
    fs::write(&record, old.to_string()).unwrap();
    let image = store.image("name").unwrap();
    assert_eq!(image.id(), format!("blake3:{}", built.digest));
    assert_eq!(image.content().unwrap(), Vec::<PathBuf>::new());
    assert_eq!(image.config().unwrap().os, "linux");
    let saved = store.save_images(&["name"], &mut Vec::new()).unwrap_err();
    let commit = super::super::Commit::default();
    let committed = store.commit_image(&image, None, commit, &mut |_| {}).unwrap_err();
    for error in [saved, committed] {
        assert!(matches!(error, EngineError::Images(ImagesError::Built { .. })));
        assert!(error.to_string().contains("picovm image build"), "{error}");
    }
    store.remove_image("name", false).unwrap();
    assert!(!image.file.exists());
}

#[test]
fn what_root_has_built_is_the_same_in_another_store() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (directory, store) = store();
    let source = tree(directory.path(), "one");
    let at = |name: &str| source.join(name);
    fs::hard_link(at("bin/file"), at("linked")).unwrap();
    fs::set_permissions(at("bin/file"), fs::Permissions::from_mode(0o4755)).unwrap();
    std::os::unix::fs::chown(at("bin"), Some(1000), Some(2000)).unwrap();
    let kind = rustix::fs::FileType::CharacterDevice;
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(rustix::fs::CWD, at("null"), kind, 0o666.into(), null).unwrap();
    let built = build(&store, "name", &source).unwrap();
    let saved = directory.path().join("saved.tar");
    store
        .save_images(&["name"], &mut File::create(&saved).unwrap())
        .unwrap();
    let other = Store::open(&directory.path().join("other")).unwrap();
    let loaded = other
        .load_images(LoadSource::Path(&saved), &LoadOptions::default(), &mut |_| {})
        .unwrap();
    assert_eq!((loaded[0].id(), &loaded[0].digest), (built.id(), &built.digest));
    assert_eq!(fs::read(&loaded[0].file).unwrap(), fs::read(&built.file).unwrap());
    // And what an ordinary user makes of the directory is, too.
    let third = Store::open(&directory.path().join("third")).unwrap();
    let diff_id = format!("sha256:{}", built.digest);
    third.pack_directory(&diff_id, &source, &[], &mut |_| {}).unwrap();
    let direct = third.image_file(&built.digest);
    assert_eq!(fs::read(direct).unwrap(), fs::read(&built.file).unwrap());
    let null = fs::symlink_metadata(at("null")).unwrap();
    assert!(null.file_type().is_char_device() && null.nlink() == 1);
}

//! What the store does with images that are loaded.

use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    (directory, store)
}

#[test]
fn names_cannot_leave_the_store() {
    let (_directory, store) = store();
    for name in ["", "..", "../x", "/a", ".hidden", "a b", "%2F"] {
        assert!(
            matches!(
                store.image(name),
                Err(EngineError::Images(ImagesError::Name { .. }))
            ),
            "{name:?}"
        );
    }
    assert!(matches!(
        store.image("debian:12"),
        Err(EngineError::NoImage { .. })
    ));
}

/// An archive of files.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(rustix::process::geteuid().as_raw().into());
        header.set_gid(rustix::process::getegid().as_raw().into());
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// What `docker save` of an image with two layers writes.
struct DockerArchive {
    config: Vec<u8>,
    layers: [Vec<u8>; 2],
    tags: &'static str,
}

impl DockerArchive {
    fn new(content: &str) -> Self {
        let layers = [
            archive(&[("etc/motd", b"lower"), ("etc/gone", b"")]),
            archive(&[("etc/.wh.gone", b""), ("etc/motd", content.as_bytes())]),
        ];
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Cmd": ["cat", "/etc/motd"], "Env": ["A=1"]},
            "rootfs": {"type": "layers", "diff_ids": layers.each_ref().map(|layer| Digest::of(layer).to_string())},
        });
        Self {
            config: config.to_string().into_bytes(),
            layers,
            tags: r#"["app:1","localhost:5000/team/app:latest"]"#,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let manifest = format!(
            r#"[{{"Config":"config.json","RepoTags":{},"Layers":["1/layer.tar","2/layer.tar"]}}]"#,
            self.tags
        );
        archive(&[
            ("1/layer.tar", &self.layers[0]),
            ("2/layer.tar", &self.layers[1]),
            ("config.json", &self.config),
            ("manifest.json", manifest.as_bytes()),
        ])
    }
}

fn load(store: &Store, bytes: Vec<u8>) -> Result<Vec<Image>, EngineError> {
    let stream = LoadSource::Stream(Box::new(std::io::Cursor::new(bytes)));
    store.load_images(stream, &LoadOptions::default(), &mut |_| {})
}

/// Files of the store's content, and of images.
fn content(store: &Store) -> (usize, usize) {
    let count = |directory: PathBuf| fs::read_dir(directory).map_or(0, Iterator::count);
    (count(store.blobs_directory()), count(store.files()))
}

#[test]
fn an_archive_of_docker_is_loaded_and_saved_as_a_layout_that_is_the_same_image() {
    let (directory, store) = store();
    let made = DockerArchive::new("hello");
    let loaded = load(&store, made.bytes()).unwrap();
    let names: Vec<&str> = loaded.iter().map(|image| image.name.as_str()).collect();
    assert_eq!(names, ["app:1", "localhost:5000/team/app"]);
    let image = store.image("app:1").unwrap();
    assert_eq!(image.id(), Digest::of(&made.config).to_string());
    assert_eq!(image.config().unwrap().config.cmd, ["cat", "/etc/motd"]);
    assert_eq!(image.entries, 2);
    for same in ["docker.io/library/app:1", &image.id(), &image.id_digits()[..12]] {
        assert_eq!(store.image(same).unwrap().id(), image.id(), "{same}");
    }

    let mut saved = Vec::new();
    store
        .save_images(&["app:1", "localhost:5000/team/app"], &mut saved)
        .unwrap();
    let mut again = Vec::new();
    store
        .save_images(&["app:1", "localhost:5000/team/app"], &mut again)
        .unwrap();
    assert_eq!(saved, again);
    let other = Store::open(&directory.path().join("other")).unwrap();
    let reloaded = load(&other, saved.clone()).unwrap();
    assert_eq!(
        reloaded.iter().map(|image| &image.name).collect::<Vec<_>>(),
        loaded.iter().map(|image| &image.name).collect::<Vec<_>>()
    );
    assert_eq!(reloaded[0].manifest, image.manifest);
    assert_eq!(
        fs::read(&reloaded[0].file).unwrap(),
        fs::read(&image.file).unwrap()
    );

    // As a directory, too.
    let layout = directory.path().join("layout");
    tar::Archive::new(&saved[..]).unpack(&layout).unwrap();
    let third = Store::open(&directory.path().join("third")).unwrap();
    let loaded = third
        .load_images(LoadSource::Path(&layout), &LoadOptions::default(), &mut |_| {})
        .unwrap();
    assert_eq!(loaded[0].manifest, image.manifest);
}

#[test]
fn loading_again_makes_nothing_new() {
    let (_directory, store) = store();
    load(&store, DockerArchive::new("hello").bytes()).unwrap();
    let before = content(&store);
    assert_eq!(before, (4, 2));
    load(&store, DockerArchive::new("hello").bytes()).unwrap();
    assert_eq!(content(&store), before);
    assert_eq!(store.images().unwrap().len(), 2);
}

#[test]
fn an_image_that_loses_its_name_stays_until_it_is_pruned() {
    let (_directory, store) = store();
    load(&store, DockerArchive::new("old").bytes()).unwrap();
    let old = store.image("app:1").unwrap();
    let new = load(&store, DockerArchive::new("new").bytes()).unwrap();
    let images = store.images().unwrap();
    assert_eq!(images.len(), 3);
    assert_eq!((images[0].name.as_str(), images[0].id()), ("", old.id()));
    assert_eq!(store.image(&old.id()).unwrap().digest, old.digest);
    // A name again.
    store.tag_image(&old.id(), "old").unwrap();
    assert_eq!(store.images().unwrap().len(), 3);
    assert_eq!(
        store.prune(false, &BTreeSet::new()).unwrap(),
        Collected::default()
    );
    assert_eq!(
        store.remove_image("old", false).unwrap(),
        Removed {
            untagged: vec!["old".into()],
            deleted: Some(old.id()),
            left: false,
        }
    );
    // What the two share stays.
    assert!(fs::metadata(&new[0].file).is_ok());
    assert_eq!(content(&store), (4, 2));
    load(&store, DockerArchive::new("old").bytes()).unwrap();
    let collected = store.prune(false, &BTreeSet::new()).unwrap();
    assert_eq!(collected.images, [new[0].id()]);
    assert_eq!(content(&store), (4, 2));
    assert!(collected.bytes > 0);
    // All but what is in use.
    let used = BTreeSet::from([store.image("app:1").unwrap().digest]);
    assert_eq!(store.prune(true, &used).unwrap(), Collected::default());
    store.prune(true, &BTreeSet::new()).unwrap();
    assert_eq!(content(&store), (0, 0));
    assert_eq!(store.images().unwrap(), []);
}

#[test]
fn an_image_with_several_names_is_not_removed_by_its_id_without_force() {
    let (_directory, store) = store();
    let id = load(&store, DockerArchive::new("hello").bytes()).unwrap()[0].id();
    let error = store.remove_image(&id, false).unwrap_err().to_string();
    assert!(error.contains("app:1, localhost:5000/team/app"), "{error}");
    assert_eq!(store.remove_image("app:1", false).unwrap().deleted, None);
    store.tag_image("localhost:5000/team/app", "app:2").unwrap();
    assert_eq!(store.remove_image(&id, true).unwrap().untagged.len(), 2);
    assert_eq!(content(&store), (0, 0));
}

#[test]
fn what_is_no_image_is_refused_and_leaves_no_name() {
    let (directory, store) = store();
    let refused = |bytes: Vec<u8>| {
        let error = load(&store, bytes).unwrap_err().to_string();
        assert_eq!(store.images().unwrap(), [], "{error}");
        error
    };
    let plain = archive(&[("etc/motd", b"hello")]);
    assert!(refused(plain).contains("neither an archive of images"));
    assert!(refused(b"hello".to_vec()).contains("not a tar archive"));
    let mut lacking = DockerArchive::new("x");
    lacking.tags = "null";
    let whole = lacking.bytes();
    assert!(refused(whole[..3000].to_vec()).contains("truncated"));
    // A layer other than what the configuration says, by its digest.
    let mut exchanged = DockerArchive::new("x");
    exchanged.layers[1] = archive(&[("etc/motd", b"other")]);
    let error = refused(exchanged.bytes());
    let layer = Digest::of(&exchanged.layers[1]).to_string();
    assert!(error.contains(&format!("unpack layer {layer}")), "{error}");
    // An entry that would leave the image, in the layer that it is in.
    let mut hostile = DockerArchive::new("x");
    hostile.layers[1] = archive(&[("etc/.wh..", b"")]);
    let error = refused(
        DockerArchive {
            config: config_for(&hostile.layers),
            ..hostile
        }
        .bytes(),
    );
    assert!(
        error.contains("unpack layer sha256:") && error.contains("refused entry etc/.wh..:"),
        "{error}"
    );
    let mut odd = DockerArchive::new("x");
    odd.tags = r#"["../../escape"]"#;
    assert!(refused(odd.bytes()).contains("not a name"));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    // Nothing half done, either.
    store.prune(false, &BTreeSet::new()).unwrap();
    assert_eq!(content(&store), (0, 0));
}

fn config_for(layers: &[Vec<u8>; 2]) -> Vec<u8> {
    let ids = layers.each_ref().map(|layer| Digest::of(layer).to_string());
    serde_json::json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}})
        .to_string()
        .into_bytes()
}

#[test]
fn content_of_a_layout_must_be_what_its_name_says() {
    let (directory, store) = store();
    load(&store, DockerArchive::new("hello").bytes()).unwrap();
    let mut saved = Vec::new();
    store.save_images(&["app:1"], &mut saved).unwrap();
    let layout = directory.path().join("layout");
    tar::Archive::new(&saved[..]).unpack(&layout).unwrap();
    let blobs = layout.join("blobs/sha256");
    let names: Vec<PathBuf> = fs::read_dir(&blobs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(names.len(), 4);
    let other = Store::open(&directory.path().join("other")).unwrap();
    let load = || other.load_images(LoadSource::Path(&layout), &LoadOptions::default(), &mut |_| {});
    for path in &names {
        let whole = fs::read(path).unwrap();
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        let hex = path.file_name().unwrap().to_str().unwrap();
        for bytes in [
            &damaged[..],
            &whole[..whole.len() - 1],
            &[&whole[..], b" "].concat(),
        ] {
            fs::write(path, bytes).unwrap();
            let error = load().unwrap_err().to_string();
            assert!(error.contains(hex), "{error}");
        }
        // A link out of the layout is not followed.
        fs::write(directory.path().join("elsewhere"), &whole).unwrap();
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), path).unwrap();
        load().unwrap_err();
        fs::remove_file(path).unwrap();
        fs::write(path, &whole).unwrap();
        assert_eq!(other.images().unwrap(), []);
    }
    load().unwrap();
}

#[test]
fn what_a_killed_process_left_is_removed_by_the_next() {
    let (_directory, store) = store();
    store.blobs().prepare().unwrap();
    fs::create_dir_all(store.files().join(".building-1/.picovm-unpack-2/root")).unwrap();
    fs::write(store.blobs_directory().join(".unfinished-1"), "x").unwrap();
    let partial = store.blobs().path(&Digest::of(b"x")).with_extension("partial");
    fs::write(&partial, "x").unwrap();
    {
        // Not while somebody adds something.
        let _other = store.adding_lock();
        load(&store, DockerArchive::new("hello").bytes()).unwrap();
        assert!(store.files().join(".building-1").exists());
        assert!(store.remove_image("app:1", false).unwrap().deleted.is_none());
        assert!(store.remove_image("localhost:5000/team/app", false).unwrap().left);
    }
    load(&store, DockerArchive::new("other").bytes()).unwrap();
    assert!(!store.files().join(".building-1").exists());
    assert!(!store.blobs_directory().join(".unfinished-1").exists());
    // The beginning of a layer is gone on from, and goes with prune.
    assert!(partial.exists());
    store.prune(false, &BTreeSet::new()).unwrap();
    assert_eq!(content(&store), (4, 2));
}

impl Store {
    /// As somebody who adds something has it.
    fn adding_lock(&self) -> Lock {
        Lock::share(&self.images_lock()).unwrap()
    }
}

#[test]
fn processes_that_load_the_same_at_once_make_it_once() {
    let (_directory, store) = store();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..3 {
                    load(&store, DockerArchive::new("hello").bytes()).unwrap();
                    let _ = store.remove_image("app:1", false);
                }
            });
        }
    });
    store.prune(false, &BTreeSet::new()).unwrap();
    assert_eq!(content(&store), (4, 2));
    assert_eq!(store.image("localhost:5000/team/app").unwrap().entries, 2);
}

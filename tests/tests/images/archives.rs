//! Loading, saving, naming, removing.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::fixtures::{App, CAPABILITY, archive, assert_same, docker_archive};
use crate::{Mounted, Place, stderr, stdout, tool};

#[test]
fn archives_and_layouts_of_skopeo_are_loaded_from_files_directories_and_a_pipe() {
    let app = App::new();
    let place = Place::new();
    let at = |name: &str| place.path(name).display().to_string();
    let copy = |to: &str| {
        tool(
            "skopeo",
            &["copy", "--quiet", "--insecure-policy", &app.source(), to],
        );
    };
    copy(&format!(
        "docker-archive:{}:localhost/app:docker",
        at("docker.tar")
    ));
    copy(&format!("oci-archive:{}:localhost/app:oci", at("oci.tar")));
    tool("gzip", &["-k", &at("docker.tar")]);
    for (input, name) in [
        (at("docker.tar"), "localhost/app:docker"),
        (at("docker.tar.gz"), "localhost/app:docker"),
        (at("oci.tar"), "localhost/app:oci"),
        (app.layout().display().to_string(), "localhost/app:layout"),
    ] {
        assert_eq!(place.ok(&["load", "-i", &input]), format!("Loaded image: {name}"));
        let mounted = Mounted::new(&place.store().image(name).expect("the image").file);
        assert_same(mounted.path(), &app.expected);
    }
    // An archive that docker save itself has named, through a pipe.
    let mut load = place
        .picovm(&["load"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("picovm starts");
    let bytes = fs::read(&app.archive).expect("the archive");
    load.stdin
        .take()
        .expect("piped")
        .write_all(&bytes)
        .expect("it reads");
    let output = load.wait_with_output().expect("its end");
    assert_eq!(stdout(&output), "Loaded image: app:1");
    // The configurations are not: each format has its own. The root file system is.
    let files = place.files();
    assert_eq!(
        files.iter().filter(|file| file.ends_with(".erofs")).count(),
        1,
        "{files:?}"
    );
}

#[test]
fn what_is_saved_is_read_by_skopeo_and_is_the_same_image() {
    let app = App::new();
    let place = Place::new();
    place.ok(&["load", "-i", &app.archive.display().to_string()]);
    place.ok(&["tag", "app:1", "localhost:5000/team/app"]);
    let saved = place.path("saved.tar").display().to_string();
    place.ok(&["save", "-o", &saved, "app:1", "localhost:5000/team/app"]);
    let config = |transport: &str| {
        tool(
            "skopeo",
            &["inspect", "--config", "--raw", &format!("{transport}:{saved}")],
        )
    };
    assert_eq!(config("docker-archive"), config("docker-archive"));
    let id = place.ok(&["inspect", "--format", "{{.Id}}", "app:1"]);
    assert_eq!(
        picovm_engine::Digest::of(config("docker-archive").as_bytes()).to_string(),
        id
    );
    let unpacked = place.path("unpacked").display().to_string();
    tool(
        "skopeo",
        &[
            "copy",
            "--quiet",
            "--insecure-policy",
            &format!("oci-archive:{saved}:1"),
            &format!("dir:{unpacked}"),
        ],
    );

    let other = Place::new();
    assert_eq!(
        other.ok(&["load", "-i", &saved]),
        "Loaded image: app:1\nLoaded image: localhost:5000/team/app:latest"
    );
    let again = other.path("again.tar").display().to_string();
    other.ok(&["save", "-o", &again, "app:1", "localhost:5000/team/app"]);
    assert_eq!(
        fs::read(&saved).expect("a file"),
        fs::read(&again).expect("a file")
    );
    assert!(
        place
            .refused(&["save", "-o", "/nowhere/x", "app:1"])
            .contains("/nowhere/x")
    );
    assert!(
        place
            .refused(&["save", "-o", &saved, "nothing"])
            .contains("no image named nothing")
    );
    assert!(fs::metadata(&saved).expect("untouched").len() > 0);
}

/// Panics if an image is not what the directory is that it was made of.
fn assert_whole(store: &picovm_engine::Store, name: &str, app: &App) {
    let mounted = Mounted::new(&store.image(name).expect("the image").file);
    assert_same(mounted.path(), &app.expected);
    let capable = mounted.path().join("bin/capable");
    let mut value = [0; 64];
    for (attribute, expected) in [("user.note", &b"kept"[..]), ("security.capability", &CAPABILITY)] {
        let size = rustix::fs::getxattr(&capable, attribute, &mut value).expect("an attribute");
        assert_eq!(&value[..size], expected, "{attribute}");
    }
}

#[test]
fn what_is_built_of_a_directory_is_saved_copied_and_loaded_with_all_that_is_in_it() {
    let app = App::new();
    fs::write(app.expected.join("etc/odd \n\u{e9}"), "odd").expect("a file");
    let place = Place::new();
    let tree = app.expected.display().to_string();
    let id = place.ok(&["image", "build", "mine", &tree]);
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(place.ok(&["image", "build", "again", &tree]), id);
    assert_eq!(place.ok(&["inspect", "-f", "{{.Id}}", "mine"]), id);
    assert_eq!(
        place.ok(&[
            "inspect",
            "-f",
            "{{.Os}}/{{.Architecture}} {{len .RootFS.Layers}}",
            "mine"
        ]),
        "linux/amd64 1"
    );
    let row = place.ok(&["images", "mine"]);
    assert!(row.contains(&id[7..19]) && row.contains("ago"), "{row}");
    let saved = place.path("saved.tar").display().to_string();
    place.ok(&["save", "-o", &saved, "mine"]);

    let same = |place: &Place, name: &str| assert_whole(&place.store(), name, &app);
    same(&place, "mine");
    let other = Place::new();
    assert_eq!(other.ok(&["load", "-i", &saved]), "Loaded image: mine:latest");
    assert_eq!(other.ok(&["inspect", "-f", "{{.Id}}", "mine"]), id);
    same(&other, "mine");
    // As other tools read it.
    let third = Place::new();
    let layout = third.path("layout").display().to_string();
    for from in ["docker-archive", "oci-archive"] {
        tool(
            "skopeo",
            &[
                "copy",
                "--quiet",
                "--insecure-policy",
                &format!("{from}:{saved}"),
                &format!("oci:{layout}:localhost/{from}:1"),
            ],
        );
    }
    third.ok(&["load", "-i", &layout]);
    for from in ["docker-archive", "oci-archive"] {
        same(&third, &format!("localhost/{from}:1"));
    }
}

#[test]
fn a_user_makes_of_a_directory_of_others_the_image_that_root_makes() {
    let (app, place) = (App::new(), Place::new());
    let tree = app.expected.display().to_string();
    let id = place.ok(&["image", "build", "mine", &tree]);
    // All that another user needs, where it can be read.
    let around = tempfile::tempdir().expect("a directory");
    let at = |name: &str| around.path().join(name);
    let reachable = fs::Permissions::from_mode(0o755);
    for directory in [around.path(), app.expected.parent().expect("a directory")] {
        fs::set_permissions(directory, reachable.clone()).expect("a mode");
    }
    fs::copy(picovm_tests::binary(), at("picovm")).expect("the program");
    fs::create_dir(at("store")).expect("a directory");
    std::os::unix::fs::chown(at("store"), Some(65534), Some(65534)).expect("an owner");
    let build = |source: &str| {
        Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(at("picovm"))
            .args(["image", "build", "mine", source])
            .env("PICOVM_HOME", at("store"))
            .stdin(Stdio::null())
            .output()
            .expect("setpriv starts")
    };
    let built = build(&tree);
    assert_eq!(stdout(&built), id, "{}", stderr(&built));
    let store = picovm_engine::Store::open(&at("store")).expect("the store opens");
    assert_whole(&store, "mine", &app);
    // Files of others in an archive are only root's to make.
    let archive = at("tree.tar").display().to_string();
    tool("tar", &["-C", &tree, "-cf", &archive, "."]);
    let refused = stderr(&build(&archive));
    assert!(
        refused.contains(&archive) && refused.contains("needs root"),
        "{refused}"
    );
}

#[test]
fn what_cannot_be_built_is_named_and_leaves_nothing() {
    let place = Place::new();
    let tree = place.path("tree");
    fs::create_dir_all(tree.join("etc")).expect("a directory");
    fs::write(tree.join("etc/.wh.passwd"), "").expect("a file");
    let tree = tree.display().to_string();
    let archive = place.path("tree.tar").display().to_string();
    tool("tar", &["-C", &tree, "-cf", &archive, "."]);
    for source in [&tree, &archive] {
        let refused = place.refused(&["image", "build", "mine", source]);
        assert!(
            refused.contains(source) && refused.contains("etc/.wh.passwd"),
            "{refused}"
        );
    }
    assert_eq!(place.files(), Vec::<String>::new());
}

#[test]
fn an_image_that_is_built_again_goes_unless_a_container_is_made_of_it() {
    let place = Place::new();
    let tree = place.path("tree");
    fs::create_dir(&tree).expect("a directory");
    let build = |content: &str| {
        fs::write(tree.join("file"), content).expect("a file");
        place.ok(&["image", "build", "mine", &tree.display().to_string()])
    };
    build("one");
    let two = build("two");
    assert_eq!(place.ok(&["images", "-q", "--no-trunc"]), two);
    place.ok(&["create", "--name", "user", "mine", "file"]);
    let three = build("three");
    let images = place.ok(&["images", "-q", "--no-trunc"]);
    assert!(images.contains(&two) && images.contains(&three), "{images}");
    place.ok(&["rm", "user"]);
    place.ok(&["prune", "--force"]);
    assert_eq!(place.ok(&["images", "-q", "--no-trunc"]), three);
}

#[test]
fn images_are_listed_named_and_removed_as_in_docker() {
    let app = App::new();
    let place = Place::new();
    place.ok(&["load", "-i", &app.archive.display().to_string()]);
    let id = place.ok(&["images", "-q", "--no-trunc"]);
    let listed = place.ok(&["images"]);
    let mut lines = listed.lines();
    let heading: Vec<&str> = lines.next().expect("a heading").split_whitespace().collect();
    assert_eq!(heading, ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]);
    let row = lines.next().expect("a row");
    assert!(
        row.starts_with("app") && row.contains("years ago") && row.ends_with("MB"),
        "{row}"
    );
    place.ok(&["tag", "app:1", "other"]);
    assert_eq!(
        place.ok(&["images", "--format", "{{.Repository}}:{{.Tag}}", "other"]),
        "other:latest"
    );
    let json: serde_json::Value = serde_json::from_str(&place.ok(&["image", "ls", "--json"])).expect("JSON");
    assert_eq!(json.as_array().map(Vec::len), Some(2));
    assert_eq!(
        place
            .ok(&["images", "-q", "--filter", "label=made-by=test"])
            .lines()
            .count(),
        1
    );
    assert_eq!(
        place
            .ok(&["images", "-q", "--filter", "reference=oth*"])
            .lines()
            .count(),
        1
    );
    assert_eq!(place.ok(&["images", "-q", "--filter", "dangling=true"]), "");

    let described = place.ok(&["inspect", "app:1"]);
    let described: serde_json::Value = serde_json::from_str(&described).expect("JSON");
    let config = &described[0]["Config"];
    for (key, value) in [
        ("User", json!("web")),
        ("WorkingDir", json!("/srv/app")),
        ("StopSignal", json!("SIGQUIT")),
        ("ExposedPorts", json!({"80/tcp": {}})),
        ("Volumes", json!({"/srv/data": {}})),
        ("Labels", json!({"made-by": "test"})),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(config["Healthcheck"]["Test"], json!(["CMD-SHELL", "true"]));
    assert_eq!(described[0]["RepoTags"], json!(["app:1", "other:latest"]));
    assert_eq!(
        place.ok(&[
            "inspect",
            "-f",
            "{{index .Config.Cmd 0}} {{len .RootFS.Layers}}",
            "app:1"
        ]),
        "from 2"
    );

    let refused = place.refused(&["rmi", &id]);
    assert!(refused.contains("more than one name"), "{refused}");
    assert_eq!(place.ok(&["rmi", "app:1"]), "Untagged: app:1");
    assert_eq!(place.ok(&["rmi", &id]), format!("Untagged: other\nDeleted: {id}"));
    assert_eq!(place.files(), Vec::<String>::new());
    assert!(place.refused(&["rmi", "app:1"]).contains("no image named app:1"));
    place.ok(&["rmi", "--force", "app:1"]);
}

#[test]
fn hostile_images_are_refused_and_nothing_outside_of_the_store_is_touched() {
    let outside = tempfile::tempdir().expect("a directory");
    fs::write(outside.path().join("precious"), "precious").expect("a file");
    let target = outside.path().display().to_string();
    let base = |name: &str, link: Option<(&str, tar::EntryType)>| {
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |name: &str, link: Option<(&str, tar::EntryType)>| {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_size(0);
            header.set_mtime(0);
            if let Some((target, kind)) = link {
                header.set_entry_type(kind);
                header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
            }
            // Written raw: no library makes these.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            builder.append(&header, &b""[..]).expect("an entry");
        };
        add("out", Some((&target, tar::EntryType::Symlink)));
        add(name, link);
        builder.into_inner().expect("an archive")
    };
    let hard = tar::EntryType::Link;
    let cases = [
        ("../../escape", base("../../escape", None)),
        ("out/new", base("out/new", None)),
        ("out/.wh.precious", base("out/.wh.precious", None)),
        ("out/.wh..wh..opq", base("out/.wh..wh..opq", None)),
        ("grab", base("grab", Some(("out/precious", hard)))),
        ("grab", base("grab", Some(("../../etc/passwd", hard)))),
    ];
    for (entry, hostile) in cases {
        let place = Place::new();
        let lower = archive(&[("file", b"x")]);
        let layer = picovm_engine::Digest::of(&hostile).to_string();
        let path = place.path("hostile.tar");
        fs::write(
            &path,
            docker_archive(&[lower, hostile], json!({}), Some("hostile:1")),
        )
        .expect("the archive");
        let refused = place.refused(&["load", "-i", &path.display().to_string()]);
        assert!(
            refused.contains(&format!("unpack layer {layer}: refused entry {entry}: ")),
            "{refused}"
        );
        assert_eq!(
            fs::read(outside.path().join("precious")).expect("still there"),
            b"precious"
        );
        assert_eq!(fs::read_dir(outside.path()).expect("a directory").count(), 1);
        assert_eq!(place.ok(&["images", "-q"]), "");
        place.ok(&["prune", "--force"]);
        assert_eq!(place.files(), Vec::<String>::new());
    }
}

#[test]
fn an_image_that_is_too_large_is_refused_where_it_gets_so() {
    let app = App::new();
    let place = Place::new();
    let output = place
        .picovm(&[
            "load",
            "--max-size",
            "4m",
            "-i",
            &app.archive.display().to_string(),
        ])
        .output()
        .expect("picovm starts");
    assert!(
        stderr(&output).contains("refused at entry 0/layer.tar")
            && stderr(&output).contains("more than 4194304 bytes"),
        "{}",
        stderr(&output)
    );
    assert!(place.refused(&["load", "-i", "/nowhere"]).contains("/nowhere"));
    let plain = place.path("plain.tar");
    fs::write(&plain, archive(&[("file", b"x")])).expect("an archive");
    let refused = place.refused(&["load", "-i", &plain.display().to_string()]);
    assert!(refused.contains("picovm image build"), "{refused}");
}

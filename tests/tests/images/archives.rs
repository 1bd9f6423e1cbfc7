//! Loading, saving, naming, removing.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::json;

use crate::fixtures::{App, archive, assert_same, docker_archive};
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

//! Pulling.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixtures::{App, CAPABILITY, LARGE, archive, assert_same, docker_archive};
use crate::registry::Registry;
use crate::server::{Faults, Server};
use crate::{Mounted, Place, stderr, tool};

fn inspected(place: &Place, name: &str) -> Value {
    let text = place.ok(&["inspect", "--format", "json", name]);
    let list: Value = serde_json::from_str(&text).expect("JSON");
    list[0].clone()
}

#[test]
fn what_skopeo_pushed_is_pulled_file_by_file_whatever_compresses_it() {
    let (registry, app) = (Registry::start(), App::new());
    let place = Place::new();
    registry.fill(&app.source(), "team/app:gzip", &["--format", "oci"]);
    registry.fill(
        &app.source(),
        "team/app:zstd",
        &["--format", "oci", "--dest-compress-format", "zstd"],
    );
    registry.fill(&app.source(), "team/app:docker", &["--format", "v2s2"]);
    for tag in ["gzip", "zstd", "docker"] {
        let name = registry.name(&format!("team/app:{tag}"));
        let said = place.ok(&["pull", &name]);
        assert!(
            said.contains(&format!("Downloaded newer image for {name}")),
            "{said}"
        );
        assert!(said.ends_with(&name), "{said}");
        let image = place.store().image(&name).expect("the image");
        let mounted = Mounted::new(&image.file);
        assert_same(mounted.path(), &app.expected);
    }
    // The same layers, and so the same file.
    let files = place.files();
    assert_eq!(
        files.iter().filter(|file| file.ends_with(".erofs")).count(),
        1,
        "{files:?}"
    );

    let name = registry.name("team/app:gzip");
    let mounted = Mounted::new(&place.store().image(&name).expect("the image").file);
    let at = |path: &str| mounted.path().join(path);
    assert_eq!(
        fs::metadata(at("bin/as-root"))
            .expect("a file")
            .permissions()
            .mode()
            & 0o7777,
        0o4755
    );
    let device = fs::metadata(at("dev/null")).expect("a device");
    assert!(device.file_type().is_char_device());
    assert_eq!(
        (rustix::fs::major(device.rdev()), rustix::fs::minor(device.rdev())),
        (1, 3)
    );
    let mut value = [0; 64];
    let size =
        rustix::fs::getxattr(at("bin/capable"), "security.capability", &mut value).expect("a capability");
    assert_eq!(value[..size], CAPABILITY);
    let size = rustix::fs::getxattr(at("bin/capable"), "user.note", &mut value).expect("an attribute");
    assert_eq!(&value[..size], b"kept");
}

#[test]
fn a_second_pull_fetches_nothing_and_a_digest_is_a_name() {
    let (registry, app) = (Registry::start(), App::new());
    let place = Place::new();
    registry.fill(&app.source(), "app:1", &[]);
    let name = registry.name("app:1");
    place.ok(&["pull", &name]);
    let before = place.files();
    let output = place.picovm(&["pull", &name]).output().expect("picovm starts");
    assert!(
        stderr(&output).contains("Already exists") && !stderr(&output).contains("Download"),
        "{}",
        stderr(&output)
    );
    assert!(
        crate::stdout(&output).contains("Status: Image is up to date"),
        "{}",
        crate::stdout(&output)
    );
    assert_eq!(place.files(), before);

    let described = inspected(&place, &name);
    let digest = described["RepoDigests"][0].as_str().expect("a digest").to_owned();
    let other = Place::new();
    assert_eq!(other.ok(&["pull", "-q", &digest]), digest);
    assert_eq!(inspected(&other, &digest)["Id"], described["Id"]);
    let listed = other.ok(&["images", "--format", "{{.Repository}} {{.Tag}} {{.Digest}}"]);
    assert!(listed.contains("app <none> sha256:"), "{listed}");
    // And of the one that was pulled by its tag, too.
    assert_eq!(inspected(&place, &digest)["Id"], described["Id"]);
    let unknown = format!("{}@sha256:{}", registry.name("app"), "0".repeat(64));
    assert!(place.refused(&["pull", &unknown]).contains("has no"));
}

#[test]
fn passwords_come_from_docker_s_configuration_and_its_helpers() {
    let (registry, app) = (Registry::with_passwords(), App::new());
    registry.fill(&app.source(), "app:1", &["--dest-creds", "user:secret"]);
    let name = registry.name("app:1");
    let host = name.strip_suffix("/app:1").expect("a host");
    let place = Place::new();
    let refused = place.refused(&["pull", &name]);
    assert!(refused.contains("docker login"), "{refused}");

    let configure = |configuration: Value| {
        fs::create_dir_all(place.path("docker")).expect("a directory");
        fs::write(place.path("docker/config.json"), configuration.to_string()).expect("the configuration");
    };
    // `user:secret`, and `user:wrong`.
    configure(json!({"auths": {host: {"auth": "dXNlcjp3cm9uZw=="}}}));
    assert!(place.refused(&["pull", &name]).contains("docker login"));
    configure(json!({"auths": {host: {"auth": "dXNlcjpzZWNyZXQ="}}}));
    place.ok(&["pull", &name]);

    let helper = place.path("docker-credential-test");
    let script = format!(
        "#!/bin/sh\ntest \"$1\" = get && {{ read host || true; }} && test \"$host\" = {host} && \
                          echo '{{\"Username\":\"user\",\"Secret\":\"secret\"}}'\n"
    );
    fs::write(&helper, script).expect("the helper");
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).expect("a mode");
    configure(json!({"credHelpers": {host: "test"}}));
    place.ok(&["rmi", &name]);
    let path = format!(
        "{}:{}",
        place.path("").display(),
        std::env::var("PATH").expect("PATH")
    );
    let output = place
        .picovm(&["pull", &name])
        .env("PATH", path)
        .output()
        .expect("picovm starts");
    assert!(output.status.success(), "{}", stderr(&output));
    fs::write(place.path("docker/config.json"), "{").expect("the configuration");
    let refused = place.refused(&["pull", &name]);
    assert!(refused.contains("config.json"), "{refused}");
}

#[test]
fn tls_is_spoken_and_a_certificate_that_nobody_vouches_for_is_refused() {
    let (registry, app) = (Registry::with_tls(), App::new());
    registry.fill(&app.source(), "app:1", &[]);
    let name = registry.name("app:1");
    let place = Place::new();
    let refused = place.refused(&["pull", &name]);
    assert!(refused.contains("certificate"), "{refused}");
    let output = place
        .picovm(&["pull", &name])
        .env("SSL_CERT_FILE", registry.authority())
        .output()
        .expect("picovm starts");
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_token_is_fetched_with_the_password_where_a_registry_asks_for_one() {
    let app = App::new();
    let server = Server::start(
        &app.layout(),
        Faults {
            token: true,
            ..Faults::default()
        },
    );
    let name = server.name("app:1");
    let place = Place::new();
    place.refused(&["pull", &name]);
    fs::create_dir_all(place.path("docker")).expect("a directory");
    let host = name.strip_suffix("/app:1").expect("a host");
    let configuration = json!({"auths": {host: {"username": "user", "password": "secret"}}});
    fs::write(place.path("docker/config.json"), configuration.to_string()).expect("the configuration");
    place.ok(&["pull", &name]);
}

#[test]
fn the_platform_is_chosen_from_an_index() {
    let registry = Registry::start();
    let place = Place::new();
    let mut manifests = Vec::new();
    for (architecture, content) in [("arm64", "of arm"), ("amd64", "of amd")] {
        let image = docker_archive(&[archive(&[("platform", content.as_bytes())])], json!({}), None);
        let path = place.path(architecture);
        fs::write(&path, image).expect("the archive");
        let layout = place.path("layout").display().to_string();
        let from = format!("docker-archive:{}", path.display());
        tool(
            "skopeo",
            &[
                "copy",
                "--quiet",
                "--insecure-policy",
                &from,
                &format!("oci:{layout}:{architecture}"),
            ],
        );
    }
    let layout = place.path("layout");
    let read = |path: &str| -> Value {
        serde_json::from_slice(&fs::read(layout.join(path)).expect("a file")).expect("JSON")
    };
    for mut manifest in read("index.json")["manifests"]
        .as_array()
        .expect("manifests")
        .clone()
    {
        let name = manifest["annotations"]["org.opencontainers.image.ref.name"].take();
        manifest.as_object_mut().expect("an object").remove("annotations");
        manifest["platform"] = json!({"os": "linux", "architecture": name});
        manifests.push(manifest);
    }
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests})
        .to_string();
    let digest = picovm_engine::Digest::of(index.as_bytes());
    fs::write(layout.join("blobs/sha256").join(digest.hex()), &index).expect("the index");
    let outer = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest.as_str(), "size": index.len(),
        "annotations": {"org.opencontainers.image.ref.name": "localhost/many:1"},
    }]});
    fs::write(layout.join("index.json"), outer.to_string()).expect("the index");

    let content = |name: &str| {
        let mounted = Mounted::new(&place.store().image(name).expect("the image").file);
        fs::read_to_string(mounted.path().join("platform")).expect("a file")
    };
    registry.fill(
        &format!("oci:{}:localhost/many:1", layout.display()),
        "many:1",
        &["--all"],
    );
    let name = registry.name("many:1");
    place.ok(&["pull", &name]);
    assert_eq!(content(&name), "of amd");
    // What the registry has under the name is the index.
    assert_eq!(
        inspected(&place, &name)["RepoDigests"][0],
        format!("{}@{digest}", registry.name("many"))
    );
    place.ok(&["pull", "--platform", "linux/arm64", &name]);
    assert_eq!(content(&name), "of arm");
    let refused = place.refused(&["pull", "--platform", "linux/s390x", &name]);
    assert!(
        refused.contains("no image for linux/s390x, but for: linux/arm64, linux/amd64"),
        "{refused}"
    );
    place.ok(&["load", "-i", &layout.display().to_string()]);
    assert_eq!(content("localhost/many:1"), "of amd");
}

#[test]
fn a_pull_over_a_bad_connection_goes_on_where_it_broke_off() {
    let app = App::new();
    let faults = Faults {
        break_after: Some(1 << 20),
        ..Faults::default()
    };
    let server = Server::start(&app.layout(), faults);
    let place = Place::new();
    place.ok(&["pull", &server.name("app:1")]);
    let ranges = server.ranges();
    assert!(
        ranges.len() > LARGE >> 20 && ranges.contains(&format!("bytes={}-", 1 << 20)),
        "{ranges:?}"
    );

    // One that knows nothing of ranges begins again, and that comes to an end in any case.
    server.set(Faults {
        no_ranges: true,
        ..Faults::default()
    });
    let other = Place::new();
    other.ok(&["pull", &server.name("app:1")]);
    server.set(Faults {
        no_ranges: true,
        break_after: Some(1 << 20),
        ..Faults::default()
    });
    let third = Place::new();
    assert!(
        third
            .refused(&["pull", &server.name("app:1")])
            .contains("broke off")
    );
}

#[test]
fn what_came_before_a_kill_is_not_fetched_again() {
    let app = App::new();
    let server = Server::start(
        &app.layout(),
        Faults {
            stall_after: Some(2 << 20),
            ..Faults::default()
        },
    );
    let place = Place::new();
    let name = server.name("app:1");
    let mut pull = place.picovm(&["pull", &name]).spawn().expect("picovm starts");
    let blobs = place.path("store/images/blobs/sha256");
    let begun = Instant::now();
    let arrived = || -> u64 {
        fs::read_dir(&blobs)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| {
                entry
                    .path()
                    .extension()
                    .is_some_and(|extension| extension == "partial")
            })
            .filter_map(|entry| Some(entry.metadata().ok()?.len()))
            .sum()
    };
    while arrived() < 2 << 20 {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing arrives");
        std::thread::sleep(Duration::from_millis(20));
    }
    pull.kill().expect("a process");
    pull.wait().expect("its end");
    server.set(Faults::default());
    server.ranges();
    place.ok(&["pull", &name]);
    let ranges = server.ranges();
    assert!(
        !ranges.is_empty() && !ranges.contains(&"bytes=0-".to_owned()),
        "{ranges:?}"
    );
    assert!(!place.files().iter().any(|file| file.ends_with(".partial")));
}

#[test]
fn content_that_is_not_what_its_manifest_says_is_refused_by_its_digest() {
    let app = App::new();
    let server = Server::start(&app.layout(), Faults::default());
    let name = server.name("app:1");
    for (faults, reason) in [
        (
            Faults {
                flip: true,
                ..Faults::default()
            },
            "its digest is sha256:",
        ),
        (
            Faults {
                too_much: true,
                ..Faults::default()
            },
            "larger than",
        ),
    ] {
        let place = Place::new();
        server.set(faults);
        let refused = place.refused(&["pull", &name]);
        assert!(
            refused.contains("is not what it should be") && refused.contains(reason),
            "{refused}"
        );
        assert_eq!(place.ok(&["images", "-q"]), "");
        // Nothing of it is gone on from.
        server.set(Faults::default());
        place.ok(&["pull", &name]);
    }
    let place = Place::new();
    server.set(Faults {
        other_manifest: true,
        ..Faults::default()
    });
    let index: Value =
        serde_json::from_slice(&fs::read(app.layout().join("index.json")).expect("a file")).expect("JSON");
    let digest = index["manifests"][0]["digest"].as_str().expect("a digest");
    let refused = place.refused(&["pull", &format!("{}@{digest}", server.name("app"))]);
    assert!(refused.contains("igest"), "{refused}");
    assert_eq!(place.files(), Vec::<String>::new());
}

#[test]
fn pulls_at_once_share_what_they_fetch() {
    let app = App::new();
    let server = Server::start(&app.layout(), Faults::default());
    let place = Place::new();
    let pulls: Vec<_> = (0..4)
        .map(|tag| {
            place
                .picovm(&["pull", "-q", &server.name(&format!("app:{tag}"))])
                .spawn()
                .expect("picovm starts")
        })
        .collect();
    for mut pull in pulls {
        assert!(pull.wait().expect("its end").success());
    }
    // Each of the large layers once.
    let mut paths: Vec<String> = server
        .requests
        .lock()
        .expect("the requests")
        .iter()
        .filter_map(|(path, _)| path.rsplit('/').next().map(str::to_owned))
        .collect();
    assert_eq!(paths.len(), 2, "{paths:?}");
    paths.dedup();
    assert_eq!(paths.len(), 2, "{paths:?}");
    assert_eq!(place.ok(&["images", "-q"]).lines().count(), 1);
    assert_eq!(place.ok(&["images", "--format", "{{.Tag}}"]).lines().count(), 4);
}

#[test]
fn a_store_opens_after_a_kill_at_any_moment() {
    let app = App::new();
    let server = Server::start(&app.layout(), Faults::default());
    let place = Place::new();
    let name = server.name("app:1");
    let begun = Instant::now();
    place.ok(&["pull", &name]);
    let whole = begun.elapsed();
    place.ok(&["prune", "--all", "--force"]);
    assert_eq!(place.files(), Vec::<String>::new());
    for part in 1..12u32 {
        let mut pull = place
            .picovm(&["pull", "-q", &name])
            .spawn()
            .expect("picovm starts");
        std::thread::sleep(whole * part / 12);
        let _ = pull.kill();
        pull.wait().expect("its end");
        place.ok(&["images"]);
        if part % 2 == 0 {
            place.ok(&["prune", "--all", "--force"]);
            assert_eq!(place.files(), Vec::<String>::new());
        }
    }
    place.ok(&["pull", &name]);
    let mounted = Mounted::new(&place.store().image(&name).expect("the image").file);
    assert_same(mounted.path(), &app.expected);
    drop(mounted);
    place.ok(&["prune", "--force"]);
    assert_eq!(place.files().len(), 7, "{:?}", place.files());
}

#[test]
fn a_registry_that_is_not_there_is_told() {
    let place = Place::new();
    let refused = place.refused(&["pull", "127.0.0.1:1/app"]);
    assert!(
        refused.contains("cannot pull 127.0.0.1:1/app") && refused.contains("refused"),
        "{refused}"
    );
    assert!(place.refused(&["pull", "NoName"]).contains("not a name"));
}

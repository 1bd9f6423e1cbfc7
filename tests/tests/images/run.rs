//! Running what was pulled. This needs KVM.

use picovm_engine::Store;
use serde_json::json;

use crate::fixtures::{App, CAPABILITY, archive, docker_archive};
use crate::registry::Registry;
use crate::{Place, stderr, stdout, tool};

#[test]
fn a_container_runs_what_its_image_says_unless_its_user_says_otherwise() {
    let (registry, app) = (Registry::start(), App::new());
    let place = Place::new();
    registry.fill(&app.source(), "team/app:1", &[]);
    let name = registry.name("team/app:1");
    place.ok(&["pull", "-q", &name]);
    let run = |options: &[&str], arguments: &[&str]| {
        let mut all = vec!["run", "--rm"];
        all.extend(options);
        all.push(&name);
        all.extend(arguments);
        let output = place.picovm(&all).output().expect("picovm starts");
        assert!(output.status.success(), "{all:?}: {}", stderr(&output));
        stdout(&output)
    };
    assert_eq!(run(&[], &[]), "hello from the image\n1000\n/srv/app");
    assert_eq!(run(&[], &["from", "here"]), "hello from here\n1000\n/srv/app");
    assert_eq!(
        run(
            &["-e", "GREETING=bye", "-u", "root", "-w", "/etc"],
            &["and", "out"]
        ),
        "bye and out\n0\n/etc"
    );
    assert_eq!(run(&["--entrypoint", "echo"], &[]), "");
    assert_eq!(
        run(&["--entrypoint", "cat"], &["/etc/group"]),
        "root:x:0:\nweb:x:1000:"
    );
    assert_eq!(run(&["--entrypoint", ""], &["pwd"]), "/srv/app");
    // What the upper layer took away is gone, and what it brought is there.
    let listed = run(
        &["--entrypoint", "ls"],
        &["-1", "/etc", "/var/cache", "/var/run/"],
    );
    assert!(
        !listed.contains("gone") && !listed.contains("deep") && listed.contains("new"),
        "{listed}"
    );
    // By its id as well.
    let id = place.ok(&["images", "-q"]);
    let output = place
        .picovm(&["run", "--rm", &id])
        .output()
        .expect("picovm starts");
    assert!(stdout(&output).starts_with("hello"), "{}", stderr(&output));

    // Its templates go with it.
    assert!(place.ok(&["template", "ls"]).contains(&name));
    place.ok(&["rmi", &name]);
    assert!(!place.ok(&["template", "ls"]).contains(&name));
    let output = place
        .picovm(&["run", "--pull", "never", &name])
        .output()
        .expect("picovm starts");
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("picovm pull"), "{}", stderr(&output));
}

#[test]
fn what_is_built_runs_in_another_store_and_what_is_committed_of_it_has_all_of_it() {
    let app = App::new();
    let at = |name: &str| app.expected.join(name);
    // A name by which it is `grep`, and a capability for who has none.
    std::fs::create_dir(at("srv/capable")).expect("a directory");
    std::fs::copy("/bin/busybox", at("srv/capable/grep")).expect("busybox");
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(at("srv/capable/grep"), "security.capability", &CAPABILITY, flags)
        .expect("a capability");
    std::fs::write(at("srv/odd \u{e9}"), "odd").expect("a file");
    // Not below /dev, which every container has of its own.
    tool("mknod", &[&at("srv/device").display().to_string(), "c", "1", "5"]);
    let place = Place::new();
    place.ok(&["image", "build", "mine", &app.expected.display().to_string()]);
    let saved = place.path("saved.tar").display().to_string();
    place.ok(&["save", "-o", &saved, "mine"]);

    let other = Place::new();
    other.ok(&["load", "-i", &saved]);
    let seen = |image: &str| {
        let script = "stat -c '%h %a' /bin/cat /bin/as-root; stat -c '%t:%T %F' /srv/device; cat /srv/odd*; echo; \
                      /srv/capable/grep CapEff /proc/self/status";
        other.ok(&["run", "--rm", "-u", "1000", image, "/bin/sh", "-c", script])
    };
    let all = "9 755\n1 4755\n1:5 character special file\nodd\nCapEff:\t0000000000000400";
    assert_eq!(seen("mine"), all);
    other.ok(&[
        "run",
        "--name",
        "changed",
        "mine",
        "/bin/sh",
        "-c",
        "echo new > /srv/new",
    ]);
    other.ok(&["commit", "changed", "more"]);
    assert_eq!(seen("more"), all);
    assert_eq!(other.ok(&["run", "--rm", "more", "/bin/cat", "/srv/new"]), "new");
    assert_eq!(
        other.ok(&["inspect", "-f", "{{len .RootFS.Layers}}", "more"]),
        "2"
    );
    other.ok(&["rm", "changed"]);
}

#[test]
fn an_image_that_is_missing_is_pulled_and_one_that_nobody_has_is_refused() {
    let (registry, app) = (Registry::start(), App::new());
    let place = Place::new();
    registry.fill(&app.source(), "team/app:1", &[]);
    let run = |name: &str| {
        let output = place
            .picovm(&["run", "--rm", name])
            .output()
            .expect("picovm starts");
        (output.status.code(), stdout(&output), stderr(&output))
    };
    let name = registry.name("team/app:1");
    let (code, said, told) = run(&name);
    assert_eq!(code, Some(0), "{told}");
    // What pulling has to say is not the container's.
    assert_eq!(said, "hello from the image\n1000\n/srv/app");
    assert!(told.contains("pulling it"), "{told}");
    let (_, said, told) = run(&name);
    assert!(said.starts_with("hello") && !told.contains("pulling"), "{told}");
    let (code, said, told) = run(&registry.name("team/app:2"));
    assert_eq!((code, said.as_str()), (Some(125), ""));
    assert!(told.contains("picovm images"), "{told}");
    assert!(place.ok(&["ps", "-aq"]).is_empty());
}

#[test]
fn without_any_command_a_container_is_not_started() {
    let place = Place::new();
    let tree = place.path("tree");
    std::fs::create_dir(&tree).expect("a directory");
    std::fs::write(tree.join("file"), "x").expect("a file");
    place.ok(&["image", "build", "plain", &tree.display().to_string()]);
    let output = place.picovm(&["run", "plain"]).output().expect("picovm starts");
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("names none"), "{}", stderr(&output));
}

#[test]
fn a_real_debian_comes_through_a_registry_and_runs() {
    let debian = Store::open_default()
        .and_then(|store| store.image(picovm_tests::IMAGE))
        .expect("`make image` puts the image into the store");
    let root = std::fs::read(&debian.source).expect("what the image was built from");
    let more = archive(&[("etc/motd", b"of the upper layer\n"), ("etc/.wh.issue", b"")]);
    let config = json!({"Cmd": ["sh", "-c", "cat /etc/motd; ls /etc/issue"], "Env": ["LANG=C.UTF-8"]});
    let place = Place::new();
    let path = place.path("debian.tar");
    std::fs::write(&path, docker_archive(&[root, more], config, None)).expect("the archive");
    let registry = Registry::start();
    let source = format!("docker-archive:{}", path.display());
    registry.fill(
        &source,
        "debian:test",
        &["--dest-compress-format", "zstd", "--dest-compress-level", "1"],
    );
    std::fs::remove_file(&path).expect("the archive");
    let name = registry.name("debian:test");
    place.ok(&["pull", "-q", &name]);
    let image = place.store().image(&name).expect("the image");
    // But for the one that was taken away.
    assert_eq!(image.entries, debian.entries - 1);
    let output = place.picovm(&["run", &name]).output().expect("picovm starts");
    assert_eq!(stdout(&output), "of the upper layer");
    assert!(stderr(&output).contains("/etc/issue"), "{}", stderr(&output));
    let script = "perl -e 'print 6*7' && dpkg -l | grep -c ^ii";
    let output = place
        .picovm(&["run", &name, "sh", "-c", script])
        .output()
        .expect("picovm starts");
    let said = stdout(&output);
    assert!(said.starts_with("42"), "{said} {}", stderr(&output));
    assert!(output.status.success(), "{said} {}", stderr(&output));
}

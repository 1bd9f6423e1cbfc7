//! Files of containers: `cp`, `diff`, `commit`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Stdio;

use crate::{Container, output, picovm, refused, stderr, stdout, told};

/// A directory with files of all kinds, beside each other.
fn sample() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir_all(at("tree/sub")).unwrap();
    fs::write(at("tree/plain"), "plain\n").unwrap();
    fs::write(at("tree/sub/program"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(at("tree/sub/program"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("plain", at("tree/link")).unwrap();
    fs::write(at(&format!("tree/{}", "long".repeat(50))), "x").unwrap();
    directory
}

#[test]
fn files_go_in_and_come_out_of_a_container_that_runs() {
    let container = Container::sleeping(&[]);
    let sample = sample();
    let tree = sample.path().join("tree");
    told(&["cp", tree.to_str().unwrap(), &format!("{}:/srv", container.id())]);
    assert_eq!(
        container.shell("cd /srv/tree && cat plain && sub/program && readlink link && ls | wc -l"),
        "plain\nran\nplain\n4"
    );
    // To a name that is not there: it gets that name.
    told(&[
        "cp",
        tree.to_str().unwrap(),
        &format!("{}:/srv/copy", container.id()),
    ]);
    assert_eq!(container.shell("cat /srv/copy/plain"), "plain");
    told(&[
        "cp",
        &format!("{}/.", tree.display()),
        &format!("{}:/tmp", container.id()),
    ]);
    assert_eq!(container.shell("cat /tmp/plain"), "plain");

    let back = sample.path().join("back");
    told(&[
        "cp",
        &format!("{}:/srv/tree", container.id()),
        back.to_str().unwrap(),
    ]);
    assert_eq!(fs::read_to_string(back.join("plain")).unwrap(), "plain\n");
    assert_eq!(
        fs::read_link(back.join("link")).unwrap(),
        std::path::Path::new("plain")
    );
    assert_eq!(
        fs::metadata(back.join("sub/program")).unwrap().mode() & 0o777,
        0o755
    );
    told(&[
        "cp",
        &format!("{}:/etc/issue", container.id()),
        sample.path().join("name").to_str().unwrap(),
    ]);
}

#[test]
fn files_go_in_and_come_out_of_one_that_does_not_run() {
    let container = Container(told(&["create", "debian", "cat", "/srv/plain"]));
    let sample = sample();
    let plain = sample.path().join("tree/plain");
    told(&[
        "cp",
        plain.to_str().unwrap(),
        &format!("{}:/srv/", container.id()),
    ]);
    assert_eq!(told(&["start", "-a", container.id()]), "plain");
    let out = sample.path().join("out");
    told(&[
        "cp",
        &format!("{}:/srv/plain", container.id()),
        out.to_str().unwrap(),
    ]);
    assert_eq!(fs::read_to_string(out).unwrap(), "plain\n");
}

#[test]
fn archives_go_in_and_come_out_by_the_standard_streams() {
    let container = Container::sleeping(&[]);
    let sample = sample();
    let archive = std::process::Command::new("tar")
        .args(["-c", "-C", sample.path().to_str().unwrap(), "tree"])
        .output()
        .unwrap()
        .stdout;
    let mut child = picovm(&["cp", "-", &format!("{}:/opt", container.id())])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&archive).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(container.shell("cat /opt/tree/plain"), "plain");
    let out = output(&["cp", &format!("{}:/opt/tree", container.id()), "-"]);
    assert!(out.status.success(), "{}", stderr(&out));
    let mut names: Vec<String> = Vec::new();
    let listed = std::process::Command::new("tar")
        .arg("-t")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .and_then(|mut child| {
            child.stdin.take().unwrap().write_all(&out.stdout)?;
            child.wait_with_output()
        })
        .unwrap();
    names.extend(String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned));
    assert!(names.iter().any(|name| name == "tree/sub/program"), "{names:?}");
}

#[test]
fn what_cannot_be_copied_says_why() {
    let container = Container::sleeping(&[]);
    let target = format!("{}:/srv", container.id());
    assert!(refused(&["cp", "/no/such/file", &target], 1).contains("/no/such/file"));
    let error = refused(&["cp", &format!("{}:/no/such/file", container.id()), "/tmp"], 1);
    assert!(error.contains("/no/such/file"), "{error}");
    assert!(refused(&["cp", "/etc/passwd", "/tmp"], 1).contains("container"));
    assert!(refused(&["cp", "/etc/passwd", "nobody:/tmp"], 1).contains("nobody"));
    let error = refused(&["cp", "/etc", &format!("{}:/etc/passwd", container.id())], 1);
    assert!(error.contains("directory"), "{error}");
}

#[test]
fn diff_lists_what_has_changed() {
    let container = Container::sleeping(&[]);
    container.shell("echo x > /srv/new; mkdir /opt/dir; rm /etc/motd; echo more >> /etc/issue");
    let list = told(&["diff", container.id()]);
    let lines: Vec<&str> = list.lines().collect();
    for line in [
        "C /srv",
        "A /srv/new",
        "A /opt/dir",
        "D /etc/motd",
        "C /etc/issue",
        "C /etc",
    ] {
        assert!(lines.contains(&line), "{line} in {lines:?}");
    }
    assert!(
        !lines
            .iter()
            .any(|line| line.contains("/proc") || line.contains("/dev")),
        "{lines:?}"
    );
    told(&["stop", container.id()]);
    assert_eq!(told(&["diff", container.id()]), list);
    let untouched = Container::sleeping(&[]);
    assert_eq!(told(&["diff", untouched.id()]), "");
}

#[test]
fn a_container_becomes_an_image() {
    let container = Container::sleeping(&["-e", "KEPT=yes"]);
    container.shell("echo from the container > /srv/new; rm /etc/motd");
    let id = told(&[
        "commit",
        "-m",
        "a change",
        "-a",
        "me",
        "-c",
        "CMD [\"cat\", \"/srv/new\"]",
        "-c",
        "ENV EXTRA=1",
        container.id(),
        "committed:1",
    ]);
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(told(&["run", "--rm", "committed:1"]), "from the container");
    let inside = told(&[
        "run",
        "--rm",
        "committed:1",
        "sh",
        "-c",
        "test -e /etc/motd || echo gone; echo $EXTRA; stat -c '%h %a' /usr/bin/perl /usr/bin/passwd",
    ]);
    // What was built below it is whole: of two names there is one file, and who runs the other becomes root.
    assert_eq!(inside, "gone\n1\n2 755\n1 4755");
    // An image that a container uses stays.
    let user = Container(told(&["create", "committed:1"]));
    let refusal = output(&["rmi", "committed:1"]);
    assert!(!refusal.status.success());
    assert!(
        stderr(&refusal).contains(&user.id()[..12]),
        "{}",
        stderr(&refusal)
    );
    told(&["rm", user.id()]);
    told(&["rmi", "committed:1"]);
    assert!(!stdout(&output(&["images", "-q"])).contains(&id[7..19]));
}

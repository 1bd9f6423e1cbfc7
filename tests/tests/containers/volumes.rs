//! Directories of the host and volumes in containers.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::{Container, output, refused, stderr, stdout, told};

/// A directory of the host, to be removed by who made it.
fn directory() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().to_str().expect("a path of text").to_owned();
    (directory, path)
}

fn run(options: &[&str], script: &str) -> String {
    told(&[&["run", "--rm"], options, &["debian", "sh", "-ec", script]].concat())
}

#[test]
fn a_directory_of_the_host_is_read_and_written_by_a_container() {
    let (host, path) = directory();
    fs::write(host.path().join("note"), "from the host").unwrap();
    let volume = format!("{path}:/data");
    let script = "cat /data/note; mkdir -p /data/a/b; echo made > /data/a/b/file; chown 1000:2000 /data/a/b/file; \
                  chmod 640 /data/a/b/file; ln /data/a/b/file /data/hard; ln -s a/b/file /data/soft; mkfifo /data/fifo";
    assert_eq!(run(&["-v", &volume], script), "from the host");
    let file = fs::metadata(host.path().join("a/b/file")).unwrap();
    assert_eq!(
        (file.uid(), file.gid(), file.mode() & 0o7777),
        (1000, 2000, 0o640)
    );
    assert_eq!(file.nlink(), 2);
    assert_eq!(fs::read_to_string(host.path().join("soft")).unwrap(), "made\n");
}

#[test]
fn what_is_shared_read_only_cannot_be_changed() {
    let (host, path) = directory();
    fs::write(host.path().join("note"), "as it was").unwrap();
    for options in [
        ["-v".to_owned(), format!("{path}:/data:ro")],
        [
            "--mount".into(),
            format!("type=bind,src={path},dst=/data,readonly"),
        ],
    ] {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let script = "! touch /data/new 2>/dev/null; ! echo x 2>/dev/null > /data/note; ! rm -f /data/note 2>/dev/null; \
                      ! mount -o remount,bind,rw /data 2>/dev/null || ! touch /data/new 2>/dev/null; cat /data/note";
        assert_eq!(run(&options, script), "as it was");
    }
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 1);
}

#[test]
fn a_single_file_is_shared() {
    let (host, path) = directory();
    fs::write(host.path().join("settings"), "one\n").unwrap();
    let volume = format!("{path}/settings:/etc/of/mine");
    assert_eq!(
        run(&["-v", &volume], "cat /etc/of/mine; echo two >> /etc/of/mine"),
        "one"
    );
    assert_eq!(
        fs::read_to_string(host.path().join("settings")).unwrap(),
        "one\ntwo\n"
    );
}

#[test]
fn nothing_but_what_is_shared_can_be_reached() {
    let (host, path) = directory();
    fs::create_dir(host.path().join("inner")).unwrap();
    fs::write(host.path().join("secret"), "of the host").unwrap();
    std::os::unix::fs::symlink("../secret", host.path().join("inner/up")).unwrap();
    std::os::unix::fs::symlink(host.path().join("secret"), host.path().join("inner/out")).unwrap();
    let volume = format!("{path}/inner:/data");
    let script = "! cat /data/up 2>/dev/null; ! cat /data/out 2>/dev/null; ! cat /data/../secret 2>/dev/null; \
                  ! mknod /data/disk b 254 0 2>/dev/null; echo fine";
    assert_eq!(run(&["-v", &volume], script), "fine");
}

#[test]
fn files_behave_as_on_any_file_system() {
    let (_host, path) = directory();
    let volume = format!("{path}:/data");
    let script = r#"cd /data
        echo one > a; echo two > b; mv a b; test "$(cat b)" = one; test ! -e a
        exec 3<>open; echo kept >&3; rm open; test ! -e open; exec 3>&-
        echo 1 > log; for i in 2 3 4; do echo $i >> log; done; test "$(wc -l < log)" = 4
        truncate -s 5 b; test "$(stat -c %s b)" = 5
        truncate -s 6G sparse; echo end | dd of=sparse bs=1 seek=5368709120 conv=notrunc 2>/dev/null
        test "$(dd if=sparse bs=1 skip=5368709120 count=3 2>/dev/null)" = end
        mkdir many; i=0; while [ $i -lt 300 ]; do : > "many/$i"; i=$((i+1)); done; test "$(ls many | wc -l)" = 300; rm -r many
        flock log true; ( flock 9; echo locked >&9 ) 9>>log
        dd if=/dev/urandom of=big bs=64k count=20 2>/dev/null; cp big copy; cmp big copy; sync big
        : > "name with space"; : > "$(printf 'line\nend')"
        su nobody -s /bin/sh -c '! touch /data/denied' 2>/dev/null
        mkdir -m 1777 all; su nobody -s /bin/sh -c 'touch /data/all/mine'; stat -c %U all/mine
        perl -e 'print 1' >/dev/null"#;
    let told = output(&["run", "--rm", "-v", &volume, "debian", "sh", "-ec", script]);
    assert!(told.status.success(), "{}", stderr(&told));
    assert_eq!(stdout(&told), "nobody");
}

#[test]
fn a_volume_outlives_its_containers_and_is_shared_by_those_that_run() {
    told(&["volume", "create", "kept"]);
    let first = Container::sleeping(&["-v", "kept:/data"]);
    let second = Container::sleeping(&["-v", "kept:/other"]);
    first.shell("echo from the first > /data/note");
    assert_eq!(second.shell("cat /other/note"), "from the first");
    let in_use = refused(&["volume", "rm", "kept"], 1);
    assert!(in_use.contains("in use"), "{in_use}");
    assert_eq!(
        first.inspect("{{range .Mounts}}{{.Type}} {{.Name}} {{.Destination}}{{end}}"),
        "volume kept /data"
    );
    drop((first, second));
    assert_eq!(run(&["-v", "kept:/data"], "cat /data/note"), "from the first");
    told(&["volume", "rm", "kept"]);
    assert!(refused(&["volume", "inspect", "kept"], 1).contains("kept"));
}

#[test]
fn an_empty_volume_is_filled_with_what_the_image_has_there() {
    assert_eq!(
        run(
            &["-v", "filled:/etc/apt"],
            "ls /etc/apt/sources.list; rm /etc/apt/sources.list"
        ),
        "/etc/apt/sources.list"
    );
    assert_eq!(
        run(
            &["-v", "filled:/etc/apt"],
            "ls -d /etc/apt/apt.conf.d; test ! -e /etc/apt/sources.list"
        ),
        "/etc/apt/apt.conf.d"
    );
    told(&["volume", "rm", "filled"]);
}

#[test]
fn a_volume_without_a_name_goes_with_its_container_if_asked_to() {
    let volumes = || {
        told(&["volume", "ls", "-q"])
            .lines()
            .filter(|name| name.len() == 64)
            .count()
    };
    let before = volumes();
    run(&["-v", "/data"], "touch /data/file");
    assert_eq!(volumes(), before, "--rm removes it");
    let kept = Container::sleeping(&["-v", "/data"]);
    assert_eq!(volumes(), before + 1);
    told(&["rm", "-f", "-v", kept.id()]);
    assert_eq!(volumes(), before, "rm -v removes it");
}

#[test]
fn a_container_with_volumes_is_stopped_and_started_again() {
    let (host, path) = directory();
    let container = Container::run(
        &["-v", &format!("{path}:/data")],
        &["sh", "-c", "echo x >> /data/starts"],
    );
    told(&["wait", container.id()]);
    told(&["start", container.id()]);
    told(&["wait", container.id()]);
    assert_eq!(fs::read_to_string(host.path().join("starts")).unwrap(), "x\nx\n");
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_source_that_is_gone_is_named() {
    let (host, path) = directory();
    let id = told(&["create", "-v", &format!("{path}:/data"), "debian", "true"]);
    drop(host);
    let output = output(&["start", "-a", &id]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains(&path), "{}", stderr(&output));
    told(&["rm", &id]);
}

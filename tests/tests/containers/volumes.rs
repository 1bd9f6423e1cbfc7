//! Directories of the host and volumes in containers.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::{Container, output, refused, stderr, stdout, told, until};

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

/// The share server of a container: of the children of its monitor that one which is no VMM process.
fn share_server(container: &Container) -> u32 {
    let monitor = container.inspect("{{.State.Pid}}").parse().unwrap();
    let has_machine = |process: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
        descriptors
            .flatten()
            .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
            .any(|link| link.to_string_lossy().contains("kvm"))
    };
    let mut servers = picovm_tests::children(monitor);
    servers.retain(|process| !has_machine(process));
    assert_eq!(servers.len(), 1);
    servers[0]
}

#[test]
fn a_share_server_that_has_as_many_files_open_as_it_may_says_so_and_goes_on() {
    const MAY: u64 = 120;
    let (host, path) = directory();
    for file in 0..300 {
        fs::write(host.path().join(file.to_string()), "text").unwrap();
    }
    let container = Container::sleeping(&["-v", &format!("{path}:/data")]);
    let server = share_server(&container);
    // What it may have by itself takes minutes to reach where every instruction is emulated.
    let limit = Rlimit {
        current: Some(MAY),
        maximum: Some(MAY),
    };
    let process = Pid::from_raw(server.cast_signed());
    let before = prlimit(process, Resource::Nofile, limit).unwrap();
    assert_eq!(before.current, Some(1 << 17));

    let script = r#"
        my $made = 0; open(my $held, "+<", "/data/0") or die $!;
        for (1..299) { open(my $file, "<", "/data/$_") ? $made++ : ($error = $!) }
        print "$error\n"; print $made > 50 && $made < 120 ? "some" : $made, " were opened\n";
        open(my $new, ">", "/data/new") ? 1 : print "not made: $!\n"; mkdir "/data/directory" or print "no directory: $!\n";
        opendir(my $list, "/data") or print "not listed: $!\n";
        syswrite($held, "kept") or print "not written: $!\n"; close $held or print "not closed: $!\n"
    "#;
    let expected = [
        "Too many open files",
        "some were opened",
        "not made: Too many open files",
        "no directory: Too many open files",
        "not listed: Too many open files",
    ];
    let at_the_limit = told(&["exec", container.id(), "perl", "-e", script]);
    assert_eq!(at_the_limit.lines().collect::<Vec<_>>(), expected);
    assert_eq!(
        fs::read_dir(host.path()).unwrap().count(),
        300,
        "nothing was made"
    );
    assert_eq!(fs::read_to_string(host.path().join("0")).unwrap(), "kept");
    // The container's kernel forgets what nobody uses.
    container.shell("echo 2 > /proc/sys/vm/drop_caches");
    assert_eq!(
        container.shell("cat /data/0 /data/299; echo new > /data/new; ls /data | wc -l"),
        "kepttext301"
    );
    assert_eq!(share_server(&container), server);
}

#[test]
fn two_containers_of_a_directory_see_what_is_written_and_not_each_others_locks() {
    let (host, path) = directory();
    fs::write(host.path().join("file"), "").unwrap();
    let volume = format!("{path}:/data");
    let [first, second] = [0; 2].map(|_| Container::sleeping(&["-v", &volume]));
    // By both ways to lock a file.
    let locked = |container: &Container| {
        container.shell(
            r#"flock -n /data/file true && echo -n 'free ' || echo -n 'locked '
            perl -e 'use Fcntl; open F, "+<", "/data/file"; $lock = pack "s s x4 q q l x4", F_WRLCK, 0, 0, 0, 0;
                print fcntl(F, F_SETLK, $lock) ? "free" : "locked"'"#,
        )
    };
    let lock = r#"use Fcntl ":DEFAULT", ":flock"; open F, "+<", "/data/file"; flock F, LOCK_EX;
        $lock = pack "s s x4 q q l x4", F_WRLCK, 0, 0, 0, 0; fcntl F, F_SETLKW, $lock; sleep 1000"#;
    assert_eq!(locked(&first), "free free");
    told(&["exec", "-d", first.id(), "perl", "-e", lock]);
    until(|| locked(&first) == "locked locked", || locked(&first));
    assert_eq!(locked(&second), "free free");
    // Nor does this machine see any.
    let here = fs::File::open(host.path().join("file")).unwrap();
    rustix::fs::flock(&here, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    // What they write is there for both.
    first.shell("for i in $(seq 50); do echo first >> /data/all; done");
    second.shell("for i in $(seq 50); do echo second >> /data/all; done");
    assert_eq!(
        first.shell("sort /data/all | uniq -c | tr -s ' '"),
        " 50 first\n 50 second"
    );
    assert_eq!(first.shell("ls /data"), "all\nfile");
}

#[test]
fn who_opens_a_file_again_reads_what_it_holds_now_and_as_far_as_it_goes_within_a_second() {
    let (host, path) = directory();
    fs::write(host.path().join("note"), "old").unwrap();
    let writer = std::thread::spawn({
        let host = host.path().to_owned();
        move || {
            for (round, text) in ["new", "new and longer"].into_iter().enumerate() {
                until(
                    || host.join(format!("read{round}")).exists(),
                    || "nothing was read".into(),
                );
                fs::write(host.join("note"), text).unwrap();
                fs::write(host.join(format!("written{round}")), "").unwrap();
            }
        }
    });
    // By system calls: who asks for the status of what it has opened, as libraries do, learns its size.
    let script = r#"
        use Time::HiRes "time";
        sub text {
            my ($path, $text) = ("/data/note", "\0" x 100); my $file = syscall(2, $path, 0, 0);
            my $length = syscall(0, $file, $text, 100); syscall(3, $file); substr $text, 0, $length
        }
        sub ask { open(my $file, ">", "/data/read$_[0]") or die $!; close $file; 1 until -e "/data/written$_[0]" }
        print text(), "\n"; ask(0); print text(), "\n"; ask(1);
        my $since = time; print substr(text(), 0, 3), "\n"; my $text = "";
        $text = text() until $text eq "new and longer" || time - $since > 10; print "$text\n"
    "#;
    let volume = format!("{path}:/data");
    let read = told(&["run", "--rm", "-v", &volume, "debian", "perl", "-e", script]);
    writer.join().unwrap();
    assert_eq!(read, "old\nnew\nnew\nnew and longer");
}

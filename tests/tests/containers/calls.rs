//! No container needs a system call of its processes here that is not in their lists: `--seccomp=log` tells which it would be.

use std::process::Stdio;

use crate::{Container, output, picovm, stderr, stdout, storage, told, until};

/// That a command has told of no call, although it would have.
fn nothing_told(told: &std::process::Output) {
    assert!(!stderr(told).contains("not in the list"), "{}", stderr(told));
}

/// The same of one that has done what it should.
fn done_and_nothing_told(told: &std::process::Output) {
    assert!(told.status.success(), "{}", stderr(told));
    nothing_told(told);
}

/// A container that `picovm start -a` runs until it is stopped: what that tells.
fn start_and_stop(container: &Container, meanwhile: &str) -> std::process::Output {
    let attached = picovm(&["start", "-a", container.id()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("picovm starts");
    container.until("{{.State.Status}}", "running");
    container.shell(meanwhile);
    until(
        || storage::taken(container) < 40,
        || "what was deleted does not go back".into(),
    );
    told(&["stop", "-t", "0", container.id()]);
    attached.wait_with_output().expect("it ends")
}

#[test]
fn of_a_container_with_storage() {
    let create = output(&[
        "create",
        "--seccomp=log",
        "--storage",
        "256m",
        "debian",
        "sleep",
        "1000",
    ]);
    done_and_nothing_told(&create);
    assert!(
        stderr(&create).contains("warning: --seccomp=log"),
        "{}",
        stderr(&create)
    );
    let container = Container(stdout(&create));
    let script = "set -e; dd if=/dev/zero of=/big bs=1M count=50 conv=fsync 2> /dev/null
        dd if=/big of=/dev/null bs=1M iflag=direct 2> /dev/null; rm /big; sync
        fallocate -l 8M /set-aside; fallocate -p -l 4M /set-aside; sync; rm /set-aside; fstrim / 2> /dev/null || true; echo kept > /note; sync";
    for _ in 0..2 {
        let ended = start_and_stop(&container, script);
        nothing_told(&ended);
    }
    for command in [&["diff"][..], &["commit"]] {
        done_and_nothing_told(&output(&[command, &[container.id()]].concat()));
    }
}

#[test]
fn of_a_container_with_a_directory_of_the_host() {
    let host = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", host.path().display());
    // Where it may write, all of it has to work, or the calls would not be made.
    let script = r#"cd /data; touch a 2> /dev/null && set -e
        dd if=/dev/zero of=big bs=1M count=50 conv=fsync 2> /dev/null; dd if=big of=/dev/null bs=1M iflag=direct; rm big; sync
        echo one > a; cp a b; mv a c; ln c d; ln -s c e; readlink e; mkfifo f; mkdir g; mv g h; touch -d @100 c; truncate -s 100 c
        fallocate -l 1M i; fallocate -p -l 64K i; chmod 4755 c; chown 1000:1000 c; df .; ls -laR .; cp --sparse=always i j
        flock c true; chmod 1777 h; su nobody -s /bin/sh -c 'echo x > h/mine; echo y >> h/mine; chmod 600 h/mine; mkdir h/dir; rm -r h/dir'; rm h/mine
        perl -e '$f = "c"; for $n ("user.a", "security.capability", "trusted.a") {
            $m = $n; $v = pack "V5", 0x02000001, 1, 0, 0, 0; $b = "\0" x 100;
            syscall 188, $f, $m, $v, 20, 0; syscall 191, $f, $m, $b, 100; syscall 194, $f, $b, 100; syscall 197, $f, $m }'
        perl -e 'use Fcntl; sysopen F, ".", O_RDWR | 020200000; open F, "+>", "k"; unlink "k"; print F "x"; truncate F, 9; chmod 0600, F; close F'
        sync c; rm -r *; cd /; echo 2 > /proc/sys/vm/drop_caches; echo at the end"#;
    for option in [volume.as_str(), "of-calls:/data", &format!("{volume}:ro")] {
        let ended = output(&[
            "run",
            "--rm",
            "--seccomp=log",
            "-v",
            option,
            "debian",
            "sh",
            "-c",
            script,
        ]);
        done_and_nothing_told(&ended);
        assert!(stdout(&ended).ends_with("at the end"), "{}", stdout(&ended));
    }
    told(&["volume", "rm", "of-calls"]);
}

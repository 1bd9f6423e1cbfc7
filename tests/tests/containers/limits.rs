//! What a container may take.

use crate::{Container, output, refused, stderr, stdout, told};

#[test]
fn a_container_that_takes_more_memory_than_its_limit_is_killed_and_that_is_told() {
    let hog = "head -c 200000000 /dev/zero | tail";
    let ended = output(&[
        "run",
        "--name",
        "hog",
        "-m",
        "40m",
        "debian",
        "sh",
        "-c",
        &format!("exec {hog}"),
    ]);
    let container = Container("hog".into());
    // The shell has execed the first of the two; that the second was killed is told all the same.
    assert_eq!(
        container.inspect("{{.State.OOMKilled}}"),
        "true",
        "{}",
        stderr(&ended)
    );
    let perl = "my $x = 'x' x 100_000_000; print length $x";
    let killed = output(&["run", "--rm", "-m", "40m", "debian", "perl", "-e", perl]);
    assert_eq!(
        killed.status.code(),
        Some(137),
        "{}{}",
        stdout(&killed),
        stderr(&killed)
    );
    // The same with room.
    let enough = output(&["run", "--rm", "-m", "300m", "debian", "perl", "-e", perl]);
    assert_eq!(stdout(&enough), "100000000", "{}", stderr(&enough));
}

#[test]
fn without_a_limit_a_hog_is_killed_too_and_its_container_can_be_asked() {
    let hog = "head -c 1000000000 /dev/zero | tail";
    let killed = output(&["run", "--rm", "debian", "sh", "-c", hog]);
    assert_eq!(
        killed.status.code(),
        Some(137),
        "{}{}",
        stdout(&killed),
        stderr(&killed)
    );
}

#[test]
fn the_number_of_processes_has_a_limit() {
    let script = "for i in $(seq 30); do sleep 1000 & done; echo started";
    let limited = output(&["run", "--rm", "--pids-limit", "10", "debian", "sh", "-c", script]);
    let text = format!("{}{}", stdout(&limited), stderr(&limited));
    assert!(text.to_lowercase().contains("fork"), "{text}");
}

#[test]
fn processor_time_has_a_limit() {
    let container = Container::sleeping(&["--cpus", "0.5"]);
    let told = container.shell("cat /sys/fs/cgroup/cpu.max");
    assert!(told.contains("50000 100000"), "{told}");
    assert_eq!(container.inspect("{{.HostConfig.NanoCpus}}"), "500000000");
    assert_eq!(container.shell("nproc"), "1");
}

#[test]
fn ulimits_are_those_that_were_given() {
    let told = told(&[
        "run",
        "--rm",
        "--ulimit",
        "nofile=100:200",
        "--ulimit",
        "core=0",
        "debian",
        "bash",
        "-c",
        "ulimit -Sn; ulimit -Hn; ulimit -c",
    ]);
    assert_eq!(told, "100\n200\n0");
}

#[test]
fn capabilities_can_be_taken_away() {
    let bounding = |options: &[&str]| {
        let command = ["debian", "grep", "CapBnd", "/proc/self/status"];
        let line = told(&[&["run", "--rm"], options, &command].concat());
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    let usual = bounding(&[]);
    assert_ne!(usual & 1, 0, "CAP_CHOWN");
    assert_eq!(bounding(&["--cap-drop", "CHOWN"]), usual & !1);
    assert_eq!(bounding(&["--cap-drop", "ALL"]), 0);
    assert_eq!(bounding(&["--cap-drop", "ALL", "--cap-add", "CAP_CHOWN"]), 1);
    let denied = output(&[
        "run",
        "--rm",
        "--cap-drop",
        "CHOWN",
        "debian",
        "chown",
        "1:1",
        "/etc/passwd",
    ]);
    assert!(!denied.status.success());
    assert!(refused(&["run", "--cap-drop", "NONSENSE", "debian", "true"], 125).contains("NONSENSE"));
}

#[test]
fn no_program_gives_privileges_where_that_is_wanted() {
    let line = told(&[
        "run",
        "--rm",
        "--security-opt",
        "no-new-privileges",
        "debian",
        "grep",
        "NoNewPrivs",
        "/proc/self/status",
    ]);
    assert!(line.ends_with('1'), "{line}");
}

#[test]
fn a_read_only_root_refuses_and_file_systems_in_memory_take() {
    let options = [
        "--read-only",
        "--tmpfs",
        "/scratch:size=1m,mode=1777",
        "--tmpfs",
        "/run/app",
    ];
    let container = Container::sleeping(&options);
    let failed = output(&["exec", container.id(), "touch", "/root/x"]);
    assert!(
        stderr(&failed).contains("Read-only file system"),
        "{}",
        stderr(&failed)
    );
    assert_eq!(
        container.shell("touch /scratch/x /run/app/y /dev/shm/z && echo fine"),
        "fine"
    );
    let full = output(&[
        "exec",
        container.id(),
        "sh",
        "-c",
        "head -c 2000000 /dev/zero > /scratch/big",
    ]);
    assert!(stderr(&full).contains("No space left"), "{}", stderr(&full));
}

#[test]
fn names_of_hosts_can_be_added() {
    let told = told(&[
        "run",
        "--rm",
        "--add-host",
        "db:10.0.0.7",
        "--hostname",
        "me",
        "debian",
        "sh",
        "-c",
        "getent hosts db; getent hosts localhost | head -n 1; hostname",
    ]);
    assert!(told.contains("10.0.0.7") && told.ends_with("me"), "{told}");
}

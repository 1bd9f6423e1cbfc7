//! What lives how long, and what is left behind: nothing.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::{alone, cgroups, jailer, output, with_shell};

/// A jail in which a shell sleeps, and the ids of its processes on the host.
fn sleeping(directory: &std::path::Path, members: &str) -> (Child, Vec<i32>) {
    let mut child = jailer(
        directory,
        &with_shell(members),
        &["--", "/bin/sh", "-c", "echo ready; sleep 1000; true"],
    )
    .stdout(Stdio::piped())
    .spawn()
    .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "ready\n");
    let below = descendants(child.id() as i32);
    assert!(below.len() >= 2, "{below:?}");
    (child, below)
}

fn descendants(of: i32) -> Vec<i32> {
    let children = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    let children: Vec<i32> = children
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect();
    children
        .iter()
        .flat_map(|&pid| std::iter::once(pid).chain(descendants(pid)))
        .collect()
}

fn gone(processes: &[i32]) -> bool {
    let begun = Instant::now();
    while processes.iter().any(|pid| {
        std::path::Path::new(&format!("/proc/{pid}/exe"))
            .read_link()
            .is_ok()
    }) {
        if begun.elapsed() > Duration::from_secs(10) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

#[test]
fn a_jail_dies_with_its_parent_and_the_next_one_clears_up() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let cgroup = r#", "cgroup": { "pids": 8 }, "ids": { "first": 300000, "count": 1 }"#;
    let (mut child, below) = sleeping(directory.path(), cgroup);
    assert_eq!(cgroups().len(), 1);
    // The only id of the range is taken.
    let (status, _, err) = output(jailer(directory.path(), &with_shell(cgroup), &["--", "/bin/sh"]));
    assert_eq!(status, Some(125));
    assert!(err.contains("all 1 ids"), "{err}");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(gone(&below), "{below:?}");
    // SIGKILL leaves no time to remove the cgroup. Its name is its id, and whoever has the id next takes it away.
    let (status, _, err) = output(jailer(
        directory.path(),
        &with_shell(cgroup),
        &["--", "/bin/sh", "-c", "exit 0"],
    ));
    assert_eq!(status, Some(0), "{err}");
    assert!(cgroups().is_empty());
}

#[test]
fn a_jail_that_may_outlives_its_parent() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let (mut child, below) = sleeping(directory.path(), r#", "outlives_parent": true"#);
    child.kill().unwrap();
    child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let first = below.first().copied().unwrap();
    let alive = std::path::Path::new(&format!("/proc/{first}/exe"))
        .read_link()
        .is_ok();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(first).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    assert!(alive);
    assert!(gone(&below), "the program goes with process 1 of its jail");
}

#[test]
fn nothing_is_left_behind_by_errors() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    for members in [
        // The mount fails.
        r#", "cgroup": { "pids": 8 }, "x": 1"#,
        // The device is none.
        r#", "cgroup": { "pids": 8, "io": [ { "device": "/dev/null", "reads": 1 } ] }"#,
        // There is no such device.
        r#", "cgroup": { "pids": 8, "io": [ { "device": "250:250", "reads": 1 } ] }"#,
        // More open files than a process may have.
        r#", "cgroup": { "pids": 8 }, "rlimits": { "open_files": 99999999999 }"#,
    ] {
        let (status, _, err) = output(jailer(
            directory.path(),
            &with_shell(members),
            &["--", "/bin/sh", "-c", "exit 0"],
        ));
        assert_eq!(status, Some(125), "{members}: {err}");
        assert!(
            err.starts_with("picovm-jailer: ") && err.contains("cannot"),
            "{err}"
        );
    }
    let policy = r#"{ "cgroup": { "pids": 8 }, "root": [ { "path": "/nowhere" } ] }"#;
    assert_eq!(
        output(jailer(directory.path(), policy, &["--", "x"])).0,
        Some(125)
    );
    assert!(cgroups().is_empty());
    assert_eq!(mounts(), before);
}

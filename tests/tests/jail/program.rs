//! `picovm-jailer`, used alone.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::{alone, cgroups, jailer, output, with_shell};

#[test]
fn a_program_sees_only_its_jail_and_its_status_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let script = "echo $(ls /) $(ls /dev) $$; touch /x; exit 7";
    let (status, out, err) = output(jailer(
        directory.path(),
        &with_shell(""),
        &["--", "/bin/sh", "-c", script],
    ));
    assert_eq!(out, "bin dev null 2", "{err}");
    assert_eq!(status, Some(7), "{err}");
    assert!(err.contains("Read-only file system"), "{err}");
}

#[test]
fn each_jail_has_an_id_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let start = || {
        let mut command = jailer(
            directory.path(),
            &with_shell(""),
            &["--", "/bin/sh", "-c", "id -u; sleep 1"],
        );
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let all: Vec<_> = (0..3).map(|_| start()).collect();
    let mut ids: Vec<u32> = all
        .into_iter()
        .map(|child| {
            crate::text(&child.wait_with_output().unwrap().stdout)
                .parse()
                .unwrap()
        })
        .collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 3);
    assert!(ids.iter().all(|id| (200_000..265_536).contains(id)), "{ids:?}");
}

#[test]
fn statuses_are_those_of_a_shell() {
    let directory = tempfile::tempdir().unwrap();
    let run = |policy: &str, arguments: &[&str]| output(jailer(directory.path(), policy, arguments));
    let shell = with_shell("");
    assert_eq!(
        run(&shell, &["--", "/bin/sh", "-c", "kill -TERM $$"]).0,
        Some(128 + 15)
    );
    let (status, _, err) = run(&shell, &["--", "nothing"]);
    assert_eq!(status, Some(127));
    assert!(err.contains("there is no nothing in the jail"), "{err}");
    assert_eq!(run(&shell, &["--", "/bin"]).0, Some(126));
    let (status, _, err) = run("{ \"rootz\": [] }", &["--", "/bin/sh"]);
    assert_eq!(status, Some(125));
    assert!(err.contains("rootz"), "{err}");
    let (status, _, err) = run(r#"{ "root": [ { "path": "/no/such" } ] }"#, &["--", "/bin/sh"]);
    assert_eq!(status, Some(125));
    assert!(err.contains("find an entry of the root on the host"), "{err}");
    assert_eq!(run(&shell, &["/bin/sh"]).0, Some(125));
}

#[test]
fn a_call_that_is_not_allowed_ends_the_program_or_is_told_of() {
    let directory = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| output(jailer(directory.path(), &with_shell(""), arguments));
    let unshare = ["--", "/bin/unshare", "-n", "/bin/sh", "-c", "exit 3"];
    let (status, _, err) = run(&unshare);
    assert_eq!(status, Some(128 + 31), "{err}");
    assert!(err.contains("--seccomp=log"), "{err}");
    let (status, _, err) = run(&[&["--seccomp=log"], unshare.as_slice()].concat());
    // It is let through, and refused by the walls.
    assert!(
        status == Some(1) && err.contains("Operation not permitted"),
        "{err}"
    );
    let told = format!("not in the list of program: unshare({:#x}", libc::CLONE_NEWNET);
    assert!(err.contains(&told), "{err}");
    assert_eq!(err.matches("program: unshare(").count(), 1, "{err}");
}

#[test]
fn a_policy_can_have_a_list_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let allow = |calls: &str| with_shell(&format!(r#", "seccomp": {{ "allow": [{calls}] }}"#));
    let few = [
        "execve",
        "exit_group",
        "wait4",
        "rt_sigtimedwait",
        "kill",
        "rt_sigprocmask",
        "rt_sigaction",
    ];
    let calls: Vec<String> = few
        .iter()
        .map(|name| format!(r#"{{ "syscall": "{name}" }}"#))
        .collect();
    let (status, _, err) = output(jailer(
        directory.path(),
        &allow(&calls.join(",")),
        &["--", "/bin/sh", "-c", "exit 0"],
    ));
    assert_eq!(status, Some(159), "a shell needs more: {err}");
    let (status, _, err) = output(jailer(
        directory.path(),
        &allow(r#"{ "syscall": "reed" }"#),
        &["--", "/bin/sh"],
    ));
    assert_eq!(status, Some(125));
    assert!(err.contains("there is no system call reed"), "{err}");
}

#[test]
fn signals_are_passed_on() {
    let directory = tempfile::tempdir().unwrap();
    let script = "trap 'echo got; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let mut child = jailer(
        directory.path(),
        &with_shell(""),
        &["--", "/bin/sh", "-c", script],
    )
    .stdout(Stdio::piped())
    .spawn()
    .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "got");
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

#[test]
fn limits_of_a_cgroup_hold_and_the_cgroup_goes() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let policy = with_shell(r#", "cgroup": { "memory": 33554432, "pids": 8, "cpu": 500, "cpu_weight": 50 }"#);
    let hog = "dd if=/dev/zero of=/dev/null bs=200M count=1";
    let policy = policy.replace(
        r#"{ "path": "/dev/null", "access": "device" }"#,
        r#"{ "path": "/dev", "access": "device" }"#,
    );
    let (status, _, err) = output(jailer(directory.path(), &policy, &["--", "/bin/sh", "-c", hog]));
    assert_eq!(status, Some(128 + 9), "{err}");
    let bomb = "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 5 & done; echo all";
    let begun = Instant::now();
    let (_, out, err) = output(jailer(directory.path(), &policy, &["--", "/bin/sh", "-c", bomb]));
    assert!(err.contains("fork"), "{out} {err}");
    assert_eq!(cgroups(), Vec::<std::path::PathBuf>::new());
    assert!(!std::path::Path::new("/sys/fs/cgroup/picovm-jail").exists());
    // What the program leaves running goes with it.
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn without_root_there_is_a_jail_too() {
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(65534), Some(65534)).unwrap();
    let mut command = jailer(
        directory.path(),
        &with_shell(r#", "cgroup": { "memory": 33554432 }"#),
        &["--", "/bin/sh", "-c", "id -u; ls /; touch /x || exit 4"],
    );
    std::os::unix::process::CommandExt::uid(&mut command, 65534);
    std::os::unix::process::CommandExt::gid(&mut command, 65534);
    let (status, out, err) = output(command);
    assert_eq!(out, "65534\nbin\ndev", "{err}");
    assert_eq!(status, Some(4), "{err}");
    // Root can be without root, too.
    let command = jailer(
        directory.path(),
        &with_shell(""),
        &["--rootless", "--", "/bin/sh", "-c", "id -u; exit 5"],
    );
    let (status, out, err) = output(command);
    assert_eq!((status, out.as_str()), (Some(5), "0"), "{err}");
}

#[test]
fn a_mount_on_the_hosts_root_does_not_show_through() {
    let directory = tempfile::tempdir().unwrap();
    let jail = jailer(
        directory.path(),
        &with_shell(""),
        &["--", "/bin/sh", "-c", "echo $(ls / /..)"],
    );
    let inner: Vec<String> = std::iter::once(jail.get_program())
        .chain(jail.get_args())
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    let script = format!(
        "mount -t tmpfs one / && mount -t tmpfs two / && exec {}",
        quoted(&inner)
    );
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]);
    let (status, out, err) = output(command);
    assert_eq!(
        (status, out.as_str()),
        (Some(0), "/: bin dev /..: bin dev"),
        "{err}"
    );
}

fn quoted(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    words.join(" ")
}

//! From `create` to `rm`.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use crate::{Container, PATIENCE, output, picovm, refused, stderr, stdout, told, until};

#[test]
fn a_container_in_the_background_runs_until_it_is_stopped() {
    let container = Container::sleeping(&["--name", "background"]);
    assert_eq!(container.id().len(), 64);
    assert_eq!(container.status(), "running");
    let begun = Instant::now();
    // A sleep has no handler of SIGTERM and is no process 1.
    assert_eq!(told(&["stop", "background"]), "background");
    assert!(
        begun.elapsed() < Duration::from_secs(9),
        "it was not waited for SIGKILL"
    );
    assert_eq!(
        container.inspect("{{.State.Status}} {{.State.ExitCode}}"),
        "exited 143"
    );
    told(&["start", "background"]);
    assert_eq!(container.status(), "running");
    assert_eq!(told(&["kill", "background"]), "background");
    container.until("{{.State.Status}} {{.State.ExitCode}}", "exited 137");
    assert_eq!(told(&["rm", "background"]), "background");
    assert!(refused(&["inspect", "background"], 1).contains("background"));
}

#[test]
fn one_that_was_created_is_started_later_and_its_output_followed() {
    let id = told(&[
        "create",
        "--name",
        "later",
        "debian",
        "sh",
        "-c",
        "echo here I am; exit 3",
    ]);
    let container = Container(id);
    assert_eq!(container.status(), "created");
    let started = output(&["start", "-a", "later"]);
    assert_eq!(
        (stdout(&started).as_str(), started.status.code()),
        ("here I am", Some(3))
    );
    // Once more, with another result of the same program.
    let again = output(&["start", "-a", "later"]);
    assert_eq!(stdout(&again), "here I am");
    assert_eq!(told(&["logs", "later"]), "here I am\nhere I am");
}

#[test]
fn what_it_has_written_survives_its_end() {
    let script = "cat /root/mark 2>/dev/null || { echo first > /root/mark; mkdir -p /srv/deep/er; ln -s mark /root/link; rm /etc/motd; chown 12:34 /root/mark; chmod 4711 /root/mark; echo made; }";
    let container = Container(told(&["create", "debian", "sh", "-c", script]));
    let start = || told(&["start", "-a", container.id()]);
    assert_eq!(start(), "made");
    assert_eq!(start(), "first");
    let look = Container(told(&[
        "create",
        "debian",
        "sh",
        "-c",
        "test -e /root/mark && stat -c '%u:%g %a' /root/mark && readlink /root/link && ls -d /srv/deep/er && ls /etc/motd || echo setting; \
         touch /root/mark; chown 12:34 /root/mark; chmod 4711 /root/mark; mkdir -p /srv/deep/er; ln -s mark /root/link; rm -f /etc/motd",
    ]));
    assert_eq!(told(&["start", "-a", look.id()]), "setting");
    let second = output(&["start", "-a", look.id()]);
    assert_eq!(stdout(&second), "12:34 4711\nmark\n/srv/deep/er\nsetting");
    assert!(stderr(&second).contains("/etc/motd"), "{}", stderr(&second));
}

#[test]
fn a_stopped_container_is_waited_for_by_who_asked_before() {
    let container = Container::run(
        &[],
        &["sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done"],
    );
    let waiting = picovm(&["wait", container.id()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    told(&["stop", container.id()]);
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(stdout(&output), "9");
    // One that has ended is not waited for.
    assert_eq!(told(&["wait", container.id()]), "9");
}

#[test]
fn one_that_ignores_its_signal_is_killed_when_its_time_is_over() {
    let container = Container::run(&[], &["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]);
    told(&["stop", "-t", "1", container.id()]);
    assert_eq!(container.inspect("{{.State.ExitCode}}"), "137");
}

#[test]
fn its_own_stop_signal_is_used() {
    let script = "trap 'exit 5' USR1; while :; do sleep 0.1; done";
    let container = Container::run(&["--stop-signal", "USR1"], &["sh", "-c", script]);
    told(&["stop", container.id()]);
    assert_eq!(container.inspect("{{.State.ExitCode}}"), "5");
}

#[test]
fn one_that_is_paused_stands_still() {
    let container = Container::run(
        &[],
        &[
            "sh",
            "-c",
            "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done",
        ],
    );
    until(
        || !told(&["logs", container.id()]).is_empty(),
        || "it says nothing".into(),
    );
    told(&["pause", container.id()]);
    assert_eq!(container.status(), "paused");
    assert!(refused(&["pause", container.id()], 1).contains("paused"));
    assert!(refused(&["exec", container.id(), "true"], 1).contains("paused"));
    std::thread::sleep(Duration::from_millis(300));
    let before = told(&["logs", container.id()]);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(told(&["logs", container.id()]), before);
    told(&["unpause", container.id()]);
    assert_eq!(container.status(), "running");
    until(
        || told(&["logs", container.id()]) != before,
        || "it does not go on".into(),
    );
    told(&["pause", container.id()]);
    // One that stands still can be ended all the same.
    told(&["kill", container.id()]);
    container.until("{{.State.Status}}", "exited");
}

#[test]
fn one_with_a_restart_policy_is_started_again_until_it_is_stopped() {
    let container = Container::run(
        &["--restart", "always"],
        &["sh", "-c", "echo run; sleep 0.2; exit 1"],
    );
    until(
        || told(&["logs", container.id()]).lines().count() >= 3,
        || told(&["logs", container.id()]),
    );
    told(&["stop", container.id()]);
    assert_eq!(container.status(), "exited");
    let runs = told(&["logs", container.id()]).lines().count();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(told(&["logs", container.id()]).lines().count(), runs);

    let limited = Container::run(&["--restart", "on-failure:2"], &["sh", "-c", "echo run; exit 1"]);
    limited.until("{{.State.Status}} {{.RestartCount}}", "exited 2");
    assert_eq!(told(&["logs", limited.id()]), "run\nrun\nrun");
    let succeeds = Container::run(&["--restart", "on-failure"], &["true"]);
    succeeds.until("{{.State.Status}} {{.RestartCount}}", "exited 0");
}

#[test]
fn with_rm_nothing_of_it_is_left() {
    let output = output(&["run", "--rm", "--name", "brief", "debian", "echo", "hi"]);
    assert_eq!(stdout(&output), "hi");
    assert!(refused(&["inspect", "brief"], 1).contains("brief"));
    let id = told(&["run", "-d", "--rm", "debian", "sleep", "1000"]);
    told(&["stop", &id]);
    let all = told(&["ps", "-aq", "--no-trunc"]);
    assert!(!all.contains(&id), "{all}");
}

#[test]
fn a_running_container_is_removed_only_by_force() {
    let container = Container::sleeping(&[]);
    assert!(refused(&["rm", container.id()], 1).contains("--force"));
    assert_eq!(container.status(), "running");
    told(&["rm", "-f", container.id()]);
    assert!(!told(&["ps", "-aq", "--no-trunc"]).contains(container.id()));
}

#[test]
fn names_are_unique_and_can_be_changed() {
    let first = Container::sleeping(&["--name", "one"]);
    let error = refused(&["run", "-d", "--name", "one", "debian", "true"], 125);
    assert!(error.contains(first.id()), "{error}");
    told(&["rename", "one", "two"]);
    assert_eq!(first.inspect("{{.Name}}"), "/two");
    // The name is free, and its container runs on.
    let second = Container::sleeping(&["--name", "one"]);
    assert_ne!(second.id(), first.id());
    assert!(refused(&["rename", "two", "one"], 1).contains("one"));
}

#[test]
fn many_commands_on_one_container_at_once_are_safe() {
    let container = Container(told(&["create", "debian", "sleep", "1000"]));
    for _ in 0..3 {
        let all: Vec<_> = (0..6)
            .map(|number| {
                let verb = if number % 3 == 2 { "stop" } else { "start" };
                picovm(&[verb, container.id()])
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for child in all {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
        }
    }
    told(&["start", container.id()]);
    assert_eq!(container.status(), "running");
    assert_eq!(container.shell("echo alive"), "alive");
}

/// The lines that a process writes, as they come.
fn lines(child: &mut std::process::Child) -> Receiver<String> {
    let (tell, told) = std::sync::mpsc::channel();
    let output = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || {
        for line in output.lines() {
            let Ok(()) = tell.send(line.unwrap()) else { return };
        }
    });
    told
}

#[test]
fn who_attaches_sees_what_comes_and_may_say_something() {
    let script = "while read line; do echo \"got $line\"; done; echo over";
    let container = Container::run(&["-i"], &["sh", "-c", script]);
    let attach = || {
        picovm(&["attach", container.id()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let (mut first, mut second) = (attach(), attach());
    let (from_first, from_second) = (lines(&mut first), lines(&mut second));
    // Who is not connected yet misses what is said: it is said until the second one has heard of it.
    let give_up = Instant::now() + PATIENCE;
    let heard = loop {
        first.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
        match from_second.recv_timeout(Duration::from_millis(500)) {
            Ok(line) => break line,
            Err(_) => assert!(Instant::now() < give_up, "the second one hears nothing"),
        }
    };
    assert_eq!(heard, "got one");
    assert_eq!(from_first.recv_timeout(PATIENCE).unwrap(), "got one");
    // One that goes away takes nothing with it.
    first.kill().unwrap();
    first.wait().unwrap();
    second.stdin.as_mut().unwrap().write_all(b"two\n").unwrap();
    let mut rest = std::iter::from_fn(|| from_second.recv_timeout(PATIENCE).ok());
    assert_eq!(rest.find(|line| line != "got one").unwrap(), "got two");
    told(&["kill", container.id()]);
    assert_eq!(second.wait().unwrap().code(), Some(137));
}

#[test]
fn what_was_not_started_says_why_with_the_status_that_docker_has() {
    for (program, status) in [("no-such-command", 127), ("/etc/passwd", 126)] {
        let error = refused(&["run", "-d", "--name", "never", "debian", program], status);
        assert!(error.contains(program), "{error}");
        let container = Container("never".into());
        assert_eq!(
            container.inspect("{{.State.Status}} {{.State.ExitCode}}"),
            format!("exited {status}")
        );
        assert!(container.inspect("{{.State.Error}}").contains(program));
    }
}

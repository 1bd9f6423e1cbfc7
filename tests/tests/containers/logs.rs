//! What containers have said.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use crate::{Container, output, picovm, stderr, stdout, told, until};

#[test]
fn both_streams_are_kept_apart_and_in_order() {
    let container = Container::run(&[], &["sh", "-c", "echo one; echo two >&2; printf three"]);
    container.until("{{.State.Status}}", "exited");
    let logs = output(&["logs", container.id()]);
    assert_eq!(
        (stdout(&logs).as_str(), stderr(&logs).as_str()),
        ("one\nthree", "two")
    );
    // Those of a container in the foreground too.
    told(&["run", "--name", "foreground", "debian", "echo", "seen"]);
    let foreground = Container("foreground".into());
    assert_eq!(told(&["logs", foreground.id()]), "seen");
}

#[test]
fn times_the_last_lines_and_those_since() {
    let script = "echo a; sleep 1; echo b; echo c";
    let container = Container::run(&[], &["sh", "-c", script]);
    container.until("{{.State.Status}}", "exited");
    let timed = told(&["logs", "-t", container.id()]);
    let times: Vec<&str> = timed
        .lines()
        .map(|line| line.split_once(' ').unwrap().0)
        .collect();
    assert_eq!(times.len(), 3);
    assert!(
        times[0] < times[1] && times[0].ends_with('Z') && times[0].contains('T'),
        "{times:?}"
    );
    assert_eq!(told(&["logs", "--tail", "2", container.id()]), "b\nc");
    assert_eq!(told(&["logs", "-n", "0", container.id()]), "");
    assert_eq!(told(&["logs", "--since", times[1], container.id()]), "b\nc");
    assert_eq!(told(&["logs", "--until", times[0], container.id()]), "a");
}

#[test]
fn who_follows_sees_all_of_it_until_the_end() {
    let script = "for i in $(seq 20); do echo line $i; sleep 0.05; done";
    let container = Container::run(&[], &["sh", "-c", script]);
    let followed = told(&["logs", "-f", container.id()]);
    let expected: Vec<String> = (1..=20).map(|number| format!("line {number}")).collect();
    assert_eq!(followed, expected.join("\n"));
}

#[test]
fn a_flood_of_lines_is_whole_and_fills_no_memory() {
    let lines = 300_000;
    let mut child = picovm(&["run", "--name", "flood", "debian", "seq", &lines.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let container = Container("flood".into());
    let mut most = 0;
    let out = BufReader::new(child.stdout.take().unwrap());
    let monitor = |id: u32| picovm_tests::children(id).first().copied();
    for (number, line) in out.lines().enumerate() {
        assert_eq!(line.unwrap(), (number + 1).to_string());
        if number % 50_000 == 0
            && let Some(monitor) = monitor(child.id())
        {
            let status = std::fs::read_to_string(format!("/proc/{monitor}/status")).unwrap_or_default();
            let kib = status
                .lines()
                .find_map(|line| line.strip_prefix("RssAnon:"))
                .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
            most = most.max(kib.unwrap_or(0));
        }
    }
    assert!(child.wait().unwrap().success());
    assert!((1..16 << 10).contains(&most), "{most} KiB");
    let mut logs = picovm(&["logs", container.id()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let kept = BufReader::new(logs.stdout.take().unwrap());
    let mut count = 0;
    for (number, line) in kept.lines().enumerate() {
        assert_eq!(line.unwrap(), (number + 1).to_string());
        count += 1;
    }
    assert_eq!(count, lines);
    assert!(logs.wait().unwrap().success());
}

#[test]
fn rotation_keeps_what_it_was_told_to_keep() {
    let container = Container::run(
        &["--log-opt", "max-size=10k", "--log-opt", "max-file=2"],
        &["seq", "2000"],
    );
    container.until("{{.State.Status}}", "exited");
    let kept = told(&["logs", container.id()]);
    let numbers: Vec<u32> = kept.lines().map(|line| line.parse().unwrap()).collect();
    let first = numbers[0];
    assert!(
        first > 1 && numbers.len() > 50,
        "{} lines from {first} on",
        numbers.len()
    );
    assert_eq!(numbers, (first..=2000).collect::<Vec<u32>>());
}

#[test]
fn a_slow_reader_holds_up_the_container_and_nothing_is_lost() {
    let mut child = picovm(&["run", "--rm", "debian", "seq", "100000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_secs(2));
    let mut all = String::new();
    child.stdout.take().unwrap().read_to_string(&mut all).unwrap();
    assert_eq!(all.lines().count(), 100_000);
    assert!(child.wait().unwrap().success());
}

#[test]
fn events_tell_what_has_happened() {
    let before = told(&[
        "events",
        "--since",
        "1s",
        "--until",
        "0s",
        "--format",
        "{{.Action}}",
    ]);
    let _ = before;
    let container = Container::run(
        &["--name", "eventful", "--label", "team=blue"],
        &["sh", "-c", "exit 4"],
    );
    container.until("{{.State.Status}}", "exited");
    told(&["rm", container.id()]);
    let filter = format!("container={}", container.id());
    let read = || {
        told(&[
            "events",
            "--since",
            "10m",
            "--until",
            "0s",
            "--filter",
            &filter,
            "--format",
            "{{.Action}}",
        ])
    };
    until(|| read().contains("destroy"), read);
    let actions = read();
    let actions: Vec<&str> = actions.lines().collect();
    assert_eq!(actions, ["create", "start", "die", "destroy"]);
}

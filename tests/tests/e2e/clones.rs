//! Many clones of one template, and what they leave: nothing.

use std::time::{Duration, Instant};

use picovm_engine::{Container, ContainerExit};
use picovm_tests::{Holdings, capture, script};

use crate::{picovm, stderr, stdout, template};

/// Waits until what clones held is gone: threads end and descriptors close a moment after they are told to.
fn settles_to(before: &Holdings) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while Holdings::now() != *before {
        assert!(
            Instant::now() < give_up,
            "held before: {before:?}, now: {:?}",
            Holdings::now()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn warm() -> Holdings {
    capture(template(), &script("true")).unwrap();
    // Nothing else of this process may come and go: the tests run one after the other.
    std::thread::sleep(Duration::from_millis(200));
    Holdings::now()
}

#[test]
fn two_hundred_in_sequence_are_right_and_leave_nothing() {
    let before = warm();
    for number in 0..200u32 {
        let done = capture(
            template(),
            &script(&format!("echo clone {number}; exit {}", number % 256)),
        )
        .unwrap();
        assert_eq!(done.text(), format!("clone {number}"));
        assert_eq!(done.exit, ContainerExit::Code((number % 256) as u8));
    }
    settles_to(&before);
}

#[test]
fn fifty_at_once_are_right_and_leave_nothing() {
    let before = warm();
    let results: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..50u32)
            .map(|number| {
                scope.spawn(move || {
                    let text =
                        format!("echo clone {number}; echo $$ > /tmp/mine; cat /tmp/mine >&2; exit {number}");
                    (number, capture(template(), &script(&text)))
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (number, done) in results {
        let done = done.unwrap();
        assert_eq!(done.text(), format!("clone {number}"));
        assert_eq!(done.exit, ContainerExit::Code(number as u8));
        assert!(!done.stderr.is_empty());
    }
    settles_to(&before);
}

#[test]
fn fifty_processes_at_once_are_right_and_leave_nothing() {
    template();
    let running: Vec<_> = (0..50u32)
        .map(|number| {
            let text = format!("echo {number}; exit {number}");
            let child = picovm(&["run", "--rm", "debian", "sh", "-c", &text])
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            (number, child)
        })
        .collect();
    for (number, child) in running {
        let id = child.id();
        let output = child.wait_with_output().unwrap();
        assert_eq!(stdout(&output), number.to_string(), "{}", stderr(&output));
        assert_eq!(output.status.code(), Some(number as i32));
        assert!(!std::path::Path::new(&format!("/proc/{id}")).exists());
    }
    let templates = crate::store().path().join("templates");
    for entry in std::fs::read_dir(templates).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.starts_with('.'), "{name} was left");
    }
}

#[test]
fn clones_that_are_dropped_while_they_run_leave_nothing() {
    let before = warm();
    for _ in 0..10 {
        let clone = Container::start(template(), &script("echo up; while :; do :; done")).unwrap();
        clone.wait_for_output(Duration::from_secs(60)).unwrap();
        drop(clone);
    }
    settles_to(&before);
}

#[test]
fn a_clone_owns_little_of_its_memory() {
    let clones: Vec<Container> = (0..5)
        .map(|_| Container::start(template(), &script("echo up; exec sleep 1000")).unwrap())
        .collect();
    for clone in &clones {
        clone.wait_for_output(Duration::from_secs(60)).unwrap();
    }
    let (owned, shared) = picovm_tests::clone_memory();
    assert!(owned / 5 < 3 << 20, "{} KiB owned by a clone", (owned / 5) >> 10);
    assert!(
        shared > owned,
        "{} KiB shared, {} KiB owned",
        shared >> 10,
        owned >> 10
    );
}

#[test]
fn a_container_outlives_its_command_and_a_killed_monitor_leaves_no_process() {
    use std::io::Read;
    template();
    let mut child = picovm(&[
        "run",
        "--rm",
        "--name",
        "outlives",
        "debian",
        "sh",
        "-c",
        "echo up; exec sleep 1000",
    ])
    .stdout(std::process::Stdio::piped())
    .spawn()
    .unwrap();
    let mut said = [0u8; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    // One process of its own for a clone, without helpers.
    let (monitor, vmm) = picovm_tests::monitor_and_vmm(child.id()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let status = || {
        let output = picovm(&[
            "inspect",
            "--format",
            "{{.State.Status}} {{.State.ExitCode}}",
            "outlives",
        ])
        .output()
        .unwrap();
        stdout(&output)
    };
    assert_eq!(status(), "running 0");
    picovm_tests::kill(monitor);
    let gone = || {
        [monitor, vmm]
            .iter()
            .all(|id| !std::path::Path::new(&format!("/proc/{id}")).exists())
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !gone() && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(gone(), "the monitor {monitor} or the VMM process {vmm} is left");
    assert_eq!(status(), "exited 137");
    let removed = picovm(&["rm", "outlives"]).output().unwrap();
    assert!(removed.status.success(), "{}", stderr(&removed));
}

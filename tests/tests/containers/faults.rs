//! Processes that are killed and records that are damaged.

use std::time::Duration;

use crate::{Container, output, picovm, stderr, store, told, until};

fn pid(container: &Container) -> i32 {
    container.inspect("{{.State.Pid}}").parse().unwrap()
}

fn kill(pid: i32) {
    use rustix::process::{Pid, Signal, kill_process};
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

#[test]
fn a_container_whose_monitor_is_killed_has_ended_and_can_be_started_again() {
    let container = Container::run(&[], &["sh", "-c", "echo up; exec sleep 1000"]);
    let monitor = pid(&container);
    let vmm = picovm_tests::children(monitor.unsigned_abs());
    assert_eq!(vmm.len(), 1);
    kill(monitor);
    container.until("{{.State.Status}} {{.State.ExitCode}}", "exited 137");
    assert!(!container.inspect("{{.State.Error}}").is_empty());
    until(
        || !std::path::Path::new(&format!("/proc/{}", vmm[0])).exists(),
        || "its VMM process is left".into(),
    );
    assert!(told(&["ps", "-a"]).contains("Exited (137)"));
    told(&["start", container.id()]);
    assert_eq!(container.status(), "running");
}

#[test]
fn a_container_whose_vmm_process_is_killed_says_so() {
    let container = Container::run(&[], &["sh", "-c", "echo up; exec sleep 1000"]);
    let vmm = picovm_tests::children(pid(&container).unsigned_abs());
    kill(vmm[0].cast_signed());
    container.until("{{.State.Status}}", "exited");
    assert!(
        container.inspect("{{.State.Error}}").contains("signal 9"),
        "{}",
        container.inspect("{{.State.Error}}")
    );
}

#[test]
fn one_that_has_started_and_was_killed_at_any_moment_leaves_a_store_that_works() {
    for wait in [0, 5, 20, 60, 150, 400] {
        let mut child = picovm(&["run", "-d", "--name", "interrupted", "debian", "sleep", "1000"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        let _ = child.kill();
        child.wait().unwrap();
        // It was made or not, it runs or not: it is listed, or its name is free.
        let listed = output(&["ps", "-a"]);
        assert!(listed.status.success(), "{}", stderr(&listed));
        let removed = output(&["rm", "-f", "interrupted"]);
        let is_gone = removed.status.success() || stderr(&removed).contains("no container");
        assert!(is_gone, "{}", stderr(&removed));
    }
}

#[test]
fn a_record_that_is_damaged_is_named() {
    let container = Container(told(&["create", "--name", "damaged", "debian", "true"]));
    let config = store()
        .path()
        .join("containers")
        .join(container.id())
        .join("config.json");
    let whole = std::fs::read(&config).unwrap();
    std::fs::write(&config, &whole[..whole.len() / 2]).unwrap();
    let failed = output(&["inspect", "damaged"]);
    assert!(!failed.status.success());
    assert!(stderr(&failed).contains("config.json"), "{}", stderr(&failed));
    std::fs::write(&config, whole).unwrap();
}

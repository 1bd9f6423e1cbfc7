//! Standing pools: containers that start in a clone that was parked before.

use std::path::Path;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};

use picovm_tests::{children, kill};
use serde_json::Value;

use super::{Container, picovm, refused, stdout, store, told, until};

/// Of machines of a size that no other test has, so that no other test's container comes from them.
const SIZE: [&str; 2] = ["-m", "300m"];

/// One test at a time has pools in the store of all.
static ONE: Mutex<()> = Mutex::new(());

pub fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pool, ended with the test.
struct Pool(#[expect(dead_code, reason = "held")] MutexGuard<'static, ()>);

impl Pool {
    fn of(clones: &str) -> Self {
        let alone = alone();
        store();
        let id = fill(clones);
        assert_eq!(told(&["pool", "ls", "-q"]), id);
        Self(alone)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = super::output(&["pool", "stop", "--all"]);
    }
}

/// `picovm pool start` for so many clones.
fn fill(clones: &str) -> String {
    told(&[&["pool", "start", "--size", clones][..], &SIZE, &["debian"]].concat())
}

/// `picovm run --rm` of a command.
fn run(command: &[&str]) -> String {
    told(&[&["run", "--rm"][..], &SIZE, &["debian"], command].concat())
}

/// What the pool says of itself.
fn seen() -> Value {
    let list: Value = serde_json::from_str(&told(&["pool", "ls", "--json"])).unwrap();
    list.get(0).cloned().unwrap_or(Value::Null)
}

/// Waits until it has so many parked clones.
fn until_parked(clones: i64) {
    until(|| seen()["parked"] == clones, || format!("it is {}", seen()));
}

fn process() -> u32 {
    u32::try_from(seen()["pid"].as_u64().unwrap()).unwrap()
}

#[test]
fn run_takes_its_clones_and_it_fills_up_again() {
    let _pool = Pool::of("2");
    assert_eq!(seen()["parked"], 2);
    let mut told = Vec::new();
    for taken in 1..=5 {
        told.push(run(&["sh", "-c", "hostname; cat /proc/sys/kernel/random/uuid"]));
        assert_eq!(seen()["taken"], taken);
        until_parked(2);
    }
    told.sort();
    told.dedup();
    assert_eq!(told.len(), 5, "{told:?}");
}

#[test]
fn more_at_once_than_it_has_start_all_the_same() {
    let _pool = Pool::of("1");
    let start = |number: &str| {
        let line = [&["run", "--rm"][..], &SIZE, &["debian", "echo", number]].concat();
        picovm(&line).stdout(Stdio::piped()).spawn().unwrap()
    };
    let running = ["0", "1", "2", "3"].map(|number| (number, start(number)));
    for (number, child) in running {
        assert_eq!(stdout(&child.wait_with_output().unwrap()), number);
    }
}

#[test]
fn a_container_of_it_is_one_like_any_other_and_outlives_it() {
    let pool = Pool::of("1");
    let script = "echo > /kept; hostname; exec sleep 1000";
    let container = Container::run(
        &[&SIZE[..], &["--hostname", "box"]].concat(),
        &["sh", "-c", script],
    );
    assert_eq!(seen()["taken"], 1);
    drop(pool);
    let _others_keep_out = alone();
    let logs = || told(&["logs", container.id()]);
    until(|| logs() == "box", logs);
    assert_eq!(container.shell("echo still"), "still");
    told(&["stop", "-t", "1", container.id()]);
    // Its writable layer comes back, now in a clone that is started cold.
    told(&["start", container.id()]);
    assert_eq!(container.shell("ls /kept"), "/kept");
    assert_eq!(container.status(), "running");
}

#[test]
fn a_writable_layer_goes_into_a_clone_of_it_too() {
    let _pool = Pool::of("1");
    let container = Container::run(&SIZE, &["sh", "-c", "echo more >> /kept; wc -l < /kept"]);
    assert_eq!(told(&["wait", container.id()]), "0");
    until_parked(1);
    assert_eq!(told(&["start", "-a", container.id()]), "2");
    assert_eq!(seen()["taken"], 2);
}

#[test]
fn directories_and_volumes_are_shared_with_a_clone_of_it_too() {
    let _pool = Pool::of("1");
    let here = tempfile::tempdir().unwrap();
    std::fs::write(here.path().join("from-here"), "shared\n").unwrap();
    let mount = format!("{}:/mnt", here.path().display());
    let volumes = ["-v", mount.as_str(), "-v", "/var/lib/dpkg"];
    let options = [&SIZE[..], &volumes].concat();
    let script = "cat /mnt/from-here; echo back > /mnt/from-there; ls /var/lib/dpkg/status; exec sleep 1000";
    let container = Container::run(&options, &["sh", "-c", script]);
    assert_eq!(seen()["taken"], 1);
    let logs = || told(&["logs", container.id()]);
    until(|| logs() == "shared\n/var/lib/dpkg/status", logs);
    assert_eq!(
        std::fs::read_to_string(here.path().join("from-there")).unwrap(),
        "back\n"
    );
    // What has no share server is told so, and waits for none.
    until_parked(1);
    let plain = Container::run(&SIZE, &["sleep", "1000"]);
    assert_eq!(seen()["taken"], 2);
    let script = "mount -t virtiofs picovm /mnt 2>&1 && ls /mnt; echo $?";
    let mounted = plain.shell(script);
    assert!(mounted.lines().last() != Some("0"), "{mounted}");
}

#[test]
fn what_only_a_cold_start_can_give_is_given_by_one() {
    let _pool = Pool::of("1");
    for option in ["--isolate-memory", "--no-jail"] {
        let line = [&["run", "--rm", option][..], &SIZE, &["debian", "echo", "cold"]].concat();
        assert_eq!(told(&line), "cold");
    }
    assert_eq!(seen()["taken"], 0);
}

#[test]
fn one_that_is_killed_leaves_nothing_and_nobody_misses_it() {
    let _pool = Pool::of("2");
    let server = process();
    let mut processes = children(server);
    assert_eq!(processes.len(), 1, "a fork server");
    processes.extend(children(processes[0]));
    assert!(processes.len() >= 3, "and two VMM processes: {processes:?}");
    kill(server);
    let live = || {
        let mut live = processes.clone();
        live.retain(|process| Path::new(&format!("/proc/{process}")).exists());
        live
    };
    until(
        || live().is_empty(),
        || format!("of {processes:?} live {:?}", live()),
    );
    assert_eq!(told(&["pool", "ls", "-q"]), "");
    assert_eq!(run(&["echo", "cold"]), "cold");
    fill("1");
    assert_eq!(seen()["parked"], 1);
}

#[test]
fn it_goes_on_when_its_fork_server_is_killed() {
    let _pool = Pool::of("1");
    let server = process();
    kill(children(server)[0]);
    assert_eq!(run(&["echo", "cold"]), "cold");
    until_parked(1);
    run(&["true"]);
    assert_eq!((process(), seen()["taken"].as_u64()), (server, Some(1)));
}

#[test]
fn its_size_can_change_and_wrong_names_are_told() {
    let _pool = Pool::of("1");
    fill("3");
    until_parked(3);
    fill("1");
    assert_eq!(seen()["parked"], 1);
    assert!(refused(&["pool", "stop", "nobody"], 1).contains("there is no pool nobody"));
    assert!(refused(&["pool", "start", "nobody"], 1).contains("no image named nobody"));
    assert!(refused(&["pool", "start", "--size", "0", "debian"], 2).contains("--size"));
}

#[test]
fn it_ends_with_its_template() {
    let _pool = Pool::of("1");
    let id = told(&["pool", "ls", "-q"]);
    let processes = children(process());
    told(&["template", "rm", &id]);
    assert_eq!(told(&["pool", "ls", "-q"]), "");
    until(
        || !Path::new(&format!("/proc/{}", processes[0])).exists(),
        || "its fork server lives".into(),
    );
}

//! Pools that nobody has asked for: what a cold start leaves behind for the starts that follow.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use picovm_tests::{OwnStore, children};
use serde_json::Value;

use super::{stderr, stdout, until};

/// A store whose pools are nobody else's. All of them end with it.
struct Place(OwnStore);

impl Place {
    fn new() -> Self {
        let place = Self(OwnStore::new().expect("a store with the image"));
        place.told("0", &["template", "build", "debian"]);
        place
    }

    /// `picovm ARGUMENTS...`, with pools that stay for so long.
    fn picovm(&self, idle: &str, arguments: &[&str]) -> Command {
        let mut command = self.0.picovm();
        command
            .env("PICOVM_POOL_IDLE", idle)
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn output(&self, idle: &str, arguments: &[&str]) -> Output {
        self.picovm(idle, arguments).output().expect("picovm starts")
    }

    fn told(&self, idle: &str, arguments: &[&str]) -> String {
        let output = self.output(idle, arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        stdout(&output)
    }

    /// `picovm run --rm OPTIONS debian COMMAND`.
    fn run(&self, idle: &str, options: &[&str], command: &[&str]) -> String {
        self.told(
            idle,
            &[&["run", "--rm"][..], options, &["debian"], command].concat(),
        )
    }

    /// What the pools say of themselves.
    fn pools(&self) -> Vec<Value> {
        serde_json::from_str(&self.told("0", &["pool", "ls", "--json"])).unwrap()
    }

    /// What the only pool says of itself.
    fn seen(&self) -> Value {
        let mut list = self.pools();
        assert!(list.len() < 2, "{list:?}");
        list.pop().unwrap_or(Value::Null)
    }

    /// The processes that work for its pools, but for those that keep them.
    fn processes(&self) -> Vec<u32> {
        let store = self.0.path().to_str().unwrap();
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let ids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        ids.filter(|id: &u32| {
            let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            line.contains("picovm-vmm") && line.contains(store)
        })
        .collect()
    }

    /// Nothing is left of its pools.
    fn until_none(&self) {
        until(
            || self.directories().is_empty() && self.processes().is_empty(),
            || format!("left are {:?} and {:?}", self.directories(), self.processes()),
        );
    }

    fn until_parked(&self) {
        until(|| self.seen()["parked"] == 1, || format!("it is {}", self.seen()));
    }

    fn process(&self) -> u32 {
        u32::try_from(self.seen()["pid"].as_u64().unwrap()).unwrap()
    }

    /// What lies where the pools are.
    fn directories(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.0.path().join("pools"));
        entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.output("0", &["pool", "stop", "--all"]);
    }
}

fn lives(process: u32) -> bool {
    Path::new(&format!("/proc/{process}")).exists()
}

/// A pool's process, its fork server, and the VMM processes of that.
fn family(process: u32) -> Vec<u32> {
    let servers = children(process);
    let clones = servers.iter().flat_map(|server| children(*server));
    std::iter::once(process)
        .chain(servers.clone())
        .chain(clones)
        .collect()
}

fn until_gone(processes: &[u32]) {
    let left = || {
        processes
            .iter()
            .filter(|process| lives(**process))
            .collect::<Vec<_>>()
    };
    until(
        || left().is_empty(),
        || format!("of {processes:?} live {:?}", left()),
    );
}

#[test]
fn the_start_that_follows_a_cold_one_takes_a_clone_that_is_parked() {
    let place = Place::new();
    assert_eq!(place.run("10m", &[], &["echo", "cold"]), "cold");
    place.until_parked();
    assert_eq!(place.seen()["idle_seconds"], 600);
    for taken in 1..=3 {
        assert_eq!(place.run("10m", &[], &["echo", "parked"]), "parked");
        assert_eq!(place.seen()["taken"], taken);
        place.until_parked();
    }
    // Whoever does not want it to stay for him takes a clone of it all the same.
    place.run("0", &[], &["true"]);
    assert_eq!(place.seen()["taken"], 4);
    let list = place.told("0", &["pool", "ls"]);
    assert!(list.contains("unused for 600 s"), "{list}");
}

#[test]
fn a_container_that_goes_on_has_one_begun_meanwhile_and_is_its_parent_no_longer() {
    let place = Place::new();
    let id = place.told("10m", &["run", "-d", "debian", "sleep", "1000"]);
    place.until_parked();
    let format = ["inspect", "--format", "{{.State.Pid}}", &id];
    let monitor: u32 = place.told("0", &format).parse().unwrap();
    assert!(!children(monitor).contains(&place.process()));
    let directory = std::fs::read_link(format!("/proc/{monitor}/cwd")).unwrap();
    assert_eq!(
        directory,
        Path::new("/"),
        "what it was started in can be unmounted"
    );
    // Nor has the pool anything of the container: it can be removed, and the pool stays.
    place.told("0", &["rm", "-f", &id]);
    place.run("0", &[], &["true"]);
    assert_eq!(place.seen()["taken"], 1);
}

#[test]
fn it_ends_when_no_container_has_needed_it_and_containers_go_on() {
    let place = Place::new();
    place.run("12s", &[], &["true"]);
    place.until_parked();
    let processes = || family(place.process());
    until(
        || processes().len() == 4,
        || {
            format!(
                "its own, a fork server, one parked, and one ahead: {:?}",
                processes()
            )
        },
    );
    let processes = processes();
    let id = place.told("12s", &["run", "-d", "debian", "sleep", "1000"]);
    assert_eq!(place.seen()["taken"], 1);
    until(|| place.seen().is_null(), || format!("it is {}", place.seen()));
    until(
        || place.directories().is_empty(),
        || format!("{:?} is left", place.directories()),
    );
    assert_eq!(place.told("0", &["exec", &id, "echo", "still"]), "still");
    place.told("0", &["rm", "-f", &id]);
    // The fork server goes with the last container of its own.
    until_gone(&processes);
}

#[test]
fn many_that_start_cold_at_once_leave_one() {
    let place = Place::new();
    let line = ["run", "--rm", "debian", "echo", "one of many"];
    let running: Vec<_> = (0..5)
        .map(|_| place.picovm("10m", &line).stdout(Stdio::piped()).spawn().unwrap())
        .collect();
    for child in running {
        assert_eq!(stdout(&child.wait_with_output().unwrap()), "one of many");
    }
    place.until_parked();
    // Those that came too late have ended.
    let family = || family(place.process());
    let strangers = || {
        let mut others = place.processes();
        others.retain(|process| !family().contains(process));
        others
    };
    until(
        || family().len() == 4 && strangers().is_empty(),
        || format!("beside {:?} there are {:?}", family(), strangers()),
    );
    assert_eq!(place.directories().len(), 1);
}

#[test]
fn none_is_begun_where_it_would_be_of_no_use() {
    let place = Place::new();
    place.run("0", &[], &["true"]);
    place.run("10m", &["--isolate-memory"], &["true"]);
    place.run("10m", &["--storage", "size=64m"], &["true"]);
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert!(place.directories().is_empty(), "{:?}", place.directories());
    let started = place.output("10m", &["run", "debian", "/no/such/program"]);
    assert_eq!(started.status.code(), Some(127));
    // That one was a cold start as any other.
    place.until_parked();
    assert_eq!(place.seen()["taken"], 0);
    let refused = place.output("soon", &["run", "--rm", "debian", "true"]);
    assert_eq!(refused.status.code(), Some(125));
    assert!(
        stderr(&refused).contains("PICOVM_POOL_IDLE"),
        "{}",
        stderr(&refused)
    );
}

#[test]
fn one_that_was_asked_for_comes_first_and_is_another() {
    let place = Place::new();
    place.run("10m", &[], &["true"]);
    place.until_parked();
    let unasked = place.seen()["id"].as_str().unwrap().to_owned();
    let asked = place.told("0", &["pool", "start", "--size", "1", "debian"]);
    assert!(unasked.starts_with(&format!("{asked}-")), "{unasked} and {asked}");
    let taken = |id: &str| {
        let pools = place.pools();
        let pool = pools.iter().find(|pool| pool["id"] == id);
        pool.map(|pool| pool["taken"].as_u64().unwrap())
    };
    place.run("10m", &[], &["true"]);
    assert_eq!((taken(&asked), taken(&unasked)), (Some(1), Some(0)));
    // While it is there and empty, the other helps out.
    place.told("0", &["pool", "stop", &asked]);
    place.run("10m", &[], &["true"]);
    assert_eq!((taken(&asked), taken(&unasked)), (None, Some(1)));
}

#[test]
fn it_serves_only_who_could_have_begun_it() {
    let place = Place::new();
    place.run("10m", &[], &["true"]);
    place.until_parked();
    let mut otherwise = Command::new("nice");
    otherwise
        .args(["-n", "5"])
        .arg(picovm_tests::binary())
        .args(["run", "--rm", "debian", "nice"])
        .env("PICOVM_HOME", place.0.path())
        .env("PICOVM_POOL_IDLE", "10m");
    let ended = otherwise.output().unwrap();
    assert_eq!(stdout(&ended), "0", "{}", stderr(&ended));
    assert_eq!(place.pools()[0]["taken"], 0);
    until(
        || place.directories().len() == 2,
        || format!("{:?}", place.directories()),
    );
    let taken = || {
        place
            .pools()
            .iter()
            .map(|pool| pool["taken"].as_u64().unwrap())
            .sum::<u64>()
    };
    until(
        || place.pools().iter().all(|pool| pool["parked"] == 1),
        || format!("{:?}", place.pools()),
    );
    place.run("10m", &[], &["true"]);
    assert_eq!(taken(), 1);
}

#[test]
fn one_that_is_just_begun_can_be_stopped_and_does_not_bring_a_store_back() {
    let place = Place::new();
    place.run("10m", &[], &["true"]);
    place.told("0", &["rmi", "debian"]);
    place.until_none();

    let place = Place::new();
    place.run("10m", &[], &["true"]);
    place.told("0", &["pool", "start", "--size", "1", "debian"]);
    place.told("0", &["pool", "stop", "--all"]);
    place.until_none();

    let place = Place::new();
    place.run("10m", &[], &["true"]);
    // What is made in it meanwhile may be in the way.
    until(
        || std::fs::remove_dir_all(place.0.path()).is_ok() || !place.0.path().exists(),
        || "the store cannot be removed".into(),
    );
    std::thread::sleep(std::time::Duration::from_secs(3));
    place.until_none();
    assert!(!place.0.path().exists());
}

#[test]
fn it_ends_with_its_image_and_with_its_store() {
    let place = Place::new();
    place.run("10m", &[], &["true"]);
    place.until_parked();
    let processes = family(place.process());
    place.told("0", &["rmi", "debian"]);
    until_gone(&processes);

    let place = Place::new();
    place.run("10m", &[], &["true"]);
    place.until_parked();
    let processes = family(place.process());
    drop(place);
    until_gone(&processes);
}

#[test]
fn one_more_than_eight_is_not_begun() {
    let place = Place::new();
    let pools = place.0.path().join("pools");
    let mut listening = Vec::new();
    for number in 0..8 {
        let directory = pools.join(format!("{number:016x}"));
        std::fs::create_dir_all(&directory).unwrap();
        listening.push(UnixListener::bind(directory.join("pool.sock")).unwrap());
    }
    place.run("10m", &[], &["true"]);
    // Where it would be, by now.
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert_eq!(place.directories().len(), 8);
    // One that was killed does not count.
    listening.pop();
    place.run("10m", &[], &["true"]);
    let full = || {
        place
            .directories()
            .iter()
            .all(|pool| pool.join("pool.sock").exists())
    };
    until(
        || place.directories().len() == 9 && full(),
        || format!("{:?}", place.directories()),
    );
}

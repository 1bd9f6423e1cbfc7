//! Pools of parked clones, each in a VMM process of its own.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use picovm_engine::{
    Confinement, ContainerExit, ContainerOptions, EngineError, Parking, Pool, RunningContainer,
    waits_for_order,
};

use crate::template;

/// Tests that count processes run one at a time.
static ONE: Mutex<()> = Mutex::new(());

pub fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

const PARKING: Duration = Duration::from_secs(60);

/// A container of the pool and the reading ends of its output.
struct Started {
    container: RunningContainer,
    stdout: std::io::PipeReader,
    stderr: std::io::PipeReader,
}

fn start_with(pool: &mut Pool, options: &ContainerOptions, stdin: &impl AsFd) -> Started {
    let (stdout, theirs) = std::io::pipe().unwrap();
    let (stderr, errors) = std::io::pipe().unwrap();
    let container = pool
        .start(options, [stdin.as_fd(), theirs.as_fd(), errors.as_fd()])
        .unwrap();
    Started {
        container,
        stdout,
        stderr,
    }
}

fn start(pool: &mut Pool, script: &str) -> Started {
    let null = std::fs::File::open("/dev/null").unwrap();
    start_with(pool, &ContainerOptions::command(["sh", "-c", script]), &null)
}

impl Started {
    fn end(mut self) -> (String, String, ContainerExit) {
        let exit = self.container.wait().unwrap();
        let (mut output, mut errors) = (String::new(), String::new());
        self.stdout.read_to_string(&mut output).unwrap();
        self.stderr.read_to_string(&mut errors).unwrap();
        (output, errors, exit)
    }
}

/// Fork servers and VMM processes that there are: id and parent's id.
pub fn vmm_processes() -> Vec<(i32, i32)> {
    // Not those of a picovm that is installed here and has its pools; but those of copies that tests make.
    let copies = std::env::temp_dir();
    let own = picovm_tests::binary()
        .with_file_name("picovm-vmm")
        .canonicalize()
        .unwrap();
    let describe = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_string_lossy().parse().ok()?;
        let program = std::fs::read_link(entry.path().join("exe")).ok()?;
        let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        let is_ours = program == own || program.starts_with(&copies) && program.ends_with("picovm-vmm");
        is_ours.then_some((pid, parent.trim().parse().ok()?))
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(describe)
        .collect()
}

/// The VMM processes of a pool that have a clone, by their ids.
pub fn clones(pool: &Pool) -> Vec<i32> {
    let mut children = children(pool);
    children.retain(|child| !waits_for_order(child.cast_unsigned()));
    children
}

/// The VMM process of a pool that waits for an order, once it is there and confined.
pub fn waiting(pool: &Pool) -> i32 {
    let start = Instant::now();
    loop {
        if let Some(child) = children(pool)
            .into_iter()
            .find(|child| waits_for_order(child.cast_unsigned()))
        {
            return child;
        }
        assert!(start.elapsed() < PARKING, "no process waits for an order");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn children(pool: &Pool) -> Vec<i32> {
    let server = pool.server_id() as i32;
    let all = vmm_processes().into_iter();
    all.filter_map(|(id, parent)| (parent == server).then_some(id))
        .collect()
}

/// Whether there is no fork server and no VMM process any more by then.
pub fn gone_within(limit: Duration) -> bool {
    let start = Instant::now();
    while !vmm_processes().is_empty() {
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

#[test]
fn containers_start_in_parked_clones_and_are_separate() {
    let _alone = alone();
    let mut pool = Pool::new(template(), 3, Parking::Prefaulted, Confinement::Jailed).unwrap();
    pool.wait_until_full(PARKING).unwrap();
    assert_eq!(clones(&pool).len(), 3);
    let script = "cat /proc/sys/kernel/random/uuid; hostname; cat /root/mark; echo mark > /root/mark; exit 4";
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..7 {
        let (output, errors, exit) = start(&mut pool, script).end();
        assert_eq!(exit, ContainerExit::Code(4), "{errors}");
        assert!(errors.contains("/root/mark"), "{errors}");
        let words: Vec<&str> = output.split_whitespace().collect();
        assert_eq!(words.len(), 2, "{output}");
        assert!(
            words.iter().all(|word| seen.insert((*word).to_owned())),
            "{output}"
        );
        pool.refill().unwrap();
    }
    drop(pool);
    assert!(gone_within(Duration::from_secs(20)));
}

#[test]
fn a_bare_clone_owns_little_until_its_container_starts() {
    let _alone = alone();
    let mut owned = Vec::new();
    for parking in [Parking::Bare, Parking::Prefaulted] {
        let mut pool = Pool::new(template(), 1, parking, Confinement::Jailed).unwrap();
        pool.wait_until_full(PARKING).unwrap();
        let clone = clones(&pool)[0];
        let status = std::fs::read_to_string(format!("/proc/{clone}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        owned.push(line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap());
        let (output, errors, exit) = start(&mut pool, "echo hi").end();
        assert_eq!(
            (output.as_str(), exit),
            ("hi\n", ContainerExit::Code(0)),
            "{errors}"
        );
        drop(pool);
        assert!(gone_within(Duration::from_secs(20)));
    }
    // The pages that a start writes are some hundreds of KiB.
    assert!(owned[0] + 400 < owned[1], "{owned:?} KiB");
}

#[test]
fn standard_input_reaches_a_container_of_a_pool() {
    let _alone = alone();
    let mut pool = Pool::new(template(), 1, Parking::Prefaulted, Confinement::Jailed).unwrap();
    let (stdin, mut ours) = std::io::pipe().unwrap();
    let options = ContainerOptions {
        stdin: true,
        hostname: Some("pooled".into()),
        ..ContainerOptions::command(["sh", "-c", "hostname; wc -c"])
    };
    let started = start_with(&mut pool, &options, &stdin);
    drop(stdin);
    let writer = std::thread::spawn(move || ours.write_all(&vec![b'x'; 1_000_000]).unwrap());
    let (output, _, exit) = started.end();
    writer.join().unwrap();
    assert_eq!(
        (output.as_str(), exit),
        ("pooled\n1000000\n", ContainerExit::Code(0))
    );
}

#[test]
fn a_container_of_a_pool_can_be_signalled_and_ended() {
    let _alone = alone();
    let mut pool = Pool::new(template(), 1, Parking::Prefaulted, Confinement::Jailed).unwrap();
    let ready = |started: &mut Started| {
        let mut said = [0u8; 3];
        started.stdout.read_exact(&mut said).unwrap();
    };
    let mut handles = start(
        &mut pool,
        "trap 'echo stopping; exit 3' TERM; echo up; while :; do sleep 0.1; done",
    );
    ready(&mut handles);
    handles.container.signal(15).unwrap();
    let (output, _, exit) = handles.end();
    assert_eq!((output.as_str(), exit), ("stopping\n", ContainerExit::Code(3)));

    let mut ignores = start(&mut pool, "trap '' TERM; echo up; while :; do sleep 0.1; done");
    ready(&mut ignores);
    ignores.container.kill(9).unwrap();
    assert_eq!(ignores.end().2, ContainerExit::Signal(9));

    // One that nobody holds any more ends, and so does everything else with the pool.
    let mut forgotten = start(&mut pool, "echo up; sleep 1000");
    ready(&mut forgotten);
    drop(forgotten);
    drop(pool);
    assert!(gone_within(Duration::from_secs(20)));
}

#[test]
fn a_pool_survives_the_death_of_a_parked_clone_and_of_the_process_that_waits_for_an_order() {
    let _alone = alone();
    let mut pool = Pool::new(template(), 2, Parking::Prefaulted, Confinement::Jailed).unwrap();
    pool.wait_until_full(PARKING).unwrap();
    for victim in [clones(&pool)[0], waiting(&pool)] {
        // SAFETY: a plain system call on a child of the fork server that this test has started.
        assert_eq!(unsafe { libc::kill(victim, libc::SIGKILL) }, 0);
    }
    std::thread::sleep(Duration::from_millis(300));
    for _ in 0..3 {
        let (output, _, _) = start(&mut pool, "echo alive").end();
        assert_eq!(output, "alive\n");
    }
}

#[test]
fn what_cannot_be_a_pool_is_refused_with_the_reason() {
    let _alone = alone();
    for size in [0, 5000] {
        let error = Pool::new(template(), size, Parking::Prefaulted, Confinement::Jailed)
            .err()
            .unwrap();
        assert!(error.to_string().contains("1 to 1024"), "{error}");
    }
    // A template that is gone by the time the fork server opens it.
    let own = picovm_tests::OwnStore::new().unwrap();
    let spec = picovm_engine::TemplateSpec {
        memory_mib: 64,
        ..picovm_engine::TemplateSpec::new(own.image().unwrap())
    };
    let opened = own.store.template(&spec, &mut |_| {}).unwrap();
    std::fs::remove_file(opened.path().join("state")).unwrap();
    let mut pool = Pool::new(&opened, 1, Parking::Prefaulted, Confinement::Jailed).unwrap();
    let error = pool.wait_until_full(PARKING).unwrap_err();
    assert!(
        matches!(&error, EngineError::Vmm(reason) if reason.contains("state")),
        "{error}"
    );
    drop(pool);
    assert!(gone_within(Duration::from_secs(20)));
}

#[test]
fn a_clone_does_not_notice_how_long_it_was_parked_and_knows_the_time_of_day() {
    let _alone = alone();
    let mut pool = Pool::new(template(), 2, Parking::Prefaulted, Confinement::Jailed).unwrap();
    pool.wait_until_full(PARKING).unwrap();
    let uptime_and_time = |pool: &mut Pool| {
        let (output, errors, exit) = start(pool, "cat /proc/uptime; date +%s").end();
        assert_eq!(exit, ContainerExit::Code(0), "{errors}");
        let numbers: Vec<f64> = output
            .split_whitespace()
            .map(|number| number.parse().unwrap())
            .collect();
        (numbers[0], numbers[2])
    };
    let (early, _) = uptime_and_time(&mut pool);
    std::thread::sleep(Duration::from_secs(5));
    let (late, seconds) = uptime_and_time(&mut pool);
    assert!((late - early).abs() < 3.0, "{early} {late}");
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert!((now.as_secs_f64() - seconds).abs() < 3.0, "{seconds} {now:?}");
}

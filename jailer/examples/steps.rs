//! What each step of a jail costs: prints a table of medians. To be run as root; on the emulated host's instruction clock its
//! figures repeat:
//!
//! ```text
//! cargo build --release -p picovm-jailer --example steps
//! tests/emulated-host/run --instruction-clock -- target/x86_64-unknown-linux-gnu/release/examples/steps
//! ```

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use picovm_jailer::{Access, Cgroup, Jailer, Mode, Namespaces, Policy, Resource, RootEntry, ThreadKind};

const ROUNDS: usize = 41;

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort_unstable();
    all.get(all.len() / 2).copied().unwrap_or_default()
}

/// What was measured in one round: names of a jail's stages, and how long each took.
type Round = Vec<(&'static str, Duration)>;

fn print(title: &str, rounds: &[Round]) {
    println!("\n{title}");
    for (index, (name, _)) in rounds.first().into_iter().flatten().enumerate() {
        // The first rounds touch what later ones find warm.
        let all = rounds.iter().skip(5).filter_map(|round| round.get(index));
        let all: Vec<Duration> = all.map(|(_, time)| *time).collect();
        println!("  {name:<48} {:>8.1} us", median(all).as_secs_f64() * 1e6);
    }
}

/// Spawns jails one after the other; to the first instruction of their work, and of what each does then.
fn spawn(
    policy: &Policy,
    prepared: bool,
    kinds: &[(&'static str, ThreadKind)],
) -> anyhow::Result<Vec<Round>> {
    let mut rounds = Vec::new();
    let mut jailer = Jailer::new(policy.clone(), Mode::of_caller())?;
    if prepared {
        jailer.become_server()?;
    }
    for _ in 0..ROUNDS {
        let mut round = Round::new();
        if prepared {
            jailer.prepare(1)?;
        }
        let (mut told, mut tell) = std::io::pipe()?;
        let keep = [0, 1, 2, tell.as_raw_fd()];
        let filters = jailer.filters().clone();
        let start = Instant::now();
        let jail = jailer.spawn(&keep, || {
            let mut text = vec![start.elapsed()];
            for (_, kind) in kinds {
                let before = Instant::now();
                if filters.apply(*kind).is_err() {
                    return 1;
                }
                text.push(before.elapsed());
            }
            let bytes: Vec<u8> = text
                .iter()
                .flat_map(|time| (time.as_nanos() as u64).to_le_bytes())
                .collect();
            u8::from(tell.write_all(&bytes).is_err())
        })?;
        let spawned = start.elapsed();
        drop(tell);
        let mut bytes = Vec::new();
        told.read_to_end(&mut bytes)?;
        let ended = Instant::now();
        jail.wait()?;
        let mut times = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|time| Duration::from_nanos(u64::from_le_bytes(*time)));
        round.push(("spawn returns", spawned));
        round.push((
            "to the first instruction of its work",
            times.next().unwrap_or_default(),
        ));
        for ((name, _), time) in kinds.iter().zip(times) {
            round.push((name, time));
        }
        round.push(("reap and give back", ended.elapsed()));
        rounds.push(round);
    }
    Ok(rounds)
}

/// A policy and what is spawned with it.
struct Measurement {
    title: &'static str,
    policy: Policy,
    prepared: bool,
    kinds: Vec<(&'static str, ThreadKind)>,
}

fn measurements() -> Vec<Measurement> {
    let bare = Policy {
        namespaces: Namespaces {
            mount: false,
            pid: false,
            ipc: false,
            uts: false,
            net: false,
            user: false,
        },
        ..Policy::default()
    };
    let limits = |policy: &mut Policy| {
        policy.cgroup = Some(Cgroup {
            memory: Some(1 << 30),
            cpu: Some(2000),
            pids: Some(64),
            ..Cgroup::default()
        });
    };
    let with = |title, change: &dyn Fn(&mut Policy)| {
        let mut policy = bare.clone();
        // Slots are used again only where nothing can stay in them.
        policy.namespaces.pid = true;
        change(&mut policy);
        Measurement {
            title,
            policy,
            prepared: true,
            kinds: Vec::new(),
        }
    };
    let whole = |policy: &mut Policy| {
        policy.namespaces = Namespaces::default();
        policy.root.push(RootEntry {
            path: "/dev/null".into(),
            source: None,
            access: Access::Device,
        });
        limits(policy);
        policy.rlimits.insert(Resource::Core, 0);
        policy.rlimits.insert(Resource::OpenFiles, 64);
    };
    let mut all = vec![
        with("ids, capabilities, descriptors, pid namespace", &|_| ()),
        with("the same without a pid namespace", &|policy| {
            policy.namespaces.pid = false
        }),
        with("with an ipc namespace", &|policy| policy.namespaces.ipc = true),
        with("with an uts namespace", &|policy| policy.namespaces.uts = true),
        with("with a net namespace", &|policy| policy.namespaces.net = true),
        with("with a mount namespace and root", &|policy| {
            policy.namespaces.mount = true
        }),
        with("with a user namespace", &|policy| policy.namespaces.user = true),
        with("with a cgroup", &limits),
        with("whole", &whole),
    ];
    for kind in [
        ("filter of a vCPU thread", ThreadKind::Vcpu),
        ("filter of a device thread", ThreadKind::Device),
        ("filter of a control thread", ThreadKind::Control),
    ] {
        let mut with_filter = with("whole", &whole);
        with_filter.kinds.push(kind);
        all.push(with_filter);
    }
    let mut unprepared = with("whole, nothing prepared, the outer filter included", &whole);
    unprepared.prepared = false;
    all.push(unprepared);
    all
}

/// Each in a process of its own: a fork server is confined for good.
fn main() -> anyhow::Result<()> {
    let all = measurements();
    let Some(which) = std::env::args().nth(1) else {
        for which in 0..=all.len() {
            let status = std::process::Command::new(std::env::current_exe()?)
                .arg(which.to_string())
                .status()?;
            anyhow::ensure!(status.success(), "measurement {which} failed: {status}");
        }
        return Ok(());
    };
    let which: usize = which.parse()?;
    match all.get(which) {
        Some(measurement) => {
            let rounds = spawn(&measurement.policy, measurement.prepared, &measurement.kinds)?;
            print(measurement.title, &rounds);
            Ok(())
        }
        None => prepare(&all.get(8).context("no policy")?.policy),
    }
}

/// What preparing takes, off the path of a start.
fn prepare(policy: &Policy) -> anyhow::Result<()> {
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let mut jailer = Jailer::new(policy.clone(), Mode::of_caller())?;
        let made = start.elapsed();
        jailer.prepare(1)?;
        let prepared = start.elapsed();
        drop(jailer);
        rounds.push(vec![
            ("policy and filters", made),
            ("a slot", prepared - made),
            ("removing it", start.elapsed() - prepared),
        ]);
    }
    print("preparing", &rounds);
    Ok(())
}

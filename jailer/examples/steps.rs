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

use picovm_jailer::{Cgroup, Jailer, Mode, Namespaces, Policy, Resource, SeccompMode, ThreadKind};

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

fn main() -> anyhow::Result<()> {
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
    let with = |change: fn(&mut Policy)| {
        let mut policy = bare.clone();
        // Slots are used again only where nothing can stay in them.
        policy.namespaces.pid = true;
        change(&mut policy);
        policy
    };
    let limits = |policy: &mut Policy| {
        policy.cgroup = Some(Cgroup {
            memory: Some(1 << 30),
            cpu: Some(2000),
            pids: Some(64),
            ..Cgroup::default()
        });
    };
    let whole = {
        let mut policy = Policy::default();
        limits(&mut policy);
        policy.rlimits.insert(Resource::Core, 0);
        policy.rlimits.insert(Resource::OpenFiles, 64);
        policy
    };
    print("ids, capabilities, descriptors", &spawn(&bare, true, &[])?);
    print("+ pid namespace", &spawn(&with(|_| ()), true, &[])?);
    print(
        "+ pid, ipc",
        &spawn(&with(|policy| policy.namespaces.ipc = true), true, &[])?,
    );
    print(
        "+ pid, uts",
        &spawn(&with(|policy| policy.namespaces.uts = true), true, &[])?,
    );
    print(
        "+ pid, net",
        &spawn(&with(|policy| policy.namespaces.net = true), true, &[])?,
    );
    print(
        "+ pid, mount, root",
        &spawn(&with(|policy| policy.namespaces.mount = true), true, &[])?,
    );
    print(
        "+ pid, user",
        &spawn(&with(|policy| policy.namespaces.user = true), true, &[])?,
    );
    print("+ pid, cgroup", &spawn(&with(limits), true, &[])?);
    let kinds = [
        ("filter of a control thread", ThreadKind::Control),
        ("filter of a device thread", ThreadKind::Device),
        ("filter of a vCPU thread", ThreadKind::Vcpu),
    ];
    for kind in &kinds {
        print(
            "whole, prepared",
            &spawn(&whole, true, std::slice::from_ref(kind))?,
        );
    }
    let off = {
        let mut policy = whole.clone();
        policy.seccomp.mode = SeccompMode::Off;
        policy
    };
    print("whole, nothing prepared", &spawn(&off, false, &[])?);
    prepare(&whole)
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

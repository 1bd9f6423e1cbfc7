//! `picovm-attack free|walls|whole ATTACK`: tries one attack, in a jail or without one. Its status is 0 if the attack got
//! through, 1 if it was refused, 2 if the jail killed it, 125 if it could not be tried. `whole[:KIND] heap` is no attack: threads do what
//! those of a VMM process may do at any moment, and all of it is to be let through.

use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::Barrier;

use anyhow::{Context, bail};
use picovm_jailer::{Cgroup, Ended, Filters, Jailer, Mode, Policy, Resource, SeccompMode, ThreadKind, Work};
use picovm_tests::attacks::{ATTACKS, Attack, KVM, MEMFD, MEMORY, SECRET, prey};

fn main() -> ExitCode {
    match run() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("picovm-attack: {error:#}");
            ExitCode::from(125)
        }
    }
}

/// Puts a descriptor where the attacks look for it.
fn put(descriptor: impl Into<OwnedFd>, at: RawFd) -> anyhow::Result<()> {
    // SAFETY: the number is free: this process has opened next to nothing. It is never closed.
    let mut place = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(at) };
    let result = rustix::io::dup2(descriptor.into(), &mut place);
    let _ = place.into_raw_fd();
    result.context("cannot place a descriptor")
}

fn try_it(attack: &Attack) -> u8 {
    match (attack.attempt)() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            1
        }
    }
}

/// What is done in the jail.
enum Done<'a> {
    Attack(&'a Attack),
    Heap,
}

/// Takes blocks of several sizes from the heap, all at once, and gives them back: by turns those that were taken first and last.
fn use_the_heap() {
    for size in [64, 4 << 10, 100 << 10, 190 << 10] {
        for turn in 0..2 {
            let mut blocks: Vec<Vec<u8>> = (0..6).map(|_| vec![1; size]).collect();
            if turn % 2 == 0 {
                blocks.reverse();
            }
            drop(std::hint::black_box(blocks));
        }
    }
}

/// As many threads as a machine has that is as large as can be, each under its filter before it first takes memory.
fn heaps_of_threads(filters: &Filters, kind: ThreadKind) -> u8 {
    const THREADS: usize = 10;
    let all_confined = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                if filters.apply(kind).is_err() {
                    std::process::abort();
                }
                all_confined.wait();
                use_the_heap();
            });
        }
    });
    0
}

fn run() -> anyhow::Result<u8> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [how, name] = arguments.as_slice() else {
        bail!("picovm-attack free|walls|whole[:KIND] ATTACK");
    };
    let attack = ATTACKS.iter().find(|attack| attack.name == name);
    let done = match (attack, name.as_str()) {
        (Some(attack), _) => Done::Attack(attack),
        (None, "heap") => Done::Heap,
        (None, _) => bail!("there is no attack {name}"),
    };

    put(std::fs::File::open("/dev/kvm")?, KVM)?;
    put(std::fs::File::open(prey::of(prey::TEMPLATE))?, MEMORY)?;
    let memfd = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::io::write(&memfd, b"memory")?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd));
    put(std::fs::File::open(path)?, MEMFD)?;
    drop(memfd);
    put(std::fs::File::open("/etc/passwd")?, SECRET)?;

    let (walls, kind) = how.split_once(':').unwrap_or((how, "control"));
    if walls == "free" {
        // What it does to mounts and names must not reach the other tests.
        let own = rustix::thread::UnshareFlags::NEWNS | rustix::thread::UnshareFlags::NEWUTS;
        // SAFETY: descriptors and memory stay as they are.
        unsafe { rustix::thread::unshare_unsafe(own) }?;
        let private =
            rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private)?;
        return Ok(match done {
            Done::Attack(attack) => try_it(attack),
            Done::Heap => bail!("there is no filter to see what it says to a heap"),
        });
    }
    let (kind, work) = match kind {
        "vcpu" => (ThreadKind::Vcpu, Work::Clone),
        "device" => (ThreadKind::Device, Work::Clone),
        "maker-vcpu" => (ThreadKind::Vcpu, Work::Template),
        "maker-control" => (ThreadKind::Control, Work::Template),
        _ => (ThreadKind::Control, Work::Clone),
    };
    let mut policy = Policy {
        cgroup: Some(Cgroup {
            memory: Some(96 << 20),
            cpu: Some(200),
            pids: Some(16),
            ..Cgroup::default()
        }),
        ..Policy::default()
    };
    policy.rlimits.insert(Resource::Core, 0);
    policy.rlimits.insert(Resource::OpenFiles, 64);
    policy.rlimits.insert(Resource::LockedMemory, 64 << 10);
    if walls == "walls" {
        policy.seccomp.mode = SeccompMode::Off;
    }
    let mut jailer = Jailer::for_work(policy, Mode::Privileged, work)?;
    jailer.prepare(1)?;
    // Who makes templates is no child of a fork server.
    if walls == "whole" && work == Work::Clone {
        jailer.become_server()?;
    }
    let filters = jailer.filters().clone();
    let jail = jailer.spawn(&[0, 1, 2, KVM, MEMORY, MEMFD], || match done {
        Done::Heap => heaps_of_threads(&filters, kind),
        Done::Attack(attack) => match filters.apply(kind) {
            Ok(()) => try_it(attack),
            Err(_) => 125,
        },
    })?;
    Ok(match jail.wait()? {
        Ended::Code(status) => status,
        Ended::Signal(signal) => {
            eprintln!("killed by signal {signal}");
            2
        }
    })
}

//! Starts: of a process, of a clone, of `picovm run`, each with the same program, to its first byte of output and to
//! its end.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use picovm_engine::figures::ms;
use picovm_engine::{Confinement, ContainerOptions, Image, Parking, Pool, Prompt, RunningContainer, Store};
use picovm_guest_protocol::ContainerExit;
use picovm_vmm::{Template, WorkingSet};

use crate::boot::{self, MEMORY_MIB};
use crate::cloud_hypervisor::Memory;
use crate::oci::Runtime;
use crate::peer::Peer;
use crate::report::{Report, Unit};
use crate::rounds::{self, Probe, Selection};
use crate::workspace::{DISTRIBUTION, SMALL, Workspace};
use crate::{clones, cloud_hypervisor, firecracker, floor, process};

const DISCARDED: u32 = 5;
/// How long a clone is parked before it is started.
pub const PARKED: Duration = Duration::from_millis(5);
/// How long the start before is given until all that comes of it is done, where ways to start are compared: its clone is taken down in some
/// 12 ms, and its fork server makes the next process ready after 100. What is left of that would count as the next one's.
const SETTLED: Duration = Duration::from_millis(150);
/// A start that takes longer has gone wrong.
pub const START_MAX: Duration = Duration::from_secs(10);
/// So many starts tell the working set, as in the engine.
const STARTS_RECORDED: u32 = 3;
pub const WORD: &str = "hello";

/// Measures it all; gives the template of the small image.
pub fn measure(
    workspace: &Workspace,
    selection: &Selection,
    rounds: u32,
    report: &mut Report,
) -> anyhow::Result<Template> {
    let small = template(workspace, &workspace.small, "small", report)?;
    let distribution = match &workspace.distribution {
        Some(image) => Some(template(workspace, image, "distribution", report)?),
        None => None,
    };
    let mut smallest = boot::build_smallest_template(workspace, &workspace.path("smallest"))?;
    smallest.record_working_set(clones::record_first_instruction(&smallest)?);
    let mut pool = Pool::new(&small, 1, Parking::Prefaulted, Confinement::Jailed)?;
    let mut probes = vec![
        Probe::new(
            [("process_first_byte", Unit::Ms), ("process_exit", Unit::Ms)],
            || process(Command::new(&workspace.echo).arg(WORD)),
        ),
        Probe::new([("template_open", Unit::Ms)], || {
            let start = Instant::now();
            let template = Template::open(small.path())?;
            let end = Instant::now();
            drop(template);
            Ok([ms(start, end)])
        }),
        Probe::new([("kvm_floor", Unit::Ms)], || floor::measure(&small)),
        Probe::new([("fork_first_instruction", Unit::Ms)], || clones::trap(&smallest)),
        Probe::new([("parked_first_instruction", Unit::Ms)], || {
            clones::parked_first_instruction(&smallest)
        }),
        Probe::new([("fork_freeze_again", Unit::Ms)], || clones::trap(&small)),
        clones::fork_probe(&small),
        Probe::new([("fork_unpopulated_exit", Unit::Ms)], || {
            Ok([clones::fork(&small, None)?.exit])
        }),
        clones::parked_probe(&small),
        Probe::new(
            [("engine_first_byte", Unit::Ms), ("engine_exit", Unit::Ms)],
            || pooled(&mut pool),
        ),
        jail_probe(&small)?,
        run_probe(workspace, SMALL, &[]),
        run_probe(workspace, SMALL, &["--no-jail"]).named("unjailed_"),
    ];
    if selection.has("pooled_run_first_byte") {
        probes.push(StandingPool::start(workspace)?.probe());
    }
    probes.extend(firecracker_probe(workspace, selection, report));
    probes.extend(cloud_hypervisor_probes(workspace, selection, report));
    for (name, prefix) in [("crun", "crun_"), ("runc", "runc_")] {
        let root = workspace.path("image");
        let Some(mut runtime) = Runtime::find(name, &workspace.path(""), &root, ["/bin/echo", WORD])? else {
            eprintln!("{name} is not installed: measuring without it");
            continue;
        };
        let measures = [("first_byte", Unit::Ms), ("exit", Unit::Ms)];
        probes.push(Probe::new(measures, move || process(&mut runtime.run())).named(prefix));
    }
    if let Some(template) = &distribution {
        probes.push(clones::fork_probe(template).named("debian_"));
        probes.push(run_probe(workspace, DISTRIBUTION, &[]).named("debian_"));
    }
    rounds::measure("starts", probes, selection, (DISCARDED, rounds), report)?;
    note_steps(report);
    Ok(small)
}

/// Loading and resuming a snapshot of Firecracker's, if that is given and wanted.
fn firecracker_probe(
    workspace: &Workspace,
    selection: &Selection,
    report: &mut Report,
) -> Option<Probe<'static>> {
    let restore = ("firecracker_restore", Unit::Ms);
    let program = workspace
        .peer(Peer::Firecracker)
        .filter(|_| selection.has(restore.0))?;
    let snapshot = peer_snapshot(Peer::Firecracker, report, || {
        let cmdline = boot::cmdline_for_others(&workspace.kernel, &workspace.asleep);
        let guest = (workspace.asleep.as_path(), cmdline.as_str());
        firecracker::Snapshot::take(program, &workspace.kernel, guest, &workspace.path(""))
    })?;
    Some(Probe::new([restore], move || snapshot.restore()))
}

/// Loading and resuming a snapshot of Cloud Hypervisor's, if that is given and wanted, in both ways to fill memory.
fn cloud_hypervisor_probes(
    workspace: &Workspace,
    selection: &Selection,
    report: &mut Report,
) -> Vec<Probe<'static>> {
    let mut restores = vec![
        ("cloud_hypervisor_restore", Memory::Copied),
        ("cloud_hypervisor_restore_on_demand", Memory::OnDemand),
    ];
    restores.retain(|(name, _)| selection.has(name));
    let Some(program) = workspace
        .peer(Peer::CloudHypervisor)
        .filter(|_| !restores.is_empty())
    else {
        return Vec::new();
    };
    let snapshot = peer_snapshot(Peer::CloudHypervisor, report, || {
        let cmdline = boot::cmdline_for_others(&workspace.kernel, &workspace.writing);
        let guest = (workspace.writing.as_path(), cmdline.as_str());
        cloud_hypervisor::Snapshot::take(program, &workspace.kernel, guest, &workspace.path(""))
    });
    let Some(snapshot) = snapshot.map(Rc::new) else {
        return Vec::new();
    };
    restores
        .into_iter()
        .map(|(name, memory)| {
            let snapshot = Rc::clone(&snapshot);
            Probe::new([(name, Unit::Ms)], move || snapshot.restore(memory))
        })
        .collect()
}

/// What a peer is restored from; nothing, and a failure in the report, if that cannot be made.
fn peer_snapshot<T>(peer: Peer, report: &mut Report, take: impl FnMut() -> anyhow::Result<T>) -> Option<T> {
    let what = format!("{}'s snapshot", peer.name());
    rounds::persist(&what, report, rounds::FAILURES_MAX, take)
        .inspect_err(|error| rounds::leave_out(report, error))
        .ok()
}

/// Where the time of one start goes, by the medians of its steps, in milliseconds.
fn note_steps(report: &mut Report) {
    let median = |name| report.median(name);
    let cold = || {
        let (fork, populate) = (median("fork")?, median("populate")?);
        let entered = (median("fork_first_instruction")? - fork).max(0.0);
        let first_byte = median("fork_first_byte")?;
        Some(vec![
            ("fork: memory, VM, state, threads".to_owned(), fork),
            ("populate what it will write".to_owned(), populate),
            ("enter the guest".to_owned(), entered),
            (
                "become, exec, output".to_owned(),
                (first_byte - fork - populate - entered).max(0.0),
            ),
            (
                "exit status".to_owned(),
                (median("fork_exit")? - first_byte).max(0.0),
            ),
        ])
    };
    let parked = || {
        let (entered, first_byte) = (median("parked_first_instruction")?, median("parked_first_byte")?);
        Some(vec![
            ("enter the guest".to_owned(), entered),
            ("become, exec, output".to_owned(), (first_byte - entered).max(0.0)),
            (
                "exit status".to_owned(),
                (median("parked_exit")? - first_byte).max(0.0),
            ),
        ])
    };
    let bars = [("cold start", cold()), ("start of a parked clone", parked())];
    for (name, steps) in bars {
        if let Some(steps) = steps {
            report.steps.insert(name.to_owned(), steps);
        }
    }
}

fn template(
    workspace: &Workspace,
    image: &Image,
    name: &str,
    report: &mut Report,
) -> anyhow::Result<Template> {
    sized_template(workspace, image, name, (MEMORY_MIB, 1), report)
}

/// A template that knows its working set, of so many MiB and vCPUs.
pub fn sized_template(
    workspace: &Workspace,
    image: &Image,
    name: &str,
    size: (u64, u8),
    report: &mut Report,
) -> anyhow::Result<Template> {
    rounds::persist("the template", report, rounds::FAILURES_MAX, || {
        let directory = workspace.path(name);
        let mut template = boot::build_sized_template(workspace, &image.file, &directory, size)?;
        let set = (0..STARTS_RECORDED).try_fold(WorkingSet::default(), |set, _| {
            anyhow::Ok(set.union(&clones::record(&template)?))
        })?;
        template.record_working_set(set);
        Ok(template)
    })
}

/// From spawning a process to the first byte that it writes, and to its exit status.
fn process(command: &mut Command) -> anyhow::Result<[f64; 2]> {
    let watched = process::watch(command.stdin(Stdio::null()), |output| !output.is_empty())?;
    check_output(&watched.output)?;
    Ok([watched.mark.context("it wrote nothing")?, watched.exit])
}

pub fn check_output(output: &[u8]) -> anyhow::Result<()> {
    if output.trim_ascii_end() != WORD.as_bytes() {
        bail!("the output is {:?}", String::from_utf8_lossy(output));
    }
    Ok(())
}

fn run_probe<'a>(workspace: &'a Workspace, image: &'static str, options: &'static [&str]) -> Probe<'a> {
    Probe::new(
        [("run_first_byte", Unit::Ms), ("run_exit", Unit::Ms)],
        move || {
            std::thread::sleep(SETTLED);
            process(&mut run(workspace, workspace.store.root(), image, options))
        },
    )
}

/// `picovm run` of `echo` with a store.
fn run(workspace: &Workspace, store: &Path, image: &str, options: &[&str]) -> Command {
    let mut command = workspace.picovm_sized(store, &["run", "--rm"]);
    command.args(options).args([image, "echo", WORD]);
    command
}

/// A standing pool in a store of its own, out of reach of the cold starts. It ends with this.
struct StandingPool<'a> {
    workspace: &'a Workspace,
    store: PathBuf,
}

impl<'a> StandingPool<'a> {
    fn start(workspace: &'a Workspace) -> anyhow::Result<Self> {
        let store = workspace.path("pooled-store");
        Store::open(&store)?.build_image(SMALL, &workspace.path("image"), &mut |_| {})?;
        let pool = Self { workspace, store };
        let start = ["pool", "start", "--size", "1"];
        let mut command = workspace.picovm_sized(&pool.store, &start);
        let output = command.arg(SMALL).output()?;
        if !output.status.success() {
            bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(pool)
    }

    /// As `run_probe`, in a clone of it.
    fn probe(self) -> Probe<'a> {
        let measures = [("pooled_run_first_byte", Unit::Ms), ("pooled_run_exit", Unit::Ms)];
        Probe::new(measures, move || {
            // Until the next one is parked.
            std::thread::sleep(SETTLED);
            process(&mut run(self.workspace, &self.store, SMALL, &[]))
        })
    }
}

impl Drop for StandingPool<'_> {
    fn drop(&mut self) {
        let stop = Command::new(&self.workspace.picovm)
            .env("PICOVM_HOME", &self.store)
            .args(["pool", "stop", "--all"])
            .output();
        if let Err(error) = stop {
            eprintln!("warning: a pool goes on: {error}");
        }
    }
}

/// What a jail adds to a cold start by a fork server, and to a start of a clone that is parked in it: each the difference of two
/// starts that follow one another.
fn jail_probe(template: &Template) -> anyhow::Result<Probe<'static>> {
    let pool = |parking, confinement| Pool::new(template, 1, parking, confinement);
    let mut cold = [
        pool(Parking::Bare, Confinement::Unconfined)?,
        pool(Parking::Bare, Confinement::Jailed)?,
    ];
    let mut parked = [
        pool(Parking::Prefaulted, Confinement::Unconfined)?,
        pool(Parking::Prefaulted, Confinement::Jailed)?,
    ];
    let measures = [
        ("server_first_byte", Unit::Ms),
        ("jailed_server_first_byte", Unit::Ms),
        ("jail_cold", Unit::Ms),
        ("jail_pooled", Unit::Ms),
    ];
    Ok(Probe::new(measures, move || {
        let [without, with] = &mut cold;
        let (without, with) = (forked_at_request(without)?, forked_at_request(with)?);
        let [unjailed, jailed] = &mut parked;
        let ([unjailed, _], [jailed, _]) = (pooled(unjailed)?, pooled(jailed)?);
        Ok([without, with, with - without, jailed - unjailed])
    }))
}

/// To the first byte of a container in a clone that its pool's server forks when it is asked for; the first time it is the one
/// that was parked when the pool was made.
fn forked_at_request(pool: &mut Pool) -> anyhow::Result<f64> {
    std::thread::sleep(SETTLED);
    let [first_byte, _] = started(|options, streams| {
        pool.refill()?;
        Ok(pool.start(options, streams)?)
    })?;
    Ok(first_byte)
}

/// Starts a container through the engine, in a clone of its pool.
fn pooled(pool: &mut Pool) -> anyhow::Result<[f64; 2]> {
    pool.refill()?;
    pool.wait_until_full(START_MAX)?;
    std::thread::sleep(SETTLED);

    started(|options, streams| Ok(pool.start(options, streams)?))
}

/// To the first byte, and to the exit status, of `echo` started like this.
fn started(
    start: impl FnOnce(&ContainerOptions, [BorrowedFd<'_>; 3]) -> anyhow::Result<RunningContainer>,
) -> anyhow::Result<[f64; 2]> {
    let null = std::fs::File::open("/dev/null")?;
    let _prompt = Prompt::begin();
    let begun = Instant::now();
    let (mut output, theirs) = std::io::pipe()?;
    let streams = [null.as_fd(), theirs.as_fd(), theirs.as_fd()];
    let container = start(&ContainerOptions::command(["echo", WORD]), streams)?;
    drop(theirs);
    let mut bytes = [0u8; 4096];
    let count = output.read(&mut bytes)?;
    let first = Instant::now();
    let exit = container.wait()?;
    let end = Instant::now();
    check_output(bytes.get(..count).unwrap_or_default())?;
    if exit != ContainerExit::Code(0) {
        bail!("a container ended with {exit:?}");
    }
    Ok([ms(begun, first), ms(begun, end)])
}

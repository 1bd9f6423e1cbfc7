//! How starts scale: with the memory of a template, its vCPUs, with many at once, and one after the other for long.

use std::io::Read;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::bail;
use picovm_engine::figures::ms;
use picovm_engine::{Confinement, ContainerExit, ContainerOptions, Parking, Pool, RunningContainer};
use picovm_vmm::Template;

use crate::clones;
use crate::report::{Report, Unit};
use crate::rounds::{self, Probe, Selection};
use crate::start::{WORD, check_output, sized_template};
use crate::workspace::Workspace;

const DISCARDED: u32 = 1;
/// Sizes of templates: suffix of the measures, MiB, vCPUs.
const SIZES: [(&str, u64, u8); 4] = [
    ("_64m", 64, 1),
    ("_1024m", 1024, 1),
    ("_4096m", 4096, 1),
    ("_2cpus", 128, 2),
];
/// Clones that are started together.
const TOGETHER: usize = 100;
/// Clones that a pool keeps while containers are started one after the other.
const POOL: usize = 8;
/// Parking many clones takes a while where every instruction is emulated.
const PARKING_MAX: Duration = Duration::from_secs(120);

/// Measures it all; `starts` containers one after the other.
pub fn measure(
    workspace: &Workspace,
    template: &Template,
    selection: &Selection,
    (rounds, starts): (u32, u32),
    report: &mut Report,
) -> anyhow::Result<()> {
    let names = SIZES
        .map(|(suffix, ..)| ["fork_first_byte", "parked_first_byte"].map(|name| format!("{name}{suffix}")));
    let mut sized = Vec::new();
    for ((suffix, mib, vcpus), names) in SIZES.iter().zip(&names) {
        // The host of the benchmark may have less.
        if names.iter().any(|name| selection.has(name)) && fits(*mib)? {
            let size = (*mib, *vcpus);
            sized.push((
                sized_template(
                    workspace,
                    &workspace.small,
                    &format!("sized{suffix}"),
                    size,
                    report,
                )?,
                names,
            ));
        }
    }
    let mut probes = Vec::new();
    for (template, [cold, parked]) in &sized {
        probes.push(Probe::new([(cold, Unit::Ms)], || {
            Ok([clones::fork(template, template.working_set())?.first_byte])
        }));
        probes.push(Probe::new([(parked, Unit::Ms)], || {
            let [_, first_byte, ..] = clones::parked(template)?;
            Ok([first_byte])
        }));
    }
    probes.push(Probe::new([("teardown", Unit::Ms)], || teardown(template)));
    rounds::measure("sizes", probes, selection, (DISCARDED, rounds), report)?;

    let probes = vec![
        Probe::new([("fork_100_together", Unit::Ms)], || together(template)),
        Probe::new([("pool_100_together", Unit::Ms)], || pooled_together(template)),
    ];
    rounds::measure(
        "many at once",
        probes,
        selection,
        (0, (rounds / 5).max(1)),
        report,
    )?;

    let probe = Probe::new(
        [("starts_per_second", Unit::PerSecond), ("start_work", Unit::Ms)],
        || one_after_the_other(template, starts),
    );
    rounds::measure("one after the other", vec![probe], selection, (0, 1), report)
}

/// Whether this host has room for a machine of so many MiB.
fn fits(mib: u64) -> anyhow::Result<bool> {
    let info = rustix::system::sysinfo();
    let host = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit)) >> 20;
    if host < mib + 1024 {
        eprintln!("measuring without a template of {mib} MiB: this host has {host} MiB");
    }
    Ok(host >= mib + 1024)
}

/// Ending a clone whose container has ended: threads, VM, memory.
fn teardown(template: &Template) -> anyhow::Result<[f64; 1]> {
    let mut clone = clones::with_identity(template)?;
    clones::start_and_listen(&mut clone)?;
    clones::end_of(&mut clone)?;
    let start = Instant::now();
    drop(clone);
    Ok([ms(start, Instant::now())])
}

/// From the first fork to the last answer of clones that are forked together, in one process.
fn together(template: &Template) -> anyhow::Result<[f64; 1]> {
    let start = Instant::now();
    let mut clones = Vec::with_capacity(TOGETHER);
    for _ in 0..TOGETHER {
        let mut clone = clones::with_identity(template)?;
        if let Some(set) = template.working_set() {
            set.populate_written(clone.memory());
        }
        let connection = clones::connect(&mut clone)?;
        clone.start()?;
        clones.push((clone, connection));
    }
    for (clone, connection) in &mut clones {
        let (output, ..) = clones::listen(clone, connection)?;
        check_output(&output)?;
    }
    Ok([ms(start, Instant::now())])
}

/// From the first request to the last exit status of containers that are started together, from a pool that has a clone for
/// each.
fn pooled_together(template: &Template) -> anyhow::Result<[f64; 1]> {
    let mut pool = Pool::new(template, TOGETHER, Parking::Prefaulted, Confinement::Jailed)?;
    pool.wait_until_full(PARKING_MAX)?;
    let start = Instant::now();
    let containers = (0..TOGETHER)
        .map(|_| begin(&mut pool))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for (container, output) in containers {
        finish(container, output)?;
    }
    Ok([ms(start, Instant::now())])
}

/// Starts containers one after the other from a pool that is refilled meanwhile, ended clones being torn down meanwhile, too.
/// Gives starts a second and milliseconds for each: on a host with one processor that is all the work that there is.
fn one_after_the_other(template: &Template, starts: u32) -> anyhow::Result<[f64; 2]> {
    let mut pool = Pool::new(template, POOL, Parking::Prefaulted, Confinement::Jailed)?;
    pool.wait_until_full(PARKING_MAX)?;
    let start = Instant::now();
    for _ in 0..starts {
        let (container, output) = begin(&mut pool)?;
        pool.refill()?;
        finish(container, output)?;
    }
    let each = ms(start, Instant::now()) / f64::from(starts);
    Ok([1e3 / each, each])
}

fn begin(pool: &mut Pool) -> anyhow::Result<(RunningContainer, std::io::PipeReader)> {
    let null = std::fs::File::open("/dev/null")?;
    let (output, theirs) = std::io::pipe()?;
    let streams = [null.as_fd(), theirs.as_fd(), theirs.as_fd()];
    let container = pool.start(&ContainerOptions::command(["echo", WORD]), streams)?;
    Ok((container, output))
}

fn finish(container: RunningContainer, mut output: std::io::PipeReader) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    output.read_to_end(&mut bytes)?;
    check_output(&bytes)?;
    match container.wait()? {
        ContainerExit::Code(0) => Ok(()),
        exit => bail!("a container ended with {exit:?}"),
    }
}

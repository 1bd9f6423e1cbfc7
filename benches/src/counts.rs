//! Counts of one start, which say what a start is made of on any machine: what KVM came back for, system calls, page faults,
//! pages. And the budget that they must keep.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use perf_event_open_sys::bindings::{PERF_TYPE_TRACEPOINT, perf_event_attr};
use picovm_vmm::machine::Machine;
use picovm_vmm::{ForkOptions, Template};

use crate::clones;
use crate::report::{Report, Unit};
use crate::rounds::{Probe, Selection, measure as measure_rounds};

const DISCARDED: u32 = 1;
/// A count may grow by so much before it is over its budget, and by [`SLACK`] in any case: when the host's one CPU turns from
/// one thread to another makes a difference of one or two.
const TOLERANCE: f64 = 1.10;
const SLACK: f64 = 2.0;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// Where the kernel's tracing and debugging files are.
const TRACING: &str = "/sys/kernel/tracing";
const DEBUG: &str = "/sys/kernel/debug";

/// KVM's own statistics of a machine (debugfs, `kvm/PID-FD/`, summed over its vCPUs), and under what name they are told here.
const KVM_STATISTICS: [(&str, &str); 6] = [
    ("kvm_exits", "exits"),
    ("kvm_page_faults", "pf_taken"),
    ("kvm_memory_exits", "mmio_exits"),
    ("kvm_port_exits", "io_exits"),
    ("kvm_halt_exits", "halt_exits"),
    ("kvm_interrupt_exits", "irq_exits"),
];

/// Counts both kinds of start.
pub fn measure(
    template: &Template,
    selection: &Selection,
    rounds: u32,
    report: &mut Report,
) -> anyhow::Result<()> {
    if !selection.has_any_of("count_") {
        return Ok(());
    }
    if let Err(error) = mount_kernel_files() {
        eprintln!("no counts: {error:#}");
        return Ok(());
    }
    let probes = vec![
        probe("count_fork_", || cold(template)),
        probe("count_parked_", || parked(template)),
    ];
    measure_rounds("counts", probes, selection, (DISCARDED, rounds), report)
}

/// What one start took.
struct Counts {
    kvm: [f64; KVM_STATISTICS.len()],
    system_calls: f64,
    minor_faults: f64,
    major_faults: f64,
    written: u64,
    read: u64,
}

fn probe<'a>(prefix: &str, mut run: impl FnMut() -> anyhow::Result<Counts> + 'a) -> Probe<'a> {
    let [a, b, c, d, e, f] = KVM_STATISTICS.map(|(name, _)| (name, Unit::Count));
    let measures = [
        a,
        b,
        c,
        d,
        e,
        f,
        ("system_calls", Unit::Count),
        ("minor_faults", Unit::Count),
        ("major_faults", Unit::Count),
        ("pages_written", Unit::Pages),
        ("pages_read", Unit::Pages),
        ("copied", Unit::Kib),
    ];
    Probe::new(measures, move || {
        let counts = run()?;
        let [a, b, c, d, e, f] = counts.kvm;
        Ok([
            a,
            b,
            c,
            d,
            e,
            f,
            counts.system_calls,
            counts.minor_faults,
            counts.major_faults,
            counts.written as f64,
            counts.read as f64,
            ((counts.written * PAGE) >> 10) as f64,
        ])
    })
    .named(prefix)
}

/// From the fork to the exit frame of a clone that is forked for the request. Which pages it touches is looked at in another
/// one, whose faults are therefore others.
fn cold(template: &Template) -> anyhow::Result<Counts> {
    let calls = Counter::of_system_calls()?;
    let before = faults();
    let mut clone = clones::with_identity(template)?;
    if let Some(set) = template.working_set() {
        set.populate_written(clone.memory());
    }
    run(template, &mut clone, &calls, before)
}

/// From the request to the exit frame of a clone that was forked and prefaulted before.
fn parked(template: &Template) -> anyhow::Result<Counts> {
    let working_set = template.working_set().context("there is no working set")?;
    // Before the clone's threads begin: they inherit it.
    let calls = Counter::of_system_calls()?;
    let mut clone = template.fork(ForkOptions::default())?;
    clone.prefault(working_set)?;
    let (kvm, made, before) = (kvm_statistics()?, calls.read()?, faults());
    template.write_identity(&clone, &clones::identity()?.encode(template.identity_area())?)?;
    let mut counts = run(template, &mut clone, &calls, before)?;
    counts.system_calls -= made;
    for (count, before) in counts.kvm.iter_mut().zip(kvm) {
        *count -= before;
    }
    Ok(counts)
}

fn run(
    template: &Template,
    clone: &mut Machine,
    calls: &Counter,
    before: [f64; 2],
) -> anyhow::Result<Counts> {
    clones::start_and_listen(clone)?;
    let (system_calls, after) = (calls.read()?, faults());
    clones::end_of(clone)?;
    let kvm = kvm_statistics()?;
    let set = clones::record(template)?;
    Ok(Counts {
        kvm,
        system_calls,
        minor_faults: after[0] - before[0],
        major_faults: after[1] - before[1],
        written: set.written_pages(),
        read: set.read_pages(),
    })
}

/// Minor and major page faults of this process so far (getrusage(2)).
fn faults() -> [f64; 2] {
    // SAFETY: an all-zero structure is valid, and the call only fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    [usage.ru_minflt as f64, usage.ru_majflt as f64]
}

/// The statistics of the one machine that this process has now.
fn kvm_statistics() -> anyhow::Result<[f64; KVM_STATISTICS.len()]> {
    let prefix = format!("{}-", std::process::id());
    let mut machines = fs::read_dir(Path::new(DEBUG).join("kvm"))
        .context("cannot list KVM's statistics")?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    let (Some(machine), None) = (machines.next(), machines.next()) else {
        bail!("this process has not one machine");
    };
    let mut counts = [0.0; KVM_STATISTICS.len()];
    for (count, (_, file)) in counts.iter_mut().zip(KVM_STATISTICS) {
        let path = machine.path().join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        *count = text
            .trim()
            .parse()
            .with_context(|| format!("{} is no number: {text}", path.display()))?;
    }
    Ok(counts)
}

/// A counter of the kernel's, of this process and the threads that it begins from now on.
struct Counter(OwnedFd);

impl Counter {
    fn of_system_calls() -> anyhow::Result<Self> {
        let id: PathBuf = Path::new(TRACING).join("events/raw_syscalls/sys_enter/id");
        let id = fs::read_to_string(&id).with_context(|| format!("cannot read {}", id.display()))?;
        let mut attributes = perf_event_attr {
            type_: PERF_TYPE_TRACEPOINT,
            size: size_of::<perf_event_attr>() as u32,
            config: id.trim().parse()?,
            ..Default::default()
        };
        attributes.set_inherit(1);
        // SAFETY: the structure is initialised and says its size; the call takes nothing else by reference.
        let descriptor = unsafe { perf_event_open_sys::perf_event_open(&mut attributes, 0, -1, -1, 0) };
        if descriptor < 0 {
            return Err(std::io::Error::last_os_error()).context("cannot count system calls");
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    fn read(&self) -> anyhow::Result<f64> {
        let mut bytes = [0u8; 8];
        rustix::io::read(&self.0, &mut bytes).context("cannot read a counter")?;
        Ok(u64::from_ne_bytes(bytes) as f64)
    }
}

/// Makes the kernel's tracing and debugging files visible in the emulated host, which is ours; elsewhere they are there or not.
fn mount_kernel_files() -> anyhow::Result<()> {
    for (kind, place, file) in [(c"tracefs", TRACING, "events"), (c"debugfs", DEBUG, "kvm")] {
        if std::env::var_os("PICOVM_EMULATED_HOST").is_some() && !Path::new(place).join(file).exists() {
            rustix::mount::mount(kind, place, kind, rustix::mount::MountFlags::empty(), None)
                .with_context(|| format!("cannot mount {place}"))?;
        }
        if !Path::new(place).join(file).exists() {
            bail!(
                "{place}/{file} is not there: as root, mount {}",
                kind.to_string_lossy()
            );
        }
    }
    Ok(())
}

/// Compares the counts of a report with a file of budgets, a JSON object of numbers by name. All that are in it must have
/// been measured, and be no more than a tenth, or two, over.
pub fn check(report: &Report, budgets: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(budgets).with_context(|| format!("cannot read {}", budgets.display()))?;
    let budgets: BTreeMap<String, f64> = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is no table of budgets", budgets.display()))?;
    let (mut kept, mut over) = (0, 0);
    for (name, budget) in &budgets {
        let problem = match report.median(name) {
            None => "was not measured".to_owned(),
            Some(found) if found > (budget * TOLERANCE).max(budget + SLACK) => {
                format!("is {found}, and its budget {budget}")
            }
            Some(_) => {
                kept += 1;
                continue;
            }
        };
        over += 1;
        println!("FAILED {name} {problem}");
    }
    println!("budgets: {kept} passed, {over} failed");
    if over > 0 {
        bail!("{over} counts are more than a tenth over their budgets");
    }
    Ok(())
}

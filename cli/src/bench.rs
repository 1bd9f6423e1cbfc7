//! `picovm bench`: how long starts take on this machine, and what clones take of its memory. `make bench` measures more, and
//! in a way that repeats.

use std::ffi::OsString;
use std::fs::File;
use std::io::{PipeReader, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use picovm_engine::figures::{self, median, ms, percentile};
use picovm_engine::{
    Confinement, Container, ContainerExit, ContainerOptions, Density, DensityProgress, Interruption, Parking,
    Pool, Prompt, Stdio, Store, TemplateSpec, printable,
};
use picovm_vmm::Template;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::arguments::{BenchCommand, DensityOptions, LatencyOptions, MachineOptions};
use crate::{end_with_the_reader, output};

/// The image that is taken where there are several and none is named.
const IMAGE: &str = "debian";
/// What is measured as a process of this machine, and in a container if no command is given.
const PROGRAM: &str = "/bin/echo";
const WORD: &str = "hello";
/// First rounds that do not count: they read files and fill caches.
const DISCARDED: u32 = 2;
/// Lets what the last start left behind end (the teardown of a VM waits for grace periods) before the next begins.
const SETTLE: Duration = Duration::from_millis(50);
/// How long a clone is parked before it is started.
const PARKED: Duration = Duration::from_millis(5);
/// A start that takes longer has gone wrong.
const START_MAX: Duration = Duration::from_secs(60);
/// Characters of a histogram or curve.
const COLUMNS: usize = 32;

pub fn bench(command: &BenchCommand) -> anyhow::Result<ExitCode> {
    match command {
        BenchCommand::Latency(options) => latency(options),
        BenchCommand::Density(options) => density(options),
    }
}

/// Where and of what something was measured.
#[derive(Serialize)]
struct Conditions {
    /// Processor, number of CPUs, kernel.
    host: String,
    image: String,
    memory_mib: u64,
    vcpus: u8,
}

/// The template to measure, which is built if it is not there.
fn template(image: Option<&str>, machine: &MachineOptions) -> anyhow::Result<(Template, Conditions)> {
    let store = Store::open_default()?;
    let image = match image {
        Some(name) => store.image(name)?,
        None => {
            let images = store.images()?;
            let names: Vec<String> = images.iter().map(|image| image.name.clone()).collect();
            let only = images.len() == 1;
            images
                .into_iter()
                .find(|image| only || image.name == IMAGE)
                .with_context(|| match names.as_slice() {
                    [] => "there is no image yet: `picovm image build NAME DIR|TAR` makes one".to_owned(),
                    names => format!("name one of these images: {}", names.join(", ")),
                })?
        }
    };
    let conditions = Conditions {
        host: figures::host(),
        image: image.name.clone(),
        memory_mib: machine.memory,
        vcpus: machine.cpus,
    };
    let spec = TemplateSpec {
        image,
        memory_mib: machine.memory,
        vcpus: machine.cpus,
    };
    let template = store.template(&spec, &mut |progress| eprintln!("picovm: {progress}"))?;
    Ok((template, conditions))
}

impl std::fmt::Display for Conditions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = if self.vcpus == 1 { "" } else { "s" };
        writeln!(f, "host:  {}", self.host)?;
        write!(
            f,
            "image: {}, {} MiB, {} vCPU{plural}",
            self.image, self.memory_mib, self.vcpus
        )
    }
}

/// A bar on standard error, if that is a terminal.
fn progress_bar(length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}

/// One start: when its first byte and its exit status were there, in milliseconds from the request.
struct Start {
    first_byte: f64,
    exit: f64,
}

/// One figure.
#[derive(Serialize)]
struct Measure {
    name: &'static str,
    unit: &'static str,
    median: f64,
    p99: f64,
    n: usize,
    /// What was seen, in ascending order.
    values: Vec<f64>,
}

impl Measure {
    fn new(name: &'static str, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            name,
            unit: "ms",
            median: median(&values),
            p99: percentile(&values, 99),
            n: values.len(),
            values,
        }
    }
}

#[derive(Serialize)]
struct Latency {
    #[serde(flatten)]
    conditions: Conditions,
    /// What the containers ran.
    command: Vec<String>,
    measures: Vec<Measure>,
}

/// Something that is started in each round.
struct Probe<'a> {
    what: &'static str,
    names: [&'static str; 2],
    run: Box<dyn FnMut() -> anyhow::Result<Start> + 'a>,
    starts: Vec<Start>,
}

impl<'a> Probe<'a> {
    fn new(
        what: &'static str,
        names: [&'static str; 2],
        run: impl FnMut() -> anyhow::Result<Start> + 'a,
    ) -> Self {
        Self {
            what,
            names,
            run: Box::new(run),
            starts: Vec::new(),
        }
    }

    fn measures(&self) -> [Measure; 2] {
        let [first_byte, exit] = self.names;
        let values = |value: fn(&Start) -> f64| self.starts.iter().map(value).collect();
        [
            Measure::new(first_byte, values(|start| start.first_byte)),
            Measure::new(exit, values(|start| start.exit)),
        ]
    }
}

fn latency(options: &LatencyOptions) -> anyhow::Result<ExitCode> {
    let (template, conditions) = template(options.image.as_deref(), &options.machine)?;
    let command = match options.command.as_slice() {
        [] => vec!["echo".into(), WORD.into()],
        command => command.to_vec(),
    };
    let mut pool = Pool::new(&template, 1, Parking::Prefaulted, Confinement::Jailed)?;
    let mut probes = vec![
        Probe::new("a cold start", ["cold_first_byte", "cold_exit"], || {
            cold(&template, &command)
        }),
        Probe::new("a start from a pool", ["pool_first_byte", "pool_exit"], || {
            pooled(&mut pool, &command)
        }),
    ];
    if Path::new(PROGRAM).is_file() {
        let names = ["process_first_byte", "process_exit"];
        probes.insert(0, Probe::new("a process", names, process));
    }

    let rounds = DISCARDED + options.rounds;
    let bar = progress_bar(rounds.into()).with_message("rounds");
    for round in 0..rounds {
        for probe in &mut probes {
            std::thread::sleep(SETTLE);
            let start = (probe.run)().with_context(|| format!("cannot measure {}", probe.what))?;
            if round >= DISCARDED {
                probe.starts.push(start);
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let measures = probes.iter().flat_map(Probe::measures).collect();
    drop(probes);
    drop(pool);

    end_with_the_reader();
    let latency = Latency {
        conditions,
        command: command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect(),
        measures,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&latency)?);
    } else {
        latency.print();
    }
    Ok(ExitCode::SUCCESS)
}

impl Latency {
    fn print(&self) {
        println!("{}\nruns:  {}\n", self.conditions, self.command.join(" "));
        let values = || {
            self.measures
                .iter()
                .flat_map(|measure| measure.values.iter().copied())
        };
        let (low, high) = (
            values().fold(f64::MAX, f64::min),
            values().fold(f64::MIN_POSITIVE, f64::max),
        );
        let rows: Vec<Vec<String>> = self
            .measures
            .iter()
            .map(|measure| {
                vec![
                    label(measure.name),
                    format!("{:.2} ms", measure.median),
                    format!("{:.2} ms", measure.p99),
                    measure.n.to_string(),
                    histogram(&measure.values, low, high),
                ]
            })
            .collect();
        let scale = format!("{low:.2} TO {high:.2} MS, LOGARITHMIC");
        output::table(&["FROM THE REQUEST", "MEDIAN", "P99", "N", &scale], &rows);
    }
}

/// The name of a measure, for people.
fn label(name: &str) -> String {
    let (what, until) = name.split_once('_').unwrap_or((name, ""));
    let what = match what {
        "cold" => "cold clone",
        "pool" => "clone of a pool",
        other => other,
    };
    format!("{what}, to {}", until.replace('_', " "))
}

/// `fork`, `exec`, and what a small program does.
fn process() -> anyhow::Result<Start> {
    let start = Instant::now();
    let mut child = Command::new(PROGRAM)
        .arg(WORD)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {PROGRAM}"))?;
    let _prompt = Prompt::begin();
    let mut stdout = child.stdout.take().context("it has no standard output")?;
    let mut bytes = [0u8; 64];
    let count = stdout.read(&mut bytes)?;
    let first = Instant::now();
    let status = child.wait()?;
    let end = Instant::now();
    if count == 0 || !status.success() {
        bail!("{PROGRAM} wrote {count} bytes and ended with {status}");
    }
    Ok(Start {
        first_byte: ms(start, first),
        exit: ms(start, end),
    })
}

/// A container in a clone that is forked now, in this process.
fn cold(template: &Template, command: &[OsString]) -> anyhow::Result<Start> {
    let null = File::open("/dev/null").context("cannot open /dev/null")?;
    // Takes any amount without anybody reading meanwhile.
    let memory = rustix::fs::memfd_create("picovm-bench-output", rustix::fs::MemfdFlags::CLOEXEC);
    let mut output = File::from(memory.context("cannot make a file in memory")?);
    let start = Instant::now();
    let container = Container::start(template, &ContainerOptions::command(command))?;
    let prompt = Prompt::begin();
    container.wait_for_output(START_MAX)?;
    let first = Instant::now();
    let stdio = Stdio {
        stdin: null.as_fd(),
        stdout: output.as_fd(),
        stderr: null.as_fd(),
        wake: None,
        deadline: start.checked_add(START_MAX),
    };
    let mut late = false;
    let exit = container.attach(stdio, &mut |_| {
        late = true;
        Some(Interruption::Kill(9))
    })?;
    let end = Instant::now();
    drop(prompt);
    if late {
        bail!("the command still ran after {} s", START_MAX.as_secs());
    }
    check(&exit, output.seek(SeekFrom::End(0))? > 0)?;
    Ok(Start {
        first_byte: ms(start, first),
        exit: ms(start, end),
    })
}

/// A container in a clone that was forked before, in a VMM process of its own.
fn pooled(pool: &mut Pool, command: &[OsString]) -> anyhow::Result<Start> {
    pool.refill()?;
    pool.wait_until_full(START_MAX)?;
    std::thread::sleep(PARKED);

    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.context("cannot open /dev/null")?;
    let options = ContainerOptions::command(command);
    let start = Instant::now();
    let (mut output, theirs) = std::io::pipe().context("cannot create a pipe")?;
    let container = pool.start(&options, [null.as_fd(), theirs.as_fd(), null.as_fd()])?;
    drop(theirs);
    let prompt = Prompt::begin();
    let mut first = None;
    // The end of its output comes with its exit status.
    while read(&mut output, start)? > 0 {
        first.get_or_insert_with(Instant::now);
    }
    let exit = container.wait()?;
    let end = Instant::now();
    drop(prompt);
    check(&exit, first.is_some())?;
    Ok(Start {
        first_byte: ms(start, first.unwrap_or(end)),
        exit: ms(start, end),
    })
}

/// Reads once what there is; 0 bytes at the end.
fn read(output: &mut PipeReader, start: Instant) -> anyhow::Result<usize> {
    let rest = Timespec::try_from(START_MAX.saturating_sub(start.elapsed()))?;
    if poll(&mut [PollFd::new(output, PollFlags::IN)], Some(&rest))? == 0 {
        bail!("the command still ran after {} s", START_MAX.as_secs());
    }
    let mut bytes = [0u8; 16 << 10];
    Ok(output.read(&mut bytes)?)
}

fn check(exit: &ContainerExit, has_output: bool) -> anyhow::Result<()> {
    match exit {
        ContainerExit::NotStarted(failure) => {
            bail!(
                "the command cannot be started: cannot {}: {}",
                printable(&failure.attempted),
                printable(&failure.message)
            )
        }
        ContainerExit::Code(0) if has_output => Ok(()),
        ContainerExit::Code(0) => {
            bail!("the command writes nothing to its standard output, so there is no first byte")
        }
        other => bail!("the command ended with status {}, not 0", other.shell_status()),
    }
}

#[derive(Serialize)]
struct DensityReport {
    #[serde(flatten)]
    conditions: Conditions,
    #[serde(flatten)]
    density: Density,
}

fn density(options: &DensityOptions) -> anyhow::Result<ExitCode> {
    let (template, conditions) = template(options.image.as_deref(), &options.machine)?;
    let bar = progress_bar(options.clones.into());
    let parking = if options.bare {
        Parking::Bare
    } else {
        Parking::Prefaulted
    };
    let measured = Density::measure(&template, options.clones as usize, parking, &mut |progress| {
        let (what, count) = match progress {
            DensityProgress::Parked(count) => ("parking", count),
            DensityProgress::Live(count) => ("starting", count),
            DensityProgress::Answered(count) => ("ending", count),
        };
        bar.set_message(what);
        bar.set_position(count as u64);
    });
    bar.finish_and_clear();
    let density = measured?;

    end_with_the_reader();
    let left = density.processes_left;
    let report = DensityReport { conditions, density };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    if left > 0 {
        bail!("{left} VMM processes did not end");
    }
    Ok(ExitCode::SUCCESS)
}

impl DensityReport {
    fn print(&self) {
        /// So many starts at the beginning and at the end are shown.
        const STARTS: usize = 10;
        let density = &self.density;
        let bytes = |kib: f64| output::size((kib.max(0.0) * 1024.0) as u64);
        let start = |starts: &mut dyn Iterator<Item = &f64>| {
            let mut starts: Vec<f64> = starts.copied().collect();
            starts.sort_by(f64::total_cmp);
            format!("{:.2} ms", median(&starts))
        };
        let starts = &density.start_ms;
        let some = starts.len().min(STARTS);
        println!("{}\n", self.conditions);
        let rows = [
            ("a parked clone takes".to_owned(), bytes(density.parked_kib)),
            ("a live clone takes".to_owned(), bytes(density.live_kib)),
            ("  PSS of its VMM process".to_owned(), bytes(density.pss_kib)),
            ("  pages of its own".to_owned(), bytes(density.owned_kib)),
            ("  pages shared with others".to_owned(), bytes(density.shared_kib)),
            (
                format!("median of the first {some} starts"),
                start(&mut starts.iter().take(some)),
            ),
            (
                format!("median of the last {some}"),
                start(&mut starts.iter().rev().take(some)),
            ),
            (
                "starts, over live clones".to_owned(),
                bars(&means(starts, COLUMNS)),
            ),
            (
                "all answer and end in".to_owned(),
                format!("{:.1} ms", density.answer_all_ms),
            ),
            (
                "memory left behind by all".to_owned(),
                format!("{} KiB", density.left_kib),
            ),
            (
                "VMM processes left behind".to_owned(),
                density.processes_left.to_string(),
            ),
        ];
        let rows: Vec<Vec<String>> = rows.into_iter().map(|(what, value)| vec![what, value]).collect();
        output::table(&["CLONES", &density.clones.to_string()], &rows);
    }
}

/// How many values are where on a logarithmic scale from `low` to `high`.
fn histogram(values: &[f64], low: f64, high: f64) -> String {
    let width = (high / low).ln().max(f64::MIN_POSITIVE);
    let mut counts = [0.0; COLUMNS];
    for value in values {
        let column = ((value / low).ln() / width * COLUMNS as f64) as usize;
        if let Some(count) = counts.get_mut(column.min(COLUMNS - 1)) {
            *count += 1.0;
        }
    }
    bars(&counts)
}

/// Means of `columns` parts of about the same length; of fewer if there are not as many values.
fn means(values: &[f64], columns: usize) -> Vec<f64> {
    let columns = columns.min(values.len());
    (0..columns)
        .filter_map(|column| {
            let part = values.get(column * values.len() / columns..(column + 1) * values.len() / columns)?;
            Some(part.iter().sum::<f64>() / part.len() as f64)
        })
        .collect()
}

/// A bar for each value, the greatest one the highest; none for 0.
fn bars(values: &[f64]) -> String {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    values
        .iter()
        .filter_map(|value| BARS.get((value / most * 8.0).ceil() as usize))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_has_its_values_where_they_lie() {
        let text: Vec<char> = histogram(&[1.0, 1.0, 100.0, 10.1], 1.0, 100.0).chars().collect();
        assert_eq!(text.len(), COLUMNS);
        assert_eq!(
            (text[0], text[COLUMNS / 2], text[COLUMNS - 1], text[1]),
            ('█', '▄', '▄', ' ')
        );
        assert_eq!(histogram(&[2.0], 2.0, 2.0).trim_end(), "█");
    }

    #[test]
    fn a_curve_has_as_many_columns_as_there_are_values_at_most() {
        assert_eq!(means(&[1.0, 3.0, 5.0, 7.0], 2), [2.0, 6.0]);
        assert_eq!(means(&[1.0, 2.0], 32), [1.0, 2.0]);
        assert!(means(&[], 32).is_empty());
        assert_eq!(bars(&[1.0, 8.0]), "▁█");
    }

    #[test]
    fn measures_have_names_for_people() {
        assert_eq!(label("pool_first_byte"), "clone of a pool, to first byte");
        assert_eq!(label("process_exit"), "process, to exit");
    }
}

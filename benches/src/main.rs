//! Latency and memory of boot, freeze, fork and run: one program that measures everything by name, prints a table for
//! people and writes one JSON file with plots beside it. What the figures mean is in `docs/performance.md`.
//!
//! Everything that is read while the clock runs lies in a directory of its own ([`workspace`]), so that no disk and
//! no shared file system is measured.

mod boot;
mod clones;
mod cloud_hypervisor;
mod counts;
mod density;
mod firecracker;
mod floor;
mod guest;
mod host;
mod oci;
mod peer;
mod plots;
mod process;
mod report;
mod rounds;
mod scaling;
mod start;
mod targets;
mod warm;
mod workspace;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

use report::Report;
use rounds::Selection;
use workspace::Workspace;

/// Measures boot, freeze, fork and run.
///
/// PICOVM_BENCH_FIRECRACKER and PICOVM_BENCH_CLOUD_HYPERVISOR may name binaries to compare with.
#[derive(Parser)]
#[command(name = "picovm-bench", version)]
struct Arguments {
    /// Where the figures go as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench/report.json")]
    json: PathBuf,
    /// Measure only what begins with one of these names, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Rounds that count, of starts; of boots it is a fifth of them
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// Containers that are started one after the other, to see how long that can be sustained
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    starts: u32,
    /// Clones whose memory is measured
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    clones: u32,
    /// Take in the measures of another report
    #[arg(long, value_name = "FILE")]
    take_in: Vec<PathBuf>,
    /// End with an error if a count is more than a tenth over what this JSON file says
    #[arg(long, value_name = "FILE")]
    budgets: Option<PathBuf>,
}

fn main() {
    // This very binary is also what is measured as a process: before anything that costs.
    if let Some(status) = boot::as_process().or_else(workspace::as_static_program) {
        std::process::exit(status);
    }
    if let Err(error) = run(&Arguments::parse()) {
        eprintln!("error: {error:#}");
        std::process::exit(1);
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let selection = Selection::new(&arguments.only);
    let workspace = Workspace::prepare()?;
    let mut report = Report::new(&workspace)?;

    boot::measure(&workspace, &selection, (arguments.rounds / 5).max(1), &mut report)?;
    let template = start::measure(&workspace, &selection, arguments.rounds, &mut report)?;
    let many = ((arguments.rounds / 3).max(1), arguments.starts);
    scaling::measure(&workspace, &template, &selection, many, &mut report)?;
    warm::measure(&workspace, &selection, (arguments.rounds / 5).max(1), &mut report)?;
    counts::measure(&template, &selection, (arguments.rounds / 5).max(1), &mut report)?;
    // Memory needs no particular clock, and hundreds of clones take long where instructions are counted.
    if workspace.has_shell
        && (selection.is_named() || report.clock == host::Clock::Time)
        && let Err(error) = density::measure(&template, arguments.clones, &selection, &mut report)
    {
        // The other figures are not lost for it.
        let failure = format!("density: {error:#}");
        eprintln!("warning: {failure}");
        report.failures.push(failure);
    }

    for path in &arguments.take_in {
        report.take_in(path)?;
    }
    if report.measures.is_empty() {
        anyhow::bail!(
            "--only {} names nothing that is measured",
            arguments.only.join(",")
        );
    }
    report.targets = targets::judge(&report);
    print!("{}", report.table());
    report
        .write(&arguments.json)
        .with_context(|| format!("cannot write the figures to {}", arguments.json.display()))?;
    match plots::draw(&report, report::directory_of(&arguments.json)) {
        Ok(plots) => plots.iter().for_each(|path| println!("plot: {}", path.display())),
        Err(error) => eprintln!("warning: not drawn: {error:#}"),
    }
    match &arguments.budgets {
        Some(budgets) => counts::check(&report, budgets),
        None => Ok(()),
    }
}

//! Rounds: every probe of a group in turn, again and again, so that what drifts drifts for all of them alike.

use std::time::Duration;

use anyhow::Context;

use crate::report::{Report, Unit};

/// Lets what the last probe left behind (the teardown of a VM waits for grace periods) end before the next begins.
const SETTLE: Duration = Duration::from_millis(50);

/// How often something may fail in a run before it is given up. What failed is told and done again: a guest that hangs once in
/// hundreds of boots is to be seen in the report and not to cost all the other figures.
pub const FAILURES_MAX: usize = 3;

/// Does something, again if it fails, and notes each failure in the report.
pub fn persist<T>(
    what: &str,
    report: &mut Report,
    attempts: usize,
    mut attempt: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut failures = 0;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if failures + 1 < attempts => {
                failures += 1;
                let failure = format!("{what}: {error:#}");
                eprintln!("warning: done again: {failure}");
                report.failures.push(failure);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot measure {what}")),
        }
    }
}

/// Notes why something is left out; the other figures are not lost for it.
pub fn leave_out(report: &mut Report, error: &anyhow::Error) {
    let failure = format!("not measured: {error:#}");
    eprintln!("warning: {failure}");
    report.failures.push(failure);
}

/// Which measures are wanted.
pub struct Selection {
    prefixes: Vec<String>,
}

impl Selection {
    /// Those that begin with one of `prefixes`; all if there are none.
    pub fn new(prefixes: &[String]) -> Self {
        Self {
            prefixes: prefixes.to_vec(),
        }
    }

    /// Whether some are named.
    pub fn is_named(&self) -> bool {
        !self.prefixes.is_empty()
    }

    pub fn has(&self, name: &str) -> bool {
        self.prefixes.is_empty()
            || self
                .prefixes
                .iter()
                .any(|prefix| name.starts_with(prefix.as_str()))
    }

    /// Whether anything that begins with `prefix` may be wanted.
    pub fn has_any_of(&self, prefix: &str) -> bool {
        self.prefixes.is_empty()
            || self
                .prefixes
                .iter()
                .any(|wanted| wanted.starts_with(prefix) || prefix.starts_with(wanted.as_str()))
    }
}

/// Something that is done once in each round and gives one value for each of its measures.
pub struct Probe<'a> {
    measures: Vec<(String, Unit)>,
    run: Box<dyn FnMut() -> anyhow::Result<Vec<f64>> + 'a>,
}

impl<'a> Probe<'a> {
    /// A probe of these measures; `run` gives their values in the same order.
    pub fn new<const N: usize>(
        measures: [(&str, Unit); N],
        mut run: impl FnMut() -> anyhow::Result<[f64; N]> + 'a,
    ) -> Self {
        Self {
            measures: measures.map(|(name, unit)| (name.to_owned(), unit)).into(),
            run: Box::new(move || run().map(Vec::from)),
        }
    }

    /// The same probe with `prefix` before the name of each measure.
    pub fn named(mut self, prefix: &str) -> Self {
        for (name, _) in &mut self.measures {
            name.insert_str(0, prefix);
        }
        self
    }
}

/// Runs the probes that are wanted for `discarded` rounds that do not count and `rounds` that do.
pub fn measure(
    group: &str,
    mut probes: Vec<Probe<'_>>,
    selection: &Selection,
    (discarded, rounds): (u32, u32),
    report: &mut Report,
) -> anyhow::Result<()> {
    probes.retain(|probe| probe.measures.iter().any(|(name, _)| selection.has(name)));
    if probes.is_empty() {
        return Ok(());
    }
    eprintln!("{group}: {discarded} + {rounds} rounds of {}", probes.len());
    let mut series: Vec<Vec<Vec<f64>>> = probes
        .iter()
        .map(|probe| vec![Vec::new(); probe.measures.len()])
        .collect();
    for round in 0..discarded + rounds {
        for (probe, series) in probes.iter_mut().zip(&mut series) {
            if probe.measures.is_empty() {
                continue;
            }
            std::thread::sleep(SETTLE);
            let Probe { measures, run } = probe;
            let name = measures.first().map_or("", |(name, _)| name);
            let values = match persist(name, report, FAILURES_MAX, run) {
                Ok(values) => values,
                Err(error) => {
                    leave_out(report, &error);
                    measures.clear();
                    continue;
                }
            };
            if round >= discarded {
                for (series, value) in series.iter_mut().zip(values) {
                    series.push(value);
                }
            }
        }
    }
    for (probe, series) in probes.into_iter().zip(series) {
        for ((name, unit), values) in probe.measures.into_iter().zip(series) {
            if selection.has(&name) {
                report.add(name, unit, values);
            }
        }
    }
    Ok(())
}

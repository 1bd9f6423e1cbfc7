//! Density: what parked and live clones take of the host's memory, as the engine measures it.

use picovm_engine::{Density, DensityPoint, Parking};
use picovm_vmm::Template;

use crate::report::{Report, Unit};
use crate::rounds::Selection;

/// So many starts at the beginning and at the end are looked at apart.
const STARTS: usize = 10;

/// Measures the density of `clones` clones, and adds figures and curves.
pub fn measure(
    template: &Template,
    clones: u32,
    selection: &Selection,
    report: &mut Report,
) -> anyhow::Result<()> {
    let names = [
        "memory_parked",
        "memory_parked_bare",
        "memory_live",
        "memory_pss",
        "start_first",
        "start_last",
        "answer_all",
        "memory_left",
    ];
    if !names.iter().any(|name| selection.has(name)) {
        return Ok(());
    }
    eprintln!("density: {clones} clones");
    let bare = Density::measure(template, clones as usize, Parking::Bare, &mut |_| {})?;
    report.add("memory_parked_bare".into(), Unit::Kib, vec![bare.parked_kib]);
    let density = Density::measure(template, clones as usize, Parking::Prefaulted, &mut |_| {})?;
    if density.processes_left > 0 {
        let failure = format!("density: {} VMM processes did not end", density.processes_left);
        report.failures.push(failure);
    }

    let first: Vec<f64> = density.start_ms.iter().copied().take(STARTS).collect();
    let last: Vec<f64> = density.start_ms.iter().rev().copied().take(STARTS).collect();
    let left = density.left_kib as f64 / f64::from(clones);
    report.add("memory_parked".into(), Unit::Kib, vec![density.parked_kib]);
    report.add("memory_live".into(), Unit::Kib, vec![density.live_kib]);
    report.add("memory_pss".into(), Unit::Kib, vec![density.pss_kib]);
    report.add("start_first".into(), Unit::Ms, first);
    report.add("start_last".into(), Unit::Ms, last);
    report.add("answer_all".into(), Unit::Ms, vec![density.answer_all_ms]);
    report.add("memory_left".into(), Unit::Kib, vec![left]);

    let starts = density.start_ms.iter().zip(0u32..);
    let starts = starts.map(|(ms, live)| [f64::from(live), *ms]).collect();
    let curves = [
        ("start_ms_by_live_clones", starts),
        ("parked_kib_by_clones", points(&density.parked_curve)),
        ("live_kib_by_clones", points(&density.live_curve)),
    ];
    report
        .curves
        .extend(curves.map(|(name, points)| (name.to_owned(), points)));
    Ok(())
}

fn points(curve: &[DensityPoint]) -> Vec<[f64; 2]> {
    curve
        .iter()
        .map(|point| [point.clones as f64, point.kib as f64])
        .collect()
}

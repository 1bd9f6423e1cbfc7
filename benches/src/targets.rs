//! What picovm wants of itself: each target is a limit on one figure, or on how one compares with another of the same run,
//! and is told with every report, met or missed. Why one is missed, and what the limit is, stands beside it.

use serde::Serialize;

use crate::report::Report;

/// What is compared with a limit.
#[derive(Clone, Copy)]
enum Figure {
    /// A measure by itself, in its own unit.
    Of(&'static str, &'static str),
    /// One measure by another.
    Ratio(&'static str, &'static str),
    /// The largest of some measures by the smallest.
    Spread(&'static [&'static str]),
}

/// A target as it was set.
struct Wanted {
    what: &'static str,
    figure: Figure,
    most: f64,
    /// Where the rest goes and what the limit is, for those who see it missed.
    limit: &'static str,
}

/// A target and what became of it in one run.
#[derive(Debug, PartialEq, Serialize)]
pub struct Target {
    /// What is limited.
    pub what: &'static str,
    /// How it is computed from the measures.
    pub of: String,
    /// `x`, or the unit of the measure.
    pub unit: &'static str,
    /// The limit: at most this.
    pub most: f64,
    /// The figure of this run.
    pub figure: f64,
    pub met: bool,
    /// If it is missed: where the rest goes, and what the limit is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'static str>,
}

const FAULTS: &str = "a clone has page tables of its own, second stage included: some 460 faults at 10 us and 220 copied pages \
at 12 us are most of a cold start";
const EXEC: &str = "execve and the program are the same work as on the host, and each CPUID instruction of a static C library \
is an exit; less is possible only with the program started before the freeze";
const MEMORY: &str = "the pages that a start writes are the clone's own; beside them are page tables of both stages, kernel \
stacks, and what KVM keeps for a machine";

const WANTED: &[Wanted] = &[
    Wanted {
        what: "fork to the first guest instruction",
        figure: Figure::Ratio("fork_first_instruction", "kvm_floor"),
        most: 1.3,
        limit: "devices, threads and a whole state are set up, where the floor loads three registers",
    },
    Wanted {
        what: "parked clone to the first guest instruction",
        figure: Figure::Ratio("parked_first_instruction", "kvm_floor"),
        most: 0.1,
        limit: "two wake-ups of a thread and one entry",
    },
    Wanted {
        what: "cold fork to first byte",
        figure: Figure::Ratio("fork_first_byte", "kvm_floor"),
        most: 3.0,
        limit: FAULTS,
    },
    Wanted {
        what: "parked clone to first byte, by a process",
        figure: Figure::Ratio("parked_first_byte", "process_first_byte"),
        most: 0.45,
        limit: EXEC,
    },
    Wanted {
        what: "start from a pool through the engine, by a process",
        figure: Figure::Ratio("engine_first_byte", "process_first_byte"),
        most: 0.8,
        limit: "as from a parked clone, and a message with three descriptors to another process",
    },
    Wanted {
        what: "`picovm run` with a pool, by a bare cold clone",
        figure: Figure::Ratio("pooled_run_first_byte", "fork_first_byte"),
        most: 1.3,
        limit: "a command, its container's record, its monitor and a start from a pool",
    },
    Wanted {
        what: "`picovm run` with nothing prepared, by a bare cold clone",
        figure: Figure::Ratio("run_first_byte", "fork_first_byte"),
        most: 1.3,
        limit: "the command itself, its container's record, its monitor and its VMM process are three processes, and a jail with nothing \
                prepared is a network namespace and a cgroup that have to be made",
    },
    Wanted {
        what: "`picovm run`, by Firecracker's restore",
        figure: Figure::Ratio("run_first_byte", "firecracker_restore"),
        most: 0.5,
        limit: "a cold start is less than half of it, the jail with nothing prepared a fourth; Firecracker's figure ends before any \
                container is started, and is without its jailer",
    },
    Wanted {
        what: "`picovm run`, by `crun run`",
        figure: Figure::Ratio("run_first_byte", "crun_first_byte"),
        most: 0.12,
        limit: "a cold start alone is a fifth of what crun takes",
    },
    Wanted {
        what: "what the jail adds to a cold start by a fork server",
        figure: Figure::Of("jail_cold", "ms"),
        most: 0.6,
        limit: "a cgroup is charged for each page that a start takes; all else is done before the request",
    },
    Wanted {
        what: "what the jail adds to a start from a pool",
        figure: Figure::Of("jail_pooled", "ms"),
        // Nothing, as far as the difference of two figures that each repeat to a hundredth can tell.
        most: 0.03,
        limit: "in a pool all of it is done ahead; what is left is memory, which is charged to a cgroup",
    },
    Wanted {
        what: "memory of a live container",
        figure: Figure::Of("memory_live", "KiB"),
        most: 768.0,
        limit: MEMORY,
    },
    Wanted {
        what: "memory of a parked clone, prefaulted",
        figure: Figure::Of("memory_parked", "KiB"),
        most: 768.0,
        limit: MEMORY,
    },
    Wanted {
        what: "memory of a parked clone, bare",
        figure: Figure::Of("memory_parked_bare", "KiB"),
        most: 256.0,
        limit: "a process, its page tables, four kernel stacks and KVM's memory for a machine",
    },
    Wanted {
        what: "pages of its own at the exit of `echo`",
        figure: Figure::Of("owned_pages", "pages"),
        most: 100.0,
        limit: "the guest kernel's slabs and stacks for the new process, page tables, and the program's own data",
    },
    Wanted {
        what: "100 forked together, by the floor",
        figure: Figure::Ratio("fork_100_together", "kvm_floor"),
        most: 400.0,
        limit: FAULTS,
    },
    Wanted {
        what: "100 started together from a pool, by a process",
        figure: Figure::Ratio("pool_100_together", "process_first_byte"),
        most: 80.0,
        limit: "as one from the engine; on one CPU, clones that have ended are taken down meanwhile",
    },
    Wanted {
        what: "the last start of many live clones, by the first",
        figure: Figure::Ratio("start_last", "start_first"),
        most: 1.25,
        limit: "live guests wake now and then, on the one CPU of the host on which this is measured",
    },
    Wanted {
        what: "two vCPUs, cold, by one",
        figure: Figure::Ratio("fork_first_byte_2cpus", "fork_first_byte"),
        most: 1.4,
        limit: "the guest's CPUs wait for each other on the one CPU of the host",
    },
    Wanted {
        what: "two vCPUs, parked, by one",
        figure: Figure::Ratio("parked_first_byte_2cpus", "parked_first_byte"),
        most: 1.4,
        limit: "the guest's CPUs wait for each other on the one CPU of the host",
    },
    Wanted {
        what: "boot to the base freeze point, by Firecracker's to user space",
        figure: Figure::Ratio("boot_base_process", "firecracker_user_space"),
        most: 0.5,
        limit: "nine tenths of it are the kernel itself, the same in both",
    },
    Wanted {
        what: "cold start, from 64 MiB to 4 GiB",
        figure: Figure::Spread(&[
            "fork_first_byte_64m",
            "fork_first_byte",
            "fork_first_byte_1024m",
            "fork_first_byte_4096m",
        ]),
        most: 1.05,
        limit: "what of the guest lies in one block of 2 MiB depends on where its kernel puts it",
    },
    Wanted {
        what: "parked start, from 64 MiB to 4 GiB",
        figure: Figure::Spread(&[
            "parked_first_byte_64m",
            "parked_first_byte",
            "parked_first_byte_1024m",
            "parked_first_byte_4096m",
        ]),
        most: 1.05,
        limit: "from 1 GiB on the guest itself runs 0.3 ms longer with no exit more; why is not known",
    },
];

impl Figure {
    /// The figure, if every measure that it needs was made.
    fn of(self, report: &Report) -> Option<f64> {
        let value = match self {
            Self::Of(name, _) => report.median(name)?,
            Self::Ratio(name, by) => report.median(name)? / report.median(by)?,
            Self::Spread(names) => {
                let figures: Option<Vec<f64>> = names.iter().map(|name| report.median(name)).collect();
                let figures = figures?;
                let most = figures.iter().copied().fold(f64::MIN, f64::max);
                most / figures.iter().copied().fold(f64::MAX, f64::min)
            }
        };
        value.is_finite().then_some(value)
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Of(_, unit) => unit,
            Self::Ratio(..) | Self::Spread(_) => "x",
        }
    }

    fn formula(self) -> String {
        match self {
            Self::Of(name, _) => name.to_owned(),
            Self::Ratio(name, by) => format!("{name} / {by}"),
            Self::Spread(names) => format!("largest / smallest of {}", names.join(", ")),
        }
    }
}

/// The targets whose measures a report has.
pub fn judge(report: &Report) -> Vec<Target> {
    WANTED
        .iter()
        .filter_map(|wanted| {
            let figure = wanted.figure.of(report)?;
            let met = figure <= wanted.most;
            Some(Target {
                what: wanted.what,
                of: wanted.figure.formula(),
                unit: wanted.figure.unit(),
                most: wanted.most,
                figure,
                met,
                why: (!met).then_some(wanted.limit),
            })
        })
        .collect()
}

/// The table for people.
pub fn table(targets: &[Target]) -> String {
    if targets.is_empty() {
        return String::new();
    }
    let mut table = format!("\n{:<64} {:>9} {:>9}\n", "target", "at most", "figure");
    for target in targets {
        let digits = if matches!(target.unit, "x" | "ms") { 3 } else { 0 };
        table.push_str(&format!(
            "{:<64} {:>9.digits$} {:>9.digits$} {:<5} {}\n",
            target.what,
            target.most,
            target.figure,
            target.unit,
            if target.met { "met" } else { "missed" }
        ));
        if let Some(why) = target.why {
            table.push_str(&format!("    {why}\n"));
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Unit;

    fn report(measures: &[(&str, f64)]) -> Report {
        let mut report = Report::empty();
        for (name, value) in measures {
            report.add((*name).to_owned(), Unit::Ms, vec![*value]);
        }
        report
    }

    #[test]
    fn only_what_was_measured_is_judged() {
        assert_eq!(judge(&report(&[("fork_first_byte", 2.0)])), []);
        assert_eq!(table(&[]), "");
        // Nothing by nothing is no figure.
        assert_eq!(
            judge(&report(&[("fork_first_byte", 0.0), ("kvm_floor", 0.0)])),
            []
        );
    }

    #[test]
    fn a_target_is_met_at_its_limit_and_missed_with_a_reason_beyond() {
        let met = judge(&report(&[("fork_first_byte", 3.0), ("kvm_floor", 1.0)]));
        assert_eq!(met.len(), 1);
        assert!(met[0].met && met[0].why.is_none());
        let missed = judge(&report(&[("fork_first_byte", 3.1), ("kvm_floor", 1.0)]));
        assert!(!missed[0].met);
        let told = table(&missed);
        assert!(
            told.contains("3.100") && told.contains("missed") && told.contains(FAULTS),
            "{told}"
        );
    }

    #[test]
    fn how_flat_it_is_needs_every_size() {
        let mut sizes = vec![
            ("fork_first_byte_64m", 10.0),
            ("fork_first_byte", 10.2),
            ("fork_first_byte_1024m", 10.1),
        ];
        assert_eq!(judge(&report(&sizes)), []);
        sizes.push(("fork_first_byte_4096m", 10.4));
        let judged = judge(&report(&sizes));
        assert!((judged[0].figure - 1.04).abs() < 1e-9 && judged[0].met);
    }
}

//! The figures: medians and 99th percentiles, as JSON and as a table.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use picovm_engine::figures::{median, percentile};
use serde::{Deserialize, Serialize};

use crate::host;
use crate::targets::{self, Target};
use crate::workspace::Workspace;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Returns of vCPUs to user space.
    Exits,
    /// Pages of 4 KiB.
    Pages,
    /// 1,024 bytes.
    Kib,
    /// How often something happened.
    Count,
    /// Times a second.
    #[serde(rename = "per second")]
    PerSecond,
}

/// One figure.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measure {
    pub name: String,
    pub unit: Unit,
    pub median: f64,
    p99: f64,
    n: usize,
    /// What was seen, in ascending order.
    pub values: Vec<f64>,
}

/// All of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Processor, number of CPUs, kernel.
    pub host: String,
    /// What a millisecond is.
    pub clock: host::Clock,
    /// Commit of the sources, if this was started in their working tree.
    commit: Option<String>,
    /// Programs that are compared with, and what they say their version is.
    peers: BTreeMap<String, String>,
    /// What failed and was done again.
    pub failures: Vec<String>,
    /// The figures.
    pub measures: Vec<Measure>,
    /// How something grows with something else: points `[x, y]` by name, `y` in the unit that the name says.
    pub curves: BTreeMap<String, Vec<[f64; 2]>>,
    /// What a start consists of: by its name, the steps of the clone path in order with the milliseconds of each.
    pub steps: BTreeMap<String, Vec<(String, f64)>>,
    /// What picovm wants of itself, and what became of it.
    pub targets: Vec<Target>,
}

impl Report {
    /// An empty report.
    pub fn new(workspace: &Workspace) -> anyhow::Result<Self> {
        Ok(Self {
            host: host::describe(),
            clock: host::clock(),
            commit: host::commit(),
            peers: workspace
                .peers
                .iter()
                .map(|(peer, binary)| (peer.key().to_owned(), binary.version.clone()))
                .collect(),
            failures: Vec::new(),
            measures: Vec::new(),
            curves: BTreeMap::new(),
            steps: BTreeMap::new(),
            targets: Vec::new(),
        })
    }

    /// Adds a measure by the values that were seen.
    pub fn add(&mut self, name: String, unit: Unit, mut values: Vec<f64>) {
        values.sort_by(f64::total_cmp);
        self.measures.push(Measure {
            name,
            unit,
            median: median(&values),
            p99: percentile(&values, 99),
            n: values.len(),
            values,
        });
    }

    /// Takes in measures and curves of another report: of memory, say, which needs no particular clock.
    pub fn take_in(&mut self, path: &Path) -> anyhow::Result<()> {
        #[derive(Deserialize)]
        struct Part {
            measures: Vec<Measure>,
            curves: BTreeMap<String, Vec<[f64; 2]>>,
            failures: Vec<String>,
        }
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let part: Part =
            serde_json::from_slice(&bytes).with_context(|| format!("{} is no report", path.display()))?;
        self.measures.extend(part.measures);
        self.curves.extend(part.curves);
        self.failures.extend(part.failures);
        Ok(())
    }

    /// The median of a measure.
    pub fn median(&self, name: &str) -> Option<f64> {
        let measure = self.measures.iter().find(|measure| measure.name == name)?;
        Some(measure.median)
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut table = format!(
            "host: {}\nclock: {}\ncommit: {}\n",
            self.host,
            self.clock,
            self.commit.as_deref().unwrap_or("unknown")
        );
        for (peer, version) in &self.peers {
            table.push_str(&format!("{peer}: {version}\n"));
        }
        table.push_str(&format!(
            "\n{:<32} {:>12} {:>12} {:>5}\n",
            "", "median", "p99", "n"
        ));
        for measure in &self.measures {
            let (digits, unit) = match measure.unit {
                Unit::Ms => (3, "ms"),
                Unit::Exits => (0, "exits"),
                Unit::Pages => (0, "pages"),
                Unit::Kib => (0, "KiB"),
                Unit::Count => (0, ""),
                Unit::PerSecond => (1, "/s"),
            };
            table.push_str(&format!(
                "{:<32} {:>12.digits$} {:>12.digits$} {:>5}  {unit}\n",
                measure.name, measure.median, measure.p99, measure.n
            ));
        }
        table.push_str(&targets::table(&self.targets));
        for failure in &self.failures {
            table.push_str(&format!(
                "failed: {}\n",
                failure.lines().next().unwrap_or_default()
            ));
        }
        table
    }

    /// Writes the JSON file, as a whole or not at all.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        write_whole(path, &json)
    }
}

#[cfg(test)]
impl Report {
    /// A report of nowhere, for tests.
    pub fn empty() -> Self {
        Self {
            host: "a host, 1 CPU, Linux 6.12.0".into(),
            clock: host::Clock::Instructions,
            commit: None,
            peers: BTreeMap::new(),
            failures: Vec::new(),
            measures: Vec::new(),
            curves: BTreeMap::new(),
            steps: BTreeMap::new(),
            targets: Vec::new(),
        }
    }
}

/// Directory that a file lies in.
pub fn directory_of(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Writes a file that all may read, and its directory, as a whole or not at all.
pub fn write_whole(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let directory = directory_of(path);
    std::fs::create_dir_all(directory)?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    std::io::Write::write_all(&mut file, content)?;
    // Temporary files are for their maker alone; a report is for all.
    std::fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.persist(path)?;
    Ok(())
}

//! `picovm top` and `picovm stats`.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use chrono::{DateTime, Local, Utc};
use picovm_engine::containers::{Containers, Record, Status};
use picovm_engine::{EngineError, Helper, Store, Task, Usage};
use serde_json::{Value, json};

use super::arguments::{StatsOptions, TopOptions};
use crate::format::Format;
use crate::output;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// What stands for what is not known.
const UNKNOWN: &str = "--";

/// Columns of `ps`: their names, headings, and what is in them.
type Column = (&'static str, &'static str, fn(&Task) -> String);
const COLUMNS: [Column; 15] = [
    ("user", "USER", |task| printed(&task.user)),
    ("uid", "UID", |task| printed(&task.user)),
    ("pid", "PID", |task| task.pid.to_string()),
    ("ppid", "PPID", |task| task.parent.to_string()),
    ("c", "C", |task| share(task).to_string()),
    ("pcpu", "%CPU", |task| share(task).to_string()),
    ("stat", "STAT", |task| char::from(task.state).to_string()),
    ("stime", "STIME", started),
    ("tty", "TTY", terminal),
    ("time", "TIME", |task| clock(task.cpu_ms / 1000)),
    ("rss", "RSS", |task| (task.resident >> 10).to_string()),
    ("nlwp", "NLWP", |task| task.threads.to_string()),
    ("comm", "COMMAND", |task| {
        let line = printed(&task.command);
        let program = line.split(' ').next().unwrap_or_default();
        program.rsplit('/').next().unwrap_or_default().to_owned()
    }),
    ("cmd", "CMD", |task| printed(&task.command)),
    ("args", "COMMAND", |task| printed(&task.command)),
];
/// Those of `ps -ef`, which Docker asks for.
const FULL: [&str; 8] = ["uid", "pid", "ppid", "c", "stime", "tty", "time", "cmd"];

pub fn top(options: &TopOptions) -> anyhow::Result<ExitCode> {
    let columns = columns(&options.ps)?;
    let containers = Store::open_default()?.containers()?;
    let record = containers.find(&options.container)?;
    let tasks: Vec<Task> = containers
        .connect(&record)?
        .query("list the processes", Helper::Tasks)?;
    let headings: Vec<&str> = columns.iter().map(|(_, heading, _)| *heading).collect();
    let rows: Vec<Vec<String>> = tasks
        .iter()
        .map(|task| columns.iter().map(|(_, _, show)| show(task)).collect())
        .collect();
    output::table(&headings, &rows);
    Ok(ExitCode::SUCCESS)
}

/// The columns that options of `ps` ask for.
fn columns(options: &[String]) -> anyhow::Result<Vec<&'static Column>> {
    let mut wanted: Vec<String> = Vec::new();
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let list = match option.strip_prefix('-').and_then(|rest| rest.split_once('o')) {
            Some((_, "")) => options.next().map_or("", String::as_str),
            Some((_, list)) => list,
            None => continue,
        };
        wanted.extend(list.split(',').map(str::to_owned));
    }
    let names: Vec<&str> = match wanted.is_empty() {
        true => FULL.to_vec(),
        false => wanted.iter().map(String::as_str).collect(),
    };
    names
        .into_iter()
        .map(|name| match COLUMNS.iter().find(|(known, ..)| *known == name) {
            Some(column) => Ok(column),
            None => {
                let known: Vec<&str> = COLUMNS.iter().map(|(name, ..)| *name).collect();
                bail!("there is no column {name:?}: there are {}", known.join(", "))
            }
        })
        .collect()
}

/// What a guest says is no command to this terminal.
fn printed(bytes: &[u8]) -> String {
    picovm_engine::printable(&String::from_utf8_lossy(bytes)).to_string()
}

fn terminal(task: &Task) -> String {
    match task.terminal.is_empty() {
        true => "?".into(),
        false => printed(&task.terminal),
    }
}

/// Of the time since a process began, which part it ran, in percent.
fn share(task: &Task) -> u64 {
    let age = u64::try_from(Utc::now().timestamp())
        .unwrap_or_default()
        .saturating_sub(task.started);
    (task.cpu_ms / 10).checked_div(age).unwrap_or(0).min(999)
}

fn started(task: &Task) -> String {
    i64::try_from(task.started)
        .ok()
        .and_then(|seconds| DateTime::from_timestamp(seconds, 0))
        .map(|time| time.with_timezone(&Local).format("%H:%M").to_string())
        .unwrap_or_else(|| "?".into())
}

fn clock(seconds: u64) -> String {
    format!(
        "{:02}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

pub fn stats(options: &StatsOptions) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    let once = options.no_stream || options.json;
    let format = match options.format.as_deref() {
        None | Some("table" | "json") => None,
        Some(format) => Some(Format::parse(format)?),
    };
    // Named ones that are not there are told at once, and not at each look.
    for name in &options.containers {
        containers.find(name)?;
    }
    let mut before: BTreeMap<String, Usage> = BTreeMap::new();
    if once {
        // A share of the processors takes two looks.
        for record in chosen(&containers, options)? {
            if let Some(usage) = usage(&containers, &record)? {
                before.insert(record.config.id, usage);
            }
        }
        std::thread::sleep(EVERY);
    }
    loop {
        let mut rows = Vec::new();
        let mut now = BTreeMap::new();
        for record in chosen(&containers, options)? {
            let usage = usage(&containers, &record)?;
            rows.push(fields(
                &record,
                usage.as_ref(),
                before.get(record.id()),
                options.no_trunc,
            ));
            if let Some(usage) = usage {
                now.insert(record.config.id, usage);
            }
        }
        before = now;
        if !once && io::stdout().is_terminal() {
            print!("\x1b[H\x1b[2J");
        }
        show(&rows, options, format.as_ref())?;
        io::stdout().flush()?;
        if once {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(EVERY);
    }
}

fn show(rows: &[Value], options: &StatsOptions, format: Option<&Format>) -> anyhow::Result<()> {
    let columns = [
        ("CONTAINER ID", "ID"),
        ("NAME", "Name"),
        ("CPU %", "CPUPerc"),
        ("MEM USAGE / LIMIT", "MemUsage"),
        ("MEM %", "MemPerc"),
        ("NET I/O", "NetIO"),
        ("BLOCK I/O", "BlockIO"),
        ("PIDS", "PIDs"),
    ];
    if options.json {
        println!("{}", serde_json::to_string_pretty(rows)?);
    } else if let Some(format) = format {
        let mut headings: serde_json::Map<String, Value> = columns
            .iter()
            .map(|(heading, key)| ((*key).to_owned(), Value::from(*heading)))
            .collect();
        headings.insert("Container".into(), "CONTAINER".into());
        format.print(&headings.into(), rows)?;
    } else if options.format.as_deref() == Some("json") {
        output::lines(rows);
    } else {
        output::columns(&columns, rows);
    }
    Ok(())
}

/// The containers that are looked at, the newest first.
fn chosen(containers: &Containers, options: &StatsOptions) -> anyhow::Result<Vec<Record>> {
    if options.containers.is_empty() {
        let mut records = containers.list()?;
        records.retain(|record| options.all || record.state.status.is_live());
        return Ok(records);
    }
    let mut records = Vec::new();
    for name in &options.containers {
        match containers.find(name) {
            Ok(record) => records.push(record),
            // Removed meanwhile.
            Err(EngineError::NoContainer { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(records)
}

/// What a container takes; nothing is known of one that does not run, or stands still.
fn usage(containers: &Containers, record: &Record) -> anyhow::Result<Option<Usage>> {
    if record.state.status != Status::Running {
        return Ok(None);
    }
    let asked = containers
        .connect(record)
        .and_then(|client| client.query("tell what it takes", Helper::Usage));
    match asked {
        Ok(usage) => Ok(Some(usage)),
        // It has ended or was paused meanwhile.
        Err(EngineError::NotRunning { .. } | EngineError::Refused(_) | EngineError::Agent { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn fields(record: &Record, usage: Option<&Usage>, before: Option<&Usage>, whole: bool) -> Value {
    let id = match whole {
        true => record.id(),
        false => record.config.short_id(),
    };
    let mut row = json!({
        "Container": id, "ID": id, "Name": record.name,
        "CPUPerc": UNKNOWN, "MemUsage": format!("{UNKNOWN} / {UNKNOWN}"), "MemPerc": UNKNOWN,
        "NetIO": UNKNOWN, "BlockIO": UNKNOWN, "PIDs": UNKNOWN,
    });
    let Some(usage) = usage else { return row };
    if let Some(share) = processors(usage, before) {
        row["CPUPerc"] = format!("{share:.2}%").into();
    }
    row["MemUsage"] = format!(
        "{} / {}",
        binary_size(usage.memory),
        binary_size(usage.memory_limit)
    )
    .into();
    row["MemPerc"] = format!("{:.2}%", percent(usage.memory, usage.memory_limit)).into();
    row["NetIO"] = format!(
        "{} / {}",
        output::docker_size(usage.received),
        output::docker_size(usage.sent)
    )
    .into();
    row["BlockIO"] = format!(
        "{} / {}",
        output::docker_size(usage.read),
        output::docker_size(usage.written)
    )
    .into();
    row["PIDs"] = usage.pids.to_string().into();
    row
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64 * 100.0
    }
}

/// Percent of a processor that were used between two looks; a container that was started again begins anew.
fn processors(usage: &Usage, before: Option<&Usage>) -> Option<f64> {
    let before = before.filter(|before| before.uptime_ns < usage.uptime_ns)?;
    Some(percent(
        usage.cpu_ns.saturating_sub(before.cpu_ns),
        usage.uptime_ns.saturating_sub(before.uptime_ns),
    ))
}

/// Bytes as Docker tells them of memory: four digits, 1,024 to the next unit.
fn binary_size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        0.0..10.0 => 3,
        10.0..100.0 => 2,
        100.0..1000.0 => 1,
        _ => 0,
    };
    let number = format!("{value:.digits$}");
    let number = match number.contains('.') {
        true => number.trim_end_matches('0').trim_end_matches('.'),
        false => &number,
    };
    format!("{number}{}", units.get(unit).copied().unwrap_or("B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_those_of_ps() {
        let names = |options: &[&str]| {
            let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
            columns(&options).map(|columns| columns.iter().map(|(name, ..)| *name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap(), FULL);
        assert_eq!(names(&["aux"]).unwrap(), FULL);
        assert_eq!(names(&["-o", "pid,cmd"]).unwrap(), ["pid", "cmd"]);
        assert_eq!(names(&["-eopid", "-o", "comm"]).unwrap(), ["pid", "comm"]);
        assert!(names(&["-o", "nothing"]).is_err());
    }

    #[test]
    fn what_is_taken_is_told_as_docker_tells_it() {
        for (bytes, told) in [
            (0, "0B"),
            (1536, "1.5KiB"),
            (7 << 20, "7MiB"),
            (1_234_567_890, "1.15GiB"),
        ] {
            assert_eq!(binary_size(bytes), told);
        }
        let at = |cpu_ns, uptime_ns| Usage {
            cpu_ns,
            uptime_ns,
            ..Usage::default()
        };
        assert_eq!(processors(&at(150, 200), Some(&at(50, 100))), Some(100.0));
        assert_eq!(processors(&at(1, 10), Some(&at(50, 100))), None);
        assert_eq!(processors(&at(1, 10), None), None);
        assert_eq!(clock(3723), "01:02:03");
    }
}

//! `picovm logs`.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, bail};
use chrono::SecondsFormat;
use picovm_engine::Store;
use picovm_engine::containers::{LogEntry, LogQuery};

use super::arguments::LogsOptions;

pub fn logs(options: &LogsOptions) -> anyhow::Result<ExitCode> {
    let containers = Store::open_default()?.containers()?;
    let record = containers.find(&options.container)?;
    if !record.config.log.keep {
        bail!(
            "container {} keeps no log: it was made with --log-driver none",
            record.name
        );
    }
    let query = LogQuery {
        tail: options.tail.0,
        since: options.since,
        until: options.until,
        follow: options.follow,
    };
    let mut failed = None;
    containers.logs(
        &record,
        &query,
        &mut |entry| match show(&entry, options.timestamps) {
            Ok(()) => true,
            Err(error) => {
                failed = Some(error);
                false
            }
        },
    )?;
    match failed {
        Some(error) => Err(error).context("cannot write the log"),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Writes an entry to where the container has written it.
fn show(entry: &LogEntry, timestamps: bool) -> io::Result<()> {
    let mut line = Vec::new();
    if timestamps {
        line.extend(entry.time.to_rfc3339_opts(SecondsFormat::Nanos, true).bytes());
        line.push(b' ');
    }
    line.extend(entry.log.0.as_encoded_bytes());
    if entry.stream == "stderr" {
        io::stderr().lock().write_all(&line)
    } else {
        let mut stdout = io::stdout().lock();
        stdout.write_all(&line)?;
        stdout.flush()
    }
}

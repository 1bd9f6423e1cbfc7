//! Processes that are measured: spawned, watched for what they write, and waited for.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use picovm_engine::Prompt;
use picovm_engine::figures::ms;

/// A process that takes longer has gone wrong.
const PROCESS_MAX: Duration = Duration::from_secs(20);

/// What a process did.
pub struct Watched {
    /// Standard output.
    pub output: Vec<u8>,
    /// Milliseconds from its spawning to the output that was waited for.
    pub mark: Option<f64>,
    /// Milliseconds from its spawning to its exit status.
    pub exit: f64,
}

/// Runs `command`, with the standard input that it was given, to its end and notes when its output is what `is_mark` waits for. That it
/// fails is an error.
pub fn watch(command: &mut Command, is_mark: impl Fn(&[u8]) -> bool) -> anyhow::Result<Watched> {
    command.stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let prompt = Prompt::begin();
    let watched = read(&mut child, start, is_mark);
    drop(prompt);
    if watched.is_err() {
        // It is ended in any case; an error of that says nothing more.
        let _ = child.kill();
    }
    let status = child.wait()?;
    let end = Instant::now();
    let (output, mark) = watched.with_context(|| format!("{command:?} was ended"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(Watched {
        output,
        mark: mark.map(|mark| ms(start, mark)),
        exit: ms(start, end),
    })
}

fn read(
    child: &mut Child,
    start: Instant,
    is_mark: impl Fn(&[u8]) -> bool,
) -> anyhow::Result<(Vec<u8>, Option<Instant>)> {
    let mut stdout = child.stdout.take().context("it has no standard output")?;
    let (mut output, mut mark) = (Vec::new(), None);
    let mut bytes = [0u8; 4096];
    loop {
        let rest = Timespec::try_from(PROCESS_MAX.saturating_sub(start.elapsed()))?;
        let mut fds = [PollFd::new(&stdout, PollFlags::IN)];
        if poll(&mut fds, Some(&rest))? == 0 {
            bail!("it still ran after {} s", PROCESS_MAX.as_secs());
        }
        let count = stdout.read(&mut bytes)?;
        let now = Instant::now();
        if count == 0 {
            return Ok((output, mark));
        }
        output.extend_from_slice(bytes.get(..count).unwrap_or_default());
        if mark.is_none() && is_mark(&output) {
            mark = Some(now);
        }
    }
}

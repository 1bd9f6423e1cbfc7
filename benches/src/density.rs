//! Density: what parked and live clones take of the host's memory, all of it counted.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use picovm_engine::{ContainerExit, ContainerOptions, Pool, PooledContainer};
use picovm_vmm::Template;

use crate::report::{Report, Unit};
use crate::rounds::{Selection, ms};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Parking and answering take a while where every instruction is emulated.
const PARKING_MAX: Duration = Duration::from_secs(20);
/// A container that takes longer has gone wrong.
const ANSWER_MAX: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};
/// Lets freed memory come back and work of the kernel end.
const SETTLE: Duration = Duration::from_secs(2);

/// A container that waits for a line and answers with it.
struct Live {
    container: PooledContainer,
    question: PipeWriter,
    answer: PipeReader,
}

/// Parks and starts `clones` clones and sees what that takes of `MemAvailable`, page tables and KVM's own memory included.
pub fn measure(
    template: &Template,
    clones: u32,
    selection: &Selection,
    report: &mut Report,
) -> anyhow::Result<()> {
    let names = [
        "memory_parked",
        "memory_live",
        "start_first",
        "start_last",
        "answer_all",
        "memory_left",
    ];
    if !names.iter().any(|name| selection.has(name)) {
        return Ok(());
    }
    eprintln!("density: {clones} clones");
    // What the first one of all needs is not of each.
    let mut pool = Pool::new(template, 1)?;
    pool.wait_until_full(PARKING_MAX)?;
    std::thread::sleep(SETTLE);
    let before = available_kib()?;

    pool.resize(clones as usize + 1)?;
    pool.wait_until_full(PARKING_MAX)?;
    std::thread::sleep(SETTLE);
    let parked = available_kib()?;

    let mut live = Vec::new();
    let mut starts = Vec::new();
    for _ in 0..clones {
        let start = Instant::now();
        live.push(Live::start(&mut pool)?);
        starts.push(ms(start, Instant::now()));
    }
    std::thread::sleep(SETTLE);
    let running = available_kib()?;

    let start = Instant::now();
    for one in &mut live {
        one.question.write_all(b"are you there\n")?;
    }
    for one in live {
        one.answer()?;
    }
    let answered = Instant::now();
    drop(pool);
    std::thread::sleep(SETTLE);
    let after = available_kib()?;

    let each = |from: f64, to: f64| (from - to) / f64::from(clones);
    let first: Vec<f64> = starts.iter().copied().take(10).collect();
    let last: Vec<f64> = starts.iter().rev().copied().take(10).collect();
    report.add("memory_parked".into(), Unit::Kib, vec![each(before, parked)]);
    report.add("memory_live".into(), Unit::Kib, vec![each(before, running)]);
    report.add("start_first".into(), Unit::Ms, first);
    report.add("start_last".into(), Unit::Ms, last);
    report.add("answer_all".into(), Unit::Ms, vec![ms(start, answered)]);
    report.add("memory_left".into(), Unit::Kib, vec![each(before, after)]);
    Ok(())
}

impl Live {
    fn start(pool: &mut Pool) -> anyhow::Result<Self> {
        let (stdin, question) = std::io::pipe()?;
        let (mut answer, stdout) = std::io::pipe()?;
        let stderr = File::options().write(true).open("/dev/null")?;
        let options = ContainerOptions {
            stdin: true,
            ..ContainerOptions::command(["sh", "-c", "echo up; read line; echo $line"])
        };
        let container = pool.start(&options, [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?;
        wait_for(&answer).context("a container did not start")?;
        let mut up = [0u8; 3];
        answer.read_exact(&mut up).context("a container did not start")?;
        Ok(Self {
            container,
            question,
            answer,
        })
    }

    fn answer(mut self) -> anyhow::Result<()> {
        wait_for(&self.container).context("a container did not answer")?;
        let exit = self.container.wait()?;
        let mut line = String::new();
        self.answer.read_to_string(&mut line)?;
        if exit != ContainerExit::Code(0) || line != "are you there\n" {
            bail!("a container answered '{line}' and ended with {exit:?}");
        }
        Ok(())
    }
}

fn wait_for(source: &impl AsFd) -> anyhow::Result<()> {
    match poll(&mut [PollFd::new(source, PollFlags::IN)], Some(&ANSWER_MAX))? {
        0 => bail!("nothing came within {} s", ANSWER_MAX.tv_sec),
        _ => Ok(()),
    }
}

/// Memory that is there for new work, in KiB (proc(5), `MemAvailable`).
fn available_kib() -> anyhow::Result<f64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .context("/proc/meminfo has no MemAvailable")
}

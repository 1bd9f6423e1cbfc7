//! Density: what many clones of one template take of the host's memory, all of it counted, and how long a start takes as they
//! become many. `picovm bench density` and the benchmark program both measure it here.

use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use picovm_guest_protocol::ContainerExit;
use picovm_vmm::Template;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;

use crate::confinement::Confinement;
use crate::container::ContainerOptions;
use crate::error::EngineError;
use crate::figures::ms;
use crate::messages::Parking;
use crate::pool::{POOL_MAX, Pool, wait_readable};
use crate::running::RunningContainer;
use crate::scheduling::Prompt;
use crate::vmm_process::waits_for_order;

/// Lets freed memory come back and work of the host's kernel end.
const SETTLE: Duration = Duration::from_secs(2);
/// About so many points has a curve.
const POINTS: usize = 64;
/// Open files that a live clone needs in this process: its socket, and its container's two pipes.
const FILES_EACH: u64 = 3;
/// Open files for all the rest.
const FILES_OTHER: u64 = 128;

/// Says that it is up, waits for a line, and says it.
const SCRIPT: &str = "echo up; read line; echo $line";
const UP: &str = "up\n";
const QUESTION: &str = "are you there\n";

/// What clones of one template take of the host, and how their starts go.
///
/// Memory is what is missing of the host's `MemAvailable` (proc(5)) and of the free pages that its kernel keeps at hand: the
/// clones' pages, page tables, KVM's and all other memory of the host's kernel. What everybody else on the host does meanwhile
/// is in it too, so the host should be idle.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Density {
    /// How ready the parked clones were.
    pub parking: Parking,
    /// How many clones there were.
    pub clones: usize,
    /// Memory that a parked clone takes, in KiB: the mean over all of them.
    pub parked_kib: f64,
    /// Memory that a live clone takes, whose container waits for input, in KiB: the mean over all of them.
    pub live_kib: f64,
    /// Proportional set size of the VMM process of a live clone, in KiB: its own pages, and of those that processes share its
    /// part. The mean over all of them. Memory of the host's kernel is not in it.
    pub pss_kib: f64,
    /// Pages that only the VMM process of a live clone maps, in KiB: the mean over all of them.
    pub owned_kib: f64,
    /// Pages of a live clone's VMM process that others map too, counted whole for each, in KiB: the mean over all of them.
    pub shared_kib: f64,
    /// Milliseconds from a request to the first line of its container, in the order of the requests: the first with no live
    /// clone beside it, the last with all others.
    pub start_ms: Vec<f64>,
    /// Milliseconds from the first question to the last exit status, when all containers are asked at once.
    pub answer_all_ms: f64,
    /// Memory that is still missing when all have ended, in KiB for all of them together; negative if there is more than
    /// before.
    pub left_kib: i64,
    /// VMM processes that are still there when all have ended: 0 if all is well.
    pub processes_left: usize,
    /// Memory that is taken when so many clones are parked. The last point is that of `parked_kib`.
    pub parked_curve: Vec<DensityPoint>,
    /// Memory that is taken when so many clones are live and the others parked. The last point is that of `live_kib`.
    pub live_curve: Vec<DensityPoint>,
}

/// A point of a curve over the number of clones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DensityPoint {
    /// So many clones.
    pub clones: usize,
    /// Memory that all clones that there are take, parked and live ones, in KiB.
    pub kib: i64,
}

/// How far measuring is, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DensityProgress {
    /// So many clones are parked.
    Parked(usize),
    /// So many clones are live.
    Live(usize),
    /// So many containers have answered and ended.
    Answered(usize),
}

impl Density {
    /// Parks `clones` clones of a template, 1 to [`POOL_MAX`], starts a container in each, has all of them answer, and ends
    /// them. The image needs a shell. Takes seconds on a real host, and minutes for hundreds of clones on an emulated one.
    ///
    /// This process needs three open files for each clone; its limit is raised for so long if the host permits it.
    ///
    /// # Errors
    /// [`EngineError::PoolSize`]; [`EngineError::OpenFiles`]; [`EngineError::Numbered`] if a clone cannot be parked, does not
    /// start its container or does not answer; [`EngineError::NoVmm`], [`EngineError::Host`]. All clones are ended then.
    pub fn measure(
        template: &Template,
        clones: usize,
        parking: Parking,
        progress: &mut dyn FnMut(DensityProgress),
    ) -> Result<Self, EngineError> {
        if !(1..=POOL_MAX).contains(&clones) {
            return Err(EngineError::PoolSize(clones));
        }
        let _files = OpenFiles::allow(FILES_EACH * clones as u64 + FILES_OTHER)?;
        let limit = limit(clones);
        let step = clones.div_ceil(POINTS);
        let numbered = |attempted, number| {
            move |reason| EngineError::Numbered {
                attempted,
                number,
                clones,
                reason: Box::new(reason),
            }
        };

        // What the first one of all needs is not of each.
        let mut pool = Pool::new(template, 1, parking, Confinement::Jailed)?;
        pool.wait_until_full(limit)?;
        let mut first = Live::start(&mut pool, limit)?;
        first.ask()?;
        first.answer(Instant::now(), limit)?;
        wait_for_end(&pool, limit)?;
        std::thread::sleep(SETTLE);
        let before = available_kib()?;
        let point = |clones, available| DensityPoint {
            clones,
            kib: before - available,
        };

        let mut parked_curve = vec![point(0, before)];
        let mut parked = 0;
        while parked < clones {
            parked = clones.min(parked + step);
            pool.resize(parked)?;
            pool.wait_until_full(limit)
                .map_err(|error| numbered("park", pool.parked() + 1)(error))?;
            if parked == clones {
                std::thread::sleep(SETTLE);
            }
            parked_curve.push(point(parked, available_kib()?));
            progress(DensityProgress::Parked(parked));
        }

        let mut live_curve: Vec<DensityPoint> = parked_curve
            .last()
            .map(|last| DensityPoint { clones: 0, ..*last })
            .into_iter()
            .collect();
        let (mut live, mut start_ms) = (Vec::with_capacity(clones), Vec::with_capacity(clones));
        for number in 1..=clones {
            let start = Instant::now();
            let one = Live::start(&mut pool, limit).map_err(numbered("start a container in", number))?;
            start_ms.push(ms(start, Instant::now()));
            live.push(one);
            // The pool does without a clone whose process was killed; here it would be counted.
            if pool.parked() + number != clones {
                return Err(numbered("start a container in", number)(ended()));
            }
            if number == clones {
                std::thread::sleep(SETTLE);
            }
            if number == clones || number % step == 0 {
                live_curve.push(point(number, available_kib()?));
            }
            progress(DensityProgress::Live(number));
        }
        let processes = vmm_processes(&pool)?;
        // For the last one the pool makes others.
        if processes.len() > clones {
            return Err(numbered("start a container in", clones)(ended()));
        }
        let memory = processes
            .into_iter()
            .try_fold(ProcessMemory::default(), |sum, process| sum.with(process))?;

        let asked = Instant::now();
        for (one, number) in live.iter_mut().zip(1..) {
            one.ask().map_err(numbered("ask", number))?;
        }
        for (one, number) in live.into_iter().zip(1..) {
            one.answer(asked, limit)
                .map_err(numbered("get an answer from", number))?;
            progress(DensityProgress::Answered(number));
        }
        let answered = Instant::now();
        let processes_left = wait_for_end(&pool, limit)?;
        std::thread::sleep(SETTLE);
        let after = available_kib()?;

        let each = |kib: i64| kib as f64 / clones as f64;
        let last = |curve: &[DensityPoint]| each(curve.last().map_or(0, |point| point.kib));
        Ok(Self {
            parking,
            clones,
            parked_kib: last(&parked_curve),
            live_kib: last(&live_curve),
            pss_kib: each(memory.pss),
            owned_kib: each(memory.owned),
            shared_kib: each(memory.shared),
            start_ms,
            answer_all_ms: ms(asked, answered),
            left_kib: before - after,
            processes_left,
            parked_curve,
            live_curve,
        })
    }
}

/// How long something may take that one of so many clones does: there are hosts that emulate every instruction, and a clone may
/// wait for all others.
fn limit(clones: usize) -> Duration {
    Duration::from_secs(30) + Duration::from_millis(500).saturating_mul(clones as u32)
}

/// A container that waits for a line.
struct Live {
    container: RunningContainer,
    question: PipeWriter,
    answer: PipeReader,
}

impl Live {
    /// Starts it, and waits until it says that it is up.
    fn start(pool: &mut Pool, limit: Duration) -> Result<Self, EngineError> {
        let failed = || EngineError::host("make pipes for a container");
        let (stdin, question) = io::pipe().map_err(failed())?;
        let (mut answer, stdout) = io::pipe().map_err(failed())?;
        let stderr = File::options().write(true).open("/dev/null").map_err(failed())?;
        let options = ContainerOptions {
            stdin: true,
            ..ContainerOptions::command(["sh", "-c", SCRIPT])
        };
        let start = Instant::now();
        let container = pool.start(&options, [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?;
        // The end of its output is seen here only if nobody else has it open.
        drop((stdin, stdout, stderr));
        let _prompt = Prompt::begin();
        let mut said = Vec::new();
        while !said.ends_with(b"\n") {
            wait_until(&answer, start, limit)?;
            let mut bytes = [0u8; 64];
            let count = answer
                .read(&mut bytes)
                .map_err(EngineError::host("read what a container says"))?;
            said.extend_from_slice(bytes.get(..count).unwrap_or_default());
            if count == 0 {
                return Err(unexpected(&said, container.wait()?));
            }
        }
        if said != UP.as_bytes() {
            container.kill(9)?;
            return Err(unexpected(&said, container.wait()?));
        }
        Ok(Self {
            container,
            question,
            answer,
        })
    }

    fn ask(&mut self) -> Result<(), EngineError> {
        self.question
            .write_all(QUESTION.as_bytes())
            .map_err(EngineError::host("write to a container"))
    }

    /// Waits for its answer and its end, no longer than `limit` from `asked` on.
    fn answer(mut self, asked: Instant, limit: Duration) -> Result<(), EngineError> {
        wait_until(&self.container, asked, limit)?;
        let exit = self.container.wait()?;
        let mut said = Vec::new();
        self.answer
            .read_to_end(&mut said)
            .map_err(EngineError::host("read what a container says"))?;
        if exit == ContainerExit::Code(0) && said == QUESTION.as_bytes() {
            Ok(())
        } else {
            Err(unexpected(&said, exit))
        }
    }
}

fn ended() -> EngineError {
    EngineError::Vmm("the VMM process of a parked clone has ended".into())
}

fn unexpected(said: &[u8], exit: ContainerExit) -> EngineError {
    EngineError::Unexpected {
        output: String::from_utf8_lossy(said).into_owned(),
        exit,
    }
}

fn wait_until(source: &impl AsFd, from: Instant, limit: Duration) -> Result<(), EngineError> {
    wait_readable(source, limit.saturating_sub(from.elapsed())).map_err(|error| {
        let failed = EngineError::host("wait for a container");
        if error.kind() == io::ErrorKind::TimedOut {
            let reason = format!("nothing came within {} s", limit.as_secs());
            return failed(io::Error::new(io::ErrorKind::TimedOut, reason));
        }
        failed(error)
    })
}

/// While it lives this process may have so many files open.
struct OpenFiles {
    before: Option<Rlimit>,
}

impl OpenFiles {
    fn allow(needed: u64) -> Result<Self, EngineError> {
        let before = getrlimit(Resource::Nofile);
        if before.current.is_none_or(|limit| limit >= needed) {
            return Ok(Self { before: None });
        }
        if let Some(limit) = before.maximum.filter(|limit| *limit < needed) {
            return Err(EngineError::OpenFiles { needed, limit });
        }
        let raised = Rlimit {
            current: Some(needed),
            maximum: before.maximum,
        };
        setrlimit(Resource::Nofile, raised)
            .map_err(|error| EngineError::host("raise the limit of open files")(error.into()))?;
        Ok(Self { before: Some(before) })
    }
}

impl Drop for OpenFiles {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            // It was the limit before, so it is allowed; and a higher one does no harm.
            let _ = setrlimit(Resource::Nofile, before);
        }
    }
}

/// Memory that is there for new work, in KiB: `MemAvailable` (proc(5)), and the free pages that the host's kernel keeps at hand
/// for each CPU. `MemAvailable` lacks these; they are tens of MiB on some hosts, and come and go.
fn available_kib() -> Result<i64, EngineError> {
    // Reading it makes the kernel add up what each CPU has counted by itself; it is root's. Without it the figures are coarser
    // by less than a MiB for each CPU.
    let _ = fs::read("/proc/sys/vm/stat_refresh");
    let failed = || EngineError::host("read how much memory is available from /proc/meminfo");
    let zones = fs::read_to_string("/proc/zoneinfo").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").map_err(failed())?;
    let available = kib_of(&meminfo, "MemAvailable")
        .ok_or_else(|| failed()(io::Error::other("there is no MemAvailable in it")))?;
    Ok(available + at_hand(&zones) * (rustix::param::page_size() >> 10) as i64)
}

/// Pages that the kernel keeps at hand, by `/proc/zoneinfo`: the sum over zones and CPUs.
fn at_hand(zones: &str) -> i64 {
    zones
        .lines()
        .filter_map(|line| {
            line.trim_start()
                .strip_prefix("count:")?
                .trim()
                .parse::<i64>()
                .ok()
        })
        .sum()
}

/// The value of `NAME: VALUE kB`.
fn kib_of(text: &str, name: &str) -> Option<i64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Memory of processes in KiB, as the host's kernel accounts for it.
#[derive(Default)]
struct ProcessMemory {
    pss: i64,
    owned: i64,
    shared: i64,
}

impl ProcessMemory {
    /// Adds that of one more.
    fn with(self, process: u32) -> Result<Self, EngineError> {
        let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).map_err(
            EngineError::host("read the memory of a VMM process from its smaps_rollup"),
        )?;
        let kib = |name| kib_of(&rollup, name).unwrap_or(0);
        Ok(Self {
            pss: self.pss + kib("Pss"),
            owned: self.owned + kib("Private_Clean") + kib("Private_Dirty"),
            shared: self.shared + kib("Shared_Clean") + kib("Shared_Dirty"),
        })
    }
}

/// Waits until a pool of which nothing is parked or live has no VMM process any more; how many there still are after `limit`.
fn wait_for_end(pool: &Pool, limit: Duration) -> Result<usize, EngineError> {
    let start = Instant::now();
    loop {
        let left = vmm_processes(pool)?.len();
        if left == 0 || start.elapsed() > limit {
            return Ok(left);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ids of the VMM processes of a pool that have a clone: the children of its fork server, but for the one that waits for an order.
fn vmm_processes(pool: &Pool) -> Result<Vec<u32>, EngineError> {
    let server = pool.server_id();
    let entries = fs::read_dir("/proc").map_err(EngineError::host("list the processes of the host"))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let process = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            (parent(&stat)? == server && !waits_for_order(process)).then_some(process)
        })
        .collect())
}

/// The parent's id in a line of proc_pid_stat(5): the second field after the program's name, which ends with the last bracket.
fn parent(stat: &str) -> Option<u32> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_by_its_whole_name() {
        let text = "Rss:     5 kB\nPss:      13 kB\nPss_Anon:     7 kB\n";
        assert_eq!(kib_of(text, "Pss"), Some(13));
        assert_eq!(kib_of(text, "Pss_Anon"), Some(7));
        assert_eq!(kib_of(text, "Swap"), None);
        assert!(available_kib().unwrap() > 0);
    }

    #[test]
    fn pages_at_hand_are_those_of_all_cpus_in_all_zones() {
        let zones = "Node 0, zone DMA\n  pages free     3840\n  pagesets\n    cpu: 0\n              count:    12\n              \
                     high:     15\n    cpu: 1\n              count: 3\nNode 0, zone Normal\n    cpu: 0\n count:    100\n";
        assert_eq!(at_hand(zones), 115);
        assert_eq!(at_hand(""), 0);
    }

    #[test]
    fn a_parent_is_read_whatever_its_child_is_named() {
        assert_eq!(parent("17 (a) R 3 (b)) S 42 1 2 3"), Some(42));
        assert_eq!(parent("17 (vmm) R 42"), Some(42));
        assert_eq!(parent(""), None);
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        assert_eq!(parent(&stat), Some(std::os::unix::process::parent_id()));
    }

    #[test]
    fn the_limit_of_open_files_is_raised_for_a_while_or_refused() {
        let before = getrlimit(Resource::Nofile);
        let (Some(current), Some(maximum)) = (before.current, before.maximum) else {
            return;
        };
        let error = OpenFiles::allow(maximum + 1).err().unwrap();
        assert!(error.to_string().contains(&maximum.to_string()), "{error}");
        if current < maximum {
            let raised = OpenFiles::allow(current + 1).unwrap();
            assert_eq!(getrlimit(Resource::Nofile).current, Some(current + 1));
            drop(raised);
        }
        assert_eq!(getrlimit(Resource::Nofile).current, Some(current));
    }
}

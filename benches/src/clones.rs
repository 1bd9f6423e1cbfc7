//! Clones through the library alone: forked and run, or parked first, by who reads the agent's frames himself.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use picovm_engine::Prompt;
use picovm_engine::figures::ms;
use picovm_guest_protocol::{
    ContainerExit, ContainerSpec, Frame, FrameDecoder, Identity, ProcessSpec, Stream,
};
use picovm_vmm::machine::Machine;
use picovm_vmm::{ForkOptions, Outcome, Template, WorkingSet};

use crate::report::Unit;
use crate::rounds::Probe;
use crate::start::{PARKED, START_MAX, WORD, check_output};

/// From forking a clone without an identity to its trap: with its first instruction, or once it has looked for one.
pub fn trap(template: &Template) -> anyhow::Result<[f64; 1]> {
    let start = Instant::now();
    let mut clone = template.fork(ForkOptions::default())?;
    trap_again(&mut clone)?;
    Ok([ms(start, Instant::now())])
}

/// The same of a clone that was forked and prefaulted before.
pub fn parked_first_instruction(template: &Template) -> anyhow::Result<[f64; 1]> {
    let working_set = template.working_set().context("there is no working set")?;
    let mut clone = template.fork(ForkOptions::default())?;
    clone.prefault(working_set)?;
    std::thread::sleep(PARKED);
    let start = Instant::now();
    trap_again(&mut clone)?;
    Ok([ms(start, Instant::now())])
}

/// Which pages the first instruction touches.
pub fn record_first_instruction(template: &Template) -> anyhow::Result<WorkingSet> {
    let mut clone = template.fork(ForkOptions::default())?;
    clone.watch_working_set()?;
    trap_again(&mut clone)?;
    Ok(clone.working_set()?)
}

fn trap_again(clone: &mut Machine) -> anyhow::Result<()> {
    match clone.run(Some(START_MAX))? {
        Some(Outcome::FreezePoint) => Ok(()),
        outcome => bail!("a clone did not trap again: {outcome:?}"),
    }
}

/// What one cold start took: milliseconds from the fork, and counts.
pub struct Cold {
    pub fork: f64,
    /// Making the pages present that it will write, by itself.
    pub populate: f64,
    pub first_byte: f64,
    pub exit: f64,
    /// To user space.
    pub exits: f64,
    pub owned_pages: f64,
}

pub fn fork_probe(template: &Template) -> Probe<'_> {
    Probe::new(
        [
            ("fork", Unit::Ms),
            ("populate", Unit::Ms),
            ("fork_first_byte", Unit::Ms),
            ("fork_exit", Unit::Ms),
            ("start_exits", Unit::Exits),
            ("owned_pages", Unit::Pages),
        ],
        || {
            let cold = fork(template, template.working_set())?;
            Ok([
                cold.fork,
                cold.populate,
                cold.first_byte,
                cold.exit,
                cold.exits,
                cold.owned_pages,
            ])
        },
    )
}

/// Forks a clone with the pages of `populated` that it will write, lets it run [`WORD`] through `echo` and reads the agent's
/// frames.
pub fn fork(template: &Template, populated: Option<&WorkingSet>) -> anyhow::Result<Cold> {
    let start = Instant::now();
    let mut clone = with_identity(template)?;
    let forked = Instant::now();
    if let Some(set) = populated {
        set.populate_written(clone.memory());
    }
    let populated = Instant::now();
    let mut connection = connect(&mut clone)?;
    clone.start()?;
    let (output, first, exit, end) = listen(&clone, &mut connection)?;
    let exits = clone.exits();
    let owned = owned_pages()?;
    check_output(&output)?;
    if exit != ContainerExit::Code(0) {
        bail!("a container ended with {exit:?}");
    }
    end_of(&mut clone)?;
    Ok(Cold {
        fork: ms(start, forked),
        populate: ms(forked, populated),
        first_byte: ms(start, first),
        exit: ms(start, end),
        exits: (exits.port + exits.memory + exits.interrupted) as f64,
        owned_pages: owned as f64,
    })
}

/// Lets a clone that has its identity run to its exit frame.
pub fn start_and_listen(clone: &mut Machine) -> anyhow::Result<()> {
    let mut connection = connect(clone)?;
    clone.start()?;
    let (output, ..) = listen(clone, &mut connection)?;
    check_output(&output)
}

/// Runs one container and looks which pages it has touched.
pub fn record(template: &Template) -> anyhow::Result<WorkingSet> {
    let mut clone = with_identity(template)?;
    clone.watch_working_set()?;
    start_and_listen(&mut clone)?;
    Ok(clone.working_set()?)
}

pub fn parked_probe(template: &Template) -> Probe<'_> {
    Probe::new(
        [
            ("prefault", Unit::Ms),
            ("parked_first_byte", Unit::Ms),
            ("parked_exit", Unit::Ms),
            ("parked_exits", Unit::Exits),
            ("parked_owned_pages", Unit::Pages),
        ],
        || parked(template),
    )
}

/// Starts a container in a clone that was forked and prefaulted before.
pub fn parked(template: &Template) -> anyhow::Result<[f64; 5]> {
    let working_set = template.working_set().context("there is no working set")?;
    let mut clone = template.fork(ForkOptions::default())?;
    let mut connection = connect(&mut clone)?;
    let forked = Instant::now();
    clone.prefault(working_set)?;
    let prefaulted = Instant::now();
    std::thread::sleep(PARKED);

    let start = Instant::now();
    template.write_identity(&clone, &identity()?.encode(template.identity_area())?)?;
    clone.start()?;
    let (output, first, _, end) = listen(&clone, &mut connection)?;
    let exits = clone.exits();
    let owned = owned_pages()?;
    check_output(&output)?;
    end_of(&mut clone)?;
    Ok([
        ms(forked, prefaulted),
        ms(start, first),
        ms(start, end),
        (exits.port + exits.memory + exits.interrupted) as f64,
        owned as f64,
    ])
}

/// Forks a clone that will run [`WORD`] through `echo`.
pub fn with_identity(template: &Template) -> anyhow::Result<Machine> {
    Ok(template.fork(ForkOptions {
        identity: identity()?.encode(template.identity_area())?,
        ..ForkOptions::default()
    })?)
}

/// The control connection of a clone, which does not wait for ever.
pub fn connect(clone: &mut Machine) -> anyhow::Result<UnixStream> {
    let connection = clone
        .take_connection()
        .context("a clone has no control connection")?;
    connection.set_read_timeout(Some(START_MAX))?;
    Ok(connection)
}

pub fn identity() -> anyhow::Result<Identity> {
    let mut entropy = [0u8; 32];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(Identity {
        id: "bench".into(),
        hostname: "bench".into(),
        entropy,
        realtime_ns: u64::try_from(now.as_nanos())?,
        container: Some(ContainerSpec::of(ProcessSpec {
            args: vec![b"echo".to_vec(), WORD.into()],
            ..ProcessSpec::default()
        })),
    })
}

/// Output, when its first byte came, exit status, when that came.
type Heard = (Vec<u8>, Instant, ContainerExit, Instant);

/// Reads a clone's frames to the last.
pub fn listen(clone: &Machine, connection: &mut UnixStream) -> anyhow::Result<Heard> {
    read_frames(connection)
        .with_context(|| format!("a clone did not answer; its console:\n{}", clone.console_tail()))
}

fn read_frames(connection: &mut UnixStream) -> anyhow::Result<Heard> {
    // On a host with one CPU, too, whoever reads is to have the bytes when they come.
    let _prompt = Prompt::begin();
    let mut decoder = FrameDecoder::default();
    let (mut output, mut first) = (Vec::new(), None);
    let mut bytes = [0u8; 4096];
    loop {
        let count = connection.read(&mut bytes)?;
        let now = Instant::now();
        if count == 0 {
            bail!("it closed its control connection");
        }
        decoder.push(bytes.get(..count).unwrap_or_default());
        while let Some((_, frame)) = decoder.next_frame()? {
            match frame {
                Frame::Data(Stream::Stdout, data) => {
                    first.get_or_insert(now);
                    output.extend(data);
                }
                Frame::Exit(exit) => {
                    return Ok((output, first.context("its container wrote nothing")?, exit, now));
                }
                _ => {}
            }
        }
    }
}

/// Lets a clone that has said its last word power itself off.
pub fn end_of(clone: &mut Machine) -> anyhow::Result<()> {
    match clone.wait(Some(START_MAX))? {
        Some(Outcome::PowerOff) => Ok(()),
        outcome => bail!(
            "a clone did not power itself off: {outcome:?}. Its console:\n{}",
            clone.console_tail()
        ),
    }
}

/// Pages that the one clone of this process has written, and so owns: the anonymous ones of mappings of a file named
/// `memory` (`/proc/PID/smaps`, proc(5)).
fn owned_pages() -> anyhow::Result<u64> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").context("cannot read /proc/self/smaps")?;
    let (mut kib, mut ours) = (0u64, false);
    for line in smaps.lines() {
        match line.split_once(':') {
            Some(("Anonymous", value)) if ours => {
                kib += value
                    .split_whitespace()
                    .next()
                    .and_then(|value| value.parse().ok())
                    .unwrap_or(0);
            }
            Some((field, _)) if !field.contains(' ') => {}
            _ => ours = Path::new(line).ends_with("memory"),
        }
    }
    Ok(kib / 4)
}

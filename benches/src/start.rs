//! Starts: of a process, of a clone, of `picovm run`, each with the same program, to its first byte of output and to
//! its end.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use picovm_engine::{ContainerOptions, Image, Pool};
use picovm_guest_protocol::{ContainerExit, ContainerSpec, Frame, FrameDecoder, Identity, Stream};
use picovm_vmm::machine::Machine;
use picovm_vmm::{ForkOptions, Outcome, Template, WorkingSet};

use crate::boot::{self, MEMORY_MIB};
use crate::oci::Runtime;
use crate::report::{Report, Unit};
use crate::rounds::{self, Probe, Selection, ms};
use crate::workspace::{DISTRIBUTION, SMALL, Workspace};
use crate::{floor, process};

const DISCARDED: u32 = 5;
/// How long a clone is parked before it is started.
const PARKED: Duration = Duration::from_millis(5);
/// A start that takes longer has gone wrong.
const START_MAX: Duration = Duration::from_secs(10);
/// So many starts tell the working set, as in the engine.
const STARTS_RECORDED: u32 = 3;
const WORD: &str = "hello";

/// Measures it all; gives the template of the small image.
pub fn measure(
    workspace: &Workspace,
    selection: &Selection,
    rounds: u32,
    report: &mut Report,
) -> anyhow::Result<Template> {
    let small = template(workspace, &workspace.small, "small", report)?;
    let distribution = match &workspace.distribution {
        Some(image) => Some(template(workspace, image, "distribution", report)?),
        None => None,
    };
    let mut pool = Pool::new(&small, 1)?;
    let mut probes = vec![
        Probe::new(
            [("process_first_byte", Unit::Ms), ("process_exit", Unit::Ms)],
            || process(Command::new(&workspace.echo).arg(WORD)),
        ),
        Probe::new([("template_open", Unit::Ms)], || {
            let start = Instant::now();
            let template = Template::open(small.path())?;
            let end = Instant::now();
            drop(template);
            Ok([ms(start, end)])
        }),
        Probe::new([("kvm_floor", Unit::Ms)], || floor::measure(&small)),
        Probe::new([("fork_freeze_again", Unit::Ms)], || freeze_again(&small)),
        fork_probe(&small),
        Probe::new([("fork_unpopulated_exit", Unit::Ms)], || {
            Ok([fork(&small, None)?[2]])
        }),
        parked_probe(&small),
        Probe::new(
            [("engine_first_byte", Unit::Ms), ("engine_exit", Unit::Ms)],
            || pooled(&mut pool),
        ),
        run_probe(workspace, SMALL),
    ];
    for (name, prefix) in [("crun", "crun_"), ("runc", "runc_")] {
        let root = workspace.path("image");
        let Some(mut runtime) = Runtime::find(name, &workspace.path(""), &root, ["/bin/echo", WORD])? else {
            eprintln!("{name} is not installed: measuring without it");
            continue;
        };
        let measures = [("first_byte", Unit::Ms), ("exit", Unit::Ms)];
        probes.push(Probe::new(measures, move || process(&mut runtime.run())).named(prefix));
    }
    if let Some(template) = &distribution {
        probes.push(fork_probe(template).named("debian_"));
        probes.push(run_probe(workspace, DISTRIBUTION).named("debian_"));
    }
    rounds::measure("starts", probes, selection, (DISCARDED, rounds), report)?;
    Ok(small)
}

fn template(
    workspace: &Workspace,
    image: &Image,
    name: &str,
    report: &mut Report,
) -> anyhow::Result<Template> {
    rounds::persist("the template", report, rounds::FAILURES_MAX, || {
        let mut template = boot::build_template(workspace, &image.file, &workspace.path(name))?;
        let set = (0..STARTS_RECORDED).try_fold(WorkingSet::default(), |set, _| {
            anyhow::Ok(set.union(&record(&template)?))
        })?;
        template.record_working_set(set);
        Ok(template)
    })
}

/// From spawning a process to the first byte that it writes, and to its exit status.
fn process(command: &mut Command) -> anyhow::Result<[f64; 2]> {
    let watched = process::watch(command, |output| !output.is_empty())?;
    check_output(&watched.output)?;
    Ok([watched.mark.context("it wrote nothing")?, watched.exit])
}

fn check_output(output: &[u8]) -> anyhow::Result<()> {
    if output.trim_ascii_end() != WORD.as_bytes() {
        bail!("the output is {:?}", String::from_utf8_lossy(output));
    }
    Ok(())
}

fn run_probe<'a>(workspace: &'a Workspace, image: &'static str) -> Probe<'a> {
    Probe::new(
        [("run_first_byte", Unit::Ms), ("run_exit", Unit::Ms)],
        move || {
            let mut command = Command::new(&workspace.picovm);
            command
                .env("PICOVM_HOME", workspace.store.root())
                .env_remove("PICOVM_GUEST");
            command.args(["run", "--memory", &format!("{MEMORY_MIB}m"), image, "echo", WORD]);
            process(&mut command)
        },
    )
}

/// Forks a clone without an identity: its first instructions find none and trap again.
fn freeze_again(template: &Template) -> anyhow::Result<[f64; 1]> {
    let start = Instant::now();
    let mut clone = template.fork(ForkOptions::default())?;
    let outcome = clone.run(Some(START_MAX))?;
    let end = Instant::now();
    if outcome != Some(Outcome::FreezePoint) {
        bail!("a clone without an identity did not freeze again: {outcome:?}");
    }
    Ok([ms(start, end)])
}

fn fork_probe(template: &Template) -> Probe<'_> {
    Probe::new(
        [
            ("fork", Unit::Ms),
            ("fork_first_byte", Unit::Ms),
            ("fork_exit", Unit::Ms),
            ("start_exits", Unit::Exits),
            ("owned_pages", Unit::Pages),
        ],
        || fork(template, template.working_set()),
    )
}

/// Forks a clone with the pages of `populated` that it will write, lets it run [`WORD`] through `echo` and reads the agent's
/// frames.
fn fork(template: &Template, populated: Option<&WorkingSet>) -> anyhow::Result<[f64; 5]> {
    let start = Instant::now();
    let identity = identity()?.encode(template.identity_area())?;
    let mut clone = template.fork(ForkOptions {
        identity,
        ..ForkOptions::default()
    })?;
    let forked = Instant::now();
    if let Some(set) = populated {
        match std::env::var("PF").as_deref() {
            Ok("w") => clone.prefault(&WorkingSet { written: set.written.clone(), read: Vec::new() })?,
            Ok("a") => clone.prefault(set)?,
            _ => set.populate_written(clone.memory()),
        }
    }
    let mut connection = clone
        .take_connection()
        .context("a clone has no control connection")?;
    connection.set_read_timeout(Some(START_MAX))?;
    clone.start()?;
    let (output, first, exit, end) = listen(&mut connection)
        .with_context(|| format!("a clone did not answer; its console:\n{}", clone.console_tail()))?;
    let exits = clone.exits();
    let owned = owned_pages()?;
    check_output(&output)?;
    if exit != ContainerExit::Code(0) {
        bail!("a container ended with {exit:?}");
    }
    end_of(&mut clone)?;
    Ok([
        ms(start, forked),
        ms(start, first),
        ms(start, end),
        (exits.port + exits.memory + exits.interrupted) as f64,
        owned as f64,
    ])
}

/// Runs one container and looks which pages it has touched.
fn record(template: &Template) -> anyhow::Result<WorkingSet> {
    let mut clone = template.fork(ForkOptions {
        identity: identity()?.encode(template.identity_area())?,
        ..ForkOptions::default()
    })?;
    clone.watch_working_set();
    let mut connection = clone
        .take_connection()
        .context("a clone has no control connection")?;
    connection.set_read_timeout(Some(START_MAX))?;
    clone.start()?;
    listen(&mut connection)?;
    Ok(clone.working_set()?)
}

fn parked_probe(template: &Template) -> Probe<'_> {
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
fn parked(template: &Template) -> anyhow::Result<[f64; 5]> {
    let working_set = template.working_set().context("there is no working set")?;
    let mut clone = template.fork(ForkOptions::default())?;
    let mut connection = clone
        .take_connection()
        .context("a clone has no control connection")?;
    connection.set_read_timeout(Some(START_MAX))?;
    let forked = Instant::now();
    clone.prefault(working_set)?;
    let prefaulted = Instant::now();
    std::thread::sleep(PARKED);

    let start = Instant::now();
    template.write_identity(&clone, &identity()?.encode(template.identity_area())?)?;
    clone.start()?;
    let (output, first, _, end) = listen(&mut connection)
        .with_context(|| format!("a clone did not answer; its console:\n{}", clone.console_tail()))?;
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

/// Starts a container through the engine, in a clone of its pool.
fn pooled(pool: &mut Pool) -> anyhow::Result<[f64; 2]> {
    pool.refill()?;
    pool.wait_until_full(START_MAX)?;
    std::thread::sleep(PARKED);

    let null = std::fs::File::open("/dev/null")?;
    let start = Instant::now();
    let (mut output, theirs) = std::io::pipe()?;
    let streams = [null.as_fd(), theirs.as_fd(), theirs.as_fd()];
    let container = pool.start(&ContainerOptions::command(["echo", WORD]), streams)?;
    drop(theirs);
    let mut bytes = [0u8; 4096];
    let count = output.read(&mut bytes)?;
    let first = Instant::now();
    let exit = container.wait()?;
    let end = Instant::now();
    check_output(bytes.get(..count).unwrap_or_default())?;
    if exit != ContainerExit::Code(0) {
        bail!("a container ended with {exit:?}");
    }
    Ok([ms(start, first), ms(start, end)])
}

fn identity() -> anyhow::Result<Identity> {
    let mut entropy = [0u8; 32];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(Identity {
        id: "bench".into(),
        hostname: "bench".into(),
        entropy,
        realtime_ns: u64::try_from(now.as_nanos())?,
        container: Some(ContainerSpec {
            args: vec![b"echo".to_vec(), WORD.into()],
            ..ContainerSpec::default()
        }),
    })
}

/// Reads the agent's frames to the last: output, when its first byte came, exit status, when that came.
fn listen(connection: &mut UnixStream) -> anyhow::Result<(Vec<u8>, Instant, ContainerExit, Instant)> {
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
        while let Some(frame) = decoder.next_frame()? {
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
fn end_of(clone: &mut Machine) -> anyhow::Result<()> {
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

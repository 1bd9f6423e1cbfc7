//! Cold boots: to the freeze point, by phase, and beside Firecracker with the same kernel.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use picovm_engine::figures::ms;
use picovm_vmm::machine::Machine;
use picovm_vmm::{Disk, ForkOptions, FreezeOptions, MachineConfig, Outcome, Template};

use crate::peer::Peer;
use crate::process;
use crate::report::{Report, Unit};
use crate::rounds::{self, Probe, Selection};
use crate::workspace::Workspace;

/// Memory of every machine that is measured, in MiB.
pub const MEMORY_MIB: u64 = 128;
/// A boot that takes longer has gone wrong.
const BOOT_MAX: Duration = Duration::from_secs(5);
const DISCARDED: u32 = 2;
/// First argument of this program as a process that boots a machine and ends with it.
const BOOT_AND_EXIT: &str = "boot-and-exit";
/// Environment variable with which that process stops at the base freeze point.
const STOP_AT_BASE: &str = "PICOVM_BENCH_STOP_AT_BASE";
/// What that process says at the freeze point.
const REACHED: &str = "freeze point reached";

fn config(kernel: &Path, initramfs: &Path) -> MachineConfig {
    let mut config = MachineConfig::new(kernel);
    config.initramfs = Some(initramfs.to_owned());
    config.memory_mib = MEMORY_MIB;
    config
}

fn with_image(mut config: MachineConfig, image: &Path) -> MachineConfig {
    config.disks = vec![Disk::read_only(image)];
    config
}

/// A machine at its freeze point and when it was what.
struct Booted {
    machine: Machine,
    start: Instant,
    loaded: Instant,
    frozen: Instant,
}

fn boot(config: &MachineConfig) -> anyhow::Result<Booted> {
    let start = Instant::now();
    let mut machine = Machine::boot(config)?;
    let loaded = Instant::now();
    let outcome = machine.run(Some(BOOT_MAX))?;
    let frozen = Instant::now();
    expect(&machine, outcome, &Outcome::FreezePoint)?;
    Ok(Booted {
        machine,
        start,
        loaded,
        frozen,
    })
}

fn expect(machine: &Machine, outcome: Option<Outcome>, expected: &Outcome) -> anyhow::Result<()> {
    match outcome {
        Some(outcome) if outcome == *expected => Ok(()),
        Some(outcome) => bail!(
            "the machine did not do what was expected: {outcome}. Its console:\n{}",
            machine.console_tail()
        ),
        None => bail!(
            "the machine still runs after {} s. Its console:\n{}",
            BOOT_MAX.as_secs(),
            machine.console_tail()
        ),
    }
}

/// Boots a machine of so many MiB and vCPUs with an image to its freeze point and freezes it into `directory`.
pub fn build_sized_template(
    workspace: &Workspace,
    image: &Path,
    directory: &Path,
    (memory_mib, vcpus): (u64, u8),
) -> anyhow::Result<Template> {
    let mut config = with_image(config(&workspace.kernel, &workspace.initramfs), image);
    (config.memory_mib, config.vcpus) = (memory_mib, vcpus);
    let mut booted = boot(&config)?;
    Ok(booted.machine.freeze(directory, &FreezeOptions::default())?)
}

/// A template of a machine whose program does nothing but trap, again and again.
pub fn build_smallest_template(workspace: &Workspace, directory: &Path) -> anyhow::Result<Template> {
    let mut booted = boot(&config(&workspace.kernel, &workspace.at_once))?;
    Ok(booted.machine.freeze(directory, &FreezeOptions::default())?)
}

/// Measures it all.
pub fn measure(
    workspace: &Workspace,
    selection: &Selection,
    rounds: u32,
    report: &mut Report,
) -> anyhow::Result<()> {
    let image = &workspace.boot_image().file;
    let real = with_image(config(&workspace.kernel, &workspace.initramfs), image);
    let at_once = config(&workspace.kernel, &workspace.at_once);
    let mut beside = with_image(config(&workspace.kernel, &workspace.at_once_beside_init), image);
    beside.extra_cmdline = "rdinit=/at-once".into();

    let base = MachineConfig {
        stop_at_base: true,
        ..real.clone()
    };
    let of_base = rounds::persist("the base", report, rounds::FAILURES_MAX, || {
        let directory = workspace.path("base");
        let mut booted = boot(&base)?;
        Ok(booted.machine.freeze(&directory, &FreezeOptions::default())?)
    })?;

    let directory = workspace.path("frozen");
    let freezing = || -> anyhow::Result<[f64; 5]> {
        let mut booted = boot(&real)?;
        let exits = booted.machine.exits();
        let start = Instant::now();
        let template = booted.machine.freeze(&directory, &FreezeOptions::default())?;
        let frozen = Instant::now();
        let kib = template.metadata().memory_data_bytes >> 10;
        std::fs::remove_dir_all(&directory)
            .with_context(|| format!("cannot remove {}", directory.display()))?;
        Ok([
            ms(booted.start, booted.frozen),
            exits.port as f64,
            exits.memory as f64,
            ms(start, frozen),
            kib as f64,
        ])
    };
    let mut probes = vec![
        Probe::new(
            [
                ("boot_freeze", Unit::Ms),
                ("boot_freeze_port_exits", Unit::Exits),
                ("boot_freeze_memory_exits", Unit::Exits),
                ("freeze", Unit::Ms),
                ("template_data", Unit::Kib),
            ],
            freezing,
        ),
        Probe::new([("boot_base", Unit::Ms)], || {
            let booted = boot(&base)?;
            Ok([ms(booted.start, booted.frozen)])
        }),
        Probe::new([("image_template", Unit::Ms)], || {
            let start = Instant::now();
            let mut clone = of_base.fork(ForkOptions::default())?;
            let outcome = clone.run(Some(BOOT_MAX))?;
            let end = Instant::now();
            expect(&clone, outcome, &Outcome::FreezePoint)?;
            Ok([ms(start, end)])
        }),
        Probe::new([("boot_load", Unit::Ms), ("boot_kernel", Unit::Ms)], || {
            let booted = boot(&at_once)?;
            Ok([ms(booted.start, booted.loaded), ms(booted.start, booted.frozen)])
        }),
        Probe::new([("boot_initramfs", Unit::Ms)], || {
            let booted = boot(&beside)?;
            Ok([ms(booted.start, booted.frozen)])
        }),
        Probe::new([("boot_base_process", Unit::Ms)], || {
            let mut command = own_process(workspace, &workspace.initramfs, Some(image));
            Ok([to_line(command.env(STOP_AT_BASE, "1"), REACHED)?])
        }),
        Probe::new([("boot_freeze_process", Unit::Ms)], || {
            Ok([to_line(
                &mut own_process(workspace, &workspace.initramfs, Some(image)),
                REACHED,
            )?])
        }),
        Probe::new([("boot_user_space_process", Unit::Ms)], || {
            Ok([to_line(
                &mut own_process(workspace, &workspace.at_once, None),
                REACHED,
            )?])
        }),
        Probe::new([("boot_reset_process", Unit::Ms)], || {
            Ok([to_exit(&mut own_process(workspace, &workspace.reset, None))?])
        }),
    ];
    if let Some(firecracker) = workspace.peer(Peer::Firecracker) {
        let config = write_firecracker_config(workspace, "to-user-space.json", &workspace.boot_timer)?;
        probes.push(Probe::new([("firecracker_user_space", Unit::Ms)], move || {
            let mut command = Command::new(firecracker);
            command
                .args(["--no-api", "--boot-timer", "--config-file"])
                .arg(&config);
            Ok([to_line(&mut command, "Guest-boot-time")?])
        }));
        let config = write_firecracker_config(workspace, "to-reset.json", &workspace.reset)?;
        probes.push(Probe::new([("firecracker_boot", Unit::Ms)], move || {
            let mut command = Command::new(firecracker);
            command.args(["--no-api", "--config-file"]).arg(&config);
            Ok([to_exit(&mut command)?])
        }));
    }
    rounds::measure("boots", probes, selection, (DISCARDED, rounds), report)
}

/// From spawning a process to having its exit status.
fn to_exit(command: &mut Command) -> anyhow::Result<f64> {
    Ok(process::watch(command.stdin(Stdio::null()), |_| false)?.exit)
}

/// From spawning a process to reading a line with `words` from it.
fn to_line(command: &mut Command, words: &str) -> anyhow::Result<f64> {
    let has_words = |output: &[u8]| String::from_utf8_lossy(output).contains(words);
    process::watch(command.stdin(Stdio::null()), has_words)?
        .mark
        .with_context(|| format!("{command:?} never said '{words}'"))
}

fn own_process(workspace: &Workspace, initramfs: &Path, image: Option<&Path>) -> Command {
    let mut command = Command::new(&workspace.bench);
    command
        .arg(BOOT_AND_EXIT)
        .arg(&workspace.kernel)
        .arg(initramfs)
        .args(image);
    command
}

/// Is a VMM process, if started so: boots a machine until it resets itself or reaches its freeze point, says so, ends.
/// Gives the exit status.
pub fn as_process() -> Option<i32> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != BOOT_AND_EXIT {
        return None;
    }
    let paths: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    Some(match boot_and_exit(&paths) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("error: {error:#}");
            1
        }
    })
}

fn boot_and_exit(paths: &[PathBuf]) -> anyhow::Result<()> {
    let mut config = match paths {
        [kernel, initramfs] => config(kernel, initramfs),
        [kernel, initramfs, image] => with_image(config(kernel, initramfs), image),
        _ => bail!("usage: {BOOT_AND_EXIT} KERNEL INITRAMFS [IMAGE]"),
    };
    config.stop_at_base = std::env::var_os(STOP_AT_BASE).is_some();
    let mut machine = Machine::boot(&config)?;
    let outcome = machine.run(Some(BOOT_MAX))?;
    if outcome == Some(Outcome::FreezePoint) {
        println!("{REACHED}");
        return Ok(());
    }
    expect(&machine, outcome, &Outcome::Reset)
}

/// Our kernel command line, without what names our devices.
pub fn cmdline_for_others(kernel: &Path, initramfs: &Path) -> String {
    let ours = config(kernel, initramfs).cmdline();
    let line: Vec<&str> = ours
        .split(' ')
        .filter(|word| !word.starts_with("picovm.") && !word.starts_with("virtio_mmio."))
        .collect();
    line.join(" ")
}

/// The same machine for Firecracker: kernel, memory, vCPU and kernel command line as ours, without what names our
/// devices.
fn write_firecracker_config(workspace: &Workspace, name: &str, initramfs: &Path) -> anyhow::Result<PathBuf> {
    let line = cmdline_for_others(&workspace.kernel, initramfs);
    let config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": workspace.kernel,
            "initrd_path": initramfs,
            "boot_args": line,
        },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
    });
    let path = workspace.path(name);
    std::fs::write(&path, config.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

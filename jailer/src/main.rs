//! `picovm-jailer --policy FILE.json -- PROGRAM ARGUMENTS...`: confines any program.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use picovm_jailer::{Ended, Jail, Jailer, Mode, Policy, Program, SeccompMode, Signals};
use rustix::event::{PollFd, PollFlags, poll};

/// Exit status of the jailer's own errors.
const OWN_ERROR: u8 = 125;

/// Confines a program: namespaces, root directory, cgroup, ids, limits and system calls of its own.
///
/// The exit status is that of the program; 128 + N if signal N ended it (159: a system call that is not allowed); 127 if it
/// is not in the jail; 126 if it cannot be executed; 125 if it could not be confined. Signals are passed on.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    /// What the program may have, as JSON; `--schema` describes it.
    #[arg(long, value_name = "FILE", required_unless_present = "schema")]
    policy: Option<PathBuf>,

    /// What happens at a system call that is not allowed, instead of what the policy says.
    #[arg(long, value_name = "MODE")]
    seccomp: Option<Calls>,

    /// Without root anywhere, as for a caller who is not root.
    #[arg(long)]
    rootless: bool,

    /// Print the JSON Schema of policies.
    #[arg(long, exclusive = true)]
    schema: bool,

    /// The program and its arguments.
    #[arg(last = true, value_name = "PROGRAM", required_unless_present = "schema")]
    program: Vec<OsString>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Calls {
    /// The program is killed.
    Kill,
    /// Each is told on standard error, once, and let through: nothing is confined.
    Log,
    /// Every call is allowed.
    Off,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            // 0 for --help and --version.
            return ExitCode::from(if error.use_stderr() { OWN_ERROR } else { 0 });
        }
    };
    if arguments.schema {
        print!("{}", Policy::schema());
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            // Each cause once: most messages name theirs themselves.
            let told = error.chain().skip(1).fold(error.to_string(), |told, cause| {
                let cause = cause.to_string();
                if told.contains(&cause) {
                    told
                } else {
                    format!("{told}: {cause}")
                }
            });
            eprintln!("picovm-jailer: {told}");
            ExitCode::from(OWN_ERROR)
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let mut policy = read_policy(arguments.policy.as_deref().unwrap_or_else(|| "".as_ref()))?;
    match arguments.seccomp {
        None => {}
        Some(Calls::Kill) => policy.seccomp.mode = SeccompMode::Kill,
        Some(Calls::Log) => policy.seccomp.mode = SeccompMode::Log,
        Some(Calls::Off) => policy.seccomp.mode = SeccompMode::Off,
    }
    let mode = if arguments.rootless {
        Mode::Rootless
    } else {
        Mode::of_caller()
    };
    let (name, rest) = arguments.program.split_first().context("no program was given")?;
    let program = Program::new(name, rest)?;
    let mut jailer = Jailer::new(policy, mode)?;
    // From here on they wait until there is somebody to pass them on to.
    let signals = Signals::block().context("cannot take over the signals")?;
    let jail = jailer.spawn_program(&program)?;
    Ok(match accompany(jail, &signals)? {
        Ended::Code(code) => {
            if code == SIGSYS_STATUS {
                eprintln!(
                    "picovm-jailer: {} was ended for a system call that is not allowed; --seccomp=log shows which",
                    name.display()
                );
            }
            code
        }
        Ended::Signal(signal) => 128u8.saturating_add(signal as u8),
    })
}

/// 128 + SIGSYS.
const SIGSYS_STATUS: u8 = 159;

fn read_policy(path: &std::path::Path) -> anyhow::Result<Policy> {
    let attempted = || format!("cannot read the policy {}", path.display());
    let mut json = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut json))
        .with_context(attempted)?;
    Policy::from_json(&json).with_context(attempted)
}

/// Passes signals on until the jail has ended.
fn accompany(mut jail: Jail, signals: &Signals) -> anyhow::Result<Ended> {
    loop {
        {
            let mut both = [
                PollFd::new(&jail, PollFlags::IN),
                PollFd::new(signals, PollFlags::IN),
            ];
            match poll(&mut both, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait for the jail"),
            }
        }
        while let Some(signal) = signals.take() {
            // It may have ended.
            let _ = jail.signal(signal);
        }
        if let Some(ended) = jail.try_wait()? {
            return Ok(ended);
        }
    }
}

//! `picovm-emulated-host`: runs a command inside a KVM host made of software.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use emulated_host::kernel::Kernel;
use emulated_host::runner::{self, Options};

/// Runs COMMAND inside an emulated KVM host.
///
/// QEMU emulates an AMD CPU with SVM, and a stock Debian kernel with kvm_amd runs on it. COMMAND runs there as root, sees
/// the machine's whole file system at the same paths, and starts in the current directory. What it writes vanishes, but
/// for the directories given with --share. Its standard streams and exit status are passed through; a status of 125 means
/// that the emulated host itself failed, and a sentence on standard error says how.
#[derive(Parser)]
#[command(name = "run", version)]
struct Arguments {
    /// Memory of the host.
    #[arg(long, value_name = "MIB", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(256..=1_048_576))]
    memory: u32,

    /// CPUs of the host; all run on one thread of the machine.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    cpus: u32,

    /// Let the host's clock count instructions (2 ns each, idle time is skipped), for figures that repeat.
    #[arg(long)]
    instruction_clock: bool,

    /// Make DIR writable: what is written there comes back. May be repeated.
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,

    /// Give up after so long, start included.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,

    /// Only get the host's kernel (downloaded once, about 35 MB) ready for later runs, and end.
    #[arg(long, conflicts_with = "command")]
    prepare: bool,

    /// Print timings; twice: also the host's console.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,

    /// The command and its arguments.
    #[arg(
        required_unless_present = "prepare",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

fn main() {
    let begun = Instant::now();
    let arguments = Arguments::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        // 125 and not clap's 2: that could be COMMAND's own status.
        std::process::exit(if error.use_stderr() {
            runner::FAILED.into()
        } else {
            0
        });
    });
    if arguments.prepare {
        let prepared = Kernel::get().map(|kernel| println!("{}", kernel.dir().display()));
        std::process::exit(status(prepared.map(|()| 0)).into());
    }
    let options = Options {
        memory: arguments.memory,
        cpus: arguments.cpus,
        instruction_clock: arguments.instruction_clock,
        shares: arguments.share,
        timeout: Duration::from_secs(arguments.timeout),
        verbose: arguments.verbose,
        command: arguments.command,
        begun,
    };
    std::process::exit(status(runner::run(options)).into());
}

/// The exit status; an error is told first.
fn status(outcome: anyhow::Result<u8>) -> u8 {
    outcome.unwrap_or_else(|error| {
        eprintln!("emulated host: {error:#}");
        runner::FAILED
    })
}

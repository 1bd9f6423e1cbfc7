//! `picovm`: runs every container as its own lightweight VM.

mod arguments;
mod bench;
mod doctor;
mod image;
mod output;
mod run;
mod template;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use arguments::{Cli, Command};

/// Exit status of picovm's own errors, as Docker has it, so that they are told from those of a container.
const OWN_ERROR: u8 = 125;

fn main() -> ExitCode {
    let cli = Cli::parse();
    log(cli.verbose);
    if !matches!(cli.command, Command::Run(_) | Command::Bench(_)) {
        end_with_the_reader();
    }
    let result = match cli.command {
        Command::Run(options) => run::run(&options),
        Command::Image(command) => image::image(&command),
        Command::Template(command) => template::template(&command),
        Command::Bench(command) => bench::bench(&command),
        Command::Doctor { json } => doctor::doctor(json),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "picovm", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("picovm: {}", output::sentence(&error));
        ExitCode::from(OWN_ERROR)
    })
}

/// `picovm image ls | head` ends silently, as other commands do. `run` handles a closed pipe itself; `bench` calls this
/// when nothing is measured any more, because a container that has ended must not end it.
fn end_with_the_reader() {
    // SAFETY: SIG_DFL is a valid disposition; it only puts the default action back, which Rust replaces at start.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

fn log(verbose: u8) {
    let level = match verbose {
        0 => return,
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    tracing_subscriber::fmt()
        .with_env_filter(level)
        .with_writer(std::io::stderr)
        .init();
}

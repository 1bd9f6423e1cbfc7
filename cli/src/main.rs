//! `picovm`: runs every container as its own lightweight VM.

#![expect(
    rustdoc::broken_intra_doc_links,
    reason = "what is said of options is the text of --help, where brackets are what may be left out"
)]

mod arguments;
mod bench;
mod container;
mod doctor;
mod format;
mod image;
mod image_arguments;
mod image_list;
mod output;
mod pool;
mod pull_arguments;
mod template;
mod transfer;
mod view;
mod volume;

use std::process::ExitCode;

use clap::CommandFactory;

use arguments::{Cli, Command};
use container::arguments::ContainerGroup;
use image_arguments::ImageCommand;
use tracing_subscriber::filter::LevelFilter;

/// Exit status of picovm's own errors, as Docker has it, so that they are told from those of a container.
const OWN_ERROR: u8 = 125;

fn main() -> ExitCode {
    let words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    let cli = match Cli::read(&words) {
        Ok(cli) => cli,
        Err(error) => return not_understood(&error),
    };
    log(cli.verbose.saturating_add(cli.short_verbose));
    if !matches!(
        cli.command,
        Command::Container(_) | Command::Group(ContainerGroup::Same(_)) | Command::Bench(_)
    ) {
        end_with_the_reader();
    }
    let result = match cli.command {
        Command::Container(command) => return container::container(command),
        Command::Group(command) => return container::group(command),
        Command::Ps(options) => return ended(container::ps(&options)),
        Command::Inspect(options) => return ended(container::inspect(&options)),
        Command::Events(options) => return ended(container::events(&options)),
        Command::Image(command) => return ended(image::image(&command)),
        Command::Pull(options) => return ended(image::image(&ImageCommand::Pull(options))),
        Command::Images(options) => return ended(image::image(&ImageCommand::Ls(options))),
        Command::Rmi(options) => return ended(image::image(&ImageCommand::Rm(options))),
        Command::Tag(options) => return ended(image::image(&ImageCommand::Tag(options))),
        Command::Load(options) => return ended(image::image(&ImageCommand::Load(options))),
        Command::Save(options) => return ended(image::image(&ImageCommand::Save(options))),
        Command::Prune(options) => return ended(image::image(&ImageCommand::Prune(options))),
        Command::Volume(command) => return ended(volume::volume(&command)),
        Command::Template(command) => template::template(&command),
        Command::Pool(command) => return ended(pool::pool(&command)),
        Command::Bench(command) => bench::bench(&command),
        Command::Doctor { json } => doctor::doctor(json),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "picovm", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    output::ended_with(result, OWN_ERROR)
}

/// What is said of a command line that cannot be read. Where the status is a container's, picovm's own errors have their own.
fn not_understood(error: &clap::Error) -> ExitCode {
    /// As clap has it.
    const USAGE: u8 = 2;
    // What cannot be printed cannot be told.
    let _ = error.print();
    let mut words = std::env::args_os()
        .skip(1)
        .filter(|word| !word.as_encoded_bytes().starts_with(b"-"))
        .skip_while(|word| word == "container");
    let runs = words
        .next()
        .is_some_and(|word| word == "run" || word == "create" || word == "exec");
    ExitCode::from(match error.use_stderr() {
        false => 0,
        true if runs => OWN_ERROR,
        true => USAGE,
    })
}

/// The status of a command that runs no container: as in Docker, 1 if it failed.
fn ended(result: anyhow::Result<ExitCode>) -> ExitCode {
    output::ended_with(result, 1)
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
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .init();
}

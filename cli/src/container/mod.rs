//! Containers: the commands that make them, look at them, and end them.

pub mod arguments;
mod attach;
mod changes;
mod copy;
mod create;
mod events;
mod exec;
mod filter;
mod inspect;
mod lifecycle;
mod list;
mod logs;
mod mounts;
mod run;
mod terminal;
mod usage;
mod values;
mod warm;

use std::process::ExitCode;

use picovm_engine::containers::{Containers, Record};

use crate::{OWN_ERROR, end_with_the_reader, output};
use arguments::{ContainerCommand, ContainerGroup};

pub use create::confirmed;
pub use events::events;
pub use inspect::inspect;
pub use list::list as ps;
pub use warm::application;

/// `picovm container`.
pub fn group(command: ContainerGroup) -> ExitCode {
    match command {
        ContainerGroup::Same(command) => container(command),
        ContainerGroup::Ls(options) => ended(list::list(&options)),
        ContainerGroup::Inspect(mut options) => {
            options.r#type = Some(arguments::ObjectType::Container);
            ended(inspect::inspect(&options))
        }
        ContainerGroup::Prune(options) => ended(lifecycle::prune(&options)),
    }
}

/// What is the same with and without the word `container`.
pub fn container(command: ContainerCommand) -> ExitCode {
    use ContainerCommand as Do;
    // A pipe that is closed ends what only prints. What serves a container, or copies, deals with it itself.
    if matches!(
        command,
        Do::Logs(_) | Do::Top(_) | Do::Stats(_) | Do::Wait(_) | Do::Create(_) | Do::Rm(_)
    ) {
        end_with_the_reader();
    }
    match command {
        Do::Run(options) => output::ended_with(run::run(&options), OWN_ERROR),
        Do::Create(options) => output::ended_with(
            create::create(&options.create).map(|()| ExitCode::SUCCESS),
            OWN_ERROR,
        ),
        Do::Start(options) => ended(run::start(&options)),
        Do::Stop(options) => ended(lifecycle::stop(&options)),
        Do::Kill(options) => ended(lifecycle::kill(&options)),
        Do::Restart(options) => ended(lifecycle::restart(&options)),
        Do::Pause(names) => ended(lifecycle::pause(&names)),
        Do::Unpause(names) => ended(lifecycle::unpause(&names)),
        Do::Wait(names) => ended(lifecycle::wait(&names)),
        Do::Rm(options) => ended(lifecycle::remove(&options)),
        Do::Logs(options) => ended(logs::logs(&options)),
        Do::Exec(options) => ended(exec::exec(&options)),
        Do::Attach(options) => ended(attach::attach(&options)),
        Do::Top(options) => ended(usage::top(&options)),
        Do::Stats(options) => ended(usage::stats(&options)),
        Do::Cp(options) => ended(copy::copy(&options)),
        Do::Rename(options) => ended(lifecycle::rename(&options)),
        Do::Commit(options) => ended(changes::commit(&options)),
        Do::Diff(options) => ended(changes::diff(&options)),
    }
}

/// As in Docker, 1 if it failed.
fn ended(result: anyhow::Result<ExitCode>) -> ExitCode {
    output::ended_with(result, 1)
}

/// Does something to each of these containers, and prints the names of those to which it was done. What goes wrong with one is
/// told, and the others get their turn.
fn each(
    containers: &Containers,
    names: &[String],
    mut done: impl FnMut(&Record) -> anyhow::Result<()>,
) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        let result = containers
            .find(name)
            .map_err(anyhow::Error::from)
            .and_then(|record| done(&record));
        match result {
            Ok(()) => output::say(name),
            Err(error) => {
                eprintln!("picovm: {}", output::sentence(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

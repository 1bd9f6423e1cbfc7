//! `picovm exec`.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;

use anyhow::Context;
use picovm_engine::containers::{Client, ClientNews, ContainerConfig};
use picovm_engine::{ContainerExit, ProcessSpec, Store, TerminalSize};

use super::arguments::ExecOptions;
use super::attach::{self, Ends, Following, Subject, Wanted};
use super::{create, terminal};

/// Size of the terminal of a process that runs where there is none.
const NO_TERMINAL: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};

pub fn exec(options: &ExecOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let containers = store.containers()?;
    let record = containers.find(&options.container)?;
    let spec = process(&record.config, options)?;
    let client = containers.connect(&record)?;
    if options.detach {
        return detached(&client, spec);
    }
    let wanted = Wanted {
        terminal: options.tty,
        stdin: options.interactive,
        stdout: true,
        stderr: true,
    };
    let ends = Ends::open(wanted, &options.detach_keys)?;
    let null = null()?;
    let attachment = ends.attachment(false);
    let or_null = |stream: Option<_>| stream.unwrap_or(null.as_fd());
    client.exec(
        spec,
        [attachment.stdin, attachment.stdout, attachment.stderr].map(or_null),
    )?;
    let following = Following {
        subject: Subject::Process,
        sig_proxy: true,
        deadline: None,
    };
    let end = attach::follow(&client, ends, &following)?;
    if let attach::End::Detached = end {
        eprintln!();
        return Ok(ExitCode::SUCCESS);
    }
    attach::status(&record.name, end)
}

/// Begins a process and does not stay with it, but for one that cannot be begun.
fn detached(client: &Client, spec: ProcessSpec) -> anyhow::Result<ExitCode> {
    /// How long it is waited for that a program cannot be executed, in milliseconds.
    const MOMENT: rustix::event::Timespec = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    let null = null()?;
    client.exec(spec, [null.as_fd(), null.as_fd(), null.as_fd()])?;
    let mut fds = [rustix::event::PollFd::new(client, rustix::event::PollFlags::IN)];
    if matches!(rustix::event::poll(&mut fds, Some(&MOMENT)), Ok(count) if count > 0)
        && let ClientNews::Exited(exit @ ContainerExit::NotStarted(_)) = client.news()?
    {
        return attach::status("", attach::End::Exited(exit));
    }
    Ok(ExitCode::SUCCESS)
}

fn null() -> anyhow::Result<std::fs::File> {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("cannot open /dev/null")
}

/// The process: as the container's own, with what is given over it.
fn process(config: &ContainerConfig, options: &ExecOptions) -> anyhow::Result<ProcessSpec> {
    let bytes = |strings: Vec<OsString>| strings.into_iter().map(OsString::into_vec).collect();
    // The container's variables are as an image's: what is given is over them.
    let defaults = picovm_engine::RunConfig::default();
    let mut all: Vec<OsString> = config.env.iter().map(|text| text.0.clone()).collect();
    if options.tty {
        all.push("TERM=xterm".into());
        all.extend(
            config
                .env
                .iter()
                .filter(|text| text.0.as_encoded_bytes().starts_with(b"TERM="))
                .map(|text| text.0.clone()),
        );
    }
    all.extend(create::given_environment(&options.env_file, &options.env)?);
    let user = options.user.clone();
    Ok(ProcessSpec {
        args: bytes(options.command.clone()),
        env: bytes(defaults.environment(all)),
        cwd: options
            .workdir
            .clone()
            .unwrap_or_else(|| config.workdir.0.clone())
            .into_vec(),
        groups: match user {
            Some(_) => Vec::new(),
            None => bytes(config.groups.iter().map(|text| text.0.clone()).collect()),
        },
        user: user.unwrap_or_else(|| config.user.0.clone()).into_vec(),
        stdin: options.interactive,
        terminal: options.tty.then(|| terminal::size().unwrap_or(NO_TERMINAL)),
        rlimits: config.rlimits.clone(),
        drop_capabilities: if options.privileged {
            0
        } else {
            config.drop_capabilities
        },
        no_new_privileges: config.no_new_privileges && !options.privileged,
    })
}

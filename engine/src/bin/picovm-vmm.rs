//! `picovm-vmm [--no-jail | --seccomp=log] TEMPLATE`: the fork server of a pool, started by it with a socket as standard input. Each child of it is the
//! VMM process of one clone.
//!
//! `picovm-vmm make-template [--no-jail | --seccomp=log]`: starts the jailed processes that make templates, for whoever needs one.
//!
//! `picovm-vmm keep-pool`: becomes the process of a standing pool.
//!
//! Not to be called by people.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use picovm_engine::{Confinement, KEEP_POOL, MAKE_TEMPLATE};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    let mut has = |option| arguments.next_if(|argument| argument == option).is_some();
    let makes_templates = has(MAKE_TEMPLATE);
    let keeps_pool = !makes_templates && has(KEEP_POOL);
    let confinement = if has("--no-jail") {
        Confinement::Unconfined
    } else if has("--seccomp=log") {
        Confinement::CallsLogged
    } else {
        Confinement::Jailed
    };
    let (template, None) = (arguments.next().map(PathBuf::from), arguments.next()) else {
        return usage();
    };
    if template.is_some() == (makes_templates || keeps_pool) {
        return usage();
    }
    let input = std::io::stdin();
    if input.is_terminal() {
        return usage();
    }
    // The socket is the server's alone: its children must not keep it open as their standard input.
    let taken = rustix::io::fcntl_dupfd_cloexec(&input, 3).and_then(|control| {
        let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())?;
        rustix::stdio::dup2_stdin(null)?;
        Ok(control)
    });
    let Ok(control) = taken else {
        return usage();
    };
    let served = match template {
        Some(template) => picovm_engine::serve_pool(&template, control.into(), confinement),
        None if keeps_pool => picovm_engine::keep_pool(control),
        None => picovm_engine::serve_maker(control, confinement),
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("picovm-vmm: {error}");
            ExitCode::from(125)
        }
    }
}

fn usage() -> ExitCode {
    eprintln!(
        "picovm-vmm serves a pool or makes templates for picovm, which starts it; to run a container, see `picovm run --help`"
    );
    ExitCode::from(125)
}

//! Rehearsals: whole containers run before the freeze, through the very code that serves the real one, so that a
//! clone finds code, page cache, dentries and allocator caches warm.

use std::os::fd::OwnedFd;

use picovm_guest_protocol::{ContainerSpec, ProcessSpec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::accounts::Accounts;
use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::container::Ground;
use crate::error::{Attempt, InitError};
use crate::stub::{self, Setting, Stack};

/// How often. The first one reads from the image, the second finds it cached; more change nothing.
const REHEARSALS: usize = 2;

/// What is rehearsed: a shell that writes a line. An image without one still warms the way to its failure.
pub fn spec() -> ContainerSpec {
    ContainerSpec::of(ProcessSpec {
        args: [&b"sh"[..], b"-c", b"echo"].map(<[u8]>::to_vec).to_vec(),
        ..ProcessSpec::default()
    })
}

/// Runs the rehearsals, each served over a socket pair in the place of the control port, and in the container's control group,
/// which counts nothing yet.
pub fn run(stack: &Stack, accounts: &Accounts, group: Option<&Cgroup>) -> Result<(), InitError> {
    let ground = Ground::default();
    for _ in 0..REHEARSALS {
        let (control, _host) = control_pair().attempt(|| "make a socket pair".into())?;
        let (pipes, ends) = stub::pipes()?;
        let agent = Agent::new(control, pipes, &ground)?;
        let setting = Setting {
            stack,
            accounts,
            ground: &ground,
            control: agent.control(),
            terminal: agent.terminal(),
        };
        let begun = stub::begin(setting, ends, || {
            stub::enter_group(group)?;
            stub::confine()?;
            Ok(Some(spec()))
        })?;
        agent.serve(begun)?;
    }
    Ok(())
}

/// Two ends of a connection, non-blocking.
pub fn control_pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

//! Freezing the machine with a running container in it, and what a clone of such a machine does before that container goes on.
//!
//! From the freeze until the clone has randomness of its own, and its hooks have run, the kernel lets nothing of the container
//! run (`cgroup.freeze`).

// What a guest or a file says must not end this process.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use picovm_guest_protocol::frame::MAIN;
use picovm_guest_protocol::{ContainerSpec, Frame, FrameDecoder, StartFailure, Stream};

use super::{Agent, AgentError, hooks};
use crate::cgroup::Cgroup;
use crate::container::{self, Ground};
use crate::identity::{IdentityArea, Machine};
use crate::names;
use crate::start::failure;
use crate::stub;
use crate::trap::Trap;

/// Name of the control group of hooks, which run while the container's own stands still.
const HOOKS_GROUP: &str = "hooks";

/// What it takes to reach a freeze point.
#[derive(Clone, Copy)]
pub struct FreezePoint<'a> {
    /// Where the identity of a clone is written.
    pub area: &'a IdentityArea,
    /// The way to the VMM.
    pub trap: &'a Trap,
    /// What becomes the clone's own.
    pub machine: &'a Machine,
}

/// How far freezing has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Freezing {
    /// Nobody has asked for it.
    #[default]
    No,
    /// The container stands still; what it has written is on its way.
    Draining,
    /// The host was told that all of it was sent.
    Told,
    /// Nothing more comes from the host.
    Now,
}

fn cannot(failed: &StartFailure) -> AgentError {
    AgentError::Freeze(format!("{}: {}", failed.attempted, failed.message))
}

impl Agent<'_> {
    /// The host has said so.
    pub(super) fn freeze(&mut self) -> Result<(), AgentError> {
        match self.freezing {
            Freezing::No if self.has_ended => Ok(()),
            Freezing::No if self.freeze_point.is_none() => {
                Err(AgentError::Protocol("asked what is no machine to freeze"))
            }
            Freezing::No if self.processes.len() != 1 || !self.processes.contains_key(&MAIN) => {
                Err(AgentError::Protocol("asked to freeze more than the main process"))
            }
            Freezing::No => {
                self.group()?.freeze().map_err(|failed| cannot(&failed))?;
                if let Some(main) = self.processes.get_mut(&MAIN) {
                    main.look_again();
                }
                self.freezing = Freezing::Draining;
                Ok(())
            }
            Freezing::Told => {
                self.freezing = Freezing::Now;
                Ok(())
            }
            Freezing::Draining | Freezing::Now => Err(AgentError::Protocol("asked again to freeze")),
        }
    }

    fn group(&self) -> Result<&Cgroup, AgentError> {
        self.ground
            .cgroup
            .as_ref()
            .ok_or_else(|| AgentError::Freeze("its kernel has no control groups".into()))
    }

    /// Goes on with freezing as far as it can; whether that has changed anything.
    pub(super) fn go_on_freezing(&mut self) -> Result<bool, AgentError> {
        match self.freezing {
            Freezing::No | Freezing::Told => Ok(false),
            Freezing::Draining => {
                self.outgoing.hurry();
                let drained = self.processes.get(&MAIN).is_some_and(|main| main.is_drained());
                if !drained || !self.outgoing.is_empty() {
                    return Ok(!self.outgoing.is_empty() && self.outgoing.writable);
                }
                self.outgoing.push(MAIN, &Frame::Freeze)?;
                self.freezing = Freezing::Told;
                Ok(true)
            }
            Freezing::Now => {
                self.freezing = Freezing::No;
                self.become_clone()?;
                Ok(true)
            }
        }
    }

    /// Freezes the machine; in the clone, makes it one, and lets its container go on.
    fn become_clone(&mut self) -> Result<(), AgentError> {
        let Some(point) = self.freeze_point else {
            return Ok(());
        };
        let hooks_group = self
            .group()?
            .beside(HOOKS_GROUP)
            .map_err(|error| AgentError::Freeze(format!("make the control group of hooks: {error}")))?;
        let ground = Ground {
            is_guest: self.ground.is_guest,
            cgroup: Some(hooks_group),
            layers: None,
        };
        let identity = point
            .area
            .freeze_until_cloned(point.trap)
            .map_err(|failed| cannot(&failed))?;
        // Nothing of the container runs before this is done.
        point
            .machine
            .become_clone(&identity)
            .map_err(|failed| cannot(&failed))?;
        // At the other end is another host, which knows nothing of what was sent.
        self.decoder = FrameDecoder::default();
        self.readable = true;
        self.hung_up = false;
        self.outgoing.writable = true;
        self.children_changed = true;
        let hostname = identity.hostname;
        let spec = match identity.container {
            Some(spec) => Ok(spec),
            None => stub::receive(self.control()),
        };
        if let Some(main) = self.processes.get_mut(&MAIN) {
            main.meet_another_host();
        }
        let prepared = spec.and_then(|spec| {
            self.stays = spec.stay;
            self.prepare_clone(&hostname, &spec, &ground)?;
            Ok(spec)
        });
        match prepared {
            Ok(spec) => {
                if spec.announce {
                    self.outgoing.push(MAIN, &Frame::Started)?;
                }
                if let Some(main) = self.processes.get_mut(&MAIN).filter(|_| !spec.process.stdin) {
                    main.obey(Frame::Close(Stream::Stdin), &mut self.outgoing)?;
                }
            }
            Err(failed) => {
                if let Some(main) = self.processes.get_mut(&MAIN) {
                    main.fail(failed);
                }
                self.kill_what_is_left(self.ground.is_guest);
            }
        }
        self.group()?.thaw().map_err(|failed| cannot(&failed))
    }

    /// Does what is the clone's own in the container, which still stands still.
    fn prepare_clone(
        &mut self,
        hostname: &str,
        spec: &ContainerSpec,
        ground: &Ground,
    ) -> Result<(), StartFailure> {
        names::rename(hostname)?;
        if !spec.hosts.is_empty() {
            container::add_hosts(&spec.hosts)?;
        }
        let (said, ran) = hooks::run(&spec.process, ground);
        if let Some(main) = self.processes.get_mut(&MAIN).filter(|_| !said.is_empty()) {
            main.say(&said, &mut self.outgoing)
                .map_err(|error| failure("pass on what hooks have written", 0, error))?;
        }
        ran
    }
}

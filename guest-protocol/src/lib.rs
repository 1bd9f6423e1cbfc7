//! What the host and a clone's `init` say to each other.
//!
//! Three parts, one module each, used by both sides so that they cannot drift apart:
//!
//! * [`trap`]: the registers of the freeze trap, the one MMIO page through which `init` tells the VMM that it is ready
//!   to be cloned, where its identity is to be written, and that it is done;
//! * [`identity`]: what makes a clone itself, written by the host into guest memory before the clone's first
//!   instruction;
//! * [`frame`]: the agent's messages on the control connection: processes, streams, signals, exit status.
//!
//! Neither side trusts the other: every decoder here takes arbitrary bytes and answers with a value or an error.

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

pub mod frame;
pub mod identity;
pub mod trap;

pub use frame::{ContainerExit, Frame, FrameDecoder, FrameError, StartFailure, Stream};
pub use identity::{
    Change, ChangeKind, ContainerSpec, Helper, Identity, IdentityError, Limits, Mount, PathStatus,
    ProcessSpec, Task, TerminalSize, Usage,
};

/// Version of everything in this crate. A template made by another version is rebuilt, never reinterpreted.
pub const PROTOCOL_VERSION: u32 = 5;

/// Name of the virtio-console port that carries the control connection, as sysfs shows it in
/// `/sys/class/virtio-ports/vportNpM/name`.
pub const CONTROL_PORT_NAME: &str = "picovm.control";

/// Tag by which the guest mounts what the host shares with it (virtio 1.2, 5.11.4).
pub const SHARE_TAG: &str = "picovm";

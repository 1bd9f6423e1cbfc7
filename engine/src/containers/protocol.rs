//! What a client and a container's monitor say to each other, over the monitor's Unix socket; one request on each connection.

use picovm_guest_protocol::{ContainerExit, Helper, ProcessSpec, TerminalSize};
use serde::{Deserialize, Serialize};

/// To a monitor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToMonitor {
    /// Connect the container's streams with descriptors: those that are wanted, in this order.
    Attach { stdin: bool, stdout: bool, stderr: bool },
    /// Deliver a signal to the container.
    Signal(u8),
    /// End it: by this signal, after so many seconds by `SIGKILL`. Answered when it has ended.
    Stop {
        signal: Option<u8>,
        timeout: Option<u32>,
    },
    /// Let it stand still.
    Pause,
    /// Let it go on.
    Unpause,
    /// Begin a process in it, with three descriptors as its streams.
    Exec(ProcessSpec),
    /// Have its agent do something, with three descriptors as streams.
    Help(Helper),
    /// The size of the terminal of who has attached or executed on this connection.
    Resize(TerminalSize),
    /// Deliver a signal to the process that was executed on this connection.
    SignalOwn(u8),
    /// Tell when it has ended.
    Wait,
}

/// From a monitor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromMonitor {
    /// It is done, or under way.
    Done,
    /// It is not done, for this reason.
    Refused(String),
    /// The container's main process runs.
    Started,
    /// The process that was executed on this connection has ended.
    Exited(ContainerExit),
    /// The container has ended.
    Ended(Ending),
}

/// How a container has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Its exit status, as a shell has it; 125 to 127 if it could not be started.
    pub code: u8,
    /// Why it could not be started, or ended other than by itself; empty if it did not.
    pub error: String,
    /// Whether a process of it was killed because memory had run out.
    pub oom_killed: bool,
}

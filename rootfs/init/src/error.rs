//! What went wrong in init, for the console.

use std::io;

use crate::agent::AgentError;

/// Why the guest cannot go on. The message names what was attempted, on what.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A system call or file operation failed.
    #[error("{attempted}: {source}")]
    System {
        /// What was attempted, on what.
        attempted: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The machine is not as the VMM should have made it.
    #[error("{0}")]
    Machine(String),
    /// Serving the container failed.
    #[error("the agent cannot go on: {0}")]
    Agent(#[from] AgentError),
}

/// Says what was attempted when an operation fails.
pub trait Attempt<T> {
    /// Turns the error into an [`InitError::System`] with `attempted` in front.
    fn attempt(self, attempted: impl FnOnce() -> String) -> Result<T, InitError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn attempt(self, attempted: impl FnOnce() -> String) -> Result<T, InitError> {
        self.map_err(|source| InitError::System {
            attempted: attempted(),
            source: source.into(),
        })
    }
}

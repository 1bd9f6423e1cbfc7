//! What is saved of a file system device.

use serde::{Deserialize, Serialize};

/// Saved state. A clone has another share server, which knows nothing of what was asked: the requests that were under way are
/// answered with an error there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// Requests that had no reply yet.
    pub unanswered: Vec<Unanswered>,
}

/// A request under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unanswered {
    /// Index of its queue.
    pub queue: u16,
    /// Head of its chain.
    pub head: u16,
    /// The guest's number of it.
    pub unique: u64,
    /// Where its reply goes: guest-physical addresses and lengths.
    pub reply: Vec<(u64, u32)>,
}

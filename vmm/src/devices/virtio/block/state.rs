//! What is saved of a block device: nothing of its backend but what a clone's backend must match.

use serde::{Deserialize, Serialize};

/// Saved state. Requests are completed before a notification returns, so none is ever under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Capacity in sectors of 512 bytes, which the guest has read.
    pub sectors: u64,
    /// Whether a smaller file will do: what is behind its end reads as zeros.
    pub padded: bool,
    /// Whether the guest was told that it cannot write.
    pub read_only: bool,
    /// The guest accepted `VIRTIO_BLK_F_FLUSH`.
    pub flush: bool,
}

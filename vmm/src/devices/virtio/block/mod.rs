//! Block device (virtio 1.2, 5.2).

mod backend;
mod device;
mod state;

pub use backend::{BackendError, FileBackend};
pub use device::Block;
pub use state::BlockState;

//! File system device (virtio 1.2, 5.11): directories of the host, served by another process.

mod backend;
mod device;
mod state;

pub use backend::ShareBackend;
pub use device::Fs;
pub use state::{FsState, Unanswered};

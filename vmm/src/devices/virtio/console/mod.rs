//! Console device (virtio 1.2, 5.3) with one generic port: the byte stream of the control connection.

mod backend;
mod device;
mod state;

pub use backend::{StreamBackend, connection};
pub use device::Console;
pub use state::ConsoleState;

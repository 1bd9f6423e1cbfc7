//! What is saved of a console device.

use serde::{Deserialize, Serialize};

/// Saved state. Bytes that the guest has sent but the backend has not yet taken stay in the queue; those that the
/// backend gave and the guest has not yet taken are here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// The guest accepted `VIRTIO_CONSOLE_F_MULTIPORT`.
    pub multiport: bool,
    /// The guest has opened the port.
    pub guest_open: bool,
    /// The guest has set the port up, so that it listens to what is said of it.
    pub port_ready: bool,
    /// The guest was told that the host's side is open.
    pub announced_open: bool,
    /// Control messages not yet delivered to the guest.
    pub control: Vec<Vec<u8>>,
    /// Bytes on their way to the guest.
    pub to_guest: Vec<u8>,
    /// Bytes of the first waiting transmit chain that the backend has already.
    pub sent: u64,
}

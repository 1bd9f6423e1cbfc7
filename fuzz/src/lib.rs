//! What the fuzz targets do with their input, one function each. A target fails by a panic, by touching memory that is
//! none of the guest's, or by not ending in time.
//!
//! Input is taken to be hostile: from the guest (devices, session), from a file (template, archive, accounts), from
//! another process (messages), or, seen from the guest, from the host (agent, identity).

mod files;
mod guest;
mod legacy;
mod protocol;
mod virtio;

pub use files::{image_archive, template_state};
pub use legacy::legacy_and_trap;
pub use protocol::{agent, identity, messages, session};
pub use virtio::{virtio_block, virtio_console, virtio_entropy, virtio_fs};

/// First byte of an input of `template_state`: which file the rest is.
pub const TEMPLATE_FILES: [u8; 3] = *b"mws";

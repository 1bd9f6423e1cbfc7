//! What the guest sees beside memory and processors.
//!
//! Every virtio device has a folder with the same files: `device.rs` (what the guest sees), `backend.rs` (what it lies
//! on, on the host; a clone gets a backend of its own) and `state.rs` (what is saved of it, a plain struct). The
//! transport between them and the guest is [`virtio::transport`].
//!
//! # Life of a device
//! 1. made with a backend, reset;
//! 2. used by the guest from vCPU threads, and by its backend from the device thread, never by both at once: each
//!    device stands behind one lock;
//! 3. *paused*: touches guest memory no more until resumed. Work that comes in waits;
//! 4. *saved*, while paused: a plain struct, taken without changing the device;
//! 5. *resumed*, in the same machine, or made anew from the saved struct in a clone and then resumed. Resuming looks
//!    at all queues once, for work that waited.
//!
//! The guest is hostile: whatever it does to a device is an error of that device, never a panic.

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

pub mod bus;
pub mod interrupt;
pub mod legacy;
pub mod trap;
pub mod virtio;

//! The share server: carries out the FUSE requests of one guest on the directories that are in its root.
//!
//! It is a process of its own, so that neither the VMM can open a file of the host nor this server see the guest's memory.
//! Requests come and replies go as packets of a Unix socket, each a whole message of the FUSE protocol. Who starts it confines
//! it: in its root there is nothing but what is shared, and what is shared read-only is mounted so.

// What a guest says must not end this process.
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

mod directories;
mod numbers;
mod server;

pub use directories::Directories;
pub use server::{REQUEST_MAX, serve};

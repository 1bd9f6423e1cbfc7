//! Templates: a booted, frozen machine in a directory, immutable, checksummed and versioned.
//!
//! | file | what |
//! |---|---|
//! | `template.json` | format version, how the machine was made, checksums of the other files, and its own |
//! | `state` | everything of the machine but its memory ([`crate::machine::MachineState`]), postcard |
//! | `memory` | guest memory, low range first; pages of zeros are holes |
//! | `working-set` | which pages a start touches ([`crate::WorkingSet`]); may be missing |
//! | `verified` | says for which boot of this host the memory's checksum has been compared; may be missing |
//!
//! A template is written under another name and renamed, so that a directory with a template's name is whole.

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

pub(crate) mod checksum;
mod draft;
mod expected;
mod format;
mod freeze;
mod large_pages;
mod open;

pub use draft::{Draft, FrozenFiles, unfinished};
pub use expected::Expected;
pub use format::{FORMAT_VERSION, FileRecord, Metadata, TemplateError, encode as encode_metadata};
pub use freeze::FreezeOptions;
pub use open::{ForkOptions, Template};

/// The pure parses of a template's files, for the fuzz targets.
#[cfg(fuzzing)]
pub mod parses {
    pub use super::format::decode as metadata;
    pub use super::open::{decode_state as state, decode_working_set as working_set};
}

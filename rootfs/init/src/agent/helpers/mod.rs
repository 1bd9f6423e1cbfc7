//! What the agent does in a container for the host, each in a process of its own: a copy of the agent.

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

mod files;
mod listeners;
mod tasks;
mod usage;

use std::io::{self, BufWriter, Write};
use std::path::Path;

use picovm_guest_protocol::Helper;

use crate::archive::unpack::{Manner, unpack};
use crate::container::Ground;
use crate::layer::Layers;

/// Bytes that go into the pipe at once.
const BUFFER: usize = 64 << 10;

/// Does it, with the streams of this process. Gives its exit status: 0, or 1 with a sentence on standard error.
pub fn run(helper: &Helper, ground: &Ground) -> u8 {
    match act(helper, ground) {
        Ok(()) => 0,
        Err(message) => {
            // Nothing is left to tell it to if this fails, too.
            let _ = io::stderr().write_all(format!("{message}\n").as_bytes());
            1
        }
    }
}

fn act(helper: &Helper, ground: &Ground) -> Result<(), String> {
    let mut output = BufWriter::with_capacity(BUFFER, io::stdout().lock());
    match helper {
        Helper::Pack { path, follow } => files::pack(path, *follow, &mut output)?,
        Helper::Unpack { path, keep_owners } => {
            let directory = files::directory(path)?;
            let manner = Manner::Copy {
                keep_owners: *keep_owners,
            };
            unpack(io::stdin().lock(), &directory, manner)?;
        }
        Helper::Stat { path } => answer(&mut output, &files::stat(path)?)?,
        Helper::Changes => {
            let changes = in_layer(ground, |layers| layers.changes(Path::new(".")))?;
            answer(&mut output, &changes)?;
        }
        Helper::SaveLayer => in_layer(ground, |layers| layers.save(Path::new("."), &mut output))?,
        Helper::Sync => {
            let layers = ground
                .layers
                .as_ref()
                .ok_or("this machine has no writable layer of its own")?;
            layers
                .sync()
                .map_err(|error| format!("write the writable layer to its disk: {error}"))?;
        }
        Helper::Tasks => answer(&mut output, &tasks::tasks(ground)?)?,
        Helper::Usage => answer(&mut output, &usage::usage(ground)?)?,
        Helper::Listens(port) => listeners::find(*port)?,
    }
    output
        .flush()
        .map_err(|error| format!("write to standard output: {error}"))
}

fn answer(output: &mut impl Write, value: &impl serde::Serialize) -> Result<(), String> {
    let bytes = postcard::to_stdvec(value).map_err(|error| format!("encode the answer: {error}"))?;
    output
        .write_all(&bytes)
        .map_err(|error| format!("write to standard output: {error}"))
}

fn in_layer<T>(ground: &Ground, look: impl FnOnce(&Layers) -> io::Result<T>) -> Result<T, String> {
    let layers = ground
        .layers
        .as_ref()
        .ok_or("this machine has no writable layer of its own")?;
    layers
        .enter()
        .map_err(io::Error::from)
        .and_then(|()| look(layers))
        .map_err(|error| format!("look at the writable layer: {error}"))
}

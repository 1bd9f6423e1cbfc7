//! Freezing: a machine that stands still becomes a template.

// Sizes of regions and chunks of this process, none of them from a guest or a file.
#![allow(clippy::arithmetic_side_effects)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::checksum::{self, CHUNK};
use super::draft::{Draft, FrozenFiles};
use super::format::TemplateError;
use super::open::Template;
use crate::machine::{Machine, MachineError};

/// Pages of a chunk.
const CHUNK_PAGES: u64 = CHUNK as u64 / 4096;

/// What is written beside the machine itself.
#[derive(Clone, Debug, Default)]
pub struct FreezeOptions {
    /// Kept in the metadata; read back with [`Template::metadata`].
    pub notes: BTreeMap<String, String>,
}

impl Machine {
    /// Freezes a machine that stands still into a new directory and opens it. The machine is not consumed: start it
    /// again to reach a later freeze point.
    ///
    /// # Errors
    /// [`TemplateError::Exists`], [`TemplateError::Io`] (a full disk among them), [`TemplateError::Machine`]. Nothing
    /// is left at the directory or beside it.
    pub fn freeze(&mut self, directory: &Path, options: &FreezeOptions) -> Result<Template, TemplateError> {
        let draft = Draft::new(directory)?;
        let files = draft.create_files()?;
        self.freeze_into(&files, None)?;
        draft.seal(options.notes.clone(), None)
    }

    /// Writes memory and state of a machine that stands still into files that are open already, for somebody else to
    /// [seal](Draft::seal). `pagemap` is this process's `/proc/self/pagemap`, where that cannot be opened.
    ///
    /// # Errors
    /// [`TemplateError::Io`], [`TemplateError::Machine`].
    pub fn freeze_into(&mut self, files: &FrozenFiles, pagemap: Option<&File>) -> Result<(), TemplateError> {
        let state =
            postcard::to_stdvec(&self.save()?).map_err(|_| MachineError::State("it cannot be encoded"))?;
        files
            .state
            .write_all_at(&state, 0)
            .map_err(TemplateError::io("write", &files.state_path()))?;
        self.write_memory(&files.memory, pagemap)
            .map_err(TemplateError::io("write", &files.memory_path()))
    }

    /// Chunks of memory that may hold something: touched by this machine, or data of the file that it was forked from. All
    /// others were never more than zeros, and reading them would cost a fault for each page. `None` if that cannot be told.
    fn touched_chunks(&self, total: u64, pagemap: Option<&File>) -> Option<BTreeSet<u64>> {
        let set = match pagemap {
            Some(pagemap) => self.working_set_by(pagemap),
            None => self.working_set(),
        };
        let set = set.ok()?;
        let mut chunks = match self.origin() {
            Some(file) => checksum::data_chunks(file, total).ok()?,
            None => BTreeSet::new(),
        };
        for pages in set.written.iter().chain(&set.read) {
            let last = pages.first.saturating_add(pages.count.saturating_sub(1));
            chunks.extend(pages.first / CHUNK_PAGES..=last / CHUNK_PAGES);
        }
        Some(chunks)
    }

    /// Writes guest memory into an empty file, zeros as holes.
    fn write_memory(&self, file: &File, pagemap: Option<&File>) -> io::Result<()> {
        let total: u64 = self.memory().iter().map(GuestMemoryRegion::len).sum();
        let mut chunk = vec![0u8; CHUNK];
        let mut base = 0u64;
        let touched = self.touched_chunks(total, pagemap);
        for region in self.memory().iter() {
            let mut offset = 0u64;
            while offset < region.len() {
                let length = usize::try_from(region.len() - offset).unwrap_or(CHUNK).min(CHUNK);
                let index = (base + offset) / CHUNK as u64;
                if touched.as_ref().is_some_and(|touched| !touched.contains(&index)) {
                    offset += length as u64;
                    continue;
                }
                let bytes = chunk.get_mut(..length).unwrap_or_default();
                region
                    .read_slice(bytes, MemoryRegionAddress(offset))
                    .map_err(io::Error::other)?;
                if !checksum::is_zero(bytes) {
                    write_pages(file, bytes, base + offset)?;
                }
                offset += length as u64;
            }
            base += region.len();
        }
        Ok(())
    }
}

/// Writes the pages of a chunk that are not all zero, runs of them at once.
fn write_pages(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    const PAGE: usize = 4096;
    let mut start = 0;
    while start < bytes.len() {
        let rest = bytes.get(start..).unwrap_or_default();
        let run: usize = rest
            .chunks(PAGE)
            .take_while(|page| !checksum::is_zero(page))
            .map(<[u8]>::len)
            .sum();
        if run > 0 {
            file.write_all_at(rest.get(..run).unwrap_or_default(), offset + start as u64)?;
        }
        start += run.max(PAGE);
    }
    Ok(())
}

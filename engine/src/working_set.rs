//! Which pages a start touches: containers are run in a new template, to learn that.

use std::io::{Read, Seek};
use std::os::fd::AsFd;

use picovm_vmm::{Template, WorkingSet};

use crate::error::EngineError;
use crate::maker::{Maker, Order};

/// How many starts are looked at: of the pages that one writes, the next writes all but a few.
const TRIES: usize = 3;
/// Pages that a start may touch to be taken for one: 4 GiB. Each is remembered.
const TOUCHED_MAX: u64 = 1 << 20;
/// Largest working set that is read, in bytes: they are some ten KiB.
const WORKING_SET_MAX: u64 = 16 << 20;

/// Has containers run, to learn which pages a start touches.
pub(crate) fn try_starts(template: &Template, maker: &mut Maker) -> Result<WorkingSet, EngineError> {
    (0..TRIES).try_fold(WorkingSet::default(), |set, _| {
        Ok(set.union(&watch_a_start(template, maker)?))
    })
}

fn watch_a_start(template: &Template, maker: &mut Maker) -> Result<WorkingSet, EngineError> {
    let failed = || EngineError::host("record which pages a start touches");
    let mut file = tempfile::tempfile_in(template.path()).map_err(failed())?;
    let order = Order::Try {
        template: template.path().to_owned(),
    };
    maker.carry_out(&order, &[file.as_fd()], &mut || {})?;
    let mut bytes = Vec::new();
    file.rewind().map_err(failed())?;
    file.take(WORKING_SET_MAX)
        .read_to_end(&mut bytes)
        .map_err(failed())?;
    template
        .decode_working_set(&bytes)
        .filter(|set| set.written_pages().saturating_add(set.read_pages()) <= TOUCHED_MAX)
        .ok_or_else(|| failed()(std::io::ErrorKind::InvalidData.into()))
}

//! Numbers of files as the guest sees them. It sees one file system, and the host may have several in what is shared, whose files
//! have the same numbers: programs would take two of them for one.

use std::sync::{PoisonError, RwLock};

/// Bits of a file's number that its file system uses; the others tell file systems apart. A file system that uses more loses nothing:
/// its numbers are changed in those bits, not cut.
const BITS: u32 = 48;
/// The number of the root's file system, in which there is nothing but what directories are mounted on.
const ROOT: u64 = 0xffff;
/// The largest number of another: what is more shares the last.
const LAST: usize = 0xfffe;

/// The file systems that were seen.
#[derive(Default)]
pub struct Numbers {
    seen: RwLock<Seen>,
}

#[derive(Default)]
struct Seen {
    root: Option<u64>,
    others: Vec<u64>,
}

impl Numbers {
    /// Tells which device has the root.
    pub fn set_root(&self, device: u64) {
        self.seen.write().unwrap_or_else(PoisonError::into_inner).root = Some(device);
    }

    /// The guest's number of a file: that of the host for all of the first file system.
    pub fn of(&self, device: u64, file: u64) -> u64 {
        file ^ (self.system(device) << BITS)
    }

    fn system(&self, device: u64) -> u64 {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        if seen.root == Some(device) {
            return ROOT;
        }
        let place = |seen: &Seen| seen.others.iter().position(|other| *other == device);
        if let Some(index) = place(&seen) {
            return index as u64;
        }
        drop(seen);
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have been first.
        let index = place(&seen).unwrap_or_else(|| {
            if seen.others.len() < LAST {
                seen.others.push(device);
            }
            seen.others.len().saturating_sub(1)
        });
        index as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_several_file_systems_have_different_numbers() {
        let numbers = Numbers::default();
        numbers.set_root(7);
        assert_eq!(numbers.of(1, 40), 40);
        let second = numbers.of(2, 40);
        assert_ne!(second, 40);
        assert_ne!(numbers.of(7, 40), second);
        assert_ne!(numbers.of(7, 40), 40);
        assert_eq!(numbers.of(1, 40), 40, "it stays what it was");
        assert_eq!(numbers.of(2, 40), second);
        assert_ne!(numbers.of(1, u64::MAX), numbers.of(2, u64::MAX));
    }

    #[test]
    fn file_systems_beyond_any_number_are_no_error() {
        let numbers = Numbers::default();
        for device in 0..0x1_0010 {
            numbers.of(device, 1);
        }
        assert_eq!(numbers.of(0, 1), 1);
        assert_eq!(numbers.of(0x1_0000, 1), numbers.of(0x1_0001, 1));
    }
}

//! A clone's storage: a large disk on a smaller file that never grows, and gives back to the host what is discarded.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::driver::{BUFFERS, Driver, Memory, line};
use crate::devices::virtio::block::FileBackend;
use crate::devices::virtio::slot::{Slot, SlotBackend};

/// What the guest sees.
const SHOWN: u64 = 1 << 31;
const SECTORS: u64 = 256;
const DATA: u64 = BUFFERS + 64;
const FEATURES: u64 = 1 << 9 | 1 << 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;

struct Rig {
    memory: Memory,
    slot: Slot,
    driver: Driver,
}

impl Rig {
    fn new(file: Option<File>) -> Self {
        let memory = Memory::new();
        let backend = FileBackend::storage(file, SHOWN).unwrap();
        let slot = Slot::new(SlotBackend::Block(backend, None), 4, memory.guest.clone(), line()).unwrap();
        let driver = Driver::new(&slot, FEATURES, false, 1, 64);
        Self { memory, slot, driver }
    }

    /// Carries out a request whose data is at [`DATA`]; its status.
    fn request(&mut self, kind: u32, sector: u64, bytes: u32) -> u8 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&sector.to_le_bytes());
        self.memory.write(BUFFERS, &header);
        self.memory.write(BUFFERS + 32, &[0xff]);
        let mut parts = vec![(BUFFERS, 16, false)];
        if bytes > 0 {
            parts.push((DATA, bytes, kind == READ));
        }
        parts.push((BUFFERS + 32, 1, true));
        self.driver.add(&self.memory, 0, &parts).unwrap();
        self.driver.notify(&self.memory, &self.slot, 0, 1);
        assert_eq!(self.driver.used(&self.memory, 0).len(), 1);
        self.memory.read(BUFFERS + 32, 1)[0]
    }

    fn write(&mut self, sector: u64, byte: u8, bytes: usize) -> u8 {
        self.memory.write(DATA, &vec![byte; bytes]);
        self.request(WRITE, sector, bytes as u32)
    }

    fn read(&mut self, sector: u64, bytes: usize) -> Option<Vec<u8>> {
        self.memory.write(DATA, &vec![0xaa; bytes]);
        (self.request(READ, sector, bytes as u32) == OK).then(|| self.memory.read(DATA, bytes))
    }

    fn discard(&mut self, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(&sectors.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
        }
        self.memory.write(DATA, &bytes);
        self.request(DISCARD, 0, bytes.len() as u32)
    }
}

fn file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    file
}

#[test]
fn storage_without_a_file_reads_as_zeros_and_takes_no_write() {
    let mut rig = Rig::new(None);
    for sector in [0, SECTORS, SHOWN - 8] {
        assert_eq!(rig.read(sector, 4096), Some(vec![0; 4096]));
        assert_eq!(rig.write(sector, 7, 4096), IOERR);
        assert_eq!(rig.discard(&[(sector, 8, 0)]), IOERR);
    }
    assert_eq!(rig.read(SHOWN - 7, 4096), None);
    assert_eq!(rig.request(FLUSH, 0, 0), OK);
    assert!(rig.memory.is_intact());
}

#[test]
fn nothing_is_written_behind_the_end_of_the_file() {
    let file = file();
    let mut rig = Rig::new(Some(file.try_clone().unwrap()));
    assert_eq!(rig.write(SECTORS - 8, 7, 4096), OK);
    for sector in [SECTORS - 7, SECTORS, SHOWN - 8, SHOWN, u64::MAX - 7, u64::MAX] {
        assert_eq!(rig.write(sector, 9, 4096), IOERR, "{sector}");
    }
    assert_eq!(rig.read(SECTORS - 8, 4096), Some(vec![7; 4096]));
    assert_eq!(rig.read(SECTORS, 4096), Some(vec![0; 4096]));
    let mut both = vec![7; 512];
    both.resize(1024, 0);
    assert_eq!(rig.read(SECTORS - 1, 1024), Some(both));
    assert_eq!(rig.request(FLUSH, 0, 0), OK);
    assert_eq!(file.metadata().unwrap().len(), SECTORS * 512);
    assert!(rig.memory.is_intact());
}

#[test]
fn what_is_discarded_goes_back_to_the_host_and_reads_as_zeros() {
    let file = file();
    let mut rig = Rig::new(Some(file.try_clone().unwrap()));
    for sector in (0..SECTORS).step_by(128) {
        assert_eq!(rig.write(sector, 7, 64 << 10), OK);
    }
    let before = file.metadata().unwrap().blocks();
    assert_eq!(rig.discard(&[(0, 64, 0), (128, 128, 0)]), OK);
    let given_back = before - file.metadata().unwrap().blocks();
    assert!(given_back >= 64 + 128, "{given_back} of {before} blocks");
    assert_eq!(rig.read(0, 32 << 10), Some(vec![0; 32 << 10]));
    assert_eq!(rig.read(64, 32 << 10), Some(vec![7; 32 << 10]));
    assert_eq!(file.metadata().unwrap().len(), SECTORS * 512);
    assert!(rig.memory.is_intact());
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let file = file();
    let mut rig = Rig::new(Some(file.try_clone().unwrap()));
    assert_eq!(rig.write(0, 7, 4096), OK);
    for range in [
        (u64::MAX, 1, 0),
        (u64::MAX, u32::MAX, 0),
        (u64::MAX / 512, 8, 0),
        (SECTORS, 1, 0),
        (SECTORS - 1, 2, 0),
        (0, u32::MAX, 0),
        (SHOWN, 1, 0),
    ] {
        assert_eq!(rig.discard(&[range]), IOERR, "{range:?}");
    }
    // To unmap is a flag of another request.
    assert_eq!(rig.discard(&[(0, 8, 1)]), UNSUPP);
    assert_eq!(rig.discard(&[]), IOERR);
    assert_eq!(rig.discard(&[(8, 8, 0); 33]), IOERR);
    assert_eq!(rig.discard(&[(8, 8, 0); 32]), OK);
    assert_eq!(rig.discard(&[(8, 0, 0)]), OK);
    rig.memory.write(DATA, &[0; 32]);
    assert_eq!(rig.request(DISCARD, 0, 17), IOERR);
    assert_eq!(rig.read(0, 4096), Some(vec![7; 4096]));
    assert_eq!(file.metadata().unwrap().len(), SECTORS * 512);
    assert!(rig.memory.is_intact());
}

#[test]
fn a_disk_that_is_only_read_discards_nothing() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().write_all_at(&[7; 4096], 0).unwrap();
    let memory = Memory::new();
    let backend = FileBackend::open(disk.path(), true).unwrap();
    let backend = SlotBackend::Block(backend, Some(disk.path().into()));
    let slot = Slot::new(backend, 3, memory.guest.clone(), line()).unwrap();
    let driver = Driver::new(&slot, 1 << 9, false, 1, 64);
    let mut rig = Rig { memory, slot, driver };
    assert_eq!(rig.discard(&[(0, 8, 0)]), UNSUPP);
    assert_eq!(rig.read(0, 4096), Some(vec![7; 4096]));
}

#[test]
fn a_file_that_is_no_disk_is_refused() {
    let empty = tempfile::tempfile().unwrap();
    assert!(FileBackend::storage(Some(empty.try_clone().unwrap()), SHOWN).is_err());
    empty.set_len(513).unwrap();
    assert!(FileBackend::storage(Some(empty), SHOWN).is_err());
    assert!(FileBackend::storage(Some(file()), SECTORS - 1).is_err());
    let error = FileBackend::storage(Some(file()), 1).err().unwrap();
    assert!(error.to_string().contains("1 at most"), "{error}");
}

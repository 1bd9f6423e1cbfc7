//! What the transport promises (virtio 1.2, 4.2).

use std::sync::atomic::Ordering;

use super::driver::{BUFFERS, Driver, Memory, get, line, set, set_up};
use crate::devices::virtio::slot::{Slot, SlotBackend, SlotState};

fn entropy(memory: &Memory) -> Slot {
    Slot::new(SlotBackend::Entropy, 1, memory.guest.clone(), line()).unwrap()
}

const STATUS: u64 = 0x070;

fn negotiate(slot: &Slot, low: u32, high: u32) {
    set(slot, STATUS, 3);
    set(slot, 0x024, 0);
    set(slot, 0x020, low);
    set(slot, 0x024, 1);
    set(slot, 0x020, high);
}

#[test]
fn a_device_whose_features_were_refused_does_not_start() {
    let memory = Memory::new();
    let slot = entropy(&memory);
    for (low, high) in [(1 << 5, 1), (0, 0), (0, 3)] {
        set(&slot, STATUS, 0);
        negotiate(&slot, low, high);
        // Both at once, which only a driver that does not look would do.
        set(&slot, STATUS, 15);
        assert_eq!(get(&slot, STATUS), 3);
        // And without asking.
        set(&slot, STATUS, 7);
        assert_eq!(get(&slot, STATUS), 3);
    }
    set(&slot, STATUS, 0);
    negotiate(&slot, 0, 1);
    set(&slot, STATUS, 15);
    assert_eq!(get(&slot, STATUS), 15);
}

#[test]
fn a_notification_before_the_driver_is_ready_does_nothing() {
    let memory = Memory::new();
    let slot = entropy(&memory);
    negotiate(&slot, 0, 1);
    set(&slot, STATUS, 11);
    set_up(&slot, 0, 16, 0);
    memory.write(0, &[0, 0, 1, 0, 0, 0, 0, 0, 16, 0, 0, 0, 2, 0, 0, 0]);
    memory.write(0x1002, &[1, 0]);
    set(&slot, 0x050, 0);
    assert_eq!(memory.read(0x2002, 2), [0, 0]);
    set(&slot, STATUS, 15);
    set(&slot, 0x050, 0);
    assert_eq!(memory.read(0x2002, 2), [1, 0]);
    assert_eq!(get(&slot, 0x060), 1, "used buffer notification");
    set(&slot, 0x064, 1);
    assert_eq!(get(&slot, 0x060), 0);
}

#[test]
fn a_queue_cannot_be_moved_under_a_running_device_and_a_reset_forgets_it() {
    let memory = Memory::new();
    let slot = entropy(&memory);
    let _driver = Driver::new(&slot, 0, true, 1, 16);
    let SlotState::Entropy { transport: before } = slot.state() else {
        unreachable!()
    };
    set_up(&slot, 0, 4, 0x4000);
    set(&slot, 0x020, u32::MAX);
    let SlotState::Entropy { transport: after } = slot.state() else {
        unreachable!()
    };
    // The selectors are registers of their own.
    assert_eq!(
        format!("{before:?}").split("queues").nth(1),
        format!("{after:?}").split("queues").nth(1)
    );
    set(&slot, STATUS, 0);
    assert_eq!(get(&slot, 0x044), 0);
    assert_eq!(get(&slot, STATUS), 0);
    assert_eq!(slot.state(), entropy(&memory).state());
}

#[test]
fn a_queue_outside_memory_needs_a_reset_and_a_saved_one_is_refused() {
    let memory = Memory::new();
    let slot = entropy(&memory);
    negotiate(&slot, 0, 1);
    set(&slot, STATUS, 11);
    set_up(&slot, 0, 16, (super::driver::MEMORY - 0x1000) as u64);
    set(&slot, STATUS, 15);
    assert_eq!(get(&slot, STATUS), 15 | 64);
    // Saved as it stands, it can be built again: it does nothing until it is reset.
    let restored =
        |state| Slot::from_state(SlotBackend::Entropy, 1, memory.guest.clone(), line(), &state).map(|_| ());
    assert!(restored(slot.state()).is_ok());
    // A running device whose queue lies outside memory was never saved by this program.
    let slot = entropy(&memory);
    let _driver = Driver::new(&slot, 0, true, 1, 16);
    let small = Slot::from_state(
        SlotBackend::Entropy,
        1,
        vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 0x2000)]).unwrap(),
        line(),
        &slot.state(),
    );
    assert!(small.is_err());
}

#[test]
fn an_index_that_promises_more_than_the_queue_holds_stops_the_device() {
    let memory = Memory::new();
    let line = line();
    let slot = Slot::new(SlotBackend::Entropy, 1, memory.guest.clone(), line.clone()).unwrap();
    let _driver = Driver::new(&slot, 0, false, 1, 16);
    memory.write(0x1002, &17u16.to_le_bytes());
    set(&slot, 0x050, 0);
    assert_eq!(get(&slot, STATUS), 15 | 64);
    assert_eq!(get(&slot, 0x060), 2, "configuration change notification");
    assert_eq!(line.0.load(Ordering::Relaxed), 1);
    set(&slot, 0x050, 0);
    assert_eq!(line.0.load(Ordering::Relaxed), 1);
}

#[test]
fn a_chain_is_no_longer_than_its_queue() {
    let memory = Memory::new();
    let slot = entropy(&memory);
    let _driver = Driver::new(&slot, 0, false, 1, 16);
    // One descriptor that leads to an indirect table of 4,000 buffers of a byte each: never offered, so cut.
    let table = BUFFERS;
    memory.write(0, &table.to_le_bytes());
    memory.write(8, &(4000u32 * 16).to_le_bytes());
    memory.write(12, &[4, 0, 0, 0]);
    for entry in 0..4000u64 {
        memory.write(table + entry * 16, &(table + 4000 * 16 + entry).to_le_bytes());
        memory.write(table + entry * 16 + 8, &[1, 0, 0, 0, 3, 0]);
        memory.write(table + entry * 16 + 14, &(entry as u16 + 1).to_le_bytes());
    }
    memory.write(0x1002, &[1, 0]);
    set(&slot, 0x050, 0);
    assert_eq!(memory.read(0x2002, 2), [1, 0]);
    assert_eq!(memory.read(0x2008, 4), [16, 0, 0, 0]);
}

#[test]
fn configuration_is_read_at_any_width_and_place() {
    let memory = Memory::new();
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(0x1234 * 512).unwrap();
    let backend = crate::devices::virtio::block::FileBackend::open(disk.path(), true).unwrap();
    let slot = Slot::new(
        SlotBackend::Block(backend, Some(disk.path().into())),
        2,
        memory.guest.clone(),
        line(),
    )
    .unwrap();
    let read = |offset, width| {
        let mut bytes = vec![0xee; width];
        slot.read(offset, &mut bytes);
        bytes
    };
    assert_eq!(read(0x100, 8), 0x1234u64.to_le_bytes());
    assert_eq!(read(0x101, 1), [0x12]);
    assert_eq!(read(0x10c, 4), 126u32.to_le_bytes());
    assert_eq!(read(0x10e, 8), [0; 8]);
    assert_eq!(read(0xffc, 4), [0; 4]);
    assert_eq!(read(0xfff, 8), [0; 8]);
    // A register of another width than its own, and one that is not there.
    assert_eq!(read(0, 8), [0; 8]);
    assert_eq!(get(&slot, 0x0b0), u32::MAX);
}

//! Ports and the freeze trap under accesses of any width, saved and restored in between.

use arbitrary::{Arbitrary, Unstructured};
use picovm_guest_protocol::trap::{IDENTITY_PAGES_MAX, PAGE_SIZE};
use picovm_vmm::devices::legacy::{ConsoleLog, Ports, TAIL};
use picovm_vmm::devices::trap::Trap;

use crate::guest;

#[derive(Arbitrary, Debug)]
enum Step {
    ReadPort(u16, u8),
    WritePort(u16, Vec<u8>),
    /// A register of the serial port, which takes most of what a guest does with ports.
    Serial(u8, u8),
    ReadSerial(u8),
    ReadTrap(u16, u8),
    WriteTrap(u16, [u8; 8], u8),
    SaveAndRestore,
}

/// Ports and trap.
pub fn legacy_and_trap(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let mut ports = Ports::new(guest::line(), ConsoleLog::default());
    let mut trap = Trap::with_base();
    while !input.is_empty() {
        let Ok(step) = Step::arbitrary(&mut input) else {
            break;
        };
        match step {
            Step::ReadPort(port, width) => ports.read(port, &mut vec![0; width.into()]),
            Step::WritePort(port, bytes) => _ = ports.write(port, &bytes),
            Step::Serial(register, value) => _ = ports.write(0x3f8 + u16::from(register % 8), &[value]),
            Step::ReadSerial(register) => ports.read(0x3f8 + u16::from(register % 8), &mut [0]),
            Step::ReadTrap(at, width) => trap.read((at % 0x1000).into(), &mut vec![0; width.into()]),
            Step::WriteTrap(at, bytes, width) => {
                _ = trap.write((at % 0x1000).into(), &bytes[..usize::from(width % 9)]);
            }
            Step::SaveAndRestore => {
                let saved = ports.state();
                ports = Ports::from_state(&saved, guest::line(), ConsoleLog::default())
                    .expect("what was saved can be restored");
                assert_eq!(ports.state(), saved);
                let pages = trap.state();
                trap = Trap::from_state(&pages);
                assert_eq!(trap.state(), pages);
            }
        }
        let pages = trap.state().identity_pages;
        assert!(pages.len() <= IDENTITY_PAGES_MAX && pages.iter().all(|page| page % PAGE_SIZE as u64 == 0));
    }
    // What is no text is replaced by a character of three bytes.
    assert!(ports.console_tail().len() <= 3 * TAIL);
}

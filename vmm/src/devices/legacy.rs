//! Port I/O of a PC, as little of it as the kernel asks for: a serial port for the console log, the keyboard
//! controller's reset line, and a clock chip that is never updating.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use vm_superio::serial::NoEvents;
use vm_superio::{I8042Device, Serial, Trigger};

use super::bus::InterruptLine;
use crate::arch::layout::SERIAL_PORT;

const SERIAL_END: u16 = SERIAL_PORT + 8;
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
const CMOS: [u16; 2] = [0x70, 0x71];

/// A log stops growing here: the guest is not to fill the host's disk.
pub const LOG_MAX: u64 = 1 << 20;

/// Where console output goes: a file up to [`LOG_MAX`] bytes, or nowhere.
pub struct ConsoleLog {
    file: Option<File>,
    written: u64,
}

impl ConsoleLog {
    /// Writes to `file`, or nowhere.
    #[must_use]
    pub fn new(file: Option<File>) -> Self {
        Self { file, written: 0 }
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(file) = &mut self.file
            && self.written < LOG_MAX
        {
            self.written = self.written.saturating_add(bytes.len() as u64);
            // A full disk costs the log, not the machine.
            let _ = file.write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct LineTrigger(Arc<dyn InterruptLine>);

impl Trigger for LineTrigger {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse();
        Ok(())
    }
}

/// Set when the guest has pulled the reset line.
#[derive(Default)]
struct ResetLine(std::cell::Cell<bool>);

impl Trigger for ResetLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.set(true);
        Ok(())
    }
}

/// The ports.
pub struct Ports {
    serial: Serial<LineTrigger, NoEvents, ConsoleLog>,
    keyboard: I8042Device<ResetLine>,
}

impl Ports {
    /// Ports with a serial console that interrupts on `line` and writes to `log`.
    #[must_use]
    pub fn new(line: Arc<dyn InterruptLine>, log: ConsoleLog) -> Self {
        Self { serial: Serial::new(LineTrigger(line), log), keyboard: I8042Device::new(ResetLine::default()) }
    }

    /// A read by the guest. Where nothing is, all bits are set, as on an empty bus.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let [value] = data {
            match port {
                SERIAL_PORT..SERIAL_END => *value = self.serial.read((port - SERIAL_PORT) as u8),
                I8042_DATA | I8042_COMMAND => *value = self.keyboard.read((port - I8042_DATA) as u8),
                // Register A bit 7 clear: no update in progress. The kernel polls for that 20,000 times otherwise.
                _ if CMOS.contains(&port) => *value = 0,
                _ => {}
            }
        }
    }

    /// A write by the guest; `true` if it pulled the reset line.
    pub fn write(&mut self, port: u16, data: &[u8]) -> bool {
        if let [value] = data {
            match port {
                SERIAL_PORT..SERIAL_END => {
                    // Fails only where the log or the line does, and neither stops the machine.
                    let _ = self.serial.write((port - SERIAL_PORT) as u8, *value);
                }
                I8042_DATA | I8042_COMMAND => {
                    let _ = self.keyboard.write((port - I8042_DATA) as u8, *value);
                }
                _ => {}
            }
        }
        self.keyboard.reset_evt().0.get()
    }
}

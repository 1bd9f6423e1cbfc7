//! Port I/O of a PC, as little of it as the kernel asks for: a serial port for the console log, the keyboard
//! controller's reset line, and a clock chip that is never updating.

use std::collections::VecDeque;
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

/// Bytes of console output that are kept in memory.
pub const TAIL: usize = 8 << 10;

/// Where console output goes: a file up to [`LOG_MAX`] bytes, if there is one, and the last [`TAIL`] bytes to memory,
/// for the message about a machine that ended badly.
#[derive(Default)]
pub struct ConsoleLog {
    file: Option<File>,
    written: u64,
    tail: VecDeque<u8>,
}

impl ConsoleLog {
    /// A log that also goes to `file`, if there is one.
    #[must_use]
    pub fn new(file: Option<File>) -> Self {
        Self {
            file,
            ..Self::default()
        }
    }

    /// The last output. What is no text is replaced.
    #[must_use]
    pub fn tail(&self) -> String {
        let (front, back) = self.tail.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).into_owned()
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.extend(bytes);
        let surplus = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..surplus);
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
        Self {
            serial: Serial::new(LineTrigger(line), log),
            keyboard: I8042Device::new(ResetLine::default()),
        }
    }

    /// The last console output.
    #[must_use]
    pub fn console_tail(&self) -> String {
        self.serial.writer().tail()
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

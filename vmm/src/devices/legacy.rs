//! Port I/O of a PC, as little of it as the kernel asks for: a serial port for the console log, the keyboard
//! controller's reset line, and a clock chip that is never updating.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{I8042Device, Serial, Trigger};

use super::interrupt::InterruptLine;
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

/// What is saved of the ports: the serial port's registers, which the guest's driver takes to be as it left them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortsState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
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

    /// Ports as they were saved; `None` if the state makes no sense.
    #[must_use]
    pub fn from_state(state: &PortsState, line: Arc<dyn InterruptLine>, log: ConsoleLog) -> Option<Self> {
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let saved = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        };
        let serial = Serial::from_state(&saved, LineTrigger(line), NoEvents, log).ok()?;
        Some(Self {
            serial,
            keyboard: I8042Device::new(ResetLine::default()),
        })
    }

    /// What a clone needs of them.
    #[must_use]
    pub fn state(&self) -> PortsState {
        let saved = self.serial.state();
        PortsState {
            divisor: [saved.baud_divisor_low, saved.baud_divisor_high],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.in_buffer,
        }
    }

    /// The last console output.
    #[must_use]
    pub fn console_tail(&self) -> String {
        self.serial.writer().tail()
    }

    /// A read by the guest. Where nothing is, all bits are set, as on an empty bus. Every port here is a byte wide: what
    /// is longer is a string instruction, which KVM hands over as one access, and each of its bytes is one from the
    /// port.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        for value in data {
            *value = match port {
                SERIAL_PORT..SERIAL_END => self.serial.read(port.wrapping_sub(SERIAL_PORT) as u8),
                I8042_DATA | I8042_COMMAND => self.keyboard.read(port.wrapping_sub(I8042_DATA) as u8),
                // Register A bit 7 clear: no update in progress. The kernel polls for that 20,000 times otherwise.
                _ if CMOS.contains(&port) => 0,
                _ => 0xff,
            };
        }
    }

    /// A write by the guest, as for reading; `true` if it pulled the reset line.
    pub fn write(&mut self, port: u16, data: &[u8]) -> bool {
        for value in data {
            match port {
                SERIAL_PORT..SERIAL_END => {
                    // Fails only where the log or the line does, and neither stops the machine.
                    let _ = self.serial.write(port.wrapping_sub(SERIAL_PORT) as u8, *value);
                }
                I8042_DATA | I8042_COMMAND => {
                    let _ = self.keyboard.write(port.wrapping_sub(I8042_DATA) as u8, *value);
                }
                _ => {}
            }
        }
        self.keyboard.reset_evt().0.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoLine;

    impl InterruptLine for NoLine {
        fn pulse(&self) {}
    }

    fn ports() -> Ports {
        Ports::new(Arc::new(NoLine), ConsoleLog::default())
    }

    #[test]
    fn every_byte_of_a_string_instruction_counts() {
        let mut ports = ports();
        assert!(!ports.write(SERIAL_PORT, b"hello"));
        assert_eq!(ports.console_tail(), "hello");
        let mut status = [0; 3];
        ports.read(SERIAL_PORT + 5, &mut status);
        assert_eq!(status, [0x60; 3]);
        let mut nothing = [0; 2];
        ports.read(0x80, &mut nothing);
        assert_eq!(nothing, [0xff; 2]);
        assert!(ports.write(I8042_COMMAND, &[0, 0xfe]));
    }

    #[test]
    fn the_registers_of_the_serial_port_survive() {
        let mut parent = ports();
        parent.write(SERIAL_PORT + 1, &[2]);
        parent.write(SERIAL_PORT + 7, &[0xa5]);
        let state = parent.state();
        let mut clone = Ports::from_state(&state, Arc::new(NoLine), ConsoleLog::default()).unwrap();
        assert_eq!(clone.state(), state);
        let mut value = [0; 1];
        clone.read(SERIAL_PORT + 7, &mut value);
        assert_eq!(value, [0xa5]);
        let overfull = PortsState {
            in_buffer: vec![0; 1000],
            ..state
        };
        assert!(Ports::from_state(&overfull, Arc::new(NoLine), ConsoleLog::default()).is_none());
    }

    #[test]
    fn a_log_keeps_its_end_and_does_not_grow_for_ever() {
        let mut log = ConsoleLog::default();
        for _ in 0..3 {
            log.write_all(&[b'x'; TAIL]).unwrap();
        }
        log.write_all(b"end").unwrap();
        assert_eq!(log.tail().len(), TAIL);
        assert!(log.tail().ends_with("xend"));
    }
}

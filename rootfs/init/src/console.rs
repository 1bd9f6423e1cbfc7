//! Messages for people, on the guest's console.

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::Write;

/// Log level "critical": shown on the console even with `quiet` on the kernel command line.
const CRITICAL: u8 = 2;

/// Reports an error or a warning. Through the kernel's log, so that it lines up with the kernel's own messages; where
/// there is none, on standard error, which is the console.
pub fn report(message: &dyn Display) {
    let line = format!("<{CRITICAL}>picovm-init: {message}\n");
    let logged = OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(line.as_bytes()));
    if logged.is_err() {
        // Nothing is left to tell it to if this fails, too.
        let _ = std::io::stderr().write_all(line.get(3..).unwrap_or_default().as_bytes());
    }
}

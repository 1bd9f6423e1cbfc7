//! The control connection: a virtio-console port, found by its name.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use picovm_guest_protocol::CONTROL_PORT_NAME;
use rustix::fs::{Mode, OFlags};

use crate::error::{Attempt, InitError};

const PORTS: &str = "/sys/class/virtio-ports";
/// The driver learns of its ports by messages from the device, so the port may come a little after init.
const PORT_DEADLINE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_micros(200);

/// Opens the control port, non-blocking. The VMM must have opened its side: the first wait would otherwise report
/// that the host has hung up.
pub fn open_port() -> Result<OwnedFd, InitError> {
    let give_up = Instant::now() + PORT_DEADLINE;
    let device = loop {
        if let Some(device) = find_port() {
            break device;
        }
        if Instant::now() > give_up {
            return Err(InitError::Machine(format!(
                "there is no virtio-console port named {CONTROL_PORT_NAME} in {PORTS}"
            )));
        }
        std::thread::sleep(RETRY);
    };
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let port = rustix::fs::open(&device, flags, Mode::empty())
        .attempt(|| format!("open control port {}", device.display()))?;
    // A port can be opened once at a time, so the container could not use the node; nor should it see it.
    rustix::fs::unlink(&device).attempt(|| format!("unlink {}", device.display()))?;
    Ok(port)
}

fn find_port() -> Option<PathBuf> {
    fs::read_dir(PORTS).ok()?.flatten().find_map(|port| {
        let name = fs::read_to_string(port.path().join("name")).ok()?;
        let device = PathBuf::from("/dev").join(port.file_name());
        (name.trim_end() == CONTROL_PORT_NAME && device.exists()).then_some(device)
    })
}

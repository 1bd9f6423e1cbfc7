//! What a port lies on: one end of a Unix stream, whose other end the host program holds. Never blocks.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::SendFlags;

/// The device's end.
pub struct StreamBackend {
    stream: Option<UnixStream>,
    write_ended: bool,
}

/// A connection: the end for the device, and the end for the host program.
///
/// # Errors
/// As `socketpair(2)`.
pub fn connection() -> io::Result<(StreamBackend, UnixStream)> {
    let (device, host) = UnixStream::pair()?;
    device.set_nonblocking(true)?;
    Ok((
        StreamBackend {
            stream: Some(device),
            write_ended: false,
        },
        host,
    ))
}

impl StreamBackend {
    /// The descriptor to wait on, until the host program has gone.
    #[must_use]
    pub fn descriptor(&self) -> Option<RawFd> {
        self.stream.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether the host program is still there.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.stream.is_some()
    }

    /// Reads what is there: `Some(0)` when the host program has gone, `None` when nothing waits.
    pub fn read(&mut self, bytes: &mut [u8]) -> Option<usize> {
        let stream = self.stream.as_mut()?;
        loop {
            match stream.read(bytes) {
                Ok(0) => {
                    self.stream = None;
                    return Some(0);
                }
                Ok(count) => return Some(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(_) => {
                    self.stream = None;
                    return Some(0);
                }
            }
        }
    }

    /// Whether anybody may read what is written.
    #[must_use]
    pub fn takes_bytes(&self) -> bool {
        self.stream.is_some() && !self.write_ended
    }

    /// Writes as much as fits: `None` when nothing fits now. Once the host program has gone, everything fits.
    pub fn write(&mut self, bytes: &[u8]) -> Option<usize> {
        let Some(stream) = self.stream.as_ref().filter(|_| !self.write_ended) else {
            return Some(bytes.len());
        };
        // Not `write(2)`: a host program that lets SIGPIPE do what it does by default would end with its clone.
        match rustix::io::retry_on_intr(|| rustix::net::send(stream, bytes, SendFlags::NOSIGNAL)) {
            Ok(count) => Some(count),
            Err(Errno::AGAIN) => None,
            Err(_) => {
                // The reading side may still hold bytes: only writing ends here.
                self.write_ended = true;
                Some(bytes.len())
            }
        }
    }
}

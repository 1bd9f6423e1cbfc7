//! What the runner and the host's `init` say to each other, over four virtio-serial ports.
//!
//! Every port carries frames: a little-endian `u32` length, then that many bytes. A frame of length 0 on a stream is its
//! end: a virtio-serial port has no end of file of its own that could not be mistaken for "not connected yet".

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Ports of the virtio-serial device, in the order in which QEMU numbers them (port 0 is reserved for a console).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// Messages: [`ToHost`] inwards, [`FromHost`] outwards.
    Control = 1,
    /// The command's standard input.
    Stdin = 2,
    /// The command's standard output.
    Stdout = 3,
    /// The command's standard error.
    Stderr = 4,
}

impl Port {
    /// All ports.
    pub const ALL: [Port; 4] = [Port::Control, Port::Stdin, Port::Stdout, Port::Stderr];

    /// Its device node in the emulated host.
    pub fn device(self) -> PathBuf {
        PathBuf::from(format!("/dev/vport0p{}", self as u8))
    }
}

/// An output of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The virtiofs tag of the machine's root file system.
pub const ROOT_TAG: &str = "rootfs";

/// The virtiofs tag of the shared directory with this index.
pub fn share_tag(index: usize) -> String {
    format!("share{index}")
}

/// All that the host's `init` must know to run the command. Strings are bytes: neither arguments nor paths nor the
/// environment need be UTF-8.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The command and its arguments.
    pub argv: Vec<Vec<u8>>,
    /// Its whole environment.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Its working directory.
    pub cwd: Vec<u8>,
    /// Its file mode creation mask.
    pub umask: u32,
    /// Directories that are writable and come back; the index is that of [`share_tag`].
    pub shares: Vec<Vec<u8>>,
    /// The unpacked host kernel: modules and their index.
    pub kernel_dir: Vec<u8>,
    /// Time of day of the machine, nanoseconds since 1970.
    pub time_ns: u64,
}

/// Runner to `init`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// Run this command. Sent once, first.
    Run(Spec),
    /// Nobody reads this output any more: the command must meet a broken pipe.
    OutputClosed(Output),
}

/// `init` to runner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHost {
    /// The kernel has booted and `init` runs.
    Booted,
    /// The command has been started.
    Started,
    /// The command has ended, its outputs are complete and shared directories are written.
    Exited(u8),
    /// The host could not be prepared.
    Failed(String),
}

/// Largest frame that either side sends or accepts, in bytes. An environment may be large; streams use far less.
pub const MAX_FRAME: usize = 64 << 20;

/// Writes one frame in one `write` where the transport takes it.
pub fn write_frame(to: &mut impl Write, payload: &[u8]) -> io::Result<()> {
    let len = u32::try_from(payload.len())
        .ok()
        .filter(|len| *len as usize <= MAX_FRAME)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "frame too large"))?;
    let mut frame = Vec::with_capacity(4 + payload.len());
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)?;
    to.flush()
}

/// Reads one frame into `buffer`, replacing what it held.
pub fn read_frame(from: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<()> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("frame of {len} bytes"),
        ));
    }
    buffer.resize(len, 0);
    from.read_exact(buffer)
}

/// Sends one message as one frame.
pub fn send<M: Serialize>(to: &mut impl Write, message: &M) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    write_frame(to, &bytes)
}

/// Receives one message.
pub fn receive<M: DeserializeOwned>(from: &mut impl Read) -> io::Result<M> {
    let mut bytes = Vec::new();
    read_frame(from, &mut bytes)?;
    postcard::from_bytes(&bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_the_wire() {
        let spec = Spec {
            argv: vec![b"echo".to_vec(), vec![0xff, 0xfe]],
            env: vec![(b"A".to_vec(), b"B=C".to_vec())],
            cwd: b"/tmp".to_vec(),
            umask: 0o22,
            shares: vec![b"/srv".to_vec()],
            kernel_dir: b"/cache".to_vec(),
            time_ns: 1 << 60,
        };
        let mut wire = Vec::new();
        send(&mut wire, &ToHost::Run(spec.clone())).expect("sends");
        send(&mut wire, &ToHost::OutputClosed(Output::Stderr)).expect("sends");
        let mut wire = wire.as_slice();
        assert_eq!(receive::<ToHost>(&mut wire).expect("arrives"), ToHost::Run(spec));
        assert_eq!(
            receive::<ToHost>(&mut wire).expect("arrives"),
            ToHost::OutputClosed(Output::Stderr)
        );
        assert!(wire.is_empty());
    }

    #[test]
    fn an_absurd_length_is_refused_before_memory_is_taken() {
        let mut buffer = Vec::new();
        let error = read_frame(&mut [0xff; 8].as_slice(), &mut buffer).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(buffer.is_empty());
    }

    #[test]
    fn a_cut_frame_is_an_error() {
        let mut wire = Vec::new();
        write_frame(&mut wire, b"hello").expect("writes");
        wire.pop();
        let error = read_frame(&mut wire.as_slice(), &mut Vec::new()).expect_err("cut");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

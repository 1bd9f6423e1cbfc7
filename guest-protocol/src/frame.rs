//! The agent's messages on the control connection.
//!
//! The connection is a byte stream in each direction (a virtio-console port). A frame is an 8-byte header (kind `u8`,
//! a zero byte, number of the process little-endian `u16`, payload length little-endian `u32`) and a payload of at most
//! [`PAYLOAD_MAX`] bytes.
//!
//! Process [`MAIN`] is the container's main process, which the identity or [`Frame::Spec`] describes. The host begins others with
//! [`Frame::Exec`] and [`Frame::Help`], under a number that no process has, and may use the number again after the process's
//! [`Frame::Exit`].
//!
//! Streams have credit, so that one that nobody reads never holds up another, a signal or the exit status: each
//! direction of a stream starts with [`INITIAL_CREDIT`] bytes; a sender spends credit with each data frame, and the
//! receiver gives it back with [`Frame::Credit`] once the bytes have left its hands.

use serde::{Deserialize, Serialize};

use crate::identity::{ContainerSpec, Helper, ProcessSpec, TerminalSize};

/// Bytes of a frame before its payload.
pub const HEADER_SIZE: usize = 8;
/// Largest payload in bytes. `execve(2)` takes 2 MiB of arguments and environment at most; the rest is room for
/// lengths.
pub const PAYLOAD_MAX: usize = 4 << 20;
/// Largest data payload that either side sends in one frame, in bytes.
pub const DATA_MAX: usize = 32 << 10;
/// Bytes that may be sent on a stream before the first [`Frame::Credit`].
pub const INITIAL_CREDIT: u32 = 256 << 10;

/// Number of the container's main process.
pub const MAIN: u16 = 0;
/// What comes before the main process starts: its writable layer, as standard input of this number
/// ([`ContainerSpec::layer`]). No process has it.
pub const LAYER: u16 = u16::MAX;
/// Most processes that an agent has at once, with the main one. One more than that ends with a
/// [`StartFailure`].
pub const PROCESSES_MAX: usize = 256;

/// A stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stream {
    /// Standard input, host to guest.
    Stdin,
    /// Standard output, guest to host.
    Stdout,
    /// Standard error, guest to host.
    Stderr,
}

/// How the container's process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerExit {
    /// It exited with this status, 0 to 255.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
    /// It could not be started.
    NotStarted(StartFailure),
}

/// Why a container's process could not be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFailure {
    /// What was attempted, on what: `exec /bin/nothing`.
    pub attempted: String,
    /// The error number of the guest's kernel; 0 where it is not one.
    pub errno: i32,
    /// What happened, for people.
    pub message: String,
}

impl ContainerExit {
    /// The exit status that a shell would show: the code itself, 128 + signal, and for a process that could not be
    /// started 127 (not found), 126 (found, but cannot be executed) or 125 (anything else), as Docker has it.
    #[must_use]
    pub fn shell_status(&self) -> u8 {
        const ENOENT: i32 = 2;
        const EACCES: i32 = 13;
        const ENOEXEC: i32 = 8;
        const EISDIR: i32 = 21;
        const EPERM: i32 = 1;
        match self {
            Self::Code(code) => *code,
            Self::Signal(signal) => signal.saturating_add(128),
            Self::NotStarted(failure) if failure.attempted.starts_with("exec ") => match failure.errno {
                ENOENT => 127,
                EACCES | ENOEXEC | EISDIR | EPERM => 126,
                _ => 125,
            },
            Self::NotStarted(_) => 125,
        }
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Host to guest, first frame, only if the identity had no container: what to run.
    Spec(ContainerSpec),
    /// Bytes of a stream, at most [`DATA_MAX`] as this crate sends them.
    Data(Stream, Vec<u8>),
    /// From the sender of a stream: no more bytes will follow on it. From the receiver (host to guest, of an output):
    /// nobody reads it any more, so the container's next write to it is to fail.
    Close(Stream),
    /// The receiver of this stream can take so many more bytes.
    Credit(Stream, u32),
    /// Host to guest: deliver this signal to the process's group.
    Signal(u8),
    /// Guest to host, last frame of a process: how it ended. Every byte of its output was sent before. With the main process
    /// all others end, but for helpers; their last frames come first.
    Exit(ContainerExit),
    /// Host to guest: begin a process in the container.
    Exec(ProcessSpec),
    /// Host to guest: begin a process that is the agent's own.
    Help(Helper),
    /// Host to guest: the process's terminal has this size.
    Resize(TerminalSize),
    /// Guest to host, about the main process, before its exit: memory has run out, and the kernel has killed a process of the
    /// container for it.
    OutOfMemory,
    /// Guest to host, of the main process: its program runs. Only if [`ContainerSpec::announce`].
    Started,
    /// About the main process, which is to be frozen as it is. Host to guest: let nothing of the container run any more. Guest to
    /// host, then: all that it has written was sent. Host to guest again: nothing more comes, so freeze the machine.
    Freeze,
}

/// Why bytes are not a frame. The connection is of no use after such an error.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Unknown kind.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// Reserved header bytes are not zero.
    #[error("the reserved byte of a frame header is not zero")]
    Reserved,
    /// The payload is longer than allowed.
    #[error("a frame of {0} bytes is longer than {PAYLOAD_MAX}")]
    Length(u32),
    /// The payload does not fit the kind.
    #[error("the payload of a frame of kind {0} is malformed")]
    Payload(u8),
    /// The frame cannot be encoded: its payload is too large.
    #[error("a payload of {0} bytes is longer than {PAYLOAD_MAX}")]
    TooLarge(usize),
}

const SPEC: u8 = 1;
const DATA: u8 = 2;
const CLOSE: u8 = 5;
const CREDIT: u8 = 8;
const SIGNAL: u8 = 11;
const EXIT: u8 = 12;
const EXEC: u8 = 13;
const HELP: u8 = 14;
const RESIZE: u8 = 15;
const OUT_OF_MEMORY: u8 = 16;
const STARTED: u8 = 17;
const FREEZE: u8 = 18;

/// The kind of a frame about a stream: `first` is that of standard input, the others follow.
fn kind_for(first: u8, stream: Stream) -> u8 {
    first.saturating_add(match stream {
        Stream::Stdin => 0,
        Stream::Stdout => 1,
        Stream::Stderr => 2,
    })
}

fn stream_of(first: u8, kind: u8) -> Stream {
    match kind.saturating_sub(first) {
        0 => Stream::Stdin,
        1 => Stream::Stdout,
        _ => Stream::Stderr,
    }
}

impl Frame {
    /// Appends the encoded frame about a process to `out`.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`]; `out` is then unchanged.
    pub fn encode(&self, process: u16, out: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Spec(spec) => put_value(SPEC, process, spec, out),
            Self::Data(stream, bytes) => encode_data(process, *stream, bytes, out),
            Self::Close(stream) => put(kind_for(CLOSE, *stream), process, &[], out),
            Self::Credit(stream, bytes) => put(kind_for(CREDIT, *stream), process, &bytes.to_le_bytes(), out),
            Self::Signal(signal) => put(SIGNAL, process, &[*signal], out),
            Self::Exit(exit) => put_value(EXIT, process, exit, out),
            Self::Exec(spec) => put_value(EXEC, process, spec, out),
            Self::Help(helper) => put_value(HELP, process, helper, out),
            Self::Resize(size) => put_value(RESIZE, process, size, out),
            Self::OutOfMemory => put(OUT_OF_MEMORY, process, &[], out),
            Self::Started => put(STARTED, process, &[], out),
            Self::Freeze => put(FREEZE, process, &[], out),
        }
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Self, FrameError> {
        let malformed = FrameError::Payload(kind);
        match kind {
            SPEC => value(kind, payload).map(Self::Spec),
            DATA..CLOSE => Ok(Self::Data(stream_of(DATA, kind), payload.to_vec())),
            CLOSE..CREDIT if payload.is_empty() => Ok(Self::Close(stream_of(CLOSE, kind))),
            CREDIT..SIGNAL => match payload.try_into() {
                Ok(bytes) => Ok(Self::Credit(stream_of(CREDIT, kind), u32::from_le_bytes(bytes))),
                Err(_) => Err(malformed),
            },
            SIGNAL => match payload {
                [signal] => Ok(Self::Signal(*signal)),
                _ => Err(malformed),
            },
            EXIT => value(kind, payload).map(Self::Exit),
            EXEC => value(kind, payload).map(Self::Exec),
            HELP => value(kind, payload).map(Self::Help),
            RESIZE => value(kind, payload).map(Self::Resize),
            OUT_OF_MEMORY if payload.is_empty() => Ok(Self::OutOfMemory),
            STARTED if payload.is_empty() => Ok(Self::Started),
            FREEZE if payload.is_empty() => Ok(Self::Freeze),
            CLOSE..CREDIT | OUT_OF_MEMORY | STARTED | FREEZE => Err(malformed),
            _ => Err(FrameError::Kind(kind)),
        }
    }
}

fn value<T: serde::de::DeserializeOwned>(kind: u8, payload: &[u8]) -> Result<T, FrameError> {
    postcard::from_bytes(payload).map_err(|_| FrameError::Payload(kind))
}

fn put_value(kind: u8, process: u16, value: &impl Serialize, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let payload = postcard::to_stdvec(value).map_err(|_| FrameError::Payload(kind))?;
    put(kind, process, &payload, out)
}

/// Appends a data frame to `out` without a copy of the bytes in between.
///
/// # Errors
/// [`FrameError::TooLarge`]; `out` is then unchanged.
pub fn encode_data(process: u16, stream: Stream, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
    put(kind_for(DATA, stream), process, bytes, out)
}

fn put(kind: u8, process: u16, payload: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= PAYLOAD_MAX)
        .ok_or(FrameError::TooLarge(payload.len()))?;
    out.extend_from_slice(&[kind, 0]);
    out.extend_from_slice(&process.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(payload);
    Ok(())
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    consumed: usize,
}

impl FrameDecoder {
    /// Takes bytes as they came from the connection.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame and the process that it is about, or `None` until more bytes are there.
    ///
    /// # Errors
    /// A [`FrameError`]; the decoder then stays at the bad frame and repeats the error.
    pub fn next_frame(&mut self) -> Result<Option<(u16, Frame)>, FrameError> {
        let Some((kind, process, length)) = self.header()? else {
            return Ok(None);
        };
        let start = self.consumed.saturating_add(HEADER_SIZE);
        let end = start.saturating_add(length);
        let Some(payload) = self.buffer.get(start..end) else {
            return Ok(None);
        };
        let frame = Frame::decode(kind, payload)?;
        self.consumed = end;
        Ok(Some((process, frame)))
    }

    /// How many bytes are certainly missing until the next frame is whole, 0 if it is: for who must not take a byte of
    /// what follows it.
    ///
    /// # Errors
    /// As [`FrameDecoder::next_frame`].
    pub fn missing(&self) -> Result<usize, FrameError> {
        let present = self.buffer.len().saturating_sub(self.consumed);
        let needed = self.header()?.map_or(0, |(_, _, length)| length);
        Ok(needed.saturating_add(HEADER_SIZE).saturating_sub(present))
    }

    /// Kind of the next frame, its process and length of its payload, if its header is there.
    fn header(&self) -> Result<Option<(u8, u16, usize)>, FrameError> {
        let rest = self.buffer.get(self.consumed..).unwrap_or_default();
        let Some(header) = rest.first_chunk::<HEADER_SIZE>() else {
            return Ok(None);
        };
        let [kind, reserved, p0, p1, length @ ..] = *header;
        if !(SPEC..=FREEZE).contains(&kind) {
            return Err(FrameError::Kind(kind));
        }
        if reserved != 0 {
            return Err(FrameError::Reserved);
        }
        let length = u32::from_le_bytes(length);
        if length as usize > PAYLOAD_MAX {
            return Err(FrameError::Length(length));
        }
        Ok(Some((kind, u16::from_le_bytes([p0, p1]), length as usize)))
    }

    /// Whether part of a frame has been received.
    #[must_use]
    pub fn is_mid_frame(&self) -> bool {
        self.buffer.len() > self.consumed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream() -> impl Strategy<Value = Stream> {
        prop_oneof![Just(Stream::Stdin), Just(Stream::Stdout), Just(Stream::Stderr)]
    }

    fn frame() -> impl Strategy<Value = (u16, Frame)> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..40);
        let size = (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| TerminalSize { rows, columns });
        let process =
            (bytes(), bytes(), bytes(), any::<bool>(), size.clone()).prop_map(|(a, e, cwd, stdin, size)| {
                ProcessSpec {
                    args: vec![a],
                    env: vec![e],
                    cwd,
                    stdin,
                    terminal: Some(size),
                    rlimits: vec![(7, 1024, u64::MAX)],
                    ..ProcessSpec::default()
                }
            });
        let frame = prop_oneof![
            (stream(), bytes()).prop_map(|(s, b)| Frame::Data(s, b)),
            stream().prop_map(Frame::Close),
            (stream(), any::<u32>()).prop_map(|(s, n)| Frame::Credit(s, n)),
            any::<u8>().prop_map(Frame::Signal),
            any::<u8>().prop_map(|c| Frame::Exit(ContainerExit::Code(c))),
            any::<u8>().prop_map(|c| Frame::Exit(ContainerExit::Signal(c))),
            process
                .clone()
                .prop_map(|process| Frame::Spec(ContainerSpec::of(process))),
            process.prop_map(Frame::Exec),
            bytes().prop_map(|path| Frame::Help(Helper::Pack { path, follow: true })),
            Just(Frame::Help(Helper::Changes)),
            size.prop_map(Frame::Resize),
            Just(Frame::OutOfMemory),
            Just(Frame::Started),
            Just(Frame::Freeze),
        ];
        (any::<u16>(), frame)
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting_of_the_stream(frames in prop::collection::vec(frame(), 0..8), cut in 1usize..30) {
            let mut bytes = Vec::new();
            for (process, frame) in &frames {
                frame.encode(*process, &mut bytes).unwrap();
            }
            let mut decoder = FrameDecoder::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame);
                }
            }
            prop_assert_eq!(seen, frames);
            prop_assert!(!decoder.is_mid_frame());
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_errors_stay(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = FrameDecoder::default();
            decoder.push(&bytes);
            loop {
                match decoder.next_frame() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => {
                        prop_assert_eq!(decoder.next_frame(), Err(error));
                        break;
                    }
                }
            }
        }
    }

    #[test]
    fn a_length_past_the_limit_is_refused_before_it_is_awaited() {
        let mut decoder = FrameDecoder::default();
        decoder.push(&[DATA, 0, 7, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(decoder.next_frame(), Err(FrameError::Length(u32::MAX)));
    }

    #[test]
    fn exit_statuses_are_those_of_a_shell() {
        let not_started = |attempted: &str, errno| {
            ContainerExit::NotStarted(StartFailure {
                attempted: attempted.into(),
                errno,
                message: String::new(),
            })
        };
        assert_eq!(ContainerExit::Code(7).shell_status(), 7);
        assert_eq!(ContainerExit::Signal(9).shell_status(), 137);
        assert_eq!(not_started("exec nothing", 2).shell_status(), 127);
        assert_eq!(not_started("exec /etc", 13).shell_status(), 126);
        assert_eq!(not_started("user nobody2", 2).shell_status(), 125);
    }

    #[test]
    fn a_frame_can_be_taken_without_a_byte_of_the_next() {
        let mut bytes = Vec::new();
        Frame::Data(Stream::Stdin, b"first".to_vec())
            .encode(3, &mut bytes)
            .unwrap();
        Frame::Signal(15).encode(MAIN, &mut bytes).unwrap();
        let mut decoder = FrameDecoder::default();
        let mut rest = bytes.as_slice();
        while decoder.missing().unwrap() > 0 {
            let (part, after) = rest.split_at(decoder.missing().unwrap());
            decoder.push(part);
            rest = after;
        }
        let frame = decoder.next_frame().unwrap();
        assert_eq!(frame, Some((3, Frame::Data(Stream::Stdin, b"first".to_vec()))));
        assert_eq!(rest.len(), HEADER_SIZE + 1);
        assert_eq!(decoder.missing().unwrap(), HEADER_SIZE);
    }
}

//! The host's side of the agent protocol: bytes of the control connection in, events out, and the other way round.
//! It does no I/O and waits for nothing, so it can be driven by any loop.

// What a guest or a file says must not end this process.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use picovm_guest_protocol::frame::{DATA_MAX, INITIAL_CREDIT, encode_data};
use picovm_guest_protocol::{ContainerExit, ContainerSpec, Frame, FrameDecoder, FrameError, Stream};

use crate::error::EngineError;

/// Something that the agent told.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of standard output or error. Give them back with [`Session::consumed`] once they are out.
    Output(Stream, Vec<u8>),
    /// The container has ended; no more output follows.
    Exit(ContainerExit),
}

/// A control connection seen from the host.
pub struct Session {
    decoder: FrameDecoder,
    out: Vec<u8>,
    stdin_credit: u32,
    output_credit: [u32; 2],
}

impl Default for Session {
    fn default() -> Self {
        Self {
            decoder: FrameDecoder::default(),
            out: Vec::new(),
            stdin_credit: INITIAL_CREDIT,
            output_credit: [INITIAL_CREDIT; 2],
        }
    }
}

fn output_index(stream: Stream) -> Option<usize> {
    match stream {
        Stream::Stdin => None,
        Stream::Stdout => Some(0),
        Stream::Stderr => Some(1),
    }
}

impl Session {
    /// Sends the container that did not fit into the identity.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`].
    pub fn send_spec(&mut self, spec: &ContainerSpec) -> Result<(), FrameError> {
        Frame::Spec(spec.clone()).encode(&mut self.out)
    }

    /// Takes bytes as they came from the connection.
    pub fn received(&mut self, bytes: &[u8]) {
        self.decoder.push(bytes);
    }

    /// The next event, if one has come in whole.
    ///
    /// # Errors
    /// [`EngineError::Protocol`], [`EngineError::Credit`]: the agent cannot be trusted any more.
    pub fn next_event(&mut self) -> Result<Option<Event>, EngineError> {
        while let Some(frame) = self.decoder.next_frame()? {
            match frame {
                Frame::Data(stream, bytes) => {
                    let index = output_index(stream).ok_or(FrameError::Payload(0))?;
                    let credit = self.output_credit.get_mut(index).ok_or(EngineError::Credit)?;
                    let length = u32::try_from(bytes.len()).map_err(|_| EngineError::Credit)?;
                    *credit = credit.checked_sub(length).ok_or(EngineError::Credit)?;
                    return Ok(Some(Event::Output(stream, bytes)));
                }
                Frame::Credit(Stream::Stdin, bytes) => {
                    let credit = self.stdin_credit.checked_add(bytes).ok_or(EngineError::Credit)?;
                    if credit > INITIAL_CREDIT {
                        return Err(EngineError::Credit);
                    }
                    self.stdin_credit = credit;
                }
                Frame::Exit(exit) => return Ok(Some(Event::Exit(exit))),
                // The end of a stream before the container's says nothing to the host.
                Frame::Close(Stream::Stdout | Stream::Stderr) => {}
                Frame::Spec(_) | Frame::Signal(_) | Frame::Credit(..) | Frame::Close(Stream::Stdin) => {
                    return Err(FrameError::Payload(0).into());
                }
            }
        }
        Ok(None)
    }

    /// Gives credit back for output that has left the host's hands.
    pub fn consumed(&mut self, stream: Stream, bytes: usize) {
        let Some(credit) = output_index(stream).and_then(|index| self.output_credit.get_mut(index)) else {
            return;
        };
        let bytes = u32::try_from(bytes)
            .unwrap_or(u32::MAX)
            .min(INITIAL_CREDIT.saturating_sub(*credit));
        *credit = credit.saturating_add(bytes);
        // A frame of this size cannot be too large.
        let _ = Frame::Credit(stream, bytes).encode(&mut self.out);
    }

    /// Bytes of standard input that may be sent now.
    #[must_use]
    pub fn stdin_room(&self) -> usize {
        (self.stdin_credit as usize).min(DATA_MAX)
    }

    /// Sends standard input, at most [`Session::stdin_room`] bytes of it; returns how many.
    pub fn send_stdin(&mut self, bytes: &[u8]) -> usize {
        let part = bytes
            .get(..bytes.len().min(self.stdin_room()))
            .unwrap_or_default();
        if part.is_empty() || encode_data(Stream::Stdin, part, &mut self.out).is_err() {
            return 0;
        }
        self.stdin_credit = self.stdin_credit.saturating_sub(part.len() as u32);
        part.len()
    }

    /// No more standard input follows.
    pub fn close_stdin(&mut self) {
        let _ = Frame::Close(Stream::Stdin).encode(&mut self.out);
    }

    /// Nobody reads this output any more: the container's next write to it fails with `EPIPE`.
    pub fn close_output(&mut self, stream: Stream) {
        let _ = Frame::Close(stream).encode(&mut self.out);
    }

    /// Delivers a signal to the container.
    pub fn signal(&mut self, signal: u8) {
        let _ = Frame::Signal(signal).encode(&mut self.out);
    }

    /// Bytes for the connection. Tell with [`Session::sent`] how many went.
    #[must_use]
    pub fn to_send(&self) -> &[u8] {
        &self.out
    }

    /// So many bytes of [`Session::to_send`] went.
    pub fn sent(&mut self, bytes: usize) {
        self.out.drain(..bytes.min(self.out.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session_with(frames: &[Frame]) -> Session {
        let mut bytes = Vec::new();
        for frame in frames {
            frame.encode(&mut bytes).unwrap();
        }
        let mut session = Session::default();
        session.received(&bytes);
        session
    }

    #[test]
    fn output_and_exit_come_in_order() {
        let mut session = session_with(&[
            Frame::Data(Stream::Stdout, b"hello".to_vec()),
            Frame::Close(Stream::Stdout),
            Frame::Exit(ContainerExit::Code(3)),
        ]);
        assert_eq!(
            session.next_event().unwrap(),
            Some(Event::Output(Stream::Stdout, b"hello".to_vec()))
        );
        assert_eq!(
            session.next_event().unwrap(),
            Some(Event::Exit(ContainerExit::Code(3)))
        );
        assert_eq!(session.next_event().unwrap(), None);
    }

    #[test]
    fn an_agent_that_overdraws_its_credit_is_refused() {
        let chunk = vec![0u8; DATA_MAX];
        let frames: Vec<Frame> = (0..=INITIAL_CREDIT as usize / DATA_MAX)
            .map(|_| Frame::Data(Stream::Stderr, chunk.clone()))
            .collect();
        let mut session = session_with(&frames);
        let last = loop {
            match session.next_event() {
                Ok(Some(_)) => {}
                other => break other,
            }
        };
        assert!(matches!(last, Err(EngineError::Credit)));
    }

    #[test]
    fn credit_that_was_never_spent_is_refused() {
        assert!(
            session_with(&[Frame::Credit(Stream::Stdin, 1)])
                .next_event()
                .is_err()
        );
        assert!(session_with(&[Frame::Signal(9)]).next_event().is_err());
        assert!(
            session_with(&[Frame::Data(Stream::Stdin, vec![1])])
                .next_event()
                .is_err()
        );
    }

    #[test]
    fn stdin_stops_when_its_credit_is_spent() {
        let mut session = Session::default();
        let bytes = vec![7u8; DATA_MAX];
        let mut sent = 0;
        loop {
            match session.send_stdin(&bytes) {
                0 => break,
                count => sent += count,
            }
        }
        assert_eq!(sent, INITIAL_CREDIT as usize);
    }
}

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

/// Once so many bytes wait for an agent that does not read, nothing is added of what it can bring about itself: the answers
/// to its output, and input that it has given credit for.
const WAITING_MAX: usize = INITIAL_CREDIT as usize + (64 << 10);

/// A control connection seen from the host.
pub struct Session {
    decoder: FrameDecoder,
    out: Vec<u8>,
    stdin_credit: u32,
    output_credit: [u32; 2],
    /// Output that has left the host's hands, and for which credit was not given back yet.
    owed: [u32; 2],
}

impl Default for Session {
    fn default() -> Self {
        Self {
            decoder: FrameDecoder::default(),
            out: Vec::new(),
            stdin_credit: INITIAL_CREDIT,
            output_credit: [INITIAL_CREDIT; 2],
            owed: [0; 2],
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
        if let Some(owed) = output_index(stream).and_then(|index| self.owed.get_mut(index)) {
            // No more than was ever given: it was spent before.
            *owed = owed
                .saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX))
                .min(INITIAL_CREDIT);
        }
        self.give_credit();
    }

    fn give_credit(&mut self) {
        for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            let (Some(owed), Some(credit)) = (self.owed.get_mut(index), self.output_credit.get_mut(index))
            else {
                continue;
            };
            if *owed == 0 || self.out.len() >= WAITING_MAX {
                continue;
            }
            let bytes = std::mem::take(owed).min(INITIAL_CREDIT.saturating_sub(*credit));
            *credit = credit.saturating_add(bytes);
            // A frame of this size cannot be too large.
            let _ = Frame::Credit(stream, bytes).encode(&mut self.out);
        }
    }

    /// Bytes of standard input that may be sent now.
    #[must_use]
    pub fn stdin_room(&self) -> usize {
        if self.out.len() >= WAITING_MAX {
            return 0;
        }
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
        self.give_credit();
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

    /// As much as an agent can make wait that reads nothing.
    const MOST: usize = WAITING_MAX + DATA_MAX + 64;

    #[test]
    fn answers_that_an_agent_does_not_read_do_not_pile_up() {
        let mut session = Session::default();
        let mut given = 0;
        let mut frames = Vec::new();
        for _ in 0..1000 {
            Frame::Data(Stream::Stdout, vec![b'x'])
                .encode(&mut frames)
                .unwrap();
        }
        for _ in 0..200 {
            session.received(&frames);
            while let Some(Event::Output(stream, bytes)) = session.next_event().unwrap() {
                session.consumed(stream, bytes.len());
                given += bytes.len();
            }
            assert!(session.to_send().len() <= MOST, "{}", session.to_send().len());
        }
        assert_eq!(given, 200_000);
        // Once it reads, it has all its credit back.
        let mut decoder = FrameDecoder::default();
        let mut back = 0;
        while !session.to_send().is_empty() {
            let part = session.to_send().len().min(1000);
            decoder.push(&session.to_send()[..part]);
            session.sent(part);
            while let Some(frame) = decoder.next_frame().unwrap() {
                match frame {
                    Frame::Credit(Stream::Stdout, bytes) => back += bytes as usize,
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!(back, given);
    }

    #[test]
    fn empty_output_is_not_answered() {
        let mut session = Session::default();
        session.consumed(Stream::Stdout, 0);
        assert!(session.to_send().is_empty());
    }

    #[test]
    fn input_that_an_agent_pays_for_and_does_not_read_does_not_pile_up() {
        let mut session = Session::default();
        let bytes = vec![7u8; DATA_MAX];
        for _ in 0..1000 {
            let mut sent = 0;
            loop {
                match session.send_stdin(&bytes) {
                    0 => break,
                    count => sent += count,
                }
            }
            assert!(session.to_send().len() <= MOST, "{}", session.to_send().len());
            let mut credit = Vec::new();
            Frame::Credit(Stream::Stdin, sent as u32)
                .encode(&mut credit)
                .unwrap();
            session.received(&credit);
            assert_eq!(session.next_event().unwrap(), None);
        }
    }
}

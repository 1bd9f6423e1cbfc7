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

use std::collections::BTreeMap;

use picovm_guest_protocol::frame::{DATA_MAX, INITIAL_CREDIT, LAYER, MAIN, encode_data};
use picovm_guest_protocol::{
    ContainerExit, ContainerSpec, Frame, FrameDecoder, FrameError, Helper, ProcessSpec, Stream, TerminalSize,
};

use crate::error::EngineError;

/// Something that the agent told.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of a process's standard output or error. Give them back with [`Session::consumed`] once they are out.
    Output(u16, Stream, Vec<u8>),
    /// The process has ended; no more output of it follows. Its number is free again.
    Exit(u16, ContainerExit),
    /// Memory has run out, and the guest has killed a process of the container.
    OutOfMemory,
    /// The main process's program runs.
    Started,
    /// Nothing of the container runs any more, and all that it has written was sent.
    Frozen,
}

/// Once so many bytes wait for an agent that does not read, nothing is added of what it can bring about itself: the answers
/// to its output, and input that it has given credit for.
const WAITING_MAX: usize = INITIAL_CREDIT as usize + (64 << 10);

/// A control connection seen from the host.
pub struct Session {
    decoder: FrameDecoder,
    out: Vec<u8>,
    processes: BTreeMap<u16, Credit>,
}

/// What may be sent on the streams of a process.
struct Credit {
    stdin: u32,
    output: [u32; 2],
    /// Output that has left the host's hands, and for which credit was not given back yet.
    owed: [u32; 2],
}

impl Default for Credit {
    fn default() -> Self {
        Self {
            stdin: INITIAL_CREDIT,
            output: [INITIAL_CREDIT; 2],
            owed: [0; 2],
        }
    }
}

impl Default for Session {
    fn default() -> Self {
        Self {
            decoder: FrameDecoder::default(),
            out: Vec::new(),
            processes: BTreeMap::from([(MAIN, Credit::default())]),
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
        Frame::Spec(spec.clone()).encode(MAIN, &mut self.out)
    }

    /// The container's writable layer will be sent, as standard input of [`LAYER`].
    pub fn expect_layer(&mut self) {
        self.processes.insert(LAYER, Credit::default());
    }

    /// Begins a process in the container, under a number that no process has.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`].
    pub fn exec(&mut self, process: u16, spec: &ProcessSpec) -> Result<(), FrameError> {
        Frame::Exec(spec.clone()).encode(process, &mut self.out)?;
        self.processes.insert(process, Credit::default());
        Ok(())
    }

    /// Begins a process of the agent's own, under a number that no process has.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`].
    pub fn help(&mut self, process: u16, helper: &Helper) -> Result<(), FrameError> {
        Frame::Help(helper.clone()).encode(process, &mut self.out)?;
        self.processes.insert(process, Credit::default());
        Ok(())
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
        let wrong = || FrameError::Payload(0);
        while let Some((process, frame)) = self.decoder.next_frame()? {
            let credits = self.processes.get_mut(&process).ok_or_else(wrong)?;
            match frame {
                Frame::Data(stream, bytes) => {
                    let index = output_index(stream)
                        .filter(|_| process != LAYER)
                        .ok_or_else(wrong)?;
                    let credit = credits.output.get_mut(index).ok_or(EngineError::Credit)?;
                    let length = u32::try_from(bytes.len()).map_err(|_| EngineError::Credit)?;
                    *credit = credit.checked_sub(length).ok_or(EngineError::Credit)?;
                    return Ok(Some(Event::Output(process, stream, bytes)));
                }
                Frame::Credit(Stream::Stdin, bytes) => {
                    let credit = credits.stdin.checked_add(bytes).ok_or(EngineError::Credit)?;
                    if credit > INITIAL_CREDIT {
                        return Err(EngineError::Credit);
                    }
                    credits.stdin = credit;
                }
                Frame::Exit(exit) if process != LAYER => {
                    self.processes.remove(&process);
                    return Ok(Some(Event::Exit(process, exit)));
                }
                Frame::OutOfMemory if process == MAIN => return Ok(Some(Event::OutOfMemory)),
                Frame::Started if process == MAIN => return Ok(Some(Event::Started)),
                Frame::Freeze if process == MAIN => return Ok(Some(Event::Frozen)),
                // The end of a stream before the process's says nothing to the host.
                Frame::Close(Stream::Stdout | Stream::Stderr) => {}
                _ => return Err(wrong().into()),
            }
        }
        Ok(None)
    }

    /// Gives credit back for output that has left the host's hands.
    pub fn consumed(&mut self, process: u16, stream: Stream, bytes: usize) {
        let owed = self
            .processes
            .get_mut(&process)
            .zip(output_index(stream))
            .and_then(|(credits, index)| credits.owed.get_mut(index));
        if let Some(owed) = owed {
            // No more than was ever given: it was spent before.
            *owed = owed
                .saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX))
                .min(INITIAL_CREDIT);
        }
        self.give_credit();
    }

    fn give_credit(&mut self) {
        for (process, credits) in &mut self.processes {
            for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
                let (Some(owed), Some(credit)) = (credits.owed.get_mut(index), credits.output.get_mut(index))
                else {
                    continue;
                };
                if *owed == 0 || self.out.len() >= WAITING_MAX {
                    continue;
                }
                let bytes = std::mem::take(owed).min(INITIAL_CREDIT.saturating_sub(*credit));
                *credit = credit.saturating_add(bytes);
                // A frame of this size cannot be too large.
                let _ = Frame::Credit(stream, bytes).encode(*process, &mut self.out);
            }
        }
    }

    /// Bytes of a process's standard input that may be sent now.
    #[must_use]
    pub fn stdin_room(&self, process: u16) -> usize {
        match self.processes.get(&process) {
            Some(credits) if self.out.len() < WAITING_MAX => (credits.stdin as usize).min(DATA_MAX),
            _ => 0,
        }
    }

    /// Sends standard input, at most [`Session::stdin_room`] bytes of it; returns how many.
    pub fn send_stdin(&mut self, process: u16, bytes: &[u8]) -> usize {
        let part = bytes
            .get(..bytes.len().min(self.stdin_room(process)))
            .unwrap_or_default();
        if part.is_empty() || encode_data(process, Stream::Stdin, part, &mut self.out).is_err() {
            return 0;
        }
        if let Some(credits) = self.processes.get_mut(&process) {
            credits.stdin = credits.stdin.saturating_sub(part.len() as u32);
        }
        part.len()
    }

    /// No more standard input follows.
    pub fn close_stdin(&mut self, process: u16) {
        self.tell(process, &Frame::Close(Stream::Stdin));
    }

    /// Nobody reads this output any more: the process's next write to it fails with `EPIPE`.
    pub fn close_output(&mut self, process: u16, stream: Stream) {
        self.tell(process, &Frame::Close(stream));
    }

    /// Delivers a signal to a process and its group.
    pub fn signal(&mut self, process: u16, signal: u8) {
        self.tell(process, &Frame::Signal(signal));
    }

    /// Asks for the container to be stopped, and once [`Event::Frozen`] has come, for the machine to be frozen: the last that is
    /// sent.
    pub fn freeze(&mut self) {
        self.tell(MAIN, &Frame::Freeze);
    }

    /// A process's terminal has this size.
    pub fn resize(&mut self, process: u16, size: TerminalSize) {
        self.tell(process, &Frame::Resize(size));
    }

    /// Sends a small frame about a process, unless that has ended.
    fn tell(&mut self, process: u16, frame: &Frame) {
        if self.processes.contains_key(&process) {
            // A frame of this size cannot be too large.
            let _ = frame.encode(process, &mut self.out);
        }
    }

    /// Whether a process has this number.
    #[must_use]
    pub fn is_live(&self, process: u16) -> bool {
        self.processes.contains_key(&process)
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
            frame.encode(MAIN, &mut bytes).unwrap();
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
            Some(Event::Output(MAIN, Stream::Stdout, b"hello".to_vec()))
        );
        assert_eq!(
            session.next_event().unwrap(),
            Some(Event::Exit(MAIN, ContainerExit::Code(3)))
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
            match session.send_stdin(MAIN, &bytes) {
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
                .encode(MAIN, &mut frames)
                .unwrap();
        }
        for _ in 0..200 {
            session.received(&frames);
            while let Some(Event::Output(process, stream, bytes)) = session.next_event().unwrap() {
                session.consumed(process, stream, bytes.len());
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
                    (MAIN, Frame::Credit(Stream::Stdout, bytes)) => back += bytes as usize,
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!(back, given);
    }

    #[test]
    fn empty_output_is_not_answered() {
        let mut session = Session::default();
        session.consumed(MAIN, Stream::Stdout, 0);
        assert!(session.to_send().is_empty());
    }

    #[test]
    fn input_that_an_agent_pays_for_and_does_not_read_does_not_pile_up() {
        let mut session = Session::default();
        let bytes = vec![7u8; DATA_MAX];
        for _ in 0..1000 {
            let mut sent = 0;
            loop {
                match session.send_stdin(MAIN, &bytes) {
                    0 => break,
                    count => sent += count,
                }
            }
            assert!(session.to_send().len() <= MOST, "{}", session.to_send().len());
            let mut credit = Vec::new();
            Frame::Credit(Stream::Stdin, sent as u32)
                .encode(MAIN, &mut credit)
                .unwrap();
            session.received(&credit);
            assert_eq!(session.next_event().unwrap(), None);
        }
    }

    #[test]
    fn processes_have_numbers_and_credit_of_their_own() {
        let mut session = Session::default();
        session.exec(7, &ProcessSpec::default()).unwrap();
        assert_eq!(
            session.send_stdin(7, &vec![1; DATA_MAX]),
            DATA_MAX,
            "standard input of 7"
        );
        assert_eq!(session.stdin_room(MAIN), DATA_MAX);
        assert_eq!(session.stdin_room(8), 0);
        let mut bytes = Vec::new();
        Frame::Data(Stream::Stderr, b"x".to_vec())
            .encode(7, &mut bytes)
            .unwrap();
        Frame::Exit(ContainerExit::Code(1)).encode(7, &mut bytes).unwrap();
        session.received(&bytes);
        let event = session.next_event().unwrap();
        assert_eq!(event, Some(Event::Output(7, Stream::Stderr, b"x".to_vec())));
        let event = session.next_event().unwrap();
        assert_eq!(event, Some(Event::Exit(7, ContainerExit::Code(1))));
        assert!(!session.is_live(7) && session.is_live(MAIN));
        // What comes about a process that has ended, or never was, is not from an agent that can be trusted.
        session.received(&bytes);
        assert!(session.next_event().is_err());
    }

    #[test]
    fn nothing_is_told_to_a_process_that_has_ended() {
        let mut session = session_with(&[Frame::Exit(ContainerExit::Code(0))]);
        session.next_event().unwrap();
        session.signal(MAIN, 15);
        session.close_stdin(MAIN);
        assert!(session.to_send().is_empty());
    }

    #[test]
    fn a_layer_is_only_taken() {
        let mut session = Session::default();
        session.expect_layer();
        assert_eq!(session.send_stdin(LAYER, b"tar"), 3);
        let mut bytes = Vec::new();
        Frame::Exit(ContainerExit::Code(0))
            .encode(LAYER, &mut bytes)
            .unwrap();
        session.received(&bytes);
        assert!(session.next_event().is_err());
    }
}

//! The processes' streams and the control connection's two directions, each with what it has buffered and may send.

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

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use picovm_guest_protocol::frame::{DATA_MAX, HEADER_SIZE, INITIAL_CREDIT, encode_data};
use picovm_guest_protocol::{Frame, FrameError, Stream};
use rustix::io::Errno;

/// Unsent bytes from which on nothing more is read from the container.
const OUTGOING_HIGH: usize = 64 << 10;
/// Largest data frame with its header: the virtio-console driver takes that many bytes in one write.
const CHUNK: usize = DATA_MAX - HEADER_SIZE;

/// Bytes on their way to the host.
pub struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// Whether the connection may take bytes; set by its readiness, cleared when it refuses.
    pub writable: bool,
    /// Whether somebody waits for what is here.
    urgent: bool,
}

impl Outgoing {
    /// An empty buffer, its memory already present.
    pub fn new() -> Self {
        let mut bytes = vec![1; 2 * OUTGOING_HIGH];
        bytes.clear();
        Self {
            bytes,
            sent: 0,
            writable: true,
            urgent: false,
        }
    }

    /// Appends a frame.
    pub fn push(&mut self, process: u16, frame: &Frame) -> Result<(), FrameError> {
        self.urgent = true;
        frame.encode(process, &mut self.bytes)
    }

    /// Appends a frame that may wait for the next one: each write to the connection costs several exits.
    fn push_at_leisure(&mut self, process: u16, frame: &Frame) -> Result<(), FrameError> {
        frame.encode(process, &mut self.bytes)
    }

    fn push_data(&mut self, process: u16, stream: Stream, bytes: &[u8]) -> Result<(), FrameError> {
        self.urgent = true;
        encode_data(process, stream, bytes, &mut self.bytes)
    }

    /// Whether there is only what may wait.
    pub fn is_at_leisure(&self) -> bool {
        !self.urgent && !self.is_empty()
    }

    /// What is there has waited long enough.
    pub fn hurry(&mut self) {
        self.urgent = true;
    }

    /// Whether all has been sent.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == self.sent
    }

    /// Whether more may be read from processes.
    pub fn has_room(&self) -> bool {
        self.bytes.len().saturating_sub(self.sent) < OUTGOING_HIGH
    }

    /// Writes as much as the connection takes.
    pub fn flush(&mut self, connection: &OwnedFd) -> rustix::io::Result<()> {
        while self.urgent && self.writable && !self.is_empty() {
            match rustix::io::write(connection, self.bytes.get(self.sent..).unwrap_or_default()) {
                Ok(count) => self.sent = self.sent.saturating_add(count),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        if self.is_empty() {
            self.bytes.clear();
            self.sent = 0;
            self.urgent = false;
        } else if self.sent >= OUTGOING_HIGH {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }
}

/// Most bytes that are taken from a terminal after its process's end: more than a terminal holds.
const TERMINAL_REST: usize = 128 << 10;

/// How long an output is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// To its end. A terminal has none while its process lives: one who closes it may open it again.
    End,
    /// To its end, of a process that has ended.
    LastEnd,
    /// Until it is empty, and no more than so many bytes: its process has ended, and others may hold it open.
    Empty(usize),
}

/// Standard output or standard error: from a pipe or a terminal to the host, within the host's credit.
pub struct Output {
    process: u16,
    stream: Stream,
    pipe: Option<OwnedFd>,
    credit: u32,
    /// Whether the pipe may have bytes; set by its readiness, cleared when it is empty.
    pub readable: bool,
    /// Whether its last writer has gone: no event will come again, so it is read to its end.
    hung_up: bool,
    /// Whether it is a terminal, which gives less than asked for though it has more, and fails instead of ending.
    is_terminal: bool,
    until: Until,
    /// Whether nobody on the host reads it: a terminal cannot be closed for writing, so what it gives is dropped.
    discarded: bool,
}

impl Output {
    /// The stream of a process that comes from this pipe.
    pub fn new(process: u16, stream: Stream, pipe: OwnedFd) -> Self {
        Self {
            process,
            stream,
            pipe: Some(pipe),
            credit: INITIAL_CREDIT,
            readable: false,
            hung_up: false,
            is_terminal: false,
            until: Until::End,
            discarded: false,
        }
    }

    /// A terminal's output, which is a process's standard output.
    pub fn of_terminal(process: u16, terminal: OwnedFd) -> Self {
        Self {
            is_terminal: true,
            readable: true,
            ..Self::new(process, Stream::Stdout, terminal)
        }
    }

    /// Its process has ended, and so will everybody who could write: it is read to its end.
    pub fn process_ended(&mut self) {
        self.until = Until::LastEnd;
        self.readable = true;
    }

    /// Its process has ended, and whoever else could write is not waited for: what is there is all there is.
    pub fn process_left(&mut self) {
        let there = match &self.pipe {
            Some(_) if self.is_terminal => TERMINAL_REST,
            Some(pipe) => rustix::io::ioctl_fionread(pipe)
                .ok()
                .and_then(|bytes| usize::try_from(bytes).ok())
                .unwrap_or_default(),
            None => 0,
        };
        self.until = Until::Empty(there);
        self.readable = true;
    }

    /// Takes an event of the pipe.
    pub fn note(&mut self, hung_up: bool) {
        self.readable = true;
        self.hung_up |= hung_up;
    }

    /// Whether the end of the stream was reached and queued for the host.
    pub fn is_closed(&self) -> bool {
        self.pipe.is_none() || self.discarded
    }

    /// Whether nothing waits in it.
    pub fn is_drained(&self) -> bool {
        let is_empty = |pipe| rustix::io::ioctl_fionread(pipe).is_ok_and(|bytes| bytes == 0);
        self.is_closed() || self.pipe.as_ref().is_none_or(is_empty)
    }

    /// The host that is there now has given the credit that each begins with, and nothing was sent to it.
    pub fn meet_another_host(&mut self) {
        self.credit = INITIAL_CREDIT;
    }

    /// Sends bytes that are not the process's, as far as there is credit for them.
    pub fn say(&mut self, bytes: &[u8], outgoing: &mut Outgoing) -> Result<(), FrameError> {
        let bytes = bytes
            .get(..bytes.len().min(self.credit as usize))
            .unwrap_or_default();
        for part in bytes.chunks(CHUNK) {
            outgoing.push_data(self.process, self.stream, part)?;
            self.credit = self
                .credit
                .saturating_sub(u32::try_from(part.len()).unwrap_or(u32::MAX));
        }
        Ok(())
    }

    /// Takes credit from the host; `false` if the sum is impossible.
    pub fn add_credit(&mut self, bytes: u32) -> bool {
        match self.credit.checked_add(bytes) {
            Some(credit) => self.credit = credit,
            None => return false,
        }
        true
    }

    /// Whether bytes could move now.
    pub fn can_move(&self, outgoing: &Outgoing) -> bool {
        self.pipe.is_some() && self.readable && (self.discarded || self.credit > 0 && outgoing.has_room())
    }

    /// Moves what is there, as far as credit and the outgoing buffer allow.
    pub fn pump(&mut self, outgoing: &mut Outgoing, scratch: &mut [u8]) -> Result<(), FrameError> {
        while self.can_move(outgoing) {
            let Some(pipe) = &self.pipe else { break };
            let mut limit = CHUNK.min(scratch.len());
            if !self.discarded {
                limit = limit.min(self.credit as usize);
            }
            if let Until::Empty(left) = self.until {
                limit = limit.min(left);
            }
            if limit == 0 {
                return self.close(outgoing);
            }
            let buffer = scratch.get_mut(..limit).unwrap_or_default();
            match rustix::io::read(pipe, &mut *buffer) {
                // The end, or an error that a pipe cannot have: no more bytes either way.
                Ok(0) => return self.close(outgoing),
                Ok(count) => {
                    if !self.discarded {
                        let bytes = buffer.get(..count).unwrap_or_default();
                        outgoing.push_data(self.process, self.stream, bytes)?;
                        self.credit = self
                            .credit
                            .saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
                    }
                    if let Until::Empty(left) = &mut self.until {
                        *left = left.saturating_sub(count);
                        continue;
                    }
                    // A pipe gives all it has: less than asked for means empty, and the next byte is a new event.
                    self.readable = count == limit || self.hung_up || self.is_terminal;
                }
                Err(Errno::AGAIN) if matches!(self.until, Until::Empty(_)) => return self.close(outgoing),
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                // Nobody has the terminal open.
                Err(Errno::IO) if self.is_terminal && self.until == Until::End => self.readable = false,
                Err(_) => return self.close(outgoing),
            }
        }
        // The end needs no credit.
        let is_empty = |pipe| rustix::io::ioctl_fionread(pipe).is_ok_and(|bytes| bytes == 0);
        let may_be_over = match self.until {
            Until::End => self.hung_up && !self.is_terminal,
            Until::LastEnd => self.hung_up,
            Until::Empty(_) => true,
        };
        if may_be_over && self.credit == 0 && self.pipe.as_ref().is_some_and(is_empty) {
            return self.close(outgoing);
        }
        Ok(())
    }

    /// Nobody on the host reads this stream any more: the container's next write to it ends in `SIGPIPE` or `EPIPE`, as
    /// it would without a VM in between.
    pub fn abandon(&mut self, outgoing: &mut Outgoing) -> Result<(), FrameError> {
        if self.is_closed() {
            return Ok(());
        }
        if self.is_terminal {
            self.discarded = true;
            self.readable = true;
            return outgoing.push_at_leisure(self.process, &Frame::Close(self.stream));
        }
        self.close(outgoing)
    }

    fn close(&mut self, outgoing: &mut Outgoing) -> Result<(), FrameError> {
        self.pipe = None;
        if self.discarded {
            return Ok(());
        }
        // Most close theirs by ending, and then the exit status follows at once.
        outgoing.push_at_leisure(self.process, &Frame::Close(self.stream))
    }
}

/// Standard input: from the host to a pipe, giving credit back as the pipe takes bytes.
pub struct Input {
    process: u16,
    pipe: Option<OwnedFd>,
    buffer: VecDeque<u8>,
    closed_by_host: bool,
    /// Whether the pipe may take bytes; set by its readiness, cleared when it is full.
    pub writable: bool,
    /// Whether it is a terminal, which is not closed when the host has no more.
    is_terminal: bool,
}

/// The host sent what it must not.
#[derive(Debug, PartialEq, Eq)]
pub enum InputViolation {
    /// More bytes than it has credit for.
    BeyondCredit,
    /// Bytes or an end after the end.
    AfterClose,
}

impl Input {
    /// The stream of a process that goes into this pipe.
    pub fn new(process: u16, pipe: OwnedFd) -> Self {
        Self {
            process,
            pipe: Some(pipe),
            buffer: VecDeque::new(),
            closed_by_host: false,
            writable: true,
            is_terminal: false,
        }
    }

    /// What is typed on a terminal.
    pub fn of_terminal(process: u16, terminal: OwnedFd) -> Self {
        Self {
            is_terminal: true,
            ..Self::new(process, terminal)
        }
    }

    /// Goes on where another has begun, with what that has not written.
    pub fn take_over(&mut self, other: &mut Self) {
        self.buffer = std::mem::take(&mut other.buffer);
        self.closed_by_host = other.closed_by_host;
    }

    /// Whether a terminal has refused bytes. It does not always tell when it takes some again: what a line discipline throws
    /// away makes room without a word.
    pub fn is_stuck(&self) -> bool {
        self.is_terminal && !self.writable && !self.buffer.is_empty() && self.pipe.is_some()
    }

    /// Takes bytes from the host.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), InputViolation> {
        if self.closed_by_host {
            return Err(InputViolation::AfterClose);
        }
        if self.buffer.len().saturating_add(bytes.len()) > INITIAL_CREDIT as usize {
            return Err(InputViolation::BeyondCredit);
        }
        self.buffer.extend(bytes);
        Ok(())
    }

    /// The host's end of the stream: the pipe is closed once the buffer is written.
    pub fn close(&mut self) -> Result<(), InputViolation> {
        if self.closed_by_host {
            return Err(InputViolation::AfterClose);
        }
        self.closed_by_host = true;
        Ok(())
    }

    /// Nobody will read any more: what is there and what will come is discarded.
    pub fn abandon(&mut self) {
        self.pipe = None;
    }

    /// Writes what the pipe takes and gives credit for it.
    pub fn pump(&mut self, outgoing: &mut Outgoing) -> Result<(), FrameError> {
        let mut consumed = 0usize;
        while let Some(pipe) = self.pipe.as_ref().filter(|_| self.writable) {
            let (bytes, _) = self.buffer.as_slices();
            if bytes.is_empty() {
                break;
            }
            match rustix::io::write(pipe, bytes) {
                Ok(count) => {
                    // A pipe takes all it can: less than offered means full, and room is a new event.
                    self.writable = count == bytes.len();
                    self.buffer.drain(..count);
                    consumed = consumed.saturating_add(count);
                }
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                // The container has closed its end.
                Err(_) => self.pipe = None,
            }
        }
        if self.pipe.is_none() {
            consumed = consumed.saturating_add(self.buffer.len());
            self.buffer.clear();
        }
        if self.closed_by_host && self.buffer.is_empty() && !self.is_terminal {
            self.pipe = None;
        }
        match u32::try_from(consumed) {
            Ok(0) | Err(_) => Ok(()),
            Ok(bytes) => outgoing.push(self.process, &Frame::Credit(Stream::Stdin, bytes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use picovm_guest_protocol::FrameDecoder;
    use picovm_guest_protocol::frame::MAIN;
    use rustix::pipe::{PipeFlags, pipe_with};

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap()
    }

    fn frames(outgoing: &mut Outgoing) -> Vec<Frame> {
        let mut decoder = FrameDecoder::default();
        decoder.push(&outgoing.bytes);
        outgoing.bytes.clear();
        std::iter::from_fn(|| decoder.next_frame().unwrap())
            .map(|(process, frame)| {
                assert_eq!(process, MAIN);
                frame
            })
            .collect()
    }

    #[test]
    fn output_stops_at_the_end_of_its_credit_and_goes_on_with_more() {
        let _no_fork = crate::tests::no_fork();
        let (read, write) = pipe();
        let mut output = Output::new(MAIN, Stream::Stdout, read);
        output.credit = 3;
        output.readable = true;
        rustix::io::write(&write, b"hello").unwrap();
        let mut outgoing = Outgoing::new();
        let mut scratch = [0; 100];
        output.pump(&mut outgoing, &mut scratch).unwrap();
        assert_eq!(
            frames(&mut outgoing),
            [Frame::Data(Stream::Stdout, b"hel".to_vec())]
        );
        assert!(!output.can_move(&outgoing));

        assert!(output.add_credit(10));
        drop(write);
        output.pump(&mut outgoing, &mut scratch).unwrap();
        assert_eq!(
            frames(&mut outgoing),
            [Frame::Data(Stream::Stdout, b"lo".to_vec())]
        );
        output.readable = true;
        output.pump(&mut outgoing, &mut scratch).unwrap();
        assert_eq!(frames(&mut outgoing), [Frame::Close(Stream::Stdout)]);
        assert!(output.is_closed());
    }

    #[test]
    fn an_end_that_came_while_there_was_no_credit_is_not_forgotten() {
        let _no_fork = crate::tests::no_fork();
        let (read, write) = pipe();
        let mut output = Output::new(MAIN, Stream::Stderr, read);
        output.credit = 0;
        rustix::io::write(&write, b"last words").unwrap();
        drop(write);
        // The only event that there will be.
        output.note(true);
        let mut outgoing = Outgoing::new();
        output.pump(&mut outgoing, &mut [0; 100]).unwrap();
        assert_eq!(frames(&mut outgoing), []);
        output.add_credit(1000);
        output.pump(&mut outgoing, &mut [0; 100]).unwrap();
        let expected = [
            Frame::Data(Stream::Stderr, b"last words".to_vec()),
            Frame::Close(Stream::Stderr),
        ];
        assert_eq!(frames(&mut outgoing), expected);
    }

    #[test]
    fn the_end_needs_no_credit() {
        let _no_fork = crate::tests::no_fork();
        let (read, write) = pipe();
        let mut output = Output::new(MAIN, Stream::Stdout, read);
        output.credit = 0;
        drop(write);
        output.note(true);
        let mut outgoing = Outgoing::new();
        output.pump(&mut outgoing, &mut [0; 100]).unwrap();
        assert_eq!(frames(&mut outgoing), [Frame::Close(Stream::Stdout)]);
    }

    #[test]
    fn credit_that_overflows_is_refused() {
        let (read, _write) = pipe();
        assert!(!Output::new(MAIN, Stream::Stderr, read).add_credit(u32::MAX));
    }

    #[test]
    fn input_gives_credit_for_what_the_pipe_took_and_closes_after_the_last_byte() {
        let (read, write) = pipe();
        rustix::pipe::fcntl_setpipe_size(&write, 4096).unwrap();
        let mut input = Input::new(MAIN, write);
        let mut outgoing = Outgoing::new();
        input.push(&[7; 5000]).unwrap();
        input.close().unwrap();
        input.pump(&mut outgoing).unwrap();
        assert_eq!(frames(&mut outgoing), [Frame::Credit(Stream::Stdin, 4096)]);
        assert!(input.pipe.is_some() && !input.writable);

        let mut bytes = [0; 8192];
        assert_eq!(rustix::io::read(&read, &mut bytes).unwrap(), 4096);
        input.writable = true;
        input.pump(&mut outgoing).unwrap();
        assert_eq!(frames(&mut outgoing), [Frame::Credit(Stream::Stdin, 904)]);
        assert!(input.pipe.is_none());
        assert_eq!(input.push(b"more"), Err(InputViolation::AfterClose));
        assert_eq!(input.close(), Err(InputViolation::AfterClose));
    }

    #[test]
    fn input_that_nobody_reads_is_discarded_with_credit() {
        let _no_fork = crate::tests::no_fork();
        let (read, write) = pipe();
        drop(read);
        let mut input = Input::new(MAIN, write);
        let mut outgoing = Outgoing::new();
        for _ in 0..2 {
            input.push(&[7; 5000]).unwrap();
            input.pump(&mut outgoing).unwrap();
            assert_eq!(frames(&mut outgoing), [Frame::Credit(Stream::Stdin, 5000)]);
        }
    }

    #[test]
    fn input_beyond_the_credit_is_a_violation() {
        let (_read, write) = pipe();
        let mut input = Input::new(MAIN, write);
        input.push(&vec![0; INITIAL_CREDIT as usize]).unwrap();
        assert_eq!(input.push(&[0]), Err(InputViolation::BeyondCredit));
    }
}

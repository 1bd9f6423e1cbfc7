//! The protocols: what the host decodes from a guest, what a guest decodes from the host, and what the engine and its
//! VMM processes decode from each other.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use picovm_engine::messages::{self as messages_of_engine, FromVmm, ToServer, ToVmm};
use picovm_engine::{Event, Session};
use picovm_guest_protocol::frame::{DATA_MAX, HEADER_SIZE, INITIAL_CREDIT, MAIN, PAYLOAD_MAX};
use picovm_guest_protocol::{Frame, FrameDecoder, Identity, ProcessSpec, Stream};
use rustix::pipe::{PipeFlags, pipe_with};

// The crate of init is a program; its parses are taken from their source.
#[allow(dead_code)]
#[path = "../../rootfs/init/src/accounts.rs"]
mod accounts;
#[allow(dead_code)]
#[path = "../../rootfs/init/src/streams.rs"]
mod streams;

/// Cuts the input into pieces as a connection may: the first byte says how long they are.
fn pieces(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (first, rest) = data.split_first().unwrap_or((&0, &[]));
    rest.chunks(match first {
        0 => usize::MAX,
        length => usize::from(*length),
    })
}

/// What is decoded is encoded and decoded as the same again.
fn round_trip(process: u16, frame: &Frame) {
    let mut bytes = Vec::new();
    frame.encode(process, &mut bytes).expect("it came in a frame");
    let mut again = FrameDecoder::default();
    again.push(&bytes);
    assert_eq!(again.next_frame().as_ref(), Ok(&Some((process, frame.clone()))));
}

/// The host's side of the control connection, with a hostile guest at the other end.
pub fn session(data: &[u8]) {
    let mut session = Session::default();
    // One process that was executed beside the container's own.
    let spec = ProcessSpec::default();
    session.exec(1, &spec).expect("a specification fits a frame");
    let mut owed = [[0usize; 2]; 2];
    for piece in pieces(data) {
        session.received(piece);
        loop {
            match session.next_event() {
                Ok(Some(Event::Output(process, stream, bytes))) => {
                    let owed = &mut owed[usize::from(process)][usize::from(stream == Stream::Stderr)];
                    *owed += bytes.len();
                    assert!(*owed <= INITIAL_CREDIT as usize, "more than its credit");
                    if bytes.len() % 2 == 1 {
                        session.consumed(process, stream, *owed);
                        *owed = 0;
                    }
                }
                Ok(Some(Event::Exit(process, exit))) => {
                    assert!(!session.is_live(process));
                    let _ = exit.shell_status();
                }
                Ok(Some(Event::OutOfMemory | Event::Started | Event::Frozen)) => {}
                Ok(None) => break,
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    return;
                }
            }
        }
        assert!(session.stdin_room(MAIN) <= DATA_MAX);
        session.send_stdin(MAIN, piece);
        session.sent(piece.len());
    }
}

/// A pipe that never blocks: the end for the agent, and the container's.
fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).expect("make a pipe")
}

/// The guest's side: frames, the streams that they act upon, and the image's account files, which the host's
/// specification of a user is looked up in.
pub fn agent(data: &[u8]) {
    if let Some(data) = data.strip_prefix(b"a") {
        // Specification, passwd, group.
        let mut parts = data.splitn(3, |byte| *byte == 0);
        let mut next = || parts.next().unwrap_or_default();
        let (spec, passwd, group) = (next(), next(), next());
        let accounts = accounts::Accounts::from_files(passwd.to_vec(), group.to_vec());
        let _ = accounts.resolve(spec);
        return;
    }
    // As in init, whose runtime does this: a pipe that nobody reads is an error of the write.
    static IGNORE: std::sync::Once = std::sync::Once::new();
    // SAFETY: no handler is installed.
    IGNORE.call_once(|| unsafe { _ = libc::signal(libc::SIGPIPE, libc::SIG_IGN) });
    let (container, stdin) = pipe();
    let (stdout, container_out) = pipe();
    let mut input = streams::Input::new(MAIN, stdin);
    let mut output = streams::Output::new(MAIN, Stream::Stdout, stdout);
    let mut outgoing = streams::Outgoing::new();
    let mut decoder = FrameDecoder::default();
    let mut scratch = vec![0; DATA_MAX];
    for piece in pieces(data) {
        assert!(
            decoder
                .missing()
                .is_ok_and(|bytes| bytes <= PAYLOAD_MAX + HEADER_SIZE)
        );
        decoder.push(piece);
        loop {
            let (process, frame) = match decoder.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(
                        decoder.next_frame(),
                        Err(error),
                        "the decoder stays at a bad frame"
                    );
                    return;
                }
            };
            round_trip(process, &frame);
            let obeyed = match frame {
                Frame::Data(Stream::Stdin, bytes) => input.push(&bytes).is_ok(),
                Frame::Close(Stream::Stdin) => input.close().is_ok(),
                Frame::Credit(Stream::Stdout, bytes) => output.add_credit(bytes),
                Frame::Close(Stream::Stdout) => output.abandon(&mut outgoing).is_ok(),
                // Stands for the container, which writes and reads as it likes.
                Frame::Signal(signal) => {
                    let _ = rustix::io::write(&container_out, &vec![signal; usize::from(signal) << 4]);
                    let _ = rustix::io::read(&container, &mut vec![0; usize::from(signal) << 8]);
                    input.writable = true;
                    output.note(signal == 0);
                    true
                }
                Frame::Spec(_)
                | Frame::Exec(_)
                | Frame::Help(_)
                | Frame::Resize(_)
                | Frame::OutOfMemory
                | Frame::Started
                | Frame::Freeze
                | Frame::Exit(_)
                | Frame::Data(..)
                | Frame::Close(_)
                | Frame::Credit(..) => true,
            };
            if !obeyed {
                return;
            }
            input.pump(&mut outgoing).expect("credit fits a frame");
            output
                .pump(&mut outgoing, &mut scratch)
                .expect("a chunk fits a frame");
        }
    }
}

/// The identity area as the guest reads it.
pub fn identity(data: &[u8]) {
    if let Ok(identity) = Identity::decode(data) {
        let bytes = identity.encode(usize::MAX).expect("it was decoded from memory");
        assert_eq!(Identity::decode(&bytes).as_ref(), Ok(&identity));
    }
}

/// The engine's messages; the first byte says which.
pub fn messages(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let (mut here, there) = UnixStream::pair().expect("make a socket pair");
    here.set_nonblocking(true).expect("set a socket non-blocking");
    // What does not fit the socket's buffer is cut off.
    let _ = here.write(data);
    drop(here);
    // As many as there are: each takes four bytes at least.
    match kind % 3 {
        0 => while let Ok(Some(_)) = messages_of_engine::receive::<ToServer>(&there) {},
        1 => while let Ok(Some(_)) = messages_of_engine::receive::<ToVmm>(&there) {},
        _ => while let Ok(Some(_)) = messages_of_engine::receive::<FromVmm>(&there) {},
    }
}

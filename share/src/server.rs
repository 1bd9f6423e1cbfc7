//! The loop of the server's threads: a request in, its reply out.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::Directories;

/// Data of a request or a reply at most: 32 pages, as a FUSE file system has them that asks for no more.
pub const DATA_MAX: usize = 128 << 10;
/// Longest request, and longest reply, with headers and names.
pub const REQUEST_MAX: usize = DATA_MAX + (8 << 10);
/// Threads, so that a request that waits for a disk holds up no other.
const THREADS: usize = 4;
/// Bytes of the header with which a request begins; the first four tell its length.
const HEADER: usize = 40;
/// Messages that have no answer of their own.
const INTERRUPT: u32 = 36;
const NOTIFY_REPLY: u32 = 41;

/// Serves the guest at the other end of a socket of packets (`SOCK_SEQPACKET`) until that is closed. `confine` is called first thing
/// in each thread, this one among them; where it says no, the thread serves nothing.
pub fn serve(directories: Directories, socket: BorrowedFd<'_>, confine: &(dyn Fn() -> bool + Sync)) {
    let server = Server::new(Arc::new(directories));
    std::thread::scope(|scope| {
        for _ in 1..THREADS {
            let builder = std::thread::Builder::new().name("share".into());
            // With fewer threads it is slower.
            let _ = builder.spawn_scoped(scope, || {
                if confine() {
                    serve_requests(&server, socket);
                }
            });
        }
        if confine() {
            serve_requests(&server, socket);
        }
    });
    // The process ends. Of what the crate opened at first some may be closed already, by who confines it.
    std::mem::forget(server);
}

fn serve_requests(server: &Server<Arc<Directories>>, socket: BorrowedFd<'_>) {
    let mut request = vec![0u8; REQUEST_MAX];
    let mut reply = vec![0u8; REQUEST_MAX];
    loop {
        let length = match rustix::net::recv(socket, request.as_mut_slice(), RecvFlags::empty()) {
            Ok((0, _)) => return,
            Ok((length, _)) => length,
            Err(Errno::INTR) => continue,
            Err(_) => return,
        };
        let Some(message) = request.get_mut(..length).filter(|message| is_whole(message)) else {
            // Who sends that has lost its way, and what it would send next makes no sense either.
            return;
        };
        answer(server, socket, message, &mut reply);
    }
}

/// Whether a packet is as long as it says.
fn is_whole(message: &[u8]) -> bool {
    message.len() >= HEADER
        && message
            .first_chunk::<4>()
            .is_some_and(|length| u32::from_le_bytes(*length) as usize == message.len())
}

fn answer(server: &Server<Arc<Directories>>, socket: BorrowedFd<'_>, message: &mut [u8], reply: &mut [u8]) {
    let unique = message.get(8..16).map(<[u8]>::to_vec).unwrap_or_default();
    let opcode = message
        .get(4..8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes);
    if matches!(opcode, INTERRUPT | NOTIFY_REPLY) {
        // Nothing here can be interrupted, nor has it asked anything. The crate would say nothing, and the guest wait for ever.
        return refuse(socket, &unique, libc::ENOSYS);
    }
    let handled = Reader::<()>::from_fuse_buffer(FuseBuf::new(message)).and_then(|reader| {
        let writer = FuseDevWriter::new(socket.as_raw_fd(), reply)?;
        Ok(server.handle_message(reader, Writer::FuseDev(writer), None, None))
    });
    let refused = !matches!(handled, Ok(Ok(_)));
    if refused && !is_forgetting(opcode) {
        // It may have been told already: who waits knows of each request one reply, and drops another.
        refuse(socket, &unique, libc::EINVAL);
    }
}

fn refuse(socket: BorrowedFd<'_>, unique: &[u8], number: i32) {
    let result = number.checked_neg().unwrap_or(number);
    let mut header = [16u32.to_le_bytes(), result.to_le_bytes()].concat();
    header.extend_from_slice(unique);
    let _ = rustix::net::send(socket, &header, rustix::net::SendFlags::NOSIGNAL);
}

/// Whether a request is one to which nobody expects a reply: FORGET and BATCH_FORGET.
fn is_forgetting(opcode: u32) -> bool {
    matches!(opcode, 2 | 42)
}

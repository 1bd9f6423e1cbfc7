//! Sockets.

use std::io;

use super::call::{address, call};
use super::prey;

fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<usize> {
    call(
        libc::SYS_socket,
        [family as usize, kind as usize, protocol as usize],
    )
}

pub fn raw_socket() -> io::Result<()> {
    socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP).map(drop)
}

pub fn packet_socket() -> io::Result<()> {
    socket(libc::AF_PACKET, libc::SOCK_RAW, 0).map(drop)
}

pub fn any_socket() -> io::Result<()> {
    socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).map(drop)
}

pub fn tcp() -> io::Result<()> {
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let port: u16 = prey::of(prey::PORT).parse().unwrap_or(0);
    let to = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
        },
        sin_zero: [0; 8],
    };
    call(libc::SYS_connect, [socket, address(&to), size_of_val(&to)]).map(drop)
}

pub fn unix_socket() -> io::Result<()> {
    connect(prey::of(prey::SOCKET).as_bytes())
}

pub fn abstract_socket() -> io::Result<()> {
    connect(&[b"\0", prey::of(prey::ABSTRACT_SOCKET).as_bytes()].concat())
}

fn connect(name: &[u8]) -> io::Result<()> {
    let socket = socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    let mut to = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    to.extend_from_slice(name);
    call(libc::SYS_connect, [socket, address(to.as_slice()), to.len()]).map(drop)
}

/// `struct ifreq`, as far as it is needed.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

pub fn interface() -> io::Result<()> {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let mut request = Request {
        name: [0; 16],
        flags: libc::IFF_UP as i16,
        rest: [0; 22],
    };
    request.name[..2].copy_from_slice(b"lo");
    call(
        libc::SYS_ioctl,
        [socket, libc::SIOCSIFFLAGS as usize, address(&request)],
    )
    .map(drop)
}

//! The file system device: between a driver and a share server, either of which may do as it likes.

use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::driver::{BUFFERS, Driver, Memory, line, set};
use crate::devices::virtio::fs::ShareBackend;
use crate::devices::virtio::slot::{Slot, SlotBackend, SlotState};

const REQUESTS: usize = 1;
const REPLY: u64 = BUFFERS + 0x1000;
const GETATTR: u32 = 3;
const FORGET: u32 = 2;

fn pair() -> (ShareBackend, OwnedFd) {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    (ShareBackend::new(ours).unwrap(), theirs)
}

fn slot(memory: &Memory, backend: ShareBackend) -> (Slot, Driver) {
    let slot = Slot::new(SlotBackend::Fs(backend), 2, memory.guest.clone(), line()).unwrap();
    let driver = Driver::new(&slot, 0, true, 2, 2);
    (slot, driver)
}

fn request(length: u32, opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = [length.to_le_bytes(), opcode.to_le_bytes()].concat();
    bytes.extend_from_slice(&unique.to_le_bytes());
    bytes.resize(40, 0);
    bytes.extend_from_slice(body);
    bytes
}

fn ask(driver: &mut Driver, memory: &Memory, slot: &Slot, queue: usize, bytes: &[u8], room: u32) -> u16 {
    memory.write(BUFFERS, bytes);
    let mut parts = vec![(BUFFERS, bytes.len() as u32, false)];
    if room > 0 {
        parts.push((REPLY, room, true));
    }
    let head = driver.add(memory, queue, &parts).unwrap();
    driver.notify(memory, slot, queue, 1);
    head
}

/// Length, error and number of the reply in memory.
fn reply(memory: &Memory) -> (u32, i32, u64) {
    let bytes = memory.read(REPLY, 16);
    let (length, rest) = bytes.split_first_chunk().unwrap();
    let (error, unique) = rest.split_first_chunk().unwrap();
    (
        u32::from_le_bytes(*length),
        i32::from_le_bytes(*error),
        u64::from_le_bytes(unique.try_into().unwrap()),
    )
}

fn received(server: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 200_000];
    let (length, _) = recv(server, bytes.as_mut_slice(), RecvFlags::empty()).ok()?;
    bytes.truncate(length);
    Some(bytes)
}

fn answer(server: &OwnedFd, request: &[u8], body: &[u8]) {
    let mut bytes = (16 + body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&0i32.to_le_bytes());
    bytes.extend_from_slice(&request[8..16]);
    bytes.extend_from_slice(body);
    send(server, &bytes, SendFlags::empty()).unwrap();
}

#[test]
fn without_a_server_every_request_is_answered_with_an_error() {
    let memory = Memory::new();
    let (slot, mut driver) = slot(&memory, ShareBackend::default());
    for queue in [0, REQUESTS] {
        let head = ask(
            &mut driver,
            &memory,
            &slot,
            queue,
            &request(40, GETATTR, 7, &[]),
            64,
        );
        assert_eq!(driver.used(&memory, queue), [(head, 16)]);
        assert_eq!(reply(&memory), (16, -libc::ENOTCONN, 7));
        let head = ask(
            &mut driver,
            &memory,
            &slot,
            queue,
            &request(48, FORGET, 8, &[0; 8]),
            0,
        );
        assert_eq!(driver.used(&memory, queue), [(head, 0)]);
    }
}

#[test]
fn a_request_reaches_the_server_and_its_reply_the_guest() {
    let memory = Memory::new();
    let (backend, server) = pair();
    let (slot, mut driver) = slot(&memory, backend);
    let head = ask(
        &mut driver,
        &memory,
        &slot,
        REQUESTS,
        &request(44, GETATTR, 99, b"body"),
        64,
    );
    assert!(driver.used(&memory, REQUESTS).is_empty());
    let asked = received(&server).unwrap();
    assert_eq!((asked.len(), &asked[40..]), (44, &b"body"[..]));
    answer(&server, &asked, b"answer");
    slot.process(0);
    assert_eq!(driver.used(&memory, REQUESTS), [(head, 22)]);
    assert_eq!(reply(&memory), (22, 0, 99));
    assert_eq!(memory.read(REPLY + 16, 6), b"answer");
    // Once, and no second time.
    answer(&server, &asked, b"answer");
    slot.process(0);
    assert!(driver.used(&memory, REQUESTS).is_empty());
}

#[test]
fn what_is_no_request_reaches_no_server() {
    let memory = Memory::new();
    let (backend, server) = pair();
    let (slot, mut driver) = slot(&memory, backend);
    for (bytes, room, written) in [
        (request(41, GETATTR, 1, &[]), 64, 16),
        (request(u32::MAX, GETATTR, 1, &[]), 64, 16),
        (request(40, GETATTR, 1, &[]), 15, 0),
        (request(40, GETATTR, 1, &[])[..39].to_vec(), 64, 0),
    ] {
        let head = ask(&mut driver, &memory, &slot, REQUESTS, &bytes, room);
        assert_eq!(driver.used(&memory, REQUESTS), [(head, written)]);
    }
    assert!(received(&server).is_none());
}

#[test]
fn a_server_that_answers_nonsense_harms_nobody() {
    let memory = Memory::new();
    let (backend, server) = pair();
    let (slot, mut driver) = slot(&memory, backend);
    for nonsense in [&b"x"[..], &[0; 16], &[0xff; 70_000]] {
        send(&server, nonsense, SendFlags::empty()).unwrap();
        slot.process(0);
    }
    // A reply that the guest has no room for, and one that lies about its length.
    for (body, length) in [(vec![1; 65], None), (vec![1; 4], Some(19u32))] {
        let head = ask(
            &mut driver,
            &memory,
            &slot,
            REQUESTS,
            &request(40, GETATTR, 5, &[]),
            64,
        );
        let asked = received(&server).unwrap();
        let mut bytes = length.unwrap_or(16 + body.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(&0i32.to_le_bytes());
        bytes.extend_from_slice(&asked[8..16]);
        bytes.extend_from_slice(&body);
        send(&server, &bytes, SendFlags::empty()).unwrap();
        slot.process(0);
        assert_eq!(driver.used(&memory, REQUESTS), [(head, 16)]);
        assert_eq!(reply(&memory), (16, -libc::EIO, 5));
    }
    assert!(memory.is_intact());
}

#[test]
fn who_waits_is_told_when_the_server_ends() {
    let memory = Memory::new();
    let (backend, server) = pair();
    let (slot, mut driver) = slot(&memory, backend);
    let head = ask(
        &mut driver,
        &memory,
        &slot,
        REQUESTS,
        &request(40, GETATTR, 3, &[]),
        64,
    );
    drop(server);
    slot.process(0);
    assert_eq!(driver.used(&memory, REQUESTS), [(head, 16)]);
    assert_eq!(reply(&memory), (16, -libc::ENOTCONN, 3));
    assert!(slot.descriptor().is_none());
}

#[test]
fn a_clone_is_told_that_what_was_asked_before_is_lost() {
    let memory = Memory::new();
    let (backend, _server) = pair();
    let (slot, mut driver) = slot(&memory, backend);
    let head = ask(
        &mut driver,
        &memory,
        &slot,
        REQUESTS,
        &request(40, GETATTR, 3, &[]),
        64,
    );
    slot.pause();
    let state = slot.state();
    assert!(matches!(&state, SlotState::Fs { device, .. } if device.unanswered.len() == 1));
    let (other, _other_server) = pair();
    let slot = Slot::from_state(SlotBackend::Fs(other), 2, memory.guest.clone(), line(), &state).unwrap();
    assert_eq!(slot.state(), state);
    let _ = slot.resume();
    assert_eq!(driver.used(&memory, REQUESTS), [(head, 16)]);
    assert_eq!(reply(&memory), (16, -libc::ENOTCONN, 3));
}

#[test]
fn what_the_server_does_not_take_waits_and_goes_on() {
    let memory = Memory::new();
    let (backend, server) = pair();
    let (slot, mut driver) = slot(&memory, backend);
    // FORGETs: nothing but the socket's room ends their flow.
    let mut sent = 0;
    while !slot.output_waits() {
        let body = vec![0; 20_000];
        ask(
            &mut driver,
            &memory,
            &slot,
            REQUESTS,
            &request(20_040, FORGET, 1, &body),
            0,
        );
        sent += driver.used(&memory, REQUESTS).len();
        assert!(sent < 1000, "it never fills");
    }
    while received(&server).is_some() {}
    slot.process(1);
    assert!(!slot.output_waits());
    assert_eq!(driver.used(&memory, REQUESTS).len(), 1);
    assert_eq!(received(&server).unwrap().len(), 20_040);
    set(&slot, 0x070, 0);
}

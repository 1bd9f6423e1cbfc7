//! Requests to the share server that no kernel would make. Wherever the answer matters, a wrong one ends the machine with a panic.

use std::time::{Duration, Instant};

use crate::After;
use crate::driver::{BUFFERS, Device, NEXT, SHARE, VERSION_1, WRITE};
use crate::kernel;
use crate::machine::{Machine, PAGE};
use crate::random::Random;

/// The queue of requests.
const QUEUE: u64 = 1;
const HEADER: usize = 40;
const ROOT: u64 = 1;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const RENAME: u32 = 12;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE_FILE: u32 = 16;
const SETXATTR: u32 = 21;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

/// Files that are opened and not closed.
const OPENED: usize = 1000;

struct Fuse {
    device: Device,
    sent: u16,
}

/// Numbers one after the other, as requests have them.
fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn header(length: usize, opcode: u32, node: u64) -> Vec<u8> {
    let mut bytes = (length as u32).to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(words(&[77, node, 0, 0]));
    bytes
}

fn must(holds: bool, what: &str) {
    if !holds {
        eprintln!("picovm-hostile-init: the share server: {what}");
        kernel::panic();
    }
}

impl Fuse {
    /// Offers the chain that begins with descriptor 0, and waits until it is used.
    fn offer(&mut self) {
        self.device.available(QUEUE, self.sent % self.device.largest(), 0);
        self.sent = self.sent.wrapping_add(1);
        self.device.offer(QUEUE, self.sent);
        self.device.notify(QUEUE);
        let begun = Instant::now();
        while self.device.used(QUEUE) != self.sent {
            must(begun.elapsed() < Duration::from_secs(10), "no answer");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Sends these bytes: the error number, and what else the answer has.
    fn send(&mut self, bytes: &[u8]) -> (i32, Vec<u8>) {
        let machine = self.device.machine.clone();
        machine.put(BUFFERS, 0, bytes);
        machine.put(BUFFERS + 1, 0, &[0; 256]);
        let [from, to] = [0, 1].map(|page| machine.address(BUFFERS + page));
        self.device
            .descriptor(QUEUE, 0, from, bytes.len() as u32, NEXT, 1);
        self.device.descriptor(QUEUE, 1, to, PAGE as u32, WRITE, 0);
        self.offer();
        let answer = machine.get(BUFFERS + 1, 0, 256);
        let error = i32::from_le_bytes([answer[4], answer[5], answer[6], answer[7]]);
        (-error, answer[16..].to_vec())
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let mut bytes = header(HEADER + body.len(), opcode, node);
        bytes.extend(body);
        self.send(&bytes)
    }

    fn refused(&mut self, opcode: u32, node: u64, body: &[u8]) {
        let (error, _) = self.call(opcode, node, body);
        must(error > 0, &format!("it did as operation {opcode} said on {node}"));
    }

    /// The first number of an answer that has to be a good one: that of a file, or of an open one.
    fn number(&mut self, opcode: u32, node: u64, body: &[u8]) -> u64 {
        let (error, answer) = self.call(opcode, node, body);
        must(
            error == 0,
            &format!("error {error} of operation {opcode} on {node}"),
        );
        answer.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn begin(&mut self) {
        let (error, _) = self.call(INIT, 0, &words(&[7 | 31 << 32, 1 << 20, 0, 0, 0, 0, 0, 0]));
        must(error == 0, "it does not begin");
    }
}

/// Says what no kernel says, of a container that has one shared directory.
pub fn nonsense(machine: &Machine, random: &mut Random) -> After {
    let device = Device::new(machine, SHARE);
    device.bring_up(VERSION_1);
    let mut fuse = Fuse { device, sent: 0 };
    fuse.refused(LOOKUP, ROOT, b"0\0");
    fuse.refused(INIT, 0, &words(&[6]));
    fuse.begin();
    fuse.begin();
    let directory = fuse.number(LOOKUP, ROOT, b"0\0");
    ways_out(&mut fuse, directory);
    lies(&mut fuse, directory);
    for _ in 0..OPENED {
        fuse.number(OPENDIR, directory, &[0; 8]);
    }
    for _ in 0..400 {
        let mut body = vec![0; random.below(120) as usize];
        random.fill(&mut body);
        if random.below(2) == 0 {
            // Numbers that may be those of something.
            for byte in &mut body {
                *byte &= random.one_of(&[0, 0, 1, 3]);
            }
        }
        let opcode = match random.below(8) {
            0 => random.next() as u32,
            _ => random.below(60) as u32,
        };
        let node = random.one_of(&[0, ROOT, directory, directory, directory + 1, u64::MAX]);
        if ![FORGET, BATCH_FORGET, DESTROY].contains(&opcode) {
            fuse.call(opcode, node, &body);
        }
    }
    overlapping(&mut fuse);
    fuse.call(DESTROY, 0, &[]);
    fuse.begin();
    let directory = fuse.number(LOOKUP, ROOT, b"0\0");
    fuse.number(OPENDIR, directory, &[0; 8]);
    After::Devices
}

/// Names that lead elsewhere, links that do, files that were never found, and devices.
fn ways_out(fuse: &mut Fuse, directory: u64) {
    let long = [b"x".repeat(3000), b"\0".to_vec()].concat();
    for name in [
        b"..\0".as_slice(),
        b".\0",
        b"\0",
        b"",
        b"/\0",
        b"/etc/passwd\0",
        b"../secret\0",
        b"0/..\0",
        b"..\0\0\0",
        &long,
    ] {
        for node in [ROOT, directory] {
            fuse.refused(LOOKUP, node, name);
            fuse.refused(CREATE, node, &[&words(&[0o102, 0o644]), name].concat());
            fuse.refused(RENAME, node, &[&words(&[directory]), name, b"mine\0"].concat());
        }
    }
    // A name ends where it ends.
    for name in [b"a\0../b\0".as_slice(), b"unended"] {
        fuse.call(CREATE, directory, &[&words(&[0o102, 0o644]), name].concat());
    }
    for node in [0, directory + 77, u64::MAX] {
        fuse.refused(GETATTR, node, &[0; 16]);
        fuse.refused(OPENDIR, node, &[0; 8]);
        fuse.refused(READ, node, &words(&[1, 0, 64, 0, 0]));
    }
    fuse.number(SYMLINK, directory, b"link\0../../secret\0");
    let link = fuse.number(LOOKUP, directory, b"link\0");
    fuse.refused(OPEN, link, &words(&[2]));
    fuse.refused(OPENDIR, link, &[0; 8]);
    fuse.refused(LOOKUP, link, b"secret\0");
    let disk = u64::from(0o060_644u32) | 254 << 40;
    fuse.refused(
        MKNOD,
        directory,
        &[&words(&[disk, 0]), b"disk\0".as_slice()].concat(),
    );
}

/// Lengths that are not, and counts that are too large.
fn lies(fuse: &mut Fuse, directory: u64) {
    for length in [0, 1, HEADER - 1, HEADER + 1, 4096, u32::MAX as usize] {
        let mut bytes = header(length, GETATTR, ROOT);
        bytes.extend([0; 16]);
        let (error, _) = fuse.send(&bytes);
        must(error > 0, "it took a request of another length than it says");
    }
    for length in [1, 8, HEADER - 1] {
        fuse.send(&header(length, LOOKUP, ROOT)[..length]);
    }
    let (error, answer) = fuse.call(
        CREATE,
        directory,
        &[&words(&[0o102 | 0o644 << 32, 0]), b"file\0".as_slice()].concat(),
    );
    must(error == 0, "a file cannot be made");
    let [file, handle] = [0, 128].map(|at| {
        let bytes = answer[at..at + 8].first_chunk().copied();
        bytes.map_or(0, u64::from_le_bytes)
    });
    for size in [u64::from(u32::MAX), 1 << 31, 1 << 20] {
        for offset in [0, 1 << 40, u64::MAX] {
            fuse.call(READ, file, &words(&[handle, offset, size, 0, 0]));
            fuse.call(WRITE_FILE, file, &words(&[handle, offset, size, 0, 0, 1]));
        }
    }
    fuse.refused(READ, directory, &words(&[handle, 0, 64, 0, 0]));
    fuse.refused(
        SETXATTR,
        file,
        &[&words(&[1 << 20]), b"user.x\0x".as_slice()].concat(),
    );
    let listed = fuse.number(OPENDIR, directory, &[0; 8]);
    for offset in [0, u64::MAX, 1 << 62] {
        let size = u64::from(u32::MAX);
        fuse.call(READDIR, directory, &words(&[listed, offset, size, 0, 0]));
    }
    // Nobody answers these.
    fuse.call(BATCH_FORGET, 0, &words(&[u64::from(u32::MAX), file, 1]));
    fuse.call(FORGET, file, &words(&[u64::MAX]));
    fuse.call(FORGET, file, &words(&[u64::MAX]));
    fuse.call(FORGET, ROOT, &words(&[u64::MAX]));
    fuse.number(LOOKUP, directory, b"file\0");
}

/// An answer over its own question, and chains with hardly any room for one.
fn overlapping(fuse: &mut Fuse) {
    let machine = fuse.device.machine.clone();
    let page = machine.address(BUFFERS);
    for room in [0, 1, 15, 16, 17, 4096] {
        machine.put(BUFFERS, 0, &header(HEADER + 2, LOOKUP, ROOT));
        machine.put(BUFFERS, HEADER, b"0\0");
        fuse.device
            .descriptor(QUEUE, 0, page, (HEADER + 2) as u32, NEXT, 1);
        fuse.device.descriptor(QUEUE, 1, page, room, WRITE, 0);
        fuse.offer();
    }
}

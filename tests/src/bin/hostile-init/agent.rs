//! The agent's side of the control connection, in the wrong hands.

use std::fs;
use std::io::{Error, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use picovm_guest_protocol::frame::{DATA_MAX, INITIAL_CREDIT, MAIN};
use picovm_guest_protocol::{
    CONTROL_PORT_NAME, ContainerExit, ContainerSpec, Frame, FrameDecoder, StartFailure, Stream,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};

use crate::After;
use crate::driver::{BUFFERS, CONSOLE, Device, TRANSMIT, VERSION_1};
use crate::machine::{Machine, PAGE};
use crate::random::Random;

/// How long the flood lasts.
const FLOOD: Duration = Duration::from_secs(4);

pub struct Agent {
    port: OwnedFd,
}

impl Agent {
    /// Opens the control port, as a good init does.
    pub fn open() -> Result<Self> {
        let give_up = Instant::now() + Duration::from_secs(5);
        while Instant::now() < give_up {
            for port in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
                let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
                let device = std::path::Path::new("/dev").join(port.file_name());
                if name.trim_end() == CONTROL_PORT_NAME && device.exists() {
                    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
                    let port = rustix::fs::open(&device, flags, Mode::empty())?;
                    return Ok(Self { port });
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(Error::other("there is no control port"))
    }

    fn wait(&self, flags: PollFlags) {
        let _ = poll(&mut [PollFd::new(&self.port.as_fd(), flags)], None);
    }

    /// Sends all bytes, however long it takes.
    pub fn send_bytes(&self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            match rustix::io::write(&self.port, &rest[..rest.len().min(32 << 10)]) {
                Ok(count) => rest = &rest[count..],
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::OUT),
                Err(_) => return,
            }
        }
    }

    pub fn send(&self, frame: &Frame) {
        let mut bytes = Vec::new();
        let _ = frame.encode(MAIN, &mut bytes);
        self.send_bytes(&bytes);
    }

    /// Waits for bytes.
    fn receive(&self) -> Vec<u8> {
        let mut bytes = vec![0; 64 << 10];
        loop {
            match rustix::io::read(&self.port, &mut bytes) {
                Ok(count) => {
                    bytes.truncate(count);
                    return bytes;
                }
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::IN),
                Err(_) => return Vec::new(),
            }
        }
    }

    /// Not an attacker, but one who shares a template with them: holds 4 MiB, and tells for each line of input whether
    /// they are what they were.
    pub fn be_a_neighbour(&self) -> After {
        let mut random = Random::new(4711);
        let mut mine = vec![0; 4 << 20];
        random.fill(&mut mine);
        let mut decoder = FrameDecoder::default();
        loop {
            decoder.push(&self.receive());
            while let Ok(Some((_, frame))) = decoder.next_frame() {
                match frame {
                    Frame::Data(Stream::Stdin, line) => {
                        self.send(&Frame::Credit(Stream::Stdin, line.len() as u32));
                        let mut random = Random::new(4711);
                        let mut expected = vec![0; mine.len()];
                        random.fill(&mut expected);
                        let answer = if expected == mine { "whole\n" } else { "damaged\n" };
                        self.send(&Frame::Data(Stream::Stdout, answer.into()));
                    }
                    Frame::Close(Stream::Stdin) => return After::Whole,
                    _ => {}
                }
            }
        }
    }

    pub fn garbage(&self, random: &mut Random) -> After {
        let mut bytes = vec![0; 64 << 10];
        random.fill(&mut bytes);
        self.send_bytes(&bytes);
        After::Nothing
    }

    /// The connection ends within a frame.
    pub fn cut_off(&self) -> After {
        self.send_bytes(&[2, 0, 0, 0, 0xff, 0xff, 0, 0, 1, 2, 3]);
        After::Nothing
    }

    /// What only the host may say.
    pub fn frames_of_the_host(&self, which: u64) -> After {
        self.send(&match which {
            1 => Frame::Spec(ContainerSpec::default()),
            2 => Frame::Signal(9),
            3 => Frame::Close(Stream::Stdin),
            4 => Frame::Data(Stream::Stdin, b"input".to_vec()),
            5 => Frame::Credit(Stream::Stdout, 1),
            _ => Frame::Credit(Stream::Stdin, u32::MAX),
        });
        After::Whole
    }

    /// A frame of 4 GiB.
    pub fn too_long(&self) -> After {
        self.send_bytes(&[3, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        After::Whole
    }

    /// More output than there is credit for.
    pub fn overdraw(&self) -> After {
        for _ in 0..=INITIAL_CREDIT as usize / DATA_MAX * 2 {
            self.send(&Frame::Data(Stream::Stdout, vec![b'x'; DATA_MAX]));
        }
        After::Whole
    }

    /// Gives credit for input that it never takes: the host is to hold it all.
    pub fn hoard_input(&self) -> After {
        let end = Instant::now() + FLOOD;
        while Instant::now() < end {
            // More than was spent is refused, so it comes in small portions, when the host has had time to spend it.
            self.send(&Frame::Credit(Stream::Stdin, 32 << 10));
            std::thread::sleep(Duration::from_millis(4));
        }
        After::Whole
    }

    /// Frames that say nothing, as fast as can be.
    pub fn flood(&self) -> After {
        let mut bytes = Vec::new();
        while bytes.len() < 256 << 10 {
            let _ = Frame::Close(Stream::Stdout).encode(MAIN, &mut bytes);
            let _ = Frame::Data(Stream::Stderr, Vec::new()).encode(MAIN, &mut bytes);
            let _ = Frame::Credit(Stream::Stdin, 0).encode(MAIN, &mut bytes);
        }
        let end = Instant::now() + FLOOD;
        while Instant::now() < end {
            self.send_bytes(&bytes);
        }
        After::Whole
    }

    /// Output of no bytes and then of one, each of which the host would answer, while nothing of the answers is read.
    pub fn flood_unread(&self) -> After {
        for length in [0, 1] {
            let mut bytes = Vec::new();
            while bytes.len() < 128 << 10 {
                let _ = Frame::Data(Stream::Stdout, vec![b'x'; length]).encode(MAIN, &mut bytes);
            }
            let end = Instant::now() + FLOOD / 2;
            while Instant::now() < end {
                self.send_bytes(&bytes);
            }
        }
        After::Whole
    }

    /// Good frames, one byte at a time.
    pub fn drip(&self, random: &mut Random) -> After {
        let mut bytes = Vec::new();
        for _ in 0..20 {
            let text = vec![b'a' + random.below(26) as u8; random.below(40) as usize];
            let _ = Frame::Data(Stream::Stdout, text).encode(MAIN, &mut bytes);
        }
        for byte in bytes {
            self.send_bytes(&[byte]);
        }
        After::Whole
    }

    /// A reason for people that would be commands to a terminal.
    pub fn escape(&self) -> After {
        self.send(&Frame::Exit(ContainerExit::NotStarted(StartFailure {
            attempted: "exec \x1b]0;owned\x07\x1b[2J".into(),
            errno: 2,
            message: "\r\x1b[31mred\u{9b}1m\nan invented line\u{202e}".into(),
        })));
        After::Whole
    }
}

/// Says how the container ended through a console that no driver of the kernel holds any more.
pub fn say_last(machine: &Machine, frame: &Frame) -> Result<()> {
    let mut bytes = Vec::new();
    frame.encode(MAIN, &mut bytes).map_err(Error::other)?;
    let console = Device::new(machine, CONSOLE);
    console.bring_up(VERSION_1);
    machine.put(BUFFERS, 0, &bytes);
    assert!(bytes.len() < PAGE as usize);
    console.descriptor(TRANSMIT, 0, machine.address(BUFFERS), bytes.len() as u32, 0, 0);
    console.available(TRANSMIT, 0, 0);
    console.offer(TRANSMIT, 1);
    console.notify(TRANSMIT);
    let give_up = Instant::now() + Duration::from_secs(5);
    while console.used(TRANSMIT) != 1 {
        if Instant::now() > give_up {
            return Err(Error::other("the console does not work after a reset"));
        }
        std::thread::yield_now();
    }
    Ok(())
}

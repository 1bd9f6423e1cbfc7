//! Writes the seeds of the corpora: one well-formed input of each kind that has a format of its own. What drives devices
//! is found by fuzzing alone, and kept.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use picovm_engine::messages::{self, FromVmm, Parking, ToServer, ToVmm};
use picovm_fuzz::TEMPLATE_FILES;
use picovm_guest_protocol::frame::MAIN;
use picovm_guest_protocol::{
    ContainerExit, ContainerSpec, Frame, Helper, Identity, ProcessSpec, StartFailure, Stream, TerminalSize,
};
use picovm_vmm::WorkingSet;
use picovm_vmm::arch::cpuid::Processor;
use picovm_vmm::devices::interrupt::InterruptLine;
use picovm_vmm::devices::legacy::{ConsoleLog, Ports};
use picovm_vmm::devices::trap::TrapState;
use picovm_vmm::devices::virtio::block::FileBackend;
use picovm_vmm::devices::virtio::console;
use picovm_vmm::devices::virtio::fs::ShareBackend;
use picovm_vmm::devices::virtio::slot::{Slot, SlotBackend, SlotState};
use picovm_vmm::machine::MachineState;
use picovm_vmm::template::{FORMAT_VERSION, FileRecord, Metadata, encode_metadata};
use picovm_vmm::vcpu::{Msr, VcpuState};
use picovm_vmm::vm::VmState;
use picovm_vmm::working_set::Pages;
use vm_memory::{GuestAddress, GuestMemoryMmap};

struct NoLine;

impl InterruptLine for NoLine {
    fn pulse(&self) {}
}

type Anything = Box<dyn std::error::Error>;

fn main() -> Result<(), Anything> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let seed = |target: &str, name: &str, bytes: &[u8]| -> io::Result<()> {
        let directory = corpus.join(target);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(format!("seed-{name}")), bytes)
    };

    let [metadata, working_set, state] = TEMPLATE_FILES;
    let prefixed = |kind: u8, bytes: &[u8]| [&[kind], bytes].concat();
    let pages = |first, count| vec![Pages { first, count }];
    let set = WorkingSet {
        written: pages(3, 2),
        read: pages(8, 8),
    };
    seed(
        "template_state",
        "metadata",
        &prefixed(metadata, &encode_metadata(&sample_metadata())?),
    )?;
    seed(
        "template_state",
        "working-set",
        &prefixed(working_set, &postcard::to_stdvec(&set)?),
    )?;
    seed(
        "template_state",
        "state",
        &prefixed(state, &postcard::to_stdvec(&machine()?)?),
    )?;

    let spec = ContainerSpec::of(ProcessSpec {
        args: vec![b"sh".to_vec(), b"-c".to_vec(), b"exit 7".to_vec()],
        env: vec![b"LANG=C".to_vec()],
        cwd: b"/srv".to_vec(),
        user: b"nobody:users".to_vec(),
        stdin: true,
        ..ProcessSpec::default()
    });
    // A first byte of zero: all at once; see `pieces`.
    let frames = |list: &[Frame]| -> Result<Vec<u8>, Anything> {
        let mut bytes = vec![0];
        for frame in list {
            frame.encode(MAIN, &mut bytes)?;
        }
        Ok(bytes)
    };
    let failure = StartFailure {
        attempted: "exec nothing".into(),
        errno: 2,
        message: "no such file".into(),
    };
    seed(
        "session",
        "output",
        &frames(&[
            Frame::Data(Stream::Stdout, b"hello".to_vec()),
            Frame::Data(Stream::Stderr, b"oh".to_vec()),
            Frame::Credit(Stream::Stdin, 1),
            Frame::Close(Stream::Stdout),
            Frame::Exit(ContainerExit::Code(3)),
        ])?,
    )?;
    let not_started = Frame::Exit(ContainerExit::NotStarted(failure));
    seed("session", "not-started", &frames(&[not_started])?)?;
    seed(
        "agent",
        "frames",
        &frames(&[
            Frame::Spec(spec.clone()),
            Frame::Data(Stream::Stdin, b"hello".to_vec()),
            Frame::Signal(15),
            Frame::Exec(spec.process.clone()),
            Frame::Help(Helper::Stat {
                path: b"/etc".to_vec(),
            }),
            Frame::Resize(TerminalSize {
                rows: 25,
                columns: 80,
            }),
            Frame::Credit(Stream::Stdout, 100),
            Frame::Close(Stream::Stdin),
            Frame::Close(Stream::Stdout),
        ])?,
    )?;
    seed(
        "agent",
        "accounts",
        b"anobody:users\0root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n\0root:x:0:\nusers:x:100:nobody\n",
    )?;
    let identity = Identity {
        id: "0123456789abcdef".into(),
        hostname: "box".into(),
        entropy: [7; 32],
        realtime_ns: 1_790_000_000_000_000_000,
        container: Some(spec.clone()),
    };
    seed("identity", "container", &identity.encode(1 << 16)?)?;

    for (kind, name, bytes) in [
        (0, "fork", sent(&ToServer::Fork(Parking::Prefaulted))?),
        (0, "fork-bare", sent(&ToServer::Fork(Parking::Bare))?),
        (
            1,
            "start",
            sent(&ToVmm::Start {
                id: None,
                spec,
                hostname: Some("box".into()),
            })?,
        ),
        (1, "signal", sent(&ToVmm::Signal(15))?),
        (2, "parked", sent(&FromVmm::Parked)?),
        (2, "exit", sent(&FromVmm::Exit(ContainerExit::Signal(9)))?),
        (2, "failed", sent(&FromVmm::Failed("no memory".into()))?),
    ] {
        seed("messages", name, &prefixed(kind, &bytes))?;
    }
    Ok(())
}

/// A message as it is on the socket.
fn sent(message: &impl serde::Serialize) -> Result<Vec<u8>, Anything> {
    let (here, mut there) = std::os::unix::net::UnixStream::pair()?;
    messages::send(&here, message, &[])?;
    drop(here);
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut there, &mut bytes)?;
    Ok(bytes)
}

fn sample_metadata() -> Metadata {
    let record = |bytes| FileRecord {
        bytes,
        checksum: "00".repeat(32),
    };
    Metadata {
        format: FORMAT_VERSION,
        protocol: picovm_guest_protocol::PROTOCOL_VERSION,
        created: 1_790_000_000,
        memory_mib: 128,
        vcpus: 1,
        processor: Processor {
            vendor: "AuthenticAMD".into(),
            signature: 1,
            features: [0; 8],
        },
        memory: record(128 << 20),
        memory_data_bytes: 1 << 20,
        state: record(10_000),
        notes: BTreeMap::from([("image".into(), "debian".into())]),
    }
}

/// A machine that never was, with a device of each kind in the middle of its life.
fn machine() -> Result<MachineState, Anything> {
    let msr = |index, value| Msr { index, value };
    Ok(MachineState {
        memory_mib: 32,
        vm: VmState {
            irqchips: vec![Default::default(); 3],
            clock: Default::default(),
        },
        vcpus: vec![VcpuState {
            tsc_khz: 2_000_000,
            cpuid: vec![Default::default(); 2],
            msrs: vec![msr(0x10, 1 << 40), msr(0x6e0, 0)],
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Default::default(),
            xcrs: Default::default(),
            debug: Default::default(),
            lapic: Default::default(),
            events: Default::default(),
            mp_state: Default::default(),
        }],
        slots: slots()?,
        trap: TrapState {
            identity_pages: vec![0x1000, 0x2000],
        },
        ports: Ports::new(std::sync::Arc::new(NoLine), ConsoleLog::default()).state(),
    })
}

fn slots() -> Result<Vec<SlotState>, Anything> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 128 << 10)])?;
    let disk = tempfile::NamedTempFile::new()?;
    disk.as_file().set_len(4096)?;
    let (backend, _host) = console::connection()?;
    let backends = [
        SlotBackend::Console(backend),
        SlotBackend::Entropy,
        SlotBackend::Fs(ShareBackend::default()),
        SlotBackend::Block(FileBackend::open(disk.path(), true)?, Some("disk".into())),
        SlotBackend::Block(FileBackend::storage(None, 16)?, None),
    ];
    let mut states = Vec::new();
    for (index, backend) in backends.into_iter().enumerate() {
        let slot = Slot::new(backend, index, memory.clone(), std::sync::Arc::new(NoLine))?;
        let set = |register: u64, value: u32| slot.write(register, &value.to_le_bytes());
        set(0x070, 3);
        set(0x024, 1);
        set(0x020, 1);
        set(0x070, 11);
        for queue in 0..4u32 {
            set(0x030, queue);
            set(0x038, 16);
            set(0x080, queue * 0x3000);
            set(0x090, queue * 0x3000 + 0x1000);
            set(0x0a0, queue * 0x3000 + 0x2000);
            set(0x044, 1);
        }
        set(0x070, 15);
        states.push(slot.state());
    }
    Ok(states)
}

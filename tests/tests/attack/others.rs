//! Attacks that no container can make: garbage from the host to a good agent, and a guest that is hostile before its template
//! is frozen.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use picovm_engine::TemplateSpec;
use picovm_guest_protocol::frame::MAIN;
use picovm_guest_protocol::{ContainerSpec, Frame, FrameDecoder, Helper, Identity, ProcessSpec};
use picovm_vmm::{ForkOptions, FreezeOptions, Machine, MachineConfig, Outcome, Template};
use rustix::process::Pid;

use crate::harness::{Guest, MEMORY_MIB, has_guest, hostile_files, run, store, the_neighbour_is_whole};

const PATIENCE: Duration = Duration::from_secs(20);

/// A good template, opened in this process.
fn good_template() -> Template {
    the_neighbour_is_whole(Guest::Container);
    let spec = TemplateSpec {
        memory_mib: MEMORY_MIB,
        vcpus: 2,
        ..TemplateSpec::new(store().image().unwrap())
    };
    store().store.template(&spec, &mut |_| {}).unwrap()
}

fn identity(script: &str) -> Vec<u8> {
    let identity = Identity {
        id: "attack".into(),
        hostname: "attack".into(),
        entropy: [1; 32],
        realtime_ns: 1_800_000_000_000_000_000,
        container: Some(ContainerSpec::of(ProcessSpec {
            args: vec![b"sh".to_vec(), b"-c".to_vec(), script.into()],
            stdin: true,
            ..ProcessSpec::default()
        })),
    };
    identity.encode(1 << 16).unwrap()
}

/// xorshift64* (Vigna, 2016).
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A clone whose host sends these bytes and then only listens: how it came to its end, and what it sent.
fn told(template: &Template, bytes: &[u8]) -> (Option<Outcome>, Vec<Frame>) {
    let mut clone = template
        .fork(ForkOptions {
            identity: identity("sleep 2; exit 3"),
            ..Default::default()
        })
        .unwrap();
    let mut connection = clone.take_connection().unwrap();
    connection
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    connection.set_write_timeout(Some(PATIENCE)).unwrap();
    clone.start().unwrap();
    connection.write_all(bytes).unwrap();
    let begun = Instant::now();
    let (mut decoder, mut part) = (FrameDecoder::default(), [0; 4096]);
    let mut frames = Vec::new();
    let outcome = loop {
        if let Ok(count) = connection.read(&mut part) {
            decoder.push(&part[..count]);
        }
        while let Some((_, frame)) = decoder
            .next_frame()
            .expect("the agent itself keeps to the protocol")
        {
            frames.push(frame);
        }
        match clone.wait(Some(Duration::ZERO)).unwrap() {
            Some(outcome) => break Some(outcome),
            None if begun.elapsed() > PATIENCE => break None,
            None => {}
        }
    };
    println!(
        "{outcome:?} after {} ms; {}",
        begun.elapsed().as_millis(),
        clone.console_tail()
    );
    (outcome, frames)
}

#[test]
fn garbage_to_the_agent() {
    let template = good_template();
    for seed in 1..=3 {
        println!("seed {seed}");
        let (outcome, _) = told(&template, &noise(seed, 8192));
        assert_eq!(outcome, Some(Outcome::PowerOff));
    }
    // Frames that only an agent may send, one that is longer than any, one that is cut off, and input beyond its credit.
    let encode = |process: u16, frame: Frame| {
        let mut bytes = Vec::new();
        frame.encode(process, &mut bytes).unwrap();
        bytes
    };
    let exit = encode(MAIN, Frame::Exit(picovm_guest_protocol::ContainerExit::Code(0)));
    let stdin = |process| {
        let bytes = vec![0; 32 << 10];
        encode(process, Frame::Data(picovm_guest_protocol::Stream::Stdin, bytes))
    };
    let input = stdin(MAIN);
    for bytes in [
        exit,
        // About a process that is not there, and one more with the number of the main one.
        stdin(77),
        encode(MAIN, Frame::Help(Helper::Tasks)),
        // More input than credit for a process that is executed.
        [
            encode(5, Frame::Exec(ProcessSpec::default())),
            stdin(5).repeat(12),
        ]
        .concat(),
        vec![4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        vec![11, 0, 0, 0, 1, 0, 0],
        input.repeat(12),
    ] {
        let (outcome, _) = told(&template, &bytes);
        assert_eq!(outcome, Some(Outcome::PowerOff));
    }
    the_neighbour_is_whole(Guest::Container);
    template.verify_memory().unwrap();
}

/// Boots the hostile `init` to the freeze point, where it does as the command line says.
fn frozen(how: &str, disk: &std::path::Path, directory: &std::path::Path) -> Template {
    let (kernel, initramfs) = hostile_files();
    let mut config = MachineConfig::new(kernel);
    config.initramfs = Some(initramfs);
    config.memory_mib = MEMORY_MIB;
    config.disks = vec![picovm_vmm::Disk::read_only(disk)];
    config.extra_cmdline = format!("hostile={how}");
    let mut machine = Machine::boot(&config).unwrap();
    assert_eq!(
        machine.run(Some(Duration::from_secs(60))).unwrap(),
        Some(Outcome::FreezePoint),
        "{}",
        machine.console_tail()
    );
    machine
        .freeze(&directory.join(how), &FreezeOptions::default())
        .unwrap()
}

#[test]
fn an_identity_area_where_no_memory_is() {
    let directory = tempfile::tempdir().unwrap();
    let template = frozen("no-memory", &store().image().unwrap().file, directory.path());
    let error = template
        .fork(ForkOptions {
            identity: identity("true"),
            ..Default::default()
        })
        .err()
        .expect("there is nowhere to write it");
    println!("{error}");
    assert!(error.to_string().contains("identity"), "{error}");
}

/// The disk's queue, at the moment of the freeze, has work without end: its requests write the next ones. A clone starts all
/// the same, and can be paused and ended.
#[test]
fn a_template_with_work_without_end() {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    let mut sectors = Vec::new();
    for request in 0..=u16::MAX {
        let mut sector = vec![0; 512];
        // An available ring of entries that are all 0, which promises one more, and the header of the next request.
        sector[2..4].copy_from_slice(&request.wrapping_add(2).to_le_bytes());
        sector[504..506].copy_from_slice(&request.wrapping_add(1).to_le_bytes());
        sectors.extend(sector);
    }
    std::fs::write(&disk, sectors).unwrap();
    let template = frozen("endless-work", &disk, directory.path());
    for _ in 0..3 {
        let mut clone = template.fork(ForkOptions::default()).unwrap();
        let begun = Instant::now();
        clone.start().unwrap();
        std::thread::sleep(Duration::from_millis(200));
        clone.pause().unwrap();
        // More than a device does at once, and it would have gone on.
        let saved = clone.save().unwrap();
        let slots: Vec<_> = saved
            .slots
            .iter()
            .map(|slot| serde_json::to_value(slot).unwrap())
            .collect();
        let disk = slots.iter().find(|slot| slot.get("Block").is_some()).unwrap();
        let requests = disk["Block"]["transport"]["queues"][0]["next_used"].as_u64();
        println!("{requests:?} requests");
        assert!(requests.unwrap() > 256, "{requests:?}");
        drop(clone);
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    }
}

/// A VMM process that its guest has taken over may not end when it is told to. Here it stands still.
#[test]
fn a_vmm_process_that_does_not_end() {
    the_neighbour_is_whole(Guest::Container);
    let begun = Instant::now();
    let mut picovm = run(Guest::Container, &["--timeout", "2s"], &["sleep", "60"])
        .stdin(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let vmm = loop {
        // Its guest runs, so that it is ready to be told.
        if let Ok((_, vmm)) = picovm_tests::monitor_and_vmm(picovm.id())
            && let Some(vmm) = Pid::from_raw(vmm.cast_signed())
            && has_guest(vmm)
        {
            break vmm;
        }
        assert!(begun.elapsed() < PATIENCE, "no VMM process");
        std::thread::sleep(Duration::from_millis(10));
    };
    rustix::process::kill_process(vmm, rustix::process::Signal::STOP).unwrap();
    let status = loop {
        if let Some(status) = picovm.try_wait().unwrap() {
            break status;
        }
        assert!(begun.elapsed() < PATIENCE, "picovm waits for ever");
        std::thread::sleep(Duration::from_millis(10));
    };
    println!("{status} after {} ms", begun.elapsed().as_millis());
    assert_eq!(status.code(), Some(124));
    assert!(begun.elapsed() > Duration::from_secs(4), "it did not stand still");
    assert!(
        rustix::process::test_kill_process(vmm).is_err(),
        "its VMM process is still there"
    );
    the_neighbour_is_whole(Guest::Container);
}

/// Whatever was done in their clones before this: every template of the store is, byte by byte, what was frozen.
#[test]
fn templates_are_as_they_were_frozen() {
    for guest in [Guest::HostileInit, Guest::Container] {
        the_neighbour_is_whole(guest);
    }
    let templates = store().store.templates().unwrap();
    // Of each guest its base, and the image's.
    assert!(templates.len() >= 4, "{templates:?}");
    for template in templates {
        Template::open(&template.path).unwrap().verify_memory().unwrap();
    }
}

//! The VMM as a library: booting, ending, freezing more than once, disks.

use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use picovm_guest_protocol::{
    ContainerExit, ContainerSpec, Frame, FrameDecoder, Identity, ProcessSpec, Stream,
};
use picovm_vmm::{Disk, ForkOptions, FreezeOptions, Machine, MachineConfig, Outcome, Template};

use crate::{guest, image_file};

const PATIENCE: Option<Duration> = Some(Duration::from_secs(60));

fn config() -> MachineConfig {
    let mut config = MachineConfig::new(guest().kernel);
    config.initramfs = Some(guest().initramfs);
    config.disks = vec![Disk::read_only(image_file())];
    config
}

fn identity(script: &str) -> Vec<u8> {
    let identity = Identity {
        id: "test".into(),
        hostname: "test".into(),
        entropy: [1; 32],
        realtime_ns: 1_800_000_000_000_000_000,
        container: Some(ContainerSpec::of(ProcessSpec {
            args: vec![b"sh".to_vec(), b"-c".to_vec(), script.into()],
            ..ProcessSpec::default()
        })),
    };
    identity.encode(1 << 16).unwrap()
}

/// Runs a script in a clone and returns its output and its exit.
fn run(template: &Template, script: &str) -> (String, ContainerExit) {
    let mut clone = template
        .fork(ForkOptions {
            identity: identity(script),
            ..Default::default()
        })
        .unwrap();
    talk(&mut clone)
}

fn talk(clone: &mut Machine) -> (String, ContainerExit) {
    let mut connection = clone.take_connection().unwrap();
    connection.set_read_timeout(PATIENCE).unwrap();
    clone.start().unwrap();
    let (mut decoder, mut bytes, mut output) = (FrameDecoder::default(), [0u8; 4096], Vec::new());
    loop {
        let count = connection.read(&mut bytes).unwrap();
        assert_ne!(count, 0, "the clone has gone");
        decoder.push(&bytes[..count]);
        while let Some((_, frame)) = decoder.next_frame().unwrap() {
            match frame {
                Frame::Data(Stream::Stdout, data) => output.extend(data),
                Frame::Exit(exit) => {
                    assert_eq!(clone.wait(PATIENCE).unwrap(), Some(Outcome::PowerOff));
                    return (String::from_utf8(output).unwrap().trim_end().to_owned(), exit);
                }
                _ => {}
            }
        }
    }
}

#[test]
fn a_kernel_without_a_root_resets_itself_and_the_console_says_why() {
    let mut config = MachineConfig::new(guest().kernel);
    config.memory_mib = 64;
    let mut machine = Machine::boot(&config).unwrap();
    assert_eq!(machine.run(PATIENCE).unwrap(), Some(Outcome::Reset));
    assert!(
        machine.console_tail().contains("Kernel panic"),
        "{}",
        machine.console_tail()
    );
    assert!(machine.start().is_err(), "it has ended");
}

#[test]
fn a_triple_fault_is_a_reset() {
    // `reboot=t` makes the kernel reset itself by an empty interrupt table.
    let mut config = MachineConfig::new(guest().kernel);
    config.extra_cmdline = "reboot=t".into();
    let mut machine = Machine::boot(&config).unwrap();
    assert_eq!(machine.run(PATIENCE).unwrap(), Some(Outcome::Reset));
}

#[test]
fn a_guest_that_cannot_go_on_powers_off_and_says_why() {
    let mut config = config();
    config.disks.clear();
    let log = tempfile::NamedTempFile::new().unwrap();
    config.console_log = Some(log.path().to_owned());
    let mut machine = Machine::boot(&config).unwrap();
    assert_eq!(machine.run(PATIENCE).unwrap(), Some(Outcome::PowerOff));
    // What there is is the disk for storage, and the only one.
    assert!(
        std::fs::read_to_string(log.path())
            .unwrap()
            .contains("no /dev/vdb: the first virtio block device must hold the image")
    );
}

#[test]
fn one_machine_freezes_into_many_templates_and_a_template_opens_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut parent = Machine::boot(&config()).unwrap();
    assert_eq!(parent.run(PATIENCE).unwrap(), Some(Outcome::FreezePoint));
    for name in ["first", "second"] {
        let template = parent
            .freeze(&directory.path().join(name), &FreezeOptions::default())
            .unwrap();
        assert_eq!(
            run(&template, "echo $0 ok; exit 5"),
            ("sh ok".into(), ContainerExit::Code(5))
        );
        drop(template);
        let again = Template::open(&directory.path().join(name)).unwrap();
        assert_eq!(run(&again, "echo again").0, "again");
        // The parent was not consumed: it goes on and comes back to its freeze point.
        assert_eq!(parent.run(PATIENCE).unwrap(), Some(Outcome::FreezePoint));
    }
}

#[test]
fn a_clone_that_is_frozen_again_is_a_template() {
    let directory = tempfile::tempdir().unwrap();
    let mut parent = Machine::boot(&config()).unwrap();
    assert_eq!(parent.run(PATIENCE).unwrap(), Some(Outcome::FreezePoint));
    let base = parent
        .freeze(&directory.path().join("base"), &FreezeOptions::default())
        .unwrap();
    // Without an identity a clone is what its parent was: it goes back to the freeze point.
    let mut clone = base.fork(ForkOptions::default()).unwrap();
    assert_eq!(clone.run(PATIENCE).unwrap(), Some(Outcome::FreezePoint));
    let deeper = clone
        .freeze(&directory.path().join("deeper"), &FreezeOptions::default())
        .unwrap();
    assert_eq!(run(&deeper, "echo deep").0, "deep");
}

#[test]
fn a_running_clone_can_be_paused_and_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut parent = Machine::boot(&config()).unwrap();
    assert_eq!(parent.run(PATIENCE).unwrap(), Some(Outcome::FreezePoint));
    let template = parent
        .freeze(&directory.path().join("t"), &FreezeOptions::default())
        .unwrap();
    let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo $i";
    let mut clone = template
        .fork(ForkOptions {
            identity: identity(script),
            ..Default::default()
        })
        .unwrap();
    clone.start().unwrap();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(5));
        clone.pause().unwrap();
        // A live fork of it will save exactly this.
        clone.save().unwrap();
        clone.start().unwrap();
    }
    assert_eq!(talk(&mut clone), ("20000".into(), ContainerExit::Code(0)));
}

#[test]
fn a_writable_disk_keeps_what_is_written_and_a_read_only_one_refuses() {
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    let mut file = std::fs::File::create(&disk).unwrap();
    file.write_all(b"from the host").unwrap();
    file.set_len(1 << 20).unwrap();
    let mut config = config();
    config.disks.push(Disk {
        read_only: false,
        ..Disk::read_only(&disk)
    });
    config.disks.push(Disk::read_only(&disk));
    let mut parent = Machine::boot(&config).unwrap();
    assert_eq!(parent.run(PATIENCE).unwrap(), Some(Outcome::FreezePoint));
    let template = parent
        .freeze(&directory.path().join("t"), &FreezeOptions::default())
        .unwrap();
    drop(parent);
    let script = "head -c 13 /dev/vdb; echo; printf 'from the guest' | dd of=/dev/vdb bs=512 seek=100 conv=sync,fsync \
                  2>/dev/null || echo no; echo x 2>/dev/null > /dev/vdc || echo refused";
    let (output, exit) = run(&template, script);
    assert_eq!(
        (output.as_str(), exit),
        ("from the host\nrefused", ContainerExit::Code(0))
    );
    let bytes = std::fs::read(&disk).unwrap();
    assert_eq!(&bytes[100 * 512..100 * 512 + 14], b"from the guest");

    // A clone's disk must be as large as the one that its guest knows.
    std::fs::File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .set_len(1 << 19)
        .unwrap();
    let error = template.fork(ForkOptions::default()).err().unwrap().to_string();
    assert!(
        error.contains("has 1024 sectors") && error.contains("rebuild"),
        "{error}"
    );
}

#[test]
fn wrong_kernels_and_missing_files_are_named() {
    let boot = |kernel: &Path, change: &dyn Fn(&mut MachineConfig)| {
        let mut config = config();
        config.kernel = kernel.to_owned();
        change(&mut config);
        Machine::boot(&config).err().expect("it cannot boot").to_string()
    };
    let kernel = guest().kernel;
    assert!(boot(Path::new("/no/kernel"), &|_| {}).contains("cannot read the kernel /no/kernel"));
    assert!(boot(Path::new("/bin/sh"), &|_| {}).contains("/bin/sh"));
    assert!(boot(Path::new("/etc/passwd"), &|_| {}).contains("is not an uncompressed kernel"));
    assert!(
        boot(&kernel, &|config| config.initramfs = Some("/no/initramfs".into())).contains("/no/initramfs")
    );
    assert!(
        boot(&kernel, &|config| config.disks[0].path = "/no/disk".into())
            .contains("cannot open the disk /no/disk")
    );
    assert!(boot(&kernel, &|config| config.memory_mib = 0).contains("32 to"));

    let truncated = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(truncated.path(), &std::fs::read(&kernel).unwrap()[..100_000]).unwrap();
    assert!(boot(truncated.path(), &|_| {}).contains("cannot load the kernel"));
}

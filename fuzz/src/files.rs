//! Files of others: a template's, and an archive that is to become an image.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use picovm_vmm::devices::legacy::{ConsoleLog, Ports};
use picovm_vmm::devices::trap::Trap;
use picovm_vmm::devices::virtio::block::FileBackend;
use picovm_vmm::devices::virtio::console;
use picovm_vmm::devices::virtio::fs::ShareBackend;
use picovm_vmm::devices::virtio::slot::{Slot, SlotBackend, SlotState};
use picovm_vmm::machine::MachineState;
use picovm_vmm::template::{FORMAT_VERSION, FileRecord, Metadata, parses};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::{TEMPLATE_FILES, guest};

/// A template's files, without KVM: metadata, working set, or state, and then the devices that are made of it.
pub fn template_state(data: &[u8]) {
    let Some((file, data)) = data.split_first() else {
        return;
    };
    let [metadata, working_set, state] = TEMPLATE_FILES;
    if *file == metadata {
        let _ = parses::metadata(data, Path::new("template"));
    } else if *file == working_set {
        if let Some(set) = parses::working_set(data, 32) {
            // Its pages lie in memory, or they would have been refused.
            set.populate_written(&guest::memory());
            let _ = set.union(&set);
        }
    } else if *file == state {
        machine_state(data);
    }
}

fn machine_state(data: &[u8]) {
    // What the metadata says is compared with the state, so it says what the state does.
    let Ok(decoded) = postcard::from_bytes::<MachineState>(data) else {
        assert!(parses::state(data, &metadata(32, 1), Path::new("template")).is_err());
        return;
    };
    let vcpus = u8::try_from(decoded.vcpus.len()).unwrap_or(u8::MAX);
    let Ok(state) = parses::state(data, &metadata(decoded.memory_mib, vcpus), Path::new("template")) else {
        return;
    };
    let _ = Ports::from_state(&state.ports, guest::line(), ConsoleLog::default()).map(|ports| ports.state());
    let _ = Trap::from_state(&state.trap).state();
    for saved in state.slots.iter().take(32) {
        let backend = match saved {
            SlotState::Console { .. } => {
                let Ok((backend, _host)) = console::connection() else {
                    return;
                };
                SlotBackend::Console(backend)
            }
            SlotState::Block { device, .. } => {
                let disk = File::from(
                    rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).expect("make a disk"),
                );
                disk.write_all_at(&[7; 4096], 0).expect("fill the disk");
                let path = format!("/proc/self/fd/{}", disk.as_raw_fd());
                match FileBackend::open_for_clone(Path::new(&path), device) {
                    Ok(backend) => SlotBackend::Block(backend, Some(path.into())),
                    Err(_) => continue,
                }
            }
            SlotState::Entropy { .. } => SlotBackend::Entropy,
            SlotState::Fs { .. } => SlotBackend::Fs(ShareBackend::default()),
            SlotState::Storage { device, .. } => match FileBackend::storage(None, device.sectors) {
                Ok(backend) => SlotBackend::Block(backend, None),
                Err(_) => continue,
            },
        };
        // The state of the queues is the file's: the devices work on it at once, as in a clone.
        if let Ok(slot) = Slot::from_state(backend, 2, guest::memory(), guest::line(), saved) {
            let _ = slot.resume();
            for register in (0..0x120).step_by(4) {
                slot.read(register, &mut [0; 4]);
            }
            for queue in 0..5u32 {
                slot.write(0x050, &queue.to_le_bytes());
            }
            let _ = slot.state();
        }
    }
}

fn metadata(memory_mib: u64, vcpus: u8) -> Metadata {
    let record = |bytes| FileRecord {
        bytes,
        checksum: String::new(),
    };
    Metadata {
        format: FORMAT_VERSION,
        protocol: picovm_guest_protocol::PROTOCOL_VERSION,
        created: 0,
        memory_mib,
        vcpus,
        processor: picovm_vmm::arch::cpuid::Processor {
            vendor: String::new(),
            signature: 0,
            features: [0; 8],
        },
        memory: record(memory_mib.saturating_mul(1 << 20)),
        memory_data_bytes: 0,
        state: record(0),
        notes: Default::default(),
    }
}

/// Largest file that an archive may make here, in bytes: a few bytes can describe a file of any size, and that it fills
/// the disk is between who builds an image and their disk.
const FILE_MAX: u64 = 256 << 10;

fn limit_files(current: Option<u64>) {
    let limit = Rlimit {
        current,
        maximum: None,
    };
    setrlimit(Resource::Fsize, limit).expect("limit the size of files");
}

fn open_again(archive: &File) -> File {
    File::open(format!("/proc/self/fd/{}", archive.as_raw_fd())).expect("open the archive again")
}

fn only_layer(archive: &File, root: &Path) {
    use picovm_rootfs::unpack::{Limits, Layers};
    let path = format!("/proc/self/fd/{}", archive.as_raw_fd());
    let limits = Limits::default();
    let made = picovm_rootfs::layer::make(path.as_ref(), &mut std::io::sink(), &limits, &mut |_| {});
    let Ok(made) = made else {
        return;
    };
    let mut layers = Layers::new(root, &limits).expect("open the root");
    // What is a layer has the digest that was said, unless it is refused before its end.
    if let Err(picovm_rootfs::unpack::UnpackError::Digest { actual, expected }) =
        layers.add(open_again(archive), &made.diff_id, &mut |_, _| {})
    {
        panic!("the digest of the layer is {actual} and not {expected}");
    }
    let _ = layers.finish();
}

fn layers(archive: &File, root: &Path) {
    use picovm_rootfs::unpack::{Layers, UnpackError};
    let open = || open_again(archive);
    let mut layers = Layers::new(root, &Default::default()).expect("open the root");
    // The digest is compared last, and tells what it is.
    let Err(UnpackError::Digest { actual, .. }) = layers.add(open(), "", &mut |_, _| {}) else {
        return;
    };
    let _ = layers.add(open(), &actual, &mut |_, _| {});
    let _ = layers.add(open(), &actual, &mut |_, _| {});
    let _ = layers.finish();
}

/// An archive, unpacked into a directory in memory. Nothing appears beside that directory.
pub fn image_archive(data: &[u8]) {
    static IGNORE: std::sync::Once = std::sync::Once::new();
    // What is beyond the limit below is then an error of the call instead of the end of the process.
    // SAFETY: no handler is installed.
    IGNORE.call_once(|| unsafe { _ = libc::signal(libc::SIGXFSZ, libc::SIG_IGN) });
    let around = tempfile::tempdir_in("/dev/shm").expect("make a directory");
    let root = around.path().join("root");
    std::fs::create_dir(&root).expect("make a directory");
    let archive = File::from(
        rustix::fs::memfd_create("archive", rustix::fs::MemfdFlags::CLOEXEC).expect("make a file"),
    );
    if archive.write_all_at(data, 0).is_err() {
        return;
    }
    limit_files(Some(FILE_MAX));
    // As the only layer of an image that is built, or as three layers of which each is the whole archive: whiteouts, and entries that
    // meet their like.
    if data.len().is_multiple_of(2) {
        only_layer(&archive, &root);
    } else {
        layers(&archive, &root);
    }
    // libFuzzer writes its own.
    limit_files(None);
    let beside = std::fs::read_dir(around.path()).expect("look around").count();
    assert_eq!(beside, 1, "something was written beside the root");
}

//! Opening a template and forking clones from it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::checksum;
use super::format::{
    self, FileRecord, MEMORY, METADATA, Metadata, SMALL_FILE_MAX, STATE, TemplateError, VERIFIED, WORKING_SET,
};
use super::large_pages;
use crate::arch::cpuid::Processor;
use crate::arch::layout;
use crate::machine::{Backends, Machine, MachineError, MachineState};
use crate::working_set::WorkingSet;
use crate::{memory, vm};

/// What a clone gets of its own.
#[derive(Default)]
pub struct ForkOptions {
    /// Written to the start of the identity area. The format is the guest's business; see
    /// [`picovm_guest_protocol::Identity`]. At most [`Template::identity_area`] bytes.
    pub identity: Vec<u8>,
    /// Files for the disks in order, instead of those that the template was made with. Each must have as many sectors.
    pub disks: Vec<PathBuf>,
    /// Where the clone's console output goes.
    pub console_log: Option<File>,
}

/// An open template. Forking needs nothing but this; any number of clones may be forked at once, from any thread.
pub struct Template {
    path: PathBuf,
    id: String,
    metadata: Metadata,
    state: MachineState,
    memory: Arc<File>,
    working_set: Option<WorkingSet>,
    kvm: Arc<Kvm>,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template")
            .field("path", &self.path)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Template {
    /// Reads a template's metadata without opening KVM or looking at its other files.
    ///
    /// # Errors
    /// [`TemplateError::Io`], [`TemplateError::Damaged`], [`TemplateError::Version`].
    pub fn read_metadata(directory: &Path) -> Result<(Metadata, String), TemplateError> {
        let bytes = read_small(&directory.join(METADATA))?;
        format::decode(&bytes, directory)
    }

    /// Opens and checks a template: every checksum, its format version, and that this host's processor is the one it
    /// was made on. The memory's checksum is compared once per boot of the host and change of the file.
    ///
    /// # Errors
    /// [`TemplateError`] says what is wrong and what to do.
    pub fn open(directory: &Path) -> Result<Self, TemplateError> {
        let (metadata, id) = Self::read_metadata(directory)?;
        let damaged = |reason: String| TemplateError::damaged(directory, reason);

        if metadata.protocol != picovm_guest_protocol::PROTOCOL_VERSION {
            return Err(TemplateError::Protocol {
                path: directory.to_owned(),
                found: metadata.protocol,
            });
        }

        let bytes = read_small(&directory.join(STATE))?;
        if bytes.len() as u64 != metadata.state.bytes || checksum::of(&bytes) != metadata.state.checksum {
            return Err(damaged(format!("{STATE} does not match its checksum")));
        }
        let state = decode_state(&bytes, &metadata, directory)?;

        let path = directory.join(MEMORY);
        let file = File::open(&path).map_err(TemplateError::io("open", &path))?;
        let found = file.metadata().map_err(TemplateError::io("read", &path))?.len();
        if found != metadata.memory.bytes {
            return Err(damaged(format!(
                "{MEMORY} has {found} bytes instead of {}",
                metadata.memory.bytes
            )));
        }
        let working_set = recorded_working_set(directory, metadata.memory_mib);
        let verified = Verified::of(&file, &metadata.memory.checksum);
        if verified.is_none() || recorded(directory) != verified {
            compare_memory(directory, &file, &metadata.memory)?;
            // The page cache has it only since now, or may have been rid of it: in small pages.
            if let Some(set) = &working_set {
                large_pages::collapse(&file, set);
            }
            // The file that was read, and as it was before: what was written to it meanwhile is not vouched for.
            if verified == Verified::of(&file, &metadata.memory.checksum) {
                record(directory, verified.as_ref());
            }
        }

        let kvm = vm::open_kvm().map_err(MachineError::from)?;
        let here = Processor::of(&vm::supported_cpuid(&kvm).map_err(MachineError::from)?);
        if here != metadata.processor {
            return Err(TemplateError::Foreign {
                path: directory.to_owned(),
                made_on: Box::new(metadata.processor),
                here: Box::new(here),
            });
        }
        Ok(Self {
            path: directory.to_owned(),
            id,
            metadata,
            state,
            memory: Arc::new(file),
            working_set,
            kvm: Arc::new(kvm),
        })
    }

    /// The same template, whose directory was renamed.
    pub(super) fn renamed(self, directory: &Path) -> Self {
        Self {
            path: directory.to_owned(),
            ..self
        }
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its content's id: BLAKE3 of its metadata, which holds the checksums of the rest.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it says of itself.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Bytes that the guest has set aside for an identity.
    #[must_use]
    pub fn identity_area(&self) -> usize {
        self.state.trap.identity_pages.len() * picovm_guest_protocol::trap::PAGE_SIZE
    }

    /// Which pages a start touches, if that was recorded.
    #[must_use]
    pub fn working_set(&self) -> Option<&WorkingSet> {
        self.working_set.as_ref()
    }

    /// Keeps beside the template which pages a start touches: [`Machine::working_set`] of a clone that has run one. Where
    /// it cannot be written, this opened template knows it and later ones do not.
    ///
    /// What a start only reads is put into large pages where the host can, and with that into the record as whole blocks.
    pub fn record_working_set(&mut self, set: WorkingSet) {
        let blocks = large_pages::collapse(&self.memory, &set);
        tracing::debug!(?blocks, "what a start only reads is in large pages");
        // What is in one large page is mapped by one fault.
        let set = set.union(&WorkingSet::of_read_blocks(&blocks));
        if let Ok(bytes) = postcard::to_stdvec(&set) {
            store_advice(&self.path, WORKING_SET, &bytes);
        }
        self.working_set = Some(set);
    }

    /// Compares the memory's checksum now, whatever was recorded.
    ///
    /// # Errors
    /// [`TemplateError::Io`], [`TemplateError::Damaged`].
    pub fn verify_memory(&self) -> Result<(), TemplateError> {
        compare_memory(&self.path, &self.memory, &self.metadata.memory)
    }

    /// Forks a clone. It stands at the freeze point with its identity written; [`Machine::start`] lets it run.
    ///
    /// # Errors
    /// [`TemplateError::Identity`] if the identity is too large, [`TemplateError::Machine`] for what the host refuses.
    pub fn fork(&self, options: ForkOptions) -> Result<Machine, TemplateError> {
        let memory = memory::private(self.metadata.memory_mib, &self.memory).map_err(MachineError::from)?;
        self.write_identity_to(&memory, &options.identity)?;
        let own = Backends {
            disks: options.disks,
            console_log: options.console_log,
            memory_file: Some(self.memory.clone()),
        };
        Ok(Machine::build(
            &self.kvm,
            &self.metadata.processor,
            memory,
            &self.state,
            own,
        )?)
    }

    /// Gives an identity to a clone of this template that was forked without one and has not run yet.
    ///
    /// # Errors
    /// As [`Template::fork`].
    pub fn write_identity(&self, clone: &Machine, identity: &[u8]) -> Result<(), TemplateError> {
        self.write_identity_to(clone.memory(), identity)
    }

    /// Writes an identity into a clone's memory: pages that the guest has mapped already.
    fn write_identity_to(&self, memory: &GuestMemoryMmap, identity: &[u8]) -> Result<(), TemplateError> {
        let pages = &self.state.trap.identity_pages;
        if identity.len() > self.identity_area() {
            return Err(TemplateError::Identity {
                needed: identity.len(),
                available: self.identity_area(),
            });
        }
        for (part, address) in identity.chunks(picovm_guest_protocol::trap::PAGE_SIZE).zip(pages) {
            memory
                .write_slice(part, GuestAddress(*address))
                .map_err(|_| TemplateError::IdentityArea { address: *address })?;
        }
        Ok(())
    }
}

/// Decodes the machine's state and checks all that can be checked of it before there is a VM.
///
/// # Errors
/// [`TemplateError::Damaged`].
pub fn decode_state(
    bytes: &[u8],
    metadata: &Metadata,
    directory: &Path,
) -> Result<MachineState, TemplateError> {
    let damaged = |reason: String| TemplateError::damaged(directory, reason);
    let state: MachineState =
        postcard::from_bytes(bytes).map_err(|error| damaged(format!("{STATE} cannot be read ({error})")))?;
    let memory_bytes = metadata.memory_mib.checked_mul(1 << 20);
    if state.memory_mib != metadata.memory_mib || memory_bytes != Some(metadata.memory.bytes) {
        return Err(damaged("its files disagree on the size of the memory".into()));
    }
    if !(layout::MEMORY_MIN_MIB..=layout::MEMORY_MAX_MIB).contains(&metadata.memory_mib) {
        return Err(damaged(format!(
            "a machine of {} MiB cannot be made",
            metadata.memory_mib
        )));
    }
    if state.vcpus.len() != usize::from(metadata.vcpus) {
        return Err(damaged("its files disagree on the number of vCPUs".into()));
    }
    Ok(state)
}

/// Decodes a working set; `None` if it is none, or makes no sense for so much memory.
pub fn decode_working_set(bytes: &[u8], memory_mib: u64) -> Option<WorkingSet> {
    postcard::from_bytes(bytes)
        .ok()
        .filter(|set: &WorkingSet| set.fits(memory_mib))
}

/// Compares a memory file with what the template of `directory` says of it.
fn compare_memory(directory: &Path, memory: &File, record: &FileRecord) -> Result<(), TemplateError> {
    let sum = checksum::of_memory(memory, record.bytes)
        .map_err(TemplateError::io("read", &directory.join(MEMORY)))?;
    if sum == record.checksum {
        Ok(())
    } else {
        Err(TemplateError::damaged(
            directory,
            format!("{MEMORY} does not match its checksum"),
        ))
    }
}

fn read_small(path: &Path) -> Result<Vec<u8>, TemplateError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(SMALL_FILE_MAX).read_to_end(&mut bytes))
        .map_err(TemplateError::io("read", path))?;
    Ok(bytes)
}

/// Which file was verified, against what, and in which boot of the host: any change of the file changes its `ctime`,
/// and a restart of the host ends what its page cache vouches for.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Verified {
    checksum: String,
    boot: String,
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Verified {
    fn of(file: &File, checksum: &str) -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let metadata = file.metadata().ok()?;
        Some(Self {
            checksum: checksum.to_owned(),
            boot: boot.trim().to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

fn recorded(directory: &Path) -> Option<Verified> {
    serde_json::from_slice(&read_small(&directory.join(VERIFIED)).ok()?).ok()
}

/// Records that the memory, just written by this process, is what its checksum says.
pub(super) fn record_written(directory: &Path, checksum: &str) {
    let file = File::open(directory.join(MEMORY)).ok();
    record(
        directory,
        file.and_then(|file| Verified::of(&file, checksum)).as_ref(),
    );
}

/// Where the record cannot be written, the next opening compares again.
fn record(directory: &Path, verified: Option<&Verified>) {
    if let Some(bytes) = verified.and_then(|verified| serde_json::to_vec(verified).ok()) {
        store_advice(directory, VERIFIED, &bytes);
    }
}

/// Writes a file that a template is as good without, whole or not at all.
fn store_advice(directory: &Path, name: &str, bytes: &[u8]) {
    if let Ok(mut file) = tempfile::NamedTempFile::new_in(directory)
        && std::io::Write::write_all(&mut file, bytes).is_ok()
    {
        let _ = file.persist(directory.join(name));
    }
}

/// A working set that was recorded and makes sense for so much memory.
fn recorded_working_set(directory: &Path, memory_mib: u64) -> Option<WorkingSet> {
    let bytes = read_small(&directory.join(WORKING_SET)).ok()?;
    decode_working_set(&bytes, memory_mib)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::legacy::PortsState;
    use crate::devices::trap::TrapState;
    use crate::template::format::{FORMAT_VERSION, FileRecord};
    use crate::vm::VmState;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    const MIB: u64 = 32;

    fn state() -> MachineState {
        MachineState {
            memory_mib: MIB,
            vm: VmState {
                irqchips: vec![Default::default()],
                clock: Default::default(),
            },
            vcpus: vec![crate::vcpu::tests::state(&[(1, 2)])],
            slots: Vec::new(),
            trap: TrapState {
                identity_pages: vec![0x1000],
            },
            ports: PortsState::default(),
        }
    }

    /// A template as freezing writes it, of a machine that never was; `content` is at the start of its memory.
    fn write(directory: &Path, content: &[u8], change: impl FnOnce(&mut Metadata)) {
        let memory = File::create(directory.join(MEMORY)).unwrap();
        memory.set_len(MIB << 20).unwrap();
        memory.write_all_at(content, 0).unwrap();
        let state = postcard::to_stdvec(&state()).unwrap();
        fs::write(directory.join(STATE), &state).unwrap();
        let mut metadata = Metadata {
            format: FORMAT_VERSION,
            protocol: picovm_guest_protocol::PROTOCOL_VERSION,
            created: 0,
            memory_mib: MIB,
            vcpus: 1,
            processor: Processor {
                vendor: String::new(),
                signature: 0,
                features: [0; 8],
            },
            memory: FileRecord {
                bytes: MIB << 20,
                checksum: checksum::of_memory(&File::open(directory.join(MEMORY)).unwrap(), MIB << 20)
                    .unwrap(),
            },
            memory_data_bytes: 0,
            state: FileRecord {
                bytes: state.len() as u64,
                checksum: checksum::of(&state),
            },
            notes: Default::default(),
        };
        change(&mut metadata);
        fs::write(directory.join(METADATA), format::encode(&metadata).unwrap()).unwrap();
    }

    /// What is damaged; `None` if opening got as far as this host's KVM and processor.
    fn damage(directory: &Path) -> Option<String> {
        match Template::open(directory).unwrap_err() {
            TemplateError::Damaged { reason, .. } => Some(reason),
            TemplateError::Foreign { .. } | TemplateError::Machine(MachineError::Vm(_)) => None,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_memory_file_that_changed_after_it_was_verified_is_compared_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        write(path, b"memory", |_| {});
        assert_eq!(damage(path), None);
        assert!(path.join(VERIFIED).exists());
        // The time of a change is that of a tick of the kernel.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let memory = File::options().write(true).open(path.join(MEMORY)).unwrap();
        memory.write_all_at(b"M", 0).unwrap();
        assert!(damage(path).unwrap().contains("memory does not match"));
        memory.write_all_at(b"m", 0).unwrap();
        assert_eq!(damage(path), None);
    }

    #[test]
    fn a_memory_file_verified_for_another_template_is_compared_again() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(one.path(), b"one", |_| {});
        write(other.path(), b"other", |_| {});
        assert_eq!(damage(one.path()), None);
        for file in [METADATA, STATE] {
            fs::copy(other.path().join(file), one.path().join(file)).unwrap();
        }
        assert!(damage(one.path()).unwrap().contains("memory does not match"));
    }

    #[test]
    fn sizes_that_no_machine_has_are_damage() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        write(path, b"", |metadata| metadata.vcpus = 2);
        assert!(damage(path).unwrap().contains("vCPUs"));
        for mib in [0, MIB + 1, 1 << 44, u64::MAX] {
            write(path, b"", |metadata| metadata.memory_mib = mib);
            assert!(damage(path).unwrap().contains("size of the memory"));
        }
        write(path, b"", |_| {});
        File::options()
            .write(true)
            .open(path.join(MEMORY))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        assert!(damage(path).unwrap().contains("has 1048576 bytes"));
    }

    #[test]
    fn another_guest_protocol_is_told_as_such() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), b"", |metadata| metadata.protocol += 1);
        let error = Template::open(directory.path()).unwrap_err();
        assert!(matches!(error, TemplateError::Protocol { .. }), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        #[test]
        fn arbitrary_metadata_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(format::decode(&bytes, Path::new("t")).is_err());
        }

        /// Lengths among the bytes promise up to 2^64 elements: decoding allocates no more than what is there.
        #[test]
        fn an_arbitrary_state_is_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let _ = postcard::from_bytes::<MachineState>(&bytes);
        }

        #[test]
        fn a_changed_state_is_decoded_or_refused(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
            from_the_start: bool,
        ) {
            let mut bytes = postcard::to_stdvec(&state()).unwrap();
            for (at, value) in changes {
                let at = at.index(if from_the_start { 64 } else { bytes.len() });
                bytes[at] = value;
            }
            let _ = postcard::from_bytes::<MachineState>(&bytes);
            let _ = postcard::from_bytes::<MachineState>(&bytes[..cut.index(bytes.len())]);
        }
    }
}

//! Opening a template and forking clones from it.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::checksum::{self, CHUNK};
use super::format::{
    self, FileRecord, MEMORY, METADATA, Metadata, SMALL_FILE_MAX, STATE, TemplateError, VERIFIED, WORKING_SET,
};
use super::large_pages;
use crate::arch::cpuid::Processor;
use crate::arch::layout;
use crate::devices::virtio::block::FileBackend;
use crate::devices::virtio::slot::SlotState;
use crate::machine::{Backends, Machine, MachineError, MachineState};
use crate::threads::Threads;
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
    /// The clone's end of a connection with a share server (a pair of `SOCK_SEQPACKET` sockets), which carries out the requests of its
    /// file system device. Without one they are answered with an error.
    pub share: Option<OwnedFd>,
    /// The file of its storage, open for reading and writing, of whole sectors and 1 TiB at most. It never grows. Without one that disk
    /// reads as zeros and takes no write.
    pub storage: Option<File>,
    /// Where the clone's console output goes.
    pub console_log: Option<File>,
    /// Whether its memory is a copy of the template's from the start, of which it shares no page with other clones: what one of
    /// them touches cannot then be told by another from how long an access takes. It costs a read of the whole template.
    pub isolate_memory: bool,
    /// Where its threads come from: they may be made, and confined, ahead.
    pub threads: Threads,
}

/// An open template. Forking needs nothing but this; any number of clones may be forked at once, from any thread.
pub struct Template {
    path: PathBuf,
    id: String,
    metadata: Metadata,
    state: MachineState,
    memory: Arc<File>,
    working_set: Option<WorkingSet>,
    /// By slot, what its clones need open and none can write to.
    shared: Vec<Option<FileBackend>>,
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
        same_processor(directory, &metadata.processor, here)?;
        let shared = state.slots.iter().map(SlotState::open_shared).collect();
        Ok(Self {
            path: directory.to_owned(),
            id,
            shared,
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

    /// The same template with other files for its disks, opened now: see [`ForkOptions::disks`]. Forking a clone of it opens
    /// nothing.
    ///
    /// # Errors
    /// [`TemplateError::Machine`] for a file that cannot be opened, or is not as large as the guest knows it.
    pub fn on_disks(mut self, disks: &[PathBuf]) -> Result<Self, TemplateError> {
        let mut disks = disks.iter();
        for (state, shared) in self.state.slots.iter_mut().zip(&mut self.shared) {
            if let SlotState::Block { device, path, .. } = state
                && let Some(other) = disks.next()
            {
                let backend = FileBackend::open_for_clone(other, device).map_err(MachineError::from)?;
                *shared = Some(backend).filter(FileBackend::is_read_only);
                path.clone_from(other);
            }
        }
        Ok(self)
    }

    /// Its machine's state.
    pub(super) fn state(&self) -> &MachineState {
        &self.state
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
        self.state
            .trap
            .identity_pages
            .len()
            .saturating_mul(picovm_guest_protocol::trap::PAGE_SIZE)
    }

    /// The descriptors that a process needs of this template to fork clones of it.
    #[must_use]
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let disks = self.shared.iter().flatten().filter_map(FileBackend::descriptor);
        // SAFETY: /dev/kvm is open for as long as the template, which is borrowed.
        let kvm = unsafe { BorrowedFd::borrow_raw(self.kvm.as_raw_fd()) };
        [kvm, self.memory.as_fd()].into_iter().chain(disks).collect()
    }

    /// Which pages a start touches, if that was recorded.
    #[must_use]
    pub fn working_set(&self) -> Option<&WorkingSet> {
        self.working_set.as_ref()
    }

    /// Decodes which pages a start touches, from bytes that nobody vouches for; `None` if they are none, or make no sense for this
    /// template.
    #[must_use]
    pub fn decode_working_set(&self, bytes: &[u8]) -> Option<WorkingSet> {
        decode_working_set(bytes, self.metadata.memory_mib)
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
        let isolated = options.isolate_memory;
        let memory = if isolated {
            self.copy_memory()?
        } else {
            memory::private(self.metadata.memory_mib, &self.memory).map_err(MachineError::from)?
        };
        self.write_identity_to(&memory, &options.identity)?;
        let own = Backends {
            disks: options.disks,
            shared: self.shared.clone(),
            share: options.share,
            storage: options.storage,
            console_log: options.console_log,
            threads: options.threads,
            memory_file: (!isolated).then(|| self.memory.clone()),
        };
        Ok(Machine::build(
            &self.kvm,
            &self.metadata.processor,
            memory,
            &self.state,
            own,
        )?)
    }

    /// Memory that holds what the template's does, and shares no page with it.
    fn copy_memory(&self) -> Result<GuestMemoryMmap, TemplateError> {
        let path = self.path.join(MEMORY);
        let bytes = self.metadata.memory.bytes;
        let memory = memory::anonymous(self.metadata.memory_mib).map_err(MachineError::from)?;
        let chunks = checksum::data_chunks(&self.memory, bytes)
            .map_err(TemplateError::io("find the data of", &path))?;
        let mut buffer = vec![0u8; CHUNK];
        for chunk in chunks {
            let offset = chunk.saturating_mul(CHUNK as u64);
            let length = bytes.saturating_sub(offset).min(CHUNK as u64) as usize;
            let part = buffer.get_mut(..length).unwrap_or_default();
            self.memory
                .read_exact_at(part, offset)
                .map_err(TemplateError::io("read", &path))?;
            memory::write_at_offset(&memory, offset, part).map_err(MachineError::from)?;
        }
        Ok(memory)
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

/// Whether the guest finds the processor that it has adapted to.
fn same_processor(directory: &Path, made_on: &Processor, here: Processor) -> Result<(), TemplateError> {
    if here == *made_on {
        return Ok(());
    }
    Err(TemplateError::Foreign {
        path: directory.to_owned(),
        made_on: Box::new(made_on.clone()),
        here: Box::new(here),
    })
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

pub(super) fn read_small(path: &Path) -> Result<Vec<u8>, TemplateError> {
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

/// Records that the memory, just read by this process, is what its checksum says.
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
pub(super) mod tests {
    use super::*;
    use crate::devices::legacy::PortsState;
    use crate::devices::trap::TrapState;
    use crate::template::format::{FORMAT_VERSION, FileRecord};
    use crate::vm::VmState;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    const MIB: u64 = 32;

    pub(crate) fn state() -> MachineState {
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
        write_with(directory, content, &state(), change);
    }

    fn write_with(
        directory: &Path,
        content: &[u8],
        state: &MachineState,
        change: impl FnOnce(&mut Metadata),
    ) {
        let memory = File::create(directory.join(MEMORY)).unwrap();
        memory.set_len(MIB << 20).unwrap();
        memory.write_all_at(content, 0).unwrap();
        let state = postcard::to_stdvec(state).unwrap();
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

    /// Numbers that are random and can be had again: each test prints its seed, `PICOVM_TEST_SEED` sets it.
    struct Random(u64);

    fn nanoseconds() -> u32 {
        std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap()
            .subsec_nanos()
    }

    impl Random {
        fn new() -> Self {
            let seed = std::env::var("PICOVM_TEST_SEED")
                .ok()
                .and_then(|seed| seed.parse().ok())
                .unwrap_or_else(|| u64::from(std::process::id()) << 32 | u64::from(nanoseconds()));
            println!("PICOVM_TEST_SEED={seed}");
            Self(seed)
        }

        /// A number below `end` (splitmix64).
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed ^ mixed >> 31) % end
        }
    }

    const FLIPS: usize = 500;
    const TRUNCATIONS: usize = 100;
    /// Bytes of memory that hold something in the templates below: a few chunks.
    const CONTENT: u64 = 200_000;

    /// A whole template with all that may be beside it.
    fn complete(random: &mut Random) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..CONTENT).map(|_| random.below(256) as u8).collect();
        let mut state = state();
        state.vcpus[0].regs.rip = random.below(u64::MAX);
        write_with(directory.path(), &content, &state, |_| {});
        let pages = |first, count| vec![crate::working_set::Pages { first, count }];
        let set = WorkingSet {
            written: pages(3, 100),
            read: pages(200, 1000),
        };
        store_advice(directory.path(), WORKING_SET, &postcard::to_stdvec(&set).unwrap());
        assert_eq!(damage(directory.path()), None);
        directory
    }

    /// A changed file is refused by its name, or the template is exactly what it was: nothing else is possible. What is
    /// only advice is never refused.
    fn check(directory: &Path, name: &str, before: &Metadata, what: &str) {
        let reason = damage(directory);
        match (name, &reason) {
            // Comparing again is all that a record that is gone costs.
            (VERIFIED | WORKING_SET, reason) => assert_eq!(*reason, None, "{name} {what}"),
            (_, Some(reason)) => assert!(reason.contains(name), "{name} {what}: {reason}"),
            (_, None) => assert_eq!(
                Template::read_metadata(directory).unwrap().0,
                *before,
                "{name} {what} was noticed by nobody"
            ),
        }
        if let Some(set) = recorded_working_set(directory, MIB) {
            assert!(set.fits(MIB));
        }
    }

    #[test]
    fn a_byte_flipped_anywhere_in_any_file_is_refused_by_name_or_changes_nothing() {
        let mut random = Random::new();
        let template = complete(&mut random);
        let path = template.path();
        let before = Template::read_metadata(path).unwrap().0;
        for name in [METADATA, STATE, MEMORY, WORKING_SET, VERIFIED] {
            let place = path.join(name);
            let mut noticed = 0;
            for round in 0..FLIPS {
                if name != VERIFIED {
                    // What was verified within one tick of the kernel's clock counts as unchanged.
                    let _ = fs::remove_file(path.join(VERIFIED));
                }
                let file = File::options().read(true).write(true).open(&place).unwrap();
                let length = file.metadata().unwrap().len();
                // Of the memory, what it holds as often as its holes.
                let end = if name == MEMORY && round % 2 == 0 {
                    CONTENT
                } else {
                    length
                };
                let (offset, flip) = (random.below(end), 1 + random.below(255) as u8);
                let mut byte = [0u8];
                file.read_exact_at(&mut byte, offset).unwrap();
                file.write_all_at(&[byte[0] ^ flip], offset).unwrap();
                check(path, name, &before, &format!("at {offset} by {flip:#x}"));
                noticed += usize::from(name == MEMORY && damage(path).is_some());
                file.write_all_at(&byte, offset).unwrap();
                if name == MEMORY && offset >= CONTENT.next_multiple_of(4096) {
                    // A hole again.
                    let flags =
                        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(&file, flags, offset & !0xfff, 4096).unwrap();
                }
            }
            assert!(name != MEMORY || noticed == FLIPS, "{noticed} flips were noticed");
            let _ = fs::remove_file(path.join(VERIFIED));
            assert_eq!(damage(path), None, "{name} was put back");
        }
    }

    #[test]
    fn a_file_cut_off_anywhere_is_refused_by_name() {
        let mut random = Random::new();
        let template = complete(&mut random);
        let path = template.path();
        let before = Template::read_metadata(path).unwrap().0;
        for name in [METADATA, STATE, MEMORY, WORKING_SET, VERIFIED] {
            let place = path.join(name);
            let whole = fs::metadata(&place).unwrap().len();
            let content = (name != MEMORY).then(|| fs::read(&place).unwrap());
            for round in 0..TRUNCATIONS as u64 {
                // Nothing, all but one byte, and anything in between.
                let length = match round {
                    0 => 0,
                    1 => whole - 1,
                    _ => random.below(whole),
                };
                let file = File::options().write(true).open(&place).unwrap();
                file.set_len(length).unwrap();
                check(path, name, &before, &format!("of {length} bytes"));
                if !matches!(name, WORKING_SET | VERIFIED) {
                    assert!(damage(path).is_some(), "{name} of {length} bytes");
                }
                match &content {
                    Some(content) => fs::write(&place, content).unwrap(),
                    None => file.set_len(whole).unwrap(),
                }
            }
            if name == MEMORY {
                assert!(damage(path).unwrap().contains(MEMORY), "its content is gone");
            } else {
                assert_eq!(damage(path), None, "{name} was put back");
                continue;
            }
            let again = complete(&mut random);
            fs::copy(again.path().join(MEMORY), &place).unwrap();
            for name in [METADATA, STATE] {
                fs::copy(again.path().join(name), path.join(name)).unwrap();
            }
        }
    }

    #[test]
    fn no_mixture_of_two_templates_is_opened() {
        const FILES: [&str; 3] = [METADATA, STATE, MEMORY];
        let mut random = Random::new();
        for mixture in 1..7u8 {
            let (one, other) = (complete(&mut random), complete(&mut random));
            for (bit, name) in FILES.iter().enumerate() {
                if mixture >> bit & 1 == 1 {
                    fs::copy(other.path().join(name), one.path().join(name)).unwrap();
                }
            }
            let reason = damage(one.path()).unwrap();
            // The metadata says what the other two are to be.
            let strangers = FILES[1..].iter().enumerate();
            let mut strangers = strangers.filter(|(bit, _)| mixture >> (bit + 1) & 1 != mixture & 1);
            assert!(
                strangers.any(|(_, name)| reason.contains(name)),
                "mixture {mixture:03b}: {reason}"
            );
        }
    }

    #[test]
    fn a_working_set_of_another_template_is_advice_or_nothing() {
        let mut random = Random::new();
        let template = complete(&mut random);
        for (last, taken) in [((MIB << 8) - 1, true), (MIB << 8, false)] {
            let set = WorkingSet {
                written: vec![crate::working_set::Pages {
                    first: last,
                    count: 1,
                }],
                ..WorkingSet::default()
            };
            store_advice(template.path(), WORKING_SET, &postcard::to_stdvec(&set).unwrap());
            assert_eq!(damage(template.path()), None);
            assert_eq!(recorded_working_set(template.path(), MIB).is_some(), taken);
        }
    }

    #[test]
    fn every_other_version_is_told_as_such() {
        let directory = tempfile::tempdir().unwrap();
        for format in [0, FORMAT_VERSION - 1, FORMAT_VERSION + 1, u32::MAX] {
            write(directory.path(), b"", |metadata| metadata.format = format);
            let error = Template::open(directory.path()).unwrap_err();
            assert!(
                matches!(error, TemplateError::Version { found, .. } if found == format),
                "{error}"
            );
            assert!(error.to_string().contains("build it again"), "{error}");
        }
    }

    #[test]
    fn a_template_of_another_processor_is_refused_with_both_named() {
        let made_on = Processor {
            vendor: "GenuineIntel".into(),
            signature: 0x806f8,
            features: [1; 8],
        };
        let here = Processor {
            features: [3; 8],
            ..made_on.clone()
        };
        assert!(same_processor(Path::new("t"), &made_on, made_on.clone()).is_ok());
        let error = same_processor(Path::new("t"), &made_on, here.clone()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("another processor") && text.contains("build it again"),
            "{text}"
        );
        for other in [
            Processor {
                vendor: "AuthenticAMD".into(),
                ..made_on.clone()
            },
            Processor {
                signature: 0x806f9,
                ..made_on.clone()
            },
        ] {
            let error = same_processor(Path::new("t"), &made_on, other).unwrap_err();
            assert!(matches!(error, TemplateError::Foreign { .. }), "{error}");
        }
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

//! Device slots: what every machine has at a fixed place, whatever device is in it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::block::{BackendError, Block, BlockState, FileBackend};
use super::console::{Console, ConsoleState, StreamBackend};
use super::entropy::Entropy;
use super::fs::{Fs, FsState, ShareBackend};
use super::transport::{Transport, TransportState};
use super::{Device, DeviceError};
use crate::devices::interrupt::InterruptLine;

/// Saved state of a slot: the transport's, the device's, and where to find its backend again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlotState {
    /// Control connection.
    Console {
        /// Registers and queues.
        transport: TransportState,
        /// The device.
        device: ConsoleState,
    },
    /// Disk.
    Block {
        /// Registers and queues.
        transport: TransportState,
        /// The device.
        device: BlockState,
        /// The file that it lay on.
        path: PathBuf,
    },
    /// Entropy.
    Entropy {
        /// Registers and queues.
        transport: TransportState,
    },
    /// Shared directories.
    Fs {
        /// Registers and queues.
        transport: TransportState,
        /// The device.
        device: FsState,
    },
    /// A disk of a clone's own, which has no file before.
    Storage {
        /// Registers and queues.
        transport: TransportState,
        /// The device.
        device: BlockState,
    },
}

/// A device in its slot, shared by the vCPU threads and the device thread.
#[derive(Clone)]
pub enum Slot {
    /// Control connection.
    Console(Arc<Mutex<Transport<Console>>>),
    /// Disk, and the file that it lies on; none if that is a clone's own.
    Block(Arc<Mutex<Transport<Block>>>, Option<PathBuf>),
    /// Entropy.
    Entropy(Arc<Mutex<Transport<Entropy>>>),
    /// Shared directories.
    Fs(Arc<Mutex<Transport<Fs>>>),
}

/// What a slot is made with.
pub enum SlotBackend {
    /// Control connection.
    Console(StreamBackend),
    /// Disk, and the file that it lies on; none if that is a clone's own: see [`FileBackend::storage`].
    Block(FileBackend, Option<PathBuf>),
    /// Entropy.
    Entropy,
    /// Shared directories.
    Fs(ShareBackend),
}

/// What the slots of a clone are opened from: each takes what is its own.
#[derive(Default)]
pub struct SlotSources<'a> {
    /// The host's side of the control connection.
    pub console: Option<StreamBackend>,
    /// The connection with a share server; without it nothing is shared.
    pub share: Option<ShareBackend>,
    /// The file of its storage; without it storage reads as zeros and takes no write.
    pub storage: Option<File>,
    /// Files for the disks in order, instead of those that they lay on.
    pub disks: std::vec::IntoIter<PathBuf>,
    /// By slot, what [`SlotState::open_shared`] has opened.
    pub shared: &'a [Option<FileBackend>],
}

fn lock<D>(device: &Mutex<Transport<D>>) -> MutexGuard<'_, Transport<D>> {
    // A thread that panicked while holding a device has ended its machine; the device's own data is still whole.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn shared<D: Device>(transport: Transport<D>) -> Arc<Mutex<Transport<D>>> {
    Arc::new(Mutex::new(transport))
}

macro_rules! on_transport {
    ($slot:expr, $transport:ident => $action:expr) => {
        match $slot {
            Slot::Console(device) => {
                let mut $transport = lock(device);
                $action
            }
            Slot::Block(device, _) => {
                let mut $transport = lock(device);
                $action
            }
            Slot::Entropy(device) => {
                let mut $transport = lock(device);
                $action
            }
            Slot::Fs(device) => {
                let mut $transport = lock(device);
                $action
            }
        }
    };
}

impl Slot {
    /// A device as the guest finds it after power-on.
    ///
    /// # Errors
    /// See [`Transport::new`].
    pub fn new(
        backend: SlotBackend,
        index: usize,
        memory: GuestMemoryMmap,
        line: Arc<dyn InterruptLine>,
    ) -> Result<Self, DeviceError> {
        Ok(match backend {
            SlotBackend::Console(backend) => {
                Self::Console(shared(Transport::new(Console::new(backend), memory, line)?))
            }
            SlotBackend::Block(backend, path) => Self::Block(
                shared(Transport::new(Block::new(backend, serial(index)), memory, line)?),
                path,
            ),
            SlotBackend::Entropy => Self::Entropy(shared(Transport::new(Entropy, memory, line)?)),
            SlotBackend::Fs(backend) => Self::Fs(shared(Transport::new(Fs::new(backend), memory, line)?)),
        })
    }

    /// A device as it was saved, on a backend of its own, paused.
    ///
    /// # Errors
    /// [`DeviceError::State`] if backend and state are of different kinds; see [`Transport::from_state`].
    pub fn from_state(
        backend: SlotBackend,
        index: usize,
        memory: GuestMemoryMmap,
        line: Arc<dyn InterruptLine>,
        state: &SlotState,
    ) -> Result<Self, DeviceError> {
        Ok(match (backend, state) {
            (SlotBackend::Console(backend), SlotState::Console { transport, device }) => {
                let device = Console::from_state(backend, device);
                Self::Console(shared(Transport::from_state(device, memory, line, transport)?))
            }
            (
                SlotBackend::Block(backend, path @ Some(_)),
                SlotState::Block {
                    transport, device, ..
                },
            )
            | (SlotBackend::Block(backend, path @ None), SlotState::Storage { transport, device }) => {
                let device = Block::from_state(backend, serial(index), device);
                Self::Block(
                    shared(Transport::from_state(device, memory, line, transport)?),
                    path,
                )
            }
            (SlotBackend::Entropy, SlotState::Entropy { transport }) => {
                Self::Entropy(shared(Transport::from_state(Entropy, memory, line, transport)?))
            }
            (SlotBackend::Fs(backend), SlotState::Fs { transport, device }) => {
                let device = Fs::from_state(backend, device);
                Self::Fs(shared(Transport::from_state(device, memory, line, transport)?))
            }
            _ => return Err(DeviceError::State("virtio")),
        })
    }

    /// What a clone needs to go on.
    #[must_use]
    pub fn state(&self) -> SlotState {
        match self {
            Self::Console(device) => {
                let device = lock(device);
                SlotState::Console {
                    transport: device.state(),
                    device: device.device().state(),
                }
            }
            Self::Block(device, path) => {
                let locked = lock(device);
                let (transport, device) = (locked.state(), locked.device().state());
                match path.clone() {
                    Some(path) => SlotState::Block {
                        transport,
                        device,
                        path,
                    },
                    None => SlotState::Storage { transport, device },
                }
            }
            Self::Entropy(device) => SlotState::Entropy {
                transport: lock(device).state(),
            },
            Self::Fs(device) => {
                let device = lock(device);
                SlotState::Fs {
                    transport: device.state(),
                    device: device.device().state(),
                }
            }
        }
    }

    /// A read by the guest.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        on_transport!(self, transport => transport.read(offset, data));
    }

    /// A write by the guest.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let more = on_transport!(self, transport => transport.write(offset, data));
        if let Some(queue) = more {
            self.process(queue);
        }
    }

    /// See [`Transport::pause`].
    pub fn pause(&self) {
        on_transport!(self, transport => transport.pause());
    }

    /// See [`Transport::resume`].
    #[must_use]
    pub fn resume(&self) -> Vec<usize> {
        on_transport!(self, transport => transport.resume())
    }

    /// Works on a queue until it is done or the device is paused; see [`Transport::process`].
    pub fn process(&self, queue: usize) {
        while on_transport!(self, transport => transport.process(queue)) {
            // The lock is free for this moment: it goes to who waits for it rather than at once to this thread again.
            std::thread::yield_now();
        }
    }

    /// Whether bytes from the guest wait for the slot's backend.
    #[must_use]
    pub fn output_waits(&self) -> bool {
        match self {
            Self::Console(device) => lock(device).device().waits_to_send(),
            Self::Fs(device) => lock(device).device().waits_to_send(),
            Self::Block(..) | Self::Entropy(_) => false,
        }
    }

    /// The descriptor on which the slot's backend reports events, if it has one.
    #[must_use]
    pub fn descriptor(&self) -> Option<std::os::fd::RawFd> {
        match self {
            Self::Console(device) => lock(device).device().backend().descriptor(),
            Self::Fs(device) => lock(device).device().backend().descriptor(),
            Self::Block(..) | Self::Entropy(_) => None,
        }
    }
}

/// What the guest reads as a disk's serial number: its slot, so that a disk can be found by name.
fn serial(index: usize) -> String {
    format!("picovm-slot-{index}")
}

impl SlotState {
    /// Opens what all clones have in common in this slot, so that forking one opens no file: a disk that none can write to.
    /// `None` for anything else, and for what cannot be opened: [`SlotState::open_backend`] says why.
    #[must_use]
    pub fn open_shared(&self) -> Option<FileBackend> {
        match self {
            Self::Block { device, path, .. } if device.read_only => {
                FileBackend::open_for_clone(path, device).ok()
            }
            _ => None,
        }
    }

    /// The backend that a clone needs in this slot; none if this is a second control connection.
    ///
    /// # Errors
    /// [`BackendError`] for a disk.
    pub fn open_backend(
        &self,
        index: usize,
        sources: &mut SlotSources<'_>,
    ) -> Result<Option<SlotBackend>, BackendError> {
        Ok(match self {
            Self::Console { .. } => sources.console.take().map(SlotBackend::Console),
            Self::Block { device, path, .. } => {
                let other = sources.disks.next();
                let backend = match (&other, sources.shared.get(index)) {
                    (None, Some(Some(shared))) => shared.clone(),
                    _ => FileBackend::open_for_clone(other.as_ref().unwrap_or(path), device)?,
                };
                let path = other.unwrap_or_else(|| path.clone());
                Some(SlotBackend::Block(backend, Some(path)))
            }
            Self::Entropy { .. } => Some(SlotBackend::Entropy),
            Self::Fs { .. } => Some(SlotBackend::Fs(sources.share.take().unwrap_or_default())),
            Self::Storage { device, .. } => {
                let backend = FileBackend::storage(sources.storage.take(), device.sectors)?;
                Some(SlotBackend::Block(backend, None))
            }
        })
    }
}

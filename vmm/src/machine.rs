//! A machine: booted from a kernel or built from saved state, then run, paused, saved.
//!
//! Capturing state and building from state are apart ([`Machine::save`], [`Machine::build`]), so that forking a frozen
//! template and forking a live machine differ only in where the memory comes from.

// What a guest or a file says must not end this process.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::boot::{self, BootFile};
use crate::arch::cpuid::Processor;
use crate::arch::{cpuid, layout};
use crate::config::{ConfigError, MachineConfig, STORAGE_SECTORS};
use crate::devices::bus::Devices;
use crate::devices::interrupt::{InterruptLine, KvmLine};
use crate::devices::legacy::{ConsoleLog, Ports, PortsState};
use crate::devices::trap::{Trap, TrapState};
use crate::devices::virtio::DeviceError;
use crate::devices::virtio::block::{BackendError, FileBackend};
use crate::devices::virtio::console;
use crate::devices::virtio::fs::ShareBackend;
use crate::devices::virtio::slot::{Slot, SlotBackend, SlotSources, SlotState};
use crate::memory::{self, MemoryError};
use crate::threads::{DeviceThread, ExitCounters, ExitCounts, Stop, Threads, VcpuContext, VcpuThread};
use crate::vcpu::{self, Msr, MsrList, VcpuError, VcpuState};
use crate::vm::{self, VmError, VmState};
use crate::working_set::{self, WorkingSet};

/// Why a machine could not be made, run or saved.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Kernel and boot data.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// A device.
    #[error("cannot set up a device: {0}")]
    Device(#[from] DeviceError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] BackendError),
    /// The console log.
    #[error("cannot write the console log {}: {source}", path.display())]
    ConsoleLog {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The host refused a thread or descriptor.
    #[error("cannot {attempted}: {source}")]
    Host {
        /// What was attempted.
        attempted: &'static str,
        /// What happened.
        source: io::Error,
    },
    /// Saved state makes no sense.
    #[error("the saved machine cannot be built: {0}")]
    State(&'static str),
    /// A vCPU's thread has ended.
    #[error("a vCPU's thread has ended before its time")]
    Thread,
    /// The machine is running, or has ended.
    #[error("cannot {0} a machine that is not standing still at its freeze point or in a pause")]
    NotPaused(&'static str),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest has reached its freeze point; the machine stands still and can be saved or go on.
    FreezePoint,
    /// The guest has powered itself off.
    PowerOff,
    /// The guest has reset itself: a reboot, a kernel panic or a triple fault. The console log says which.
    Reset,
    /// KVM cannot go on, for this reason.
    Crash(String),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::FreezePoint => write!(f, "it reached its freeze point"),
            Self::PowerOff => write!(f, "it powered itself off"),
            Self::Reset => write!(f, "it reset itself (a reboot, a kernel panic or a triple fault)"),
            Self::Crash(reason) => write!(f, "{reason}"),
        }
    }
}

/// Everything of a machine but its memory.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Interrupt controllers and clock.
    pub vm: VmState,
    /// vCPUs in order.
    pub vcpus: Vec<VcpuState>,
    /// Device slots in order.
    pub slots: Vec<SlotState>,
    /// Freeze trap.
    pub trap: TrapState,
    /// Serial port.
    pub ports: PortsState,
}

/// What a machine that is built from state gets of its own.
#[derive(Default)]
pub struct Backends {
    /// Files for the disks in order, instead of those of the saved machine.
    pub disks: Vec<PathBuf>,
    /// By slot, what is open already: see [`SlotState::open_shared`].
    pub shared: Vec<Option<FileBackend>>,
    /// The connection with the share server, if there is one: a socket of packets.
    pub share: Option<OwnedFd>,
    /// The file of its storage, if it has any.
    pub storage: Option<File>,
    /// Where console output goes.
    pub console_log: Option<File>,
    /// Where its threads come from.
    pub threads: Threads,
    /// The file that the memory is a private mapping of, if it is.
    pub memory_file: Option<Arc<File>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Paused,
    Running,
    Ended,
}

/// A machine. Dropping it ends it and leaves nothing.
pub struct Machine {
    // Threads first: they hold the vCPUs, which go before the VM, which goes before the memory.
    vcpus: Vec<VcpuThread>,
    device_thread: Option<DeviceThread>,
    devices: Arc<Devices>,
    kvm: Arc<Kvm>,
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap,
    memory_mib: u64,
    /// The file that memory was mapped from.
    origin: Option<Arc<File>>,
    processor: Processor,
    connection: Option<UnixStream>,
    stops: Receiver<(u8, Stop)>,
    stopped: Arc<EventFd>,
    running: Vec<bool>,
    phase: Phase,
    /// A stop that a pause met, for the next wait.
    pending: Option<Stop>,
    /// The paravirtual clock to set when the machine first runs: until then its time stands still.
    clock: Option<kvm_clock_data>,
    exits: Arc<ExitCounters>,
    /// What to save of the model-specific registers, if that was found out already.
    msrs: Option<Arc<MsrList>>,
}

/// What a machine needs open to boot, so that the process that boots it need not be able to open anything.
pub struct BootFiles {
    kvm: Arc<Kvm>,
    kernel: BootFile,
    initramfs: Option<BootFile>,
    disks: Vec<FileBackend>,
    console_log: Option<File>,
}

impl BootFiles {
    /// Checks a configuration against what this host has, and opens what it names.
    ///
    /// # Errors
    /// [`MachineError`] names what is wrong; nothing is left behind.
    pub fn open(config: &MachineConfig) -> Result<Self, MachineError> {
        config.check()?;
        memory::check_size(config.memory_mib)?;
        let kvm = Arc::new(vm::open_kvm()?);
        let kernel = BootFile::kernel(&config.kernel)?;
        let initramfs = config.initramfs.as_deref().map(BootFile::initramfs).transpose()?;
        let mut disks = Vec::with_capacity(config.disks.len());
        for disk in &config.disks {
            disks.push(
                FileBackend::open(&disk.path, disk.read_only)?.with_capacity(&disk.path, disk.sectors)?,
            );
        }
        let console_log = match &config.console_log {
            Some(path) => Some(File::create(path).map_err(|source| MachineError::ConsoleLog {
                path: path.clone(),
                source,
            })?),
            None => None,
        };
        Ok(Self {
            kvm,
            kernel,
            initramfs,
            disks,
            console_log,
        })
    }

    /// The descriptors that the process that boots must keep.
    #[must_use]
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        // SAFETY: /dev/kvm is open for as long as these files, which are borrowed.
        let kvm = unsafe { BorrowedFd::borrow_raw(self.kvm.as_raw_fd()) };
        let mut all = vec![kvm, self.kernel.as_fd()];
        all.extend(self.initramfs.as_ref().map(AsFd::as_fd));
        all.extend(self.disks.iter().filter_map(FileBackend::descriptor));
        all.extend(self.console_log.as_ref().map(AsFd::as_fd));
        all
    }
}

fn host(attempted: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Host { attempted, source }
}

impl Machine {
    /// Makes a machine from its configuration, ready to be started at the kernel's entry.
    ///
    /// # Errors
    /// [`MachineError`] names what is wrong; nothing is left behind.
    pub fn boot(config: &MachineConfig) -> Result<Self, MachineError> {
        Self::boot_from(config, BootFiles::open(config)?, Threads::default())
    }

    /// As [`Machine::boot`], from files that are open already, with threads from here.
    ///
    /// # Errors
    /// As [`Machine::boot`].
    pub fn boot_from(
        config: &MachineConfig,
        files: BootFiles,
        threads: Threads,
    ) -> Result<Self, MachineError> {
        config.check()?;
        let kvm = files.kvm;
        let memory = memory::anonymous(config.memory_mib)?;
        let entry = boot::load(
            &memory,
            files.kernel,
            files.initramfs,
            &config.cmdline(),
            config.vcpus,
        )?;
        tracing::info!(kernel = %config.kernel.display(), entry = entry.0, "kernel and boot data loaded");
        let vm = Arc::new(vm::create(&kvm, &memory)?);

        let (backend, connection) = console::connection().map_err(host("create the control connection"))?;
        let mut backends = vec![
            SlotBackend::Console(backend),
            SlotBackend::Entropy,
            SlotBackend::Fs(ShareBackend::default()),
        ];
        for (backend, disk) in files.disks.into_iter().zip(&config.disks) {
            backends.push(SlotBackend::Block(backend, Some(disk.path.clone())));
        }
        backends.push(SlotBackend::Block(
            FileBackend::storage(None, STORAGE_SECTORS)?,
            None,
        ));
        let slots = backends
            .into_iter()
            .enumerate()
            .map(|(index, backend)| Slot::new(backend, index, memory.clone(), line(&vm, index)))
            .collect::<Result<Vec<_>, _>>()?;

        tracing::info!("VM and devices made");
        let supported = vm::supported_cpuid(&kvm)?;
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let vcpu = create_vcpu(&vm, index)?;
            let cpuid = cpuid::for_vcpu(&supported, index, config.vcpus)
                .map_err(|_| MachineError::State("CPUID has too many entries"))?;
            ioctl(index, "set the CPUID", vcpu.set_cpuid2(&cpuid))?;
            if index == 0 {
                let mut sregs = ioctl(index, "read the control registers", vcpu.get_sregs())?;
                boot::enter_long_mode(&mut sregs);
                ioctl(index, "set the control registers", vcpu.set_sregs(&sregs))?;
                ioctl(
                    index,
                    "set the registers",
                    vcpu.set_regs(&boot::entry_registers(entry)),
                )?;
            }
            vcpus.push((vcpu, None));
        }

        let ports = Ports::new(serial_line(&vm), ConsoleLog::new(files.console_log));
        let parts = Parts {
            kvm,
            vm,
            memory,
            memory_mib: config.memory_mib,
            processor: Processor::of(&supported),
            slots,
            trap: if config.stop_at_base {
                Trap::with_base()
            } else {
                Trap::default()
            },
            ports,
            connection,
            vcpus,
            clock: None,
            origin: None,
            threads,
        };
        Self::assemble(parts)
    }

    /// Builds a machine from saved state over memory that holds what the saved machine's held. It stands still.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind.
    pub fn build(
        kvm: &Arc<Kvm>,
        processor: &Processor,
        memory: GuestMemoryMmap,
        state: &MachineState,
        own: Backends,
    ) -> Result<Self, MachineError> {
        if state.vcpus.is_empty() || state.vcpus.len() > usize::from(layout::VCPUS_MAX) {
            return Err(MachineError::State("it has no vCPU or too many"));
        }
        if state.slots.len() > layout::VIRTIO_DEVICES_MAX {
            return Err(MachineError::State("it has too many devices"));
        }
        let vm = Arc::new(vm::create(kvm, &memory)?);
        vm::load_irqchips(&vm, &state.vm)?;

        let mut vcpus = Vec::with_capacity(state.vcpus.len());
        for (index, saved) in (0u8..).zip(&state.vcpus) {
            let vcpu = create_vcpu(&vm, index)?;
            vcpu::load(&vcpu, index, saved)?;
            vcpus.push((vcpu, Some(saved.time())));
        }

        let (backend, connection) = console::connection().map_err(host("create the control connection"))?;
        let share = own.share.map(ShareBackend::new).transpose();
        let mut sources = SlotSources {
            console: Some(backend),
            share: share.map_err(host("use the connection with a share server"))?,
            storage: own.storage,
            disks: own.disks.into_iter(),
            shared: &own.shared,
        };
        let mut slots = Vec::with_capacity(state.slots.len());
        for (index, saved) in state.slots.iter().enumerate() {
            let backend = saved
                .open_backend(index, &mut sources)?
                .ok_or(MachineError::State("it has more than one control connection"))?;
            slots.push(Slot::from_state(
                backend,
                index,
                memory.clone(),
                line(&vm, index),
                saved,
            )?);
        }

        let ports = Ports::from_state(&state.ports, serial_line(&vm), ConsoleLog::new(own.console_log))
            .ok_or(MachineError::State("its serial port holds more than one can"))?;
        let parts = Parts {
            kvm: kvm.clone(),
            vm,
            memory,
            memory_mib: state.memory_mib,
            processor: processor.clone(),
            slots,
            trap: Trap::from_state(&state.trap),
            ports,
            connection,
            vcpus,
            clock: Some(state.vm.clock),
            origin: own.memory_file,
            threads: own.threads,
        };
        Self::assemble(parts)
    }

    fn assemble(parts: Parts) -> Result<Self, MachineError> {
        let devices = Arc::new(Devices {
            ports: Mutex::new(parts.ports),
            trap: Mutex::new(parts.trap),
            slots: parts.slots,
        });
        let (sender, stops): (Sender<(u8, Stop)>, _) = channel();
        let stopped =
            EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(host("create an eventfd"))?;
        let stopped = Arc::new(stopped);
        let exits = Arc::new(ExitCounters::default());
        let mut threads = parts.threads;
        let mut vcpus = Vec::with_capacity(parts.vcpus.len());
        for (index, (vcpu, time)) in (0u8..).zip(parts.vcpus) {
            let context = VcpuContext {
                index,
                devices: devices.clone(),
                stops: sender.clone(),
                stopped: stopped.clone(),
                exits: exits.clone(),
                time,
            };
            vcpus
                .push(VcpuThread::begin(&mut threads, vcpu, context).map_err(host("start a vCPU's thread"))?);
        }
        let device_thread =
            DeviceThread::begin(&mut threads, &devices).map_err(host("start the device thread"))?;
        Ok(Self {
            running: vec![false; vcpus.len()],
            vcpus,
            device_thread: Some(device_thread),
            devices,
            kvm: parts.kvm,
            vm: parts.vm,
            memory: parts.memory,
            memory_mib: parts.memory_mib,
            origin: parts.origin,
            processor: parts.processor,
            connection: Some(parts.connection),
            stops,
            stopped,
            phase: Phase::Paused,
            pending: None,
            clock: parts.clock,
            exits,
            msrs: None,
        })
    }

    /// The host's end of the control connection: what the guest writes to its port named
    /// [`picovm_guest_protocol::CONTROL_PORT_NAME`] is read here, and the other way round. Given once.
    pub fn take_connection(&mut self) -> Option<UnixStream> {
        self.connection.take()
    }

    /// Whether bytes that the guest has written to the control connection wait for the other end to be read.
    #[must_use]
    pub fn output_waits(&self) -> bool {
        self.devices.slots.iter().any(Slot::output_waits)
    }

    /// Lets the machine run. Without effect on one that runs, and on one that stopped by itself when it was paused:
    /// [`Machine::wait`] tells that first.
    ///
    /// # Errors
    /// [`MachineError::NotPaused`] if it has ended.
    pub fn start(&mut self) -> Result<(), MachineError> {
        if self.pending.is_some() {
            return Ok(());
        }
        match self.phase {
            Phase::Running => return Ok(()),
            Phase::Ended => return Err(MachineError::NotPaused("start")),
            Phase::Paused => {}
        }
        if let Some(clock) = self.clock.take() {
            vm::load_clock(&self.vm, &clock)?;
        }
        self.phase = Phase::Running;
        let mut unfinished = Some(self.devices.resume());
        for (vcpu, running) in self.vcpus.iter().zip(&mut self.running) {
            *running = true;
            vcpu.run(unfinished.take().unwrap_or_default());
        }
        Ok(())
    }

    /// A descriptor that is readable once the machine has stopped by itself: [`Machine::wait`] will not block then.
    #[must_use]
    pub fn stopped_descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as the machine is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.stopped.as_raw_fd()) }
    }

    /// Waits until a running machine stops by itself, at most `timeout`; `None`: it still runs. After an outcome the
    /// machine stands still.
    ///
    /// # Errors
    /// [`MachineError::NotPaused`] if it was not started, [`MachineError::Thread`].
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Option<Outcome>, MachineError> {
        if let Some(stop) = self.pending.take() {
            let _ = self.stopped.read();
            return Ok(outcome(stop));
        }
        if self.phase != Phase::Running {
            return Err(MachineError::NotPaused("wait for"));
        }
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let (index, stop) = match deadline {
            None => self.stops.recv().map_err(|_| MachineError::Thread)?,
            Some(deadline) => {
                match self
                    .stops
                    .recv_timeout(deadline.saturating_duration_since(Instant::now()))
                {
                    Ok(stop) => stop,
                    Err(RecvTimeoutError::Timeout) => return Ok(None),
                    Err(RecvTimeoutError::Disconnected) => return Err(MachineError::Thread),
                }
            }
        };
        let first = self.note(index, stop);
        let stop = self.halt(first)?;
        let _ = self.stopped.read();
        Ok(outcome(stop))
    }

    /// [`Machine::start`] and [`Machine::wait`]: `Ok(None)` if `timeout` has passed; the machine then still runs.
    ///
    /// # Errors
    /// See both.
    pub fn run(&mut self, timeout: Option<Duration>) -> Result<Option<Outcome>, MachineError> {
        self.start()?;
        self.wait(timeout)
    }

    /// Lets a running machine stand still at the next instruction. If it stops by itself at this very moment, the next
    /// [`Machine::wait`] tells so.
    ///
    /// # Errors
    /// [`MachineError::Thread`].
    pub fn pause(&mut self) -> Result<(), MachineError> {
        if self.phase == Phase::Running {
            let stop = self.halt(Stop::Paused)?;
            self.pending = Some(stop).filter(|stop| *stop != Stop::Paused);
        }
        Ok(())
    }

    fn note(&mut self, index: u8, stop: Stop) -> Stop {
        if let Some(running) = self.running.get_mut(usize::from(index)) {
            *running = false;
        }
        stop
    }

    /// Stops every vCPU that runs, and the devices. Returns why the machine stopped, of `stop` and what else its vCPUs
    /// have to tell: what ends the machine rather than a freeze point reached at the same time.
    fn halt(&mut self, mut stop: Stop) -> Result<Stop, MachineError> {
        for (vcpu, running) in self.vcpus.iter().zip(&self.running) {
            if *running {
                vcpu.pause();
            }
        }
        // While vCPUs still run: one may be at work for a queue that another keeps filling. What a device leaves undone
        // it finds when it is resumed.
        self.devices.pause();
        while self.running.contains(&true) {
            let (index, other) = self.stops.recv().map_err(|_| MachineError::Thread)?;
            let other = self.note(index, other);
            if stop == Stop::Paused || stop == Stop::FreezePoint && other != Stop::Paused {
                stop = other;
            }
        }
        self.phase = match stop {
            Stop::Paused | Stop::FreezePoint => Phase::Paused,
            Stop::PowerOff | Stop::Reset | Stop::Crash(_) => Phase::Ended,
        };
        Ok(stop)
    }

    /// Does ahead what saving needs of KVM beside the machine itself, for a process that may not do that any more once its guest
    /// has run.
    ///
    /// # Errors
    /// [`MachineError::Vcpu`], [`MachineError::Vm`].
    pub fn prepare_save(&mut self) -> Result<(), MachineError> {
        if self.msrs.is_none() {
            self.msrs = Some(Arc::new(msr_list(&self.kvm)?));
        }
        Ok(())
    }

    /// Captures everything but the memory of a machine that stands still.
    ///
    /// # Errors
    /// [`MachineError::NotPaused`], [`MachineError::Vcpu`], [`MachineError::Vm`].
    pub fn save(&mut self) -> Result<MachineState, MachineError> {
        if self.phase != Phase::Paused {
            return Err(MachineError::NotPaused("save"));
        }
        let msrs = match &self.msrs {
            Some(msrs) => msrs.clone(),
            None => Arc::new(msr_list(&self.kvm)?),
        };
        let saved = self
            .vcpus
            .iter()
            .map(|vcpu| {
                vcpu.save(&msrs)
                    .ok_or(MachineError::Thread)?
                    .map_err(MachineError::from)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut vm = vm::save(&self.vm)?;
        // The guest's time stands still while the machine does: a timer that would go off meanwhile is not to go off first
        // thing in every clone. The last vCPU to stop tells how much that is.
        let rate = saved.first().map_or(0, |saved| saved.state.tsc_khz);
        let since_stop = match rate {
            // Where KVM does not know it, counter and clock could not be set back alike.
            0 => 0,
            _ => saved.iter().map(|saved| saved.since_stop).min().unwrap_or(0),
        };
        if let Some(clock) = self.clock {
            vm.clock = clock;
        } else {
            vm.rewind_clock(since_stop, rate);
        }
        let vcpus = saved
            .into_iter()
            .map(|saved| {
                let mut state = saved.state;
                state.rewind(since_stop);
                state
            })
            .collect();
        Ok(MachineState {
            memory_mib: self.memory_mib,
            vm,
            vcpus,
            slots: self.devices.slots.iter().map(Slot::state).collect(),
            trap: self
                .devices
                .trap
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .state(),
            ports: self
                .devices
                .ports
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .state(),
        })
    }

    /// Makes [`Machine::working_set`] exact, of a clone that has not run yet; see [`working_set::watch`].
    ///
    /// # Errors
    /// As it says.
    pub fn watch_working_set(&self) -> io::Result<()> {
        match &self.origin {
            Some(file) => working_set::watch(&self.memory, file),
            // No page of it is a file's, and so none is mapped because its neighbour is read.
            None => Ok(()),
        }
    }

    /// Which pages of memory the machine has touched since it was forked.
    ///
    /// # Errors
    /// As reading `/proc/self/pagemap`.
    pub fn working_set(&self) -> io::Result<WorkingSet> {
        WorkingSet::of(&self.memory)
    }

    /// As [`Machine::working_set`], from this process's `/proc/self/pagemap`, which is open already.
    ///
    /// # Errors
    /// As reading it.
    pub fn working_set_by(&self, pagemap: &File) -> io::Result<WorkingSet> {
        WorkingSet::by(pagemap, &self.memory)
    }

    /// Makes pages present before they are needed, in this process and in the second-stage page tables, of a machine that
    /// stands still. It is advice, see [`WorkingSet::populate_written`]: nothing fails without it.
    ///
    /// # Errors
    /// [`MachineError::NotPaused`].
    pub fn prefault(&mut self, set: &WorkingSet) -> Result<(), MachineError> {
        if self.phase != Phase::Paused {
            return Err(MachineError::NotPaused("prefault the memory of"));
        }
        set.populate_written(&self.memory);
        // The tables are those of the VM: one vCPU fills them for all. KVM has the pages that are only read faulted in.
        if let Some(vcpu) = self.vcpus.first() {
            vcpu.prefault(set.guest_ranges(&self.memory));
        }
        Ok(())
    }

    /// The last console output, 8 KiB at most, for the message about a machine that ended badly.
    #[must_use]
    pub fn console_tail(&self) -> String {
        self.devices
            .ports
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .console_tail()
    }

    /// The file that memory is a private mapping of: what is not touched is as there.
    pub(crate) fn origin(&self) -> Option<&File> {
        self.origin.as_deref()
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The processor that the guest runs on.
    #[must_use]
    pub fn processor(&self) -> &Processor {
        &self.processor
    }

    /// How often the vCPUs have come back to user space.
    #[must_use]
    pub fn exits(&self) -> ExitCounts {
        self.exits.read()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // All at once: each thread that is joined waits for its vCPU to leave the guest.
        for vcpu in &self.vcpus {
            vcpu.pause();
        }
        self.devices.pause();
        self.vcpus.clear();
        self.device_thread = None;
    }
}

fn outcome(stop: Stop) -> Option<Outcome> {
    Some(match stop {
        Stop::FreezePoint => Outcome::FreezePoint,
        Stop::PowerOff => Outcome::PowerOff,
        Stop::Reset => Outcome::Reset,
        Stop::Crash(reason) => Outcome::Crash(reason),
        Stop::Paused => return None,
    })
}

struct Parts {
    kvm: Arc<Kvm>,
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap,
    memory_mib: u64,
    processor: Processor,
    slots: Vec<Slot>,
    trap: Trap,
    ports: Ports,
    connection: UnixStream,
    /// With the time that each is given when it first runs.
    vcpus: Vec<(VcpuFd, Option<Vec<Msr>>)>,
    clock: Option<kvm_clock_data>,
    origin: Option<Arc<File>>,
    threads: Threads,
}

fn ioctl<T>(
    index: u8,
    attempted: &'static str,
    result: Result<T, kvm_ioctls::Error>,
) -> Result<T, MachineError> {
    result.map_err(|source| {
        VcpuError::Ioctl {
            attempted,
            index,
            source,
        }
        .into()
    })
}

fn create_vcpu(vm: &VmFd, index: u8) -> Result<VcpuFd, MachineError> {
    ioctl(index, "create the vCPU", vm.create_vcpu(u64::from(index)))
}

/// What to save of the model-specific registers. A vCPU that has never run, of a VM made for it alone, tells their
/// values from the start: saving is not on the path of a clone, booting and cloning are.
fn msr_list(kvm: &Kvm) -> Result<MsrList, MachineError> {
    let vm_error = |attempted| move |source| VmError::Ioctl { attempted, source };
    let numbers = kvm
        .get_msr_index_list()
        .map_err(vm_error("list the model-specific registers"))?
        .as_slice()
        .to_vec();
    let vm = kvm.create_vm().map_err(vm_error("create a VM"))?;
    vm.create_irq_chip()
        .map_err(vm_error("create the interrupt controllers"))?;
    let vcpu = create_vcpu(&vm, 0)?;
    let cpuid = cpuid::for_vcpu(&vm::supported_cpuid(kvm)?, 0, 1)
        .map_err(|_| MachineError::State("CPUID has too many entries"))?;
    ioctl(0, "set the CPUID", vcpu.set_cpuid2(&cpuid))?;
    let fresh = vcpu::read_msrs(&vcpu, 0, &numbers)?;
    Ok(MsrList { numbers, fresh })
}

fn serial_line(vm: &Arc<VmFd>) -> Arc<dyn InterruptLine> {
    Arc::new(KvmLine::new(vm.clone(), layout::SERIAL_IRQ))
}

fn line(vm: &Arc<VmFd>, slot: usize) -> Arc<dyn InterruptLine> {
    Arc::new(KvmLine::new(
        vm.clone(),
        layout::VIRTIO_IRQ.saturating_add(slot as u32),
    ))
}

//! The threads of a machine: one for each vCPU, which also serves the devices that its guest talks to, and one for
//! what comes from the backends.

mod ahead;

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tracing::{debug, warn};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use ahead::Waiting;
pub use ahead::{OnThread, ThreadKind, Threads};

use crate::devices::bus::{Devices, Unfinished};
use crate::devices::trap::TrapAction;
use crate::devices::virtio::slot::Slot;
use crate::vcpu::{self, Msr, MsrList, VcpuError, VcpuState};

/// Why a vCPU no longer runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It was asked to pause.
    Paused,
    /// It wrote to the freeze register, and the write is completed.
    FreezePoint,
    /// The guest has powered itself off.
    PowerOff,
    /// The guest has reset itself, by the keyboard controller or by a triple fault.
    Reset,
    /// KVM cannot go on.
    Crash(String),
}

/// How often a machine's vCPUs came back to user space, by reason.
#[derive(Debug, Default)]
pub struct ExitCounters {
    port: AtomicU64,
    memory: AtomicU64,
    interrupted: AtomicU64,
}

/// A reading of [`ExitCounters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitCounts {
    /// Port I/O.
    pub port: u64,
    /// Accesses to device registers.
    pub memory: u64,
    /// Signals, pauses among them.
    pub interrupted: u64,
}

impl ExitCounters {
    /// The counts so far.
    #[must_use]
    pub fn read(&self) -> ExitCounts {
        ExitCounts {
            port: self.port.load(Ordering::Relaxed),
            memory: self.memory.load(Ordering::Relaxed),
            interrupted: self.interrupted.load(Ordering::Relaxed),
        }
    }
}

enum Command {
    Run(Unfinished),
    Prefault(Vec<(u64, u64)>, Sender<()>),
    Save(Arc<MsrList>, Sender<Box<Result<Saved, VcpuError>>>),
}

/// A captured vCPU.
pub struct Saved {
    /// Its state as it is.
    pub state: VcpuState,
    /// How far its time stamp counter has gone on since it stopped.
    pub since_stop: u64,
}

/// A way to get a vCPU thread out of the guest without a race: `immediate_exit` (KVM API 5, `struct kvm_run`) covers
/// the moments in which the signal would be lost.
#[derive(Default)]
struct Kick {
    wanted: AtomicBool,
    immediate_exit: AtomicPtr<u8>,
    /// Held while the pointer is used, and while it is taken away.
    alive: Mutex<()>,
}

impl Kick {
    fn set_immediate_exit(&self, value: u8) {
        let _alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner);
        let pointer = self.immediate_exit.load(Ordering::Relaxed);
        if !pointer.is_null() {
            // SAFETY: the pointer leads into the vCPU's `kvm_run` page, which stays mapped until the thread has
            // cleared the pointer under the lock. The byte is shared with the kernel and accessed atomically.
            unsafe { AtomicU8::from_ptr(pointer) }.store(value, Ordering::SeqCst);
        }
    }
}

/// A vCPU's thread, seen from its machine. Dropping it ends the thread.
pub struct VcpuThread {
    thread: Waiting<VcpuWork>,
    commands: Option<Sender<Command>>,
    kick: Arc<Kick>,
}

/// What a vCPU's thread needs beside the vCPU.
pub struct VcpuContext {
    /// Which vCPU.
    pub index: u8,
    /// What the guest talks to.
    pub devices: Arc<Devices>,
    /// Where stops are told, with the vCPU's index.
    pub stops: Sender<(u8, Stop)>,
    /// Raised with every stop that the machine did not ask for.
    pub stopped: Arc<EventFd>,
    /// Counts.
    pub exits: Arc<ExitCounters>,
    /// Time to load when it first runs; see [`VcpuState::time`].
    pub time: Option<Vec<Msr>>,
}

/// What a vCPU's thread waits for.
struct VcpuWork {
    vcpu: VcpuFd,
    context: VcpuContext,
    kick: Arc<Kick>,
    inbox: Receiver<Command>,
}

impl VcpuWork {
    fn run(mut self) {
        serve(&mut self.vcpu, &mut self.context, &self.kick, &self.inbox);
        let _alive = self.kick.alive.lock().unwrap_or_else(PoisonError::into_inner);
        self.kick
            .immediate_exit
            .store(std::ptr::null_mut(), Ordering::Relaxed);
    }
}

fn kick_signal() -> i32 {
    SIGRTMIN()
}

impl VcpuThread {
    /// Gives a thread its vCPU, which does not run yet.
    ///
    /// # Errors
    /// As thread creation.
    pub fn begin(threads: &mut Threads, mut vcpu: VcpuFd, context: VcpuContext) -> std::io::Result<Self> {
        let kick = Arc::new(Kick::default());
        let run: *mut kvm_bindings::kvm_run = vcpu.get_kvm_run();
        // SAFETY: only the field's address is taken, of a page that lives as long as the vCPU.
        kick.immediate_exit
            .store(unsafe { &raw mut (*run).immediate_exit }, Ordering::Relaxed);
        let (commands, inbox) = channel();
        let mut thread = threads.vcpu(context.index)?;
        thread.give(VcpuWork {
            vcpu,
            context,
            kick: kick.clone(),
            inbox,
        });
        Ok(Self {
            thread,
            commands: Some(commands),
            kick,
        })
    }

    /// Lets the vCPU run until it stops by itself or by [`VcpuThread::pause`]. Before that its thread does what the devices
    /// have left: work that its guest may have made endless, and a pause ends.
    pub fn run(&self, unfinished: Unfinished) {
        self.kick.wanted.store(false, Ordering::SeqCst);
        self.kick.set_immediate_exit(0);
        self.send(Command::Run(unfinished));
    }

    /// Asks a running vCPU to stop. The stop is told like every other.
    pub fn pause(&self) {
        self.kick.wanted.store(true, Ordering::SeqCst);
        self.kick.set_immediate_exit(1);
        if let Some(thread) = self.thread.handle()
            && let Err(error) = thread.kill(kick_signal())
        {
            debug!(%error, "the vCPU's thread has ended");
        }
    }

    /// Captures the state of a stopped vCPU.
    ///
    /// # Errors
    /// [`VcpuError`]; `None` if the thread has ended.
    pub fn save(&self, msrs: &Arc<MsrList>) -> Option<Result<Saved, VcpuError>> {
        let (reply, answer) = channel();
        self.send(Command::Save(msrs.clone(), reply));
        answer.recv().ok().map(|saved| *saved)
    }

    /// Maps guest-physical ranges (address and size in bytes) for a stopped vCPU: see [`vcpu::prefault`].
    pub fn prefault(&self, ranges: Vec<(u64, u64)>) {
        let (done, answer) = channel();
        self.send(Command::Prefault(ranges, done));
        let _ = answer.recv();
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // The thread ends only after this sender is dropped.
            let _ = commands.send(command);
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.commands = None;
        self.pause();
        self.thread.join("a vCPU's thread");
    }
}

fn serve(vcpu: &mut VcpuFd, context: &mut VcpuContext, kick: &Kick, inbox: &Receiver<Command>) {
    // Where the time stamp counter stood when the guest stopped.
    let mut stopped_at = None;
    while let Ok(command) = inbox.recv() {
        match command {
            Command::Run(unfinished) => {
                context.devices.finish(&unfinished);
                let stop = match load_time(vcpu, context) {
                    Ok(()) => run(vcpu, context, kick),
                    Err(error) => Stop::Crash(error.to_string()),
                };
                stopped_at = match stop {
                    Stop::Paused | Stop::FreezePoint => vcpu::read_tsc(vcpu, context.index).ok().flatten(),
                    Stop::PowerOff | Stop::Reset | Stop::Crash(_) => None,
                };
                // Before the stop is told: whoever receives it lowers the eventfd again, and one that is raised after
                // that would announce a stop of the next run.
                if stop != Stop::Paused {
                    let _ = context.stopped.write(1);
                }
                let _ = context.stops.send((context.index, stop));
            }
            Command::Prefault(ranges, done) => {
                vcpu::prefault(vcpu, &ranges);
                enter_once(vcpu, kick);
                let _ = done.send(());
            }
            Command::Save(msrs, reply) => {
                // In a box, as a queue has room for dozens from the start.
                let _ = reply.send(Box::new(save(vcpu, context, &msrs, stopped_at)));
            }
        }
    }
}

/// Gives a vCPU that runs for the first time its time.
fn load_time(vcpu: &VcpuFd, context: &mut VcpuContext) -> Result<(), VcpuError> {
    match context.time.take() {
        Some(time) => vcpu::load_time(vcpu, context.index, &time),
        None => Ok(()),
    }
}

fn save(
    vcpu: &VcpuFd,
    context: &VcpuContext,
    msrs: &MsrList,
    stopped_at: Option<u64>,
) -> Result<Saved, VcpuError> {
    let state = vcpu::save(vcpu, context.index, msrs)?;
    if let Some(time) = &context.time {
        return Ok(Saved {
            state: state.with_time(time),
            since_stop: 0,
        });
    }
    let since_stop = match (state.tsc(), stopped_at) {
        (Some(now), Some(then)) => now.saturating_sub(then),
        _ => 0,
    };
    Ok(Saved { state, since_stop })
}

fn run(vcpu: &mut VcpuFd, context: &VcpuContext, kick: &Kick) -> Stop {
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&context.exits.memory);
                context.devices.read_memory(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&context.exits.memory);
                match context.devices.write_memory(address, data) {
                    TrapAction::Continue => {}
                    TrapAction::PowerOff => return Stop::PowerOff,
                    TrapAction::FreezePoint => return complete(vcpu, kick),
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&context.exits.port);
                context.devices.read_port(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&context.exits.port);
                if context.devices.write_port(port, data) {
                    return Stop::Reset;
                }
            }
            Ok(VcpuExit::Shutdown) => return Stop::Reset,
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Stop::Crash(format!(
                    "the processor refused to enter the guest (hardware reason {reason:#x} on processor {cpu})"
                ));
            }
            Ok(VcpuExit::InternalError) => {
                return Stop::Crash(
                    "KVM could not emulate an instruction of the guest. This happens where KVM interprets kernel \
                     code instead of running it; `picovm doctor` tells"
                        .into(),
                );
            }
            Ok(exit) => return Stop::Crash(format!("KVM stopped with {exit:?}")),
            Err(error) => match error.errno() {
                libc::EINTR => {
                    count(&context.exits.interrupted);
                    // Only here: KVM has completed the last access before it looked at `immediate_exit`.
                    if kick.wanted.load(Ordering::SeqCst) {
                        return Stop::Paused;
                    }
                }
                libc::EAGAIN => {}
                _ => return Stop::Crash(format!("KVM_RUN failed: {error}")),
            },
        }
    }
}

/// Enters a vCPU and comes back before its first instruction. What KVM does at the first entry of a VM (a thread of its own
/// for the recovery of large pages, 0.1 ms) is done then.
fn enter_once(vcpu: &mut VcpuFd, kick: &Kick) {
    kick.set_immediate_exit(1);
    // `EINTR`, or what is wrong shows at the next entry.
    let _ = vcpu.run();
    kick.set_immediate_exit(0);
}

/// Completes the access that led here: KVM moves the instruction pointer only at the next entry (KVM API 5,
/// `KVM_EXIT_MMIO`).
fn complete(vcpu: &mut VcpuFd, kick: &Kick) -> Stop {
    kick.set_immediate_exit(1);
    let completed = vcpu.run().map(|exit| format!("{exit:?}"));
    kick.set_immediate_exit(0);
    match completed {
        Err(error) if error.errno() == libc::EINTR => Stop::FreezePoint,
        Err(error) => Stop::Crash(format!("cannot complete the access at the freeze point: {error}")),
        Ok(exit) => Stop::Crash(format!("cannot complete the access at the freeze point: {exit}")),
    }
}

/// The thread that waits for the backends. Dropping it ends the thread.
pub struct DeviceThread {
    thread: Waiting<DeviceWork>,
    end: Arc<EventFd>,
}

/// What the device thread waits for.
struct DeviceWork {
    manager: EventManager<Box<dyn MutEventSubscriber + Send>>,
    ended: Arc<AtomicBool>,
}

impl DeviceWork {
    fn run(mut self) {
        while !self.ended.load(Ordering::Relaxed) {
            if let Err(error) = self.manager.run() {
                warn!(%error, "waiting for the backends failed");
                break;
            }
        }
    }
}

struct BackendEvents {
    slot: Slot,
    descriptor: RawFd,
}

impl MutEventSubscriber for BackendEvents {
    fn init(&mut self, ops: &mut EventOps) {
        // Edge-triggered, both ways, always: a full backend that drains raises an edge, and bytes that the guest had
        // no room for are fetched when it makes room, so there is no interest to keep up to date.
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new_raw(self.descriptor, events)) {
            warn!(%error, "cannot watch a backend");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.event_set().contains(EventSet::OUT) {
            self.slot.process(1);
        }
        if events
            .event_set()
            .intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP)
        {
            self.slot.process(0);
        }
        if self.slot.descriptor().is_none() {
            let _ = ops.remove(Events::empty_raw(self.descriptor));
        }
    }
}

struct End(Arc<EventFd>, Arc<AtomicBool>);

impl MutEventSubscriber for End {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&*self.0, EventSet::IN)) {
            warn!(%error, "cannot watch for the end of the machine");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.1.store(true, Ordering::Relaxed);
    }
}

impl DeviceThread {
    /// Watches the backends of all slots that have events.
    ///
    /// # Errors
    /// As thread, epoll and eventfd creation.
    pub fn begin(threads: &mut Threads, devices: &Devices) -> std::io::Result<Self> {
        let end = Arc::new(EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?);
        let ended = Arc::new(AtomicBool::new(false));
        let mut manager =
            EventManager::<Box<dyn MutEventSubscriber + Send>>::new().map_err(std::io::Error::other)?;
        manager.add_subscriber(Box::new(End(end.clone(), ended.clone())));
        for slot in &devices.slots {
            if let Some(descriptor) = slot.descriptor() {
                manager.add_subscriber(Box::new(BackendEvents {
                    slot: slot.clone(),
                    descriptor,
                }));
            }
        }
        let mut thread = threads.device()?;
        thread.give(DeviceWork { manager, ended });
        Ok(Self { thread, end })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        let _ = self.end.write(1);
        self.thread.join("the device thread");
    }
}

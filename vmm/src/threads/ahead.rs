//! Threads that are made, and confined, before there is a machine for them to work for: so that neither is on the path of its start.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use tracing::warn;
use vmm_sys_util::signal::{register_signal_handler, unblock_signal};

use super::{DeviceWork, VcpuWork, kick_signal};

/// What a thread of a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU, and serves the devices that its guest talks to.
    Vcpu,
    /// Waits for what comes from the backends.
    Device,
}

/// Called first thing in a thread of a machine. It has no way to refuse: who cannot do without what it does ends the process.
pub type OnThread = Arc<dyn Fn(ThreadKind) + Send + Sync>;

/// Where a machine has its threads from. By default it makes them itself.
#[derive(Default)]
pub struct Threads {
    on_thread: Option<OnThread>,
    /// Those of vCPUs, the one of vCPU 0 last.
    vcpus: Vec<Waiting<VcpuWork>>,
    device: Option<Waiting<DeviceWork>>,
}

impl Threads {
    /// Threads that are made with the machine, and call this first.
    #[must_use]
    pub fn calling(on_thread: Option<OnThread>) -> Self {
        Self {
            on_thread,
            ..Self::default()
        }
    }

    /// Makes now the threads of a machine with so many vCPUs. Each has begun with the call when this returns.
    ///
    /// # Errors
    /// As thread creation.
    pub fn ahead(vcpus: u8, on_thread: Option<OnThread>) -> io::Result<Self> {
        let mut threads = Self::calling(on_thread);
        let (begun, all_begun) = channel();
        for index in (0..vcpus).rev() {
            let thread = threads.make_vcpu(index, Some(begun.clone()))?;
            threads.vcpus.push(thread);
        }
        threads.device = Some(threads.make_device(Some(begun))?);
        // Ends when each has dropped its sender.
        let _ = all_begun.recv();
        Ok(threads)
    }

    /// That of the next vCPU, in order.
    pub(super) fn vcpu(&mut self, index: u8) -> io::Result<Waiting<VcpuWork>> {
        match self.vcpus.pop() {
            Some(thread) => Ok(thread),
            None => self.make_vcpu(index, None),
        }
    }

    pub(super) fn device(&mut self) -> io::Result<Waiting<DeviceWork>> {
        match self.device.take() {
            Some(thread) => Ok(thread),
            None => self.make_device(None),
        }
    }

    fn make_vcpu(&self, index: u8, begun: Option<Sender<()>>) -> io::Result<Waiting<VcpuWork>> {
        static HANDLER: OnceLock<Result<(), i32>> = OnceLock::new();
        HANDLER
            .get_or_init(|| register_signal_handler(kick_signal(), do_nothing).map_err(|error| error.errno()))
            .map_err(io::Error::from_raw_os_error)?;
        let begin = self.begin(ThreadKind::Vcpu, begun);
        Waiting::spawn(format!("vcpu{index}"), move || {
            // The mask is that of who made the thread, and a blocked signal does not interrupt KVM_RUN.
            if let Err(error) = unblock_signal(kick_signal()) {
                warn!(%error, "a pause may not reach a vCPU");
            }
            begin();
            VcpuWork::run
        })
    }

    fn make_device(&self, begun: Option<Sender<()>>) -> io::Result<Waiting<DeviceWork>> {
        let begin = self.begin(ThreadKind::Device, begun);
        Waiting::spawn("devices".into(), move || {
            begin();
            DeviceWork::run
        })
    }

    /// What a thread does first.
    fn begin(&self, kind: ThreadKind, begun: Option<Sender<()>>) -> impl FnOnce() + Send + 'static {
        let call = self.on_thread.clone();
        move || {
            if let Some(call) = call {
                call(kind);
            }
            drop(begun);
        }
    }
}

extern "C" fn do_nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A thread that waits for its work, does it, and ends. One that is given none ends when this is dropped.
pub(super) struct Waiting<Work> {
    thread: Option<JoinHandle<()>>,
    /// In a box, as a queue has room for dozens from the start.
    work: Option<Sender<Box<Work>>>,
}

impl<Work: Send + 'static> Waiting<Work> {
    /// `begin` is called first, and gives what does the work.
    fn spawn<Run>(name: String, begin: impl FnOnce() -> Run + Send + 'static) -> io::Result<Self>
    where
        Run: FnOnce(Work),
    {
        let (work, inbox) = channel::<Box<Work>>();
        let thread = std::thread::Builder::new()
            .name(name)
            .stack_size(256 << 10)
            .spawn(move || {
                let run = begin();
                if let Ok(work) = inbox.recv() {
                    run(*work);
                }
            })?;
        Ok(Self {
            thread: Some(thread),
            work: Some(work),
        })
    }

    /// Its work. To be given once.
    pub(super) fn give(&mut self, work: Work) {
        if let Some(sender) = self.work.take() {
            // It ends only after the sender is dropped.
            let _ = sender.send(Box::new(work));
        }
    }

    pub(super) fn handle(&self) -> Option<&JoinHandle<()>> {
        self.thread.as_ref()
    }
}

impl<Work> Waiting<Work> {
    /// Waits for its end.
    pub(super) fn join(&mut self, what: &str) {
        self.work = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("{what} panicked");
        }
    }
}

impl<Work> Drop for Waiting<Work> {
    fn drop(&mut self) {
        self.join("a thread that waited for work");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn threads_that_are_made_ahead_have_begun_and_end_without_work() {
        let kinds = Arc::new(Mutex::new(Vec::new()));
        let told = kinds.clone();
        let on_thread: OnThread = Arc::new(move |kind| told.lock().unwrap().push(kind));
        let threads = Threads::ahead(3, Some(on_thread)).unwrap();
        let count = |kind| kinds.lock().unwrap().iter().filter(|one| **one == kind).count();
        assert_eq!((count(ThreadKind::Vcpu), count(ThreadKind::Device)), (3, 1));
        drop(threads);
        // Each of them held it.
        assert_eq!(Arc::strong_count(&kinds), 1);
    }

    #[test]
    fn each_vcpu_has_the_thread_with_its_name_and_more_are_made_when_they_are_wanted() {
        let mut threads = Threads::ahead(2, None).unwrap();
        let names: Vec<_> = (0..3)
            .map(|index| threads.vcpu(index).unwrap())
            .map(|thread| thread.handle().unwrap().thread().name().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["vcpu0", "vcpu1", "vcpu2"]);
    }
}

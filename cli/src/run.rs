//! `picovm run`.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use picovm_engine::{Confinement, ContainerExit, RunningContainer, Store, TemplateSpec, printable};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

use crate::arguments::{RunOptions, SeccompMode};
use crate::image_defaults;

/// Exit status of a container that `--timeout` ended, as `timeout(1)` has it.
const TIMED_OUT: u8 = 124;
/// So many Ctrl-C, and a container that ignores them is killed.
const PATIENCE: u32 = 3;

/// How long a VMM process may take that was told to end its container, until it is killed itself.
const KILL_MAX: Duration = Duration::from_secs(5);

/// Signals that are passed on to the container.
const FORWARDED: [i32; 6] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];

/// The last signal that came, and a stream that is readable when one did.
struct Signals {
    last: Arc<AtomicUsize>,
    wake: UnixStream,
}

impl Signals {
    fn watch() -> anyhow::Result<Self> {
        let last = Arc::new(AtomicUsize::new(0));
        let (wake, raise) = UnixStream::pair().context("cannot create a socket pair")?;
        wake.set_nonblocking(true)
            .context("cannot set up a socket pair")?;
        for signal in FORWARDED {
            let register = || -> std::io::Result<()> {
                let number = usize::try_from(signal).unwrap_or(0);
                signal_hook::flag::register_usize(signal, last.clone(), number)?;
                signal_hook::low_level::pipe::register(signal, raise.try_clone()?)?;
                Ok(())
            };
            register().with_context(|| format!("cannot handle signal {signal}"))?;
        }
        Ok(Self { last, wake })
    }

    fn take(&self) -> Option<u8> {
        let mut bytes = [0u8; 64];
        while matches!((&self.wake).read(&mut bytes), Ok(count) if count > 0) {}
        u8::try_from(self.last.swap(0, Ordering::SeqCst))
            .ok()
            .filter(|signal| *signal != 0)
    }
}

pub fn run(options: &RunOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let spec = TemplateSpec {
        image: store.image(&options.image)?,
        memory_mib: options.machine.memory,
        vcpus: options.machine.cpus,
    };
    let confinement = confinement(options);
    let template = store.template_confined(&spec, confinement, &mut |progress| {
        eprintln!("picovm: {progress}")
    })?;

    let console_log = match &options.console_log {
        Some(path) => Some(
            File::create(path).with_context(|| format!("cannot write the console log {}", path.display()))?,
        ),
        None => None,
    };
    let streams = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    let container = RunningContainer::start(
        &template,
        &image_defaults::container_options(&spec.image, options, console_log)?,
        streams,
        confinement,
    )?;
    // From here on a Ctrl-C is the container's. Its VMM process has none of these handlers.
    let signals = Signals::watch()?;

    let deadline = options
        .timeout
        .and_then(|timeout| Instant::now().checked_add(timeout));
    let mut interrupts = 0;
    let mut timed_out = false;
    // When a VMM process that was told to end its container has had its time.
    let mut patience = None;
    let mut killed = false;
    loop {
        match wait(&container, &signals, patience.or(deadline).filter(|_| !killed))? {
            Wake::Ended => break,
            Wake::Deadline if patience.is_some() => {
                killed = true;
                container.kill_vmm_process();
            }
            Wake::Deadline => {
                timed_out = true;
                patience = Some(Instant::now() + KILL_MAX);
                // One that has ended meanwhile needs no signal.
                let _ = container.kill(SIGKILL as u8);
            }
            Wake::Signal => {
                let Some(signal) = signals.take() else { continue };
                interrupts += u32::from(i32::from(signal) == SIGINT);
                let _ = if interrupts >= PATIENCE {
                    patience = patience.or(Some(Instant::now() + KILL_MAX));
                    container.kill(SIGKILL as u8)
                } else {
                    container.signal(signal)
                };
            }
        }
    }
    let exit = match container.wait() {
        // How it took its end is of no interest.
        Err(_) if killed => ContainerExit::Signal(SIGKILL as u8),
        exit => exit?,
    };
    if let ContainerExit::NotStarted(failure) = &exit {
        eprintln!(
            "picovm: cannot {}: {}",
            printable(&failure.attempted),
            printable(&failure.message)
        );
    }
    Ok(ExitCode::from(if timed_out {
        TIMED_OUT
    } else {
        exit.shell_status()
    }))
}

/// How the container's VMM process is to be confined. Less than all is not done silently.
fn confinement(options: &RunOptions) -> Confinement {
    match options.seccomp {
        _ if options.no_jail => {
            eprintln!(
                "picovm: warning: --no-jail: nothing but its VM stands between this container and the host. Use it for \
                 debugging only"
            );
            Confinement::Unconfined
        }
        SeccompMode::Log => {
            eprintln!(
                "picovm: warning: --seccomp=log: the VMM may make any system call. Use it for debugging only"
            );
            Confinement::CallsLogged
        }
        SeccompMode::Kill => Confinement::Jailed,
    }
}

/// Why a wait for a container is over.
enum Wake {
    Ended,
    Signal,
    Deadline,
}

/// Waits until the container has ended, a signal came, or the deadline has passed.
fn wait(container: &RunningContainer, signals: &Signals, deadline: Option<Instant>) -> anyhow::Result<Wake> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        let mut fds = [
            PollFd::new(container, PollFlags::IN),
            PollFd::new(&signals.wake, PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Ok(Wake::Deadline),
            Ok(_) => {
                let [container, _] = fds;
                return Ok(if container.revents().is_empty() {
                    Wake::Signal
                } else {
                    Wake::Ended
                });
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the container"),
        }
    }
}

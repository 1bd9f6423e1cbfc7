//! A container's streams, connected with those of this process: what `run`, `start -a`, `attach` and `exec` have in common.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use picovm_engine::containers::{Attachment, Client, ClientNews, Ending, Status};
use picovm_engine::{ContainerExit, Store};
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};

use super::arguments::{AttachOptions, SessionOptions};
use super::terminal::{self, DetachKeys, Keyboard, Typed};

/// Signals that are passed on to the container.
const FORWARDED: [i32; 6] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];
/// So many Ctrl-C, and a container that ignores them is killed.
const PATIENCE: u32 = 3;
/// Exit status of a container that `--timeout` ended, as `timeout(1)` has it.
pub const TIMED_OUT: u8 = 124;

/// Signals that came, and a stream that is readable when one did.
struct Signals {
    flags: Vec<(i32, Arc<AtomicBool>)>,
    wake: UnixStream,
}

impl Signals {
    fn watch(signals: &[i32]) -> anyhow::Result<Self> {
        let (wake, raise) = UnixStream::pair().context("cannot create a socket pair")?;
        wake.set_nonblocking(true)
            .context("cannot set up a socket pair")?;
        let mut flags = Vec::new();
        for &signal in signals {
            let flag = Arc::new(AtomicBool::new(false));
            let register = || -> std::io::Result<()> {
                // In this order: whoever is woken finds the flag.
                signal_hook::flag::register(signal, flag.clone())?;
                signal_hook::low_level::pipe::register(signal, raise.try_clone()?)?;
                Ok(())
            };
            register().with_context(|| format!("cannot handle signal {signal}"))?;
            flags.push((signal, flag));
        }
        Ok(Self { flags, wake })
    }

    fn take(&self) -> Vec<i32> {
        let mut bytes = [0u8; 64];
        while matches!((&self.wake).read(&mut bytes), Ok(count) if count > 0) {}
        self.flags
            .iter()
            .filter(|(_, flag)| flag.swap(false, Ordering::SeqCst))
            .map(|(signal, _)| *signal)
            .collect()
    }
}

/// What of this process is to be connected.
#[derive(Clone, Copy, Default)]
pub struct Wanted {
    pub terminal: bool,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// The ends of this process.
pub struct Ends {
    wanted: Wanted,
    keyboard: Option<Keyboard>,
    pipe: Option<OwnedFd>,
}

impl Ends {
    /// Opens what is wanted. This process's terminal is not made raw before [`follow`].
    pub fn open(wanted: Wanted, keys: &DetachKeys) -> anyhow::Result<Self> {
        let (keyboard, pipe) = if wanted.terminal && wanted.stdin {
            if !terminal::is_stdin() {
                bail!("the input device is not a TTY: without a terminal here, use -i without -t");
            }
            let (keyboard, pipe) = Keyboard::new(keys.clone())?;
            (Some(keyboard), Some(pipe))
        } else {
            (None, None)
        };
        Ok(Self {
            wanted,
            keyboard,
            pipe,
        })
    }

    /// What the container is given.
    pub fn attachment(&self, announce: bool) -> Attachment<'_> {
        let stdin = match &self.pipe {
            Some(pipe) => pipe.as_fd(),
            None => rustix::stdio::stdin(),
        };
        Attachment {
            stdin: self.wanted.stdin.then_some(stdin),
            stdout: self.wanted.stdout.then(rustix::stdio::stdout),
            stderr: self.wanted.stderr.then(rustix::stdio::stderr),
            terminal: self.wanted.terminal.then(terminal::size).flatten(),
            announce,
        }
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    Container,
    Process,
}

/// How [`follow`] is to go.
pub struct Following {
    pub subject: Subject,
    pub sig_proxy: bool,
    pub deadline: Option<Instant>,
}

/// Why [`follow`] has ended.
#[derive(Debug)]
pub enum End {
    Ended(Ending),
    TimedOut,
    Exited(ContainerExit),
    /// The container was left alone.
    Detached,
    /// Its monitor was killed.
    Gone,
    /// This process was told to end.
    Interrupted(i32),
}

/// Stays with a container or a process until it has ended, passes signals on, and what is typed.
pub fn follow(client: &Client, mut ends: Ends, following: &Following) -> anyhow::Result<End> {
    // The container has its own by now: when it does not read any more, a write is to fail.
    ends.pipe = None;
    let mut signals: Vec<i32> = match following.sig_proxy || ends.keyboard.is_some() {
        true => FORWARDED.to_vec(),
        false => Vec::new(),
    };
    if ends.wanted.terminal {
        signals.push(SIGWINCH);
    }
    // From here on a Ctrl-C is the container's. Its monitor has none of these handlers.
    let signals = Signals::watch(&signals)?;
    let mut keyboard = ends.keyboard;
    if let Some(keyboard) = &mut keyboard {
        keyboard.raw()?;
        // It may have changed since its size was told.
        if let Some(size) = terminal::size() {
            let _ = client.resize(size);
        }
    }
    let mut interrupts = 0;
    let mut deadline = following.deadline;
    let mut timed_out = false;
    loop {
        let ready = wait(client, &signals, keyboard.as_ref(), deadline)?;
        if ready.news {
            match client.news()? {
                ClientNews::Started => {}
                ClientNews::Ended(_) if timed_out => return Ok(End::TimedOut),
                ClientNews::Ended(ending) => return Ok(End::Ended(ending)),
                ClientNews::Exited(exit) => return Ok(End::Exited(exit)),
                ClientNews::Gone if timed_out => return Ok(End::TimedOut),
                ClientNews::Gone => return Ok(End::Gone),
            }
        }
        if ready.late {
            timed_out = true;
            // The monitor sees to it that this one is obeyed.
            deadline = None;
            let _ = client.signal(SIGKILL as u8);
        }
        if ready.signal {
            for signal in signals.take() {
                if signal == SIGWINCH {
                    if let Some(size) = terminal::size() {
                        let _ = client.resize(size);
                    }
                    continue;
                }
                if !following.sig_proxy {
                    return Ok(End::Interrupted(signal));
                }
                interrupts += u32::from(signal == SIGINT);
                let number = if interrupts >= PATIENCE { SIGKILL } else { signal };
                let number = u8::try_from(number).unwrap_or(SIGKILL as u8);
                // One that has ended meanwhile needs no signal.
                let _ = match following.subject {
                    Subject::Container => client.signal(number),
                    Subject::Process => client.signal_own(number),
                };
            }
        }
        if let Some(keyboard) = &mut keyboard {
            if ready.pipe {
                keyboard.write();
            }
            if ready.keys && matches!(keyboard.read(), Typed::Detach | Typed::Gone) {
                return Ok(End::Detached);
            }
        }
    }
}

/// What there is to do.
#[derive(Default)]
struct Ready {
    news: bool,
    signal: bool,
    keys: bool,
    pipe: bool,
    late: bool,
}

fn wait(
    client: &Client,
    signals: &Signals,
    keyboard: Option<&Keyboard>,
    deadline: Option<Instant>,
) -> anyhow::Result<Ready> {
    loop {
        let timeout = deadline.map(picovm_engine::timeout::until);
        let stdin = rustix::stdio::stdin();
        let mut fds = vec![
            PollFd::new(client, PollFlags::IN),
            PollFd::new(&signals.wake, PollFlags::IN),
        ];
        let keys = keyboard.filter(|keyboard| keyboard.reads()).map(|_| fds.len());
        if keys.is_some() {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        let blocked = keyboard.and_then(Keyboard::blocked);
        let pipe = blocked.map(|_| fds.len());
        if let Some(blocked) = &blocked {
            fds.push(PollFd::new(blocked, PollFlags::OUT));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => {
                return Ok(Ready {
                    late: true,
                    ..Ready::default()
                });
            }
            Ok(_) => {
                let is = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
                return Ok(Ready {
                    news: is(0),
                    signal: is(1),
                    keys: keys.is_some_and(is),
                    pipe: pipe.is_some_and(is),
                    late: false,
                });
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the container"),
        }
    }
}

/// The exit status of this process for how it has ended; what there is to say is said.
pub fn status(name: &str, end: End) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::from(match end {
        End::Ended(ending) => {
            if !ending.error.is_empty() {
                eprintln!("picovm: {}", ending.error);
            }
            ending.code
        }
        End::TimedOut => TIMED_OUT,
        End::Exited(exit) => {
            if let ContainerExit::NotStarted(failure) = &exit {
                eprintln!(
                    "picovm: cannot {}: {}",
                    picovm_engine::printable(&failure.attempted),
                    picovm_engine::printable(&failure.message)
                );
            }
            exit.shell_status()
        }
        End::Detached => {
            eprintln!("\npicovm: left {name} alone: `picovm attach {name}` comes back");
            0
        }
        End::Gone => bail!("the monitor of container {name} was killed, and the container with it"),
        End::Interrupted(signal) => {
            // What the signal does to a program that has no handler for it.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
            return Ok(ExitCode::FAILURE);
        }
    }))
}

/// `picovm attach`.
pub fn attach(options: &AttachOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let containers = store.containers()?;
    let record = containers.find(&options.container)?;
    let name = record.name.as_str();
    if record.state.status == Status::Paused {
        bail!("container {name} is paused: `picovm unpause {name}` lets it go on");
    }
    let client = containers.connect(&record)?;
    let wanted = Wanted {
        terminal: record.config.terminal,
        stdin: record.config.stdin && !options.no_stdin,
        stdout: true,
        // That of a terminal is its standard output.
        stderr: !record.config.terminal,
    };
    let ends = Ends::open(wanted, &options.session.detach_keys)?;
    let attachment = ends.attachment(false);
    if let Some(mut size) = attachment.terminal {
        // Another size first: then the program draws its screen again.
        size.rows = size.rows.saturating_add(1);
        client.resize(size)?;
    }
    client.attach(&attachment)?;
    let end = follow(&client, ends, &following(&options.session, None))?;
    drop(client);
    status(name, end)
}

/// How to stay with a container.
pub fn following(session: &SessionOptions, deadline: Option<Instant>) -> Following {
    Following {
        subject: Subject::Container,
        sig_proxy: session.sig_proxy,
        deadline,
    }
}

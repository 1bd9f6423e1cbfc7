//! One run: start the helpers, pass streams through, bring the exit status back, leave nothing behind.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::console::Console;
use crate::helper::Helper;
use crate::kernel::{self, Kernel};
use crate::protocol::{self, FromHost, Output, ROOT_TAG, Spec, ToHost, share_tag};
use crate::qemu::{self, Machine};
use crate::virtiofs::{self, Use};

/// The exit status that says that the emulated host failed, and not the command.
pub const FAILED: u8 = 125;

/// How long the host may take to start the command before it is given up; on an idle machine it takes 3 seconds.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// Lines of the console that an error shows.
const TAIL: usize = 25;

/// What to run, and in what.
#[derive(Clone, Debug)]
pub struct Options {
    /// MiB of memory.
    pub memory: u32,
    /// CPUs.
    pub cpus: u32,
    /// Time is a count of instructions.
    pub instruction_clock: bool,
    /// Directories that come back.
    pub shares: Vec<PathBuf>,
    /// From start to end.
    pub timeout: Duration,
    /// 1: timings, 2: also the console.
    pub verbose: u8,
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// When the runner was started.
    pub begun: Instant,
}

/// What happens while the host runs, in the order in which it becomes known.
enum Event {
    Message(FromHost),
    /// No more messages will come.
    ControlEnded,
    /// An output is complete, and all of it has been written.
    OutputEnded,
    /// Nobody reads this output of ours any more.
    OutputClosed(Output),
    HelperEnded(&'static str, io::Result<ExitStatus>),
    Signal(i32),
}

/// Runs the command and returns its exit status, or 128 + the signal that ended the runner's wait.
pub fn run(options: Options) -> Result<u8> {
    let (events, happened) = mpsc::channel();
    // First of all: from here on a signal ends the run in order.
    watch_signals(events.clone())?;
    if !rustix::process::geteuid().is_root() {
        bail!("this must be run as root: virtiofsd serves the machine's whole file system");
    }
    let mut host = Host::start(options, events)?;
    let outcome = host.serve(&happened);
    host.end();
    outcome.map_err(|error| host.explain(error))
}

fn watch_signals(events: Sender<Event>) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch for signals")?;
    thread::spawn(move || {
        let mut asked = false;
        for signal in &mut signals {
            // The second one is for the impatient: the helpers' death signal then does the work.
            if asked || events.send(Event::Signal(signal)).is_err() {
                std::process::exit(128 + signal);
            }
            asked = true;
        }
    });
    Ok(())
}

/// A started host.
struct Host {
    options: Options,
    console: Console,
    control: UnixStream,
    spec: Option<Spec>,
    /// QEMU first: its end is the end of its peers.
    helpers: Vec<Helper>,
    /// Holds the sockets until they are connected, and then goes.
    sockets: Option<tempfile::TempDir>,
    /// Pumps of the command's streams, which begin when the command runs.
    streams: Option<Streams>,
    /// Held to the end: QEMU would drop what is still under way in a port whose socket closes.
    _stdin: UnixStream,
    console_readers: Vec<thread::JoinHandle<()>>,
}

struct Streams {
    stdin: UnixStream,
    stdout: UnixStream,
    stderr: UnixStream,
    events: Sender<Event>,
}

impl Host {
    fn start(options: Options, events: Sender<Event>) -> Result<Self> {
        let init = std::env::current_exe()
            .context("cannot tell where this program is")?
            .with_file_name("picovm-host-init");
        if !init.exists() {
            bail!(
                "{} is missing: `cargo build --release -p picovm-emulated-host` makes it",
                init.display()
            );
        }
        let shares = shares(&options.shares)?;
        let virtiofsd = virtiofs::Program::find()?;
        let kernel = Kernel::get()?;
        let spec = spec(&options, &shares, &kernel, init.parent())?;
        let console = Console::new(options.verbose >= 2);
        let sockets = tempfile::Builder::new()
            .prefix("picovm-emulated-host-")
            .tempdir()
            .context("cannot make a temporary directory")?;

        let mut file_systems = vec![(ROOT_TAG.to_owned(), PathBuf::from("/"), Use::Root)];
        file_systems.extend(
            shares
                .into_iter()
                .enumerate()
                .map(|(i, dir)| (share_tag(i), dir, Use::Share)),
        );
        let mut servers = Vec::new();
        let mut mounts = Vec::new();
        for (tag, dir, purpose) in file_systems {
            let (path, listener) = virtiofs::listen(sockets.path(), &tag)?;
            let command = virtiofsd.command(&dir, &listener, purpose);
            servers.push((command, virtiofs::into_fd(listener)));
            mounts.push((tag, path));
        }

        let (console_ours, console_theirs) = pair()?;
        let (control, control_theirs) = pair()?;
        let (stdin, stdin_theirs) = pair()?;
        let (stdout, stdout_theirs) = pair()?;
        let (stderr, stderr_theirs) = pair()?;
        let ports = [control_theirs, stdin_theirs, stdout_theirs, stderr_theirs];
        let machine = Machine {
            memory: options.memory,
            cpus: options.cpus,
            instruction_clock: options.instruction_clock,
            kernel: kernel.image(),
            init,
            verbose_kernel: options.verbose >= 2,
            file_systems: mounts,
            console: console_theirs.as_raw_fd(),
            ports: [
                ports[0].as_raw_fd(),
                ports[1].as_raw_fd(),
                ports[2].as_raw_fd(),
                ports[3].as_raw_fd(),
            ],
        };
        let command = machine.command()?;

        let mut host = Self {
            options,
            console: console.clone(),
            control: control.try_clone().context("cannot duplicate a socket")?,
            spec: Some(spec),
            helpers: Vec::new(),
            sockets: Some(sockets),
            _stdin: stdin.try_clone().context("cannot duplicate a socket")?,
            streams: Some(Streams {
                stdin,
                stdout,
                stderr,
                events: events.clone(),
            }),
            console_readers: vec![console.collect(console_ours)],
        };
        let mut inherit: Vec<OwnedFd> = vec![console_theirs];
        inherit.extend(ports);
        if let Err(error) = host.launch("QEMU", command, inherit, &events) {
            let missing = error
                .root_cause()
                .downcast_ref::<io::Error>()
                .map(io::Error::kind)
                == Some(io::ErrorKind::NotFound);
            return Err(match missing {
                true => anyhow!(
                    "{} is not installed: run `make setup`, or `apt-get install qemu-system-x86`",
                    qemu::PROGRAM
                ),
                false => error,
            });
        }
        for (command, listener) in servers {
            host.launch("virtiofsd", command, vec![listener], &events)?;
        }
        let mut control = control;
        thread::spawn(move || {
            while let Ok(message) = protocol::receive(&mut control) {
                if events.send(Event::Message(message)).is_err() {
                    return;
                }
            }
            let _ = events.send(Event::ControlEnded);
        });
        host.note("helpers started");
        Ok(host)
    }

    fn launch(
        &mut self,
        name: &'static str,
        command: Command,
        inherit: Vec<OwnedFd>,
        events: &Sender<Event>,
    ) -> Result<()> {
        let events = events.clone();
        let on_exit = move |status| {
            let _ = events.send(Event::HelperEnded(name, status));
        };
        let mut helper = Helper::start(name, command, inherit, on_exit)?;
        if let Some(stderr) = helper.stderr.take() {
            self.console_readers.push(self.console.collect(stderr));
        }
        self.helpers.push(helper);
        Ok(())
    }

    fn note(&self, what: &str) {
        if self.options.verbose >= 1 {
            eprintln!(
                "emulated host: {:7.3} s  {what}",
                self.options.begun.elapsed().as_secs_f64()
            );
        }
    }

    /// Waits for the end, passing on what must be passed on.
    fn serve(&mut self, happened: &Receiver<Event>) -> Result<u8> {
        let limit = self.options.begun + self.options.timeout;
        let mut start_limit = Some(Instant::now() + START_TIMEOUT);
        let mut outputs_open = 2;
        let mut status = None;
        loop {
            if let (Some(status), 0) = (status, outputs_open) {
                self.note("the command has ended");
                return Ok(status);
            }
            let deadline = start_limit.map_or(limit, |s| s.min(limit));
            let event = match happened.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) if deadline == limit => {
                    let seconds = self.options.timeout.as_secs();
                    bail!(
                        "stopped after {seconds} s (--timeout): {:?} had not ended",
                        self.options.command[0]
                    );
                }
                Err(_) => bail!(
                    "the host did not start the command within {} s",
                    START_TIMEOUT.as_secs()
                ),
            };
            match event {
                Event::Message(FromHost::Booted) => {
                    self.note("the host has booted");
                    // Its root file system is there, so all sockets are connected.
                    self.sockets = None;
                    if let Some(mut spec) = self.spec.take() {
                        spec.time_ns = now_ns();
                        protocol::send(&mut self.control, &ToHost::Run(spec))
                            .context("the host does not take the command")?;
                    }
                }
                Event::Message(FromHost::Started) => {
                    self.note("the command has started");
                    start_limit = None;
                    if let Some(streams) = self.streams.take() {
                        streams.pump();
                    }
                }
                Event::Message(FromHost::Exited(code)) => {
                    start_limit = None;
                    status = Some(code);
                    // A command that could not be started has its say on standard error, too.
                    if let Some(streams) = self.streams.take() {
                        streams.pump();
                    }
                }
                Event::Message(FromHost::Failed(reason)) => {
                    bail!("the host cannot run the command: {reason}")
                }
                Event::OutputEnded => outputs_open -= 1,
                Event::OutputClosed(output) => {
                    // The host may be gone already, and then nobody writes.
                    let _ = protocol::send(&mut self.control, &ToHost::OutputClosed(output));
                }
                Event::Signal(signal) => {
                    self.note("ended by a signal");
                    return Ok(128_u8.saturating_add(u8::try_from(signal).unwrap_or(0)));
                }
                Event::HelperEnded(name, how) => {
                    // A panic of the kernel makes QEMU end, and virtiofsd after it, in an order that nobody knows.
                    thread::sleep(Duration::from_millis(100));
                    if let Some(reason) = self.console.panic_reason() {
                        bail!("the host's kernel has crashed ({reason}) before the command ended");
                    }
                    let how = match how {
                        Ok(status) => status.to_string(),
                        Err(error) => error.to_string(),
                    };
                    bail!("{name} ended ({how}) before the command did");
                }
                // QEMU ends now, and says more.
                Event::ControlEnded => {}
            }
        }
    }

    /// Ends all helpers and waits until they are gone.
    fn end(&mut self) {
        for helper in &mut self.helpers {
            helper.end();
        }
        self.helpers.clear();
        for reader in self.console_readers.drain(..) {
            let _ = reader.join();
        }
        self.sockets = None;
    }

    /// The error with what the console shows of its cause.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let tail = self.console.tail(TAIL);
        if tail.is_empty() {
            return anyhow!("{error:#} (the host's console is empty)");
        }
        let log = kernel::cache_dir().and_then(|d| Ok(self.console.save(&d.join("emulated-host-logs"))?));
        let log = match log {
            Ok(path) => format!("whole console: {}", path.display()),
            Err(error) => format!("the console could not be kept: {error:#}"),
        };
        anyhow!("{error:#}\n--- last lines of the host's console:\n{tail}\n--- {log}")
    }
}

impl Streams {
    fn pump(self) {
        let Self {
            mut stdin,
            stdout,
            stderr,
            events,
        } = self;
        // It ends with the process: a read of a terminal or an idle pipe cannot be called off.
        thread::spawn(move || {
            let mut input = io::stdin().lock();
            let mut buffer = vec![0; 64 << 10];
            loop {
                match input.read(&mut buffer) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    // An unreadable input ends like an empty one.
                    Ok(0) | Err(_) => break,
                    Ok(n) => {
                        if protocol::write_frame(&mut stdin, &buffer[..n]).is_err() {
                            return;
                        }
                    }
                }
            }
            let _ = protocol::write_frame(&mut stdin, &[]);
        });
        pump_output(stdout, Output::Stdout, events.clone());
        pump_output(stderr, Output::Stderr, events);
    }
}

fn pump_output(mut from: UnixStream, output: Output, events: Sender<Event>) {
    thread::spawn(move || {
        let mut frame = Vec::new();
        let mut open = true;
        while protocol::read_frame(&mut from, &mut frame).is_ok() {
            if frame.is_empty() {
                let _ = events.send(Event::OutputEnded);
                return;
            }
            if open && write_unbuffered(output, &frame).is_err() {
                // Go on reading: what is under way must not stop the host.
                open = false;
                let _ = events.send(Event::OutputClosed(output));
            }
        }
    });
}

/// Past the standard library's line buffer: what the command has written is out.
fn write_unbuffered(output: Output, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        let written = match output {
            Output::Stdout => rustix::io::write(rustix::stdio::stdout(), bytes),
            Output::Stderr => rustix::io::write(rustix::stdio::stderr(), bytes),
        };
        match written {
            Ok(n) => bytes = &bytes[n..],
            Err(rustix::io::Errno::INTR) => {}
            // Somebody has set our output to non-blocking, as programs do that share a terminal.
            Err(rustix::io::Errno::AGAIN) => thread::sleep(Duration::from_millis(2)),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A connected pair: our end, and the one that is inherited.
fn pair() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket")?;
    Ok((ours, theirs.into()))
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The shared directories by their real paths, each once, outer ones before those inside them.
fn shares(given: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut real = given
        .iter()
        .map(|dir| {
            let path = dir
                .canonicalize()
                .with_context(|| format!("cannot share {}", dir.display()))?;
            match path.is_dir() && path != Path::new("/") {
                true => Ok(path),
                false if path == Path::new("/") => bail!("cannot share /: share a directory below it"),
                false => bail!("cannot share {}: not a directory", dir.display()),
            }
        })
        .collect::<Result<Vec<_>>>()?;
    real.sort();
    real.dedup();
    Ok(real)
}

fn spec(options: &Options, shares: &[PathBuf], kernel: &Kernel, programs: Option<&Path>) -> Result<Spec> {
    let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
    let path = search_path(programs, std::env::var_os("PATH"))?;
    let mut env: Vec<(Vec<u8>, Vec<u8>)> = vec![
        (b"PATH".to_vec(), path.into_vec()),
        // Programs can tell that writes vanish and time is not what it seems.
        (b"PICOVM_EMULATED_HOST".to_vec(), b"1".to_vec()),
    ];
    let set: HashSet<Vec<u8>> = env.iter().map(|(name, _)| name.clone()).collect();
    env.extend(
        std::env::vars_os()
            .map(|(n, v)| (n.into_vec(), v.into_vec()))
            .filter(|(name, _)| !set.contains(name)),
    );
    Ok(Spec {
        argv: options.command.iter().map(|a| a.as_bytes().to_vec()).collect(),
        env,
        cwd: bytes(&std::env::current_dir().context("cannot tell the current directory")?),
        umask: current_umask(),
        shares: shares.iter().map(|s| bytes(s)).collect(),
        kernel_dir: bytes(kernel.dir()),
        time_ns: 0,
    })
}

/// The search path with the built programs in front.
fn search_path(programs: Option<&Path>, path: Option<OsString>) -> Result<OsString> {
    let path = path.unwrap_or_else(|| "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    let all = programs
        .map(Path::to_owned)
        .into_iter()
        .chain(std::env::split_paths(&path));
    std::env::join_paths(all).context("the directory of the built programs cannot stand in PATH")
}

fn current_umask() -> u32 {
    // It can only be read by setting it; no other thread makes files now.
    let mask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(mask);
    mask.bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_programs_are_found_first() {
        let path = search_path(Some(Path::new("/built")), Some("/bin:/sbin".into())).expect("valid");
        assert_eq!(path, "/built:/bin:/sbin");
    }

    #[test]
    fn shares_are_real_directories_and_outer_ones_come_first() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let outer = dir.path().canonicalize().expect("real");
        let inner = outer.join("inner");
        std::fs::create_dir(&inner).expect("made");
        let given = [inner.clone(), outer.join("inner/.."), inner.clone()];
        assert_eq!(shares(&given).expect("valid"), [outer.clone(), inner]);
        assert!(shares(&[outer.join("missing")]).is_err());
        assert!(shares(&["/".into()]).is_err());
        assert!(shares(&["/dev/null".into()]).is_err());
    }
}

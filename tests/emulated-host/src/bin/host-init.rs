//! `picovm-host-init`: process 1 of the emulated host.
//!
//! The kernel starts it from the machine's root file system, read only through virtiofs. It lays a scratch layer above,
//! mounts what a Linux host has mounted, loads KVM, runs the one command, and reports its end. Under the name `modprobe`
//! it loads modules, for people and for the kernel.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use emulated_host::kernel::Kernel;
use emulated_host::modules::Index;
use emulated_host::protocol::{self, FromHost, Output, Port, Spec, ToHost, share_tag};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{FileType, Mode};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

fn main() {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if Path::new(&name).file_name() == Some(OsStr::new("modprobe")) {
        std::process::exit(modprobe(arguments));
    }
    if !rustix::process::getpid().is_init() {
        eprintln!(
            "picovm-host-init is process 1 of the emulated host, and nothing else: use tests/emulated-host/run"
        );
        std::process::exit(1);
    }
    if let Err(error) = host() {
        // The runner has got a message if there was a way to send it; the console shows it in any case.
        println!("picovm-host-init: {error:#}");
    }
    power_off();
}

fn power_off() -> ! {
    loop {
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
        thread::sleep(Duration::from_secs(1));
    }
}

/// The ports, open. Each can be opened by one process at a time, once.
struct Ports {
    control: File,
    stdin: File,
    stdout: File,
    stderr: File,
}

fn host() -> Result<()> {
    ignore_busy(mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None))
        .context("cannot mount /dev")?;
    let mut ports = open_ports()?;
    protocol::send(&mut ports.control, &FromHost::Booted).context("cannot reach the runner")?;
    let ToHost::Run(spec) = protocol::receive(&mut ports.control).context("no command came")? else {
        bail!("the runner sent something else than a command");
    };
    let control = ports
        .control
        .try_clone()
        .context("cannot duplicate the control port")?;
    let outcome = serve(spec, ports);
    let last = match &outcome {
        Ok(status) => FromHost::Exited(*status),
        Err(error) => FromHost::Failed(format!("{error:#}")),
    };
    protocol::send(&mut &control, &last).context("cannot report the end")?;
    // The runner ends QEMU as soon as it has read that. Should it be gone, power off.
    thread::sleep(Duration::from_secs(10));
    outcome.map(drop)
}

/// Waits until the kernel has measured its time stamp counter for good and switched to it, some 2 s after its start.
///
/// KVM notes the rate when it is loaded, and the clock of a guest that runs over the switch stood still for 8 s in one
/// start of ten. A kernel that keeps another clock is not waited for much longer.
fn wait_for_clock() {
    const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        match fs::read_to_string(CLOCK) {
            Ok(clock) if clock.trim() == "tsc-early" => thread::sleep(Duration::from_millis(10)),
            _ => return,
        }
    }
}

fn open_ports() -> Result<Ports> {
    // The driver makes the ports when the device tells it of them, some milliseconds after the kernel starts us.
    let begun = Instant::now();
    let open = |port: Port| -> Result<File> {
        let device = port.device();
        loop {
            match OpenOptions::new().read(true).write(true).open(&device) {
                Ok(file) => return Ok(file),
                Err(_) if begun.elapsed() < Duration::from_secs(10) => {
                    thread::sleep(Duration::from_millis(1))
                }
                Err(error) => return Err(error).with_context(|| format!("cannot open {}", device.display())),
            }
        }
    };
    Ok(Ports {
        control: open(Port::Control)?,
        stdin: open(Port::Stdin)?,
        stdout: open(Port::Stdout)?,
        stderr: open(Port::Stderr)?,
    })
}

fn serve(spec: Spec, ports: Ports) -> Result<u8> {
    set_clock(spec.time_ns)?;
    let kernel_dir = PathBuf::from(OsString::from_vec(spec.kernel_dir.clone()));
    let modules = Kernel::modules(&kernel_dir);
    let index = Index::load(&modules)?;
    scratch_root(&index, &modules)?;
    mount_kernel_file_systems()?;
    let release = provide_modules(&modules)?;
    wait_for_clock();
    for module in ["kvm", "kvm_amd"] {
        index.insert(&modules, module, "")?;
    }
    make_devices(&modules).with_context(|| format!("cannot make the device nodes of kernel {release}"))?;
    let shares = mount_shares(&spec.shares)?;
    settle()?;
    let status = run(&spec, ports)?;
    // What was written must have reached the machine before anybody hears of the end.
    for share in shares {
        let dir = File::open(&share).with_context(|| format!("cannot open the share {}", share.display()))?;
        rustix::fs::syncfs(&dir)
            .with_context(|| format!("cannot write the share {} back", share.display()))?;
    }
    Ok(status)
}

fn set_clock(time_ns: u64) -> Result<()> {
    let time = rustix::time::Timespec {
        tv_sec: i64::try_from(time_ns / 1_000_000_000).context("a time beyond all times")?,
        tv_nsec: i64::try_from(time_ns % 1_000_000_000).context("a time beyond all times")?,
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time).context("cannot set the clock")
}

fn ignore_busy(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(rustix::io::Errno::BUSY) => Ok(()),
        other => other,
    }
}

/// Lays a tmpfs above the machine's root and moves there.
fn scratch_root(index: &Index, modules: &Path) -> Result<()> {
    index.insert(modules, "overlay", "")?;
    // Any directory that every machine has will do: the mount is out of sight once the root has changed.
    let base = Path::new("/tmp");
    mount(
        "scratch",
        base,
        "tmpfs",
        MountFlags::empty(),
        Some(c"mode=0755,size=80%"),
    )
    .context("cannot mount a tmpfs")?;
    let root = base.join("root");
    for dir in ["upper", "work", "root"] {
        fs::create_dir(base.join(dir)).context("cannot make directories on a tmpfs")?;
    }
    // No user is meant to write here but root; the mode of the machine's own root shows through.
    mount(
        "overlay",
        &root,
        "overlay",
        MountFlags::empty(),
        Some(c"lowerdir=/,upperdir=/tmp/upper,workdir=/tmp/work,xino=on"),
    )
    .context("cannot lay the scratch layer above the root")?;
    std::env::set_current_dir(&root).context("cannot enter the new root")?;
    // pivot_root(2), "pivot_root(\".\", \".\")": the old root is stacked on the new one, and taken off it.
    rustix::process::pivot_root(".", ".").context("cannot change the root")?;
    unmount(".", UnmountFlags::DETACH).context("cannot take the old root away")?;
    std::env::set_current_dir("/").context("cannot enter the root")
}

fn mount_kernel_file_systems() -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let devices = MountFlags::NOSUID | MountFlags::NOEXEC;
    let needed: [(&str, &str, MountFlags, Option<&str>); 7] = [
        ("proc", "/proc", safe, None),
        ("sysfs", "/sys", safe, None),
        (
            "cgroup2",
            "/sys/fs/cgroup",
            safe,
            Some("nsdelegate,memory_recursiveprot"),
        ),
        ("devtmpfs", "/dev", MountFlags::NOSUID, None),
        ("devpts", "/dev/pts", devices, Some("mode=620,gid=5,ptmxmode=666")),
        (
            "tmpfs",
            "/dev/shm",
            MountFlags::NOSUID | MountFlags::NODEV,
            Some("mode=1777"),
        ),
        (
            "tmpfs",
            "/run",
            MountFlags::NOSUID | MountFlags::NODEV,
            Some("mode=755"),
        ),
    ];
    let welcome: [(&str, &str, MountFlags, Option<&str>); 3] = [
        ("mqueue", "/dev/mqueue", safe, None),
        ("debugfs", "/sys/kernel/debug", safe, None),
        ("tracefs", "/sys/kernel/tracing", safe, None),
    ];
    let attach = |(fs_type, dir, flags, data): (&str, &str, MountFlags, Option<&str>)| -> Result<()> {
        // Those in /sys are there, and cannot be made.
        let _ = fs::create_dir_all(dir);
        let data = data
            .map(CString::new)
            .transpose()
            .context("mount options hold a zero byte")?;
        mount(fs_type, dir, fs_type, flags, data.as_deref())
            .with_context(|| format!("cannot mount {fs_type} on {dir}"))
    };
    needed.into_iter().try_for_each(attach)?;
    for optional in welcome {
        let _ = attach(optional);
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = symlink(target, link);
    }
    let _ = fs::create_dir_all("/run/lock");
    Ok(())
}

/// Puts the modules where they belong, and ourselves where the kernel and people look for `modprobe`.
fn provide_modules(modules: &Path) -> Result<String> {
    let release =
        fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's release")?;
    let release = release.trim().to_owned();
    let dir = module_dir(&release);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    mount_bind(modules, &dir).with_context(|| format!("cannot bind the modules to {}", dir.display()))?;
    // The machine's own, if it has one, wants an index of another form.
    let program = Path::new("/sbin/modprobe");
    let _ = fs::remove_file(program);
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    symlink(own, program).context("cannot make /sbin/modprobe")?;
    Ok(release)
}

fn module_dir(release: &str) -> PathBuf {
    Path::new("/lib/modules").join(release)
}

/// Makes the nodes whose opening loads a module, and opens KVM to everybody, as most distributions do.
fn make_devices(modules: &Path) -> Result<()> {
    for device in Index::load_devices(modules)? {
        let path = Path::new("/dev").join(&device.name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let numbers = rustix::fs::makedev(device.major, device.minor);
        match rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            FileType::CharacterDevice,
            Mode::from(0o666),
            numbers,
        ) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", path.display())),
        }
    }
    let kvm = Path::new("/dev/kvm");
    fs::set_permissions(kvm, fs::Permissions::from_mode(0o666)).context("the host has no /dev/kvm")
}

fn mount_shares(shares: &[Vec<u8>]) -> Result<Vec<PathBuf>> {
    let mut mounted = Vec::new();
    for (i, share) in shares.iter().enumerate() {
        let dir = PathBuf::from(OsString::from_vec(share.clone()));
        // A share below /run or /dev/shm is hidden by ours.
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        mount(share_tag(i), &dir, "virtiofs", MountFlags::empty(), None)
            .with_context(|| format!("cannot mount the share {}", dir.display()))?;
        mounted.push(dir);
    }
    Ok(mounted)
}

/// What a distribution's start-up does besides mounting.
fn settle() -> Result<()> {
    rustix::system::sethostname(b"picovm-host").context("cannot set the host name")?;
    loopback_up().context("cannot bring the loopback interface up")?;
    let cgroups = Path::new("/sys/fs/cgroup");
    let controllers =
        fs::read_to_string(cgroups.join("cgroup.controllers")).context("cannot list the controllers")?;
    for controller in controllers.split_whitespace() {
        // One that cannot be passed down is missed by those who need it, and by nobody else.
        let _ = fs::write(cgroups.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    let files = rustix::process::Rlimit {
        current: Some(1 << 20),
        maximum: Some(1 << 20),
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, files)
        .context("cannot raise the file limit")
}

fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo\0") {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is complete, lives across the call, and is of the type that SIOCSIFFLAGS takes.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs the command to its end, and everything that it left behind; returns its exit status.
fn run(spec: &Spec, mut ports: Ports) -> Result<u8> {
    let mut child = match start(spec) {
        Ok(child) => child,
        Err((status, sentence)) => {
            let line = format!("emulated host: {sentence}\n");
            protocol::write_frame(&mut ports.stderr, line.as_bytes()).context("cannot report")?;
            protocol::write_frame(&mut ports.stderr, &[]).context("cannot report")?;
            protocol::write_frame(&mut ports.stdout, &[]).context("cannot report")?;
            return Ok(status);
        }
    };
    protocol::send(&mut ports.control, &FromHost::Started).context("cannot report the start")?;
    let pid = Pid::from_child(&child);
    if let Some(input) = child.stdin.take() {
        thread::spawn(move || pump_input(ports.stdin, input));
    }
    let mut outputs = Vec::new();
    let mut stops = Vec::new();
    for (output, pipe, port) in [
        (
            Output::Stdout,
            child.stdout.take().map(OwnedFd::from),
            ports.stdout,
        ),
        (
            Output::Stderr,
            child.stderr.take().map(OwnedFd::from),
            ports.stderr,
        ),
    ] {
        let Some(pipe) = pipe else { continue };
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).context("cannot make an eventfd")?);
        stops.push((output, stop.clone()));
        outputs.push(thread::spawn(move || pump_output(pipe, port, &stop)));
    }
    let mut control = ports.control;
    thread::spawn(move || {
        while let Ok(message) = protocol::receive(&mut control) {
            if let ToHost::OutputClosed(closed) = message {
                for (_, stop) in stops.iter().filter(|(output, _)| *output == closed) {
                    let _ = rustix::io::write(stop, &1_u64.to_ne_bytes());
                }
            }
        }
    });
    let status = reap_until(pid)?;
    end_all();
    for output in outputs {
        match output.join() {
            Ok(result) => result.context("the command's output is lost")?,
            Err(_) => bail!("the command's output is lost"),
        }
    }
    Ok(status)
}

/// Starts the command, or says why not with the status that a shell would give.
fn start(spec: &Spec) -> Result<Child, (u8, String)> {
    let os = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let Some((program, arguments)) = spec.argv.split_first() else {
        return Err((127, "no command".into()));
    };
    let cwd = os(&spec.cwd);
    // The kernel's message would be the same for a missing directory and a missing program.
    if let Err(error) = fs::metadata(&cwd) {
        return Err((
            125,
            format!(
                "the working directory {} is not there: {error}",
                cwd.to_string_lossy()
            ),
        ));
    }
    let program = os(program);
    let mask = Mode::from_bits_truncate(spec.umask);
    let mut command = Command::new(&program);
    command
        .args(arguments.iter().map(|a| os(a)))
        .env_clear()
        .envs(spec.env.iter().map(|(n, v)| (os(n), os(v))))
        .current_dir(&cwd)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: two system calls, which allocate nothing and take no lock.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            rustix::process::umask(mask);
            Ok(())
        });
    }
    command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => (127, format!("{}: command not found", program.to_string_lossy())),
        _ => (
            126,
            format!("{}: cannot be executed: {error}", program.to_string_lossy()),
        ),
    })
}

/// Reaps whatever ends, as process 1 must, until the command does.
fn reap_until(command: Pid) -> Result<u8> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == command => return Ok(exit_code(status)),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the command"),
        }
    }
}

fn exit_code(status: WaitStatus) -> u8 {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    };
    u8::try_from(code & 0xff).unwrap_or(255)
}

/// Kills all that the command left running, so that its pipes end, and waits for it.
fn end_all() {
    // SAFETY: -1 means all processes but process 1, which is us; the call touches no memory.
    unsafe { libc::kill(-1, Signal::KILL.as_raw()) };
    let (done, ended) = mpsc::channel();
    thread::spawn(move || {
        while !matches!(
            rustix::process::wait(WaitOptions::empty()),
            Err(rustix::io::Errno::CHILD)
        ) {}
        let _ = done.send(());
    });
    // A process that the kernel cannot end holds nothing that we could give back.
    let _ = ended.recv_timeout(Duration::from_secs(10));
}

fn pump_input(mut port: File, pipe: impl Write) {
    let mut frame = Vec::new();
    let mut pipe = Some(pipe);
    while protocol::read_frame(&mut port, &mut frame).is_ok() && !frame.is_empty() {
        // A command that has closed its input does not mind; what still comes is thrown away.
        pipe = pipe.and_then(|mut open| open.write_all(&frame).is_ok().then_some(open));
    }
}

fn pump_output(pipe: OwnedFd, mut port: File, stop: &OwnedFd) -> io::Result<()> {
    let mut pipe = File::from(pipe);
    let mut buffer = vec![0; 32 << 10];
    loop {
        let mut ready = [
            PollFd::new(&pipe, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if !ready[1].revents().is_empty() {
            break;
        }
        match pipe.read(&mut buffer)? {
            0 => break,
            n => protocol::write_frame(&mut port, &buffer[..n])?,
        }
    }
    // Before the end is told: from now on the command meets a broken pipe.
    drop(pipe);
    protocol::write_frame(&mut port, &[])
}

/// `modprobe [-q] [-a] [-v] [--] NAME [PARAMETER...]`, as people and the kernel call it.
fn modprobe(arguments: impl Iterator<Item = OsString>) -> i32 {
    let mut quiet = false;
    let mut all = false;
    let mut words = Vec::new();
    for argument in arguments {
        match argument.as_bytes() {
            b"-q" | b"--quiet" => quiet = true,
            b"-a" | b"--all" => all = true,
            b"--" | b"-v" | b"--verbose" | b"-b" | b"--use-blacklist" => {}
            option if option.starts_with(b"-") => {
                eprintln!(
                    "modprobe: the emulated host's modprobe does not know {}",
                    argument.to_string_lossy()
                );
                return 1;
            }
            _ => words.push(argument.to_string_lossy().into_owned()),
        }
    }
    let insert = |name: &str, parameters: &str| -> Result<()> {
        let release =
            fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's release")?;
        let dir = module_dir(release.trim());
        let index = Index::load_with_aliases(&dir)?;
        let found = index.resolve(name);
        if found.is_empty() && !is_builtin(&dir, name) {
            bail!("the host kernel has no module {name}");
        }
        found
            .iter()
            .try_for_each(|module| index.insert(&dir, module, parameters))
    };
    let outcome = match words.split_first() {
        None => Err(anyhow::anyhow!("which module?")),
        Some(_) if all => words.iter().try_for_each(|name| insert(name, "")),
        Some((name, parameters)) => insert(name, &parameters.join(" ")),
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            if !quiet {
                eprintln!("modprobe: {error:#}");
            }
            1
        }
    }
}

/// Whether the kernel has it without a module.
fn is_builtin(dir: &Path, name: &str) -> bool {
    let wanted = emulated_host::modules::canonical(name);
    fs::read_to_string(dir.join("modules.builtin")).is_ok_and(|list| {
        list.lines().any(|line| {
            Path::new(line)
                .file_stem()
                .is_some_and(|s| emulated_host::modules::canonical(&s.to_string_lossy()) == wanted)
        })
    })
}

//! Agent and stub together, on the host: a forked process is the agent, its child the container, a socket pair the
//! control port. Only what makes a machine (mounts, trap, identity) is absent.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use picovm_guest_protocol::frame::{DATA_MAX, INITIAL_CREDIT, LAYER, MAIN, PROCESSES_MAX};
use picovm_guest_protocol::{
    ContainerExit, ContainerSpec, Frame, FrameDecoder, Helper, PathStatus, ProcessSpec, Stream, Task,
    TerminalSize,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions};

use crate::accounts::Accounts;
use crate::agent::Agent;
use crate::container::Ground;
use crate::rehearsal;
use crate::stub::{self, Setting, Stack};

/// Nothing here takes a second on an idle machine; this is for a busy one.
const DEADLINE: Duration = Duration::from_secs(60);

/// The host's side of one agent.
struct Host {
    /// Until it is reaped.
    agent: Option<Pid>,
    control: OwnedFd,
    decoder: FrameDecoder,
    unsent: Vec<u8>,
    input: Vec<u8>,
    input_sent: usize,
    input_credit: usize,
    input_closed: bool,
    /// Whether bytes that come are credited at once.
    generous: bool,
    owed: [u32; 2],
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    closed: Vec<Stream>,
    exit: Option<ContainerExit>,
    /// Whether more may come after the main process's exit.
    stays: bool,
    others: BTreeMap<u16, Other>,
    /// Numbers of processes in the order of their ends.
    ends: Vec<u16>,
    /// How often it was said that the program runs.
    started: usize,
    /// Credit for the layer.
    layer_credit: usize,
}

/// What has come of a process beside the main one. Its bytes are credited at once.
#[derive(Default)]
struct Other {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    closed: Vec<Stream>,
    exit: Option<ContainerExit>,
}

/// How the agent process itself ended.
#[derive(Debug, PartialEq, Eq)]
enum AgentEnd {
    PoweredOff,
    Failed,
}

fn shell(script: &str) -> ProcessSpec {
    ProcessSpec {
        args: ["sh", "-c", script].map(|word| word.as_bytes().to_vec()).to_vec(),
        stdin: true,
        ..ProcessSpec::default()
    }
}

fn program(program: &str) -> ProcessSpec {
    ProcessSpec {
        args: vec![program.into()],
        ..ProcessSpec::default()
    }
}

/// While this is held no other test forks an agent, which would hold open whatever this one means to close.
pub fn no_fork() -> MutexGuard<'static, ()> {
    static FORK: Mutex<()> = Mutex::new(());
    FORK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The life of the agent process.
fn live(control: OwnedFd, spec: Option<ContainerSpec>) -> bool {
    let accounts = Accounts::new(
        "root:x:0:0::/root:/bin/sh\nme:x:1234:1235::/home/me:/bin/sh\n",
        "extra:x:77:me\n",
    );
    if stub::block_child_signal().is_err() {
        return false;
    }
    // The developer's shell may have left some open.
    // SAFETY: plain system call; it only marks descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    // As PID 1 it would be the parent of orphans.
    // SAFETY: this option takes plain integers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    let ground = Ground::default();
    let begun = stub::pipes().and_then(|(pipes, ends)| {
        let agent = Agent::new(control, pipes, &ground)?;
        let stack = Stack::allocate()?;
        let setting = Setting {
            stack: &stack,
            accounts: &accounts,
            ground: &ground,
            control: agent.control(),
            terminal: agent.terminal(),
        };
        let begun = stub::begin(setting, ends, || {
            if rustix::process::geteuid().is_root() {
                stub::withhold_capabilities()?;
            }
            Ok(spec)
        })?;
        Ok((agent, begun))
    });
    let Ok((agent, begun)) = begun else {
        return false;
    };
    let group = begun.pid;
    let served = agent.serve(begun);
    // Where the guest would power off.
    let _ = rustix::process::kill_process(group, Signal::KILL);
    let _ = rustix::process::kill_process_group(group, Signal::KILL);
    served.is_ok()
}

impl Host {
    fn start(process: Option<ProcessSpec>) -> Self {
        Self::start_container(process.map(ContainerSpec::of))
    }

    fn start_container(spec: Option<ContainerSpec>) -> Self {
        let stays = spec.as_ref().is_some_and(|spec| spec.stay);
        let _no_other_fork = no_fork();
        let (control, guest) = rehearsal::control_pair().unwrap();
        // SAFETY: the child uses only the forking thread's own state and glibc's allocator, which is usable after
        // fork, and leaves by _exit.
        let agent = match unsafe { libc::fork() } {
            -1 => panic!("fork: {}", std::io::Error::last_os_error()),
            0 => {
                drop(control);
                let fine = std::panic::catch_unwind(|| live(guest, spec)).unwrap_or(false);
                // SAFETY: ends the forked process without the test harness's destructors.
                unsafe { libc::_exit(i32::from(!fine)) }
            }
            pid => Pid::from_raw(pid).unwrap(),
        };
        Self {
            agent: Some(agent),
            control,
            decoder: FrameDecoder::default(),
            unsent: Vec::new(),
            input: Vec::new(),
            input_sent: 0,
            input_credit: INITIAL_CREDIT as usize,
            input_closed: false,
            generous: true,
            owed: [0; 2],
            stdout: Vec::new(),
            stderr: Vec::new(),
            closed: Vec::new(),
            exit: None,
            stays,
            others: BTreeMap::new(),
            ends: Vec::new(),
            started: 0,
            layer_credit: INITIAL_CREDIT as usize,
        }
    }

    fn send(&mut self, frame: &Frame) {
        self.send_to(MAIN, frame);
    }

    fn send_to(&mut self, process: u16, frame: &Frame) {
        frame.encode(process, &mut self.unsent).unwrap();
    }

    fn exec(&mut self, process: u16, spec: ProcessSpec) {
        self.send_to(process, &Frame::Exec(spec));
    }

    /// Runs a helper to its end with this input, and gives its exit and outputs.
    fn help(&mut self, process: u16, helper: Helper, input: &[u8]) -> (ContainerExit, Vec<u8>, String) {
        self.send_to(process, &Frame::Help(helper));
        assert!(input.len() <= INITIAL_CREDIT as usize);
        for bytes in input.chunks(DATA_MAX) {
            self.send_to(process, &Frame::Data(Stream::Stdin, bytes.to_vec()));
        }
        self.send_to(process, &Frame::Close(Stream::Stdin));
        self.other(process)
    }

    /// Serves until this process has ended, and forgets it.
    fn other(&mut self, process: u16) -> (ContainerExit, Vec<u8>, String) {
        self.until(|host| {
            host.others
                .get(&process)
                .is_some_and(|other| other.exit.is_some())
        });
        let other = self.others.remove(&process).unwrap();
        let errors = String::from_utf8_lossy(&other.stderr).into_owned();
        (other.exit.unwrap(), other.stdout, errors)
    }

    fn stdout_of(&self, process: u16) -> &[u8] {
        self.others.get(&process).map_or(b"", |other| &other.stdout)
    }

    fn close_input(&mut self) {
        self.input_closed = true;
        self.step_input();
    }

    fn step_input(&mut self) {
        while self.input_credit > 0 && self.input_sent < self.input.len() {
            let left = self.input.len() - self.input_sent;
            let count = left.min(self.input_credit).min(DATA_MAX);
            let bytes = self.input[self.input_sent..][..count].to_vec();
            self.send(&Frame::Data(Stream::Stdin, bytes));
            self.input_sent += count;
            self.input_credit -= count;
        }
        if self.input_closed && self.input_sent == self.input.len() {
            self.input_closed = false;
            self.send(&Frame::Close(Stream::Stdin));
        }
    }

    /// Moves bytes for up to `wait`; `false` once the agent has closed its side.
    fn step(&mut self, wait: Duration) -> bool {
        self.step_input();
        let mut interest = PollFlags::IN;
        if !self.unsent.is_empty() {
            interest |= PollFlags::OUT;
        }
        let timeout = Timespec::try_from(wait).unwrap();
        poll(&mut [PollFd::new(&self.control, interest)], Some(&timeout)).unwrap();
        match rustix::io::write(&self.control, &self.unsent) {
            Ok(count) => drop(self.unsent.drain(..count)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // The agent does not read any more, but may have written before.
            Err(_) => self.unsent.clear(),
        }
        let mut buffer = [0; 1 << 16];
        match rustix::io::read(&self.control, &mut buffer) {
            Ok(0) => return false,
            Ok(count) => self.decoder.push(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        while let Some((process, frame)) = self.decoder.next_frame().unwrap() {
            if process == MAIN {
                assert_eq!(self.exit, None, "{frame:?} after the last frame");
                self.take(frame);
            } else if process == LAYER {
                let Frame::Credit(Stream::Stdin, bytes) = frame else {
                    panic!("{frame:?} for the layer");
                };
                self.layer_credit += bytes as usize;
            } else {
                assert!(
                    self.exit.is_none() || self.stays,
                    "{frame:?} after the last frame"
                );
                self.take_other(process, frame);
            }
        }
        true
    }

    fn take(&mut self, frame: Frame) {
        match frame {
            Frame::Data(stream, bytes) => {
                assert!(!self.closed.contains(&stream), "data after the end of {stream:?}");
                assert!(!bytes.is_empty() && bytes.len() <= DATA_MAX);
                let (output, owed) = match stream {
                    Stream::Stdout => (&mut self.stdout, &mut self.owed[0]),
                    Stream::Stderr => (&mut self.stderr, &mut self.owed[1]),
                    Stream::Stdin => panic!("standard input from the guest"),
                };
                output.extend(&bytes);
                *owed += u32::try_from(bytes.len()).unwrap();
                assert!(*owed <= INITIAL_CREDIT, "more than the credit of {stream:?}");
                if self.generous {
                    self.pay(stream, u32::MAX);
                }
            }
            Frame::Close(stream) => self.closed.push(stream),
            Frame::Credit(Stream::Stdin, bytes) => {
                self.input_credit += bytes as usize;
                assert!(
                    self.input_credit <= INITIAL_CREDIT as usize,
                    "credit from nothing"
                );
            }
            Frame::Started => self.started += 1,
            Frame::Exit(exit) => {
                self.exit = Some(exit);
                self.ends.push(MAIN);
            }
            other => panic!("{other:?} from the guest"),
        }
    }

    fn take_other(&mut self, process: u16, frame: Frame) {
        let other = self.others.entry(process).or_default();
        assert_eq!(other.exit, None, "{frame:?} after the last frame of {process}");
        match frame {
            Frame::Data(stream, bytes) => {
                assert!(
                    !other.closed.contains(&stream),
                    "data after the end of {stream:?}"
                );
                match stream {
                    Stream::Stdout => other.stdout.extend(&bytes),
                    Stream::Stderr => other.stderr.extend(&bytes),
                    Stream::Stdin => panic!("standard input from the guest"),
                }
                let count = u32::try_from(bytes.len()).unwrap();
                self.send_to(process, &Frame::Credit(stream, count));
            }
            Frame::Close(stream) => other.closed.push(stream),
            Frame::Credit(Stream::Stdin, _) => {}
            Frame::Exit(exit) => {
                if !matches!(exit, ContainerExit::NotStarted(_)) {
                    assert_eq!(
                        other.closed.len(),
                        2,
                        "process {process} ended before its outputs"
                    );
                }
                other.exit = Some(exit);
                self.ends.push(process);
            }
            frame => panic!("{frame:?} of {process} from the guest"),
        }
    }

    fn pay(&mut self, stream: Stream, at_most: u32) {
        let owed = &mut self.owed[usize::from(stream == Stream::Stderr)];
        let bytes = at_most.min(*owed);
        *owed -= bytes;
        self.send(&Frame::Credit(stream, bytes));
    }

    fn until(&mut self, mut reached: impl FnMut(&Self) -> bool) {
        let give_up = Instant::now() + DEADLINE;
        while !reached(self) {
            assert!(Instant::now() < give_up, "nothing more comes");
            assert!(self.step(Duration::from_millis(100)), "the agent has gone");
        }
    }

    /// Serves until the agent closes its side, and tells how it ended.
    fn finish(&mut self) -> AgentEnd {
        let give_up = Instant::now() + DEADLINE;
        while self.step(Duration::from_millis(100)) {
            assert!(Instant::now() < give_up, "the agent does not end");
        }
        let (_, status) = rustix::process::waitpid(self.agent.take(), WaitOptions::empty())
            .unwrap()
            .unwrap();
        match status.exit_status() {
            Some(0) => AgentEnd::PoweredOff,
            Some(1) => AgentEnd::Failed,
            _ => panic!("the agent died: {status:?}"),
        }
    }

    /// Runs to a good end and gives the exit.
    fn exit(&mut self) -> ContainerExit {
        assert_eq!(self.finish(), AgentEnd::PoweredOff);
        let mut closed = self.closed.clone();
        closed.sort_by_key(|stream| *stream as u8);
        assert_eq!(closed, [Stream::Stdout, Stream::Stderr]);
        self.exit.clone().unwrap()
    }
}

impl Drop for Host {
    /// A test that failed leaves no agent behind; its container's pipes end with it.
    fn drop(&mut self) {
        if let Some(agent) = self.agent {
            let _ = rustix::process::kill_process(agent, Signal::KILL);
            let _ = rustix::process::waitpid(Some(agent), WaitOptions::empty());
        }
    }
}

fn run(spec: ProcessSpec) -> (ContainerExit, String, String) {
    let mut host = Host::start(Some(spec));
    let exit = host.exit();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (exit, text(&host.stdout), text(&host.stderr))
}

#[test]
fn the_exit_status_comes_back() {
    assert_eq!(run(shell("exit 7")).0, ContainerExit::Code(7));
    assert_eq!(run(shell("exit 255")).0, ContainerExit::Code(255));
    assert_eq!(run(program("true")).0, ContainerExit::Code(0));
}

#[test]
fn a_signal_that_ended_it_comes_back() {
    assert_eq!(run(shell("kill -SEGV $$")).0, ContainerExit::Signal(11));
}

#[test]
fn output_and_errors_are_separate() {
    let (exit, stdout, stderr) = run(shell("echo out; echo err >&2; echo out again"));
    assert_eq!(exit, ContainerExit::Code(0));
    assert_eq!(stdout, "out\nout again\n");
    assert_eq!(stderr, "err\n");
}

#[test]
fn a_signal_reaches_the_whole_process_group() {
    let mut host = Host::start(Some(shell(
        "(trap 'echo child; exit' TERM; echo ready; while :; do sleep 0.01; done) & \
                                            trap 'wait; exit 3' TERM; wait",
    )));
    host.until(|host| host.stdout == b"ready\n");
    host.send(&Frame::Signal(15));
    assert_eq!(host.exit(), ContainerExit::Code(3));
    assert_eq!(host.stdout, b"ready\nchild\n");
}

#[test]
fn a_signal_before_the_start_waits_for_the_container() {
    let mut host = Host::start(None);
    host.send(&Frame::Spec(ContainerSpec::of(shell("sleep 100"))));
    host.send(&Frame::Signal(15));
    assert_eq!(host.exit(), ContainerExit::Signal(15));
}

#[test]
fn what_comes_before_what_to_run_is_refused_and_told() {
    let mut host = Host::start(None);
    host.send(&Frame::Signal(15));
    let ContainerExit::NotStarted(failure) = host.exit() else {
        panic!("it was started");
    };
    assert!(failure.message.contains("another frame"), "{}", failure.message);
}

#[test]
fn a_signal_that_does_not_exist_is_no_disaster() {
    let mut host = Host::start(Some(shell("read x; exit 4")));
    host.send(&Frame::Signal(0));
    host.send(&Frame::Signal(200));
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(4));
}

#[test]
fn ten_megabytes_go_in_and_come_out() {
    let mut host = Host::start(Some(program("cat")).map(|spec| ProcessSpec { stdin: true, ..spec }));
    host.input = (0..10_000_000u32)
        .flat_map(|n| n.to_le_bytes()[..1].to_vec())
        .collect();
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(0));
    assert!(host.stdout == host.input, "{} bytes came out", host.stdout.len());
}

#[test]
fn a_slow_reader_gets_every_byte_and_holds_up_only_its_stream() {
    let mut host = Host::start(Some(shell(
        "seq 1 200000 & seq 1 1000 >&2; wait; echo end >&2; exit 5",
    )));
    host.generous = false;
    host.until(|host| host.owed[0] == INITIAL_CREDIT);
    // Credit is spent, but the other stream goes on.
    host.until(|host| host.stderr.ends_with(b"1000\n"));
    assert!(!host.stderr.ends_with(b"end\n"));
    let give_up = Instant::now() + DEADLINE;
    while host.exit.is_none() {
        assert!(Instant::now() < give_up);
        host.pay(Stream::Stdout, 4321);
        host.pay(Stream::Stderr, u32::MAX);
        if !host.step(Duration::from_millis(1)) {
            break;
        }
    }
    assert_eq!(host.exit(), ContainerExit::Code(5));
    let expected: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(host.stdout == expected.as_bytes(), "{} bytes", host.stdout.len());
    assert!(host.stderr.ends_with(b"1000\nend\n"));
}

#[test]
fn what_was_written_before_the_end_waits_for_credit() {
    // The rest fits into the pipe, so the container has ended long before its output is taken.
    let bytes = INITIAL_CREDIT + 60_000;
    let mut host = Host::start(Some(shell(&format!("head -c {bytes} /dev/zero"))));
    host.generous = false;
    host.until(|host| host.owed[0] == INITIAL_CREDIT);
    host.step(Duration::from_millis(100));
    assert_eq!(host.exit, None);
    host.generous = true;
    host.pay(Stream::Stdout, u32::MAX);
    assert_eq!(host.exit(), ContainerExit::Code(0));
    assert_eq!(host.stdout.len(), bytes as usize);
}

#[test]
fn input_that_the_container_does_not_want_is_swallowed() {
    let mut host = Host::start(Some(shell("exec <&-; echo closed; sleep 0.3; echo end")));
    host.until(|host| host.stdout == b"closed\n");
    host.input = vec![1; 2_000_000];
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(0));
    assert_eq!(host.stdout, b"closed\nend\n");
}

#[test]
fn without_input_it_is_dev_null() {
    let spec = ProcessSpec {
        stdin: false,
        ..shell("cat; readlink /proc/self/fd/0")
    };
    assert_eq!(run(spec).1, "/dev/null\n");
}

#[test]
fn the_container_has_no_other_descriptors_and_a_session_of_its_own() {
    let (_, stdout, _) = run(shell("ls /proc/self/fd | wc -l; ps -o pid=,sid=,pgid= -p $$"));
    let words: Vec<&str> = stdout.split_whitespace().collect();
    // ls itself opens the directory.
    assert_eq!(words[0], "4");
    assert!(words[1] == words[2] && words[2] == words[3], "{stdout}");
}

#[test]
fn no_signal_is_left_blocked_or_ignored() {
    let (_, stdout, _) = run(shell("grep -E '^Sig(Blk|Ign)' /proc/self/status"));
    let sets: Vec<u64> = stdout
        .lines()
        .map(|line| u64::from_str_radix(line.rsplit('\t').next().unwrap(), 16).unwrap())
        .collect();
    // 32 and 33 are glibc's own and come from the test's parent.
    let all = !(0b11 << 31);
    assert_eq!(
        sets.iter().map(|set| set & all).collect::<Vec<_>>(),
        [0, 0],
        "{stdout}"
    );
}

#[test]
fn the_container_may_close_its_output_and_go_on() {
    let mut host = Host::start(Some(shell("exec >&- 2>&-; read x; exit 9")));
    host.until(|host| host.closed.len() == 2);
    assert_eq!(host.exit, None);
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(9));
}

#[test]
fn what_outlives_the_main_process_is_killed_and_holds_nothing_up() {
    let (exit, stdout, _) = run(shell("(trap '' TERM; sleep 1000) & echo started; exit 2"));
    assert_eq!(exit, ContainerExit::Code(2));
    assert_eq!(stdout, "started\n");
}

#[test]
fn orphans_are_reaped_while_the_container_runs() {
    let script = "(sh -c 'echo $$ > /dev/fd/3' &) 3>&1 | cat; sleep 0.3; ";
    let (_, stdout, _) = run(shell(&format!(
        "orphan=$( {script}); test -e /proc/$orphan && echo zombie; echo done"
    )));
    assert_eq!(stdout, "done\n");
}

#[test]
fn a_program_that_is_not_there_is_127() {
    for name in ["no-such-program", "/no/such/program", "/etc/passwd/x"] {
        let (exit, ..) = run(program(name));
        assert_eq!(exit.shell_status(), 127, "{name}: {exit:?}");
        let ContainerExit::NotStarted(failure) = exit else {
            panic!("{exit:?}")
        };
        assert_eq!(failure.attempted, format!("exec {name}"));
    }
}

#[test]
fn a_program_that_cannot_be_executed_is_126() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8], mode| {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = file("plain", b"#!/bin/sh\n", 0o644);
    let nonsense = file("nonsense", b"echo no first line\n", 0o755);
    for name in [plain.as_str(), nonsense.as_str(), "/etc"] {
        let (exit, ..) = run(program(name));
        assert_eq!(exit.shell_status(), 126, "{name}: {exit:?}");
    }
    let orphan = file("orphan", b"#!/no/such/interpreter\n", 0o755);
    let (exit, ..) = run(program(&orphan));
    assert_eq!(exit.shell_status(), 127);
    assert!(format!("{exit:?}").contains("interpreter"), "{exit:?}");
    // In PATH, one that may not be executed does not hide a later one that may, but is what is told if there is none.
    let in_path = |name: &str, path: &str| {
        run(ProcessSpec {
            env: vec![format!("PATH={path}").into_bytes()],
            ..program(name)
        })
    };
    let here = directory.path().to_str().unwrap();
    assert_eq!(in_path("plain", here).0.shell_status(), 126);
    file("true", b"", 0o644);
    let both = format!("{here}:/bin:/usr/bin");
    assert_eq!(in_path("true", &both).0, ContainerExit::Code(0));
}

#[test]
fn a_container_without_a_program_is_125() {
    let (exit, ..) = run(program(""));
    assert_eq!(exit.shell_status(), 125, "{exit:?}");
    let (exit, ..) = run(program("tr\0ue"));
    assert_eq!(exit.shell_status(), 125, "{exit:?}");
}

#[test]
fn environment_and_working_directory_are_as_told() {
    let directory = tempfile::tempdir().unwrap();
    let deep = directory.path().join("made/on/the/way");
    let (exit, stdout, stderr) = run(ProcessSpec {
        env: vec![b"A=one two".to_vec()],
        cwd: deep.to_str().unwrap().into(),
        ..shell("pwd; echo $A; echo $HOME; echo $PATH")
    });
    assert_eq!(exit, ContainerExit::Code(0), "{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[0], deep.to_str().unwrap());
    assert_eq!(lines[1..3], ["one two", "/root"]);
    assert!(lines[3].starts_with("/usr/local/sbin:"));

    let (exit, ..) = run(ProcessSpec {
        cwd: b"/etc/passwd/no".to_vec(),
        ..shell("")
    });
    assert!(format!("{exit:?}").contains("/etc/passwd/no"), "{exit:?}");
    let (exit, ..) = run(ProcessSpec {
        cwd: b"relative".to_vec(),
        ..shell("")
    });
    assert!(format!("{exit:?}").contains("absolute"), "{exit:?}");
}

#[test]
fn a_user_is_looked_up_and_has_no_capabilities() {
    if !rustix::process::geteuid().is_root() {
        // Only root becomes another user; anyone else is told.
        let (exit, ..) = run(ProcessSpec {
            user: b"me".to_vec(),
            ..shell("id")
        });
        assert_eq!(exit.shell_status(), 125);
        return;
    }
    let script = "id -u; id -g; id -G; echo $HOME; grep CapEff /proc/self/status; echo x > /dev/stderr";
    let (exit, stdout, stderr) = run(ProcessSpec {
        user: b"me".to_vec(),
        ..shell(script)
    });
    assert_eq!(exit, ContainerExit::Code(0), "{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(
        lines,
        ["1234", "1235", "1235 77", "/home/me", "CapEff:\t0000000000000000"]
    );
    assert_eq!(stderr, "x\n");
    let (exit, ..) = run(ProcessSpec {
        user: b"ghost".to_vec(),
        ..shell("id")
    });
    assert_eq!(exit.shell_status(), 125);
    assert!(format!("{exit:?}").contains("ghost"), "{exit:?}");
}

#[test]
fn root_cannot_reach_the_machine() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (_, stdout, _) = run(shell("grep CapEff /proc/self/status"));
    let effective = u64::from_str_radix(stdout.trim().rsplit('\t').next().unwrap(), 16).unwrap();
    for withheld in [16, 17, 19, 22] {
        assert_eq!(
            effective & 1 << withheld,
            0,
            "capability {withheld} of {effective:#x}"
        );
    }
}

#[test]
fn what_to_run_may_come_over_the_connection_however_large() {
    let mut host = Host::start(None);
    host.send(&Frame::Spec(ContainerSpec::of(ProcessSpec {
        env: (0..15)
            .map(|n| format!("V{n}={}", "x".repeat(100_000)).into_bytes())
            .collect(),
        ..shell("echo ${#V7}")
    })));
    assert_eq!(host.exit(), ContainerExit::Code(0));
    assert_eq!(host.stdout, b"100000\n");
}

#[test]
fn a_writer_whose_output_nobody_reads_any_more_gets_sigpipe() {
    let mut host = Host::start(Some(program("yes")));
    host.until(|host| !host.stdout.is_empty());
    host.send(&Frame::Close(Stream::Stdout));
    assert_eq!(host.exit(), ContainerExit::Signal(13));
}

#[test]
fn a_host_that_breaks_the_protocol_is_left() {
    let wrong = [
        Frame::Data(Stream::Stdout, vec![1]),
        Frame::Credit(Stream::Stdin, 1),
        Frame::Credit(Stream::Stdout, u32::MAX),
        Frame::Exit(ContainerExit::Code(0)),
        Frame::OutOfMemory,
        Frame::Started,
        Frame::Freeze,
        Frame::Spec(ContainerSpec::default()),
        Frame::Exec(shell("true")),
        Frame::Help(Helper::Tasks),
    ];
    for frame in wrong {
        let mut host = Host::start(Some(shell("sleep 1000")));
        host.send(&frame);
        assert_eq!(host.finish(), AgentEnd::Failed, "{frame:?}");
        assert_eq!(host.exit, None);
    }
    let mut host = Host::start(Some(shell("sleep 1000")));
    host.unsent = vec![0xee; 8];
    assert_eq!(host.finish(), AgentEnd::Failed);
    let mut host = Host::start(Some(shell("sleep 1000")));
    host.input_credit = 0;
    for _ in 0..=INITIAL_CREDIT as usize / DATA_MAX + 2 {
        host.send(&Frame::Data(Stream::Stdin, vec![0; DATA_MAX]));
    }
    assert_eq!(host.finish(), AgentEnd::Failed);
}

#[test]
fn a_host_that_goes_away_is_noticed() {
    let mut host = Host::start(Some(shell("echo up; sleep 1000")));
    host.until(|host| host.stdout == b"up\n");
    rustix::net::shutdown(host.control.as_fd(), rustix::net::Shutdown::Both).unwrap();
    assert_eq!(host.finish(), AgentEnd::Failed);
}

fn terminal(script: &str) -> ProcessSpec {
    ProcessSpec {
        terminal: Some(TerminalSize {
            rows: 25,
            columns: 80,
        }),
        ..shell(script)
    }
}

#[test]
fn processes_run_beside_the_main_one_each_with_its_streams() {
    let mut host = Host::start(Some(shell("read x; echo main $x; exit 3")));
    host.exec(7, shell("echo out; echo err >&2; exit 4"));
    host.exec(9, shell("cat; exit 5"));
    let (exit, stdout, stderr) = host.other(7);
    assert_eq!(exit, ContainerExit::Code(4), "{stderr}");
    assert_eq!((stdout.as_slice(), stderr.as_str()), (&b"out\n"[..], "err\n"));
    host.send_to(9, &Frame::Data(Stream::Stdin, b"hello".to_vec()));
    host.until(|host| host.stdout_of(9) == b"hello");
    // A number can be used again.
    host.exec(7, program("/no/such/program"));
    assert_eq!(host.other(7).0.shell_status(), 127);
    host.send_to(9, &Frame::Close(Stream::Stdin));
    assert_eq!(host.other(9).0, ContainerExit::Code(5));
    host.input = b"done\n".to_vec();
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(3));
    assert_eq!(host.stdout, b"main done\n");
}

#[test]
fn a_process_is_signalled_by_its_number() {
    let mut host = Host::start(Some(shell("read x; exit 1")));
    host.exec(2, shell("echo up; sleep 1000"));
    host.until(|host| host.stdout_of(2) == b"up\n");
    host.send_to(2, &Frame::Signal(10));
    assert_eq!(host.other(2).0, ContainerExit::Signal(10));
    // To nobody.
    host.send_to(2, &Frame::Signal(9));
    host.send_to(2, &Frame::Credit(Stream::Stdout, 5));
    host.send_to(2, &Frame::Data(Stream::Stdin, b"x".to_vec()));
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(1));
}

#[test]
fn the_container_ends_with_its_main_process_and_that_is_told_last() {
    let mut host = Host::start(Some(shell("read x; exit 6")));
    for process in [11, 12] {
        host.exec(process, shell("echo up; sleep 1000"));
        host.until(|host| host.stdout_of(process) == b"up\n");
    }
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(6));
    assert_eq!(host.ends.last(), Some(&MAIN));
    for process in [11, 12] {
        assert_eq!(host.others[&process].exit, Some(ContainerExit::Signal(9)));
    }
}

#[test]
fn a_number_in_use_and_one_process_too_many_are_refused() {
    let refused = |exit: Option<&ContainerExit>, why: &str| match exit {
        Some(ContainerExit::NotStarted(failure)) => assert!(failure.message.contains(why), "{failure:?}"),
        other => panic!("{other:?}"),
    };
    let mut host = Host::start(Some(shell("read x")));
    host.exec(1, shell("read x"));
    host.exec(1, shell("exit 9"));
    refused(Some(&host.other(1).0), "in use");
    host.close_input();
    host.finish();

    let mut host = Host::start(Some(shell("read x")));
    let count = u16::try_from(PROCESSES_MAX).unwrap();
    for process in 1..count {
        host.exec(process, shell("read x"));
    }
    host.exec(count, shell("exit 9"));
    refused(Some(&host.other(count).0), "too many");
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(1));
    assert_eq!(host.ends.len(), PROCESSES_MAX + 1);
}

#[test]
fn what_an_ended_process_has_left_behind_holds_nothing_up() {
    let mut host = Host::start(Some(shell("read x")));
    host.exec(3, shell("(while :; do echo more; done) & echo first; exit 2"));
    let (exit, stdout, _) = host.other(3);
    assert_eq!(exit, ContainerExit::Code(2));
    assert!(stdout.windows(6).any(|line| line == b"first\n"));
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(1));
}

#[test]
fn one_who_never_stops_writing_leaves_others_their_turn() {
    let mut host = Host::start(Some(program("yes")));
    host.exec(1, program("yes"));
    host.exec(2, shell("seq 1 20000"));
    host.exec(3, program("yes"));
    let (exit, stdout, _) = host.other(2);
    assert_eq!(exit, ContainerExit::Code(0));
    assert!(stdout.ends_with(b"19999\n20000\n"));
    host.send(&Frame::Signal(9));
    assert_eq!(host.exit(), ContainerExit::Signal(9));
}

#[test]
fn a_process_without_credit_for_its_output_holds_up_no_other() {
    let mut host = Host::start(Some(program("yes")));
    host.generous = false;
    host.until(|host| host.owed[0] == INITIAL_CREDIT);
    host.exec(1, shell("echo fine"));
    assert_eq!(host.other(1).1, b"fine\n");
    host.send(&Frame::Signal(9));
    host.generous = true;
    host.pay(Stream::Stdout, u32::MAX);
    assert_eq!(host.exit(), ContainerExit::Signal(9));
}

#[test]
fn a_terminal_is_one_with_its_size_its_user_and_an_end() {
    let script = "tty; stty size; test -t 2 && test -t 0 && echo all; echo $TERM; \
                  trap 'stty size; exit 8' WINCH; echo ready; while :; do sleep 0.01; done";
    let mut host = Host::start(Some(terminal(script)));
    host.until(|host| host.stdout.ends_with(b"ready\r\n"));
    let text = String::from_utf8(host.stdout.clone()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("/dev/pts/"), "{text}");
    assert_eq!(lines[1..4], ["25 80", "all", "xterm"]);
    host.send(&Frame::Resize(TerminalSize {
        rows: 40,
        columns: 132,
    }));
    assert_eq!(host.exit(), ContainerExit::Code(8));
    assert!(host.stdout.ends_with(b"40 132\r\n"));
    assert_eq!(host.stderr, b"");
}

#[test]
fn what_is_typed_reaches_the_terminal_and_ctrl_c_its_foreground() {
    let mut host = Host::start(Some(terminal(
        "stty -echo; echo ready; read x; echo got $x; exec cat",
    )));
    host.until(|host| host.stdout == b"ready\r\n");
    host.input = b"typed\n".to_vec();
    host.until(|host| host.stdout.ends_with(b"got typed\r\n"));
    // The end of the host's input is not that of a terminal.
    host.close_input();
    host.step(Duration::from_millis(100));
    assert_eq!(host.exit, None);
    let mut host = Host::start(Some(terminal("stty -echo; echo ready; exec cat")));
    host.until(|host| host.stdout == b"ready\r\n");
    host.input = b"\x03".to_vec();
    assert_eq!(host.exit(), ContainerExit::Signal(2));
}

#[test]
fn a_terminal_beside_the_main_process_has_all_of_its_output() {
    let mut host = Host::start(Some(shell("read x")));
    host.exec(1, terminal("seq 1 30000"));
    let (exit, stdout, _) = host.other(1);
    assert_eq!(exit, ContainerExit::Code(0));
    assert_eq!(String::from_utf8_lossy(&stdout).lines().count(), 30_000);
    host.exec(
        1,
        ProcessSpec {
            args: vec![b"/no/such".to_vec()],
            ..terminal("")
        },
    );
    assert_eq!(host.other(1).0.shell_status(), 127);
    host.send(&Frame::Resize(TerminalSize::default()));
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(1));
    let (exit, ..) = run(ProcessSpec {
        args: vec![b"/no/such".to_vec()],
        ..terminal("")
    });
    assert_eq!(exit.shell_status(), 127);
}

#[test]
fn nobody_reads_a_terminal_and_it_goes_on() {
    let mut host = Host::start(Some(terminal(
        "stty -echo; echo up; seq 1 100000; read x; exit 4",
    )));
    host.until(|host| host.stdout.starts_with(b"up"));
    host.send(&Frame::Close(Stream::Stdout));
    host.input = b"x\n".to_vec();
    host.step(Duration::from_millis(10));
    let give_up = Instant::now() + DEADLINE;
    while host.exit.is_none() {
        assert!(Instant::now() < give_up);
        host.step(Duration::from_millis(10));
    }
    assert_eq!(host.exit, Some(ContainerExit::Code(4)));
}

#[test]
fn limits_of_a_process_are_set() {
    let (exit, stdout, stderr) = run(ProcessSpec {
        rlimits: vec![(7, 100, 200), (4, 0, u64::MAX)],
        no_new_privileges: true,
        ..shell("ulimit -Sn; ulimit -Hn; grep NoNewPrivs /proc/self/status")
    });
    assert_eq!(exit, ContainerExit::Code(0), "{stderr}");
    assert_eq!(stdout, "100\n200\nNoNewPrivs:\t1\n");
    let (exit, ..) = run(ProcessSpec {
        rlimits: vec![(16, 0, 0)],
        ..shell("")
    });
    assert!(format!("{exit:?}").contains("no such resource"), "{exit:?}");
}

#[test]
fn capabilities_and_groups_are_as_told() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (exit, stdout, stderr) = run(ProcessSpec {
        // CHOWN, NET_RAW, and one that there is not.
        drop_capabilities: 1 | 1 << 13 | 1 << 63,
        groups: vec![b"extra".to_vec(), b"4242".to_vec()],
        ..shell("id -G; grep -E 'Cap(Eff|Bnd)' /proc/self/status")
    });
    assert_eq!(exit, ContainerExit::Code(0), "{stderr}");
    let mut lines = stdout.lines();
    assert_eq!(lines.next(), Some("0 77 4242"));
    for line in lines {
        let set = u64::from_str_radix(line.rsplit('\t').next().unwrap(), 16).unwrap();
        assert_eq!(set & (1 | 1 << 13), 0, "{line}");
    }
    let (exit, ..) = run(ProcessSpec {
        groups: vec![b"ghosts".to_vec()],
        ..shell("")
    });
    assert!(format!("{exit:?}").contains("ghosts"), "{exit:?}");
}

#[test]
fn one_that_is_idle_serves_until_the_host_goes() {
    let mut host = Host::start_container(Some(ContainerSpec::default()));
    host.exec(1, shell("echo here"));
    assert_eq!(host.other(1).1, b"here\n");
    host.send(&Frame::Signal(15));
    let (exit, stdout, errors) = host.help(
        2,
        Helper::Stat {
            path: b"/etc".to_vec(),
        },
        b"",
    );
    assert_eq!(exit, ContainerExit::Code(0), "{errors}");
    assert_eq!(postcard::from_bytes::<PathStatus>(&stdout).unwrap().name, b"etc");
    assert_eq!(host.exit, None);
    rustix::net::shutdown(host.control.as_fd(), rustix::net::Shutdown::Both).unwrap();
    assert_eq!(host.finish(), AgentEnd::Failed);
}

#[test]
fn one_that_stays_still_helps_after_its_end() {
    let mut host = Host::start_container(Some(ContainerSpec {
        stay: true,
        ..ContainerSpec::of(shell("exit 3"))
    }));
    host.until(|host| host.exit.is_some());
    assert_eq!(host.exit, Some(ContainerExit::Code(3)));
    let (exit, ..) = host.help(
        2,
        Helper::Stat {
            path: b"/etc".to_vec(),
        },
        b"",
    );
    assert_eq!(exit, ContainerExit::Code(0));
    host.exec(3, shell("true"));
    assert_eq!(host.other(3).0.shell_status(), 125);
    rustix::net::shutdown(host.control.as_fd(), rustix::net::Shutdown::Both).unwrap();
    assert_eq!(host.finish(), AgentEnd::Failed);
}

#[test]
fn files_go_out_and_in_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let bytes = |name: &str| path(name).to_str().unwrap().as_bytes().to_vec();
    let long = "n".repeat(200);
    std::fs::create_dir_all(path("tree/below")).unwrap();
    std::fs::write(path("tree/below").join(&long), b"content").unwrap();
    std::fs::hard_link(path("tree/below").join(&long), path("tree/link")).unwrap();
    std::os::unix::fs::symlink("below", path("tree/soft")).unwrap();
    std::fs::set_permissions(path("tree/below"), PermissionsExt::from_mode(0o2750)).unwrap();
    std::fs::create_dir(path("to")).unwrap();

    let mut host = Host::start(Some(shell("read x")));
    let pack = |name| Helper::Pack {
        path: bytes(name),
        follow: false,
    };
    let unpack = |name| Helper::Unpack {
        path: bytes(name),
        keep_owners: true,
    };
    let (exit, archive, errors) = host.help(1, pack("tree"), b"");
    assert_eq!(exit, ContainerExit::Code(0), "{errors}");
    let (exit, _, errors) = host.help(2, unpack("to"), &archive);
    assert_eq!(exit, ContainerExit::Code(0), "{errors}");
    let file = path("to/tree/below").join(&long);
    assert_eq!(std::fs::read(&file).unwrap(), b"content");
    let inode = |path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
    assert_eq!(inode(file), inode(path("to/tree/link")));
    let mode = std::fs::metadata(path("to/tree/below"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o2750);
    assert_eq!(
        std::fs::read_link(path("to/tree/soft")).unwrap().to_str(),
        Some("below")
    );

    // Neither takes the other's place, and nothing leads out.
    std::fs::write(path("file"), b"").unwrap();
    std::fs::create_dir(path("to2")).unwrap();
    std::fs::write(path("to2/tree"), b"").unwrap();
    let (exit, _, errors) = host.help(3, unpack("to2"), &archive);
    assert_eq!(exit, ContainerExit::Code(1));
    assert!(errors.contains("non-directory by a directory"), "{errors}");
    let outside = archive_of("../x");
    let (exit, _, errors) = host.help(4, unpack("to"), &outside);
    assert_eq!(exit, ContainerExit::Code(1));
    assert!(errors.contains(".."), "{errors}");
    let (_, _, errors) = host.help(5, unpack("to"), &archive_of("/x"));
    assert!(errors.contains("absolute"), "{errors}");
    let (exit, _, errors) = host.help(6, unpack("file"), &archive);
    assert_eq!(exit, ContainerExit::Code(1));
    assert!(errors.contains("not a directory"), "{errors}");
    let (exit, _, errors) = host.help(7, unpack("to"), &vec![7; 10_000]);
    assert_eq!(exit, ContainerExit::Code(1), "{errors}");
    let (exit, _, errors) = host.help(8, pack("nothing"), b"");
    assert_eq!(exit, ContainerExit::Code(1), "{errors}");
    // A helper has its number like any process.
    let (exit, tasks, _) = host.help(9, Helper::Tasks, b"");
    assert_eq!(exit, ContainerExit::Code(0));
    assert!(!postcard::from_bytes::<Vec<Task>>(&tasks).unwrap().is_empty());
    // Here is neither group nor layer.
    for helper in [Helper::Usage, Helper::Changes, Helper::SaveLayer] {
        let (exit, _, errors) = host.help(10, helper, b"");
        assert_eq!(exit, ContainerExit::Code(1));
        assert!(errors.starts_with("this machine"), "{errors}");
    }
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(1));
}

/// An archive with one empty file of this name, which a good archive would not have.
fn archive_of(name: &str) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_mode(0o644);
    header.set_size(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header, std::io::empty()).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn a_helper_holds_no_stream_of_another_open() {
    let mut host = Host::start(Some(program("cat")).map(|spec| ProcessSpec { stdin: true, ..spec }));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap().as_bytes().to_vec();
    // It waits for input that does not come.
    host.send_to(
        1,
        &Frame::Help(Helper::Unpack {
            path,
            keep_owners: false,
        }),
    );
    host.exec(2, shell("sleep 0.2"));
    host.other(2);
    host.close_input();
    assert_eq!(host.exit(), ContainerExit::Code(0));
    assert_eq!(host.ends, [2, MAIN]);
}

#[test]
fn that_the_program_runs_is_told_if_asked_for() {
    let announced = |spec| {
        let mut host = Host::start_container(Some(ContainerSpec {
            announce: true,
            ..ContainerSpec::of(spec)
        }));
        host.exit();
        host.started
    };
    assert_eq!(announced(shell("exit 1")), 1);
    assert_eq!(announced(terminal("exit 1")), 1);
    assert_eq!(announced(program("/no/such/program")), 0);
    let mut host = Host::start(Some(shell("exit 1")));
    host.exit();
    assert_eq!(host.started, 0);
}

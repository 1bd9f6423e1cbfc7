//! Agent and stub together, on the host: a forked process is the agent, its child the container, a socket pair the
//! control port. Only what makes a machine (mounts, trap, identity) is absent.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use picovm_guest_protocol::frame::{DATA_MAX, INITIAL_CREDIT, MAIN};
use picovm_guest_protocol::{ContainerExit, ContainerSpec, Frame, FrameDecoder, ProcessSpec, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions};

use crate::accounts::Accounts;
use crate::agent::Agent;
use crate::rehearsal;
use crate::stub::{self, Stack};

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
    let begun = stub::pipes().and_then(|(container, ends)| {
        let agent = Agent::new(control, container)?;
        let stack = Stack::allocate()?;
        let pid = stub::begin(&stack, ends, &accounts, agent.control(), || {
            if rustix::process::geteuid().is_root() {
                stub::withhold_capabilities()?;
            }
            Ok(spec)
        })?;
        Ok((agent, pid))
    });
    let Ok((agent, group)) = begun else {
        return false;
    };
    let served = agent.serve(group);
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
        }
    }

    fn send(&mut self, frame: &Frame) {
        frame.encode(MAIN, &mut self.unsent).unwrap();
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
        while let Some((_, frame)) = self.decoder.next_frame().unwrap() {
            assert_eq!(self.exit, None, "{frame:?} after the last frame");
            self.take(frame);
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
            Frame::Exit(exit) => self.exit = Some(exit),
            other => panic!("{other:?} from the guest"),
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
    let (exit, ..) = run(ProcessSpec::default());
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

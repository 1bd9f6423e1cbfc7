//! The emulated host as its users meet it. Each test starts at least one host, which takes some seconds.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use rustix::process::{Pid, Signal, kill_process};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// A run of the emulated host with these options and this command.
fn host<S: AsRef<OsStr>>(options: &[S], command: &[&str]) -> Command {
    let mut host = Command::new(env!("CARGO_BIN_EXE_picovm-emulated-host"));
    host.args(options).arg("--").args(command).stdin(Stdio::null());
    host
}

const NONE: [&str; 0] = [];

struct Ended {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: String,
}

fn run(host: &mut Command) -> Ended {
    let output = host.output().expect("the runner starts");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    eprint!("{stderr}");
    Ended {
        status: output.status,
        stdout: output.stdout,
        stderr,
    }
}

/// Bytes that repeat late and hold every value.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn a_command_runs_where_it_was_called_and_its_status_and_streams_come_back() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let ended = run(host(
        &NONE,
        &["sh", "-c", "pwd; id -u; echo $WORD; echo complaint >&2; exit 7"],
    )
    .current_dir(dir.path())
    .env("WORD", "passed on"));
    assert_eq!(ended.status.code(), Some(7));
    let expected = format!(
        "{}\n0\npassed on\n",
        dir.path().canonicalize().expect("real").display()
    );
    assert_eq!(String::from_utf8_lossy(&ended.stdout), expected);
    assert_eq!(ended.stderr, "complaint\n");
}

#[test]
fn every_byte_passes_through_in_both_directions() {
    // Not a multiple of any buffer's size.
    let sent = noise(9_000_001);
    let mut child = host(&NONE, &["sh", "-c", "tee /dev/stderr"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the runner starts");
    let mut stdin = child.stdin.take().expect("piped");
    let mut stderr = child.stderr.take().expect("piped");
    let copy = sent.clone();
    let writer = thread::spawn(move || stdin.write_all(&copy).expect("all is taken"));
    let second = thread::spawn(move || {
        let mut received = Vec::new();
        stderr.read_to_end(&mut received).expect("readable");
        received
    });
    let mut received = Vec::new();
    child
        .stdout
        .take()
        .expect("piped")
        .read_to_end(&mut received)
        .expect("readable");
    writer.join().expect("written");
    assert!(child.wait().expect("ends").success());
    assert!(
        received == sent,
        "standard output differs: {} of {} bytes",
        received.len(),
        sent.len()
    );
    assert!(second.join().expect("read") == sent, "standard error differs");
}

#[test]
fn a_reader_that_goes_away_ends_an_endless_writer() {
    let mut child = host(&NONE, &["sh", "-c", "yes; echo status $? >&2"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the runner starts");
    let mut first = [0; 2];
    child
        .stdout
        .take()
        .expect("piped")
        .read_exact(&mut first)
        .expect("readable");
    assert_eq!(&first, b"y\n");
    let output = child.wait_with_output().expect("ends");
    // 128 + SIGPIPE, or yes's own complaint about it.
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("status 141") || stderr.contains("status 1"),
        "{stderr}"
    );
}

#[test]
fn a_share_comes_back_and_everything_else_is_scratch() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (shared, scratch) = (dir.path().join("a, b"), dir.path().join("scratch"));
    for path in [&shared, &scratch] {
        fs::create_dir(path).expect("made");
        fs::write(path.join("before"), "before").expect("written");
    }
    let script = "set -e; for d in \"$0\" \"$1\"; do grep -q before \"$d/before\"; echo after > \"$d/after\"; \
                  rm \"$d/before\"; test ! -e \"$d/before\"; done";
    let command = [
        "sh",
        "-c",
        script,
        shared.to_str().expect("UTF-8"),
        scratch.to_str().expect("UTF-8"),
    ];
    let ended = run(&mut host(&[OsStr::new("--share"), shared.as_os_str()], &command));
    assert!(ended.status.success());
    assert_eq!(
        fs::read_to_string(shared.join("after")).expect("came back"),
        "after\n"
    );
    assert!(!shared.join("before").exists());
    assert_eq!(
        fs::read_to_string(scratch.join("before")).expect("untouched"),
        "before"
    );
    assert!(!scratch.join("after").exists());
}

#[test]
fn two_hosts_run_at_once_and_neither_sees_the_other() {
    let script = "hostname $0; echo $0 > /tmp/picovm-who; sleep 1; cat /tmp/picovm-who; hostname; nproc";
    let start = |name: &str, options: &[&str]| {
        host(options, &["sh", "-c", script, name])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the runner starts")
    };
    let (first, second) = (start("first", &[]), start("second", &["--cpus", "2"]));
    let text =
        |child: Child| String::from_utf8(child.wait_with_output().expect("ends").stdout).expect("text");
    assert_eq!(text(first), "first\nfirst\n1\n");
    assert_eq!(text(second), "second\nsecond\n2\n");
}

#[test]
fn a_command_that_cannot_be_run_gives_a_shells_status() {
    let missing = run(&mut host(&NONE, &["no-such-command"]));
    assert_eq!(missing.status.code(), Some(127));
    assert!(missing.stderr.contains("no-such-command: command not found"));
    let forbidden = run(&mut host(&NONE, &["/etc/passwd"]));
    assert_eq!(forbidden.status.code(), Some(126));
    assert!(forbidden.stderr.contains("cannot be executed"));
}

#[test]
fn a_command_killed_by_a_signal_gives_128_and_the_signal_and_leaves_nothing_to_wait_for() {
    // The sleep holds the pipes open: it must go with the command.
    let ended = run(&mut host(&NONE, &["sh", "-c", "sleep 1000 & kill -TERM $$"]));
    assert_eq!(ended.status.code(), Some(128 + 15));
}

#[test]
fn a_hang_is_an_error() {
    let ended = run(&mut host(&["--timeout", "6"], &["sleep", "1000"]));
    assert_eq!(ended.status.code(), Some(125));
    assert!(ended.stderr.contains("stopped after 6 s (--timeout)"));
}

#[test]
fn a_crash_of_the_hosts_kernel_is_an_error() {
    let ended = run(&mut host(&NONE, &["sh", "-c", "echo c > /proc/sysrq-trigger"]));
    assert_eq!(ended.status.code(), Some(125));
    assert!(
        ended
            .stderr
            .contains("kernel has crashed (Kernel panic - not syncing: sysrq triggered crash)")
    );
    let log = ended
        .stderr
        .lines()
        .find_map(|l| l.strip_prefix("--- whole console: "))
        .expect("a log is named");
    assert!(
        fs::read_to_string(log)
            .expect("the log is there")
            .contains("Kernel panic")
    );
    fs::remove_file(log).expect("removed");
}

/// Processes that `parent` has started.
fn children(parent: u32) -> Vec<String> {
    let list = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).expect("listed");
    list.split_whitespace().map(str::to_owned).collect()
}

fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Starts a host in a temporary directory of its own, waits until its command runs, sends the signal to the runner.
fn end_by(signal: Signal) -> ExitStatus {
    let tmp = tempfile::tempdir().expect("temporary directory");
    let mut child = host(
        &["--share", "/var/tmp"],
        &["sh", "-c", "echo running; sleep 1000"],
    )
    .env("TMPDIR", tmp.path())
    .stdout(Stdio::piped())
    .spawn()
    .expect("the runner starts");
    let mut line = [0; 8];
    child
        .stdout
        .as_mut()
        .expect("piped")
        .read_exact(&mut line)
        .expect("the command runs");
    let helpers = children(child.id());
    assert_eq!(
        helpers.len(),
        3,
        "QEMU, and virtiofsd for the root and for the share"
    );
    kill_process(Pid::from_child(&child), signal).expect("sent");
    let status = child.wait().expect("ends");
    await_that("helpers are left", || helpers.iter().all(|pid| !alive(pid)));
    assert_eq!(
        fs::read_dir(tmp.path()).expect("readable").count(),
        0,
        "temporary files are left"
    );
    status
}

/// Whether a process runs: one that has ended and is not yet reaped, by whoever inherits it, does not.
fn alive(pid: &str) -> bool {
    fs::read_to_string(Path::new("/proc").join(pid).join("stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .trim_start()
            .starts_with('Z')
    })
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    assert_eq!(end_by(Signal::INT).code(), Some(130));
}

#[test]
fn even_a_killed_runner_leaves_nothing_behind() {
    assert_eq!(end_by(Signal::KILL).signal(), Some(9));
}

#[test]
fn a_directory_that_is_not_there_cannot_be_shared() {
    let ended = run(&mut host(&["--share", "/no/such/directory"], &["true"]));
    assert_eq!(ended.status.code(), Some(125));
    assert!(ended.stderr.contains("cannot share /no/such/directory"));
}

#[test]
fn kvm_inside_runs_ring_0_code() {
    let own = std::env::current_exe().expect("known");
    let own = own.to_str().expect("UTF-8");
    let ended = run(&mut host(
        &NONE,
        &[
            own,
            "--ignored",
            "--exact",
            "inside_the_host_a_guest_adds_two_numbers",
        ],
    ));
    assert!(
        ended.status.success(),
        "{}",
        String::from_utf8_lossy(&ended.stdout)
    );
    assert!(String::from_utf8_lossy(&ended.stdout).contains("1 passed"));
}

/// Run by the test above, inside the host.
#[test]
#[ignore = "needs a real KVM: runs inside the emulated host"]
fn inside_the_host_a_guest_adds_two_numbers() {
    const CODE: GuestAddress = GuestAddress(0x1000);
    let program = [
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0x00, 0xd8, // add al, bl
        0xee, // out dx, al
        0xf4, // hlt
    ];
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory");
    memory.write_slice(&program, CODE).expect("fits");
    let vm = Kvm::new().expect("/dev/kvm opens").create_vm().expect("a VM");
    let region = kvm_userspace_memory_region {
        memory_size: 0x4000,
        userspace_addr: memory.get_host_address(GuestAddress(0)).expect("mapped") as u64,
        ..Default::default()
    };
    // SAFETY: the memory outlives the VM: it was made before it and is dropped after it.
    unsafe { vm.set_user_memory_region(region) }.expect("memory is taken");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    let mut segments = vcpu.get_sregs().expect("readable");
    segments.cs.base = 0;
    segments.cs.selector = 0;
    vcpu.set_sregs(&segments).expect("writable");
    let mut registers = vcpu.get_regs().expect("readable");
    (registers.rip, registers.rax, registers.rbx, registers.rflags) = (CODE.0, 40, 2, 2);
    vcpu.set_regs(&registers).expect("writable");
    match vcpu.run().expect("the guest runs") {
        VcpuExit::IoOut(0x3f8, data) => assert_eq!(data, [42]),
        exit => panic!("unexpected exit {exit:?}"),
    }
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Hlt)));
}

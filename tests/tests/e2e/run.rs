//! `picovm run`, as a Docker user types it.

use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::{picovm, shell, stderr, stdout, template};

#[test]
fn the_output_and_the_exit_status_are_those_of_the_command() {
    let output = shell("echo out; exit 7");
    assert_eq!(stdout(&output), "out");
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(stderr(&output), "");
}

#[test]
fn the_kernel_is_the_pico_kernel_and_the_root_is_debian() {
    let output = shell("uname -r; . /etc/os-release; echo $ID; dpkg -l | grep -c ^ii");
    let text = stdout(&output);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].ends_with("-pico"), "{text}");
    assert_eq!(lines[1], "debian");
    assert!(lines[2].parse::<u32>().unwrap() > 50, "{text}");
}

#[test]
fn standard_output_and_standard_error_are_separate() {
    let output = shell("echo to-out; echo to-err >&2; echo again > /dev/stderr");
    assert_eq!(stdout(&output), "to-out");
    assert_eq!(stderr(&output), "to-err\nagain");
}

#[test]
fn a_command_that_does_not_exist_is_127_and_one_that_cannot_be_executed_126() {
    template();
    let run = |program: &str| picovm(&["run", "--rm", "debian", program]).output().unwrap();
    for (program, status) in [
        ("no-such-command", 127),
        ("/no/such/file", 127),
        ("/etc/passwd", 126),
        ("/etc", 126),
    ] {
        let output = run(program);
        assert_eq!(output.status.code(), Some(status), "{program}");
        assert!(stderr(&output).contains(program), "{}", stderr(&output));
    }
}

#[test]
fn a_signal_that_ends_the_command_is_told_as_a_shell_tells_it() {
    assert_eq!(shell("kill -9 $$").status.code(), Some(137));
    assert_eq!(shell("kill -TERM $$").status.code(), Some(143));
}

#[test]
fn environment_directory_user_and_host_name_are_as_given() {
    template();
    let output = picovm(&[
        "run",
        "-e",
        "COLOUR=deep blue",
        "-w",
        "/made/for/this",
        "-u",
        "nobody",
        "--hostname",
        "box",
        "debian",
        "sh",
        "-c",
        "echo $COLOUR; pwd; id -un; hostname; echo $HOME",
    ])
    .output()
    .unwrap();
    assert_eq!(
        stdout(&output),
        "deep blue\n/made/for/this\nnobody\nbox\n/nonexistent",
        "{}",
        stderr(&output)
    );
    let output = picovm(&["run", "--rm", "-u", "33:44", "debian", "id"])
        .output()
        .unwrap();
    assert!(
        stdout(&output).starts_with("uid=33(www-data) gid=44"),
        "{}",
        stdout(&output)
    );
    let output = picovm(&["run", "--rm", "-u", "no-such-user", "debian", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("no-such-user"), "{}", stderr(&output));
}

#[test]
fn arguments_and_environment_may_be_larger_than_the_identity_area() {
    template();
    let long = "x".repeat(100_000);
    let environment = format!("LONG={long}");
    let output = picovm(&[
        "run",
        "-e",
        &environment,
        "debian",
        "sh",
        "-c",
        "echo ${#LONG} ${#1}",
        "sh",
        &long,
    ])
    .output()
    .unwrap();
    assert_eq!(stdout(&output), "100000 100000", "{}", stderr(&output));
}

fn spawn(arguments: &[&str]) -> Child {
    picovm(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Bytes that no shift or repetition of themselves equals.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn what_is_piped_in_comes_out_unchanged_past_a_slow_reader() {
    template();
    let bytes = noise(5_000_000);
    let mut child = spawn(&["run", "--rm", "-i", "debian", "cat"]);
    let mut stdin = child.stdin.take().unwrap();
    let writer = {
        let bytes = bytes.clone();
        std::thread::spawn(move || stdin.write_all(&bytes))
    };
    // Every pipe and buffer on the way is full by now.
    std::thread::sleep(Duration::from_secs(2));
    let mut seen = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut seen).unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(seen.len(), bytes.len());
    assert!(seen == bytes, "the bytes differ");
}

#[test]
fn without_i_standard_input_is_empty() {
    template();
    let mut child = spawn(&["run", "--rm", "debian", "wc", "-c"]);
    let stdin = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    assert_eq!(stdout(&output), "0");
}

#[test]
fn a_reader_that_has_enough_ends_the_writer() {
    template();
    let mut child = spawn(&["run", "--rm", "debian", "yes"]);
    let mut out = child.stdout.take().unwrap();
    let mut first = [0u8; 4];
    out.read_exact(&mut first).unwrap();
    drop(out);
    assert_eq!(&first, b"y\ny\n");
    // SIGPIPE, as without a VM in between.
    assert_eq!(child.wait().unwrap().code(), Some(128 + 13));
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: a plain system call, on a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// Starts a script that says `up` when it is ready, and waits for that.
fn up(script: &str) -> Child {
    template();
    let mut child = spawn(&["run", "--rm", "debian", "sh", "-c", script]);
    let mut said = [0u8; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    child
}

#[test]
fn ctrl_c_ends_the_container() {
    let mut child = up("echo up; exec sleep 1000");
    signal(&child, libc::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_container_can_handle_the_signals_that_it_is_sent() {
    let child = up("trap 'echo stopping; exit 3' TERM; echo up; while :; do sleep 0.1; done");
    signal(&child, libc::SIGTERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), "stopping");
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn ctrl_c_three_times_ends_a_container_that_ignores_it() {
    let mut child = up("trap '' INT; echo up; while :; do sleep 0.1; done");
    for _ in 0..3 {
        assert_eq!(child.try_wait().unwrap(), None);
        signal(&child, libc::SIGINT);
        std::thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(child.wait().unwrap().code(), Some(137));
}

#[test]
fn a_container_that_takes_too_long_is_ended() {
    template();
    let start = Instant::now();
    let output = picovm(&["run", "--rm", "--timeout", "700ms", "debian", "sleep", "1000"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(124));
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn orphans_are_reaped_and_do_not_keep_the_container() {
    let script = "sh -c 'sleep 0.2 & sleep 1000 & exit' ; sleep 0.6; grep -l '^State:.Z' /proc/[0-9]*/status; echo end";
    let output = shell(script);
    assert_eq!(stdout(&output), "end");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn two_vcpus_are_two_processors() {
    let output = picovm(&[
        "run",
        "--cpus",
        "2",
        "debian",
        "sh",
        "-c",
        "nproc; taskset -c 1 echo second",
    ])
    .output()
    .unwrap();
    assert_eq!(stdout(&output), "2\nsecond", "{}", stderr(&output));
}

/// What the kernel of a container with so much memory says it has, in KiB, and the container's limit in bytes.
fn memory_of_a_container(memory: &str) -> (u64, String) {
    let script =
        "grep MemTotal /proc/meminfo; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/*/memory.max 2>/dev/null";
    let output = picovm(&["run", "--rm", "-m", memory, "debian", "sh", "-c", script])
        .output()
        .unwrap();
    let text = stdout(&output);
    let mut words = text.split_whitespace();
    let kib = words
        .nth(1)
        .unwrap_or_else(|| panic!("no size: {}", stderr(&output)));
    let limit = words.find(|word| word.parse::<u64>().is_ok());
    (kib.parse().unwrap(), limit.unwrap_or("no limit").to_owned())
}

#[test]
fn eight_vcpus_and_the_smallest_memory_both_work() {
    let output = picovm(&["run", "--rm", "--cpus", "8", "debian", "nproc"])
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "8", "{}", stderr(&output));
    let (kib, limit) = memory_of_a_container("6m");
    assert!((40_000..65_536).contains(&kib), "{kib} KiB");
    assert_eq!(limit, (6 << 20).to_string());
}

#[test]
fn memory_above_the_hole_of_the_32_bit_devices_is_there() {
    // A machine of 4 GiB.
    let (kib, limit) = memory_of_a_container("3g");
    assert!(kib > 3_500_000, "{kib} KiB");
    assert_eq!(limit, (3u64 << 30).to_string());
}

#[test]
fn the_clock_is_that_of_the_host() {
    // The template's own clock has long been standing still.
    template();
    std::thread::sleep(Duration::from_secs(3));
    let output = shell("date +%s");
    let here = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let there: u64 = stdout(&output).parse().unwrap();
    assert!(here.abs_diff(there) <= 2, "{here} here, {there} there");
}

#[test]
fn the_container_cannot_reach_the_machine_under_it() {
    let output = shell(
        "mknod /tmp/mem c 1 1; head -c 1 /tmp/mem; echo $?; perl -e 'syscall(169, 0xfee1dead, 672274793, 0x1234567) and print \"$!\n\"'; echo still",
    );
    assert!(
        stdout(&output).ends_with("Operation not permitted\nstill"),
        "{}",
        stdout(&output)
    );
    assert!(
        stderr(&output).contains("Operation not permitted"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_kernel_panic_is_told_with_the_consoles_last_words() {
    let hog = "echo 2 > /proc/sys/vm/panic_on_oom; head -c 1000000000 /dev/zero | tail";
    let output = picovm(&["run", "--rm", "-m", "96m", "debian", "sh", "-c", hog])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", stdout(&output));
    assert!(
        stderr(&output).contains("the clone ended before its container"),
        "{}",
        stderr(&output)
    );
    assert!(stderr(&output).contains("panic_on_oom"), "{}", stderr(&output));
}

#[test]
fn what_no_machine_can_have_is_refused_with_the_range() {
    let no_image = &["run", "-m", "64m", "--pull", "never", "no-such-image", "true"];
    for (arguments, says) in [
        (&["run", "-m", "0", "debian", "true"][..], "6m"),
        (&["run", "-m", "5m", "debian", "true"], "6m"),
        (&["run", "-m", "900000g", "debian", "true"], "32 to"),
        (&["run", "-m", "500g", "debian", "true"], "this host has"),
        (&["run", "--cpus", "0", "debian", "true"], "1 to 8"),
        (&["run", "--cpus", "9", "debian", "true"], "1 to 8"),
        (no_image, "picovm image"),
        (&["run", "-m", "64m", "../escape", "true"], "is not a name"),
    ] {
        let output = picovm(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{arguments:?}");
        assert!(
            stderr(&output).contains(says),
            "{arguments:?}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn a_template_is_built_once_and_said_so() {
    let own = picovm_tests::OwnStore::new().unwrap();
    let run = || {
        own.picovm()
            .args(["run", "-m", "96m", "debian", "echo", "hello"])
            .output()
            .unwrap()
    };
    let first = run();
    assert_eq!(stdout(&first), "hello");
    assert!(
        stderr(&first).contains("no template of debian with 128 MiB and 1 vCPU yet"),
        "{}",
        stderr(&first)
    );
    let second = run();
    assert_eq!(
        (stdout(&second), stderr(&second)),
        ("hello".into(), String::new())
    );
    let list = own.picovm().args(["template", "ls"]).output().unwrap();
    assert_eq!(stdout(&list).lines().count(), 3, "{}", stdout(&list));
    let list = own.picovm().args(["template", "ls", "--json"]).output().unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    let list = list.as_array().unwrap();
    let is_base = |template: &&serde_json::Value| template["metadata"]["notes"]["image"].is_null();
    let id = list.iter().find(|template| !is_base(template)).unwrap()["id"]
        .as_str()
        .unwrap();
    let base = list.iter().find(is_base).unwrap()["id"].as_str().unwrap();
    assert!(
        list.iter()
            .all(|template| template["metadata"]["memory_mib"] == 128)
    );
    let inspect = own
        .picovm()
        .args(["template", "inspect", &id[..6]])
        .output()
        .unwrap();
    assert!(
        stdout(&inspect).contains("\"image\": \"debian\""),
        "{}",
        stderr(&inspect)
    );
    assert!(
        own.picovm()
            .args(["template", "rm", id, base])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(
        std::fs::read_dir(own.path().join("templates"))
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().path().is_dir())
            .count(),
        0
    );
}

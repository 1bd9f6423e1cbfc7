//! A writable layer on disk: what fits in it, that it is kept whatever ends, and that what is deleted goes back.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::{Container, output, picovm, refused, stderr, stdout, store, told, until};

/// The disk of a container.
fn disk(container: &Container) -> PathBuf {
    store()
        .path()
        .join("containers")
        .join(container.id())
        .join("storage")
}

/// MiB that it takes here.
pub fn taken(container: &Container) -> u64 {
    fs::metadata(disk(container)).expect("its disk").blocks() >> 11
}

/// A machine of 64 MiB.
const SMALL: [&str; 4] = ["-m", "32m", "--storage", "256m"];

#[test]
fn a_container_writes_more_than_its_memory_holds_and_has_it_when_it_is_started_again() {
    let script = "if [ -e /big ]; then sha256sum < /big; else seq 1 20000000 | head -c 100M > /big; sha256sum < /big; fi";
    let container = Container(told(
        &[&["create"], &SMALL[..], &["debian", "sh", "-ec", script]].concat(),
    ));
    assert!(taken(&container) < 16, "{} MiB", taken(&container));
    let first = told(&["start", "-a", container.id()]);
    assert_eq!(first.len(), 67, "{first}");
    assert!(taken(&container) >= 100, "{} MiB", taken(&container));
    assert_eq!(told(&["start", "-a", container.id()]), first);
    assert_eq!(container.inspect("{{.State.Error}}"), "");
    assert_eq!(
        container.inspect("{{.HostConfig.StorageOpt.size}}"),
        (256 << 20).to_string()
    );
}

#[test]
fn a_full_disk_is_an_error_of_who_writes_and_what_is_deleted_goes_back_to_this_machine() {
    let container = Container::sleeping(&["--storage-opt", "size=64m"]);
    let full = output(&["exec", container.id(), "dd", "if=/dev/zero", "of=/big", "bs=1M"]);
    assert!(
        stderr(&full).contains("No space left on device"),
        "{}",
        stderr(&full)
    );
    assert_eq!(container.shell("rm /big; echo fine > /small; cat /small"), "fine");
    container.shell("dd if=/dev/zero of=/big bs=1M count=32 2> /dev/null; sync");
    let before = taken(&container);
    assert!((32..=64).contains(&before), "{before} MiB");
    container.shell("rm /big; sync");
    until(
        || taken(&container) < before - 24,
        || format!("it takes {} of {before} MiB still", taken(&container)),
    );
    assert_eq!(fs::metadata(disk(&container)).unwrap().len(), 64 << 20);
}

#[test]
fn what_is_on_its_disk_survives_the_end_of_vmm_process_and_monitor() {
    let container = Container::sleeping(&["--storage", "64m"]);
    for round in ["one", "two"] {
        container.shell(&format!("echo {round} >> /kept; sync; echo lost > /not-synced"));
        let monitor: u32 = container.inspect("{{.State.Pid}}").parse().unwrap();
        let victim = match round {
            "one" => picovm_tests::children(monitor)[0],
            _ => monitor,
        };
        picovm_tests::kill(victim);
        container.until("{{.State.Status}}", "exited");
        // At once: the VMM process of a monitor that was killed may be there still.
        told(&["start", container.id()]);
    }
    assert_eq!(container.shell("cat /kept"), "one\ntwo");
}

#[test]
fn diff_commit_and_cp_work_on_it_whether_it_runs_or_not() {
    let script = "rm -rf /etc/apt /etc/issue; mkdir -p /etc/apt /made; echo new > /etc/apt/new; chmod 700 /srv; echo text > /made/file; \
                  exec sleep 1000";
    let container = Container::run(&["--storage", "64m"], &["sh", "-ec", script]);
    let changed = "C /etc\nC /etc/apt\nD /etc/apt/apt.conf.d";
    until(
        || container.shell("cat /made/file 2> /dev/null || true") == "text",
        || "it does not write".into(),
    );
    let while_running = told(&["diff", container.id()]);
    assert!(while_running.starts_with(changed), "{while_running}");
    for line in [
        "A /etc/apt/new",
        "D /etc/issue",
        "A /made",
        "A /made/file",
        "C /srv",
    ] {
        assert!(
            while_running.lines().any(|other| other == line),
            "{while_running}"
        );
    }
    let not = ["/etc/host", "/etc/resolv", " /dev", " /proc", " /sys", " /run"];
    assert!(
        !not.iter().any(|not| while_running.contains(not)),
        "{while_running}"
    );
    told(&["stop", "-t", "0", container.id()]);
    assert_eq!(told(&["diff", container.id()]), while_running);
    told(&["commit", container.id(), "stored:1"]);
    let script = "cat /made/file /etc/apt/new; ls /etc/apt; ls -d /etc/issue || stat -c %a /srv";
    let ran = output(&["run", "--rm", "stored:1", "sh", "-c", script]);
    assert_eq!(stdout(&ran), "text\nnew\nnew\n700", "{}", stderr(&ran));
    told(&["rmi", "stored:1"]);
    let here = tempfile::tempdir().unwrap();
    let file = here.path().join("file");
    let path = file.to_str().unwrap();
    fs::write(&file, "from here\n").unwrap();
    told(&["cp", path, &format!("{}:/made/here", container.id())]);
    told(&["cp", &format!("{}:/made/file", container.id()), path]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "text\n");
    let out = output(&["cp", &format!("{}:/made/here", container.id()), "-"]);
    assert!(stdout(&out).contains("from here"));
    // It does again what it does; what was copied is there still.
    picovm(&["start", container.id()]).output().unwrap();
    assert_eq!(container.shell("cat /made/here"), "from here");
    assert_eq!(
        container.shell("cat /etc/hostname"),
        container.inspect("{{.Config.Hostname}}")
    );
}

#[test]
fn its_disk_goes_with_it() {
    let id = told(&["create", "--storage", "16m", "debian", "true"]);
    let container = Container(id);
    assert_eq!(fs::metadata(disk(&container)).unwrap().mode() & 0o777, 0o600);
    told(&["rm", container.id()]);
    assert!(!disk(&container).exists());
    let ran = told(&[
        "run",
        "--rm",
        "--storage",
        "16m",
        "--read-only",
        "debian",
        "sh",
        "-c",
        "touch /x 2>&1 || true",
    ]);
    assert!(ran.contains("Read-only"), "{ran}");
    for (options, says) in [
        (&["--storage", "1m"][..], "16m"),
        (&["--storage", "2000g"], "16m"),
        (&["--storage-opt", "quota=1g"], "size"),
    ] {
        let error = refused(&[&["create"], options, &["debian", "true"]].concat(), 125);
        assert!(error.contains(says), "{error}");
    }
}

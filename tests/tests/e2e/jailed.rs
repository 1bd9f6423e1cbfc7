//! Every VMM process is confined, however its clone was started.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use picovm_engine::{Confinement, Parking, Pool};

use crate::pool::{alone, clones, gone_within};
use crate::{picovm, stderr, stdout, store, template};

/// A container that has said that it is up, and waits; dropping it kills its monitor.
struct Waiting(Child);

impl Waiting {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut said = [0u8; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        Self(child)
    }

    /// Its VMM process.
    fn vmm(&self) -> String {
        let (_, vmm) = picovm_tests::monitor_and_vmm(self.0.id()).unwrap();
        vmm.to_string()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Ok((monitor, _)) = picovm_tests::monitor_and_vmm(self.0.id()) {
            picovm_tests::kill(monitor);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn waiting(options: &[&str]) -> Waiting {
    template();
    let command = ["debian", "sh", "-c", "echo up; exec sleep 1000"];
    Waiting::start(&mut picovm(&[&["run"], options, &command].concat()))
}

pub fn status(process: &str, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':')
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned()
}

fn namespace(process: &str, name: &str) -> std::path::PathBuf {
    std::fs::read_link(format!("/proc/{process}/ns/{name}")).unwrap()
}

/// Files that a VMM process has open, each named by a part of its path.
const FILES: [&str; 8] = [
    "/dev/kvm",
    "/dev/null",
    "anon_inode:",
    "socket:",
    "pipe:",
    "/memory",
    "/image",
    ".erofs",
];

/// Looks at a VMM process from outside.
fn assert_jailed(process: &str) {
    assert_jailed_with(process, &FILES);
}

/// The same of one that has these files open.
pub fn assert_jailed_with(process: &str, files: &[&str]) {
    assert_walls(process, files);
    let filters = filters(process);
    assert!(filters.len() >= 3, "{filters:?}");
    for (name, count) in filters {
        // The outer filter, and that of its kind.
        assert_eq!(count, 2, "{name}");
    }
}

/// The names of its threads, and by how many filters of system calls each is confined.
fn filters(process: &str) -> Vec<(String, u32)> {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    threads
        .map(|entry| {
            format!(
                "{process}/task/{}",
                entry.unwrap().file_name().into_string().unwrap()
            )
        })
        // A thread that the kernel makes for a VM has no system calls.
        .filter(|thread| !status(thread, "Name").starts_with("kvm-"))
        .map(|thread| {
            let name = status(&thread, "Name");
            assert_eq!(status(&thread, "Seccomp"), "2", "{name}");
            (name, status(&thread, "Seccomp_filters").parse().unwrap())
        })
        .collect()
}

/// All that confines it but the filters.
fn assert_walls(process: &str, files: &[&str]) {
    assert!(status(process, "Uid").parse::<u32>().unwrap() >= 200_000);
    assert!(status(process, "Gid").parse::<u32>().unwrap() >= 200_000);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status(process, set), 16), Ok(0), "{set}");
    }
    assert_eq!(status(process, "NoNewPrivs"), "1");
    for name in ["mnt", "pid", "ipc", "uts", "net"] {
        assert_ne!(namespace(process, name), namespace("self", name), "{name}");
    }
    let root = std::fs::read_dir(format!("/proc/{process}/root")).unwrap();
    assert_eq!(root.count(), 0, "its root is empty");
    let cgroup = std::fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
    assert!(cgroup.contains("picovm-jail"), "{cgroup}");
    for descriptor in std::fs::read_dir(format!("/proc/{process}/fd")).unwrap() {
        let leads_to = std::fs::read_link(descriptor.unwrap().path()).unwrap();
        let name = leads_to.to_string_lossy().into_owned();
        assert!(files.iter().any(|part| name.contains(part)), "{name} is open");
    }
}

#[test]
fn every_vmm_process_is_in_a_jail() {
    let _alone = alone();
    assert_jailed(&waiting(&[]).vmm());

    let mut pool = Pool::new(template(), 2, Parking::Prefaulted, Confinement::Jailed).unwrap();
    pool.wait_until_full(Duration::from_secs(60)).unwrap();
    let clones = clones(&pool);
    assert_eq!(clones.len(), 2);
    for clone in &clones {
        assert_jailed(&clone.to_string());
    }
    // One more waits for an order, and has no machine yet.
    let ahead = crate::pool::waiting(&pool);
    assert_walls(&ahead.to_string(), &FILES);
    let filters = filters(&ahead.to_string());
    for (name, count) in [("vcpu0", 2), ("devices", 2), ("maker", 1)] {
        assert!(filters.contains(&(name.into(), count)), "{name}: {filters:?}");
    }
    let all = clones.iter().chain([&ahead]);
    let ids: HashSet<String> = all.map(|clone| status(&clone.to_string(), "Uid")).collect();
    assert_eq!(ids.len(), 3, "each has an id of its own");
    drop(pool);
    assert!(gone_within(Duration::from_secs(20)));
}

#[test]
fn the_callers_environment_is_not_in_the_vmm_process() {
    let _alone = alone();
    template();
    let mut command = picovm(&["run", "debian", "sh", "-c", "echo up; exec sleep 1000"]);
    let waiting = Waiting::start(command.env("TOKEN", "hunter2"));
    let environment = |process: &str| std::fs::read(format!("/proc/{process}/environ")).unwrap();
    let has = |bytes: &[u8]| bytes.windows(7).any(|window| window == b"hunter2");
    assert!(has(&environment(&waiting.0.id().to_string())));
    assert!(!has(&environment(&waiting.vmm())));
}

#[test]
fn without_a_jail_there_is_a_warning() {
    let _alone = alone();
    template();
    let output = picovm(&["run", "--no-jail", "debian", "echo", "hi"])
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "hi");
    assert!(
        stderr(&output).contains("warning: --no-jail"),
        "{}",
        stderr(&output)
    );
    let output = picovm(&["run", "--seccomp=log", "debian", "echo", "hi"])
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "hi");
    assert!(
        stderr(&output).contains("warning: --seccomp=log"),
        "{}",
        stderr(&output)
    );
    // Nothing is missing in the lists.
    assert!(
        !stderr(&output).contains("not in the list"),
        "{}",
        stderr(&output)
    );
    assert_eq!(
        status(&waiting(&["--no-jail"]).vmm(), "Uid"),
        status("self", "Uid")
    );
}

#[test]
fn isolated_memory_is_no_mapping_of_the_template() {
    let _alone = alone();
    let maps = |waiting: &Waiting| {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", waiting.vmm())).unwrap();
        maps.lines().filter(|line| line.ends_with("/memory")).count()
    };
    assert!(maps(&waiting(&[])) > 0);
    assert_eq!(maps(&waiting(&["--isolate-memory"])), 0);
    let output = picovm(&[
        "run",
        "--isolate-memory",
        "debian",
        "sh",
        "-c",
        "cat /etc/debian_version; exit 3",
    ])
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stdout(&output).starts_with("12"), "{}", stdout(&output));
}

/// `picovm` of a user who is nobody, with everything that it needs where that can read and write it, and with no template: those
/// of the store are of other files. The image itself is where the store has a link.
pub fn of_nobody(directory: &Path, arguments: &str) -> Command {
    let at = |name: &str| directory.join(name);
    std::fs::create_dir(at("guest")).unwrap();
    std::fs::copy(picovm_tests::binary(), at("picovm")).unwrap();
    std::fs::copy(
        picovm_tests::binary().with_file_name("picovm-vmm"),
        at("picovm-vmm"),
    )
    .unwrap();
    std::fs::copy(crate::guest().kernel, at("guest/vmlinux")).unwrap();
    std::fs::copy(crate::guest().initramfs, at("guest/initramfs.cpio")).unwrap();
    std::fs::create_dir(at("store")).unwrap();
    let copied = Command::new("cp")
        .args(["-rL", "--reflink=auto"])
        .arg(store().path().join("images"))
        .arg(at("store"))
        .status()
        .unwrap();
    assert!(copied.success());
    as_nobody(directory, arguments)
}

/// `picovm` of that user once more.
fn as_nobody(directory: &Path, arguments: &str) -> Command {
    let at = |name: &str| directory.join(name);
    let script = format!(
        "[ -e \"$KVM\" ] || mknod \"$KVM\" c 10 232 && chmod 666 \"$KVM\" && mount --bind \"$KVM\" /dev/kvm && \
                  chown -R 65534:65534 \"$PICOVM_HOME\" && chmod 755 \"$PICOVM_HOME/..\" && \
                  exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all \"$0\" {arguments}"
    );
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", &script])
        .arg(at("picovm"))
        .env("PICOVM_HOME", at("store"))
        .env("PICOVM_POOL_IDLE", "0")
        .env("KVM", at("kvm"));
    command
}

#[test]
fn without_root_anywhere_a_container_runs_in_a_jail_too() {
    let _alone = alone();
    template();
    let directory = tempfile::tempdir().unwrap();
    let run = "run debian sh -c 'echo up; exec sleep 1000'";
    let waiting = Waiting::start(&mut of_nobody(directory.path(), run));
    let vmm = waiting.vmm();
    assert_eq!(status(&vmm, "Uid"), "65534");
    assert_eq!(status(&vmm, "Seccomp"), "2");
    for name in ["user", "mnt", "pid", "ipc", "uts", "net"] {
        assert_ne!(namespace(&vmm, name), namespace("self", name), "{name}");
    }
    let root = std::fs::read_dir(Path::new("/proc").join(&vmm).join("root")).unwrap();
    assert_eq!(root.count(), 0, "its root is empty");
}

#[test]
fn without_root_the_start_that_follows_a_cold_one_takes_a_parked_clone_too() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let told = |command: &mut Command| {
        let output = command.env("PICOVM_POOL_IDLE", "10m").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let run = "run --rm debian echo up";
    assert_eq!(told(&mut of_nobody(directory.path(), run)), "up");
    let seen = || told(&mut as_nobody(directory.path(), "pool ls"));
    let give_up = Instant::now() + Duration::from_secs(60);
    while !seen().contains("1 of 1") {
        assert!(Instant::now() < give_up, "{}", seen());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(told(&mut as_nobody(directory.path(), run)), "up");
    let listed = seen();
    assert!(
        listed.contains("1 of 1   1 ") || listed.contains("0 of 1   1 "),
        "{listed}"
    );
    told(&mut as_nobody(directory.path(), "pool stop --all"));
}

/// Cgroups of jails that are there.
pub fn cgroups() -> usize {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let roots = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - cgroup")?;
        let _ = right;
        left.split(' ').nth(4)
    });
    roots
        .filter_map(|root| std::fs::read_dir(Path::new(root).join("picovm-jail")).ok())
        .flatten()
        .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.path().is_dir()))
        .count()
}

#[test]
fn two_hundred_jailed_in_sequence_are_right_and_leave_nothing() {
    let _alone = alone();
    template();
    // What a picovm left that was killed, the next jail with the same id removes, and no other.
    let before = cgroups();
    for number in 0..200 {
        let text = format!("echo clone {number}; exit {}", number % 100);
        let output = picovm(&["run", "--rm", "debian", "sh", "-c", &text])
            .output()
            .unwrap();
        assert_eq!(stdout(&output), format!("clone {number}"), "{}", stderr(&output));
        assert_eq!(output.status.code(), Some(number % 100));
    }
    assert!(gone_within(Duration::from_secs(20)));
    let after = cgroups();
    assert!(after <= before, "{after} cgroups, and {before} before");
}

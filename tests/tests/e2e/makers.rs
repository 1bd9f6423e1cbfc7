//! Templates are made in a jail as containers run in one, and whatever happens to who makes one, nothing is left of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use picovm_tests::OwnStore;
use rustix::process::{Pid, Signal, kill_process};

use crate::jailed::{assert_jailed_with, cgroups, of_nobody, status};
use crate::pool::{alone, gone_within, vmm_processes};
use crate::{stderr, stdout};

const PATIENCE: Duration = Duration::from_secs(60);
const GONE: Duration = Duration::from_secs(20);

/// A picovm that is making a template, and the process in which that is made, stopped in the middle.
struct Making {
    picovm: Child,
    /// Who has started the process.
    starter: Pid,
    process: Pid,
}

fn pid(id: i32) -> Pid {
    Pid::from_raw(id).unwrap()
}

fn filters(process: &str) -> u32 {
    // One that has just ended has none.
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp_filters:"));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

impl Making {
    /// Starts a picovm, and stops the process of the template once its guest may run.
    #[expect(
        clippy::zombie_processes,
        reason = "one that is not waited for is that of a test that has failed"
    )]
    fn stopped(command: &mut Command, sealed: impl Fn(&str) -> bool) -> Self {
        let picovm = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        loop {
            let all = vmm_processes();
            let of_starter = all
                .iter()
                .find(|(_, parent)| all.iter().any(|(other, _)| other == parent));
            if let Some((process, parent)) = of_starter
                && sealed(&process.to_string())
            {
                let process = pid(*process);
                kill_process(process, Signal::STOP).unwrap();
                return Self {
                    picovm,
                    starter: pid(*parent),
                    process,
                };
            }
            assert!(begun.elapsed() < PATIENCE, "no template is being made");
        }
    }

    fn of(store: &OwnStore, arguments: &[&str]) -> Self {
        // That of the process, and that of its main thread.
        Self::stopped(store.picovm().args(arguments), |process| filters(process) == 2)
    }

    fn name(&self) -> String {
        self.process.as_raw_nonzero().to_string()
    }

    fn go_on(self) -> Output {
        kill_process(self.process, Signal::CONT).unwrap();
        self.end()
    }

    fn end(self) -> Output {
        self.picovm.wait_with_output().unwrap()
    }
}

fn build(memory: &str) -> [&str; 5] {
    ["template", "build", "-m", memory, "debian"]
}

/// What is in the directory of templates, but locks.
fn templates(store: &OwnStore) -> Vec<String> {
    fs::read_dir(store.path().join("templates"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".lock"))
        .collect()
}

fn works(store: &OwnStore, memory: &str) {
    let output = store
        .picovm()
        .args(["run", "-m", memory, "debian", "echo", "works"])
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "works", "{}", stderr(&output));
}

const FILES: [&str; 7] = [
    "/dev/kvm",
    "anon_inode:",
    "socket:",
    "pipe:",
    "/memory",
    "/state",
    "/pagemap",
];

#[test]
fn a_template_is_made_in_a_jail_the_base_and_that_of_the_image() {
    let _alone = alone();
    let store = OwnStore::new().unwrap();
    let files = [&FILES[..], &[".erofs", "/image"]].concat();
    let base = Making::of(&store, &build("88m"));
    assert_jailed_with(&base.name(), &files);
    assert_eq!(templates(&store).len(), 1, "the base, half-written");
    let output = base.go_on();
    assert!(output.status.success(), "{}", stderr(&output));

    // The base is there: what comes now is a clone of it, in which the image's program runs.
    let made = stdout(&output);
    fs::remove_dir_all(store.path().join("templates").join(made)).unwrap();
    let image = Making::of(&store, &build("88m"));
    assert_jailed_with(&image.name(), &files);
    let output = image.go_on();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stderr(&output).contains("booting"), "{}", stderr(&output));
    assert!(gone_within(GONE));
    works(&store, "88m");
}

#[test]
fn a_picovm_that_is_killed_in_the_middle_leaves_nothing_and_the_next_build_works() {
    let _alone = alone();
    let store = OwnStore::new().unwrap();
    let before = cgroups();
    let mut making = Making::of(&store, &build("88m"));
    making.picovm.kill().unwrap();
    making.picovm.wait().unwrap();
    assert!(
        gone_within(GONE),
        "who makes its template ends with it, even one that stands still"
    );
    assert!(cgroups() <= before);
    works(&store, "88m");
    assert!(templates(&store).iter().all(|name| !name.starts_with('.')));
}

#[test]
fn a_maker_that_is_killed_is_an_error_that_says_so_and_leaves_nothing() {
    let _alone = alone();
    let store = OwnStore::new().unwrap();
    let before = cgroups();
    let making = Making::of(&store, &build("88m"));
    kill_process(making.process, Signal::KILL).unwrap();
    let output = making.end();
    assert_eq!(output.status.code(), Some(125));
    let said = stderr(&output);
    assert!(
        said.contains("cannot make the template") && said.contains("ended by signal 9"),
        "{said}"
    );
    assert!(gone_within(GONE));
    assert_eq!(templates(&store), Vec::<String>::new());
    assert!(cgroups() <= before);
    works(&store, "88m");
}

#[test]
fn what_its_starter_leaves_when_it_is_killed_the_next_container_sweeps() {
    let _alone = alone();
    let store = OwnStore::new().unwrap();
    works(&store, "80m");
    let before = cgroups_at_rest();
    let making = Making::of(&store, &build("150m"));
    kill_process(making.starter, Signal::KILL).unwrap();
    let output = making.end();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("has ended"), "{}", stderr(&output));
    assert!(gone_within(GONE));
    assert!(cgroups() > before, "nobody was left to remove the cgroup");
    works(&store, "80m");
    assert_eq!(cgroups_at_rest(), 0);
    assert_eq!(templates(&store).len(), 2, "the base and the image of 80 MiB");
}

/// Cgroups of jails that are there, once those of containers that have just ended are gone: a monitor takes a clone down after its
/// end was told.
fn cgroups_at_rest() -> usize {
    let begun = Instant::now();
    while cgroups() > 0 && begun.elapsed() < GONE {
        std::thread::sleep(Duration::from_millis(20));
    }
    cgroups()
}

fn base_of(store: &OwnStore) -> PathBuf {
    let all = store.store.templates().unwrap();
    let base = all.into_iter().find(|template| template.image().is_none());
    base.unwrap().path
}

fn flip(file: &Path) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0u8];
    let offset = file.metadata().unwrap().len() / 3;
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

#[test]
fn a_base_that_is_damaged_is_an_error_with_the_reason() {
    let _alone = alone();
    let store = OwnStore::new().unwrap();
    let built = store.picovm().args(build("88m")).output().unwrap();
    assert!(built.status.success(), "{}", stderr(&built));
    fs::remove_dir_all(store.path().join("templates").join(stdout(&built))).unwrap();
    for name in ["state", "memory"] {
        let file = base_of(&store).join(name);
        flip(&file);
        let output = store.picovm().args(build("88m")).output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        let said = stderr(&output);
        assert!(said.contains("is damaged") && said.contains(name), "{said}");
        flip(&file);
    }
    assert_eq!(templates(&store).len(), 1, "the base");
    works(&store, "88m");
}

#[test]
fn without_a_jail_a_template_is_made_too_and_that_is_said_loudly() {
    let _alone = alone();
    let store = OwnStore::new().unwrap();
    let run = ["run", "--no-jail", "-m", "88m", "debian", "echo", "hi"];
    // Its vCPU and its devices have a thread each.
    let own = |process: &str| {
        let threads = fs::read_dir(format!("/proc/{process}/task"));
        threads.is_ok_and(|threads| threads.count() >= 3)
    };
    let making = Making::stopped(store.picovm().args(run), own);
    assert_eq!(status(&making.name(), "Uid"), status("self", "Uid"));
    assert_eq!(status(&making.name(), "Seccomp"), "0");
    let output = making.go_on();
    assert_eq!(stdout(&output), "hi", "{}", stderr(&output));
    let said = stderr(&output);
    let (warning, booting) = (said.find("warning: --no-jail"), said.find("booting"));
    assert!(warning.is_some() && warning < booting, "{said}");
    // What `picovm template build` makes is always made in a jail.
    let making = Making::of(&store, &build("150m"));
    assert_jailed_with(&making.name(), &[&FILES[..], &[".erofs", "/image"]].concat());
    assert!(making.go_on().status.success());
}

#[test]
fn with_eight_vcpus_a_template_is_made_and_nothing_is_missing_in_the_lists() {
    let _alone = alone();
    for option in ["--seccomp=kill", "--seccomp=log"] {
        let store = OwnStore::new().unwrap();
        let output = store
            .picovm()
            .args(["run", option, "--cpus", "8", "-m", "128m", "debian", "nproc"])
            .output()
            .unwrap();
        assert_eq!(stdout(&output), "8", "{}", stderr(&output));
        assert!(
            !stderr(&output).contains("not in the list"),
            "{}",
            stderr(&output)
        );
        // It was tried which pages a start touches, with as many.
        let made = templates(&store).into_iter().filter(|name| {
            let path = store.path().join("templates").join(name);
            path.join("working-set").exists()
        });
        assert_eq!(made.count(), 1);
        assert!(gone_within(GONE));
    }
}

#[test]
fn without_root_anywhere_a_template_is_made_in_a_jail_too() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    crate::template();
    let mut command = of_nobody(directory.path(), "template build -m 88m debian");
    let making = Making::stopped(&mut command, |process| filters(process) == 2);
    let name = making.name();
    assert_eq!(status(&name, "Uid"), "65534");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(u64::from_str_radix(&status(&name, set), 16), Ok(0), "{set}");
    }
    let root = fs::read_dir(Path::new("/proc").join(&name).join("root")).unwrap();
    assert_eq!(root.count(), 0, "its root is empty");
    let output = making.go_on();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(gone_within(GONE));
}

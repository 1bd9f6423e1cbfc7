//! `picovm doctor`: can this machine run picovm, and what is to be done if not?
//!
//! Functions named `gather_*` look at the machine; those named `judge_*` and `parse_*` are pure.

use std::fmt::Write as _;
use std::io::{ErrorKind, IsTerminal, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use kvm_ioctls::Kvm;
use picovm_vmm::probe::{self, Failure, Outcome, ProbeReport, Verdict};
use picovm_vmm::vm::NEEDED;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::output;

/// The version of the KVM API, unchanged since Linux 2.6.22 (KVM API 4.1).
const KVM_API: i32 = 12;
/// Oldest kernel that picovm is made for.
const KERNEL: (u32, u32) = (5, 10);
/// A machine of default size.
const MACHINE: u64 = 256 << 20;
/// Less available memory than this runs next to nothing; less than the second runs few clones.
const MEMORY: (u64, u64) = (128 << 20, 1 << 30);
/// Free space of the store: less than this holds no template; less than the second few images.
const SPACE: (u64, u64) = (256 << 20, 2 << 30);
/// Open files that many clones in one process want.
const OPEN_FILES: u64 = 1024;
/// Cgroup controllers that limit a container.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
const EMULATED_HOST: &str =
    "use the emulated host: tests/emulated-host/run -- COMMAND, or make with PICOVM_HOST=emulated";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warning,
    Failed,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    found: String,
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            found: found.into(),
            remedy: None,
        }
    }

    fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Warning,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn failed(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Failed,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// What the machine is.
#[derive(Debug, Serialize)]
struct Host {
    kernel: String,
    processor: String,
    /// `vmx`, `svm` or nothing.
    virtualization: Option<&'static str>,
    /// Whether a hypervisor is below this machine.
    virtual_machine: bool,
    kvm_modules: Vec<String>,
    memory_mib: u64,
    emulated_host: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    host: Host,
    checks: Vec<Check>,
    usable: bool,
}

/// Checks this machine and prints what it finds. The exit status is 0 if picovm can run here, 1 if not.
pub fn doctor(json: bool) -> anyhow::Result<ExitCode> {
    let report = examine();
    let text = if json {
        format!("{}\n", serde_json::to_string_pretty(&report)?)
    } else {
        let stdout = std::io::stdout();
        let terminal = stdout.is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let columns = if terminal {
            rustix::termios::tcgetwinsize(&stdout).map_or(0, |size| size.ws_col)
        } else {
            0
        };
        table(&report, colour, if columns == 0 { 110 } else { columns.into() })
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        result => result?,
    }
    Ok(ExitCode::from(u8::from(!report.usable)))
}

fn examine() -> Report {
    let cpuinfo = parse_cpuinfo(&read("/proc/cpuinfo"));
    let kvm_modules = gather_kvm_modules();
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let memory = parse_meminfo(&read("/proc/meminfo"));

    let mut checks = gather_kvm();
    checks.push(judge_virtualization(&cpuinfo, &kvm_modules));
    checks.push(judge_kernel(&kernel));
    checks.push(judge_memory(memory));
    checks.push(judge_overcommit(&read("/proc/sys/vm/overcommit_memory")));
    checks.push(judge_limits(
        getrlimit(Resource::As).current,
        getrlimit(Resource::Memlock).current,
    ));
    let files = getrlimit(Resource::Nofile);
    checks.push(judge_open_files(files.current, files.maximum));
    checks.push(judge_huge_pages(
        &read("/sys/kernel/mm/transparent_hugepage/enabled"),
        &read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    ));
    checks.push(judge_userfaultfd(
        Path::new("/proc/sys/vm/unprivileged_userfaultfd").exists(),
    ));
    checks.push(gather_cgroup());
    checks.push(gather_tun());
    checks.push(gather_erofs_tools());
    checks.push(gather_ext4_tools());
    checks.push(gather_store());

    let host = Host {
        kernel,
        processor: cpuinfo.model,
        virtualization: cpuinfo.virtualization,
        virtual_machine: cpuinfo.hypervisor,
        kvm_modules,
        memory_mib: memory.map_or(0, |memory| memory.total >> 20),
        emulated_host: std::env::var_os("PICOVM_EMULATED_HOST").is_some(),
    };
    let usable = checks.iter().all(|check| check.status != Status::Failed);
    Report { host, checks, usable }
}

/// A small file of the kernel; empty if there is none.
fn read(path: impl AsRef<Path>) -> String {
    std::fs::read(path).map_or_else(
        |_| String::new(),
        |bytes| String::from_utf8_lossy(&bytes).trim().to_owned(),
    )
}

// KVM

/// Device, capabilities and guest code; the last two only as far as those before them are well.
fn gather_kvm() -> Vec<Check> {
    let permissions = std::fs::metadata("/dev/kvm").ok().map(|metadata| Permissions {
        mode: metadata.mode() & 0o777,
        group: group_name(&read("/etc/group"), metadata.gid()),
    });
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return vec![judge_device(Some(error.errno()), permissions.as_ref())],
    };
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(capability, _)| !kvm.check_extension(*capability))
        .map(|(_, name)| *name)
        .collect();
    let mut checks = vec![
        judge_device(None, permissions.as_ref()),
        judge_capabilities(kvm.get_api_version(), &missing),
    ];
    if checks.iter().all(|check| check.status == Status::Ok) {
        checks.push(judge_probe(&probe::run(&kvm).map_err(|error| error.to_string())));
    }
    checks
}

struct Permissions {
    mode: u32,
    group: String,
}

fn judge_device(errno: Option<i32>, permissions: Option<&Permissions>) -> Check {
    const NAME: &str = "kvm";
    let Some(errno) = errno else {
        let found = match permissions {
            None => "/dev/kvm opens".to_owned(),
            Some(Permissions { mode, group }) => {
                let who = match mode {
                    mode if mode & 0o006 == 0o006 => "every user may use it".to_owned(),
                    mode if mode & 0o060 == 0o060 => format!("root and the group {group} may use it"),
                    _ => "only root may use it".to_owned(),
                };
                format!("/dev/kvm opens; {who} (mode {mode:04o}, group {group})")
            }
        };
        return Check::ok(NAME, found);
    };
    let error = std::io::Error::from_raw_os_error(errno);
    let remedy = match (errno, permissions) {
        (libc::ENOENT, _) => format!(
            "load kvm_intel or kvm_amd, after switching virtualization on in the firmware or in the settings of the \
             surrounding VM; or {EMULATED_HOST}"
        ),
        (libc::EACCES | libc::EPERM, Some(Permissions { mode, group })) if mode & 0o060 == 0o060 && group != "root" => {
            format!("add this user to the group {group} (usermod -aG {group} USER, then log in again), or run as root")
        }
        (libc::EACCES | libc::EPERM, _) => {
            "run as root, or let a group use it: groupadd -f kvm; chgrp kvm /dev/kvm; chmod 660 /dev/kvm; then add this \
             user to the group kvm. In a container, pass the device in (docker run --device /dev/kvm)"
                .to_owned()
        }
        (libc::ENODEV | libc::ENXIO, _) => format!("load kvm_intel or kvm_amd; or {EMULATED_HOST}"),
        (libc::EBUSY, _) => "stop the other hypervisor that holds the processor's virtualization".to_owned(),
        (libc::EMFILE | libc::ENFILE, _) => "raise the limit of open files: ulimit -n 65536".to_owned(),
        _ => format!("see the kernel log (dmesg); or {EMULATED_HOST}"),
    };
    Check::failed(NAME, format!("/dev/kvm does not open: {error}"), remedy)
}

/// The name of a group in the text of /etc/group, else its number.
fn group_name(groups: &str, gid: u32) -> String {
    groups
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
        })
        .unwrap_or_else(|| gid.to_string())
}

fn judge_capabilities(version: i32, missing: &[&str]) -> Check {
    const NAME: &str = "kvm capabilities";
    let remedy = format!("use a host kernel of version {}.{} or later", KERNEL.0, KERNEL.1);
    if version < 0 {
        let remedy =
            "make it the character device 10, 232 (mknod /dev/kvm c 10 232), or load kvm_intel or kvm_amd";
        return Check::failed(NAME, "/dev/kvm does not answer as KVM does", remedy);
    }
    if version != KVM_API {
        return Check::failed(
            NAME,
            format!("API version {version}, and {KVM_API} is needed"),
            remedy,
        );
    }
    match missing {
        [] => Check::ok(
            NAME,
            format!("API version {version}; all {} that are needed", NEEDED.len()),
        ),
        missing => Check::failed(NAME, format!("missing: {}", missing.join(", ")), remedy),
    }
}

fn judge_probe(report: &Result<ProbeReport, String>) -> Check {
    const NAME: &str = "guest code";
    let report = match report {
        Ok(report) => report,
        Err(error) => {
            return Check::failed(
                NAME,
                error,
                format!("see the kernel log (dmesg); or {EMULATED_HOST}"),
            );
        }
    };
    let speed = match &report.iterations_per_second {
        Ok(rate) if *rate < 100e6 => format!("{:.1} M iterations/s", rate / 1e6),
        Ok(rate) => format!("{:.0} M iterations/s", rate / 1e6),
        Err(failure) => format!("a loop fails: {failure}"),
    };
    let mut failed = String::new();
    let mut not_emulated = Vec::new();
    for (tried, failure) in report.failed() {
        match failure {
            Failure::NotEmulated { instruction } => not_emulated.push(format!("`{instruction}`")),
            other => failed.push_str(&format!("; {tried}: {other}")),
        }
    }
    if !not_emulated.is_empty() {
        failed.push_str(&format!("; it cannot emulate {}", not_emulated.join(", ")));
    }
    match report.verdict() {
        Verdict::Executes => {
            let working: Vec<&str> = report
                .instructions
                .iter()
                .filter(|report| report.outcome == Outcome::Works)
                .map(|report| report.instruction)
                .collect();
            Check::ok(
                NAME,
                format!("runs kernel code: {speed}; works: {}", working.join(", ")),
            )
        }
        Verdict::Interprets => Check::failed(
            NAME,
            format!("KVM here interprets kernel code ({speed}; a real one does more than 100 M/s){failed}"),
            format!("picovm cannot boot its kernel on it; {EMULATED_HOST}"),
        ),
        Verdict::Broken => Check::failed(
            NAME,
            format!("KVM here does not execute what every kernel needs ({speed}){failed}"),
            format!("picovm cannot boot its kernel on it; {EMULATED_HOST}"),
        ),
    }
}

// Processor and kernel

#[derive(Debug, PartialEq, Eq)]
struct Cpuinfo {
    model: String,
    virtualization: Option<&'static str>,
    hypervisor: bool,
}

fn parse_cpuinfo(text: &str) -> Cpuinfo {
    let field = |name: &str| {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.trim() == name)
            .map_or("", |(_, value)| value.trim())
    };
    let has = |flag: &str| field("flags").split_whitespace().any(|found| found == flag);
    Cpuinfo {
        model: field("model name").to_owned(),
        virtualization: ["vmx", "svm"].into_iter().find(|flag| has(flag)),
        hypervisor: has("hypervisor"),
    }
}

/// What implements KVM here: `kvm_intel`, `kvm_amd`, or something else.
fn gather_kvm_modules() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/module") else {
        return Vec::new();
    };
    let mut modules: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    modules.sort();
    modules
}

fn judge_virtualization(cpu: &Cpuinfo, modules: &[String]) -> Check {
    const NAME: &str = "virtualization";
    let place = if cpu.hypervisor {
        "inside a virtual machine"
    } else {
        "on bare metal"
    };
    let by = if modules.is_empty() {
        "no KVM module".to_owned()
    } else {
        modules.join(", ")
    };
    match cpu.virtualization {
        Some(extension) => Check::ok(NAME, format!("{}; {by}; {place}", extension.to_uppercase())),
        None => Check::warning(
            NAME,
            format!("the processor shows neither VMX nor SVM; {by}; {place}"),
            if cpu.hypervisor {
                "for full speed, switch nested virtualization on for this virtual machine, or use another machine"
            } else {
                "for full speed, switch virtualization (VT-x, AMD-V) on in the firmware"
            },
        ),
    }
}

fn judge_kernel(release: &str) -> Check {
    const NAME: &str = "kernel";
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Check::warning(
            NAME,
            format!("Linux {release:?}: not a version"),
            "picovm needs Linux 5.10 or later",
        );
    };
    if (major, minor) < KERNEL {
        let remedy = format!("use {}.{} or later", KERNEL.0, KERNEL.1);
        return Check::failed(NAME, format!("Linux {release}"), remedy);
    }
    Check::ok(NAME, format!("Linux {release}"))
}

// Memory and limits

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    /// Bytes.
    total: u64,
    /// Bytes.
    available: u64,
}

fn parse_meminfo(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        value
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    };
    Some(Memory {
        total: field("MemTotal")?,
        available: field("MemAvailable")?,
    })
}

fn judge_memory(memory: Option<Memory>) -> Check {
    const NAME: &str = "memory";
    let Some(Memory { total, available }) = memory else {
        return Check::warning(NAME, "/proc/meminfo does not tell", "mount /proc");
    };
    let found = format!("{} available of {}", output::size(available), output::size(total));
    let need = format!(
        "a template of default size takes up to {}, each clone what it writes: free some memory, or use --memory",
        output::size(MACHINE)
    );
    match available {
        available if available < MEMORY.0 => Check::failed(NAME, found, need),
        available if available < MEMORY.1 => Check::warning(NAME, found, need),
        _ => Check::ok(NAME, found),
    }
}

fn judge_overcommit(policy: &str) -> Check {
    const NAME: &str = "overcommit";
    match policy {
        "0" => Check::ok(NAME, "heuristic"),
        "1" => Check::ok(NAME, "always"),
        "2" => Check::warning(
            NAME,
            "never: the whole memory of each clone is counted, whether it writes it or not",
            "sysctl vm.overcommit_memory=0",
        ),
        other => Check::warning(
            NAME,
            format!("{other:?}: not a known policy"),
            "sysctl vm.overcommit_memory=0",
        ),
    }
}

fn judge_limits(address_space: Option<u64>, locked: Option<u64>) -> Check {
    const NAME: &str = "limits";
    let text = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), output::size);
    let found = format!(
        "address space {}, locked memory {} (not used)",
        text(address_space),
        text(locked)
    );
    match address_space {
        Some(limit) if limit < 2 * MACHINE => {
            Check::failed(NAME, found, "a machine's memory must fit: ulimit -v unlimited")
        }
        Some(limit) if limit < 16 * MACHINE => {
            Check::warning(NAME, found, "large machines will not fit: ulimit -v unlimited")
        }
        _ => Check::ok(NAME, found),
    }
}

fn judge_open_files(soft: Option<u64>, hard: Option<u64>) -> Check {
    const NAME: &str = "open files";
    let text = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
    let found = format!("{} in a process, can be raised to {}", text(soft), text(hard));
    match soft {
        Some(limit) if limit < OPEN_FILES => Check::warning(
            NAME,
            found,
            "many clones in one process want more: ulimit -n 65536",
        ),
        _ => Check::ok(NAME, found),
    }
}

/// The word in brackets: `always [madvise] never`.
fn chosen(setting: &str) -> &str {
    setting
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or("not there", |(word, _)| word)
}

fn judge_huge_pages(enabled: &str, shmem: &str) -> Check {
    let found = format!(
        "transparent: {}; shared memory: {}",
        chosen(enabled),
        chosen(shmem)
    );
    Check::ok("huge pages", found)
}

fn judge_userfaultfd(there: bool) -> Check {
    Check::ok(
        "userfaultfd",
        if there {
            "there (optional)"
        } else {
            "not there (optional)"
        },
    )
}

// What containers use

#[derive(Debug, PartialEq, Eq)]
enum Cgroup {
    /// Only version 2, mounted there.
    V2(String),
    /// Version 2 beside version 1, which may have taken the controllers.
    Hybrid(String),
    V1,
    None,
}

/// Reads the text of /proc/self/mountinfo (proc_pid_mountinfo(5)).
fn parse_cgroup(mounts: &str) -> Cgroup {
    let (mut v1, mut v2) = (false, None);
    for line in mounts.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else {
            continue;
        };
        match filesystem.split(' ').next() {
            Some("cgroup") => v1 = true,
            Some("cgroup2") => v2 = v2.or_else(|| mount.split(' ').nth(4).map(str::to_owned)),
            _ => {}
        }
    }
    match (v2, v1) {
        (Some(path), false) => Cgroup::V2(path),
        (Some(path), true) => Cgroup::Hybrid(path),
        (None, true) => Cgroup::V1,
        (None, false) => Cgroup::None,
    }
}

fn gather_cgroup() -> Check {
    let cgroup = parse_cgroup(&read("/proc/self/mountinfo"));
    let controllers = match &cgroup {
        Cgroup::V2(path) | Cgroup::Hybrid(path) => read(Path::new(path).join("cgroup.controllers")),
        Cgroup::V1 | Cgroup::None => String::new(),
    };
    judge_cgroup(&cgroup, &controllers)
}

fn judge_cgroup(cgroup: &Cgroup, controllers: &str) -> Check {
    const NAME: &str = "cgroup";
    const ONLY_V2: &str =
        "containers run without limits; boot with systemd.unified_cgroup_hierarchy=1 or cgroup_no_v1=all";
    let there: Vec<&str> = controllers.split_whitespace().collect();
    let missing: Vec<&str> = CONTROLLERS
        .iter()
        .copied()
        .filter(|controller| !there.contains(controller))
        .collect();
    let found = match cgroup {
        Cgroup::None => {
            let remedy = "containers run without limits; mount -t cgroup2 none /sys/fs/cgroup";
            return Check::warning(NAME, "not mounted", remedy);
        }
        Cgroup::V1 => return Check::warning(NAME, "version 1 only", ONLY_V2),
        Cgroup::V2(_) => "version 2",
        Cgroup::Hybrid(_) => "version 2 beside version 1",
    };
    match missing.as_slice() {
        [] => Check::ok(NAME, format!("{found}: {}", there.join(", "))),
        missing => {
            let remedy = match cgroup {
                Cgroup::Hybrid(_) => ONLY_V2,
                _ => {
                    "containers run without these limits; the kernel must have them, and whoever is above delegate them"
                }
            };
            Check::warning(NAME, format!("{found}, without {}", missing.join(", ")), remedy)
        }
    }
}

fn gather_tun() -> Check {
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    judge_tun(opened.err().map(|error| error.raw_os_error().unwrap_or(0)))
}

fn judge_tun(errno: Option<i32>) -> Check {
    const NAME: &str = "tun";
    let remedy = match errno {
        None => return Check::ok(NAME, "/dev/net/tun opens"),
        Some(libc::EACCES | libc::EPERM) => "containers have no network; run as root for it",
        Some(_) => "containers have no network; modprobe tun",
    };
    let error = std::io::Error::from_raw_os_error(errno.unwrap_or(0));
    Check::warning(NAME, format!("/dev/net/tun does not open: {error}"), remedy)
}

fn gather_ext4_tools() -> Check {
    let run = Command::new("mke2fs")
        .arg("-V")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output();
    judge_ext4_tools(
        run.ok()
            .map(|output| String::from_utf8_lossy(&output.stderr).into_owned())
            .as_deref(),
    )
}

fn judge_ext4_tools(printed: Option<&str>) -> Check {
    const NAME: &str = "ext4 tools";
    let Some(printed) = printed else {
        return Check::warning(
            NAME,
            "mke2fs not found",
            "containers have no --storage; apt-get install e2fsprogs, and look whether PATH has /usr/sbin",
        );
    };
    let version = printed.split_whitespace().nth(1);
    Check::ok(
        NAME,
        format!("mke2fs {}", version.unwrap_or("of unknown version")),
    )
}

fn gather_erofs_tools() -> Check {
    let run = Command::new("mkfs.erofs")
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    // Version 1.5 prints its version and then an error, for it does not know the option.
    judge_erofs_tools(
        run.ok()
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .as_deref(),
    )
}

fn judge_erofs_tools(printed: Option<&str>) -> Check {
    const NAME: &str = "erofs tools";
    let Some(printed) = printed else {
        return Check::warning(
            NAME,
            "mkfs.erofs not found",
            "images cannot be built; apt-get install erofs-utils, and look whether PATH has /usr/sbin",
        );
    };
    let version = printed.lines().next().and_then(|line| {
        line.split_whitespace()
            .find(|word| word.starts_with(|first: char| first.is_ascii_digit()))
    });
    Check::ok(
        NAME,
        format!("mkfs.erofs {}", version.unwrap_or("of unknown version")),
    )
}

// The store

fn gather_store() -> Check {
    let store = picovm_engine::Store::default_root();
    let absolute = std::path::absolute(&store).unwrap_or_else(|_| store.clone());
    // What does not exist yet is made in the nearest directory that does.
    let there = absolute
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let writable = if there.is_dir() {
        use rustix::fs::Access;
        rustix::fs::access(there, Access::WRITE_OK | Access::EXEC_OK).map_err(std::io::Error::from)
    } else {
        Err(ErrorKind::NotADirectory.into())
    };
    let free = rustix::fs::statvfs(there)
        .ok()
        .map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    let error = writable
        .err()
        .map(|error| format!("{}: {error}", there.display()));
    judge_store(&store, there == absolute, error.as_deref(), free)
}

fn judge_store(store: &Path, exists: bool, error: Option<&str>, free: Option<u64>) -> Check {
    const NAME: &str = "store";
    let store = store.display();
    if let Some(error) = error {
        let remedy = "run as root, or set PICOVM_HOME to a directory that this user may write to";
        return Check::failed(NAME, format!("{store} cannot be written: {error}"), remedy);
    }
    let state = if exists { "" } else { " (made on first use)" };
    let Some(free) = free else {
        return Check::ok(NAME, format!("{store}{state}"));
    };
    let found = format!("{store}{state}, {} free", output::size(free));
    let remedy = "remove something, or set PICOVM_HOME to a directory with more space";
    match free {
        free if free < SPACE.0 => Check::failed(NAME, found, remedy),
        free if free < SPACE.1 => Check::warning(NAME, found, remedy),
        _ => Check::ok(NAME, found),
    }
}

// What people see

fn table(report: &Report, colour: bool, columns: usize) -> String {
    let width = report
        .checks
        .iter()
        .map(|check| check.name.len())
        .max()
        .unwrap_or(0);
    let indent = width + 4;
    let room = columns.saturating_sub(indent).max(30);
    let mut text = String::new();
    for check in &report.checks {
        let (mark, code) = match check.status {
            Status::Ok => ("✔", "32"),
            Status::Warning => ("!", "33"),
            Status::Failed => ("✘", "31"),
        };
        let mark = if colour {
            format!("\x1b[{code}m{mark}\x1b[0m")
        } else {
            mark.to_owned()
        };
        let mut lines = wrap(&check.found, room).into_iter();
        let _ = writeln!(
            text,
            "{mark} {:width$}  {}",
            check.name,
            lines.next().unwrap_or_default()
        );
        for line in lines {
            let _ = writeln!(text, "{:indent$}{line}", "");
        }
        let mut arrow = "→ ";
        for line in check
            .remedy
            .iter()
            .flat_map(|remedy| wrap(remedy, room.saturating_sub(2)))
        {
            let _ = writeln!(text, "{:indent$}{arrow}{line}", "");
            arrow = "  ";
        }
    }
    let count = |status| {
        report
            .checks
            .iter()
            .filter(|check| check.status == status)
            .count()
    };
    let (failed, warnings) = (count(Status::Failed), count(Status::Warning));
    let plural = |number: usize| if number == 1 { "" } else { "s" };
    text.push('\n');
    text.push_str(if failed == 0 {
        "picovm can run here"
    } else {
        "picovm cannot run here"
    });
    match (failed, warnings) {
        (0, 0) => text.push_str(".\n"),
        (0, _) => text.push_str(&format!("; {warnings} warning{}.\n", plural(warnings))),
        (_, 0) => text.push_str(&format!(": {failed} check{} failed.\n", plural(failed))),
        _ => text.push_str(&format!(
            ": {failed} check{} failed; {warnings} warning{}.\n",
            plural(failed),
            plural(warnings)
        )),
    }
    text
}

/// Breaks a text at spaces into lines of at most `width` characters; a longer word stays whole.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use picovm_vmm::probe::InstructionReport;

    #[test]
    fn a_device_that_does_not_open_has_the_remedy_for_its_reason() {
        let of = |errno, mode, group: &str| {
            judge_device(
                Some(errno),
                Some(&Permissions {
                    mode,
                    group: group.into(),
                }),
            )
            .remedy
            .unwrap()
        };
        assert!(
            judge_device(Some(libc::ENOENT), None)
                .remedy
                .unwrap()
                .contains("kvm_intel or kvm_amd")
        );
        assert!(of(libc::EACCES, 0o660, "kvm").contains("usermod -aG kvm"));
        assert!(of(libc::EACCES, 0o600, "root").contains("chgrp kvm"));
        // Nobody should be told to join the group root.
        assert!(of(libc::EACCES, 0o660, "root").contains("chgrp kvm"));
        assert_eq!(judge_device(Some(12345), None).status, Status::Failed);
    }

    #[test]
    fn a_device_that_opens_says_who_may_use_it() {
        let of = |mode| {
            judge_device(
                None,
                Some(&Permissions {
                    mode,
                    group: "kvm".into(),
                }),
            )
            .found
        };
        assert!(of(0o600).contains("only root"));
        assert!(of(0o660).contains("group kvm may"));
        assert!(of(0o666).contains("every user"));
    }

    #[test]
    fn a_group_is_found_by_number() {
        let groups = "root:x:0:\nbroken\nkvm:x:104:me,you\n";
        assert_eq!(group_name(groups, 104), "kvm");
        assert_eq!(group_name(groups, 7), "7");
    }

    #[test]
    fn missing_capabilities_are_named() {
        assert_eq!(judge_capabilities(12, &[]).status, Status::Ok);
        assert_eq!(judge_capabilities(11, &[]).status, Status::Failed);
        assert!(judge_capabilities(-1, &[]).found.contains("does not answer"));
        assert!(
            judge_capabilities(12, &["KVM_CAP_XSAVE", "KVM_CAP_XCRS"])
                .found
                .contains("KVM_CAP_XSAVE, KVM_CAP_XCRS")
        );
    }

    fn probed(rate: f64, outcome: Outcome) -> Result<ProbeReport, String> {
        Ok(ProbeReport {
            iterations_per_second: Ok(rate),
            instructions: vec![InstructionReport {
                instruction: "int3",
                outcome,
            }],
        })
    }

    #[test]
    fn an_interpreting_kvm_is_reported_as_what_it_is() {
        let fails = || Outcome::Failed(Failure::NotEmulated { instruction: "int3" });
        let check = judge_probe(&probed(2.2e6, fails()));
        assert_eq!(check.status, Status::Failed);
        assert!(
            check
                .found
                .starts_with("KVM here interprets kernel code (2.2 M iterations/s; a real one does more")
        );
        assert!(check.found.ends_with("; it cannot emulate `int3`"));
        assert!(check.remedy.unwrap().contains("PICOVM_HOST=emulated"));

        let check = judge_probe(&probed(4000e6, Outcome::Works));
        assert_eq!(
            (check.status, check.found.as_str()),
            (Status::Ok, "runs kernel code: 4000 M iterations/s; works: int3")
        );
        let check = judge_probe(&probed(4000e6, fails()));
        assert_eq!(check.status, Status::Failed);
        assert!(check.found.contains("does not execute"));
        assert_eq!(judge_probe(&Err("stuck".into())).status, Status::Failed);
    }

    #[test]
    fn the_processor_is_read_from_cpuinfo() {
        let cpu =
            parse_cpuinfo("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu svm_lock svm hypervisor\n");
        assert_eq!(
            cpu,
            Cpuinfo {
                model: "A CPU".into(),
                virtualization: Some("svm"),
                hypervisor: true
            }
        );
        assert_eq!(
            judge_virtualization(&cpu, &["kvm_amd".into()]).found,
            "SVM; kvm_amd; inside a virtual machine"
        );
        let cpu = parse_cpuinfo("nothing to see");
        assert_eq!(cpu.virtualization, None);
        assert_eq!(judge_virtualization(&cpu, &[]).status, Status::Warning);
    }

    #[test]
    fn kernels_are_compared_by_number() {
        assert_eq!(judge_kernel("6.12.117+deb12-cloud-amd64").status, Status::Ok);
        assert_eq!(judge_kernel("5.10.0-28-amd64").status, Status::Ok);
        assert_eq!(judge_kernel("5.9.16").status, Status::Failed);
        assert_eq!(judge_kernel("4.19-rc1").status, Status::Failed);
        assert_eq!(judge_kernel("").status, Status::Warning);
    }

    #[test]
    fn memory_is_judged_by_what_is_available() {
        let of = |available: u64| {
            let text = format!("MemTotal:  24000000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n");
            judge_memory(parse_meminfo(&text)).status
        };
        assert_eq!(of(8 << 20), Status::Ok);
        assert_eq!(of(512 << 10), Status::Warning);
        assert_eq!(of(100 << 10), Status::Failed);
        assert_eq!(parse_meminfo("MemTotal: 99999999999999999999 kB"), None);
        assert_eq!(judge_memory(None).status, Status::Warning);
    }

    #[test]
    fn limits_are_judged_by_what_a_machine_needs() {
        assert_eq!(judge_limits(None, Some(8 << 20)).status, Status::Ok);
        assert_eq!(judge_limits(Some(1 << 30), None).status, Status::Warning);
        assert_eq!(judge_limits(Some(100 << 20), None).status, Status::Failed);
        assert_eq!(judge_open_files(Some(256), None).status, Status::Warning);
        assert_eq!(judge_open_files(None, None).status, Status::Ok);
        assert_eq!(judge_overcommit("0").status, Status::Ok);
        assert_eq!(judge_overcommit("2").status, Status::Warning);
        assert_eq!(judge_overcommit("").status, Status::Warning);
    }

    #[test]
    fn the_chosen_setting_is_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), "madvise");
        assert_eq!(chosen(""), "not there");
    }

    #[test]
    fn cgroups_are_told_apart_by_their_mounts() {
        let v1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let v2 = "31 30 0:29 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(parse_cgroup(v2), Cgroup::V2("/sys/fs/cgroup".into()));
        assert_eq!(
            parse_cgroup(&format!("{v1}{v2}")),
            Cgroup::Hybrid("/sys/fs/cgroup".into())
        );
        assert_eq!(parse_cgroup(v1), Cgroup::V1);
        assert_eq!(
            parse_cgroup("22 1 8:1 / / rw - ext4 /dev/cgroup2 rw\nshort"),
            Cgroup::None
        );
    }

    #[test]
    fn a_cgroup_without_its_controllers_is_a_warning() {
        let v2 = Cgroup::V2("/sys/fs/cgroup".into());
        assert_eq!(judge_cgroup(&v2, "cpuset cpu io memory pids").status, Status::Ok);
        assert_eq!(
            judge_cgroup(&v2, "cpuset io memory").found,
            "version 2, without cpu, pids"
        );
        assert_eq!(
            judge_cgroup(&Cgroup::Hybrid("/x".into()), "").status,
            Status::Warning
        );
        assert_eq!(judge_cgroup(&Cgroup::V1, "").found, "version 1 only");
        assert_eq!(judge_cgroup(&Cgroup::None, "").status, Status::Warning);
    }

    #[test]
    fn what_is_missing_for_containers_is_a_warning() {
        assert_eq!(judge_tun(None).status, Status::Ok);
        assert!(
            judge_tun(Some(libc::ENOENT))
                .remedy
                .unwrap()
                .contains("modprobe tun")
        );
        assert_eq!(judge_ext4_tools(None).status, Status::Warning);
        assert_eq!(
            judge_ext4_tools(Some("mke2fs 1.47.0 (5-Feb-2023)\n\tUsing EXT2FS Library\n")).found,
            "mke2fs 1.47.0"
        );
        assert_eq!(judge_erofs_tools(None).status, Status::Warning);
        assert_eq!(
            judge_erofs_tools(Some("mkfs.erofs 1.5\n")).found,
            "mkfs.erofs 1.5"
        );
        assert_eq!(
            judge_erofs_tools(Some("mkfs.erofs (erofs-utils) 1.8.6\n")).found,
            "mkfs.erofs 1.8.6"
        );
        assert_eq!(judge_erofs_tools(Some("")).found, "mkfs.erofs of unknown version");
    }

    #[test]
    fn the_store_needs_space_and_permission() {
        let of = |error, free| judge_store(Path::new("/store"), true, error, Some(free)).status;
        assert_eq!(of(None, 100 << 30), Status::Ok);
        assert_eq!(of(None, 1 << 30), Status::Warning);
        assert_eq!(of(None, 1 << 20), Status::Failed);
        assert_eq!(of(Some("/: Read-only file system"), 100 << 30), Status::Failed);
    }

    fn report(checks: Vec<Check>) -> Report {
        let host = Host {
            kernel: "6.12".into(),
            processor: "A CPU".into(),
            virtualization: None,
            virtual_machine: false,
            kvm_modules: Vec::new(),
            memory_mib: 1,
            emulated_host: false,
        };
        Report {
            host,
            usable: checks.iter().all(|check| check.status != Status::Failed),
            checks,
        }
    }

    #[test]
    fn the_table_has_a_mark_for_each_line_and_a_remedy_where_one_is_needed() {
        let report = report(vec![
            Check::ok("kvm", "opens"),
            Check::warning("cgroup", "version 1 only", "mount version 2"),
            Check::failed("store", "full", "remove something"),
        ]);
        assert_eq!(
            table(&report, false, 80),
            "✔ kvm     opens\n! cgroup  version 1 only\n          → mount version 2\n✘ store   full\n          → remove \
             something\n\npicovm cannot run here: 1 check failed; 1 warning.\n"
        );
        assert!(table(&report, true, 80).contains("\x1b[31m✘\x1b[0m store"));
    }

    #[test]
    fn json_has_the_promised_fields() {
        let value = serde_json::to_value(report(vec![Check::ok("kvm", "opens")])).unwrap();
        assert_eq!(value["usable"], true);
        assert_eq!(value["checks"][0]["status"], "ok");
        assert_eq!(value["checks"][0]["remedy"], serde_json::Value::Null);
        assert_eq!(value["host"]["kernel"], "6.12");
    }

    #[test]
    fn long_lines_break_at_spaces() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("incomprehensible", 4), ["incomprehensible"]);
        assert!(wrap("", 4).is_empty());
    }
}

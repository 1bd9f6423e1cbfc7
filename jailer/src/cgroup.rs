//! A cgroup for each jail: version 2, and version 1 for the controllers that a host has only there.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::JailError;
use crate::policy::{self, IoLimit};

/// Where the cgroups of jails are if the policy does not say.
const PARENT: &str = "picovm-jail";
/// Period of the limit of processor time, in microseconds.
const PERIOD_US: u64 = 100_000;

/// Where a host has its cgroups, and what is written into each of ours.
pub(crate) struct Cgroups {
    /// The directory in the version 2 hierarchy below which ours are, if there is one.
    unified: Option<PathBuf>,
    /// The same in hierarchies of version 1.
    legacy: Vec<PathBuf>,
    /// File and content, in version 2 or 1.
    settings: Vec<(String, String)>,
}

/// A cgroup. Dropping it ends what is left in it and removes it.
pub(crate) struct CgroupDirectory {
    unified: Option<(PathBuf, File)>,
    /// Each with its open `cgroup.procs`.
    legacy: Vec<(PathBuf, File)>,
}

/// Mounted hierarchies: of version 2, and of version 1 by controller.
#[derive(Default)]
struct Hierarchies {
    unified: Option<PathBuf>,
    legacy: Vec<(String, PathBuf)>,
}

fn host(attempted: &str, path: &Path) -> impl FnOnce(io::Error) -> JailError {
    JailError::host(format!("{attempted} the cgroup's {}", path.display()))
}

/// Reads `mountinfo` (proc_pid_mountinfo(5)).
fn hierarchies(mountinfo: &str) -> Hierarchies {
    let mut found = Hierarchies::default();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(point), Some(kind), Some(options)) = (
            left.split(' ').nth(4),
            right.split(' ').next(),
            right.split(' ').nth(2),
        ) else {
            continue;
        };
        match kind {
            "cgroup2" if found.unified.is_none() => found.unified = Some(point.into()),
            "cgroup" => {
                for controller in options.split(',') {
                    found.legacy.push((controller.to_owned(), point.into()));
                }
            }
            _ => {}
        }
    }
    found
}

impl Cgroups {
    /// Finds out where cgroups are to be made; `None` if the policy has no limits, or there is no delegated cgroup for somebody
    /// who is not root.
    pub(crate) fn find(limits: &policy::Cgroup, rootless: bool) -> Result<Option<Self>, JailError> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").map_err(JailError::host(
            "read /proc/self/mountinfo to find the cgroup hierarchies",
        ))?;
        let mounted = hierarchies(&mountinfo);
        if rootless {
            return Self::delegated(limits, &mounted);
        }
        let available = mounted
            .unified
            .as_deref()
            .map(|root| fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default())
            .unwrap_or_default();
        let parent = limits.parent.as_deref().unwrap_or(Path::new(PARENT));
        let parent = parent.strip_prefix("/").unwrap_or(parent);
        let mut here = Self {
            unified: mounted.unified.as_deref().map(|root| root.join(parent)),
            legacy: Vec::new(),
            settings: Vec::new(),
        };
        let (mut unified, mut legacy) = (Vec::new(), Vec::new());
        for controller in needed(limits) {
            if available.split_whitespace().any(|name| name == controller) {
                unified.push(controller);
                continue;
            }
            let old = if controller == "io" { "blkio" } else { controller };
            let Some((_, root)) = mounted.legacy.iter().find(|(name, _)| name == old) else {
                return Err(JailError::Policy(format!(
                    "cgroup: this host's kernel has no controller `{controller}`, neither in version 2 nor 1 of cgroups; \
                     mount one or leave the limit out"
                )));
            };
            legacy.push(controller);
            let path = root.join(parent);
            if !here.legacy.contains(&path) {
                here.legacy.push(path);
            }
        }
        if unified.is_empty() && (!legacy.is_empty() || limits == &policy::Cgroup::default()) {
            // Also for the members to be found and ended together: but that needs version 2.
            here.unified = here.unified.filter(|_| legacy.is_empty());
        }
        if let (Some(directory), Some(root)) = (&here.unified, &mounted.unified) {
            enable(root, directory, &unified)?;
        }
        for controller in unified {
            here.settings.extend(settings(limits, controller)?);
        }
        for controller in legacy {
            here.settings.extend(legacy_settings(limits, controller)?);
        }
        if here.unified.is_none() && here.legacy.is_empty() {
            return Err(JailError::Policy(
                "cgroup: this host has no cgroup hierarchy mounted; mount one (`mount -t cgroup2 none /sys/fs/cgroup`) or \
                 leave `cgroup` out"
                    .into(),
            ));
        }
        Ok(Some(here))
    }

    /// The caller's own cgroup, where it was delegated (cgroups(7)).
    fn delegated(limits: &policy::Cgroup, mounted: &Hierarchies) -> Result<Option<Self>, JailError> {
        let Some(root) = &mounted.unified else {
            return Ok(None);
        };
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let Some(own) = own.lines().find_map(|line| line.strip_prefix("0::/")) else {
            return Ok(None);
        };
        let own = root.join(own);
        let controllers = fs::read_to_string(own.join("cgroup.subtree_control")).unwrap_or_default();
        let writable = rustix::fs::access(&own, rustix::fs::Access::WRITE_OK).is_ok()
            && rustix::fs::access(own.join("cgroup.procs"), rustix::fs::Access::WRITE_OK).is_ok();
        let enabled = |name: &&str| controllers.split_whitespace().any(|other| other == *name);
        if !writable || !needed(limits).iter().all(enabled) {
            tracing::warn!(
                cgroup = %own.display(),
                "no limits: this cgroup is not delegated, or its subtree_control lacks a controller"
            );
            return Ok(None);
        }
        let mut all = Vec::new();
        for controller in needed(limits) {
            all.extend(settings(limits, controller)?);
        }
        Ok(Some(Self {
            unified: Some(own),
            legacy: Vec::new(),
            settings: all,
        }))
    }

    /// Makes one, with its limits. One of this name that nobody uses any more is replaced.
    pub(crate) fn create(&self, name: &str) -> Result<CgroupDirectory, JailError> {
        let mut made = CgroupDirectory {
            unified: None,
            legacy: Vec::new(),
        };
        if let Some(parent) = &self.unified {
            let path = make(parent, name)?;
            let directory = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECTORY)
                .open(&path)
                .map_err(host("open", &path));
            made.unified = Some((path.clone(), directory.inspect_err(|_| remove(&path))?));
        }
        for parent in &self.legacy {
            let path = make(parent, name)?;
            let procs = path.join("cgroup.procs");
            let procs = OpenOptions::new()
                .write(true)
                .open(&procs)
                .map_err(host("open", &procs));
            made.legacy
                .push((path.clone(), procs.inspect_err(|_| remove(&path))?));
        }
        for (file, content) in &self.settings {
            let mut paths = made.paths().map(|path| path.join(file));
            let Some(path) = paths.find(|path| path.exists()) else {
                // Limits of swap are there only if swap is accounted for.
                if file.contains("swap") || file.contains("memsw") || file == "memory.oom.group" {
                    continue;
                }
                return Err(JailError::Policy(format!(
                    "cgroup: there is no {file}, which a limit needs: the controller is not enabled"
                )));
            };
            fs::write(&path, content).map_err(host(&format!("write {content} to"), &path))?;
        }
        Ok(made)
    }

    /// Removes what ours were made in, unless somebody else uses it.
    pub(crate) fn remove_parents(&self) {
        for parent in self.unified.iter().chain(&self.legacy) {
            if parent.file_name().is_some_and(|name| name == PARENT) {
                let _ = fs::remove_dir(parent);
            }
        }
    }
}

/// Makes the directory `name` in `parent`, whatever is in its way.
fn make(parent: &Path, name: &str) -> Result<PathBuf, JailError> {
    let path = parent.join(name);
    for _ in 0..10 {
        // Another jailer may remove an empty parent at any moment.
        fs::create_dir_all(parent).map_err(host("make", parent))?;
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            // Who had this name before is gone, for the name is ours.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => remove(&path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(host("make", &path)(error)),
        }
    }
    Err(host("make", &path)(io::ErrorKind::AlreadyExists.into()))
}

/// Ends what is in a cgroup and removes it.
fn remove(path: &Path) {
    for attempt in 0..200u32 {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if fs::write(path.join("cgroup.kill"), "1").is_err() {
                    kill_each(path);
                }
                std::thread::sleep(Duration::from_millis(attempt.min(20).into()));
            }
            _ => return,
        }
    }
    tracing::warn!(cgroup = %path.display(), "a cgroup could not be removed");
}

/// Version 1 cannot end the members of a cgroup together.
fn kill_each(path: &Path) {
    let members = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|line| line.parse().ok()) {
        if let Some(pid) = rustix::process::Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

impl CgroupDirectory {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        self.unified
            .iter()
            .chain(&self.legacy)
            .map(|(path, _)| path.as_path())
    }

    /// What a process is to be forked into.
    pub(crate) fn fork_into(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(|(_, directory)| directory.as_fd())
    }

    /// What a process has to write `0` to, to be moved there.
    pub(crate) fn to_enter(&self) -> impl Iterator<Item = &File> {
        self.legacy.iter().map(|(_, procs)| procs)
    }

    /// Ends every process in it.
    pub(crate) fn kill(&self) {
        for path in self.paths() {
            if fs::write(path.join("cgroup.kill"), "1").is_err() {
                kill_each(path);
            }
        }
    }
}

impl Drop for CgroupDirectory {
    fn drop(&mut self) {
        for path in self.paths() {
            remove(path);
        }
    }
}

/// Hands controllers down from the top of the hierarchy to a directory, which is made.
fn enable(root: &Path, directory: &Path, controllers: &[&str]) -> Result<(), JailError> {
    fs::create_dir_all(directory).map_err(host("make", directory))?;
    let wanted: String = controllers.iter().map(|name| format!("+{name} ")).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let below = directory.strip_prefix(root).unwrap_or(Path::new(""));
    let mut here = root.to_owned();
    for part in std::iter::once(Path::new("")).chain(below.iter().map(Path::new)) {
        here.push(part);
        let file = here.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        if controllers
            .iter()
            .all(|name| enabled.split_whitespace().any(|other| other == *name))
        {
            continue;
        }
        fs::write(&file, &wanted).map_err(host(&format!("write {wanted} to"), &file))?;
    }
    Ok(())
}

/// The controllers that limits need, by their names in version 2.
fn needed(limits: &policy::Cgroup) -> Vec<&'static str> {
    [
        ("memory", limits.memory.is_some()),
        ("cpu", limits.cpu.is_some() || limits.cpu_weight.is_some()),
        ("pids", limits.pids.is_some()),
        ("io", !limits.io.is_empty()),
    ]
    .into_iter()
    .filter_map(|(name, wanted)| wanted.then_some(name))
    .collect()
}

/// Files and their content in version 2 (Documentation/admin-guide/cgroup-v2.rst).
fn settings(limits: &policy::Cgroup, controller: &str) -> Result<Vec<(String, String)>, JailError> {
    let mut all = Vec::new();
    let mut set = |file: &str, content: String| all.push((file.to_owned(), content));
    match controller {
        "memory" => {
            if let Some(bytes) = limits.memory {
                set("memory.max", bytes.to_string());
                set("memory.swap.max", "0".into());
                set("memory.oom.group", "1".into());
            }
        }
        "cpu" => {
            if let Some(thousandths) = limits.cpu {
                set("cpu.max", format!("{} {PERIOD_US}", quota(thousandths)));
            }
            if let Some(weight) = limits.cpu_weight {
                set("cpu.weight", weight.to_string());
            }
        }
        "pids" => {
            if let Some(pids) = limits.pids {
                set("pids.max", pids.to_string());
            }
        }
        _ => {
            for limit in &limits.io {
                let device = device_number(&limit.device)?;
                let parts = [
                    ("rbps", limit.read_bytes),
                    ("wbps", limit.write_bytes),
                    ("riops", limit.reads),
                    ("wiops", limit.writes),
                ];
                let parts: String = parts
                    .into_iter()
                    .filter_map(|(name, value)| Some(format!(" {name}={}", value?)))
                    .collect();
                set("io.max", device + &parts);
            }
        }
    }
    Ok(all)
}

/// The same in version 1 (Documentation/admin-guide/cgroup-v1/).
fn legacy_settings(limits: &policy::Cgroup, controller: &str) -> Result<Vec<(String, String)>, JailError> {
    let mut all = Vec::new();
    let mut set = |file: &str, content: String| all.push((file.to_owned(), content));
    match controller {
        "memory" => {
            if let Some(bytes) = limits.memory {
                set("memory.limit_in_bytes", bytes.to_string());
                set("memory.memsw.limit_in_bytes", bytes.to_string());
            }
        }
        "cpu" => {
            if let Some(thousandths) = limits.cpu {
                set("cpu.cfs_period_us", PERIOD_US.to_string());
                set("cpu.cfs_quota_us", quota(thousandths).to_string());
            }
            if let Some(weight) = limits.cpu_weight {
                // 100 of version 2 is 1,024 here; 2 is the least.
                set(
                    "cpu.shares",
                    (weight.saturating_mul(1024) / 100).max(2).to_string(),
                );
            }
        }
        "pids" => {
            if let Some(pids) = limits.pids {
                set("pids.max", pids.to_string());
            }
        }
        _ => {
            for limit in &limits.io {
                let device = device_number(&limit.device)?;
                let IoLimit {
                    read_bytes,
                    write_bytes,
                    reads,
                    writes,
                    ..
                } = limit;
                for (name, value) in [
                    ("read_bps", read_bytes),
                    ("write_bps", write_bytes),
                    ("read_iops", reads),
                    ("write_iops", writes),
                ] {
                    if let Some(value) = value {
                        set(
                            &format!("blkio.throttle.{name}_device"),
                            format!("{device} {value}"),
                        );
                    }
                }
            }
        }
    }
    Ok(all)
}

/// Microseconds in a period.
fn quota(thousandths: u64) -> u64 {
    thousandths.saturating_mul(PERIOD_US) / 1000
}

/// `MAJOR:MINOR` of a device that is given so, or by its path.
fn device_number(device: &str) -> Result<String, JailError> {
    let is_number = device
        .split_once(':')
        .is_some_and(|(major, minor)| major.parse::<u32>().is_ok() && minor.parse::<u32>().is_ok());
    if is_number {
        return Ok(device.to_owned());
    }
    let metadata = fs::metadata(device)
        .map_err(|error| JailError::Policy(format!("cgroup.io: cannot find the device {device}: {error}")))?;
    if !metadata.file_type().is_block_device() {
        return Err(JailError::Policy(format!(
            "cgroup.io: {device} is no block device; give the disk, as `8:0` or `/dev/sda`"
        )));
    }
    let number = metadata.rdev();
    Ok(format!(
        "{}:{}",
        rustix::fs::major(number),
        rustix::fs::minor(number)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
24 1 0:22 / /sys rw - sysfs sysfs rw
30 24 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
31 24 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct
32 24 0:28 / /sys/fs/cgroup/blkio rw shared:11 - cgroup cgroup rw,blkio
";

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let found = hierarchies(MOUNTS);
        assert_eq!(
            found.unified.as_deref(),
            Some(Path::new("/sys/fs/cgroup/unified"))
        );
        let find = |name: &str| found.legacy.iter().find(|(controller, _)| controller == name);
        assert_eq!(
            find("cpu").map(|(_, path)| path.as_path()),
            Some(Path::new("/sys/fs/cgroup/cpu,cpuacct"))
        );
        assert!(find("blkio").is_some() && find("memory").is_none());
        assert!(hierarchies("nonsense\n- - -\n").unified.is_none());
    }

    #[test]
    fn limits_become_files_of_either_version() {
        let limits = policy::Cgroup {
            memory: Some(1 << 20),
            cpu: Some(1500),
            cpu_weight: Some(50),
            pids: Some(7),
            io: vec![IoLimit {
                device: "8:16".into(),
                read_bytes: Some(1000),
                writes: Some(5),
                ..IoLimit::default()
            }],
            ..policy::Cgroup::default()
        };
        assert_eq!(needed(&limits), ["memory", "cpu", "pids", "io"]);
        let all = |of: fn(&policy::Cgroup, &str) -> Result<Vec<(String, String)>, JailError>| {
            needed(&limits)
                .into_iter()
                .flat_map(|controller| of(&limits, controller).unwrap())
                .map(|(file, content)| format!("{file}={content}"))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            all(settings),
            [
                "memory.max=1048576",
                "memory.swap.max=0",
                "memory.oom.group=1",
                "cpu.max=150000 100000",
                "cpu.weight=50",
                "pids.max=7",
                "io.max=8:16 rbps=1000 wiops=5",
            ]
        );
        assert_eq!(
            all(legacy_settings),
            [
                "memory.limit_in_bytes=1048576",
                "memory.memsw.limit_in_bytes=1048576",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=150000",
                "cpu.shares=512",
                "pids.max=7",
                "blkio.throttle.read_bps_device=8:16 1000",
                "blkio.throttle.write_iops_device=8:16 5",
            ]
        );
        assert!(
            device_number("/dev/null")
                .unwrap_err()
                .to_string()
                .contains("no block device")
        );
        assert!(device_number("/nowhere").is_err());
    }
}

//! A cgroup for each jail: version 2, and version 1 for the controllers that a host has only there.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::JailError;
use crate::ids::Locks;
use crate::limits::{self, Setting};
use crate::policy;

/// Where the cgroups of jails are if the policy does not say.
const PARENT: &str = "picovm-jail";
/// How often something is tried that another jailer can undo.
const ATTEMPTS: u32 = 100;

/// Where a host has its cgroups, and what is written into each of ours.
#[derive(Default)]
pub(crate) struct Cgroups {
    /// The directory in the version 2 hierarchy below which ours are, if there is one.
    unified: Option<PathBuf>,
    /// The top of that hierarchy, and the controllers that are handed down from there.
    root: PathBuf,
    handed_down: Vec<String>,
    /// The same in hierarchies of version 1.
    legacy: Vec<PathBuf>,
    /// File and content, in version 2 or 1.
    settings: Vec<Setting>,
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
            ..Self::default()
        };
        let (mut unified, mut legacy) = (Vec::new(), Vec::new());
        for controller in limits::needed(limits) {
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
        if let Some(root) = &mounted.unified {
            here.handed_down = unified.iter().map(|name| (*name).to_owned()).collect();
            here.root.clone_from(root);
            here.enable()?;
        }
        for controller in unified {
            here.settings.extend(limits::settings(limits, controller)?);
        }
        for controller in legacy {
            here.settings.extend(limits::legacy_settings(limits, controller)?);
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
        if !writable || !limits::needed(limits).iter().all(enabled) {
            tracing::warn!(
                cgroup = %own.display(),
                "no limits: this cgroup is not delegated, or its subtree_control lacks a controller"
            );
            return Ok(None);
        }
        let mut all = Vec::new();
        for controller in limits::needed(limits) {
            all.extend(limits::settings(limits, controller)?);
        }
        Ok(Some(Self {
            unified: Some(own),
            settings: all,
            ..Self::default()
        }))
    }

    /// Hands controllers down from the top of the hierarchy to where ours are made, which is made, too.
    fn enable(&self) -> Result<(), JailError> {
        match &self.unified {
            Some(directory) => self.until_it_stays(|| enable(&self.root, directory, &self.handed_down)),
            None => Ok(()),
        }
    }

    /// Whether where ours are made is not as it is to be: another jailer, which removes what is empty, may do that at any moment, and
    /// one that needs less may make it again.
    fn is_undone(&self) -> bool {
        self.unified
            .as_ref()
            .is_some_and(|directory| !directory.is_dir() || !hands_down(directory, &self.handed_down))
            || self.legacy.iter().any(|directory| !directory.is_dir())
    }

    /// Does what another jailer may undo until that does not happen.
    fn until_it_stays<T>(&self, mut attempt: impl FnMut() -> Result<T, JailError>) -> Result<T, JailError> {
        let mut result = attempt();
        // Once more in any case: it may be as it should be again.
        for tried in 0..ATTEMPTS {
            if result.is_ok() || tried > 0 && !self.is_undone() {
                break;
            }
            std::thread::yield_now();
            result = attempt();
        }
        result
    }

    /// Makes one, with its limits. One of this name that nobody uses any more is replaced.
    pub(crate) fn create(&self, name: &str) -> Result<CgroupDirectory, JailError> {
        self.create_here(name).or_else(|_| {
            self.until_it_stays(|| {
                if let Some(directory) = &self.unified {
                    enable(&self.root, directory, &self.handed_down)?;
                }
                self.create_here(name)
            })
        })
    }

    fn create_here(&self, name: &str) -> Result<CgroupDirectory, JailError> {
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

    /// Removes the cgroups that jailers left which were killed: those whose name nobody can have any more, and that nobody is
    /// in. One whose last process is just ending is left to the next sweep.
    pub(crate) fn sweep(&self, ids: Option<&Locks>) {
        for parent in self.unified.iter().chain(&self.legacy) {
            // The caller's own cgroup, without root, holds what others made too.
            for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
                let (name, path) = (entry.file_name(), entry.path());
                let Some(owner) = name.to_str().and_then(Owner::of) else {
                    continue;
                };
                let remove = || {
                    // Refused while anybody is in it.
                    let _ = fs::remove_dir(&path);
                };
                match (owner, ids) {
                    (Owner::Id(id), Some(ids)) => ids.with_free(id, remove),
                    (Owner::Process(process), None) if !Path::new("/proc").join(process).exists() => remove(),
                    _ => {}
                }
            }
        }
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

/// Whose a cgroup is, by its name.
#[derive(Debug, PartialEq, Eq)]
enum Owner<'a> {
    /// Who has this id.
    Id(u32),
    /// The jailer that is this process: without root there are no ids.
    Process(&'a str),
}

impl<'a> Owner<'a> {
    fn of(name: &'a str) -> Option<Self> {
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if digits(name) {
            return name.parse().ok().map(Self::Id);
        }
        let (process, number) = name.strip_prefix("jail-")?.split_once('-')?;
        (digits(process) && digits(number)).then_some(Self::Process(process))
    }
}

/// Makes the directory `name` in `parent`, whatever is in its way.
fn make(parent: &Path, name: &str) -> Result<PathBuf, JailError> {
    let path = parent.join(name);
    for _ in 0..ATTEMPTS {
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            // Who had this name before is gone, for the name is ours.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => remove(&path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::create_dir_all(parent) {
                // Removed again between two looks at it.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.map_err(host("make", parent))?,
            },
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

/// Whether what is made in this directory has all of these controllers.
fn hands_down(directory: &Path, controllers: &[String]) -> bool {
    let enabled = fs::read_to_string(directory.join("cgroup.subtree_control")).unwrap_or_default();
    controllers
        .iter()
        .all(|name| enabled.split_whitespace().any(|other| other == name))
}

/// Hands controllers down from the top of the hierarchy to a directory, which is made.
fn enable(root: &Path, directory: &Path, controllers: &[String]) -> Result<(), JailError> {
    fs::create_dir_all(directory).map_err(host("make", directory))?;
    let wanted: String = controllers.iter().map(|name| format!("+{name} ")).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let below = directory.strip_prefix(root).unwrap_or(Path::new(""));
    let mut here = root.to_owned();
    for part in std::iter::once(Path::new("")).chain(below.iter().map(Path::new)) {
        here.push(part);
        if hands_down(&here, controllers) {
            continue;
        }
        let file = here.join("cgroup.subtree_control");
        fs::write(&file, &wanted).map_err(host(&format!("write {wanted} to"), &file))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::IdRange;

    const MOUNTS: &str = "\
24 1 0:22 / /sys rw - sysfs sysfs rw
30 24 0:26 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
31 24 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct
32 24 0:28 / /sys/fs/cgroup/blkio rw shared:11 - cgroup cgroup rw,blkio
";

    #[test]
    fn what_is_nobodys_is_swept_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let own = std::process::id();
        // Ids beyond the range that jails have, so that none of this host is met.
        let mut range = IdRange::open(&policy::Ids {
            first: 900_000,
            count: 1,
        });
        let taken = range.as_mut().ok().map(|range| range.take().unwrap());
        let mine = format!("jail-{own}-0");
        // No process has this id: it is above what the kernel gives.
        for name in [
            "900000",
            "900001",
            &mine,
            "jail-9999999-0",
            "others",
            "jail-x-1",
            "12x",
        ] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let cgroups = Cgroups {
            unified: Some(parent.path().to_owned()),
            ..Cgroups::default()
        };
        let left = || {
            let entries = fs::read_dir(parent.path()).unwrap();
            let mut names: Vec<String> = entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        cgroups.sweep(None);
        assert_eq!(left(), ["12x", "900000", "900001", &mine, "jail-x-1", "others"]);
        // Without root nothing is marked.
        if let Ok(range) = &range {
            cgroups.sweep(Some(&range.locks()));
            assert_eq!(left(), ["12x", "900000", &mine, "jail-x-1", "others"]);
            drop(taken);
            cgroups.sweep(Some(&range.locks()));
            assert_eq!(left(), ["12x", &mine, "jail-x-1", "others"]);
        }
    }

    #[test]
    fn many_jails_at_once_make_and_remove_what_theirs_are_in() {
        let root = tempfile::tempdir().unwrap();
        let cgroups = || Cgroups {
            unified: Some(root.path().join(PARENT)),
            ..Cgroups::default()
        };
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    let cgroups = cgroups();
                    for number in 0..500 {
                        drop(cgroups.create(&format!("{thread}-{number}")).unwrap());
                        cgroups.remove_parents();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

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
}

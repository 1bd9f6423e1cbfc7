//! What a process and all that it forks have in common: a clone that is parked by one who has none of that would be another's.

use std::os::unix::fs::MetadataExt;

use rustix::process::{Resource, getpriority_process, getrlimit};
use rustix::thread::{CpuSet, sched_getaffinity};

/// Limits that a VMM process has from who started it, and that bear on it.
const LIMITS: [Resource; 6] = [
    Resource::As,
    Resource::Cpu,
    Resource::Data,
    Resource::Fsize,
    Resource::Memlock,
    Resource::Nproc,
];

/// What tells this process's circumstances from others', as digits: who it is, which program, its cgroup, which ends it together with
/// others, its namespace of users, its CPUs, its priority, and what ends or limits it. `None` where that cannot be
/// found out.
pub(super) fn own() -> Option<String> {
    let read = |name: &str| std::fs::read(format!("/proc/self/{name}"));
    let program = std::fs::metadata("/proc/self/exe").ok()?;
    let cpus = sched_getaffinity(None).ok()?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| cpus.is_set(*cpu)).collect();
    let all = format!(
        "{:?}",
        (
            rustix::process::geteuid().as_raw(),
            (
                program.dev(),
                program.ino(),
                program.mtime(),
                program.mtime_nsec()
            ),
            read("cgroup").ok()?,
            read("oom_score_adj").ok()?,
            std::fs::read_link("/proc/self/ns/user").ok()?,
            cpus,
            getpriority_process(None).ok()?,
            LIMITS.map(getrlimit),
        )
    );
    blake3::hash(all.as_bytes()).to_hex().get(..8).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_the_same_until_something_of_them_changes() {
        // What is changed is this thread's alone.
        std::thread::spawn(|| {
            let before = own().unwrap();
            assert_eq!(before.len(), 8);
            assert_eq!(own().as_deref(), Some(before.as_str()));
            rustix::process::setpriority_process(None, getpriority_process(None).unwrap() + 1).unwrap();
            assert_ne!(own(), Some(before));
        })
        .join()
        .unwrap();
    }
}

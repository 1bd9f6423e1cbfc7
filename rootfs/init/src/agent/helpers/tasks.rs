//! The processes of a container, from `/proc`.

// What a guest or a file says must not end this process.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic
    )
)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use picovm_guest_protocol::Task;

use crate::accounts::Accounts;
use crate::cgroup;
use crate::container::Ground;

/// `PF_KTHREAD` of a process's flags.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// Majors of the devices of pseudoterminals.
const TERMINALS: std::ops::RangeInclusive<u64> = 136..=143;

/// All that are there now.
pub fn tasks(ground: &Ground) -> Result<Vec<Task>, String> {
    let failed = |error: std::io::Error| format!("read /proc: {error}");
    let stat = fs::read("/proc/stat").map_err(failed)?;
    let booted = cgroup::value(&stat, "btime").unwrap_or_default();
    let accounts = Accounts::read();
    let mut tasks = Vec::new();
    for entry in fs::read_dir("/proc").map_err(failed)?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if is_ours(&entry.path(), pid, ground) {
            // One that has ended meanwhile is none.
            tasks.extend(task(&entry.path(), pid, booted, &accounts));
        }
    }
    tasks.sort_by_key(|task| task.pid);
    Ok(tasks)
}

/// Whether a process belongs to the container, and not to the machine or to the agent.
fn is_ours(directory: &Path, pid: u32, ground: &Ground) -> bool {
    if ground.cgroup.is_none() {
        return pid != 1 && pid != std::process::id();
    }
    let group = fs::read(directory.join("cgroup")).unwrap_or_default();
    let path = group
        .split(|&byte| byte == b'\n')
        .find_map(|line| line.strip_prefix(b"0::/"))
        .and_then(|path| path.strip_prefix(cgroup::CONTAINER.as_bytes()));
    matches!(path, Some([] | [b'/', ..]))
}

fn task(directory: &Path, pid: u32, booted: u64, accounts: &Accounts) -> Option<Task> {
    let owner = fs::metadata(directory).ok()?.uid();
    let stat = fs::read(directory.join("stat")).ok()?;
    let mut task = parse(&stat, booted)?;
    task.pid = pid;
    task.user = accounts.user_name(owner);
    let mut command = fs::read(directory.join("cmdline")).ok()?;
    while command.last() == Some(&0) {
        command.pop();
    }
    for byte in &mut command {
        if *byte == 0 {
            *byte = b' ';
        }
    }
    if !command.is_empty() {
        task.command = command;
    }
    Some(task)
}

/// Takes a line of `/proc/PID/stat` apart: `PID (NAME) STATE PARENT ...`, and the name may contain anything.
fn parse(stat: &[u8], booted: u64) -> Option<Task> {
    let open = stat.iter().position(|&byte| byte == b'(')?;
    let close = stat.iter().rposition(|&byte| byte == b')')?;
    let name = stat.get(open.saturating_add(1)..close)?;
    let rest = std::str::from_utf8(stat.get(close.saturating_add(1)..)?).ok()?;
    // The first is the third of `proc(5)`.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |field: usize| -> Option<u64> { fields.get(field.checked_sub(3)?)?.parse().ok() };
    if number(9)? & KERNEL_THREAD != 0 {
        return None;
    }
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    let cpu_ticks = number(14)?.saturating_add(number(15)?);
    Some(Task {
        pid: 0,
        parent: u32::try_from(number(4)?).ok()?,
        user: Vec::new(),
        state: fields.first()?.bytes().next()?,
        threads: u32::try_from(number(20)?).ok()?,
        resident: number(24)?.saturating_mul(page),
        terminal: terminal(number(7).unwrap_or_default()),
        started: booted.saturating_add(number(22)?.checked_div(ticks)?),
        cpu_ms: cpu_ticks.saturating_mul(1000).checked_div(ticks)?,
        command: [b"[", name, b"]"].concat(),
    })
}

/// Name of a terminal by its device number.
fn terminal(device: u64) -> Vec<u8> {
    let major = device >> 8 & 0xfff;
    let minor = device & 0xff | device >> 12 & 0xf_ff00;
    if !TERMINALS.contains(&major) {
        return Vec::new();
    }
    let number = major
        .saturating_sub(*TERMINALS.start())
        .saturating_mul(256)
        .saturating_add(minor);
    format!("pts/{number}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_stat_is_taken_apart_whatever_the_name() {
        let line = b"7 (a) b) (c) S 1 7 7 34818 7 4194304 1 0 0 0 12 13 0 0 20 0 3 0 500 1000 25 18446744073709551615 1";
        let task = parse(line, 1000).unwrap();
        assert_eq!(task.command, b"[a) b) (c]");
        assert_eq!((task.parent, task.state, task.threads), (1, b'S', 3));
        assert_eq!(task.terminal, b"pts/2");
        assert_eq!(task.resident, 25 * 4096);
        assert_eq!(task.started, 1005);
        assert_eq!(task.cpu_ms, 250);
        assert!(parse(b"7 (x", 0).is_none());
        assert!(parse(b"7 (x) S 1", 0).is_none());
    }

    #[test]
    fn this_process_is_among_the_tasks_of_a_machine_without_groups() {
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get() as u32;
        let tasks = tasks(&Ground::default()).unwrap();
        assert!(
            tasks
                .iter()
                .any(|task| task.pid == parent && !task.command.is_empty())
        );
    }
}

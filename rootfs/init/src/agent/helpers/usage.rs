//! What a container takes: from its control group and from the kernel's own counters.

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

use picovm_guest_protocol::Usage;
use rustix::time::ClockId;

use crate::cgroup;
use crate::container::Ground;

const SECTOR: u64 = 512;

/// As it is now.
pub fn usage(ground: &Ground) -> Result<Usage, String> {
    let group = ground
        .cgroup
        .as_ref()
        .ok_or("this machine's kernel has no control groups")?;
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("read {path}: {error}"));
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    let meminfo = read("/proc/meminfo")?;
    let bytes = |key| in_meminfo(&meminfo, key).unwrap_or_default();
    let machine = bytes("MemTotal:");
    // Where nothing counts for the container alone, the machine's is its own: the agent takes little.
    let of_machine = || bytes("AnonPages:").saturating_add(bytes("Shmem:"));
    let (bytes_read, written) = disks(&read("/proc/diskstats").unwrap_or_default());
    let (received, sent) = networks(&read("/proc/self/net/dev").unwrap_or_default());
    let cache = group.value_of("memory.stat", "inactive_file").unwrap_or_default();
    Ok(Usage {
        cpu_ns: group
            .value_of("cpu.stat", "usage_usec")
            .unwrap_or_default()
            .saturating_mul(1000),
        uptime_ns: u64::try_from(now.tv_sec)
            .unwrap_or_default()
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::try_from(now.tv_nsec).unwrap_or_default()),
        cpus: cpus(&read("/proc/stat")?),
        memory: group
            .number("memory.current")
            .map_or_else(of_machine, |memory| memory.saturating_sub(cache)),
        memory_limit: group
            .number("memory.max")
            .map_or(machine, |limit| limit.min(machine)),
        pids: group.number("pids.current").unwrap_or_else(|| group.threads()),
        read: bytes_read,
        written,
        received,
        sent,
        oom_kills: group.events().map_or(0, |events| cgroup::oom_kills(&events)),
    })
}

fn in_meminfo(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

fn cpus(stat: &str) -> u32 {
    let is_cpu = |line: &&str| {
        line.strip_prefix("cpu")
            .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
    };
    u32::try_from(stat.lines().filter(is_cpu).count()).unwrap_or(u32::MAX)
}

/// Adds up two columns of the lines whose name, in a column of its own or before a colon, is wanted.
fn columns(lines: &str, name: usize, wanted: impl Fn(&str) -> bool, two: (usize, usize)) -> (u64, u64) {
    let mut sums = (0u64, 0u64);
    for line in lines.lines() {
        let fields: Vec<&str> = line
            .split(|at: char| at.is_ascii_whitespace() || at == ':')
            .filter(|field| !field.is_empty())
            .collect();
        if !fields.get(name).is_some_and(|name| wanted(name)) {
            continue;
        }
        let number = |column: usize| fields.get(column).and_then(|field| field.parse::<u64>().ok());
        if let (Some(one), Some(other)) = (number(two.0), number(two.1)) {
            sums = (sums.0.saturating_add(one), sums.1.saturating_add(other));
        }
    }
    sums
}

/// Bytes read from and written to the virtio disks.
fn disks(diskstats: &str) -> (u64, u64) {
    let (read, written) = columns(diskstats, 2, |name| name.starts_with("vd"), (5, 9));
    (read.saturating_mul(SECTOR), written.saturating_mul(SECTOR))
}

/// Bytes received from and sent to all interfaces but the loopback.
fn networks(devices: &str) -> (u64, u64) {
    columns(devices, 0, |name| name != "lo", (1, 9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let disk = " 254 0 vda 10 0 80 5 20 0 160 9 0 0 0\n 254 16 vdb 1 0 2 0 0 0 4 0 0 0 0\n 7 0 loop0 9 9 9 9 9 9 9 9\n";
        assert_eq!(disks(disk), (82 * 512, 164 * 512));
        let net = "Inter-|   Receive                            |  Transmit\n face |bytes    packets\n    lo: 5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n  eth0:700 3 0 0 0 0 0 0 900 4 0 0 0 0 0 0\n";
        assert_eq!(networks(net), (700, 900));
        assert_eq!(cpus("cpu  1 2\ncpu0 1\ncpu1 1\nintr 5\n"), 2);
        assert_eq!(in_meminfo("MemTotal:   1000 kB\n", "MemTotal:"), Some(1_024_000));
    }
}

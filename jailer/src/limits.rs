//! Limits as the files of a cgroup take them, in version 2 and 1.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use crate::error::JailError;
use crate::policy::{self, IoLimit};

/// A file and what is written to it.
pub(crate) type Setting = (String, String);

/// Period of the limit of processor time, in microseconds.
const PERIOD_US: u64 = 100_000;

/// The controllers that limits need, by their names in version 2.
pub(crate) fn needed(limits: &policy::Cgroup) -> Vec<&'static str> {
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
pub(crate) fn settings(limits: &policy::Cgroup, controller: &str) -> Result<Vec<Setting>, JailError> {
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
pub(crate) fn legacy_settings(limits: &policy::Cgroup, controller: &str) -> Result<Vec<Setting>, JailError> {
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
        type Of = fn(&policy::Cgroup, &str) -> Result<Vec<Setting>, JailError>;
        let all = |of: Of| {
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

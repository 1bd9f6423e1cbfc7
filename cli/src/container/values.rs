//! What people type for signals, times, resource limits and capabilities, as Docker reads it.

use std::time::Duration;

use chrono::{DateTime, Local, NaiveDate, NaiveDateTime, TimeZone, Utc};
use picovm_engine::containers::check_storage;

use crate::pull_arguments::parse_bytes;

/// Names and numbers of the signals of Linux on x86-64 (`signal(7)`).
const SIGNALS: [(&str, u8); 33] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];
/// The first and the last real-time signal, as the C library leaves them.
const REAL_TIME: (u8, u8) = (34, 64);

/// Bytes of storage, as `10g` or `size=10g`.
pub fn storage(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text.strip_prefix("size=").unwrap_or(text))?;
    check_storage(bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// `size=10g`, which alone there is of Docker's options.
pub fn storage_option(text: &str) -> Result<u64, String> {
    match text.split_once('=') {
        Some(("size", _)) => storage(text),
        _ => Err("there is only size=SIZE".to_owned()),
    }
}

/// A signal by name, with or without `SIG`, or by number.
pub fn signal(text: &str) -> Result<u8, String> {
    let wrong = || {
        format!("{text:?} is no signal: give a name as TERM or SIGTERM, a number from 1 to 64, or RTMIN+N")
    };
    if let Ok(number) = text.parse::<u8>() {
        return (1..=64).contains(&number).then_some(number).ok_or_else(wrong);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let (first, last) = REAL_TIME;
    let real_time = match name {
        "RTMIN" => Some(first),
        "RTMAX" => Some(last),
        _ => None,
    };
    real_time
        .or_else(|| first.checked_add(name.strip_prefix("RTMIN+")?.parse().ok()?))
        .or_else(|| last.checked_sub(name.strip_prefix("RTMAX-")?.parse().ok()?))
        .filter(|number| (first..=last).contains(number))
        .ok_or_else(wrong)
}

/// A signal's name, as `SIGTERM`.
pub fn signal_name(number: u8) -> String {
    match SIGNALS.iter().find(|(_, known)| *known == number) {
        Some((name, _)) => format!("SIG{name}"),
        None if number == REAL_TIME.0 => "SIGRTMIN".into(),
        None if number > REAL_TIME.0 => format!("SIGRTMIN+{}", number - REAL_TIME.0),
        None => number.to_string(),
    }
}

/// A time as Go writes it: `90s`, `1m30s`, `500ms`, `1.5h`. A number alone is seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("{text:?} is no time: give a number with ns, us, ms, s, m or h, or several as 1m30s");
    let mut rest = text;
    let mut total = 0f64;
    if text.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|character: char| !character.is_ascii_digit() && character != '.')
            .unwrap_or(rest.len());
        let number: f64 = rest
            .get(..digits)
            .unwrap_or_default()
            .parse()
            .map_err(|_| wrong())?;
        rest = rest.get(digits..).unwrap_or_default();
        let letters = rest
            .find(|character: char| !character.is_alphabetic())
            .unwrap_or(rest.len());
        total += number
            * match rest.get(..letters).unwrap_or_default() {
                "" | "s" => 1.0,
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(wrong()),
            };
        rest = rest.get(letters..).unwrap_or_default();
    }
    Duration::try_from_secs_f64(total).map_err(|_| format!("{text:?} is too long"))
}

/// A time as `--since` and `--until` take it: an age as `10m`, seconds since 1970 with a fraction or without, a date or a date with a
/// time, in UTC if it says so, else in this machine's zone.
pub fn moment(text: &str) -> Result<DateTime<Utc>, String> {
    moment_at(text, Utc::now())
}

fn moment_at(text: &str, now: DateTime<Utc>) -> Result<DateTime<Utc>, String> {
    let wrong = || {
        format!(
            "{text:?} is no time: give an age as 10m, seconds since 1970, or a date as 2026-01-31T12:00:00Z"
        )
    };
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.to_utc());
    }
    if !text.is_empty()
        && text
            .chars()
            .all(|character| character.is_ascii_digit() || character == '.')
    {
        let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
        let nanoseconds = format!("{fraction:0<9}");
        let nanoseconds = nanoseconds.get(..9).and_then(|digits| digits.parse().ok());
        return seconds
            .parse()
            .ok()
            .zip(nanoseconds)
            .and_then(|(seconds, nanoseconds)| DateTime::from_timestamp(seconds, nanoseconds))
            .ok_or_else(wrong);
    }
    if let Ok(age) = duration(text) {
        let age = chrono::Duration::from_std(age).map_err(|_| wrong())?;
        return now.checked_sub_signed(age).ok_or_else(wrong);
    }
    let (plain, utc) = match text.strip_suffix('Z') {
        Some(plain) => (plain, true),
        None => (text, false),
    };
    let forms = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M"];
    let time = forms
        .iter()
        .find_map(|form| NaiveDateTime::parse_from_str(plain, form).ok())
        .or_else(|| {
            NaiveDate::parse_from_str(plain, "%Y-%m-%d")
                .ok()?
                .and_hms_opt(0, 0, 0)
        })
        .ok_or_else(wrong)?;
    if utc {
        return Ok(time.and_utc());
    }
    Local
        .from_local_datetime(&time)
        .earliest()
        .map(|time| time.to_utc())
        .ok_or_else(wrong)
}

/// Names of resource limits and their numbers (`setrlimit(2)`).
const RESOURCES: [(&str, u32); 15] = [
    ("cpu", 0),
    ("fsize", 1),
    ("data", 2),
    ("stack", 3),
    ("core", 4),
    ("rss", 5),
    ("nproc", 6),
    ("nofile", 7),
    ("memlock", 8),
    ("locks", 10),
    ("sigpending", 11),
    ("msgqueue", 12),
    ("nice", 13),
    ("rtprio", 14),
    ("rttime", 15),
];

/// `NAME=SOFT[:HARD]`: number of the resource, soft, hard.
pub fn ulimit(text: &str) -> Result<(u32, u64, u64), String> {
    let (name, limits) = text.split_once('=').ok_or_else(|| {
        format!("{text:?} is no resource limit: it is NAME=SOFT[:HARD], as nofile=1024:4096")
    })?;
    let Some((_, number)) = RESOURCES.iter().find(|(known, _)| *known == name) else {
        let known: Vec<&str> = RESOURCES.iter().map(|(name, _)| *name).collect();
        return Err(format!(
            "there is no resource {name:?}: there are {}",
            known.join(", ")
        ));
    };
    let limit = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        text => text
            .parse::<u64>()
            .map_err(|_| format!("{text:?} is no limit of {name}: give a number, or -1 for none")),
    };
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let (soft, hard) = (limit(soft)?, limit(hard)?);
    if soft > hard {
        return Err(format!(
            "of {name}, the soft limit {soft} is over the hard limit {hard}"
        ));
    }
    Ok((*number, soft, hard))
}

/// The name of a resource.
pub fn resource_name(number: u32) -> &'static str {
    RESOURCES
        .iter()
        .find(|(_, known)| *known == number)
        .map_or("unknown", |(name, _)| name)
}

/// Names of capabilities, in the order of their numbers (`capabilities(7)`).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
const ALL_CAPABILITIES: u64 = (1 << CAPABILITIES.len()) - 1;

/// A capability by name, with or without `CAP_`, or `ALL`: a bit for each.
pub fn capability(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    if upper == "ALL" {
        return Ok(ALL_CAPABILITIES);
    }
    let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
    CAPABILITIES
        .iter()
        .position(|known| *known == name)
        .map(|number| 1 << number)
        .ok_or_else(|| {
            format!("there is no capability {text:?}: `capabilities(7)` lists them; ALL is all of them")
        })
}

/// What is taken from a container that is to have `add` and not `drop`, as Docker has it: one over the other by name, `ALL` first.
pub fn dropped(add: &[u64], drop: &[u64]) -> u64 {
    let named = |bits: &[u64]| {
        bits.iter()
            .filter(|bits| **bits != ALL_CAPABILITIES)
            .fold(0, |all, bit| all | bit)
    };
    let all = drop.contains(&ALL_CAPABILITIES);
    match all {
        true => ALL_CAPABILITIES & !add.iter().fold(0, |all, bit| all | bit) | named(drop),
        false => named(drop) & !named(add),
    }
}

/// Names of these capabilities, as Docker shows them.
pub fn capability_names(bits: u64) -> Vec<String> {
    if bits == ALL_CAPABILITIES {
        return vec!["ALL".into()];
    }
    CAPABILITIES
        .iter()
        .enumerate()
        .filter(|(number, _)| bits >> number & 1 == 1)
        .map(|(_, name)| format!("CAP_{name}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGKILL", 9),
            ("sighup", 1),
            ("10", 10),
            ("RTMIN+3", 37),
            ("SIGRTMAX-1", 63),
        ] {
            assert_eq!(signal(text), Ok(number), "{text}");
        }
        for text in ["", "0", "65", "SIG", "NOPE", "RTMIN+99", "-1"] {
            assert!(signal(text).is_err(), "{text}");
        }
        assert_eq!(signal_name(15), "SIGTERM");
        assert_eq!(signal(&signal_name(37)), Ok(37));
    }

    #[test]
    fn times_are_those_of_go() {
        for (text, milliseconds) in [
            ("500ms", 500),
            ("2", 2000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "2y", "m", "-1s", "1..2s", "1e400h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_moment_is_an_age_or_a_date() {
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let at = |text: &str| moment_at(text, now).map(|time| time.timestamp());
        assert_eq!(at("10m"), Ok(1_800_000_000 - 600));
        assert_eq!(at("1700000000"), Ok(1_700_000_000));
        assert_eq!(
            moment_at("1.25", now).unwrap(),
            DateTime::from_timestamp(1, 250_000_000).unwrap()
        );
        assert_eq!(at("2026-01-31T12:00:00Z"), Ok(1_769_860_800));
        assert_eq!(at("2026-01-31T13:00:00+01:00"), Ok(1_769_860_800));
        assert_eq!(at("2026-01-31T12:00:00.5Z"), Ok(1_769_860_800));
        assert!(at("2026-01-31").is_ok());
        for text in ["", "yesterday", "2026-13-01", "."] {
            assert!(at(text).is_err(), "{text}");
        }
    }

    #[test]
    fn storage_has_dockers_words_and_a_size_within_bounds() {
        for text in ["10g", "size=10g", "size=10G", "10240m"] {
            assert_eq!(storage(text), Ok(10 << 30), "{text}");
        }
        for text in ["", "15m", "1025g", "much", "size=", "volume=10g"] {
            assert!(storage(text).is_err(), "{text}");
        }
        assert_eq!(storage_option("size=16m"), Ok(16 << 20));
        assert!(storage_option("16m").is_err() && storage_option("quota=16m").is_err());
    }

    #[test]
    fn resource_limits_are_read() {
        assert_eq!(ulimit("nofile=1024:4096"), Ok((7, 1024, 4096)));
        assert_eq!(ulimit("core=0"), Ok((4, 0, 0)));
        assert_eq!(ulimit("memlock=-1"), Ok((8, u64::MAX, u64::MAX)));
        for text in ["nofile", "what=1", "nofile=x", "nofile=5:4"] {
            assert!(ulimit(text).is_err(), "{text}");
        }
        assert_eq!(resource_name(7), "nofile");
    }

    #[test]
    fn capabilities_are_taken_and_given_as_docker_does() {
        let bit = |name: &str| capability(name).unwrap();
        assert_eq!(bit("CAP_CHOWN"), 1);
        assert_eq!(bit("net_raw"), 1 << 13);
        assert!(capability("nothing").is_err());
        assert_eq!(dropped(&[], &[bit("NET_RAW")]), 1 << 13);
        assert_eq!(dropped(&[bit("CHOWN")], &[bit("ALL")]), ALL_CAPABILITIES & !1);
        assert_eq!(dropped(&[bit("ALL")], &[bit("CHOWN")]), 1);
        assert_eq!(dropped(&[], &[]), 0);
        assert_eq!(capability_names(1 << 13), ["CAP_NET_RAW"]);
        assert_eq!(capability_names(ALL_CAPABILITIES), ["ALL"]);
    }
}

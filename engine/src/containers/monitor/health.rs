//! Health checks: a command that is executed in the container from time to time, and says by its exit status whether it works.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use picovm_guest_protocol::{ContainerExit, ProcessSpec};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::super::client::null;
use super::super::record::{ContainerConfig, Health, HealthResult, Status};
use super::{KILL, Monitor, Purpose, Running};

/// Results that are kept.
const KEPT: usize = 5;
/// Bytes of output that are kept of each.
const OUTPUT_MAX: usize = 4096;
const SECOND: Duration = Duration::from_secs(1);

/// The checks of a container that runs.
pub(super) struct Checks {
    args: Vec<Vec<u8>>,
    interval: Duration,
    timeout: Duration,
    retries: u32,
    start_until: Instant,
    start_interval: Duration,
    /// When the next one is due.
    pub(super) next: Instant,
    /// The one that runs.
    pub(super) current: Option<Check>,
    /// What they have said.
    pub(super) health: Health,
}

/// A check that runs.
pub(super) struct Check {
    pub(super) process: u16,
    pub(super) deadline: Instant,
    pub(super) output: Option<OwnedFd>,
    started: DateTime<Utc>,
    told: Vec<u8>,
    pub(super) timed_out: bool,
}

impl Check {
    /// Takes output.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        let room = OUTPUT_MAX.saturating_sub(self.told.len());
        self.told
            .extend_from_slice(bytes.get(..bytes.len().min(room)).unwrap_or_default());
    }
}

impl Checks {
    /// Those that the configuration asks for.
    pub(super) fn of(config: &ContainerConfig) -> Option<Self> {
        let check = config.healthcheck.as_ref()?;
        let words = |words: &[String]| words.iter().map(|word| word.clone().into_bytes()).collect();
        let args: Vec<Vec<u8>> = match check.test.split_first() {
            Some((kind, rest)) if kind == "CMD" && !rest.is_empty() => words(rest),
            Some((kind, [line])) if kind == "CMD-SHELL" => {
                vec![b"/bin/sh".to_vec(), b"-c".to_vec(), line.clone().into_bytes()]
            }
            _ => return None,
        };
        let or = |nanoseconds: i64, default: Duration| match u64::try_from(nanoseconds) {
            Ok(0) | Err(_) => default,
            Ok(nanoseconds) => Duration::from_nanos(nanoseconds),
        };
        let now = Instant::now();
        let interval = or(check.interval, 30 * SECOND);
        let start_period = or(check.start_period, Duration::ZERO);
        let start_interval = or(check.start_interval, 5 * SECOND).min(interval);
        let first = if start_period.is_zero() {
            interval
        } else {
            start_interval
        };
        Some(Self {
            args,
            interval,
            timeout: or(check.timeout, 30 * SECOND),
            retries: u32::try_from(check.retries)
                .ok()
                .filter(|retries| *retries > 0)
                .unwrap_or(3),
            start_until: now + start_period,
            start_interval,
            next: now + first,
            current: None,
            health: Health {
                status: "starting".into(),
                ..Health::default()
            },
        })
    }

    /// What to execute.
    pub(super) fn spec(&self, config: &ContainerConfig) -> ProcessSpec {
        use std::os::unix::ffi::OsStringExt;
        ProcessSpec {
            args: self.args.clone(),
            env: config.env.iter().map(|text| text.0.clone().into_vec()).collect(),
            cwd: config.workdir.0.clone().into_vec(),
            user: config.user.0.clone().into_vec(),
            ..ProcessSpec::default()
        }
    }

    /// One begins.
    pub(super) fn begin(&mut self, process: u16, output: OwnedFd) {
        self.current = Some(Check {
            process,
            deadline: Instant::now() + self.timeout,
            output: Some(output),
            started: Utc::now(),
            told: Vec::new(),
            timed_out: false,
        });
    }

    /// The one that runs has ended with this status, -1 if it took too long; whether the container works as it did before.
    pub(super) fn end(&mut self, code: i32) -> bool {
        let Some(check) = self.current.take() else {
            return true;
        };
        let now = Instant::now();
        let before = self.health.status.clone();
        if code == 0 {
            self.health.failing_streak = 0;
            self.health.status = "healthy".into();
        } else if before != "starting" || now > self.start_until {
            self.health.failing_streak = self.health.failing_streak.saturating_add(1);
            if self.health.failing_streak >= self.retries {
                self.health.status = "unhealthy".into();
            }
        }
        self.health.log.push(HealthResult {
            start: check.started,
            end: Utc::now(),
            exit_code: code,
            output: String::from_utf8_lossy(&check.told).into_owned(),
        });
        let surplus = self.health.log.len().saturating_sub(KEPT);
        self.health.log.drain(..surplus);
        let starting = self.health.status == "starting" && now < self.start_until;
        self.next = now
            + if starting {
                self.start_interval
            } else {
                self.interval
            };
        self.health.status == before
    }

    /// When the monitor has to look at the checks again.
    pub(super) fn due(&self) -> Instant {
        match &self.current {
            Some(check) if check.timed_out => check.deadline + 5 * SECOND,
            Some(check) => check.deadline,
            None => self.next,
        }
    }
}

impl Monitor<'_> {
    /// Begins a health check that is due, ends one that takes too long.
    pub(super) fn check_health(&mut self, now: Instant) {
        let paused = self.record.state.status == Status::Paused;
        let Some(running) = self
            .running
            .as_mut()
            .filter(|running| running.exit.is_none() && !paused)
        else {
            return;
        };
        let Some(checks) = running.checks.as_mut().filter(|checks| now >= checks.due()) else {
            return;
        };
        if let Some(check) = &mut checks.current {
            if check.timed_out {
                // Killed, and still there: its end will come, or that of the container.
                check.deadline = now + Duration::from_secs(3600);
            }
            check.timed_out = true;
            let _ = running.vmm.signal_process(check.process, KILL);
            return;
        }
        let spec = checks.spec(&self.record.config);
        let begin = |running: &mut Running| -> Option<()> {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC).ok()?;
            let null = null().ok()?;
            let process = Self::free_number(running)?;
            running
                .vmm
                .exec(process, &spec, [null.as_fd(), write.as_fd(), write.as_fd()])
                .ok()?;
            running.processes.insert(process, Purpose::Check);
            running.checks.as_mut()?.begin(process, read);
            Some(())
        };
        if begin(running).is_none()
            && let Some(checks) = &mut running.checks
        {
            checks.next = now + Duration::from_secs(1);
        }
    }

    pub(super) fn take_check_output(&mut self) {
        let check = self
            .running
            .as_mut()
            .and_then(|running| running.checks.as_mut()?.current.as_mut());
        let Some(check) = check else { return };
        let Some(output) = &check.output else { return };
        let mut bytes = Vec::with_capacity(4096);
        match rustix::io::read(output, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(count) if count > 0 => check.take(&bytes),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Ok(_) | Err(_) => check.output = None,
        }
    }

    pub(super) fn end_check(&mut self, exit: &ContainerExit) {
        // What it wrote last is in the pipe: its writers have gone.
        while self
            .running
            .as_ref()
            .and_then(|running| running.checks.as_ref()?.current.as_ref())
            .is_some_and(|check| check.output.is_some())
        {
            self.take_check_output();
        }
        let Some(checks) = self.running.as_mut().and_then(|running| running.checks.as_mut()) else {
            return;
        };
        let timed_out = checks.current.as_ref().is_some_and(|check| check.timed_out);
        let code = if timed_out {
            -1
        } else {
            i32::from(exit.shell_status())
        };
        let same = checks.end(code);
        let health = checks.health.clone();
        let status = health.status.clone();
        self.change(|state| state.health = Some(health));
        if !same {
            self.containers
                .tell(&self.record, &format!("health_status: {status}"), &[]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::Healthcheck;

    fn checks(retries: i64, start_period: i64) -> Checks {
        let config = ContainerConfig {
            healthcheck: Some(Healthcheck {
                test: vec!["CMD-SHELL".into(), "test -e /ok".into()],
                retries,
                start_period,
                ..Healthcheck::default()
            }),
            ..super::super::super::tests::config()
        };
        Checks::of(&config).unwrap()
    }

    fn run(checks: &mut Checks, code: i32) -> bool {
        let (read, _write) = rustix::pipe::pipe().unwrap();
        checks.begin(1, read);
        checks.end(code)
    }

    #[test]
    fn a_container_is_unhealthy_after_so_many_failures_in_a_row_and_healthy_after_one_success() {
        let mut checks = checks(2, 0);
        assert!(run(&mut checks, 1));
        assert!(!run(&mut checks, -1));
        assert_eq!(checks.health.status, "unhealthy");
        assert!(!run(&mut checks, 0));
        assert_eq!(
            (checks.health.status.as_str(), checks.health.failing_streak),
            ("healthy", 0)
        );
        for _ in 0..10 {
            run(&mut checks, 0);
        }
        assert_eq!(checks.health.log.len(), KEPT);
    }

    #[test]
    fn failures_while_it_starts_do_not_count() {
        let mut checks = checks(1, 3_600_000_000_000);
        assert!(run(&mut checks, 1));
        assert_eq!(checks.health.status, "starting");
        run(&mut checks, 0);
        run(&mut checks, 1);
        assert_eq!(checks.health.status, "unhealthy");
    }

    #[test]
    fn none_and_nonsense_are_no_checks() {
        for test in [
            vec![],
            vec!["NONE".to_owned()],
            vec!["CMD".into()],
            vec!["WHAT".into(), "x".into()],
        ] {
            let config = ContainerConfig {
                healthcheck: Some(Healthcheck {
                    test,
                    ..Healthcheck::default()
                }),
                ..super::super::super::tests::config()
            };
            assert!(Checks::of(&config).is_none());
        }
    }
}

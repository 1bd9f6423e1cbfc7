//! Hearing what a jailed process says that makes a template, until it has ended, and seeing to it that it does.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::RecvFlags;

use super::jailed::Said;
use super::{END_MAX, FromMaker, failed};
use crate::confinement::VmmProcess;
use crate::error::EngineError;
use crate::messages;
use crate::timeout;

/// Largest message of a jailed process.
const MESSAGE_MAX: usize = 64 << 10;

/// What a jailed process has said, if it has said anything more; `Err` if it will not.
fn receive(said: &OwnedFd) -> Result<Option<Said>, ()> {
    let mut bytes = vec![0u8; MESSAGE_MAX];
    match rustix::net::recv(said, bytes.as_mut_slice(), RecvFlags::DONTWAIT) {
        Ok((0, _)) => Err(()),
        Ok((count, _)) => Ok(bytes
            .get(..count)
            .and_then(|bytes| postcard::from_bytes(bytes).ok())),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(_) => Err(()),
    }
}

/// What has been heard of a jailed process.
#[derive(Default)]
struct Heard {
    at_freeze_point: bool,
    done: Option<Result<(), String>>,
    /// Whether it has closed its end.
    all: bool,
}

impl Heard {
    /// Takes what it has said next. It is told once that it is at the freeze point, and what it says after that it is done does
    /// not count.
    fn next(&mut self, said: &OwnedFd, control: &UnixStream) {
        match receive(said) {
            Ok(Some(Said::FreezePoint)) if !self.at_freeze_point => {
                self.at_freeze_point = true;
                // Who does not listen has closed the other end, which is noticed.
                let _ = messages::send(control, &FromMaker::FreezePoint, &[]);
            }
            Ok(Some(Said::Done(done))) if self.done.is_none() => self.done = Some(done),
            Ok(_) => {}
            Err(()) => self.all = true,
        }
    }
}

/// Waits until a jailed process has ended. It is killed if it takes longer than `limit`, or if who asked for the template is gone.
pub(super) fn supervise(
    control: &UnixStream,
    said: &OwnedFd,
    process: VmmProcess,
    limit: Duration,
) -> Result<(), EngineError> {
    let begun = Instant::now();
    let mut deadline = begun.checked_add(limit);
    let mut heard = Heard::default();
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            process.kill();
            process.wait();
            return match heard.done {
                Some(Err(reason)) => Err(EngineError::Vmm(reason)),
                _ => Err(EngineError::Vmm(format!(
                    "cannot make the template: the process that does it did not end within {} s, and was killed",
                    begun.elapsed().as_secs()
                ))),
            };
        }
        let timeout = left.map(timeout::timespec);
        let mut fds = vec![
            PollFd::new(&process, PollFlags::IN),
            PollFd::new(control, PollFlags::IN),
        ];
        if !heard.all {
            fds.push(PollFd::new(said, PollFlags::IN));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed("wait for the process that makes a template")(error.into())),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let ready = |index: usize| ready.get(index).copied().unwrap_or(false);
        if ready(1) {
            // Nobody says anything here until it is answered: who asked has ended.
            process.kill();
            process.wait();
            return Err(EngineError::Vmm("who asked for the template has ended".into()));
        }
        if ready(2) {
            heard.next(said, control);
            if heard.done.is_some() {
                let soon = Instant::now().checked_add(END_MAX);
                deadline = deadline.min(soon);
            }
        }
        if ready(0) {
            // The last that it said, of which there are two at most that count.
            for _ in 0..2 {
                heard.next(said, control);
            }
            let how = process.wait();
            return match heard.done {
                Some(done) => done.map_err(EngineError::Vmm),
                None => Err(EngineError::Vmm(format!("cannot make the template: {how}"))),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::super::jailed::{REASON_MAX, send, tell};
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A process in the place of a jailed one, which does what this script does, and both ends of what it says.
    #[expect(clippy::zombie_processes, reason = "it is reaped by its descriptor")]
    fn process(script: &str) -> (VmmProcess, OwnedFd, OwnedFd) {
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let (said, say) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (VmmProcess::plain(process), said, say)
    }

    fn told(result: Result<(), EngineError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn one_that_hangs_is_killed_in_time_and_told_as_such() {
        let (control, _theirs) = UnixStream::pair().unwrap();
        let (process, said, _say) = process("exec sleep 1000");
        let begun = Instant::now();
        let error = told(supervise(&control, &said, process, Duration::from_secs(1)));
        assert!(error.contains("did not end within 1 s"), "{error}");
        assert!(begun.elapsed() < LONG);
    }

    #[test]
    fn one_that_dies_is_told_by_how_it_did() {
        let (control, _theirs) = UnixStream::pair().unwrap();
        for (script, how) in [
            ("kill -SYS $$", "system call that its jail does not allow"),
            ("kill -KILL $$", "ended by signal 9"),
            ("exit 0", "has ended"),
        ] {
            let (process, said, say) = process(script);
            drop(say);
            let error = told(supervise(&control, &said, process, LONG));
            assert!(
                error.contains("cannot make the template") && error.contains(how),
                "{error}"
            );
        }
    }

    #[test]
    fn what_it_says_is_told_once_and_its_reason_is_the_error() {
        let (control, theirs) = UnixStream::pair().unwrap();
        let (process, said, say) = process("exit 0");
        // More than it has to say, and what is no message at all.
        for _ in 0..3 {
            send(&say, &Said::FreezePoint);
        }
        rustix::net::send(&say, &[0xff; 100], SendFlags::empty()).unwrap();
        let mut heard = Heard::default();
        for _ in 0..4 {
            heard.next(&said, &control);
        }
        assert!(heard.at_freeze_point && heard.done.is_none() && !heard.all);
        tell(&say, Err(EngineError::Vmm("x".repeat(1 << 20))));
        let error = told(supervise(&control, &said, process, LONG));
        assert!(
            error.starts_with("xxx") && error.len() <= REASON_MAX,
            "{}",
            error.len()
        );
        drop(control);
        let first = messages::receive::<FromMaker>(&theirs).unwrap();
        assert_eq!(first.map(|(told, _)| told), Some(FromMaker::FreezePoint));
        assert!(messages::receive::<FromMaker>(&theirs).unwrap().is_none());
    }

    #[test]
    fn one_that_is_done_but_does_not_end_is_not_waited_for_long() {
        let (control, _theirs) = UnixStream::pair().unwrap();
        let (process, said, say) = process("exec sleep 1000");
        tell(&say, Ok(()));
        let begun = Instant::now();
        // It may still write: so it is no template.
        assert!(supervise(&control, &said, process, LONG).is_err());
        assert!(begun.elapsed() < LONG);
    }

    #[test]
    fn it_ends_with_who_asked_for_the_template() {
        let (control, theirs) = UnixStream::pair().unwrap();
        let (process, said, _say) = process("exec sleep 1000");
        drop(theirs);
        let begun = Instant::now();
        assert!(supervise(&control, &said, process, LONG).is_err());
        assert!(begun.elapsed() < LONG);
    }
}

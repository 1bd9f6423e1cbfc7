//! The VMM processes of a pool's fork server: reaped when they have ended, and killed when they do not end although nobody is
//! left who could want them.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::confinement::VmmProcess;
use crate::timeout;

/// How long a VMM process may go on whose other end is closed: it takes its clone down, which is a matter of milliseconds. One
/// that its guest has taken over, or that was stopped, may not want to.
const END_MAX: Duration = Duration::from_secs(5);

/// Why a wait has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The pool has said something.
    Pool,
    /// The moment has come.
    Time,
    /// Something else has happened.
    Nothing,
}

/// The VMM processes of a fork server.
#[derive(Default)]
pub(crate) struct Children(Vec<Child>);

struct Child {
    process: VmmProcess,
    /// Its end of the connection with who uses the pool: it tells when the other one is closed.
    socket: UnixStream,
    /// When it is killed, since the other end is closed.
    until: Option<Instant>,
}

impl Children {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes one that was just forked, with its end of its connection.
    pub(crate) fn push(&mut self, process: VmmProcess, socket: UnixStream) {
        self.0.push(Child {
            process,
            socket,
            until: None,
        });
    }

    /// In a child of this process, which has copies of all: none of these is its own.
    pub(crate) fn leave(&mut self) {
        for child in self.0.drain(..) {
            // Dropping it would end it.
            std::mem::forget(child.process);
        }
    }

    /// Waits until the pool has said something, a child has ended, which then is reaped, one was left by its user, or this moment
    /// has come.
    pub(crate) fn wait(&mut self, control: Option<&UnixStream>, due: Option<Instant>) -> io::Result<Asked> {
        let mut fds: Vec<PollFd<'_>> = self
            .0
            .iter()
            .map(|child| PollFd::new(&child.process, PollFlags::IN))
            .collect();
        for child in self.0.iter().filter(|child| child.until.is_none()) {
            // Not what is sent to it: that is the child's to read.
            fds.push(PollFd::new(&child.socket, PollFlags::RDHUP));
        }
        fds.extend(control.map(|control| PollFd::new(control, PollFlags::IN)));
        if fds.is_empty() {
            return Ok(Asked::Nothing);
        }
        let first = self.0.iter().filter_map(|child| child.until).chain(due).min();
        let timeout = first.map(timeout::until);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let asked = control.is_some() && ready.pop().unwrap_or(false);
        let mut left = ready.split_off(self.0.len()).into_iter();
        for child in self.0.iter_mut().filter(|child| child.until.is_none()) {
            if left.next().unwrap_or(false) {
                child.until = Instant::now().checked_add(END_MAX);
            }
        }
        let now = Instant::now();
        for child in &self.0 {
            if child.until.is_some_and(|until| until <= now) {
                child.process.kill();
            }
        }
        let mut ended = ready.into_iter();
        let (gone, left) = std::mem::take(&mut self.0)
            .into_iter()
            .partition::<Vec<_>, _>(|_| ended.next().unwrap_or(false));
        self.0 = left;
        for child in gone {
            // Last, so that nobody hears of an end that is not one yet.
            let Child { process, socket, .. } = child;
            process.wait();
            drop(socket);
        }
        Ok(match asked {
            true => Asked::Pool,
            false if due.is_some_and(|due| due <= now) => Asked::Time,
            false => Asked::Nothing,
        })
    }
}

/// Lets a fork server have as many files open as it may: some for each child. What it cannot have shows when it forks.
pub(crate) fn raise_open_files() {
    let before = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: before.maximum,
        maximum: before.maximum,
    };
    let _ = setrlimit(Resource::Nofile, raised);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    use std::process::{Command, Stdio};

    /// A process that does not care whether anybody wants it.
    #[expect(clippy::zombie_processes, reason = "it is reaped by its descriptor")]
    fn stubborn(children: &mut Children) -> UnixStream {
        let child = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        children.push(VmmProcess::plain(process), theirs);
        ours
    }

    #[test]
    fn one_that_nobody_wants_any_more_has_its_time_and_no_other_is_touched() {
        let mut children = Children::default();
        let wanted = stubborn(&mut children);
        let unwanted = stubborn(&mut children);
        let (control, theirs) = UnixStream::pair().unwrap();
        let begun = Instant::now();
        drop(unwanted);
        while children.0.len() == 2 {
            assert_eq!(children.wait(Some(&control), None).unwrap(), Asked::Nothing);
            assert!(begun.elapsed() < END_MAX * 3);
        }
        assert!(begun.elapsed() >= END_MAX);
        assert!(children.0.iter().all(|child| child.until.is_none()));
        drop(theirs);
        assert_eq!(children.wait(Some(&control), None).unwrap(), Asked::Pool);
        // The test's own.
        for child in &mut children.0 {
            child.process.kill();
        }
        while !children.is_empty() {
            children.wait(None, None).unwrap();
        }
        drop(wanted);
    }
}

//! How the host's scheduler treats a thread for a while: who parks clones gives way, who waits for a container's bytes gets
//! them at once.

/// While it lives this thread does not push others aside when it wakes: parking a clone must not hold up one that starts.
/// Threads that it makes are alike until they call [`end_batch`].
pub struct Batch;

impl Batch {
    /// Begins it.
    pub fn begin() -> Self {
        set_policy(libc::SCHED_BATCH);
        Self
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        end_batch();
    }
}

/// Ends what a thread has inherited of a [`Batch`] in which it was made. `SCHED_RESET_ON_FORK` would do that, but only who is
/// privileged can take it back, and a jailed process is not.
pub fn end_batch() {
    set_policy(libc::SCHED_OTHER);
}

fn set_policy(policy: libc::c_int) {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is initialised and outlives the call. A host that refuses it only makes parking less polite.
    unsafe { libc::sched_setscheduler(0, policy, &raw const none) };
}

/// Lets the rest of this process's life give way to whatever else is to be done: its container has ended, and taking down its
/// clone takes longer than starting one. It still gets its share, so that memory comes back under any load.
pub fn give_way() {
    const NICEST: libc::c_int = 19;
    // SAFETY: takes plain integers. If it is refused, others wait a little.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICEST) };
}

/// While it lives this thread asks for the processor in short slices, for which the scheduler runs it at once when it wakes,
/// even where all processors are busy, with vCPUs above all (Linux 6.12, sched_setattr(2); an earlier kernel ignores it).
/// Threads and processes that it makes meanwhile inherit it. A thread with a policy other than the usual one keeps what it has.
pub struct Prompt {
    changed: bool,
}

/// The shortest slice that the kernel takes, in nanoseconds.
const SLICE_NS: u64 = 100_000;

impl Prompt {
    /// Begins it.
    #[must_use]
    pub fn begin() -> Self {
        // SAFETY: takes a plain integer; 0 is this thread.
        let changed = unsafe { libc::sched_getscheduler(0) } == libc::SCHED_OTHER;
        if changed {
            set_slice(SLICE_NS);
        }
        Self { changed }
    }
}

impl Drop for Prompt {
    fn drop(&mut self) {
        if self.changed {
            // 0: the kernel's own.
            set_slice(0);
        }
    }
}

fn set_slice(nanoseconds: u64) {
    /// `struct sched_attr`, first version (sched_setattr(2)).
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        // SAFETY: takes plain integers. A niceness of -1 is told from an error by nobody here, and is the same request.
        nice: unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) },
        priority: 0,
        runtime: nanoseconds,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the structure is initialised, says its size and outlives the call. A host that refuses it only makes the
    // thread wait its turn.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> libc::c_int {
        // SAFETY: takes a plain integer.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn a_batch_ends_without_any_privilege_in_this_thread_and_in_those_made_in_it() {
        let batch = Batch::begin();
        // A flag beside the policy could be set by everybody, and taken back only with a capability.
        assert_eq!(policy(), libc::SCHED_BATCH);
        let made = std::thread::spawn(|| {
            let inherited = policy();
            end_batch();
            (inherited, policy())
        });
        assert_eq!(made.join().unwrap(), (libc::SCHED_BATCH, libc::SCHED_OTHER));
        drop(batch);
        assert_eq!(policy(), libc::SCHED_OTHER);
    }

    #[test]
    fn a_thread_with_a_policy_of_its_own_keeps_it() {
        let batch = Batch::begin();
        let before = policy();
        let prompt = Prompt::begin();
        assert_eq!(policy(), before);
        drop(prompt);
        assert_eq!(policy(), before);
        drop(batch);
        assert_eq!(policy(), libc::SCHED_OTHER);
        drop(Prompt::begin());
        assert_eq!(policy(), libc::SCHED_OTHER);
    }
}

//! What can go wrong. The message says what was tried, on what, what happened, and what to do.

use std::io;

/// Why a process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The policy asks for what cannot be.
    #[error("the policy cannot be followed: {0}")]
    Policy(String),
    /// The host refused something.
    #[error("cannot {attempted}: {source}{}", advice(source, attempted))]
    Host {
        /// What was attempted, on what.
        attempted: String,
        /// What happened.
        source: io::Error,
    },
    /// A list of system calls is not one.
    #[error("the list of system calls {list} cannot be used: {reason}")]
    List {
        /// Its name.
        list: String,
        /// What is wrong.
        reason: String,
    },
    /// No id of the range is free.
    #[error(
        "all {count} ids of the policy's range are in use: end some jails, or give the policy a wider range (ids.count)"
    )]
    NoIds {
        /// How many there are.
        count: u32,
    },
    /// The confined process could not be confined; it has ended without running anything.
    #[error("cannot {attempted} for a jail: {source}{}", advice(source, attempted))]
    Confine {
        /// Which step.
        attempted: String,
        /// What happened.
        source: io::Error,
    },
    /// A jail may only be spawned by the process that prepared it, while that has one thread.
    #[error(
        "a jail can be spawned only by the process that prepared its jailer, and only while it has one thread; {0}"
    )]
    NotAlone(&'static str),
}

fn advice(source: &io::Error, attempted: &str) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) if attempted.contains("namespace") => {
            ". The host may forbid it: see sysctl user.max_user_namespaces and kernel.unprivileged_userns_clone"
        }
        Some(libc::ENOSPC) if attempted.contains("namespace") => {
            ". The host's limit on namespaces is reached: see sysctl user.max_*_namespaces"
        }
        Some(libc::EACCES | libc::EROFS) if attempted.contains("cgroup") => {
            ". A cgroup must be writable: run as root, or in one that was delegated to you"
        }
        Some(libc::ENOSYS) => ". The jail needs Linux 5.12 or later",
        _ => "",
    }
}

impl JailError {
    /// For `map_err`.
    pub(crate) fn host<E: Into<io::Error>>(attempted: impl Into<String>) -> impl FnOnce(E) -> Self {
        let attempted = attempted.into();
        move |source| Self::Host {
            attempted,
            source: source.into(),
        }
    }
}

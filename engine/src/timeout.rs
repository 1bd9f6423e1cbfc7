//! Timeouts as the kernel takes them.

use std::time::{Duration, Instant};

use rustix::event::Timespec;

/// A duration for `ppoll(2)`.
#[must_use]
pub fn timespec(duration: Duration) -> Timespec {
    // What does not fit is longer than anybody waits.
    Timespec::try_from(duration).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    })
}

/// What is left until then.
#[must_use]
pub fn until(deadline: Instant) -> Timespec {
    timespec(deadline.saturating_duration_since(Instant::now()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_exact_and_never_negative() {
        let half = timespec(Duration::from_millis(2500));
        assert_eq!((half.tv_sec, half.tv_nsec), (2, 500_000_000));
        assert!(timespec(Duration::MAX).tv_sec > 0);
        assert_eq!(until(Instant::now()), timespec(Duration::ZERO));
    }
}

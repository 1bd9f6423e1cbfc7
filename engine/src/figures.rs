//! Figures as `picovm bench` and the benchmark program tell them.

use std::time::Instant;

/// Milliseconds from one moment to another.
#[must_use]
pub fn ms(from: Instant, to: Instant) -> f64 {
    to.duration_since(from).as_secs_f64() * 1e3
}

/// Middle of sorted values; of an even number of them, the mean of both; 0 of none.
#[must_use]
pub fn median(sorted: &[f64]) -> f64 {
    let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
    let upper = at(sorted.len() / 2);
    if sorted.len() % 2 == 1 {
        upper
    } else {
        f64::midpoint(at((sorted.len() / 2).saturating_sub(1)), upper)
    }
}

/// The smallest of sorted values that is not less than `percent` % of them (nearest rank); 0 of none.
#[must_use]
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// This host: processor, number of CPUs, kernel.
#[must_use]
pub fn host() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let plural = if cpus == 1 { "" } else { "s" };
    let kernel = rustix::system::uname();
    format!(
        "{model}, {cpus} CPU{plural}, Linux {}",
        kernel.release().to_string_lossy()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles_are_values_in_the_middle_and_near_the_end() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[1.0, 2.0]), 1.5);
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 99), 99.0);
        assert_eq!(percentile(&[1.0, 2.0], 99), 2.0);
        assert_eq!(percentile(&[], 99), 0.0);
    }
}

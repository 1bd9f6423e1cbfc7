//! Latency and memory of boot, freeze, fork and run.
fn main() {}

//! PID 1 of the guest: reaches the freeze point, then becomes the agent.
fn main() {}

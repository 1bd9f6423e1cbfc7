//! Run every container as its own lightweight VM.
fn main() {}

//! Confines one process: namespaces of its own, an empty read-only root, a cgroup, an id that nobody else has, no
//! capabilities, resource limits, and a list of the system calls that each of its threads needs.
//!
//! ```no_run
//! use picovm_jailer::{Jailer, Mode, Policy, ThreadKind};
//!
//! // Once, by a process that has one thread: whatever can be prepared is.
//! let mut jailer = Jailer::new(Policy::default(), Mode::of_caller())?;
//! jailer.prepare(2)?;
//! // For each confined process. It has no descriptor but these, and ends with what the closure returns.
//! let filters = jailer.filters().clone();
//! let jail = jailer.spawn(&[0, 1, 2], move || {
//!     // Build what needs more system calls than the list has, then, in each thread:
//!     if filters.apply(ThreadKind::Control).is_err() {
//!         return 125;
//!     }
//!     // Work for somebody who is not trusted.
//!     0
//! })?;
//! println!("{:?}", jail.wait()?);
//! # Ok::<(), picovm_jailer::JailError>(())
//! ```
//!
//! What is done in which order, and why: `docs/jail.md`. The policy's fields are described by its JSON Schema,
//! `docs/jail-policy.schema.json`.

mod cgroup;
mod confine;
mod error;
mod exec;
mod ids;
mod jail;
mod jailer;
mod limits;
mod policy;
mod root;
mod seccomp;
mod slot;
mod sys;

pub use error::JailError;
pub use exec::{Program, Signals};
pub use jail::{Ended, Jail};
pub use jailer::{Jailer, Mode, Opened};
pub use policy::{
    Access, AllowedCall, ArgumentCondition, Capability, Cgroup, Ids, IoLimit, Namespaces, Operator, Policy,
    Resource, RootEntry, Seccomp, SeccompMode, Width,
};
pub use seccomp::{Filters, ThreadKind, Work};

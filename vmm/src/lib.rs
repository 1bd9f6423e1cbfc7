//! The picovm VMM: boots a Linux kernel once, freezes the machine, and forks copy-on-write clones of it.
//!
//! ```no_run
//! use picovm_vmm::{ForkOptions, FreezeOptions, Machine, MachineConfig, Outcome};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = MachineConfig::new("vmlinux");
//! config.initramfs = Some("initramfs.cpio".into());
//! let mut parent = Machine::boot(&config)?;
//! assert_eq!(parent.run(None)?, Some(Outcome::FreezePoint));
//! let template = parent.freeze("template".as_ref(), &FreezeOptions::default())?;
//!
//! let mut clone = template.fork(ForkOptions { identity: b"who you are".to_vec(), ..Default::default() })?;
//! let outcome = clone.run(None)?;
//! # let _ = outcome; Ok(()) }
//! ```
//!
//! The crate knows nothing of containers: an identity is bytes, and the control connection
//! ([`Machine::take_connection`]) a byte stream. What they mean is between the guest's `init` and whoever forks.
//!
//! Modules, in the order of a clone's life: [`config`] and [`arch`] (what a machine is made of and how it boots),
//! [`machine`] (run, pause, save, build), [`template`] (freeze, open, fork), [`devices`].

pub mod arch;
pub mod config;
pub mod devices;
pub mod machine;
pub mod memory;
pub mod probe;
pub mod template;
pub mod threads;
pub mod vcpu;
pub mod vm;
pub mod working_set;

pub use config::{Disk, MachineConfig, STORAGE_SECTORS};
pub use machine::{BootFiles, Machine, MachineError, Outcome};
pub use template::{Draft, Expected, ForkOptions, FreezeOptions, FrozenFiles, Template, TemplateError};
pub use threads::{OnThread, ThreadKind, Threads};
pub use working_set::WorkingSet;

//! Attacks from inside the guest. A program as root with `/dev/mem`, device registers and ports at hand attacks the VMM
//! that runs it, as `picovm run` runs every container. Whatever it does, the VMM does not panic, keeps to its memory and
//! comes to an end, its neighbours go on, and the container ends with a reason or goes on.
//!
//! `docs/attacks.md` lists them. They need KVM; `make test` runs them in the emulated host where there is none.

mod container;
mod harness;
mod hostile_init;
mod others;
mod share;
mod table;

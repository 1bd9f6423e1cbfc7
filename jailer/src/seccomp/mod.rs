//! Filters of system calls: lists as JSON beside this file, compiled once.
//!
//! There are two layers. The outer one is in force while a process sets itself up, and can be inherited from the fork server; it
//! allows what any of the lists does. On top of it each thread installs that of its kind, which is short, because the outer one
//! has decided most already. What a thread may do is what both allow.

mod layout;
mod log;

use std::io;
use std::sync::Arc;

use seccompiler::BpfProgram;
use syscalls::Sysno;

use crate::error::JailError;
use crate::policy::{AllowedCall, Seccomp, SeccompMode};
use crate::sys::{self, SharedWord};
use layout::Rules;

/// Kinds of threads of a VMM process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU, and the devices that its guest talks to.
    Vcpu,
    /// Waits for what comes from the devices' backends.
    Device,
    /// All others: serves the container's streams, starts and ends the machine.
    Control,
}

const KINDS: [ThreadKind; 3] = [ThreadKind::Vcpu, ThreadKind::Device, ThreadKind::Control];

/// What threads of every kind need.
const COMMON: &str = include_str!("common.json");
/// What is needed before the threads are confined.
const SETUP: &str = include_str!("setup.json");
/// What a program may do that `picovm-jailer` starts.
const PROGRAM: &str = include_str!("program.json");

impl ThreadKind {
    fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu",
            Self::Device => "device",
            Self::Control => "control",
        }
    }

    fn list(self) -> &'static str {
        match self {
            Self::Vcpu => include_str!("vcpu.json"),
            Self::Device => include_str!("device.json"),
            Self::Control => include_str!("control.json"),
        }
    }
}

struct All {
    mode: SeccompMode,
    outer: BpfProgram,
    /// By kind, on top of the outer one.
    kinds: [BpfProgram; 3],
    /// By kind, alone: for [`SeccompMode::Log`], where a thread can have only one filter.
    alone: [BpfProgram; 3],
    program: BpfProgram,
    /// Calls that a program is told do not exist: what it does instead can be checked.
    absent: BpfProgram,
}

/// The filters of a policy, ready to be installed. Cheap to clone.
#[derive(Clone)]
pub struct Filters(Arc<All>);

fn wrong(list: &str) -> impl Fn(String) -> JailError {
    move |reason| JailError::List {
        list: list.to_owned(),
        reason,
    }
}

fn parse(name: &str, list: &str) -> Result<Vec<AllowedCall>, JailError> {
    serde_json::from_str(list).map_err(|error| wrong(name)(error.to_string()))
}

/// Adds a list to rules. A call that is allowed without conditions is allowed.
fn add(rules: &mut Rules, name: &str, calls: &[AllowedCall]) -> Result<(), JailError> {
    for call in calls {
        let number: Sysno = call
            .syscall
            .parse()
            .map_err(|()| wrong(name)(format!("there is no system call {}", call.syscall)))?;
        if let Some(condition) = call.args.iter().find(|condition| condition.index > 5) {
            return Err(wrong(name)(format!(
                "{}: a system call has arguments 0 to 5, and no {}",
                call.syscall, condition.index
            )));
        }
        let mut args = call.args.clone();
        for condition in &mut args {
            condition.comment = None;
        }
        let known = rules.contains_key(&i64::from(number.id()));
        let alternatives = rules.entry(number.id().into()).or_default();
        if args.is_empty() {
            alternatives.clear();
        } else if !(known && alternatives.is_empty()) && !alternatives.contains(&args) {
            alternatives.push(args);
        }
    }
    Ok(())
}

impl Filters {
    pub(crate) fn new(policy: &Seccomp) -> Result<Self, JailError> {
        let common = parse("common", COMMON)?;
        let mut outer = Rules::new();
        add(&mut outer, "common", &common)?;
        let mut kinds = Vec::new();
        for kind in KINDS {
            let own = parse(kind.name(), kind.list())?;
            let mut rules = Rules::new();
            add(&mut rules, "common", &common)?;
            add(&mut rules, kind.name(), &own)?;
            add(&mut outer, kind.name(), &own)?;
            kinds.push((kind.name(), rules));
        }
        add(&mut outer, "setup", &parse("setup", SETUP)?)?;

        let mut program = Rules::new();
        match &policy.allow {
            Some(calls) => add(&mut program, "seccomp.allow", calls)?,
            None => add(&mut program, "program", &parse("program", PROGRAM)?)?,
        }
        let compile = |below: Option<&Rules>| -> Result<[BpfProgram; 3], JailError> {
            let all: Result<Vec<BpfProgram>, JailError> = kinds
                .iter()
                .map(|(name, rules)| layout::compile(rules, below).map_err(wrong(name)))
                .collect();
            all?.try_into()
                .map_err(|_| wrong("all")("there are three kinds".into()))
        };
        Ok(Self(Arc::new(All {
            mode: policy.mode,
            kinds: compile(Some(&outer))?,
            alone: compile(None)?,
            outer: layout::compile(&outer, None).map_err(wrong("setup"))?,
            program: layout::compile_plainly(&program).map_err(wrong("program"))?,
            // Its arguments are in memory, where a filter cannot see them; the C library then takes clone.
            absent: layout::absent(libc::SYS_clone3).map_err(wrong("absent"))?,
        })))
    }

    /// What happens at a call that is not in a list.
    #[must_use]
    pub fn mode(&self) -> SeccompMode {
        self.0.mode
    }

    /// Confines the calling thread, and those that it makes, to the calls of its kind. It cannot be undone. A thread that has been
    /// confined cannot make threads: make them first.
    ///
    /// # Errors
    /// What the kernel says; `EBUSY` in [`SeccompMode::Log`] for a thread that has such a filter.
    pub fn apply(&self, kind: ThreadKind) -> io::Result<()> {
        let of = |[vcpu, device, control]: &[BpfProgram; 3]| -> BpfProgram {
            match kind {
                ThreadKind::Vcpu => vcpu,
                ThreadKind::Device => device,
                ThreadKind::Control => control,
            }
            .clone()
        };
        match self.0.mode {
            SeccompMode::Off => Ok(()),
            SeccompMode::Kill => sys::install_filter(&of(&self.0.kinds)),
            SeccompMode::Log => log::install(kind.name(), &handing_over(&of(&self.0.alone))),
        }
    }

    /// Confines the calling process to what any of its threads may need, and to setting itself up: what the others are on top of.
    pub(crate) fn apply_outer(&self) -> io::Result<()> {
        match self.0.mode {
            SeccompMode::Kill => sys::install_filter(&self.0.outer),
            SeccompMode::Off | SeccompMode::Log => Ok(()),
        }
    }

    /// Confines the calling thread to the calls of a program, in [`SeccompMode::Kill`].
    pub(crate) fn apply_to_program(&self) -> io::Result<()> {
        sys::install_filter(&self.0.absent)?;
        sys::install_filter(&self.0.program)
    }

    /// For [`SeccompMode::Log`]: installs the filter of a program for the calling process, whose descriptors the one that runs
    /// [`Filters::tell_of_program`] shares.
    pub(crate) fn hand_over_program(&self, listener: &std::sync::atomic::AtomicI32) -> io::Result<()> {
        sys::install_filter(&self.0.absent)?;
        sys::listen_to_filter(&handing_over(&self.0.program), listener)
    }

    /// Tells, from a thread of the calling process, of the calls that are not in a program's list, until nobody is left who
    /// could make any.
    pub(crate) fn tell_of_program(&self, listener: Arc<SharedWord>) -> io::Result<()> {
        log::supervise_from_thread("program", listener)
    }
}

/// The same filter, which hands over what it would kill for.
fn handing_over(program: &BpfProgram) -> BpfProgram {
    let mut program = program.clone();
    // The first instructions check the processor's architecture: what another means by a number is not known here.
    for instruction in program.iter_mut().skip(layout::ARCHITECTURE_CHECK) {
        if instruction.code == layout::RETURN && instruction.k == libc::SECCOMP_RET_KILL_PROCESS {
            instruction.k = libc::SECCOMP_RET_USER_NOTIF;
        }
    }
    program
}

#[cfg(test)]
mod tests;

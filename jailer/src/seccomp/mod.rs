//! Filters of system calls: one list for each kind of thread, as JSON beside this file, compiled once.

mod log;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::error::JailError;
use crate::policy::{AllowedCall, Seccomp, SeccompMode};
use crate::sys::SharedWord;

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

/// A list: its name and its text.
type List = (&'static str, &'static str);
const VCPU: List = ("vcpu", include_str!("vcpu.json"));
const DEVICE: List = ("device", include_str!("device.json"));
const CONTROL: List = ("control", include_str!("control.json"));
const PROGRAM: List = ("program", include_str!("program.json"));

struct Compiled {
    name: &'static str,
    program: BpfProgram,
}

struct All {
    mode: SeccompMode,
    vcpu: Compiled,
    device: Compiled,
    control: Compiled,
    program: Compiled,
    /// Calls that a program is told do not exist: what it does instead can be checked.
    absent: BpfProgram,
}

/// The filters of a policy, ready to be installed. Cheap to clone.
#[derive(Clone)]
pub struct Filters(Arc<All>);

const X86_64: TargetArch = TargetArch::x86_64;

fn parse(list: List) -> Result<Vec<AllowedCall>, JailError> {
    serde_json::from_str(list.1).map_err(|error| JailError::List {
        list: list.0.to_owned(),
        reason: error.to_string(),
    })
}

fn compile(name: &'static str, calls: &[AllowedCall]) -> Result<Compiled, JailError> {
    let wrong = |reason: String| JailError::List {
        list: name.to_owned(),
        reason,
    };
    // The format of seccompiler, which only wants to know the actions too.
    let filter = serde_json::json!({
        name: { "mismatch_action": "kill_process", "match_action": "allow", "filter": calls }
    });
    let mut compiled = seccompiler::compile_from_json(filter.to_string().as_bytes(), X86_64)
        .map_err(|error| wrong(error.to_string()))?;
    let program = compiled
        .remove(name)
        .ok_or_else(|| wrong("it was not compiled".into()))?;
    Ok(Compiled { name, program })
}

/// Tells that a system call does not exist.
fn absent(number: i64) -> Result<BpfProgram, JailError> {
    let rules = BTreeMap::from([(number, Vec::new())]);
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        X86_64,
    )
    .and_then(BpfProgram::try_from)
    .map_err(|error| JailError::List {
        list: "absent".into(),
        reason: error.to_string(),
    })
}

impl Filters {
    pub(crate) fn new(policy: &Seccomp) -> Result<Self, JailError> {
        let own;
        let program = match &policy.allow {
            Some(calls) => calls,
            None => {
                own = parse(PROGRAM)?;
                &own
            }
        };
        Ok(Self(Arc::new(All {
            mode: policy.mode,
            vcpu: compile(VCPU.0, &parse(VCPU)?)?,
            device: compile(DEVICE.0, &parse(DEVICE)?)?,
            control: compile(CONTROL.0, &parse(CONTROL)?)?,
            program: compile(PROGRAM.0, program)?,
            // Its arguments are in memory, where a filter cannot see them; the C library then takes clone.
            absent: absent(libc::SYS_clone3)?,
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
    /// What the kernel says; `EBUSY` in [`SeccompMode::Log`] for a thread that has a filter.
    pub fn apply(&self, kind: ThreadKind) -> io::Result<()> {
        let compiled = match kind {
            ThreadKind::Vcpu => &self.0.vcpu,
            ThreadKind::Device => &self.0.device,
            ThreadKind::Control => &self.0.control,
        };
        match self.0.mode {
            SeccompMode::Off => Ok(()),
            SeccompMode::Kill => install(&compiled.program),
            SeccompMode::Log => log::install(compiled.name, &handing_over(&compiled.program)),
        }
    }

    /// Confines the calling thread to the calls of a program, in [`SeccompMode::Kill`].
    pub(crate) fn apply_to_program(&self) -> io::Result<()> {
        install(&self.0.absent)?;
        install(&self.0.program.program)
    }

    /// For [`SeccompMode::Log`]: installs the filter of a program for the calling process, whose descriptors the one that runs
    /// [`Filters::tell_of_program`] shares.
    pub(crate) fn hand_over_program(&self, listener: &std::sync::atomic::AtomicI32) -> io::Result<()> {
        install(&self.0.absent)?;
        crate::sys::listen_to_filter(&handing_over(&self.0.program.program), listener)
    }

    /// Tells, from a thread of the calling process, of the calls that are not in a program's list, until nobody is left who
    /// could make any.
    pub(crate) fn tell_of_program(&self, listener: Arc<SharedWord>) -> io::Result<()> {
        log::supervise_from_thread(self.0.program.name, listener)
    }
}

fn install(program: &BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(program).map_err(|error| match error {
        seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
        other => io::Error::other(other.to_string()),
    })
}

/// The same filter, which hands over what it would kill for.
fn handing_over(program: &BpfProgram) -> BpfProgram {
    let mut program = program.clone();
    let return_constant = (libc::BPF_RET | libc::BPF_K) as u16;
    // The first three instructions check the processor's architecture: what another means by a number is not known here.
    for instruction in program.iter_mut().skip(3) {
        if instruction.code == return_constant && instruction.k == libc::SECCOMP_RET_KILL_PROCESS {
            instruction.k = libc::SECCOMP_RET_USER_NOTIF;
        }
    }
    program
}

#[cfg(test)]
mod tests;

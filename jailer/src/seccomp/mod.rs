//! Filters of system calls: lists as JSON beside this file, compiled once.
//!
//! There are two layers. The outer one is in force while a process sets itself up, and can be inherited from the fork server; it
//! allows what any of the lists does. On top of it each thread installs that of its kind, which is short, because the outer one
//! has decided most already. What a thread may do is what both allow.

mod compiled;
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

/// For which work of a VMM process the lists are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Work {
    /// Running a clone.
    #[default]
    Clone,
    /// Making a template: booting or running a machine to its freeze point, and saving it.
    Template,
    /// Serving directories to a guest. Its threads are all [`ThreadKind::Control`].
    Share,
}

#[cfg(test)]
const WORKS: [Work; 3] = [Work::Clone, Work::Template, Work::Share];

/// What threads of every kind need.
const COMMON: &str = include_str!("common.json");
/// What is needed before the threads are confined, of a clone and by the fork server.
const SETUP: &str = include_str!("setup.json");
/// The same of who makes a template, whose process is confined before and has nothing to open.
const MAKER_SETUP: &str = include_str!("maker-setup.json");
/// The same of a share server.
const SHARE_SETUP: &str = include_str!("share-setup.json");
/// What a program may do that `picovm-jailer` starts.
const PROGRAM: &str = include_str!("program.json");

type List = (&'static str, &'static str);

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

    /// Its lists, by their names: what together it may do.
    fn lists(self, work: Work) -> Vec<List> {
        if work == Work::Share {
            return vec![("common", COMMON), ("share", include_str!("share.json"))];
        }
        let mut lists = vec![("common", COMMON), (self.name(), self.list())];
        if work == Work::Template {
            match self {
                Self::Vcpu => lists.push(("maker-vcpu", include_str!("maker-vcpu.json"))),
                Self::Control => lists.push(("maker-control", include_str!("maker-control.json"))),
                Self::Device => {}
            }
        }
        lists
    }
}

impl Work {
    fn setup(self) -> List {
        match self {
            Self::Clone => ("setup", SETUP),
            Self::Template => ("maker-setup", MAKER_SETUP),
            Self::Share => ("share-setup", SHARE_SETUP),
        }
    }

    /// What a kind's threads are called where a call of theirs is told of.
    fn name_of(self, kind: ThreadKind) -> &'static str {
        match (self, kind) {
            (Self::Template, ThreadKind::Vcpu) => "maker-vcpu",
            (Self::Template, ThreadKind::Control) => "maker-control",
            (Self::Share, _) => "share",
            (_, kind) => kind.name(),
        }
    }
}

struct All {
    mode: SeccompMode,
    work: Work,
    outer: BpfProgram,
    /// By kind: on top of the outer one, or alone in [`SeccompMode::Log`], where a thread can have only one filter.
    kinds: [BpfProgram; 3],
    /// Of a program, if the policy has one.
    program: Option<Vec<AllowedCall>>,
}

/// The filter of a program, and that by which it is told that some calls do not exist: what it does instead can be checked.
pub(crate) struct ProgramFilter {
    absent: BpfProgram,
    program: BpfProgram,
    mode: SeccompMode,
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
        let always = rules
            .get(&i64::from(number.id()))
            .is_some_and(|alternatives| alternatives.is_empty());
        let alternatives = rules.entry(number.id().into()).or_default();
        if args.is_empty() {
            alternatives.clear();
        } else if !always && !alternatives.contains(&args) {
            alternatives.push(args);
        }
    }
    Ok(())
}

impl Filters {
    /// What VMM processes need.
    pub(crate) fn new(policy: &Seccomp, work: Work) -> Result<Self, JailError> {
        let (outer, kinds) = match policy.mode {
            // Those that are enforced are compiled ahead: it would be a fourth of what a cold start takes.
            SeccompMode::Kill => compiled::read(work).map_err(wrong("compiled"))?,
            SeccompMode::Log | SeccompMode::Off => Self::compile(policy.mode, work)?,
        };
        Ok(Self(Arc::new(All {
            mode: policy.mode,
            work,
            outer,
            kinds,
            program: policy.allow.clone(),
        })))
    }

    /// Compiles the lists: the outer filter, and those of the kinds.
    fn compile(mode: SeccompMode, work: Work) -> Result<(BpfProgram, [BpfProgram; 3]), JailError> {
        let mut outer = Rules::new();
        let mut kinds = Vec::new();
        for kind in KINDS {
            let mut rules = Rules::new();
            for (name, list) in kind.lists(work) {
                let calls = parse(name, list)?;
                add(&mut rules, name, &calls)?;
                add(&mut outer, name, &calls)?;
            }
            kinds.push((kind.name(), rules));
        }
        let (name, list) = work.setup();
        add(&mut outer, name, &parse(name, list)?)?;

        let below = (mode != SeccompMode::Log).then_some(&outer);
        let compiled: Result<Vec<BpfProgram>, JailError> = kinds
            .iter()
            .map(|(name, rules)| layout::compile(rules, below).map_err(wrong(name)))
            .collect();
        let kinds = compiled?
            .try_into()
            .map_err(|_| wrong("all")("there are three kinds".into()))?;
        Ok((layout::compile(&outer, None).map_err(wrong(name))?, kinds))
    }

    /// The filter of a program.
    ///
    /// # Errors
    /// [`JailError::List`].
    pub(crate) fn of_program(&self) -> Result<ProgramFilter, JailError> {
        let mut program = Rules::new();
        match &self.0.program {
            Some(calls) => add(&mut program, "seccomp.allow", calls)?,
            None => add(&mut program, "program", &parse("program", PROGRAM)?)?,
        }
        Ok(ProgramFilter {
            program: layout::compile_plainly(&program).map_err(wrong("program"))?,
            // Its arguments are in memory, where a filter cannot see them; the C library then takes clone.
            absent: layout::absent(libc::SYS_clone3).map_err(wrong("absent"))?,
            mode: self.0.mode,
        })
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
        let [vcpu, device, control] = &self.0.kinds;
        let program = match kind {
            ThreadKind::Vcpu => vcpu,
            ThreadKind::Device => device,
            ThreadKind::Control => control,
        };
        match self.0.mode {
            SeccompMode::Off => Ok(()),
            SeccompMode::Kill => sys::install_filter(program),
            SeccompMode::Log => log::install(self.0.work.name_of(kind), &handing_over(program)),
        }
    }

    /// Confines the calling process to what any of its threads may need, and to setting itself up: what the others are on top of.
    pub(crate) fn apply_outer(&self) -> io::Result<()> {
        match self.0.mode {
            SeccompMode::Kill => sys::install_filter(&self.0.outer),
            SeccompMode::Off | SeccompMode::Log => Ok(()),
        }
    }
}

impl ProgramFilter {
    /// What happens at a call that is not in the list.
    pub(crate) fn mode(&self) -> SeccompMode {
        self.mode
    }

    /// Confines the calling thread, in [`SeccompMode::Kill`].
    pub(crate) fn apply(&self) -> io::Result<()> {
        sys::install_filter(&self.absent)?;
        sys::install_filter(&self.program)
    }

    /// For [`SeccompMode::Log`]: installs the filter for the calling process, whose descriptors the one that runs
    /// [`ProgramFilter::tell`] shares.
    pub(crate) fn hand_over(&self, listener: &std::sync::atomic::AtomicI32) -> io::Result<()> {
        sys::install_filter(&self.absent)?;
        sys::listen_to_filter(&handing_over(&self.program), listener)
    }

    /// Tells, from a thread of the calling process, of the calls that are not in the list, until nobody is left who could make any.
    pub(crate) fn tell(listener: Arc<SharedWord>) -> io::Result<()> {
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

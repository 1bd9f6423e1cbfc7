//! What a jail allows: read from JSON, described by the schema in `docs/jail-policy.schema.json`.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::JailError;

/// What a confined process may have. What is not mentioned has the value that confines most, but for limits, which are
/// only set if they are given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(title = "Policy of a picovm jail")]
pub struct Policy {
    /// User and group ids. Without root (rootless mode) they are those of the caller, whatever this says.
    pub ids: Ids,
    /// Namespaces of its own.
    pub namespaces: Namespaces,
    /// What its root directory holds; empty if nothing is listed. Needs `namespaces.mount`.
    pub root: Vec<RootEntry>,
    /// Limits of its cgroup; without this it stays in the caller's. Without root it needs a delegated cgroup, and is left out
    /// where there is none.
    pub cgroup: Option<Cgroup>,
    /// Resource limits (getrlimit(2)), soft and hard alike; those that are not given stay as they are.
    pub rlimits: BTreeMap<Resource, u64>,
    /// Its system calls.
    pub seccomp: Seccomp,
    /// Whether it outlives the process that spawned it. If not, it is killed with it.
    pub outlives_parent: bool,
    /// Capabilities that it keeps, for a process of picovm that acts on files of all users: it stays the caller's user then. None
    /// without root, and none for programs.
    #[serde(skip)]
    pub capabilities: Vec<Capability>,
}

/// A capability (capabilities(7)) about owners and modes of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Give files to other users.
    Chown,
    /// Read and write files whatever their mode is.
    DacOverride,
    /// Change modes and times of other users' files.
    Fowner,
    /// Keep set-id bits that an owner's change would clear.
    Fsetid,
    /// Act as another group.
    Setgid,
    /// Act as another user.
    Setuid,
    /// Give files capabilities.
    Setfcap,
}

/// A range of ids: every jail has one to itself for as long as it lives, user and group alike, on the whole host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ids {
    /// The first, 1 or more.
    pub first: u32,
    /// How many there are, 1 to 1,048,576.
    pub count: u32,
}

impl Default for Ids {
    /// Below what systemd gives to containers (524288) and above its dynamic users (65519).
    fn default() -> Self {
        Self {
            first: 200_000,
            count: 65_536,
        }
    }
}

/// Which namespaces a jail has of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[allow(clippy::struct_excessive_bools)]
pub struct Namespaces {
    /// Mounts: an empty, read-only root with what `root` lists.
    pub mount: bool,
    /// Processes: it sees only its own.
    pub pid: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Host name.
    pub uts: bool,
    /// Network: no interface is up.
    pub net: bool,
    /// Users: its ids stand for themselves, all others are nobody. Always there without root.
    pub user: bool,
}

impl Default for Namespaces {
    fn default() -> Self {
        Self {
            mount: true,
            pid: true,
            ipc: true,
            uts: true,
            net: true,
            user: false,
        }
    }
}

/// A file, directory or device node in the root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RootEntry {
    /// Where it is in the jail: an absolute path.
    pub path: PathBuf,
    /// Which of the host's it is; the same path if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<PathBuf>,
    /// What may be done with it. Set-user-id programs have no effect in any.
    #[serde(default)]
    pub access: Access,
}

/// What may be done with an entry of the root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Read it.
    #[default]
    Read,
    /// Read it and execute what is in it.
    Execute,
    /// Read and write it; its permissions still hold.
    Write,
    /// Use it as a device node, or those in it.
    Device,
}

/// Limits of a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Cgroup {
    /// The cgroup below which each jail has one, from the top of the hierarchy; `/picovm-jail` if not given. Without root it is
    /// the caller's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<PathBuf>,
    /// Memory in bytes, swap included: more is not given, and the jail is killed if it insists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Processor time, in thousandths of one CPU: 1500 is one and a half.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u64>,
    /// Share of the CPUs when they are contended, 1 to 10,000; others have 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u64>,
    /// Threads and processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    /// Reads and writes of block devices.
    pub io: Vec<IoLimit>,
}

/// Limits on one block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IoLimit {
    /// `MAJOR:MINOR`, or the path of its node.
    pub device: String,
    /// Bytes read in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bytes: Option<u64>,
    /// Bytes written in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_bytes: Option<u64>,
    /// Reads in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<u64>,
    /// Writes in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writes: Option<u64>,
}

/// A resource of getrlimit(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Address space in bytes.
    AddressSpace,
    /// Size of a core dump in bytes.
    Core,
    /// Processor time in seconds.
    Cpu,
    /// Data segment in bytes.
    Data,
    /// Size of a file in bytes.
    FileSize,
    /// Locked memory in bytes.
    LockedMemory,
    /// POSIX message queues in bytes.
    MessageQueues,
    /// Open files.
    OpenFiles,
    /// Processes and threads of its user.
    Processes,
    /// Signals that wait.
    PendingSignals,
    /// Stack in bytes.
    Stack,
}

/// What happens to its system calls.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Seccomp {
    /// What happens at a call that is not in the list.
    pub mode: SeccompMode,
    /// The list for a program that `picovm-jailer` starts, instead of its own (`jailer/src/seccomp/program.json`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<AllowedCall>>,
}

/// What happens at a system call that is not in the list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SeccompMode {
    /// The process is killed, by SIGSYS.
    #[default]
    Kill,
    /// It is told on standard error, once for each, with its arguments, and let through. For finding out what is missing: it
    /// confines nothing.
    Log,
    /// There is no list.
    Off,
}

/// A call that is allowed if all conditions hold; several of one name are alternatives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AllowedCall {
    /// Its name, such as `openat`.
    pub syscall: String,
    /// Conditions on its arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<ArgumentCondition>,
    /// Why it is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

/// A condition on an argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ArgumentCondition {
    /// Which argument, from 0.
    pub index: u8,
    /// How much of it is compared: its low 32 bits or all 64.
    #[serde(rename = "type")]
    pub width: Width,
    /// How it is compared.
    pub op: Operator,
    /// With what.
    pub val: u64,
    /// What the value means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

/// How much of an argument is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Width {
    /// Its low 32 bits.
    Dword,
    /// All 64 bits.
    Qword,
}

/// How an argument is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Operator {
    /// Equal.
    Eq,
    /// Equal after masking it with these bits.
    MaskedEq(u64),
    /// Greater or equal.
    Ge,
    /// Greater.
    Gt,
    /// Less or equal.
    Le,
    /// Less.
    Lt,
    /// Not equal.
    Ne,
}

impl Policy {
    /// Reads a policy and checks it.
    ///
    /// # Errors
    /// [`JailError::Policy`] says what is wrong, and where.
    pub fn from_json(json: &[u8]) -> Result<Self, JailError> {
        let policy: Self =
            serde_json::from_slice(json).map_err(|error| JailError::Policy(error.to_string()))?;
        policy.check()?;
        Ok(policy)
    }

    /// Whether it can be followed.
    ///
    /// # Errors
    /// [`JailError::Policy`].
    pub fn check(&self) -> Result<(), JailError> {
        let wrong = |reason: String| Err(JailError::Policy(reason));
        let Ids { first, count } = self.ids;
        // The last id is -1, which system calls take for "leave it".
        if first == 0 || !(1..=1 << 20).contains(&count) || first.checked_add(count).is_none() {
            return wrong(format!("ids: {count} from {first} on is no range without root"));
        }
        if !self.namespaces.mount && !self.root.is_empty() {
            return wrong("root lists files, which needs namespaces.mount".into());
        }
        let mut seen: Vec<&Path> = Vec::new();
        if !self.capabilities.is_empty() && self.namespaces.user {
            return wrong("capabilities mean nothing in a user namespace".into());
        }
        for entry in &self.root {
            let path = &entry.path;
            if !is_plain(path) || !entry.source.as_deref().is_none_or(Path::is_absolute) {
                return wrong(format!(
                    "root: {} is no absolute path below / without . and ..",
                    path.display()
                ));
            }
            if let Some(other) = seen
                .iter()
                .find(|other| other.starts_with(path) || path.starts_with(other))
            {
                return wrong(format!(
                    "root: {} and {} are in each other's way",
                    other.display(),
                    path.display()
                ));
            }
            seen.push(path);
        }
        if let Some(cgroup) = &self.cgroup {
            if let Some(parent) = &cgroup.parent
                && !is_plain(parent)
            {
                return wrong(format!(
                    "cgroup.parent: {} is no absolute path below / without . and ..",
                    parent.display()
                ));
            }
            if cgroup.cpu.is_some_and(|cpu| cpu < 10) {
                return wrong("cgroup.cpu: thousandths of a CPU, 10 or more".into());
            }
            if cgroup
                .cpu_weight
                .is_some_and(|weight| !(1..=10_000).contains(&weight))
            {
                return wrong("cgroup.cpu_weight: 1 to 10000".into());
            }
        }
        Ok(())
    }

    /// Its JSON Schema.
    ///
    /// # Panics
    /// Never: a schema is JSON.
    #[must_use]
    pub fn schema() -> String {
        let schema = schemars::schema_for!(Self);
        let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
        text.push('\n');
        text
    }
}

/// Whether a path is absolute, names something below `/`, and leads nowhere else.
fn is_plain(path: &Path) -> bool {
    let mut parts = path.components();
    parts.next() == Some(Component::RootDir)
        && path.components().count() > 1
        && parts.all(|part| matches!(part, Component::Normal(_)))
}

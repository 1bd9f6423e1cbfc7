//! What is known of a container: its configuration, which does not change, and its state, which does.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use chrono::{DateTime, Utc};
use picovm_guest_protocol::{Limits, TerminalSize};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;

use crate::container::ContainerOptions;
use crate::images::Healthcheck;

/// A string of any bytes, in JSON a text or, where it is none, an array of its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text(pub OsString);

impl From<OsString> for Text {
    fn from(text: OsString) -> Self {
        Self(text)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl std::fmt::Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.to_string_lossy().fmt(f)
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => self.0.as_bytes().serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Text(String),
            Bytes(Vec<u8>),
        }
        Ok(Self(match Either::deserialize(deserializer)? {
            Either::Text(text) => text.into(),
            Either::Bytes(bytes) => OsString::from_vec(bytes),
        }))
    }
}

/// When a container that has ended is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// If it has failed; at most so often, or without end if that is 0.
    OnFailure(u32),
    /// Whenever it has ended by itself.
    Always,
    /// The same; here, where no daemon starts containers, no other than [`RestartPolicy::Always`].
    UnlessStopped,
}

/// How a container's output is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOptions {
    /// Whether it is kept at all.
    pub keep: bool,
    /// Size in bytes at which a new file is begun.
    pub max_size: Option<u64>,
    /// How many files are kept, 1 at least.
    pub max_files: u32,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            keep: true,
            max_size: None,
            max_files: 1,
        }
    }
}

/// What is mounted in a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// A directory or file of this machine.
    Bind {
        /// Its absolute path.
        source: Text,
    },
    /// A volume.
    Volume {
        /// Its name.
        name: String,
        /// Whether it was made for this container.
        anonymous: bool,
    },
}

/// A place in a container at which something of this machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPoint {
    /// What it is.
    pub kind: MountKind,
    /// Where: an absolute path.
    pub target: Text,
    /// Whether the container can only read it.
    pub read_only: bool,
    /// Whether an empty volume stays empty, and does not get what the image has there.
    pub no_copy: bool,
}

/// That a container goes on with the application of a warm template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WarmStart {
    /// The template's key.
    pub template: String,
    /// Its name, or the key.
    pub name: String,
    /// Variables for the hooks, as `NAME=value`. The application has those that it was started with.
    pub env: Vec<Text>,
}

/// The configuration of a container, made when it is created.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// 64 hexadecimal digits.
    pub id: String,
    /// When it was created.
    pub created: DateTime<Utc>,
    /// Its image, as it was named.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// What tells the image's root file system from others: see [`Image::digest`](crate::Image::digest).
    pub image_digest: String,
    /// Memory of its machine in MiB.
    pub memory_mib: u64,
    /// Processors of its machine.
    pub vcpus: u8,
    /// Program and arguments.
    pub args: Vec<Text>,
    /// How many of these are the entry point's, for showing them.
    pub entrypoint: usize,
    /// Environment as `NAME=value`.
    pub env: Vec<Text>,
    /// Working directory; `/` if empty.
    pub workdir: Text,
    /// `user[:group]`; root if empty.
    pub user: Text,
    /// Further groups.
    pub groups: Vec<Text>,
    /// Host name; the first 12 digits of the id if there is none.
    pub hostname: Option<String>,
    /// Whether standard input can be connected.
    pub stdin: bool,
    /// Whether its streams are a terminal.
    pub terminal: bool,
    /// Resource limits: number, soft, hard.
    pub rlimits: Vec<(u32, u64, u64)>,
    /// Capabilities that are taken from it, a bit for each.
    pub drop_capabilities: u64,
    /// Whether no program gives it privileges.
    pub no_new_privileges: bool,
    /// Memory limit in bytes.
    pub memory_limit: Option<u64>,
    /// Most processes and threads.
    pub pids_limit: Option<u64>,
    /// Processor time, in microseconds for each 100 ms.
    pub cpu_limit: Option<u64>,
    /// Whether its root file system refuses to be written to.
    pub read_only: bool,
    /// File systems in memory, with their options.
    pub tmpfs: Vec<(Text, Text)>,
    /// Directories and files of this machine, and volumes.
    #[serde(default)]
    pub mounts: Vec<MountPoint>,
    /// Bytes of the disk that its writable layer lies on, if not in memory.
    #[serde(default)]
    pub storage: Option<u64>,
    /// Addresses and names for `/etc/hosts`.
    pub hosts: Vec<(String, String)>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Number of the signal that asks it to end.
    pub stop_signal: u8,
    /// Seconds between that signal and `SIGKILL`.
    pub stop_timeout: u32,
    /// When it is started again.
    pub restart: RestartPolicy,
    /// How its output is kept.
    pub log: LogOptions,
    /// Whether it is removed when it has ended.
    pub auto_remove: bool,
    /// How to find out whether it works.
    pub healthcheck: Option<Healthcheck>,
    /// Whether it shares no page of memory with others.
    pub isolate_memory: bool,
    /// Whether its VMM process runs without a jail, or with its system calls only told.
    pub confinement: crate::Confinement,
    /// Where its guest's console output goes.
    pub console_log: Option<PathBuf>,
    /// The warm template that it is started from, if not from its image's.
    #[serde(default)]
    pub warm: Option<WarmStart>,
}

impl ContainerConfig {
    /// What is told to a clone of a warm template, in which all that it had before holds: whose it is, and what its hooks are given.
    pub(crate) fn warm_options(&self, warm: &WarmStart) -> ContainerOptions {
        let own = [
            format!("PICOVM_CONTAINER_ID={}", self.id),
            format!("PICOVM_TEMPLATE={}", warm.name),
            format!("HOSTNAME={}", self.hostname()),
        ];
        let given = warm.env.iter().map(|variable| variable.0.clone());
        ContainerOptions {
            env: own.into_iter().map(OsString::from).chain(given).collect(),
            workdir: OsString::new(),
            user: OsString::new(),
            groups: Vec::new(),
            terminal: None,
            rlimits: Vec::new(),
            limits: Limits::default(),
            read_only: false,
            tmpfs: Vec::new(),
            ..self.options(None)
        }
    }

    /// What to start, but for streams, layer and what the caller has of its own.
    pub(crate) fn options(&self, terminal: Option<TerminalSize>) -> ContainerOptions {
        let plain = |texts: &[Text]| texts.iter().map(|text| text.0.clone()).collect();
        ContainerOptions {
            id: Some(self.id.clone()),
            args: plain(&self.args),
            env: plain(&self.env),
            workdir: self.workdir.0.clone(),
            user: self.user.0.clone(),
            groups: plain(&self.groups),
            hostname: self.hostname.clone(),
            stdin: self.stdin,
            terminal: self.terminal.then(|| {
                terminal.unwrap_or(TerminalSize {
                    rows: 24,
                    columns: 80,
                })
            }),
            rlimits: self.rlimits.clone(),
            drop_capabilities: self.drop_capabilities,
            no_new_privileges: self.no_new_privileges,
            limits: Limits {
                memory: self.memory_limit,
                pids: self.pids_limit,
                cpu: self.cpu_limit,
            },
            read_only: self.read_only,
            tmpfs: self
                .tmpfs
                .iter()
                .map(|(place, options)| (place.0.clone(), options.0.clone()))
                .collect(),
            shared: Vec::new(),
            storage: None,
            hosts: self.hosts.clone(),
            layer: None,
            stay: !self.auto_remove,
            announce: false,
            isolate_memory: self.isolate_memory,
            console_log: None,
        }
    }

    /// Whether a clone that was parked ahead will do; else it needs what only one that is started cold can have.
    pub(crate) fn takes_parked(&self) -> bool {
        self.confinement == crate::Confinement::Jailed
            && !self.isolate_memory
            && self.console_log.is_none()
            && self.storage.is_none()
    }

    /// Its host name.
    #[must_use]
    pub fn hostname(&self) -> &str {
        match &self.hostname {
            Some(name) => name,
            None => self.short_id(),
        }
    }

    /// The beginning of its id, which is what people see.
    #[must_use]
    pub fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }

    /// What it runs, as one line.
    #[must_use]
    pub fn command_line(&self) -> String {
        let words: Vec<&OsStr> = self.args.iter().map(|text| text.0.as_os_str()).collect();
        words.join(OsStr::new(" ")).to_string_lossy().into_owned()
    }
}

/// MiB of a machine whose container may use so many bytes: a power of two, so that few templates serve all, with room for the
/// guest's kernel.
#[must_use]
pub fn machine_memory(limit: u64) -> u64 {
    /// What the kernel, the agent and page tables take.
    const OVERHEAD: u64 = 32 << 20;
    const SMALLEST: u64 = 64;
    limit
        .saturating_add(OVERHEAD)
        .div_ceil(1 << 20)
        .checked_next_power_of_two()
        .unwrap_or(u64::MAX)
        .max(SMALLEST)
}

/// What a container does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It was never started.
    #[default]
    Created,
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// It has ended and will be started again.
    Restarting,
    /// It has ended.
    Exited,
}

impl Status {
    /// Its name, as Docker has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Exited => "exited",
        }
    }

    /// Whether it has a monitor.
    #[must_use]
    pub fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Restarting)
    }
}

/// Whether a container works, as its health check says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `starting`, `healthy` or `unhealthy`.
    pub status: String,
    /// Checks that have failed in a row.
    pub failing_streak: u32,
    /// The last checks, the oldest first.
    pub log: Vec<HealthResult>,
}

/// What one health check has said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthResult {
    /// When it began.
    pub start: DateTime<Utc>,
    /// When it ended.
    pub end: DateTime<Utc>,
    /// Its exit status; -1 if it took too long.
    pub exit_code: i32,
    /// What it wrote, shortened.
    pub output: String,
}

/// The state of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What it does.
    pub status: Status,
    /// Process id of its monitor while it runs, 0 else.
    pub pid: u32,
    /// When it was last started.
    pub started: Option<DateTime<Utc>>,
    /// When it last ended.
    pub finished: Option<DateTime<Utc>>,
    /// How its process ended last, as a shell has it.
    pub exit_code: u8,
    /// Whether a process of it was killed because memory had run out.
    pub oom_killed: bool,
    /// Why it could not be started, or ended other than by itself; empty if it did not.
    pub error: String,
    /// How often it was started again.
    pub restarts: u32,
    /// Whether it works; none without a health check.
    pub health: Option<Health>,
}

/// A container of the store.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// Its configuration.
    pub config: ContainerConfig,
    /// Its state, as it was when this was read.
    pub state: State,
    /// Its directory in the store.
    pub directory: PathBuf,
}

impl Record {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.config.id
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Its writable layer, as its last run has left it: a tar archive that exists once it has ended.
    #[must_use]
    pub fn layer(&self) -> PathBuf {
        self.file("layer.tar")
    }

    /// The disk that its writable layer lies on, if it has one.
    pub(crate) fn storage(&self) -> PathBuf {
        self.file(super::STORAGE)
    }

    /// Bytes of this machine's disk that its writable layer takes: of one in memory, what its last run has left.
    #[must_use]
    pub fn layer_size(&self) -> u64 {
        match self.config.storage {
            // A file with holes.
            Some(_) => {
                fs::metadata(self.storage()).map_or(0, |metadata| metadata.blocks().saturating_mul(512))
            }
            None => fs::metadata(self.layer()).map_or(0, |metadata| metadata.len()),
        }
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.file("log.json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_room_for_its_kernel_beside_the_containers_memory() {
        for (limit, machine) in [(6, 64), (32, 64), (33, 128), (224, 256), (256, 512), (1000, 2048)] {
            assert_eq!(machine_memory(limit << 20), machine, "{limit} MiB");
        }
        assert_eq!(machine_memory(u64::MAX), 1 << 44);
    }

    #[test]
    fn text_that_is_no_text_survives() {
        let texts = [Text::from("plain"), Text(OsString::from_vec(vec![0xff, 1]))];
        let json = serde_json::to_string(&texts).unwrap();
        assert_eq!(json, r#"["plain",[255,1]]"#);
        assert_eq!(serde_json::from_str::<Vec<Text>>(&json).unwrap(), texts);
    }
}

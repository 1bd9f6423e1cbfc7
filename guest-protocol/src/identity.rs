//! What makes a clone itself.
//!
//! The host encodes an [`Identity`] into the identity area, pages of guest memory that `init` announced before the
//! freeze, so that the clone's first instructions read it without any device access. The area starts with an 8-byte
//! header: [`AREA_MAGIC`] and the length of the body, both little-endian `u32`; the body is the postcard encoding.
//! A zeroed header means that there is no identity: the machine is the parent going on after a freeze.

use serde::{Deserialize, Serialize};

/// First word of an identity area that holds an identity.
pub const AREA_MAGIC: u32 = u32::from_le_bytes(*b"IDNT");
/// Bytes before the encoded identity.
pub const AREA_HEADER: usize = 8;

/// What makes a clone itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Id of the clone, printable ASCII.
    pub id: String,
    /// Host name, 1 to 64 bytes.
    pub hostname: String,
    /// Fresh random bytes from the host, mixed into the kernel's generator before anything else runs.
    pub entropy: [u8; 32],
    /// The host's `CLOCK_REALTIME` at the fork, in nanoseconds since 1970.
    pub realtime_ns: u64,
    /// What to run. `None`: it did not fit here and comes as the first frame of the control connection
    /// ([`crate::Frame::Spec`]).
    pub container: Option<ContainerSpec>,
}

/// A container: its main process, and what holds for all its processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Its main process. Without arguments there is none: the agent serves until the host ends the clone, which is for looking
    /// at the files of a container that does not run.
    pub process: ProcessSpec,
    /// What all its processes together may take.
    pub limits: Limits,
    /// Whether its root file system refuses to be written to.
    pub read_only: bool,
    /// File systems in memory: where, absolute, and the options of `mount(8)` as `size=64m,mode=1777`.
    pub tmpfs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Directories and files of the host, which the machine's file system device has (tag [`SHARE_TAG`](crate::SHARE_TAG)).
    pub mounts: Vec<Mount>,
    /// Lines for its `/etc/hosts`, after its own.
    pub hosts: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether its writable layer comes over the control connection before anything runs: data of standard input of process
    /// [`LAYER`](crate::frame::LAYER), in the format of [`Helper::SaveLayer`].
    pub layer: bool,
    /// Whether its writable layer is on the machine's disk for storage, which has a file system, and not in memory.
    pub storage: bool,
    /// Whether the agent goes on when the main process has ended, for the host to ask for the writable layer. If not, it powers
    /// the machine off after the exit status.
    pub stay: bool,
    /// Whether the agent says when the main process's program runs ([`Frame::Started`](crate::Frame::Started)).
    pub announce: bool,
}

/// A directory or file of the host in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Its name in the root of the shared file system.
    pub name: Vec<u8>,
    /// Where it is in the container: absolute, made if it is not there. Links on the way lead nowhere but within the container.
    pub target: Vec<u8>,
    /// Whether it refuses to be written to.
    pub read_only: bool,
    /// Whether it gets, if it is an empty directory, what the image has at that place.
    pub fill: bool,
}

impl ContainerSpec {
    /// One with this process and everything else by default.
    #[must_use]
    pub fn of(process: ProcessSpec) -> Self {
        Self {
            process,
            ..Self::default()
        }
    }
}

/// A process of a container. Strings are bytes, as `execve(2)` has them; none contains a zero byte.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Arguments; the first is the program, looked up in the container's `PATH` when it has no slash.
    pub args: Vec<Vec<u8>>,
    /// Environment as `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// Working directory, absolute; created if it does not exist. Empty: `/`.
    pub cwd: Vec<u8>,
    /// `user[:group]`, each a name from the container's own `/etc/passwd` and `/etc/group` or a number.
    /// Empty: root.
    pub user: Vec<u8>,
    /// Further groups by name or number.
    pub groups: Vec<Vec<u8>>,
    /// Whether standard input is connected. If not, it is `/dev/null`; with a terminal, it is the terminal, and nothing comes.
    pub stdin: bool,
    /// A terminal of this size for all three streams; its output is the process's standard output.
    pub terminal: Option<TerminalSize>,
    /// Resource limits (`setrlimit(2)`): number of the resource, soft, hard; `u64::MAX` is none.
    pub rlimits: Vec<(u32, u64, u64)>,
    /// Capabilities that it and its descendants cannot have, a bit for each (`capabilities(7)`), beside those that no container
    /// has.
    pub drop_capabilities: u64,
    /// Whether `execve` gives no privileges (`PR_SET_NO_NEW_PRIVS`).
    pub no_new_privileges: bool,
}

/// What the processes of a container may take together; `None` is all that the machine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory in bytes (`memory.max` of cgroup v2).
    pub memory: Option<u64>,
    /// Number of processes and threads (`pids.max`).
    pub pids: Option<u64>,
    /// Processor time in microseconds for each [`Limits::CPU_PERIOD`] (`cpu.max`).
    pub cpu: Option<u64>,
}

impl Limits {
    /// Microseconds in which [`Limits::cpu`] may be spent.
    pub const CPU_PERIOD: u64 = 100_000;
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Something that the agent does in the container, as a process of its own with streams and an exit status: 0, or 1 with a
/// sentence on standard error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Helper {
    /// Standard output is a tar archive (PAX where it must be) of a file, or of a directory with all that is in it, under its
    /// last name. With `follow`, a link at the end of the path is followed.
    Pack {
        /// Absolute path in the container.
        path: Vec<u8>,
        /// Whether a symbolic link at the end of the path is followed.
        follow: bool,
    },
    /// Standard input is a tar archive, which is unpacked in a directory that exists.
    Unpack {
        /// Absolute path in the container.
        path: Vec<u8>,
        /// Whether files get the owners that the archive names, or root.
        keep_owners: bool,
    },
    /// Standard output is what `stat(2)` says of a path, a [`PathStatus`] in postcard.
    Stat {
        /// Absolute path in the container.
        path: Vec<u8>,
    },
    /// Standard output is the list of what the container has changed of its image's files, a `Vec<`[`Change`]`>` in postcard.
    Changes,
    /// Standard output is the writable layer, a tar archive with whiteouts as the OCI image specification has them
    /// (`.wh.NAME`, `.wh..wh..opq`).
    SaveLayer,
    /// Ends when all that is in the writable layer is on its disk, if it is on one.
    Sync,
    /// Standard output is the list of processes, a `Vec<`[`Task`]`>` in postcard.
    Tasks,
    /// Standard output is a [`Usage`] in postcard.
    Usage,
    /// Ends with 0 if somebody in the guest listens for TCP connections on this port, else with 1.
    Listens(u16),
}

/// What `stat(2)` says of a path in the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// Its last name.
    pub name: Vec<u8>,
    /// Type and permissions (`st_mode`).
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Change of content, in seconds since 1970.
    pub modified: i64,
    /// Where a symbolic link leads; empty for anything else.
    pub target: Vec<u8>,
}

/// How a file differs from the image's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChangeKind {
    /// The content or what belongs to it; of a directory, that something in it has changed.
    Modified,
    /// It is not in the image.
    Added,
    /// It is gone.
    Deleted,
}

/// One file that differs from the image's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// How.
    pub kind: ChangeKind,
    /// Absolute path.
    pub path: Vec<u8>,
}

/// A process of the container, as `/proc` has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its id in the guest.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Name of its user, or the number.
    pub user: Vec<u8>,
    /// One letter (`proc(5)`).
    pub state: u8,
    /// Number of threads.
    pub threads: u32,
    /// Memory in bytes that is present.
    pub resident: u64,
    /// Terminal, as `pts/0`; empty for none.
    pub terminal: Vec<u8>,
    /// When it started, in seconds since 1970.
    pub started: u64,
    /// Processor time in milliseconds.
    pub cpu_ms: u64,
    /// Its command line, or its name in brackets.
    pub command: Vec<u8>,
}

/// What a container takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time of all its processes, in nanoseconds.
    pub cpu_ns: u64,
    /// Time since the machine has started, in nanoseconds: what [`Usage::cpu_ns`] is compared with.
    pub uptime_ns: u64,
    /// Processors of the machine.
    pub cpus: u32,
    /// Memory in bytes, without the page cache that could be given up.
    pub memory: u64,
    /// Its limit, or the machine's memory.
    pub memory_limit: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes read from disks.
    pub read: u64,
    /// Bytes written to disks.
    pub written: u64,
    /// Bytes received from networks.
    pub received: u64,
    /// Bytes sent to networks.
    pub sent: u64,
    /// How often a process was killed because memory had run out.
    pub oom_kills: u64,
}

/// Why an identity could not be encoded or decoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdentityError {
    /// The area has no header or a zeroed one.
    #[error("the identity area holds no identity")]
    Absent,
    /// Header or body is not what the host writes.
    #[error("the identity area is damaged: {0}")]
    Damaged(&'static str),
    /// It does not fit.
    #[error("the identity takes {needed} bytes and the identity area has {available}")]
    TooLarge {
        /// Bytes needed, header included.
        needed: usize,
        /// Bytes available.
        available: usize,
    },
}

impl Identity {
    /// Encodes the identity with its header, ready to be copied into an area of `area_size` bytes.
    ///
    /// # Errors
    /// [`IdentityError::TooLarge`] if it does not fit; leave out the container then.
    pub fn encode(&self, area_size: usize) -> Result<Vec<u8>, IdentityError> {
        let body = postcard::to_stdvec(self).map_err(|_| IdentityError::Damaged("it cannot be encoded"))?;
        let needed = body.len().saturating_add(AREA_HEADER);
        if needed > area_size {
            return Err(IdentityError::TooLarge {
                needed,
                available: area_size,
            });
        }
        let length =
            u32::try_from(body.len()).map_err(|_| IdentityError::Damaged("it is longer than 4 GiB"))?;
        Ok([&AREA_MAGIC.to_le_bytes()[..], &length.to_le_bytes(), &body].concat())
    }

    /// Decodes an identity area.
    ///
    /// # Errors
    /// [`IdentityError::Absent`] for a zeroed header, [`IdentityError::Damaged`] for anything that the host did not
    /// write.
    pub fn decode(area: &[u8]) -> Result<Self, IdentityError> {
        let (magic, rest) = area.split_first_chunk::<4>().ok_or(IdentityError::Absent)?;
        let (length, body) = rest.split_first_chunk::<4>().ok_or(IdentityError::Absent)?;
        let length = u32::from_le_bytes(*length) as usize;
        match u32::from_le_bytes(*magic) {
            0 => return Err(IdentityError::Absent),
            AREA_MAGIC => {}
            _ => return Err(IdentityError::Damaged("wrong first word")),
        }
        let body = body
            .get(..length)
            .ok_or(IdentityError::Damaged("it is longer than its area"))?;
        let (identity, rest) =
            postcard::take_from_bytes(body).map_err(|_| IdentityError::Damaged("bad encoding"))?;
        if !rest.is_empty() {
            return Err(IdentityError::Damaged("bytes are left over"));
        }
        Ok(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Identity {
        Identity {
            id: "c1".into(),
            hostname: "box".into(),
            entropy: [7; 32],
            realtime_ns: 1_790_000_000_000_000_000,
            container: Some(ContainerSpec::of(ProcessSpec {
                args: vec![b"echo".to_vec(), vec![0xff, 0xfe]],
                env: vec![b"PATH=/bin".to_vec()],
                ..ProcessSpec::default()
            })),
        }
    }

    #[test]
    fn an_identity_survives_the_area() {
        let mut area = sample().encode(4096).unwrap();
        area.resize(4096, 0xaa);
        assert_eq!(Identity::decode(&area).unwrap(), sample());
    }

    #[test]
    fn a_zeroed_area_holds_no_identity() {
        assert_eq!(Identity::decode(&[0; 4096]), Err(IdentityError::Absent));
        assert_eq!(Identity::decode(&[]), Err(IdentityError::Absent));
    }

    #[test]
    fn a_large_container_does_not_fit_and_says_so() {
        let mut identity = sample();
        identity.container.as_mut().unwrap().process.env = vec![vec![b'x'; 5000]];
        assert!(matches!(
            identity.encode(4096),
            Err(IdentityError::TooLarge { needed, available: 4096 }) if needed > 5000
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_an_error_or_an_identity(mut area in prop::collection::vec(any::<u8>(), 0..600), header in any::<bool>()) {
            if header && area.len() >= 8 {
                area[..4].copy_from_slice(&AREA_MAGIC.to_le_bytes());
                let length = (area.len() - 8) as u32;
                area[4..8].copy_from_slice(&length.to_le_bytes());
            }
            if let Ok(identity) = Identity::decode(&area) {
                prop_assert_eq!(&identity.encode(usize::MAX).unwrap()[..8], &area[..8]);
            }
        }
    }
}

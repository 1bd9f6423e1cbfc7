//! The command line of containers, as Docker users type it. `picovm container X` and `picovm X` are the same.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::{ArgAction, Args, Subcommand, ValueEnum};
use picovm_engine::containers::RestartPolicy;

use super::terminal::DetachKeys;
use super::values;
use crate::arguments::SeccompMode;
use crate::pull_arguments::parse_bytes;

/// What `picovm container` has beside the commands that do without that word.
#[derive(Subcommand)]
pub enum ContainerGroup {
    #[command(flatten)]
    Same(ContainerCommand),
    /// List containers
    #[command(visible_aliases = ["list", "ps"])]
    Ls(PsOptions),
    /// Show containers as JSON
    Inspect(InspectOptions),
    /// Remove all containers that do not run
    Prune(PruneOptions),
}

/// Commands that are the same with and without the word `container`.
#[derive(Subcommand)]
pub enum ContainerCommand {
    /// Run a command in a new container
    Run(Box<RunOptions>),
    /// Make a container, and do not start it
    Create(Box<CreateArguments>),
    /// Start containers that do not run
    Start(StartOptions),
    /// Ask containers to end, and kill those that do not
    Stop(StopOptions),
    /// Kill containers, or send them a signal
    Kill(KillOptions),
    /// Stop containers and start them again
    Restart(StopOptions),
    /// Let containers stand still
    #[command(after_help = "Examples:
  picovm pause web
  picovm pause $(picovm ps -q)")]
    Pause(Names),
    /// Let containers that stand still go on
    #[command(after_help = "Examples:
  picovm unpause web")]
    Unpause(Names),
    /// Wait until containers have ended, and print their exit statuses
    #[command(after_help = "Examples:
  picovm wait web
  status=$(picovm wait web)")]
    Wait(Names),
    /// Remove containers
    #[command(visible_alias = "remove")]
    Rm(RemoveOptions),
    /// Show what a container has written
    Logs(LogsOptions),
    /// Run a command in a container that runs
    Exec(ExecOptions),
    /// Connect with the streams of a container that runs
    Attach(AttachOptions),
    /// List the processes of a container
    Top(TopOptions),
    /// Show what containers take, again and again
    Stats(StatsOptions),
    /// Copy files between a container and this machine
    #[command(visible_alias = "copy")]
    Cp(CopyOptions),
    /// Give a container another name
    Rename(RenameOptions),
    /// Make an image of what a container has changed
    Commit(CommitOptions),
    /// List what a container has changed of its image's files
    Diff(DiffOptions),
}

#[derive(Args)]
#[command(
    disable_help_flag = true,
    after_help = "Examples:
  picovm create --name web -e LANG=C debian sleep 1000
  picovm start web

The id is printed. All options are those of `picovm run`."
)]
pub struct CreateArguments {
    #[command(flatten)]
    pub create: CreateOptions,
}

/// What is made of an image, and what of it runs.
#[derive(Args)]
pub struct CreateOptions {
    /// Name of the container; one is made up if there is none
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Keep standard input open, and connect it
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Connect only these streams: stdin, stdout, stderr
    #[arg(short, long, value_name = "STREAM", ignore_case = true)]
    pub attach: Vec<StreamName>,
    /// Remove the container when it has ended
    #[arg(long)]
    pub rm: bool,
    /// Print help; -h is the host name, as in Docker
    #[arg(long, action = ArgAction::Help)]
    pub help: Option<bool>,
    #[command(flatten)]
    pub process: ProcessOptions,
    #[command(flatten)]
    pub limits: LimitOptions,
    #[command(flatten)]
    pub files: FileOptions,
    #[command(flatten)]
    pub behaviour: BehaviourOptions,
    #[command(flatten)]
    pub health: HealthOptions,
    #[command(flatten)]
    pub machine: MachineOptions,
    #[command(flatten)]
    pub absent: AbsentOptions,
    /// Go on with the application of this warm template, by its name or id; neither an image nor a command is given then. -e is
    /// for the hooks of the container, which make this clone different from others
    #[arg(long, value_name = "TEMPLATE")]
    pub from_template: Option<String>,
    /// The image's name or id
    #[arg(
        required_unless_present = "from_template",
        default_value = "",
        hide_default_value = true
    )]
    pub image: String,
    /// The command and its arguments; by default the image's. To an image with an entry point, they are arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

/// What a process of a container is given.
#[derive(Args, Clone)]
#[command(next_help_heading = "Process")]
pub struct ProcessOptions {
    /// Set an environment variable; without =VALUE it is taken from this environment
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<OsString>,
    /// Set the environment variables of the lines of a file
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Working directory in the container, made if it does not exist; by default the image's, or /
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<OsString>,
    /// Run as this user, by name or number of the container; by default the image's, or root
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<OsString>,
    /// Be in this group too
    #[arg(long, value_name = "GROUP")]
    pub group_add: Vec<OsString>,
    /// Run this program instead of the image's entry point and command; empty for none
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// Limit a resource of each process, as nofile=1024:4096
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = values::ulimit)]
    pub ulimit: Vec<(u32, u64, u64)>,
    /// Leave the container this capability, over --cap-drop
    #[arg(long, value_name = "NAME", value_parser = values::capability)]
    pub cap_add: Vec<u64>,
    /// Take a capability, or ALL, from the container
    #[arg(long, value_name = "NAME", value_parser = values::capability)]
    pub cap_drop: Vec<u64>,
    /// no-new-privileges: no program gives its user privileges
    #[arg(long, value_name = "OPTION")]
    pub security_opt: Vec<String>,
    /// Accepted: a container has its own kernel, and all the rights in it that --cap-add could give
    #[arg(long)]
    pub privileged: bool,
    /// Accepted: there always is an init process that reaps the others
    #[arg(long)]
    pub init: bool,
}

/// What a container may take.
#[derive(Args, Clone)]
#[command(next_help_heading = "Limits")]
pub struct LimitOptions {
    /// Memory of the container, as 512m or 2g, 6 MiB at least; without it, a machine of 256 MiB. Taken from the host as it is used
    #[arg(short, long, value_name = "SIZE", value_parser = parse_limit)]
    pub memory: Option<u64>,
    /// Accepted: there is no swap
    #[arg(long, value_name = "SIZE")]
    pub memory_swap: Option<String>,
    /// Accepted: memory is taken as it is used
    #[arg(long, value_name = "SIZE", hide = true)]
    pub memory_reservation: Option<String>,
    /// Processors, up to 8, or a part of them as 0.5
    #[arg(long, value_name = "NUMBER", value_parser = parse_cpus)]
    pub cpus: Option<Cpus>,
    /// Most processes and threads; -1 for no limit
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub pids_limit: Option<i64>,
}

/// What is there beside the image's files.
#[derive(Args, Default)]
#[command(next_help_heading = "Files and names")]
pub struct FileOptions {
    /// A file system in memory, as /run:size=64m,mode=1777
    #[arg(long, value_name = "DIR[:OPTIONS]")]
    pub tmpfs: Vec<OsString>,
    /// Share a directory or file of this machine, or a volume by its name; without a source, a new volume
    #[arg(short = 'v', long, value_name = "[SOURCE:]DIR[:ro]")]
    pub volume: Vec<OsString>,
    /// The same in full: type=bind|volume|tmpfs,source=SOURCE,destination=DIR[,readonly][,volume-nocopy][,tmpfs-size=SIZE]
    /// [,tmpfs-mode=MODE]
    #[arg(long, value_name = "OPTIONS")]
    pub mount: Vec<String>,
    /// Let what the container writes lie on this machine's disk, this much at most, as 10g, and not in its memory
    #[arg(long, value_name = "SIZE", value_parser = values::storage)]
    pub storage: Option<u64>,
    /// The same as Docker has it: size=SIZE
    #[arg(long, value_name = "size=SIZE", value_parser = values::storage_option, conflicts_with = "storage")]
    pub storage_opt: Option<u64>,
    /// Let the root file system refuse to be written to
    #[arg(long)]
    pub read_only: bool,
    /// Host name; by default the container's id
    #[arg(short = 'h', long, value_name = "NAME", value_parser = crate::arguments::parse_hostname)]
    pub hostname: Option<String>,
    /// A line for /etc/hosts
    #[arg(long, value_name = "NAME:ADDRESS", value_parser = parse_host)]
    pub add_host: Vec<(String, String)>,
    /// Network: `none`, which is what there is, or `default`
    #[arg(long, alias = "net", value_name = "NAME")]
    pub network: Vec<String>,
}

/// What becomes of a container.
#[derive(Args, Default)]
#[command(next_help_heading = "Behaviour")]
pub struct BehaviourOptions {
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
    /// Set the labels of the lines of a file
    #[arg(long, value_name = "FILE")]
    pub label_file: Vec<PathBuf>,
    /// When to start the container again: no, on-failure[:N], always, unless-stopped
    #[arg(long, value_name = "POLICY", value_parser = parse_restart)]
    pub restart: Option<RestartPolicy>,
    /// The signal that asks the container to end; by default the image's, or TERM
    #[arg(long, value_name = "SIGNAL", value_parser = values::signal)]
    pub stop_signal: Option<u8>,
    /// Seconds between that signal and SIGKILL; 10 by default
    #[arg(long, value_name = "SECONDS")]
    pub stop_timeout: Option<u32>,
    /// How output is kept for `picovm logs`: json-file, local (which is the same), or none
    #[arg(long, value_name = "DRIVER", default_value = "json-file")]
    pub log_driver: LogDriver,
    /// max-size=SIZE, max-file=NUMBER: begin another file, and how many there are at most
    #[arg(long, value_name = "OPTION")]
    pub log_opt: Vec<String>,
    /// Write the container's id to this file, which must not exist
    #[arg(long, value_name = "FILE")]
    pub cidfile: Option<PathBuf>,
    /// Whether to pull the image first: always, if it is missing, or never
    #[arg(long, value_name = "WHEN", default_value = "missing")]
    pub pull: Pull,
    /// Accepted if it is linux/amd64, which is what the machines are
    #[arg(long, value_name = "OS/ARCH")]
    pub platform: Option<String>,
}

/// How to find out whether a container works.
#[derive(Args, Default)]
#[command(next_help_heading = "Health")]
pub struct HealthOptions {
    /// A line for the container's shell that says by its exit status whether the container works
    #[arg(long, value_name = "COMMAND")]
    pub health_cmd: Option<String>,
    /// Time between two checks; 30s by default
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub health_interval: Option<Duration>,
    /// Time after which a check has failed; 30s by default
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub health_timeout: Option<Duration>,
    /// Failures in a row after which the container does not work; 3 by default
    #[arg(long, value_name = "NUMBER")]
    pub health_retries: Option<u32>,
    /// Time after the start in which failures do not count
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub health_start_period: Option<Duration>,
    /// Time between two checks in that time
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub health_start_interval: Option<Duration>,
    /// Do without the image's check
    #[arg(long)]
    pub no_healthcheck: bool,
}

/// What is asked of the machine that a container is.
#[derive(Args, Default)]
#[command(next_help_heading = "Machine")]
pub struct MachineOptions {
    /// Write the guest's console output to this file
    #[arg(long, value_name = "FILE")]
    pub console_log: Option<PathBuf>,
    /// Share no page of memory with other containers, for those who mind what can be told from the time that an access takes;
    /// starts later and takes more memory
    #[arg(long)]
    pub isolate_memory: bool,
    /// For debugging: run the VMM process unconfined, so that a guest that breaks out of its VM can do what you can
    #[arg(long)]
    pub no_jail: bool,
    /// What happens when the VMM makes a system call that its jail does not allow
    #[arg(
        long,
        value_name = "MODE",
        value_enum,
        default_value = "kill",
        conflicts_with = "no_jail"
    )]
    pub seccomp: SeccompMode,
}

/// What Docker has and picovm has not: read, so that the reason can be said.
#[derive(Args, Default)]
#[command(next_help_heading = "Not there yet")]
pub struct AbsentOptions {
    /// Refused: there is no network yet
    #[arg(short, long, value_name = "PORTS")]
    pub publish: Vec<String>,
    /// Refused: a machine has no devices but its own
    #[arg(long, value_name = "DEVICE")]
    pub device: Vec<String>,
    #[arg(short = 'P', long, hide = true)]
    pub publish_all: bool,
    #[arg(long, hide = true, value_name = "NAME")]
    pub volumes_from: Vec<String>,
    #[arg(long, hide = true, value_name = "NAME")]
    pub gpus: Option<String>,
    #[arg(long, hide = true, value_name = "NAME")]
    pub pid: Option<String>,
    #[arg(long, hide = true, value_name = "NAME")]
    pub ipc: Option<String>,
    #[arg(long, hide = true, value_name = "NAME")]
    pub uts: Option<String>,
    #[arg(long, hide = true, value_name = "NAME")]
    pub userns: Option<String>,
    #[arg(long, hide = true, value_name = "NAME")]
    pub cgroupns: Option<String>,
    #[arg(long, hide = true, value_name = "NAME")]
    pub runtime: Option<String>,
    #[arg(long, hide = true, value_name = "ADDRESS")]
    pub dns: Vec<String>,
    #[arg(long, hide = true, value_name = "NAME")]
    pub link: Vec<String>,
    #[arg(long, hide = true, value_name = "ADDRESS")]
    pub ip: Option<String>,
    #[arg(long, hide = true, value_name = "ADDRESS")]
    pub mac_address: Option<String>,
    #[arg(long, hide = true, value_name = "NAME=VALUE")]
    pub sysctl: Vec<String>,
    #[arg(long, hide = true, value_name = "CPUS")]
    pub cpuset_cpus: Option<String>,
    #[arg(long, hide = true, value_name = "SIZE")]
    pub shm_size: Option<String>,
}

#[derive(Args)]
#[command(
    disable_help_flag = true,
    after_help = "Examples:
  picovm run --rm debian echo hello
  picovm run -it --rm debian bash
  picovm run --rm -v \"$PWD\":/src:ro -v cache:/var/cache debian ls /src
  picovm run --rm --storage 20g debian dd if=/dev/zero of=/big bs=1M count=4096
  picovm run -d --name web -m 512m --restart on-failure:3 app:1
  echo hello | picovm run -i --rm debian tr a-z A-Z
  picovm run -d --from-template app

The exit status is that of the command; 128 + N if signal N ended it; 127 if it does not exist; 126 if it cannot be executed; \
125 if picovm itself failed; 124 if --timeout ended it. Ctrl-C is passed on; a third one kills the container."
)]
pub struct RunOptions {
    /// Let the container run in the background, and print its id
    #[arg(short, long, conflicts_with_all = ["attach", "timeout"])]
    pub detach: bool,
    /// Kill the container after this time, as 30, 500ms, 5m or 1h
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub timeout: Option<Duration>,
    #[command(flatten)]
    pub session: SessionOptions,
    #[command(flatten)]
    pub create: CreateOptions,
}

/// How this terminal is connected.
#[derive(Args, Clone)]
pub struct SessionOptions {
    /// Keys that leave the container alone
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = DetachKeys::parse)]
    pub detach_keys: DetachKeys,
    /// Pass signals on to the container
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub sig_proxy: bool,
}

/// A stream of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StreamName {
    Stdin,
    Stdout,
    Stderr,
}

/// A time as `500ms` or `1m30s`.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    values::duration(text)
}

/// How output is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogDriver {
    #[default]
    JsonFile,
    Local,
    None,
}

/// When an image is fetched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    Always,
    #[default]
    Missing,
    Never,
}

/// Processors of a machine, and which part of them its container may use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cpus {
    pub vcpus: u8,
    /// In microseconds for each 100 ms; none if all of them.
    pub limit: Option<u64>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm start web
  picovm start -ai worker

With -a, the exit status is that of the container.")]
pub struct StartOptions {
    /// Names or ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub containers: Vec<String>,
    /// Show its output, and pass signals on
    #[arg(short, long)]
    pub attach: bool,
    /// Connect standard input
    #[arg(short, long)]
    pub interactive: bool,
    #[command(flatten)]
    pub session: SessionOptions,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm stop web
  picovm stop -t 2 -s INT web db
  picovm restart web")]
pub struct StopOptions {
    /// Names or ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub containers: Vec<String>,
    /// Seconds after which it is killed; by default those of the container
    #[arg(
        short = 't',
        long = "timeout",
        alias = "time",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    pub timeout: Option<i64>,
    /// The signal that asks it to end; by default that of the container
    #[arg(short, long, value_name = "SIGNAL", value_parser = values::signal)]
    pub signal: Option<u8>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm kill web
  picovm kill -s HUP web")]
pub struct KillOptions {
    /// Names or ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub containers: Vec<String>,
    /// The signal
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL", value_parser = values::signal)]
    pub signal: u8,
}

#[derive(Args)]
pub struct Names {
    /// Names or ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub containers: Vec<String>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm rm web
  picovm rm -f $(picovm ps -aq)")]
pub struct RemoveOptions {
    /// Names or ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub containers: Vec<String>,
    /// Kill those that run, and do not mind those that are not there
    #[arg(short, long)]
    pub force: bool,
    /// Remove the volumes without a name that were made for them too
    #[arg(short, long)]
    pub volumes: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm ps -a
  picovm ps -q --filter label=team=web --filter status=running
  picovm ps --format '{{.Names}}: {{.Status}}'

Filters: id, name, label, status, exited, ancestor, health, before, since. Fields of --format: .ID .Image .Command .CreatedAt \
.RunningFor .State .Status .Health .Ports .Names .Labels .LocalVolumes .Mounts .Networks .Size, and .Label \"KEY\".")]
pub struct PsOptions {
    /// Those that do not run too
    #[arg(short, long)]
    pub all: bool,
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
    /// Only the one that was created last
    #[arg(short, long)]
    pub latest: bool,
    /// Only so many that were created last
    #[arg(short = 'n', long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub last: Option<i64>,
    /// Do not shorten ids and commands
    #[arg(long)]
    pub no_trunc: bool,
    /// Show how large the writable layers are
    #[arg(short, long)]
    pub size: bool,
    /// Only some
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// `table`, `json`, or a template of Go
    #[arg(long, value_name = "FORMAT", conflicts_with = "json")]
    pub format: Option<String>,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm logs web
  picovm logs -f --tail 20 --since 10m web
  picovm logs -t --until 2026-01-31T12:00:00Z web")]
pub struct LogsOptions {
    /// Name or id
    pub container: String,
    /// Go on with new lines until the container has ended
    #[arg(short, long)]
    pub follow: bool,
    /// Show when each line was written
    #[arg(short, long)]
    pub timestamps: bool,
    /// Only lines from then on: an age as 10m, or a time
    #[arg(long, value_name = "TIME", value_parser = values::moment)]
    pub since: Option<DateTime<Utc>>,
    /// Only lines until then
    #[arg(long, value_name = "TIME", value_parser = values::moment)]
    pub until: Option<DateTime<Utc>>,
    /// Only so many of the last lines, or `all`
    #[arg(short = 'n', long, value_name = "NUMBER", default_value = "all", value_parser = parse_tail, allow_hyphen_values = true)]
    pub tail: Tail,
    /// Accepted: there are no details
    #[arg(long)]
    pub details: bool,
}

/// How many lines; none for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail(pub Option<u64>);

#[derive(Args)]
#[command(after_help = "Examples:
  picovm exec web ps
  picovm exec -it web sh
  picovm exec -u nobody -w /tmp -e A=1 web env

The exit status is that of the command; 127 if it does not exist; 126 if it cannot be executed; 1 if the container does not run.")]
pub struct ExecOptions {
    /// Let it run in the background
    #[arg(short, long)]
    pub detach: bool,
    /// Connect standard input
    #[arg(short, long)]
    pub interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Set an environment variable; without =VALUE it is taken from this environment
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<OsString>,
    /// Set the environment variables of the lines of a file
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Working directory; by default the container's
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<OsString>,
    /// Run as this user; by default the container's
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<OsString>,
    /// Give it the capabilities that were taken from the container
    #[arg(long)]
    pub privileged: bool,
    /// Keys that leave the process alone
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = DetachKeys::parse)]
    pub detach_keys: DetachKeys,
    /// Name or id
    pub container: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm attach web

Ctrl-P Ctrl-Q leaves a container that has a terminal. Of others, Ctrl-C is passed on: with --sig-proxy=false it only ends this \
command. The exit status is that of the container.")]
pub struct AttachOptions {
    /// Name or id
    pub container: String,
    /// Do not connect standard input
    #[arg(long)]
    pub no_stdin: bool,
    #[command(flatten)]
    pub session: SessionOptions,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm inspect web
  picovm inspect --format '{{.State.Status}}' web
  picovm inspect --type image debian")]
pub struct InspectOptions {
    /// Names or ids, of containers or else of images
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// `json`, or a template of Go
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Only what is of this type
    #[arg(long, value_name = "TYPE")]
    pub r#type: Option<ObjectType>,
    /// Say how large the writable layer is
    #[arg(short, long)]
    pub size: bool,
}

/// What there is to inspect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ObjectType {
    Container,
    Image,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm top web")]
pub struct TopOptions {
    /// Name or id
    pub container: String,
    /// Options of ps: -o COLUMN,... of user, pid, ppid, c, stat, stime, tty, time, rss, nlwp, comm, cmd; others are passed over
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    pub ps: Vec<String>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm stats
  picovm stats --no-stream --format '{{.Name}} {{.MemUsage}}' web

Fields of --format: .Container .Name .ID .CPUPerc .MemUsage .MemPerc .NetIO .BlockIO .PIDs")]
pub struct StatsOptions {
    /// Names or ids; by default all that run
    #[arg(value_name = "CONTAINER")]
    pub containers: Vec<String>,
    /// Those that do not run too
    #[arg(short, long)]
    pub all: bool,
    /// Look once
    #[arg(long)]
    pub no_stream: bool,
    /// Do not shorten ids
    #[arg(long)]
    pub no_trunc: bool,
    /// `table`, `json`, or a template of Go
    #[arg(long, value_name = "FORMAT", conflicts_with = "json")]
    pub format: Option<String>,
    /// Print JSON, once
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm cp notes.txt web:/tmp
  picovm cp web:/var/log/. logs
  picovm cp web:/etc - | tar t

As with `docker cp`: a directory that exists is copied into, any other name is what the copy is called; a source that ends with /. \
is what is in it. `-` is a tar archive on standard input or output. The container need not run.")]
pub struct CopyOptions {
    /// PATH, CONTAINER:PATH or -
    pub source: OsString,
    /// PATH, CONTAINER:PATH or -
    pub destination: OsString,
    /// Keep the numbers of users and groups
    #[arg(short, long)]
    pub archive: bool,
    /// Copy what a link as the source leads to
    #[arg(short = 'L', long)]
    pub follow_link: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm rename web old-web")]
pub struct RenameOptions {
    /// Name or id
    pub container: String,
    /// The other name
    pub name: String,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm commit web team/web:2
  picovm commit -m 'with tools' -c 'CMD [\"sleep\", \"1\"]' -c 'ENV A=1' web tools

Instructions of --change: CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK NONE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR.")]
pub struct CommitOptions {
    /// Name or id
    pub container: String,
    /// Name of the image; none if it is to have none
    pub name: Option<String>,
    /// Who has made it
    #[arg(short, long, value_name = "NAME")]
    pub author: Option<String>,
    /// What is to be said of it
    #[arg(short, long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Change what a container of the image runs, by an instruction as in a Dockerfile
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub change: Vec<String>,
    /// Accepted: the container goes on while its files are read
    #[arg(short, long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub pause: bool,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm diff web

A is what was added, C what was changed, D what was removed. The container need not run.")]
pub struct DiffOptions {
    /// Name or id
    pub container: String,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm container prune
  picovm container prune -f --filter until=24h")]
pub struct PruneOptions {
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
    /// Only those with until=TIME, which were created before, or label=KEY[=VALUE]
    #[arg(long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
}

#[derive(Args)]
#[command(after_help = "Examples:
  picovm events
  picovm events --since 10m --until 0s --filter event=die
  picovm events --format '{{.Action}} {{.Actor.Attributes.name}}'

Filters: container, image, label, event, type. Without --until, new events are waited for.")]
pub struct EventsOptions {
    /// Events from then on, as an age or a time; by default only new ones
    #[arg(long, value_name = "TIME", value_parser = values::moment)]
    pub since: Option<DateTime<Utc>>,
    /// Events until then
    #[arg(long, value_name = "TIME", value_parser = values::moment)]
    pub until: Option<DateTime<Utc>>,
    /// Only some
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub filter: Vec<String>,
    /// `json`, or a template of Go
    #[arg(long, value_name = "FORMAT", conflicts_with = "json")]
    pub format: Option<String>,
    /// Print JSON, one a line
    #[arg(long)]
    pub json: bool,
}

/// Bytes that a container may use. What is more than any machine has is told by who knows the machines.
pub fn parse_limit(text: &str) -> Result<u64, String> {
    /// As little as Docker takes.
    const SMALLEST: u64 = 6 << 20;
    match parse_bytes(text)? {
        bytes if bytes < SMALLEST => Err("a container has 6m (6 MiB) at least".into()),
        bytes => Ok(bytes),
    }
}

fn parse_cpus(text: &str) -> Result<Cpus, String> {
    /// As little as Docker takes.
    const SMALLEST: f64 = 0.01;
    let wrong = || "the number of processors is 1 to 8, or a part of them from 0.01 on".to_owned();
    let number: f64 = text.parse().map_err(|_| wrong())?;
    if !(SMALLEST..=8.0).contains(&number) {
        return Err(wrong());
    }
    Ok(Cpus {
        vcpus: number.ceil() as u8,
        limit: (number.fract() != 0.0)
            .then(|| (number * picovm_engine::Limits::CPU_PERIOD as f64).round() as u64),
    })
}

fn parse_restart(text: &str) -> Result<RestartPolicy, String> {
    let (policy, count) = text
        .split_once(':')
        .map_or((text, None), |(policy, count)| (policy, Some(count)));
    match (policy, count) {
        ("no" | "", None) => Ok(RestartPolicy::No),
        ("always", None) => Ok(RestartPolicy::Always),
        ("unless-stopped", None) => Ok(RestartPolicy::UnlessStopped),
        ("on-failure", None) => Ok(RestartPolicy::OnFailure(0)),
        ("on-failure", Some(count)) => count
            .parse()
            .map(RestartPolicy::OnFailure)
            .map_err(|_| format!("{count:?} is no number of restarts")),
        _ => Err("a policy is no, on-failure[:N], always or unless-stopped".into()),
    }
}

/// Address and name of a host.
fn parse_host(text: &str) -> Result<(String, String), String> {
    let (name, address) = text
        .split_once([':', '='])
        .ok_or("a host is NAME:ADDRESS, as db:10.0.0.2")?;
    if address == "host-gateway" {
        return Err("there is no way to the host yet: containers have no network".into());
    }
    let plain = address.trim_start_matches('[').trim_end_matches(']');
    let address: std::net::IpAddr = plain
        .parse()
        .map_err(|_| format!("{address:?} is no IP address"))?;
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err(format!("{name:?} is no name of a host"));
    }
    Ok((address.to_string(), name.to_owned()))
}

fn parse_tail(text: &str) -> Result<Tail, String> {
    match text {
        "all" => Ok(Tail(None)),
        // What is below zero means all of them in Docker.
        text => text
            .parse::<i64>()
            .map(|number| Tail(u64::try_from(number).ok()))
            .map_err(|_| format!("{text:?} is no number of lines")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_docker_users_type_them() {
        assert_eq!(parse_limit("6m"), Ok(6 << 20));
        assert!(parse_limit("5m").is_err());
        let cpus = |text: &str| parse_cpus(text).map(|cpus| (cpus.vcpus, cpus.limit));
        assert_eq!(cpus("2"), Ok((2, None)));
        assert_eq!(cpus("0.5"), Ok((1, Some(50_000))));
        assert_eq!(cpus("1.5"), Ok((2, Some(150_000))));
        for text in ["0", "9", "8.5", "-1", "x", "NaN"] {
            assert!(cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn restart_policies_hosts_and_tails_are_docker_s() {
        assert_eq!(parse_restart("on-failure:3"), Ok(RestartPolicy::OnFailure(3)));
        assert_eq!(parse_restart("no"), Ok(RestartPolicy::No));
        assert!(parse_restart("sometimes").is_err() && parse_restart("always:2").is_err());
        assert_eq!(parse_host("db:10.0.0.2"), Ok(("10.0.0.2".into(), "db".into())));
        assert_eq!(parse_host("db:::1"), Ok(("::1".into(), "db".into())));
        assert_eq!(parse_host("db=[::1]"), Ok(("::1".into(), "db".into())));
        assert!(
            parse_host("db").is_err()
                && parse_host(":1.2.3.4").is_err()
                && parse_host("x:host-gateway").is_err()
        );
        assert_eq!(parse_tail("all"), Ok(Tail(None)));
        assert_eq!(parse_tail("5"), Ok(Tail(Some(5))));
        assert_eq!(parse_tail("-1"), Ok(Tail(None)));
        assert!(parse_tail("x").is_err());
    }
}

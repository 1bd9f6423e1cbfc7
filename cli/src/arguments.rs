//! The command line.

use std::ffi::OsString;

use clap::{Args, Parser, Subcommand};
use picovm_engine::POOL_MAX;

use crate::container::arguments::{
    ContainerCommand, ContainerGroup, EventsOptions, ExecOptions, InspectOptions, LimitOptions,
    ProcessOptions, PsOptions, RunOptions, StartOptions,
};
use crate::image_arguments::{
    ImageCommand, ListOptions, LoadArguments, PruneOptions, RemoveOptions, SaveOptions, TagOptions,
};
use crate::pull_arguments::{PullArguments, parse_bytes};
use crate::volume::VolumeCommand;

/// Run every container as its own lightweight VM, forked from a frozen one.
#[derive(Parser)]
#[command(name = "picovm", version, disable_help_subcommand = true)]
pub struct Cli {
    /// Log to stderr; more often for more. Before the command -v does as well, behind it that is another option's
    #[arg(long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    #[arg(short = 'v', action = clap::ArgAction::Count, hide = true)]
    pub short_verbose: u8,
    #[command(subcommand)]
    pub command: Command,
}

/// The commands that start processes, without all others: that clap makes each of those ready takes longer than a start.
#[derive(Parser)]
#[command(name = "picovm", disable_help_subcommand = true)]
struct Starting {
    #[arg(long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: StartingCommand,
}

#[derive(Subcommand)]
enum StartingCommand {
    Run(Box<RunOptions>),
    Exec(ExecOptions),
    Start(StartOptions),
}

impl Cli {
    /// Reads a command line.
    ///
    /// # Errors
    /// What is wrong with it, or what was asked for in its place: help, the version.
    pub fn read(words: &[OsString]) -> Result<Self, clap::Error> {
        let first = words.get(1).and_then(|word| word.to_str());
        if matches!(first, Some("run" | "exec" | "start"))
            && let Ok(Starting { verbose, command }) = Starting::try_parse_from(words)
        {
            return Ok(Self {
                verbose,
                short_verbose: 0,
                command: Command::Container(match command {
                    StartingCommand::Run(options) => ContainerCommand::Run(options),
                    StartingCommand::Exec(options) => ContainerCommand::Exec(options),
                    StartingCommand::Start(options) => ContainerCommand::Start(options),
                }),
            });
        }
        // Every error is this one's, so that it knows all commands.
        Self::try_parse_from(words)
    }
}

#[derive(Subcommand)]
pub enum Command {
    #[command(flatten)]
    Container(ContainerCommand),
    /// List containers
    Ps(PsOptions),
    /// Show containers and images as JSON
    Inspect(InspectOptions),
    /// Show what happens to containers
    Events(EventsOptions),
    /// The same commands of containers, and a few more
    #[command(name = "container", subcommand)]
    Group(ContainerGroup),
    /// Fetch an image from a registry
    Pull(PullArguments),
    /// List images
    Images(ListOptions),
    /// Remove images, and the templates made of them
    Rmi(RemoveOptions),
    /// Give an image another name
    Tag(TagOptions),
    /// Load images of an archive or an OCI image layout
    Load(LoadArguments),
    /// Write images as an archive
    Save(SaveOptions),
    /// Remove images without a name, and content that no image needs
    Prune(PruneOptions),
    /// Make images of root file systems, and everything else about images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Make, list, show and remove volumes, which outlive containers
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Build, list, show and remove templates (frozen machines)
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Keep clones ready, for containers that start in the time of a process
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Measure starts and memory on this machine
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Check whether this machine can run picovm, and what to do if not
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// What is frozen into a template beside the image.
#[derive(Args, Clone)]
pub struct MachineOptions {
    /// Memory, as 512m or 2g; a plain number is bytes. 32 MiB at least. Taken from the host only as it is used
    #[arg(short, long, value_name = "SIZE", default_value = "256m", value_parser = parse_memory)]
    pub memory: u64,
    /// vCPUs, 1 to 8
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub cpus: u8,
}

/// What happens at a system call that is not allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SeccompMode {
    /// The VMM process is killed
    #[default]
    Kill,
    /// It is told on standard error and let through: for finding out what is missing
    Log,
}

#[derive(Subcommand)]
pub enum TemplateCommand {
    /// Build the template that `run` with the same options would need
    #[command(after_help = "Examples:
  picovm template build debian
  picovm template build -m 512m --cpus 2 debian")]
    Build {
        /// Memory of the containers, as 512m or 2g, 6 MiB at least; without it, a machine of 256 MiB. The machine has that and room
        /// for its kernel: several limits have one template
        #[arg(short, long, value_name = "SIZE", value_parser = crate::container::arguments::parse_limit)]
        memory: Option<u64>,
        /// vCPUs, 1 to 8
        #[arg(long, value_name = "NUMBER", default_value_t = 1)]
        cpus: u8,
        /// The image's name
        image: String,
    },
    /// Start an application once, and freeze it warm: `run --from-template` then goes on with it
    #[command(
        disable_help_flag = true,
        after_help = "Examples:
  picovm template warm --name app --until-log ready python -- python3 /srv/app.py
  picovm template warm --until-port 6379 -m 512m redis
  picovm template warm --until-exec 'curl -sf localhost:8080/health' app:1 -- java -jar /app.jar
  picovm run --rm -i --from-template app

The id of the template is printed; what the application writes goes to standard error. All clones begin with what the application \
has drawn of randomness so far: programs in /etc/picovm/on-clone.d of the container are run in each before it goes on."
    )]
    Warm(Box<WarmOptions>),
    /// List templates
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a template as JSON, and check all of it
    Inspect {
        /// Its name or id, or the beginning of that
        id: String,
    },
    /// Remove templates; containers that run go on
    Rm {
        /// Their names or ids, or the beginnings of those
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// What is started, and when it is frozen.
#[derive(Args)]
#[command(group = clap::ArgGroup::new("until").required(true))]
pub struct WarmOptions {
    /// Name of the template
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Freeze once a line of what it writes matches this regular expression
    #[arg(long, value_name = "REGEX", group = "until")]
    pub until_log: Option<String>,
    /// Freeze once it listens on this TCP port
    #[arg(long, value_name = "PORT", group = "until", value_parser = clap::value_parser!(u16).range(1..=65_535))]
    pub until_port: Option<u16>,
    /// Freeze once this line for the container's shell ends with 0; it is run again and again
    #[arg(long, value_name = "COMMAND", group = "until")]
    pub until_exec: Option<String>,
    /// How long it may take to that, as 500ms, 60s or 5m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = crate::container::arguments::parse_time)]
    pub timeout: std::time::Duration,
    /// Print help; -h is the host name, as in `run`
    #[arg(long, action = clap::ArgAction::Help)]
    pub help: Option<bool>,
    /// Host name while it starts; each clone has its own
    #[arg(short = 'h', long, value_name = "NAME", value_parser = parse_hostname)]
    pub hostname: Option<String>,
    #[command(flatten)]
    pub process: ProcessOptions,
    #[command(flatten)]
    pub limits: LimitOptions,
    /// The image's name or id
    pub image: String,
    /// The command and its arguments; by default the image's
    #[arg(last = true)]
    pub command: Vec<OsString>,
}

#[derive(Subcommand)]
pub enum PoolCommand {
    /// Keep clones of an image parked; `run` and `start` then take one of them
    #[command(
        long_about = "Keeps clones of an image's template parked at their freeze point, each in a jailed VMM process, by a process of its \
own that goes on after this command. Containers of that image with the same memory and vCPUs then start in one of them, until the \
pool is stopped or this machine is. Prints the pool's id. Where there is one already, it is given this size.\n\nA pool of one clone \
comes by itself after a cold start, and ends when it was not needed for 5 minutes (environment variable PICOVM_POOL_IDLE, as 90s or 1h; 0: none comes).",
        after_help = "Examples:
  picovm pool start debian
  picovm pool start --size 20 -m 512m --cpus 2 debian

What a parked clone takes of the host's memory: docs/performance.md."
    )]
    Start {
        /// How many clones
        #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=POOL_MAX as i64))]
        size: u32,
        /// Park them without any page made ready: they take less memory and start slower
        #[arg(long)]
        bare: bool,
        /// As the option of `run` for the containers that are to be served
        #[arg(short, long, value_name = "SIZE", value_parser = crate::container::arguments::parse_limit)]
        memory: Option<u64>,
        /// vCPUs, 1 to 8
        #[arg(long, value_name = "NUMBER", default_value_t = 1)]
        cpus: u8,
        /// The image's name
        image: String,
    },
    /// List pools
    #[command(after_help = "Examples:
  picovm pool ls
  picovm pool ls --json")]
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Print ids alone
        #[arg(short, long, conflicts_with = "json")]
        quiet: bool,
    },
    /// End pools and their parked clones; containers go on
    #[command(after_help = "Examples:
  picovm pool stop debian
  picovm pool stop --all")]
    Stop {
        /// All of them
        #[arg(short, long)]
        all: bool,
        /// Their ids, the beginnings of them, or images' names
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        pools: Vec<String>,
    },
}

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Measure how long starts take, of a process and of containers, in turn
    #[command(
        long_about = "Measures how long starts take by this machine's clock, in turn: of a process of this machine (/bin/echo, \
where there is one), of a container in a clone that is forked for it (cold), and of one in a clone of a pool. Each to the \
first byte of its output and to its exit status. A cold clone is taken down before its exit status is there; one of a pool \
after it.",
        after_help = "Examples:
  picovm bench latency
  picovm bench latency --rounds 200 --memory 512m debian
  picovm bench latency --json debian python3 -c 'print(1)'

The command has to write something and to end with status 0."
    )]
    Latency(LatencyOptions),
    /// Measure what parked and live clones take of this machine's memory
    #[command(
        long_about = "Parks clones, starts a container in each that waits for input, has all of them answer, and ends them. \
Measures what that takes of the memory that is available, all of it counted, and how starts go as live clones become many. \
What else this machine does meanwhile is counted too.",
        after_help = "Examples:
  picovm bench density
  picovm bench density --clones 1000 --memory 128m debian
  picovm bench density --bare --json debian

The image needs a shell, `sh`."
    )]
    Density(DensityOptions),
}

#[derive(Args)]
pub struct LatencyOptions {
    /// Rounds that count
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rounds: u32,
    #[command(flatten)]
    pub machine: MachineOptions,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The image's name; by default the only one that there is, or `debian`
    pub image: Option<String>,
    /// The command and its arguments; by default `echo hello`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

#[derive(Args)]
pub struct DensityOptions {
    /// How many clones
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=POOL_MAX as i64))]
    pub clones: u32,
    /// Park clones without any page made ready: they take less memory and start slower
    #[arg(long)]
    pub bare: bool,
    #[command(flatten)]
    pub machine: MachineOptions,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The image's name; by default the only one that there is, or `debian`
    pub image: Option<String>,
}

/// Whole MiB from a size as Docker takes it.
fn parse_memory(text: &str) -> Result<u64, String> {
    parse_bytes(text).map(|bytes| bytes >> 20)
}

/// A host name.
pub fn parse_hostname(text: &str) -> Result<String, String> {
    let allowed = |character: char| character.is_ascii_alphanumeric() || "-._".contains(character);
    if (1..=64).contains(&text.len()) && text.chars().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err("a host name is 1 to 64 of a-z, A-Z, 0-9, `-`, `.`, `_`".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_as_docker_users_type_them() {
        assert_eq!(parse_memory("256m"), Ok(256));
        assert_eq!(parse_memory("1G"), Ok(1024));
        assert_eq!(parse_memory("134217728"), Ok(128));
        assert_eq!(parse_memory("0"), Ok(0));
        assert!(parse_memory("m").is_err());
        assert!(parse_memory("5x").is_err());
        assert!(parse_memory("99999999999g").is_err());
    }

    #[test]
    fn commands_that_start_processes_are_read_alike_with_and_without_all_others() {
        let words = |line: &str| -> Vec<OsString> { line.split(' ').map(OsString::from).collect() };
        for line in [
            "picovm run --rm -e A=1 --verbose debian ls --verbose -v",
            "picovm exec -it web sh -c true",
            "picovm start -ai web",
        ] {
            let cli = Cli::read(&words(line)).unwrap_or_else(|error| panic!("{line}: {error}"));
            let whole = Cli::try_parse_from(words(line)).unwrap();
            assert_eq!(cli.verbose, whole.verbose, "{line}");
            match (cli.command, whole.command) {
                (
                    Command::Container(ContainerCommand::Run(one)),
                    Command::Container(ContainerCommand::Run(other)),
                ) => assert_eq!(one.create.command, other.create.command),
                (
                    Command::Container(ContainerCommand::Exec(_)),
                    Command::Container(ContainerCommand::Exec(_)),
                )
                | (
                    Command::Container(ContainerCommand::Start(_)),
                    Command::Container(ContainerCommand::Start(_)),
                ) => {}
                _ => panic!("{line} is read as two commands"),
            }
        }
        let (quick, whole) = (
            Cli::read(&words("picovm run --nonsense debian")),
            Cli::try_parse_from(words("picovm run --nonsense debian")),
        );
        assert_eq!(
            quick.err().map(|error| error.to_string()),
            whole.err().map(|error| error.to_string())
        );
    }

    #[test]
    fn options_of_the_command_are_the_command_s() {
        let cli = Cli::try_parse_from(["picovm", "run", "-m", "64m", "debian", "ls", "-l", "--all"]).unwrap();
        let Command::Container(ContainerCommand::Run(options)) = cli.command else {
            panic!("not run")
        };
        assert_eq!(options.create.command, ["ls", "-l", "--all"]);
        assert_eq!(options.create.limits.memory, Some(64 << 20));
    }

    #[test]
    fn commands_of_containers_are_the_same_with_and_without_that_word() {
        for words in [
            "run -d --rm -h box debian",
            "ps -aq",
            "rm -f a b",
            "start -ai a",
            "stop -t 2 a",
            "stop --time 2 a",
            "exec -it a sh -c x",
            "logs -fn 5 --since 10m a",
            "cp a:/x -",
            "top a -o pid",
            "attach --sig-proxy=false a",
            "commit -m x -c CMD a b",
            "inspect -f {{.Id}} a",
            "rm -fv a",
            "run --verbose --rm debian",
        ] {
            for before in ["picovm", "picovm container"] {
                let line = format!("{before} {words}");
                if let Err(error) = Cli::try_parse_from(line.split(' ')) {
                    panic!("{line}: {error}");
                }
            }
        }
        assert!(Cli::try_parse_from(["picovm", "container", "ls", "-a"]).is_ok());
        assert!(Cli::try_parse_from(["picovm", "container", "prune", "-f"]).is_ok());
        for wrong in [
            "run -d --timeout 5 x",
            "exec a",
            "rm",
            "logs --tail x a",
            "run --memory 1m x",
        ] {
            assert!(
                Cli::try_parse_from(format!("picovm {wrong}").split(' ')).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn what_is_measured_may_be_left_out_and_a_pool_has_its_limit() {
        let parse = |arguments: &str| Cli::try_parse_from(arguments.split(' ')).map(|cli| cli.command);
        let Ok(Command::Bench(BenchCommand::Latency(options))) = parse("picovm bench latency --json") else {
            panic!("not latency")
        };
        assert_eq!((options.image, options.command.len()), (None, 0));
        let Ok(Command::Bench(BenchCommand::Latency(options))) =
            parse("picovm bench latency --rounds 2 debian ls --json")
        else {
            panic!("not latency")
        };
        assert_eq!((options.json, options.command.len()), (false, 2));
        assert!(parse("picovm bench density --clones 1024").is_ok());
        assert!(parse("picovm bench density --clones 1025").is_err());
        assert!(parse("picovm bench density --clones 0").is_err());
    }
}

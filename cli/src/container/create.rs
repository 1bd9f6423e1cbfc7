//! From the command line and an image's configuration to that of a container.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use chrono::Utc;
use picovm_engine::containers::{
    ContainerConfig, Containers, LogOptions, Record, RestartPolicy, Text, machine_memory,
};
use picovm_engine::{
    Confinement, EngineError, Healthcheck, Image, ImageConfig, Overrides, RunConfig, Store, TemplateSpec,
};

use super::arguments::{
    AbsentOptions, BehaviourOptions, CreateOptions, FileOptions, HealthOptions, LogDriver, MachineOptions,
    ProcessOptions, Pull, StreamName,
};
use super::{mounts, values, warm};
use crate::arguments::SeccompMode;
use crate::pull_arguments::parse_bytes;
use crate::transfer;

/// Seconds between the signal that asks a container to end and SIGKILL, as Docker has it.
const STOP_TIMEOUT: u32 = 10;
const SIGTERM: u8 = 15;

/// `picovm create`.
pub fn create(options: &CreateOptions) -> anyhow::Result<()> {
    let store = Store::open_default()?;
    let containers = store.containers()?;
    let (record, _) = new_container(&store, &containers, options)?;
    println!("{}", record.id());
    Ok(())
}

/// Makes the container that this command line asks for, and says of which image, unless it is of a warm template.
pub fn new_container(
    store: &Store,
    containers: &Containers,
    options: &CreateOptions,
) -> anyhow::Result<(Record, Option<Image>)> {
    refuse_absent(&options.absent)?;
    if let Some(path) = &options.behaviour.cidfile
        && path.exists()
    {
        bail!(
            "the file {} for the container's id exists: remove it, or give another one",
            path.display()
        );
    }
    let (config, image) = match &options.from_template {
        Some(template) => (warm::config(&store.find_template(template)?, options)?, None),
        None => {
            let image = find_image(store, options)?;
            let defaults = image.config()?;
            tell_of_it(options);
            (config(&image, defaults, options)?, Some(image))
        }
    };
    let record = containers.create(config, options.name.as_deref())?;
    if let Some(path) = &options.behaviour.cidfile {
        let written = fs::File::create_new(path).and_then(|mut file| file.write_all(record.id().as_bytes()));
        if let Err(error) = written {
            // Nobody would know of it.
            let _ = containers.remove_with_volumes(&record);
            return Err(error)
                .with_context(|| format!("cannot write the container's id to {}", path.display()));
        }
    }
    Ok((record, image))
}

/// The machine of a container: which template it is started from.
pub fn template_spec(store: &Store, record: &Record) -> anyhow::Result<TemplateSpec> {
    let config = &record.config;
    // By what it is and not by its name, which may be another image's by now.
    let of_digest = |image: &Image| image.digest == config.image_digest;
    let image = match store.images()?.into_iter().find(of_digest) {
        Some(image) if image.file.is_file() => image,
        _ => bail!(
            "the image {} of container {} ({}) is not in the store any more: pull, load or build the same one again, or remove \
             the container",
            config.image,
            record.name,
            config.image_id
        ),
    };
    Ok(TemplateSpec {
        image,
        memory_mib: config.memory_mib,
        vcpus: config.vcpus,
    })
}

fn find_image(store: &Store, options: &CreateOptions) -> anyhow::Result<Image> {
    if let Some(platform) = &options.behaviour.platform
        && !matches!(platform.as_str(), "linux/amd64" | "linux/x86_64" | "linux")
    {
        bail!("--platform {platform}: containers here are linux/amd64");
    }
    let name = &options.image;
    match (store.image(name), options.behaviour.pull) {
        (_, Pull::Always) => transfer::pull_first(name)?,
        (Err(EngineError::NoImage { .. }), Pull::Missing) => {
            eprintln!("picovm: there is no image named {name} here: pulling it");
            transfer::pull_first(name)?;
        }
        (found, _) => return Ok(found?),
    }
    Ok(store.image(name)?)
}

/// What of a command line is worth a word on standard error.
fn tell_of_it(options: &CreateOptions) {
    if options.process.privileged {
        eprintln!(
            "picovm: note: --privileged: the container has all rights in its own kernel, and none on this machine, as without it"
        );
    }
}

/// The configuration of a container of this image.
pub fn config(image: &Image, whole: ImageConfig, options: &CreateOptions) -> anyhow::Result<ContainerConfig> {
    if !matches!(whole.os.as_str(), "" | "linux") || !matches!(whole.architecture.as_str(), "" | "amd64") {
        bail!(
            "the image {} is for {}/{}, and containers here are linux/amd64: pull it with --platform linux/amd64",
            options.image,
            whole.os,
            whole.architecture
        );
    }
    let defaults = whole.config;
    let process = &options.process;
    let args = defaults.command(Overrides {
        entrypoint: process.entrypoint.as_deref(),
        arguments: &options.command,
    });
    if args.is_empty() {
        bail!(
            "there is no command to run: the image {} names none, so give one behind it",
            options.image
        );
    }
    let behaviour = &options.behaviour;
    let restart = behaviour.restart.unwrap_or_default();
    if options.rm && restart != RestartPolicy::No {
        bail!("--rm and --restart contradict each other: a container that is removed is not started again");
    }
    let (terminal, stdin) = (options.tty, wants_stdin(options));
    let cpus = options.limits.cpus;
    let mounts = mounts::mounts(
        &options.files,
        options.absent.shm_size.as_deref(),
        &defaults.volumes,
    )?;
    Ok(ContainerConfig {
        id: Containers::new_id()?,
        created: Utc::now(),
        image: options.image.clone(),
        image_id: image.id(),
        image_digest: image.digest.clone(),
        memory_mib: options
            .limits
            .memory
            .map_or(TemplateSpec::DEFAULT_MEMORY_MIB, machine_memory),
        vcpus: cpus.map_or(1, |cpus| cpus.vcpus),
        entrypoint: entrypoint_words(&defaults, process.entrypoint.as_deref()).min(args.len()),
        args: texts(args),
        env: texts(environment(&defaults, process, terminal)?),
        workdir: workdir(process.workdir.as_deref(), &defaults)?.into(),
        user: process
            .user
            .clone()
            .unwrap_or_else(|| defaults.user.clone().into())
            .into(),
        groups: texts(process.group_add.clone()),
        hostname: options.files.hostname.clone(),
        stdin,
        terminal,
        rlimits: process.ulimit.clone(),
        drop_capabilities: values::dropped(&process.cap_add, &process.cap_drop),
        no_new_privileges: no_new_privileges(&process.security_opt)?,
        memory_limit: options.limits.memory,
        pids_limit: options
            .limits
            .pids_limit
            .and_then(|limit| u64::try_from(limit).ok())
            .filter(|limit| *limit > 0),
        cpu_limit: cpus.and_then(|cpus| cpus.limit),
        read_only: options.files.read_only,
        tmpfs: mounts.tmpfs,
        mounts: mounts.shared,
        storage: options.files.storage.or(options.files.storage_opt),
        hosts: hosts(&options.files)?,
        labels: labels(&defaults.labels, behaviour)?,
        stop_signal: match (behaviour.stop_signal, defaults.stop_signal.as_deref()) {
            (Some(signal), _) => signal,
            (None, Some(name)) if !name.is_empty() => values::signal(name).map_err(|reason| {
                anyhow::anyhow!(
                    "the image {} has a stop signal that is none: {reason}",
                    options.image
                )
            })?,
            _ => SIGTERM,
        },
        stop_timeout: behaviour
            .stop_timeout
            .or_else(|| u32::try_from(defaults.stop_timeout?).ok())
            .unwrap_or(STOP_TIMEOUT),
        restart,
        log: log_options(behaviour)?,
        auto_remove: options.rm,
        healthcheck: healthcheck(defaults.healthcheck, &options.health)?,
        isolate_memory: options.machine.isolate_memory,
        confinement: confinement(&options.machine),
        console_log: match &options.machine.console_log {
            Some(path) => Some(absolute(path)?),
            None => None,
        },
        warm: None,
    })
}

/// Whether standard input is connected: by `-i`, or because it is named.
pub fn wants_stdin(options: &CreateOptions) -> bool {
    options.interactive || options.attach.contains(&StreamName::Stdin)
}

pub fn texts(strings: Vec<OsString>) -> Vec<Text> {
    strings.into_iter().map(Text).collect()
}

pub fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("cannot tell where {} is", path.display()))
}

/// How many of the arguments are the entry point's.
fn entrypoint_words(defaults: &RunConfig, given: Option<&str>) -> usize {
    match given {
        Some("") => 0,
        Some(_) => 1,
        None => defaults.entrypoint.len(),
    }
}

fn environment(
    defaults: &RunConfig,
    process: &ProcessOptions,
    terminal: bool,
) -> anyhow::Result<Vec<OsString>> {
    let mut environment = defaults.environment(given_environment(&process.env_file, &process.env)?);
    if terminal
        && !environment
            .iter()
            .any(|pair| pair.as_bytes().starts_with(b"TERM="))
    {
        environment.push("TERM=xterm".into());
    }
    Ok(environment)
}

/// Variables of files and then of the command line.
pub fn given_environment(files: &[PathBuf], given: &[OsString]) -> anyhow::Result<Vec<OsString>> {
    let mut pairs = Vec::new();
    for path in files {
        let bytes =
            fs::read(path).with_context(|| format!("cannot read the variables of {}", path.display()))?;
        pairs.extend(variables(&bytes).with_context(|| format!("in {}", path.display()))?);
    }
    pairs.extend(given.iter().cloned());
    Ok(pairs.iter().filter_map(|pair| with_value(pair)).collect())
}

/// The lines of a file of variables: without what is empty or begins with `#`.
fn variables(bytes: &[u8]) -> anyhow::Result<Vec<OsString>> {
    let mut pairs = Vec::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii_start();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let name = line.split(|byte| *byte == b'=').next().unwrap_or_default();
        if name.is_empty() || name.iter().any(u8::is_ascii_whitespace) {
            bail!(
                "{:?} is no variable: it is NAME=VALUE",
                String::from_utf8_lossy(line)
            );
        }
        pairs.push(OsString::from_vec(line.to_vec()));
    }
    Ok(pairs)
}

/// `NAME=value` as it is, and `NAME` with its value here if it has one, as Docker has it.
fn with_value(argument: &OsStr) -> Option<OsString> {
    if argument.as_bytes().contains(&b'=') {
        return Some(argument.to_owned());
    }
    let mut pair = argument.to_owned();
    pair.push("=");
    pair.push(std::env::var_os(argument)?);
    Some(pair)
}

fn workdir(given: Option<&OsStr>, defaults: &RunConfig) -> anyhow::Result<OsString> {
    match given {
        Some(directory) if directory.as_bytes().starts_with(b"/") || directory.is_empty() => {
            Ok(directory.to_owned())
        }
        Some(directory) => bail!("the working directory {} is not absolute", directory.display()),
        None if defaults.working_dir.is_empty() || defaults.working_dir.starts_with('/') => {
            Ok(defaults.working_dir.clone().into())
        }
        None => Ok(format!("/{}", defaults.working_dir).into()),
    }
}

fn no_new_privileges(options: &[String]) -> anyhow::Result<bool> {
    let mut no_new = false;
    for option in options {
        let (name, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
        match (name, value) {
            ("no-new-privileges", "" | "true") => no_new = true,
            ("no-new-privileges", "false") => no_new = false,
            // What these loosen, no container has here.
            ("seccomp" | "apparmor", "unconfined") | ("label", "disable") => {}
            _ => bail!(
                "--security-opt {option}: there is no-new-privileges only. A container has its own kernel, and its machine a jail that \
                 no option loosens"
            ),
        }
    }
    Ok(no_new)
}

const NO_OTHERS: &str =
    "the volumes of another container are named one by one: `picovm inspect` shows them, -v shares them";
const NO_NETWORK: &str = "containers have no network yet, but for loopback of their own";

pub fn hosts(files: &FileOptions) -> anyhow::Result<Vec<(String, String)>> {
    for name in &files.network {
        if !matches!(name.as_str(), "none" | "default") {
            bail!("--network {name}: {NO_NETWORK}. `none` and `default` are what there is");
        }
    }
    Ok(files.add_host.clone())
}

fn refuse_absent(absent: &AbsentOptions) -> anyhow::Result<()> {
    let listed = |given: bool, option: &str, reason: &str| match given {
        true => Err(anyhow::anyhow!("{option}: {reason}")),
        false => Ok(()),
    };
    let isolated = "a container has its own kernel, so there is nothing of this machine, or of another container, that it could share";
    listed(!absent.volumes_from.is_empty(), "--volumes-from", NO_OTHERS)?;
    listed(!absent.publish.is_empty(), "--publish", NO_NETWORK)?;
    for (given, option) in [
        (absent.publish_all, "--publish-all"),
        (!absent.dns.is_empty(), "--dns"),
        (!absent.link.is_empty(), "--link"),
        (absent.ip.is_some(), "--ip"),
        (absent.mac_address.is_some(), "--mac-address"),
    ] {
        listed(given, option, NO_NETWORK)?;
    }
    let devices = "a container is a machine of its own, which has no devices of this one";
    listed(!absent.device.is_empty(), "--device", devices)?;
    listed(absent.gpus.is_some(), "--gpus", devices)?;
    for (value, option) in [
        (&absent.pid, "--pid"),
        (&absent.ipc, "--ipc"),
        (&absent.uts, "--uts"),
        (&absent.userns, "--userns"),
        (&absent.cgroupns, "--cgroupns"),
    ] {
        // These ask for what there is anyway.
        let own = value
            .as_deref()
            .is_none_or(|value| matches!(value, "" | "private" | "shareable"));
        listed(!own, option, isolated)?;
    }
    listed(
        absent.runtime.is_some(),
        "--runtime",
        "there is one way to run a container here: as a machine of its own",
    )?;
    listed(
        !absent.sysctl.is_empty(),
        "--sysctl",
        "parameters of a container's kernel cannot be set yet",
    )?;
    listed(
        absent.cpuset_cpus.is_some(),
        "--cpuset-cpus",
        "a container cannot be bound to processors yet: --cpus says how many it has",
    )
}

pub fn labels(
    defaults: &BTreeMap<String, String>,
    behaviour: &BehaviourOptions,
) -> anyhow::Result<BTreeMap<String, String>> {
    let mut labels = defaults.clone();
    let mut set = |text: &str| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        if key.trim().is_empty() {
            bail!("{text:?} is no label: it is KEY=VALUE");
        }
        labels.insert(key.to_owned(), value.to_owned());
        Ok(())
    };
    for path in &behaviour.label_file {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the labels of {}", path.display()))?;
        for line in text.lines().map(str::trim) {
            if !line.is_empty() && !line.starts_with('#') {
                set(line)?;
            }
        }
    }
    for label in &behaviour.label {
        set(label)?;
    }
    Ok(labels)
}

pub fn log_options(behaviour: &BehaviourOptions) -> anyhow::Result<LogOptions> {
    let mut options = LogOptions {
        keep: behaviour.log_driver != LogDriver::None,
        ..LogOptions::default()
    };
    for option in &behaviour.log_opt {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        let wrong = |reason: String| anyhow::anyhow!("--log-opt {option}: {reason}");
        match key {
            "max-size" if value == "-1" => options.max_size = None,
            "max-size" => {
                let bytes = parse_bytes(value).map_err(wrong)?;
                if bytes == 0 {
                    return Err(wrong("a log has room for something".into()));
                }
                options.max_size = Some(bytes);
            }
            "max-file" => {
                options.max_files = value
                    .parse()
                    .ok()
                    .filter(|count| *count > 0)
                    .ok_or_else(|| wrong("the number of files is 1 at least".into()))?;
            }
            _ => return Err(wrong("there are max-size=SIZE and max-file=NUMBER".into())),
        }
    }
    if options.max_files > 1 && options.max_size.is_none() {
        bail!("--log-opt max-file does nothing without max-size, the size at which another file is begun");
    }
    Ok(options)
}

/// The image's health check with what is given over it.
pub fn healthcheck(
    image: Option<Healthcheck>,
    options: &HealthOptions,
) -> anyhow::Result<Option<Healthcheck>> {
    let times = [
        options.health_interval,
        options.health_timeout,
        options.health_start_period,
        options.health_start_interval,
    ];
    let given =
        options.health_cmd.is_some() || options.health_retries.is_some() || times.iter().any(Option::is_some);
    if options.no_healthcheck {
        if given {
            bail!("--no-healthcheck contradicts the other options of the health check");
        }
        return Ok(None);
    }
    let mut check = image.unwrap_or_default();
    if let Some(command) = &options.health_cmd {
        check.test = match command.as_str() {
            "none" | "NONE" => vec!["NONE".into()],
            command => vec!["CMD-SHELL".into(), command.into()],
        };
    }
    for (time, field) in times.into_iter().zip([
        &mut check.interval,
        &mut check.timeout,
        &mut check.start_period,
        &mut check.start_interval,
    ]) {
        if let Some(time) = time {
            *field = nanoseconds(time);
        }
    }
    if let Some(retries) = options.health_retries {
        check.retries = retries.into();
    }
    let works = check.test.first().is_some_and(|first| first != "NONE");
    Ok(works.then_some(check))
}

fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// How the container's VMM process is to be confined. Less than all is not done silently.
pub fn confinement(options: &MachineOptions) -> Confinement {
    match options.seccomp {
        _ if options.no_jail => {
            eprintln!(
                "picovm: warning: --no-jail: nothing but its VM stands between this container and the host. Use it for \
                 debugging only"
            );
            Confinement::Unconfined
        }
        SeccompMode::Log => {
            eprintln!(
                "picovm: warning: --seccomp=log: the VMM may make any system call. Use it for debugging only"
            );
            Confinement::CallsLogged
        }
        SeccompMode::Kill => Confinement::Jailed,
    }
}

/// Asks on the terminal before something is removed; without a terminal, nobody is asked.
pub fn confirmed(force: bool, what: &str) -> anyhow::Result<bool> {
    use std::io::{BufRead, IsTerminal};
    if force || !io::stdin().is_terminal() {
        return Ok(true);
    }
    print!("{what} Go on? [y/N] ");
    io::stdout().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::{Cli, Command};
    use crate::container::arguments::ContainerCommand;
    use clap::Parser;

    fn options(arguments: &[&str]) -> CreateOptions {
        let words = ["picovm", "create"]
            .iter()
            .chain(arguments)
            .chain(&["debian", "true"]);
        let Command::Container(ContainerCommand::Create(options)) = Cli::parse_from(words).command else {
            panic!("not create")
        };
        options.create
    }

    fn image() -> Image {
        Image {
            name: "debian".into(),
            digest: "0".repeat(64),
            bytes: 0,
            entries: 0,
            created: 0,
            source: PathBuf::new(),
            manifest: None,
            config_digest: None,
            registry_digest: None,
            file: PathBuf::new(),
        }
    }

    fn made(arguments: &[&str]) -> ContainerConfig {
        config(&image(), ImageConfig::default(), &options(arguments)).unwrap()
    }

    fn refused(arguments: &[&str]) -> String {
        let options = options(arguments);
        let error = match refuse_absent(&options.absent) {
            Err(error) => error,
            Ok(()) => config(&image(), ImageConfig::default(), &options).unwrap_err(),
        };
        format!("{error:#}")
    }

    #[test]
    fn a_container_has_what_docker_users_ask_for() {
        let made = made(&[
            "-it",
            "-m",
            "6m",
            "--cpus",
            "1.5",
            "--pids-limit",
            "50",
            "--ulimit",
            "nofile=10:20",
            "--cap-drop",
            "ALL",
            "--cap-add",
            "CHOWN",
            "--security-opt",
            "no-new-privileges",
            "--tmpfs",
            "/run:size=1m",
            "--mount",
            "type=tmpfs,dst=/x,tmpfs-size=2m",
            "--add-host",
            "db:10.0.0.2",
            "-l",
            "a=b",
            "-l",
            "c",
            "--restart",
            "on-failure:2",
            "--stop-signal",
            "INT",
            "--log-opt",
            "max-size=1m",
            "--log-opt",
            "max-file=3",
            "--health-cmd",
            "true",
            "--health-interval",
            "5s",
            "-h",
            "box",
            "--init",
            "--network",
            "none",
            "--read-only",
            "--storage",
            "10g",
        ]);
        assert_eq!((made.memory_limit, made.memory_mib), (Some(6 << 20), 64));
        assert_eq!((made.vcpus, made.cpu_limit), (2, Some(150_000)));
        assert_eq!(
            (made.pids_limit, made.rlimits.clone()),
            (Some(50), vec![(7, 10, 20)])
        );
        assert_eq!(made.drop_capabilities & 0b11, 0b10);
        assert!(made.no_new_privileges && made.read_only && made.terminal && made.stdin);
        assert_eq!(made.env, [Text::from("TERM=xterm")]);
        let tmpfs: Vec<String> = made
            .tmpfs
            .iter()
            .map(|(place, options)| format!("{place} {options}"))
            .collect();
        assert_eq!(tmpfs, ["/run size=1m", "/x size=2097152"]);
        assert_eq!(made.storage, Some(10 << 30));
        assert_eq!(made.hosts, [("10.0.0.2".to_owned(), "db".to_owned())]);
        assert_eq!(made.labels["a"], "b");
        assert_eq!(made.labels["c"], "");
        assert_eq!((made.restart, made.stop_signal), (RestartPolicy::OnFailure(2), 2));
        assert_eq!((made.log.max_size, made.log.max_files), (Some(1 << 20), 3));
        let check = made.healthcheck.unwrap();
        assert_eq!(
            (check.test, check.interval),
            (vec!["CMD-SHELL".to_owned(), "true".into()], 5_000_000_000)
        );
        assert_eq!(made.hostname.as_deref(), Some("box"));
    }

    #[test]
    fn without_options_a_container_is_as_it_always_was() {
        let made = made(&[]);
        assert_eq!((made.memory_mib, made.memory_limit, made.vcpus), (256, None, 1));
        assert_eq!((made.stop_signal, made.stop_timeout), (15, 10));
        assert_eq!(made.command_line(), "true");
        assert!(!made.stdin && !made.terminal && made.healthcheck.is_none() && made.log.keep);
        assert_eq!(made.confinement, Confinement::Jailed);
    }

    #[test]
    fn what_is_not_there_is_refused_with_the_reason() {
        for (arguments, reason) in [
            (&["-v", "/tmp:/b:bogus"][..], "ro, rw and nocopy"),
            (&["-v", "/tmp:/"], "absolute path, and not /"),
            (&["-v", "/tmp:/b", "--tmpfs", "/b"], "more than one mount"),
            (
                &["--mount", "type=bind,src=/no-such-directory,dst=/b"],
                "cannot be shared",
            ),
            (&["-p", "80:80"], "no network yet"),
            (&["--network", "host"], "no network yet"),
            (&["--device", "/dev/fuse"], "no devices"),
            (&["--pid", "host"], "its own kernel"),
            (&["--rm", "--restart", "always"], "contradict"),
            (&["--log-opt", "x=1"], "max-size"),
            (&["--log-opt", "max-file=2"], "without max-size"),
            (&["--tmpfs", "run"], "absolute"),
            (&["-w", "srv"], "absolute"),
            (&["--security-opt", "x"], "no-new-privileges"),
            (&["--no-healthcheck", "--health-cmd", "x"], "contradicts"),
            (&["-l", "=x"], "no label"),
        ] {
            let error = refused(arguments);
            assert!(error.contains(reason), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn a_bare_name_takes_its_value_from_here_or_is_left_out() {
        let path = std::env::var("PATH").unwrap();
        let given = ["A=1".into(), "PATH".into(), "PICOVM_NOT_SET".into(), "B=".into()];
        assert_eq!(
            given_environment(&[], &given).unwrap(),
            ["A=1".into(), OsString::from(format!("PATH={path}")), "B=".into()]
        );
    }

    #[test]
    fn files_of_variables_are_docker_s() {
        let read = variables(b"# comment\n\n A=b c # d\r\nPATH\nB=\n").unwrap();
        assert_eq!(read, ["A=b c # d", "PATH", "B="]);
        assert!(variables(b"A B=1").is_err() && variables(b"=1").is_err());
    }

    #[test]
    fn a_health_check_of_the_image_can_be_changed_or_left_out() {
        let image = Healthcheck {
            test: vec!["CMD".into(), "check".into()],
            retries: 5,
            ..Healthcheck::default()
        };
        let with = |arguments: &[&str]| healthcheck(Some(image.clone()), &options(arguments).health).unwrap();
        assert_eq!(with(&["--health-retries", "2"]).unwrap().retries, 2);
        assert_eq!(with(&[]), Some(image.clone()));
        assert_eq!(with(&["--no-healthcheck"]), None);
        assert_eq!(with(&["--health-cmd", "none"]), None);
    }
}

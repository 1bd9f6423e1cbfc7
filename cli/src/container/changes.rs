//! `picovm diff` and `picovm commit`.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Context, bail};
use picovm_engine::containers::{ContainerConfig, Record};
use picovm_engine::{Change, ChangeKind, Commit, ContainerExit, Helper, RunConfig, Store};

use super::arguments::{CommitOptions, DiffOptions};
use super::copy::Files;
use super::{create, values};

pub fn diff(options: &DiffOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let containers = store.containers()?;
    let record = containers.find(&options.container)?;
    let mut files = Files::of(&store, containers, record)?;
    let changes: Vec<Change> = files.query("list the changes", Helper::Changes)?;
    // From here on only this is printed. Before, a clone may have been made, which is to know nothing of it.
    crate::end_with_the_reader();
    for change in changes {
        let kind = match change.kind {
            ChangeKind::Added => 'A',
            ChangeKind::Modified => 'C',
            ChangeKind::Deleted => 'D',
        };
        let path = String::from_utf8_lossy(&change.path).into_owned();
        println!("{kind} {}", picovm_engine::printable(&path));
    }
    Ok(ExitCode::SUCCESS)
}

pub fn commit(options: &CommitOptions) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let containers = store.containers()?;
    let record = containers.find(&options.container)?;
    let parent = create::template_spec(&store, &record)?.image;
    let mut config = run_config(&record.config, parent.config()?.config);
    for change in &options.change {
        apply(&mut config, change).with_context(|| format!("--change {change:?}"))?;
    }
    let mut layer = layer(&store, &containers, &record)?;
    let commit = Commit {
        name: options.name.as_deref(),
        config,
        author: options.author.clone(),
        comment: options.message.clone(),
        created_by: Some(record.config.command_line()),
    };
    let image = store.commit_image(
        &parent,
        layer.as_mut().map(|file| file as &mut dyn Read),
        commit,
        &mut |_| {},
    )?;
    containers.tell(&record, "commit", &[("imageID", image.id())]);
    println!("{}", image.id());
    Ok(ExitCode::SUCCESS)
}

/// What a container has changed, as a layer; none if it is nothing.
fn layer(
    store: &Store,
    containers: &picovm_engine::containers::Containers,
    record: &Record,
) -> anyhow::Result<Option<File>> {
    if !record.state.status.is_live() && record.config.storage.is_none() {
        return match File::open(record.layer()) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("cannot read the container's files"),
        };
    }
    let failed = "cannot make a temporary file";
    let (file, mut told) = (
        tempfile::tempfile_in(&record.directory).context(failed)?,
        tempfile::tempfile().context(failed)?,
    );
    let null = File::open("/dev/null").context("cannot open /dev/null")?;
    let mut files = Files::of(store, containers.clone(), record.clone())?;
    let exit = files.help(Helper::SaveLayer, [null.as_fd(), file.as_fd(), told.as_fd()])?;
    if exit != ContainerExit::Code(0) {
        io::Seek::rewind(&mut told)?;
        let mut bytes = Vec::new();
        told.take(4096).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        bail!(
            "cannot read the files of container {}: {}",
            record.name,
            picovm_engine::printable_text(text.trim())
        );
    }
    let mut file = file;
    io::Seek::rewind(&mut file)?;
    Ok(Some(file))
}

/// What a container of the image is to run: what this one does, over what its image says.
fn run_config(config: &ContainerConfig, image: RunConfig) -> RunConfig {
    let text =
        |texts: &[picovm_engine::containers::Text]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
    let words = text(&config.args);
    let (entrypoint, cmd) = words.split_at(config.entrypoint.min(words.len()));
    RunConfig {
        user: config.user.to_string(),
        env: text(&config.env),
        entrypoint: entrypoint.to_vec(),
        cmd: cmd.to_vec(),
        working_dir: config.workdir.to_string(),
        labels: config.labels.clone(),
        stop_signal: match (&image.stop_signal, config.stop_signal) {
            // What everybody has need not be said.
            (None, 15) => None,
            (_, signal) => Some(values::signal_name(signal)),
        },
        healthcheck: config.healthcheck.clone(),
        ..image
    }
}

/// Applies an instruction as in a Dockerfile.
fn apply(config: &mut RunConfig, change: &str) -> anyhow::Result<()> {
    let change = change.trim();
    let (instruction, rest) = change.split_once(char::is_whitespace).unwrap_or((change, ""));
    let rest = rest.trim();
    let some = || match rest.is_empty() {
        true => Err(anyhow::anyhow!("{instruction} needs something behind it")),
        false => Ok(rest.to_owned()),
    };
    match instruction.to_ascii_uppercase().as_str() {
        "CMD" => config.cmd = command(rest)?,
        "ENTRYPOINT" => config.entrypoint = command(rest)?,
        "ENV" => {
            for (name, value) in pairs(&some()?)? {
                let named = format!("{name}=");
                config.env.retain(|pair| !pair.starts_with(&named));
                config.env.push(format!("{named}{value}"));
            }
        }
        "LABEL" => config.labels.extend(pairs(&some()?)?),
        "EXPOSE" => {
            for port in some()?.split_whitespace() {
                let port = match port.contains('/') {
                    true => port.to_owned(),
                    false => format!("{port}/tcp"),
                };
                if port
                    .split('/')
                    .next()
                    .is_none_or(|number| number.parse::<u16>().is_err())
                {
                    bail!("{port:?} is no port");
                }
                if !config.exposed_ports.contains(&port) {
                    config.exposed_ports.push(port);
                }
            }
        }
        "VOLUME" => {
            let some = some()?;
            let places = match exec_form(&some) {
                Some(words) => words,
                None => some.split_whitespace().map(str::to_owned).collect(),
            };
            for place in places {
                if !config.volumes.contains(&place) {
                    config.volumes.push(place);
                }
            }
        }
        "USER" => config.user = some()?,
        "WORKDIR" => {
            let directory = some()?;
            config.working_dir = match directory.starts_with('/') {
                true => directory,
                false => format!("{}/{directory}", config.working_dir.trim_end_matches('/')),
            };
        }
        "STOPSIGNAL" => {
            let name = some()?;
            values::signal(&name).map_err(anyhow::Error::msg)?;
            config.stop_signal = Some(name);
        }
        "HEALTHCHECK" if rest.eq_ignore_ascii_case("none") => config.healthcheck = None,
        _ => bail!(
            "there are CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK NONE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR"
        ),
    }
    Ok(())
}

/// `["program", "argument"]`.
fn exec_form(text: &str) -> Option<Vec<String>> {
    text.starts_with('[')
        .then(|| serde_json::from_str(text).ok())
        .flatten()
}

/// A command as a list, or as a line for the shell.
fn command(text: &str) -> anyhow::Result<Vec<String>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    Ok(exec_form(text).unwrap_or_else(|| vec!["/bin/sh".into(), "-c".into(), text.to_owned()]))
}

/// `NAME=value` and more of them, quoted as in a shell; or, as it once was, `NAME value`.
fn pairs(text: &str) -> anyhow::Result<Vec<(String, String)>> {
    let words = shlex::split(text).context("a quote has no end")?;
    if let Some(first) = words.first()
        && !first.contains('=')
    {
        let (name, value) = text
            .split_once(char::is_whitespace)
            .with_context(|| format!("{text:?} has no value"))?;
        return Ok(vec![(name.to_owned(), value.trim().to_owned())]);
    }
    words
        .iter()
        .map(|word| match word.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => bail!("{word:?} is not NAME=value"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_those_of_a_dockerfile() {
        let mut config = RunConfig {
            env: vec!["A=0".into(), "AB=1".into()],
            working_dir: "/srv".into(),
            ..RunConfig::default()
        };
        for change in [
            "CMD [\"sleep\", \"1\"]",
            "entrypoint echo hi",
            "ENV A=1 B=\"two words\"",
            "ENV C three  words",
            "LABEL \"a b\"=c",
            "EXPOSE 80 53/udp",
            "USER nobody",
            "WORKDIR sub",
            "STOPSIGNAL SIGINT",
            "VOLUME [\"/data\"]",
            "HEALTHCHECK NONE",
        ] {
            apply(&mut config, change).unwrap();
        }
        assert_eq!(config.cmd, ["sleep", "1"]);
        assert_eq!(config.entrypoint, ["/bin/sh", "-c", "echo hi"]);
        assert_eq!(config.env, ["AB=1", "A=1", "B=two words", "C=three  words"]);
        assert_eq!(config.labels["a b"], "c");
        assert_eq!(config.exposed_ports, ["80/tcp", "53/udp"]);
        assert_eq!(
            (config.user.as_str(), config.working_dir.as_str()),
            ("nobody", "/srv/sub")
        );
        assert_eq!(config.stop_signal.as_deref(), Some("SIGINT"));
        assert_eq!(config.volumes, ["/data"]);
        for wrong in [
            "RUN x",
            "ENV",
            "ENV \"x",
            "LABEL =x",
            "EXPOSE x",
            "STOPSIGNAL x",
            "USER",
        ] {
            assert!(apply(&mut config, wrong).is_err(), "{wrong}");
        }
    }
}

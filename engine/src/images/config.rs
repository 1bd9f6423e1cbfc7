//! An image's configuration: what it is, and what a container of it runs (OCI image specification, "Image Configuration";
//! Docker's health check besides).

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

/// The configuration of an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// When it was made, as RFC 3339 has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Who made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// The processors that its programs run on, as `amd64`.
    #[serde(default, deserialize_with = "or_default")]
    pub architecture: String,
    /// A variant of these processors, as `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// The operating system that its programs run on, as `linux`.
    #[serde(default, deserialize_with = "or_default")]
    pub os: String,
    /// What a container of it runs.
    #[serde(default, deserialize_with = "or_default")]
    pub config: RunConfig,
    /// What its root file system is made of.
    #[serde(default, deserialize_with = "or_default")]
    pub rootfs: RootFs,
    /// How it was made, step by step.
    #[serde(default, deserialize_with = "or_default")]
    pub history: Vec<History>,
}

/// What a root file system is made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RootFs {
    /// `layers`.
    #[serde(default, rename = "type", deserialize_with = "or_default")]
    pub kind: String,
    /// SHA-256 of each layer, uncompressed, the lowest first.
    #[serde(default, deserialize_with = "or_default")]
    pub diff_ids: Vec<String>,
}

/// A step of making an image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// When, as RFC 3339 has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// By which command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// By whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// What was said of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// Whether it made no layer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

/// What a container of an image runs, unless its user says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    /// `user[:group]` by name or number; root if empty.
    #[serde(deserialize_with = "or_default")]
    pub user: String,
    /// Environment as `NAME=value`.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// Program and first arguments; what the user gives is appended.
    #[serde(deserialize_with = "words")]
    pub entrypoint: Vec<String>,
    /// Further arguments if the user gives none, or program and arguments if there is no entry point.
    #[serde(deserialize_with = "words")]
    pub cmd: Vec<String>,
    /// Working directory; `/` if empty.
    #[serde(deserialize_with = "or_default")]
    pub working_dir: String,
    /// Labels.
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// Ports that its program listens on, as `80/tcp`.
    #[serde(deserialize_with = "keys", serialize_with = "as_keys")]
    pub exposed_ports: Vec<String>,
    /// Directories that hold a container's data.
    #[serde(deserialize_with = "keys", serialize_with = "as_keys")]
    pub volumes: Vec<String>,
    /// Signal that asks its program to end, by name or number; `SIGTERM` if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Seconds between that signal and `SIGKILL`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_timeout: Option<u64>,
    /// How to find out whether a container works (Docker's).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Healthcheck>,
    /// Shell that commands of a build file are run by (Docker's).
    #[serde(deserialize_with = "words", skip_serializing_if = "Vec::is_empty")]
    pub shell: Vec<String>,
}

/// How to find out whether a container works. Times are in nanoseconds; 0 stands for the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Healthcheck {
    /// `NONE`; `CMD` and a program with its arguments; or `CMD-SHELL` and a line for the shell.
    #[serde(deserialize_with = "words")]
    pub test: Vec<String>,
    /// Between two checks.
    pub interval: i64,
    /// After which a check has failed.
    pub timeout: i64,
    /// After the start, in which failures do not count.
    pub start_period: i64,
    /// Between two checks in that time.
    pub start_interval: i64,
    /// Failures in a row after which a container does not work.
    pub retries: i64,
}

/// What a user says of the command.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overrides<'a> {
    /// In place of the entry point; an empty one takes it away.
    pub entrypoint: Option<&'a str>,
    /// Arguments.
    pub arguments: &'a [std::ffi::OsString],
}

impl RunConfig {
    /// Program and arguments, as Docker puts them together; empty if neither image nor user names a program.
    #[must_use]
    pub fn command(&self, overrides: Overrides<'_>) -> Vec<std::ffi::OsString> {
        let mut command: Vec<std::ffi::OsString> = match overrides.entrypoint {
            Some("") => Vec::new(),
            Some(entrypoint) => vec![entrypoint.into()],
            None => self.entrypoint.iter().map(Into::into).collect(),
        };
        if !overrides.arguments.is_empty() {
            command.extend_from_slice(overrides.arguments);
        } else if overrides.entrypoint.is_none() {
            command.extend(self.cmd.iter().map(std::ffi::OsString::from));
        }
        command
    }

    /// The image's environment with `more` over it: `NAME=value` each, the later of two with one name counts.
    #[must_use]
    pub fn environment(&self, more: Vec<std::ffi::OsString>) -> Vec<std::ffi::OsString> {
        use std::os::unix::ffi::OsStrExt;
        let name = |pair: &std::ffi::OsString| {
            let bytes = pair.as_bytes();
            let end = bytes.iter().position(|byte| *byte == b'=').unwrap_or(bytes.len());
            bytes.get(..end).unwrap_or_default().to_vec()
        };
        let mut environment: Vec<std::ffi::OsString> = Vec::new();
        for pair in self.env.iter().map(std::ffi::OsString::from).chain(more) {
            let named = name(&pair);
            match environment.iter_mut().find(|set| name(set) == named) {
                Some(set) => *set = pair,
                None => environment.push(pair),
            }
        }
        environment
    }
}

/// Go writes what is empty as null.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// A list of words, or one that old images give as such.
fn words<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Words {
        Many(Vec<String>),
        One(String),
    }
    Ok(match Option::deserialize(from)? {
        Some(Words::Many(words)) => words,
        Some(Words::One(word)) => vec![word],
        None => Vec::new(),
    })
}

/// Go has no sets: `{"80/tcp": {}}`.
fn keys<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let map: Option<BTreeMap<String, serde_json::Value>> = Option::deserialize(from)?;
    Ok(map.unwrap_or_default().into_keys().collect())
}

fn as_keys<S: serde::Serializer>(list: &[String], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(list.iter().map(|key| (key, serde_json::json!({}))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_read_as_docker_and_others_write_it() {
        let config: ImageConfig = serde_json::from_str(
            r#"{"architecture":"amd64","os":"linux","created":"2024-01-01T00:00:00Z",
            "config":{"User":"","Env":["PATH=/bin"],"Entrypoint":null,"Cmd":["sh"],"WorkingDir":"/srv","Labels":null,
            "ExposedPorts":{"80/tcp":{}},"Volumes":{"/data":{}},"StopSignal":"SIGQUIT","OnBuild":null,
            "Healthcheck":{"Test":["CMD-SHELL","true"],"Interval":30000000000,"Retries":3}},
            "rootfs":{"type":"layers","diff_ids":["sha256:00"]},
            "history":[{"created_by":"x","empty_layer":true},{"comment":"y"}],"unknown":1}"#,
        )
        .unwrap();
        assert_eq!(config.config.cmd, ["sh"]);
        assert_eq!(config.config.exposed_ports, ["80/tcp"]);
        assert_eq!(config.config.volumes, ["/data"]);
        assert_eq!(config.config.healthcheck.as_ref().unwrap().retries, 3);
        assert!(config.history[0].empty_layer);
        let again: ImageConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        for sparse in [
            r#"{}"#,
            r#"{"config":null,"rootfs":null,"history":null}"#,
            r#"{"config":{}}"#,
        ] {
            assert_eq!(
                serde_json::from_str::<ImageConfig>(sparse).unwrap(),
                ImageConfig::default()
            );
        }
        let old: RunConfig = serde_json::from_str(r#"{"Entrypoint":"/init"}"#).unwrap();
        assert_eq!(old.entrypoint, ["/init"]);
    }

    #[test]
    fn the_command_is_put_together_as_docker_does() {
        let config = RunConfig {
            entrypoint: vec!["entry".into(), "point".into()],
            cmd: vec!["cmd".into()],
            ..RunConfig::default()
        };
        let arguments = ["a".into(), "b".into()];
        let command = |config: &RunConfig, entrypoint, arguments| {
            config
                .command(Overrides {
                    entrypoint,
                    arguments,
                })
                .into_iter()
                .map(|word| word.into_string().unwrap())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(command(&config, None, &[]), "entry point cmd");
        assert_eq!(command(&config, None, &arguments), "entry point a b");
        assert_eq!(command(&config, Some("own"), &[]), "own");
        assert_eq!(command(&config, Some("own"), &arguments), "own a b");
        assert_eq!(command(&config, Some(""), &arguments), "a b");
        assert_eq!(command(&RunConfig::default(), None, &[]), "");
        assert_eq!(command(&RunConfig::default(), None, &arguments), "a b");
    }

    #[test]
    fn what_the_user_sets_is_over_what_the_image_sets() {
        let config = RunConfig {
            env: vec!["PATH=/bin".into(), "A=1".into()],
            ..RunConfig::default()
        };
        let all = config.environment(vec!["A=2".into(), "B=3".into(), "B=4".into()]);
        assert_eq!(all, ["PATH=/bin", "A=2", "B=4"]);
    }
}

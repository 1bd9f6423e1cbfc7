//! What a container runs: what the image's configuration says, and what the command line says over it.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;

use anyhow::bail;
use picovm_engine::{ContainerOptions, Image, Overrides};

use crate::arguments::RunOptions;

/// The options of the container that this command line asks for.
pub fn container_options(
    image: &Image,
    options: &RunOptions,
    console_log: Option<File>,
) -> anyhow::Result<ContainerOptions> {
    let whole = image.config()?;
    if !matches!(whole.os.as_str(), "" | "linux") || !matches!(whole.architecture.as_str(), "" | "amd64") {
        bail!(
            "the image {} is for {}/{}, and containers here are linux/amd64: pull it with --platform linux/amd64",
            options.image,
            whole.os,
            whole.architecture
        );
    }
    let config = whole.config;
    let args = config.command(Overrides {
        entrypoint: options.entrypoint.as_deref(),
        arguments: &options.command,
    });
    if args.is_empty() {
        bail!(
            "there is no command to run: the image {} names none, so give one behind it",
            options.image
        );
    }
    Ok(ContainerOptions {
        args,
        env: config.environment(environment(&options.env)),
        workdir: options
            .workdir
            .clone()
            .unwrap_or_else(|| config.working_dir.into()),
        user: options.user.clone().unwrap_or_else(|| config.user.into()),
        hostname: options.hostname.clone(),
        stdin: options.interactive,
        isolate_memory: options.isolate_memory,
        console_log,
        ..ContainerOptions::default()
    })
}

/// `NAME=value` as it is, and `NAME` with its value here if it has one, as Docker has it.
fn environment(arguments: &[OsString]) -> Vec<OsString> {
    arguments
        .iter()
        .filter_map(|argument| {
            if argument.as_bytes().contains(&b'=') {
                return Some(argument.clone());
            }
            let mut pair = argument.clone();
            pair.push("=");
            pair.push(std::env::var_os(argument)?);
            Some(pair)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_takes_its_value_from_here_or_is_left_out() {
        let path = std::env::var("PATH").unwrap();
        let list = environment(&["A=1".into(), "PATH".into(), "PICOVM_NOT_SET".into(), "B=".into()]);
        assert_eq!(
            list,
            ["A=1".into(), OsString::from(format!("PATH={path}")), "B=".into()]
        );
    }
}

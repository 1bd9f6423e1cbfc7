//! `picovm pull`, `load` and `save`.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use picovm_engine::{ImageName, LoadOptions, LoadSource, Store};

use crate::image_arguments::{LoadArguments, SaveOptions};
use crate::pull_arguments::PullArguments;
use crate::view::View;

/// Has `picovm-pull` do it, and becomes that. It is a program of its own because what it is made of, HTTP and TLS, would have
/// every `picovm run` begin later: a program's relocations are made when it starts, used or not.
pub fn pull(arguments: &PullArguments) -> anyhow::Result<ExitCode> {
    let program = puller()?;
    let error = Command::new(&program).args(words(arguments)).exec();
    Err(error).with_context(|| format!("cannot execute {}", program.display()))
}

/// Fetches an image before something else is done with it; what there is to see of it goes to standard error.
pub fn pull_first(name: &str) -> anyhow::Result<()> {
    let program = puller()?;
    let status = Command::new(&program)
        .args(["--", name])
        .stdout(io::stderr())
        .status()
        .with_context(|| format!("cannot execute {}", program.display()))?;
    if !status.success() {
        bail!(
            "the image {name} could not be pulled. `picovm images` lists those that there are; `picovm load` and `picovm image build` \
             make one without a registry"
        );
    }
    Ok(())
}

/// Where `picovm-pull` is.
fn puller() -> anyhow::Result<PathBuf> {
    let beside = std::env::current_exe().context("cannot find out where picovm lies")?;
    let beside = beside.parent().unwrap_or(Path::new("."));
    let places = ["", "../lib/picovm"].map(|place| beside.join(place).join("picovm-pull"));
    if let Some(program) = places.iter().find(|path| path.is_file()) {
        return Ok(program.clone());
    }
    let looked: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
    bail!(
        "there is no picovm-pull, which fetches images (looked at {}): `make build` puts it beside picovm",
        looked.join(", ")
    )
}

/// The words of this command line.
fn words(arguments: &PullArguments) -> Vec<String> {
    let mut words = vec![
        format!("--platform={}", arguments.platform),
        format!("--max-size={}", arguments.limits.max_size),
    ];
    for (given, word) in [
        (arguments.plain_http, "--plain-http"),
        (arguments.quiet, "--quiet"),
    ] {
        if given {
            words.push(word.to_owned());
        }
    }
    // Behind it, nothing is an option.
    words.extend(["--".to_owned(), arguments.name.clone()]);
    words
}

pub fn load(store: &Store, arguments: &LoadArguments) -> anyhow::Result<ExitCode> {
    let source = match &arguments.input {
        Some(path) => LoadSource::Path(path),
        None if io::stdin().is_terminal() => {
            bail!("there is no archive: standard input is a terminal. Give one by -i FILE, or through a pipe")
        }
        None => LoadSource::Stream(Box::new(io::stdin())),
    };
    let options = LoadOptions {
        platform: arguments.platform.clone(),
        limits: arguments.limits.limits(),
    };
    let mut view = View::new(arguments.quiet);
    let loaded = store.load_images(source, &options, &mut |activity| view.show(&activity));
    view.end();
    for image in loaded? {
        match ImageName::parse(&image.name) {
            Ok(name) => println!(
                "Loaded image: {}:{}",
                name.repository(),
                name.tag().unwrap_or_default()
            ),
            Err(_) => println!("Loaded image ID: {}", image.id()),
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub fn save(store: &Store, options: &SaveOptions) -> anyhow::Result<ExitCode> {
    let names: Vec<&str> = options.images.iter().map(String::as_str).collect();
    // What is not there or cannot be saved is said before anything is written over.
    for name in &names {
        store.image(name)?;
    }
    match &options.output {
        Some(path) => {
            let mut file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
            let saved = store.save_images(&names, &mut file).map_err(anyhow::Error::from);
            if let Err(error) = saved.and_then(|()| Ok(file.sync_all()?)) {
                // Half an archive is none. What cannot be removed is no file.
                let _ = std::fs::remove_file(path);
                return Err(error);
            }
        }
        None if io::stdout().is_terminal() => {
            bail!("an archive is not for a terminal: give a file by -o FILE, or a pipe")
        }
        None => {
            let mut stdout = io::stdout().lock();
            store.save_images(&names, &mut stdout)?;
            stdout.flush().context("cannot write the archive")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Pull {
        #[command(flatten)]
        arguments: PullArguments,
    }

    #[test]
    fn what_is_asked_of_pull_is_handed_on_whole() {
        let typed = [
            "pull",
            "-q",
            "--plain-http",
            "--platform",
            "linux/arm64/v8",
            "--max-size",
            "1g",
            "app:1",
        ];
        let parsed = |words: &[String]| Pull::parse_from(words).arguments;
        let first = parsed(&typed.map(str::to_owned));
        let handed: Vec<String> = std::iter::once("pull".to_owned()).chain(words(&first)).collect();
        let second = parsed(&handed);
        assert_eq!(words(&second), words(&first));
        assert_eq!((second.name.as_str(), second.limits.max_size), ("app:1", 1 << 30));
        assert!(second.quiet && second.plain_http && second.platform.variant.is_some());
    }
}

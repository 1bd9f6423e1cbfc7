//! `picovm pull`, `load` and `save`, and what people see of them meanwhile.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use picovm_engine::{
    Digest, ImageActivity, ImageLimits, ImageName, ImageProgress, LoadOptions, LoadSource, PullOptions, Store,
};

use crate::image_arguments::{LimitOptions, LoadArguments, PullArguments, SaveOptions};

impl LimitOptions {
    fn limits(&self) -> ImageLimits {
        ImageLimits {
            bytes: self.max_size,
            ..ImageLimits::default()
        }
    }
}

pub fn pull(store: &Store, arguments: &PullArguments) -> anyhow::Result<ExitCode> {
    let name = ImageName::parse(&arguments.name)?;
    if !arguments.quiet {
        if name.tag() == Some("latest") && !arguments.name.ends_with(":latest") {
            println!("Using default tag: latest");
        }
        println!(
            "{}: Pulling from {}",
            name.tag().or(name.digest()).unwrap_or_default(),
            name.reference().repository()
        );
    }
    let options = PullOptions {
        platform: arguments.platform.clone(),
        limits: arguments.limits.limits(),
        plain_http: arguments.plain_http,
    };
    let mut view = View::new(arguments.quiet);
    let pulled = store.pull_image(&arguments.name, &options, &mut |activity| view.show(&activity));
    view.end();
    let pulled = pulled?;
    if !arguments.quiet {
        println!("Digest: {}", pulled.digest);
        println!(
            "Status: {} for {}",
            if pulled.changed {
                "Downloaded newer image"
            } else {
                "Image is up to date"
            },
            arguments.name
        );
    }
    println!("{}", name.reference().whole());
    Ok(ExitCode::SUCCESS)
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

/// What is shown of a transfer: bars on a terminal, else a line for each layer.
struct View {
    kind: Kind,
}

enum Kind {
    Nothing,
    Lines,
    Bars {
        all: MultiProgress,
        layers: HashMap<Digest, ProgressBar>,
        build: Option<ProgressBar>,
    },
}

impl View {
    fn new(quiet: bool) -> Self {
        let kind = if quiet {
            Kind::Nothing
        } else if io::stderr().is_terminal() {
            Kind::Bars {
                all: MultiProgress::new(),
                layers: HashMap::new(),
                build: None,
            }
        } else {
            Kind::Lines
        };
        Self { kind }
    }

    fn show(&mut self, activity: &ImageActivity) {
        let short = |digest: &Digest| digest.hex().chars().take(12).collect::<String>();
        match (&mut self.kind, activity) {
            (Kind::Nothing, _) | (_, ImageActivity::Resolved(_)) => {}
            (Kind::Lines, ImageActivity::Exists(digest)) => eprintln!("{}: Already exists", short(digest)),
            (Kind::Lines, ImageActivity::Fetched(digest)) => {
                eprintln!("{}: Download complete", short(digest))
            }
            (Kind::Lines, ImageActivity::Fetching { .. }) => {}
            (Kind::Lines, ImageActivity::Building(progress)) => match progress {
                ImageProgress::Layer { number, of } => eprintln!("Unpacking layer {number} of {of}"),
                ImageProgress::Packing { .. } => eprintln!("Writing the file system"),
                _ => {}
            },
            (Kind::Bars { all, layers, .. }, ImageActivity::Exists(digest)) => {
                let bar = layer_bar(all, layers, digest, &short(digest));
                bar.finish_with_message("Already exists");
            }
            (Kind::Bars { all, layers, .. }, ImageActivity::Fetching { digest, done, size }) => {
                let bar = layer_bar(all, layers, digest, &short(digest));
                bar.set_length(*size);
                bar.set_position(*done);
            }
            (Kind::Bars { all, layers, .. }, ImageActivity::Fetched(digest)) => {
                let bar = layer_bar(all, layers, digest, &short(digest));
                bar.finish_with_message("Download complete");
            }
            (Kind::Bars { all, build, .. }, ImageActivity::Building(progress)) => {
                let bar = build.get_or_insert_with(|| {
                    let bar = all.add(ProgressBar::new(0));
                    bar.enable_steady_tick(Duration::from_millis(100));
                    bar
                });
                show_build(bar, *progress);
            }
        }
    }

    fn end(self) {
        if let Kind::Bars { all, layers, build } = self.kind {
            for bar in layers.values() {
                bar.abandon();
            }
            if let Some(bar) = build {
                bar.finish_and_clear();
            }
            drop(all);
        }
    }
}

fn layer_bar<'a>(
    all: &MultiProgress,
    layers: &'a mut HashMap<Digest, ProgressBar>,
    digest: &Digest,
    name: &str,
) -> &'a ProgressBar {
    layers.entry(digest.clone()).or_insert_with(|| {
        let bar = all.add(ProgressBar::new(0));
        bar.set_style(style("{prefix}: {msg:18} {bar:40} {bytes}/{total_bytes}"));
        bar.set_prefix(name.to_owned());
        bar.set_message("Downloading");
        bar
    })
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Shows how far the building of an image is.
pub fn show_build(bar: &ProgressBar, progress: ImageProgress) {
    match progress {
        ImageProgress::Unpacking { read, size, .. } => {
            if bar.length() != Some(size) {
                bar.set_length(size);
                bar.set_style(style("{msg} {wide_bar} {bytes}/{total_bytes} {eta}"));
            }
            bar.set_position(read);
        }
        ImageProgress::Layer { number, of } => bar.set_message(format!("unpacking layer {number} of {of}")),
        other => {
            let what = match other {
                ImageProgress::Packing { .. } => "writing the file system",
                ImageProgress::Digesting { .. } => "computing the digest",
                _ => "looking through the source",
            };
            bar.set_style(style("{spinner} {msg} ({elapsed})"));
            bar.set_message(what);
        }
    }
}

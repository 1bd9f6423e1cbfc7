//! What people see while images are pulled, loaded and built.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use picovm_engine::{Digest, ImageActivity, ImageProgress};

/// What is shown of a transfer: bars on a terminal, else a line for each layer.
pub struct View {
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
    pub fn new(quiet: bool) -> Self {
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

    pub fn show(&mut self, activity: &ImageActivity) {
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
                bar.set_style(style("{prefix}: {msg}"));
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

    pub fn end(self) {
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
        bar.set_style(style("{prefix}: {msg:17} {wide_bar} {bytes}/{total_bytes}"));
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
        ImageProgress::Reading { read, size, .. } | ImageProgress::Unpacking { read, size, .. }
            if size > 0 =>
        {
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
                ImageProgress::Reading { .. } => "reading the source",
                _ => "looking through the source",
            };
            bar.set_style(style("{spinner} {msg} ({elapsed})"));
            bar.set_message(what);
        }
    }
}

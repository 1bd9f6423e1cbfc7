//! `picovm image`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use picovm_engine::{ImageProgress, Store};

use crate::arguments::ImageCommand;
use crate::output;

pub fn image(command: &ImageCommand) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    match command {
        ImageCommand::Build { name, source } => {
            let start = Instant::now();
            let bar = ProgressBar::new(0);
            bar.enable_steady_tick(Duration::from_millis(100));
            let built = store.build_image(name, source, &mut |progress| show(&bar, progress));
            bar.finish_and_clear();
            let image = built?;
            eprintln!(
                "picovm: built image {name} in {:.1} s: {}, {} entries",
                start.elapsed().as_secs_f64(),
                output::size(image.bytes),
                image.entries
            );
            println!("{}", image.digest);
        }
        ImageCommand::Ls { json } => {
            let images = store.images()?;
            if *json {
                println!("{}", serde_json::to_string_pretty(&images)?);
            } else {
                let rows: Vec<Vec<String>> = images
                    .iter()
                    .map(|image| {
                        vec![
                            image.name.clone(),
                            image.digest.chars().take(12).collect(),
                            output::size(image.bytes),
                            image.entries.to_string(),
                            output::age(image.created),
                        ]
                    })
                    .collect();
                output::table(&["NAME", "DIGEST", "SIZE", "ENTRIES", "BUILT"], &rows);
            }
        }
        ImageCommand::Rm { names } => {
            for name in names {
                store.remove_image(name, false)?;
                println!("{name}");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(bar: &ProgressBar, progress: ImageProgress) {
    let style = |template: &str| {
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
    };
    match progress {
        ImageProgress::Unpacking { read, size, .. } => {
            if bar.length() != Some(size) {
                bar.set_length(size);
                bar.set_style(style("unpacking {wide_bar} {bytes}/{total_bytes} {eta}"));
            }
            bar.set_position(read);
        }
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

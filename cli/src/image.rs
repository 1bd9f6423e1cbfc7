//! `picovm image`, and the commands that are the same without that word.

use std::collections::BTreeSet;
use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use picovm_engine::{EngineError, Store};

use crate::image_arguments::{ImageCommand, PruneOptions, RemoveOptions};
use crate::{image_list, output, transfer, view};

pub fn image(command: &ImageCommand) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    match command {
        ImageCommand::Build { name, source } => {
            let start = Instant::now();
            let bar = ProgressBar::new(0);
            bar.set_message("unpacking");
            bar.enable_steady_tick(Duration::from_millis(100));
            let built = store.build_image(name, source, &mut |progress| view::show_build(&bar, progress));
            bar.finish_and_clear();
            let image = built?;
            eprintln!(
                "picovm: built image {name} in {:.1} s: {}, {} entries",
                start.elapsed().as_secs_f64(),
                output::size(image.bytes),
                image.entries
            );
            println!("{}", image.digest);
            Ok(ExitCode::SUCCESS)
        }
        ImageCommand::Ls(options) => image_list::list(&store, options),
        ImageCommand::Rm(options) => remove(&store, options),
        ImageCommand::Pull(arguments) => transfer::pull(arguments),
        ImageCommand::Load(arguments) => transfer::load(&store, arguments),
        ImageCommand::Save(options) => transfer::save(&store, options),
        ImageCommand::Tag(options) => {
            store.tag_image(&options.image, &options.name)?;
            Ok(ExitCode::SUCCESS)
        }
        ImageCommand::Inspect(options) => image_list::inspect(&store, options),
        ImageCommand::Prune(options) => prune(&store, options),
    }
}

/// Removes what can be; the others are told.
fn remove(store: &Store, options: &RemoveOptions) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for name in &options.images {
        match store.remove_image(name, options.force) {
            Ok(removed) => {
                for name in removed.untagged {
                    println!("Untagged: {name}");
                }
                if let Some(id) = removed.deleted {
                    println!("Deleted: {id}");
                }
                if removed.left {
                    eprintln!(
                        "picovm: images are being added now, so the content of {name} is still there: `picovm prune` removes it"
                    );
                }
            }
            Err(EngineError::NoImage { .. }) if options.force => {}
            Err(error) => {
                eprintln!("picovm: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

fn prune(store: &Store, options: &PruneOptions) -> anyhow::Result<ExitCode> {
    if !options.force && io::stdin().is_terminal() {
        let what = if options.all {
            "all images"
        } else {
            "all images without a name"
        };
        print!("This removes {what}, and content that no image needs. Go on? [y/N] ");
        io::stdout().flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let collected = store.prune(options.all, &BTreeSet::new())?;
    if !collected.images.is_empty() {
        println!("Deleted images:");
        for id in &collected.images {
            println!("{id}");
        }
        println!();
    }
    println!("Total reclaimed space: {}", output::docker_size(collected.bytes));
    Ok(ExitCode::SUCCESS)
}

//! `picovm image`, and the commands that are the same without that word.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use indicatif::ProgressBar;
use picovm_engine::containers::Record;
use picovm_engine::{EngineError, Image, Removed, Store};

use crate::image_arguments::{ImageCommand, PruneOptions, RemoveOptions};
use crate::{container, image_list, output, transfer, view};

pub fn image(command: &ImageCommand) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    match command {
        ImageCommand::Build { name, source } => {
            let start = Instant::now();
            let bar = ProgressBar::new(0);
            bar.set_message("reading");
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
            println!("{}", image.id());
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
    let containers = store.containers()?.list()?;
    for name in &options.images {
        match remove_one(store, name, options.force, &containers) {
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
            Err(error)
                if options.force && matches!(error.downcast_ref(), Some(EngineError::NoImage { .. })) => {}
            Err(error) => {
                eprintln!("picovm: {}", output::sentence(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// Removes an image, or only its name if a container needs its files.
fn remove_one(store: &Store, name: &str, force: bool, containers: &[Record]) -> anyhow::Result<Removed> {
    // One whose file is missing is needed by nobody.
    let Ok(image) = store.image(name) else {
        return Ok(store.remove_image(name, force)?);
    };
    let Some(user) = containers
        .iter()
        .find(|record| record.config.image_digest == image.digest)
    else {
        return Ok(store.remove_image(name, force)?);
    };
    // Another name or another image keeps the files.
    let keeps = |other: &Image| {
        other.digest == image.digest && (&other.name, other.id()) != (&image.name, image.id())
    };
    if !force && (image.name.is_empty() || !store.images()?.iter().any(keeps)) {
        bail!(
            "the image {name} is that of container {} ({}): remove that first with `picovm rm {}`, or only take the name away with \
             --force",
            user.name,
            user.config.short_id(),
            user.name
        );
    }
    if image.name.is_empty() {
        bail!(
            "the image {name} is that of container {} ({}) and has no name that could be taken away: remove the container first",
            user.name,
            user.config.short_id()
        );
    }
    Ok(store.untag_image(&image.name)?)
}

fn prune(store: &Store, options: &PruneOptions) -> anyhow::Result<ExitCode> {
    let what = if options.all {
        "all images that no container needs"
    } else {
        "all images without a name"
    };
    if !container::confirmed(
        options.force,
        &format!("This removes {what}, and content that no image needs."),
    )? {
        return Ok(ExitCode::SUCCESS);
    }
    let used = store
        .containers()?
        .list()?
        .into_iter()
        .map(|record| record.config.image_digest)
        .collect();
    let collected = store.prune(options.all, &used)?;
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

//! `picovm-pull`: what `picovm pull` becomes. It is called as that is.

mod pull_arguments;
mod view;

use std::process::ExitCode;

use clap::Parser;
use picovm_engine::{EngineError, ImageName, PullOptions, Store};

use pull_arguments::PullArguments;
use view::View;

/// Fetch an image from a registry
#[derive(Parser)]
#[command(name = "picovm-pull", version)]
struct Cli {
    #[command(flatten)]
    arguments: PullArguments,
}

fn main() -> ExitCode {
    match pull(&Cli::parse().arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("picovm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn pull(arguments: &PullArguments) -> Result<(), EngineError> {
    let store = Store::open_default()?;
    let name = ImageName::parse(&arguments.name)?;
    if !arguments.quiet {
        if name.tag() == Some("latest") && !arguments.name.ends_with(":latest") {
            println!("Using default tag: latest");
        }
        println!(
            "{}: Pulling from {}",
            name.tag().or(name.digest()).unwrap_or_default(),
            name.path()
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
    println!("{}", name.whole());
    Ok(())
}

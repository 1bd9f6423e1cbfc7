//! `picovm pool`.

use std::process::ExitCode;

use picovm_engine::containers::machine_memory;
use picovm_engine::{Parking, StandingPool, Store, TemplateSpec};

use crate::arguments::PoolCommand;
use crate::output;

pub fn pool(command: &PoolCommand) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    let pools = store.pools();
    match command {
        PoolCommand::Start {
            size,
            bare,
            memory,
            cpus,
            image,
        } => {
            let spec = TemplateSpec {
                image: store.image(image)?,
                memory_mib: memory.map_or(TemplateSpec::DEFAULT_MEMORY_MIB, machine_memory),
                vcpus: *cpus,
            };
            let parking = if *bare { Parking::Bare } else { Parking::Prefaulted };
            let started = pools.start(&spec, *size as usize, parking, &mut |progress| {
                eprintln!("picovm: {progress}");
            })?;
            println!("{}", started.id);
        }
        PoolCommand::Ls { json, quiet } => {
            let list = pools.list()?;
            if *json {
                println!("{}", serde_json::to_string_pretty(&list)?);
            } else if *quiet {
                list.iter().for_each(|pool| println!("{}", pool.id));
            } else {
                let headings = [
                    "ID", "IMAGE", "MEMORY", "VCPUS", "PARKED", "TAKEN", "CREATED", "ENDS",
                ];
                output::table(&headings, &list.iter().map(row).collect::<Vec<_>>());
            }
        }
        PoolCommand::Stop { all, pools: names } => {
            let mut meant = if *all { pools.list()? } else { Vec::new() };
            for name in names {
                meant.extend(pools.find(name)?);
            }
            for pool in meant {
                pools.stop(&pool.id)?;
                println!("{}", pool.id);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(pool: &StandingPool) -> Vec<String> {
    vec![
        pool.id.clone(),
        pool.image.clone(),
        output::size(pool.memory_mib << 20),
        pool.vcpus.to_string(),
        format!("{} of {}", pool.parked, pool.size),
        pool.taken.to_string(),
        output::since(pool.created),
        match pool.idle_seconds {
            Some(seconds) => format!("unused for {seconds} s"),
            None => "when stopped".to_owned(),
        },
    ]
}

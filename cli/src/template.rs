//! `picovm template`.

use std::process::ExitCode;

use anyhow::bail;
use picovm_engine::{Confinement, Store, StoredTemplate, TemplateSpec, Until, WarmSpec};
use picovm_vmm::Template;
use serde_json::json;

use picovm_engine::containers::machine_memory;

use crate::arguments::{TemplateCommand, WarmOptions};
use crate::{container, output};

pub fn template(command: &TemplateCommand) -> anyhow::Result<ExitCode> {
    let store = Store::open_default()?;
    match command {
        TemplateCommand::Build { memory, cpus, image } => {
            let spec = TemplateSpec {
                image: store.image(image)?,
                memory_mib: memory.map_or(TemplateSpec::DEFAULT_MEMORY_MIB, machine_memory),
                vcpus: *cpus,
            };
            let template = store.template(&spec, &mut |progress| eprintln!("picovm: {progress}"))?;
            if let Some(key) = template.path().file_name() {
                println!("{}", key.display());
            }
        }
        TemplateCommand::Warm(options) => warm(&store, options)?,
        TemplateCommand::Ls { json } => {
            let templates = store.templates()?;
            if *json {
                let list: Vec<serde_json::Value> = templates.iter().map(description).collect();
                println!("{}", serde_json::to_string_pretty(&list)?);
            } else {
                let rows: Vec<Vec<String>> = templates.iter().map(row).collect();
                output::table(
                    &["ID", "NAME", "DEPTH", "IMAGE", "MEMORY", "VCPUS", "DATA", "BUILT"],
                    &rows,
                );
            }
        }
        TemplateCommand::Inspect { id } => {
            let found = store.find_template(id)?;
            let opened = Template::open(&found.path)?;
            opened.verify_memory()?;
            println!("{}", serde_json::to_string_pretty(&description(&found))?);
        }
        TemplateCommand::Rm { ids } => {
            for id in ids {
                println!("{}", store.remove_template(id)?.key);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(template: &StoredTemplate) -> Vec<String> {
    match &template.metadata {
        Ok(metadata) => vec![
            template.key.clone(),
            template.name().unwrap_or_default().to_owned(),
            template.depth().to_owned(),
            template.image().unwrap_or("(base)").to_owned(),
            output::size(metadata.memory_mib << 20),
            metadata.vcpus.to_string(),
            output::size(metadata.memory_data_bytes),
            output::age(metadata.created),
        ],
        Err(error) => vec![
            template.key.clone(),
            String::new(),
            String::new(),
            format!("({error})"),
        ],
    }
}

fn warm(store: &Store, options: &WarmOptions) -> anyhow::Result<()> {
    let image = store.image(&options.image)?;
    let container = container::application(&image, options)?;
    let until = match (&options.until_log, options.until_port, &options.until_exec) {
        (Some(pattern), ..) => Until::Log(pattern.clone()),
        (None, Some(port), _) => Until::Port(port),
        (None, None, Some(line)) => {
            Until::Exec(["sh", "-c", line].map(|word| word.as_bytes().to_vec()).to_vec())
        }
        (None, None, None) => bail!("one of --until-log, --until-port and --until-exec says when to freeze"),
    };
    let spec = WarmSpec {
        template: TemplateSpec {
            image,
            memory_mib: container.memory_mib,
            vcpus: container.vcpus,
        },
        container,
        until,
        timeout: options.timeout,
        name: options.name.clone(),
    };
    let template = store.warm_template(&spec, Confinement::Jailed, &mut |progress| {
        eprintln!("picovm: {progress}");
    })?;
    if let Some(key) = template.path().file_name() {
        println!("{}", key.display());
    }
    Ok(())
}

fn description(template: &StoredTemplate) -> serde_json::Value {
    match &template.metadata {
        Ok(metadata) => {
            let mut described = json!({
                "id": template.key,
                "depth": template.depth(),
                "path": template.path,
                "metadata": metadata,
            });
            if let (Ok(container), Some(fields)) = (template.container(), described.as_object_mut()) {
                fields.insert("name".into(), json!(template.name()));
                fields.insert("command".into(), json!(container.args));
            }
            described
        }
        Err(error) => json!({ "id": template.key, "path": template.path, "error": error.to_string() }),
    }
}

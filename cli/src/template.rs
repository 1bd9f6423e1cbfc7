//! `picovm template`.

use std::process::ExitCode;

use picovm_engine::{Store, StoredTemplate, TemplateSpec};
use picovm_vmm::Template;
use serde_json::json;

use picovm_engine::containers::machine_memory;

use crate::arguments::TemplateCommand;
use crate::output;

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
        TemplateCommand::Ls { json } => {
            let templates = store.templates()?;
            if *json {
                let list: Vec<serde_json::Value> = templates.iter().map(description).collect();
                println!("{}", serde_json::to_string_pretty(&list)?);
            } else {
                let rows: Vec<Vec<String>> = templates.iter().map(row).collect();
                output::table(&["ID", "IMAGE", "MEMORY", "VCPUS", "DATA", "BUILT"], &rows);
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
            template.image().unwrap_or("(base)").to_owned(),
            output::size(metadata.memory_mib << 20),
            metadata.vcpus.to_string(),
            output::size(metadata.memory_data_bytes),
            output::age(metadata.created),
        ],
        Err(error) => vec![template.key.clone(), format!("({error})")],
    }
}

fn description(template: &StoredTemplate) -> serde_json::Value {
    match &template.metadata {
        Ok(metadata) => json!({ "id": template.key, "path": template.path, "metadata": metadata }),
        Err(error) => json!({ "id": template.key, "path": template.path, "error": error.to_string() }),
    }
}

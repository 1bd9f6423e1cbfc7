//! End-to-end tests: a real kernel, a real Debian, the real command. They need KVM; `make test` runs them in the
//! emulated host where there is none.

mod bench;
mod clones;
mod doctor;
mod faults;
mod jailed;
mod machine;
mod makers;
mod pool;
mod run;
mod separate;
mod templates;

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use picovm_engine::TemplateSpec;
use picovm_tests::OwnStore;
use picovm_vmm::Template;

/// The store that most tests share, so that its templates are built once.
fn store() -> &'static OwnStore {
    static STORE: OnceLock<OwnStore> = OnceLock::new();
    STORE.get_or_init(|| OwnStore::new().expect("a store with the image"))
}

/// The template that most tests share.
fn template() -> &'static Template {
    static TEMPLATE: OnceLock<Template> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let spec = TemplateSpec::new(store().image().expect("the image"));
        store().store.template(&spec, &mut |_| {}).expect("a template")
    })
}

/// `picovm ARGUMENTS...` on the shared store.
fn picovm(arguments: &[&str]) -> Command {
    let mut command = store().picovm();
    command.args(arguments).stdin(Stdio::null());
    command
}

/// `picovm run debian sh -c SCRIPT` on the shared store.
fn shell(script: &str) -> Output {
    template();
    picovm(&["run", "--rm", "debian", "sh", "-c", script])
        .output()
        .expect("picovm starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim_end().to_owned()
}

/// Kernel and initramfs of the guests.
fn guest() -> picovm_engine::GuestFiles {
    picovm_engine::GuestFiles::find().expect("the guest's files beside the programs")
}

/// The image's file.
fn image_file() -> PathBuf {
    store().image().expect("the image").file
}

//! Each command of docs/images.md, in its order.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::fixtures::App;
use crate::registry::Registry;
use crate::{Place, stderr};

/// The registry of the page.
const REGISTRY: &str = "localhost:5000";

/// Lines of a page that begin with `$ ` in a block, without that.
fn commands(page: &str) -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if inside && let Some(command) = line.strip_prefix("$ ") {
            commands.push(command.to_owned());
        }
    }
    commands
}

#[test]
fn every_command_of_the_page_about_images_works() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/images.md");
    let page = std::fs::read_to_string(page).expect("the page");
    let commands = commands(&page);
    assert!(commands.len() > 15, "{commands:?}");

    let (registry, app) = (Registry::start(), App::new());
    let place = Place::new();
    registry.fill(&app.source(), "team/app:1", &[]);
    std::fs::create_dir_all(place.path("work/rootfs/bin")).expect("a directory");
    std::fs::copy("/bin/busybox", place.path("work/rootfs/bin/busybox")).expect("busybox");
    std::fs::copy(&app.archive, place.path("work/app.tar")).expect("the archive");
    std::fs::create_dir_all(place.path("docker")).expect("a directory");
    let path = std::env::var_os("PATH").expect("PATH");
    let mut path: Vec<PathBuf> = std::env::split_paths(&path).collect();
    path.insert(
        0,
        picovm_tests::binary().parent().expect("a directory").to_owned(),
    );
    let host = registry.name("");
    for command in commands {
        let typed = command.replace(REGISTRY, host.trim_end_matches('/'));
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &typed])
            .current_dir(place.path("work"))
            .env("PICOVM_HOME", place.path("store"))
            .env("PICOVM_POOL_IDLE", "0")
            .env("DOCKER_CONFIG", place.path("docker"))
            .env("PATH", std::env::join_paths(&path).expect("a path"))
            .stdin(Stdio::null())
            .output()
            .expect("bash starts");
        assert!(output.status.success(), "{command}: {}", stderr(&output));
    }
}

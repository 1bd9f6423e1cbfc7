//! OCI runtimes, which run containers as processes of the host's kernel: the same program, root file system and measure.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// A runtime that is installed, with a bundle for it.
pub struct Runtime {
    program: PathBuf,
    bundle: PathBuf,
    /// Each run needs a name of its own.
    runs: u32,
}

impl Runtime {
    /// Looks for `name` on `PATH` and makes a bundle in `directory` that runs `command` on the root file system `root`;
    /// `None` if it is not installed.
    pub fn find(
        name: &str,
        directory: &Path,
        root: &Path,
        command: [&str; 2],
    ) -> anyhow::Result<Option<Self>> {
        let Some(program) = std::env::var_os("PATH")
            .iter()
            .flat_map(std::env::split_paths)
            .map(|path| path.join(name))
            .find(|path| path.is_file())
        else {
            return Ok(None);
        };
        let bundle = directory.join(format!("bundle-{name}"));
        std::fs::create_dir(&bundle).with_context(|| format!("cannot create {}", bundle.display()))?;
        let status = Command::new(&program)
            .arg("spec")
            .current_dir(&bundle)
            .stdout(Stdio::null())
            .status()
            .with_context(|| format!("cannot run {}", program.display()))?;
        if !status.success() {
            bail!("{} spec ended with {status}", program.display());
        }
        // What it proposes, without a terminal.
        let path = bundle.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = command.to_vec().into();
        config["root"] = serde_json::json!({ "path": root, "readonly": false });
        std::fs::write(&path, config.to_string())?;
        Ok(Some(Self {
            program,
            bundle,
            runs: 0,
        }))
    }

    /// The command that runs the container once more.
    pub fn run(&mut self) -> Command {
        self.runs += 1;
        let mut command = Command::new(&self.program);
        command
            .args([OsStr::new("run"), OsStr::new("--bundle"), self.bundle.as_os_str()])
            .arg(format!("picovm-bench-{}-{}", std::process::id(), self.runs));
        command
    }
}

//! stub
use std::process::ExitCode;
pub fn doctor(_json: bool) -> anyhow::Result<ExitCode> { Ok(ExitCode::SUCCESS) }

//! `picovm-initramfs INIT OUT`: packs the program INIT into the initramfs OUT, for the build. OUT is left alone, with
//! its time, if it would come out the same; otherwise it is replaced at once.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tempfile::NamedTempFile;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [init, out] = arguments.as_slice() else {
        eprintln!("usage: picovm-initramfs INIT OUT");
        return ExitCode::from(2);
    };
    match pack(Path::new(init), Path::new(out)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("picovm-initramfs: {why}");
            ExitCode::FAILURE
        }
    }
}

fn pack(init: &Path, out: &Path) -> Result<(), String> {
    let archive = picovm_rootfs::initramfs::build(init).map_err(|error| error.to_string())?;
    if fs::read(out).is_ok_and(|present| present == archive) {
        return Ok(());
    }
    replace(out, &archive).map_err(|error| format!("write {}: {error}", out.display()))
}

/// Writes a new file beside `out` and renames it: whoever reads `out` finds the old bytes or the new ones.
fn replace(out: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;

    let directory = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let mut file = NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(0o644))?;
    file.persist(out)?;
    Ok(())
}

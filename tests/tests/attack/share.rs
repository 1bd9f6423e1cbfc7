//! Attacks on the share server of a container that has a directory of the host.

use std::fs;
use std::time::Duration;

use crate::harness::{GOES_ON, Guest, Input, Output, attack, run};

#[test]
fn requests_that_no_kernel_makes() {
    let host = tempfile::tempdir().unwrap();
    let inner = host.path().join("inner");
    let secret = host.path().join("secret");
    fs::create_dir(&inner).unwrap();
    fs::write(&secret, "as it was").unwrap();
    let volume = format!("{}:/data", inner.display());
    let ended = attack(
        Guest::HostileInit,
        &["-v", &volume],
        &["fuse", "1"],
        Input::Null,
        Output::Kept,
        Some(Duration::from_secs(60)),
    );
    assert_eq!(ended.status.code(), Some(GOES_ON), "{ended:?}");
    // Nothing beside the directory was touched, and another container that has it goes on.
    assert_eq!(fs::read_to_string(&secret).unwrap(), "as it was");
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 2);
    let script = "echo fine > /data/fine; cat /data/fine";
    let good = run(Guest::Container, &["-v", &volume], &["sh", "-ec", script])
        .output()
        .unwrap();
    assert!(good.status.success(), "{good:?}");
    assert_eq!(good.stdout, b"fine\n");
}

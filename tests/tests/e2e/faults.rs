//! KVM that is not there or not allowed, guests' files that are missing.

use std::process::Command;

use crate::{picovm, stderr, store, template};

/// Runs `picovm run debian true` after a preparation in a mount namespace of its own.
fn with(preparation: &str) -> std::process::Output {
    template();
    let script = format!("{preparation} && exec \"$0\" run debian true");
    Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .arg(picovm_tests::binary())
        .env("PICOVM_HOME", store().path())
        .env("PICOVM_POOL_IDLE", "0")
        .output()
        .unwrap()
}

#[test]
fn without_kvm_the_error_says_what_to_load() {
    let output = with("mount -t tmpfs none /dev");
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr(&output).contains("cannot open /dev/kvm"),
        "{}",
        stderr(&output)
    );
    assert!(
        stderr(&output).contains("load kvm_intel or kvm_amd"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_user_who_may_not_use_kvm_is_told_so() {
    // Everything that another user needs, where it can read it.
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir_all(at("guest")).unwrap();
    std::fs::create_dir_all(at("tree/bin")).unwrap();
    let binary = at("picovm");
    std::fs::copy(picovm_tests::binary(), &binary).unwrap();
    std::fs::copy(picovm_tests::binary(), at("tree/bin/true")).unwrap();
    std::fs::copy(crate::guest().kernel, at("guest/vmlinux")).unwrap();
    std::fs::copy(crate::guest().initramfs, at("guest/initramfs.cpio")).unwrap();
    let built = picovm_tests::picovm_in(&at("store"))
        .args(["image", "build", "tiny"])
        .arg(at("tree"))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", stderr(&built));

    let script = "chmod -R go+rwX \"$PICOVM_HOME/..\" && chmod 600 \"$KVM\" && mount --bind \"$KVM\" /dev/kvm && \
                  exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$0\" run tiny true";
    // Stands in for the device: what counts is that it may not be opened.
    let forbidden = at("forbidden");
    std::fs::write(&forbidden, "").unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(&binary)
        .env("PICOVM_HOME", at("store"))
        .env("PICOVM_POOL_IDLE", "0")
        .env("KVM", &forbidden)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("may not use KVM"), "{}", stderr(&output));
}

#[test]
fn missing_guest_files_are_named_with_what_makes_them() {
    let output = picovm(&["run", "debian", "true"])
        .env("PICOVM_GUEST", "/nowhere")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr(&output).contains("/nowhere/vmlinux") && stderr(&output).contains("make build"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn an_image_whose_file_is_gone_is_told_as_such() {
    let own = picovm_tests::OwnStore::new().unwrap();
    std::fs::remove_file(own.image().unwrap().file).unwrap();
    let output = own.picovm().args(["run", "debian", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("is missing"), "{}", stderr(&output));
}

#[test]
fn an_image_without_a_shell_still_runs_what_it_has() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    std::fs::create_dir_all(tree.join("bin")).unwrap();
    std::fs::copy(picovm_tests::binary(), tree.join("bin/picovm")).unwrap();
    let home = directory.path().join("store");
    let built = picovm_tests::picovm_in(&home)
        .args(["image", "build", "tiny"])
        .arg(&tree)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", stderr(&built));
    let output = picovm_tests::picovm_in(&home)
        .args(["run", "tiny", "picovm", "--version"])
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&output.stdout).starts_with("picovm "),
        "{}",
        stderr(&output)
    );
    let output = picovm_tests::picovm_in(&home)
        .args(["run", "tiny", "sh"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(127));
}

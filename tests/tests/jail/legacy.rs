//! Cgroups of version 1, for the controllers that a host has only there.

use std::path::Path;
use std::process::Command;

use crate::{alone, jailer, output, with_shell};

/// A hierarchy of version 1 with one controller, for as long as it lives.
struct Legacy(tempfile::TempDir);

impl Legacy {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "cgroup", "-o", "pids", "pids"])
            .arg(place.path())
            .output()
            .unwrap();
        assert!(mounted.status.success(), "{}", crate::text(&mounted.stderr));
        Self(place)
    }
}

impl Drop for Legacy {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// Whether version 2 has the controller `pids`, to hand down.
fn hand_down(wanted: &str) {
    let control = Path::new("/sys/fs/cgroup/cgroup.subtree_control");
    let _ = std::fs::write(control, wanted);
}

#[test]
fn a_controller_of_version_1_limits_a_jail() {
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    hand_down("-pids");
    let told = {
        let legacy = Legacy::new();
        let policy = with_shell(r#", "cgroup": { "pids": 8, "memory": 67108864 }"#);
        let bomb = "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 5 & done; echo all";
        let (_, out, err) = output(jailer(directory.path(), &policy, &["--", "/bin/sh", "-c", bomb]));
        assert!(
            !legacy.0.path().join("picovm-jail").exists(),
            "its cgroup is left"
        );
        (out, err)
    };
    hand_down("+pids");
    assert!(told.1.contains("fork"), "{told:?}");
}

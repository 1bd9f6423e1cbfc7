//! What programs expect of a file system, of directories of the host. More is asked of it by `docs/programs.md`.

use std::process::Command;

use crate::told;

fn shared(script: &str) -> String {
    let host = tempfile::tempdir().expect("a directory");
    let volume = format!("{}:/data", host.path().display());
    told(&["run", "--rm", "-v", &volume, "debian", "sh", "-ec", script])
}

#[test]
fn hard_links_are_made_whoever_was_served_before() {
    // A thread that has acted for a user must be able to make links afterwards.
    let script = "cd /data; chmod 1777 .; i=0; while [ $i -lt 12 ]; do i=$((i+1)); \
                  su nobody -s /bin/sh -c \"mkdir d$i; : > f$i\"; ln f$i l$i; mkfifo p$i; ln p$i q$i; ln -s x s$i; \
                  ln -P s$i t$i; test $(stat -c %h f$i) = 2; test f$i -ef l$i; mv l$i d$i/m; rm f$i; cat d$i/m; done; \
                  stat -c %h d1/m q1 t1 | tr '\\n' ' '";
    assert_eq!(shared(script), "1 2 2");
}

/// Unmounts when it is dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(at: std::path::PathBuf) -> Self {
        std::fs::create_dir(&at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "tmpfs"])
            .arg(&at)
            .status();
        assert!(mounted.unwrap().success());
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// The host has several file systems in what is shared, and each of them a file with the same number.
#[test]
fn files_of_different_file_systems_are_different_files() {
    use std::os::unix::fs::MetadataExt;
    let host = tempfile::tempdir().unwrap();
    let mounts = ["one", "two"].map(|name| Mounted::tmpfs(host.path().join(name)));
    let [one, two] = mounts.each_ref().map(|mount| mount.0.join("file"));
    std::fs::write(&one, "first").unwrap();
    std::fs::write(&two, "second").unwrap();
    assert_eq!(one.metadata().unwrap().ino(), two.metadata().unwrap().ino());
    let volume = format!("{}:/data", host.path().display());
    let again = format!("{}:/again", host.path().join("one").display());
    let script = "cd /data; ! test one/file -ef two/file; cp one/file two/file; cat two/file; test one/file -ef /again/file; \
                  ls -i one | cut -d' ' -f1 > a; stat -c %i one/file | cmp - a; ls -1Ui two | cut -d' ' -f1 > a; \
                  stat -c %i two/file | cmp - a";
    let said = told(&[
        "run", "--rm", "-v", &volume, "-v", &again, "debian", "sh", "-ec", script,
    ]);
    assert_eq!(said, "first");
    assert_eq!(std::fs::read_to_string(&two).unwrap(), "first");
}

#[test]
fn a_file_without_a_name_goes_on() {
    let script = "cd /data; exec 3<>file; echo one >&3; rm file; echo two >&3; cat /proc/self/fd/3; chmod 600 /proc/self/fd/3; \
                  truncate -s 4 /proc/self/fd/3; stat -Lc '%s %a %h' /proc/self/fd/3; echo new > file; cat /proc/self/fd/3; \
                  exec 3>&-; cat file";
    assert_eq!(shared(script), "one\ntwo\n4 600 0\none\nnew");
}

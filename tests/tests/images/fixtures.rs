//! Images to bring into a registry: their layers are made by GNU tar, and they are what `docker save` writes.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use picovm_engine::Digest;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{stderr, tool};

/// Bytes in large files of the image, which no compression makes small.
pub const LARGE: usize = 3 << 20;

/// A file capability: `CAP_NET_BIND_SERVICE`, effective and permitted (`struct vfs_cap_data`, version 2).
pub const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An archive of the files of a directory.
pub fn layer(directory: &Path, options: &[&str]) -> Vec<u8> {
    let made = Command::new("tar")
        .arg("-C")
        .arg(directory)
        .args(["--xattrs", "--xattrs-include=*", "--format=posix", "-cS"])
        .args(options)
        .arg(".")
        .output()
        .expect("tar starts");
    assert!(made.status.success(), "{}", stderr(&made));
    made.stdout
}

/// What `docker save` writes of one image.
pub fn docker_archive(layers: &[Vec<u8>], config: Value, tag: Option<&str>) -> Vec<u8> {
    let mut whole = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "2024-05-06T07:08:09Z",
        "rootfs": {
            "type": "layers",
            "diff_ids": layers.iter().map(|layer| Digest::of(layer).to_string()).collect::<Vec<_>>(),
        },
        "history": layers.iter().map(|_| json!({"created_by": "test"})).collect::<Vec<_>>(),
    });
    whole["config"] = config;
    let config = whole.to_string().into_bytes();
    let names: Vec<String> = (0..layers.len())
        .map(|number| format!("{number}/layer.tar"))
        .collect();
    let manifest = json!([{
        "Config": "config.json",
        "RepoTags": tag.into_iter().collect::<Vec<_>>(),
        "Layers": names,
    }])
    .to_string()
    .into_bytes();
    let mut files: Vec<(&str, &[u8])> = vec![("config.json", &config), ("manifest.json", &manifest)];
    files.extend(
        names
            .iter()
            .map(String::as_str)
            .zip(layers.iter().map(Vec::as_slice)),
    );
    archive(&files)
}

/// A tar archive.
pub fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        builder
            .append_data(&mut header, name, *content)
            .expect("an entry");
    }
    builder.into_inner().expect("an archive")
}

/// Bytes that no compression makes small, the same each time.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// An image of two layers with all that a layer can have.
pub struct App {
    directory: TempDir,
    /// What a container of it should see.
    pub expected: PathBuf,
    /// The archive.
    pub archive: PathBuf,
}

impl App {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("lower")).expect("a directory");
        fs::create_dir_all(at("upper")).expect("a directory");
        lower(&at("lower"));
        upper(&at("upper"));
        let layers = [layer(&at("lower"), &[]), layer(&at("upper"), &[])];

        // The same by other means: one over the other, and then what the marks say.
        let expected = at("expected");
        fs::create_dir(&expected).expect("a directory");
        for name in ["lower", "upper"] {
            if name == "upper" {
                for gone in ["etc/gone", "var/cache"] {
                    let path = expected.join(gone);
                    let removed = if path.is_dir() {
                        fs::remove_dir_all(path)
                    } else {
                        fs::remove_file(path)
                    };
                    removed.expect("it was there");
                }
            }
            tool(
                "cp",
                &[
                    "-a",
                    &format!("{}/.", at(name).display()),
                    &expected.display().to_string(),
                ],
            );
        }
        for mark in ["etc/.wh.gone", "var/cache/.wh..wh..opq"] {
            fs::remove_file(expected.join(mark)).expect("a mark");
            let parent = |root: &Path| root.join(mark).parent().expect("a parent").display().to_string();
            tool("touch", &["-r", &parent(&at("upper")), &parent(&expected)]);
        }

        let config = json!({
            "Entrypoint": ["/bin/sh", "-c", "echo \"$GREETING $0 $@\"; id -u; pwd"],
            "Cmd": ["from", "the", "image"],
            "Env": ["PATH=/bin", "GREETING=hello"],
            "User": "web",
            "WorkingDir": "/srv/app",
            "StopSignal": "SIGQUIT",
            "Labels": {"made-by": "test"},
            "ExposedPorts": {"80/tcp": {}},
            "Volumes": {"/srv/data": {}},
            "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 1_000_000_000},
        });
        let archive = at("app.tar");
        fs::write(&archive, docker_archive(&layers, config, Some("app:1"))).expect("the archive");
        Self {
            expected,
            archive,
            directory,
        }
    }

    /// As `skopeo` names it.
    pub fn source(&self) -> String {
        format!("docker-archive:{}", self.archive.display())
    }

    /// An OCI layout of it, made by `skopeo`.
    pub fn layout(&self) -> PathBuf {
        let layout = self.directory.path().join("layout");
        if !layout.exists() {
            let to = format!("oci:{}:localhost/app:layout", layout.display());
            tool(
                "skopeo",
                &["copy", "--quiet", "--insecure-policy", &self.source(), &to],
            );
        }
        layout
    }
}

fn lower(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).expect("a mode");
    for directory in ["bin", "etc", "dev", "srv/app", "usr/lib", "var/cache/deep", "run"] {
        fs::create_dir_all(at(directory)).expect("a directory");
    }
    fs::copy("/bin/busybox", at("bin/busybox")).expect("busybox; `make setup` installs it");
    for name in ["sh", "cat", "id", "pwd", "env", "ls", "stat", "echo"] {
        fs::hard_link(at("bin/busybox"), at("bin").join(name)).expect("a link");
    }
    fs::write(
        at("etc/passwd"),
        "root:x:0:0::/:/bin/sh\nweb:x:1000:1000::/srv:/bin/sh\n",
    )
    .expect("a file");
    fs::write(at("etc/group"), "root:x:0:\nweb:x:1000:\n").expect("a file");
    fs::write(at("etc/gone"), "of the lower layer").expect("a file");
    fs::write(at("var/cache/deep/old"), "of the lower layer").expect("a file");
    fs::write(at("usr/lib/large"), noise(LARGE)).expect("a file");
    symlink("/run", at("var/run")).expect("a link");
}

fn upper(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).expect("a mode");
    for directory in ["bin", "etc", "dev", "var/cache", "usr/lib"] {
        fs::create_dir_all(at(directory)).expect("a directory");
    }
    fs::write(at("etc/.wh.gone"), "").expect("a mark");
    fs::write(at("var/cache/.wh..wh..opq"), "").expect("a mark");
    fs::write(at("var/cache/new"), "of the upper layer").expect("a file");
    let name = "long-name-".repeat(20);
    fs::write(at("etc").join(&name), "long").expect("a file");
    fs::copy("/bin/busybox", at("bin/as-root")).expect("busybox");
    fs::set_permissions(at("bin/as-root"), fs::Permissions::from_mode(0o4755)).expect("a mode");
    fs::write(at("bin/capable"), "x").expect("a file");
    let set = |name: &str, value: &[u8]| {
        rustix::fs::setxattr(at("bin/capable"), name, value, rustix::fs::XattrFlags::empty())
            .expect("an attribute");
    };
    set("user.note", b"kept");
    set("security.capability", &CAPABILITY);
    tool("mknod", &[&at("dev/null").display().to_string(), "c", "1", "3"]);
    let sparse = fs::File::create(at("usr/lib/sparse")).expect("a file");
    sparse.write_all_at(b"end", 5 << 20).expect("a file");
    for (path, owner) in [("etc", 0), ("var/cache/new", 1000)] {
        std::os::unix::fs::chown(at(path), Some(owner), Some(owner)).expect("an owner");
    }
}

/// Panics where two trees differ: in names, types, modes, owners, sizes, links, times, or in what is in their files.
pub fn assert_same(found: &Path, expected: &Path) {
    let (found, expected) = (listing(found), listing(expected));
    let lacking: Vec<&str> = expected.lines().filter(|line| !found.contains(line)).collect();
    let other: Vec<&str> = found.lines().filter(|line| !expected.contains(line)).collect();
    assert!(
        lacking.is_empty() && other.is_empty(),
        "lacking: {lacking:#?}\nother: {other:#?}"
    );
    assert!(found.contains("long-name-") && found.contains("4755"), "{found}");
}

fn listing(root: &Path) -> String {
    // The size of a directory is its file system's own matter.
    let script = "cd \"$1\" && find . -type d -printf '%p %y %m %U:%G %n %t\\n' && \
                  find . ! -type d -printf '%p %y %m %U:%G %s %l %n %t\\n' && \
                  find . -type f -print0 | xargs -0 sha256sum";
    let output = Command::new("sh")
        .args(["-ec", script, "sh"])
        .arg(root)
        .env("LC_ALL", "C")
        .output()
        .expect("sh starts");
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

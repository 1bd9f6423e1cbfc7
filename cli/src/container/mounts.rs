//! What is mounted in a container: `-v`, `--mount`, `--tmpfs`, and the volumes that an image wants.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use picovm_engine::containers::{Containers, MountKind, MountPoint, Text};

use super::arguments::FileOptions;
use crate::pull_arguments::parse_bytes;

/// Everything that is mounted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    /// File systems in memory, with their options.
    pub tmpfs: Vec<(Text, Text)>,
    /// Directories and files of this machine, and volumes.
    pub shared: Vec<MountPoint>,
}

/// What a command line and an image ask for.
pub fn mounts(files: &FileOptions, shm_size: Option<&str>, volumes: &[String]) -> anyhow::Result<Mounts> {
    let mut found = Mounts::default();
    if let Some(size) = shm_size {
        let bytes = parse_bytes(size).map_err(|reason| anyhow::anyhow!("--shm-size {size}: {reason}"))?;
        let options = format!("size={bytes},mode=1777");
        found.tmpfs.push(("/dev/shm".into(), options.into()));
    }
    for given in &files.tmpfs {
        let bytes = given.as_bytes();
        let end = bytes.iter().position(|byte| *byte == b':').unwrap_or(bytes.len());
        let (place, options) = bytes.split_at(end);
        found.tmpfs.push((
            Text(OsStr::from_bytes(place).to_owned()),
            Text(OsStr::from_bytes(options.get(1..).unwrap_or_default()).to_owned()),
        ));
    }
    for given in &files.mount {
        found.add(mount(given).with_context(|| format!("--mount {given}"))?);
    }
    for given in &files.volume {
        let mount = volume(given).with_context(|| format!("--volume {}", given.display()))?;
        found.add(One::Shared(mount));
    }
    for (place, _) in &found.tmpfs {
        check_target(&place.0).context("a file system in memory")?;
    }
    for mount in &found.shared {
        check_target(&mount.target.0).context("what is shared with the container")?;
    }
    let mut places: Vec<PathBuf> = found.places().map(clean).collect();
    places.sort();
    let twice = places
        .iter()
        .zip(places.iter().skip(1))
        .find(|(one, next)| one == next);
    if let Some((place, _)) = twice {
        bail!(
            "there is more than one mount at {}: leave one out",
            place.display()
        );
    }
    for place in volumes {
        let place = format!("/{}", place.trim_start_matches('/'));
        // What is given goes before what the image wants.
        if !places.contains(&clean(OsStr::new(&place))) && clean(OsStr::new(&place)) != Path::new("/") {
            found.shared.push(anonymous(place.into())?);
        }
    }
    Ok(found)
}

enum One {
    Tmpfs(Text, Text),
    Shared(MountPoint),
}

impl Mounts {
    fn add(&mut self, one: One) {
        match one {
            One::Tmpfs(place, options) => self.tmpfs.push((place, options)),
            One::Shared(mount) => self.shared.push(mount),
        }
    }

    fn places(&self) -> impl Iterator<Item = &OsStr> {
        let tmpfs = self.tmpfs.iter().map(|(place, _)| place.0.as_os_str());
        tmpfs.chain(self.shared.iter().map(|mount| mount.target.0.as_os_str()))
    }
}

fn clean(place: &OsStr) -> PathBuf {
    Path::new(place).components().collect()
}

fn check_target(place: &OsStr) -> anyhow::Result<()> {
    if !place.as_bytes().starts_with(b"/") || clean(place) == Path::new("/") {
        bail!(
            "cannot be at {:?}: its place is an absolute path, and not /",
            place.display().to_string()
        );
    }
    Ok(())
}

fn anonymous(target: Text) -> anyhow::Result<MountPoint> {
    Ok(MountPoint {
        // As long as an id, and made as one.
        kind: MountKind::Volume {
            name: Containers::new_id()?,
            anonymous: true,
        },
        target,
        read_only: false,
        no_copy: false,
    })
}

/// `-v PLACE`, `-v SOURCE:PLACE[:OPTIONS]`.
fn volume(text: &OsStr) -> anyhow::Result<MountPoint> {
    let parts: Vec<&OsStr> = text
        .as_bytes()
        .split(|byte| *byte == b':')
        .map(OsStr::from_bytes)
        .collect();
    let (source, target, options) = match parts.as_slice() {
        [target] => return anonymous(Text((*target).to_owned())),
        [source, target] => (*source, *target, ""),
        [source, target, options] => {
            let options = options.to_str().context("its options are no text")?;
            (*source, *target, options)
        }
        _ => bail!("it is SOURCE:PLACE[:OPTIONS], and there is a : too many"),
    };
    let (mut read_only, mut no_copy) = (false, false);
    for option in options.split(',') {
        match option {
            "ro" | "readonly" => read_only = true,
            "nocopy" => no_copy = true,
            // What these ask for is so, or means nothing for a machine of its own.
            "" | "rw" | "z" | "Z" | "cached" | "delegated" | "consistent" | "private" | "rprivate"
            | "shared" | "rshared" | "slave" | "rslave" => {}
            _ => bail!("there is no option {option:?}: there are ro, rw and nocopy"),
        }
    }
    let kind = match source.as_bytes() {
        [] => bail!("it has no source in front of the :"),
        [b'/', ..] | [b'.'] | [b'.', b'.'] | [b'.', b'/', ..] | [b'.', b'.', b'/', ..] => {
            let source = std::path::absolute(source).context("cannot tell where it is")?;
            // As Docker does it for -v, and for --mount not.
            if fs::symlink_metadata(&source).is_err() {
                fs::create_dir_all(&source)
                    .with_context(|| format!("cannot make the directory {}", source.display()))?;
            }
            bind(&source)?
        }
        _ => named(source.to_str().context("the name of the volume is no text")?),
    };
    Ok(MountPoint {
        kind,
        target: Text(target.to_owned()),
        read_only,
        no_copy,
    })
}

fn named(name: &str) -> MountKind {
    MountKind::Volume {
        name: name.to_owned(),
        anonymous: false,
    }
}

/// A directory or file of this machine, where links to it lead.
fn bind(source: &Path) -> anyhow::Result<MountKind> {
    let found = fs::canonicalize(source)
        .with_context(|| format!("{} cannot be shared with the container", source.display()))?;
    Ok(MountKind::Bind {
        source: Text(found.into_os_string()),
    })
}

/// `--mount type=KIND,...`.
fn mount(text: &str) -> anyhow::Result<One> {
    let mut kind = "volume";
    let (mut place, mut source) = (None, None);
    let mut tmpfs = Vec::new();
    let (mut read_only, mut no_copy) = (false, false);
    for field in text.split(',') {
        let (key, value) = field.split_once('=').unwrap_or((field, ""));
        match key.to_ascii_lowercase().as_str() {
            "type" => kind = value,
            "destination" | "dst" | "target" => place = Some(value),
            "source" | "src" => source = Some(value),
            "tmpfs-size" => tmpfs.push(format!(
                "size={}",
                parse_bytes(value).map_err(|reason| anyhow::anyhow!("{value:?}: {reason}"))?
            )),
            "tmpfs-mode" => tmpfs.push(format!("mode={value}")),
            "readonly" | "ro" => read_only = !matches!(value, "false" | "0"),
            "volume-nocopy" => no_copy = !matches!(value, "false" | "0"),
            "consistency" | "bind-propagation" | "bind-nonrecursive" | "bind-recursive" => {}
            _ => bail!(
                "{key:?} is not known: there are type, source, destination, readonly, volume-nocopy, tmpfs-size, tmpfs-mode"
            ),
        }
    }
    let target: OsString = place.context("it has no destination")?.into();
    let shared = |kind| {
        One::Shared(MountPoint {
            kind,
            target: Text(target.clone()),
            read_only,
            no_copy,
        })
    };
    Ok(match (kind, source) {
        ("tmpfs", _) => {
            if read_only {
                tmpfs.push("ro".into());
            }
            One::Tmpfs(Text(target), tmpfs.join(",").into())
        }
        ("bind", Some(source)) if source.starts_with('/') => shared(bind(Path::new(source))?),
        ("bind", Some(source)) => bail!("the source {source:?} of a bind mount is no absolute path"),
        ("bind", None) => bail!("a bind mount needs a source"),
        ("volume", None | Some("")) => One::Shared(MountPoint {
            read_only,
            no_copy,
            ..anonymous(Text(target))?
        }),
        ("volume", Some(name)) => shared(named(name)),
        (kind, _) => bail!("there is no mount of type {kind:?}: there are bind, volume and tmpfs"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume_of(text: &str) -> anyhow::Result<MountPoint> {
        volume(OsStr::new(text))
    }

    #[test]
    fn a_volume_is_a_directory_a_name_or_nothing_but_a_place() {
        let bound = volume_of("/tmp:/data:ro").unwrap();
        assert_eq!(
            bound.kind,
            MountKind::Bind {
                source: "/tmp".into()
            }
        );
        assert!(bound.read_only && bound.target == "/data".into());
        let named_one = volume_of("cache:/var/cache").unwrap();
        assert_eq!(named_one.kind, named("cache"));
        assert!(!named_one.read_only);
        assert!(matches!(
            volume_of("/data").unwrap().kind,
            MountKind::Volume { anonymous: true, .. }
        ));
        for wrong in ["a:/b:c:d", ":/x", "a:/b:bogus"] {
            assert!(volume_of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn mounts_are_written_in_full() {
        let One::Shared(bound) = mount("type=bind,src=/tmp,dst=/data,ro").unwrap() else {
            panic!("it is shared");
        };
        assert!(bound.read_only && matches!(bound.kind, MountKind::Bind { .. }));
        let One::Shared(volume) = mount("source=cache,target=/c,volume-nocopy").unwrap() else {
            panic!("it is shared");
        };
        assert!(volume.no_copy && volume.kind == named("cache"));
        assert!(matches!(
            mount("type=tmpfs,dst=/x,tmpfs-size=2m"),
            Ok(One::Tmpfs(..))
        ));
        for wrong in [
            "type=bind,dst=/x",
            "type=bind,src=tmp,dst=/x",
            "type=npipe,dst=/x",
            "src=a",
            "bogus=1,dst=/x",
        ] {
            assert!(mount(wrong).is_err(), "{wrong}");
        }
    }
}

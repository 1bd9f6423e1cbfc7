//! Names of containers: what people may give, what those get that are given none, and which container has which.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::{NAME, UNFINISHED, is_id};
use crate::error::EngineError;
use crate::store;

/// Whether a name is one, as Docker has it.
pub(super) fn check(name: &str) -> Result<(), EngineError> {
    let mut characters = name.chars();
    let first = characters
        .next()
        .is_some_and(|first| first.is_ascii_alphanumeric());
    let rest = characters.all(|character| character.is_ascii_alphanumeric() || "_.-".contains(character));
    if first && rest && (2..=128).contains(&name.len()) {
        Ok(())
    } else {
        Err(EngineError::ContainerName {
            name: name.to_owned(),
        })
    }
}

const QUALITIES: [&str; 48] = [
    "able", "agile", "amber", "ample", "azure", "bold", "brave", "brisk", "calm", "candid", "civil", "clear",
    "clever", "cosmic", "crisp", "deft", "eager", "early", "fair", "fleet", "frank", "gentle", "glad",
    "golden", "grand", "happy", "hardy", "honest", "jolly", "keen", "kind", "lively", "lucid", "mellow",
    "merry", "neat", "nimble", "noble", "quiet", "rapid", "ready", "sharp", "silver", "smart", "steady",
    "sunny", "swift", "witty",
];

const BIRDS: [&str; 48] = [
    "avocet", "bittern", "bunting", "buzzard", "chough", "coot", "crane", "curlew", "dipper", "dove",
    "dunlin", "egret", "eider", "falcon", "finch", "gannet", "godwit", "goshawk", "grebe", "harrier",
    "heron", "hobby", "hoopoe", "jackdaw", "jay", "kestrel", "kite", "knot", "lapwing", "lark", "linnet",
    "magpie", "martin", "merlin", "nuthatch", "osprey", "ouzel", "owl", "pipit", "plover", "puffin", "rail",
    "raven", "redstart", "robin", "siskin", "swift", "wren",
];

/// A name of two words for so many random bits.
pub(super) fn random(bits: u32) -> String {
    let pick = |words: &[&'static str], bits: u32| {
        let index = bits as usize % words.len();
        words.get(index).copied().unwrap_or("plain")
    };
    format!("{}_{}", pick(&QUALITIES, bits & 0xffff), pick(&BIRDS, bits >> 16))
}

/// Directory of the index, beside those of the containers.
const INDEX: &str = ".names";
/// Where a link goes to.
fn target(id: &str) -> PathBuf {
    Path::new("..").join(id)
}

/// Which container has which name: a symbolic link of each name to an id, so that a name is found without reading all containers.
///
/// A container's own file says what it is called. A link that is there before its container is, or still there after it or after its
/// name, counts for nothing, so nothing is lost if a command is killed between the two. What changes names holds the lock of the
/// containers.
pub(super) struct Names {
    /// Directory of the containers.
    root: PathBuf,
}

impl Names {
    /// Those of the containers in this directory.
    pub(super) fn of(root: PathBuf) -> Self {
        Self { root }
    }

    fn directory(&self) -> PathBuf {
        self.root.join(INDEX)
    }

    /// Whether there is an index.
    pub(super) fn are_indexed(&self) -> bool {
        self.directory().is_dir()
    }

    /// Makes an index if there is none.
    pub(super) fn index(&self) -> Result<(), EngineError> {
        let failed = || EngineError::store("make the index of names in", &self.root);
        if self.are_indexed() {
            return Ok(());
        }
        let made = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(&self.root)
            .map_err(failed())?;
        for entry in fs::read_dir(&self.root).map_err(failed())?.flatten() {
            let Some(id) = entry.file_name().into_string().ok().filter(|name| is_id(name)) else {
                continue;
            };
            if let Ok(name) = fs::read_to_string(entry.path().join(NAME)) {
                symlink(target(&id), made.path().join(name)).map_err(failed())?;
            }
        }
        fs::rename(made.path(), self.directory()).map_err(failed())?;
        let _ = made.keep();
        Ok(())
    }

    /// Id of the container that has this name.
    pub(super) fn id(&self, name: &str) -> Option<String> {
        check(name).ok()?;
        let target = fs::read_link(self.directory().join(name)).ok()?;
        let id = target.strip_prefix("..").ok()?.to_str()?;
        let own = is_id(id).then(|| fs::read_to_string(self.root.join(id).join(NAME)).ok())??;
        (own == name).then(|| id.to_owned())
    }

    /// Notes that a container will have this name, which nobody has: before it has it.
    pub(super) fn add(&self, name: &str, id: &str) -> Result<(), EngineError> {
        let path = self.directory().join(name);
        let write = || match symlink(target(id), &path) {
            // Of one that is gone, or is called otherwise now.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(&path)?;
                symlink(target(id), &path)
            }
            done => done,
        };
        write().map_err(EngineError::store("write", &path))
    }

    /// Forgets that this container had this name.
    pub(super) fn remove(&self, name: &str, id: &str) -> Result<(), EngineError> {
        let path = self.directory().join(name);
        match fs::read_link(&path) {
            Ok(to) if to == target(id) => store::remove(&path),
            // Given to another meanwhile.
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_docker() {
        for name in ["web", "web-1", "a1", "My_app.2", &"x".repeat(128)] {
            assert!(check(name).is_ok(), "{name}");
        }
        for name in ["", "a", "-web", ".web", "we b", "web/1", "wéb", &"x".repeat(129)] {
            let error = check(name).unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
    }

    #[test]
    fn random_names_are_names() {
        for bits in [0, 1, u32::MAX, 0x1234_5678] {
            check(&random(bits)).unwrap();
        }
    }
}

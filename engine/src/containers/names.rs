//! Names of containers: what people may give, and what those get that are given none.

use crate::error::EngineError;

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

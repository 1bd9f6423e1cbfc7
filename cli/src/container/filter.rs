//! `--filter KEY=VALUE`: conditions of one key are alternatives, those of different keys all have to hold, as in Docker.

use std::collections::BTreeMap;

use anyhow::bail;

/// The conditions of a command line.
#[derive(Debug, Default)]
pub struct Filters(BTreeMap<String, Vec<String>>);

impl Filters {
    /// Reads them; `known` are the keys that there are.
    pub fn parse(texts: &[String], known: &[&str]) -> anyhow::Result<Self> {
        let mut filters: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for text in texts {
            let Some((key, value)) = text.split_once('=') else {
                bail!(
                    "{text:?} is no filter: it is KEY=VALUE, and the keys are {}",
                    known.join(", ")
                );
            };
            if !known.contains(&key) {
                bail!("there is no filter {key:?}: there are {}", known.join(", "));
            }
            filters.entry(key.to_owned()).or_default().push(value.to_owned());
        }
        Ok(Self(filters))
    }

    /// Whether this key is among them.
    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// What is given for a key.
    pub fn values(&self, key: &str) -> &[String] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    /// Whether one of a key's values does, or the key is not given.
    pub fn any(&self, key: &str, mut does: impl FnMut(&str) -> bool) -> bool {
        self.0
            .get(key)
            .is_none_or(|values| values.iter().any(|value| does(value)))
    }

    /// Whether all of a key's values do: what Docker asks of labels.
    pub fn all(&self, key: &str, mut does: impl FnMut(&str) -> bool) -> bool {
        self.values(key).iter().all(|value| does(value))
    }

    /// Whether labels are those asked for: `KEY`, or `KEY=VALUE`.
    pub fn labels(&self, labels: &BTreeMap<String, String>) -> bool {
        self.all("label", |wanted| match wanted.split_once('=') {
            Some((key, value)) => labels.get(key).is_some_and(|found| found == value),
            None => labels.contains_key(wanted),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_a_key_are_alternatives_and_keys_are_not() {
        let texts = ["name=web", "name=db", "status=running"].map(str::to_owned);
        let filters = Filters::parse(&texts, &["name", "status"]).unwrap();
        assert!(filters.any("name", |name| name == "db"));
        assert!(!filters.any("name", |name| name == "x"));
        assert!(filters.any("id", |_| false));
        assert!(filters.has("status") && !filters.has("id"));
        let labels = BTreeMap::from([("a".to_owned(), "1".to_owned())]);
        let of = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|text| format!("label={text}")).collect();
            Filters::parse(&texts, &["label"]).unwrap().labels(&labels)
        };
        assert!(of(&["a", "a=1"]) && !of(&["a", "b"]) && !of(&["a=2"]));
    }

    #[test]
    fn what_is_no_filter_is_told() {
        for text in ["name", "nothing=x"] {
            let error = Filters::parse(&[text.to_owned()], &["name"])
                .unwrap_err()
                .to_string();
            assert!(error.contains("name"), "{error}");
        }
    }
}

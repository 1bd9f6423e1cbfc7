//! What has happened to containers: a line of JSON for each event, in a file of the store.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::record::Record;
use crate::error::EngineError;
use crate::store::Store;

/// Size in bytes at which the file is put aside, and another begun; one that was put aside is kept.
const MAX_SIZE: u64 = 4 << 20;
/// Between two looks for new events.
const FOLLOW_EVERY: Duration = Duration::from_millis(50);

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineEvent {
    /// When.
    pub time: DateTime<Utc>,
    /// What it happened to: `container`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What: `create`, `start`, `die`, ... as Docker calls them.
    pub action: String,
    /// Id of the container.
    pub id: String,
    /// Its name, its image, its labels, and what belongs to the event.
    pub attributes: BTreeMap<String, String>,
}

impl EngineEvent {
    pub(super) fn of(record: &Record, action: &str, more: &[(&str, String)]) -> Self {
        let mut attributes = record.config.labels.clone();
        attributes.insert("name".into(), record.name.clone());
        attributes.insert("image".into(), record.config.image.clone());
        attributes.extend(
            more.iter()
                .map(|(name, value)| ((*name).to_owned(), value.clone())),
        );
        Self {
            time: Utc::now(),
            kind: "container".into(),
            action: action.into(),
            id: record.config.id.clone(),
            attributes,
        }
    }
}

fn path(store: &Store) -> PathBuf {
    store.containers_directory().join("events.json")
}

/// Writes an event down. What cannot be written is lost: nothing else fails for it.
pub(super) fn tell(store: &Store, event: &EngineEvent) {
    let write = || -> io::Result<()> {
        let path = path(store);
        let mut file = File::options().create(true).append(true).open(&path)?;
        if file.metadata()?.len() > MAX_SIZE {
            std::fs::rename(&path, path.with_extension("json.1"))?;
            file = File::options().create(true).append(true).open(&path)?;
        }
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        // At once, so that the lines of two processes do not mix.
        file.write_all(&line)
    };
    if let Err(error) = write() {
        tracing::warn!("cannot write down the event {}: {error}", event.action);
    }
}

/// Reads events; `event` gets each, and says whether to go on. Those from `since` on; without it, only new ones. Until `until`;
/// without it, without end.
pub(super) fn read(
    store: &Store,
    since: Option<DateTime<Utc>>,
    until: Option<DateTime<Utc>>,
    event: &mut dyn FnMut(EngineEvent) -> bool,
) -> Result<(), EngineError> {
    let path = path(store);
    let failed = || EngineError::store("read", &path);
    let since = since.unwrap_or_else(Utc::now);
    let mut take = |line: &[u8]| match serde_json::from_slice::<EngineEvent>(line) {
        Ok(found) if until.is_some_and(|until| found.time > until) => false,
        Ok(found) if found.time >= since => event(found),
        _ => true,
    };
    if let Ok(old) = File::open(path.with_extension("json.1")) {
        for line in BufReader::new(old).split(b'\n') {
            if !take(&line.map_err(failed())?) {
                return Ok(());
            }
        }
    }
    let mut reader: Option<BufReader<File>> = None;
    let mut line = Vec::new();
    loop {
        let over = until.is_some_and(|until| Utc::now() > until);
        if reader.is_none() {
            reader = File::open(&path).ok().map(BufReader::new);
        }
        if let Some(open) = &mut reader {
            let put_aside = match (open.get_ref().metadata(), std::fs::metadata(&path)) {
                (Ok(open), Ok(named)) => open.ino() != named.ino(),
                _ => true,
            };
            while open.read_until(b'\n', &mut line).map_err(failed())? > 0 {
                if line.last() == Some(&b'\n') {
                    if !take(&line) {
                        return Ok(());
                    }
                    line.clear();
                }
            }
            let at = open.stream_position().map_err(failed())?;
            open.seek(SeekFrom::Start(at)).map_err(failed())?;
            if put_aside {
                reader = None;
                continue;
            }
        }
        if over {
            return Ok(());
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
}

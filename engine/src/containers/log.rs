//! A container's output, kept in files: a line of JSON for each line of output, as Docker's `json-file` has them.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use picovm_guest_protocol::Stream;
use serde::{Deserialize, Serialize};

use super::record::{LogOptions, Text};
use crate::error::EngineError;

/// Bytes of a line that has not ended, after which it is written anyway; what follows is the next entry.
const LINE_MAX: usize = 16 << 10;

/// One entry of a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// A line of output with its end; without one, if it was too long or the last.
    pub log: Text,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// When it was written.
    pub time: DateTime<Utc>,
}

fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// Writes a container's log.
pub(super) struct LogWriter {
    path: PathBuf,
    options: LogOptions,
    file: Option<File>,
    size: u64,
    partial: [Vec<u8>; 2],
}

impl LogWriter {
    pub(super) fn open(path: PathBuf, options: LogOptions) -> io::Result<Self> {
        let file = match options.keep {
            true => Some(File::options().create(true).append(true).open(&path)?),
            false => None,
        };
        let size = match &file {
            Some(file) => file.metadata()?.len(),
            None => 0,
        };
        Ok(Self {
            path,
            options,
            file,
            size,
            partial: [Vec::new(), Vec::new()],
        })
    }

    /// Takes output.
    pub(super) fn write(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let time = Utc::now();
        let index = usize::from(stream == Stream::Stderr);
        let mut entries = Vec::new();
        if let Some(partial) = self.partial.get_mut(index) {
            for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
                partial.extend_from_slice(piece);
                while partial.len() >= LINE_MAX {
                    let rest = partial.split_off(LINE_MAX);
                    encode(stream, &std::mem::replace(partial, rest), time, &mut entries)?;
                }
                if partial.last() == Some(&b'\n') {
                    encode(stream, &std::mem::take(partial), time, &mut entries)?;
                }
            }
        }
        self.append(&entries)
    }

    /// Writes what has no end of line: the container has ended.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        for (stream, index) in [(Stream::Stdout, 0), (Stream::Stderr, 1)] {
            let rest = self
                .partial
                .get_mut(index)
                .map(std::mem::take)
                .unwrap_or_default();
            if !rest.is_empty() && self.file.is_some() {
                let mut entries = Vec::new();
                encode(stream, &rest, Utc::now(), &mut entries)?;
                self.append(&entries)?;
            }
        }
        Ok(())
    }

    fn append(&mut self, entries: &[u8]) -> io::Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        // Between two entries: none is cut in two.
        let mut rest = entries;
        while !rest.is_empty() {
            let part = match self.options.max_size {
                Some(max)
                    if self.size > 0 && self.size.saturating_add(first_line(rest).len() as u64) > max =>
                {
                    self.rotate()?;
                    continue;
                }
                Some(_) => first_line(rest),
                None => rest,
            };
            if let Some(file) = &mut self.file {
                file.write_all(part)?;
            }
            self.size = self.size.saturating_add(part.len() as u64);
            rest = rest.get(part.len()..).unwrap_or_default();
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let kept = self.options.max_files.saturating_sub(1);
        for number in (1..kept).rev() {
            let _ = std::fs::rename(rotated(&self.path, number), rotated(&self.path, number + 1));
        }
        if kept > 0 {
            std::fs::rename(&self.path, rotated(&self.path, 1))?;
        } else {
            std::fs::remove_file(&self.path)?;
        }
        self.file = Some(File::options().create(true).append(true).open(&self.path)?);
        self.size = 0;
        Ok(())
    }
}

fn first_line(entries: &[u8]) -> &[u8] {
    let end = entries
        .iter()
        .position(|&byte| byte == b'\n')
        .map_or(entries.len(), |end| end + 1);
    entries.get(..end).unwrap_or(entries)
}

fn encode(stream: Stream, line: &[u8], time: DateTime<Utc>, out: &mut Vec<u8>) -> io::Result<()> {
    use std::os::unix::ffi::OsStringExt;
    let entry = LogEntry {
        log: Text(std::ffi::OsString::from_vec(line.to_vec())),
        stream: match stream {
            Stream::Stderr => "stderr".into(),
            _ => "stdout".into(),
        },
        time,
    };
    serde_json::to_writer(&mut *out, &entry)?;
    out.push(b'\n');
    Ok(())
}

/// What of a log is wanted.
#[derive(Clone, Debug, Default)]
pub struct LogQuery {
    /// Only so many of the last lines.
    pub tail: Option<u64>,
    /// Only lines from then on.
    pub since: Option<DateTime<Utc>>,
    /// Only lines until then.
    pub until: Option<DateTime<Utc>>,
    /// Go on with new lines until the container has ended.
    pub follow: bool,
}

/// Between two looks for new lines.
const FOLLOW_EVERY: Duration = Duration::from_millis(50);

/// Reads a log; `entry` gets each entry, and says whether to go on. With [`LogQuery::follow`], `is_live` tells whether more may
/// come.
///
/// # Errors
/// [`EngineError::Store`].
pub(super) fn read(
    path: &Path,
    query: &LogQuery,
    is_live: &mut dyn FnMut() -> Result<bool, EngineError>,
    entry: &mut dyn FnMut(LogEntry) -> bool,
) -> Result<(), EngineError> {
    let failed = EngineError::store("read", path);
    let wanted = |entry: &LogEntry| {
        query.since.is_none_or(|since| entry.time >= since)
            && query.until.is_none_or(|until| entry.time <= until)
    };
    let mut old: Vec<PathBuf> = (1..)
        .map(|number| rotated(path, number))
        .take_while(|path| path.exists())
        .collect();
    old.reverse();
    let mut current = match File::open(path) {
        Ok(file) => Some(Follower::new(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error)),
    };
    let mut last: VecDeque<LogEntry> = VecDeque::new();
    let keep = query.tail.map(|tail| usize::try_from(tail).unwrap_or(usize::MAX));
    let mut take = |found: LogEntry, entry: &mut dyn FnMut(LogEntry) -> bool| match keep {
        _ if !wanted(&found) => true,
        None => entry(found),
        Some(keep) => {
            last.push_back(found);
            while last.len() > keep {
                last.pop_front();
            }
            true
        }
    };
    for path in old {
        // It may have been rotated away meanwhile.
        let Ok(file) = File::open(&path) else { continue };
        let mut follower = Follower::new(file);
        while let Some(found) = follower.next().map_err(EngineError::store("read", &path))? {
            if !take(found, entry) {
                return Ok(());
            }
        }
    }
    if let Some(current) = &mut current {
        while let Some(found) = current.next().map_err(EngineError::store("read", path))? {
            if !take(found, entry) {
                return Ok(());
            }
        }
    }
    for found in last {
        if !entry(found) {
            return Ok(());
        }
    }
    if !query.follow {
        return Ok(());
    }
    loop {
        // Asked before the look: what was written before the end is seen.
        let live = is_live()?;
        if current.is_none() {
            current = File::open(path).ok().map(Follower::new);
        }
        let mut rotated = false;
        if let Some(current) = &mut current {
            rotated = !current.is_at(path);
            while let Some(found) = current.next().map_err(EngineError::store("read", path))? {
                if query.until.is_some_and(|until| found.time > until) {
                    return Ok(());
                }
                if wanted(&found) && !entry(found) {
                    return Ok(());
                }
            }
        }
        if rotated {
            current = None;
            continue;
        }
        if !live || query.until.is_some_and(|until| Utc::now() > until) {
            return Ok(());
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
}

/// Reads entries of a file that may grow.
struct Follower {
    reader: BufReader<File>,
    line: Vec<u8>,
}

impl Follower {
    fn new(file: File) -> Self {
        Self {
            reader: BufReader::new(file),
            line: Vec::new(),
        }
    }

    /// Whether this is still the file of that name.
    fn is_at(&self, path: &Path) -> bool {
        match (self.reader.get_ref().metadata(), std::fs::metadata(path)) {
            (Ok(open), Ok(named)) => open.ino() == named.ino(),
            _ => false,
        }
    }

    /// The next whole entry. What is none is passed over.
    fn next(&mut self) -> io::Result<Option<LogEntry>> {
        loop {
            let read = self.reader.read_until(b'\n', &mut self.line)?;
            if self.line.last() != Some(&b'\n') {
                if read == 0 {
                    // A buffered reader forgets the end of a file when it is told where it is.
                    let at = self.reader.stream_position()?;
                    self.reader.seek(SeekFrom::Start(at))?;
                }
                return Ok(None);
            }
            let parsed = serde_json::from_slice(&self.line).ok();
            self.line.clear();
            if parsed.is_some() {
                return Ok(parsed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path, query: &LogQuery) -> Vec<String> {
        let mut found = Vec::new();
        read(path, query, &mut || Ok(false), &mut |entry| {
            found.push(entry.log.to_string());
            true
        })
        .unwrap();
        found
    }

    #[test]
    fn lines_are_whole_and_those_of_two_streams_stay_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        let mut log = LogWriter::open(path.clone(), LogOptions::default()).unwrap();
        log.write(Stream::Stdout, b"he").unwrap();
        log.write(Stream::Stderr, b"oops\n").unwrap();
        log.write(Stream::Stdout, b"llo\nworld").unwrap();
        log.write(Stream::Stdout, &[0xff]).unwrap();
        log.finish().unwrap();
        let mut found = Vec::new();
        read(&path, &LogQuery::default(), &mut || Ok(false), &mut |entry| {
            found.push((entry.stream, entry.log));
            true
        })
        .unwrap();
        let last = found.pop().unwrap();
        assert_eq!(
            found,
            [
                ("stderr".into(), Text::from("oops\n")),
                ("stdout".into(), Text::from("hello\n"))
            ]
        );
        assert_eq!(last.1.0.as_encoded_bytes(), b"world\xff");
    }

    #[test]
    fn a_line_without_end_fills_no_memory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        let mut log = LogWriter::open(path.clone(), LogOptions::default()).unwrap();
        for _ in 0..100 {
            log.write(Stream::Stdout, &[b'x'; 1000]).unwrap();
            assert!(log.partial[0].len() < LINE_MAX);
        }
        log.finish().unwrap();
        assert_eq!(lines(&path, &LogQuery::default()).concat().len(), 100_000);
    }

    #[test]
    fn rotation_keeps_the_last_files_and_cuts_no_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        let options = LogOptions {
            keep: true,
            max_size: Some(1000),
            max_files: 3,
        };
        let mut log = LogWriter::open(path.clone(), options).unwrap();
        for number in 0..100 {
            log.write(Stream::Stdout, format!("line {number}\n").as_bytes())
                .unwrap();
        }
        let kept = lines(&path, &LogQuery::default());
        assert!(kept.len() < 60, "{}", kept.len());
        let first = 100 - kept.len();
        let expected: Vec<String> = (first..100).map(|number| format!("line {number}\n")).collect();
        assert_eq!(kept, expected);
        for number in 0..3 {
            let path = if number == 0 {
                path.clone()
            } else {
                rotated(&path, number)
            };
            assert!(path.metadata().unwrap().len() <= 1000);
        }
        assert!(!rotated(&path, 3).exists());
    }

    #[test]
    fn the_last_lines_and_those_since_then() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        let mut log = LogWriter::open(path.clone(), LogOptions::default()).unwrap();
        log.write(Stream::Stdout, b"a\nb\n").unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let then = Utc::now();
        log.write(Stream::Stdout, b"c\nd\n").unwrap();
        let tail = |tail| LogQuery {
            tail: Some(tail),
            ..LogQuery::default()
        };
        assert_eq!(lines(&path, &tail(3)), ["b\n", "c\n", "d\n"]);
        assert!(lines(&path, &tail(0)).is_empty());
        let since = LogQuery {
            since: Some(then),
            ..LogQuery::default()
        };
        assert_eq!(lines(&path, &since), ["c\n", "d\n"]);
        let until = LogQuery {
            until: Some(then),
            ..LogQuery::default()
        };
        assert_eq!(lines(&path, &until), ["a\n", "b\n"]);
    }

    #[test]
    fn who_follows_sees_every_line_of_a_log_that_is_rotated() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        let options = LogOptions {
            keep: true,
            max_size: Some(2000),
            max_files: 5,
        };
        let mut log = LogWriter::open(path.clone(), options).unwrap();
        let writer = std::thread::spawn(move || {
            for number in 0..200 {
                log.write(Stream::Stdout, format!("{number}\n").as_bytes())
                    .unwrap();
                if number % 10 == 0 {
                    std::thread::sleep(Duration::from_millis(60));
                }
            }
        });
        let mut found = Vec::new();
        let query = LogQuery {
            follow: true,
            ..LogQuery::default()
        };
        let mut is_live = || Ok(!writer.is_finished());
        read(&path, &query, &mut is_live, &mut |entry| {
            found.push(entry.log.to_string().trim().to_owned());
            true
        })
        .unwrap();
        let expected: Vec<String> = (0..200).map(|number| number.to_string()).collect();
        assert_eq!(found, expected);
    }
}

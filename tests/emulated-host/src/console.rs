//! What the host's kernel console, QEMU and virtiofsd have printed: kept in memory, shown when something goes wrong.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Bytes kept. A kernel's boot messages and a panic are some 100 KiB.
const KEEP: usize = 1 << 20;

/// A bounded log that several sources write.
#[derive(Clone, Default)]
pub struct Console {
    kept: Arc<Mutex<VecDeque<u8>>>,
    echo: bool,
}

impl Console {
    /// An empty log; with `echo` everything goes to standard error as well.
    pub fn new(echo: bool) -> Self {
        Self {
            kept: Arc::default(),
            echo,
        }
    }

    /// Collects everything from `source`, on a thread of its own, until it ends.
    pub fn collect(&self, mut source: impl Read + Send + 'static) -> thread::JoinHandle<()> {
        let console = self.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                match source.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(n) => console.append(&buffer[..n]),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, bytes: &[u8]) {
        if self.echo {
            // A lost echo harms nothing: the log itself is kept.
            let _ = io::stderr().write_all(bytes);
        }
        let mut kept = self.lock();
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEEP);
        kept.drain(..excess);
    }

    /// The text so far, without the carriage returns of a serial line.
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = self.lock().iter().copied().filter(|b| *b != b'\r').collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The last lines that say something: virtiofsd remarks on every end of QEMU that QEMU has gone.
    pub fn tail(&self, lines: usize) -> String {
        let text = self.text();
        let says_something = |l: &&str| {
            !l.trim().is_empty() && !l.starts_with("virtio_loop: ") && !l.starts_with("fv_remove_watch: ")
        };
        let all: Vec<&str> = text.lines().filter(says_something).collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// The kernel's own words for why it gave up, if it did.
    pub fn panic_reason(&self) -> Option<String> {
        let text = self.text();
        let at = text.find("Kernel panic - not syncing")?;
        text[at..].lines().next().map(str::to_owned)
    }

    /// Writes the whole log to a new file in `dir`.
    pub fn save(&self, dir: &Path) -> io::Result<PathBuf> {
        fs::create_dir_all(dir)?;
        let (mut file, path) = tempfile::Builder::new()
            .prefix("console-")
            .suffix(".log")
            .tempfile_in(dir)?
            .keep()
            .map_err(|e| e.error)?;
        file.write_all(self.text().as_bytes())?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_last_lines_that_say_something() {
        let console = Console::default();
        console.append(b"one\r\n\r\ntwo\r\nthree\r\n\r\n");
        assert_eq!(console.tail(2), "two\nthree");
    }

    #[test]
    fn a_panic_is_found() {
        let console = Console::default();
        console.append(b"[1.0] Kernel panic - not syncing: sysrq triggered crash\r\n[1.1] CPU: 0\r\n");
        assert_eq!(
            console.panic_reason().as_deref(),
            Some("Kernel panic - not syncing: sysrq triggered crash")
        );
    }

    #[test]
    fn an_endless_log_stays_bounded() {
        let console = Console::default();
        for _ in 0..300 {
            console.append(&[b'x'; 4096]);
        }
        assert_eq!(console.lock().len(), KEEP);
    }
}

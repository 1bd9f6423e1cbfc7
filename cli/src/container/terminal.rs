//! This terminal, while a container's is connected with it: keys go through as they are, and it is put back whatever happens.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use anyhow::Context;
use picovm_engine::TerminalSize;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// The terminal as it was before it was made raw. Static, because what ends a program with a panic runs no destructor.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Whether standard input is a terminal.
pub fn is_stdin() -> bool {
    isatty(rustix::stdio::stdin())
}

/// The size of this terminal, if there is one.
pub fn size() -> Option<TerminalSize> {
    let ends = [
        rustix::stdio::stdout(),
        rustix::stdio::stdin(),
        rustix::stdio::stderr(),
    ];
    let size = ends.into_iter().find_map(|end| tcgetwinsize(end).ok())?;
    (size.ws_row > 0 && size.ws_col > 0).then_some(TerminalSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Standard input as a terminal that gives every key as it is, until this is dropped.
pub struct Raw(());

impl Raw {
    pub fn enter() -> anyhow::Result<Self> {
        let stdin = rustix::stdio::stdin();
        let before = tcgetattr(stdin).context("cannot ask for the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        if let Ok(mut saved) = BEFORE.lock() {
            *saved = Some(before);
        }
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            told(panic);
        }));
        tcsetattr(stdin, OptionalActions::Now, &raw).context("cannot set the terminal's mode")?;
        Ok(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was.
fn restore() {
    // A lock that somebody holds is one that is just being made raw: there is no other thread that does.
    if let Ok(mut saved) = BEFORE.try_lock()
        && let Some(before) = saved.take()
    {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &before);
    }
}

/// Keys that leave a container alone, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetachKeys(Vec<u8>);

impl DetachKeys {
    /// Characters, or `ctrl-` and one of `a-z @ [ \ ] ^ _`, with commas between; none if it is empty.
    pub fn parse(text: &str) -> Result<Self, String> {
        let key = |name: &str| -> Result<u8, String> {
            let wrong =
                || format!("{name:?} is no key: give one character, or ctrl- and one of a-z @ [ \\ ] ^ _");
            if let Some(name) = name.strip_prefix("ctrl-") {
                return match name.as_bytes() {
                    [letter @ (b'a'..=b'z' | b'A'..=b'Z' | b'@' | b'['..=b'_')] => {
                        Ok(letter.to_ascii_uppercase() & 0x1f)
                    }
                    _ => Err(wrong()),
                };
            }
            match name.as_bytes() {
                [character] => Ok(*character),
                _ => Err(wrong()),
            }
        };
        if text.is_empty() {
            return Ok(Self(Vec::new()));
        }
        text.split(',').map(key).collect::<Result<_, _>>().map(Self)
    }
}

/// Looks for the keys in what is typed.
struct KeySearch {
    keys: DetachKeys,
    found: usize,
}

impl KeySearch {
    /// Hands on what was typed, but keys that may be the beginning of those; whether all of them have come.
    fn pass(&mut self, typed: &[u8], on: &mut VecDeque<u8>) -> bool {
        let DetachKeys(keys) = &self.keys;
        for &byte in typed {
            if keys.get(self.found) == Some(&byte) {
                self.found += 1;
                if self.found == keys.len() {
                    return true;
                }
                continue;
            }
            // What was held back was not meant so; this may be the beginning again.
            on.extend(keys.iter().take(self.found));
            self.found = 0;
            match keys.first() == Some(&byte) {
                true => self.found = 1,
                false => on.push_back(byte),
            }
        }
        false
    }
}

/// What happened to the keyboard.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// Something was handed on.
    On,
    /// The keys that leave the container alone.
    Detach,
    /// The terminal is gone.
    Gone,
}

/// The keyboard: read here, handed on through a pipe.
pub struct Keyboard {
    pipe: Option<OwnedFd>,
    search: KeySearch,
    waiting: VecDeque<u8>,
    _raw: Option<Raw>,
}

impl Keyboard {
    /// One, and the end of the pipe that the container reads.
    pub fn new(keys: DetachKeys) -> anyhow::Result<(Self, OwnedFd)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).context("cannot make a pipe")?;
        let flags = rustix::fs::fcntl_getfl(&write).context("cannot set up a pipe")?;
        rustix::fs::fcntl_setfl(&write, flags | OFlags::NONBLOCK).context("cannot set up a pipe")?;
        let keyboard = Self {
            pipe: Some(write),
            search: KeySearch { keys, found: 0 },
            waiting: VecDeque::new(),
            _raw: None,
        };
        Ok((keyboard, read))
    }

    /// From now on every key is handed on as it is.
    pub fn raw(&mut self) -> anyhow::Result<()> {
        self._raw = Some(Raw::enter()?);
        Ok(())
    }

    /// The pipe while something waits for it: writable means [`Keyboard::write`].
    pub fn blocked(&self) -> Option<BorrowedFd<'_>> {
        match self.waiting.is_empty() {
            true => None,
            false => self.pipe.as_ref().map(AsFd::as_fd),
        }
    }

    /// Whether keys are to be read: one that does not read holds up who types, and fills no memory.
    pub fn reads(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Reads what was typed.
    pub fn read(&mut self) -> Typed {
        let mut bytes = [0; 4096];
        match rustix::io::read(rustix::stdio::stdin(), &mut bytes) {
            Err(Errno::INTR | Errno::AGAIN) => Typed::On,
            Ok(0) | Err(_) => Typed::Gone,
            Ok(count) => {
                let detach = self
                    .search
                    .pass(bytes.get(..count).unwrap_or_default(), &mut self.waiting);
                if self.pipe.is_none() {
                    self.waiting.clear();
                }
                self.write();
                if detach { Typed::Detach } else { Typed::On }
            }
        }
    }

    /// Hands on what waits.
    pub fn write(&mut self) {
        while let Some(pipe) = &self.pipe
            && !self.waiting.is_empty()
        {
            match rustix::io::write(pipe, self.waiting.make_contiguous()) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // Nobody reads it any more. The keys that detach still do.
                Err(_) => {
                    self.pipe = None;
                    self.waiting.clear();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_docker_s() {
        let keys = |text: &str| DetachKeys::parse(text).map(|keys| keys.0);
        assert_eq!(keys("ctrl-p,ctrl-q"), Ok(vec![16, 17]));
        assert_eq!(keys("a,ctrl-["), Ok(vec![b'a', 27]));
        assert_eq!(keys("ctrl-@,ctrl-_,ctrl-\\"), Ok(vec![0, 31, 28]));
        assert_eq!(keys(""), Ok(vec![]));
        for text in ["ctrl-", "ctrl-1", "ab", "a,,b", "ctrl-ä"] {
            assert!(keys(text).is_err(), "{text}");
        }
    }

    #[test]
    fn keys_are_held_back_only_while_they_may_detach() {
        let pass = |typed: &[&[u8]]| {
            let mut search = KeySearch {
                keys: DetachKeys::parse("ctrl-p,ctrl-q").unwrap(),
                found: 0,
            };
            let mut on = VecDeque::new();
            let detach = typed.iter().any(|bytes| search.pass(bytes, &mut on));
            (Vec::from(on), detach)
        };
        assert_eq!(pass(&[b"ls\r"]), (b"ls\r".to_vec(), false));
        assert_eq!(pass(&[b"l\x10", b"\x11s"]), (b"l".to_vec(), true));
        assert_eq!(pass(&[b"\x10", b"x"]), (b"\x10x".to_vec(), false));
        assert_eq!(pass(&[b"\x10\x10\x11"]), (b"\x10".to_vec(), true));
        assert_eq!(pass(&[b"\x11\x10"]), (b"\x11".to_vec(), false));
    }

    #[test]
    fn without_keys_nothing_detaches() {
        let mut search = KeySearch {
            keys: DetachKeys::parse("").unwrap(),
            found: 0,
        };
        let mut on = VecDeque::new();
        assert!(!search.pass(b"\x10\x11", &mut on));
        assert_eq!(on, b"\x10\x11");
    }
}

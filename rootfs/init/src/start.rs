//! From a container's spec to its first instruction: user, working directory, program, `execve`.

use std::ffi::{CStr, CString};
use std::fmt::Display;
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use picovm_guest_protocol::{ProcessSpec, StartFailure};
use rustix::fs::{Access, Gid, Uid};
use rustix::io::Errno;

use crate::accounts::{Account, Accounts};

/// What a container gets that brings no `PATH`.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A failure must fit into a pipe whose reader may not be reading.
const MESSAGE_MAX: usize = 1024;

/// A start failure for people. `message` is what happened; the error number is 0 where it has none.
pub fn failure(attempted: impl Into<String>, errno: i32, message: impl Display) -> StartFailure {
    let shorten = |text: String| match text.char_indices().nth(MESSAGE_MAX) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    };
    StartFailure {
        attempted: shorten(attempted.into()),
        errno,
        message: shorten(message.to_string()),
    }
}

/// Becomes the container's process. Returns only if that fails.
pub fn exec(spec: &ProcessSpec, accounts: &Accounts, no_input: BorrowedFd<'_>) -> StartFailure {
    match try_exec(spec, accounts, no_input) {
        Ok(never) => match never {},
        Err(failure) => failure,
    }
}

fn try_exec(
    spec: &ProcessSpec,
    accounts: &Accounts,
    no_input: BorrowedFd<'_>,
) -> Result<std::convert::Infallible, StartFailure> {
    let name = String::from_utf8_lossy(&spec.user).into_owned();
    let account = accounts
        .resolve(&spec.user)
        .map_err(|message| failure(format!("find user {name}"), 0, message))?;
    let program = spec
        .args
        .first()
        .filter(|program| !program.is_empty())
        .ok_or_else(|| failure("start the container", libc::EINVAL, "there is no program to run"))?;
    let arguments = Strings::new(spec.args.iter().cloned(), "an argument")?;
    let path = variable(&spec.env, b"PATH").unwrap_or(DEFAULT_PATH).to_vec();
    let environment = Strings::new(environment(&spec.env, &account), "an environment variable")?;

    if !spec.stdin {
        rustix::stdio::dup2_stdin(no_input)
            .map_err(|error| failure("connect standard input", error.raw_os_error(), error))?;
    }
    make_working_directory(&spec.cwd)?;
    become_user(&account)?;
    enter_working_directory(&spec.cwd)?;
    unblock_signals()?;

    let attempted = || format!("exec {}", String::from_utf8_lossy(program));
    let mut last = Errno::NOENT;
    for candidate in candidates(program, &path) {
        let Ok(candidate) = CString::new(candidate) else {
            return Err(failure(
                attempted(),
                libc::EINVAL,
                "its name contains a zero byte",
            ));
        };
        if let Err(error) = rustix::fs::access(candidate.as_c_str(), Access::EXEC_OK) {
            last = worse(last, error);
            continue;
        }
        let error = execve(&candidate, &arguments, &environment);
        match error {
            Errno::ACCESS | Errno::NOTDIR => last = worse(last, error),
            Errno::NOENT => {
                return Err(failure(
                    attempted(),
                    libc::ENOENT,
                    "its interpreter or loader was not found",
                ));
            }
            _ => return Err(failure(attempted(), error.raw_os_error(), error)),
        }
    }
    let why = match last {
        Errno::NOENT if program.contains(&b'/') => "no such file".into(),
        Errno::NOENT => format!("not found in PATH {}", String::from_utf8_lossy(&path)),
        Errno::ACCESS if Path::new(std::ffi::OsStr::from_bytes(program)).is_dir() => {
            "it is a directory".into()
        }
        _ => last.to_string(),
    };
    Err(failure(attempted(), last.raw_os_error(), why))
}

/// Of two reasons why nothing could be executed, the one to tell: a file that was there and forbidden, before a file
/// that was not there. A path through something that is no directory is a file that is not there.
fn worse(last: Errno, error: Errno) -> Errno {
    match error {
        Errno::NOENT | Errno::NOTDIR => last,
        _ => error,
    }
}

/// Paths to try for a program: itself if it has a slash, else in each directory of `PATH`.
fn candidates(program: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    path.split(|&byte| byte == b':')
        .map(|directory| match directory {
            [] => [b"./", program].concat(),
            _ => [directory, b"/", program].concat(),
        })
        .collect()
}

/// The value of a variable; the last one counts.
fn variable<'a>(env: &'a [Vec<u8>], name: &[u8]) -> Option<&'a [u8]> {
    env.iter()
        .rev()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix(b"="))
}

/// The container's environment: its own, with PATH and HOME where it has none.
fn environment(env: &[Vec<u8>], account: &Account) -> impl Iterator<Item = Vec<u8>> {
    let path = variable(env, b"PATH")
        .is_none()
        .then(|| [b"PATH=", DEFAULT_PATH].concat());
    let home = variable(env, b"HOME")
        .is_none()
        .then(|| [b"HOME=", account.home.as_slice()].concat());
    env.iter().cloned().chain(path).chain(home)
}

fn directory(cwd: &[u8]) -> Option<&Path> {
    (!cwd.is_empty() && cwd != b"/").then(|| Path::new(std::ffi::OsStr::from_bytes(cwd)))
}

fn make_working_directory(cwd: &[u8]) -> Result<(), StartFailure> {
    let Some(path) = directory(cwd) else { return Ok(()) };
    if path.is_relative() {
        let attempted = format!("enter working directory {}", path.display());
        return Err(failure(attempted, libc::EINVAL, "it is not an absolute path"));
    }
    fs::create_dir_all(path).map_err(|error| {
        let attempted = format!("make working directory {}", path.display());
        failure(attempted, error.raw_os_error().unwrap_or(0), error)
    })
}

fn enter_working_directory(cwd: &[u8]) -> Result<(), StartFailure> {
    let Some(path) = directory(cwd) else { return Ok(()) };
    std::env::set_current_dir(path).map_err(|error| {
        let attempted = format!("enter working directory {}", path.display());
        failure(attempted, error.raw_os_error().unwrap_or(0), error)
    })
}

fn become_user(account: &Account) -> Result<(), StartFailure> {
    let because = |what: &str| {
        let attempted = format!("become user {} with group {}: {what}", account.uid, account.gid);
        move |error: Errno| failure(attempted, error.raw_os_error(), error)
    };
    if account.uid == 0 && account.gid == 0 && account.groups.is_empty() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    // So that the container can open /dev/stdout and its like, which are pipes that root made.
    for stream in [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ] {
        let is_pipe = |stat: rustix::fs::Stat| stat.st_mode & libc::S_IFMT == libc::S_IFIFO;
        if rustix::fs::fstat(stream).is_ok_and(is_pipe) {
            rustix::fs::fchown(stream, Some(uid), None).map_err(because("fchown"))?;
        }
    }
    let groups: Vec<Gid> = account.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
    rustix::thread::set_thread_groups(&groups).map_err(because("setgroups"))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(because("setresgid"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(because("setresuid"))
}

/// Lets through what the stub has held back: a signal that came early meets the container's process now.
fn unblock_signals() -> Result<(), StartFailure> {
    // SAFETY: the set is initialised by sigemptyset before it is used, and both outlive the calls.
    let result = unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(failure(
        "unblock signals",
        error.raw_os_error().unwrap_or(0),
        error,
    ))
}

/// A null-terminated array of strings as `execve(2)` takes it.
struct Strings {
    pointers: Vec<*const libc::c_char>,
    _owned: Vec<CString>,
}

impl Strings {
    fn new(strings: impl Iterator<Item = Vec<u8>>, what: &str) -> Result<Self, StartFailure> {
        let owned: Vec<CString> = strings.map(CString::new).collect::<Result<_, _>>().map_err(|_| {
            let message = format!("{what} contains a zero byte");
            failure("start the container", libc::EINVAL, message)
        })?;
        let pointers = owned
            .iter()
            .map(|string| string.as_ptr())
            .chain([std::ptr::null()])
            .collect();
        Ok(Self {
            pointers,
            _owned: owned,
        })
    }
}

fn execve(path: &CStr, arguments: &Strings, environment: &Strings) -> Errno {
    // SAFETY: all three are null-terminated, and the strings they point to are owned beside them.
    unsafe {
        libc::execve(
            path.as_ptr(),
            arguments.pointers.as_ptr(),
            environment.pointers.as_ptr(),
        )
    };
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_a_slash_is_itself() {
        assert_eq!(candidates(b"./x", b"/bin:/sbin"), [b"./x".to_vec()]);
    }

    #[test]
    fn a_plain_program_is_looked_for_along_the_path() {
        let found = candidates(b"x", b"/bin::/sbin");
        assert_eq!(found, [b"/bin/x".to_vec(), b"./x".to_vec(), b"/sbin/x".to_vec()]);
    }

    #[test]
    fn path_and_home_are_added_only_where_missing() {
        let account = Account {
            uid: 1,
            gid: 1,
            groups: Vec::new(),
            home: b"/h".to_vec(),
        };
        let added: Vec<_> = environment(&[b"A=1".to_vec()], &account).collect();
        assert_eq!(added[0], b"A=1");
        assert!(added[1].starts_with(b"PATH=/usr/local/sbin:"));
        assert_eq!(added[2], b"HOME=/h");
        let own = [b"HOME=".to_vec(), b"PATH=/p".to_vec()];
        assert_eq!(environment(&own, &account).collect::<Vec<_>>(), own);
    }

    #[test]
    fn the_last_of_two_variables_counts() {
        let env = [b"PATH=/a".to_vec(), b"PATHS=/c".to_vec(), b"PATH=/b".to_vec()];
        assert_eq!(variable(&env, b"PATH"), Some(&b"/b"[..]));
    }

    #[test]
    fn a_failure_is_kept_short() {
        let long = failure("é".repeat(5000), 0, "x".repeat(5000));
        assert!(long.attempted.len() + long.message.len() < 4096);
    }
}

//! From a process's spec to its first instruction: user, terminal, working directory, limits, program, `execve`.

use std::ffi::{CStr, CString};
use std::fmt::Display;
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use picovm_guest_protocol::{ProcessSpec, StartFailure};
use rustix::fs::{Access, Gid, Uid};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;

use crate::accounts::{Account, Accounts};
use crate::agent::Terminal;

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

/// What a process is connected to.
#[derive(Clone, Copy)]
pub struct Connections<'a> {
    /// `/dev/null`, for one without standard input.
    pub no_input: BorrowedFd<'a>,
    /// For one that asks for it; `None` if there can be none.
    pub terminal: Option<&'a Terminal>,
    /// Whether the terminal is the container's console, too.
    pub is_console: bool,
}

/// Becomes a process of the container. Returns only if that fails.
pub fn exec(spec: &ProcessSpec, accounts: &Accounts, connections: Connections<'_>) -> StartFailure {
    match try_exec(spec, accounts, connections) {
        Ok(never) => match never {},
        Err(failure) => failure,
    }
}

fn try_exec(
    spec: &ProcessSpec,
    accounts: &Accounts,
    connections: Connections<'_>,
) -> Result<std::convert::Infallible, StartFailure> {
    let name = String::from_utf8_lossy(&spec.user).into_owned();
    let mut account = accounts
        .resolve(&spec.user)
        .map_err(|message| failure(format!("find user {name}"), 0, message))?;
    for group in &spec.groups {
        let found = accounts.group_id(group).map_err(|message| {
            failure(
                format!("find group {}", String::from_utf8_lossy(group)),
                0,
                message,
            )
        })?;
        account.groups.push(found);
    }
    let program = spec
        .args
        .first()
        .filter(|program| !program.is_empty())
        .ok_or_else(|| failure("start the container", libc::EINVAL, "there is no program to run"))?;
    let arguments = Strings::new(spec.args.iter().cloned(), "an argument")?;
    let path = variable(&spec.env, b"PATH").unwrap_or(DEFAULT_PATH).to_vec();
    let environment = environment(&spec.env, &account, spec.terminal.is_some());
    let environment = Strings::new(environment, "an environment variable")?;

    connect(spec, &account, connections)?;
    make_working_directory(&spec.cwd)?;
    limit_resources(&spec.rlimits)?;
    drop_capabilities(spec.drop_capabilities)?;
    become_user(&account)?;
    if spec.no_new_privileges {
        rustix::thread::set_no_new_privs(true)
            .map_err(|error| failure("give up new privileges", error.raw_os_error(), error))?;
    }
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

/// Connects what is not connected to pipes.
fn connect(spec: &ProcessSpec, account: &Account, connections: Connections<'_>) -> Result<(), StartFailure> {
    if let Some(size) = spec.terminal {
        let terminal = connections
            .terminal
            .ok_or_else(|| failure("open a terminal", libc::ENXIO, "there is none"))?;
        terminal.attach(size, Uid::from_raw(account.uid))?;
        if connections.is_console {
            terminal.be_console();
        }
        return Ok(());
    }
    if spec.stdin {
        return Ok(());
    }
    rustix::stdio::dup2_stdin(connections.no_input)
        .map_err(|error| failure("connect standard input", error.raw_os_error(), error))
}

/// Resources by their number (`setrlimit(2)`).
const RESOURCES: [Resource; 16] = [
    Resource::Cpu,
    Resource::Fsize,
    Resource::Data,
    Resource::Stack,
    Resource::Core,
    Resource::Rss,
    Resource::Nproc,
    Resource::Nofile,
    Resource::Memlock,
    Resource::As,
    Resource::Locks,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Rttime,
];

fn limit_resources(limits: &[(u32, u64, u64)]) -> Result<(), StartFailure> {
    for &(number, soft, hard) in limits {
        let attempted = || format!("limit resource {number} to {soft}:{hard}");
        let resource = usize::try_from(number)
            .ok()
            .and_then(|number| RESOURCES.get(number))
            .ok_or_else(|| failure(attempted(), libc::EINVAL, "there is no such resource"))?;
        let bound = |limit: u64| (limit != u64::MAX).then_some(limit);
        let limit = Rlimit {
            current: bound(soft),
            maximum: bound(hard),
        };
        rustix::process::setrlimit(*resource, limit)
            .map_err(|error| failure(attempted(), error.raw_os_error(), error))?;
    }
    Ok(())
}

/// Takes capabilities, a bit for each, from what will be executed. One that the kernel does not know nobody has.
fn drop_capabilities(capabilities: u64) -> Result<(), StartFailure> {
    for capability in (0..u64::BITS).filter_map(|bit| 1u64.checked_shl(bit)) {
        if capabilities & capability == 0 {
            continue;
        }
        let set = CapabilitySet::from_bits_retain(capability);
        match rustix::thread::remove_capability_from_bounding_set(set) {
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(failure("drop a capability", error.raw_os_error(), error)),
        }
    }
    Ok(())
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

/// The process's environment: its own, with PATH and HOME, and TERM on a terminal, where it has none.
fn environment(env: &[Vec<u8>], account: &Account, terminal: bool) -> impl Iterator<Item = Vec<u8>> {
    let term = (terminal && variable(env, b"TERM").is_none()).then(|| b"TERM=xterm".to_vec());
    let path = variable(env, b"PATH")
        .is_none()
        .then(|| [b"PATH=", DEFAULT_PATH].concat());
    let home = variable(env, b"HOME")
        .is_none()
        .then(|| [b"HOME=", account.home.as_slice()].concat());
    env.iter().cloned().chain(path).chain(home).chain(term)
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
pub fn unblock_signals() -> Result<(), StartFailure> {
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
        let added: Vec<_> = environment(&[b"A=1".to_vec()], &account, false).collect();
        assert_eq!(added[0], b"A=1");
        assert!(added[1].starts_with(b"PATH=/usr/local/sbin:"));
        assert_eq!(added[2], b"HOME=/h");
        let own = [b"HOME=".to_vec(), b"PATH=/p".to_vec()];
        assert_eq!(environment(&own, &account, false).collect::<Vec<_>>(), own);
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

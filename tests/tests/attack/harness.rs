//! A store with a template of the hostile `init`, the neighbours that share it, and what has to hold of every attack.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use picovm_tests::OwnStore;
use rustix::process::Pid;

/// Exit status of a container whose attack is over and whose machine goes on (`src/bin/hostile-init/main.rs`).
pub const GOES_ON: i32 = 42;
/// Memory of every attacking guest, in MiB.
pub const MEMORY_MIB: u64 = 64;
/// The limit of a container that such a machine serves.
const LIMIT: &str = "32m";
/// What a VMM may take beside its guest's memory, in bytes: program, stacks, buffers of streams and console log. It is 4 MiB
/// where nobody attacks.
pub const OWN_MAX: u64 = 8 << 20;
/// A wedged guest is ended after so long, by `--timeout`.
const WEDGED: Duration = Duration::from_secs(15);
/// So long after it was to be ended, a VMM is taken to hang.
const HANG: Duration = Duration::from_secs(15);

/// Who attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// `picovm-hostile-init` in the place of `init`: its container's arguments are an attack and a seed.
    HostileInit,
    /// A root shell in a container of the ordinary template.
    Container,
}

/// The hostile `init` where `picovm` looks for a guest's files.
fn hostile_guest() -> &'static PathBuf {
    static GUEST: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = GUEST.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let init =
            picovm_rootfs::initramfs::build(env!("CARGO_BIN_EXE_picovm-hostile-init").as_ref()).unwrap();
        fs::write(path.join("initramfs.cpio"), init).unwrap();
        let good = picovm_engine::GuestFiles::find().expect("the guest's files beside the programs");
        std::os::unix::fs::symlink(good.kernel, path.join("vmlinux")).unwrap();
        (directory, path)
    });
    path
}

/// Kernel, and initramfs with the hostile `init`.
pub fn hostile_files() -> (PathBuf, PathBuf) {
    let directory = hostile_guest();
    (directory.join("vmlinux"), directory.join("initramfs.cpio"))
}

/// The store of all attacks.
pub fn store() -> &'static OwnStore {
    static STORE: OnceLock<OwnStore> = OnceLock::new();
    STORE.get_or_init(|| OwnStore::new().expect("a store with the image"))
}

/// `picovm ...` on that store with one of the guests.
pub fn picovm(guest: Guest) -> Command {
    let mut command = store().picovm();
    if guest == Guest::HostileInit {
        command.env("PICOVM_GUEST", hostile_guest());
    }
    command
}

/// Builds the template of a guest, once.
fn template(guest: Guest) {
    static BUILT: [OnceLock<()>; 2] = [OnceLock::new(), OnceLock::new()];
    BUILT[guest as usize].get_or_init(|| {
        let built = picovm(guest)
            .args(["template", "build", "--memory", LIMIT, "--cpus", "2", "debian"])
            .output()
            .unwrap();
        assert!(
            built.status.success(),
            "{}",
            String::from_utf8_lossy(&built.stderr)
        );
    });
}

/// `picovm run` with options of its own, in a guest of [`MEMORY_MIB`] and two vCPUs.
pub fn run(guest: Guest, options: &[&str], arguments: &[&str]) -> Command {
    template(guest);
    let mut command = picovm(guest);
    command.args(["run", "--rm", "--memory", LIMIT, "--cpus", "2"]);
    command.args(options).arg("debian").args(arguments);
    command
}

/// A clone of the same template as the attackers', that lives through all attacks.
struct Neighbour {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl Neighbour {
    fn begin(guest: Guest) -> Self {
        // Tells for each line whether what it holds is what it was.
        let script = "head -c 1000000 /dev/urandom > /root/mine; sum=$(sha256sum < /root/mine); while read line; do \
                      if [ \"$(sha256sum < /root/mine)\" = \"$sum\" ]; then echo whole; else echo damaged; fi; done";
        let arguments: &[&str] = match guest {
            Guest::HostileInit => &["neighbour"],
            Guest::Container => &["sh", "-c", script],
        };
        let mut child = run(guest, &["-i"], arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, answers) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let input = child.stdin.take().unwrap();
        Self {
            child,
            input,
            answers,
        }
    }
}

/// A neighbour of the attackers goes on, and what it holds is as it was.
pub fn the_neighbour_is_whole(guest: Guest) {
    static NEIGHBOURS: [Mutex<Option<Neighbour>>; 2] = [Mutex::new(None), Mutex::new(None)];
    let mut neighbour = NEIGHBOURS[guest as usize]
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let neighbour = neighbour.get_or_insert_with(|| Neighbour::begin(guest));
    neighbour.input.write_all(b"?\n").expect("the neighbour is there");
    let answer = neighbour
        .answers
        .recv_timeout(Duration::from_secs(20))
        .unwrap_or_else(|_| format!("nothing; it is {:?}", neighbour.child.try_wait()));
    assert_eq!(answer, "whole", "what the neighbour says of itself");
}

/// What a process takes now, in bytes: beside a guest's memory, and of that.
fn memory_of(process: u32) -> Option<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{process}/smaps")).ok()?;
    let (mut own, mut guest, mut of_guest) = (0, 0, false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next()?;
        if !first.ends_with(':') {
            of_guest = line.ends_with("/memory");
        } else if first == "Rss:" {
            let bytes = words.next()?.parse::<u64>().ok()? << 10;
            *(if of_guest { &mut guest } else { &mut own }) += bytes;
        }
    }
    Some((own, guest))
}

/// Whether a process runs a guest, which has touched some of its memory.
pub fn has_guest(process: Pid) -> bool {
    memory_of(process.as_raw_nonzero().get().unsigned_abs()).is_some_and(|(_, guest)| guest > 1 << 20)
}

/// The same of `picovm`, the container's monitor and its VMM process, whichever is most.
fn most_memory(picovm: u32) -> (u64, u64) {
    let monitors = picovm_tests::children(picovm);
    let vmms: Vec<u32> = monitors
        .iter()
        .flat_map(|monitor| picovm_tests::children(*monitor))
        .collect();
    monitors
        .into_iter()
        .chain(vmms)
        .chain([picovm])
        .filter_map(memory_of)
        .fold((0, 0), |most, now| (most.0.max(now.0), most.1.max(now.1)))
}

/// How an attack ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// The most that its VMM took beside its guest's memory, in bytes.
    pub own: u64,
    pub took: Duration,
}

/// Where an attacker's input comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Input {
    Null,
    /// As many bytes as it takes.
    Endless,
}

/// Where its output goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Output {
    Kept,
    /// To a pipe that nobody reads any more.
    Closed,
    /// To a pipe that is not read for now.
    Stalled,
    /// Read, and thrown away.
    Read,
}

fn reader(mut from: impl Read + Send + 'static, keep: bool) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let (mut kept, mut bytes) = (Vec::new(), vec![0; 64 << 10]);
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if keep {
                kept.extend_from_slice(&bytes[..count]);
            }
        }
        kept
    })
}

/// Runs an attack to its end, and checks what has to hold of each: the VMM does not panic, keeps to its memory, and comes
/// to an end; its neighbours go on.
pub fn attack(
    guest: Guest,
    options: &[&str],
    arguments: &[&str],
    input: Input,
    output: Output,
    limit: Option<Duration>,
) -> Ended {
    the_neighbour_is_whole(guest);
    let wedged = format!("{}s", limit.unwrap_or(WEDGED).as_secs());
    let mut all = vec!["--timeout", wedged.as_str()];
    all.extend(options);
    let mut command = run(guest, &all, arguments);
    command.stdin(match input {
        Input::Null => Stdio::null(),
        Input::Endless => fs::File::open("/dev/zero").unwrap().into(),
    });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let begun = Instant::now();
    let mut child = command.spawn().unwrap();
    let mut stalled = child.stdout.take();
    let stdout = match output {
        Output::Stalled => None,
        Output::Closed => {
            stalled = None;
            None
        }
        Output::Kept | Output::Read => stalled.take().map(|pipe| reader(pipe, output == Output::Kept)),
    };
    let stderr = reader(child.stderr.take().unwrap(), true);
    let (mut own, mut guests) = (0, 0);
    let mut next_look = begun + Duration::from_millis(40);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > limit.unwrap_or(WEDGED) + HANG {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the VMM hangs: {arguments:?}, {}", text(stderr));
        }
        if Instant::now() > next_look {
            let (now, guest) = most_memory(child.id());
            own = own.max(now);
            guests = guests.max(guest);
            // Often while it is short, as most are.
            next_look = Instant::now() + (begun.elapsed() / 8).max(Duration::from_millis(40));
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    drop(stalled);
    let ended = Ended {
        status,
        stdout: stdout.map(|reader| reader.join().unwrap()).unwrap_or_default(),
        stderr: text(stderr),
        own,
        took: begun.elapsed(),
    };
    println!(
        "{arguments:?}: {} in {} ms, own memory {} KiB, guest memory {} KiB: {}",
        ended.status,
        ended.took.as_millis(),
        own >> 10,
        guests >> 10,
        ended.stderr.lines().next().unwrap_or_default()
    );
    assert!(
        ended.status.code().is_some(),
        "picovm was ended by a signal: {ended:?}"
    );
    for word in [
        "panicked",
        "stack overflow",
        "RUST_BACKTRACE",
        "memory allocation",
    ] {
        assert!(!ended.stderr.contains(word), "{ended:?}");
    }
    // What the guest says of itself in picovm's own sentences is no command to a terminal.
    if ended.status.code() == Some(125) || guest == Guest::HostileInit {
        let acts = |c: char| c.is_control() && c != '\n';
        assert!(!ended.stderr.contains(acts), "{ended:?}");
    }
    assert!(
        own > 0 && (guests > 0 || ended.took < Duration::from_secs(1)),
        "the memory of the VMM was never seen: {ended:?}"
    );
    assert!(
        ended.own <= OWN_MAX,
        "the VMM took {} bytes beside its guest's memory, and {OWN_MAX} are allowed: {arguments:?}",
        ended.own
    );
    assert!(guests <= MEMORY_MIB << 20, "{guests} bytes of guest memory");
    the_neighbour_is_whole(guest);
    ended
}

fn text(reader: std::thread::JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&reader.join().unwrap()).into_owned()
}

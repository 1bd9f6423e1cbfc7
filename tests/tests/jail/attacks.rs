//! Every attack three times: free, behind the walls alone, in the whole jail.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Child, Command};

use picovm_tests::attacks::{ATTACKS, Attack, StoppedBy, prey, share};

use crate::{alone, built};

/// What there is on the host to be attacked.
struct Prey {
    directory: tempfile::TempDir,
    process: Child,
    tcp: TcpListener,
    _sockets: [UnixListener; 2],
    abstract_name: String,
}

impl Prey {
    fn new() -> Self {
        // A file system whose files have handles.
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let template = directory.path().join("memory");
        std::fs::write(&template, b"memory of another template").unwrap();
        std::fs::set_permissions(&template, std::fs::Permissions::from_mode(0o644)).unwrap();
        let abstract_name = format!("picovm-attacked-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let sockets = [
            UnixListener::bind(directory.path().join("socket")).unwrap(),
            UnixListener::bind_addr(&address).unwrap(),
        ];
        share().unwrap();
        Self {
            process: Command::new("sleep").arg("1000").spawn().unwrap(),
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            _sockets: sockets,
            abstract_name,
            directory,
        }
    }

    /// Status of an attack by this name, and what was said of it.
    fn attack(&self, how: &str, name: &str) -> (i32, String) {
        let path = |name| self.directory.path().join(name);
        let output = Command::new(built("picovm-attack"))
            .args([how, name])
            .env(prey::PROCESS, self.process.id().to_string())
            .env(prey::TEMPLATE, path("memory"))
            .env(prey::SOCKET, path("socket"))
            .env(prey::PORT, self.tcp.local_addr().unwrap().port().to_string())
            .env(prey::ABSTRACT_SOCKET, &self.abstract_name)
            .output()
            .unwrap();
        let said = crate::text(&output.stderr);
        (output.status.code().unwrap_or(-1), said)
    }
}

impl Drop for Prey {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Makes all attacks in one way and tells of those that end otherwise than they should.
fn all(how: &str, right: impl Fn(&Attack, i32, &str) -> bool) {
    let _alone = alone();
    let prey = Prey::new();
    let wrong: Vec<String> = ATTACKS
        .iter()
        .filter_map(|attack| {
            let (status, said) = prey.attack(how, attack.name);
            println!("{how} {}: {status} {said}", attack.name);
            (!right(attack, status, &said)).then(|| format!("{}: {status} {said}", attack.name))
        })
        .collect();
    assert!(wrong.is_empty(), "{how}:\n{}", wrong.join("\n"));
    assert!(crate::cgroups().is_empty());
}

const THROUGH: i32 = 0;
const REFUSED: i32 = 1;
const KILLED: i32 = 2;
/// Kinds of threads, of a clone and of who makes a template.
const KINDS: [&str; 5] = ["vcpu", "device", "control", "maker-vcpu", "maker-control"];

#[test]
fn without_a_jail_every_attack_gets_through() {
    all("free", |_, status, _| status == THROUGH);
}

#[test]
fn the_walls_alone_stop_what_they_are_said_to_stop() {
    all("walls", |attack, status, _| match attack.stopped_by {
        StoppedBy::Walls | StoppedBy::Limits => status == REFUSED || status == KILLED,
        // So that the table is right: the filter is the only thing in the way.
        StoppedBy::Filter => status == THROUGH,
    });
}

#[test]
fn the_whole_jail_stops_every_attack_whatever_the_thread() {
    for kind in KINDS {
        all(&format!("whole:{kind}"), |attack, status, said| {
            match attack.stopped_by {
                StoppedBy::Walls | StoppedBy::Limits => status == REFUSED || status == KILLED,
                StoppedBy::Filter => status == KILLED && said.contains("signal 31"),
            }
        });
    }
}

/// The C library's allocator opens files for some of what it does, and when it does it depends on which thread is first.
#[test]
fn no_thread_is_killed_for_what_its_heap_does() {
    let _alone = alone();
    let prey = Prey::new();
    for kind in KINDS {
        let output = prey.attack(&format!("whole:{kind}"), "heap");
        assert_eq!(output.0, THROUGH, "{kind}: {}", output.1);
    }
}

#[test]
fn the_documentation_has_every_attack() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/jail.md");
    let text = std::fs::read_to_string(file).unwrap();
    let rows: Vec<Vec<&str>> = text
        .lines()
        .skip_while(|line| !line.starts_with("| attack |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let expected: Vec<Vec<&str>> = ATTACKS
        .iter()
        .map(|attack| {
            let by = match attack.stopped_by {
                StoppedBy::Walls => "walls and filter",
                StoppedBy::Filter => "filter",
                StoppedBy::Limits => "limits",
            };
            vec![attack.name, attack.tries, by]
        })
        .collect();
    let table: String = expected
        .iter()
        .map(|row| format!("| {} |\n", row.join(" | ")))
        .collect();
    assert!(rows == expected, "the table of docs/jail.md is to be:\n{table}");
}

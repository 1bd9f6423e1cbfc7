//! Applications that are started once: the answer of a clone that goes on with one, and of a container that starts it first. Both
//! are `picovm run` as a whole, jailed, with nothing prepared.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::process;
use crate::report::{Report, Unit};
use crate::rounds::{self, Probe, Selection};
use crate::workspace::Workspace;

/// Rounds that do not count.
const DISCARDED: u32 = 2;
/// What an application writes when it can answer.
const READY: &str = "ready";
/// A line is what it is asked, and another one the answer.
const QUESTION: &str = "key:4242";

/// What is started, and what it answers.
struct Application {
    image: &'static str,
    command: [&'static str; 3],
    answer: &'static str,
    /// The names of the two measures.
    warm: &'static str,
    cold: &'static str,
}

const APPLICATIONS: [Application; 2] = [
    Application {
        image: "debian-python",
        command: [
            "python3",
            "-c",
            "import asyncio, decimal, email.message, http.server, json, logging, sqlite3, ssl, sys, unittest, xml.etree.ElementTree\n\
             print('ready', flush=True)\n\
             for line in sys.stdin: print(json.dumps({'asked': line.strip()}), flush=True)",
        ],
        answer: r#"{"asked": "key:4242"}"#,
        warm: "warm_python",
        cold: "cold_python",
    },
    Application {
        image: "debian-redis",
        command: [
            "sh",
            "-c",
            "redis-server --port 0 --unixsocket /run/redis.sock --save '' --enable-debug-command yes --daemonize yes >/dev/null\n\
             ask() { redis-cli -s /run/redis.sock \"$@\"; }\n\
             until ask ping >/dev/null 2>&1; do sleep 0.05; done\n\
             ask debug populate 100000 >/dev/null\n\
             echo ready\n\
             while read -r key; do ask get \"$key\"; done",
        ],
        answer: "value:4242",
        warm: "warm_redis",
        cold: "cold_redis",
    },
];

/// Measures those whose image is there. Of one that fails, the report says so.
pub fn measure(
    workspace: &Workspace,
    selection: &Selection,
    rounds: u32,
    report: &mut Report,
) -> anyhow::Result<()> {
    let question = workspace.path("question");
    fs::write(&question, format!("{QUESTION}\n"))
        .with_context(|| format!("cannot write {}", question.display()))?;
    let mut probes = Vec::new();
    for application in &APPLICATIONS {
        if !selection.has(application.warm) && !selection.has(application.cold) {
            continue;
        }
        if workspace.take_image(application.image)?.is_none() {
            continue;
        }
        let what = format!("a template with {} running", application.image);
        let made = rounds::persist(&what, report, rounds::FAILURES_MAX, || {
            warm_up(workspace, application)
        });
        if let Err(error) = made {
            rounds::leave_out(report, &error);
            continue;
        }
        probes.push(probe(workspace, application, &question, application.warm, true));
        probes.push(probe(workspace, application, &question, application.cold, false));
    }
    rounds::measure("applications", probes, selection, (DISCARDED, rounds), report)
}

/// Makes the template with the application running, called as its measure.
fn warm_up(workspace: &Workspace, application: &Application) -> anyhow::Result<()> {
    let mut command = workspace.picovm_sized(workspace.store.root(), &["template", "warm"]);
    command
        .args(["--name", application.warm])
        .args(["--until-log", READY, application.image, "--"])
        .args(application.command);
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// From spawning `picovm run` to the answer at its standard output.
fn probe<'a>(
    workspace: &'a Workspace,
    application: &'a Application,
    question: &Path,
    name: &str,
    warm: bool,
) -> Probe<'a> {
    let question: PathBuf = question.to_owned();
    Probe::new([(name, Unit::Ms)], move || {
        let store = workspace.store.root();
        let subcommand = ["run", "--rm", "-i"];
        let mut command;
        if warm {
            command = workspace.picovm(store);
            command
                .args(subcommand)
                .args(["--from-template", application.warm]);
        } else {
            command = workspace.picovm_sized(store, &subcommand);
            command.arg(application.image).args(application.command);
        }
        let input = File::open(&question).with_context(|| format!("cannot open {}", question.display()))?;
        let answered = |output: &[u8]| String::from_utf8_lossy(output).contains(application.answer);
        let watched = process::watch(command.stdin(input), answered)?;
        let said = || format!("it answered {:?}", String::from_utf8_lossy(&watched.output));
        Ok([watched.mark.with_context(said)?])
    })
}

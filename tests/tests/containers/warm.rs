//! Warm templates: an application is started once, and clones go on with it.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::sync::OnceLock;

use picovm_tests::{children, kill};

use crate::{Container, PATIENCE, output, picovm, refused, stderr, stdout, store, told, until};

/// Brings hooks, starts slowly, then answers each line of its standard input with what only this run of it knows; ends with 3 when
/// there are no more.
const APPLICATION: &str = r##"
use strict; $| = 1;
mkdir "/etc/picovm"; mkdir "/etc/picovm/on-clone.d";
sub hook { my ($name, $text) = @_;
  open(my $file, ">", "/etc/picovm/on-clone.d/$name") or die; print $file "#!/bin/sh\n$text\n"; close $file;
  chmod 0755, "/etc/picovm/on-clone.d/$name"; }
hook("20-second", 'echo "second $COLOUR" >> /tmp/hooks; test -z "$BROKEN" || { echo so it is >&2; exit 5; }');
hook("10-first", 'echo "first $PICOVM_TEMPLATE $HOSTNAME ${#PICOVM_CONTAINER_ID}" >> /tmp/hooks');
print "slowly\n"; select(undef, undef, undef, 0.3);
my $answered = 0; print "ready\n";
while (my $line = <STDIN>) { chomp $line; $answered++;
  open(my $file, "<", "/tmp/hooks"); my @hooks = map { chomp; $_ } <$file>;
  print join("|", $answered, $line, `cat /etc/hostname` =~ s/\n//r, @hooks), "\n"; }
exit 3;
"##;

/// The template of that, named `app`.
fn app() -> &'static str {
    static APP: OnceLock<String> = OnceLock::new();
    APP.get_or_init(|| {
        let made = output(&[
            "template",
            "warm",
            "--name",
            "app",
            "--until-log",
            "^ready$",
            "-e",
            "COLOUR=red",
            "debian",
            "--",
            "perl",
            "-e",
            APPLICATION,
        ]);
        assert!(made.status.success(), "{}", stderr(&made));
        assert!(stderr(&made).contains("slowly\nready"), "{}", stderr(&made));
        stdout(&made)
    })
}

/// `picovm run --rm -i OPTIONS... --from-template NAME`, with this standard input.
fn answers(name: &str, options: &[&str], input: &str) -> Output {
    let arguments = [&["run", "--rm", "-i"], options, &["--from-template", name]].concat();
    let mut child = picovm(&arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("picovm starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    // One whose hooks fail does not read it.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("it ends")
}

#[test]
fn a_clone_goes_on_with_the_application_after_its_hooks() {
    let key = app();
    let first = answers("app", &["-h", "one", "-e", "COLOUR=blue"], "a\nb\n");
    assert_eq!(
        stdout(&first),
        "1|a|one|first app one 64|second blue\n2|b|one|first app one 64|second blue",
        "{}",
        stderr(&first)
    );
    assert_eq!(first.status.code(), Some(3));
    // The next one begins where the first did, by its id as well; the application's own variables are not the hooks'.
    let second = answers(key, &[], "c\n");
    let answer = stdout(&second);
    let fields: Vec<&str> = answer.split('|').collect();
    assert_eq!(fields.first(), Some(&"1"), "{answer}");
    assert_eq!(fields.get(4), Some(&"second"), "{answer}");
    assert_ne!(fields.get(2), Some(&"one"));
    // Without -i there is nothing to answer, and nothing of before is written again.
    let end = output(&["run", "--rm", "--from-template", "app"]);
    assert_eq!((end.status.code(), stdout(&end).as_str()), (Some(3), ""));
}

#[test]
fn the_start_that_follows_goes_on_in_a_clone_that_is_parked() {
    let _alone = crate::pool::alone();
    let key = app();
    let pool = || {
        let list: serde_json::Value = serde_json::from_str(&told(&["pool", "ls", "--json"])).unwrap();
        let pools = list.as_array().unwrap().clone();
        pools
            .into_iter()
            .find(|pool| pool["id"].as_str().unwrap().starts_with(key))
            .unwrap_or_default()
    };
    let parked = || until(|| pool()["parked"] == 1, || format!("it is {}", pool()));
    // Started cold; it has input to wait for.
    let first = picovm(&["run", "-d", "-i", "--from-template", "app"])
        .env("PICOVM_POOL_IDLE", "10m")
        .output()
        .expect("picovm starts");
    assert!(first.status.success(), "{}", stderr(&first));
    parked();
    for taken in 1..=2 {
        let name = format!("parked-{taken}");
        let answer = stdout(&answers("app", &["-h", &name, "-e", "COLOUR=green"], "a\n"));
        assert_eq!(
            answer,
            format!("1|a|{name}|first app {name} 64|second green"),
            "as in a clone that is started cold"
        );
        assert_eq!(pool()["taken"], taken);
        parked();
    }
    told(&["rm", "-f", &stdout(&first)]);
    told(&["pool", "stop", key]);
}

#[test]
fn a_hook_that_fails_ends_the_container_before_the_application_goes_on() {
    app();
    let failed = answers("app", &["-e", "BROKEN=1"], "a\n");
    let says = stderr(&failed);
    assert_eq!(
        (failed.status.code(), stdout(&failed).as_str()),
        (Some(125), ""),
        "{says}"
    );
    assert!(
        says.contains("on-clone.d/20-second") && says.contains("status 5"),
        "{says}"
    );
    assert!(says.contains("so it is"), "{says}");
}

#[test]
fn clones_draw_nothing_in_common_even_with_two_processors_that_never_rest() {
    // Both draw all the time, also while they are frozen. Of a number that was drawn before that, and not written yet, there may
    // be one for each.
    let draw = "open(R, '<', '/dev/urandom'); $| = 1; sub draw { sysread(R, my $b, 16); unpack('H*', $b) } \
                if (!fork) { while (1) { draw() } } print \"ready\\n\"; my $l; \
                $l = draw() while (!-e '/run/go'); print draw(), \"\\n\" for 0..500; kill 9, 0;";
    told(&[
        "template",
        "warm",
        "--name",
        "draw",
        "--cpus",
        "2",
        "--until-log",
        "ready",
        "debian",
        "--",
        "perl",
        "-e",
        draw,
    ]);
    let mut seen = BTreeSet::new();
    for _ in 0..2 {
        let container = Container(told(&["run", "-d", "--from-template", "draw"]));
        // The container may have ended, and that shell with it, before it has told how it ended.
        let _ = output(&["exec", container.id(), "touch", "/run/go"]);
        container.until("{{.State.Status}}", "exited");
        let drawn = told(&["logs", container.id()]);
        let numbers: Vec<&str> = drawn.lines().skip(1).collect();
        assert_eq!(numbers.len(), 500, "{drawn}");
        assert!(
            numbers
                .iter()
                .all(|number| number.len() == 32 && seen.insert((*number).to_owned()))
        );
    }
}

#[test]
fn a_warm_container_is_looked_at_stopped_and_begins_anew() {
    app();
    let container = Container(told(&["run", "-di", "--from-template", "app", "-h", "box"]));
    assert_eq!(
        container.shell("hostname; cat /tmp/hooks"),
        "box\nfirst app box 64\nsecond"
    );
    assert!(told(&["top", container.id()]).contains("perl"));
    container.shell("echo mine > /tmp/mine");
    told(&["stop", "-t", "1", container.id()]);
    // What it has written can be looked at.
    assert!(told(&["diff", container.id()]).contains("/tmp/mine"));
    told(&["start", container.id()]);
    assert_eq!(
        container.shell("ls /tmp/mine 2>/dev/null; cat /tmp/hooks | wc -l"),
        "2"
    );
}

#[test]
fn twenty_clones_of_one_application_answer_at_once() {
    app();
    let answered: BTreeSet<String> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..20)
            .map(|number| scope.spawn(move || answers("app", &[], &format!("{number}\n"))))
            .collect();
        runs.into_iter()
            .map(|run| {
                let output = run.join().expect("it ends");
                let answer = stdout(&output);
                assert!(answer.starts_with("1|"), "{answer}{}", stderr(&output));
                // Its host name.
                answer.split('|').nth(2).unwrap_or_default().to_owned()
            })
            .collect()
    });
    assert_eq!(answered.len(), 20);
}

#[test]
fn a_command_or_a_listener_tells_that_it_is_warm() {
    let listen = "use Socket; socket(S, PF_INET, SOCK_STREAM, 0); select(undef, undef, undef, 0.3); \
                  bind(S, sockaddr_in(8080, INADDR_LOOPBACK)); listen(S, 5); $l = <STDIN>; print \"got $l\";";
    told(&[
        "template",
        "warm",
        "--name",
        "port",
        "--until-port",
        "8080",
        "debian",
        "--",
        "perl",
        "-e",
        listen,
    ]);
    assert_eq!(stdout(&answers("port", &[], "it\n")), "got it");
    let slow = "sleep 0.3; touch /run/up; read line; echo got $line";
    told(&[
        "template",
        "warm",
        "--name",
        "exec",
        "--until-exec",
        "test -e /run/up",
        "debian",
        "--",
        "sh",
        "-c",
        slow,
    ]);
    assert_eq!(stdout(&answers("exec", &[], "it\n")), "got it");
}

#[test]
fn an_application_that_does_not_get_warm_is_told_with_its_reason() {
    let warm = |options: &[&str], script: &str| {
        refused(
            &[
                &["template", "warm"],
                options,
                &["debian", "--", "sh", "-c", script],
            ]
            .concat(),
            125,
        )
    };
    let ended = warm(&["--until-log", "never"], "echo last words; exit 4");
    assert!(
        ended.contains("status 4") && ended.contains("last words"),
        "{ended}"
    );
    let late = warm(&["--until-log", "never", "--timeout", "2s"], "sleep 1000");
    assert!(late.contains("2 s"), "{late}");
    assert!(warm(&["--until-log", "("], "true").contains("regular expression"));
    assert!(warm(&["--until-log", "x", "--name", "-"], "true").contains("name"));
    app();
    let taken = warm(&["--until-log", "x", "--name", "app"], "true");
    assert!(taken.contains("picovm template rm app"), "{taken}");
    // One of them has to say when.
    assert!(refused(&["template", "warm", "debian", "--", "true"], 2).contains("--until-log"));
}

#[test]
fn what_cannot_be_changed_of_a_running_application_is_refused() {
    app();
    for options in [
        &["-t"][..],
        &["-m", "64m"],
        &["--cpus", "2"],
        &["-u", "nobody"],
        &["-w", "/srv"],
        &["--entrypoint", "sh"],
        &["--read-only"],
        &["--storage", "1g"],
        &["--tmpfs", "/x"],
        &["-v", "/tmp:/data"],
    ] {
        refused(&[&["create", "--from-template", "app"], options].concat(), 125);
    }
    let command = refused(&["create", "--from-template", "app", "debian", "true"], 125);
    assert!(command.contains("neither an image nor a command"), "{command}");
    let image = told(&["template", "build", "debian"]);
    assert!(refused(&["create", "--from-template", &image], 125).contains("no running application"));
    assert!(refused(&["create", "--from-template", "no-such-template"], 125).contains("no-such-template"));
    let listed = told(&["template", "ls"]);
    assert!(
        listed
            .lines()
            .any(|line| line.contains("app") && line.contains("warm")),
        "{listed}"
    );
    assert!(told(&["template", "inspect", "app"]).contains("\"perl\""));
}

/// A `picovm template warm` under way, and the two processes below it: the one that starts jailed ones, and a jailed one.
struct UnderWay {
    picovm: Child,
    maker: u32,
    jailed: u32,
    cgroup: PathBuf,
}

/// Gets warm after a few seconds.
const SLOW: [&str; 8] = [
    "template",
    "warm",
    "--until-log",
    "up",
    "debian",
    "--",
    "sh",
    "-c",
];
const SLOW_SCRIPT: &str = "sleep 3; echo up; read line; echo got $line";

impl UnderWay {
    fn begin(options: &[&str]) -> Self {
        // The image's template is not what is killed.
        store();
        let arguments = [&SLOW[..2], options, &SLOW[2..], &[SLOW_SCRIPT]].concat();
        let picovm = picovm(&arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("picovm starts");
        let below = |process: u32| children(process).first().copied();
        let jail = |jailed: u32| {
            let told = std::fs::read_to_string(format!("/proc/{jailed}/cgroup")).ok()?;
            let path = told.trim_end().strip_prefix("0::/")?;
            // Before it is in its jail it is where everybody else is.
            path.contains("picovm")
                .then(|| PathBuf::from("/sys/fs/cgroup").join(path))
        };
        let in_its_jail = || {
            let maker = below(picovm.id())?;
            let jailed = below(maker)?;
            Some((maker, jailed, jail(jailed)?))
        };
        until(|| in_its_jail().is_some(), || "nobody makes the template".into());
        let (maker, jailed, cgroup) = in_its_jail().expect("a jailed process");
        Self {
            picovm,
            maker,
            jailed,
            cgroup,
        }
    }

    /// Waits until no process of it is there, and no cgroup.
    fn is_gone(&self) {
        let there = || {
            [self.maker, self.jailed]
                .map(|process| PathBuf::from(format!("/proc/{process}")))
                .into_iter()
                .chain([self.cgroup.clone()])
                .filter(|path| path.exists())
                .collect::<Vec<_>>()
        };
        until(
            || there().is_empty(),
            || format!("{:?} after {PATIENCE:?}", there()),
        );
    }
}

/// Templates that are half-written.
fn unfinished() -> usize {
    let templates = std::fs::read_dir(store().path().join("templates")).expect("the templates");
    templates
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".freezing-"))
        .count()
}

#[test]
fn who_is_killed_while_an_application_gets_warm_leaves_nothing() {
    // Who asks has no time to tidy up: its processes and their cgroup go at once, its files with the next template that is made,
    // which is another one here.
    let mut killed = UnderWay::begin(&["--name", "killed"]);
    kill(killed.picovm.id());
    killed.picovm.wait().expect("it ends");
    killed.is_gone();
    // Of the process with the guest in it, who asks is told.
    let killed = UnderWay::begin(&["--name", "again"]);
    kill(killed.jailed);
    let (maker, jailed, cgroup) = (killed.maker, killed.jailed, killed.cgroup);
    let output = killed.picovm.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("signal 9"), "{}", stderr(&output));
    for gone in [format!("/proc/{maker}"), format!("/proc/{jailed}")] {
        assert!(!Path::new(&gone).exists(), "{gone}");
    }
    assert!(!cgroup.exists(), "{}", cgroup.display());
    assert_eq!(unfinished(), 0);
    // Both names are free, and the same command works.
    let arguments = [&SLOW[..2], &["--name", "killed"], &SLOW[2..], &[SLOW_SCRIPT]].concat();
    told(&arguments);
    assert_eq!(stdout(&answers("killed", &[], "it\n")), "got it");
}

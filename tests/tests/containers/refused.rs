//! What cannot be done is refused with a sentence, and help is there for every command.

use crate::{output, refused, stdout, told};

#[test]
fn options_that_make_no_sense_here_are_refused_with_a_reason() {
    for (options, says) in [
        (&["--device", "/dev/sda"][..], "device"),
        (&["-v", "/tmp:/data:bogus"], "nocopy"),
        (&["-p", "80:80"], "network"),
        (&["--network", "host"], "network"),
        (&["--ulimit", "nonsense=1"], "nonsense"),
        (&["--ulimit", "nofile=5:2"], "nofile"),
        (&["--restart", "sometimes"], "sometimes"),
        (&["--stop-signal", "NOPE"], "NOPE"),
        (&["--name", "-x"], "x"),
        (&["--platform", "linux/arm64"], "arm64"),
        (&["--log-driver", "syslog"], "syslog"),
    ] {
        let error = refused(&[&["create"], options, &["debian", "true"]].concat(), 125);
        assert!(
            error.to_lowercase().contains(&says.to_lowercase()),
            "{options:?}: {error}"
        );
        assert!(!error.contains("panicked"), "{error}");
    }
    // What is so anyway is only noted.
    let noted = output(&["run", "--rm", "--privileged", "--init", "debian", "echo", "fine"]);
    assert_eq!(stdout(&noted), "fine");
}

#[test]
fn what_is_not_there_is_named() {
    for command in [
        &["start"][..],
        &["stop"],
        &["kill"],
        &["restart"],
        &["pause"],
        &["unpause"],
        &["wait"],
        &["rm"],
        &["logs"],
        &["attach"],
        &["inspect"],
        &["top"],
        &["diff"],
    ] {
        let error = refused(&[command, &["no-such-container"]].concat(), 1);
        assert!(error.contains("no-such-container"), "{command:?}: {error}");
    }
    assert!(refused(&["exec", "no-such-container", "true"], 1).contains("no-such-container"));
}

#[test]
fn every_command_has_help_with_an_example() {
    for command in [
        "run", "create", "start", "stop", "kill", "restart", "pause", "unpause", "wait", "rm", "ps", "logs",
        "exec", "attach", "inspect", "top", "stats", "cp", "rename", "commit", "diff", "events",
    ] {
        let help = told(&[command, "--help"]);
        assert!(
            help.contains("Examples:") && help.contains(&format!("picovm {command}")),
            "{command}: {help}"
        );
    }
}

//! `picovm exec`.

use std::io::Write;
use std::process::Stdio;

use crate::{Container, output, picovm, refused, stderr, stdout, told, until};

#[test]
fn a_command_runs_beside_the_container_s_own() {
    let container = Container::sleeping(&["-e", "COLOUR=blue", "-w", "/srv", "--hostname", "box"]);
    assert_eq!(
        container.shell("echo $COLOUR $(pwd) $(hostname)"),
        "blue /srv box"
    );
    let failed = output(&[
        "exec",
        container.id(),
        "sh",
        "-c",
        "echo out; echo err >&2; exit 7",
    ]);
    assert_eq!(
        (
            stdout(&failed).as_str(),
            stderr(&failed).as_str(),
            failed.status.code()
        ),
        ("out", "err", Some(7))
    );
    refused(
        &["exec", container.id(), "sh", "-c", "kill -9 $$; echo never"],
        137,
    );
}

#[test]
fn options_of_exec_are_its_own() {
    let container = Container::sleeping(&["-e", "COLOUR=blue"]);
    let told = told(&[
        "exec",
        "-e",
        "COLOUR=red",
        "-e",
        "SIZE=7",
        "-w",
        "/tmp",
        "-u",
        "nobody",
        container.id(),
        "sh",
        "-c",
        "echo $COLOUR $SIZE $(pwd) $(id -un)",
    ]);
    assert_eq!(told, "red 7 /tmp nobody");
}

#[test]
fn standard_input_goes_in_and_ends() {
    let container = Container::sleeping(&[]);
    let mut child = picovm(&["exec", "-i", container.id(), "sha256sum"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&vec![b'x'; 3_000_000]));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    let here = {
        let output = std::process::Command::new("sh")
            .args(["-c", "head -c 3000000 /dev/zero | tr '\\0' x | sha256sum"])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(stdout(&output), here.trim_end());
    // Without -i there is none.
    assert_eq!(told(&["exec", container.id(), "wc", "-c"]), "0");
}

#[test]
fn many_at_once_stay_apart() {
    let container = Container::sleeping(&[]);
    let children: Vec<_> = (0..20)
        .map(|number| {
            let script = format!("for i in 1 2 3; do echo {number}; sleep 0.05; done; exit {number}");
            picovm(&["exec", container.id(), "sh", "-c", &script])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for (number, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(stdout(&output), format!("{number}\n{number}\n{number}"));
        assert_eq!(output.status.code(), Some(number as i32));
    }
}

#[test]
fn in_the_background_it_goes_on_after_the_command() {
    let container = Container::sleeping(&[]);
    assert_eq!(
        told(&[
            "exec",
            "-d",
            container.id(),
            "sh",
            "-c",
            "sleep 0.5; echo done > /tmp/mark"
        ]),
        ""
    );
    until(
        || stdout(&output(&["exec", container.id(), "cat", "/tmp/mark"])) == "done",
        || "the mark is not there".into(),
    );
}

#[test]
fn what_cannot_be_executed_has_the_status_that_docker_has() {
    let container = Container::sleeping(&[]);
    assert!(refused(&["exec", container.id(), "no-such-command"], 127).contains("no-such-command"));
    assert!(refused(&["exec", container.id(), "/etc/passwd"], 126).contains("/etc/passwd"));
    assert!(refused(&["exec", "-u", "no-such-user", container.id(), "true"], 125).contains("no-such-user"));
    told(&["stop", container.id()]);
    assert!(refused(&["exec", container.id(), "true"], 1).contains("not running"));
}

#[test]
fn it_ends_with_the_container() {
    let container = Container::sleeping(&[]);
    let child = picovm(&["exec", container.id(), "sleep", "1000"])
        .spawn()
        .unwrap();
    let mut child = child;
    until(
        || told(&["top", container.id()]).matches("sleep 1000").count() == 2,
        || "the second sleep is not there".into(),
    );
    told(&["kill", container.id()]);
    assert_eq!(child.wait().unwrap().code(), Some(137));
}

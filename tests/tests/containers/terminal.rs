//! Containers with a terminal, in a real one: tmux.

use std::process::Command;

use crate::{Container, store, told, until};

/// The end of the shell's prompt. The blank behind it is none on a screen.
const PROMPT: &str = ":/#";

/// A terminal of 80 by 24 characters in which commands run.
struct Terminal {
    server: String,
}

impl Terminal {
    fn run(name: &str, command: &str) -> Self {
        let terminal = Self {
            server: format!("picovm-{name}-{}", std::process::id()),
        };
        let picovm = picovm_tests::binary();
        let directory = picovm.parent().unwrap().display();
        let shell = format!(
            "PATH={directory}:$PATH PICOVM_HOME={} PICOVM_POOL_IDLE=0 PS1='here> ' TERM=screen exec sh -c '{command}; echo status $?; stty -a | grep -o -- \"-*icanon\"; exec sleep 1000'",
            store().path().display()
        );
        terminal.tmux(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "80",
            "-y",
            "24",
            &shell,
        ]);
        terminal
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let output = Command::new("tmux")
            .args(["-L", &self.server])
            .args(arguments)
            .env("LC_ALL", "C.UTF-8")
            .output()
            .expect("tmux is there: `make setup` installs it");
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn until(&self, text: &str) {
        until(
            || self.screen().contains(text),
            || format!("no {text:?} on\n{}", self.screen()),
        );
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = Command::new("tmux")
            .args(["-L", &self.server, "kill-server"])
            .output();
    }
}

#[test]
fn a_shell_has_a_terminal_of_the_right_size_and_job_control() {
    let terminal = Terminal::run("shell", "picovm run --rm -it debian bash");
    terminal.until(PROMPT);
    terminal.keys(&["stty size; tty; echo $TERM", "Enter"]);
    terminal.until("24 80");
    terminal.until("/dev/pts/");
    terminal.keys(&["clear; sleep 1000", "Enter"]);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    terminal.keys(&["C-z"]);
    terminal.until("Stopped");
    terminal.keys(&["clear; jobs; kill %1; echo j$((1+1))b", "Enter"]);
    terminal.until("j2b");
    // Ctrl-C ends what runs, and not the shell.
    terminal.keys(&["clear; sleep 1000", "Enter"]);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    terminal.keys(&["C-c"]);
    terminal.keys(&["echo al''ive", "Enter"]);
    terminal.until("alive");
    terminal.keys(&["exit 7", "Enter"]);
    terminal.until("status 7");
    // The terminal is what it was before.
    terminal.until("icanon");
    assert!(!terminal.screen().contains("-icanon"), "{}", terminal.screen());
}

#[test]
fn another_size_is_told_to_the_program() {
    let terminal = Terminal::run("size", "picovm run --rm -it debian bash");
    terminal.until(PROMPT);
    terminal.tmux(&["resize-window", "-x", "100", "-y", "30"]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    terminal.keys(&["stty size", "Enter"]);
    terminal.until("30 100");
    terminal.keys(&["exit", "Enter"]);
    terminal.until("status 0");
}

#[test]
fn a_program_of_the_whole_screen_draws_right() {
    let container = Container::sleeping(&["--name", "whole-screen"]);
    told(&["cp", "/bin/busybox", "whole-screen:/bin/busybox"]);
    let terminal = Terminal::run("screen", "picovm exec -it whole-screen busybox vi /tmp/written");
    // An empty file: a tilde at the beginning of each line but the first and the last.
    terminal.until("~");
    terminal.keys(&["i", "some text", "Escape"]);
    terminal.until("some text");
    let screen = terminal.screen();
    let lines: Vec<&str> = screen.lines().collect();
    assert_eq!(lines.first(), Some(&"some text"), "{screen}");
    assert_eq!(lines.iter().filter(|line| **line == "~").count(), 22, "{screen}");
    terminal.keys(&[":wq", "Enter"]);
    terminal.until("status 0");
    assert_eq!(container.shell("cat /tmp/written"), "some text");
    let top = Terminal::run("top", "picovm exec -it whole-screen busybox top -d 1");
    top.until("PID");
    top.until("sleep 1000");
    assert!(top.screen().starts_with("Mem: "), "{}", top.screen());
    top.keys(&["q"]);
    top.until("status 0");
}

#[test]
fn who_detaches_leaves_it_running_and_may_come_back() {
    let terminal = Terminal::run("detach", "picovm run -it --name detached debian bash");
    let container = Container("detached".into());
    terminal.until(PROMPT);
    terminal.keys(&["MARK=still-here", "Enter"]);
    terminal.keys(&["C-p", "C-q"]);
    terminal.until("status 0");
    assert_eq!(container.status(), "running");
    let back = Terminal::run("back", "picovm attach detached");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    back.keys(&["echo $MARK", "Enter"]);
    back.until("still-here");
    back.keys(&["exit 4", "Enter"]);
    back.until("status 4");
    assert_eq!(
        container.inspect("{{.State.Status}} {{.State.ExitCode}}"),
        "exited 4"
    );
}

#[test]
fn exec_has_a_terminal_too() {
    let container = Container::sleeping(&["--name", "executed"]);
    let terminal = Terminal::run("exec", "picovm exec -it executed bash");
    terminal.until(PROMPT);
    terminal.keys(&["stty size; [ -t 0 ] && echo ter''minal", "Enter"]);
    terminal.until("24 80");
    terminal.until("terminal");
    terminal.keys(&["exit 3", "Enter"]);
    terminal.until("status 3");
    assert_eq!(container.status(), "running");
}

#[test]
fn without_a_terminal_here_there_is_none_there() {
    let error = crate::refused(&["run", "-it", "--rm", "debian", "true"], 1);
    assert!(
        error.to_lowercase().contains("terminal") || error.contains("TTY"),
        "{error}"
    );
    // -t alone is for who only looks.
    assert_eq!(told(&["run", "--rm", "-t", "debian", "tty"]), "/dev/pts/0");
}

//! Looking at containers: `ps`, `inspect`, `top`, `stats`, health.

use crate::{Container, output, stderr, told};

#[test]
fn ps_lists_those_that_run_and_with_a_all() {
    let running = Container::sleeping(&["--name", "listed-up", "--label", "list=1"]);
    let ended = Container::run(
        &["--name", "listed-down", "--label", "list=1"],
        &["sh", "-c", "exit 3"],
    );
    ended.until("{{.State.Status}}", "exited");
    let filter = ["--filter", "label=list=1"];
    let list = told(&[&["ps"][..], &filter].concat());
    let lines: Vec<&str> = list.lines().collect();
    assert!(
        lines[0].starts_with("CONTAINER ID") && lines[0].ends_with("NAMES"),
        "{list}"
    );
    assert_eq!(lines.len(), 2, "{list}");
    assert!(lines[1].starts_with(&running.id()[..12]), "{list}");
    assert!(
        lines[1].contains("debian") && lines[1].contains("\"sleep 1000\"") && lines[1].contains("Up "),
        "{list}"
    );
    let all = told(&[&["ps", "-a"][..], &filter].concat());
    assert_eq!(all.lines().count(), 3, "{all}");
    assert!(all.contains("Exited (3)"), "{all}");
    let ids = told(&[&["ps", "-aq", "--no-trunc"][..], &filter].concat());
    // The newest first.
    assert_eq!(ids, format!("{}\n{}", ended.id(), running.id()));
    let format = told(&[&["ps", "-a", "--format", "{{.Names}} {{.State}}"][..], &filter].concat());
    assert_eq!(format, "listed-down exited\nlisted-up running");
    let status = told(&[&["ps", "-a", "--filter", "status=exited", "-q"][..], &filter].concat());
    assert_eq!(status, ended.id()[..12]);
    let json = told(&[&["ps", "-a", "--json"][..], &filter].concat());
    assert!(
        serde_json::from_str::<serde_json::Value>(json.lines().next().unwrap_or_default()).is_ok()
            || serde_json::from_str::<serde_json::Value>(&json).is_ok(),
        "{json}"
    );
}

#[test]
fn inspect_has_the_fields_that_docker_has() {
    let container = Container::sleeping(&[
        "-e",
        "A=1",
        "--label",
        "x=y",
        "-m",
        "100m",
        "--restart",
        "on-failure:3",
    ]);
    let json = told(&["inspect", container.id()]);
    let all: serde_json::Value = serde_json::from_str(&json).unwrap();
    let one = &all[0];
    assert_eq!(one["Id"], container.id());
    assert_eq!(one["State"]["Running"], true);
    assert_eq!(one["Path"], "sleep");
    assert_eq!(one["Args"][0], "1000");
    assert_eq!(one["Config"]["Labels"]["x"], "y");
    assert!(one["Config"]["Env"].as_array().unwrap().contains(&"A=1".into()));
    assert_eq!(one["HostConfig"]["Memory"], 100 << 20);
    assert_eq!(one["HostConfig"]["RestartPolicy"]["Name"], "on-failure");
    assert_eq!(one["HostConfig"]["RestartPolicy"]["MaximumRetryCount"], 3);
    assert_eq!(one["Config"]["Hostname"], container.id()[..12]);
    // Images are there too.
    assert!(told(&["inspect", "debian"]).contains("\"RootFS\""));
}

#[test]
fn top_and_stats_tell_what_it_does() {
    let container = Container::run(&[], &["sh", "-c", "sleep 1000 & while :; do :; done"]);
    let top = told(&["top", container.id()]);
    assert!(top.lines().next().unwrap().contains("PID"), "{top}");
    assert!(top.contains("sleep 1000"), "{top}");
    assert!(!top.contains("init"), "{top}");
    let stats = told(&["stats", "--no-stream", container.id()]);
    let lines: Vec<&str> = stats.lines().collect();
    assert!(lines[0].contains("CPU %") && lines[0].contains("PIDS"), "{stats}");
    assert!(lines[1].contains(&container.id()[..12]), "{stats}");
    let pids = told(&["stats", "--no-stream", "--format", "{{.PIDs}}", container.id()]);
    assert_eq!(pids, "2");
}

#[test]
fn a_health_check_tells_whether_it_works() {
    let options = [
        "--health-cmd",
        "test -e /tmp/well",
        "--health-interval",
        "300ms",
        "--health-retries",
        "2",
    ];
    let container = Container::sleeping(&options);
    assert_eq!(container.inspect("{{.State.Health.Status}}"), "starting");
    container.until("{{.State.Health.Status}}", "unhealthy");
    container.shell("touch /tmp/well");
    container.until("{{.State.Health.Status}}", "healthy");
    assert!(told(&["ps", "--filter", &format!("id={}", container.id())]).contains("(healthy)"));
}

#[test]
fn one_that_fails_among_several_does_not_hold_up_the_others() {
    let container = Container::sleeping(&[]);
    let stopped = output(&["stop", "no-such", container.id()]);
    assert_eq!(stopped.status.code(), Some(1));
    assert!(stderr(&stopped).contains("no-such"), "{}", stderr(&stopped));
    assert_eq!(container.status(), "exited");
}

//! The records of containers, without any that runs.

use std::collections::BTreeMap;

use super::*;

/// A configuration with nothing particular in it.
pub(super) fn config() -> ContainerConfig {
    ContainerConfig {
        id: Containers::new_id().unwrap(),
        created: Utc::now(),
        image: "debian".into(),
        image_id: format!("sha256:{}", "1".repeat(64)),
        image_digest: "2".repeat(64),
        memory_mib: 256,
        vcpus: 1,
        args: vec!["sh".into(), "-c".into(), "true".into()],
        entrypoint: 0,
        env: vec!["A=1".into()],
        workdir: Text::default(),
        user: Text::default(),
        groups: Vec::new(),
        hostname: None,
        stdin: false,
        terminal: false,
        rlimits: Vec::new(),
        drop_capabilities: 0,
        no_new_privileges: false,
        memory_limit: None,
        pids_limit: None,
        cpu_limit: None,
        read_only: false,
        tmpfs: Vec::new(),
        mounts: Vec::new(),
        storage: None,
        hosts: Vec::new(),
        labels: BTreeMap::from([("team".to_owned(), "blue".to_owned())]),
        stop_signal: 15,
        stop_timeout: 10,
        restart: RestartPolicy::No,
        log: LogOptions::default(),
        auto_remove: false,
        healthcheck: None,
        isolate_memory: false,
        confinement: crate::Confinement::Jailed,
        console_log: None,
        warm: None,
    }
}

fn containers() -> (tempfile::TempDir, Containers) {
    let directory = tempfile::tempdir().unwrap();
    let containers = Store::open(directory.path()).unwrap().containers().unwrap();
    (directory, containers)
}

#[test]
fn a_container_is_found_by_its_name_its_id_and_the_beginning_of_it() {
    let (_directory, containers) = containers();
    let made = containers.create(config(), Some("web")).unwrap();
    for name in ["web", "/web", made.id(), &made.id()[..12]] {
        let found = containers.find(name).unwrap();
        assert_eq!(
            (found.id(), found.config.clone()),
            (made.id(), made.config.clone())
        );
        assert_eq!(found.state, State::default());
    }
    for name in ["", "we", "xyz"] {
        assert!(
            matches!(containers.find(name), Err(EngineError::NoContainer { .. })),
            "{name:?}"
        );
    }
}

#[test]
fn a_name_is_free_again_when_its_container_is_gone_or_called_otherwise() {
    let (directory, containers) = containers();
    let first = containers.create(config(), Some("web")).unwrap();
    let mut second = containers.create(config(), Some("dbs")).unwrap();
    containers.remove(&first).unwrap();
    containers.rename(&mut second, "web").unwrap();
    assert_eq!(containers.find("web").unwrap().id(), second.id());
    let third = containers.create(config(), Some("dbs")).unwrap();
    assert_eq!(containers.find("dbs").unwrap().id(), third.id());
    // Who removes it may have found it by the name before.
    second.name = "cache".into();
    containers.remove(&second).unwrap();
    assert!(!directory.path().join("containers/.names/web").is_symlink());
}

#[test]
fn a_whole_id_is_not_the_name_of_another() {
    let (_directory, containers) = containers();
    let made = containers.create(config(), None).unwrap();
    containers.create(config(), Some(made.id())).unwrap();
    assert_eq!(containers.find(made.id()).unwrap().id(), made.id());
}

#[test]
fn what_a_killed_command_has_left_of_a_name_counts_for_nothing() {
    let (directory, containers) = containers();
    let links = directory.path().join("containers/.names");
    let made = containers.create(config(), Some("web")).unwrap();
    // Before the container was there; before the name was; of what is no container.
    std::os::unix::fs::symlink(format!("../{}", Containers::new_id().unwrap()), links.join("dbs")).unwrap();
    std::os::unix::fs::symlink(format!("../{}", made.id()), links.join("cache")).unwrap();
    std::os::unix::fs::symlink("../../etc", links.join("etc")).unwrap();
    assert!(links.join("web").join(CONFIG).is_file());
    for name in ["dbs", "cache", "etc", "..", ".names"] {
        assert!(
            matches!(containers.find(name), Err(EngineError::NoContainer { .. })),
            "{name}"
        );
    }
    for name in ["dbs", "cache", "etc"] {
        let taken = containers.create(config(), Some(name)).unwrap();
        assert_eq!(containers.find(name).unwrap().id(), taken.id());
    }
}

#[test]
fn an_index_of_names_that_is_gone_is_made_again() {
    let (directory, containers) = containers();
    let made = containers.create(config(), Some("web")).unwrap();
    fs::remove_dir_all(directory.path().join("containers/.names")).unwrap();
    let again = containers.store.containers().unwrap();
    assert_eq!(again.find("web").unwrap().id(), made.id());
    assert!(again.create(config(), Some("web")).is_err());
}

#[test]
fn a_container_whose_monitor_was_killed_is_taken_as_one_that_has_ended() {
    let (_directory, containers) = containers();
    let mut made = containers.create(config(), None).unwrap();
    made.state.status = Status::Running;
    Containers::write_state(&made).unwrap();
    let (taken, _lock) = containers.lock(&made).unwrap().unwrap();
    assert_eq!(
        (taken.state.status, taken.state.exit_code),
        (Status::Exited, KILLED)
    );
    // To everybody else it is one that runs, or is about to.
    assert!(containers.lock(&made).unwrap().is_none());
}

#[test]
fn a_container_that_was_removed_is_said_to_be_gone() {
    let (_directory, containers) = containers();
    let made = containers.create(config(), None).unwrap();
    containers.remove(&made).unwrap();
    for error in [containers.remove(&made).err(), containers.reread(&made).err()] {
        assert!(
            matches!(error, Some(EngineError::NoContainer { .. })),
            "{error:?}"
        );
    }
}

#[test]
fn nobody_else_may_look_into_containers() {
    use std::os::unix::fs::PermissionsExt;
    let (directory, containers) = containers();
    let made = containers.create(config(), None).unwrap();
    for path in [&directory.path().join("containers"), &made.directory] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
    }
}

#[test]
fn the_beginning_of_two_ids_is_refused() {
    let (_directory, containers) = containers();
    for last in ["1", "2"] {
        let id = format!("{}{last}", "a".repeat(63));
        containers
            .create(ContainerConfig { id, ..config() }, None)
            .unwrap();
    }
    assert!(matches!(
        containers.find("aaaa"),
        Err(EngineError::AmbiguousContainer { .. })
    ));
}

#[test]
fn no_two_containers_have_one_name() {
    let (_directory, containers) = containers();
    let first = containers.create(config(), Some("web")).unwrap();
    let error = containers.create(config(), Some("web")).unwrap_err().to_string();
    assert!(error.contains(first.id()), "{error}");
    let mut other = containers.create(config(), None).unwrap();
    assert!(containers.rename(&mut other, "web").is_err());
    containers.rename(&mut other, "dbs").unwrap();
    assert_eq!(containers.find("dbs").unwrap().id(), other.id());
    assert_eq!(containers.list().unwrap().len(), 2);
}

#[test]
fn one_whose_monitor_was_killed_has_ended() {
    let (_directory, containers) = containers();
    let mut made = containers.create(config(), Some("web")).unwrap();
    made.state.status = Status::Running;
    made.state.pid = 1;
    Containers::write_state(&made).unwrap();
    {
        let _lock = Lock::take(&made.file(RUNNING_LOCK)).unwrap();
        assert_eq!(containers.find("web").unwrap().state.status, Status::Running);
        assert!(matches!(
            containers.remove(&made),
            Err(EngineError::StillRunning { .. })
        ));
    }
    let state = containers.find("web").unwrap().state;
    assert_eq!(
        (state.status, state.exit_code, state.pid),
        (Status::Exited, 137, 0)
    );
    assert!(state.finished.is_some() && state.error.contains("killed"));
    containers.remove(&made).unwrap();
    assert!(containers.find("web").is_err());
}

#[test]
fn what_was_left_half_done_is_swept_and_never_listed() {
    let (directory, containers) = containers();
    let half = directory.path().join("containers").join(format!("{UNFINISHED}x"));
    fs::create_dir(&half).unwrap();
    assert!(containers.list().unwrap().is_empty());
    containers.sweep();
    assert!(!half.exists());
}

#[test]
fn events_are_read_from_a_time_on() {
    let (_directory, containers) = containers();
    let before = Utc::now();
    let mut made = containers.create(config(), Some("web")).unwrap();
    containers.rename(&mut made, "site").unwrap();
    containers.remove(&made).unwrap();
    let mut seen = Vec::new();
    containers
        .events(Some(before), Some(Utc::now()), &mut |event| {
            assert_eq!(event.attributes["team"], "blue");
            seen.push(event.action);
            true
        })
        .unwrap();
    assert_eq!(seen, ["create", "rename", "destroy"]);
}

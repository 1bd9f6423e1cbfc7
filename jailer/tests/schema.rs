//! The schema that is published is that of the policy as it is.

use picovm_jailer::{Access, Policy, SeccompMode};

#[test]
fn the_published_schema_is_that_of_the_policy() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/jail-policy.schema.json");
    let published = std::fs::read_to_string(file).unwrap();
    assert!(
        published == Policy::schema(),
        "docs/jail-policy.schema.json is old: picovm-jailer --schema > docs/jail-policy.schema.json"
    );
}

#[test]
fn what_is_not_mentioned_confines_most() {
    let policy = Policy::from_json(b"{}").unwrap();
    let namespaces = &policy.namespaces;
    assert!(namespaces.mount && namespaces.pid && namespaces.ipc && namespaces.uts && namespaces.net);
    assert!(policy.root.is_empty() && !policy.outlives_parent);
    assert_eq!(policy.seccomp.mode, SeccompMode::Kill);
    let entry = br#"{ "root": [ { "path": "/etc" } ] }"#;
    assert_eq!(Policy::from_json(entry).unwrap().root[0].access, Access::Read);
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    for (json, reason) in [
        ("", "EOF"),
        (r#"{ "roots": [] }"#, "unknown field `roots`"),
        (r#"{ "root": [ { "path": "etc" } ] }"#, "no absolute path"),
        (r#"{ "root": [ { "path": "/" } ] }"#, "no absolute path"),
        (r#"{ "root": [ { "path": "/a/../b" } ] }"#, "no absolute path"),
        (
            r#"{ "root": [ { "path": "/a", "source": "b" } ] }"#,
            "no absolute path",
        ),
        (
            r#"{ "root": [ { "path": "/a" }, { "path": "/a/b" } ] }"#,
            "in each other's way",
        ),
        (
            r#"{ "root": [ { "path": "/a" } ], "namespaces": { "mount": false } }"#,
            "namespaces.mount",
        ),
        (r#"{ "ids": { "first": 0 } }"#, "no range without root"),
        (r#"{ "ids": { "first": 4294967000 } }"#, "no range without root"),
        (r#"{ "ids": { "count": 0 } }"#, "no range without root"),
        (r#"{ "cgroup": { "parent": "../x" } }"#, "cgroup.parent"),
        (r#"{ "cgroup": { "cpu": 1 } }"#, "cgroup.cpu"),
        (r#"{ "cgroup": { "cpu_weight": 0 } }"#, "cgroup.cpu_weight"),
        (r#"{ "rlimits": { "files": 1 } }"#, "files"),
        (r#"{ "seccomp": { "mode": "loud" } }"#, "loud"),
    ] {
        let told = Policy::from_json(json.as_bytes()).unwrap_err().to_string();
        assert!(told.contains(reason), "{json}: {told}");
    }
}

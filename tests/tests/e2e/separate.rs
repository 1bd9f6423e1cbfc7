//! No clone sees another, and none changes the template.

use std::collections::HashSet;

use picovm_tests::{capture, script};

use crate::template;

#[test]
fn what_one_writes_the_next_does_not_see() {
    let written = capture(
        template(),
        &script("echo secret > /etc/mark; MARK=x; cat /etc/mark; touch /dev/shm/mark"),
    )
    .unwrap();
    assert_eq!(written.text(), "secret");
    let seen = capture(
        template(),
        &script("cat /etc/mark; ls /dev/shm; echo \"[$MARK]\""),
    )
    .unwrap();
    assert_eq!(seen.text(), "[]");
}

#[test]
fn random_bytes_identifiers_and_host_names_differ() {
    let look = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; hostname; perl -e 'print rand()'";
    let mut lines: [HashSet<String>; 4] = Default::default();
    for _ in 0..20 {
        let done = capture(template(), &script(look)).unwrap();
        for (set, line) in lines.iter_mut().zip(done.text().lines()) {
            set.insert(line.to_owned());
        }
    }
    assert_eq!(lines.map(|set| set.len()), [20; 4]);
}

#[test]
fn address_space_layouts_differ() {
    let stacks: HashSet<String> = (0..10)
        .map(|_| {
            capture(template(), &script("grep stack /proc/self/maps | cut -d- -f1"))
                .unwrap()
                .text()
        })
        .collect();
    assert!(stacks.len() >= 9, "{stacks:?}");
}

#[test]
fn the_template_stays_as_it_was_frozen() {
    capture(
        template(),
        &script("head -c 20000000 /dev/urandom > /root/x; sync"),
    )
    .unwrap();
    template().verify_memory().unwrap();
}

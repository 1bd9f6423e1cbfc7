//! Attacks by a root shell in an ordinary container: on its own machine, and through it on the VMM.

use std::time::Duration;

use crate::harness::{Ended, Guest, Input, Output, attack};

fn shell(script: &str, output: Output, limit: u64) -> Ended {
    let limit = Some(Duration::from_secs(limit));
    attack(
        Guest::Container,
        &[],
        &["sh", "-c", script],
        Input::Null,
        output,
        limit,
    )
}

fn said(ended: &Ended) -> String {
    String::from_utf8_lossy(&ended.stdout).trim_end().to_owned()
}

/// Ended by what it did, or by the time that it had: told, in either case.
fn came_to_an_end(ended: &Ended, statuses: &[i32]) {
    let status = ended.status.code().unwrap();
    assert!(
        statuses.contains(&status) || status == 125 && ended.stderr.contains("picovm: "),
        "{ended:?}"
    );
}

#[test]
fn a_fork_bomb() {
    let ended = shell(
        "bomb() { bomb | bomb & }; bomb; sleep 4; echo over",
        Output::Kept,
        10,
    );
    // The shell outlives it, is chosen when memory runs out, or cannot fork.
    came_to_an_end(&ended, &[0, 1, 2, 137, 124]);
}

#[test]
fn memory_without_end() {
    let ended = shell("exec perl -e '$x .= \"x\" x 1000000 while 1'", Output::Kept, 15);
    came_to_an_end(&ended, &[137, 1, 12, 124]);
}

#[test]
fn files_without_end() {
    let ended = shell(
        "cat /dev/zero > /root/x || rm /root/x; i=0; while [ $i -lt 300 ]; do i=$((i+1)); : > /root/$i; done; echo over",
        Output::Kept,
        15,
    );
    came_to_an_end(&ended, &[0, 137, 124]);
}

#[test]
fn output_without_end() {
    let ended = shell("exec timeout 3 cat /dev/zero", Output::Read, 15);
    assert_eq!(ended.status.code(), Some(124), "{ended:?}");
    // And to a reader that does not read.
    let ended = shell("exec cat /dev/zero", Output::Stalled, 3);
    assert_eq!(ended.status.code(), Some(124), "{ended:?}");
}

/// `reboot(2)` with its two magic numbers: `reboot -f`.
#[test]
fn a_reboot_by_force() {
    let ended = shell(
        "perl -e 'syscall(169, 0xfee1dead, 672274793, 0x1234567, 0); print \"$!\\n\"'; perl -e \
         'syscall(169, 0xfee1dead, 672274793, 0x4321fedc, 0); print \"$!\\n\"'",
        Output::Kept,
        15,
    );
    assert_eq!(
        said(&ended),
        "Operation not permitted\nOperation not permitted",
        "{ended:?}"
    );
    assert_eq!(ended.status.code(), Some(0));
}

#[test]
fn signals_to_process_1_and_to_all() {
    // Process 1 takes no signal that it does not handle from its own machine.
    let ended = shell(
        "for s in KILL STOP SEGV TERM; do kill -$s 1; done; echo lives",
        Output::Kept,
        15,
    );
    assert_eq!((said(&ended).as_str(), ended.status.code()), ("lives", Some(0)));
    let ended = shell("exec perl -e 'kill 9, -1; print \"lives\\n\"'", Output::Kept, 15);
    assert_eq!((said(&ended).as_str(), ended.status.code()), ("lives", Some(0)));
    let ended = shell("kill -9 $$", Output::Kept, 15);
    assert_eq!(ended.status.code(), Some(137));
}

#[test]
fn a_panic_on_demand() {
    let ended = shell(
        "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; echo lives",
        Output::Kept,
        15,
    );
    // This kernel has no such trigger. One that has panics, and the reason is told.
    match ended.status.code() {
        Some(0) => assert_eq!(said(&ended), "lives"),
        _ => assert!(ended.stderr.contains("it reset itself"), "{ended:?}"),
    }
}

/// What a container's root finds of the machine: physical memory, the control port, the drivers.
#[test]
fn the_machine_behind_the_container() {
    let ended = shell(
        "mknod /m c 1 1 && dd if=/m bs=1 count=1 of=/dev/null 2>/dev/null && echo memory; ls /dev/mem /dev/vport* \
         2>/dev/null; perl -e 'syscall(172, 3); print \"ports\\n\" unless $!'; echo lives",
        Output::Kept,
        15,
    );
    assert_eq!(
        (said(&ended).as_str(), ended.status.code()),
        ("lives", Some(0)),
        "{ended:?}"
    );
}

/// Drivers taken off their devices, the disk and the console among them, under the running container.
#[test]
fn drivers_taken_off_their_devices() {
    let script = "for driver in virtio_rng virtio_blk virtio_console; do for device in /sys/bus/virtio/drivers/$driver/virtio*; \
                  do echo ${device##*/} > /sys/bus/virtio/drivers/$driver/unbind; done; done; sleep 1; echo lives";
    let ended = shell(script, Output::Kept, 8);
    // Without its console the agent ends the machine; without its disk a program may not be read any more.
    came_to_an_end(&ended, &[0, 1, 2, 124, 126, 127, 135]);
}

//! `picovm doctor`, and the probe behind it, where KVM is a real one.

use picovm_vmm::{probe, vm};

use crate::{picovm, stdout};

#[test]
fn the_probe_finds_that_kernel_code_runs() {
    let report = probe::run(&vm::open_kvm().unwrap()).unwrap();
    assert_eq!(report.verdict(), probe::Verdict::Executes, "{report}");
}

#[test]
fn doctor_says_that_this_host_can_run_picovm() {
    let output = picovm(&["doctor"]).output().unwrap();
    assert!(output.status.success(), "{}", stdout(&output));
    assert!(stdout(&output).contains("guest code"), "{}", stdout(&output));
    let output = picovm(&["doctor", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["usable"], true);
}

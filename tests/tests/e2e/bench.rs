//! `picovm bench`: the figures are well-formed, and nothing is left when they are printed.

use std::time::Duration;

use serde_json::Value;

use crate::pool::{alone, gone_within};
use crate::{picovm, stderr, stdout, template};

const GONE: Duration = Duration::from_secs(20);

/// What `picovm bench ARGUMENTS... --json` prints.
fn figures(arguments: &[&str]) -> Value {
    template();
    let output = picovm(&[&["bench"], arguments].concat()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(gone_within(GONE), "VMM processes are left");
    assert_eq!(stderr(&output), "", "there is nothing to say without a terminal");
    // What was seen is of interest when the log is read.
    println!("{}", stdout(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What fails, with picovm's own status and one sentence.
fn refused(arguments: &[&str]) -> String {
    let output = picovm(&[&["bench"], arguments].concat()).output().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
    assert!(gone_within(GONE), "VMM processes are left");
    stderr(&output)
}

fn number(figures: &Value, name: &str) -> f64 {
    figures[name]
        .as_f64()
        .unwrap_or_else(|| panic!("no {name} in {figures}"))
}

#[test]
fn latency_has_a_median_and_a_p99_of_each_kind_of_start() {
    let _alone = alone();
    let figures = figures(&["latency", "--rounds", "2", "--json"]);
    assert_eq!(figures["image"], "debian");
    assert_eq!(figures["command"], serde_json::json!(["echo", "hello"]));
    let measures = figures["measures"].as_array().unwrap();
    let names: Vec<&str> = measures
        .iter()
        .map(|measure| measure["name"].as_str().unwrap())
        .collect();
    let expected = [
        "process_first_byte",
        "process_exit",
        "cold_first_byte",
        "cold_exit",
        "pool_first_byte",
        "pool_exit",
    ];
    assert_eq!(names, expected);
    for measure in measures {
        assert_eq!(measure["unit"], "ms");
        assert_eq!(measure["n"], 2);
        assert_eq!(measure["values"].as_array().unwrap().len(), 2);
        let (median, p99) = (number(measure, "median"), number(measure, "p99"));
        assert!(median > 0.0 && median <= p99, "{measure}");
    }
    for pair in measures.chunks(2) {
        assert!(
            number(&pair[0], "median") <= number(&pair[1], "median"),
            "{pair:?}"
        );
    }
}

#[test]
fn density_has_the_memory_of_clones_and_leaves_none() {
    let _alone = alone();
    let figures = figures(&["density", "--clones", "3", "--json"]);
    assert_eq!(figures["clones"], 3);
    // MemAvailable is too coarse for three clones to say more than that it is there; what the processes map is exact.
    for name in [
        "parked_kib",
        "live_kib",
        "pss_kib",
        "owned_kib",
        "shared_kib",
        "answer_all_ms",
    ] {
        assert!(number(&figures, name) > 0.0, "{name} in {figures}");
    }
    assert!(number(&figures, "owned_kib") <= number(&figures, "pss_kib"));
    let starts = figures["start_ms"].as_array().unwrap();
    assert_eq!(starts.len(), 3);
    assert!(starts.iter().all(|start| start.as_f64().unwrap() > 0.0));
    assert_eq!(figures["processes_left"], 0);
    assert!(number(&figures, "left_kib") < 8192.0, "{figures}");
    for curve in ["parked_curve", "live_curve"] {
        let clones: Vec<&Value> = figures[curve]
            .as_array()
            .unwrap()
            .iter()
            .map(|point| &point["clones"])
            .collect();
        assert_eq!(clones, [0, 1, 2, 3]);
    }
}

#[test]
fn what_cannot_be_measured_is_refused_and_leaves_nothing() {
    let _alone = alone();
    template();
    let said = refused(&["latency", "--rounds", "1", "debian", "false"]);
    assert!(
        said.contains("a cold start") && said.contains("status 1"),
        "{said}"
    );
    let said = refused(&["latency", "--rounds", "1", "debian", "true"]);
    assert!(said.contains("writes nothing"), "{said}");
    let said = refused(&["density", "--clones", "1", "nothing"]);
    assert!(said.contains("no image named nothing"), "{said}");
}

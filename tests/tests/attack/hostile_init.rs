//! Attacks by a hostile `init`: `src/bin/hostile-init/`.

use std::time::Duration;

use crate::harness::{Ended, GOES_ON, Guest, Input, Output, attack};

/// What an attack has to come to.
#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// The machine goes on, and its devices work after a reset.
    GoesOn,
    /// `picovm` ends with a sentence in which these words are.
    Ends(&'static str),
    /// Either of the two.
    GoesOnOr(&'static str),
    /// The agent tells that the container could not be started, with these words.
    NotStarted(&'static str),
    /// The guest neither goes on nor ends, and `--timeout` ends it.
    TimesOut,
    /// One of the three: what the attack makes of the guest itself is left to chance.
    Any,
}

/// How an attack is carried out.
pub struct Attack {
    pub name: &'static str,
    pub seeds: u64,
    pub expected: Expected,
    options: &'static [&'static str],
    input: Input,
    output: Output,
    limit: Option<u64>,
}

impl Attack {
    const fn new(name: &'static str, seeds: u64, expected: Expected) -> Self {
        Self {
            name,
            seeds,
            expected,
            options: &[],
            input: Input::Null,
            output: Output::Kept,
            limit: None,
        }
    }

    fn run(&self) {
        for seed in 1..=self.seeds {
            let ended = attack(
                Guest::HostileInit,
                self.options,
                &[self.name, &seed.to_string()],
                self.input,
                self.output,
                self.limit.map(Duration::from_secs),
            );
            self.check(&ended);
        }
    }

    fn check(&self, ended: &Ended) {
        let stated = ended.stderr.starts_with("picovm: ");
        match (self.expected, ended.status.code()) {
            (Expected::GoesOn | Expected::GoesOnOr(_) | Expected::Any, Some(GOES_ON)) => {}
            (Expected::TimesOut | Expected::Any, Some(124)) => {}
            (Expected::Ends(words) | Expected::GoesOnOr(words), Some(125))
                if stated && ended.stderr.contains(words) => {}
            (Expected::NotStarted(words), Some(127)) if stated && ended.stderr.contains(words) => {}
            (Expected::Any, Some(125)) if stated => {}
            _ => panic!("{}: {:?} was expected of {ended:?}", self.name, self.expected),
        }
    }
}

macro_rules! attacks {
    ($($test:ident: $name:literal, $seeds:literal, $expected:expr $(, $field:ident: $value:expr)*;)*) => {
        /// All of them, by the name of the test.
        pub const ATTACKS: &[(&str, Attack)] = &[$((
            stringify!($test),
            #[allow(clippy::needless_update)]
            Attack { $($field: $value,)* ..Attack::new($name, $seeds, $expected) },
        )),*];
        $(#[test]
        fn $test() {
            let (_, attack) = ATTACKS.iter().find(|(test, _)| *test == stringify!($test)).unwrap();
            attack.run();
        })*
    };
}

use Expected::{Any, Ends, GoesOn, GoesOnOr, NotStarted, TimesOut};

/// What a console sends to the host whose queues make no sense.
const NO_FRAMES: &str = "the clone's agent";

attacks! {
    descriptors_in_loops: "descriptor-loops", 2, GoesOnOr(NO_FRAMES);
    buffers_and_rings_where_no_memory_is: "bad-addresses", 2, GoesOnOr(NO_FRAMES);
    buffers_past_the_end_of_memory: "lengths-past-memory", 2, GoesOnOr(NO_FRAMES);
    indices_that_wrap_and_leap: "wrapped-indices", 2, GoesOnOr(NO_FRAMES);
    sizes_of_queues: "queue-sizes", 2, GoesOnOr(NO_FRAMES);
    rings_on_each_other: "overlapping-rings", 2, GoesOnOr(NO_FRAMES);
    requests_onto_their_own_rings: "requests-onto-rings", 2, GoesOn;
    the_largest_requests: "largest-requests", 1, Any;
    rings_that_another_vcpu_changes: "concurrent-mutation", 2, GoesOnOr(NO_FRAMES);

    random_values_in_every_register: "registers", 3, GoesOnOr(NO_FRAMES);
    a_reset_at_any_moment: "reset-at-any-moment", 1, GoesOnOr(NO_FRAMES);
    configuration_out_of_range: "configuration-out-of-range", 1, GoesOn;
    a_storm_of_device_accesses: "mmio-storm", 1, GoesOnOr(NO_FRAMES);
    code_in_device_registers: "code-in-registers", 1, Any;
    every_instruction_on_device_registers: "instructions-on-registers", 1, Any;
    random_values_in_the_interrupt_controllers: "interrupt-controllers", 2, Any;

    a_storm_of_port_accesses: "port-storm", 2, GoesOn;
    a_flood_on_the_console: "console-flood", 1, GoesOn;
    the_reset_line: "reset-line", 1, Ends("it reset itself");

    the_freeze_trap_again: "freeze-again", 1, Ends("it went back to its freeze point");
    the_freeze_trap_by_a_string_instruction: "freeze-by-string", 1, Ends("freeze point");
    the_freeze_trap_on_both_vcpus: "freeze-on-both", 1, Ends("it went back to its freeze point");
    a_storm_on_the_trap: "trap-storm", 2, GoesOn;
    last_words_that_a_terminal_would_obey: "console-escapes", 1, Ends("\\u{1b}[2J");
    a_power_off_without_a_word: "power-off", 1, Ends("it powered itself off");

    garbage_from_the_agent: "protocol-garbage", 3, Ends("the clone's agent broke the protocol");
    a_frame_that_is_cut_off: "protocol-cut-off", 1, Ends("it powered itself off");
    frames_that_only_the_host_may_send: "protocol-of-the-host", 6, Ends("the clone's agent");
    a_frame_of_four_gibibytes: "protocol-too-long", 1, Ends("broke the protocol");
    output_beyond_its_credit: "credit-overdrawn", 1, Ends("sent more than it may"), output: Output::Stalled;
    frames_byte_by_byte: "drip", 2, GoesOn;
    a_reason_that_a_terminal_would_obey: "terminal-escapes", 1, NotStarted("\\u{1b}[31mred\\u{9b}1m\\n");
    silence: "silence", 1, TimesOut, limit: Some(2);
    input_that_is_paid_for_and_never_taken: "credit-never-given", 1, GoesOnOr("sent more than it may"), options: &["-i"], input: Input::Endless;
    a_flood_of_frames: "flood-of-frames", 1, GoesOn;
    a_flood_of_frames_whose_answers_are_not_read: "flood-unread", 1, GoesOnOr("sent more than it may"), output: Output::Closed;

    a_kernel_panic: "kernel-panic", 1, Ends("it reset itself");
    a_reboot: "reboot", 1, Ends("it reset itself");
    a_halt: "halt", 1, TimesOut, limit: Some(2);
    a_vcpu_that_nothing_interrupts: "spin-without-interrupts", 1, TimesOut, limit: Some(2);
    random_bytes_over_the_kernel: "scribble", 3, Any;
}

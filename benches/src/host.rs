//! Where and by which clock something was measured.

use std::process::Command;
use std::time::Instant;

use picovm_engine::figures;
use serde::Serialize;

/// What a millisecond of this host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Clock {
    /// A count of instructions.
    #[serde(rename = "instructions, 2 ns each")]
    Instructions,
    /// Time.
    #[serde(rename = "time")]
    Time,
}

impl std::fmt::Display for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Instructions => "instructions, 2 ns each; idle time is skipped",
            Self::Time => "time",
        })
    }
}

/// Nanoseconds of one instruction in the emulated host with `--instruction-clock`.
const INSTRUCTION_NS: f64 = 2.0;

/// Tells the clock by what it makes of a loop of known length: no processor takes exactly 2 ns for each instruction
/// of three loops in succession.
pub fn clock() -> Clock {
    const TURNS: u64 = 1_000_000;
    let counts = (0..3).all(|_| {
        let start = Instant::now();
        // SAFETY: a loop of two instructions on one register, which is declared as changed.
        unsafe {
            std::arch::asm!("2:", "dec {turns}", "jnz 2b", turns = inout(reg) TURNS => _, options(nomem, nostack));
        }
        let each = start.elapsed().as_nanos() as f64 / (2 * TURNS) as f64;
        // An interrupt or two fall into the loop.
        (INSTRUCTION_NS..1.05 * INSTRUCTION_NS).contains(&each)
    });
    if counts { Clock::Instructions } else { Clock::Time }
}

/// Processor, number of CPUs, kernel.
pub fn describe() -> String {
    let emulated = if std::env::var_os("PICOVM_EMULATED_HOST").is_some() {
        "the emulated host: "
    } else {
        ""
    };
    format!("{emulated}{}", figures::host())
}

/// Commit of the working tree that this was started in; `-dirty` if files that it tracks are changed.
pub fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|changes| !changes.is_empty());
    Some(if changed { commit + "-dirty" } else { commit })
}

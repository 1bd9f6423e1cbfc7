//! `picovm-hostile-init`: a PID 1 that attacks its VMM. It stands in for picovm's own init in a guest of the tests in
//! `tests/tests/attack/`, and is root with `/dev/mem`, device registers and ports at hand.
//!
//! It goes the way of a good init to the freeze point, so that a template can be made of it. In a clone the container's
//! arguments name the attack and its seed, by which all that is random in it repeats.

mod agent;
mod driver;
mod fuse;
mod instructions;
mod kernel;
mod machine;
mod ports;
mod queues;
mod random;
mod registers;
mod trap;

use agent::Agent;
use machine::Machine;
use picovm_guest_protocol::{Frame, Identity, IdentityError};
use random::Random;

/// Exit status of a container whose attack is over, and whose machine goes on.
const GOES_ON: u8 = 42;
/// Exit status for an attack that is not one.
const UNKNOWN: u8 = 99;

/// What is left of the machine after an attack.
enum After {
    /// All of it: the agent can say so.
    Whole,
    /// Its drivers do not know their devices any more. Whoever sets one up anew can use it.
    Devices,
    /// The attack was to end the machine, and the machine is still there.
    Nothing,
}

/// What an attack has at hand.
struct Attacker {
    machine: Machine,
    agent: Agent,
    random: Random,
    seed: u64,
}

fn main() {
    if std::process::id() != 1 {
        eprintln!(
            "picovm-hostile-init is PID 1 of a guest that attacks its VMM, and does nothing anywhere else"
        );
        std::process::exit(1);
    }
    if let Err(error) = live() {
        eprintln!("picovm-hostile-init: {error}");
    }
    kernel::panic();
}

fn live() -> std::io::Result<()> {
    kernel::mount_file_systems()?;
    let machine = Machine::open()?;
    let agent = Agent::open()?;
    ports::take_privilege(&machine)?;
    trap::base(&machine);
    // Where a test boots this without a container to come.
    let command_line = std::fs::read_to_string("/proc/cmdline")?;
    match command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("hostile="))
    {
        Some("no-memory") => trap::freeze_without_memory(&machine),
        Some("endless-work") => {
            queues::prepare_endless_work(&machine);
            trap::freeze(&machine);
            kernel::be_silent();
        }
        _ => {}
    }
    let identity = loop {
        trap::freeze(&machine);
        match Identity::decode(&machine.identity()) {
            Err(IdentityError::Absent) => {}
            decoded => break decoded.map_err(std::io::Error::other)?,
        }
    };
    let arguments: Vec<String> = identity
        .container
        .unwrap_or_default()
        .process
        .args
        .iter()
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect();
    let name = arguments.first().map(String::as_str).unwrap_or_default();
    let seed = arguments.get(1).and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut attacker = Attacker {
        machine,
        agent,
        random: Random::new(seed),
        seed,
    };
    let (code, after) = attack(name, &mut attacker);
    let exit = Frame::Exit(picovm_guest_protocol::ContainerExit::Code(code));
    match after {
        After::Whole => attacker.agent.send(&exit),
        After::Devices => agent::say_last(&attacker.machine, &exit)?,
        After::Nothing => {}
    }
    trap::power_off(&attacker.machine)
}

/// Carries out an attack by its name in `docs/attacks.md`.
fn attack(name: &str, attacker: &mut Attacker) -> (u8, After) {
    let Attacker {
        machine,
        agent,
        random,
        seed,
    } = attacker;
    let after = match name {
        // What making a template tries.
        "sh" => {
            agent.send(&Frame::Data(
                picovm_guest_protocol::Stream::Stdout,
                b"\n".to_vec(),
            ));
            return (0, After::Whole);
        }
        "neighbour" => agent.be_a_neighbour(),

        "descriptor-loops" => queues::descriptor_loops(machine, random),
        "bad-addresses" => queues::bad_addresses(machine, random),
        "lengths-past-memory" => queues::lengths_past_memory(machine, random),
        "wrapped-indices" => queues::wrapped_indices(machine, random),
        "queue-sizes" => queues::sizes(machine, random),
        "overlapping-rings" => queues::overlapping_rings(machine, random),
        "requests-onto-rings" => queues::requests_onto_rings(machine, random),
        "largest-requests" => queues::largest_requests(machine, random),
        "concurrent-mutation" => queues::concurrent_mutation(machine, random),

        "fuse" => fuse::nonsense(machine, random),

        "registers" => registers::random_values(machine, random),
        "reset-at-any-moment" => registers::reset_at_any_moment(machine, random),
        "configuration-out-of-range" => registers::configuration_out_of_range(machine, random),
        "mmio-storm" => registers::storm(machine, random),
        "code-in-registers" => registers::execute(machine, random),
        "instructions-on-registers" => instructions::all(machine),
        "interrupt-controllers" => registers::interrupt_controllers(machine, random),

        "port-storm" => ports::storm(random),
        "console-flood" => ports::flood_console(random),
        "console-escapes" => ports::escape_on_console(),
        "reset-line" => ports::reset_line(),

        "freeze-again" => trap::freeze_again(machine),
        "freeze-by-string" => trap::freeze_by_string(machine),
        "freeze-on-both" => trap::freeze_on_both(machine),
        "trap-storm" => trap::storm(machine, random),
        "power-off" => After::Nothing,

        "protocol-garbage" => agent.garbage(random),
        "protocol-cut-off" => agent.cut_off(),
        "protocol-of-the-host" => agent.frames_of_the_host(*seed),
        "protocol-too-long" => agent.too_long(),
        "credit-overdrawn" => agent.overdraw(),
        "credit-never-given" => agent.hoard_input(),
        "flood-of-frames" => agent.flood(),
        "flood-unread" => agent.flood_unread(),
        "drip" => agent.drip(random),
        "terminal-escapes" => agent.escape(),
        "silence" => kernel::be_silent(),

        "kernel-panic" => kernel::panic(),
        "reboot" => kernel::reboot(rustix::system::RebootCommand::Restart),
        "halt" => kernel::reboot(rustix::system::RebootCommand::Halt),
        "spin-without-interrupts" => kernel::spin(),
        "scribble" => kernel::scribble(machine, random),
        _ => return (UNKNOWN, After::Whole),
    };
    (GOES_ON, after)
}

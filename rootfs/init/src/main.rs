//! PID 1 of the guest: reaches the freeze point, then becomes the agent.
//!
//! Read top to bottom, this is the whole life of a guest. Everything before [`Agent::serve`] is done once, in the
//! template; the freeze itself happens in the container stub ([`stub`]), a child that is begun ahead so that a
//! clone's first instructions are already those of its container.

mod accounts;
mod agent;
mod archive;
mod cgroup;
mod console;
mod container;
mod control;
mod error;
mod fill;
mod identity;
mod layer;
mod mounts;
mod names;
mod rehearsal;
mod shares;
mod start;
mod storage;
mod streams;
mod stub;
#[cfg(test)]
mod tests;
mod trap;

use accounts::Accounts;
use agent::{Agent, FreezePoint};
use cgroup::Cgroup;
use container::Ground;
use error::InitError;
use identity::{IdentityArea, Machine};
use names::NameFiles;
use stub::{Setting, Stack};
use trap::Trap;

fn main() {
    if std::process::id() != 1 {
        eprintln!("picovm-init is PID 1 of a picovm guest and does nothing anywhere else");
        std::process::exit(1);
    }
    let trap = match mounts::kernel_file_systems().and_then(|()| Trap::map()) {
        Ok(trap) => trap,
        Err(error) => {
            console::report(&error);
            // There is no trap to say it through: a reset is what every VMM notices.
            restart();
        }
    };
    match live(&trap) {
        Ok(()) => trap.power_off(0),
        Err(error) => {
            console::report(&error);
            trap.power_off(1)
        }
    }
}

fn live(trap: &Trap) -> Result<(), InitError> {
    mounts::loopback_up()?;
    mounts::quiet_kernel()?;
    let control = control::open_port()?;
    mounts::hide_machine()?;
    let area = IdentityArea::allocate()?;
    let machine = Machine::open()?;
    agent::shield_from_oom()?;
    agent::allow_open_files()?;
    stub::block_child_signal()?;
    mounts::wait_for_disks()?;
    // All that does not depend on the image is done: one boot serves the templates of all images.
    trap.base();

    let layers = mounts::enter_root_file_system()?;
    mounts::populate_root_file_system()?;
    let names = NameFiles::make();
    let cgroup = Cgroup::make()?;
    let accounts = Accounts::read();
    let stack = Stack::allocate()?;
    rehearsal::run(&stack, &accounts, cgroup.as_ref())?;
    layers.remember()?;
    let ground = Ground {
        is_guest: true,
        cgroup,
        layers: Some(layers),
    };
    let (pipes, ends) = stub::pipes()?;
    let agent = Agent::new(control, pipes, &ground)?.with_freeze_point(FreezePoint {
        area: &area,
        trap,
        machine: &machine,
    });
    let setting = Setting {
        stack: &stack,
        accounts: &accounts,
        ground: &ground,
        control: agent.control(),
        terminal: agent.terminal(),
    };
    let begun = stub::begin(setting, ends, || {
        stub::enter_group(ground.cgroup.as_ref())?;
        stub::confine()?;
        machine.rehearse()?;
        names.rehearse()?;
        stub::wait_until_asleep(rustix::process::Pid::INIT)?;
        let identity = area.freeze_until_cloned(trap)?;
        machine.become_clone(&identity)?;
        names.write(&identity.hostname)?;
        Ok(identity.container)
    })?;
    agent.serve(begun)?;
    Ok(())
}

fn restart() -> ! {
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    loop {
        std::thread::park();
    }
}

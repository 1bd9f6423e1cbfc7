//! The freeze trap, used as it should be and as it should not.

use picovm_guest_protocol::trap::{BASE, FREEZE, IDENTITY_PAGE, IDENTITY_RESET, MAGIC, POWER_OFF, VERSION};

use crate::After;
use crate::machine::{Machine, PAGE};
use crate::random::Random;

pub fn base(machine: &Machine) {
    machine.poke(BASE, 4, 0);
}

/// The freeze point, with the identity area announced.
pub fn freeze(machine: &Machine) {
    machine.poke(IDENTITY_RESET, 4, 0);
    for page in machine.identity_pages() {
        machine.poke(IDENTITY_PAGE, 8, *page);
    }
    machine.poke(FREEZE, 4, 0);
}

pub fn power_off(machine: &Machine) -> ! {
    machine.poke(POWER_OFF, 4, 0);
    loop {
        std::thread::park();
    }
}

pub fn freeze_again(machine: &Machine) -> After {
    machine.poke(FREEZE, 4, 1);
    After::Whole
}

/// One instruction that writes to the freeze register and goes on to the next ones.
pub fn freeze_by_string(machine: &Machine) -> After {
    let at = machine.register(FREEZE, 64);
    // SAFETY: 16 words within the trap's page.
    unsafe {
        std::arch::asm!("rep stosd", inout("rdi") at => _, inout("rcx") 16u64 => _, in("eax") 1);
    }
    After::Whole
}

/// Both vCPUs at once.
pub fn freeze_on_both(machine: &Machine) -> After {
    let other = machine.clone();
    std::thread::spawn(move || {
        loop {
            other.poke(FREEZE, 4, 1);
        }
    });
    loop {
        machine.poke(FREEZE, 4, 1);
    }
}

/// Everything but freezing and powering off, at every width: announcements without end and without sense among it.
pub fn storm(machine: &Machine, random: &mut Random) -> After {
    let nonsense = [
        u64::MAX,
        machine.ram_end(),
        machine.ram_end() - PAGE,
        0xd000_0000,
        0xfee0_0000,
        1 << 52,
        7,
    ];
    for _ in 0..2500 {
        let width = random.one_of(&[1, 2, 4, 8]);
        let offset = match random.below(4) {
            0 => random.below(PAGE - 8),
            1 => IDENTITY_PAGE,
            _ => random.one_of(&[MAGIC, VERSION, IDENTITY_RESET, BASE, FREEZE + 1, POWER_OFF - 1]),
        };
        // What takes effect does so at its own width alone.
        if width == 4 && [FREEZE, POWER_OFF].contains(&offset) {
            continue;
        }
        machine.poke(offset, width, random.one_of(&nonsense));
        machine.peek(offset, width);
    }
    After::Whole
}

/// The freeze point, with an identity area that is in no memory.
pub fn freeze_without_memory(machine: &Machine) -> ! {
    machine.poke(IDENTITY_RESET, 4, 0);
    for place in [
        machine.ram_end(),
        0xd000_0000,
        0xfee0_0000,
        1 << 52,
        u64::MAX - PAGE + 1,
    ] {
        machine.poke(IDENTITY_PAGE, 8, place);
    }
    machine.poke(FREEZE, 4, 0);
    power_off(machine)
}

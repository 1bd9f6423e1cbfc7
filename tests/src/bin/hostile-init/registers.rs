//! Device registers at random, resets at any moment, accesses where nothing is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::mm::ProtFlags;

use crate::After;
use crate::driver::{
    BUFFERS, CONFIGURATION, DEVICES, DISK, Device, NOTIFY, QUEUE_SELECT, QUEUE_SIZE, STATUS, VERSION_1, WRITE,
};
use crate::machine::{Machine, PAGE, REGISTERS_SIZE, WINDOWS, map_physical};
use crate::random::Random;

/// Values that a register may not have thought of, and some that it has.
fn value(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => random.below(16),
        1 => 1 << random.below(32),
        2 => random.one_of(&[0, u64::MAX, 0x8000_0000, 0xffff, 0x1_0000]),
        _ => random.next(),
    }
}

/// Every register of every device, and what lies between and behind them.
pub fn random_values(machine: &Machine, random: &mut Random) -> After {
    for slot in DEVICES {
        let device = Device::new(machine, slot);
        for round in 0..3 {
            // From every state that a driver brings the device to.
            match round {
                0 => device.set(STATUS, 0),
                1 => device.begin(VERSION_1),
                _ => device.bring_up(VERSION_1),
            }
            for register in (0..0x120).step_by(4) {
                device.set(register, value(random));
                device.get(register);
            }
            for _ in 0..150 {
                let (offset, width) = (random.below(0x120), random.one_of(&[1, 2, 4, 8]));
                machine.poke(device.offset(offset), width, value(random));
                machine.peek(device.offset(offset), width);
            }
        }
    }
    After::Devices
}

/// A reset between any two steps of a driver, and from another vCPU while requests are carried out.
pub fn reset_at_any_moment(machine: &Machine, random: &mut Random) -> After {
    for slot in DEVICES {
        let device = Device::new(machine, slot);
        let work = |reset_before: u64| {
            let mut step = 0;
            let mut go_on = |set: &dyn Fn()| {
                if step == reset_before {
                    device.set(STATUS, 0);
                }
                set();
                step += 1;
            };
            go_on(&|| device.set(STATUS, 3));
            go_on(&|| device.set(0x024, 1));
            go_on(&|| device.set(0x020, 1));
            go_on(&|| device.set(STATUS, 11));
            for queue in 0..device.queues() {
                go_on(&|| device.set_up(queue, device.largest().into(), device.usual(queue)));
            }
            go_on(&|| device.set(STATUS, 15));
            for queue in 0..device.queues() {
                go_on(&|| fill(&device, queue));
                go_on(&|| device.notify(queue));
            }
            device.set(STATUS, 0);
            step
        };
        for reset_before in 0..work(u64::MAX) {
            work(reset_before);
        }

        let end = Arc::new(AtomicBool::new(false));
        let other = std::thread::spawn({
            let (device, end) = (device.clone(), end.clone());
            move || {
                while !end.load(Ordering::Relaxed) {
                    device.set(STATUS, 0);
                }
            }
        });
        for _ in 0..40 {
            device.bring_up(VERSION_1);
            for queue in 0..device.queues() {
                fill(&device, queue);
                device.notify(queue);
            }
            device.notify(random.below(4));
        }
        end.store(true, Ordering::Relaxed);
        let _ = other.join();
    }
    After::Devices
}

/// Fills a queue with what its device can work on for a while.
fn fill(device: &Device, queue: u64) {
    let size = device.largest();
    for index in 0..size {
        let address = device.machine.address(BUFFERS + usize::from(index) % 8);
        // What goes to the host are frames that say nothing: the end of standard output, again and again.
        let flags = if queue.is_multiple_of(2) { WRITE } else { 0 };
        if flags == 0 {
            let page = BUFFERS + usize::from(index) % 8;
            device
                .machine
                .put(page, 0, &[6, 0, 0, 0, 0, 0, 0, 0].repeat(PAGE as usize / 8));
        }
        device.descriptor(queue, index, address, PAGE as u32, flags, 0);
        device.available(queue, index, index);
    }
    device.offer(queue, size);
}

/// Configuration behind its end, at every width, read and written, over the end of its window, and of devices that are not
/// there.
pub fn configuration_out_of_range(machine: &Machine, random: &mut Random) -> After {
    for slot in 0..REGISTERS_SIZE / PAGE - 2 {
        let window = WINDOWS + slot * PAGE;
        for offset in (CONFIGURATION..CONFIGURATION + 28)
            .step_by(3)
            .chain(PAGE - 9..PAGE)
        {
            for width in [1, 2, 4, 8] {
                machine.peek(window + offset, width);
                machine.poke(window + offset, width, value(random));
            }
        }
        for _ in 0..16 {
            let offset = CONFIGURATION + random.below(PAGE - CONFIGURATION);
            machine.poke(window + offset, random.one_of(&[1, 2, 4, 8]), value(random));
            machine.peek(window + offset, random.one_of(&[1, 2, 4, 8]));
        }
    }
    // A device tells the same of itself as before, for nothing of it can be written.
    let disk = Device::new(machine, DISK);
    assert_eq!(disk.get(CONFIGURATION), 1 << 31, "sectors of the disk");
    After::Devices
}

/// As many accesses as fast as can be, from both vCPUs: all windows, and the holes between and behind them.
pub fn storm(machine: &Machine, random: &mut Random) -> After {
    let one = |machine: Machine, seed: u64| {
        let mut random = Random::new(seed);
        for _ in 0..4000 {
            let width = random.one_of(&[1, 2, 4, 8]);
            // Not the trap, which would end it.
            let offset = match random.below(3) {
                0 => WINDOWS + random.below(REGISTERS_SIZE - WINDOWS - 8),
                1 => {
                    WINDOWS
                        + random.below(3) * PAGE
                        + random.one_of(&[NOTIFY, STATUS, QUEUE_SELECT, QUEUE_SIZE])
                }
                _ => WINDOWS + random.below(3) * PAGE + random.below(0x110),
            };
            if random.once_in(3) {
                machine.peek(offset, width);
            } else {
                machine.poke(offset, width, value(&mut random));
            }
        }
    };
    let (seed, copy) = (random.next(), machine.clone());
    let other = std::thread::spawn(move || one(copy, seed));
    one(machine.clone(), random.next());
    let _ = other.join();
    After::Devices
}

/// Jumps into the registers of a device: there is no code.
pub fn execute(_machine: &Machine, _random: &mut Random) -> After {
    let both = ProtFlags::READ | ProtFlags::EXEC;
    if let Ok(page) = map_physical(0xd000_1000, both) {
        // SAFETY: not sound at all, and meant so: what happens there is the attack.
        let jump: extern "C" fn() = unsafe { std::mem::transmute(page) };
        jump();
    }
    After::Nothing
}

/// The interrupt controllers, which KVM emulates.
pub fn interrupt_controllers(_machine: &Machine, random: &mut Random) -> After {
    for address in [0xfec0_0000, 0xfee0_0000] {
        let Ok(page) = map_physical(address, ProtFlags::READ | ProtFlags::WRITE) else {
            continue;
        };
        for _ in 0..2000 {
            let at = (page as u64 + (random.below(PAGE) & !3)) as *mut u32;
            // SAFETY: within the page that was just mapped, aligned; what answers there is what is attacked.
            unsafe {
                at.write_volatile(value(random) as u32);
                at.read_volatile();
            }
        }
    }
    After::Devices
}

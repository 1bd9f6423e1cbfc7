//! Queues that make no sense.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::After;
use crate::driver::{
    BUFFERS, CONSOLE, DEVICES, DISK, Device, ENTROPY, EVENT_INDEX, NEXT, QUEUE_READY, QUEUE_SELECT,
    QUEUE_SIZE, STATUS, TRANSMIT, VERSION_1, WRITE,
};
use crate::machine::{Machine, PAGE};
use crate::random::Random;

const ROUNDS: usize = 8;
/// Queue of the console from which it takes messages about ports.
const CONTROL: u64 = 3;
/// Port of the console as a queue of its own, and everything as one with ports.
const FEATURES: [u64; 4] = [
    VERSION_1,
    VERSION_1 | EVENT_INDEX,
    VERSION_1 | 2,
    VERSION_1 | EVENT_INDEX | 2,
];

/// Brings every device up some times; fills its queues by `fill`, and notifies them. The queue that leads to the host comes
/// last: what it sends is no frame, and ends the container.
fn each(machine: &Machine, random: &mut Random, mut fill: impl FnMut(&Device, u64, &mut Random)) -> After {
    for round in 0..ROUNDS {
        for slot in DEVICES {
            let device = Device::new(machine, slot);
            let features = if slot == CONSOLE {
                random.one_of(&FEATURES)
            } else {
                random.one_of(&FEATURES[..2])
            };
            device.bring_up(features);
            let queues = (0..device.queues())
                .filter(|queue| round + 2 >= ROUNDS || (slot, *queue) != (CONSOLE, TRANSMIT));
            for queue in queues.clone() {
                fill(&device, queue, random);
            }
            for queue in queues {
                device.notify(queue);
            }
        }
    }
    After::Devices
}

/// Offers every descriptor as the head of a chain.
fn offer_all(device: &Device, queue: u64) {
    for entry in 0..device.largest() {
        device.available(queue, entry, entry);
    }
    device.offer(queue, device.largest());
}

/// A page for data, and a place in it for a request to the disk.
fn buffer(device: &Device, random: &mut Random) -> u64 {
    let page = BUFFERS + random.below(8) as usize;
    let (kind, sector) = (random.below(5) as u32, random.below(64));
    device.request(page, 0, kind, sector)
}

pub fn descriptor_loops(machine: &Machine, random: &mut Random) -> After {
    each(machine, random, |device, queue, random| {
        let size = device.largest();
        for index in 0..size {
            let next = match random.below(4) {
                0 => index,
                1 => (index + 1) % size,
                2 => random.next() as u16,
                _ => random.below(size.into()) as u16,
            };
            // Indirect tables, which are not offered, among them.
            let flags = NEXT | random.below(8) as u16;
            let address = buffer(device, random);
            device.descriptor(queue, index, address, 16 + random.below(512) as u32, flags, next);
        }
        offer_all(device, queue);
    })
}

/// Addresses at which there is no memory, or none that is the guest's.
fn bad_address(machine: &Machine, random: &mut Random) -> u64 {
    let end = machine.ram_end();
    random.one_of(&[
        end - 1,
        end - 8,
        end,
        end + PAGE,
        0xbfff_fff0,
        0xc000_0000,
        0xd000_0000,
        0xd000_1000,
        0xfec0_0000,
        0xfee0_0000,
        0xffff_fff0,
        0x1_0000_0000,
        1 << 40,
        1 << 52,
        1 << 63,
        u64::MAX - PAGE,
        u64::MAX,
    ])
}

pub fn bad_addresses(machine: &Machine, random: &mut Random) -> After {
    each(machine, random, |device, queue, random| {
        for index in 0..device.largest() {
            // Some buffers of a chain are good, so that the device gets to the bad ones.
            let address = if random.once_in(2) {
                buffer(device, random)
            } else {
                bad_address(&device.machine, random)
            };
            let flags = random.below(4) as u16;
            device.descriptor(
                queue,
                index,
                address,
                16 + random.below(512) as u32,
                flags,
                index + 1,
            );
        }
        offer_all(device, queue);
    });
    // The rings themselves.
    for _ in 0..ROUNDS * 4 {
        for slot in DEVICES {
            let device = Device::new(machine, slot);
            device.begin(VERSION_1);
            let queue = random.below(device.queues());
            let mut places = device.usual(queue);
            places[random.below(3) as usize] = bad_address(machine, random);
            if random.once_in(4) {
                places[random.below(3) as usize] += 1 + random.below(15);
            }
            device.set_up(queue, device.largest().into(), places);
            device.offer(queue, 1);
            device.set(STATUS, 15);
            device.notify(queue);
        }
    }
    After::Devices
}

pub fn lengths_past_memory(machine: &Machine, random: &mut Random) -> After {
    each(machine, random, |device, queue, random| {
        for index in 0..device.largest() {
            let address = buffer(device, random);
            // What is written with these begins in a page of its own and reaches past the end of memory.
            let past = (device.machine.ram_end() - address) as u32;
            let length = random.one_of(&[u32::MAX, u32::MAX - 15, 1 << 31, past + 1, past + 4097, 0, 15, 17]);
            let flags = random.below(4) as u16 & !(WRITE * u16::from(length > PAGE as u32));
            device.descriptor(queue, index, address, length, flags, index + 1);
        }
        offer_all(device, queue);
    });
    // The disk is asked for what would reach past memory: nothing of it is read.
    let disk = Device::new(machine, DISK);
    for _ in 0..ROUNDS {
        disk.bring_up(VERSION_1);
        let header = disk.request(BUFFERS, 0, 0, random.below(16));
        let data = machine.address(BUFFERS + 1);
        disk.descriptor(0, 0, header, 16, NEXT, 1);
        // A sector more than there is memory, less than the file holds.
        let length = (machine.ram_end() - data) as u32 & !511;
        disk.descriptor(0, 1, data, length + 512, NEXT | WRITE, 2);
        disk.descriptor(0, 2, data, 1, WRITE, 0);
        disk.available(0, 0, 0);
        disk.offer(0, 1);
        disk.notify(0);
    }
    After::Devices
}

pub fn wrapped_indices(machine: &Machine, random: &mut Random) -> After {
    each(machine, random, |device, queue, random| {
        for index in 0..device.largest() {
            let address = buffer(device, random);
            device.descriptor(queue, index, address, 64, random.one_of(&[0, WRITE]), 0);
            let head = if random.once_in(4) {
                random.next() as u16
            } else {
                random.below(device.largest().into()) as u16
            };
            device.available(queue, index, head);
        }
        for _ in 0..16 {
            let size = device.largest();
            device.offer(
                queue,
                random.one_of(&[0, 1, size, size + 1, 0x7fff, 0x8000, u16::MAX - 1, u16::MAX]),
            );
            device.notify(queue);
            if random.once_in(4) {
                device.offer(queue, random.next() as u16);
                device.notify(queue);
            }
        }
    });
    // All the way round, in leaps of a whole queue: messages to the console that say nothing.
    let console = Device::new(machine, CONSOLE);
    console.bring_up(VERSION_1 | 2);
    console.descriptor(CONTROL, 0, machine.address(BUFFERS + 8), 8, 0, 0);
    let size = console.largest();
    for turn in 1..=(u32::from(u16::MAX) + 1) / u32::from(size) + 3 {
        console.offer(CONTROL, (turn * u32::from(size)) as u16);
        console.notify(CONTROL);
    }
    After::Devices
}

pub fn sizes(machine: &Machine, random: &mut Random) -> After {
    const SIZES: [u64; 12] = [0, 1, 2, 3, 5, 16, 127, 256, 0x8000, 0xffff, 0x1_0000, 0xffff_ffff];
    for _ in 0..ROUNDS * 2 {
        for slot in DEVICES {
            let device = Device::new(machine, slot);
            device.begin(random.one_of(&FEATURES[..2]));
            for queue in 0..device.queues() {
                device.clear(queue);
                device.set_up(queue, random.one_of(&SIZES), device.usual(queue));
                // Changed when it is ready already, and a queue that is not there.
                device.set(QUEUE_SIZE, random.one_of(&SIZES));
                device.set(QUEUE_SELECT, random.one_of(&[4, 5, 255, 0xffff_ffff]));
                device.set(QUEUE_SIZE, random.one_of(&SIZES));
                device.set(QUEUE_READY, random.one_of(&[0, 1, 2, 0xffff_ffff]));
                offer_all(&device, queue);
            }
            device.set(STATUS, 15);
            for queue in 0..device.queues() + 3 {
                device.notify(queue);
            }
            // Under the running device.
            device.set(QUEUE_SELECT, 0);
            device.set(QUEUE_SIZE, random.one_of(&SIZES));
            device.set(QUEUE_READY, random.below(2));
            device.offer(0, random.next() as u16);
            device.notify(0);
            device.notify(random.next());
        }
    }
    After::Devices
}

/// Descriptors, available and used ring on each other, in every arrangement.
pub fn overlapping_rings(machine: &Machine, random: &mut Random) -> After {
    for _ in 0..ROUNDS * 3 {
        for slot in DEVICES {
            let device = Device::new(machine, slot);
            device.begin(random.one_of(&FEATURES[..2]));
            for queue in 0..device.queues() {
                device.clear(queue);
                let base = machine.address(device.page(queue));
                let at = |random: &mut Random| base + random.one_of(&[0, 0, 4, 16, 256]);
                let places = [base, at(random) & !1, at(random) & !3];
                device.set_up(queue, random.one_of(&[1, 2, 8, 16]), places);
                let mut bytes = [0; 320];
                random.fill(&mut bytes);
                for index in 0..20 {
                    // Descriptors that are good, with entries of a ring among them.
                    let address = buffer(&device, random);
                    bytes[index * 16..index * 16 + 8].copy_from_slice(&address.to_le_bytes());
                    bytes[index * 16 + 8..index * 16 + 16].copy_from_slice(&[64, 0, 0, 0, 2, 0, 0, 0]);
                }
                device.machine.put(device.page(queue), 0, &bytes);
            }
            device.set(STATUS, 15);
            for queue in 0..device.queues() {
                for _ in 0..4 {
                    device.notify(queue);
                }
            }
        }
    }
    After::Devices
}

/// The disk and the generator write into their own queues.
pub fn requests_onto_rings(machine: &Machine, random: &mut Random) -> After {
    for _ in 0..ROUNDS * 3 {
        let disk = Device::new(machine, DISK);
        disk.bring_up(VERSION_1);
        for chain in 0..16u16 {
            let header = disk.request(BUFFERS, usize::from(chain) * 16, 0, random.below(2000));
            let target = disk.usual(0)[random.below(3) as usize] + random.below(4) * 512;
            let status = machine.address(BUFFERS + 1) + u64::from(chain);
            let first = chain * 3;
            disk.descriptor(0, first, header, 16, NEXT, first + 1);
            disk.descriptor(0, first + 1, target, 512, NEXT | WRITE, first + 2);
            disk.descriptor(0, first + 2, status, 1, WRITE, 0);
            disk.available(0, chain, first);
        }
        disk.offer(0, 16);
        disk.notify(0);
        let entropy = Device::new(machine, ENTROPY);
        entropy.bring_up(random.one_of(&FEATURES[..2]));
        for index in 0..entropy.largest() {
            let target = entropy.usual(0)[random.below(3) as usize] + random.below(64);
            entropy.descriptor(0, index, target, 1 + random.below(256) as u32, WRITE, 0);
        }
        offer_all(&entropy, 0);
        for _ in 0..8 {
            entropy.notify(0);
        }
    }
    After::Devices
}

/// As much as a chain can ask for, again and again: of the disk behind its file's end, which is written over all memory.
pub fn largest_requests(machine: &Machine, _random: &mut Random) -> After {
    let disk = Device::new(machine, DISK);
    disk.bring_up(VERSION_1);
    let header = disk.request(BUFFERS, 0, 0, 1 << 30);
    disk.descriptor(0, 0, header, 16, NEXT, 1);
    // One page of the attacker's again and again: 62 parts of nearly 64 MiB would write over everything.
    let data = machine.address(BUFFERS + 1);
    let parts = disk.largest() - 2;
    for part in 1..=parts {
        disk.descriptor(0, part, data, PAGE as u32, NEXT | WRITE, part + 1);
    }
    disk.descriptor(0, parts + 1, machine.address(BUFFERS + 2), 1, WRITE, 0);
    for entry in 0..disk.largest() {
        disk.available(0, entry, 0);
    }
    for turn in 1..=8 {
        disk.offer(0, turn * disk.largest());
        disk.notify(0);
    }
    // And once over all memory behind the page, the attacker's program and kernel among it.
    let length = (machine.ram_end() - data) as u32 & !511;
    disk.descriptor(0, 1, data, length, NEXT | WRITE, parts + 1);
    disk.offer(0, 8u16 * disk.largest() + 1);
    disk.notify(0);
    After::Nothing
}

/// Another vCPU changes descriptors and rings all the while.
pub fn concurrent_mutation(machine: &Machine, random: &mut Random) -> After {
    for slot in DEVICES {
        let device = Device::new(machine, slot);
        let end = Arc::new(AtomicBool::new(false));
        let other = std::thread::spawn({
            let (device, end) = (device.clone(), end.clone());
            let mut random = Random::new(random.next());
            move || {
                while !end.load(Ordering::Relaxed) {
                    let queue = random.below(device.queues());
                    let size = device.largest();
                    let index = random.below(size.into()) as u16;
                    let address = match random.below(8) {
                        0 => bad_address(&device.machine, &mut random),
                        1 => device.usual(queue)[random.below(3) as usize],
                        _ => buffer(&device, &mut random),
                    };
                    let length = random.one_of(&[1, 16, 512, 513, 4096]);
                    let flags = random.below(4) as u16;
                    device.descriptor(
                        queue,
                        index,
                        address,
                        length,
                        flags,
                        random.below(size.into()) as u16,
                    );
                    device.available(queue, index, random.below(u64::from(size) + 1) as u16);
                    let step = random.below(u64::from(size)) as u16;
                    device.offer(queue, device.used(queue).wrapping_add(step));
                }
            }
        });
        let limit = Instant::now() + Duration::from_millis(700);
        let mut turns = 0u64;
        while Instant::now() < limit {
            if turns.is_multiple_of(64) {
                device.bring_up(random.one_of(&FEATURES[..2]));
            }
            device.notify(random.below(device.queues()));
            turns += 1;
        }
        end.store(true, Ordering::Relaxed);
        device.set(STATUS, 0);
        let _ = other.join();
    }
    After::Devices
}

/// A request to the disk that waits, of a disk whose sectors each hold an available ring with one more entry, and the header
/// of the request for the next sector: work that feeds itself.
pub fn prepare_endless_work(machine: &Machine) {
    const RING: u32 = 496;
    let disk = Device::new(machine, DISK);
    disk.begin(VERSION_1);
    disk.clear(0);
    disk.set_up(0, 16, disk.usual(0));
    let header = disk.request(BUFFERS, 0, 0, 0);
    let [_, available, _] = disk.usual(0);
    disk.descriptor(0, 0, header, 16, NEXT, 1);
    disk.descriptor(0, 1, available, RING, NEXT | WRITE, 2);
    disk.descriptor(0, 2, header, 512 - RING, NEXT | WRITE, 3);
    disk.descriptor(0, 3, header + 16, 1, WRITE, 0);
    disk.set(STATUS, 15);
    disk.offer(0, 1);
}

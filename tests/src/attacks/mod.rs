//! What a program tries from the place of a VMM process that its guest has taken over.
//!
//! Each attack is made three times (`tests/tests/jail/attacks.rs`): free, where it must get through, or the test could not
//! fail; behind the walls of the jail alone, without a filter of system calls; and in the whole jail. The table of
//! `docs/jail.md` is compared with this list.

mod call;
mod files;
mod limits;
mod network;
mod processes;
mod system;

use std::io;

pub use processes::share;

/// What stands in an attack's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoppedBy {
    /// Namespaces, root, ids, capabilities, cgroup, limits: the filter, too.
    Walls,
    /// The filter of system calls, and nothing else.
    Filter,
    /// Limits alone: the calls are those of a VMM.
    Limits,
}

/// An attack.
pub struct Attack {
    /// Its name.
    pub name: &'static str,
    /// What it tries, as the documentation has it.
    pub tries: &'static str,
    /// What stands in its way.
    pub stopped_by: StoppedBy,
    /// Tries it; `Ok` if it gets through.
    pub attempt: fn() -> io::Result<()>,
}

const fn attack(
    name: &'static str,
    tries: &'static str,
    stopped_by: StoppedBy,
    attempt: fn() -> io::Result<()>,
) -> Attack {
    Attack {
        name,
        tries,
        stopped_by,
        attempt,
    }
}

/// What an attack finds when it looks for it: made by the test, told by the environment.
pub mod prey {
    /// Environment variable with the id of a process of the host.
    pub const PROCESS: &str = "PREY_PROCESS";
    /// A file that belongs to another template.
    pub const TEMPLATE: &str = "PREY_TEMPLATE";
    /// A TCP port on which the host listens.
    pub const PORT: &str = "PREY_PORT";
    /// A Unix socket on which it listens.
    pub const SOCKET: &str = "PREY_SOCKET";
    /// One without a file.
    pub const ABSTRACT_SOCKET: &str = "PREY_ABSTRACT";

    /// One of these.
    #[must_use]
    pub fn of(name: &str) -> String {
        std::env::var(name).unwrap_or_default()
    }
}

/// Descriptors that a jail keeps: /dev/kvm, a template's memory (read-only), a memfd with one (read-only too).
pub const KVM: i32 = 10;
/// See [`KVM`].
pub const MEMORY: i32 = 11;
/// See [`KVM`].
pub const MEMFD: i32 = 12;
/// One that it does not keep.
pub const SECRET: i32 = 20;

use StoppedBy::{Filter, Limits, Walls};

/// All of them.
pub const ATTACKS: &[Attack] = &[
    attack("host-file", "open a file of the host", Walls, files::host_file),
    attack(
        "proc-of-others",
        "read the environment of another process in /proc",
        Walls,
        files::proc_of_others,
    ),
    attack(
        "other-template",
        "open another template",
        Walls,
        files::other_template,
    ),
    attack("device-node", "open /dev/mem", Walls, files::device_node),
    attack("make-file", "create a file in its root", Walls, files::make_file),
    attack("make-device", "make a device node", Walls, files::make_device),
    attack(
        "own-cgroup",
        "move itself to another cgroup",
        Walls,
        files::own_cgroup,
    ),
    attack(
        "template-by-proc",
        "write the template, reopened through /proc/self/fd",
        Walls,
        files::template_by_proc,
    ),
    attack(
        "memfd-by-proc",
        "write a template in a memfd, reopened through /proc/self/fd",
        Walls,
        files::memfd_by_proc,
    ),
    attack(
        "template-by-handle",
        "write the template, reopened by its file handle",
        Walls,
        files::template_by_handle,
    ),
    attack(
        "template-mode",
        "change the template's permissions through its descriptor",
        Walls,
        files::template_mode,
    ),
    attack(
        "other-descriptor",
        "read a descriptor that it was not given",
        Walls,
        files::other_descriptor,
    ),
    attack("mount", "mount a file system", Walls, files::mount),
    attack("unmount", "unmount its root", Walls, files::unmount),
    attack(
        "chroot-escape",
        "leave its root by a second chroot",
        Walls,
        files::chroot_escape,
    ),
    attack("execute", "execute a program of the host", Walls, files::execute),
    attack(
        "execute-memory",
        "execute a program from memory",
        Filter,
        files::execute_memory,
    ),
    attack("kill", "kill a process of the host", Walls, processes::kill),
    attack("ptrace", "trace a process of the host", Walls, processes::trace),
    attack(
        "process-memory",
        "write another process's memory",
        Walls,
        processes::process_memory,
    ),
    attack(
        "steal-descriptor",
        "take a descriptor of another process",
        Walls,
        processes::steal_descriptor,
    ),
    attack("setns", "enter the host's namespaces", Walls, processes::setns),
    attack(
        "user-namespace",
        "make a user namespace, to have all capabilities in it",
        Filter,
        processes::user_namespace,
    ),
    attack("setuid", "become root", Walls, processes::setuid),
    attack(
        "capabilities",
        "take capabilities back",
        Walls,
        processes::capabilities,
    ),
    attack("new-process", "fork", Filter, processes::new_process),
    attack("fork-bomb", "make 100 processes", Walls, processes::fork_bomb),
    attack("raw-socket", "open a raw IP socket", Walls, network::raw_socket),
    attack(
        "packet-socket",
        "open a packet socket",
        Walls,
        network::packet_socket,
    ),
    attack("tcp", "connect to a server of the host", Walls, network::tcp),
    attack(
        "unix-socket",
        "connect to a Unix socket of the host",
        Walls,
        network::unix_socket,
    ),
    attack(
        "abstract-socket",
        "connect to an abstract Unix socket of the host",
        Walls,
        network::abstract_socket,
    ),
    attack("any-socket", "open any socket", Filter, network::any_socket),
    attack(
        "interface",
        "bring a network interface up",
        Walls,
        network::interface,
    ),
    attack(
        "shared-memory",
        "attach System V shared memory of the host",
        Walls,
        processes::shared_memory,
    ),
    attack(
        "message-queue",
        "open a message queue of the host",
        Walls,
        processes::message_queue,
    ),
    attack(
        "kvm-ioctl",
        "make another VM through /dev/kvm",
        Filter,
        system::kvm_ioctl,
    ),
    attack("module", "load a kernel module", Walls, system::module),
    attack("time", "set the clock", Walls, system::time),
    attack("host-name", "set the host name", Walls, system::host_name),
    attack("reboot", "configure the reboot key", Walls, system::reboot),
    attack("kernel-log", "read the kernel's log", Walls, system::kernel_log),
    attack("ports", "get access to I/O ports", Walls, system::ports),
    attack("bpf", "make a BPF map", Walls, system::bpf),
    attack("perf", "count events of the whole host", Walls, system::perf),
    attack(
        "userfaultfd",
        "make a userfaultfd, to stop the kernel in a page fault",
        Walls,
        system::userfaultfd,
    ),
    attack("io-uring", "make an io_uring", Filter, system::io_uring),
    attack("keyring", "add a key to a keyring", Filter, system::keyring),
    attack(
        "executable-memory",
        "map memory that can be written and executed",
        Filter,
        system::executable_memory,
    ),
    attack(
        "old-calls",
        "make a 32-bit system call",
        Filter,
        system::old_calls,
    ),
    attack("priority", "raise its priority", Walls, limits::priority),
    attack(
        "real-time",
        "become a real-time process",
        Walls,
        limits::real_time,
    ),
    attack("lock-memory", "lock 64 MiB of memory", Walls, limits::lock_memory),
    attack(
        "memory-hog",
        "use 256 MiB where it has 96",
        Limits,
        limits::memory_hog,
    ),
    attack(
        "cpu-hog",
        "use more than its share of the processor",
        Limits,
        limits::cpu_hog,
    ),
    attack(
        "descriptors",
        "open 1,000 descriptors",
        Limits,
        limits::descriptors,
    ),
];

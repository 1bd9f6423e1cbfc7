//! The command line of the emulated host.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::protocol::{Port, ROOT_TAG};

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// What the emulated host is made of.
#[derive(Clone, Debug)]
pub struct Machine {
    /// MiB of memory.
    pub memory: u32,
    /// CPUs.
    pub cpus: u32,
    /// Time is a count of instructions.
    pub instruction_clock: bool,
    /// The uncompressed kernel.
    pub kernel: PathBuf,
    /// The kernel's process 1, a path on the machine.
    pub init: PathBuf,
    /// Print all kernel messages to the console.
    pub verbose_kernel: bool,
    /// virtiofs tags and sockets; the root first.
    pub file_systems: Vec<(String, PathBuf)>,
    /// Our ends' peers: one connected socket for the console, and one for each port.
    pub console: RawFd,
    /// See [`Port`].
    pub ports: [RawFd; 4],
}

impl Machine {
    /// The kernel command line.
    pub fn kernel_arguments(&self) -> Result<String> {
        let Some(init) = self.init.to_str().filter(|p| !p.contains(['"', '\n'])) else {
            bail!(
                "the path {} cannot stand on a kernel command line: build in another directory",
                self.init.display()
            );
        };
        let mut arguments = vec![
            "console=ttyS0".to_owned(),
            // A panic or an oops ends QEMU (with -no-reboot) and so becomes an error at once.
            "panic=-1".to_owned(),
            "oops=panic".to_owned(),
            // The kernel mounts the machine's root itself: no initramfs to build, load and unpack.
            format!("root={ROOT_TAG}"),
            "rootfstype=virtiofs".to_owned(),
            "ro".to_owned(),
            // One UART exists; probing for three more costs time.
            "8250.nr_uarts=1".to_owned(),
            // Emulated time is steady by construction; the checks and the watchdogs only see a busy machine.
            "tsc=reliable".to_owned(),
            "no_timer_check".to_owned(),
            "nowatchdog".to_owned(),
            // There is nobody to type and no cipher in need of a self-test.
            "i8042.noaux".to_owned(),
            "i8042.nokbd".to_owned(),
            "i8042.nopnp".to_owned(),
            "cryptomgr.notests".to_owned(),
        ];
        arguments.push(
            if self.verbose_kernel {
                "loglevel=7"
            } else {
                "quiet"
            }
            .to_owned(),
        );
        arguments.push(format!("init=\"{init}\""));
        Ok(arguments.join(" "))
    }

    /// The whole command line.
    pub fn command(&self) -> Result<Command> {
        let mut q = Command::new(PROGRAM);
        q.args([
            "-name",
            "picovm-emulated-host",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        // No device that nobody uses: each one is probed at every boot.
        q.args(["-machine", "q35,smbus=off,sata=off,usb=off,vmport=off"]);
        // One thread for all CPUs: with a thread each, a host kernel that patched code while another CPU executed it
        // crashed on a half-written instruction.
        q.args(["-accel", "tcg,thread=single,tb-size=512"]);
        if self.instruction_clock {
            // 2 ns for each instruction; idle time is skipped. Without `erms` and `fsrm` the kernel copies by 8 bytes, and
            // not by `rep movsb`, of which each byte would count as an instruction.
            q.args(["-icount", "shift=1,sleep=off"]);
            q.args(["-cpu", "max,+svm,+npt,-erms,-fsrm"]);
        } else {
            q.args(["-cpu", "max,+svm,+npt"]);
        }
        q.arg("-smp").arg(self.cpus.to_string());
        q.arg("-m").arg(format!("{}M", self.memory));
        // virtiofsd reads and writes the host's memory: it must be shareable.
        q.arg("-object").arg(format!(
            "memory-backend-memfd,id=memory,size={}M,share=on",
            self.memory
        ));
        q.args(["-numa", "node,memdev=memory"]);
        q.args(["-rtc", "base=utc"]);
        q.arg("-chardev")
            .arg(format!("socket,id=console,fd={}", self.console));
        q.args(["-serial", "chardev:console"]);
        q.args(["-device", "virtio-serial-pci,id=serial,max_ports=8"]);
        for (port, fd) in Port::ALL.into_iter().zip(self.ports) {
            let nr = port as u8;
            q.arg("-chardev").arg(format!("socket,id=port{nr},fd={fd}"));
            q.arg("-device").arg(format!(
                "virtserialport,bus=serial.0,nr={nr},chardev=port{nr},name=picovm.{nr}"
            ));
        }
        for (tag, socket) in &self.file_systems {
            q.arg("-chardev")
                .arg(format!("socket,id={tag},path={}", escape(socket)?));
            q.arg("-device")
                .arg(format!("vhost-user-fs-pci,chardev={tag},tag={tag}"));
        }
        q.arg("-kernel").arg(&self.kernel);
        q.arg("-append").arg(self.kernel_arguments()?);
        Ok(q)
    }
}

/// A path inside an option with commas.
fn escape(path: &Path) -> Result<String> {
    match path.to_str() {
        Some(path) => Ok(path.replace(',', ",,")),
        None => bail!(
            "the path {} is not UTF-8: set TMPDIR to a simpler one",
            path.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(instruction_clock: bool) -> Machine {
        Machine {
            memory: 512,
            cpus: 2,
            instruction_clock,
            kernel: "/cache/vmlinux".into(),
            init: "/with space/init".into(),
            verbose_kernel: false,
            file_systems: vec![("rootfs".into(), "/tmp/a,b/rootfs".into())],
            console: 3,
            ports: [4, 5, 6, 7],
        }
    }

    fn line(machine: &Machine) -> String {
        let command = machine.command().expect("valid");
        command
            .get_args()
            .map(|a| a.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn the_instruction_clock_never_counts_bytes_of_a_copy() {
        assert!(line(&machine(true)).contains("-icount shift=1,sleep=off -cpu max,+svm,+npt,-erms,-fsrm "));
        assert!(line(&machine(false)).contains("-cpu max,+svm,+npt -smp 2"));
    }

    #[test]
    fn all_cpus_share_one_thread() {
        assert!(line(&machine(false)).contains("tcg,thread=single"));
    }

    #[test]
    fn odd_paths_are_quoted() {
        assert!(line(&machine(false)).contains("path=/tmp/a,,b/rootfs"));
        assert!(line(&machine(false)).contains("init=\"/with space/init\""));
    }
}

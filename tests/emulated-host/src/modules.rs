//! The kernel's modules: an index made when they are unpacked, and loading by name or alias inside the host.
//!
//! The machine need not have kmod installed, and a kernel package that is only unpacked has no index; so the index is made
//! here, in three plain text files, and `init` answers to the name `modprobe`.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};

/// A device node whose opening loads a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    /// Path below `/dev`.
    pub name: String,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// What one module says of itself in its `.modinfo` section.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModInfo {
    /// Modules that must be there first.
    pub depends: Vec<String>,
    /// Names, with `*` for any text, under which the kernel asks for it.
    pub aliases: Vec<String>,
}

impl ModInfo {
    /// Reads the section's `key=value` strings.
    pub fn parse(section: &[u8]) -> Self {
        let mut info = Self::default();
        for entry in section.split(|b| *b == 0) {
            let Ok(entry) = std::str::from_utf8(entry) else {
                continue;
            };
            match entry.split_once('=') {
                Some(("depends", list)) => {
                    info.depends = list.split(',').filter(|d| !d.is_empty()).map(canonical).collect();
                }
                Some(("alias", alias)) => info.aliases.push(alias.to_owned()),
                _ => {}
            }
        }
        info
    }

    /// Reads the section out of a module.
    pub fn of_module(elf: &[u8]) -> Result<Self> {
        let file = object::File::parse(elf).context("not an ELF file")?;
        let section = file.section_by_name(".modinfo").context("no .modinfo section")?;
        Ok(Self::parse(
            section.data().context("unreadable .modinfo section")?,
        ))
    }

    /// The device node that this module wants, if it names both the node and its numbers.
    pub fn device_node(&self) -> Option<DeviceNode> {
        let name = self.aliases.iter().find_map(|a| a.strip_prefix("devname:"))?;
        let (major, minor) = self
            .aliases
            .iter()
            .find_map(|a| a.strip_prefix("char-major-"))?
            .split_once('-')?;
        Some(DeviceNode {
            name: name.to_owned(),
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

/// A module's name as the kernel knows it: `kvm-amd.ko` is `kvm_amd`.
pub fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The index of a directory of modules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// Name to file (below the directory) and names of what it depends on.
    modules: BTreeMap<String, (PathBuf, Vec<String>)>,
    /// Pattern and name of the module.
    aliases: Vec<(String, String)>,
    /// Nodes to make.
    devices: Vec<DeviceNode>,
}

const DEPENDENCIES: &str = "picovm.dep";
const ALIASES: &str = "picovm.alias";
const DEVICES: &str = "picovm.devname";

impl Index {
    /// Adds one module by its file below the directory.
    pub fn add(&mut self, file: &Path, info: ModInfo) {
        let Some(name) = file.file_stem().map(|s| canonical(&s.to_string_lossy())) else {
            return;
        };
        self.devices.extend(info.device_node());
        self.aliases
            .extend(info.aliases.into_iter().map(|a| (a, name.clone())));
        self.modules.insert(name, (file.to_owned(), info.depends));
    }

    /// Writes the index into the directory.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let dependencies: String = self
            .modules
            .iter()
            .map(|(name, (file, depends))| format!("{name} {} {}\n", file.display(), depends.join(" ")))
            .collect();
        let aliases: String = self.aliases.iter().map(|(a, m)| format!("{a} {m}\n")).collect();
        let devices: String = self
            .devices
            .iter()
            .map(|d| format!("{} {} {}\n", d.name, d.major, d.minor))
            .collect();
        for (name, text) in [
            (DEPENDENCIES, dependencies),
            (ALIASES, aliases),
            (DEVICES, devices),
        ] {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    fn read(dir: &Path, name: &str) -> Result<String> {
        let path = dir.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// Reads the index back, without the aliases, which are many and seldom wanted.
    pub fn load(dir: &Path) -> Result<Self> {
        let mut index = Self::default();
        for line in Self::read(dir, DEPENDENCIES)?.lines() {
            let mut words = line.split_whitespace();
            let (Some(name), Some(file)) = (words.next(), words.next()) else {
                continue;
            };
            index.modules.insert(
                name.to_owned(),
                (PathBuf::from(file), words.map(str::to_owned).collect()),
            );
        }
        Ok(index)
    }

    /// Reads the aliases too.
    pub fn load_with_aliases(dir: &Path) -> Result<Self> {
        let mut index = Self::load(dir)?;
        for line in Self::read(dir, ALIASES)?.lines() {
            if let Some((alias, module)) = line.rsplit_once(' ') {
                index.aliases.push((alias.to_owned(), module.to_owned()));
            }
        }
        Ok(index)
    }

    /// Reads only the device nodes.
    pub fn load_devices(dir: &Path) -> Result<Vec<DeviceNode>> {
        let text = Self::read(dir, DEVICES)?;
        Ok(text
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                Some(DeviceNode {
                    name: words.next()?.to_owned(),
                    major: words.next()?.parse().ok()?,
                    minor: words.next()?.parse().ok()?,
                })
            })
            .collect())
    }

    /// The modules that `name` means: itself, or all that have it as an alias.
    pub fn resolve(&self, name: &str) -> Vec<String> {
        let module = canonical(name);
        if self.modules.contains_key(&module) {
            return vec![module];
        }
        let mut found: Vec<String> = self
            .aliases
            .iter()
            .filter(|(a, _)| glob(a, name))
            .map(|(_, m)| m.clone())
            .collect();
        found.dedup();
        found
    }

    /// Files to load for a module, in order.
    pub fn load_order(&self, module: &str) -> Result<Vec<PathBuf>> {
        fn visit(
            index: &Index,
            module: &str,
            seen: &mut HashSet<String>,
            order: &mut Vec<PathBuf>,
        ) -> Result<()> {
            if !seen.insert(module.to_owned()) {
                return Ok(());
            }
            let Some((file, depends)) = index.modules.get(module) else {
                bail!("the host kernel has no module {module}");
            };
            for dependency in depends {
                visit(index, dependency, seen, order)?;
            }
            order.push(file.clone());
            Ok(())
        }
        let mut order = Vec::new();
        visit(self, module, &mut HashSet::new(), &mut order)?;
        Ok(order)
    }

    /// Loads a module and what it needs. What is loaded already is left alone; `parameters` go to the module itself.
    pub fn insert(&self, dir: &Path, module: &str, parameters: &str) -> Result<()> {
        let order = self.load_order(module)?;
        for (i, file) in order.iter().enumerate() {
            let last = i + 1 == order.len();
            insert_file(&dir.join(file), if last { parameters } else { "" })?;
        }
        Ok(())
    }
}

fn insert_file(path: &Path, parameters: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open module {}", path.display()))?;
    let parameters = std::ffi::CString::new(parameters).context("module parameters hold a zero byte")?;
    // SAFETY: finit_module(2) takes an open descriptor, a zero-terminated string and flags; both live across the call.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EEXIST) {
        return Ok(());
    }
    Err(error).with_context(|| format!("cannot load module {}", path.display()))
}

/// Whether `text` fits `pattern`, in which `*` stands for any text.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.len() >= last.len() && rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> Index {
        let mut index = Index::default();
        index.add(
            Path::new("kernel/kvm-amd.ko"),
            ModInfo::parse(b"depends=kvm,ccp\0alias=cpu:type:*,feat:*00C2*\0"),
        );
        index.add(Path::new("kernel/kvm.ko"), ModInfo::parse(b"depends=irqbypass\0"));
        index.add(Path::new("kernel/irqbypass.ko"), ModInfo::parse(b"depends=\0"));
        index.add(Path::new("kernel/ccp.ko"), ModInfo::default());
        index.add(
            Path::new("kernel/tun.ko"),
            ModInfo::parse(b"license=GPL\0alias=devname:net/tun\0alias=char-major-10-200\0depends=\0"),
        );
        index
    }

    #[test]
    fn dependencies_come_first() {
        let order = index().load_order("kvm_amd").expect("known");
        let names: Vec<_> = order.iter().map(|p| p.display().to_string()).collect();
        assert_eq!(
            names,
            [
                "kernel/irqbypass.ko",
                "kernel/kvm.ko",
                "kernel/ccp.ko",
                "kernel/kvm-amd.ko"
            ]
        );
    }

    #[test]
    fn a_module_is_found_by_name_and_by_alias() {
        assert_eq!(index().resolve("kvm-amd"), ["kvm_amd"]);
        assert_eq!(index().resolve("char-major-10-200"), ["tun"]);
        assert_eq!(index().resolve("cpu:type:x86,feat:,0001,00C2,"), ["kvm_amd"]);
        assert!(index().resolve("char-major-10-2").is_empty());
    }

    #[test]
    fn the_index_reads_back_as_it_was_written() {
        let dir = tempfile::tempdir().expect("temporary directory");
        index().save(dir.path()).expect("saved");
        let mut back = Index::load_with_aliases(dir.path()).expect("read");
        back.devices = Index::load_devices(dir.path()).expect("read");
        assert_eq!(back, index());
        assert_eq!(
            back.devices,
            [DeviceNode {
                name: "net/tun".into(),
                major: 10,
                minor: 200
            }]
        );
    }
}

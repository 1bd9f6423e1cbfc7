use std::collections::BTreeSet;

use seccompiler::sock_filter;

use super::*;

/// What a program returns for a system call: classic BPF as seccomp allows it, as far as our filters use it.
fn run(program: &[sock_filter], number: u32, architecture: u32, arguments: &[u64; 6]) -> u32 {
    let word = |offset: u32| -> u32 {
        match offset {
            0 => number,
            4 => architecture,
            16..64 => {
                let argument = arguments[(offset as usize - 16) / 8];
                if offset.is_multiple_of(8) {
                    argument as u32
                } else {
                    (argument >> 32) as u32
                }
            }
            _ => panic!("no such word: {offset}"),
        }
    };
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let instruction = &program[at];
        at += 1;
        let k = instruction.k;
        let holds = match u32::from(instruction.code) {
            0x20 => {
                accumulator = word(k);
                continue;
            }
            0x54 => {
                accumulator &= k;
                continue;
            }
            0x06 => return k,
            0x05 => {
                at += k as usize;
                continue;
            }
            0x15 => accumulator == k,
            0x25 => accumulator > k,
            0x35 => accumulator >= k,
            code => panic!("no such instruction: {code:#x}"),
        };
        at += usize::from(if holds { instruction.jt } else { instruction.jf });
    }
}

const X86_64: u32 = 0xc000_003e;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

fn rules(lists: &[(&str, &str)]) -> Rules {
    let mut all = Rules::new();
    for (name, text) in lists {
        add(&mut all, name, &parse(name, text).unwrap()).unwrap();
    }
    all
}

fn outer(work: Work) -> Rules {
    let mut lists = vec![work.setup()];
    lists.extend(KINDS.iter().flat_map(|kind| kind.lists(work)));
    rules(&lists)
}

fn of(kind: ThreadKind, work: Work) -> Rules {
    rules(&kind.lists(work))
}

/// Arguments that matter to any rule, and their neighbours.
fn samples() -> Vec<[u64; 6]> {
    let mut values = BTreeSet::from([0, 1, 2, u64::MAX, 1 << 32]);
    for work in WORKS {
        let outer = outer(work);
        for condition in outer.values().flatten().flatten() {
            values.extend([
                condition.val,
                condition.val ^ 1,
                condition.val | 1 << 40,
                condition.val | 4,
            ]);
        }
    }
    values.into_iter().map(|value| [value; 6]).collect()
}

/// Every number, those of the x32 ABI, and some that do not exist.
fn numbers() -> impl Iterator<Item = u32> {
    (0..600)
        .chain(0x4000_0000..0x4000_0220)
        .chain([u32::MAX, 0x8000_0000])
}

#[test]
fn the_short_layout_decides_as_seccompiler_does() {
    let samples = samples();
    let mut lists = vec![rules(&[("program", PROGRAM)]), Rules::new()];
    for work in WORKS {
        lists.push(outer(work));
        lists.extend(KINDS.map(|kind| of(kind, work)));
    }
    for list in &lists {
        let plain = layout::compile_plainly(list).unwrap();
        let short = match layout::compile(list, None) {
            Ok(short) => short,
            Err(reason) => {
                assert!(list.len() > 150, "{reason}");
                continue;
            }
        };
        assert!(short.len() <= plain.len() + 1);
        for number in numbers() {
            for arguments in &samples {
                let (one, other) = (
                    run(&plain, number, X86_64, arguments),
                    run(&short, number, X86_64, arguments),
                );
                assert_eq!(one, other, "{number} {arguments:x?}");
            }
        }
        assert_eq!(run(&short, 0, 0x4000_0003, &[0; 6]), KILL, "another architecture");
    }
}

#[test]
fn on_top_of_the_outer_filter_a_kind_is_what_it_is_alone() {
    let samples = samples();
    for work in WORKS {
        let outer = outer(work);
        let below = layout::compile(&outer, None).unwrap();
        for kind in KINDS {
            let rules = of(kind, work);
            let alone = layout::compile_plainly(&rules).unwrap();
            let above = layout::compile(&rules, Some(&outer)).unwrap();
            println!(
                "{work:?}, {}: {} instructions on top of {}",
                kind.name(),
                above.len(),
                below.len()
            );
            for number in numbers() {
                for arguments in &samples {
                    // The kernel takes the sterner of the two.
                    let both = [&below, &above].map(|program| run(program, number, X86_64, arguments));
                    let both = if both == [ALLOW; 2] { ALLOW } else { KILL };
                    assert_eq!(
                        both,
                        run(&alone, number, X86_64, arguments),
                        "{work:?} {} {number} {arguments:x?}",
                        kind.name()
                    );
                }
            }
        }
    }
}

#[test]
fn the_filters_are_as_short_as_they_were_measured() {
    let filters = Filters::new(&Seccomp::default(), Work::Clone).unwrap();
    let lengths = filters.0.kinds.each_ref().map(Vec::len);
    assert!(lengths.iter().all(|length| *length <= 50), "{lengths:?}");
    assert!(filters.0.outer.len() <= 250, "{}", filters.0.outer.len());
}

#[test]
fn who_makes_a_template_can_open_and_start_nothing_at_any_time() {
    let outer = outer(Work::Template);
    for name in [
        "open",
        "openat",
        "openat2",
        "creat",
        "socket",
        "connect",
        "execve",
        "execveat",
        "fork",
        "vfork",
        "mount",
        "setns",
        "unshare",
        "ptrace",
        "chmod",
        "fchmod",
        "ftruncate",
        "rename",
        "unlink",
        "kill",
        "setresuid",
    ] {
        let number: Sysno = name.parse().unwrap();
        assert!(!outer.contains_key(&i64::from(number.id())), "{name}");
    }
    // Nor a thread, a VM or a filter once its guest may run.
    for kind in KINDS {
        let rules = of(kind, Work::Template);
        for name in [
            "clone",
            "clone3",
            "seccomp",
            "prctl",
            "socketpair",
            "fcntl",
            "mincore",
        ] {
            let number: Sysno = name.parse().unwrap();
            assert!(!rules.contains_key(&i64::from(number.id())), "{kind:?}: {name}");
        }
    }
}

#[test]
fn numbers_of_ioctls_are_those_of_their_names() {
    use kvm_bindings as kvm;
    fn number<T>(direction: u64, number: u64) -> u64 {
        direction << 30 | (size_of::<T>() as u64) << 16 | 0xae << 8 | number
    }
    const NONE: u64 = 0;
    const WRITE: u64 = 1;
    const READ: u64 = 2;
    let known = [
        ("KVM_CREATE_VM", number::<()>(NONE, 0x01)),
        ("KVM_CHECK_EXTENSION", number::<()>(NONE, 0x03)),
        ("KVM_GET_VCPU_MMAP_SIZE", number::<()>(NONE, 0x04)),
        ("KVM_CREATE_VCPU", number::<()>(NONE, 0x41)),
        (
            "KVM_SET_USER_MEMORY_REGION",
            number::<kvm::kvm_userspace_memory_region>(WRITE, 0x46),
        ),
        ("KVM_SET_TSS_ADDR", number::<()>(NONE, 0x47)),
        ("KVM_CREATE_IRQCHIP", number::<()>(NONE, 0x60)),
        ("KVM_IRQ_LINE", number::<kvm::kvm_irq_level>(WRITE, 0x61)),
        // As the kernel has it: the direction is the wrong way round.
        ("KVM_SET_IRQCHIP", number::<kvm::kvm_irqchip>(READ, 0x63)),
        ("KVM_SET_CLOCK", number::<kvm::kvm_clock_data>(WRITE, 0x7b)),
        ("KVM_RUN", number::<()>(NONE, 0x80)),
        ("KVM_SET_REGS", number::<kvm::kvm_regs>(WRITE, 0x82)),
        ("KVM_SET_SREGS", number::<kvm::kvm_sregs>(WRITE, 0x84)),
        ("KVM_GET_MSRS", number::<kvm::kvm_msrs>(READ | WRITE, 0x88)),
        ("KVM_SET_MSRS", number::<kvm::kvm_msrs>(WRITE, 0x89)),
        ("KVM_SET_LAPIC", number::<kvm::kvm_lapic_state>(WRITE, 0x8f)),
        ("KVM_SET_CPUID2", number::<kvm::kvm_cpuid2>(WRITE, 0x90)),
        ("KVM_SET_MP_STATE", number::<kvm::kvm_mp_state>(WRITE, 0x99)),
        ("KVM_SET_VCPU_EVENTS", number::<kvm::kvm_vcpu_events>(WRITE, 0xa0)),
        ("KVM_SET_DEBUGREGS", number::<kvm::kvm_debugregs>(WRITE, 0xa2)),
        ("KVM_SET_TSC_KHZ", number::<()>(NONE, 0xa2)),
        ("KVM_GET_TSC_KHZ", number::<()>(NONE, 0xa3)),
        ("KVM_SET_XSAVE", number::<kvm::kvm_xsave>(WRITE, 0xa5)),
        ("KVM_SET_XCRS", number::<kvm::kvm_xcrs>(WRITE, 0xa7)),
        (
            "KVM_PRE_FAULT_MEMORY",
            number::<kvm::kvm_pre_fault_memory>(READ | WRITE, 0xd5),
        ),
        ("FIONBIO", libc::FIONBIO),
        (
            "KVM_GET_MSR_INDEX_LIST",
            number::<kvm::kvm_msr_list>(READ | WRITE, 0x02),
        ),
        (
            "KVM_GET_SUPPORTED_CPUID",
            number::<kvm::kvm_cpuid2>(READ | WRITE, 0x05),
        ),
        ("KVM_GET_IRQCHIP", number::<kvm::kvm_irqchip>(READ | WRITE, 0x62)),
        ("KVM_GET_CLOCK", number::<kvm::kvm_clock_data>(READ, 0x7c)),
        ("KVM_GET_REGS", number::<kvm::kvm_regs>(READ, 0x81)),
        ("KVM_GET_SREGS", number::<kvm::kvm_sregs>(READ, 0x83)),
        ("KVM_GET_LAPIC", number::<kvm::kvm_lapic_state>(READ, 0x8e)),
        ("KVM_GET_CPUID2", number::<kvm::kvm_cpuid2>(READ | WRITE, 0x91)),
        ("KVM_GET_MP_STATE", number::<kvm::kvm_mp_state>(READ, 0x98)),
        ("KVM_GET_VCPU_EVENTS", number::<kvm::kvm_vcpu_events>(READ, 0x9f)),
        ("KVM_GET_DEBUGREGS", number::<kvm::kvm_debugregs>(READ, 0xa1)),
        ("KVM_GET_XSAVE", number::<kvm::kvm_xsave>(READ, 0xa4)),
        ("KVM_GET_XCRS", number::<kvm::kvm_xcrs>(READ, 0xa6)),
    ];
    let mut lists: Vec<List> = WORKS.map(Work::setup).to_vec();
    lists.extend(KINDS.iter().flat_map(|kind| kind.lists(Work::Template)));
    let mut seen = 0;
    for (name, text) in lists {
        for call in parse(name, text).unwrap() {
            if call.syscall != "ioctl" {
                continue;
            }
            let condition = &call.args[0];
            let comment = condition.comment.as_deref().unwrap();
            let (_, value) = known
                .iter()
                .find(|(known, _)| *known == comment)
                .unwrap_or_else(|| panic!("{comment} is not known to this test"));
            assert_eq!((condition.index, condition.val), (1, *value), "{comment}");
            seen += 1;
        }
    }
    assert!(seen >= known.len());
}

#[test]
fn what_is_no_list_is_refused_with_the_reason() {
    let told = |json: &str| {
        let calls = serde_json::from_str::<Vec<AllowedCall>>(json).map_err(|error| error.to_string())?;
        add(&mut Rules::new(), "mine", &calls).map_err(|error| error.to_string())
    };
    assert!(
        told(r#"[{"syscall": "reed"}]"#)
            .unwrap_err()
            .contains("no system call reed")
    );
    assert!(told(r#"[{"syscal": "read"}]"#).is_err());
    let bad = r#"[{"syscall": "read", "args": [{"index": 6, "type": "dword", "op": "eq", "val": 0}]}]"#;
    assert!(told(bad).unwrap_err().contains("arguments 0 to 5"));
    assert!(told(r#"[{"syscall": "read"}, {"syscall": "read"}]"#).is_ok());
}

#[test]
fn a_call_that_is_listed_with_and_without_conditions_needs_none() {
    let condition = ArgumentConditionText::DWORD_0_IS_1;
    let with = format!(r#"[{{"syscall": "read", "args": [{condition}]}}]"#);
    for (first, second) in [
        (with.as_str(), r#"[{"syscall": "read"}]"#),
        (r#"[{"syscall": "read"}]"#, &with),
    ] {
        let both = rules(&[("first", first), ("second", second)]);
        assert_eq!(both.get(&0).map(Vec::len), Some(0));
    }
    assert_eq!(
        rules(&[("one", &with), ("two", &with)]).get(&0).map(Vec::len),
        Some(1)
    );
}

struct ArgumentConditionText;

impl ArgumentConditionText {
    const DWORD_0_IS_1: &str = r#"{"index": 0, "type": "dword", "op": "eq", "val": 1}"#;
}

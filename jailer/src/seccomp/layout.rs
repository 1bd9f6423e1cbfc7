//! Short filters, quick to install.
//!
//! What installing a filter takes grows with its length (the kernel translates it) and with the steps that it takes for each
//! number of a system call (the kernel tries them all, to know which are always allowed). So the conditions are compiled by
//! seccompiler, and what is around them is a search tree over the numbers instead of one comparison after the other.
//!
//! A filter that is installed on top of another need not tell apart what that one does not let through.

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use crate::policy::{ArgumentCondition, Operator, Width};

/// For each system call the alternatives, each with conditions that must all hold; none: it is always allowed.
pub(super) type Rules = BTreeMap<i64, Vec<Vec<ArgumentCondition>>>;

/// What comes of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Allow,
    Kill,
    /// The conditions of this entry of the list decide.
    Check(usize),
}

/// Where a comparison leads: the next comparison, or an end.
#[derive(Clone, Copy)]
enum Target {
    Node(usize),
    End(Outcome),
}

/// How conditions are checked.
enum Check {
    /// By seccompiler's program, which returns.
    Program(BpfProgram),
    /// The low half of an argument is one of these: by far the most frequent, and much shorter so.
    OneOf(u8, Vec<u32>),
}

impl Check {
    fn len(&self) -> usize {
        match self {
            Self::Program(program) => program.len(),
            Self::OneOf(_, values) => values.len().saturating_add(1),
        }
    }
}

/// Is the number at least this?
struct Node {
    least: u32,
    yes: Target,
    no: Target,
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
pub(super) const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Instructions by which seccompiler checks the architecture.
pub(super) const ARCHITECTURE_CHECK: usize = 3;
/// Those that follow, before the conditions: the number is loaded and compared.
const NUMBER_CHECK: usize = 2;

fn instruction(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Compiles rules that allow, where everything else kills. `below` are those of a filter that is in force already, if there is
/// one; it has checked the architecture, too.
pub(super) fn compile(rules: &Rules, below: Option<&Rules>) -> Result<BpfProgram, String> {
    let mut checks = Vec::new();
    let mut known: Vec<(u32, Outcome)> = Vec::new();
    let numbers: BTreeSet<i64> = rules
        .keys()
        .chain(below.into_iter().flatten().map(|(number, _)| number))
        .copied()
        .collect();
    for number in numbers {
        let outcome = match rules.get(&number) {
            None => Outcome::Kill,
            // What is below has checked just that.
            Some(alternatives)
                if alternatives.is_empty()
                    || below.and_then(|below| below.get(&number)) == Some(alternatives) =>
            {
                Outcome::Allow
            }
            Some(alternatives) => {
                checks.push(check(number, alternatives)?);
                Outcome::Check(checks.len().saturating_sub(1))
            }
        };
        let number = u32::try_from(number).map_err(|_| "a number is negative".to_owned())?;
        known.push((number, outcome));
    }
    let mut nodes = Vec::new();
    let root = tree(&segments(&known, below.is_some()), &mut nodes);
    let mut program = match below {
        Some(_) => BpfProgram::new(),
        None => architecture_check()?,
    };
    program.push(instruction(LOAD, 0));
    place(&mut program, root, &nodes, &checks)?;
    Ok(program)
}

/// Compiles rules with seccompiler alone.
pub(super) fn compile_plainly(rules: &Rules) -> Result<BpfProgram, String> {
    let mut all = BTreeMap::new();
    for (number, alternatives) in rules {
        let alternatives: Result<Vec<SeccompRule>, String> =
            alternatives.iter().map(|all| rule(all)).collect();
        all.insert(*number, alternatives?);
    }
    SeccompFilter::new(
        all,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .and_then(BpfProgram::try_from)
    .map_err(|error| error.to_string())
}

fn rule(conditions: &[ArgumentCondition]) -> Result<SeccompRule, String> {
    let conditions = conditions.iter().map(|condition| {
        let width = match condition.width {
            Width::Dword => SeccompCmpArgLen::Dword,
            Width::Qword => SeccompCmpArgLen::Qword,
        };
        let operator = match condition.op {
            Operator::Eq => SeccompCmpOp::Eq,
            Operator::MaskedEq(mask) => SeccompCmpOp::MaskedEq(mask),
            Operator::Ge => SeccompCmpOp::Ge,
            Operator::Gt => SeccompCmpOp::Gt,
            Operator::Le => SeccompCmpOp::Le,
            Operator::Lt => SeccompCmpOp::Lt,
            Operator::Ne => SeccompCmpOp::Ne,
        };
        SeccompCondition::new(condition.index, width, operator, condition.val)
    });
    conditions
        .collect::<Result<_, _>>()
        .and_then(SeccompRule::new)
        .map_err(|error| error.to_string())
}

/// Tells that a system call does not exist, and allows all others.
pub(super) fn absent(number: i64) -> Result<BpfProgram, String> {
    let rules = BTreeMap::from([(number, Vec::new())]);
    let (others, this) = (SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32));
    SeccompFilter::new(rules, others, this, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(|error| error.to_string())
}

/// The instructions with which seccompiler begins.
fn architecture_check() -> Result<BpfProgram, String> {
    let mut program = compile_plainly(&Rules::new())?;
    program.truncate(ARCHITECTURE_CHECK);
    Ok(program)
}

/// How the conditions of one system call are checked.
fn check(number: i64, alternatives: &[Vec<ArgumentCondition>]) -> Result<Check, String> {
    if let Some(one_of) = one_of(alternatives) {
        return Ok(one_of);
    }
    let mut program = compile_plainly(&Rules::from([(number, alternatives.to_vec())]))?;
    // The last instruction is for other numbers.
    program.pop();
    let begins = ARCHITECTURE_CHECK + NUMBER_CHECK;
    if program
        .get(begins.saturating_sub(1))
        .map(|compare| i64::from(compare.k))
        != Some(number)
    {
        return Err("seccompiler lays out its programs in another way than this version knows".into());
    }
    Ok(Check::Program(program.split_off(begins)))
}

fn one_of(alternatives: &[Vec<ArgumentCondition>]) -> Option<Check> {
    let mut values = Vec::new();
    let mut argument = None;
    for alternative in alternatives {
        match alternative.as_slice() {
            [condition] if condition.width == Width::Dword && condition.op == Operator::Eq => {
                if argument.is_some_and(|argument| argument != condition.index) {
                    return None;
                }
                argument = Some(condition.index);
                values.push(condition.val as u32);
            }
            _ => return None,
        }
    }
    Some(Check::OneOf(argument?, values))
}

/// Numbers from which on another outcome holds. Numbers between those that are known are killed, or do not matter.
fn segments(known: &[(u32, Outcome)], others_do_not_matter: bool) -> Vec<(u32, Outcome)> {
    let mut all: Vec<(u32, Outcome)> = Vec::new();
    let mut push = |from: u32, outcome: Outcome| {
        if all.last().is_none_or(|(_, last)| *last != outcome) {
            all.push((from, outcome));
        }
    };
    let mut next = 0;
    for &(number, outcome) in known {
        if number > next && !others_do_not_matter {
            push(next, Outcome::Kill);
        }
        push(number, outcome);
        next = number.saturating_add(1);
    }
    if !others_do_not_matter {
        push(next, Outcome::Kill);
    }
    all
}

/// A balanced tree over segments, the first of which begins at or below every number.
fn tree(segments: &[(u32, Outcome)], nodes: &mut Vec<Node>) -> Target {
    match segments {
        [] => Target::End(Outcome::Kill),
        [(_, outcome)] => Target::End(*outcome),
        _ => {
            let (left, right) = segments.split_at(segments.len() / 2);
            let least = right.first().map_or(0, |(from, _)| *from);
            let at = nodes.len();
            nodes.push(Node {
                least,
                yes: Target::End(Outcome::Kill),
                no: Target::End(Outcome::Kill),
            });
            let (no, yes) = (tree(left, nodes), tree(right, nodes));
            if let Some(node) = nodes.get_mut(at) {
                (node.no, node.yes) = (no, yes);
            }
            Target::Node(at)
        }
    }
}

/// Puts the comparisons, then the conditions, then the two ends.
fn place(program: &mut BpfProgram, root: Target, nodes: &[Node], checks: &[Check]) -> Result<(), String> {
    let tree = program.len();
    let mut next = tree.saturating_add(nodes.len());
    let mut begins = Vec::new();
    for check in checks {
        begins.push(next);
        next = next.saturating_add(check.len());
    }
    let (allow, kill) = (next, next.saturating_add(1));
    let position = |target: Target| match target {
        Target::Node(node) => tree.saturating_add(node),
        Target::End(Outcome::Allow) => allow,
        Target::End(Outcome::Kill) => kill,
        Target::End(Outcome::Check(check)) => begins.get(check).copied().unwrap_or(kill),
    };
    // The first comparison comes first. Without one there is one end for all.
    if nodes.is_empty() && position(root) == kill {
        program.push(instruction(RETURN, libc::SECCOMP_RET_KILL_PROCESS));
        return Ok(());
    }
    let jump = |after: usize, to: usize| {
        to.checked_sub(after)
            .and_then(|distance| u8::try_from(distance).ok())
            .ok_or_else(|| "it is too long: a jump reaches over 255 instructions".to_owned())
    };
    for (index, node) in nodes.iter().enumerate() {
        let after = tree.saturating_add(index).saturating_add(1);
        program.push(sock_filter {
            code: JUMP_IF_AT_LEAST,
            jt: jump(after, position(node.yes))?,
            jf: jump(after, position(node.no))?,
            k: node.least,
        });
    }
    for check in checks {
        match check {
            Check::Program(instructions) => program.extend(instructions.iter().cloned()),
            Check::OneOf(argument, values) => {
                // `struct seccomp_data`: the arguments begin at byte 16, the low half of each comes first.
                let offset = u32::from(*argument).saturating_mul(8).saturating_add(16);
                program.push(instruction(LOAD, offset));
                for (index, value) in values.iter().enumerate() {
                    let after = program.len().saturating_add(1);
                    let no = if index.saturating_add(1) == values.len() {
                        jump(after, kill)?
                    } else {
                        0
                    };
                    program.push(sock_filter {
                        code: JUMP_IF_EQUAL,
                        jt: jump(after, allow)?,
                        jf: no,
                        k: *value,
                    });
                }
            }
        }
    }
    program.push(instruction(RETURN, libc::SECCOMP_RET_ALLOW));
    program.push(instruction(RETURN, libc::SECCOMP_RET_KILL_PROCESS));
    Ok(())
}

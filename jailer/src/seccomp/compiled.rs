//! The filters that are enforced, compiled ahead: `compiled.bin` holds, for clones, for templates and for share servers, the outer one and those
//! of the kinds, each as the number of its instructions (32 bits, little-endian) and these as `struct sock_filter`.
//!
//! A test compares the file with what the lists are compiled to; `PICOVM_WRITE_FILTERS=1 cargo test -p picovm-jailer` writes it.

use seccompiler::{BpfProgram, sock_filter};

use super::Work;

const BYTES: &[u8] = include_bytes!("compiled.bin");

/// The outer filter of a work, and those of its kinds in their order.
pub(super) fn read(work: Work) -> Result<Programs, String> {
    let [clone, template, share] = decode(BYTES).ok_or("the file of compiled filters is not one")?;
    Ok(match work {
        Work::Clone => clone,
        Work::Template => template,
        Work::Share => share,
    })
}

type Programs = (BpfProgram, [BpfProgram; 3]);

/// By work.
fn decode(bytes: &[u8]) -> Option<[Programs; 3]> {
    let mut rest = bytes;
    let mut next = || -> Option<BpfProgram> {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length))
            .ok()?
            .checked_mul(8)?;
        let (program, behind) = behind.split_at_checked(length)?;
        rest = behind;
        Some(program.as_chunks::<8>().0.iter().map(instruction).collect())
    };
    let mut of_one = || Some((next()?, [next()?, next()?, next()?]));
    let all = [of_one()?, of_one()?, of_one()?];
    rest.is_empty().then_some(all)
}

fn instruction(bytes: &[u8; 8]) -> sock_filter {
    let [code_low, code_high, jt, jf, k @ ..] = *bytes;
    sock_filter {
        code: u16::from_le_bytes([code_low, code_high]),
        jt,
        jf,
        k: u32::from_le_bytes(k),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::policy::SeccompMode;
    use crate::seccomp::{Filters, WORKS};

    fn encode(programs: &[BpfProgram]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for program in programs {
            bytes.extend_from_slice(&(program.len() as u32).to_le_bytes());
            for instruction in program {
                bytes.extend_from_slice(&instruction.code.to_le_bytes());
                bytes.extend_from_slice(&[instruction.jt, instruction.jf]);
                bytes.extend_from_slice(&instruction.k.to_le_bytes());
            }
        }
        bytes
    }

    #[test]
    fn the_compiled_filters_are_those_of_the_lists() {
        let compiled = WORKS.map(|work| Filters::compile(SeccompMode::Kill, work).unwrap());
        let programs: Vec<BpfProgram> = compiled
            .into_iter()
            .flat_map(|(outer, kinds)| [vec![outer], kinds.to_vec()].concat())
            .collect();
        let bytes = encode(&programs);
        if std::env::var_os("PICOVM_WRITE_FILTERS").is_some() {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/seccomp/compiled.bin");
            std::fs::write(path, &bytes).unwrap();
        } else {
            assert!(
                bytes == BYTES,
                "the lists have changed: PICOVM_WRITE_FILTERS=1 cargo test -p picovm-jailer"
            );
        }
    }

    #[test]
    fn what_is_no_file_of_filters_is_refused() {
        assert!(decode(BYTES).is_some());
        assert!(decode(&BYTES[..BYTES.len() - 1]).is_none());
        assert!(decode(&[BYTES, &[0]].concat()).is_none());
        assert!(decode(&[0xff; 16]).is_none());
    }
}

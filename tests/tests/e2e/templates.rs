//! Templates that are damaged, mixed, foreign, or that there is no room for.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use picovm_engine::{ContainerOptions, TemplateSpec};
use picovm_tests::{OwnStore, capture};
use picovm_vmm::{Template, TemplateError};

use crate::template;

/// A copy of the shared template.
fn copy() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("template");
    fs::create_dir(&path).unwrap();
    for name in ["template.json", "state", "memory"] {
        let status = Command::new("cp")
            .arg("--sparse=always")
            .arg(template().path().join(name))
            .arg(&path)
            .status();
        assert!(status.unwrap().success());
    }
    (directory, path)
}

fn flip(file: &Path, offset: u64) {
    let file = fs::File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0u8];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

fn refused(path: &Path) -> String {
    match Template::open(path) {
        Ok(_) => panic!("a damaged template was opened"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_copy_opens_and_runs() {
    let (_directory, path) = copy();
    let template = Template::open(&path).unwrap();
    assert_eq!(template.id(), crate::template().id());
    assert_eq!(
        capture(&template, &ContainerOptions::command(["echo", "copy"]))
            .unwrap()
            .text(),
        "copy"
    );
}

#[test]
fn a_flipped_byte_in_any_file_is_noticed() {
    for name in ["template.json", "state", "memory"] {
        let (_directory, path) = copy();
        let file = path.join(name);
        let length = fs::metadata(&file).unwrap().len();
        for part in [1, 3, 5] {
            let offset = length * part / 7;
            flip(&file, offset);
            let error = refused(&path);
            assert!(
                error.contains("is damaged") && error.contains(name),
                "{name} at {offset}: {error}"
            );
            flip(&file, offset);
        }
        Template::open(&path).unwrap();
    }
}

/// Numbers that are random and can be had again: `PICOVM_TEST_SEED` sets the seed, which a test prints.
fn random() -> impl FnMut(u64) -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let seed = std::env::var("PICOVM_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| {
            std::collections::hash_map::RandomState::new()
                .build_hasher()
                .finish()
        });
    println!("PICOVM_TEST_SEED={seed}");
    let mut state = seed | 1;
    move |end| {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % end
    }
}

/// The many places are tried on a made-up template, beside the code; here it is a real one, to the end.
#[test]
fn random_damage_to_a_real_template_is_refused_by_name_and_mended_it_runs() {
    let mut below = random();
    let (_directory, path) = copy();
    for (name, flips, cuts) in [("template.json", 40, 20), ("state", 40, 20), ("memory", 6, 6)] {
        let file = path.join(name);
        let length = fs::metadata(&file).unwrap().len();
        for _ in 0..flips {
            let offset = below(length);
            flip(&file, offset);
            let error = refused(&path);
            assert!(
                error.contains("is damaged") && error.contains(name),
                "{name} at {offset}: {error}"
            );
            flip(&file, offset);
        }
        let whole = path.join("whole");
        fs::rename(&file, &whole).unwrap();
        for _ in 0..cuts {
            let cut = below(length);
            let status = Command::new("cp")
                .arg("--sparse=always")
                .arg(&whole)
                .arg(&file)
                .status();
            assert!(status.unwrap().success());
            let copy = fs::File::options().write(true).open(&file).unwrap();
            copy.set_len(cut).unwrap();
            let error = refused(&path);
            assert!(error.contains(name), "{name} of {cut} bytes: {error}");
        }
        fs::rename(&whole, &file).unwrap();
    }
    let template = Template::open(&path).unwrap();
    let output = capture(&template, &ContainerOptions::command(["echo", "mended"])).unwrap();
    assert_eq!(output.text(), "mended");
}

/// What is recorded beside a template is advice: wrong, cut off or of another template, it changes nothing that a
/// container sees.
#[test]
fn any_working_set_and_any_record_of_a_verification_leave_a_template_as_good() {
    let mut below = random();
    let (_directory, path) = copy();
    let shared = fs::read(template().path().join("working-set")).unwrap_or_else(|_| vec![1, 3, 2, 1, 9, 9]);
    for round in 0..6 {
        let mut bytes = shared.clone();
        match round {
            0 => bytes.truncate(below(bytes.len() as u64) as usize),
            1 => bytes = (0..4096).map(|_| below(256) as u8).collect(),
            _ => {
                let at = below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 + below(255) as u8;
            }
        }
        fs::write(path.join("working-set"), &bytes).unwrap();
        fs::write(path.join("verified"), &bytes).unwrap();
        let template = Template::open(&path).unwrap();
        let output = capture(&template, &ContainerOptions::command(["echo", "fine"])).unwrap();
        assert_eq!(output.text(), "fine", "round {round}");
    }
}

#[test]
fn a_byte_flipped_after_it_was_found_right_is_noticed() {
    let (_directory, path) = copy();
    Template::open(&path).unwrap();
    flip(&path.join("memory"), 20 << 20);
    assert!(refused(&path).contains("memory does not match its checksum"));
}

#[test]
fn a_truncated_or_missing_file_is_noticed() {
    for name in ["template.json", "state", "memory"] {
        let (_directory, path) = copy();
        let file = path.join(name);
        let length = fs::metadata(&file).unwrap().len();
        for length in [length - 1, length / 2, 0] {
            fs::File::options()
                .write(true)
                .open(&file)
                .unwrap()
                .set_len(length)
                .unwrap();
            let error = refused(&path);
            assert!(error.contains(name), "{name} of {length} bytes: {error}");
        }
        fs::remove_file(&file).unwrap();
        assert!(refused(&path).contains(name));
    }
}

#[test]
fn files_of_two_templates_do_not_mix() {
    let spec = TemplateSpec {
        memory_mib: 64,
        ..TemplateSpec::new(crate::store().image().unwrap())
    };
    let other = crate::store().store.template(&spec, &mut |_| {}).unwrap();
    for name in ["template.json", "state", "memory"] {
        let (_directory, path) = copy();
        fs::copy(other.path().join(name), path.join(name)).unwrap();
        assert!(refused(&path).contains("is damaged"));
    }
}

/// Rewrites the metadata, with a checksum that is right.
fn rewrite(path: &Path, change: impl Fn(&mut picovm_vmm::template::Metadata)) {
    let (mut metadata, _) = Template::read_metadata(path).unwrap();
    change(&mut metadata);
    fs::write(
        path.join("template.json"),
        picovm_vmm::template::encode_metadata(&metadata).unwrap(),
    )
    .unwrap();
}

#[test]
fn a_newer_format_and_another_processor_are_told_as_what_they_are() {
    let (_directory, path) = copy();
    rewrite(&path, |metadata| metadata.format += 1);
    assert!(matches!(
        Template::open(&path),
        Err(TemplateError::Version { .. })
    ));

    let (_directory, path) = copy();
    rewrite(&path, |metadata| {
        metadata.processor.vendor = "GenuineIntel".into();
        metadata.processor.signature = 0x806f8;
    });
    let error = Template::open(&path).err().unwrap();
    assert!(matches!(error, TemplateError::Foreign { .. }));
    assert!(
        error.to_string().contains("GenuineIntel family 6 model 143"),
        "{error}"
    );
}

#[test]
fn freezing_where_there_is_no_room_leaves_nothing() {
    let own = OwnStore::new().unwrap();
    let templates = own.path().join("templates");
    // Less than the memory of any template.
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "none"])
        .arg(&templates)
        .status()
        .unwrap();
    assert!(status.success());
    let output = own.picovm().args(["run", "debian", "true"]).output().unwrap();
    let left: Vec<_> = fs::read_dir(&templates)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".lock"))
        .collect();
    assert!(Command::new("umount").arg(&templates).status().unwrap().success());
    assert_eq!(output.status.code(), Some(125));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn a_picovm_that_is_killed_while_it_freezes_leaves_a_store_that_works() {
    let own = OwnStore::new().unwrap();
    for wait in [200, 900, 1600, 2300] {
        let mut child = own
            .picovm()
            .args(["template", "build", "-m", "80m", "debian"])
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(wait));
        let _ = child.kill();
        child.wait().unwrap();
    }
    let output = own
        .picovm()
        .args(["run", "-m", "80m", "debian", "echo", "works"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "works\n",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // The heading, the base and the image's template.
    let list = own.picovm().args(["template", "ls"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&list.stdout).lines().count(), 3);
    // What the killed ones left half-written goes with the next template that is built.
    let left = fs::read_dir(own.path().join("templates"))
        .unwrap()
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .starts_with(".freezing-")
        })
        .count();
    assert_eq!(left, 0);
}

#[test]
fn the_kernel_is_booted_once_for_images_of_all_sizes() {
    let own = OwnStore::new().unwrap();
    let small = own.path().join("small");
    for directory in ["bin", "etc"] {
        fs::create_dir_all(small.join(directory)).unwrap();
    }
    // A static program that is there on every machine that built this.
    fs::copy(picovm_tests::binary(), small.join("bin/picovm")).unwrap();
    fs::write(small.join("etc/which"), "the small one").unwrap();
    let done = |arguments: &[&str]| {
        let output = own.picovm().args(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {errors}");
        (String::from_utf8_lossy(&output.stdout).into_owned(), errors)
    };
    done(&["image", "build", "small", small.to_str().unwrap()]);
    let (version, said) = done(&["run", "-m", "72m", "small", "picovm", "--version"]);
    assert!(version.starts_with("picovm "), "{version}");
    assert!(said.contains("booting the kernel, once for all images"), "{said}");
    let (name, said) = done(&[
        "run",
        "-m",
        "72m",
        "debian",
        "sh",
        "-c",
        ". /etc/os-release; echo $ID; test -e /etc/which || echo absent",
    ]);
    assert!(name == "debian\nabsent\n", "{name}");
    assert!(
        said.contains("no template of debian") && !said.contains("booting"),
        "{said}"
    );
    // Both from one base, and none of them needs it any more.
    let (list, _) = done(&["template", "ls"]);
    let base = list.lines().find(|line| line.contains("(base)")).unwrap();
    assert_eq!(list.lines().count(), 4, "{list}");
    done(&["template", "rm", base.split_whitespace().next().unwrap()]);
    let (version, said) = done(&["run", "-m", "72m", "small", "picovm", "--version"]);
    assert!(
        version.starts_with("picovm ") && said.is_empty(),
        "{version}{said}"
    );
}

#[test]
fn an_identity_larger_than_its_area_is_refused() {
    let options = picovm_vmm::ForkOptions {
        identity: vec![1; 1 << 20],
        ..Default::default()
    };
    let error = template().fork(options).err().unwrap();
    assert!(
        matches!(error, TemplateError::Identity { needed, available } if needed == 1 << 20 && available == 1 << 16)
    );
}

//! The main job, with a real Debian: boots a template once, forks clones that do different real work, in sequence and
//! at once, and proves that they are separate. Prints a table and one line of summary; the exit status is not zero if
//! anything failed.

use std::collections::HashSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use picovm_engine::{Container, ContainerExit, TemplateSpec};
use picovm_tests::{Captured, IMAGE, OwnStore, capture, clone_memory, script};
use picovm_vmm::Template;

/// A clone's work, and how to tell that it was done.
struct Job {
    name: &'static str,
    script: &'static str,
    done: fn(&str) -> bool,
}

const JOBS: &[Job] = &[
    Job {
        name: "echo",
        script: "echo hello",
        done: |out| out == "hello",
    },
    Job {
        name: "uname",
        script: "uname -sr",
        done: |out| out.starts_with("Linux 6."),
    },
    Job {
        name: "dpkg -l",
        script: "dpkg -l | grep -c ^ii",
        done: |out| out.parse::<u32>().is_ok_and(|n| n > 50),
    },
    Job {
        name: "os-release",
        script: ". /etc/os-release && echo $ID $VERSION_ID",
        done: |out| out.starts_with("debian"),
    },
    Job {
        name: "pipeline",
        script: "seq 1 20000 | grep 7 | sort -rn | head -1",
        done: |out| out == "19997",
    },
    Job {
        name: "awk",
        script: "seq 1000 | awk '{s+=$1} END {print s}'",
        done: |out| out == "500500",
    },
    Job {
        name: "perl",
        script: "perl -e 'print join \",\", map {$_*$_} 1..5'",
        done: |out| out == "1,4,9,16,25",
    },
    Job {
        name: "sha256sum /usr/bin",
        script: "find /usr/bin -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum",
        done: |out| out.len() == 67,
    },
    Job {
        name: "tar and gzip",
        script: "tar cz /etc 2>/dev/null | gzip -dc | tar t | grep -c ^etc/",
        done: |out| out.parse::<u32>().is_ok_and(|n| n > 100),
    },
    Job {
        name: "write 8 MiB",
        script: "head -c 8388608 /dev/urandom > /root/file && wc -c < /root/file",
        done: |out| out == "8388608",
    },
    Job {
        name: "exit status",
        script: "sh -c 'exit 7'; echo $?",
        done: |out| out == "7",
    },
    Job {
        name: "users",
        script: "useradd -m guest 2>/dev/null; su guest -c 'id -un; pwd' -s /bin/sh | tr '\\n' ' '",
        done: |out| out.starts_with("guest"),
    },
];

/// A clone of more than one vCPU, from a template of its own.
const TWO_VCPUS: Job = Job {
    name: "two vCPUs",
    script: "nproc; (seq 1 30000 | sha256sum) & (seq 1 30000 | sha256sum) & wait",
    done: |out| out.lines().next() == Some("2") && out.lines().count() == 3,
};

/// Clones at once.
const AT_ONCE: usize = 20;

#[derive(Default)]
struct Report {
    failures: Vec<String>,
    clones: usize,
    forked: Vec<Duration>,
    first_byte: Vec<Duration>,
    exited: Vec<Duration>,
}

impl Report {
    fn check(&mut self, name: &str, ok: bool, detail: impl Into<String>) {
        let detail = detail.into();
        println!("  {} {name:22} {detail}", if ok { "ok  " } else { "FAIL" });
        if !ok {
            self.failures.push(name.to_owned());
        }
    }

    fn job(&mut self, job: &Job, captured: anyhow::Result<Captured>) {
        self.clones += 1;
        match captured {
            Err(error) => self.check(job.name, false, format!("{error:#}")),
            Ok(captured) => {
                let text = captured.text();
                let ok = captured.exit == ContainerExit::Code(0) && (job.done)(&text);
                let first = captured.first_byte.unwrap_or(captured.exited);
                self.forked.push(captured.forked);
                self.first_byte.push(first);
                self.exited.push(captured.exited);
                let shown: String = text.replace('\n', " | ").chars().take(48).collect();
                let mut detail = format!(
                    "first output {:>9}   exit {:>9}   {shown}",
                    time(first),
                    time(captured.exited)
                );
                if !ok {
                    detail.push_str(&format!(
                        "\n       ended with {:?}, stderr: {}",
                        captured.exit,
                        String::from_utf8_lossy(&captured.stderr).trim_end()
                    ));
                }
                self.check(job.name, ok, detail);
            }
        }
    }
}

fn time(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// The value below which `percent` of all lie.
fn percentile(values: &[Duration], percent: usize) -> Duration {
    let mut sorted = values.to_vec();
    sorted.sort();
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last * percent).div_ceil(100))
        .copied()
        .unwrap_or_default()
}

fn mib(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}

fn main() -> ExitCode {
    match demo() {
        Ok(report) if report.failures.is_empty() => {
            println!(
                "\ndemo: {} clones of one {IMAGE}, everything as it should be",
                report.clones
            );
            ExitCode::SUCCESS
        }
        Ok(report) => {
            println!(
                "\ndemo: {} clones, {} checks FAILED: {}",
                report.clones,
                report.failures.len(),
                report.failures.join(", ")
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("\ndemo: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> anyhow::Result<Report> {
    let mut report = Report::default();
    let own = OwnStore::new()?;

    println!("Boot {IMAGE} once and freeze it");
    let spec = TemplateSpec::new(own.image()?);
    let start = Instant::now();
    let template = own
        .store
        .template(&spec, &mut |progress| println!("  {progress}"))?;
    let built = start.elapsed();
    let two = TemplateSpec { vcpus: 2, ..spec };
    let two = own
        .store
        .template(&two, &mut |progress| println!("  {progress}"))?;

    println!("\nIn sequence, a clone for each job");
    for job in JOBS {
        report.job(job, capture(&template, &script(job.script)));
    }
    report.job(&TWO_VCPUS, capture(&two, &script(TWO_VCPUS.script)));

    println!("\nAt once, {AT_ONCE} clones");
    let jobs: Vec<&Job> = JOBS.iter().cycle().take(AT_ONCE).collect();
    let start = Instant::now();
    let results: Vec<anyhow::Result<Captured>> = std::thread::scope(|scope| {
        let running: Vec<_> = jobs
            .iter()
            .map(|job| scope.spawn(|| capture(&template, &script(job.script))))
            .collect();
        running
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| bail!("the clone's thread panicked"))
            })
            .collect()
    });
    let all = start.elapsed();
    let sequential = (
        report.forked.clone(),
        report.first_byte.clone(),
        report.exited.clone(),
    );
    for (job, captured) in jobs.iter().zip(results) {
        report.job(job, captured);
    }
    println!("  all of them took {}", time(all));

    let memory = owned_memory(&template)?;
    separation(&mut report, &template)?;

    println!("\n{:34} {:>12} {:>12}", "", "median", "p99");
    for (name, values) in [
        ("fork", &sequential.0),
        ("fork to first output", &sequential.1),
        ("fork to exit", &sequential.2),
    ] {
        println!(
            "{name:34} {:>12} {:>12}",
            time(percentile(values, 50)),
            time(percentile(values, 99))
        );
    }
    println!("{:34} {:>12}", "booting and freezing the template", time(built));
    println!(
        "{:34} {:>12}",
        "memory in the template",
        mib(template.metadata().memory_data_bytes)
    );
    println!("{:34} {:>12}", "memory that a live clone owns", mib(memory.0));
    println!("{:34} {:>12}", "memory that it shares", mib(memory.1));
    Ok(report)
}

/// Bytes that each of some live clones owns, and that it shares.
fn owned_memory(template: &Template) -> anyhow::Result<(u64, u64)> {
    const LIVE: u64 = 10;
    let clones: Vec<Container> = (0..LIVE)
        .map(|_| Container::start(template, &script("echo up; exec sleep 1000")))
        .collect::<Result<_, _>>()?;
    // Each has started its command when the first byte of output waits in its connection.
    for clone in &clones {
        clone
            .wait_for_output(Duration::from_secs(60))
            .context("a clone did not come up")?;
    }
    let (owned, shared) = clone_memory();
    Ok((owned / LIVE, shared / LIVE))
}

/// Proves on real output that clones do not see each other.
fn separation(report: &mut Report, template: &Template) -> anyhow::Result<()> {
    println!("\nClones are separate");
    let write = "echo secret > /root/mark && export MARK=secret && cat /root/mark && echo $MARK";
    let written = capture(template, &script(write))?.text();
    report.check(
        "a file, a variable",
        written == "secret\nsecret",
        "written in one clone",
    );
    let seen = capture(template, &script("cat /root/mark 2>&1; echo \"MARK=$MARK\""))?.text();
    let absent = seen.contains("No such file") && seen.ends_with("MARK=");
    report.check("absent in the next", absent, seen.replace('\n', " | "));
    report.clones += 2;

    let look =
        "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; cat /proc/sys/kernel/random/uuid; hostname";
    let mut values: [HashSet<String>; 3] = Default::default();
    const LOOKS: usize = 8;
    for _ in 0..LOOKS {
        let text = capture(template, &script(look))?.text();
        report.clones += 1;
        for (set, line) in values.iter_mut().zip(text.lines()) {
            set.insert(line.to_owned());
        }
    }
    for (name, set) in ["random bytes differ", "UUIDs differ", "host names differ"]
        .iter()
        .zip(&values)
    {
        let example = set.iter().next().cloned().unwrap_or_default();
        report.check(
            name,
            set.len() == LOOKS,
            format!("{} of {LOOKS}, such as {example}", set.len()),
        );
    }
    let unchanged = template.verify_memory();
    report.check(
        "template unchanged",
        unchanged.is_ok(),
        unchanged.err().map_or_else(
            || {
                format!(
                    "checksum {}...",
                    template.metadata().memory.checksum.get(..16).unwrap_or_default()
                )
            },
            |error| error.to_string(),
        ),
    );
    Ok(())
}

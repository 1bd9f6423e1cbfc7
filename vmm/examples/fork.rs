//! Boots a kernel to its freeze point, freezes it and forks a clone: `fork KERNEL INITRAMFS TEMPLATE [DISK...]`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use picovm_vmm::{Disk, ForkOptions, FreezeOptions, Machine, MachineConfig, Template};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let usage = "usage: fork KERNEL INITRAMFS TEMPLATE [DISK...]";
    let mut config = MachineConfig::new(args.next().ok_or(usage)?);
    config.initramfs = Some(args.next().ok_or(usage)?);
    let directory = args.next().ok_or(usage)?;
    config.disks = args.map(Disk::read_only).collect();
    config.console_log = Some("/dev/stderr".into());
    config.extra_cmdline = std::env::var("CMDLINE").unwrap_or_default();

    let start = Instant::now();
    let mut parent = Machine::boot(&config)?;
    let outcome = parent.run(Some(Duration::from_secs(60)))?;
    println!(
        "boot: {outcome:?} after {:?}, {:?}",
        start.elapsed(),
        parent.exits()
    );
    let template = parent.freeze(&directory, &FreezeOptions::default())?;
    println!(
        "frozen after {:?}: {} KiB",
        start.elapsed(),
        template.metadata().memory_data_bytes >> 10
    );
    drop(template);

    let start = Instant::now();
    let template = Template::open(&directory)?;
    println!(
        "opened after {:?}, identity area {} bytes",
        start.elapsed(),
        template.identity_area()
    );
    for _ in 0..3 {
        let start = Instant::now();
        let mut clone = template.fork(ForkOptions::default())?;
        println!("forked after {:?}", start.elapsed());
        let outcome = clone.run(Some(Duration::from_secs(5)))?;
        println!(
            "clone: {outcome:?} after {:?}, {:?}",
            start.elapsed(),
            clone.exits()
        );
    }
    Ok(())
}

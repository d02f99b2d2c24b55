// SPDX-License-Identifier: GPL-2.0

//! What /dev/anon and its peers cost. Runs as root in the test VM; KTAP on standard output, with what
//! was measured as JSON in its comments, which devanon-report reads. In a VM with --icount a
//! nanosecond is an instruction.
//!
//! Each benchmark sets up what it needs, takes the time of its operations, and checks that pages
//! came and went as they should have. The least of the rounds counts, but
//! for the first one.

mod child;
mod growth;
mod memory;
mod pages;
mod parallel;
mod sizes;

use std::fs;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::process::ExitCode;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use clap::Parser;
use rustix::mount::MountFlags;
use rustix::mount::mount;
use rustix::system::finit_module;
use serde_json::json;

use crate::memory::Subject;
use crate::memory::allow_files;

const MODULE: &str = "/lib/devanon/devanon.ko";

/// What /dev/anon and its peers cost, measured inside the test VM
///
/// Exit status: 0 all was measured and every check held, 1 something failed, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Only benchmarks whose names have this in them
    filter: Option<String>,
    /// One round, and fewer operations in it: to see that all works
    #[arg(long)]
    short: bool,
    /// Also what takes two processors
    #[arg(long)]
    parallel: bool,
}

/// How much is measured.
#[derive(Clone, Copy)]
pub struct Scale {
    short: bool,
}

impl Scale {
    /// So many, or a part of it in a short run.
    pub fn of(self, number: usize) -> usize {
        if self.short {
            (number / 16).max(1)
        } else {
            number
        }
    }

    /// Those that do not take long, in a short run.
    pub fn up_to(self, numbers: &[usize]) -> Vec<usize> {
        let limit = if self.short { 1000 } else { usize::MAX };
        let numbers = numbers.iter().copied();
        numbers.filter(|&number| number <= limit).collect()
    }
}

/// What was found: a value for each operation.
#[derive(Clone, Copy)]
pub enum Cost {
    Time(f64),
    Bytes(f64),
    Vmas(f64),
}

impl Cost {
    pub fn time(time: Duration, operations: usize) -> Self {
        Self::Time(time.as_nanos() as f64 / operations as f64)
    }

    fn value(self) -> f64 {
        let (Self::Time(value) | Self::Bytes(value) | Self::Vmas(value)) = self;
        value
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Time(_) => "time",
            Self::Bytes(_) => "bytes",
            Self::Vmas(_) => "VMAs",
        }
    }
}

/// One thing to measure.
pub struct Bench {
    pub name: &'static str,
    /// What one operation is.
    pub operation: &'static str,
    /// Where on the curve, of those that belong to one.
    pub at: Option<usize>,
    pub subjects: &'static [Subject],
    /// Rounds of a full run.
    pub rounds: usize,
    pub run: Box<dyn Fn(Subject) -> Result<Cost>>,
}

impl Bench {
    pub fn new(
        name: &'static str,
        operation: &'static str,
        subjects: &'static [Subject],
        run: impl Fn(Subject) -> Result<Cost> + 'static,
    ) -> Self {
        Self {
            name,
            operation,
            at: None,
            subjects,
            rounds: 8,
            run: Box::new(run),
        }
    }

    pub fn at(mut self, at: usize) -> Self {
        self.at = Some(at);
        self
    }

    pub fn rounds(mut self, rounds: usize) -> Self {
        self.rounds = rounds;
        self
    }
}

/// The time that some work takes.
pub fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(Duration, T)> {
    let start = Instant::now();
    let done = work()?;
    Ok((start.elapsed(), done))
}

/// A setting of the kernel, as long as this lives.
pub struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    pub fn set(path: &'static str, value: &str) -> Result<Self> {
        let text = fs::read_to_string(path).context(path)?;
        // Of several words, the one in brackets.
        let before = match text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'))
        {
            Some((word, _)) => word.to_owned(),
            None => text.trim().to_owned(),
        };
        fs::write(path, value).with_context(|| format!("{path}: {value}"))?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = fs::write(self.path, &self.before);
    }
}

fn busybox(words: &[&str]) -> Result<()> {
    let status = Command::new("/bin/busybox").args(words).status()?;
    ensure!(status.success(), "busybox {}: {status}", words.join(" "));
    Ok(())
}

/// The driver, room for temporary files, and swap in compressed memory.
fn set_up() -> Result<()> {
    if !Path::new("/sys/class/devanon").exists() {
        let module = File::open(MODULE).context(MODULE)?;
        finit_module(&module, c"", 0).context(MODULE)?;
    }
    fs::create_dir_all(memory::TMPFS)?;
    let options = c"huge=never,size=2g";
    mount(
        "bench",
        memory::TMPFS,
        "tmpfs",
        MountFlags::empty(),
        options,
    )?;
    // Only where huge pages are what is measured.
    for path in [pages::SHMEM_HUGE, pages::ANON_HUGE] {
        fs::write(path, "never").context(path)?;
    }
    if !Path::new("/sys/block/zram0").exists() {
        busybox(&["modprobe", "zram"])?;
    }
    fs::write("/sys/block/zram0/disksize", "256M")?;
    busybox(&["mkswap", "/dev/zram0"])?;
    busybox(&["swapon", "/dev/zram0"])?;
    allow_files(20_000)
}

/// Measures for each subject, and prints what was found.
fn measure(bench: &Bench, rounds: usize) -> Result<()> {
    for &subject in bench.subjects {
        // One after the other, not in turns: how pages were freed decides how soon the next ones
        // are found, and so each subject finds what it left itself.
        // Of several rounds, the first is for that alone.
        let costs: Result<Vec<Cost>> = (0..rounds).map(|_| (bench.run)(subject)).collect();
        let costs = costs.context(subject.name())?;
        // The least: what else the kernel does meanwhile only adds.
        let counted = &costs[usize::from(rounds > 1)..];
        let least = counted
            .iter()
            .min_by(|a, b| a.value().total_cmp(&b.value()));
        let least = least.context("no rounds")?;
        println!(
            "# {}",
            json!({"measure": {
                "name": bench.name,
                "operation": bench.operation,
                "at": bench.at,
                "subject": subject.name(),
                "unit": least.unit(),
                "value": least.value(),
            }})
        );
    }
    Ok(())
}

/// Whether all went well.
fn run(args: &Args) -> Result<bool> {
    set_up().context("cannot set up")?;
    let scale = Scale { short: args.short };
    let mut benches = pages::benches(scale);
    benches.extend(growth::benches(scale));
    benches.extend(sizes::benches(scale));
    if args.parallel {
        benches.extend(parallel::benches(scale));
    }
    if let Some(filter) = &args.filter {
        benches.retain(|bench| bench.name.contains(filter.as_str()));
    }
    // After that the free pages no longer lie as the boot left them, for the first benchmark alone.
    pages::free(Subject::Memfd, scale.of(pages::MANY), 1)?;
    println!("KTAP version 1\n1..{}", benches.len());
    let mut good = true;
    for (number, bench) in (1..).zip(&benches) {
        let start = Instant::now();
        let done = measure(bench, if args.short { 1 } else { bench.rounds });
        let at = bench.at.map_or(String::new(), |at| format!(", {at}"));
        let title = format!("{number} {}{at}", bench.name);
        match done {
            Ok(()) => println!("ok {title} # {:.1} s", start.elapsed().as_secs_f64()),
            Err(error) => {
                println!("# {error:#}\nnot ok {title}");
                good = false;
            }
        }
    }
    Ok(good)
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("devanon-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The cost of /dev/anon and its peers. Runs as root in the test VM; KTAP on standard output, with the
//! measurements as JSON in comments, which devanon-report reads. In a VM with --icount, a nanosecond
//! is an instruction.
//!
//! Each benchmark sets up what it needs, times its operations, and checks that pages came and went as
//! they should. The minimum of the rounds counts, without the first round.

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

/// Measures the cost of /dev/anon and its peers inside the test VM
///
/// Exit status: 0 all benchmarks ran and every check held, 1 something failed, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Run only benchmarks whose names contain this
    filter: Option<String>,
    /// Run one round with fewer operations, to check that everything works
    #[arg(long)]
    short: bool,
    /// Also run the benchmarks that need two CPUs
    #[arg(long)]
    parallel: bool,
}

/// The extent of a run.
#[derive(Clone, Copy)]
pub struct Scale {
    short: bool,
}

impl Scale {
    /// `number`, or a part of it in a short run.
    pub fn of(self, number: usize) -> usize {
        if self.short {
            (number / 16).max(1)
        } else {
            number
        }
    }

    /// `numbers`, or those up to a limit in a short run.
    pub fn up_to(self, numbers: &[usize]) -> Vec<usize> {
        let limit = if self.short { 1000 } else { usize::MAX };
        let numbers = numbers.iter().copied();
        numbers.filter(|&number| number <= limit).collect()
    }
}

/// The measured value, per operation.
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
    /// The position on a curve, if the benchmark belongs to one.
    pub at: Option<usize>,
    pub subjects: &'static [Subject],
    /// Number of rounds in a full run.
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

/// Runs `work`, and returns the time it took and its result.
pub fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(Duration, T)> {
    let start = Instant::now();
    let done = work()?;
    Ok((start.elapsed(), done))
}

/// A kernel setting, restored on drop.
pub struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    pub fn set(path: &'static str, value: &str) -> Result<Self> {
        let text = fs::read_to_string(path).context(path)?;
        // Of several words, the selected one is in brackets.
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

/// Loads the driver, mounts a tmpfs, and sets up swap on zram.
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
    // Only benchmarks of huge pages enable them.
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

/// Runs the benchmark for each subject, and prints the results.
fn measure(bench: &Bench, rounds: usize) -> Result<()> {
    for &subject in bench.subjects {
        // All rounds of one subject run in a row: how pages were freed affects how fast the next ones
        // are allocated, so each subject sees only its own effect. If there are several rounds, the
        // first serves only to establish that.
        let costs: Result<Vec<Cost>> = (0..rounds).map(|_| (bench.run)(subject)).collect();
        let costs = costs.context(subject.name())?;
        // The minimum: other activity of the kernel only adds to the cost.
        let counted = &costs[usize::from(rounds > 1)..];
        let minimum = counted
            .iter()
            .min_by(|a, b| a.value().total_cmp(&b.value()));
        let minimum = minimum.context("no rounds")?;
        println!(
            "# {}",
            json!({"measure": {
                "name": bench.name,
                "operation": bench.operation,
                "at": bench.at,
                "subject": subject.name(),
                "unit": minimum.unit(),
                "value": minimum.value(),
            }})
        );
    }
    Ok(())
}

/// Returns true if every benchmark succeeded.
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
    // Shuffles the free pages: otherwise the first benchmark alone would find them as left by boot.
    pages::free(Subject::Memfd, scale.of(pages::MANY), 1)?;
    println!("KTAP version 1\n1..{}", benches.len());
    let mut passed = true;
    for (number, bench) in (1..).zip(&benches) {
        let start = Instant::now();
        let done = measure(bench, if args.short { 1 } else { bench.rounds });
        let at = bench.at.map_or(String::new(), |at| format!(", {at}"));
        let title = format!("{number} {}{at}", bench.name);
        match done {
            Ok(()) => println!("ok {title} # {:.1} s", start.elapsed().as_secs_f64()),
            Err(error) => {
                println!("# {error:#}\nnot ok {title}");
                passed = false;
            }
        }
    }
    Ok(passed)
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

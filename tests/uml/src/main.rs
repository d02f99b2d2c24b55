// SPDX-License-Identifier: GPL-2.0

//! Tests and demonstrations of UML guests on `/dev/anon`. Runs as root in the test VM, on the tree
//! that scripts/uml-guest builds. Writes KTAP, a table, or JSON lines for devanon-plot and
//! devanon-report to standard output.

mod demo;
mod guest;
mod host;
mod kernel;
mod ktap;
mod life;
mod mconsole;
mod over;
mod sandbox;
mod savings;
mod ubd;
mod unmodified;
mod userland;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use clap::ValueEnum;

/// Run tests and demonstrations of UML guests on /dev/anon, inside the test VM
///
/// Exit status: 0 success, 1 something failed, 2 usage error.
#[derive(Parser)]
#[command(version)]
struct Args {
    scenario: Scenario,
    /// For unmodified: the kernel has patches/host, so a node opened before its driver was loaded works
    #[arg(long)]
    node_works: bool,
    /// For userland and ubd: the long form
    #[arg(long)]
    long: bool,
    /// For kernel, userland and ubd: run on this machine instead of in the VM, without /dev/anon and without changing
    /// the machine
    #[arg(long)]
    here: bool,
    /// For kernel and ubd: also run what `make test` leaves to `make test-all`, and some tests for longer
    #[arg(long)]
    more: bool,
    /// For tests: run only those whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// For savings: start a few guests each way, and do not go on until the host swaps
    #[arg(long)]
    short: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Scenario {
    /// Test Debian's unmodified UML, started by devanon-run
    Unmodified,
    /// Test our UML: its options, page reporting, hot-plug
    Kernel,
    /// Test a Debian userland on our UML
    Userland,
    /// Test ubd=mmap: pages of an image mapped into the guest
    Ubd,
    /// Show the host's memory with and without guests
    Demo,
    /// Follow a Debian guest from boot to shutdown, on /dev/anon and on tmpfs as today: samples and figures
    Life,
    /// Count the instructions that /dev/anon and page reporting cost: figures (for a VM with --icount)
    Count,
    /// Measure host memory for guests of one image, with and without ubd=mmap: samples and figures
    Savings,
    /// Count the instructions that ubd=mmap costs: figures (for a VM with --icount)
    SavingsCount,
    /// Count the instructions of a guest's boot and work on /dev/anon and on tmpfs: measures (for a VM with --icount)
    Bench,
}

/// Prints the error, if any. Returns true on success.
pub fn report(result: Result<()>) -> bool {
    if let Err(error) = &result {
        eprintln!("devanon-uml: {error:#}");
    }
    result.is_ok()
}

fn main() -> ExitCode {
    let args = Args::parse();
    let only = args.only.as_deref();
    let success = match args.scenario {
        Scenario::Unmodified => unmodified::run(args.node_works, only),
        Scenario::Kernel => kernel::run(args.here, args.more, only),
        Scenario::Userland => userland::run(args.long, args.here, only),
        Scenario::Ubd => ubd::run(args.long, args.here, args.more, only),
        Scenario::Demo => report(demo::run()),
        Scenario::Life => report(life::run()),
        Scenario::Count => report(life::count()),
        Scenario::Savings => report(savings::run(args.short)),
        Scenario::SavingsCount => report(savings::count()),
        Scenario::Bench => report(life::bench()),
    };
    if success {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

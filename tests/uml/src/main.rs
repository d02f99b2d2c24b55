// SPDX-License-Identifier: GPL-2.0

//! UML guests on `/dev/anon`. Runs as root in the test VM, with the tree that scripts/uml-guest
//! makes. Standard output has tests in KTAP, a demonstration's table, or what devanon-plot reads.

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

/// UML guests on /dev/anon, inside the test VM
///
/// Exit status: 0 all is well, 1 something failed, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    scenario: Scenario,
    /// The kernel has patches/host: a node opened before its driver was there works
    #[arg(long)]
    node_works: bool,
    /// Of userland and ubd: more of everything
    #[arg(long)]
    long: bool,
    /// Of kernel, userland and ubd: not in the VM but on a machine that has no /dev/anon and is left as it is
    #[arg(long)]
    here: bool,
    /// Of savings: a few guests each way, and no search for when the host swaps
    #[arg(long)]
    short: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Scenario {
    /// Tests: Debian's unmodified UML, by devanon-run
    Unmodified,
    /// Tests: our UML, its options, reporting, hot-plug
    Kernel,
    /// Tests: a Debian userland on our UML
    Userland,
    /// Tests: pages of an image mapped into the guest, ubd=mmap
    Ubd,
    /// Shows the host's memory with guests and without
    Demo,
    /// The life of a Debian guest, on /dev/anon and as it is today: samples and figures
    Life,
    /// What /dev/anon and reporting cost in instructions: figures (for a VM with --icount)
    Count,
    /// What a host pays for guests from one image, with and without ubd=mmap: samples and figures
    Savings,
    /// What that costs in instructions: figures (for a VM with --icount)
    SavingsCount,
    /// A guest's boot and work on /dev/anon and on tmpfs: measures (for a VM with --icount)
    Bench,
}

fn shown(result: Result<()>) -> bool {
    if let Err(error) = &result {
        eprintln!("devanon-uml: {error:#}");
    }
    result.is_ok()
}

fn main() -> ExitCode {
    let args = Args::parse();
    let good = match args.scenario {
        Scenario::Unmodified => unmodified::run(args.node_works),
        Scenario::Kernel => kernel::run(args.here),
        Scenario::Userland => userland::run(args.long, args.here),
        Scenario::Ubd => ubd::run(args.long, args.here),
        Scenario::Demo => shown(demo::run()),
        Scenario::Life => shown(life::run()),
        Scenario::Count => shown(life::count()),
        Scenario::Savings => shown(savings::run(args.short)),
        Scenario::SavingsCount => shown(savings::count()),
        Scenario::Bench => shown(life::bench()),
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

// SPDX-License-Identifier: GPL-2.0

//! UML guests on `/dev/anon`. Runs as root in the test VM, with the tree that scripts/uml-guest
//! makes. Standard output has the tests in KTAP, or the demonstration's table.

mod demo;
mod guest;
mod host;
mod over;
mod tests;

use std::process::ExitCode;

use clap::Parser;

/// UML guests on /dev/anon, inside the test VM
///
/// Exit status: 0 all is well, 1 something failed, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Show the host's memory with guests and without, instead of testing
    #[arg(long)]
    demo: bool,
    /// The kernel has patches/host: a node opened before its driver was there works
    #[arg(long)]
    node_works: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.demo {
        return match demo::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("devanon-uml: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    if tests::run(args.node_works) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

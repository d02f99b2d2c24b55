// SPDX-License-Identifier: GPL-2.0

//! Tests that run one after the other, each as the one before it left the machine, in KTAP.

use std::time::Instant;

use anyhow::Result;

/// What a test says: lines for the log, or that it was skipped.
pub const SKIP: &str = "SKIP ";

pub type Test<S> = (&'static str, fn(&mut S) -> Result<String>);

/// Runs all; whether all passed.
pub fn run<S>(tests: &[Test<S>], state: &mut S) -> bool {
    println!("KTAP version 1\n1..{}", tests.len());
    let mut failed = 0;
    for (number, (name, test)) in (1..).zip(tests) {
        let begun = Instant::now();
        let result = test(state);
        println!("# {name}: {} s", begun.elapsed().as_secs());
        match result {
            Ok(text) if text.starts_with(SKIP) => println!("ok {number} {name} # {text}"),
            Ok(text) => {
                for line in text.lines() {
                    println!("# {line}");
                }
                println!("ok {number} {name}");
            }
            Err(error) => {
                let text = format!("{error:#}").replace('\n', "\n# ");
                println!("# {text}\nnot ok {number} {name}");
                failed += 1;
            }
        }
    }
    // For who runs this outside the VM.
    eprintln!(
        "devanon-uml: {} passed, {failed} failed",
        tests.len() - failed
    );
    failed == 0
}

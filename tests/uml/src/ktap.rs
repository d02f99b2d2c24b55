// SPDX-License-Identifier: GPL-2.0

//! Tests that run one after the other, each as the one before it left the machine, in KTAP.

use std::time::Instant;

use anyhow::Result;

/// What a test says: lines for the log, or that it was skipped.
pub const SKIP: &str = "SKIP ";

pub type Test<S> = (&'static str, fn(&mut S) -> Result<String>);

/// Where a test runs: in the VM, which has /dev/anon and can be changed at will, or on the machine itself,
/// where guests are many times as fast.
#[derive(Clone, Copy, PartialEq)]
pub enum Place {
    Vm,
    Here,
    Both,
}

/// All but those that run elsewhere.
pub fn choose<S>(tests: &[(Place, Test<S>)], elsewhere: Option<Place>) -> Vec<Test<S>> {
    tests
        .iter()
        .filter(|(place, _)| Some(*place) != elsewhere)
        .map(|&(_, test)| test)
        .collect()
}

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

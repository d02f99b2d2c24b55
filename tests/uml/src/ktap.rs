// SPDX-License-Identifier: GPL-2.0

//! Runs tests in order and prints KTAP. Each test finds the machine as the previous one left it.

use std::time::Instant;

use anyhow::Result;

/// A test returns lines for the log. Text that starts with this means that the test was skipped.
pub const SKIP: &str = "SKIP ";

pub type Test<S> = (&'static str, fn(&mut S) -> Result<String>);

/// Where a test runs: in the VM, which has /dev/anon and whose settings can be changed, or on the machine itself
/// (--here), where guests are many times faster.
#[derive(Clone, Copy, PartialEq)]
pub enum Place {
    Vm,
    Here,
    Both,
}

/// Returns all tests but those that run only in the excluded place.
pub fn select<S>(tests: &[(Place, Test<S>)], excluded: Option<Place>) -> Vec<Test<S>> {
    tests
        .iter()
        .filter(|(place, _)| Some(*place) != excluded)
        .map(|&(_, test)| test)
        .collect()
}

/// Runs the tests. Returns true if none failed.
pub fn run<S>(tests: &[Test<S>], state: &mut S) -> bool {
    println!("KTAP version 1\n1..{}", tests.len());
    let mut failed = 0;
    for (number, (name, test)) in (1..).zip(tests) {
        let start = Instant::now();
        let result = test(state);
        println!("# {name}: {} s", start.elapsed().as_secs());
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
    // scripts/test reads this line where the tests run outside the VM.
    eprintln!(
        "devanon-uml: {} passed, {failed} failed",
        tests.len() - failed
    );
    failed == 0
}

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
    /// In the VM with --more: in `make test` other tests run most of the same code.
    VmMore,
    Here,
    Both,
}

/// Returns all tests, wherever they run.
pub fn all<S>(tests: &[(Place, Test<S>)]) -> Vec<Test<S>> {
    tests.iter().map(|&(_, test)| test).collect()
}

/// Returns the tests for this machine if `here`, otherwise those for the VM.
pub fn select<S>(tests: &[(Place, Test<S>)], here: bool, more: bool) -> Vec<Test<S>> {
    tests
        .iter()
        .filter(|(place, _)| match place {
            Place::Vm => !here,
            Place::VmMore => !here && more,
            Place::Here => here,
            Place::Both => true,
        })
        .map(|&(_, test)| test)
        .collect()
}

/// Runs the tests, or those whose name contains `only`. Returns true if some ran and none failed.
pub fn run<S>(tests: &[Test<S>], only: Option<&str>, state: &mut S) -> bool {
    let chosen = |name: &str| only.is_none_or(|part| name.contains(part));
    let tests: Vec<_> = tests.iter().filter(|(name, _)| chosen(name)).collect();
    if tests.is_empty() {
        let part = only.unwrap_or_default();
        eprintln!(
            "devanon-uml: no test that runs here has \"{part}\" in its name (see Place in tests/uml/src)"
        );
        return false;
    }
    println!("KTAP version 1\n1..{}", tests.len());
    let mut failed = 0;
    for (number, (name, test)) in (1..).zip(&tests) {
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

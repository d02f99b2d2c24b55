// SPDX-License-Identifier: GPL-2.0

//! The first two patches of patches/host are needed: without each of them, a test of the driver
//! fails. Boots the stock kernel DEVANON_LINE with a driver that maps by `.mmap_prepare`, as on a
//! patched kernel.

use std::process::Command;

/// Runs one test of the driver, which must fail; returns the lines of its KTAP.
fn run(test: &str, name: &str) -> Vec<String> {
    let line = std::env::var("DEVANON_LINE").expect("DEVANON_LINE must name a stock kernel");
    let output = Command::new(env!("CARGO_BIN_EXE_devanon-vm"))
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .args(["--line", &line, "--name", name, "--bare"])
        .arg(format!(
            "--file=build/kernels/{line}/module-patched/devanon.ko=/lib/devanon/devanon.ko"
        ))
        .arg("--file=build/bin/devanon-tests=/bin/devanon-tests")
        .args(["--", "devanon-tests", "--node-works", "--merges", test])
        .output()
        .expect("devanon-vm runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let status = output.status.code();
    assert_eq!(
        status,
        Some(1),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text.lines().map(str::to_owned).collect()
}

#[test]
#[ignore = "boots a VM"]
fn without_the_chardev_patch_a_node_stays_dead() {
    let lines = run("doors::node_opened_too_early", "patches-chardev");
    assert!(
        lines
            .iter()
            .any(|line| line == "not ok 1 doors::node_opened_too_early"),
        "{lines:#?}"
    );
    let why = "# open of the same node after: No such device or address (os error 6)";
    assert!(lines.iter().any(|line| line == why), "{lines:#?}");
}

#[test]
#[ignore = "boots a VM"]
fn without_the_mm_patch_files_are_leaked() {
    let lines = run("doors::vmas_merge_as_with_memfd", "patches-mm");
    assert!(
        lines
            .iter()
            .any(|line| line == "not ok 1 doors::vmas_merge_as_with_memfd"),
        "{lines:#?}"
    );
    assert!(
        lines
            .iter()
            .any(|line| line == "# files of the driver were leaked"),
        "{lines:#?}"
    );
}

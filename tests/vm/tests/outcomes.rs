// SPDX-License-Identifier: GPL-2.0

//! Tests of the harness: each provokes one outcome, in a VM that has only busybox.
//!
//! Most of them boot VMs, so plain `cargo test` ignores them. scripts/test runs them by `cargo test -p
//! devanon-vm -- --include-ignored`. DEVANON_LINE names the kernel, a directory in build/kernels.
//! DEVANON_DEBUG_LINE names the kernel with detectors: for the tests `debug_*` the debug kernel or the
//! one with KASAN, for `kasan_*` the latter. DEVANON_KCSAN_LINE names the one with KCSAN, for the tests
//! `kcsan_*`, which `make test-kcsan` runs. Tests without their kernel are left out with `--skip`.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;
use std::time::Instant;

use devanon_summary::Summary;

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn top() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The kernel that an environment variable names.
fn line(variable: &str) -> String {
    let Ok(line) = std::env::var(variable) else {
        panic!("{variable} must name a directory in build/kernels");
    };
    line
}

/// A runner of a small VM. The VM has one processor, unless `options` say otherwise.
fn runner(name: &str, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_devanon-vm"));
    if !options.contains(&"--cpus") {
        command.args(["--cpus", "1"]);
    }
    if !options.contains(&"--line") {
        command.args(["--line", &line("DEVANON_LINE")]);
    }
    command
        .current_dir(top())
        .args(["--bare", "--memory", "512"])
        .args(["--name", &format!("harness-{name}")])
        .args(options)
        .stdin(Stdio::null());
    command
}

/// Runs a shell script in a VM.
fn vm(name: &str, options: &[&str], script: &str) -> Run {
    vm_words(name, options, &["sh", "-c", script])
}

fn vm_words(name: &str, options: &[&str], words: &[&str]) -> Run {
    let out = runner(name, options)
        .arg("--")
        .args(words)
        .output()
        .expect("devanon-vm runs");
    Run {
        code: out.status.code(),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// The same with the module that causes real trouble: tests/plant, as scripts/prepare builds it.
fn vm_with_plant(name: &str, line: &str, options: &[&str], script: &str) -> Run {
    let file = format!("build/kernels/{line}/plant/plant.ko=/plant.ko");
    let ours = ["--line", line, "--file", &file];
    vm(name, &[&ours[..], options].concat(), script)
}

/// The summary that devanon-vm wrote for a run.
fn summary(name: &str) -> Summary {
    let file = top().join(format!("build/vm/harness-{name}/summary.json"));
    Summary::read(&file).expect("every run leaves one")
}

impl Run {
    /// Checks the exit status, and that the last line contains the reason.
    #[track_caller]
    fn ended(&self, code: i32, why: &str) {
        let last = self.stderr.lines().last().unwrap_or("");
        assert!(
            self.code == Some(code) && last.contains(why),
            "not {code} ({why}) but {:?}:\n{}",
            self.code,
            self.stderr
        );
    }
}

/// A script that reports two passed tests.
const KTAP: &str = "echo KTAP version 1; echo 1..2; echo ok 1 a; echo ok 2 b";
/// A script that reports counts.
const COUNTS: &str = "echo '# count: operations 5'; echo '# count: pages 7'";

#[test]
#[ignore = "boots a VM"]
fn pass_and_all_output_arrives() {
    // 5 MB right before power-off, and an unterminated last line.
    let run = vm(
        "pass",
        &[],
        &format!("{KTAP}; {COUNTS}; yes 0123456789abcde | head -n 320000; echo; printf 'the end'"),
    );
    run.ended(0, "PASS, 2 passed, 0 failed, 0 skipped");
    assert_eq!(run.stdout.matches("0123456789abcde\n").count(), 320_000);
    assert!(run.stdout.ends_with("abcde\n\nthe end\n"));
    let summary = summary("pass");
    assert_eq!(summary.findings, [""; 0]);
    assert_eq!((summary.passed, summary.failed, summary.skipped), (2, 0, 0));
    let counts = (summary.operations, summary.pages, summary.faults_injected);
    assert_eq!(counts, (5, 7, 0));
}

#[test]
#[ignore = "boots a VM"]
fn failed_test() {
    let run = vm(
        "fail",
        &[],
        "echo KTAP version 1; echo 1..2; echo ok 1 a; echo not ok 2 b",
    );
    run.ended(1, "FAIL: not ok 2 b, 1 passed, 1 failed, 0 skipped");
    assert_eq!(summary("fail").findings, ["not ok 2 b"]);
}

#[test]
#[ignore = "boots a VM"]
fn tests_never_reported() {
    let run = vm("plan", &[], "echo KTAP version 1; echo 1..3; echo ok 1 a");
    run.ended(1, "FAIL: 2 of 3 tests were never reported");
}

#[test]
#[ignore = "boots a VM"]
fn exit_status_counts() {
    vm("status", &[], &format!("{KTAP}; kill -9 $$")).ended(1, "status 137");
}

#[test]
#[ignore = "boots a VM"]
fn panic() {
    let run = vm(
        "panic",
        &[],
        &format!("{KTAP}; echo c > /proc/sysrq-trigger"),
    );
    run.ended(3, "KERNEL TROUBLE: line");
    assert!(
        run.stderr.contains("sysrq triggered crash"),
        "{}",
        run.stderr
    );
}

#[test]
#[ignore = "boots a VM"]
fn warning() {
    let script = format!("insmod /plant.ko warn=1; {KTAP}");
    let run = vm_with_plant("warning", &line("DEVANON_LINE"), &[], &script);
    run.ended(3, "] WARNING: ");
    assert!(!summary("warning").findings.is_empty());
    assert!(run.stderr.contains("[ cut here ]"), "{}", run.stderr);
    assert!(run.stderr.contains("planted"), "{}", run.stderr);
}

#[test]
#[ignore = "boots a VM"]
fn hung_task() {
    let timeout = "/proc/sys/kernel/hung_task_timeout_secs";
    let script = format!("{KTAP}; echo 1 > {timeout}; insmod /plant.ko hang=1");
    let start = Instant::now();
    let run = vm_with_plant("hung-task", &line("DEVANON_LINE"), &[], &script);
    run.ended(3, "INFO: task insmod:");
    // The runner did not wait until the task woke up.
    assert!(start.elapsed() < Duration::from_secs(50));
}

#[test]
#[ignore = "boots a VM"]
fn taint() {
    let run = vm(
        "taint",
        &[],
        &format!("echo 12800 > /proc/sys/kernel/tainted; {KTAP}"),
    );
    // 12800 is O, E and W; every out-of-tree module sets O and E.
    run.ended(3, "newly tainted: W");
}

#[test]
#[ignore = "boots a VM"]
fn forged_verdict() {
    let forged = "echo devanon-init: status 0; echo devanon-init: taint 0 0";
    vm("forged", &[], &format!("{KTAP}; {forged}; exit 1")).ended(5, "the verdict may be forged");
}

#[test]
#[ignore = "boots a VM"]
fn power_lost() {
    vm("power", &[], &format!("{KTAP}; poweroff -f")).ended(3, "went down before the verdict");
}

#[test]
#[ignore = "boots a VM"]
fn hang() {
    let run = vm(
        "hang",
        &["--time-limit", "20"],
        &format!("{KTAP}; sleep 1000"),
    );
    run.ended(4, "TIMEOUT: killed after 20 s, 2 passed");
    assert_eq!(summary("hang").findings, ["killed after 20 s"]);
}

#[test]
#[ignore = "boots a VM"]
fn boot_hangs() {
    let options = ["--time-limit", "10", "--append", "rdinit=/bin/sleep"];
    let run = vm_words("boot-hang", &options, &["1000"]);
    run.ended(4, "TIMEOUT: PID 1 was not reached");
    assert!(run.stderr.contains("last lines:\n  ["), "{}", run.stderr);
}

#[test]
#[ignore = "boots a VM"]
fn boot_panics() {
    let run = vm("boot-panic", &["--append", "rdinit=/nothing"], KTAP);
    run.ended(3, "KERNEL TROUBLE");
    assert!(
        run.stderr.contains("Unable to mount root"),
        "{}",
        run.stderr
    );
}

#[test]
#[ignore = "boots a VM"]
fn boot_ends_early() {
    let run = vm_words("boot-end", &["--append", "rdinit=/bin/poweroff"], &["-f"]);
    run.ended(5, "the VM ended before PID 1 reported");
    assert!(run.stderr.contains("reboot: Power down"), "{}", run.stderr);
}

#[test]
#[ignore = "starts QEMU"]
fn qemu_fails() {
    let run = vm("qemu", &["--cpus", "0"], KTAP);
    run.ended(
        5,
        "the VM ended before PID 1 reported; QEMU: exit status: 1",
    );
    assert!(
        run.stderr.contains("Invalid CPU topology"),
        "{}",
        run.stderr
    );
}

#[test]
#[ignore = "starts QEMU"]
fn a_killed_runner_leaves_nothing() {
    let mut runner = runner("kill", &["--plain", "--", "true"])
        .spawn()
        .expect("devanon-vm runs");
    let qemus = || {
        let processes = fs::read_dir("/proc").expect("/proc is there").flatten();
        let commands = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
        commands
            .filter(|command| {
                let command = String::from_utf8_lossy(command);
                command.starts_with("qemu") && command.contains("harness-kill")
            })
            .count()
    };
    let wait_for = |count| {
        let start = Instant::now();
        while qemus() != count {
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "expected {count} QEMU processes"
            );
            sleep(Duration::from_millis(20));
        }
    };
    wait_for(1);
    // SIGKILL: the runner cannot clean up.
    runner.kill().expect("it runs");
    runner.wait().expect("it was spawned");
    wait_for(0);
}

/// The findings name the report of each detector.
#[test]
#[ignore = "boots a VM"]
fn debug_detectors() {
    let script = "insmod /plant.ko inversion=1 atomic=1 list=1 bounds=1";
    let run = vm_with_plant(
        "debug",
        &line("DEVANON_DEBUG_LINE"),
        &[],
        &format!("{KTAP}; {script}"),
    );
    run.ended(3, "WARNING: possible circular locking dependency detected");
    let findings = summary("debug").findings;
    for name in [
        "WARNING: possible circular locking dependency detected",
        "BUG: sleeping function called from invalid context",
        "list_add corruption.",
        "UBSAN: array-index-out-of-bounds",
    ] {
        assert!(
            findings.iter().any(|finding| finding.contains(name)),
            "{name} is not in {findings:#?}"
        );
    }
}

#[test]
#[ignore = "boots a VM"]
fn kasan_use_after_free() {
    let script = format!("insmod /plant.ko uaf=1; {KTAP}");
    let run = vm_with_plant("kasan", &line("DEVANON_DEBUG_LINE"), &[], &script);
    run.ended(3, "BUG: KASAN: slab-use-after-free in ");
}

#[test]
#[ignore = "boots a VM"]
fn debug_leak() {
    let script = format!("insmod /plant.ko leak=1; {KTAP}");
    let run = vm_with_plant("leak", &line("DEVANON_DEBUG_LINE"), &[], &script);
    run.ended(3, "suspected memory leaks");
    assert!(run.stderr.contains("unreferenced object"), "{}", run.stderr);
    assert!(run.stderr.contains("comm \"insmod\""), "{}", run.stderr);
}

/// A detector that has turned itself off reports nothing, and that must not count as a pass.
#[test]
#[ignore = "boots a VM"]
fn debug_detectors_that_turned_off() {
    let script = "echo off > /sys/kernel/debug/kmemleak; insmod /plant.ko blind=1";
    let run = vm_with_plant(
        "blind",
        &line("DEVANON_DEBUG_LINE"),
        &[],
        &format!("{KTAP}; {script}"),
    );
    run.ended(5, "PID 1: kmemleak is off");
    run.ended(5, "lockdep is off");
}

#[test]
#[ignore = "boots a VM"]
fn kcsan_race() {
    let script = format!("insmod /plant.ko race=1; {KTAP}");
    let line = line("DEVANON_KCSAN_LINE");
    let run = vm_with_plant("race", &line, &["--cpus", "2"], &script);
    run.ended(3, "BUG: KCSAN: data-race in count");
}

/// One row for each kernel, whatever the outcome of its runs.
#[test]
fn summaries_are_added_up() {
    let directory = std::env::temp_dir().join(format!("devanon-summary-{}", std::process::id()));
    fs::create_dir_all(&directory).expect("a directory of our own");
    let run = |name: &str, failed, findings: &[&str]| {
        let path = directory.join(name);
        let run = Summary {
            name: name.to_owned(),
            kernel: Some("7.3.4".to_owned()),
            passed: 3,
            failed,
            pages: 10,
            seconds: 1.5,
            findings: findings.iter().map(|&finding| finding.to_owned()).collect(),
            ..Summary::default()
        };
        run.write(&path).expect("it is written");
        path
    };
    let (a, b, c) = (
        run("a", 0, &[]),
        run("b", 0, &[]),
        run("c", 1, &["not ok 2 b"]),
    );
    let output = directory.join("all");
    let add = |runs: &[(&str, &Path)]| {
        let out = Command::new(env!("CARGO_BIN_EXE_devanon-summary"))
            .arg("--output")
            .arg(&output)
            .args(
                runs.iter()
                    .map(|(name, path)| format!("{name}={}", path.display())),
            )
            .output()
            .expect("devanon-summary runs");
        let all = fs::read_to_string(&output).unwrap_or_default();
        (
            out.status.code(),
            all,
            String::from_utf8_lossy(&out.stdout).into_owned(),
        )
    };

    let (code, all, table) = add(&[("7.3", &a), ("7.2", &c), ("7.3", &b)]);
    assert_eq!(code, Some(1));
    let value: serde_json::Value = serde_json::from_str(&all).expect("it is JSON");
    assert_eq!(
        value,
        serde_json::json!({"kernels": [
            {"name": "7.3", "passed": 6, "failed": 0, "skipped": 0, "operations": 0, "pages": 20,
             "faults_injected": 0, "seconds": 3.0, "findings": []},
            {"name": "7.2", "passed": 3, "failed": 1, "skipped": 0, "operations": 0, "pages": 10,
             "faults_injected": 0, "seconds": 1.5, "findings": ["not ok 2 b"]},
        ]})
    );
    assert_eq!(table.lines().count(), 3);

    assert_eq!(add(&[("7.3", &a), ("7.3", &b)]).0, Some(0));
    // A run that left no summary.
    let (code, all, _) = add(&[("7.3", &a), ("debug", &directory.join("none"))]);
    assert_eq!(code, Some(1));
    assert!(all.contains("no summary in"), "{all}");
    fs::remove_dir_all(&directory).expect("it is ours");
}

#[test]
fn wrong_usage() {
    let line = ["--line", "0.0"];
    let out = runner("usage", &line).output().expect("devanon-vm runs");
    assert_eq!(out.status.code(), Some(2));
    let out = runner("../x", &[&line[..], &["--", "true"]].concat())
        .output()
        .expect("devanon-vm runs");
    assert_eq!(out.status.code(), Some(2));
}

#[test]
fn no_such_kernel() {
    vm("line", &["--line", "0.0"], KTAP).ended(5, "no kernel of line 0.0");
}

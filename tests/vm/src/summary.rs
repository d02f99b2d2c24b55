// SPDX-License-Identifier: GPL-2.0

//! The summary of a run: each goes to build/vm/NAME/summary.json, and devanon-summary adds up those
//! of one kernel.

use std::fs;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use serde::Deserialize;
use serde::Serialize;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    pub name: String,
    /// What `uname -r` prints on it; None if several runs were added up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
    pub operations: u64,
    pub pages: u64,
    pub faults_injected: u64,
    pub seconds: f64,
    /// Everything that went wrong. Empty if the run passed.
    pub findings: Vec<String>,
}

impl Summary {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("no summary in {}", path.display()))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("{} is not a summary", path.display()))
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        write(path, self)
    }

    /// Adds another run of the same kernel.
    pub fn add(&mut self, other: Summary) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.operations += other.operations;
        self.pages += other.pages;
        self.faults_injected += other.faults_injected;
        self.seconds = tenths(self.seconds + other.seconds);
        self.findings.extend(other.findings);
    }
}

/// Rounds to tenths.
pub fn tenths(seconds: f64) -> f64 {
    (seconds * 10.0).round() / 10.0
}

/// Writes `value` to a JSON file.
pub fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

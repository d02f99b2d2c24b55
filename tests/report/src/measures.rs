// SPDX-License-Identifier: GPL-2.0

//! The results of devanon-bench from one VM.

use std::fs;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use serde::Deserialize;

#[derive(Deserialize)]
struct Line {
    measure: Measure,
}

/// The cost of one operation on one subject.
#[derive(Deserialize)]
pub struct Measure {
    pub name: String,
    /// Says what one operation is.
    pub operation: String,
    /// The position on the growth curve, if the measure belongs to one.
    pub at: Option<usize>,
    pub subject: String,
    /// "time" (nanoseconds, which are instructions in a VM with icount), "bytes" or "VMAs".
    pub unit: String,
    pub value: f64,
}

/// All measures of a run, in input order.
pub struct Measures(pub Vec<Measure>);

impl Measures {
    /// Reads JSON lines, bare or in KTAP diagnostics ("# {"); other lines are skipped.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let lines = text
            .lines()
            .map(|line| line.trim_start_matches("# "))
            .filter(|line| line.starts_with('{'));
        let measures: Vec<Measure> = lines
            .map(|line| Ok(serde_json::from_str::<Line>(line)?.measure))
            .collect::<Result<_>>()
            .with_context(|| format!("cannot parse {}", path.display()))?;
        ensure!(!measures.is_empty(), "{}: no measures", path.display());
        Ok(Self(measures))
    }

    pub fn value(&self, name: &str, at: Option<usize>, subject: &str) -> Option<f64> {
        let found = self
            .0
            .iter()
            .find(|m| m.name == name && m.at == at && m.subject == subject);
        found.map(|measure| measure.value)
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Adds up what runs of devanon-vm left in build/vm/NAME/summary.json: one row for each kernel.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use anyhow::Result;
use clap::Parser;
use devanon_summary::Summary;
use serde::Serialize;

/// Adds up summaries of runs: a table to standard output, JSON to a file.
///
/// Summaries of the same NAME make one row. One that is missing or cannot be read is a finding of
/// its row: a run that came to nothing does not vanish. Findings are listed on standard error.
#[derive(Parser)]
#[command(
    name = "devanon-summary",
    after_help = "\
Exit status:
  0  no test failed, and nothing was found
  1  some did, or something was, or the file could not be written
  2  wrong usage"
)]
struct Cli {
    /// Writes {\"kernels\":[...]} there
    #[arg(long, value_name = "FILE")]
    output: PathBuf,

    /// Name of a kernel, and the summary of a run on it
    #[arg(value_name = "NAME=FILE", required = true, value_parser = pair)]
    summaries: Vec<(String, PathBuf)>,
}

fn pair(text: &str) -> Result<(String, PathBuf)> {
    let (name, path) = text.split_once('=').context("not of the form NAME=FILE")?;
    Ok((name.to_owned(), path.into()))
}

#[derive(Serialize)]
struct All {
    kernels: Vec<Summary>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut all = All { kernels: vec![] };
    for (name, path) in cli.summaries {
        let run = Summary::read(&path).unwrap_or_else(|error| Summary {
            findings: vec![format!("{error:#}")],
            ..Summary::default()
        });
        match all.kernels.iter_mut().find(|kernel| kernel.name == name) {
            Some(kernel) => kernel.add(run),
            None => all.kernels.push(Summary {
                name,
                kernel: None,
                ..run
            }),
        }
    }

    print!("{}", table(&all.kernels));
    for kernel in &all.kernels {
        for finding in &kernel.findings {
            eprintln!("{}: {finding}", kernel.name);
        }
    }
    if let Err(error) = devanon_summary::write(&cli.output, &all) {
        eprintln!("devanon-summary: {error:#}");
        return ExitCode::FAILURE;
    }
    let bad = |kernel: &Summary| kernel.failed != 0 || !kernel.findings.is_empty();
    ExitCode::from(u8::from(all.kernels.iter().any(bad)))
}

const HEADS: [&str; 9] = [
    "kernel",
    "passed",
    "failed",
    "skipped",
    "operations",
    "pages",
    "faults injected",
    "seconds",
    "findings",
];

fn table(kernels: &[Summary]) -> String {
    let mut rows = vec![HEADS.map(str::to_owned)];
    rows.extend(kernels.iter().map(|kernel| {
        [
            kernel.name.clone(),
            kernel.passed.to_string(),
            kernel.failed.to_string(),
            kernel.skipped.to_string(),
            kernel.operations.to_string(),
            kernel.pages.to_string(),
            kernel.faults_injected.to_string(),
            format!("{:.0}", kernel.seconds),
            kernel.findings.len().to_string(),
        ]
    }));
    let mut widths = [0; HEADS.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        text += &format!("{:<1$}", row[0], widths[0]);
        for (cell, width) in row.iter().zip(widths).skip(1) {
            text += &format!("  {cell:>width$}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_for_each_kernel() {
        let kernel = |name: &str, pages| Summary {
            name: name.to_owned(),
            pages,
            seconds: 61.6,
            ..Summary::default()
        };
        assert_eq!(
            table(&[kernel("7.3", 123_456), kernel("debug", 7)]),
            "\
kernel  passed  failed  skipped  operations   pages  faults injected  seconds  findings
7.3          0       0        0           0  123456                0       62         0
debug        0       0        0           0       7                0       62         0
"
        );
    }
}

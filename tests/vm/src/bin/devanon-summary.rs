// SPDX-License-Identifier: GPL-2.0

//! Adds up the build/vm/NAME/summary.json files of devanon-vm runs: one row for each kernel.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use anyhow::Result;
use clap::Parser;
use devanon_summary::Summary;
use serde::Serialize;

/// Adds up the summaries of test runs: a table to standard output, JSON to a file.
///
/// Summaries of the same NAME make one row. A summary that is missing or unreadable is a finding in
/// its row, so a run that died is not overlooked. Findings are listed on standard error.
#[derive(Parser)]
#[command(
    name = "devanon-summary",
    after_help = "\
Exit status:
  0  no test failed, and there are no findings
  1  a test failed, there are findings, or the file could not be written
  2  wrong usage"
)]
struct Cli {
    /// Where to write {"kernels":[...]}
    #[arg(long, value_name = "FILE")]
    output: PathBuf,

    /// Name of a kernel, and the summary of a run on that kernel
    #[arg(value_name = "NAME=FILE", required = true, value_parser = pair)]
    summaries: Vec<(String, PathBuf)>,
}

fn pair(text: &str) -> Result<(String, PathBuf)> {
    let (name, path) = text.split_once('=').context("not of the form NAME=FILE")?;
    Ok((name.to_owned(), path.into()))
}

#[derive(Serialize)]
struct Report {
    kernels: Vec<Summary>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut report = Report { kernels: vec![] };
    for (name, path) in cli.summaries {
        let run = Summary::read(&path).unwrap_or_else(|error| Summary {
            findings: vec![format!("{error:#}")],
            ..Summary::default()
        });
        match report.kernels.iter_mut().find(|kernel| kernel.name == name) {
            Some(kernel) => kernel.add(run),
            None => report.kernels.push(Summary {
                name,
                kernel: None,
                ..run
            }),
        }
    }

    print!("{}", table(&report.kernels));
    for kernel in &report.kernels {
        for finding in &kernel.findings {
            eprintln!("{}: {finding}", kernel.name);
        }
    }
    if let Err(error) = devanon_summary::write(&cli.output, &report) {
        eprintln!("devanon-summary: {error:#}");
        return ExitCode::FAILURE;
    }
    let bad = |kernel: &Summary| kernel.failed != 0 || !kernel.findings.is_empty();
    ExitCode::from(u8::from(report.kernels.iter().any(bad)))
}

const HEADINGS: [&str; 9] = [
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
    let mut rows = vec![HEADINGS.map(str::to_owned)];
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
    let mut widths = [0; HEADINGS.len()];
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
    fn one_row_per_kernel() {
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

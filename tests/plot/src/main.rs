// SPDX-License-Identifier: GPL-2.0

//! Plots the host memory that UML guests cost, and checks the measured figures against their goals.

mod chart;
mod life;

use std::fs;
use std::io;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use anyhow::Result;
use clap::Parser;
use serde::Serialize;

use crate::life::Figure;
use crate::life::Life;

/// Plots the host memory that UML guests cost, and checks the measured figures against their goals.
///
/// The input is JSON lines, as written by devanon-uml in the VM; lines that do not start with { are
/// skipped. A table of the figures goes to standard output.
#[derive(Parser)]
#[command(
    name = "devanon-plot",
    after_help = "\
Exit status:
  0  all figures meet their goals
  1  some figures miss their goals
  2  wrong usage
  3  the input cannot be read or parsed, or output cannot be written"
)]
struct Cli {
    /// Input: samples, phases, figures and titles of runs
    #[arg(long, value_name = "FILE")]
    input: PathBuf,

    /// Where to write the chart
    #[arg(long, value_name = "FILE")]
    svg: PathBuf,

    /// Where to write {"figures":[...]}
    #[arg(long, value_name = "FILE")]
    results: PathBuf,

    /// Title above the chart
    #[arg(long, default_value = "A UML guest's life")]
    title: String,

    /// Label of the horizontal axis
    #[arg(long, default_value = "seconds")]
    x_label: String,
}

#[derive(Serialize)]
struct Results {
    figures: Vec<Judged>,
}

#[derive(Serialize)]
struct Judged {
    name: String,
    value: f64,
    unit: String,
    goal: Option<f64>,
    /// Whether the value meets the goal, before rounding.
    met: Option<bool>,
}

impl From<Figure> for Judged {
    fn from(figure: Figure) -> Self {
        Self {
            met: figure.goal.map(|goal| figure.value <= goal),
            name: figure.name,
            value: thousandths(figure.value),
            unit: figure.unit,
            goal: figure.goal,
        }
    }
}

/// Rounds to thousandths. Adding zero turns -0 into 0.
fn thousandths(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0 + 0.0
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("devanon-plot: {error:#}");
            ExitCode::from(3)
        }
    }
}

/// Returns true if all goals are met.
fn run(cli: &Cli) -> Result<bool> {
    let life = Life::read(&cli.input)?;
    let svg = chart::svg(&cli.title, &cli.x_label, &life.runs).context("cannot draw the chart")?;
    let figures = life.figures.into_iter().map(Judged::from).collect();
    let results = Results { figures };

    write(&cli.svg, svg)?;
    write(&cli.results, serde_json::to_string_pretty(&results)? + "\n")?;
    io::stdout()
        .write_all(table(&results.figures).as_bytes())
        .context("cannot write to standard output")?;
    let mut figures = results.figures.iter();
    Ok(figures.all(|figure| figure.met != Some(false)))
}

fn write(path: &Path, text: String) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn table(figures: &[Judged]) -> String {
    let mut rows = vec![["figure", "value", "", "goal", "verdict"].map(str::to_owned)];
    rows.extend(figures.iter().map(|figure| {
        let verdict = match figure.met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "-",
        };
        [
            figure.name.clone(),
            figure.value.to_string(),
            figure.unit.clone(),
            figure.goal.map_or("-".to_owned(), |goal| goal.to_string()),
            verdict.to_owned(),
        ]
    }));
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let [name, value, unit, goal, _] = widths;
    let mut text = String::new();
    for [figure, number, suffix, limit, verdict] in &rows {
        text += &format!(
            "{figure:<name$}  {number:>value$} {suffix:<unit$}  {limit:>goal$}  {verdict}\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(name: &str, value: f64, unit: &str, goal: Option<f64>) -> Judged {
        Judged::from(Figure {
            name: name.to_owned(),
            value,
            unit: unit.to_owned(),
            goal,
        })
    }

    #[test]
    fn one_row_per_figure() {
        assert_eq!(
            table(&[
                judged("what is left", 4.25, "MiB", Some(10.0)),
                judged("time to boot", 12.0, "s", None),
                judged("größter Rest", 118.75, "MiB", Some(100.5)),
            ]),
            "\
figure         value       goal  verdict
what is left    4.25 MiB     10  met
time to boot      12 s        -  -
größter Rest  118.75 MiB  100.5  MISSED
"
        );
    }

    #[test]
    fn values_are_judged_before_rounding() {
        let over = judged("over", 10.000_1, "MiB", Some(10.0));
        assert_eq!((over.value, over.met), (10.0, Some(false)));
        let exact = judged("exact", 10.0, "MiB", Some(10.0));
        assert_eq!((exact.value, exact.met), (10.0, Some(true)));
        let below = judged("below", -0.000_1, "MiB", Some(0.0));
        assert_eq!(
            (below.value.to_string().as_str(), below.met),
            ("0", Some(true))
        );
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Turns the results of devanon-bench into ratios: a door of /dev/anon (the device or the ioctl)
//! against a peer in the same run.

mod growth;
mod measures;
mod ratios;

use std::fs;
use std::io;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use anyhow::Result;
use clap::Parser;
use clap::Subcommand;

use crate::measures::Measures;
use crate::ratios::Results;

/// Turns the results of devanon-bench into ratios, and checks them against goals or a baseline.
#[derive(Parser)]
#[command(
    name = "devanon-report",
    after_help = "\
Exit status:
  0  every goal is met, except goals below their floor, which are out of reach; nothing is worse
  1  a goal is missed, or a ratio is worse than in the baseline
  2  wrong usage
  3  the input cannot be read or parsed, or output cannot be written"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prints tables of ratios; those with goals come last
    Table {
        /// Instruction counts measured on a kernel, JSON lines; may be repeated
        #[arg(long = "kernel", value_name = "NAME=FILE", value_parser = named_file, required = true)]
        kernels: Vec<(String, PathBuf)>,
        /// Times measured on the first of these kernels, for an extra column
        #[arg(long, value_name = "FILE")]
        plain: Option<PathBuf>,
        /// Where to write {"ratios":[...]}
        #[arg(long, value_name = "FILE")]
        results: PathBuf,
        /// Where to write the growth curves
        #[arg(long, value_name = "FILE")]
        svg: PathBuf,
    },
    /// Lists the ratios that are worse than in a baseline by more than 2 %
    Compare {
        #[arg(long, value_name = "FILE")]
        results: PathBuf,
        #[arg(long, value_name = "FILE")]
        baseline: PathBuf,
    },
}

fn named_file(text: &str) -> Result<(String, PathBuf)> {
    let (name, file) = text.split_once('=').context("not of the form NAME=FILE")?;
    Ok((name.to_owned(), file.into()))
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("devanon-report: {error:#}");
            ExitCode::from(3)
        }
    }
}

fn run(command: Command) -> Result<bool> {
    match command {
        Command::Table {
            kernels,
            plain,
            results,
            svg,
        } => {
            let kernels: Vec<(String, Measures)> = kernels
                .into_iter()
                .map(|(name, file)| Ok((name, Measures::read(&file)?)))
                .collect::<Result<_>>()?;
            let plain = plain.map(|file| Measures::read(&file)).transpose()?;
            let ratios = Results::new(&kernels, plain.as_ref());
            write(&results, &(serde_json::to_string_pretty(&ratios)? + "\n"))?;
            let curves = growth::svg(&kernels[0].1).context("cannot draw the curves")?;
            write(&svg, &curves)?;
            print(&ratios.tables())?;
            Ok(ratios.goals_met())
        }
        Command::Compare { results, baseline } => {
            let worse = Results::read(&results)?.worse_than(&Results::read(&baseline)?);
            for line in &worse {
                print(&format!("{line}\n"))?;
            }
            Ok(worse.is_empty())
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn print(text: &str) -> Result<()> {
    let written = io::stdout().write_all(text.as_bytes());
    written.context("cannot write to standard output")
}

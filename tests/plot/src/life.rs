// SPDX-License-Identifier: GPL-2.0

//! The records that devanon-uml writes in the VM as JSON lines: the cost of guests over time, or over
//! the number of guests.

use std::fs;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::ensure;
use serde::Deserialize;

/// One line of the input.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Sample(Sample),
    Phase(Phase),
    Figure(Figure),
    Run(Title),
}

/// A measurement after some seconds of a run, or with some number of guests.
#[derive(Deserialize)]
pub struct Sample {
    run: String,
    /// Seconds since the start of the run, or the number of guests.
    #[serde(rename = "seconds", alias = "guests")]
    pub at: f64,
    /// What the guest's memory file, or all guests together, cost the host.
    pub host_kib: u64,
    /// None while the guest cannot be queried.
    pub guest_used_kib: Option<u64>,
}

/// The start of a phase of a run.
#[derive(Deserialize)]
pub struct Phase {
    run: String,
    #[serde(rename = "seconds", alias = "guests")]
    pub at: f64,
    pub name: String,
}

#[derive(Deserialize)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: String,
    /// The highest acceptable value. A figure without a goal is informational.
    pub goal: Option<f64>,
}

#[derive(Deserialize)]
struct Title {
    run: String,
    title: String,
}

/// The records of one run: at least one sample.
pub struct Run {
    name: String,
    pub title: String,
    pub samples: Vec<Sample>,
    pub phases: Vec<Phase>,
}

/// All records. Runs are in the order of their first lines.
#[derive(Default)]
pub struct Life {
    pub runs: Vec<Run>,
    pub figures: Vec<Figure>,
}

impl Life {
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    /// Takes bytes: lines that are not records may be a guest's console output, hence not UTF-8.
    fn parse(text: &[u8]) -> Result<Self> {
        let mut life = Self::default();
        for (number, line) in (1..).zip(text.split(|&byte| byte == b'\n')) {
            if line.starts_with(b"{") {
                let record = record(line).with_context(|| format!("line {number}"))?;
                life.add(record);
            }
        }
        ensure!(!life.runs.is_empty(), "no samples");
        for run in &life.runs {
            ensure!(!run.samples.is_empty(), "no samples of run {}", run.name);
        }
        Ok(life)
    }

    fn add(&mut self, record: Record) {
        match record {
            Record::Sample(sample) => self.run(&sample.run).samples.push(sample),
            Record::Phase(phase) => self.run(&phase.run).phases.push(phase),
            Record::Figure(figure) => self.figures.push(figure),
            Record::Run(title) => self.run(&title.run).title = title.title,
        }
    }

    /// Finds or adds the run of that name, which is also its title until a record gives one.
    fn run(&mut self, name: &str) -> &mut Run {
        let known = self.runs.iter().position(|run| run.name == name);
        let index = known.unwrap_or_else(|| {
            self.runs.push(Run {
                name: name.to_owned(),
                title: name.to_owned(),
                samples: vec![],
                phases: vec![],
            });
            self.runs.len() - 1
        });
        &mut self.runs[index]
    }
}

/// Parses one line. Removes the parser's own line number from errors, as that is always 1.
fn record(line: &[u8]) -> Result<Record> {
    serde_json::from_slice(line)
        .map_err(|error| anyhow!("{}", error.to_string().replace(" at line 1 ", " at ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = concat!(
        r#"{"sample":{"run":"anon","seconds":1.0,"host_kib":2048,"#,
        r#""guest_used_kib":null}}"#
    );

    fn error(text: &str) -> String {
        match Life::parse(text.as_bytes()) {
            Ok(_) => panic!("{text} was accepted"),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn records_are_grouped_by_run() {
        let text = format!(
            "KTAP version 1\n{}\n{SAMPLE}\r\n{}\n\n # {{\n{}\n",
            r#"{"run":{"run":"shm","title":"/dev/shm"}}"#,
            r#"{"phase":{"run":"shm","seconds":3,"name":"boot"}}"#,
            SAMPLE.replace("anon", "shm").replace("null", "7"),
        );
        let life = Life::parse(&[text.as_bytes(), b"\xff\xfe"].concat()).expect("is well-formed");
        let titles: Vec<_> = life.runs.iter().map(|run| run.title.as_str()).collect();
        assert_eq!(titles, ["/dev/shm", "anon"]);
        assert_eq!(life.runs[0].phases[0].name, "boot");
        assert_eq!(life.runs[0].samples[0].guest_used_kib, Some(7));
        assert_eq!(life.runs[1].samples[0].host_kib, 2048);
        assert_eq!(life.runs[1].samples[0].guest_used_kib, None);
        assert!(life.figures.is_empty());
    }

    #[test]
    fn errors_have_line_numbers() {
        assert_eq!(
            error(&format!(
                "{SAMPLE}\nok 1 - {{}}\n{{\"figure\":{{\"name\":\"\",\"value\":1}}}}"
            )),
            "line 3: missing field `unit` at column 31"
        );
        assert!(error("{").starts_with("line 1: EOF "), "{}", error("{"));
        let unknown = error("\n{\"guest\":{}}");
        assert!(
            unknown.starts_with("line 2: unknown variant `guest`"),
            "{unknown}"
        );
        let huge = error(&SAMPLE.replace("1.0", "1e999"));
        assert!(huge.starts_with("line 1: number out of range"), "{huge}");
    }

    #[test]
    fn no_samples() {
        assert_eq!(error(""), "no samples");
        let title = r#"{"run":{"run":"shm","title":"/dev/shm"}}"#;
        assert_eq!(
            error(&format!("{SAMPLE}\n{title}")),
            "no samples of run shm"
        );
    }
}

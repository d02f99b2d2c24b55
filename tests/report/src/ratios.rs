// SPDX-License-Identifier: GPL-2.0

//! Ratios, their goals, and tables of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use serde::Deserialize;
use serde::Serialize;

use crate::measures::Measure;
use crate::measures::Measures;

const DOORS: [&str; 2] = ["device", "ioctl"];
const PEERS: [&str; 4] = ["memfd", "tmpfs", "zero", "private"];
/// How much worse than in the baseline a ratio may be.
const TOLERANCE: f64 = 1.02;

/// The highest acceptable ratio of a door to a peer.
struct Goal {
    name: &'static str,
    peer: &'static str,
    at_most: f64,
    floor: Option<Floor>,
}

/// A lower bound: the peer's cost of the benchmark `page_stays`, where the page is not freed, plus the
/// kernel's own cost of removing one page. The bound does not include the call that has the page
/// removed, the check for other mappings of the page, or any lock.
#[derive(Clone, Copy)]
struct Floor {
    page_stays: &'static str,
}

const GOALS: &[Goal] = &[
    goal("first touch, write", "memfd", 1.005),
    goal("first touch, read", "memfd", 1.005),
    goal("unmap and free, bulk", "memfd", 1.00),
    Goal {
        floor: Some(Floor {
            page_stays: "unmap one of two mappings, by 4 KiB",
        }),
        ..goal("unmap and free, by 4 KiB", "memfd", 0.70)
    },
    Goal {
        floor: Some(Floor {
            page_stays: "map a file over a page that stays",
        }),
        ..goal("map a file over a page", "tmpfs", 0.80)
    },
    goal(
        "unmap and free a page, by VMAs of the object",
        "10 VMAs",
        1.5,
    ),
    goal("open and close", "memfd", 1.3),
    goal("open, map and close", "memfd", 1.3),
    goal("VMAs of adjacent maps of a page", "memfd", 1.0),
    goal("UML boot and workload", "tmpfs", 1.01),
];

const fn goal(name: &'static str, peer: &'static str, at_most: f64) -> Goal {
    Goal {
        name,
        peer,
        at_most,
        floor: None,
    }
}

/// The cost of a door relative to a peer.
#[derive(Serialize, Deserialize)]
pub struct Ratio {
    name: String,
    kernel: String,
    door: String,
    peer: String,
    value: f64,
    goal: Option<f64>,
    /// Compared to the thousandth, as printed: two runs do not agree any closer.
    met: Option<bool>,
    /// The lower bound of the ratio: see [`Floor`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    floor: Option<f64>,
    /// The ratio of plain times, measured without counting instructions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    plain: Option<f64>,
    /// The unit of the two values: instructions, ns, bytes or VMAs per operation.
    unit: String,
    /// Says what one operation is.
    operation: String,
    door_value: f64,
    peer_value: f64,
}

#[derive(Serialize, Deserialize)]
pub struct Results {
    ratios: Vec<Ratio>,
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

/// A ratio as it is printed, and as it is compared with its goal.
fn shown(value: f64) -> String {
    format!("{:.3}", rounded(value, 3))
}

fn title(measure: &Measure) -> String {
    match measure.at {
        Some(at) => format!("{}: {at}", measure.name),
        None => measure.name.clone(),
    }
}

impl Results {
    /// `plain` has the times measured on the first kernel.
    pub fn new(kernels: &[(String, Measures)], plain: Option<&Measures>) -> Self {
        let mut ratios = Vec::new();
        for (number, (kernel, measures)) in kernels.iter().enumerate() {
            let plain = plain.filter(|_| number == 0);
            for measure in &measures.0 {
                if DOORS.contains(&measure.subject.as_str()) {
                    ratios.extend(ratios_of(kernel, measures, plain, measure));
                }
            }
        }
        // Benchmarks for which only time was measured.
        for measure in plain.iter().flat_map(|plain| &plain.0) {
            let (kernel, counted) = &kernels[0];
            let door = DOORS.contains(&measure.subject.as_str());
            if door && !counted.0.iter().any(|m| m.name == measure.name) {
                let plain = plain.unwrap_or(counted);
                ratios.extend(
                    ratios_of(kernel, plain, Some(plain), measure).map(|mut ratio| {
                        ratio.unit = "ns".to_owned();
                        ratio
                    }),
                );
            }
        }
        Self { ratios }
    }

    pub fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("cannot parse {}", path.display()))
    }

    /// Returns true if every goal that is not out of reach is met.
    pub fn goals_met(&self) -> bool {
        self.ratios.iter().all(|ratio| ratio.verdict() != "MISSED")
    }

    /// A table for each kernel, and one of the ratios that have goals.
    pub fn tables(&self) -> String {
        let kernels: BTreeSet<&str> = self.ratios.iter().map(|r| r.kernel.as_str()).collect();
        let mut text = String::new();
        for kernel in kernels {
            text += &format!(
                "Linux {kernel}: instructions (or ns, bytes, VMAs, where stated) per operation, and ratios to peers\n\n"
            );
            text += &self.kernel_table(kernel);
            text += "\n";
        }
        text + "Ratios with goals\n\n" + &self.goal_table()
    }

    fn kernel_table(&self, kernel: &str) -> String {
        let mut rows = vec![
            [
                "",
                "door",
                "needs",
                "/memfd",
                "/tmpfs",
                "/zero",
                "/private",
                "/memfd, time",
                "one operation is",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        let mut seen = BTreeSet::new();
        for ratio in self.ratios.iter().filter(|r| r.kernel == kernel) {
            if !seen.insert((&ratio.name, &ratio.door)) {
                continue;
            }
            let of = |peer: &str| {
                self.ratios.iter().find(|r| {
                    r.kernel == kernel
                        && r.name == ratio.name
                        && r.door == ratio.door
                        && r.peer == peer
                })
            };
            let unit = match ratio.unit.as_str() {
                "instructions" => String::new(),
                unit => format!(" {unit}"),
            };
            let mut row = vec![
                ratio.name.clone(),
                ratio.door.clone(),
                format!("{:.0}{unit}", ratio.door_value),
            ];
            let shown = |value: Option<f64>| value.map_or("-".to_owned(), shown);
            row.extend(PEERS.map(|peer| shown(of(peer).map(|r| r.value))));
            row.push(shown(of("memfd").and_then(|r| r.plain)));
            row.push(ratio.operation.clone());
            rows.push(row);
        }
        aligned(&rows)
    }

    fn goal_table(&self) -> String {
        let mut rows = vec![
            [
                "", "kernel", "door", "against", "ratio", "goal", "floor", "",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        for goal in GOALS {
            let of_goal = |r: &&Ratio| r.goal.is_some() && r.name.starts_with(goal.name);
            for ratio in self.ratios.iter().filter(of_goal) {
                rows.push(vec![
                    ratio.name.clone(),
                    ratio.kernel.clone(),
                    ratio.door.clone(),
                    ratio.peer.clone(),
                    shown(ratio.value),
                    ratio.goal.map_or(String::new(), shown),
                    ratio.floor.map_or("-".to_owned(), shown),
                    ratio.verdict().to_owned(),
                ]);
            }
        }
        aligned(&rows)
    }

    /// The ratios of `baseline` that are missing here, or worse by more than the tolerance.
    pub fn worse_than(&self, baseline: &Self) -> Vec<String> {
        let mut worse = Vec::new();
        for old in &baseline.ratios {
            let what = format!(
                "{} (Linux {}, {} against {})",
                old.name, old.kernel, old.door, old.peer
            );
            let same = |new: &&Ratio| {
                (&new.name, &new.kernel, &new.door, &new.peer)
                    == (&old.name, &old.kernel, &old.door, &old.peer)
            };
            match self.ratios.iter().find(same) {
                None => worse.push(format!("{what}: not measured")),
                // Times in an emulator are too noisy to compare.
                Some(_) if old.unit == "ns" => {}
                Some(new) if new.value > old.value * TOLERANCE => {
                    worse.push(format!(
                        "{what}: {}, was {}",
                        shown(new.value),
                        shown(old.value)
                    ));
                }
                Some(_) => {}
            }
        }
        worse
    }
}

impl Ratio {
    fn verdict(&self) -> &'static str {
        match (self.met, self.goal, self.floor) {
            (None, ..) => "",
            (Some(true), ..) => "met",
            (Some(false), Some(goal), Some(floor)) if floor > goal => "out of reach",
            (Some(false), ..) => "MISSED",
        }
    }
}

impl Floor {
    fn of(self, measures: &Measures, peer: &str) -> Option<f64> {
        let value = |name: &str, subject: &str| measures.value(name, None, subject);
        let Self { page_stays } = self;
        let removal = value("punch a hole, a page in it", "memfd")?
            - value("punch a hole, nothing in it", "memfd")?;
        Some(value(page_stays, peer)? + removal)
    }
}

/// The ratios of a door's measure: to each peer, and at the end of a growth curve to its start.
fn ratios_of<'a>(
    kernel: &'a str,
    measures: &'a Measures,
    plain: Option<&'a Measures>,
    measure: &'a Measure,
) -> impl Iterator<Item = Ratio> + 'a {
    let (name, at, door) = (&measure.name, measure.at, &measure.subject);
    let peers = PEERS.iter().filter_map(move |&peer| {
        let value = measures.value(name, at, peer)?;
        let plain = plain
            .and_then(|plain| Some(plain.value(name, at, door)? / plain.value(name, at, peer)?));
        Some((peer, value, plain))
    });
    let start = GOALS
        .iter()
        .filter(move |goal| goal.name == name && at == Some(100_000))
        .filter_map(move |goal| {
            let start = measures.value(name, Some(10), door)?;
            Some((goal.peer, start, None))
        });
    peers.chain(start).map(move |(peer, peer_value, plain)| {
        let goal = GOALS
            .iter()
            .find(|goal| goal.name == name && goal.peer == peer)
            // A stock kernel does not merge VMAs that map the device.
            .filter(|_| measure.unit != "VMAs" || door == "ioctl" || kernel == "patched");
        let value = measure.value / peer_value;
        let floor = goal.and_then(|goal| goal.floor?.of(measures, peer));
        Ratio {
            name: title(measure),
            kernel: kernel.to_owned(),
            door: door.clone(),
            peer: peer.to_owned(),
            value: rounded(value, 4),
            goal: goal.map(|goal| goal.at_most),
            met: goal.map(|goal| rounded(value, 3) <= goal.at_most),
            floor: floor.map(|floor| rounded(floor / peer_value, 4)),
            plain: plain.map(|plain: f64| rounded(plain, 4)),
            unit: match measure.unit.as_str() {
                "time" => "instructions".to_owned(),
                unit => unit.to_owned(),
            },
            operation: measure.operation.clone(),
            door_value: rounded(measure.value, 1),
            peer_value: rounded(peer_value, 1),
        }
    })
}

/// Aligns columns: text to the left, numbers (except in the first column) to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let first = line.is_empty();
            line += &if !first && cell.starts_with(|c: char| c.is_ascii_digit() || "-/".contains(c))
            {
                format!("{cell:>width$}  ")
            } else {
                format!("{cell:<width$}  ")
            };
        }
        text += line.trim_end();
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(name: &str, subject: &str, value: f64) -> Measure {
        Measure {
            name: name.to_owned(),
            operation: String::new(),
            at: None,
            subject: subject.to_owned(),
            unit: "time".to_owned(),
            value,
        }
    }

    fn results(bulk: f64, pieces: f64, floor: f64) -> Results {
        let measures = Measures(vec![
            measure("unmap and free, bulk", "ioctl", bulk),
            measure("unmap and free, bulk", "memfd", 100.0),
            measure("unmap and free, by 4 KiB", "ioctl", pieces),
            measure("unmap and free, by 4 KiB", "memfd", 100.0),
            measure("unmap one of two mappings, by 4 KiB", "memfd", floor),
            measure("punch a hole, a page in it", "memfd", 30.0),
            measure("punch a hole, nothing in it", "memfd", 10.0),
        ]);
        Results::new(&[("7.3".to_owned(), measures)], None)
    }

    fn verdicts(results: &Results) -> Vec<&str> {
        results.ratios.iter().map(Ratio::verdict).collect()
    }

    #[test]
    fn goals() {
        let good = results(100.0, 70.0, 10.0);
        assert_eq!(verdicts(&good), ["met", "met"]);
        assert!(good.goals_met());
        let bad = results(100.1, 70.1, 10.0);
        assert_eq!(verdicts(&bad), ["MISSED", "MISSED"]);
        assert!(!bad.goals_met());
        let floor = results(99.0, 90.0, 51.0);
        assert_eq!(verdicts(&floor), ["met", "out of reach"]);
        assert!(floor.goals_met());
    }

    #[test]
    fn worse_than_the_baseline() {
        let old = results(100.0, 70.0, 10.0);
        assert!(results(101.9, 71.0, 10.0).worse_than(&old).is_empty());
        assert_eq!(
            results(102.1, 60.0, 10.0).worse_than(&old),
            ["unmap and free, bulk (Linux 7.3, ioctl against memfd): 1.021, was 1.000"]
        );
        let nothing = Results { ratios: vec![] };
        assert_eq!(nothing.worse_than(&old).len(), 2);
        assert!(old.worse_than(&nothing).is_empty());
    }
}

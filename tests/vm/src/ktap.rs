// SPDX-License-Identifier: GPL-2.0

//! Counts the results of a KTAP stream (Documentation/dev-tools/ktap.rst).
//!
//! Only leaves count: a test with subtests is not counted itself. An inconsistent stream is not
//! trusted: a missing plan, a number out of order, a planned test that is never reported (its
//! program crashed), or no test at all is a problem, and a problem fails the run.
//!
//! Diagnostic lines `# count: WHAT NUMBER` are added up, where WHAT is `operations`, `pages` or
//! `faults` (injected).

/// The results of a stream so far.
#[derive(Default)]
pub struct Ktap {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
    pub operations: u64,
    pub pages: u64,
    /// Injected faults.
    pub faults: u64,
    /// One line for each failed test and each inconsistency.
    pub problems: Vec<String>,
    /// The open nesting levels, outermost first.
    levels: Vec<Level>,
}

#[derive(Default)]
struct Level {
    plan: Option<u64>,
    seen: u64,
    failed: bool,
}

enum Line {
    Version,
    Plan { count: u64, skip: bool },
    Result { ok: bool, number: u64, skip: bool },
    BailOut,
    Other,
}

fn parse(text: &str) -> Line {
    let skip = text.to_ascii_uppercase().contains("# SKIP");
    let word = text.split_whitespace().next().unwrap_or("");
    if text.starts_with("KTAP version ") || text.starts_with("TAP version ") {
        return Line::Version;
    }
    if text.starts_with("Bail out!") {
        return Line::BailOut;
    }
    if let Some(count) = word.strip_prefix("1..").and_then(|n| n.parse().ok()) {
        return Line::Plan { count, skip };
    }
    let (ok, rest) = match text.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => match text.strip_prefix("ok ") {
            Some(rest) => (true, rest),
            None => return Line::Other,
        },
    };
    match rest.split_whitespace().next().map(str::parse) {
        Some(Ok(number)) => Line::Result { ok, number, skip },
        _ => Line::Other,
    }
}

impl Ktap {
    /// Processes one line of the stream, without its newline.
    pub fn line(&mut self, line: &str) {
        let text = line.trim_start_matches(' ');
        let depth = (line.len() - text.len()) / 2;
        match parse(text.trim_end()) {
            Line::Other => {
                if let Some(count) = text.trim_end().strip_prefix("# count: ") {
                    self.count(count);
                }
            }
            Line::BailOut => self.problems.push(text.to_owned()),
            // The command may run several programs, each with a stream of its own.
            Line::Version => {
                self.close_from(depth);
                self.level(depth);
            }
            Line::Plan { count, skip } => {
                if self.level(depth).plan.replace(count).is_some() {
                    self.problems.push(format!("a second plan: {text}"));
                }
                if count == 0 && skip {
                    self.skipped += 1;
                } else if count == 0 {
                    self.problems.push("a plan of no tests".to_owned());
                }
            }
            Line::Result { ok, number, skip } => self.result(depth, ok, number, skip, text),
        }
    }

    fn count(&mut self, text: &str) {
        let (what, number) = text.split_once(' ').unwrap_or((text, ""));
        let sum = match what {
            "operations" => &mut self.operations,
            "pages" => &mut self.pages,
            "faults" => &mut self.faults,
            _ => return self.problems.push(format!("unknown count: {text}")),
        };
        match number.parse::<u64>() {
            Ok(number) => *sum += number,
            Err(_) => self.problems.push(format!("not a count: {text}")),
        }
    }

    fn result(&mut self, depth: usize, ok: bool, number: u64, skip: bool, text: &str) {
        let subtests = self.close_from(depth + 1);
        let leaf = subtests.is_none();
        let level = self.level(depth);
        level.seen += 1;
        let expected = level.seen;
        level.failed |= !ok;
        if number != expected {
            let problem = format!("expected test number {expected}, got: {text}");
            self.problems.push(problem);
        }
        match (ok, subtests) {
            (true, Some(true)) => self
                .problems
                .push(format!("passed despite a failed subtest: {text}")),
            (true, _) => (),
            (false, _) => self.problems.push(text.to_owned()),
        }
        match (leaf, ok) {
            (true, true) if skip => self.skipped += 1,
            (true, true) => self.passed += 1,
            (true, false) => self.failed += 1,
            (false, _) => (),
        }
    }

    /// Ends the stream.
    pub fn end(&mut self) {
        self.close_from(0);
        if self.passed + self.failed + self.skipped == 0 {
            self.problems.push("no test was reported".to_owned());
        }
    }

    fn level(&mut self, depth: usize) -> &mut Level {
        while self.levels.len() <= depth {
            self.levels.push(Level::default());
        }
        &mut self.levels[depth]
    }

    /// Closes the levels from `depth` inwards and checks each against its plan. Returns None if
    /// there was none, otherwise whether any test in them failed.
    fn close_from(&mut self, depth: usize) -> Option<bool> {
        if self.levels.len() <= depth {
            return None;
        }
        let mut failed = false;
        for level in self.levels.drain(depth..) {
            failed |= level.failed;
            match level.plan {
                None => self.problems.push("a plan is missing".to_owned()),
                Some(plan) if level.seen < plan => self.problems.push(format!(
                    "{} of {plan} tests were never reported",
                    plan - level.seen
                )),
                Some(plan) if level.seen > plan => self.problems.push(format!(
                    "{} tests were reported, but {plan} planned",
                    level.seen
                )),
                Some(_) => (),
            }
        }
        Some(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Ktap {
        let mut ktap = Ktap::default();
        text.lines().for_each(|line| ktap.line(line));
        ktap.end();
        ktap
    }

    fn counts(ktap: &Ktap) -> (u64, u64, u64, usize) {
        (ktap.passed, ktap.failed, ktap.skipped, ktap.problems.len())
    }

    #[test]
    fn passed_and_skipped() {
        let ktap = read("KTAP version 1\n1..3\n# hello\nok 1 a\nok 2 - b\nok 3 c # SKIP no swap\n");
        assert_eq!(counts(&ktap), (2, 0, 1, 0));
    }

    #[test]
    fn a_failure() {
        let ktap = read("KTAP version 1\n1..2\nok 1 a\nnot ok 2 b\n");
        assert_eq!(counts(&ktap), (1, 1, 0, 1));
        assert_eq!(ktap.problems, ["not ok 2 b"]);
    }

    #[test]
    fn subtests_count_instead_of_their_parent() {
        let text = "KTAP version 1\n1..2\n  KTAP version 1\n  1..2\n  ok 1 x\n  not ok 2 y\n\
                    not ok 1 a\n  KTAP version 1\n  1..1\n  ok 1 z\nok 2 b\n";
        assert_eq!(counts(&read(text)), (2, 1, 0, 2));
        let lie = text.replace("\nnot ok 1 a", "\nok 1 a");
        assert_eq!(counts(&read(&lie)), (2, 1, 0, 2));
    }

    #[test]
    fn a_crash_leaves_tests_out() {
        let ktap = read("KTAP version 1\n1..3\nok 1 a\n");
        assert_eq!(counts(&ktap), (1, 0, 0, 1));
        let ktap = read("KTAP version 1\n1..1\n  KTAP version 1\n  1..2\n  ok 1 x\n");
        assert_eq!(counts(&ktap), (1, 0, 0, 2));
    }

    #[test]
    fn inconsistent_streams() {
        for text in [
            "",
            "hello\nok then\n",
            "KTAP version 1\n",
            "KTAP version 1\n1..0\n",
            "KTAP version 1\nok 1 a\n",
            "KTAP version 1\n1..1\nok 1 a\nok 2 b\n",
            "KTAP version 1\n1..2\nok 1 a\nok 3 b\n",
            "KTAP version 1\n1..1\nok 1 a\nBail out! no memory\n",
        ] {
            assert!(!read(text).problems.is_empty(), "{text}");
        }
    }

    #[test]
    fn a_skipped_plan_is_accepted() {
        let ktap = read("KTAP version 1\n1..0 # SKIP no swap\n");
        assert_eq!(counts(&ktap), (0, 0, 1, 0));
    }

    #[test]
    fn counts_are_added_up() {
        let ktap = read(
            "KTAP version 1\n1..2\n# count: pages 5\n# count: operations 7\nok 1 a\n\
             # count: pages 6\n# count: faults 1\nok 2 b\n",
        );
        assert_eq!((ktap.operations, ktap.pages, ktap.faults), (7, 11, 1));
        assert_eq!(counts(&ktap), (2, 0, 0, 0));
        for count in ["page 5", "pages", "pages 5 or 6", "pages -1"] {
            let ktap = read(&format!("KTAP version 1\n1..1\n# count: {count}\nok 1 a\n"));
            assert_eq!(counts(&ktap), (1, 0, 0, 1), "{count}");
        }
    }

    #[test]
    fn two_programs_one_after_the_other() {
        let ktap = read("KTAP version 1\n1..1\nok 1 a\nKTAP version 1\n1..1\nok 1 b\n");
        assert_eq!(counts(&ktap), (2, 0, 0, 0));
    }
}

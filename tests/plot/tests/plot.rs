// SPDX-License-Identifier: GPL-2.0

//! Tests of the whole program: its output and its exit statuses.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use serde_json::json;

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Makes an empty directory for a test.
fn directory(test: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).expect("directory can be made");
    directory
}

fn plot(directory: &Path, options: &[&str]) -> Run {
    let out = Command::new(env!("CARGO_BIN_EXE_devanon-plot"))
        .current_dir(directory)
        .args(["--input", "life.jsonl", "--svg", "life.svg"])
        .args(options)
        .output()
        .expect("devanon-plot runs");
    Run {
        code: out.status.code(),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// Runs devanon-plot with these lines as its input.
fn plot_lines(directory: &Path, lines: &[String]) -> Run {
    fs::write(directory.join("life.jsonl"), lines.join("\n")).expect("input can be written");
    plot(directory, &["--results", "results.json"])
}

fn samples(run: &str, count: u32) -> Vec<String> {
    let sample = |second: u32| {
        json!({"sample": {
            "run": run,
            "seconds": second,
            "host_kib": 1024 * (10 + second),
            // The guest cannot be queried in the first two seconds.
            "guest_used_kib": (second > 1).then_some(1024 * second),
        }})
    };
    (0..count)
        .map(|second| sample(second).to_string())
        .collect()
}

fn phase(run: &str, seconds: f64, name: &str) -> String {
    json!({"phase": {"run": run, "seconds": seconds, "name": name}}).to_string()
}

fn title(run: &str, title: &str) -> String {
    json!({"run": {"run": run, "title": title}}).to_string()
}

fn figure(name: &str, value: f64, goal: Option<f64>) -> String {
    json!({"figure": {"name": name, "value": value, "unit": "MiB", "goal": goal}}).to_string()
}

fn read(directory: &Path, name: &str) -> String {
    fs::read_to_string(directory.join(name)).expect("output is there")
}

/// The number of points of each line of the chart that has more than two.
fn points(svg: &str) -> Vec<usize> {
    svg.lines()
        .filter(|line| line.starts_with("<polyline"))
        .filter_map(|line| line.split_once("points=\""))
        .map(|(_, points)| points.matches(',').count())
        .filter(|&count| count > 2)
        .collect()
}

#[test]
fn all_goals_met() {
    let directory = directory("met");
    let mut lines = vec![
        "KTAP version 1".to_owned(),
        title("anon", "on <anon> & more"),
    ];
    lines.extend(samples("anon", 30));
    lines.extend(samples("shm", 40));
    lines.push(phase("anon", 3.5, "boot"));
    lines.push(phase("anon", 20.0, "drop caches"));
    lines.push(phase("shm", 5.0, "not the first run's"));
    lines.push(figure("rest", 4.123_46, Some(10.0)));
    lines.push(figure("seen", 250.0, None));
    lines.push("ok 1 - {\n".to_owned());
    let run = plot_lines(&directory, &lines);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    assert_eq!(
        run.stdout,
        "\
figure  value      goal  verdict
rest    4.123 MiB    10  met
seen      250 MiB     -  -
"
    );

    let results = read(&directory, "results.json");
    assert!(results.starts_with("{\n  \"figures\": [\n    {\n      \"name\": \"rest\",\n"));
    assert!(results.ends_with("}\n"), "{results}");
    assert_eq!(
        serde_json::from_str::<Value>(&results).expect("results are JSON"),
        json!({"figures": [
            {"name": "rest", "value": 4.123, "unit": "MiB", "goal": 10.0, "met": true},
            {"name": "seen", "value": 250.0, "unit": "MiB", "goal": null, "met": null},
        ]})
    );

    let svg = read(&directory, "life.svg");
    // The line of the guest's own use is drawn first.
    assert_eq!(points(&svg), [28, 30, 40]);
    assert!(svg.ends_with("</svg>\n"), "{svg}");
    for text in [
        "A UML guest&apos;s life",
        "seconds",
        "MiB of host memory",
        "on &lt;anon&gt; &amp; more",
        "shm",
        "boot",
        "drop caches",
    ] {
        let texts = svg.lines().filter(|&line| line == text);
        assert_eq!(texts.count(), 1, "{text} in {svg}");
    }
    assert!(!svg.contains("not the first"), "{svg}");
}

#[test]
fn a_missed_goal() {
    let directory = directory("missed");
    let mut lines = samples("anon", 3);
    lines.push(figure("rest", 10.5, Some(10.0)));
    lines.push(figure("other", 1.0, Some(10.0)));
    let run = plot_lines(&directory, &lines);
    assert_eq!((run.code, run.stderr.as_str()), (Some(1), ""));
    assert!(
        run.stdout.contains("\nrest     10.5 MiB    10  MISSED\n"),
        "{}",
        run.stdout
    );
    let results: Value =
        serde_json::from_str(&read(&directory, "results.json")).expect("results are JSON");
    assert_eq!(results["figures"][0]["met"], json!(false));
    assert_eq!(results["figures"][1]["met"], json!(true));
    assert_eq!(points(&read(&directory, "life.svg")), [3]);
}

#[test]
fn titles() {
    let directory = directory("titles");
    fs::write(directory.join("life.jsonl"), samples("anon", 1).concat()).expect("can be written");
    let run = plot(
        &directory,
        &["--results", "results.json", "--title", "Another"],
    );
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    let svg = read(&directory, "life.svg");
    assert!(
        svg.contains("\nAnother\n") && !svg.contains("life"),
        "{svg}"
    );
}

#[test]
fn wrong_usage() {
    let run = plot(&directory("usage"), &[]);
    assert_eq!(run.code, Some(2));
    assert!(run.stderr.contains("--results <FILE>"), "{}", run.stderr);
}

#[test]
fn bad_input() {
    let directory = directory("bad");
    let run = plot(&directory, &["--results", "results.json"]);
    let error = "devanon-plot: cannot read life.jsonl: No such file or directory (os error 2)\n";
    assert_eq!((run.code, run.stderr.as_str()), (Some(3), error));

    let mut lines = samples("anon", 2);
    lines.push("{\"phase\":{\"run\":\"anon\",\"name\":\"boot\"}}".to_owned());
    let run = plot_lines(&directory, &lines);
    let error = "devanon-plot: life.jsonl: line 3: missing field `seconds` at column 37\n";
    assert_eq!((run.code, run.stderr.as_str()), (Some(3), error));

    let run = plot_lines(&directory, &["1..0".to_owned()]);
    let error = "devanon-plot: life.jsonl: no samples\n";
    assert_eq!((run.code, run.stderr.as_str()), (Some(3), error));
    assert_eq!(run.stdout, "");
    assert!(!directory.join("results.json").exists() && !directory.join("life.svg").exists());
}

#[test]
fn output_that_cannot_be_written() {
    let directory = directory("unwritable");
    fs::write(directory.join("life.jsonl"), samples("anon", 2).join("\n")).expect("can be written");
    let run = plot(&directory, &["--results", "no/results.json"]);
    let error =
        "devanon-plot: cannot write no/results.json: No such file or directory (os error 2)\n";
    assert_eq!((run.code, run.stderr.as_str()), (Some(3), error));
}

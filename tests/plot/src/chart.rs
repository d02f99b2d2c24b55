// SPDX-License-Identifier: GPL-2.0

//! The chart: MiB of host memory over seconds, or over the number of guests, for each run.

use anyhow::Result;
use plotters::backend::SVGBackend;
use plotters::chart::ChartBuilder;
use plotters::drawing::IntoDrawingArea;
use plotters::element::PathElement;
use plotters::element::Text;
use plotters::series::LineSeries;
use plotters::style::BLACK;
use plotters::style::Color;
use plotters::style::FontTransform;
use plotters::style::IntoFont;
use plotters::style::RGBColor;
use plotters::style::ShapeStyle;
use plotters::style::TextStyle;
use plotters::style::WHITE;
use plotters::style::text_anchor::HPos;
use plotters::style::text_anchor::Pos;
use plotters::style::text_anchor::VPos;

use crate::life::Run;
use crate::life::Sample;

const SIZE: (u32, u32) = (1000, 520);
/// The colours of Okabe and Ito's colour-blind safe palette that are legible on white. With more
/// runs than colours, the colours repeat.
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
];
const GUEST: RGBColor = RGBColor(90, 90, 90);
const PHASE: RGBColor = RGBColor(180, 180, 180);
const MESH: RGBColor = RGBColor(230, 230, 230);

// In pixels.
/// Height of a row of the legend.
const ROW: i32 = 20;
/// Width of a phase's name, which is written upwards next to its line.
const NAME: i32 = 16;
/// Space between a name and anything else.
const GAP: i32 = 5;

/// Points: seconds or number of guests, and MiB.
type Line = Vec<(f64, f64)>;
type Pixel = (i32, i32);

/// Draws the runs; there must be at least one.
pub fn svg(title: &str, x_label: &str, runs: &[Run]) -> Result<String> {
    let mut text = String::new();
    draw(&mut text, title, x_label, runs)?;
    Ok(text)
}

fn draw(text: &mut String, title: &str, x_label: &str, runs: &[Run]) -> Result<()> {
    let first = &runs[0];
    let hosts: Vec<Line> = runs.iter().map(host).collect();
    let guest = guest(first);
    let points = || hosts.iter().chain(&guest).flatten();
    let starts = first.phases.iter().map(|phase| phase.at);
    let seconds = points().map(|point| point.0).chain(starts.clone());
    let seconds = seconds.fold(1.0, f64::max);
    let mib = points().map(|point| point.1).fold(1.0, f64::max) * 1.05;
    let phases: Vec<Line> = starts
        .map(|start| vec![(start, 0.0), (start, mib)])
        .collect();

    let styles = COLOURS.iter().cycle().map(|colour| colour.stroke_width(2));
    let titles = runs.iter().map(|run| run.title.clone());
    let mut legend: Vec<(String, ShapeStyle)> = titles.zip(styles).collect();
    if !guest.is_empty() {
        let title = format!("{}: what the guest itself uses", first.title);
        legend.push((title, GUEST.stroke_width(1)));
    }

    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let under_title = root.titled(title, style(22))?;
    let (rows, plot) = under_title.split_vertically(ROW * legend.len() as i32);
    for ((title, line), y) in legend.iter().zip((ROW / 2..).step_by(ROW as usize)) {
        rows.draw(&PathElement::new([(70, y), (100, y)], *line))?;
        let style = style(16).pos(Pos::new(HPos::Left, VPos::Center));
        rows.draw(&Text::new(title.as_str(), (110, y), style))?;
    }

    let mut chart = ChartBuilder::on(&plot)
        .margin(8)
        .margin_right(20)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..seconds, 0.0..mib)?;
    chart
        .configure_mesh()
        .max_light_lines(1)
        .bold_line_style(MESH)
        .axis_style(BLACK)
        .label_style(style(15))
        .axis_desc_style(style(16))
        .x_desc(x_label)
        .y_desc("MiB of host memory")
        .x_label_formatter(&tick)
        .y_label_formatter(&tick)
        .draw()?;
    for line in &phases {
        chart.draw_series(LineSeries::new(line.clone(), PHASE))?;
    }
    for line in &guest {
        chart.draw_series(LineSeries::new(line.clone(), GUEST))?;
    }
    for (line, (_, style)) in hosts.iter().zip(&legend) {
        chart.draw_series(LineSeries::new(line.clone(), *style))?;
    }

    // The name of a phase goes next to the phase's line, as high as there is room: to the right, or else
    // to the left if no other phase's line is there. Otherwise it overlaps a run's line rather than a name.
    let segments = |lines: &[Line]| -> Vec<(Pixel, Pixel)> {
        let pixel = |point| chart.backend_coord(point);
        let pairs = lines.iter().flat_map(|line| line.windows(2));
        pairs
            .map(|ends| (pixel(&ends[0]), pixel(&ends[1])))
            .collect()
    };
    let lines = [segments(&hosts), segments(&guest)].concat();
    let phases = segments(&phases);
    let mut names = vec![];
    let style = style(15).pos(Pos::new(HPos::Right, VPos::Top));
    let upwards = style.transform(FontTransform::Rotate270);
    for (phase, &((x, bottom), (_, top))) in first.phases.iter().zip(&phases) {
        let (length, _) = root.estimate_text_size(&phase.name, &style)?;
        let length = length as i32;
        let at = |x, taken: &[&[(Pixel, Pixel)]]| {
            let spans = taken
                .iter()
                .copied()
                .flatten()
                .filter(|&&((x1, _), (x2, _))| x1.max(x2) > x && x1.min(x2) < x + NAME)
                .map(|&((_, y1), (_, y2))| (y1.min(y2), y1.max(y2)));
            Some((
                x,
                place(spans.collect(), (top + GAP, bottom - GAP), length)?,
            ))
        };
        let (x, y) = at(x, &[&names, &lines])
            .or_else(|| at(x - NAME, &[&names, &lines, &phases]))
            .or_else(|| at(x, &[&names]))
            .unwrap_or((x, top + GAP));
        root.draw(&Text::new(phase.name.as_str(), (x + 2, y), upwards.clone()))?;
        names.push(((x, y), (x + NAME, y + length)));
    }
    root.present()?;
    Ok(())
}

fn style(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().into()
}

fn host(run: &Run) -> Line {
    let point = |sample: &Sample| (sample.at, mib(sample.host_kib));
    run.samples.iter().map(point).collect()
}

/// A line for each period in which the guest could be queried.
fn guest(run: &Run) -> Vec<Line> {
    let point = |sample: &Sample| Some((sample.at, mib(sample.guest_used_kib?)));
    run.samples
        .split(|sample| sample.guest_used_kib.is_none())
        .filter(|stretch| !stretch.is_empty())
        .map(|stretch| stretch.iter().filter_map(point).collect())
        .collect()
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// Formats a number on an axis, without binary rounding errors.
fn tick(value: &f64) -> String {
    ((value * 100.0).round() / 100.0).to_string()
}

/// Finds the highest place for a name of this length that keeps its distance from the `taken` spans.
fn place(mut taken: Vec<(i32, i32)>, (top, bottom): (i32, i32), length: i32) -> Option<i32> {
    taken.sort_unstable();
    taken.push((bottom + GAP, bottom));
    let mut y = top;
    for (start, end) in taken {
        if start - y >= length + GAP {
            return Some(y);
        }
        y = y.max(end + GAP);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_their_distance() {
        let place = |taken: &[(i32, i32)]| place(taken.to_vec(), (100, 300), 50);
        assert_eq!(place(&[]), Some(100));
        assert_eq!(place(&[(170, 180), (90, 120)]), Some(185));
        assert_eq!(place(&[(170, 180), (90, 105)]), Some(110));
        assert_eq!(place(&[(90, 245)]), Some(250));
        assert_eq!(place(&[(90, 246)]), None);
        assert_eq!(place(&[(140, 260)]), None);
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Growth curves: the cost of an unmap against the number of VMAs, or of other processes that map the page.

use anyhow::Result;
use plotters::backend::SVGBackend;
use plotters::chart::ChartBuilder;
use plotters::coord::combinators::IntoLogRange;
use plotters::drawing::IntoDrawingArea;
use plotters::element::Circle;
use plotters::element::PathElement;
use plotters::element::Text;
use plotters::series::LineSeries;
use plotters::series::PointSeries;
use plotters::style::BLACK;
use plotters::style::Color;
use plotters::style::IntoFont;
use plotters::style::RGBColor;
use plotters::style::TextStyle;
use plotters::style::WHITE;

use crate::measures::Measures;

const SIZE: (u32, u32) = (1000, 420);
/// Colours from Okabe and Ito's colour-blind safe palette.
const SUBJECTS: [(&str, RGBColor); 5] = [
    ("device", RGBColor(0, 114, 178)),
    ("ioctl", RGBColor(213, 94, 0)),
    ("memfd", RGBColor(0, 158, 115)),
    ("tmpfs", RGBColor(204, 121, 167)),
    ("private", RGBColor(90, 90, 90)),
];
const MESH: RGBColor = RGBColor(230, 230, 230);
/// Height of the legend, in pixels.
const ROW: i32 = 20;
const CAPTION: u32 = 16;

pub fn svg(measures: &Measures) -> Result<String> {
    let mut text = String::new();
    draw(&mut text, measures)?;
    Ok(text)
}

/// Names of the benchmarks that have a curve, in order.
fn curves(measures: &Measures) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for measure in measures.0.iter().filter(|m| m.at.is_some()) {
        if !names.contains(&measure.name.as_str()) {
            names.push(&measure.name);
        }
    }
    names
}

fn draw(text: &mut String, measures: &Measures) -> Result<()> {
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (legend, plots) = root.split_vertically(ROW + 8);
    for (number, (subject, colour)) in (0..).zip(SUBJECTS) {
        let (x, y) = (60 + 150 * number, ROW / 2 + 4);
        legend.draw(&PathElement::new(
            [(x, y), (x + 30, y)],
            colour.stroke_width(2),
        ))?;
        let place = (x + 40, y - 8);
        legend.draw(&Text::new(subject, place, style(16)))?;
    }
    let names = curves(measures);
    let areas = plots.split_evenly((1, names.len().max(1)));
    for (name, area) in names.iter().zip(&areas) {
        let points = |subject: &str| -> Vec<(f64, f64)> {
            let of_subject = measures
                .0
                .iter()
                .filter(|m| m.name == *name && m.subject == subject);
            of_subject
                .filter_map(|m| Some((m.at? as f64, m.value)))
                .collect()
        };
        let all: Vec<(f64, f64)> = SUBJECTS.iter().flat_map(|s| points(s.0)).collect();
        let most = |of: fn(&(f64, f64)) -> f64| all.iter().map(of).fold(1.0, f64::max);
        let least = all.iter().map(|point| point.0).fold(f64::MAX, f64::min);
        let xs = (least..most(|point| point.0) * 1.2).log_scale();
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .caption(name, style(CAPTION))
            .x_label_area_size(28)
            .y_label_area_size(60)
            .build_cartesian_2d(xs, 0.0..most(|point| point.1) * 1.1)?;
        chart
            .configure_mesh()
            .max_light_lines(1)
            .bold_line_style(MESH)
            .axis_style(BLACK)
            .label_style(style(14))
            .axis_desc_style(style(14))
            .y_desc("instructions")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .draw()?;
        for (subject, colour) in SUBJECTS {
            chart.draw_series(LineSeries::new(points(subject), colour.stroke_width(2)))?;
            chart.draw_series(PointSeries::of_element(
                points(subject),
                3,
                colour.filled(),
                &|point, size, style| Circle::new(point, size, style),
            ))?;
        }
    }
    root.present()?;
    Ok(())
}

fn style(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().into()
}

//! The results as a picture: for each row how many times slower than the bare processor Berth and
//! QEMU are, on a logarithmic scale.

use std::path::Path;

use anyhow::{Context, Result, bail};
use svg::Document;
use svg::node::element::{Group, Line, Rectangle, Text};

use crate::bench::results::{Results, Row};
use crate::bench::system::System;

const WIDTH: f64 = 860.0;
/// Where the bars begin, right of the names.
const LEFT: f64 = 150.0;
/// Space right of the bars, for their values.
const RIGHT: f64 = 50.0;
const TOP: f64 = 60.0;
const ROW_HEIGHT: f64 = 24.0;
const BAR_HEIGHT: f64 = 9.0;
const BERTH_COLOR: &str = "#1f6feb";
const QEMU_COLOR: &str = "#d9822b";
/// Readable on a light and on a dark page.
const TEXT_COLOR: &str = "#768390";

/// Writes the picture.
pub fn write(results: &Results, path: &Path) -> Result<()> {
    let document = draw(results)?;
    svg::save(path, &document).with_context(|| path.display().to_string())
}

/// The ratios of a row; QEMU may not have been measured.
struct Bars<'a> {
    row: &'a Row,
    berth: f64,
    qemu: Option<f64>,
}

fn draw(results: &Results) -> Result<Document> {
    let bars: Vec<Bars> = results
        .rows
        .iter()
        .filter(|row| row.group != "scaling")
        .filter_map(|row| {
            let berth = row.ratio(System::Berth, System::Native)?;
            Some(Bars { row, berth, qemu: row.ratio(System::Qemu, System::Native) })
        })
        .collect();
    if bars.is_empty() {
        bail!("nothing to plot: no row was measured natively and in berth");
    }
    let values = || bars.iter().flat_map(|bar| [Some(bar.berth), bar.qemu]).flatten();
    let scale = Scale::around(values());
    let height = TOP + ROW_HEIGHT * bars.len() as f64 + 10.0;
    let mut document = Document::new()
        .set("viewBox", (0, 0, WIDTH, height))
        .set("font-family", "sans-serif")
        .set("font-size", 11)
        .set("fill", TEXT_COLOR)
        .add(text("times the bare processor needs; shorter is better", LEFT, 18.0, "start"))
        .add(rectangle(LEFT, 28.0, 12.0, BERTH_COLOR))
        .add(text("Berth", LEFT + 18.0, 36.0, "start"))
        .add(rectangle(LEFT + 70.0, 28.0, 12.0, QEMU_COLOR))
        .add(text("QEMU TCG", LEFT + 88.0, 36.0, "start"))
        .add(axis(&scale, height));
    for (index, bar) in bars.iter().enumerate() {
        let y = TOP + ROW_HEIGHT * index as f64;
        document = document.add(text(&bar.row.name, LEFT - 8.0, y + 13.0, "end"));
        let shown = [(Some(bar.berth), BERTH_COLOR), (bar.qemu, QEMU_COLOR)];
        for (line, (value, color)) in shown.into_iter().enumerate() {
            let Some(value) = value else { continue };
            let y = y + line as f64 * (BAR_HEIGHT + 1.0);
            let (from, to) = (scale.x(1.0_f64.min(value)), scale.x(1.0_f64.max(value)));
            document = document.add(rectangle(from, y, (to - from).max(1.0), color)).add(
                text(&times(value), to + 4.0, y + BAR_HEIGHT - 0.5, "start").set("font-size", 9),
            );
        }
    }
    Ok(document)
}

/// Powers of ten around all values, and 1.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    fn around(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = (0.0_f64, 1.0_f64);
        for value in values {
            low = low.min(value.log10().floor());
            high = high.max(value.log10().ceil());
        }
        Self { low, high }
    }

    fn x(&self, value: f64) -> f64 {
        let part = (value.log10() - self.low) / (self.high - self.low);
        LEFT + part * (WIDTH - LEFT - RIGHT)
    }
}

fn axis(scale: &Scale, height: f64) -> Group {
    let mut group = Group::new();
    for power in scale.low as i32..=scale.high as i32 {
        let value = 10.0_f64.powi(power);
        let x = scale.x(value);
        let line = Line::new()
            .set("x1", x)
            .set("x2", x)
            .set("y1", TOP - 6.0)
            .set("y2", height - 8.0)
            .set("stroke", TEXT_COLOR)
            .set("stroke-opacity", if power == 0 { 0.9 } else { 0.3 });
        group = group.add(line).add(text(&format!("{value}"), x, TOP - 10.0, "middle"));
    }
    group
}

fn rectangle(x: f64, y: f64, width: f64, color: &str) -> Rectangle {
    Rectangle::new()
        .set("x", x)
        .set("y", y)
        .set("width", width)
        .set("height", BAR_HEIGHT)
        .set("fill", color)
}

fn text(content: &str, x: f64, y: f64, anchor: &str) -> Text {
    Text::new(content).set("x", x).set("y", y).set("text-anchor", anchor)
}

fn times(value: f64) -> String {
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::Sample;

    #[test]
    fn rows_have_bars_of_their_ratio() {
        let mut results = Results::default();
        assert!(draw(&results).is_err());
        for (system, time) in [(System::Native, 2.0), (System::Berth, 3.0), (System::Qemu, 200.0)] {
            results.add(system, "row<1>", "user", "", Sample::new(&[time]).unwrap());
        }
        let picture = draw(&results).unwrap().to_string();
        assert!(picture.contains("row&lt;1&gt;"), "{picture}");
        assert!(picture.contains("\n1.5\n") || picture.contains(">1.5<"), "{picture}");
        assert!(picture.contains("\n100\n") || picture.contains(">100<"), "{picture}");
        let scale = Scale::around([0.5, 30.0].into_iter());
        assert!((scale.x(0.1) - LEFT).abs() < 1e-9);
        assert!((scale.x(100.0) - (WIDTH - RIGHT)).abs() < 1e-9);
    }
}

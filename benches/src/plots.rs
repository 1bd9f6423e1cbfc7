//! The plots: what a report holds, drawn as SVG files beside it. Latency by measure and by the number of live clones,
//! memory by the number of clones, and a start by its steps.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::{self, Measure, Report, Unit};

/// Measures of `latency.svg` from the top down, and who is measured.
const STARTS: [(&str, Who); 15] = [
    ("process_first_byte", Who::Host),
    ("kvm_floor", Who::Host),
    ("fork_first_instruction", Who::Picovm),
    ("fork_first_byte", Who::Picovm),
    ("parked_first_byte", Who::Picovm),
    ("engine_first_byte", Who::Picovm),
    ("run_first_byte", Who::Picovm),
    ("warm_python", Who::Picovm),
    ("cold_python", Who::Picovm),
    ("warm_redis", Who::Picovm),
    ("cold_redis", Who::Picovm),
    ("crun_first_byte", Who::Peer),
    ("runc_first_byte", Who::Peer),
    ("firecracker_restore", Who::Peer),
    ("cloud_hypervisor_restore", Who::Peer),
];

/// Least width of a plot, in pixels as everything here.
const WIDTH: u32 = 960;
const MARGIN: i32 = 20;
/// Title, clock, host and colours.
const HEADING: i32 = 108;
/// Figures at the ticks of the horizontal axis, and its name.
const AXIS: u32 = 52;
/// The same of the vertical axis.
const VERTICAL_AXIS: u32 = 76;
/// Right of a plot: half of a figure may stand out there.
const RIGHT: u32 = 44;
/// Between the middles of two measures.
const ROW: u32 = 46;
/// Between the middles of two bars.
const BAR: u32 = 48;
/// Between two lines of a table.
const LINE: u32 = 22;
/// No character of a table is wider.
const CHARACTER: u32 = 8;
/// Characters of a name for which room is made.
const NAME_MAX: usize = 60;
/// Values beyond are mistakes and would make axes on which nothing else can be seen.
const VALUE_MAX: f64 = 1e9;
/// The same at the small end of a logarithmic axis.
const LOGARITHM_MIN: f64 = 1e-6;
/// Of more points a curve is a cloud: they are smaller, and no line leads from one to the next.
const FEW_POINTS: usize = 60;

const TEXT: RGBColor = RGBColor(32, 32, 32);
const PALE: RGBColor = RGBColor(96, 96, 96);
const GRID: RGBColor = RGBColor(224, 224, 224);
const BLUE: RGBColor = RGBColor(31, 104, 180);
const ORANGE: RGBColor = RGBColor(214, 94, 0);
/// Of steps that follow each other; after the last the first comes again.
const PALETTE: [RGBColor; 10] = [
    RGBColor(78, 121, 167),
    RGBColor(242, 142, 43),
    RGBColor(225, 87, 89),
    RGBColor(118, 183, 178),
    RGBColor(89, 161, 79),
    RGBColor(237, 201, 72),
    RGBColor(176, 122, 161),
    RGBColor(255, 157, 167),
    RGBColor(156, 117, 95),
    RGBColor(186, 176, 172),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws what there are figures for, and removes what an earlier run drew and this one has no figures for. Gives the
/// paths of the files.
pub fn draw(report: &Report, directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let plots = [
        ("latency.svg", latency(report)),
        ("latency-by-live-clones.svg", latency_by_live_clones(report)),
        ("memory-by-clones.svg", memory_by_clones(report)),
        ("start-steps.svg", start_steps(report)),
    ];
    let mut paths = Vec::new();
    for (name, plot) in plots {
        let path = directory.join(name);
        match plot.with_context(|| format!("cannot draw {name}"))? {
            Some(svg) => {
                report::write_whole(&path, svg.as_bytes())
                    .with_context(|| format!("cannot write {}", path.display()))?;
                paths.push(path);
            }
            None => match std::fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            },
        }
    }
    Ok(paths)
}

/// Who is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    /// The host alone: what every start contains.
    Host,
    Picovm,
    /// What picovm is compared with.
    Peer,
}

impl Who {
    const ALL: [Self; 3] = [Self::Host, Self::Picovm, Self::Peer];

    fn color(self) -> RGBColor {
        match self {
            Self::Host => PALE,
            Self::Picovm => BLUE,
            Self::Peer => ORANGE,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Host => "the host alone",
            Self::Picovm => "picovm",
            Self::Peer => "others",
        }
    }
}

/// One row for each measure of a start, on a logarithmic axis.
fn latency(report: &Report) -> anyhow::Result<Option<String>> {
    let rows: Vec<(Who, &Measure, Vec<f64>)> = STARTS
        .iter()
        .filter_map(|(name, who)| {
            let measure = report
                .measures
                .iter()
                .find(|measure| measure.name == *name && measure.unit == Unit::Ms)?;
            let mut values = measure.values.clone();
            values.retain(|value| has_logarithm(*value));
            (!values.is_empty()).then_some((*who, measure, values))
        })
        .collect();
    let all = || rows.iter().flat_map(|(_, _, values)| values.iter().copied());
    let (Some(low), Some(high)) = (all().reduce(f64::min), all().reduce(f64::max)) else {
        return Ok(None);
    };
    let axis = Axis::logarithmic(low, high);
    let left = axis.range.start;
    let keys: Vec<_> = Who::ALL
        .into_iter()
        .filter(|who| rows.iter().any(|row| row.0 == *who))
        .map(|who| (who.color(), who.name().to_owned()))
        .collect();
    let count = u32::try_from(rows.len())?;
    let labels = width_of(rows.iter().map(|(_, measure, _)| measure.name.as_str()));

    let title = "Latency of a start: a dot is one start, a bar the median";
    let body = (WIDTH, count * ROW + AXIS + ROW / 2);
    sheet(report, title, &keys, body, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_right(RIGHT)
            .margin_bottom(ROW / 2)
            .x_label_area_size(AXIS)
            .y_label_area_size(labels)
            .build_cartesian_2d(axis, Axis::rows(count))?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .bold_line_style(GRID)
            .axis_style(PALE)
            .label_style(text(12, TEXT))
            .x_desc("latency, ms (logarithmic)")
            .axis_desc_style(text(13, TEXT))
            .draw()?;
        for (row, (who, measure, values)) in (0..count).rev().zip(&rows) {
            // The figure stands in the upper part of the row, the marks in the lower.
            let middle = f64::from(row) + 0.4;
            let color = who.color();
            let radius = if values.len() <= FEW_POINTS { 3 } else { 2 };
            let name = at(&measure.name, (-8, 0), text(13, TEXT), HPos::Right);
            chart.draw_series([EmptyElement::at((left, middle)) + name])?;
            chart.draw_series(values.iter().zip(0i32..).map(|(value, index)| {
                // Equal values would lie on each other.
                let height = index.wrapping_mul(7).rem_euclid(13) - 6;
                EmptyElement::at((*value, middle))
                    + Circle::new((0, height), radius, color.mix(0.45).filled())
            }))?;
            if has_logarithm(measure.median) {
                let bar = Rectangle::new([(-2, -11), (2, 11)], color.filled());
                let figure = at(
                    &significant(measure.median),
                    (0, -19),
                    text(13, color),
                    HPos::Center,
                );
                chart.draw_series([EmptyElement::at((measure.median, middle)) + bar + figure])?;
            }
        }
        Ok(())
    })
    .map(Some)
}

fn latency_by_live_clones(report: &Report) -> anyhow::Result<Option<String>> {
    let starts = points(report, "start_ms_by_live_clones", 1.0);
    curves(
        report,
        "Latency of a start while other clones live",
        ("live clones", "latency of a start, ms"),
        vec![("a start".to_owned(), BLUE, starts)],
    )
}

fn memory_by_clones(report: &Report) -> anyhow::Result<Option<String>> {
    let lines = [
        ("live", "live_kib_by_clones", BLUE),
        ("parked", "parked_kib_by_clones", ORANGE),
    ]
    .map(|(state, curve, color)| {
        let points = points(report, curve, 1024.0);
        let each = match points.last() {
            Some([clones, mib]) if *clones >= 1.0 => {
                format!(": {:.2} MiB each at {}", mib / clones, plain(*clones))
            }
            _ => String::new(),
        };
        (format!("{state} clones{each}"), color, points)
    });
    curves(
        report,
        "Memory that clones take of the host's MemAvailable",
        ("clones", "memory of all of them, MiB"),
        lines.into(),
    )
}

/// Points of a curve from the left to the right, `y` divided by `divisor`, without those that no measurement can give.
fn points(report: &Report, curve: &str, divisor: f64) -> Vec<[f64; 2]> {
    let mut points: Vec<[f64; 2]> = report
        .curves
        .get(curve)
        .into_iter()
        .flatten()
        .map(|[x, y]| [*x, y / divisor])
        .filter(|[x, y]| (0.0..VALUE_MAX).contains(x) && y.abs() < VALUE_MAX)
        .collect();
    points.sort_by(|[one, _], [other, _]| one.total_cmp(other));
    points
}

/// Lines (name, colour, points) over each other, on axes from zero.
fn curves(
    report: &Report,
    title: &str,
    (x_name, y_name): (&str, &str),
    mut lines: Vec<(String, RGBColor, Vec<[f64; 2]>)>,
) -> anyhow::Result<Option<String>> {
    lines.retain(|(_, _, points)| !points.is_empty());
    if lines.is_empty() {
        return Ok(None);
    }
    let all = || lines.iter().flat_map(|(_, _, points)| points);
    // Clones come in whole numbers.
    let x_axis = Axis::linear(0.0, all().fold(0.0, |most, [x, _]| most.max(*x)), 1.0);
    let y_axis = Axis::linear(
        all().fold(0.0, |least, [_, y]| least.min(*y)),
        all().fold(0.0, |most, [_, y]| most.max(*y)),
        0.001,
    );
    let keys: Vec<_> = lines
        .iter()
        .map(|(name, color, _)| (*color, name.clone()))
        .collect();
    sheet(report, title, &keys, (WIDTH, 460), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(10)
            .margin_left(10)
            .margin_right(RIGHT)
            .margin_bottom(10)
            .x_label_area_size(AXIS)
            .y_label_area_size(VERTICAL_AXIS)
            .build_cartesian_2d(x_axis, y_axis)?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .axis_style(PALE)
            .label_style(text(12, TEXT))
            .x_desc(x_name)
            .y_desc(y_name)
            .axis_desc_style(text(13, TEXT))
            .draw()?;
        for (_, color, points) in &lines {
            let few = points.len() <= FEW_POINTS;
            let line: Vec<(f64, f64)> = points.iter().map(|[x, y]| (*x, *y)).collect();
            let radius = if few { 4 } else { 2 };
            chart.draw_series(
                line.iter()
                    .map(|point| Circle::new(*point, radius, color.filled())),
            )?;
            if few {
                chart.draw_series([PathElement::new(line, color.mix(0.6).stroke_width(1))])?;
            }
        }
        Ok(())
    })
    .map(Some)
}

/// One bar for each kind of start, one piece for each of its steps, and a table of them.
fn start_steps(report: &Report) -> anyhow::Result<Option<String>> {
    let bars: Vec<(&str, Vec<(&str, f64)>)> = report
        .steps
        .iter()
        .filter_map(|(bar, steps)| {
            let steps: Vec<_> = steps
                .iter()
                .map(|(step, ms)| (step.as_str(), *ms))
                .filter(|(_, ms)| (0.0..VALUE_MAX).contains(ms))
                .collect();
            (!steps.is_empty()).then_some((bar.as_str(), steps))
        })
        .collect();
    if bars.is_empty() {
        return Ok(None);
    }
    // All in one order; a step has the same colour in every bar.
    let mut steps: Vec<&str> = Vec::new();
    for (_, own) in &bars {
        let mut next = 0;
        for (step, _) in own {
            let place = steps.iter().position(|one| one == step).unwrap_or_else(|| {
                steps.insert(next, step);
                next
            });
            next = place + 1;
        }
    }
    let colors: BTreeMap<&str, RGBColor> = steps.iter().copied().zip(PALETTE.into_iter().cycle()).collect();
    let total = |steps: &[(&str, f64)]| steps.iter().map(|(_, ms)| ms).sum::<f64>();
    let longest = bars.iter().map(|(_, steps)| total(steps)).fold(0.0, f64::max);
    // Room for the sum at the end of the longest bar.
    let axis = Axis::linear(0.0, longest * 1.1, 0.001);

    let count = u32::try_from(bars.len())?;
    let label = width_of(bars.iter().map(|(bar, _)| *bar));
    let step_column = width_of(steps.iter().copied().chain(["in all"])) + LINE;
    let column = label.max(12 * CHARACTER);
    let chart_height = count * BAR + AXIS + BAR / 2;
    let table_height = LINE * (u32::try_from(steps.len())? + 3);
    let size = (
        WIDTH.max(step_column + count * column + 2 * RIGHT),
        chart_height + table_height,
    );
    sheet(report, "A start by its steps", &[], size, |area| {
        let (upper, lower) = area.split_vertically(chart_height);
        let mut chart = ChartBuilder::on(&upper)
            .margin_right(RIGHT)
            .margin_bottom(BAR / 2)
            .x_label_area_size(AXIS)
            .y_label_area_size(label)
            .build_cartesian_2d(axis, Axis::rows(count))?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .bold_line_style(GRID)
            .axis_style(PALE)
            .label_style(text(12, TEXT))
            .x_desc("time since the start, ms")
            .axis_desc_style(text(13, TEXT))
            .draw()?;
        for (row, (bar, steps)) in (0..count).rev().zip(&bars) {
            let middle = f64::from(row) + 0.5;
            let name = at(bar, (-8, 0), text(13, TEXT), HPos::Right);
            chart.draw_series([EmptyElement::at((0.0, middle)) + name])?;
            let mut from = 0.0;
            for (step, ms) in steps {
                let color = colors.get(step).copied().unwrap_or(PALE);
                let corners = [(from, middle - 0.3), (from + ms, middle + 0.3)];
                chart.draw_series([Rectangle::new(corners, color.filled())])?;
                from += ms;
            }
            let sum = at(
                &format!("{} ms", significant(from)),
                (6, 0),
                text(13, TEXT),
                HPos::Left,
            );
            chart.draw_series([EmptyElement::at((from, middle)) + sum])?;
        }

        // The table: a column of steps, and one of milliseconds for each bar.
        let line = |number: usize| i32::try_from(number * LINE as usize).unwrap_or(i32::MAX / 2);
        let end_of = |column_number: usize| {
            let end = step_column as usize + (column_number + 1) * column as usize;
            i32::try_from(end).unwrap_or(i32::MAX / 2) + MARGIN
        };
        let names = MARGIN + LINE.cast_signed();
        lower.draw(&at("step", (names, line(0)), text(13, PALE), HPos::Left))?;
        for (number, step) in steps.iter().enumerate() {
            let y = line(number + 1);
            let color = colors.get(step).copied().unwrap_or(PALE);
            let swatch = [(MARGIN, y - 6), (MARGIN + 12, y + 6)];
            lower.draw(&Rectangle::new(swatch, color.filled()))?;
            lower.draw(&at(step, (names, y), text(13, TEXT), HPos::Left))?;
        }
        let last = steps.len() + 1;
        lower.draw(&at("in all", (names, line(last)), text(13, PALE), HPos::Left))?;
        for (number, (bar, own)) in bars.iter().enumerate() {
            let x = end_of(number);
            let cell = |row, content: &str, color| at(content, (x, line(row)), text(13, color), HPos::Right);
            lower.draw(&cell(0, &format!("{bar}, ms"), PALE))?;
            for (row, step) in steps.iter().enumerate() {
                let same: Vec<f64> = own
                    .iter()
                    .filter(|(one, _)| one == step)
                    .map(|(_, ms)| *ms)
                    .collect();
                if !same.is_empty() {
                    lower.draw(&cell(row + 1, &format!("{:.3}", same.iter().sum::<f64>()), TEXT))?;
                }
            }
            lower.draw(&cell(last, &format!("{:.3}", total(own)), PALE))?;
        }
        Ok(())
    })
    .map(Some)
}

/// An SVG file: title, clock, host and a line of colours with what they mean, and below, in so many pixels, what `body`
/// draws.
fn sheet(
    report: &Report,
    title: &str,
    keys: &[(RGBColor, String)],
    (width, height): (u32, u32),
    body: impl FnOnce(&Area<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let backend = SVGBackend::with_string(&mut svg, (width, height + HEADING.cast_unsigned()));
        let whole = backend.into_drawing_area();
        whole.fill(&WHITE)?;
        let (heading, below) = whole.split_vertically(HEADING);
        heading.draw(&at(title, (MARGIN, 22), text(18, TEXT), HPos::Left))?;
        let clock = format!("clock: {}", report.clock);
        heading.draw(&at(&clock, (MARGIN, 46), text(12, PALE), HPos::Left))?;
        let host = format!("host: {}", report.host);
        heading.draw(&at(&host, (MARGIN, 64), text(12, PALE), HPos::Left))?;
        let mut x = MARGIN;
        for (color, meaning) in keys {
            heading.draw(&Rectangle::new([(x, 82), (x + 12, 94)], color.filled()))?;
            heading.draw(&at(meaning, (x + 18, 88), text(13, TEXT), HPos::Left))?;
            x += 18 + width_of([meaning.as_str()]).cast_signed();
        }
        body(&below)?;
        whole.present()?;
    }
    Ok(svg)
}

/// A font of so many pixels. The crate takes its size for a line with what is between lines.
fn text(pixels: u32, color: RGBColor) -> TextStyle<'static> {
    ("sans-serif", f64::from(pixels) * 1.24).into_font().color(&color)
}

/// Text whose middle line is at a position that is its left end, centre or right end.
fn at(
    content: &str,
    position: (i32, i32),
    style: TextStyle<'static>,
    end: HPos,
) -> Text<'static, (i32, i32), String> {
    Text::new(
        content.to_owned(),
        position,
        style.pos(Pos::new(end, VPos::Center)),
    )
}

/// Pixels that suffice for each of these names, and a gap.
fn width_of<'a>(names: impl IntoIterator<Item = &'a str>) -> u32 {
    let longest = names.into_iter().map(|name| name.chars().count()).max();
    let characters = longest.unwrap_or_default().min(NAME_MAX) + 3;
    u32::try_from(characters).unwrap_or_default() * CHARACTER
}

/// Whether a value can stand on a logarithmic axis.
fn has_logarithm(value: f64) -> bool {
    (LOGARITHM_MIN..VALUE_MAX).contains(&value)
}

/// An axis with round ticks. Those of the crate choose their own, and not the same for a logarithmic one.
#[derive(Debug, PartialEq)]
struct Axis {
    range: Range<f64>,
    logarithmic: bool,
    ticks: Vec<f64>,
}

impl Axis {
    /// Room for positive values from `low` to `high`, with ticks at 1, 2 and 5 times powers of ten; at the powers alone if
    /// there are many.
    fn logarithmic(low: f64, high: f64) -> Self {
        let all: Vec<(f64, bool)> = (-8..=10)
            .flat_map(|power| [1.0, 2.0, 5.0].map(|digit| (digit * 10f64.powi(power), digit == 1.0)))
            .collect();
        let values = || all.iter().map(|(value, _)| *value);
        let start = values().rfind(|value| *value < low).unwrap_or(low / 2.0);
        let end = values().find(|value| *value > high).unwrap_or(high * 2.0);
        let few = end / start <= 1e4;
        let ticks = all
            .into_iter()
            .filter(|(value, power)| (start..=end).contains(value) && (few || *power))
            .map(|(value, _)| value)
            .collect();
        Self {
            range: start..end,
            logarithmic: true,
            ticks,
        }
    }

    /// Room for values from `low` to `high`, which are finite; no two ticks are closer than `least`.
    fn linear(low: f64, high: f64, least: f64) -> Self {
        let wanted = ((high - low) / 8.0).max(least);
        let power = 10f64.powf(wanted.log10().floor());
        let step = [1.0, 2.0, 5.0]
            .map(|digit| digit * power)
            .into_iter()
            .find(|step| *step >= wanted * (1.0 - 1e-9))
            .unwrap_or(10.0 * power);
        let first = (low / step).floor() as i64;
        let last = ((high / step).ceil() as i64).max(first + 1);
        Self {
            range: first as f64 * step..last as f64 * step,
            logarithmic: false,
            ticks: (first..=last).map(|tick| tick as f64 * step).collect(),
        }
    }

    /// Room for so many rows of height 1, without ticks.
    fn rows(count: u32) -> Self {
        Self {
            range: 0.0..f64::from(count),
            logarithmic: false,
            ticks: Vec::new(),
        }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let scaled = |value: f64| if self.logarithmic { value.ln() } else { value };
        let (start, end) = (scaled(self.range.start), scaled(self.range.end));
        let part = (scaled(*value) - start) / (end - start);
        let pixels = f64::from(limit.1) - f64::from(limit.0);
        (f64::from(limit.0) + part * pixels).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Between the ticks there are no lines.
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        plain(*value)
    }
}

/// A number with no more digits than it needs, up to six after the point.
fn plain(value: f64) -> String {
    let digits = format!("{value:.6}");
    digits.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A figure with about three digits.
fn significant(value: f64) -> String {
    match value.abs() {
        0.0..1.0 => format!("{value:.3}"),
        1.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: [&str; 4] = [
        "latency.svg",
        "latency-by-live-clones.svg",
        "memory-by-clones.svg",
        "start-steps.svg",
    ];

    /// Something like the figures of a good run.
    fn full() -> Report {
        let mut report = Report::empty();
        let medians: [f64; STARTS.len()] = [
            1.13, 0.31, 0.8, 15.8, 3.1, 4.2, 23.8, 40.8, 894.0, 85.1, 991.0, 31.0, 42.0, 9.7, 28.0,
        ];
        for ((name, _), median) in STARTS.iter().zip(medians) {
            let values = (0..50).map(|round: i32| median * (0.97 + 0.002 * f64::from((round * 37) % 50)));
            report.add((*name).into(), Unit::Ms, values.collect());
        }
        let by_clones = |most: i32, step: i32, y: &dyn Fn(f64) -> f64| {
            (0..=most)
                .step_by(step as usize)
                .map(|clones| [f64::from(clones), y(f64::from(clones))])
                .collect::<Vec<_>>()
        };
        let mut curve = |name: &str, points| report.curves.insert(name.into(), points);
        curve(
            "start_ms_by_live_clones",
            by_clones(500, 1, &|n| 3.0 + 0.001 * n + 0.2 * (n * 7.3).sin()),
        );
        curve("live_kib_by_clones", by_clones(500, 25, &|n| 3100.0 * n));
        curve("parked_kib_by_clones", by_clones(500, 25, &|n| 1240.0 * n));
        let steps =
            |steps: &[(&str, f64)]| steps.iter().map(|(name, ms)| ((*name).to_owned(), *ms)).collect();
        report.steps.insert(
            "cold start".into(),
            steps(&[
                ("map the memory", 0.08),
                ("create the VM", 0.62),
                ("create the vCPUs", 0.21),
                ("restore vCPU and interrupt controller state", 0.14),
                ("devices", 0.09),
                ("populate the working set", 1.4),
                ("identity", 0.02),
                ("first instruction", 0.3),
                ("container to its first byte", 2.2),
            ]),
        );
        report.steps.insert(
            "start from the pool".into(),
            steps(&[
                ("take a parked clone", 0.03),
                ("container to its first byte", 2.2),
            ]),
        );
        report
    }

    /// Every element that begins ends, and in the right order.
    fn assert_well_formed(svg: &str) {
        assert!(svg.starts_with("<svg "), "{svg}");
        let mut open = Vec::new();
        for tag in svg.split('<').skip(1) {
            let (tag, content) = tag.split_once('>').unwrap();
            assert!(!content.contains('>'), "{content}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(tag.split(' ').next().unwrap());
            }
        }
        assert_eq!(open, [""; 0]);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    fn drawn(report: &Report) -> Vec<(String, String)> {
        let directory = tempfile::tempdir().unwrap();
        draw(report, directory.path())
            .unwrap()
            .into_iter()
            .map(|path| {
                let svg = std::fs::read_to_string(&path).unwrap();
                assert_well_formed(&svg);
                (path.file_name().unwrap().to_str().unwrap().to_owned(), svg)
            })
            .collect()
    }

    #[test]
    fn an_empty_report_draws_nothing_and_removes_what_is_stale() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(draw(&full(), directory.path()).unwrap().len(), FILES.len());
        let report = directory.path().join("report.json");
        std::fs::write(&report, "{}").unwrap();
        assert!(draw(&Report::empty(), directory.path()).unwrap().is_empty());
        for file in FILES {
            assert!(!directory.path().join(file).exists(), "{file}");
        }
        assert!(report.exists());
    }

    #[test]
    fn a_full_report_draws_every_plot_with_its_names_and_clock() {
        let report = full();
        let plots = drawn(&report);
        assert_eq!(plots.iter().map(|(name, _)| name).collect::<Vec<_>>(), FILES);
        for (_, svg) in &plots {
            assert!(svg.contains(&format!("clock: {}", report.clock)));
            assert!(svg.contains(&report.host));
        }
        let [(_, latency), (_, live), (_, memory), (_, steps)] = plots.as_slice() else {
            panic!("{} plots", plots.len());
        };
        for (name, _) in STARTS {
            assert!(latency.contains(name), "{name}");
        }
        assert!(live.contains("latency of a start, ms"));
        assert!(memory.contains("live clones: 3.03 MiB each at 500"));
        assert!(memory.contains("parked clones: 1.21 MiB each at 500"));
        for (bar, own) in &report.steps {
            assert!(steps.contains(bar.as_str()));
            for (step, ms) in own {
                assert!(
                    steps.contains(step.as_str()) && steps.contains(&format!("{ms:.3}")),
                    "{step}"
                );
            }
        }
    }

    #[test]
    fn a_plot_of_which_there_is_one_value_is_drawn() {
        let mut report = Report::empty();
        report.add("kvm_floor".into(), Unit::Ms, vec![1.0]);
        report
            .curves
            .insert("live_kib_by_clones".into(), vec![[0.0, 0.0]]);
        report
            .steps
            .insert("cold".into(), vec![("all of it".into(), 0.0)]);
        let names: Vec<_> = drawn(&report).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["latency.svg", "memory-by-clones.svg", "start-steps.svg"]);
    }

    #[test]
    fn values_that_no_clock_shows_do_no_harm() {
        let odd = [
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            -1.0,
            -0.0,
            0.0,
            f64::MIN_POSITIVE,
            1e-300,
            f64::MAX,
            1e12,
        ];
        let mut report = Report::empty();
        report.add("kvm_floor".into(), Unit::Ms, odd.into());
        report.add("fork_first_byte".into(), Unit::Exits, vec![1.0]);
        assert!(drawn(&report).is_empty());

        for (name, _) in STARTS {
            let values = odd.into_iter().chain([LOGARITHM_MIN, 3.0, 9e8]);
            report.add(name.into(), Unit::Ms, values.collect());
        }
        let all_pairs = odd.iter().flat_map(|x| odd.map(|y| [*x, y]));
        for curve in ["start_ms_by_live_clones", "live_kib_by_clones"] {
            report.curves.insert(curve.into(), all_pairs.clone().collect());
        }
        let steps = odd.iter().map(|ms| ("<step> & 'more'".to_owned(), *ms));
        report.steps.insert("odd \"bar\"".into(), steps.collect());
        report.steps.insert("without a step".into(), Vec::new());
        assert_eq!(drawn(&report).len(), FILES.len());
    }

    #[test]
    fn axes_have_room_and_round_ticks() {
        let axis = Axis::logarithmic(0.9, 15.0);
        assert_eq!(axis.ticks, [0.5, 1.0, 2.0, 5.0, 10.0, 20.0]);
        assert_eq!(axis.map(&0.5, (100, 0)), 100);
        assert_eq!(axis.map(&10f64.sqrt(), (100, 0)), 50);
        assert_eq!(axis.map(&20.0, (100, 0)), 0);
        assert_eq!(
            Axis::logarithmic(0.03, 700.0).ticks,
            [0.1, 1.0, 10.0, 100.0, 1000.0]
        );
        let axis = Axis::linear(0.0, 480.0, 1.0);
        assert_eq!(axis.ticks, [0.0, 100.0, 200.0, 300.0, 400.0, 500.0]);
        assert_eq!(axis.map(&50.0, (10, 110)), 20);
        assert_eq!(Axis::linear(0.0, 2.0, 1.0).ticks, [0.0, 1.0, 2.0]);
        assert_eq!(Axis::linear(0.0, 0.0, 1.0).ticks, [0.0, 1.0]);
        assert_eq!([plain(0.5), plain(100.0), plain(0.0)], ["0.5", "100", "0"]);
        assert_eq!(
            [0.31, 3.104, 23.81, 146.1].map(significant),
            ["0.310", "3.10", "23.8", "146"]
        );
    }
}

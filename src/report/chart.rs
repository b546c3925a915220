//! A line chart as SVG.

use super::escape;

/// A line chart over a common horizontal axis.
#[derive(Clone, Debug)]
pub struct Chart {
    title: String,
    x_label: String,
    log: bool,
    series: Vec<Series>,
}

/// One line of a chart.
#[derive(Clone, Debug)]
pub struct Series {
    /// What it shows.
    pub name: String,
    /// Points in the order of x.
    pub points: Vec<(f64, f64)>,
    /// Whether it is drawn faintly, as the raw values behind a smoothed line.
    pub faint: bool,
}

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 34.0;
/// More points than the chart has columns cannot be seen.
const MOST_POINTS: usize = 1000;
const COLOURS: usize = 6;

impl Series {
    /// A line.
    pub fn new(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), points, faint: false }
    }

    /// The line's running mean, each value `1 − inertia` of the new and `inertia` of the past, corrected at the start.
    pub fn smoothed(&self, name: &str, inertia: f64) -> Self {
        let (mut sum, mut weight) = (0.0, 0.0);
        let next = |(x, y): &(f64, f64)| {
            sum = inertia * sum + (1.0 - inertia) * y;
            weight = inertia * weight + (1.0 - inertia);
            (*x, sum / weight)
        };
        Self::new(name, self.points.iter().map(next).collect())
    }
}

impl Chart {
    /// An empty chart.
    pub fn new(title: &str, x_label: &str) -> Self {
        Self { title: title.into(), x_label: x_label.into(), log: false, series: Vec::new() }
    }

    /// The same with a logarithmic vertical axis; values that are not positive are left out.
    pub fn logarithmic(mut self) -> Self {
        self.log = true;
        self
    }

    /// The same with another line; one without points is left out.
    pub fn with(mut self, series: Series) -> Self {
        if !series.points.is_empty() {
            self.series.push(series);
        }
        self
    }

    /// What it shows.
    pub fn title(&self) -> &str {
        &self.title
    }

    /// Whether it has no line.
    pub fn is_empty(&self) -> bool {
        self.series.is_empty()
    }

    /// The chart as an `svg` element, its colours taken from the page's custom properties.
    pub fn svg(&self) -> String {
        let seen = |(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && (!self.log || *y > 0.0);
        let scaled = |(x, y): &(f64, f64)| (*x, if self.log { y.log10() } else { *y });
        let lines: Vec<Vec<(f64, f64)>> = self
            .series
            .iter()
            .map(|s| thinned(&s.points.iter().filter(|p| seen(p)).map(scaled).collect::<Vec<_>>()))
            .collect();
        let (left, right) = range(lines.iter().flatten().map(|p| p.0));
        let (low, high) = padded(range(lines.iter().flatten().map(|p| p.1)));
        let x_at = |x: f64| LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT);
        let y_at = |y: f64| HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
        let mut out =
            format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n", escape(&self.title));
        let heights = ticks(low, high, 5);
        let step = spacing(&heights);
        for tick in heights {
            let (y, text) = (y_at(tick), if self.log { number(10f64.powf(tick)) } else { label(tick, step) });
            out +=
                &format!("<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\n", WIDTH - RIGHT);
            out += &format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>\n", LEFT - 6.0, y + 3.5);
        }
        let counts = lines.iter().flatten().all(|(x, _)| x.fract() == 0.0);
        let mut columns = ticks(left, right, 6);
        columns.retain(|tick| !counts || (tick - tick.round()).abs() < 1e-9);
        let step = spacing(&columns);
        for tick in columns {
            let (x, y) = (x_at(tick), HEIGHT - BOTTOM + 15.0);
            out += &format!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>\n", label(tick, step));
        }
        let middle = (LEFT + WIDTH - RIGHT) / 2.0;
        out += &format!(
            "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
            HEIGHT - 4.0,
            escape(&self.x_label)
        );
        let mut order: Vec<_> = self.series.iter().zip(self.colours()).zip(&lines).collect();
        order.sort_by_key(|((series, _), _)| !series.faint); // behind the others
        for ((series, colour), points) in order {
            let class = if series.faint { "curve faint" } else { "curve" };
            let path: Vec<String> = points.iter().map(|(x, y)| format!("{:.1},{:.1}", x_at(*x), y_at(*y))).collect();
            out += &format!(
                "<polyline class=\"{class}\" style=\"stroke: var(--s{colour})\" points=\"{}\"/>\n",
                path.join(" ")
            );
            if let [(x, y)] = points.as_slice() {
                let (x, y) = (x_at(*x), y_at(*y));
                out += &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" style=\"fill: var(--s{colour})\"/>\n");
            }
        }
        out + &self.legend() + "</svg>\n"
    }

    /// The colour of each line, from 1; a faint line has that of the line before it.
    fn colours(&self) -> Vec<usize> {
        let next = |seen: &mut usize, series: &Series| {
            *seen += usize::from(!series.faint || *seen == 0);
            Some((*seen - 1) % COLOURS + 1)
        };
        self.series.iter().scan(0, next).collect()
    }

    fn legend(&self) -> String {
        let mut x = LEFT;
        let mut out = String::new();
        for (series, colour) in self.series.iter().zip(self.colours()).filter(|(series, _)| !series.faint) {
            out += &format!("<rect x=\"{x}\" y=\"8\" width=\"10\" height=\"3\" style=\"fill: var(--s{colour})\"/>\n");
            out += &format!("<text x=\"{}\" y=\"13\">{}</text>\n", x + 14.0, escape(&series.name));
            x += 26.0 + 6.2 * series.name.chars().count() as f64;
        }
        out
    }
}

/// The lowest and the highest value; an axis around a single one.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low > high {
        return (0.0, 1.0);
    }
    if low == high {
        let around = if low == 0.0 { 0.5 } else { 0.1 * low.abs() };
        return (low - around, high + around);
    }
    (low, high)
}

fn padded((low, high): (f64, f64)) -> (f64, f64) {
    let room = 0.04 * (high - low);
    (low - room, high + room)
}

/// At most `MOST_POINTS` points. Of each group the lowest and the highest value stay, so that no peak is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let group = (2 * points.len()).div_ceil(MOST_POINTS);
    let ends = |points: &[(f64, f64)]| {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let mut ends: Vec<(f64, f64)> =
            points.iter().min_by(by_height).into_iter().chain(points.iter().max_by(by_height)).copied().collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        ends
    };
    points.chunks(group).flat_map(ends).collect()
}

/// Round numbers between two ends, about `count` of them.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let raw = (high - low) / count as f64;
    if !raw.is_finite() || raw <= 0.0 {
        return Vec::new();
    }
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| *step >= raw).unwrap_or(raw);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last.min(first.saturating_add(50))).map(|at| at as f64 * step).collect()
}

fn spacing(ticks: &[f64]) -> f64 {
    if let [first, second, ..] = ticks { second - first } else { 1.0 }
}

/// A tick with as many digits as tell it from its neighbours.
fn label(value: f64, step: f64) -> String {
    let size = value.abs().max(step);
    if value.abs() < step * 1e-6 {
        return "0".into();
    }
    if (1e-3..1e6).contains(&size) {
        let digits = (-step.log10() - 1e-9).ceil().clamp(0.0, 9.0) as usize;
        return format!("{value:.digits$}");
    }
    let digits = ((value.abs() / step).log10() + 1e-9).floor().clamp(0.0, 9.0) as usize;
    format!("{value:.digits$e}")
}

/// A number as short as it can be read.
fn number(value: f64) -> String {
    let size = value.abs();
    if size != 0.0 && !(1e-3..1e6).contains(&size) {
        return format!("{value:.1e}").replace(".0e", "e");
    }
    let digits = if size >= 100.0 {
        0
    } else if size >= 1.0 {
        2
    } else {
        4
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(-0.3, 0.9, 4), [0.0, 0.5]);
        assert_eq!(ticks(1.0, 1.0, 4), Vec::<f64>::new());
        assert_eq!(ticks(0.0, f64::INFINITY, 4), Vec::<f64>::new());
    }

    #[test]
    fn labels_of_neighbours_differ() {
        let labels = |low, high| {
            let ticks = ticks(low, high, 4);
            ticks.iter().map(|tick| label(*tick, spacing(&ticks))).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(labels(10.406, 10.444), "10.41 10.42 10.43 10.44");
        assert_eq!(labels(0.0, 1.0), "0 0.5 1.0");
        assert_eq!(labels(-20.0, 20.0), "-20 -10 0 10 20");
        assert_eq!(labels(0.0, 3.9e-4), "0 1e-4 2e-4 3e-4");
        assert_eq!(labels(1_000_000.0, 1_000_004.0), "1.000000e6 1.000001e6 1.000002e6 1.000003e6 1.000004e6");
        let svg = Chart::new("t", "step").with(Series::new("s", vec![(1.0, 0.0), (2.0, 1.0)])).svg();
        assert!(svg.contains(">1</text>") && svg.contains(">2</text>") && !svg.contains(">1.2</text>"), "{svg}");
    }

    #[test]
    fn numbers_are_short() {
        let found = [0.0, 1.5, 2.0, 0.25, 1234.0, 3e-4, 2.5e-7, 1e7, -0.1].map(number);
        assert_eq!(found, ["0", "1.5", "2", "0.25", "1234", "3e-4", "2.5e-7", "1e7", "-0.1"]);
    }

    #[test]
    fn thinning_keeps_order_ends_and_peaks() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|i| (f64::from(i), f64::from(i % 7))).collect();
        points[31_234].1 = 99.0;
        let thin = thinned(&points);
        assert!(thin.len() <= MOST_POINTS && thin.contains(&(31_234.0, 99.0)));
        assert!(thin.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn smoothing_is_corrected_at_the_start() {
        let line = Series::new("raw", vec![(0.0, 4.0), (1.0, 4.0), (2.0, 0.0)]);
        let smooth = line.smoothed("smooth", 0.5);
        assert_eq!(smooth.points[0], (0.0, 4.0));
        assert_eq!(smooth.points[1], (1.0, 4.0));
        assert!((smooth.points[2].1 - 12.0 / 7.0).abs() < 1e-12);
    }

    /// Every point is where the axes say, and what cannot be drawn is left out.
    #[test]
    fn points_are_placed_on_the_axes() {
        let points = vec![(0.0, 0.0), (5.0, f64::NAN), (10.0, 1.0)];
        let svg = Chart::new("a < b", "step").with(Series::new("loss", points)).svg();
        assert!(svg.contains("aria-label=\"a &lt; b\"") && !svg.contains("NaN"));
        let bottom = HEIGHT - BOTTOM - 0.04 / 1.08 * (HEIGHT - TOP - BOTTOM);
        let top = HEIGHT - BOTTOM - 1.04 / 1.08 * (HEIGHT - TOP - BOTTOM);
        assert!(svg.contains(&format!("points=\"{LEFT:.1},{bottom:.1} {:.1},{top:.1}\"", WIDTH - RIGHT)), "{svg}");
        let log =
            Chart::new("t", "x").logarithmic().with(Series::new("s", vec![(0.0, -1.0), (1.0, 10.0), (2.0, 1000.0)]));
        assert_eq!(log.svg().matches(",").count(), 2, "the negative value is left out");
        assert!(Chart::new("t", "x").with(Series::new("none", Vec::new())).is_empty());
        assert!(Chart::new("t", "x").svg().ends_with("</svg>\n"));
    }
}

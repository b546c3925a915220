//! Heat maps and bars as SVG.

use super::escape;

/// A grid of values on a logarithmic scale.
#[derive(Clone, Debug, PartialEq)]
pub struct HeatMap {
    /// What it shows.
    pub title: String,
    /// Names of the rows.
    pub labels: Vec<String>,
    /// By row, by column; none where there is nothing.
    pub rows: Vec<Vec<Option<f64>>>,
    /// What is at the middle of the scale, a thousandth of it being one end and a thousand times it the other.
    pub middle: f64,
}

/// A value beside what is allowed.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// What it is.
    pub label: String,
    /// The value.
    pub value: f64,
    /// What is allowed.
    pub allowed: f64,
    /// Whether it passes.
    pub passes: bool,
}

const WIDTH: f64 = 760.0;
/// Of a letter of a label, about.
const LETTER: f64 = 6.1;
/// Longer labels lose their beginning.
const LONGEST: usize = 48;
const ROW: f64 = 16.0;
/// Wider grids are drawn by the largest of neighbouring columns.
const MOST_COLUMNS: usize = 256;

impl HeatMap {
    /// The map as an `svg` element.
    pub fn svg(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let group = columns.div_ceil(MOST_COLUMNS);
        let drawn = columns.div_ceil(group);
        let left = room(self.labels.iter().map(String::as_str));
        let width = (WIDTH - left) / drawn as f64;
        let height = ROW * self.rows.len() as f64 + 4.0;
        let mut out =
            format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n", escape(&self.title));
        let labels = self.labels.iter().map(String::as_str).chain(std::iter::repeat(""));
        for (index, (row, label)) in self.rows.iter().zip(labels).enumerate() {
            let y = ROW * index as f64;
            out += &format!(
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
                left - 6.0,
                y + 11.5,
                escape(&shown(label))
            );
            for (column, cells) in row.chunks(group).enumerate() {
                let Some(value) = cells.iter().flatten().copied().reduce(f64::max) else { continue };
                let x = left + width * column as f64;
                out += &format!(
                    "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{}\" fill=\"{}\"><title>{value:.3e}</title></rect>\n",
                    width + 0.05,
                    ROW - 1.0,
                    colour(value, self.middle)
                );
            }
        }
        out + "</svg>\n"
    }
}

/// Blue far below the middle of the scale, white at it, red far above.
fn colour(value: f64, middle: f64) -> String {
    let decades = if value > 0.0 && middle > 0.0 { (value / middle).log10().clamp(-3.0, 3.0) } else { -3.0 };
    let part = decades.abs() / 3.0;
    let fade = |full: f64| 245.0 + part * (full - 245.0);
    let (r, g, b) = if decades > 0.0 { (178.0, 24.0, 43.0) } else { (33.0, 102.0, 172.0) };
    format!("rgb({:.0},{:.0},{:.0})", fade(r), fade(g), fade(b))
}

/// Room for labels at the left.
fn room<'a>(labels: impl Iterator<Item = &'a str>) -> f64 {
    let longest = labels.map(|label| shown(label).chars().count()).max().unwrap_or(0);
    12.0 + LETTER * longest as f64
}

/// A label as it is drawn: the end of a long one tells more.
fn shown(label: &str) -> String {
    let surplus = label.chars().count().saturating_sub(LONGEST);
    if surplus == 0 { label.to_owned() } else { format!("…{}", label.chars().skip(surplus + 1).collect::<String>()) }
}

/// Bars on one logarithmic axis over four decades below and above what is allowed, which is a line at their middle.
pub fn bars(title: &str, bars: &[Bar]) -> String {
    let height = ROW * bars.len() as f64 + 20.0;
    let mut out = format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n", escape(title));
    let left = room(bars.iter().map(|bar| bar.label.as_str()));
    let middle = f64::midpoint(left, WIDTH);
    for (index, bar) in bars.iter().enumerate() {
        let y = ROW * index as f64;
        let decades = if bar.value > 0.0 && bar.allowed > 0.0 { (bar.value / bar.allowed).log10() } else { -4.0 };
        let end = middle + decades.clamp(-4.0, 4.0) / 4.0 * (WIDTH - middle);
        let colour = if bar.passes { 3 } else { 2 };
        out += &format!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            left - 6.0,
            y + 11.5,
            escape(&shown(&bar.label))
        );
        out += &format!(
            "<rect x=\"{left}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{}\" style=\"fill: var(--s{colour})\">\
             <title>{:.3e} of {:.3e}</title></rect>\n",
            y + 2.0,
            (end - left).max(1.0),
            ROW - 5.0,
            bar.value,
            bar.allowed
        );
    }
    let bottom = height - 16.0;
    out += &format!(
        "<line class=\"grid\" x1=\"{middle}\" x2=\"{middle}\" y1=\"0\" y2=\"{bottom}\" style=\"stroke: var(--ink)\"/>\n"
    );
    out += &format!("<text x=\"{middle}\" y=\"{:.1}\" text-anchor=\"middle\">allowed</text>\n</svg>\n", height - 3.0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_room_and_long_ones_lose_their_beginning() {
        assert_eq!(shown("layer 3"), "layer 3");
        let long = format!("{}the end", "x".repeat(80));
        assert!(shown(&long).starts_with('…') && shown(&long).ends_with("the end"));
        assert_eq!(shown(&long).chars().count(), LONGEST);
        assert!(room(["a", long.as_str()].into_iter()) < WIDTH / 2.0);
    }

    #[test]
    fn cells_are_coloured_by_their_distance_from_the_middle() {
        assert_eq!(colour(1.0, 1.0), "rgb(245,245,245)");
        assert_eq!(colour(1e9, 1.0), "rgb(178,24,43)");
        assert_eq!(colour(0.0, 1.0), "rgb(33,102,172)");
        let rows = vec![vec![Some(1.0), None, Some(2.0)], vec![Some(0.5)]];
        let svg = HeatMap { title: "a<b".into(), labels: vec!["x".into(), "y".into()], rows, middle: 1.0 }.svg();
        assert_eq!(svg.matches("<rect").count(), 3);
        assert!(svg.contains("a&lt;b") && svg.contains("<title>2.000e0</title>"));
        let wide = HeatMap { title: String::new(), labels: vec![], rows: vec![vec![Some(1.0); 1000]], middle: 1.0 };
        assert_eq!(wide.svg().matches("<rect").count(), 250);
    }

    #[test]
    fn a_bar_ends_at_the_line_where_all_of_the_allowance_is_used() {
        let bar = |value| Bar { label: "l".into(), value, allowed: 2.0, passes: value <= 2.0 };
        let svg = bars("t", &[bar(2.0), bar(2e9), bar(0.0)]);
        let left = room(std::iter::once("l"));
        let half = f64::midpoint(left, WIDTH) - left;
        assert!(svg.contains(&format!("width=\"{half:.1}\"")), "{svg}");
        assert!(svg.contains(&format!("width=\"{:.1}\"", WIDTH - left)), "{svg}");
        assert!(svg.contains("width=\"1.0\"") && svg.contains("var(--s2)"));
    }
}

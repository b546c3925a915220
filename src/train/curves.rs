//! The page of a run: its curves and its evaluations.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{METRICS_NAME, Result, RunFolder};
use crate::files;
use crate::report::{Chart, Page, Series};

/// File name of the page.
pub const REPORT_NAME: &str = "report.html";

/// How much of the past the smoothed loss keeps.
const INERTIA: f64 = 0.9;

/// Lines by name, in the order in which the names appear.
#[derive(Default)]
struct Lines {
    train: BTreeMap<String, Vec<(f64, f64)>>,
    held_out: BTreeMap<String, Vec<(f64, f64)>>,
}

impl Lines {
    fn read(metrics: &str) -> Self {
        let mut lines = Self::default();
        for line in metrics.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let Some(step) = line.get("step").and_then(Value::as_f64) else { continue };
            let (group, figures) = match line.get("held_out") {
                Some(figures) => (&mut lines.held_out, figures),
                None => (&mut lines.train, &line),
            };
            for (name, value) in figures.as_object().into_iter().flatten() {
                if let Some(value) = value.as_f64() {
                    group.entry(name.clone()).or_default().push((step, value));
                }
            }
        }
        lines
    }

    fn train(&self, name: &str) -> Series {
        Series::new(name, self.train.get(name).cloned().unwrap_or_default())
    }

    fn held_out(&self, name: &str) -> Series {
        Series::new(&format!("held-out {name}"), self.held_out.get(name).cloned().unwrap_or_default())
    }
}

/// Writes the page of a run from its metrics.
pub(super) fn write(folder: &RunFolder) -> Result<()> {
    let path = folder.path().join(METRICS_NAME);
    let Ok(metrics) = std::fs::read(&path) else { return Ok(()) };
    let html = page(&folder.path().display().to_string(), &String::from_utf8_lossy(&metrics)).html();
    folder.replace(REPORT_NAME, |path| Ok(std::fs::write(path, html).map_err(files::Error::io("write", path))?))
}

fn page(name: &str, metrics: &str) -> Page {
    let lines = Lines::read(metrics);
    let mut page = Page::new(&format!("Training run {name}"));
    page.table(&[], &summary(&lines));
    let raw = lines.train("loss");
    let smooth = raw.smoothed("loss", INERTIA);
    let chart = |title: &str| Chart::new(title, "step");
    let mut charts = vec![
        chart("Loss (nats)").with(smooth).with(Series { faint: true, ..raw }).with(lines.held_out("loss")),
        chart("Accuracy")
            .with(lines.held_out("accuracy"))
            .with(lines.held_out("token_accuracy"))
            .with(lines.held_out("macro_f1")),
        chart("Learning rate").with(lines.train("learning_rate")),
        chart("Gradient norm").logarithmic().with(lines.train("grad_norm")),
    ];
    let rewards = ["rewards/margins", "rewards/chosen", "rewards/rejected"];
    charts.push(rewards.iter().fold(chart("Rewards"), |chart, name| chart.with(lines.train(name))));
    charts.push(chart("Preferred completion has the higher reward").with(lines.train("rewards/accuracies")));
    charts.retain(|chart| !chart.is_empty());
    page.charts(&charts);
    if !lines.held_out.is_empty() {
        let names: Vec<&String> = lines.held_out.keys().filter(|name| *name != "examples").collect();
        let header: Vec<&str> = std::iter::once("step").chain(names.iter().map(|name| name.as_str())).collect();
        page.heading("Held-out evaluations").table(&header, &evaluations(&lines, &names));
    }
    page
}

fn summary(lines: &Lines) -> Vec<Vec<String>> {
    let last = |name: &str| lines.train.get(name).and_then(|points| points.last()).copied();
    let sum = |name: &str| lines.train.get(name).map(|points| points.iter().map(|p| p.1).sum::<f64>());
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    let mut rows = Vec::new();
    if let Some((step, loss)) = last("loss") {
        rows.push(row("steps", format!("{step}")));
        rows.push(row("last loss", format!("{loss:.4}")));
    }
    if let (Some(tokens), Some(seconds)) = (sum("tokens"), sum("seconds")) {
        rows.push(row("tokens", format!("{tokens}")));
        rows.push(row("tokens a second", format!("{:.0}", tokens / seconds.max(1e-9))));
    }
    rows
}

fn evaluations(lines: &Lines, names: &[&String]) -> Vec<Vec<String>> {
    let mut steps: Vec<f64> = lines.held_out.values().flatten().map(|point| point.0).collect();
    steps.sort_by(f64::total_cmp);
    steps.dedup();
    let value = |name: &String, step: f64| {
        let points = lines.held_out.get(name)?;
        points.iter().rfind(|point| point.0 == step).map(|point| format!("{:.4}", point.1))
    };
    let row = |step: &f64| {
        let values = names.iter().map(|name| value(name, *step).unwrap_or_default());
        std::iter::once(format!("{step}")).chain(values).collect()
    };
    steps.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_what_the_metrics_hold() {
        let metrics = [
            r#"{"step":0,"held_out":{"examples":4,"loss":2.5,"accuracy":0.25}}"#,
            r#"{"step":1,"loss":2.0,"learning_rate":0.1,"grad_norm":3.0,"tokens":40,"seconds":2.0}"#,
            r#"{"step":2,"loss":1.0,"learning_rate":0.2,"grad_norm":1.0,"tokens":60,"seconds":3.0}"#,
            r#"{"step":2,"held_out":{"examples":4,"loss":1.5,"accuracy":0.75}}"#,
            r#"{"step":3,"lo"#, // a killed run's last line
        ];
        let html = page("<run>", &metrics.join("\n")).html();
        for part in [
            "Training run &lt;run&gt;",
            "<tr><td>steps</td><td class=\"number\">2</td></tr>",
            "<tr><td>tokens a second</td><td class=\"number\">20</td></tr>",
            "<tr><td class=\"number\">2</td><td class=\"number\">0.7500</td><td class=\"number\">1.5000</td></tr>",
            "Learning rate",
            "Gradient norm",
        ] {
            assert!(html.contains(part), "{part}\n{html}");
        }
        assert!(!html.contains("Rewards"), "there are none");
        assert_eq!(html.matches("<svg").count(), 4);
    }
}

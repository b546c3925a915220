//! What a verification says, and where.

use super::*;
use crate::cli::style;
use crate::parity::Row;

/// Where the report goes.
#[derive(Args, Clone, Debug)]
pub(super) struct OutputArgs {
    /// Where to write the report
    #[arg(long, default_value = "parity.json")]
    pub(super) out: PathBuf,
    /// Also as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Also as SARIF 2.1
    #[arg(long, value_name = "FILE")]
    sarif: Option<PathBuf>,
    /// Also as a page that needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Fail where a figure is worse than in this earlier parity.json
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// How much worse a figure may be than in --baseline, as a part of it
    #[arg(long, default_value_t = 0.25, requires = "baseline")]
    pub(super) baseline_slack: f64,
}

impl OutputArgs {
    /// The earlier report, read before anything is computed or written.
    pub(super) fn baseline(&self) -> Result<Option<Report>> {
        if !(self.baseline_slack >= 0.0 && self.baseline_slack.is_finite()) {
            return Err(usage("--baseline-slack is no part", "give 0 or more, as in 0.25"));
        }
        let Some(path) = &self.baseline else { return Ok(None) };
        let bytes = crate::files::read(path)?;
        let report = serde_json::from_slice(&bytes).map_err(|source| crate::files::Error::Json {
            path: path.clone(),
            what: "a parity report",
            source,
        })?;
        Ok(Some(report))
    }

    /// Writes the report in every form that was asked for.
    pub(super) fn write(&self, report: &Report, graph: &Path) -> Result<()> {
        write_report(report, &self.out)?;
        if let Some(path) = &self.junit {
            let xml =
                report.to_junit().ok_or_else(|| usage("the JUnit report cannot be written", "leave --junit out"))?;
            write(path, &xml)?;
        }
        if let Some(path) = &self.sarif {
            let here = std::env::current_dir().ok();
            let relative = here.as_ref().and_then(|here| graph.strip_prefix(here).ok()).unwrap_or(graph);
            write(path, &format!("{:#}\n", report.to_sarif(&relative.to_string_lossy())))?;
        }
        match &self.html {
            Some(path) => write(path, &report.to_html()),
            None => Ok(()),
        }
    }
}

/// Writes `parity.json`.
pub(in crate::cli) fn write_report(report: &Report, path: &Path) -> Result<()> {
    write(path, &(report.to_json()? + "\n"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    Ok(std::fs::write(path, text).map_err(crate::files::Error::io("write", path))?)
}

/// Lines of the table up to which every case has its own.
const LONG: usize = 40;

/// One line for each runtime and case; of a long report one for each run that passed and for each case that did not.
pub(in crate::cli) fn table(report: &Report) -> comfy_table::Table {
    let mut table = style::table(&["runtime", "case", "distance", "allowed", "KL", "top-1", "greedy", "verdict"]);
    let number = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.2e}"));
    for row in lines(report) {
        let (row, case) = (row.row, row.case.as_str());
        let greedy = row.greedy.map_or("", |g| if g.agrees { "same" } else { "differs" });
        let run = row.of.map_or_else(|| row.run.to_owned(), |of| format!("{}, {of}", row.run));
        let kl = number(row.figures.map(|figures| figures.kl_mean));
        let top1 = row.figures.map_or_else(String::new, |figures| style::percent(figures.top1_agreement));
        let verdict = match row.failure {
            Some(why) => format!("{}: {}", row.verdict.name(), shortened(why)),
            None => row.verdict.name().to_owned(),
        };
        table.add_row([&run, case, &number(row.distance), &number(row.allowed), &kl, &top1, greedy, &verdict]);
    }
    table
}

/// A line of the table, with the case as it is shown.
struct Line<'a> {
    row: Row<'a>,
    case: String,
}

/// The lines of the table. A run of many lines is the worst of those that passed, and those that did not.
fn lines(report: &Report) -> Vec<Line<'_>> {
    let rows = report.rows();
    if rows.len() <= LONG {
        return rows.into_iter().map(|row| Line { case: row.case.to_owned(), row }).collect();
    }
    let used = |row: &Row| row.distance.zip(row.allowed).map_or(0.0, |(distance, allowed)| distance / allowed);
    let mut lines: Vec<Line> = Vec::new();
    for run in rows.chunk_by(|a, b| (a.of, a.run) == (b.of, b.run)) {
        let passed = || run.iter().filter(|row| row.verdict.passed());
        let worst = passed().max_by(|a, b| used(a).total_cmp(&used(b)));
        let case = |row: &Row| match passed().count() {
            1 => row.case.to_owned(),
            count => format!("{count} cases, the worst is {}", row.case),
        };
        lines.extend(worst.map(|row| Line { case: case(row), row: row.clone() }));
        let failed = run.iter().filter(|row| !row.verdict.passed());
        lines.extend(failed.map(|row| Line { case: row.case.to_owned(), row: row.clone() }));
    }
    lines
}

/// A reason's beginning; the whole is in the report.
fn shortened(why: &str) -> String {
    const MOST: usize = 160;
    let line = why.lines().next().unwrap_or_default();
    if line.chars().count() <= MOST { line.to_owned() } else { line.chars().take(MOST).chain(['…']).collect() }
}

/// The verdict, what was found, and what would just pass.
pub(in crate::cli) fn summary(report: &Report) -> String {
    let rows = report.rows();
    let passed = rows.iter().filter(|row| row.verdict.passed()).count();
    let verdict = match report.verdict {
        Verdict::Pass => "parity",
        Verdict::Fail => "NO PARITY",
        Verdict::Unknown => "COULD NOT TELL",
    };
    let mut out = String::new();
    for run in report.runs.iter().filter(|run| run.nodes.as_ref().is_some_and(|nodes| !nodes.is_empty())) {
        let nodes = run.nodes.iter().flatten().map(|(provider, count)| format!("{count} on {provider}"));
        out += &format!("nodes of {}: {}\n", run.name, nodes.collect::<Vec<_>>().join(", "));
    }
    for run in report.base.iter().chain(&report.runs) {
        let in_order = run.cases.iter().filter(|case| case.verdict.passed()).filter_map(|case| case.in_order);
        let (count, most) = in_order.fold((0, 0.0), |(count, most), part| (count + 1, f64::max(most, part)));
        if count > 0 {
            let (cases, most) = (if count == 1 { "case" } else { "cases" }, style::percent(most));
            out += &format!(
                "{count} {cases} of {} pass by rounding: {most} of what sums in order allow by position\n",
                run.name
            );
        }
    }
    if let Some(tolerance) = report.tolerance() {
        out += &format!("tolerance that would just pass: {tolerance:.2e} (atol = rtol)\n");
    }
    if report.thresholds.is_some() || report.verdict == Verdict::Unknown && report.figures().next().is_some() {
        let just = Thresholds::just_passing(report.figures());
        let given = [("--max-kl", just.max_kl), ("--min-top1", just.min_top1), ("--max-ppl-diff", just.max_ppl_diff)];
        let given = given.iter().filter_map(|(name, value)| Some(format!(" {name} {}", (*value)?)));
        out += &format!("thresholds that would just pass:{}\n", given.collect::<String>());
    }
    if report.environment.against_a_graph {
        out += &format!("reference: {}\n", report.environment.source);
    }
    if report.verdict != Verdict::Pass {
        out += &format!("{}\n", report.finding.text);
    }
    // the finding names the first departure
    let departures =
        report.base.iter().chain(&report.runs).filter_map(|run| Some((&run.name, run.departure.as_ref()?)));
    let from_other = report.against.iter().filter_map(|pair| Some((&pair.name, pair.departure.as_ref()?)));
    let departures = departures.chain(from_other);
    for (number, (run, departure)) in departures.enumerate() {
        if number > 0 {
            out += &format!("{run} departs in {departure}\n");
        }
        if let Some(folder) = &departure.reproducer {
            out += &format!("reproducer of {run}: {folder}\n");
        }
    }
    let worse = match report.regressions.len() {
        0 => String::new(),
        1 => ", 1 figure is worse than before".into(),
        count => format!(", {count} figures are worse than before"),
    };
    out + &format!("{verdict}: {passed} of {} checks passed{worse}", rows.len())
}

/// `500MB`, `4GB`, or a number of bytes.
pub(super) fn bytes(text: &str) -> Result<u64> {
    let text = text.trim();
    let units = [("KB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12), ("B", 1.0), ("", 1.0)];
    let upper = text.to_uppercase();
    let found =
        units.into_iter().find_map(|(unit, size)| Some((upper.strip_suffix(unit)?.trim().parse::<f64>().ok()?, size)));
    match found {
        Some((number, size)) if (0.0..1e18).contains(&(number * size)) => Ok((number * size) as u64),
        _ => Err(usage(format!("`{text}` is no size"), "give it as 500MB or 4GB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_decimal_units() {
        let found = ["500MB", "4 gb", "1.5KB", "17", "9B"].map(|text| bytes(text).unwrap());
        assert_eq!(found, [500_000_000, 4_000_000_000, 1_500, 17, 9]);
        assert!(["", "GB", "-1MB", "4XB", "1e40GB", "nan"].iter().all(|text| bytes(text).is_err()));
    }
}

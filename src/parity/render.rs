//! A report as a page for a person, and as test results and findings for machines.

use super::{CaseReport, FindingKind, Report, Row, RunCase, RunReport, Verdict};
use crate::report::{self, Bar, HeatMap, Outcome, Page, Rule, Suite, Test};

const RULES: [Rule; 5] = [
    Rule { id: "parity", description: "A graph computes what its model computes" },
    Rule { id: "faithful-base", description: "A base graph computes what its checkpoint computes" },
    Rule { id: "zero-adapter", description: "An adapter of zeros changes no bit" },
    Rule { id: "regression", description: "No figure is worse than in the baseline" },
    Rule { id: "told", description: "Whether there is parity can be told" },
];

impl Report {
    /// The report as JUnit XML: a suite for each runtime, a test for each case. None where the writer fails.
    pub fn to_junit(&self) -> Option<String> {
        let mut suites: Vec<Suite> = Vec::new();
        for row in self.rows() {
            let name = suite_name(&row);
            let test = Test { name: row.case.into(), outcome: outcome(&row), properties: properties(&row) };
            match suites.iter_mut().find(|suite| suite.name == name) {
                Some(suite) => suite.tests.push(test),
                None => suites.push(Suite { name, tests: vec![test] }),
            }
        }
        let regression = |regression: &super::Regression| Test {
            name: format!("{}, {}, {}", regression.run, regression.case, regression.figure),
            outcome: Outcome::Failed(regression.to_string()),
            properties: Vec::new(),
        };
        if !self.regressions.is_empty() {
            suites.push(Suite { name: "baseline".into(), tests: self.regressions.iter().map(regression).collect() });
        }
        report::junit("prefold verify", &suites)
    }

    /// The report as SARIF: a result for each row that did not pass. `file` is the graph, relative to the repository's root.
    pub fn to_sarif(&self, file: &str) -> serde_json::Value {
        let rows = self.rows();
        let failed = rows.iter().filter(|row| row.verdict != Verdict::Pass).map(|row| report::Finding {
            rule: self.rule_of(row),
            error: row.verdict == Verdict::Fail,
            message: row.failure.unwrap_or("it did not pass").into(),
            place: format!("{}/{}", suite_name(row), row.case),
        });
        let regressions = self.regressions.iter().map(|regression| report::Finding {
            rule: "regression",
            error: true,
            message: regression.to_string(),
            place: format!("{}/{}", regression.run, regression.case),
        });
        let findings: Vec<_> = failed.chain(regressions).collect();
        report::sarif(env!("CARGO_PKG_VERSION"), &RULES, file, &findings)
    }

    fn rule_of(&self, row: &Row<'_>) -> &'static str {
        match (row.verdict, row.of) {
            (Verdict::Unknown, _) => "told",
            (_, Some("base graph")) => "faithful-base",
            (_, Some("zero adapter")) => "zero-adapter",
            _ if self.finding.kind == FindingKind::UnfaithfulBase => "faithful-base",
            _ => "parity",
        }
    }

    /// The report as a page that needs nothing else.
    pub fn to_html(&self) -> String {
        let mut page = Page::new(&format!("Parity: {}", self.verdict.name()));
        page.paragraph(&self.finding.text);
        let facts = |name: &str, value: String| vec![name.to_owned(), value];
        let tolerance = self.tolerance().map_or_else(|| "none".into(), |t| format!("{t:.2e} (atol = rtol)"));
        let environment = &self.environment;
        page.table(
            &[],
            &[
                facts("Repeat with", self.command.clone()),
                facts("Written by", self.tool.clone()),
                facts("Reference", environment.source.clone()),
                facts("Graph computes in", environment.precision.clone()),
                facts("Tolerance that would just pass", tolerance),
            ],
        );
        self.runs_of(&mut page);
        self.rows_of(&mut page);
        self.budget_of(&mut page);
        for run in &self.runs {
            self.maps_of(&mut page, run);
        }
        self.runtimes_of(&mut page);
        page.heading("Inputs");
        let input =
            |f: &crate::files::FileFact| vec![f.role.clone(), f.name.clone(), f.bytes.to_string(), f.sha256.clone()];
        page.table(&["role", "file", "bytes", "sha256"], &self.inputs.iter().map(input).collect::<Vec<_>>());
        page.heading("What is asked").paragraph(&self.rule);
        page.html()
    }

    /// Runs beside each other: what part of the budget each takes in each case.
    fn runs_of(&self, page: &mut Page) {
        if self.runs.len() < 2 {
            return;
        }
        let part = |case: &RunCase| match case.used() {
            Some(part) => format!("{:.0} %", 100.0 * part),
            None => case.verdict.name().to_owned(),
        };
        let cell = |run: &RunReport, case: &str| {
            run.cases.iter().find(|found| found.case == case).map_or_else(|| run.verdict.name().to_owned(), &part)
        };
        let row = |case: &CaseReport| {
            let cells = self.runs.iter().map(|run| cell(run, &case.name));
            std::iter::once(case.name.clone()).chain(cells).collect::<Vec<_>>()
        };
        let header: Vec<&str> = std::iter::once("case").chain(self.runs.iter().map(|run| run.name.as_str())).collect();
        page.heading("Runs side by side");
        page.paragraph("How much of what is allowed each run takes; more than 100 % is no parity.");
        page.table(&header, &self.cases.iter().map(row).collect::<Vec<_>>());
    }

    fn rows_of(&self, page: &mut Page) {
        page.heading("Checks");
        let row = |row: &Row<'_>| {
            let number = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{x:.2e}"));
            let figures = row.figures;
            vec![
                suite_name(row),
                row.case.into(),
                number(row.distance),
                number(row.allowed),
                number(figures.map(|f| f.kl_mean)),
                figures.map_or_else(String::new, |f| format!("{:.4}", f.top1_agreement)),
                number(figures.and_then(|f| f.perplexity).map(|p| p.difference)),
                row.failure.map_or_else(|| row.verdict.name().into(), |why| format!("{}: {why}", row.verdict.name())),
            ]
        };
        let header = ["runtime", "case", "max |Δ|", "allowed", "KL", "top-1", "perplexity Δ", "verdict"];
        page.table(&header, &self.rows().iter().map(row).collect::<Vec<_>>());
        if !self.regressions.is_empty() {
            page.heading("Worse than the baseline");
            page.table(&[], &self.regressions.iter().map(|r| vec![r.to_string()]).collect::<Vec<_>>());
        }
    }

    fn budget_of(&self, page: &mut Page) {
        let bar = |run: &str, case: &RunCase| {
            let value = case.figures?.max_abs;
            let passes = case.verdict.passed();
            Some(Bar { label: format!("{run}, {}", case.case), value, allowed: case.allowed, passes })
        };
        let bars: Vec<Bar> =
            self.runs.iter().flat_map(|run| run.cases.iter().filter_map(|case| bar(&run.name, case))).collect();
        if bars.is_empty() {
            return;
        }
        page.heading("Error budget");
        let caption =
            "The largest distance from the reference beside what is allowed; one decade is a quarter of each side.";
        page.figure(caption, &report::bars("Error budget", &bars));
    }

    fn maps_of(&self, page: &mut Page, run: &RunReport) {
        let of_cases = run.cases.iter().filter_map(|case| {
            let report = self.cases.iter().find(|report| report.name == case.case)?;
            (!case.errors.is_empty()).then(|| {
                let rows = grid(report, &case.errors);
                let labels = (0..rows.len()).map(|row| format!("{}, row {row}", case.case)).collect::<Vec<_>>();
                (case.allowed, labels, rows)
            })
        });
        let of_cases: Vec<_> = of_cases.collect();
        let Some(middle) = of_cases.iter().map(|(allowed, ..)| *allowed).reduce(f64::max) else { return };
        let (labels, rows) = of_cases.into_iter().fold((vec![], vec![]), |(mut labels, mut rows), (_, l, r)| {
            labels.extend(l);
            rows.extend(r);
            (labels, rows)
        });
        page.heading(&format!("Error by position, {}", run.name));
        let map = HeatMap { title: format!("error by position, {}", run.name), labels, rows, middle };
        page.figure("Red is above what is allowed, blue below; empty is padding.", &map.svg());
        for case in &self.cases {
            let layers: Vec<_> = run.layers.iter().filter(|layer| layer.case == case.name).collect();
            if layers.is_empty() {
                continue;
            }
            let labels = layers.iter().map(|layer| format!("{} {}", layer.layer, layer.tensor)).collect();
            let rows = layers.iter().map(|layer| layer.errors.iter().map(|x| Some(*x)).collect()).collect();
            let map = HeatMap { title: format!("error by layer, {}", case.name), labels, rows, middle };
            page.figure(&format!("Error by layer and position, {}", case.name), &map.svg());
        }
        if let Some(departure) = &run.departure {
            page.paragraph(&format!("The first departure is in {departure}."));
            let list = |name: &str, values: &[String]| vec![name.to_owned(), values.join("; ")];
            page.table(&[], &[list("Nodes", &departure.nodes), list("Notes", &departure.notes)]);
        }
    }

    fn runtimes_of(&self, page: &mut Page) {
        let row = |run: &RunReport| {
            let info = run.runtime.as_ref();
            let nodes = run.nodes.iter().flatten().map(|(provider, n)| format!("{n} on {provider}"));
            vec![
                run.name.clone(),
                info.map_or_else(String::new, |info| format!("{} {}", info.runtime, info.version)),
                info.map_or_else(String::new, |info| info.optimization.clone()),
                nodes.collect::<Vec<_>>().join(", "),
            ]
        };
        page.heading("Runtimes");
        page.table(&["run", "runtime", "optimisation", "nodes"], &self.runs.iter().map(row).collect::<Vec<_>>());
    }
}

/// Errors in the order of the compared positions, put into rows and columns of their batch, padding left out.
fn grid(case: &CaseReport, errors: &[f64]) -> Vec<Vec<Option<f64>>> {
    let mut errors = errors.iter().copied();
    let width = case.input_ids.first().map_or(0, Vec::len);
    let mut rows = vec![vec![None; width.saturating_add(case.steps)]; case.input_ids.len()];
    let chunk = case.chunk.max(1);
    let prefill = (0..width).step_by(chunk).map(|start| start..start.saturating_add(chunk).min(width));
    let steps = (width..width.saturating_add(case.steps)).map(|column| column..column.saturating_add(1));
    for columns in prefill.chain(steps) {
        for (cells, mask) in rows.iter_mut().zip(&case.attention_mask) {
            for column in columns.clone() {
                if mask.get(column).copied().unwrap_or(1) != 0
                    && let Some(cell) = cells.get_mut(column)
                {
                    *cell = errors.next();
                }
            }
        }
    }
    rows
}

fn suite_name(row: &Row<'_>) -> String {
    row.of.map_or_else(|| row.run.to_owned(), |of| format!("{}, {of}", row.run))
}

fn outcome(row: &Row<'_>) -> Outcome {
    let reason = || row.failure.unwrap_or("it did not pass").to_owned();
    match row.verdict {
        Verdict::Pass => Outcome::Passed,
        Verdict::Fail => Outcome::Failed(reason()),
        Verdict::Unknown => Outcome::Error(reason()),
    }
}

fn properties(row: &Row<'_>) -> Vec<(String, String)> {
    let figures = row.figures;
    let values = [
        ("max_abs", row.distance),
        ("allowed", row.allowed),
        ("kl_mean", figures.map(|f| f.kl_mean)),
        ("top1_agreement", figures.map(|f| f.top1_agreement)),
        ("perplexity_difference", figures.and_then(|f| f.perplexity).map(|p| p.difference)),
    ];
    values.into_iter().filter_map(|(name, value)| Some((name.into(), format!("{:e}", value?)))).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::parity::testing::{self, CandleSession, FAITHFUL, UNMASKED, candidate, check, tiny_decoder};
    use crate::parity::{Facts, Subject};

    fn report(distort: testing::Distort) -> Report {
        let mut check = check(tiny_decoder, None);
        check.run(candidate(CandleSession::new(tiny_decoder(DType::F32), None, distort)));
        check.report(Facts { command: "prefold verify".into(), subject: Subject::Base, ..Facts::default() }).unwrap()
    }

    #[test]
    fn every_position_has_its_cell_whatever_the_calls() {
        for case in report(FAITHFUL).cases {
            let errors: Vec<f64> = (0..case.positions).map(|i| i as f64).collect();
            let rows = grid(&case, &errors);
            let mut found: Vec<f64> = rows.iter().flatten().flatten().copied().collect();
            found.sort_by(f64::total_cmp);
            assert_eq!(found, errors, "{}", case.name);
            for (cells, mask) in rows.iter().zip(&case.attention_mask) {
                let real = cells.iter().zip(mask).all(|(cell, real)| cell.is_some() == (*real == 1));
                assert!(real, "{}", case.name);
            }
        }
    }

    #[test]
    fn a_failure_is_in_every_rendering_and_named_for_what_it_is() {
        let report = report(UNMASKED);
        assert_eq!(report.finding.kind, FindingKind::PaddingOnly, "{}", report.finding.text);
        let failed = report.rows().iter().filter(|row| row.verdict == Verdict::Fail).count();
        let junit = report.to_junit().unwrap();
        assert!(junit.contains(&format!("failures=\"{failed}\"")), "{junit}");
        let sarif = report.to_sarif("g/model.onnx");
        assert_eq!(sarif["runs"][0]["results"].as_array().unwrap().len(), failed);
        assert_eq!(sarif["runs"][0]["results"][0]["ruleId"], "parity");
        let html = report.to_html();
        assert!(html.contains("Parity: FAIL") && html.contains("rows with padding") && html.contains("<rect"));
        assert!(!html.contains("http") && !html.contains("<script"), "the page needs nothing else");
    }

    #[test]
    fn a_figure_that_grew_is_a_regression_and_noise_is_none() {
        let before = report(FAITHFUL);
        let mut same = before.clone();
        same.compare_to(&before, 0.25, Subject::Base);
        assert_eq!((same.verdict, same.regressions.len()), (Verdict::Pass, 0));

        let mut now = before.clone();
        let case = &mut now.runs[0].cases[0];
        case.figures.as_mut().unwrap().max_abs = 0.9 * case.allowed;
        now.runs[0].cases.pop();
        now.compare_to(&before, 0.25, Subject::Base);
        let names: Vec<_> = now.regressions.iter().map(|r| (r.case.as_str(), r.figure.as_str())).collect();
        assert_eq!(names, [("single_row", "max_abs"), (before.cases.last().unwrap().name.as_str(), "verdict")]);
        assert_eq!((now.verdict, now.finding.kind), (Verdict::Fail, FindingKind::Regression));
        assert!(now.to_junit().unwrap().contains("name=\"baseline\""));
    }
}

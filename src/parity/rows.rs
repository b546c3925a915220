//! A report as lines: what every rendering shows.

use super::{AgainstReport, CaseReport, Figures, Greedy, NoOpReport, Report, RunCase, RunReport, Verdict};

/// A line of the table that sums a report up.
#[derive(Clone, Debug, PartialEq)]
pub struct Row<'a> {
    /// What is judged where it is not the graph against the reference.
    pub of: Option<&'static str>,
    /// The run's name.
    pub run: &'a str,
    /// The case; `load` for a run that has none, `zero adapter` for a no-op.
    pub case: &'a str,
    /// The outcome.
    pub verdict: Verdict,
    /// The distance from the reference.
    pub distance: Option<f64>,
    /// How far it may be; zero for a no-op.
    pub allowed: Option<f64>,
    /// The other figures.
    pub figures: Option<&'a Figures>,
    /// The greedy continuation.
    pub greedy: Option<&'a Greedy>,
    /// Why it failed.
    pub failure: Option<&'a str>,
}

impl<'a> Row<'a> {
    /// A line that says no more than a verdict.
    fn bare(run: &'a str, case: &'a str, verdict: Verdict, failure: Option<&'a str>) -> Self {
        let (of, distance, allowed, figures, greedy) = (None, None, None, None, None);
        Self { of, run, case, verdict, distance, allowed, figures, greedy, failure }
    }

    /// The same with figures, and how far they may be.
    fn judged(self, figures: Option<&'a Figures>, allowed: Option<f64>, greedy: Option<&'a Greedy>) -> Self {
        Self { distance: figures.map(|figures| figures.max_abs), allowed, figures, greedy, ..self }
    }
}

impl Report {
    /// The report as a table: one row for each run in each case, then one for each no-op; before them, one for each case
    /// that candle itself failed.
    pub fn rows(&self) -> Vec<Row<'_>> {
        let candle = self.cases.iter().filter(|case| case.failure.is_some()).map(CaseReport::row);
        let runs = self.runs.iter().flat_map(RunReport::rows);
        let base = self.base.iter().flat_map(RunReport::rows).map(|row| Row { of: Some("base graph"), ..row });
        let against = self.against.iter().flat_map(AgainstReport::rows);
        base.chain(candle).chain(runs).chain(self.no_op.iter().map(NoOpReport::row)).chain(against).collect()
    }
}

impl CaseReport {
    fn row(&self) -> Row<'_> {
        let verdict = Verdict::of(self.failure.is_none());
        Row::bare("candle", &self.name, verdict, self.failure.as_deref()).judged(self.candle.as_ref(), None, None)
    }
}

impl RunReport {
    fn rows(&self) -> Vec<Row<'_>> {
        let failure = self.failure.as_deref();
        let whole = if self.cases.is_empty() { Some("load") } else { failure.map(|_| "runtime") };
        let whole = whole.map(|case| Row::bare(&self.name, case, self.verdict, failure));
        whole.into_iter().chain(self.cases.iter().map(|case| case.row(&self.name))).collect()
    }
}

impl RunCase {
    fn row<'a>(&'a self, run: &'a str) -> Row<'a> {
        let row = Row::bare(run, &self.case, self.verdict, self.failure.as_deref());
        row.judged(self.figures.as_ref(), Some(self.allowed), self.greedy.as_ref())
    }
}

impl NoOpReport {
    fn row(&self) -> Row<'_> {
        let row = Row::bare(&self.name, "all", self.verdict, self.failure.as_deref());
        Row { of: Some("zero adapter"), allowed: Some(0.0), ..row }
    }
}

impl AgainstReport {
    fn rows(&self) -> Vec<Row<'_>> {
        let whole = self.cases.is_empty().then(|| Row::bare(&self.name, "load", self.verdict, self.failure.as_deref()));
        let cases = self.cases.iter().map(|case| {
            let row = Row::bare(&self.name, &case.case, case.verdict, case.failure.as_deref());
            row.judged(case.figures.as_ref(), Some(case.allowed), case.greedy.as_ref())
        });
        whole.into_iter().chain(cases).map(|row| Row { of: Some("other graph"), ..row }).collect()
    }
}

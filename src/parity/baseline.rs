//! What got worse since an earlier report.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Figures, Finding, Report, RunCase, Subject, Verdict};

/// A figure that is worse than in the baseline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Regression {
    /// The run.
    pub run: String,
    /// The case.
    pub case: String,
    /// The figure: `max_abs`, `kl_mean`, `top1_agreement`, `perplexity`; `verdict` for a case that passed or is missing now.
    pub figure: String,
    /// What it was; none for a verdict.
    pub before: Option<f64>,
    /// What it is.
    pub now: Option<f64>,
}

impl std::fmt::Display for Regression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { run, case, figure, before, now } = self;
        match (before, now) {
            (Some(before), Some(now)) => write!(f, "{figure} in {run}, {case} was {before:.3e} and is {now:.3e}"),
            _ => write!(f, "{run}, {case} passed and does not any more, or is not run"),
        }
    }
}

impl Report {
    /// Fails the report for every figure that is worse than the baseline's by more than `slack` of it. Figures below a tenth of
    /// what the budget allows are noise and are not compared.
    pub fn compare_to(&mut self, baseline: &Self, slack: f64, subject: Subject) {
        for run in &baseline.runs {
            let now = self.runs.iter().find(|found| found.name == run.name);
            for before in run.cases.iter().filter(|case| case.verdict.passed()) {
                let now = now.and_then(|run| run.cases.iter().find(|case| case.case == before.case));
                let found = worse(before, now, slack).into_iter().map(|(figure, before_value, now_value)| Regression {
                    run: run.name.clone(),
                    case: before.case.clone(),
                    figure: figure.into(),
                    before: before_value,
                    now: now_value,
                });
                self.regressions.extend(found);
            }
        }
        if !self.regressions.is_empty() {
            self.verdict = Verdict::Fail;
        }
        self.finding = Finding::of(self, subject);
    }
}

type Worse = (&'static str, Option<f64>, Option<f64>);

fn worse(before: &RunCase, now: Option<&RunCase>, slack: f64) -> Vec<Worse> {
    let now = now.filter(|now| now.verdict.passed());
    let (Some(old), Some(new)) = (&before.figures, now.and_then(|now| now.figures.as_ref())) else {
        return vec![("verdict", None, None)];
    };
    let noise = 0.1 * before.allowed;
    let perplexity = |figures: &Figures| figures.perplexity.map_or(0.0, |perplexity| perplexity.difference);
    let figures = [
        ("max_abs", old.max_abs, new.max_abs, noise),
        ("kl_mean", old.kl_mean, new.kl_mean, 1e-9),
        ("perplexity", perplexity(old), perplexity(new), 1e-6),
    ];
    let grown = figures.into_iter().filter(|(_, old, new, noise)| *new > noise.max(old * (1.0 + slack)));
    let grown = grown.map(|(name, old, new, _)| (name, Some(old), Some(new)));
    let (old, new) = (old.top1_agreement, new.top1_agreement);
    grown.chain((new < old).then_some(("top1_agreement", Some(old), Some(new)))).collect()
}

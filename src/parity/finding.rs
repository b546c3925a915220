//! What a report comes to, in a sentence.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Padding, Report, RunReport, Subject, Verdict};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Finding {
    /// Its kind.
    pub kind: FindingKind,
    /// The sentence.
    pub text: String,
    /// What the graph does otherwise, where its logits are recognised as those of a model that does so.
    #[serde(default)]
    pub cause: Option<String>,
}

/// The kind of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// Everything passed.
    Parity,
    /// The base graph is another function than the checkpoint, whatever was folded into it.
    UnfaithfulBase,
    /// The graph is the checkpoint's function but for rows with padding.
    PaddingOnly,
    /// The graph is the checkpoint's function for single rows, and another where a batch has several.
    BatchOnly,
    /// The graph is the checkpoint's function where a prompt is computed at once, and another with its cache.
    CacheOnly,
    /// The runtimes disagree: the graph passes in some of them.
    RuntimeDependent,
    /// An execution provider was asked for, and all nodes ran on the CPU.
    CpuFallback,
    /// No runtime gave logits to judge.
    RuntimeFailure,
    /// The graph is another function than the checkpoint with its adapter.
    NoParity,
    /// It became worse than an earlier report says.
    Regression,
    /// It could not be told.
    CouldNotTell,
}

impl Finding {
    /// What a report comes to.
    pub(super) fn of(report: &Report, subject: Subject) -> Self {
        let kind = Self::kind(report, subject);
        let departure = report.base.iter().chain(&report.runs).find_map(|run| run.departure.as_ref());
        let from_other = report.against.iter().find_map(|pair| pair.departure.as_ref());
        let departs = match (departure, from_other) {
            (Some(departure), _) => format!("; it departs in {departure}"),
            (None, Some(departure)) => format!("; it departs from the other graph in {departure}"),
            (None, None) => String::new(),
        };
        Self { kind, text: text(kind, report, subject) + &departs, cause: None }
    }

    /// The finding with the causes that the base graph's and the graph's own logits tell.
    pub(super) fn because(mut self, base: Option<String>, own: Option<String>) -> Self {
        let graph = if base.is_some() { "the base graph" } else { "the graph" };
        let same = base.is_some() && base == own;
        if let Some(cause) = base.or(own) {
            self.text = format!("{}; {graph} {cause}", self.text);
            if same {
                self.text += "; the fold is right: it adds the adapter to that";
            }
            self.cause = Some(cause);
        }
        self
    }

    fn kind(report: &Report, subject: Subject) -> FindingKind {
        use FindingKind as Kind;
        if report.verdict == Verdict::Pass {
            return Kind::Parity;
        }
        if !report.regressions.is_empty() {
            return Kind::Regression;
        }
        if report.verdict == Verdict::Unknown {
            return Kind::CouldNotTell;
        }
        let failed = |runs: &[RunReport]| runs.iter().any(|run| run.verdict == Verdict::Fail);
        let judged = if failed(&report.base) { &report.base } else { &report.runs };
        let base = failed(&report.base) || subject == Subject::Base;
        let wrong = |run: &RunReport| run.cases.iter().any(|case| case.verdict == Verdict::Fail);
        if judged.iter().any(|run| run.failure.is_some() && !run.cases.is_empty()) && !judged.iter().any(wrong) {
            return Kind::CpuFallback;
        }
        if judged.iter().any(|run| run.verdict == Verdict::Pass) && failed(judged) {
            return Kind::RuntimeDependent;
        }
        let failures = || {
            let cases = judged.iter().filter(|run| run.verdict == Verdict::Fail).flat_map(|run| &run.cases);
            cases.filter(|case| case.verdict == Verdict::Fail)
        };
        if judged.iter().flat_map(|run| &run.cases).all(|case| case.figures.is_none()) {
            return Kind::RuntimeFailure;
        }
        let all = |is: &dyn Fn(&super::CaseReport) -> bool| {
            let find = |name: &str| report.cases.iter().find(|case| case.name == name);
            failures().next().is_some()
                && failures().all(|failed| find(&failed.case).is_some_and(is))
                && report.cases.iter().any(|case| !is(case))
        };
        let padded = |case: &super::CaseReport| case.attention_mask.iter().flatten().any(|real| *real == 0);
        let batched = |case: &super::CaseReport| case.input_ids.len() > 1;
        let cached = |case: &super::CaseReport| {
            case.steps > 0 || case.input_ids.first().is_some_and(|row| row.len() > case.chunk)
        };
        match base {
            _ if all(&padded) => Kind::PaddingOnly,
            _ if all(&batched) => Kind::BatchOnly,
            _ if all(&cached) => Kind::CacheOnly,
            true => Kind::UnfaithfulBase,
            false => Kind::NoParity,
        }
    }
}

/// On which side the padding is, where rows that are padded on the other one pass.
fn side(report: &Report) -> &'static str {
    let runs = || report.base.iter().chain(&report.runs).flat_map(|run| &run.cases);
    let is = |name: &str, padding| report.cases.iter().any(|case| case.name == name && case.padding == Some(padding));
    let passes = |padding| {
        runs().any(|case| is(&case.case, padding))
            && runs().filter(|case| is(&case.case, padding)).all(|case| case.verdict != Verdict::Fail)
    };
    match (passes(Padding::Left), passes(Padding::Right)) {
        (false, true) => " on the left",
        (true, false) => " on the right",
        _ => "",
    }
}

fn text(kind: FindingKind, report: &Report, subject: Subject) -> String {
    let base = if subject == Subject::Folded && report.base.iter().any(|run| run.verdict == Verdict::Fail) {
        "the base graph"
    } else {
        "the graph"
    };
    let worst = report
        .rows()
        .into_iter()
        .find(|row| row.verdict == report.verdict)
        .and_then(|row| Some(format!("{}, {}: {}", row.run, row.case, row.failure?)));
    let worst = worst.map(|worst| format!(" ({worst})")).unwrap_or_default();
    let model = if subject == Subject::Beside { "the other graph" } else { "the model" };
    match kind {
        FindingKind::Parity => format!("the graph computes what {model} computes"),
        FindingKind::UnfaithfulBase => {
            format!("{base} is unfaithful: without any adapter it is another function than the checkpoint{worst}")
        }
        FindingKind::PaddingOnly => {
            format!("{base} computes {model} but for rows with padding{}{worst}", side(report))
        }
        FindingKind::BatchOnly => format!("{base} computes {model} but for batches of several rows{worst}"),
        FindingKind::CacheOnly => format!("{base} computes {model} but not with its cache{worst}"),
        FindingKind::RuntimeDependent => format!("{base} computes {model} in some runtimes only{worst}"),
        FindingKind::CpuFallback => format!("the graph computes {model}, but not where it was asked to{worst}"),
        FindingKind::RuntimeFailure => format!("no runtime that was asked ran the graph{worst}"),
        FindingKind::NoParity => format!("the graph is another function than {model}{worst}"),
        FindingKind::Regression => match report.regressions.first() {
            Some(first) => format!("a figure is worse than before: {first}"),
            None => "a figure is worse than before".into(),
        },
        FindingKind::CouldNotTell => format!("it could not be told whether the graph computes {model}{worst}"),
    }
}

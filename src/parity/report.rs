//! `parity.json`: what was compared with what, how far apart it is, how far it may be, and the verdict.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Allowance, Budget, Departure, Figures, Finding, FirstDifference, Greedy, LayerErrors, Padding, Regression, Result,
    TensorFigures, Thresholds,
};
use crate::files::FileFact;
use crate::runtime::RuntimeInfo;

/// Version of the report's layout.
pub const SCHEMA_VERSION: u32 = 2;

/// What the budget's numbers mean, for who reads a report.
pub(super) const RULE: &str = "e(x) is the largest absolute distance of the logits of x from the reference's over all \
    positions that are not padding. A run passes a case when its logits are finite, \
    e(run) <= max(factor * e(candle), relative_floor * largest reference logit), and its greedy tokens are the \
    reference's, each picked after the reference's own tokens; a token that differs is a tie, and counts as equal, only \
    when the reference's logits of the two tokens are no further apart than that limit. A float32 run that is further away, \
    by no more than the square root of the terms of the longest dot product, passes when at each position it is within that limit, or \
    within factor times the distance there of candle with its products summed in order, the largest in four orders. A zero adapter passes when every \
    output is equal bit for bit. Where thresholds are stated they take the budget's place. Another graph may be twice as far \
    from the graph as the graph may be from the reference. Where another graph is the reference itself, e(candle) is how far that \
    graph is from itself in the runtimes that were asked, and the floor is twice that of a model.";

/// The outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Parity.
    Pass,
    /// No parity, or a run that failed.
    Fail,
    /// It could not be told: there is no such runtime, or nothing to judge by.
    Unknown,
}

impl Verdict {
    /// Whether it is [`Pass`](Self::Pass).
    pub fn passed(self) -> bool {
        self == Self::Pass
    }

    /// The verdict over several: a failure counts most, then what could not be told.
    pub fn all(verdicts: impl Iterator<Item = Self>) -> Self {
        verdicts.fold(Self::Pass, |all, verdict| match (all, verdict) {
            (Self::Fail, _) | (_, Self::Fail) => Self::Fail,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
            (Self::Pass, Self::Pass) => Self::Pass,
        })
    }

    /// How it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::Unknown => "unknown",
        }
    }

    pub(super) fn of(passed: bool) -> Self {
        if passed { Self::Pass } else { Self::Fail }
    }
}

/// What the caller knows.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The files that were compared: graph, checkpoint, adapter.
    pub inputs: Vec<FileFact>,
    /// The command that repeats the check.
    pub command: String,
    /// The adapters of each model that the cases name.
    pub models: Vec<String>,
    /// What the graph is to the checkpoint.
    pub subject: Subject,
}

/// What a graph is to the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Subject {
    /// A base graph, with no adapter in it.
    Base,
    /// A graph with an adapter folded in.
    #[default]
    Folded,
    /// A graph that is compared with another one, without a checkpoint.
    Beside,
}

/// The whole result of a verification.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// Version of this layout.
    pub schema_version: u32,
    /// The tool that wrote the report, with its version.
    pub tool: String,
    /// Whether every run passed in every case, and every zero adapter changed nothing.
    pub verdict: Verdict,
    /// What was found, in a sentence.
    pub finding: Finding,
    /// The files that were compared.
    pub inputs: Vec<FileFact>,
    /// The command that repeats the check.
    pub command: String,
    /// What the reference ran on.
    pub environment: Environment,
    /// The error budget's numbers.
    pub budget: Budget,
    /// The thresholds that took the budget's place.
    pub thresholds: Option<Thresholds>,
    /// The error budget in words.
    pub rule: String,
    /// The models that the rows of the cases are for, by the adapters that act: one, unless the graph switches.
    #[serde(default)]
    pub models: Vec<String>,
    /// The cases, with candle's own distance.
    pub cases: Vec<CaseReport>,
    /// One entry for each runtime.
    pub runs: Vec<RunReport>,
    /// The base graph, against the checkpoint without adapter: one entry for each runtime.
    #[serde(default)]
    pub base: Vec<RunReport>,
    /// One entry for each runtime in which a zero adapter was tried.
    pub no_op: Vec<NoOpReport>,
    /// The graph against another graph: one entry for each runtime.
    #[serde(default)]
    pub against: Vec<AgainstReport>,
    /// What got worse than in an earlier report.
    #[serde(default)]
    pub regressions: Vec<Regression>,
}

/// What the reference ran on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Environment {
    /// candle's version.
    pub candle: String,
    /// The precision of the reference.
    pub reference: String,
    /// What the reference is, in words: the model in candle, or another graph in a runtime.
    #[serde(default)]
    pub source: String,
    /// Whether the reference is another graph, so that no checkpoint stands behind the verdict.
    #[serde(default)]
    pub against_a_graph: bool,
    /// The graph's precision, in which candle's own distance was measured.
    pub precision: String,
    /// Threads of candle's pool.
    pub threads: usize,
}

/// A case, and candle's own distance in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CaseReport {
    /// The case's name.
    pub name: String,
    /// Token ids, `[batch, seq]`.
    pub input_ids: Vec<Vec<i64>>,
    /// 1 where a token is real, `[batch, seq]`.
    pub attention_mask: Vec<Vec<i64>>,
    /// Cached steps after the prompts.
    pub steps: usize,
    /// On which side rows have padding.
    #[serde(default)]
    pub padding: Option<Padding>,
    /// By row, the model that it is for: a place in [`Report::models`].
    #[serde(default)]
    pub models: Vec<usize>,
    /// Columns that each call of the prefill fed, but for the last.
    pub chunk: usize,
    /// Number of compared positions, those of the steps included.
    pub positions: usize,
    /// The reference's largest absolute logit.
    pub largest_logit: f64,
    /// How far candle is from the reference at the graph's precision; none when its logits are not finite.
    pub candle: Option<Figures>,
    /// Why candle's own run failed the case.
    pub failure: Option<String>,
    /// What the budget comes to.
    pub allowance: Allowance,
}

/// A graph in one runtime.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunReport {
    /// The name that the caller gave the run.
    pub name: String,
    /// Whether all cases passed.
    pub verdict: Verdict,
    /// The runtime; none when it did not load the graph.
    pub runtime: Option<RuntimeInfo>,
    /// Why there is nothing to compare.
    pub failure: Option<String>,
    /// How many nodes ran on each execution provider, by the runtime's own profile of its first run.
    pub nodes: Option<BTreeMap<String, usize>>,
    /// Where the graph first departs from the reference, where that was looked for.
    pub departure: Option<Departure>,
    /// How far the layers are from the reference's, where that was looked at.
    #[serde(default)]
    pub layers: Vec<LayerErrors>,
    /// The cases, in the report's order.
    pub cases: Vec<RunCase>,
}

/// A graph in one runtime in one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunCase {
    /// The case's name.
    pub case: String,
    /// Whether the run passed.
    pub verdict: Verdict,
    /// Why it did not.
    pub failure: Option<String>,
    /// How far the run is from the reference; none when it failed or its logits are not finite.
    pub figures: Option<Figures>,
    /// The largest absolute distance at each compared position, in the order of the calls, in each by row, then column.
    #[serde(default)]
    pub errors: Vec<f64>,
    /// How far it may be.
    pub allowed: f64,
    /// What part it takes, at the position where it takes most, of what candle with its products summed in order allows there; measured
    /// where it was too far from the reference and rounding could explain it. It passes by that where it is 1 at most.
    #[serde(default)]
    pub in_order: Option<f64>,
    /// The factor that would just pass, `e(run) / e(candle)`; none where candle has no distance.
    pub factor: Option<f64>,
    /// The greedy continuation.
    pub greedy: Option<Greedy>,
}

/// A zero adapter in one runtime: every output of the base graph and of the graph with the adapter, bit for bit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NoOpReport {
    /// The name that the caller gave the pair.
    pub name: String,
    /// Whether nothing differs.
    pub verdict: Verdict,
    /// The runtime; none when it did not run the graphs.
    pub runtime: Option<RuntimeInfo>,
    /// Why it did not pass.
    pub failure: Option<String>,
    /// Number of output tensors compared.
    pub tensors: usize,
    /// The first element that differs.
    pub first_difference: Option<FirstDifference>,
}

/// A graph and another one in one runtime, over the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgainstReport {
    /// The name that the caller gave the pair.
    pub name: String,
    /// Whether all cases passed.
    pub verdict: Verdict,
    /// The runtime; none when it did not run the graphs.
    pub runtime: Option<RuntimeInfo>,
    /// Why there is nothing to compare.
    pub failure: Option<String>,
    /// Where the graph first departs from the other one, where that was looked for.
    #[serde(default)]
    pub departure: Option<Departure>,
    /// The cases, in the report's order.
    pub cases: Vec<AgainstCase>,
}

/// A graph and another one in one runtime in one case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AgainstCase {
    /// The case's name.
    pub case: String,
    /// Whether they agree.
    pub verdict: Verdict,
    /// Why they do not.
    pub failure: Option<String>,
    /// How far the graph's logits are from the other's.
    pub figures: Option<Figures>,
    /// How far they may be.
    pub allowed: f64,
    /// The greedy tokens, the other graph's as the reference.
    pub greedy: Option<Greedy>,
    /// The other outputs of the case's last call: the cache.
    pub tensors: Vec<TensorFigures>,
}

impl RunCase {
    /// What part it takes of how far it may be; none where it has no figures or may not be away at all.
    pub fn used(&self) -> Option<f64> {
        let part = self.figures.filter(|_| self.allowed > 0.0).map(|figures| figures.max_abs / self.allowed);
        self.in_order.filter(|_| self.verdict.passed()).or(part)
    }
}

impl Report {
    /// The report as JSON text.
    ///
    /// # Errors
    /// When it does not serialise.
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// All figures of the graph against the reference.
    pub fn figures(&self) -> impl Iterator<Item = &Figures> {
        self.runs.iter().flat_map(|run| &run.cases).filter_map(|case| case.figures.as_ref())
    }

    /// The tolerance, `atol = rtol`, that every run would just pass.
    pub fn tolerance(&self) -> Option<f64> {
        self.figures().map(|figures| figures.tolerance).reduce(f64::max)
    }
}

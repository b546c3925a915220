//! The check from end to end: reference, budget, runs, report.

use ndarray::Array2;

use super::figures::{by_spot, first_non_finite, largest_abs};
use super::report::RULE;
use super::run::{CandleRunner, GraphRunner, Runner, Script, record, replay};
use super::{
    AgainstCase, AgainstReport, Budget, Case, CaseReport, Environment, Error, Facts, Figures, Finding, FindingKind,
    Greedy, Localise, NoOpPair, NoOpReport, Report, Result, RunCase, RunReport, SCHEMA_VERSION, TensorFigures,
    Thresholds, Verdict, no_op,
};
use crate::base::{Decoder, DecoderSpec, SiteHook};
use crate::runtime::{self, Session};

/// The version in Cargo.lock; a test holds them together.
const CANDLE_VERSION: &str = "0.11.1";

/// A model as candle runs it.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// The base model.
    pub decoder: &'a Decoder,
    /// What acts at its attention sites; [`NoHook`](crate::base::NoHook) for the base model itself.
    pub hook: &'a dyn SiteHook,
}

/// Opens a graph in a runtime. Called when its turn has come, so that there is one session at a time.
pub type Open<'a> = Box<dyn FnOnce() -> runtime::Result<Box<dyn Session>> + 'a>;

/// A graph in a runtime, to be judged.
pub struct Candidate<'a> {
    /// A name for the report: the runtime's, with whatever sets it apart from others.
    pub name: String,
    /// Opens the graph.
    pub open: Open<'a>,
}

/// A graph and another one in one runtime, to be compared with each other.
pub struct Other<'a> {
    /// A name for the report: the runtime's.
    pub name: String,
    /// Opens the graph.
    pub graph: Open<'a>,
    /// Opens the graph to compare it with.
    pub other: Open<'a>,
}

/// The cases with the reference's logits. Holds no model: what computed it can be dropped.
#[derive(Debug)]
pub struct Reference {
    pub(super) spec: DecoderSpec,
    pub(super) precision: &'static str,
    pub(super) cases: Vec<ReferenceCase>,
}

#[derive(Debug)]
pub(super) struct ReferenceCase {
    pub(super) case: Case,
    pub(super) script: Script,
    /// `[spots, vocab]`.
    pub(super) logits: Array2<f64>,
    largest: f64,
}

impl Reference {
    /// Runs the model, in float64 where it fits, over the cases.
    ///
    /// # Errors
    /// When a case does not fit the model, or the model fails or gives a logit that is not finite.
    pub fn compute(model: Model<'_>, cases: Vec<Case>) -> Result<Self> {
        let spec = model.decoder.spec().clone();
        let mut runner = CandleRunner::new(model);
        let cases = cases.into_iter().map(|case| ReferenceCase::compute(&mut runner, case, &spec));
        Ok(Self { cases: cases.collect::<Result<_>>()?, precision: model.decoder.dtype().as_str(), spec })
    }

    /// The logits of the same model in another precision, by case.
    ///
    /// # Errors
    /// When it is another model, or fails.
    pub fn replay(&self, model: Model<'_>) -> Result<Vec<Array2<f64>>> {
        if *model.decoder.spec() != self.spec {
            return Err(Error::Option { option: "model", why: "is not the reference's model".into() });
        }
        let mut runner = CandleRunner::new(model);
        self.cases.iter().map(|case| replay(&mut runner, &case.script, self.spec.vocab_size)).collect()
    }
}

impl ReferenceCase {
    fn compute(runner: &mut CandleRunner<'_>, case: Case, spec: &DecoderSpec) -> Result<Self> {
        case.check_fits(spec)?;
        let (script, logits) = record(runner, &case, spec.vocab_size)?;
        Self::new(case, script, logits)
    }

    pub(super) fn new(case: Case, script: Script, logits: Array2<f64>) -> Result<Self> {
        if let Some(what) = first_non_finite(&logits, &script.spots) {
            return Err(Error::Reference { case: case.name().into(), what });
        }
        let largest = largest_abs(&logits);
        Ok(Self { case, script, logits, largest })
    }

    /// A run's distance, or why it has none.
    fn figures(&self, logits: &Array2<f64>) -> std::result::Result<Figures, String> {
        if let Some(what) = first_non_finite(logits, &self.script.spots) {
            return Err(format!("{what} is not finite"));
        }
        Figures::of(&self.logits, logits, &self.script.spots, &self.script.next)
            .ok_or_else(|| "there are no logits".into())
    }
}

/// A check in progress: the reference, the budget, and the verdicts so far.
#[derive(Debug)]
pub struct Check {
    reference: Reference,
    budget: Budget,
    judgement: Judgement,
    environment: Environment,
    cases: Vec<CaseReport>,
    runs: Vec<RunReport>,
    base: Vec<RunReport>,
    no_op: Vec<NoOpReport>,
    against: Vec<AgainstReport>,
}

/// Runs that were judged, to be localised: names and scripts of the cases, in the order of each run's.
pub(super) struct ToLocalise<'a> {
    pub(super) cases: &'a [(&'a str, &'a Script)],
    pub(super) runs: &'a mut [RunReport],
    pub(super) budget: Budget,
}

/// What a run is judged by.
#[derive(Clone, Copy, Debug)]
enum Judgement {
    Budget,
    Thresholds(Thresholds),
    /// A quantised graph, for which the user stated no thresholds.
    Nothing,
}

impl Check {
    /// Measures candle's own distance: `model` is the reference's model in the graph's precision. It can be dropped
    /// afterwards. Where it has the reference's own precision its distance is zero, and the floor decides.
    ///
    /// # Errors
    /// When the budget makes no sense, or the model is another one than the reference's or fails.
    pub fn new(reference: Reference, model: Model<'_>, budget: Budget) -> Result<Self> {
        let own = reference.replay(model)?;
        Self::with_logits(reference, &own, model.decoder.dtype().as_str(), budget)
    }

    /// The same with candle's own logits, which [`Reference::replay`] gives at `precision`.
    ///
    /// # Errors
    /// When the budget makes no sense.
    pub fn with_logits(reference: Reference, own: &[Array2<f64>], precision: &str, budget: Budget) -> Result<Self> {
        let budget = budget.checked()?;
        let cases = reference.cases.iter().zip(own);
        let cases = cases.map(|(case, logits)| case_report(case, case.figures(logits), &budget)).collect();
        let environment = Environment {
            candle: CANDLE_VERSION.into(),
            reference: reference.precision.into(),
            precision: precision.into(),
            threads: rayon::current_num_threads(),
        };
        Ok(Self {
            reference,
            budget,
            judgement: Judgement::Budget,
            environment,
            cases,
            runs: Vec::new(),
            base: Vec::new(),
            no_op: Vec::new(),
            against: Vec::new(),
        })
    }

    /// Judges by what the user states in the place of the budget.
    ///
    /// # Errors
    /// When a threshold makes no sense.
    pub fn by_thresholds(mut self, thresholds: Thresholds) -> Result<Self> {
        self.judgement = Judgement::Thresholds(thresholds.checked()?);
        Ok(self)
    }

    /// Judges nothing: the graph is quantised and no thresholds were stated.
    pub fn without_judgement(mut self) -> Self {
        self.judgement = Judgement::Nothing;
        self
    }

    /// Judges a graph in all cases. A runtime that fails is a failed row of the report.
    pub fn run(&mut self, candidate: Candidate<'_>) -> Verdict {
        let Candidate { name, open } = candidate;
        let report = RunReport {
            name,
            verdict: Verdict::Fail,
            runtime: None,
            failure: None,
            nodes: None,
            departure: None,
            layers: Vec::new(),
            cases: Vec::new(),
        };
        let report = match self.judge(open) {
            Ok((runtime, nodes, cases)) => {
                let passed = Verdict::all(cases.iter().map(|case| case.verdict));
                let verdict = if cases.is_empty() { Verdict::Fail } else { passed };
                RunReport { verdict, runtime: Some(runtime), nodes, cases, ..report }
            }
            Err(error) => RunReport { verdict: verdict_of(&error), failure: Some(error.to_string()), ..report },
        };
        let verdict = report.verdict;
        self.runs.push(report);
        verdict
    }

    fn judge(&self, open: Open<'_>) -> Result<Judged> {
        let mut runner = GraphRunner::new(open()?, self.reference.spec.attention.head_dim)?;
        let cases = self.reference.cases.iter().zip(&self.cases);
        let cases = cases.map(|(case, report)| self.judge_case(&mut runner, case, report)).collect();
        Ok((runner.session_mut().info(), runner.session_mut().nodes(), cases))
    }

    /// What is wrong with a run's figures; the verdict where nothing is asked.
    fn verdict(&self, figures: &Figures, greedy: &Greedy, allowed: f64) -> (Verdict, Option<String>) {
        let failure = match self.judgement {
            Judgement::Budget => too_far(figures, allowed).or_else(|| disagreement(greedy)),
            Judgement::Thresholds(thresholds) => thresholds.failure(figures),
            Judgement::Nothing => {
                let why = "the graph is quantised, and no thresholds were stated to judge it by";
                return (Verdict::Unknown, Some(why.into()));
            }
        };
        (Verdict::of(failure.is_none()), failure)
    }

    /// Finds where the runs that failed depart from the reference, and writes that into the report.
    ///
    /// # Errors
    /// When candle fails.
    pub fn localise(&mut self, what: &Localise<'_>) -> Result<()> {
        let cases: Vec<_> = self.reference.cases.iter().map(|case| (case.case.name(), &case.script)).collect();
        what.runs(ToLocalise { cases: &cases, runs: &mut self.runs, budget: self.budget })
    }

    /// Whether a run failed whose cases ran.
    pub fn departs(&self) -> bool {
        self.runs.iter().any(|run| run.verdict == Verdict::Fail && !run.cases.is_empty())
    }

    /// The runs of the base graph against its own reference, without adapter, to go into this report.
    pub fn with_base(mut self, base: Self) -> Self {
        self.base = base.runs;
        self
    }

    fn judge_case(&self, runner: &mut dyn Runner, case: &ReferenceCase, report: &CaseReport) -> RunCase {
        let logits = replay(runner, &case.script, self.reference.spec.vocab_size).map_err(|error| error.to_string());
        let judged = logits.and_then(|logits| Ok((case.figures(&logits)?, logits)));
        let allowed = report.allowance.allowed;
        let row = RunCase {
            case: report.name.clone(),
            verdict: Verdict::Fail,
            failure: None,
            figures: None,
            errors: Vec::new(),
            allowed,
            factor: None,
            greedy: None,
        };
        let (figures, logits) = match judged {
            Ok(judged) => judged,
            Err(failure) => return RunCase { failure: Some(failure), ..row },
        };
        let greedy = Greedy::of(&case.logits, &logits, &case.script.picks, allowed);
        let (verdict, failure) = self.verdict(&figures, &greedy, allowed);
        let candle = report.candle.map(|candle| candle.max_abs).filter(|distance| *distance > 0.0);
        RunCase {
            verdict,
            failure,
            errors: by_spot(&case.logits, &logits),
            factor: candle.map(|candle| figures.max_abs / candle),
            figures: Some(figures),
            greedy: Some(greedy),
            ..row
        }
    }

    /// Judges whether a zero adapter changes anything, over the tokens of all cases. A runtime that fails is a failed row
    /// of the report.
    pub fn no_op(&mut self, pair: NoOpPair<'_>) -> Verdict {
        let NoOpPair { name, base, folded } = pair;
        let report = match self.compare(base, folded) {
            Ok((runtime, tensors, first_difference)) => {
                let failure = match &first_difference {
                    Some(difference) => Some(difference.to_string()),
                    None => (tensors == 0).then(|| "there was nothing to compare".into()),
                };
                let verdict = Verdict::of(failure.is_none());
                NoOpReport { name, verdict, runtime: Some(runtime), failure, tensors, first_difference }
            }
            Err(error) => NoOpReport {
                name,
                verdict: verdict_of(&error),
                runtime: None,
                failure: Some(error.to_string()),
                tensors: 0,
                first_difference: None,
            },
        };
        let verdict = report.verdict;
        self.no_op.push(report);
        verdict
    }

    fn compare(
        &self,
        base: Open<'_>,
        folded: Open<'_>,
    ) -> Result<(runtime::RuntimeInfo, usize, Option<no_op::FirstDifference>)> {
        let spec = &self.reference.spec;
        let outputs = |open| {
            let scripts = self.reference.cases.iter().map(|case| &case.script);
            no_op::outputs(open, spec.attention.head_dim, spec.vocab_size, scripts)
        };
        let (base, folded) = (outputs(base)?, outputs(folded)?);
        let names: Vec<&str> = self.reference.cases.iter().map(|case| case.case.name()).collect();
        let (tensors, difference) = no_op::compare(&names, &base, &folded)?;
        Ok((folded.info, tensors, difference))
    }

    /// Compares the graph with another one, over the tokens of all cases. The logits may be twice as far apart as the graph may
    /// be from the reference, since both may be so far in other directions.
    pub fn against(&mut self, other: Other<'_>) -> Verdict {
        let Other { name, graph, other } = other;
        let report = match self.compare_graphs(graph, other) {
            Ok((runtime, cases)) => {
                let verdict = Verdict::all(cases.iter().map(|case| case.verdict));
                AgainstReport { name, verdict, runtime: Some(runtime), failure: None, cases }
            }
            Err(error) => {
                let (verdict, failure) = (verdict_of(&error), Some(error.to_string()));
                AgainstReport { name, verdict, runtime: None, failure, cases: Vec::new() }
            }
        };
        let verdict = report.verdict;
        self.against.push(report);
        verdict
    }

    fn compare_graphs(&self, graph: Open<'_>, other: Open<'_>) -> Result<(runtime::RuntimeInfo, Vec<AgainstCase>)> {
        let spec = &self.reference.spec;
        let run = |open| {
            let scripts = self.reference.cases.iter().map(|case| &case.script);
            no_op::last_outputs(open, spec.attention.head_dim, spec.vocab_size, scripts)
        };
        let ((_, other), (info, graph)) = (run(other)?, run(graph)?);
        let cases = self.reference.cases.iter().zip(&self.cases).zip(graph.iter().zip(&other));
        let cases = cases.map(|((case, report), ((logits, outputs), (other_logits, other_outputs)))| {
            let allowed = 2.0 * report.allowance.allowed;
            let script = &case.script;
            let bad = |logits| first_non_finite(logits, &script.spots).map(|what| format!("{what} is not finite"));
            let figures =
                match bad(logits).or_else(|| bad(other_logits).map(|what| format!("in the other graph {what}"))) {
                    Some(failure) => Err(failure),
                    None => Figures::of(other_logits, logits, &script.spots, &script.next).ok_or_else(String::new),
                };
            let greedy = Greedy::of(other_logits, logits, &script.picks, allowed);
            let (verdict, failure) = match &figures {
                Ok(figures) => self.verdict(figures, &greedy, allowed),
                Err(failure) => (Verdict::Fail, Some(failure.clone())),
            };
            let tensors = other_outputs.iter().filter(|(name, _)| *name != "logits");
            let tensors = tensors.map(|(name, value)| TensorFigures::of(name, value, outputs.get(name)));
            AgainstCase {
                case: report.name.clone(),
                verdict,
                failure,
                figures: figures.ok(),
                allowed,
                greedy: Some(greedy),
                tensors: tensors.collect(),
            }
        });
        Ok((info, cases.collect()))
    }

    /// The report of everything that was judged.
    ///
    /// # Errors
    /// When nothing was.
    pub fn report(self, facts: Facts) -> Result<Report> {
        if self.cases.is_empty() || self.runs.is_empty() && self.no_op.is_empty() {
            return Err(Error::Nothing);
        }
        let candle = Verdict::of(self.cases.iter().all(|case| case.failure.is_none()));
        let runs = self.base.iter().chain(&self.runs).map(|run| run.verdict);
        let no_op = self.no_op.iter().map(|pair| pair.verdict);
        let against = self.against.iter().map(|pair| pair.verdict);
        let verdict = Verdict::all(runs.chain(no_op).chain(against).chain([candle]));
        let thresholds = match self.judgement {
            Judgement::Thresholds(thresholds) => Some(thresholds),
            Judgement::Budget | Judgement::Nothing => None,
        };
        let mut report = Report {
            schema_version: SCHEMA_VERSION,
            tool: format!("prefold {}", env!("CARGO_PKG_VERSION")),
            verdict,
            finding: Finding { kind: FindingKind::Parity, text: String::new() },
            inputs: facts.inputs,
            command: facts.command,
            environment: self.environment,
            budget: self.budget,
            thresholds,
            rule: RULE.into(),
            cases: self.cases,
            runs: self.runs,
            base: self.base,
            no_op: self.no_op,
            against: self.against,
            regressions: Vec::new(),
        };
        report.finding = Finding::of(&report, facts.subject);
        Ok(report)
    }
}

type Judged = (runtime::RuntimeInfo, Option<std::collections::BTreeMap<String, usize>>, Vec<RunCase>);

/// A runtime that is not there says nothing about the graph.
fn verdict_of(error: &Error) -> Verdict {
    let unavailable = matches!(error, Error::Runtime(error) if error.is_unavailable());
    if unavailable { Verdict::Unknown } else { Verdict::Fail }
}

fn case_report(case: &ReferenceCase, candle: std::result::Result<Figures, String>, budget: &Budget) -> CaseReport {
    let rows = |array: &Array2<i64>| array.outer_iter().map(|row| row.to_vec()).collect();
    let distance = candle.as_ref().ok().map(|figures| figures.max_abs);
    CaseReport {
        name: case.case.name().into(),
        input_ids: rows(case.case.ids()),
        attention_mask: rows(case.case.mask()),
        steps: case.case.steps(),
        chunk: case.case.chunk(),
        positions: case.script.spots.len(),
        largest_logit: case.largest,
        allowance: budget.allowance(distance, case.largest),
        failure: candle.as_ref().err().cloned(),
        candle: candle.ok(),
    }
}

fn too_far(figures: &Figures, allowed: f64) -> Option<String> {
    let (distance, worst) = (figures.max_abs, figures.worst);
    (distance > allowed).then(|| {
        format!(
            "the logits are up to {distance:.3e} away from the reference, {allowed:.3e} is allowed; the worst is {} for {} \
             for token {} at row {}, column {}",
            worst.run, worst.reference, worst.token, worst.spot.row, worst.spot.column
        )
    })
}

fn disagreement(greedy: &Greedy) -> Option<String> {
    let difference = greedy.differences.iter().find(|difference| !difference.tie)?;
    Some(format!(
        "row {} picks token {} at step {} and the reference {}, whose logit is {:.3e} larger",
        difference.row, difference.run, difference.step, difference.reference, difference.gap
    ))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::{DType, Device};

    use super::*;
    use crate::adapter::Adapter;
    use crate::base::{Checkpoint, Linear, WeightRole};
    use crate::parity::testing::{
        self, Candle, CandleSession, Distort, FAITHFUL, SHIFTED, Tampered, UNMASKED, candidate, check, tiny_adapter,
        tiny_decoder,
    };
    use crate::runtime::{OrtOptions, OrtSession, TractOptions, TractSession};

    fn report(check: Check) -> Report {
        check.report(Facts { command: "prefold verify".into(), ..Facts::default() }).unwrap()
    }

    fn failures(report: &Report) -> Vec<&str> {
        report.rows().iter().filter_map(|row| row.failure).collect()
    }

    fn tiny_session(adapter: Option<&Adapter>, distort: Distort) -> CandleSession {
        CandleSession::new(tiny_decoder(DType::F32), adapter, distort)
    }

    fn in_tiny(adapter: Option<&Adapter>, session: impl Session + 'static) -> Report {
        let mut check = check(tiny_decoder, adapter);
        check.run(candidate(session));
        report(check)
    }

    #[test]
    fn the_same_model_passes_with_and_without_an_adapter() {
        for adapter in [None, Some(&tiny_adapter(0.3))] {
            let report = in_tiny(adapter, tiny_session(adapter, FAITHFUL));
            assert_eq!((report.verdict, failures(&report)), (Verdict::Pass, vec![]));
            assert_eq!(report.runs[0].cases.len(), 8);
            for case in &report.runs[0].cases {
                let greedy = case.greedy.as_ref().unwrap();
                assert_eq!(greedy.run, greedy.reference, "{}", case.case);
            }
        }
    }

    #[test]
    fn a_missing_adapter_is_told() {
        let report = in_tiny(Some(&tiny_adapter(0.3)), tiny_session(None, FAITHFUL));
        assert_eq!((report.verdict, failures(&report).len()), (Verdict::Fail, 8));
        let message = failures(&report)[0];
        assert!(message.contains("away from the reference") && message.contains("is allowed"), "{message}");
    }

    /// The base model's scores see only differences of positions, an adapter's term the positions themselves.
    #[test]
    fn shifted_positions_are_told_by_an_adapter_alone() {
        assert_eq!(in_tiny(None, tiny_session(None, SHIFTED)).verdict, Verdict::Pass);
        let adapter = tiny_adapter(0.3);
        let report = in_tiny(Some(&adapter), tiny_session(Some(&adapter), SHIFTED));
        assert_eq!((report.verdict, failures(&report).len()), (Verdict::Fail, 8));
    }

    /// Padding after a row is hidden by causality, whatever the mask says.
    #[test]
    fn an_ignored_mask_is_told_by_padding_on_the_left_alone() {
        let report = in_tiny(None, tiny_session(None, UNMASKED));
        let failed = report.runs[0].cases.iter().filter(|case| !case.verdict.passed());
        let failed: Vec<&str> = failed.map(|case| case.case.as_str()).collect();
        assert_eq!(failed, ["left_padding", "cached_decode_left_padding"]);
    }

    #[test]
    fn one_weight_a_thousandth_off_is_told() {
        for role in [WeightRole::Embedding, WeightRole::Weight(1, Linear::Down), WeightRole::FinalNorm] {
            let weight = |weight: &crate::base::WeightShape| {
                let tensor = testing::tiny_weight(weight, DType::F32)?;
                Ok(if weight.role == role { testing::perturbed(tensor, 1e-3) } else { tensor })
            };
            let decoder = Decoder::from_weights(&testing::tiny_spec(), weight).unwrap();
            let report = in_tiny(None, CandleSession::new(decoder, None, FAITHFUL));
            assert_eq!(report.verdict, Verdict::Fail, "{role:?}");
        }
    }

    #[test]
    fn logits_that_are_not_finite_fail_and_are_named() {
        for (poison, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            let change = move |_: &str, logits: &mut ndarray::ArrayD<f32>| logits[[0, 0, 3]] = poison;
            let report = in_tiny(None, Tampered { inner: tiny_session(None, FAITHFUL), change });
            let case = &report.runs[0].cases[0];
            assert_eq!((report.verdict, case.verdict, &case.figures), (Verdict::Fail, Verdict::Fail, &None));
            let expected = format!("the logit {name} for token 3 at row 0, column 0 is not finite");
            assert_eq!(case.failure.as_deref(), Some(expected.as_str()));
            report.to_json().unwrap();
        }
    }

    /// Padding is not compared: a graph may give what it likes there.
    #[test]
    fn padding_is_not_compared() {
        let mut check = check(tiny_decoder, None);
        let change = |_: &str, logits: &mut ndarray::ArrayD<f32>| {
            if logits.shape()[0] > 1 {
                logits[[1, 0, 3]] = f32::NAN;
            }
        };
        check.run(candidate(Tampered { inner: tiny_session(None, FAITHFUL), change }));
        let report = report(check);
        let verdict = |name: &str| report.runs[0].cases.iter().find(|case| case.case == name).unwrap().verdict;
        assert_eq!(verdict("left_padding"), Verdict::Pass, "row 1 starts with padding");
        assert_eq!(verdict("right_padding"), Verdict::Fail, "row 1 starts with its first token");
    }

    /// Each pick is moved to a token that is further away than a tie, without any logit moving by more than is allowed.
    #[test]
    fn another_greedy_token_fails_although_the_distance_is_allowed() {
        let mut check = check(tiny_decoder, None);
        for case in &mut check.cases {
            case.allowance.allowed = 0.3;
        }
        let change = |_: &str, logits: &mut ndarray::ArrayD<f32>| {
            for mut position in logits.lanes_mut(ndarray::Axis(2)) {
                let best = position.iter().copied().fold(f32::MIN, f32::max);
                position.mapv_inplace(|logit| if best - logit < 0.31 { logit - 0.29 } else { logit + 0.29 });
            }
        };
        check.run(candidate(Tampered { inner: tiny_session(None, FAITHFUL), change }));
        let report = report(check);
        for case in &report.runs[0].cases {
            assert!(case.figures.unwrap().max_abs < case.allowed);
            let greedy = case.greedy.as_ref().unwrap();
            assert!(!greedy.agrees && greedy.differences.iter().all(|difference| !difference.tie), "{greedy:?}");
            let message = case.failure.as_deref().unwrap();
            assert!(message.starts_with("row 0 picks token") && message.contains("at step 0 and the reference"));
        }
    }

    #[test]
    fn a_runtime_that_fails_is_a_failed_row_and_an_absent_one_tells_nothing() {
        let mut check = check(tiny_decoder, None);
        let open: Open<'_> = Box::new(|| Err(runtime::Error::NoLibrary { tried: Vec::new() }));
        assert_eq!(check.run(Candidate { name: "absent".into(), open }), Verdict::Unknown);
        let mut spec = testing::tiny_spec();
        spec.vocab_size = 41;
        let other = Decoder::from_weights(&spec, |weight| testing::tiny_weight(weight, DType::F32)).unwrap();
        check.run(candidate(CandleSession::new(other, None, FAITHFUL)));
        assert_eq!(check.run(candidate(tiny_session(None, FAITHFUL))), Verdict::Pass);
        let report = report(check);
        assert_eq!(report.verdict, Verdict::Fail);
        let rows = report.rows();
        assert_eq!((rows[0].run, rows[0].case), ("absent", "load"));
        assert!(rows[0].failure.unwrap().contains("no usable ONNX Runtime library"));
        assert!(rows[1].failure.unwrap().contains("the logits are [1, 12, 41]"), "{:?}", rows[1]);
        assert_eq!(rows.len(), 1 + 8 + 8);
    }

    #[test]
    fn what_cannot_be_judged_is_an_error() {
        assert!(matches!(check(tiny_decoder, None).report(Facts::default()), Err(Error::Nothing)));

        let broken = |weight: &crate::base::WeightShape| {
            let tensor = testing::tiny_weight(weight, DType::F64)?;
            Ok(if weight.role == WeightRole::FinalNorm { testing::perturbed(tensor, f64::NAN) } else { tensor })
        };
        let broken = Candle::new(Decoder::from_weights(&testing::tiny_spec(), broken).unwrap(), None);
        let error = Reference::compute(broken.model(), testing::cases(&testing::tiny_spec())).unwrap_err();
        assert!(matches!(&error, Error::Reference { case, .. } if case == "single_row"), "{error}");

        let model = Candle::new(tiny_decoder(DType::F64), None);
        let foreign = vec![Case::row("foreign", &[40], 0).unwrap()];
        assert!(matches!(Reference::compute(model.model(), foreign), Err(Error::Base(_))));
        let long = vec![Case::row("long", &[1; 65], 0).unwrap()];
        assert!(matches!(Reference::compute(model.model(), long), Err(Error::Case { .. })));

        let reference = Reference::compute(model.model(), testing::cases(&testing::tiny_spec())).unwrap();
        let mut spec = testing::tiny_spec();
        spec.norm.epsilon = 1e-6;
        let other = Decoder::from_weights(&spec, |weight| testing::tiny_weight(weight, DType::F32)).unwrap();
        let other = Candle::new(other, None);
        let budget = Budget::of(DType::F32, &spec).unwrap();
        assert!(matches!(Check::new(reference, other.model(), budget), Err(Error::Option { option: "model", .. })));
    }

    #[test]
    fn a_report_is_what_its_schema_says_and_reads_back() {
        let mut check = check(tiny_decoder, None);
        check.run(candidate(tiny_session(None, FAITHFUL)));
        check.run(candidate(tiny_session(Some(&tiny_adapter(0.3)), FAITHFUL)));
        let open: Open<'_> = Box::new(|| Err(runtime::Error::NoLibrary { tried: Vec::new() }));
        check.run(Candidate { name: "absent".into(), open });
        check.no_op(no_op_pair(|_, _| {}));
        let report = report(check);
        let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
        let schema = serde_json::to_value(schemars::schema_for!(Report)).unwrap();
        let errors: Vec<String> =
            jsonschema::validator_for(&schema).unwrap().iter_errors(&json).map(|error| error.to_string()).collect();
        assert_eq!(errors, Vec::<String>::new());
        assert_eq!(serde_json::from_value::<Report>(json).unwrap(), report);
    }

    fn no_op_pair(change: impl FnMut(&str, &mut ndarray::ArrayD<f32>) + Send + 'static) -> NoOpPair<'static> {
        NoOpPair {
            name: "test".into(),
            base: Box::new(|| Ok(Box::new(tiny_session(None, FAITHFUL)))),
            folded: Box::new(|| {
                Ok(Box::new(Tampered { inner: tiny_session(Some(&tiny_adapter(0.0)), FAITHFUL), change }))
            }),
        }
    }

    #[test]
    fn a_zero_adapter_changes_nothing_or_the_first_bit_is_named() {
        let mut check = check(tiny_decoder, None);
        assert_eq!(check.no_op(no_op_pair(|_, _| {})), Verdict::Pass);
        let last_bit = |_: &str, logits: &mut ndarray::ArrayD<f32>| {
            if logits.shape()[..2] == [3, 12] {
                logits[[1, 2, 3]] = logits[[1, 2, 3]].next_up();
            }
        };
        assert_eq!(check.no_op(no_op_pair(last_bit)), Verdict::Fail);
        let report = report(check);
        assert_eq!(report.verdict, Verdict::Fail);
        // Three prefills without steps, one of one token, three with four steps, one of three pieces with four steps.
        assert_eq!(report.no_op[0].tensors, 4 + 3 * 5 + (3 + 4));
        let found = report.no_op[1].first_difference.as_ref().unwrap();
        assert_eq!((found.case.as_str(), found.call, found.output.as_str()), ("left_padding", 0, "logits"));
        assert_eq!(found.index, [1, 2, 3]);
    }

    #[test]
    fn the_stated_version_is_the_locked_one() {
        let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).unwrap();
        assert!(lock.contains(&format!("name = \"candle-core\"\nversion = \"{CANDLE_VERSION}\"")));
    }

    /// A graph that another exporter wrote, and the checkpoint that it was written from.
    struct Exported {
        graph: std::path::PathBuf,
        checkpoint: Checkpoint,
        adapter: Adapter,
        library: Option<std::path::PathBuf>,
    }

    impl Exported {
        fn open(name: &str) -> Option<Self> {
            let graph = testing::shared(&format!("graphs/optimum_with_past/{name}/model.onnx"))?;
            let oracle = testing::shared(&format!("oracles/{name}"))?;
            let checkpoint = Checkpoint::open(&oracle).unwrap();
            let adapter = Adapter::open(&oracle.join("adapter.safetensors")).unwrap();
            Some(Self { graph, checkpoint, adapter, library: testing::ort_library() })
        }

        fn decoder(&self, dtype: DType) -> Decoder {
            Decoder::load(&self.checkpoint, dtype, &Device::Cpu).unwrap()
        }

        fn opens(&self) -> Vec<(&'static str, Open<'_>)> {
            let mut opens: Vec<(&'static str, Open<'_>)> = vec![("tract", tract(&self.graph))];
            if let Some(library) = &self.library {
                let open = || Ok(Box::new(OrtSession::open(library, &self.graph, OrtOptions::default())?) as Box<_>);
                opens.push(("onnxruntime", Box::new(open)));
            }
            opens
        }

        /// The graph in every runtime against the check's reference.
        fn judge(&self, mut check: Check) -> Report {
            for (name, open) in self.opens() {
                check.run(Candidate { name: name.into(), open });
            }
            report(check)
        }
    }

    fn tract(graph: &Path) -> Open<'_> {
        Box::new(move || Ok(Box::new(TractSession::open(graph, TractOptions::default())?)))
    }

    #[test]
    fn exported_graphs_pass_as_they_are_and_fail_against_another_function() {
        for name in ["llama_gqa", "llama_mha"] {
            let Some(exported) = Exported::open(name) else { return };
            let faithful = exported.judge(check(|dtype| exported.decoder(dtype), None));
            assert_eq!(failures(&faithful), Vec::<&str>::new(), "{name}");
            assert_eq!(faithful.verdict, Verdict::Pass);
            for run in &faithful.runs {
                assert_eq!(run.runtime.as_ref().unwrap().runtime, run.name);
                for case in &run.cases {
                    let figures = case.figures.unwrap();
                    eprintln!("{name} {} {}: {:.2e} of {:.2e}", run.name, case.case, figures.max_abs, case.allowed);
                    assert!(figures.max_abs > 0.0 && figures.kl_max < 1e-9, "{figures:?}");
                }
            }

            let adapted = exported.judge(check(|dtype| exported.decoder(dtype), Some(&exported.adapter)));
            for case in adapted.runs.iter().flat_map(|run| &run.cases) {
                let figures = case.figures.unwrap();
                assert_eq!(case.verdict, Verdict::Fail, "{name} {}", case.case);
                assert!(figures.max_abs > 0.1 && case.factor.unwrap() > 1e3, "{name} {}: {figures:?}", case.case);
            }

            let role = WeightRole::Weight(0, Linear::Value);
            let off = |dtype| {
                let weight = |weight: &crate::base::WeightShape| {
                    let action = crate::base::Error::candle("converting a weight");
                    let tensor = exported.checkpoint.weight(weight.role)?.to_dtype(dtype).map_err(action)?;
                    Ok(if weight.role == role { testing::perturbed(tensor, 1e-3) } else { tensor })
                };
                Decoder::from_weights(exported.checkpoint.spec(), weight).unwrap()
            };
            let perturbed = exported.judge(check(off, None));
            assert!(perturbed.runs.iter().all(|run| !run.verdict.passed()), "{name}: {:?}", perturbed.rows());
        }
    }

    #[test]
    fn an_exported_graph_equals_itself_and_a_changed_cache_is_named() {
        let Some(exported) = Exported::open("llama_gqa") else { return };
        let mut check = check(|dtype| exported.decoder(dtype), None);
        for ((name, base), (_, folded)) in exported.opens().into_iter().zip(exported.opens()) {
            assert_eq!(check.no_op(NoOpPair { name: name.into(), base, folded }), Verdict::Pass);
        }
        let mut calls = 0;
        let change = move |name: &str, array: &mut ndarray::ArrayD<f32>| {
            calls += usize::from(name == "logits");
            // Five calls without steps or before them: the sixth is a cached step.
            if name == "present.1.value" && calls == 6 {
                array[[0, 1, 12, 15]] = array[[0, 1, 12, 15]].next_down();
            }
        };
        let folded = tract(&exported.graph);
        let folded: Open<'_> = Box::new(|| Ok(Box::new(Tampered { inner: folded()?, change })));
        let pair = NoOpPair { name: "tract".into(), base: tract(&exported.graph), folded };
        assert_eq!(check.no_op(pair), Verdict::Fail);
        let report = report(check);
        let found = report.no_op.last().unwrap().first_difference.as_ref().unwrap();
        assert_eq!((found.case.as_str(), found.call), ("cached_decode", 1));
        assert_eq!((found.output.as_str(), &found.index[..]), ("present.1.value", &[0, 1, 12, 15][..]));
    }
}

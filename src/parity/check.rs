//! The check from end to end: reference, budget, runs, report.

use ndarray::Array2;

use super::figures::{first_non_finite, largest_abs};
use super::run::{CandleRunner, GraphRunner, Runner, Script, record, replay};
use super::{
    Budget, Case, CaseReport, Environment, Error, Facts, Figures, Greedy, NoOpPair, NoOpReport, Report, Result,
    RunCase, RunReport, SCHEMA_VERSION, Verdict, no_op,
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

/// The cases with the reference's logits. Holds no model: what computed it can be dropped.
#[derive(Debug)]
pub struct Reference {
    spec: DecoderSpec,
    precision: &'static str,
    cases: Vec<ReferenceCase>,
}

#[derive(Debug)]
struct ReferenceCase {
    case: Case,
    script: Script,
    /// `[spots, vocab]`.
    logits: Array2<f64>,
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
}

impl ReferenceCase {
    fn compute(runner: &mut CandleRunner<'_>, case: Case, spec: &DecoderSpec) -> Result<Self> {
        case.check_fits(spec)?;
        let (script, logits) = record(runner, &case, spec.vocab_size)?;
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
        Figures::of(&self.logits, logits, &self.script.spots).ok_or_else(|| "there are no logits".into())
    }
}

/// A check in progress: the reference, the budget, and the verdicts so far.
#[derive(Debug)]
pub struct Check {
    reference: Reference,
    budget: Budget,
    environment: Environment,
    cases: Vec<CaseReport>,
    runs: Vec<RunReport>,
    no_op: Vec<NoOpReport>,
}

impl Check {
    /// Measures candle's own distance: `model` is the reference's model in the graph's precision. It can be dropped
    /// afterwards. Where it has the reference's own precision its distance is zero, and the floor decides.
    ///
    /// # Errors
    /// When the budget makes no sense, or the model is another one than the reference's or fails.
    pub fn new(reference: Reference, model: Model<'_>, budget: Budget) -> Result<Self> {
        let budget = budget.checked()?;
        if *model.decoder.spec() != reference.spec {
            return Err(Error::Option { option: "model", why: "is not the reference's model".into() });
        }
        let mut runner = CandleRunner::new(model);
        let cases = reference.cases.iter().map(|case| {
            let logits = replay(&mut runner, &case.script, reference.spec.vocab_size)?;
            Ok(case_report(case, case.figures(&logits), &budget))
        });
        let environment = Environment {
            candle: CANDLE_VERSION.into(),
            reference: reference.precision.into(),
            precision: model.decoder.dtype().as_str().into(),
            threads: rayon::current_num_threads(),
        };
        let cases = cases.collect::<Result<_>>()?;
        Ok(Self { reference, budget, environment, cases, runs: Vec::new(), no_op: Vec::new() })
    }

    /// Judges a graph in all cases. A runtime that fails is a failed row of the report.
    pub fn run(&mut self, candidate: Candidate<'_>) -> Verdict {
        let Candidate { name, open } = candidate;
        let report = match self.judge(open) {
            Ok((runtime, cases)) => {
                let passed = !cases.is_empty() && cases.iter().all(|case| case.verdict.passed());
                RunReport { name, verdict: Verdict::of(passed), runtime: Some(runtime), failure: None, cases }
            }
            Err(error) => {
                let failure = Some(error.to_string());
                RunReport { name, verdict: Verdict::Fail, runtime: None, failure, cases: Vec::new() }
            }
        };
        let verdict = report.verdict;
        self.runs.push(report);
        verdict
    }

    fn judge(&self, open: Open<'_>) -> Result<(runtime::RuntimeInfo, Vec<RunCase>)> {
        let mut runner = GraphRunner::new(open()?, self.reference.spec.attention.head_dim)?;
        let cases = self.reference.cases.iter().zip(&self.cases);
        let cases = cases.map(|(case, report)| self.judge_case(&mut runner, case, report)).collect();
        Ok((runner.session_mut().info(), cases))
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
            allowed,
            factor: None,
            greedy: None,
        };
        let (figures, logits) = match judged {
            Ok(judged) => judged,
            Err(failure) => return RunCase { failure: Some(failure), ..row },
        };
        let greedy = Greedy::of(&case.logits, &logits, &case.script.picks, allowed);
        let failure = too_far(&figures, allowed).or_else(|| disagreement(&greedy));
        let candle = report.candle.map(|candle| candle.max_abs).filter(|distance| *distance > 0.0);
        RunCase {
            verdict: Verdict::of(failure.is_none()),
            failure,
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
                verdict: Verdict::Fail,
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

    /// The report of everything that was judged.
    ///
    /// # Errors
    /// When nothing was.
    pub fn report(self, facts: Facts) -> Result<Report> {
        if self.cases.is_empty() || self.runs.is_empty() && self.no_op.is_empty() {
            return Err(Error::Nothing);
        }
        let candle = self.cases.iter().all(|case| case.failure.is_none());
        let runs = self.runs.iter().all(|run| run.verdict.passed());
        let no_op = self.no_op.iter().all(|pair| pair.verdict.passed());
        Ok(Report {
            schema_version: SCHEMA_VERSION,
            tool: format!("prefold {}", env!("CARGO_PKG_VERSION")),
            verdict: Verdict::of(candle && runs && no_op),
            inputs: facts.inputs,
            command: facts.command,
            environment: self.environment,
            budget: self.budget,
            cases: self.cases,
            runs: self.runs,
            no_op: self.no_op,
        })
    }
}

fn case_report(case: &ReferenceCase, candle: std::result::Result<Figures, String>, budget: &Budget) -> CaseReport {
    let rows = |array: &Array2<i64>| array.outer_iter().map(|row| row.to_vec()).collect();
    let distance = candle.as_ref().ok().map(|figures| figures.max_abs);
    CaseReport {
        name: case.case.name().into(),
        input_ids: rows(case.case.ids()),
        attention_mask: rows(case.case.mask()),
        steps: case.case.steps(),
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

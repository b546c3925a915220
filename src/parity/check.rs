//! The check from end to end: reference, budget, runs, report.

use std::collections::{BTreeMap, BTreeSet};

use ndarray::Array2;

use super::cause::{Failed, Suspect, recognise};
use super::figures::by_spot;
use super::reference::{CANDLE_VERSION, ReferenceCase};
use super::report::RULE;
use super::run::{GraphRunner, Runner, Script, replay};
use super::{
    AgainstReport, Budget, CaseReport, Environment, Error, Facts, Figures, Finding, FindingKind, Greedy, Localise,
    Model, NoOpReport, Ports, Reference, Report, Result, RunCase, RunReport, SCHEMA_VERSION, SumOrder, Thresholds,
    Verdict,
};
use crate::runtime::{self, Session};

/// Opens a graph in a runtime. Called when its turn has come, so that there is one session at a time.
pub type Open<'a> = Box<dyn FnOnce() -> runtime::Result<Box<dyn Session>> + 'a>;

/// A graph in a runtime, to be judged.
pub struct Candidate<'a> {
    /// A name for the report: the runtime's, with whatever sets it apart from others.
    pub name: String,
    /// Opens the graph.
    pub open: Open<'a>,
}

/// A check in progress: the reference, the budget, and the verdicts so far.
#[derive(Debug)]
pub struct Check {
    pub(super) reference: Reference,
    budget: Budget,
    judgement: Judgement,
    environment: Environment,
    pub(super) cases: Vec<CaseReport>,
    runs: Vec<RunReport>,
    base: Vec<RunReport>,
    pub(super) no_op: Vec<NoOpReport>,
    pub(super) against: Vec<AgainstReport>,
    /// What failed in one run, to find the cause by: the first that rounding cannot explain, else the first.
    failed: Vec<Failed>,
    failed_run: usize,
    /// Run and case of what failed and rounding may explain.
    doubtful: Vec<(usize, usize)>,
    cause: Option<String>,
    base_cause: Option<String>,
}

/// What runs were judged by, to localise them: names and scripts of the cases, in the order of each run's.
pub(super) struct ToLocalise<'a> {
    pub(super) cases: &'a [(&'a str, &'a Script)],
    pub(super) ports: Ports,
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
            source: reference.source.clone(),
            against_a_graph: reference.spec.is_none(),
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
            failed: Vec::new(),
            failed_run: 0,
            doubtful: Vec::new(),
            cause: None,
            base_cause: None,
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
            Ok((runtime, nodes, judged)) => {
                let (cases, logits): (Vec<RunCase>, Vec<_>) = judged.into_iter().unzip();
                let number = self.runs.len();
                let doubtful = cases.iter().enumerate().filter(|(_, case)| self.is_doubtful(case));
                let doubtful: Vec<_> = doubtful.map(|(case, _)| (number, case)).collect();
                self.doubtful.extend(doubtful);
                let is_sure = |case: &RunCase| case.verdict == Verdict::Fail && !self.is_doubtful(case);
                let sure_before = self.runs.get(self.failed_run).is_some_and(|run| run.cases.iter().any(is_sure));
                if self.failed.is_empty() || !sure_before && cases.iter().any(is_sure) {
                    let failed = failed(&cases, logits);
                    if !failed.is_empty() {
                        (self.failed, self.failed_run) = (failed, number);
                    }
                }
                let passed = Verdict::all(cases.iter().map(|case| case.verdict));
                let failure = fallen_back(&runtime, nodes.as_ref());
                let verdict = if cases.is_empty() || failure.is_some() { Verdict::Fail } else { passed };
                RunReport { verdict, runtime: Some(runtime), failure, nodes, cases, ..report }
            }
            Err(error) => RunReport { verdict: verdict_of(&error), failure: Some(error.to_string()), ..report },
        };
        let verdict = report.verdict;
        self.runs.push(report);
        verdict
    }

    /// Whether a case failed by a distance that rounding may explain: that of K terms in order is at most about √K times that of one.
    fn is_doubtful(&self, case: &RunCase) -> bool {
        let most = (self.reference.ports.longest_dot_product as f64).sqrt();
        let far = |figures: Figures| figures.max_abs > case.allowed && figures.max_abs <= most * case.allowed;
        matches!(self.judgement, Judgement::Budget) && case.figures.is_some_and(far)
    }

    fn judge(&self, open: Open<'_>) -> Result<Judged> {
        let mut runner = GraphRunner::new(open()?, self.reference.ports.head_dim)?;
        let cases = self.reference.cases.iter().zip(&self.cases);
        let cases = cases.map(|(case, report)| self.judge_case(&mut runner, case, report)).collect();
        Ok((runner.session_mut().info(), runner.session_mut().nodes(), cases))
    }

    /// What is wrong with a run's figures; the verdict where nothing is asked.
    pub(super) fn verdict(&self, figures: &Figures, greedy: &Greedy, allowed: f64) -> (Verdict, Option<String>) {
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

    /// Finds where the runs that failed depart from the reference, and writes that into the report, with the cause where it shows.
    ///
    /// # Errors
    /// When candle fails.
    pub fn localise(&mut self, what: &Localise<'_>) -> Result<()> {
        let cases: Vec<_> = self.reference.cases.iter().map(|case| (case.case.name(), &case.script)).collect();
        what.runs(&ToLocalise { cases: &cases, ports: self.reference.ports, budget: self.budget }, &mut self.runs)?;
        let shown = || self.runs.iter().find_map(|run| run.departure.as_ref()?.cause.clone());
        self.cause = self.cause.take().or_else(shown);
        Ok(())
    }

    /// Finds where the graph departs from the other one that it was compared with.
    ///
    /// # Errors
    /// When a graph cannot be edited.
    pub fn localise_against(&mut self, what: &Localise<'_>) -> Result<()> {
        let cases: Vec<_> = self.reference.cases.iter().map(|case| (case.case.name(), &case.script)).collect();
        what.pairs(&ToLocalise { cases: &cases, ports: self.reference.ports, budget: self.budget }, &mut self.against)
    }

    /// Whether a comparison with another graph failed whose cases ran.
    pub fn departs_from_other(&self) -> bool {
        self.against.iter().any(|pair| pair.verdict == Verdict::Fail && !pair.cases.is_empty())
    }

    /// Whether a run failed whose cases ran.
    pub fn departs(&self) -> bool {
        self.runs.iter().any(|run| run.verdict == Verdict::Fail && !run.cases.is_empty())
    }

    /// The runs of the base graph against its own reference, without adapter, to go into this report.
    pub fn with_base(mut self, base: Self) -> Self {
        (self.base, self.base_cause) = (base.runs, base.cause);
        self
    }

    /// Judges once more what the budget failed and rounding may explain: `logits` computes candle's own in some cases with their
    /// products summed in an order, as [`Reference::in_order`] does. A run passes that is at no position further away than these allow
    /// there, or than is allowed anywhere. Nothing is computed where nothing failed so, and no order more than is needed.
    ///
    /// # Errors
    /// Those of `logits`.
    pub fn reconsider(
        &mut self,
        mut logits: impl FnMut(&Reference, SumOrder, &[usize]) -> Result<Vec<Array2<f64>>>,
    ) -> Result<()> {
        let mut doubtful = std::mem::take(&mut self.doubtful);
        // by case: how far candle is at each position, in the order that takes it furthest
        let mut rounding: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for order in SumOrder::ALL {
            let cases: BTreeSet<usize> = doubtful.iter().map(|(_, case)| *case).collect();
            let cases: Vec<usize> = cases.into_iter().collect();
            if cases.is_empty() {
                break;
            }
            for (number, own) in cases.iter().zip(logits(&self.reference, order, &cases)?) {
                let Some(case) = self.reference.cases.get(*number) else { continue };
                let errors = by_spot(&case.logits, &own);
                let most = rounding.entry(*number).or_insert_with(|| vec![0.0; errors.len()]);
                let finite = most.iter_mut().zip(errors).filter(|(_, error)| error.is_finite());
                finite.for_each(|(most, error)| *most = most.max(error));
            }
            doubtful.retain(|(run, number)| {
                let row = self.runs.get_mut(*run).and_then(|run| run.cases.get_mut(*number));
                let (case, rounding) = (self.reference.cases.get(*number), rounding.get(number));
                let (Some(row), Some(case), Some(rounding)) = (row, case, rounding) else { return false };
                !is_rounding(row, &case.script, self.budget.factor, rounding)
            });
        }
        for run in self.runs.iter_mut().filter(|run| !run.cases.is_empty() && run.failure.is_none()) {
            run.verdict = Verdict::all(run.cases.iter().map(|case| case.verdict));
        }
        let run = self.runs.get(self.failed_run);
        let fails = |case: usize| run.and_then(|run| run.cases.get(case)).is_some_and(|case| !case.verdict.passed());
        self.failed.retain(|failed| fails(failed.case));
        Ok(())
    }

    /// Looks for the cause of the first run that failed: `logits` computes those of a suspect in some cases, as
    /// [`Reference::suspected`] does. Nothing is computed where nothing failed.
    ///
    /// # Errors
    /// Those of `logits`.
    pub fn explain(
        &mut self,
        mut logits: impl FnMut(&Reference, &Suspect, &[usize]) -> Result<Vec<Array2<f64>>>,
    ) -> Result<()> {
        let reference = &self.reference;
        let mut of_reference = |suspect: &Suspect, cases: &[usize]| logits(reference, suspect, cases);
        let Some(spec) = &reference.spec else { return Ok(()) };
        self.cause = recognise(spec, &reference.cases, &self.failed, &mut of_reference)?;
        self.failed.clear();
        Ok(())
    }

    /// How a graph does in a case, and its logits.
    fn judge_case(
        &self,
        runner: &mut dyn Runner,
        case: &ReferenceCase,
        report: &CaseReport,
    ) -> (RunCase, Option<Array2<f64>>) {
        let logits = replay(runner, &case.script, self.reference.ports.vocab).map_err(|error| error.to_string());
        let judged = logits.and_then(|logits| Ok((case.figures(&logits)?, logits)));
        let allowed = report.allowance.allowed;
        let row = RunCase {
            case: report.name.clone(),
            verdict: Verdict::Fail,
            failure: None,
            figures: None,
            errors: Vec::new(),
            allowed,
            in_order: None,
            factor: None,
            greedy: None,
        };
        let (figures, logits) = match judged {
            Ok(judged) => judged,
            Err(failure) => return (RunCase { failure: Some(failure), ..row }, None),
        };
        let greedy = Greedy::of(&case.logits, &logits, &case.script.picks, allowed);
        let (verdict, failure) = self.verdict(&figures, &greedy, allowed);
        let candle = report.candle.map(|candle| candle.max_abs).filter(|distance| *distance > 0.0);
        let row = RunCase {
            verdict,
            failure,
            errors: by_spot(&case.logits, &logits),
            factor: candle.map(|candle| figures.max_abs / candle),
            figures: Some(figures),
            greedy: Some(greedy),
            ..row
        };
        (row, Some(logits))
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
            finding: Finding { kind: FindingKind::Parity, text: String::new(), cause: None },
            inputs: facts.inputs,
            command: facts.command,
            environment: self.environment,
            budget: self.budget,
            thresholds,
            rule: RULE.into(),
            models: facts.models,
            cases: self.cases,
            runs: self.runs,
            base: self.base,
            no_op: self.no_op,
            against: self.against,
            regressions: Vec::new(),
        };
        report.finding = Finding::of(&report, facts.subject).because(self.base_cause, self.cause);
        Ok(report)
    }
}

/// Lets a run pass that is at no position further away than is allowed in its case, or than `factor` times `rounding`: how far candle
/// is there with its products summed in order.
fn is_rounding(row: &mut RunCase, script: &Script, factor: f64, rounding: &[f64]) -> bool {
    let allowed: Vec<f64> = rounding.iter().map(|distance| row.allowed.max(factor * distance)).collect();
    let parts = row.errors.iter().zip(&allowed).map(|(error, allowed)| error / allowed);
    let used = parts.fold(0.0, f64::max);
    row.in_order = Some(used);
    let mut greedy = row.greedy.clone();
    if let Some(greedy) = &mut greedy {
        greedy.judge_ties(&script.picks, &allowed);
    }
    if used > 1.0 || greedy.as_ref().is_some_and(|greedy| !greedy.agrees) {
        return false;
    }
    (row.verdict, row.failure, row.greedy) = (Verdict::Pass, None, greedy);
    true
}

/// What is wrong with a run for which another device than the CPU was asked and that had all its nodes there.
fn fallen_back(runtime: &runtime::RuntimeInfo, nodes: Option<&BTreeMap<String, usize>>) -> Option<String> {
    const CPU: &str = "CPUExecutionProvider";
    let nodes = nodes.filter(|nodes| !nodes.is_empty() && nodes.keys().all(|provider| provider == CPU))?;
    let count: usize = nodes.values().sum();
    let device = &runtime.device;
    (device != "cpu").then(|| format!("{device} was asked for and took none of the {count} nodes: they ran on the CPU"))
}

type JudgedCase = (RunCase, Option<Array2<f64>>);
type Judged = (runtime::RuntimeInfo, Option<BTreeMap<String, usize>>, Vec<JudgedCase>);

/// The logits of the cases that failed; none where one of them has no logits.
fn failed(cases: &[RunCase], logits: Vec<Option<Array2<f64>>>) -> Vec<Failed> {
    let failed = cases.iter().zip(logits).enumerate().filter(|(_, (case, _))| case.verdict == Verdict::Fail);
    let failed = failed.map(|(case, (row, logits))| {
        Some(Failed { case, logits: logits?, allowed: row.allowed, distance: row.figures?.max_abs })
    });
    failed.collect::<Option<_>>().unwrap_or_default()
}

/// A runtime that is not there says nothing about the graph.
pub(super) fn verdict_of(error: &Error) -> Verdict {
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
        models: case.case.models().to_vec(),
        padding: case.case.padding(),
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
            "the logits are up to {distance:.3e} away from the reference, {allowed:.3e} is allowed; the worst is {:.6} for {:.6} \
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
mod tests;

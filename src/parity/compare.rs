//! A graph beside another graph: the base graph of a zero adapter, bit for bit, and any other one, within the budget.

use super::check::{Open, verdict_of};
use super::figures::first_non_finite;
use super::{
    AgainstCase, AgainstReport, Check, Figures, Greedy, NoOpPair, NoOpReport, Result, TensorFigures, Verdict, no_op,
};
use crate::runtime;

/// A graph and another one in one runtime, to be compared with each other.
pub struct Other<'a> {
    /// A name for the report: the runtime's.
    pub name: String,
    /// Opens the graph.
    pub graph: Open<'a>,
    /// Opens the graph to compare it with.
    pub other: Open<'a>,
}

impl Check {
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
        let outputs = |open| {
            let scripts = self.reference.cases.iter().map(|case| &case.script);
            no_op::outputs(open, self.reference.ports, scripts)
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
                AgainstReport { name, verdict, runtime: Some(runtime), failure: None, departure: None, cases }
            }
            Err(error) => {
                let (verdict, failure) = (verdict_of(&error), Some(error.to_string()));
                AgainstReport { name, verdict, runtime: None, failure, departure: None, cases: Vec::new() }
            }
        };
        let verdict = report.verdict;
        self.against.push(report);
        verdict
    }

    fn compare_graphs(&self, graph: Open<'_>, other: Open<'_>) -> Result<(runtime::RuntimeInfo, Vec<AgainstCase>)> {
        let run = |open| {
            let scripts = self.reference.cases.iter().map(|case| &case.script);
            no_op::last_outputs(open, self.reference.ports, scripts)
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
}

//! Another graph in the place of the model: no checkpoint is needed, and nothing but the two graphs is judged.

use ndarray::Array2;

use super::budget::Budget;
use super::reference::{Ports, ReferenceCase};
use super::run::{GraphRunner, record, replay};
use super::{Case, Reference, Result};
use crate::onnx::{Graph, Index, Model};
use crate::runtime::{GraphDecoder, Session};

/// Terms of a dot product where no product with a constant tells.
const FEW_TERMS: usize = 128;

impl Ports {
    /// What a graph tells of itself; `head_dim` is for one that does not declare the last dimension of its cache. The number of tokens
    /// is its logits', which are computed once where they are not declared.
    ///
    /// # Errors
    /// When it is no decoder's graph, or does not run.
    pub fn of_graph(session: Box<dyn Session>, graph: &Model, head_dim: Option<usize>) -> Result<Self> {
        let mut decoder = match head_dim {
            Some(head_dim) => GraphDecoder::with_head_dim(session, head_dim)?,
            None => GraphDecoder::new(session)?,
        };
        let vocab = match decoder.ports().vocab_size {
            Some(vocab) => vocab,
            None => {
                let one = |value: i64| Array2::from_elem((1, 1), value);
                decoder.extend(&one(0), &one(1), None)?.dim().2
            }
        };
        let longest_dot_product = longest_product(graph.graph()).unwrap_or(FEW_TERMS);
        Ok(Self { vocab, head_dim, longest_dot_product })
    }
}

impl Reference {
    /// Runs a graph over the cases. Those that it cannot run are left out, with a warning. `source` says what it is.
    ///
    /// # Errors
    /// When it is no decoder's graph, or runs no case.
    pub fn of_graph(
        session: Box<dyn Session>,
        precision: &'static str,
        ports: Ports,
        source: String,
        cases: Vec<Case>,
    ) -> Result<Self> {
        let mut runner = GraphRunner::new(session, ports.head_dim)?;
        let (mut ran, mut failure) = (Vec::new(), None);
        for case in cases {
            let found = record(&mut runner, &case, ports.vocab);
            let found = found.and_then(|(script, logits)| ReferenceCase::new(case.clone(), script, logits));
            match found {
                Ok(case) => ran.push(case),
                Err(error) => {
                    tracing::warn!("the case {} is left out, since the reference cannot run it: {error}", case.name());
                    failure = Some(error);
                }
            }
        }
        match failure {
            Some(failure) if ran.is_empty() => Err(failure),
            _ => Ok(Self { spec: None, ports, precision, source, cases: ran }),
        }
    }

    /// The logits of a graph over the same tokens, by case; the reference's own where it does not run one.
    ///
    /// # Errors
    /// When it is no decoder's graph.
    pub fn replay_in(&self, session: Box<dyn Session>) -> Result<Vec<Array2<f64>>> {
        let mut runner = GraphRunner::new(session, self.ports.head_dim)?;
        let logits = |case: &ReferenceCase| replay(&mut runner, &case.script, self.ports.vocab);
        Ok(self
            .cases
            .iter()
            .map(logits)
            .zip(&self.cases)
            .map(|(ran, case)| ran.unwrap_or(case.logits.clone()))
            .collect())
    }

    /// Of several runs of the reference's graph the one that is furthest away, by case, where rounding explains it: at most √K times
    /// the floor with the K terms of the longest dot product. What is further away is the graph's own dependence on its runtime.
    pub fn furthest(&self, runs: &[Vec<Array2<f64>>], budget: &Budget) -> Vec<Array2<f64>> {
        let most = (self.ports.longest_dot_product as f64).sqrt();
        let furthest = |(number, case): (usize, &ReferenceCase)| {
            let distance = |logits: &Array2<f64>| {
                let distances = logits.iter().zip(&case.logits).map(|(a, b)| (a - b).abs());
                distances.fold(0.0f64, |most, x| if x.is_nan() { f64::INFINITY } else { most.max(x) })
            };
            let runs = runs.iter().filter_map(|run| run.get(number)).map(|logits| (distance(logits), logits));
            let bound = most * budget.relative_floor * case.largest;
            let rounded = runs.filter(|(distance, _)| *distance <= bound);
            let found = rounded.max_by(|(a, _), (b, _)| a.total_cmp(b));
            found.map_or_else(|| case.logits.clone(), |(_, logits)| logits.clone())
        };
        self.cases.iter().enumerate().map(furthest).collect()
    }
}

impl Budget {
    /// The default budget for two graphs that compute in `precision`: [`Budget::of`] with the layers that the cache shows, and twice its
    /// floor, since both may be so far away from what they mean.
    ///
    /// # Errors
    /// As [`Budget::of`].
    pub fn of_graphs(precision: candle_core::DType, graph: &Model, ports: &Ports) -> Result<Self> {
        let inputs = graph.graph().inputs().iter();
        let keys = inputs.filter(|input| input.name().starts_with("past") && input.name().ends_with("key")).count();
        let budget = Self::for_depth(precision, keys.max(1), ports.longest_dot_product)?;
        Ok(Self { relative_floor: 2.0 * budget.relative_floor, ..budget })
    }
}

/// The terms of the longest dot product with a constant matrix.
fn longest_product(graph: &Graph) -> Option<usize> {
    let index = Index::new(graph);
    let own = graph.nodes().iter().filter_map(|node| {
        let [.., rows, columns] = index.initializer(node.input(1)?)?.dims() else { return None };
        let terms = match node.op_type() {
            "MatMul" | "FusedMatMul" => rows,
            "Gemm" if node.attribute("transB").and_then(|a| a.as_int()) == Some(1) => columns,
            "Gemm" => rows,
            _ => return None,
        };
        usize::try_from(*terms).ok()
    });
    let nested = graph.nodes().iter().flat_map(|node| node.subgraphs()).filter_map(longest_product);
    own.chain(nested).max()
}

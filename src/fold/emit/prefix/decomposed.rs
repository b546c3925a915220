//! Scores of a block of standard operators: they are what its softmax reads.
//!
//! ```text
//! scores ─ ReduceMax ──────────────────────┐
//! softmax ─ (NaN guard) ─ ReduceMax ─ Log ─ Sub ─► logarithm of the sum of exponentials
//! ```
//! The largest weight is the exponential of the largest score over the sum, whatever masks, caps and sinks are in it.
//! The scores of the prefix go the same way as the block's, but for its mask. Where the block takes the largest score off all
//! before its softmax, they are those before that.

use candle_core::Tensor;

use super::{Block, LOWEST, Scores, stopped, types, window};
use crate::fold::Result;
use crate::fold::locate::shape;
use crate::onnx::{DataType, Index, Node, NodeDef};

/// Nodes on one way through a block.
const MAX_STEPS: usize = 64;
/// Nodes of scores and masks that are looked at on the way to the product.
const MAX_NODES: usize = 512;
/// Less than any weight of a softmax that is not zero.
const TINY: f64 = 1e-37;

/// What happens to the product of queries and keys.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// A Mul or Div by this number.
    Scale(&'static str, String),
    Alpha(f32),
    Tanh,
    Cast(DataType),
}

/// The way from a product of queries and keys to the scores, and the product.
struct Way<'g> {
    product: &'g Node,
    steps: Vec<Step>,
    /// Scores that have a column for each key, and none for a sink.
    keys: &'g str,
    /// What is added on the way.
    added: Vec<&'g str>,
}

impl Block<'_, '_> {
    pub(super) fn in_block(&mut self, key: &Tensor) -> Result<Scores> {
        let (index, site) = (self.index, self.writer.site);
        let softmax = index.graph().node(site.node);
        let (scores, weights) = (softmax.and_then(|node| node.input(0)), softmax.and_then(|node| node.output(0)));
        let (Some(scores), Some(weights)) = (scores, weights) else {
            return Err(stopped(site, "its softmax has no input or no output"));
        };
        let scores = unshifted(index, scores);
        let mut steps = MAX_NODES;
        let Some(way) = way(index, scores, &mut steps).filter(|_| steps > 0) else {
            return Err(stopped(site, "the way from its product to its softmax is not known"));
        };
        self.refuse_biases(&way.added)?;
        let side = |slot: usize, end: Option<&str>| way.product.input(slot).and_then(|x| scales(index, x, end));
        let (Some(queries), Some(keys)) = (side(0, Some(&site.query)), side(1, None)) else {
            return Err(stopped(site, "the scales between its query or keys and their product are not known"));
        };
        let steps = [queries, keys, way.steps].concat();

        let (_, query) = self.queries(None)?;
        let mut data_type = self.writer.job.constants.data_type();
        let key = self.parameter("key", key)?;
        let mut prefix = self.node("MatMul", "MatMul_scores", &[&query, &key]);
        for step in steps {
            prefix = match step {
                Step::Scale(op, by) => {
                    let by = self.one_of(by);
                    self.node(op, &format!("{op}_scale"), &[&prefix, &by])
                }
                Step::Alpha(alpha) => {
                    let alpha = self.number(&format!("prefold/number_{alpha}"), alpha.into())?;
                    self.node("Mul", "Mul_alpha", &[&prefix, &alpha])
                }
                Step::Tanh => self.node("Tanh", "Tanh", &[&prefix]),
                Step::Cast(to) => {
                    self.set_type(to);
                    let from = std::mem::replace(&mut data_type, to);
                    self.cast("Cast_scores", &prefix, Some(from), to)
                }
            };
        }
        let wide = self.wide();
        prefix = self.cast("Cast_wide", &prefix, Some(data_type), wide);
        self.set_type(wide);
        let own = self.sum_of(scores, guarded(index, weights), &prefix)?;
        let window = window::find(index, vec![scores], self.writer.job.source);
        let column = window.map(|_| {
            let (total, seq) = (self.size("total", way.keys, -1), self.size("seq", scores, -2));
            self.columns(&total, &seq)
        });
        Ok(Scores { prefix, own, window, column })
    }

    /// A number that a tensor may hold many times, in a shape that fits any other.
    fn one_of(&mut self, number: String) -> String {
        if shape::is_number(self.index, &number) {
            return number;
        }
        let reduced = |name: String| NodeDef::new("ReduceMax", name).attr_int("keepdims", 0);
        self.writer.node_with(reduced, "ReduceMax_scale", &[&number])
    }

    /// The logarithm of the sum of exponentials behind a softmax, `[batch, heads, seq, 1]` as the prefix's scores have them.
    fn sum_of(&mut self, scores: &str, weights: &str, prefix: &str) -> Result<String> {
        let (index, wide) = (self.index, self.wide());
        let (low, tiny) = (self.number("prefold/lowest", LOWEST)?, self.number("prefold/tiny", TINY)?);
        let most = self.reduce("ReduceMax", "ReduceMax_own", scores);
        let most = self.cast("Cast_most", &most, types::float_type(index, scores), wide);
        let most = self.node("Max", "Max_lowest", &[&most, &low]);
        let weight = self.reduce("ReduceMax", "ReduceMax_weights", weights);
        let weight = self.cast("Cast_weight", &weight, types::float_type(index, weights), wide);
        let weight = self.node("Max", "Max_tiny", &[&weight, &tiny]);
        let weight = self.node("Log", "Log", &[&weight]);
        let own = self.node("Sub", "Sub_weight", &[&most, &weight]);
        if shape::rank(index, scores) == Some(4) {
            return Ok(own);
        }
        let like = self.reduce("ReduceMax", "ReduceMax_rows", prefix);
        let like = self.node("Shape", "Shape_rows", &[&like]);
        Ok(self.node("Reshape", "Reshape_own", &[&own, &like]))
    }
}

/// The weights that meet the values: those of the softmax, or where it may be no number, zero.
fn guarded<'g>(index: &Index<'g>, weights: &'g str) -> &'g str {
    let readers = |tensor: &str| {
        let nodes = index.consumers(tensor).iter().filter_map(|reader| index.graph().node(reader.node));
        nodes.collect::<Vec<_>>()
    };
    let is_guard = |node: &&Node| node.is("", "IsNaN");
    let guard = readers(weights).into_iter().find(is_guard).and_then(|node| node.output(0));
    let choice = guard.and_then(|guard| readers(guard).into_iter().find(|node| node.is("", "Where")));
    choice.and_then(|node| node.output(0)).unwrap_or(weights)
}

/// The scores that a softmax is of, before their largest is taken off all of them.
fn unshifted<'g>(index: &Index<'g>, scores: &'g str) -> &'g str {
    let shift = index.producer(scores).filter(|node| node.is("", "Sub"));
    let Some((before, taken)) = shift.and_then(|node| node.input(0).zip(node.input(1))) else { return scores };
    let largest = index.producer(taken).filter(|node| node.is("", "ReduceMax"));
    if largest.and_then(|node| node.input(0)) == Some(before) { before } else { scores }
}

/// From scores back to the product of queries and keys; none where that takes more than `steps` nodes.
fn way<'g>(index: &Index<'g>, scores: &'g str, steps: &mut usize) -> Option<Way<'g>> {
    let node = index.producer(scores)?;
    *steps = steps.checked_sub(1)?;
    let mut behind = |slot: usize| way(index, node.input(slot)?, steps);
    let number = |slot: usize| node.input(slot).filter(|input| shape::is_uniform(index, input));
    let with = |way: Option<Way<'g>>, step: Step| {
        way.map(|mut way| {
            way.steps.push(step);
            way
        })
    };
    match node.op_type() {
        "MatMul" | "FusedMatMul" => {
            let is_weight = |slot: usize| node.input(slot).is_none_or(|side| shape::is_weight(index, side));
            let alpha = node.attribute("alpha").and_then(|a| a.as_float()).filter(|alpha| *alpha != 1.0);
            let steps = alpha.map(Step::Alpha).into_iter().collect();
            let way = Way { product: node, steps, keys: scores, added: Vec::new() };
            (!is_weight(0) && !is_weight(1)).then_some(way)
        }
        "Cast" => {
            let to = node.attribute("to")?.as_int()?;
            with(behind(0), Step::Cast(DataType::from_code(i32::try_from(to).ok()?)))
        }
        "Tanh" => with(behind(0), Step::Tanh),
        "Div" => with(behind(0), Step::Scale("Div", number(1)?.to_owned())),
        "Mul" => match (number(0), number(1)) {
            (_, Some(by)) => with(behind(0), Step::Scale("Mul", by.to_owned())),
            (Some(by), _) => with(behind(1), Step::Scale("Mul", by.to_owned())),
            _ => None,
        },
        "Clip" | "DequantizeLinear" | "Identity" | "QuantizeLinear" | "Reshape" | "Squeeze" | "Unsqueeze" => behind(0),
        // masks: one side leads to the product, the other does not
        "Add" | "Max" | "Min" | "Sub" | "Where" => {
            let first = usize::from(node.op_type() == "Where");
            let (mut way, other) = match (behind(first), behind(first + 1)) {
                (Some(way), None) => (way, first + 1),
                (None, Some(way)) => (way, first),
                _ => return None,
            };
            way.added.extend(node.input(other));
            Some(way)
        }
        "Concat" => (0..node.inputs().len()).find_map(behind),
        _ => None,
    }
}

/// The scales between one side of the product and `end`, or as far as nodes only lay it out; none where they are not known.
fn scales(index: &Index, side: &str, end: Option<&str>) -> Option<Vec<Step>> {
    let (mut tensor, mut steps) = (side, Vec::new());
    for _ in 0..MAX_STEPS {
        if end == Some(tensor) {
            return Some(steps);
        }
        let Some(node) = index.producer(tensor) else { break };
        let number = |slot: usize| node.input(slot).filter(|input| shape::is_uniform(index, input));
        let slot = match (node.op_type(), number(0), number(1)) {
            ("Mul", _, Some(by)) => {
                steps.push(Step::Scale("Mul", by.to_owned()));
                0
            }
            ("Mul", Some(by), _) => {
                steps.push(Step::Scale("Mul", by.to_owned()));
                1
            }
            ("Div", _, Some(by)) => {
                steps.push(Step::Scale("Div", by.to_owned()));
                0
            }
            ("Mul" | "Div", ..) if node.inputs().iter().any(|input| shape::is_computed_number(index, input)) => {
                return None;
            }
            (
                "Cast" | "DequantizeLinear" | "Dropout" | "Expand" | "Identity" | "QuantizeLinear" | "Reshape"
                | "Squeeze" | "Transpose" | "Unsqueeze",
                ..,
            ) => 0,
            _ => break,
        };
        let Some(behind) = node.input(slot) else { break };
        tensor = behind;
    }
    end.is_none().then_some(steps)
}

//! Trained keys and values beside those of the tokens, as a term at the attention output. The cache stays that of the tokens.
//!
//! A softmax over two sets of keys is the mean of the softmaxes over each, weighted by their sums of exponentials. With
//! `s` the scores of the prefix, `V` its values, `o` the output that the graph has and `ℓ` the logarithm of the sum behind it,
//! ```text
//! e = exp(s − m),  b = exp(ℓ − m),  m = max(s, ℓ):    o + (e·V − (Σe)·o) / (Σe + b)
//! ```
//! ```text
//! query ─ MatMul Kᵀ ─ (scale, soft cap as in the block) ─ s ─┐
//! scores of the block, or made once more beside it ──── ℓ ───┼─► term ─ Add ─► what read the output
//! output ────────────────────────────────────────────────────┘
//! ```
//! The sums are taken in 32-bit floats whatever the graph computes in. The tokens' positions follow the prefix
//! ([`positions`]), and where the block has a sliding window, the prefix's columns are those before the first token.
//!
//! As slot and bank, `prefold.prefix.steps` counts the columns of the prefix from one: where it is zero there is none. Without
//! any, `e` is zero and the sum is the output.

mod bias;
mod decomposed;
mod operator;
mod positions;
mod window;

use candle_core::{DType, Tensor};

use super::constants::Constants;
use super::emission::Emission;
use super::term::Writer;
use super::{Job, types};
use crate::adapter::{Prefix, Query, term};
use crate::fold::locate::scope;
use crate::fold::{Error, Layout, Result, Site, locate};
use crate::onnx::{DataType, Index, NodeDef, NodeId, Patch};
use positions::Shift;

const HELP: &str = "export the base model with `prefold export`";
/// The logarithm of no weight at all, in the range of every type that sums are taken in.
const LOWEST: f64 = -1e29;
/// What is taken off the score of a column that is hidden: more than from [`LOWEST`] to any score.
const HIDDEN: f64 = 1e30;

pub(super) fn write(job: &mut Job, prefix: &Prefix) -> Result<()> {
    if job.model.metadata(crate::fold::MARK).is_some() {
        return Err(Error::NotFolded {
            what: "prefix tuning over another adapter, which was trained without it".into(),
            help: "fold it into the base graph; other adapters can be folded over it with --stack",
        });
    }
    if job.constants.data_type() != DataType::Double {
        job.constants.set_type(DataType::Float);
    }
    let length = Length::new(job, prefix.num_virtual_tokens)?;
    let shift = positions::shift(job, &length)?;
    let (model, sites) = (job.model, job.sites);
    for site in sites {
        let config = job.adapter.config();
        let found = prefix.keys_and_values(config, job.adapter.tensors(), site.layer).map_err(Error::Convert)?;
        let Some((key, value)) = found else { continue };
        scope::of_site(model, site, |index| {
            let output_type = types::float_type(index, &site.output);
            let writer = Writer::new(job, site, output_type)?;
            Block { writer, index, length: &length, shift: &shift }.write(&key, &value)
        })?;
    }
    Ok(())
}

fn stopped(site: &Site, reason: impl Into<String>) -> Error {
    Error::Site { anchor: site.anchor.clone(), reason: reason.into(), help: HELP }
}

fn rank_is(index: &Index, tensor: &str, rank: usize) -> bool {
    locate::shape::rank(index, tensor) == Some(rank)
}

/// The type that sums are taken in, of a graph that computes in `data_type`.
fn wide(data_type: DataType) -> DataType {
    if data_type == DataType::Double { DataType::Double } else { DataType::Float }
}

/// How many positions the prefix takes.
struct Length {
    /// The same number for every row, or what counts the columns: `[1, 1, n]`, in a bank `[batch, 1, 1, n]`.
    steps: Option<String>,
    fixed: i64,
    is_bank: bool,
}

impl Length {
    fn new(job: &mut Job, tokens: usize) -> Result<Self> {
        let emission = job.constants.emission();
        let mut length = Self { steps: None, fixed: tokens as i64, is_bank: emission == Emission::Bank };
        if emission != Emission::Baked {
            length.steps = Some(length.counted(&mut job.constants, &mut job.patch)?);
        }
        Ok(length)
    }

    /// The columns of the prefix, counted from one.
    fn counted(&self, constants: &mut Constants, patch: &mut Patch) -> Result<String> {
        let steps: Vec<f64> = (1..=self.fixed).map(|step| step as f64).collect();
        let steps = Tensor::new(steps, &candle_core::Device::Cpu).and_then(|steps| steps.reshape((1, 1, ())));
        constants.add(patch, "prefold.prefix.steps", &steps.map_err(Error::Convert)?)
    }

    /// The number of positions in the type of a tensor that it is added to, made before everything else: one number, in a
    /// bank `[batch, 1]`.
    fn number(&self, job: &mut Job, data_type: DataType) -> String {
        let at = |name: &str| format!("/prefold/prefix/{name}_{data_type}");
        let cast = |job: &mut Job, name: String, x: &str| {
            let node = NodeDef::new("Cast", name).attr_int("to", data_type.code().into());
            first(job, node, &[x])
        };
        let Some(steps) = self.steps.clone() else {
            let number = job.constants.integers(&mut job.patch, "prefold/prefix_length", &[self.fixed]);
            return if data_type == DataType::Int64 { number } else { cast(job, at("Cast"), &number) };
        };
        let most = reduce(job.model.opset(""), "ReduceMax", at("ReduceMax"), &mut job.constants, &mut job.patch);
        let most = first(job, most.0, &[&[steps.as_str()], most.1.as_slice()].concat());
        let shape: &[i64] = if self.is_bank { &[-1, 1] } else { &[-1] };
        let shape = job.constants.integers(&mut job.patch, "prefold/prefix_rows", shape);
        let rows = first(job, NodeDef::new("Reshape", at("Reshape")), &[&most, &shape]);
        cast(job, at("Cast"), &rows)
    }
}

/// A node at the beginning of the graph, once.
fn first(job: &mut Job, node: NodeDef, inputs: &[&str]) -> String {
    let output = format!("{}/output_0", node.name());
    if job.constants.is_new(node.name()) {
        job.patch.insert_before(NodeId(0), node.inputs(inputs.iter().copied()).outputs([output.as_str()]));
    }
    output
}

/// A reduction of the last axis, and what it reads beside its operand.
fn reduce(
    opset: Option<i64>,
    op: &str,
    name: String,
    constants: &mut Constants,
    patch: &mut Patch,
) -> (NodeDef, Vec<&'static str>) {
    // the axes became an input with opset 18, those of a sum with 13
    if op != "ReduceSum" && opset.unwrap_or(0) < 18 {
        return (NodeDef::new(op, name).attr_ints("axes", &[-1]), Vec::new());
    }
    constants.integers(patch, "prefold/last_axis", &[-1]);
    (NodeDef::new(op, name), vec!["prefold/last_axis"])
}

/// The nodes of one site.
struct Block<'a, 'j> {
    writer: Writer<'a, 'j>,
    index: &'a Index<'a>,
    length: &'a Length,
    shift: &'a Shift,
}

/// What a block tells of its scores.
struct Scores {
    /// Those of the prefix, `[batch, heads, seq, n]`, in the type that sums are taken in.
    prefix: String,
    /// The logarithm of the sum of exponentials of its own, `[batch, heads, seq, 1]`.
    own: String,
    /// How many keys a query sees.
    window: Option<i64>,
    /// The column of each query, where there is a window: `[…, seq, 1]`.
    column: Option<String>,
}

impl Block<'_, '_> {
    fn node(&mut self, op: &str, name: &str, inputs: &[&str]) -> String {
        self.writer.node(op, name, inputs)
    }

    fn cast(&mut self, name: &str, x: &str, from: Option<DataType>, to: DataType) -> String {
        if from == Some(to) {
            return x.to_owned();
        }
        self.writer.node_with(|name| NodeDef::new("Cast", name).attr_int("to", to.code().into()), name, &[x])
    }

    fn reduce(&mut self, op: &str, name: &str, x: &str) -> String {
        let job = &mut *self.writer.job;
        let (_, axes) = reduce(job.model.opset(""), op, String::new(), &mut job.constants, &mut job.patch);
        let inputs = [&[x], axes.as_slice()].concat();
        let by_attribute = axes.is_empty();
        let node = |name: String| {
            let node = NodeDef::new(op, name);
            if by_attribute { node.attr_ints("axes", &[-1]) } else { node }
        };
        self.writer.node_with(node, name, &inputs)
    }

    fn integers(&mut self, name: &str, values: &[i64]) -> String {
        let job = &mut *self.writer.job;
        job.constants.integers(&mut job.patch, name, values)
    }

    fn number(&mut self, name: &str, value: f64) -> Result<String> {
        self.writer.number(name, value)
    }

    /// The type that sums are taken in.
    fn wide(&self) -> DataType {
        wide(self.writer.job.constants.data_type())
    }

    fn set_type(&mut self, data_type: DataType) {
        self.writer.job.constants.set_type(data_type);
    }

    fn parameter(&mut self, part: &str, tensor: &Tensor) -> Result<String> {
        let (heads, layer) = (self.writer.job.adapter.config().num_heads, self.writer.site.layer);
        let spread = tensor.to_dtype(DType::F64).and_then(|tensor| term::spread(&tensor, heads));
        let tensor = spread.and_then(|tensor| if part == "key" { tensor.t()?.contiguous() } else { Ok(tensor) });
        let job = &mut *self.writer.job;
        let name = format!("prefold.layers.{layer}.prefix_{part}");
        job.constants.add(&mut job.patch, &name, &tensor.map_err(Error::Convert)?)
    }

    fn write(mut self, key: &Tensor, value: &Tensor) -> Result<()> {
        let (index, site) = (self.index, self.writer.site);
        let scores = match index.graph().node(site.node) {
            Some(node) if operator::is_known(node) => self.beside_operator(node, key)?,
            _ if site.shape == "decomposed" => self.in_block(key)?,
            _ => return Err(stopped(site, "prefix tuning is not written into this shape of attention")),
        };
        self.set_type(self.wide());
        let value = self.parameter("value", value)?;
        let (mut prefix, seen) = (scores.prefix.clone(), self.seen(&scores)?);
        if let Some((_, hidden)) = &seen {
            prefix = self.node("Add", "Add_hidden", &[&prefix, hidden]);
        }
        let most = self.reduce("ReduceMax", "ReduceMax", &prefix);
        let most = self.node("Max", "Max", &[&most, &scores.own]);
        let exponent = self.node("Sub", "Sub_prefix", &[&prefix, &most]);
        let mut weights = self.node("Exp", "Exp_prefix", &[&exponent]);
        if let Some((seen, _)) = &seen {
            weights = self.node("Mul", "Mul_seen", &[&weights, seen]);
        }
        let sum = self.reduce("ReduceSum", "ReduceSum", &weights);
        let exponent = self.node("Sub", "Sub_own", &[&scores.own, &most]);
        let own = self.node("Exp", "Exp_own", &[&exponent]);
        let total = self.node("Add", "Add_total", &[&sum, &own]);
        let values = self.node("MatMul", "MatMul_values", &[&weights, &value]);
        let output = self.output();
        let taken = self.node("Mul", "Mul_output", &[&output, &sum]);
        let difference = self.node("Sub", "Sub_output", &[&values, &taken]);
        let term = self.node("Div", "Div_total", &[&difference, &total]);
        self.writer.add(term)
    }

    /// The attention output, heads first, in the type that sums are taken in.
    fn output(&mut self) -> String {
        let site = self.writer.site;
        let (wide, from) = (self.wide(), types::float_type(self.index, &site.output));
        let mut output = self.cast("Cast_output", &site.output, from, wide);
        if site.output_layout == Layout::Merged {
            output = self.heads_first("output", &output);
        }
        output
    }

    /// A merged tensor of query heads with its heads first.
    fn heads_first(&mut self, what: &str, x: &str) -> String {
        let config = self.writer.job.adapter.config();
        let shape = [0, 0, config.num_heads as i64, config.head_dim as i64];
        let split = self.writer.reshape(&format!("Reshape_{what}"), x, "prefold/split_heads", &shape);
        self.writer.transpose(&format!("Transpose_{what}"), &split)
    }

    /// Which columns of the prefix a query sees: a factor on their weights, and what is added to the scores of the others. None
    /// where it sees all.
    fn seen(&mut self, scores: &Scores) -> Result<Option<(String, String)>> {
        let (one, hidden) = (self.number("prefold/number_1", 1.0)?, self.number("prefold/hidden", HIDDEN)?);
        let mut seen = None;
        if let Some(steps) = &self.length.steps {
            seen = Some(self.node("Min", "Min_steps", &[steps, &one]));
        }
        if let (Some(window), Some(column)) = (scores.window, &scores.column) {
            let job = &mut *self.writer.job;
            let steps = match &self.length.steps {
                Some(steps) => steps.clone(),
                None => self.length.counted(&mut job.constants, &mut job.patch)?,
            };
            // query - window < step - 1 - length, with tokens counted from zero
            let length = self.reduce("ReduceMax", "ReduceMax_steps", &steps);
            let reach = self.number(&format!("prefold/reach_{window}"), (window - 1) as f64)?;
            let from_end = self.node("Sub", "Sub_length", &[&steps, &length]);
            let last = self.node("Add", "Add_reach", &[&from_end, &reach]);
            let wide = self.wide();
            let column = self.cast("Cast_column", column, None, wide);
            let inside = self.node("Less", "Less", &[&column, &last]);
            let inside = self.cast("Cast_inside", &inside, Some(DataType::Bool), wide);
            seen = Some(match seen {
                Some(seen) => self.node("Mul", "Mul_inside", &[&seen, &inside]),
                None => inside,
            });
        }
        let Some(seen) = seen else { return Ok(None) };
        let hides = self.node("Sub", "Sub_seen", &[&seen, &one]);
        let hides = self.node("Mul", "Mul_hidden", &[&hides, &hidden]);
        Ok(Some((seen, hides)))
    }

    /// The column of each query among `total` keys, `[seq, 1]`: the last one is the last key's.
    fn columns(&mut self, total: &str, seq: &str) -> String {
        let (zero, one) = (self.scalar(0), self.scalar(1));
        let past = self.node("Sub", "Sub_past", &[total, seq]);
        let steps = self.node("Range", "Range_columns", &[&zero, seq, &one]);
        let columns = self.node("Add", "Add_past", &[&past, &steps]);
        self.writer.reshape("Reshape_columns", &columns, "prefold/as_column", &[-1, 1])
    }

    /// One dimension of a tensor, as a number; counted from the end where it is negative.
    fn size(&mut self, name: &str, x: &str, axis: i64) -> String {
        let axis = self.scalar(axis);
        let shape = self.node("Shape", &format!("Shape_{name}"), &[x]);
        self.node("Gather", &format!("Gather_{name}"), &[&shape, &axis])
    }

    fn scalar(&mut self, value: i64) -> String {
        let job = &mut *self.writer.job;
        job.constants.integer(&mut job.patch, &format!("prefold/integer_{value}"), value)
    }

    /// The query that meets the keys, and the one that meets those of the prefix, heads first.
    fn queries(&mut self, node: Option<&crate::onnx::Node>) -> Result<(String, String)> {
        let index = self.index;
        let site = &self.writer.site.scaled();
        let source = locate::query(self.writer.job.model, site, Query::PostRope)?;
        let (mut nodes, mut tensor) = (source.nodes, source.tensor);
        for node in &mut nodes {
            node.each_name(|name| self.shift.rename(name));
        }
        self.shift.rename(&mut tensor);
        let mut prefix = tensor.clone();
        let turned = node.map(|node| positions::turned_inside(index, node, &nodes)).transpose()?.flatten();
        if let Some(turned) = turned {
            (nodes, prefix) = positions::turned_further(self.writer.job, self.length, nodes, turned, &tensor)?;
        }
        let first = self.writer.first;
        for node in nodes {
            if self.writer.job.constants.is_new(node.name()) {
                self.writer.job.patch.insert_before(first, node);
            }
        }
        for tensor in source.initializers {
            if self.writer.job.constants.is_new(tensor.name()) {
                self.writer.job.patch.add_initializer(tensor);
            }
        }
        let output_type = || types::float_type(index, &site.output);
        if let Some(found) = types::float_type(index, &site.query).or_else(output_type) {
            self.set_type(found);
        }
        if source.layout == Layout::HeadsFirst {
            return Ok((tensor, prefix));
        }
        let own = self.heads_first("query", &tensor);
        let prefix = if prefix == tensor { own.clone() } else { self.heads_first("prefix_query", &prefix) };
        Ok((own, prefix))
    }
}

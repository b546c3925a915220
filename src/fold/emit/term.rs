//! A [`Term`] in a graph, step by step. What does not depend on the query is computed here, in float64, and stands in the
//! graph as a constant: with a rank or a gate too, one MatMul remains.
//!
//! Where heads come first, for Prefix-Tuning+ with its defaults:
//! ```text
//! query [B, h, S, d] ─ Elu ─ MatMul M [h, d, d] ─┐
//! output [B, h, S, d] ─────────────────────────── Add ─► what read the output
//! ```
//! Where heads are merged, the query is split before and the term merged after:
//! ```text
//! query [B, S, h·d] ─ Reshape ─ Transpose ─ Elu ─ MatMul M ─ Transpose ─ Reshape ─┐
//! output [B, S, h·d] ───────────────────────────────────────────────────────────── Add
//! ```
//! and in graphs that hold operators of ONNX Runtime, whose optimizer takes a Transpose of three dimensions into the product:
//! ```text
//! query [B, S, h·d] ─ Elu ─ Reshape [B·S, h, d] ─ Transpose ─ MatMul M [h, B·S, d] ─ Transpose ─ Reshape ─┐
//! output [B, S, h·d] ───────────────────────────────────────────────────────────────────────────────────── Add
//! ```
//! The feature map is taken first: what it makes has one reader, so that the reshaping after it copies nothing.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};

use super::{Emission, Job, types};
use crate::adapter::term::{Binary, Map, Step, Value, spread};
use crate::adapter::{AdapterMethod, Method, Query, Tensors, Term};
use crate::fold::locate::Positions;
use crate::fold::{Error, Layout, Record, Result, Site, locate};
use crate::onnx::{DataType, Index, Model, NodeDef, NodeId};

const MICROSOFT: &str = "com.microsoft";

pub(super) fn write(job: &mut Job, method: &dyn AdapterMethod) -> Result<()> {
    let wide = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_dtype(DType::F64)?));
    let tensors = job.adapter.tensors().iter().map(wide).collect::<candle_core::Result<Tensors>>();
    let tensors = tensors.map_err(Error::Convert)?;
    let (model, sites) = (job.model, job.sites);
    check_positions(model)?;
    let index = Index::new(model.graph());
    for site in sites {
        if let Some(term) = method.term(job.adapter.config(), site.layer) {
            let constants = term.values(&tensors, job.adapter.config().num_heads, None).map_err(Error::Convert)?;
            let output_type = types::float_type(&index, &site.output);
            Writer::new(job, site, output_type)?.write(&index, &term, &constants)?;
        }
    }
    Ok(())
}

/// An operator that counts positions goes on counting them from the first token, where an earlier fold put a prefix before it.
fn check_positions(model: &Model) -> Result<()> {
    let after_prefix = Record::all(model)?.iter().any(|fold| matches!(fold.config.method, Method::Prefix(_)));
    if after_prefix && locate::exactness(model).positions == Positions::Operator {
        return Err(Error::NotFolded {
            what: "a term of the query over prefix tuning, in a graph whose attention operator counts positions".into(),
            help: "export the base model with `prefold export`, or in a form that has the input position_ids",
        });
    }
    Ok(())
}

/// The nodes of one site.
pub(super) struct Writer<'a, 'j> {
    pub(super) job: &'a mut Job<'j>,
    pub(super) site: &'a Site,
    /// The node before which all stand: the first reader of the output.
    pub(super) first: NodeId,
    /// The type of the output, where the graph says.
    output_type: Option<DataType>,
    /// Names of the site's nodes.
    names: BTreeSet<String>,
    /// Where the rows of the batch lie one after another in products, `[h, B·S, n]`: by step, whether its value is still merged,
    /// `[B, S, h·n]`. Empty where values are `[B, h, S, n]`.
    merged: Vec<bool>,
    /// By step, a merged value as `[B·S, h, n]`.
    rows: BTreeMap<usize, String>,
}

impl<'a, 'j> Writer<'a, 'j> {
    pub(super) fn new(job: &'a mut Job<'j>, site: &'a Site, output_type: Option<DataType>) -> Result<Self> {
        let Some(first) = site.readers.iter().map(|reader| reader.node).min_by_key(|node| node.index()) else {
            let reason = format!("nothing reads its output `{}`", site.output);
            let help = "the graph computes attention that it does not use: look at how it was exported";
            return Err(Error::Site { anchor: site.anchor.clone(), reason, help });
        };
        Ok(Self { job, site, first, output_type, names: BTreeSet::new(), merged: Vec::new(), rows: BTreeMap::new() })
    }

    /// Adds a node under a name like `name`, and returns its output.
    pub(super) fn node(&mut self, op: &str, name: &str, inputs: &[&str]) -> String {
        self.node_with(|name| NodeDef::new(op, name), name, inputs)
    }

    pub(super) fn node_with(&mut self, node: impl Fn(String) -> NodeDef, name: &str, inputs: &[&str]) -> String {
        let mut unique = name.to_owned();
        let mut count = 1;
        while !self.names.insert(unique.clone()) {
            count += 1;
            unique = format!("{name}_{count}");
        }
        let name = format!("{}/{unique}", self.site.prefix());
        let output = format!("{name}/output_0");
        let node = node(name).inputs(inputs.iter().copied()).outputs([output.as_str()]);
        self.job.patch.insert_before(self.first, node);
        output
    }

    pub(super) fn transpose(&mut self, name: &str, x: &str) -> String {
        self.node_with(|name| NodeDef::new("Transpose", name).attr_ints("perm", &[0, 2, 1, 3]), name, &[x])
    }

    /// `[B·S, h, n]` to `[h, B·S, n]`, and back.
    fn transpose_rows(&mut self, name: &str, x: &str) -> String {
        self.node_with(|name| NodeDef::new("Transpose", name).attr_ints("perm", &[1, 0, 2]), name, &[x])
    }

    pub(super) fn reshape(&mut self, name: &str, x: &str, constant: &str, shape: &[i64]) -> String {
        let shape = self.job.constants.integers(&mut self.job.patch, constant, shape);
        self.node("Reshape", name, &[x, &shape])
    }

    pub(super) fn number(&mut self, name: &str, value: f64) -> Result<String> {
        self.job.constants.number(&mut self.job.patch, name, value)
    }

    fn write(mut self, index: &Index, term: &Term, constants: &[Option<Tensor>]) -> Result<()> {
        let wanted =
            term.steps().iter().find_map(|step| if let Step::Query(query) = step { Some(*query) } else { None });
        let query = wanted.map(|query| self.query(index, query, term)).transpose()?;
        let mut outputs: Vec<String> = Vec::with_capacity(constants.len());
        for (index, step) in term.steps().iter().enumerate() {
            // what is constant is written where a node reads it
            let output = match (step, constants.get(index)) {
                (_, Some(Some(_))) => String::new(),
                (Step::Query(_), _) => query.clone().unwrap_or_default(),
                _ => self.step(term, step, &outputs, constants)?,
            };
            outputs.push(output);
        }
        let Some(value) = outputs.pop().filter(|name| !name.is_empty()) else {
            let reason = "its term does not depend on the query".into();
            return Err(Error::Site {
                anchor: self.site.anchor.clone(),
                reason,
                help: "this is a fault of the method",
            });
        };
        self.add(value)
    }

    fn step(&mut self, term: &Term, step: &Step, outputs: &[String], constants: &[Option<Tensor>]) -> Result<String> {
        match step {
            Step::Query(_) | Step::Tensor(_) | Step::Number(_) => Ok(String::new()),
            Step::Map(map, x) => {
                let x = self.operand(term, *x, outputs, constants)?;
                self.map(*map, &x)
            }
            Step::MatMul(left, right) if self.merged.get(left.index()) == Some(&true) => {
                let merged = self.operand(term, *left, outputs, constants)?;
                let right = self.operand(term, *right, outputs, constants)?;
                let rows = self.rows(left.index(), &merged);
                let left = self.transpose_rows("Transpose_rows", &rows);
                Ok(self.node("MatMul", "MatMul", &[&left, &right]))
            }
            Step::MatMul(left, right) => self.pair("MatMul", term, (*left, *right), outputs, constants),
            Step::Binary(Binary::Add, left, right) => self.pair("Add", term, (*left, *right), outputs, constants),
            Step::Binary(Binary::Mul, left, right) => self.pair("Mul", term, (*left, *right), outputs, constants),
            Step::Binary(Binary::Div, left, right) => self.pair("Div", term, (*left, *right), outputs, constants),
        }
    }

    fn pair(
        &mut self,
        op: &str,
        term: &Term,
        (left, right): (Value, Value),
        outputs: &[String],
        constants: &[Option<Tensor>],
    ) -> Result<String> {
        let left = self.operand(term, left, outputs, constants)?;
        let right = self.operand(term, right, outputs, constants)?;
        Ok(self.node(op, op, &[&left, &right]))
    }

    /// The name of a value: a node's output, or a constant of `[1 or heads, rows, columns]`.
    fn operand(
        &mut self,
        term: &Term,
        value: Value,
        outputs: &[String],
        constants: &[Option<Tensor>],
    ) -> Result<String> {
        let index = value.index();
        let Some(Some(constant)) = constants.get(index) else {
            return Ok(outputs.get(index).cloned().unwrap_or_default());
        };
        if let Some(Step::Number(number)) = term.steps().get(index) {
            return self.number(&format!("prefold/number_{number}"), *number);
        }
        let name = match (term.label_of(value), term.steps().get(index)) {
            (Some(label), _) => format!("prefold.{label}"),
            (None, Some(Step::Tensor(name))) => format!("prefold.{name}"),
            _ => format!("prefold.layers.{}.constant_{index}", self.site.layer),
        };
        let heads = self.job.adapter.config().num_heads;
        let groups = constant.dim(0).map_err(Error::Convert)?;
        let spread = if groups == 1 { Ok(constant.clone()) } else { spread(constant, heads) };
        self.job.constants.add(&mut self.job.patch, &name, &spread.map_err(Error::Convert)?)
    }

    /// The query, heads first or by rows. What is written from here on computes in its type.
    fn query(&mut self, index: &Index, query: Query, term: &Term) -> Result<String> {
        let source = locate::query(self.job.model, self.site, query)?;
        let found = types::float_type(index, source.made_of());
        // sites come in graph order, so that what several share stands before the first of them
        for node in source.nodes {
            if self.job.constants.is_new(node.name()) {
                self.job.patch.insert_before(self.first, node);
            }
        }
        for tensor in source.initializers {
            if self.job.constants.is_new(tensor.name()) {
                self.job.patch.add_initializer(tensor);
            }
        }
        if let Some(found) = found.or(self.output_type) {
            self.job.constants.set_type(found);
        }
        if source.layout == Layout::HeadsFirst {
            return Ok(source.tensor);
        }
        if let Some(heads_first) = heads_first(index, &source.tensor) {
            return Ok(heads_first.to_owned());
        }
        if let Some(merged) = merged_steps(term).filter(|_| self.takes_rows()) {
            self.merged = merged;
            return Ok(source.tensor);
        }
        let config = self.job.adapter.config();
        let (heads, head_dim) = (config.num_heads as i64, config.head_dim as i64);
        let split = self.reshape("Reshape_split", &source.tensor, "prefold/split_heads", &[0, 0, heads, head_dim]);
        Ok(self.transpose("Transpose_split", &split))
    }

    /// Whether the graph is one of ONNX Runtime's alone. A bank's matrices differ by the rows of the batch.
    fn takes_rows(&self) -> bool {
        self.site.output_layout == Layout::Merged
            && self.job.constants.emission() != Emission::Bank
            && self.job.model.opset(MICROSOFT).is_some()
    }

    /// A feature map; in bfloat16, which Elu and Softplus came to take with opset 22 and few runtimes do, it is taken in 32-bit floats.
    fn map(&mut self, map: Map, x: &str) -> Result<String> {
        if self.job.constants.data_type() != DataType::Bfloat16 || map == Map::Identity {
            return self.mapped(map, x);
        }
        let cast = |to: DataType| move |name: String| NodeDef::new("Cast", name).attr_int("to", to.code().into());
        let wide = self.node_with(cast(DataType::Float), "Cast_wide", &[x]);
        self.job.constants.set_type(DataType::Float);
        let mapped = self.mapped(map, &wide)?;
        self.job.constants.set_type(DataType::Bfloat16);
        Ok(self.node_with(cast(DataType::Bfloat16), "Cast_narrow", &[&mapped]))
    }

    fn mapped(&mut self, map: Map, x: &str) -> Result<String> {
        Ok(match map {
            Map::Identity => x.to_owned(),
            Map::Elu => self.node("Elu", "Elu", &[x]),
            Map::Relu => self.node("Relu", "Relu", &[x]),
            Map::Softplus => self.node("Softplus", "Softplus", &[x]),
            Map::Abs => self.node("Abs", "Abs", &[x]),
            Map::EluPlusOne => {
                let one = self.number("prefold/number_1", 1.0)?;
                let elu = self.node("Elu", "Elu", &[x]);
                self.node("Add", "Add_one", &[&elu, &one])
            }
            Map::Silu => {
                let sigmoid = self.node("Sigmoid", "Sigmoid", &[x]);
                self.node("Mul", "Mul_silu", &[x, &sigmoid])
            }
            // composed: the operator Gelu came with opset 20
            Map::Gelu => {
                let root_half = self.number("prefold/root_half", std::f64::consts::FRAC_1_SQRT_2)?;
                let (one, half) = (self.number("prefold/number_1", 1.0)?, self.number("prefold/half", 0.5)?);
                let scaled = self.node("Mul", "Mul_root_half", &[x, &root_half]);
                let erf = self.node("Erf", "Erf", &[&scaled]);
                let sum = self.node("Add", "Add_one", &[&erf, &one]);
                // halved first: in float16 twice a large x is infinite, and times a zero M no number
                let halved = self.node("Mul", "Mul_half", &[x, &half]);
                self.node("Mul", "Mul_gelu", &[&halved, &sum])
            }
        })
    }

    /// The merged value of a step, `[B, S, h·d]`, as `[B·S, h, d]`.
    fn rows(&mut self, step: usize, merged: &str) -> String {
        if let Some(rows) = self.rows.get(&step) {
            return rows.clone();
        }
        let config = self.job.adapter.config();
        let shape = [-1, config.num_heads as i64, config.head_dim as i64];
        let rows = self.reshape("Reshape_rows", merged, "prefold/rows", &shape);
        self.rows.insert(step, rows.clone());
        rows
    }

    /// `[h, B·S, n]` in the shape of the output.
    fn merge_rows(&mut self, term: &str) -> String {
        let merged = self.transpose_rows("Transpose_merge", term);
        // sites come in graph order, so that the first one's output stands before all others of its graph
        let name = format!("{}Shape", self.site.root());
        let shape = format!("{name}/output_0");
        if self.job.constants.is_new(&name) {
            let node = NodeDef::new("Shape", name).inputs([self.site.output.as_str()]).outputs([shape.as_str()]);
            self.job.patch.insert_before(self.first, node);
        }
        self.node("Reshape", "Reshape_merge", &[&merged, &shape])
    }

    /// Adds the term to the output.
    pub(super) fn add(mut self, mut term: String) -> Result<()> {
        if !self.merged.is_empty() {
            term = self.merge_rows(&term);
        } else if self.site.output_layout == Layout::Merged {
            let config = self.job.adapter.config();
            let shape = [0, 0, (config.num_heads * config.head_dim) as i64];
            let merged = self.transpose("Transpose_merge", &term);
            term = self.reshape("Reshape_merge", &merged, "prefold/merge_heads", &shape);
        }
        if let Some(output_type) = self.output_type.filter(|found| *found != self.job.constants.data_type()) {
            let to = i64::from(output_type.code());
            term = self.node_with(|name| NodeDef::new("Cast", name).attr_int("to", to), "Cast", &[&term]);
        }
        let site = self.site;
        let sum = self.node("Add", "Add", &[&site.output, &term]);
        for reader in &site.readers {
            self.job.patch.replace_input(reader.node, reader.slot, sum.as_str());
        }
        Ok(())
    }
}

/// By step, whether its value is made of the query by functions of single elements alone. `None` where such a value goes anywhere but
/// into a function or into a product from the left.
fn merged_steps(term: &Term) -> Option<Vec<bool>> {
    let mut merged: Vec<bool> = Vec::with_capacity(term.steps().len());
    for step in term.steps() {
        let of = |value: &Value| merged.get(value.index()) == Some(&true);
        let is_merged = match step {
            Step::Query(_) => true,
            Step::Map(_, x) => of(x),
            Step::Binary(_, left, right) if of(left) || of(right) => return None,
            Step::MatMul(_, right) if of(right) => return None,
            _ => false,
        };
        merged.push(is_merged);
    }
    (merged.last() == Some(&false)).then_some(merged)
}

/// The heads-first tensor that a merged one was made from by transposing and reshaping, so that it need not be split again.
///
/// ```text
/// heads first [B, h, S, d] ─ Transpose(0, 2, 1, 3) ─ Reshape ─ merged [B, S, h·d]
/// ```
fn heads_first<'g>(index: &Index<'g>, merged: &str) -> Option<&'g str> {
    let reshape = index.producer(merged).filter(|node| node.is("", "Reshape"))?;
    let transpose = index.producer(reshape.input(0)?).filter(|node| node.is("", "Transpose"))?;
    let order = transpose.attribute("perm")?;
    (order.as_ints() == Some(&[0, 2, 1, 3])).then(|| transpose.input(0)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{ModelBuilder, TensorDef, ValueDef};

    #[test]
    fn a_query_that_was_heads_first_is_not_split_again() {
        let model = |perm: &[i64]| {
            let mut builder = ModelBuilder::new("g", 8);
            let dims = ["batch".into(), 2.into(), "sequence".into(), 4.into()];
            builder.opset("", 17).input(ValueDef::new("rotated", DataType::Float, dims));
            builder.output(ValueDef::new("merged", DataType::Float, ["batch".into(), "sequence".into(), 8.into()]));
            builder.initializer(TensorDef::from_i64s("shape", &[3], &[0, 0, 8]));
            let transpose = NodeDef::new("Transpose", "t").attr_ints("perm", perm);
            builder.node(transpose.inputs(["rotated"]).outputs(["turned"]));
            builder.node(NodeDef::new("Reshape", "r").inputs(["turned", "shape"]).outputs(["merged"]));
            builder.build().unwrap()
        };
        let of = |perm: &[i64]| heads_first(&Index::new(model(perm).graph()), "merged").map(str::to_owned);
        assert_eq!(of(&[0, 2, 1, 3]).as_deref(), Some("rotated"));
        assert_eq!(of(&[0, 2, 3, 1]), None);
        let model = model(&[0, 2, 1, 3]);
        assert_eq!(heads_first(&Index::new(model.graph()), "turned"), None);
    }
}

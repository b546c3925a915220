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

use std::collections::BTreeSet;

use candle_core::{DType, Tensor};

use super::Job;
use crate::adapter::term::{Binary, Map, Step, Value, spread};
use crate::adapter::{AdapterMethod, Query, Tensors, Term};
use crate::fold::{Error, Layout, Result, Site, locate};
use crate::onnx::{NodeDef, NodeId};

pub(super) fn write(job: &mut Job, method: &dyn AdapterMethod) -> Result<()> {
    let wide = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_dtype(DType::F64)?));
    let tensors = job.adapter.tensors().iter().map(wide).collect::<candle_core::Result<Tensors>>();
    let tensors = tensors.map_err(Error::Convert)?;
    for site in job.sites {
        if let Some(term) = method.term(job.adapter.config(), site.layer) {
            let constants = term.values(&tensors, job.adapter.config().num_heads, None).map_err(Error::Convert)?;
            Emission::new(job, site)?.write(&term, &constants)?;
        }
    }
    Ok(())
}

/// The nodes of one site.
struct Emission<'a, 'j> {
    job: &'a mut Job<'j>,
    site: &'a Site,
    /// The node before which all stand: the first reader of the output.
    first: NodeId,
    /// Names of the site's nodes.
    names: BTreeSet<String>,
}

impl<'a, 'j> Emission<'a, 'j> {
    fn new(job: &'a mut Job<'j>, site: &'a Site) -> Result<Self> {
        let Some(first) = site.readers.iter().map(|reader| reader.node).min_by_key(|node| node.index()) else {
            let reason = format!("nothing reads its output `{}`", site.output);
            let help = "the graph computes attention that it does not use: look at how it was exported";
            return Err(Error::Site { anchor: site.anchor.clone(), reason, help });
        };
        Ok(Self { job, site, first, names: BTreeSet::new() })
    }

    /// Adds a node under a name like `name`, and returns its output.
    fn node(&mut self, op: &str, name: &str, inputs: &[&str]) -> String {
        self.node_with(|name| NodeDef::new(op, name), name, inputs)
    }

    fn node_with(&mut self, node: impl Fn(String) -> NodeDef, name: &str, inputs: &[&str]) -> String {
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

    fn transpose(&mut self, name: &str, x: &str) -> String {
        self.node_with(|name| NodeDef::new("Transpose", name).attr_ints("perm", &[0, 2, 1, 3]), name, &[x])
    }

    fn reshape(&mut self, name: &str, x: &str, constant: &str, shape: &[i64]) -> String {
        let shape = self.job.constants.integers(&mut self.job.patch, constant, shape);
        self.node("Reshape", name, &[x, &shape])
    }

    fn number(&mut self, name: &str, value: f64) -> Result<String> {
        self.job.constants.number(&mut self.job.patch, name, value)
    }

    fn write(mut self, term: &Term, constants: &[Option<Tensor>]) -> Result<()> {
        let mut outputs: Vec<String> = Vec::with_capacity(constants.len());
        for (index, step) in term.steps().iter().enumerate() {
            // what is constant is written where a node reads it
            let output = match constants.get(index) {
                Some(Some(_)) => String::new(),
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
            Step::Query(query) => self.query(*query),
            Step::Tensor(_) | Step::Number(_) => Ok(String::new()),
            Step::Map(map, x) => {
                let x = self.operand(term, *x, outputs, constants)?;
                self.map(*map, &x)
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
        let name = match term.steps().get(index) {
            Some(Step::Tensor(name)) => format!("prefold.{name}"),
            _ => format!("prefold.layers.{}.constant_{index}", self.site.layer),
        };
        let heads = self.job.adapter.config().num_heads;
        let groups = constant.dim(0).map_err(Error::Convert)?;
        let spread = if groups == 1 { Ok(constant.clone()) } else { spread(constant, heads) };
        self.job.constants.add(&mut self.job.patch, &name, &spread.map_err(Error::Convert)?)
    }

    fn query(&mut self, query: Query) -> Result<String> {
        let source = locate::query(self.job.model, self.site, query)?;
        for node in source.nodes {
            self.job.patch.insert_before(self.first, node);
        }
        for tensor in source.initializers {
            self.job.patch.add_initializer(tensor);
        }
        if source.layout == Layout::HeadsFirst {
            return Ok(source.tensor);
        }
        let config = self.job.adapter.config();
        let shape = [0, 0, config.num_heads as i64, config.head_dim as i64];
        let split = self.reshape("Reshape_split", &source.tensor, "prefold/split_heads", &shape);
        Ok(self.transpose("Transpose_split", &split))
    }

    fn map(&mut self, map: Map, x: &str) -> Result<String> {
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
                let product = self.node("Mul", "Mul_gelu", &[x, &sum]);
                self.node("Mul", "Mul_half", &[&product, &half])
            }
        })
    }

    /// Adds the term to the output.
    fn add(mut self, mut term: String) -> Result<()> {
        if self.site.output_layout == Layout::Merged {
            let config = self.job.adapter.config();
            let shape = [0, 0, (config.num_heads * config.head_dim) as i64];
            let merged = self.transpose("Transpose_merge", &term);
            term = self.reshape("Reshape_merge", &merged, "prefold/merge_heads", &shape);
        }
        let site = self.site;
        let sum = self.node("Add", "Add", &[&site.output, &term]);
        for reader in &site.readers {
            self.job.patch.replace_input(reader.node, reader.slot, sum.as_str());
        }
        Ok(())
    }
}

//! LoRA beside the linear maps of a graph that prefold exported.
//!
//! ```text
//! x ─┬─ MatMul W ──────────────────────────┐
//!    └─ MatMul Aᵀ ─ MatMul s·Bᵀ ────────── Add ─ (Mul m/‖W + s·BA‖) ─► what read the product
//! ```
//!
//! The factor of DoRA is computed here, from the weight as it stands in the graph.

use candle_core::{DType, Device, Tensor};

use super::Job;
use crate::adapter::{Lora, LoraMap};
use crate::base::Linear;
use crate::fold::{Error, Result};
use crate::onnx::{Index, Node, NodeDef};

const HELP: &str = "export the base model with `prefold export`, whose nodes prefold knows by name";

pub(super) fn write(job: &mut Job, lora: &Lora) -> Result<()> {
    let index = Index::new(job.model.graph());
    for (layer, linear) in lora.sites(job.adapter.config()) {
        let map = lora.map(job.adapter.tensors(), layer, linear)?;
        add(job, &index, layer, linear, &map)?;
    }
    Ok(())
}

fn add(job: &mut Job, index: &Index, layer: usize, linear: Linear, map: &LoraMap) -> Result<()> {
    let anchor = format!("/model/layers.{layer}/{}/MatMul", linear.module().replace('.', "/"));
    let stopped = |reason: &str| Error::Site { anchor: anchor.clone(), reason: reason.into(), help: HELP };
    let node = index.graph().nodes().iter().find(|node| node.name() == anchor && node.is("", "MatMul"));
    let Some(node) = node else { return Err(stopped("the graph has no MatMul of this name")) };
    let (Some(x), Some(product)) = (node.input(0), node.output(0)) else {
        return Err(stopped("it has no input or no output"));
    };
    let readers = index.consumers(product);
    let Some(first) = readers.iter().map(|reader| reader.node).min_by_key(|node| node.index()) else {
        return Err(stopped("nothing reads its output"));
    };
    let at = |op: &str| format!("/prefold/layers.{layer}/{}/{op}", linear.module().replace('.', "/"));
    let name = |part: &str| format!("prefold.layers.{layer}.{}.{part}", linear.module());
    let transposed = |x: &Tensor, factor: f64| (x.to_dtype(DType::F64)?.t()? * factor)?.contiguous();
    let a = transposed(&map.a, 1.0).map_err(Error::Convert)?;
    let b = transposed(&map.b, map.scale).map_err(Error::Convert)?;
    let a = job.constants.add(&mut job.patch, &name("lora_A"), &a)?;
    let b = job.constants.add(&mut job.patch, &name("lora_B"), &b)?;
    let mut node_of = |op: &str, label: &str, inputs: [&str; 2]| {
        let output = format!("{}/output_0", at(label));
        let node = NodeDef::new(op, at(label)).inputs(inputs).outputs([output.as_str()]);
        job.patch.insert_before(first, node);
        output
    };
    let inner = node_of("MatMul", "MatMul_A", [x, &a]);
    let delta = node_of("MatMul", "MatMul_B", [&inner, &b]);
    let mut sum = node_of("Add", "Add", [product, &delta]);
    if let Some(magnitude) = &map.magnitude {
        let weight = weight(job, index, node)?.ok_or_else(|| stopped("its weight is no constant of two dimensions"))?;
        let ratio = ratio(map, magnitude, &weight).map_err(Error::Convert)?;
        let ratio = job.constants.add(&mut job.patch, &name("dora"), &ratio)?;
        let output = format!("{}/output_0", at("Mul"));
        let node = NodeDef::new("Mul", at("Mul")).inputs([sum.as_str(), &ratio]).outputs([output.as_str()]);
        job.patch.insert_before(first, node);
        sum = output;
    }
    for reader in readers {
        job.patch.replace_input(reader.node, reader.slot, sum.as_str());
    }
    Ok(())
}

/// The `[in, out]` right side of a MatMul.
fn weight(job: &Job, index: &Index, node: &Node) -> Result<Option<Tensor>> {
    let Some(found) = node.input(1).and_then(|name| index.initializer(name)) else { return Ok(None) };
    let dims: Vec<usize> = found.dims().iter().filter_map(|dim| usize::try_from(*dim).ok()).collect();
    let [width, out] = dims[..] else { return Ok(None) };
    let values = found.data_in(job.source)?.to_f32s()?;
    Tensor::from_vec(values, (width, out), &Device::Cpu).map(Some).map_err(Error::Convert)
}

/// `m / ‖W + s · B A‖`, `[out]`, in float64.
fn ratio(map: &LoraMap, magnitude: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    let norms = map.to_dtype(DType::F64)?.norms(&weight.t()?.to_dtype(DType::F64)?)?;
    magnitude.to_dtype(DType::F64)? / norms
}

//! LoRA beside the linear maps of a graph, whatever their weights are kept in.
//!
//! ```text
//! x ─┬─ product with W (+ bias) ───────────┐
//!    └─ MatMul Aᵀ ─ MatMul s·Bᵀ ────────── Add ─ (Mul m/‖W + s·BA‖ ─ (Add)) ─► what read the product
//! ```
//!
//! Where a product holds several maps, their A stand side by side, those that are equal once, and every B fills the columns
//! of its own map. The factor of DoRA is computed here, from the weight as it stands in the graph, and does not touch a bias that the
//! product holds already. As slot and bank it is one where no adapter is active.
//!
//! In a bank a product of two dimensions gets its batch back, `[batch, rows, …]`, since every row of the batch has its own A and B.

mod merge;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::emission::{ADAPTER_IDS, Emission};
use super::{Job, types};
use crate::adapter::{Lora, LoraMap};
use crate::base::Linear;
use crate::fold::locate::projections::{LinearNode, Projection, WeightStorage};
use crate::fold::locate::shape;
use crate::fold::{Error, Result, stack};
use crate::onnx::{Index, NodeDef, NodeId};

const HELP: &str = "fold into the graph with float weights, as it was before it was quantised or optimised";

/// An adapted map in the graph.
struct Part {
    linear: Linear,
    map: LoraMap,
    place: Projection,
}

pub(super) fn write(job: &mut Job, lora: &Lora) -> Result<()> {
    if let Some(folder) = job.merge {
        return merge::write(job, lora, folder);
    }
    let index = Index::new(job.model.graph());
    for (root, layer, parts) in products(job, lora)? {
        add(job, &index, &format!("{root}layers.{layer}"), layer, &parts)?;
    }
    Ok(())
}

/// The products that hold adapted maps, with what the names of their nodes begin with and their layers. Each branch of a merged
/// decoder has the maps of every layer.
fn products(job: &Job, lora: &Lora) -> Result<Vec<(String, usize, Vec<Part>)>> {
    let mut all = Vec::new();
    for (root, projections) in stack::linear_maps(job.model, job.adapter.config())? {
        let mut products: BTreeMap<NodeId, (usize, Vec<Part>)> = BTreeMap::new();
        for (layer, linear) in lora.sites(job.adapter.config()) {
            let map = lora.map(job.adapter.tensors(), layer, linear)?.to_dtype(DType::F64).map_err(Error::Convert)?;
            let place = projections.get(layer, linear)?.clone();
            products.entry(place.node.id).or_insert((layer, Vec::new())).1.push(Part { linear, map, place });
        }
        all.extend(products.into_values().map(|(layer, parts)| (root.clone(), layer, parts)));
    }
    Ok(all)
}

fn stopped(node: &LinearNode, reason: &str) -> Error {
    Error::Site { anchor: node.name.clone(), reason: reason.into(), help: HELP }
}

fn add(job: &mut Job, index: &Index, prefix: &str, layer: usize, parts: &[Part]) -> Result<()> {
    let Some(first) = parts.first() else { return Ok(()) };
    let node = &first.place.node;
    let readers = &node.readers;
    let before = readers.iter().map(|reader| reader.node).min_by_key(|node| node.index());
    let Some(before) = before.filter(|_| index.captured_by(&node.product).is_empty()) else {
        return Err(stopped(node, "its product is not read in the graph that makes it"));
    };
    let module = module(parts);
    let at = |op: &str| format!("{prefix}/{}/{op}", module.replace('.', "/"));
    let name = |part: &str| format!("prefold.layers.{layer}.{module}.{part}");
    if let Some(found) = types::float_type(index, &node.product) {
        job.constants.set_type(found);
    }
    let (a, b) = factors(parts).map_err(Error::Convert)?;
    let width = b.dim(1).map_err(Error::Convert)? as i64;
    let inputs = a.dim(0).map_err(Error::Convert)? as i64;
    let a = job.constants.add(&mut job.patch, &name("lora_A"), &a)?;
    let b = job.constants.add(&mut job.patch, &name("lora_B"), &b)?;
    let scaling = scaling(job, index, parts)?;
    let scaling = scaling.map(|(factor, shift)| {
        let factor = job.constants.add_off(&mut job.patch, &name("dora"), &factor, 1.0)?;
        let shift = shift.map(|shift| job.constants.add(&mut job.patch, &name("dora_bias"), &shift)).transpose()?;
        Ok::<_, Error>((factor, shift))
    });
    let scaling = scaling.transpose()?;
    let is_flat = node.op_type == "Gemm" || shape::rank(index, &node.input) == Some(2);
    // the rank that a graph does not declare may be another, and so the product gets back the shape that it had
    let rows =
        (is_flat && job.constants.emission() == Emission::Bank).then(|| (by_row(job, inputs), by_row(job, width)));
    let mut node_of = |op: &str, label: &str, inputs: &[&str]| {
        let output = format!("{}/output_0", at(label));
        job.patch.insert_before(
            before,
            NodeDef::new(op, at(label)).inputs(inputs.iter().copied()).outputs([output.as_str()]),
        );
        output
    };
    let (mut input, mut product) = (node.input.clone(), node.product.clone());
    if let Some((of_input, of_product)) = &rows {
        input = node_of("Reshape", "Reshape_input", &[&input, of_input]);
        product = node_of("Reshape", "Reshape_product", &[&product, of_product]);
    }
    let inner = node_of("MatMul", "MatMul_A", &[&input, &a]);
    let delta = node_of("MatMul", "MatMul_B", &[&inner, &b]);
    let mut sum = node_of("Add", "Add", &[&product, &delta]);
    if let Some((factor, shift)) = scaling {
        sum = node_of("Mul", "Mul", &[&sum, &factor]);
        if let Some(shift) = shift {
            sum = node_of("Add", "Add_bias", &[&sum, &shift]);
        }
    }
    if rows.is_some() {
        let shape = node_of("Shape", "Shape", &[&node.product]);
        sum = node_of("Reshape", "Reshape_flat", &[&sum, &shape]);
    }
    for reader in readers {
        job.patch.replace_input(reader.node, reader.slot, sum.as_str());
    }
    Ok(())
}

/// `[batch, -1, width]` as a shape: the batch is that of the bank's input.
fn by_row(job: &mut Job, width: i64) -> String {
    let name = format!("/prefold/batch/Concat_{width}");
    let output = format!("{name}/output_0");
    if job.constants.is_new(&name) {
        let first = NodeId(0);
        let batch = "/prefold/batch/Shape";
        let size = format!("{batch}/output_0");
        if job.constants.is_new(batch) {
            job.patch.insert_before(first, NodeDef::new("Shape", batch).inputs([ADAPTER_IDS]).outputs([size.as_str()]));
        }
        let rest = job.constants.integers(&mut job.patch, &format!("prefold/rows_{width}"), &[-1, width]);
        let concat = NodeDef::new("Concat", name).attr_int("axis", 0);
        job.patch.insert_before(first, concat.inputs([size.as_str(), &rest]).outputs([output.as_str()]));
    }
    output
}

/// The name of a product: that of its map, or of the module that holds its maps.
fn module(parts: &[Part]) -> String {
    match parts {
        [part] => part.linear.module().to_owned(),
        _ if parts.iter().all(|part| matches!(part.linear, Linear::Gate | Linear::Up)) => "mlp.gate_up_proj".into(),
        _ => "self_attn.qkv_proj".into(),
    }
}

/// `Aᵀ` of `[in, rank]` and `s · Bᵀ` of `[rank, out]` of a whole product.
fn factors(parts: &[Part]) -> candle_core::Result<(Tensor, Tensor)> {
    let mut rows: Vec<&Tensor> = Vec::new();
    let mut starts = Vec::with_capacity(parts.len());
    let mut rank = 0;
    let mut known: Vec<(Vec<f64>, usize)> = Vec::new();
    for part in parts {
        let values = part.map.a.flatten_all()?.to_vec1::<f64>()?;
        match known.iter().find(|(other, _)| *other == values) {
            Some((_, start)) => starts.push(*start),
            None => {
                known.push((values, rank));
                starts.push(rank);
                rows.push(&part.map.a);
                rank += part.map.a.dim(0)?;
            }
        }
    }
    let a = Tensor::cat(&rows, 0)?.t()?.contiguous()?;
    // what the node multiplies its own product by
    let scale = parts.first().map_or(1.0, |part| f64::from(part.place.node.scale));
    if let [Part { map, place: Projection { columns: None, .. }, .. }] = parts {
        return Ok((a, (map.b.t()? * (map.scale * scale))?.contiguous()?));
    }
    let width = parts.iter().find_map(|part| part.place.node.width).unwrap_or(0);
    let mut b = vec![0.0; rank * width];
    for (part, start) in parts.iter().zip(starts) {
        for (output, row) in part.map.b.to_vec2::<f64>()?.iter().enumerate() {
            let column = part.place.columns.as_ref().map_or(Some(&output), |columns| columns.get(output));
            for (inner, value) in row.iter().enumerate() {
                let entry = column.and_then(|column| b.get_mut((start + inner) * width + column));
                let Some(entry) = entry else {
                    candle_core::bail!("the columns of a packed product do not fit its maps")
                };
                *entry = value * part.map.scale * scale;
            }
        }
    }
    Ok((a, Tensor::from_vec(b, (rank, width), &Device::Cpu)?))
}

/// DoRA's factor on the outputs of a product, and what it must not take from the bias inside.
fn scaling(job: &Job, index: &Index, parts: &[Part]) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let Some(node) = parts.first().map(|part| &part.place.node) else { return Ok(None) };
    if parts.iter().all(|part| part.map.magnitude.is_none()) {
        return Ok(None);
    }
    let weight = weight(job, index, node)?;
    let mut factor = vec![1.0; weight.dim(0).map_err(Error::Convert)?];
    for part in parts {
        let Some(magnitude) = &part.map.magnitude else { continue };
        for (output, ratio) in ratio(part, magnitude, &weight).map_err(Error::Convert)?.into_iter().enumerate() {
            let column = part.place.columns.as_ref().map_or(Some(&output), |columns| columns.get(output)).copied();
            if let Some(entry) = column.and_then(|column| factor.get_mut(column)) {
                *entry = ratio;
            }
        }
    }
    let shift = match &node.bias {
        None => None,
        Some(name) => {
            let bias = index.initializer(name).ok_or_else(|| stopped(node, "its bias is no constant"))?;
            let bias = bias.data_in(job.source)?.to_f32s()?;
            let shift = bias.iter().zip(&factor).map(|(bias, factor)| f64::from(*bias) * (1.0 - factor));
            Some(Tensor::new(shift.collect::<Vec<_>>(), &Device::Cpu).map_err(Error::Convert)?)
        }
    };
    Ok(Some((Tensor::new(factor, &Device::Cpu).map_err(Error::Convert)?, shift)))
}

/// A float weight as `[out, in]`, in float64.
fn weight(job: &Job, index: &Index, node: &LinearNode) -> Result<Tensor> {
    let found = shape::constant(index, &node.weight).filter(|_| node.storage == WeightStorage::Float);
    let Some(found) = found else {
        return Err(stopped(node, "DoRA needs the norms of its weight, which is quantised"));
    };
    let dims: Vec<usize> = found.dims().iter().filter_map(|dim| usize::try_from(*dim).ok()).collect();
    let [rows, columns] = dims[..] else { return Err(stopped(node, "its weight has not two dimensions")) };
    let values = found.data_in(job.source)?.to_f32s()?;
    let weight = Tensor::from_vec(values, (rows, columns), &Device::Cpu).and_then(|w| w.to_dtype(DType::F64));
    let oriented = weight.and_then(|w| if node.transposed { Ok(w) } else { w.t()?.contiguous() });
    oriented.map_err(Error::Convert)
}

/// `m / ‖W + s · B A‖`, in float64.
fn ratio(part: &Part, magnitude: &Tensor, weight: &Tensor) -> candle_core::Result<Vec<f64>> {
    let own = match &part.place.columns {
        None => weight.clone(),
        Some(columns) => {
            let rows: Vec<u32> = columns.iter().map(|column| *column as u32).collect();
            weight.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?
        }
    };
    (magnitude / part.map.norms(&own)?)?.to_vec1::<f64>()
}

//! LoRA in the weights themselves: `W + s · B A`, its rows scaled to their magnitudes with DoRA.
//!
//! The merged weight is a new constant, and the product reads it in the place of the old one, which stays in the file: an
//! unfold drops the new data and keeps the old. Large weights are written to a data file one after the other.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::{Part, module, products, stopped, weight};
use crate::adapter::Lora;
use crate::fold::emit::constants::rounded;
use crate::fold::emit::emission::{INLINE_LIMIT, data_name};
use crate::fold::emit::{Job, types};
use crate::fold::locate::projections::{LinearNode, WeightStorage};
use crate::fold::locate::shape;
use crate::fold::{Error, Result};
use crate::onnx::{DataType, ExternalWriter, Index, TensorDef, TensorInfo};

pub(super) fn write(job: &mut Job, lora: &Lora, folder: &Path) -> Result<()> {
    let index = Index::new(job.model.graph());
    let products = products(job, lora)?;
    let mut stored = Vec::with_capacity(products.len());
    for (_, layer, parts) in &products {
        let Some(part) = parts.first() else { continue };
        stored.push((*layer, parts, checked(&index, &part.place.node)?));
    }
    let bytes: u64 = stored.iter().filter_map(|(_, _, weight)| weight.byte_len()).sum();
    let is_large = bytes > INLINE_LIMIT as u64;
    let mut external = is_large.then(|| ExternalWriter::create(folder, &data_name(job.model)?)).transpose()?;
    for (layer, parts, stored) in stored {
        let Some(part) = parts.first() else { continue };
        let node = &part.place.node;
        let name = format!("prefold.layers.{layer}.{}.weight", module(parts));
        // the branches of a merged decoder read one weight
        if !job.constants.is_new(&name) {
            job.patch.replace_input(node.weight_use.node, node.weight_use.slot, name);
            continue;
        }
        let merged = merged(&weight(job, &index, node)?, parts).map_err(Error::Convert)?;
        let oriented = if node.transposed { Ok(merged) } else { merged.t().and_then(|merged| merged.contiguous()) };
        let bytes = rounded(&name, &oriented.map_err(Error::Convert)?, stored.data_type())?;
        let tensor = match &mut external {
            Some(file) => file.write(&name, stored.data_type(), stored.dims(), |out| out.write_all(&bytes))?,
            None => TensorDef::inline(name.as_str(), stored.data_type(), stored.dims(), bytes),
        };
        job.patch.add_initializer(tensor);
        job.patch.replace_input(node.weight_use.node, node.weight_use.slot, name);
    }
    if let Some(external) = external {
        external.finish()?;
    }
    Ok(())
}

/// The weight of a product that can be replaced by another.
fn checked<'g>(index: &Index<'g>, node: &LinearNode) -> Result<&'g TensorInfo> {
    if node.storage != WeightStorage::Float {
        return Err(stopped(
            node,
            "its weight is quantised, and what is merged into it would be rounded: fold with --lora side",
        ));
    }
    let narrow = |stored: &&TensorInfo| types::is_float(stored.data_type()) && stored.data_type() != DataType::Double;
    let Some(stored) = shape::constant(index, &node.weight).filter(narrow) else {
        return Err(stopped(node, "its weight is no constant of 32 or 16-bit floats: fold with --lora side"));
    };
    // what lays the weight out may serve other products too; the weight itself may, for the others go on reading it
    let mut at = node.weight_use.node;
    while at != node.id {
        let Some(wrap) = index.graph().node(at) else {
            return Err(stopped(node, "its weight is laid out in a branch: fold with --lora side"));
        };
        let output = wrap.output(0).unwrap_or_default();
        match index.consumers(output) {
            [reader] if index.captured_by(output).is_empty() => at = reader.node,
            _ => {
                let reason = format!("`{}` hands its weight to several nodes: fold with --lora side", wrap.name());
                return Err(stopped(node, &reason));
            }
        }
    }
    Ok(stored)
}

/// `[out, in]` with every map of the product merged into its rows.
fn merged(weight: &Tensor, parts: &[Part]) -> candle_core::Result<Tensor> {
    if let [Part { map, place, .. }] = parts
        && place.columns.is_none()
    {
        return map.merged(weight);
    }
    let (outputs, inputs) = weight.dims2()?;
    let mut values = weight.flatten_all()?.to_vec1::<f64>()?;
    for part in parts {
        let rows: Vec<usize> = part.place.columns.clone().unwrap_or_else(|| (0..outputs).collect());
        let own: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let own = part.map.merged(&weight.index_select(&Tensor::new(own, &Device::Cpu)?, 0)?)?;
        for (row, own) in rows.iter().zip(own.to_vec2::<f64>()?) {
            match values.get_mut(row * inputs..(row + 1) * inputs) {
                Some(place) => place.copy_from_slice(&own),
                None => candle_core::bail!("the columns of a packed product do not fit its maps"),
            }
        }
    }
    Tensor::from_vec(values, (outputs, inputs), &Device::Cpu)
}

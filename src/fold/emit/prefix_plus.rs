//! Prefix-Tuning+ in a graph.
//!
//! Where heads come first:
//! ```text
//! query [B, h, S, d] ─ Elu ─ MatMul M [h, d, d] ─┐
//! output [B, h, S, d] ─────────────────────────── Add ─► what read the output
//! ```
//! Where heads are merged, the query is split before and the term merged after:
//! ```text
//! query [B, S, h·d] ─ Reshape ─ Transpose ─ Elu ─ MatMul M ─ Transpose ─ Reshape ─┐
//! output [B, S, h·d] ───────────────────────────────────────────────────────────── Add
//! ```

use std::path::Path;

use candle_core::{DType, Tensor};

use crate::adapter::{Adapter, FeatureMap};
use crate::fold::{Error, Layout, Result, Site};
use crate::onnx::{DataType, ExternalWriter, NodeDef, Patch, TensorDef};

/// Adapter tensors together larger than this go into a data file of their own.
const INLINE_LIMIT: usize = 64 << 20;
const DATA_NAME: &str = "adapter.onnx.data";

pub(super) fn baked(adapter: &Adapter, sites: &[Site], data_type: DataType, folder: &Path) -> Result<Patch> {
    let mut patch = Patch::new("fold prefix_plus, baked");
    let mut constants = Constants::new(adapter, data_type, folder)?;
    let (heads, width) = (adapter.config().num_heads as i64, adapter.config().head_dim as i64);
    let shapes = Shapes { split: "prefold/split_heads", merge: "prefold/merge_heads" };
    if sites.iter().any(|s| s.query_layout == Layout::Merged || s.output_layout == Layout::Merged) {
        patch.add_initializer(TensorDef::from_i64s(shapes.split, &[4], &[0, 0, heads, width]));
        patch.add_initializer(TensorDef::from_i64s(shapes.merge, &[3], &[0, 0, heads * width]));
    }
    for site in sites {
        let name = format!("prefold.layers.{}.M", site.layer);
        let Some(memory) = adapter.tensors().get(&format!("layers.{}.M", site.layer)) else { continue };
        patch.add_initializer(constants.tensor(&name, memory)?);
        add_term(&mut patch, adapter.config().feature_map, site, &name, &shapes)?;
    }
    constants.finish()?;
    Ok(patch)
}

/// Names of the shape constants.
struct Shapes {
    split: &'static str,
    merge: &'static str,
}

fn add_term(patch: &mut Patch, feature_map: FeatureMap, site: &Site, memory: &str, shapes: &Shapes) -> Result<()> {
    let Some(first) = site.readers.iter().map(|reader| reader.node).min_by_key(|node| node.index()) else {
        let reason = format!("nothing reads its output `{}`", site.output);
        let help = "the graph computes attention that it does not use: look at how it was exported";
        return Err(Error::Site { anchor: site.anchor.clone(), reason, help });
    };
    let at = |name: &str| format!("/prefold/layers.{}/{name}", site.layer);
    let mut add = |node: NodeDef, name: &str| {
        let output = format!("{}/output_0", at(name));
        patch.insert_before(first, node.outputs([output.as_str()]));
        output
    };
    let transpose = |name: &str| NodeDef::new("Transpose", at(name)).attr_ints("perm", &[0, 2, 1, 3]);
    let mut query = site.query.clone();
    if site.query_layout == Layout::Merged {
        let split = NodeDef::new("Reshape", at("Reshape_split")).inputs([query.as_str(), shapes.split]);
        query = add(split, "Reshape_split");
        query = add(transpose("Transpose_split").inputs([query]), "Transpose_split");
    }
    let features = match feature_map {
        FeatureMap::Elu => add(NodeDef::new("Elu", at("Elu")).inputs([query]), "Elu"),
    };
    let mut term = add(NodeDef::new("MatMul", at("MatMul")).inputs([features.as_str(), memory]), "MatMul");
    if site.output_layout == Layout::Merged {
        term = add(transpose("Transpose_merge").inputs([term]), "Transpose_merge");
        let merge = NodeDef::new("Reshape", at("Reshape_merge")).inputs([term.as_str(), shapes.merge]);
        term = add(merge, "Reshape_merge");
    }
    let sum = add(NodeDef::new("Add", at("Add")).inputs([site.output.as_str(), &term]), "Add");
    for reader in &site.readers {
        patch.replace_input(reader.node, reader.slot, sum.as_str());
    }
    Ok(())
}

/// The adapter's tensors in the graph's type, inline or in a data file.
struct Constants {
    data_type: DataType,
    external: Option<ExternalWriter>,
}

impl Constants {
    fn new(adapter: &Adapter, data_type: DataType, folder: &Path) -> Result<Self> {
        let is_large = adapter.num_parameters() > INLINE_LIMIT / 4;
        let external = is_large.then(|| ExternalWriter::create(folder, DATA_NAME)).transpose()?;
        Ok(Self { data_type, external })
    }

    fn tensor(&mut self, name: &str, tensor: &Tensor) -> Result<TensorDef> {
        let bytes = bytes_of(tensor, self.data_type).map_err(Error::Convert)?;
        let dims: Vec<i64> = tensor.dims().iter().map(|d| *d as i64).collect();
        match &mut self.external {
            Some(external) => Ok(external.write(name, self.data_type, &dims, |out| out.write_all(&bytes))?),
            None => Ok(TensorDef::inline(name, self.data_type, &dims, bytes)),
        }
    }

    fn finish(self) -> Result<()> {
        if let Some(external) = self.external {
            external.finish()?;
        }
        Ok(())
    }
}

/// Little-endian bytes of a tensor, rounded to `data_type`.
fn bytes_of(tensor: &Tensor, data_type: DataType) -> candle_core::Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match data_type {
        DataType::Double => flat.to_dtype(DType::F64)?.to_vec1::<f64>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DataType::Float16 => {
            flat.to_dtype(DType::F16)?.to_vec1::<half::f16>()?.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        DataType::Bfloat16 => {
            flat.to_dtype(DType::BF16)?.to_vec1::<half::bf16>()?.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        _ => flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
    })
}

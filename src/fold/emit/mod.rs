//! Writing an adapter's term at its sites: one file per method.

mod prefix_plus;

use std::path::Path;

use super::{Error, Result, Site};
use crate::adapter::{Adapter, Method};
use crate::onnx::{DataType, Model, Patch};

/// The metadata entry that says which adapter a graph carries.
pub const MARK: &str = "prefold.adapter";

/// The edit that puts an adapter's tensors into the graph as constants.
///
/// # Errors
/// When the graph's type or heads do not fit the adapter.
pub fn baked(model: &Model, adapter: &Adapter, sites: &[Site], folder: &Path) -> Result<Patch> {
    for site in sites {
        check_heads(site, adapter)?;
    }
    let data_type = float_type(model)?;
    let mut patch = match adapter.config().method {
        Method::PrefixPlus => prefix_plus::baked(adapter, sites, data_type, folder)?,
    };
    patch.set_metadata(MARK, adapter.config().base_model.as_deref().unwrap_or("baked"));
    Ok(patch)
}

fn check_heads(site: &Site, adapter: &Adapter) -> Result<()> {
    let config = adapter.config();
    let pairs = [
        ("num_heads", site.num_heads, config.num_heads),
        ("head_dim", site.head_dim, config.head_dim),
        ("num_heads · head_dim", site.width, config.num_heads * config.head_dim),
        ("num_kv_heads", site.num_kv_heads.filter(|_| config.num_kv_heads.is_some()), config.num_kv_heads.unwrap_or(0)),
    ];
    for (what, graph, adapter) in pairs {
        if let Some(graph) = graph.filter(|g| *g != adapter as i64) {
            return Err(Error::Shape { layer: site.layer, what, graph, adapter });
        }
    }
    Ok(())
}

/// The type that attention computes in: that of the logits.
fn float_type(model: &Model) -> Result<DataType> {
    let found = model.graph().outputs().first().and_then(|o| o.elem_type());
    match found {
        Some(t @ (DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double)) => Ok(t),
        other => Err(Error::DataType { found: other.map_or("no declared type".into(), |t| t.to_string()) }),
    }
}

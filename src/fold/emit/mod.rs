//! Writing an adapter into a graph: `term` for every method that adds a term at the attention sites, and one file for
//! each other way to act.

mod constants;
mod lora;
mod prefix;
mod term;

use std::path::Path;

use super::{Error, Result, Site};
use crate::adapter::{Adapter, Method};
use crate::onnx::{DataType, Model, Patch};
use constants::Constants;

/// The metadata entry that says which adapter a graph carries.
pub const MARK: &str = "prefold.adapter";

/// What an emission is given.
struct Job<'a> {
    model: &'a Model,
    /// The folder of the model's external data.
    source: &'a Path,
    adapter: &'a Adapter,
    sites: &'a [Site],
    constants: Constants,
    patch: Patch,
}

/// The edit that puts an adapter's tensors into the graph as constants. `source` is the folder of the graph, whose external
/// data is read where an adapter depends on it; new external data goes to `folder`.
///
/// # Errors
/// When the graph's type or heads do not fit the adapter, or its method cannot be written.
pub fn baked(model: &Model, source: &Path, adapter: &Adapter, sites: &[Site], folder: &Path) -> Result<Patch> {
    for site in sites {
        check_heads(site, adapter)?;
    }
    let constants = Constants::new(adapter, float_type(model)?, folder)?;
    let patch = Patch::new(format!("fold {}, baked", adapter.config().method.name()));
    let mut job = Job { model, source, adapter, sites, constants, patch };
    match &adapter.config().method {
        Method::Lora(lora) => lora::write(&mut job, lora)?,
        Method::Prefix(prefix) => prefix::write(&mut job, prefix)?,
        Method::Full(_) => {
            return Err(Error::NotFolded {
                what: "full fine-tuning, whose weights are the graph's own".into(),
                help: "write the graph from them: prefold compile --model … --adapter …",
            });
        }
        method => term::write(&mut job, method.as_method())?,
    }
    let Job { constants, mut patch, .. } = job;
    constants.finish()?;
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

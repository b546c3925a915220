//! Writing an adapter into a graph: `term` for every method that adds a term at the attention sites, one file for each other
//! way to act, and `emission` for how its tensors stand there.
//!
//! Method and emission know nothing of each other. A method writes its nodes and asks `Constants` for tensors by name and value;
//! it is run once for each adapter, the nodes of the first are kept, and the values of all are the emission's.

mod constants;
mod emission;
mod lora;
mod prefix;
mod term;
mod types;

use std::path::Path;

use super::locate::scope;
use super::{Error, Result, Site};
use crate::adapter::{Adapter, Method};
use crate::onnx::{DataType, Index, Model, Patch};
use constants::Constants;
pub(crate) use constants::Parameter;
pub use emission::{ADAPTER_IDS, Emission};
pub(crate) use emission::{bank_name, enlarged, padded, restack};

/// What a method is given.
struct Job<'a> {
    model: &'a Model,
    /// The folder of the model's external data.
    source: &'a Path,
    adapter: &'a Adapter,
    sites: &'a [Site],
    /// Where LoRA is merged into the weights: the folder of the new graph.
    merge: Option<&'a Path>,
    constants: Constants,
    patch: Patch,
}

/// Where adapters are written.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) model: &'a Model,
    /// The folder of the graph, whose external data is read where an adapter depends on it.
    pub(super) source: &'a Path,
    /// The adapted layers' sites.
    pub(super) sites: &'a [Site],
    /// Where LoRA is merged into the weights: the folder of the new graph.
    pub(super) merge: Option<&'a Path>,
}

/// Nodes and values of one adapter. The nodes read the tensors of an emission, which the edit does not hold yet.
///
/// # Errors
/// When the graph's type or heads do not fit the adapter, or its method cannot be written in this emission.
pub(super) fn write(place: Place, adapter: &Adapter, emission: Emission) -> Result<(Patch, Vec<Parameter>)> {
    for site in place.sites {
        check_heads(site, adapter)?;
    }
    let data_type = first_type(place)?;
    let method = &adapter.config().method;
    let constants = Constants::new(data_type, emission);
    let patch = Patch::new(format!("fold {}, {emission}", method.name()));
    let Place { model, source, sites, merge } = place;
    let mut job = Job { model, source, adapter, sites, merge, constants, patch };
    match method {
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
    let Job { constants, patch, .. } = job;
    Ok((patch, constants.into_parameters()))
}

/// The edit that puts adapters into a graph, and the values of each.
///
/// # Errors
/// As [`write`], and when adapters do not fit into one graph or new external data cannot be written to `folder`.
pub(super) fn emit(
    place: Place,
    adapters: &[Adapter],
    emission: Emission,
    folder: &Path,
) -> Result<(Patch, Vec<Vec<Parameter>>)> {
    let mut kept = None;
    let mut values = Vec::with_capacity(adapters.len());
    for adapter in adapters {
        let (patch, parameters) = write(place, adapter, emission)?;
        kept.get_or_insert(patch);
        values.push(parameters);
    }
    let Some(mut patch) = kept else { return Err(Error::NoAdapter) };
    emission::emit(&mut patch, place.model, emission, &values, folder)?;
    Ok((patch, values))
}

/// The float type of a site's query; none where nothing around it says.
///
/// # Errors
/// When the site is of another graph.
pub fn query_type(model: &Model, site: &Site) -> Result<Option<DataType>> {
    scope::of_site(model, site, |index| {
        Ok(types::float_type(index, &site.query).or_else(|| types::float_type(index, &site.output)))
    })
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

/// The type that attention computes in: that of the first site's output, or of the logits where nothing says.
fn first_type(place: Place) -> Result<DataType> {
    let index = Index::new(place.model.graph());
    let of_site = place.sites.iter().find_map(|site| types::float_type(&index, &site.output));
    let of_logits = || place.model.graph().outputs().first().and_then(|output| output.elem_type());
    match of_site.or_else(of_logits) {
        Some(found) if types::is_float(found) => Ok(found),
        other => Err(Error::DataType { found: other.map_or("no declared type".into(), |t| t.to_string()) }),
    }
}

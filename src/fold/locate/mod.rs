//! Finding the attention sites of a graph: one file per attention shape, its subgraph drawn in its doc.

mod attention;
mod beside;
mod decomposed;
mod group_query_attention;
mod microsoft_attention;
mod multi_head_attention;
mod other_operators;
pub mod projections;
mod rotary;
mod unrotated;

use serde::Serialize;

use super::{Error, Result};
use crate::adapter::Query;
use crate::onnx::{Dim, Index, Model, Node, NodeDef, TensorDef, Use};

/// An attention site: the query that meets the keys, and the attention output it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Site {
    /// Position among the graph's attention blocks in the order of data flow.
    pub layer: usize,
    /// Which attention shape was matched.
    pub shape: &'static str,
    /// The node that gave the block away.
    pub anchor: String,
    /// The rotated, unscaled query.
    pub query: String,
    /// Its layout.
    pub query_layout: Layout,
    /// The attention output before the output projection.
    pub output: String,
    /// Its layout.
    pub output_layout: Layout,
    /// What reads the output and will read the sum instead.
    #[serde(skip)]
    pub readers: Vec<Use>,
    /// Query heads, where the graph says.
    pub num_heads: Option<i64>,
    /// Width of a head, where the graph's cache says.
    pub head_dim: Option<i64>,
    /// Key-value heads, where the graph's cache says.
    pub num_kv_heads: Option<i64>,
    /// Query heads times the width of a head, where the graph says.
    pub width: Option<i64>,
}

/// How heads lie in a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// `[batch, heads, seq, head_dim]`.
    HeadsFirst,
    /// `[batch, seq, heads · head_dim]`.
    Merged,
}

/// The query that an adapter asks for, and what has to be written to have it.
#[derive(Clone, Debug)]
pub struct QuerySource {
    /// The tensor.
    pub tensor: String,
    /// Its layout.
    pub layout: Layout,
    /// Nodes that make it from tensors of the graph, in order; empty where the graph holds it.
    pub nodes: Vec<NodeDef>,
    /// Constants that they read.
    pub initializers: Vec<TensorDef>,
}

/// The query of a site as an adapter asks for it.
///
/// # Errors
/// When the graph does not show it and it cannot be rebuilt.
pub fn query(model: &Model, site: &Site, wanted: Query) -> Result<QuerySource> {
    let index = Index::new(model.graph());
    // an operator that computes the whole attention made the output, and says where its query is
    match index.producer(&site.output) {
        Some(node) if attention::is_anchor(node) => return attention::query(model, &index, site, wanted),
        Some(node) if group_query_attention::is_anchor(node) => {
            return group_query_attention::query(model, &index, node, site, wanted);
        }
        Some(node) if multi_head_attention::is_anchor(node) => {
            return multi_head_attention::query(model, &index, node, site, wanted);
        }
        Some(node) if microsoft_attention::is_anchor(node) => return microsoft_attention::query(node, site, wanted),
        _ => {}
    }
    let (tensor, layout) = match wanted {
        Query::PostRope => (site.query.clone(), site.query_layout),
        Query::PreRope => unrotated::unrotated(model, site)?,
    };
    Ok(QuerySource { tensor, layout, nodes: Vec::new(), initializers: Vec::new() })
}

/// Looks at one node; `None` where it is not the anchor of this attention shape.
type Locator = fn(&Index, &Node) -> Option<Result<Site>>;

const LOCATORS: [Locator; 6] = [
    decomposed::locate,
    attention::locate,
    group_query_attention::locate,
    multi_head_attention::locate,
    microsoft_attention::locate,
    other_operators::locate,
];

/// All attention sites in the order of data flow.
///
/// # Errors
/// When there is none, or a block lacks something that an adapter needs.
pub fn sites(model: &Model) -> Result<Vec<Site>> {
    let index = Index::new(model.graph());
    let mut sites = Vec::new();
    for node in model.graph().nodes() {
        if let Some(found) = LOCATORS.iter().find_map(|locate| locate(&index, node)) {
            let mut site = found?;
            site.layer = sites.len();
            if let Some([_, Dim::Value(heads), _, Dim::Value(width)]) = cache_dims(&index, site.layer) {
                (site.num_kv_heads, site.head_dim) = (Some(*heads), Some(*width));
            }
            sites.push(site);
        }
    }
    if sites.is_empty() {
        return Err(Error::NoSite);
    }
    Ok(sites)
}

/// Declared dimensions of a layer's past keys, `[batch, kv_heads, past, head_dim]`.
fn cache_dims<'g>(index: &Index<'g>, layer: usize) -> Option<&'g [Dim]> {
    index.input(&format!("past_key_values.{layer}.key"))?.shape()
}

/// An error that names the block and how far its match got.
fn stopped(anchor: &Node, reason: impl Into<String>, help: &'static str) -> Error {
    Error::Site { anchor: anchor.name().to_owned(), reason: reason.into(), help }
}

/// Whether a tensor is a constant of one element.
fn is_scalar(index: &Index, tensor: &str) -> bool {
    if let Some(initializer) = index.initializer(tensor) {
        return initializer.dims().iter().product::<i64>() == 1;
    }
    let constant = index.producer(tensor).filter(|node| node.is("", "Constant"));
    let Some(constant) = constant else { return false };
    let tensor = constant.attribute("value").and_then(|a| a.as_tensor());
    tensor.is_some_and(|t| t.dims().iter().product::<i64>() == 1) || constant.attribute("value_float").is_some()
}

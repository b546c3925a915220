//! Finding the attention sites of a graph: one file per attention shape, its subgraph drawn in its doc; what holds of all of
//! them in files of their own: `shape` and `axes` read dimensions, `order` numbers the layers, `positions` says for which inputs
//! an adapter is exact, `explain` how far a match got.

mod attention;
mod axes;
mod beside;
mod decomposed;
mod explain;
mod flow;
mod group_query_attention;
mod microsoft_attention;
mod multi_head_attention;
mod order;
mod other_operators;
mod position_uses;
mod positions;
pub mod projections;
mod quantized;
mod rotary;
pub(in crate::fold) mod scope;
pub(in crate::fold) mod shape;
mod unrotated;

use schemars::JsonSchema;
use serde::Serialize;

use super::{Error, Result};
use crate::adapter::Query;
use crate::onnx::{Dim, Index, Model, Node, NodeDef, NodeId, TensorDef, Use};
pub use explain::{Block, explain};
pub(in crate::fold) use group_query_attention::columns;
pub(in crate::fold) use position_uses::position_uses;
pub(in crate::fold) use positions::is_from_positions;
pub use positions::{Exactness, Positions, exactness};

/// An attention site: the query that meets the keys, and the attention output it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Site {
    /// The decoder layer, by the order of data flow. A model whose graph is in branches has each layer once in each.
    pub layer: usize,
    /// The branch that the site is in, as `node.attribute`; empty in the main graph.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scope: String,
    /// Which attention shape was matched.
    pub shape: &'static str,
    /// The name of the node that gave the block away.
    pub anchor: String,
    /// That node: the softmax, or the operator that computes the whole attention.
    #[serde(skip)]
    pub node: NodeId,
    /// The rotated, unscaled query.
    pub query: String,
    /// The query as an operator reads it, and its layout there, where the graph scales it before.
    #[serde(skip)]
    pub scaled_query: Option<(String, Layout)>,
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

impl Site {
    /// A site of which nothing more is known than query and output, each with its layout.
    fn new(shape: &'static str, anchor: &Node, query: (&str, Layout), output: (&str, Layout)) -> Self {
        Self {
            layer: 0,
            scope: String::new(),
            shape,
            anchor: anchor.name().to_owned(),
            node: anchor.id(),
            query: query.0.to_owned(),
            scaled_query: None,
            query_layout: query.1,
            output: output.0.to_owned(),
            output_layout: output.1,
            readers: Vec::new(),
            num_heads: None,
            head_dim: None,
            num_kv_heads: None,
            width: None,
        }
    }

    /// The site with its query before a scale that stands between it and its operator.
    ///
    /// # Errors
    /// When that lies in a way that no adapter is written in.
    fn unscaled(mut self, index: &Index, anchor: &Node) -> Result<Self> {
        // operators of com.microsoft take merged heads, and so do the nodes that are written beside them
        let fits = |layout: Layout| self.shape == attention::SHAPE || layout == Layout::Merged;
        let Some(before) = decomposed::before_scale(index, &self.query, self.query_layout, fits) else {
            return Ok(self);
        };
        let (query, layout) = before.map_err(|reason| stopped(anchor, reason, decomposed::HELP))?;
        let scaled = std::mem::replace(&mut self.query, query);
        self.scaled_query = Some((scaled, std::mem::replace(&mut self.query_layout, layout)));
        Ok(self)
    }

    /// The site with the query that its scores are made of.
    pub(in crate::fold) fn scaled(&self) -> Self {
        let mut site = self.clone();
        if let Some((query, layout)) = site.scaled_query.take() {
            (site.query, site.query_layout) = (query, layout);
        }
        site
    }

    /// What the names of the site's new nodes begin with: no other site of the model has the same.
    pub fn prefix(&self) -> String {
        format!("{}layers.{}", self.root(), self.layer)
    }

    /// What the names of new nodes in the site's graph begin with: no other graph of the model has the same.
    pub fn root(&self) -> String {
        if self.scope.is_empty() { "/prefold/".to_owned() } else { format!("/prefold/{}/", self.scope) }
    }
}

/// How heads lie in a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// `[batch, heads, seq, head_dim]`.
    HeadsFirst,
    /// `[batch, seq, heads, head_dim]`: that of a query which the graph rounds before it puts the heads first.
    SeqFirst,
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

impl QuerySource {
    /// With its heads before its tokens.
    fn heads_first(mut self, site: &Site) -> Self {
        if self.layout == Layout::SeqFirst {
            let name = format!("{}/query/Transpose", site.prefix());
            let output = format!("{name}/output_0");
            let transpose = NodeDef::new("Transpose", name).attr_ints("perm", &[0, 2, 1, 3]);
            self.nodes.push(transpose.inputs([&self.tensor]).outputs([&output]));
            (self.tensor, self.layout) = (output, Layout::HeadsFirst);
        }
        self
    }

    /// The tensor of the graph that it is made of, of the same type.
    pub(in crate::fold) fn made_of(&self) -> &str {
        let mut tensor = self.tensor.as_str();
        for node in self.nodes.iter().rev().filter(|node| node.op_type() != "Cast") {
            if node.outputs_made().iter().any(|output| output == tensor) {
                tensor = node.inputs_read().first().map_or(tensor, String::as_str);
            }
        }
        tensor
    }
}

/// The query of a site as an adapter asks for it.
///
/// # Errors
/// When the graph does not show it and it cannot be rebuilt.
pub fn query(model: &Model, site: &Site, wanted: Query) -> Result<QuerySource> {
    scope::of_site(model, site, |index| {
        // an operator that computes the whole attention says where its query is
        match index.graph().node(site.node) {
            Some(node) if attention::is_anchor(node) => return attention::query(index, site, wanted),
            Some(node) if group_query_attention::is_anchor(node) => {
                return group_query_attention::query(model, index, node, site, wanted);
            }
            Some(node) if multi_head_attention::is_anchor(node) => {
                return multi_head_attention::query(index, node, site, wanted);
            }
            Some(node) if microsoft_attention::is_anchor(node) => {
                return microsoft_attention::query(index, node, site, wanted);
            }
            _ => {}
        }
        let (tensor, layout) = (site.query.clone(), site.query_layout);
        let source = match wanted {
            Query::PostRope => QuerySource { tensor, layout, nodes: Vec::new(), initializers: Vec::new() },
            Query::PreRope => unrotated::unrotated(index, site)?,
        };
        Ok(source.heads_first(site))
    })
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

/// All attention sites, those of each graph in the order of its layers.
///
/// # Errors
/// When there is none, a block lacks something that an adapter needs, or the blocks are not one for each layer.
pub fn sites(model: &Model) -> Result<Vec<Site>> {
    let mut all = Vec::new();
    scope::visit(model, &mut |index, scope| {
        let mut sites = Vec::new();
        for node in index.graph().nodes() {
            if let Some(found) = LOCATORS.iter().find_map(|locate| locate(index, node)) {
                sites.push(Site { scope: scope.to_owned(), ..found? });
            }
        }
        order::number_layers(index, &mut sites)?;
        for site in &mut sites {
            quantized::move_behind(index, site);
            if let Some([_, Dim::Value(heads), _, Dim::Value(width)]) = cache_dims(index, site.layer) {
                site.num_kv_heads.get_or_insert(*heads);
                site.head_dim = Some(*width);
            }
        }
        all.extend(sites);
        Ok(())
    })?;
    if all.is_empty() {
        return Err(Error::NoSite);
    }
    order::same_layers(&all)?;
    Ok(all)
}

/// How many decoder layers the sites are of.
pub fn num_layers(sites: &[Site]) -> usize {
    sites.iter().map(|site| site.layer + 1).max().unwrap_or(0)
}

/// Declared dimensions of a layer's past keys, `[batch, kv_heads, past, head_dim]`.
fn cache_dims<'g>(index: &Index<'g>, layer: usize) -> Option<&'g [Dim]> {
    index.input(&format!("past_key_values.{layer}.key"))?.shape()
}

/// An error that names the block and how far its match got.
fn stopped(anchor: &Node, reason: impl Into<String>, help: &'static str) -> Error {
    Error::Site { anchor: anchor.name().to_owned(), reason: reason.into(), help }
}

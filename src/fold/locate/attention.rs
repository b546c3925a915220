//! `ai.onnx` Attention (opset 23 and newer).
//!
//! ```text
//! … ─ (RotaryEmbedding) ─ query ─┐
//! … ─ (RotaryEmbedding) ─ key ───┼ Attention ─ output ─ (Transpose ─ Reshape) ─ o_proj
//! value ─────────────────────────┤
//! (mask, past, lengths) ─────────┘
//! ```
//!
//! Scale, soft cap and mask are inside and do not touch the query. Inputs of four dimensions are `[batch, heads, seq,
//! head_dim]`, and so is the output; with `q_num_heads` they are `[batch, seq, heads · head_dim]`. Past and present keys,
//! and the grouping of heads, change neither.

use super::beside::{last_dim, rank, shown};
use super::{Layout, QuerySource, Site, rotary, stopped};
use crate::adapter::Query;
use crate::fold::Result;
use crate::onnx::{Dim, Index, Node};

pub(super) const SHAPE: &str = "attention";
const HELP: &str = "set q_num_heads and kv_num_heads, or pass [batch, heads, seq, head_dim]";

pub(super) fn is_anchor(node: &Node) -> bool {
    node.is("", "Attention")
}

pub(super) fn locate(index: &Index, node: &Node) -> Option<Result<Site>> {
    is_anchor(node).then(|| site(index, node))
}

fn site(index: &Index, node: &Node) -> Result<Site> {
    let heads = |name: &str| node.attribute(name).and_then(|a| a.as_int()).filter(|heads| *heads > 0);
    let (Some(query), Some(output)) = (node.input(0), node.output(0)) else {
        return Err(stopped(node, "it has no query or no output", HELP));
    };
    let num_heads = heads("q_num_heads");
    let layout = match (rank(index, query), num_heads) {
        (Some(4), _) | (None, None) => Layout::HeadsFirst,
        (Some(3) | None, Some(_)) => Layout::Merged,
        (Some(3), None) => {
            return Err(stopped(node, "its query has three dimensions, and q_num_heads is not set", HELP));
        }
        (Some(rank), _) => return Err(stopped(node, format!("its query has {rank} dimensions"), HELP)),
    };
    let declared = index.value(query).and_then(|value| value.shape());
    let (num_heads, head_dim, width) = match (layout, declared) {
        (Layout::HeadsFirst, Some([_, Dim::Value(heads), _, Dim::Value(dim)])) => (Some(*heads), Some(*dim), None),
        (Layout::HeadsFirst, _) => (num_heads, None, None),
        (Layout::SeqFirst | Layout::Merged, _) => (num_heads, None, last_dim(index, query)),
    };
    Site {
        readers: index.consumers(output).to_vec(),
        num_heads,
        head_dim,
        width,
        ..Site::new(SHAPE, node, (query, layout), (output, layout))
    }
    .unscaled(index, node)
}

/// The operator shows its query.
pub(super) fn query(index: &Index, site: &Site, wanted: Query) -> Result<QuerySource> {
    match wanted {
        Query::PostRope => Ok(shown(&site.query, site.query_layout)),
        Query::PreRope => rotary::before(index, site),
    }
}

//! `com.microsoft` Attention: the three projections and the attention in one operator.
//!
//! ```text
//! x [batch, seq, in] ───────────────────┐
//! weights [in, q + k + v], bias ────────┼ Attention ─ output [batch, seq, v] ─ o_proj
//! (mask, past) ─────────────────────────┘
//! ```
//! The query is projected once more beside it:
//! ```text
//! weights ─ Slice q ─┐   bias ─ Slice q ─┐
//! x ───────────────── MatMul ─────────── Add ─► query [batch, seq, q]
//! ```
//! The slices are of constants, and a runtime folds them when it loads the graph.

use super::beside::{Beside, MICROSOFT, last_dim};
use super::{Layout, QuerySource, Site, stopped};
use crate::adapter::Query;
use crate::fold::Result;
use crate::onnx::{Index, Node};

const SHAPE: &str = "microsoft_attention";
const HELP: &str = "the node does not follow the operator's specification: look at how the graph was made";

pub(super) fn is_anchor(node: &Node) -> bool {
    node.is(MICROSOFT, "Attention")
}

pub(super) fn locate(index: &Index, node: &Node) -> Option<Result<Site>> {
    is_anchor(node).then(|| site(index, node))
}

fn integer(node: &Node, name: &str) -> Option<i64> {
    node.attribute(name).and_then(|a| a.as_int())
}

fn site(index: &Index, node: &Node) -> Result<Site> {
    let (Some(input), Some(weights), Some(output)) = (node.input(0), node.input(1), node.output(0)) else {
        return Err(stopped(node, "it has no input, no weights or no output", HELP));
    };
    let Some(heads) = integer(node, "num_heads").filter(|heads| *heads > 0) else {
        return Err(stopped(node, "it has no num_heads", HELP));
    };
    let sizes = node.attribute("qkv_hidden_sizes").and_then(|a| a.as_ints());
    let width = match sizes {
        Some(sizes) => sizes.first().copied(),
        None => last_dim(index, weights).filter(|columns| columns % 3 == 0).map(|columns| columns / 3),
    };
    let Some(width) = width.filter(|width| *width > 0 && width % heads == 0) else {
        let reason =
            format!("how many columns of `{weights}` are the query's is not known, or no multiple of {heads} heads");
        return Err(stopped(node, reason, "set qkv_hidden_sizes, or run shape inference over the graph"));
    };
    if let Some([query, _, value]) = sizes.filter(|sizes| sizes.first() != sizes.last()) {
        let reason = format!("its heads are {query} wide together in the query, but {value} in the output");
        return Err(stopped(node, reason, "the adapter's product goes from the query's width to the same width"));
    }
    Ok(Site {
        readers: index.consumers(output).to_vec(),
        num_heads: Some(heads),
        head_dim: Some(width / heads),
        width: Some(width),
        ..Site::new(SHAPE, node, (input, Layout::Merged), (output, Layout::Merged))
    })
}

/// The query, made once more. Without rotation it is its own unrotated one.
pub(super) fn query(node: &Node, site: &Site, wanted: Query) -> Result<QuerySource> {
    if wanted == Query::PostRope && integer(node, "do_rotary").unwrap_or(0) != 0 {
        let reason =
            "the operator rotates by angles of its own (do_rotary = 1), which ONNX Runtime computes on GPUs only";
        let help =
            "rotate before the operator (RotaryEmbedding and MultiHeadAttention), or train with query = pre_rope";
        return Err(stopped(node, reason, help));
    }
    let (Some(weights), Some(width)) = (node.input(1), site.width) else {
        return Err(stopped(node, "it has no weights", HELP));
    };
    let mut beside = Beside::new(site);
    let own = beside.first("Slice_weights", weights, 1, width);
    let mut query = beside.node("MatMul", "MatMul", &[&site.query, &own]);
    if let Some(bias) = node.input(2) {
        let own = beside.first("Slice_bias", bias, 0, width);
        query = beside.node("Add", "Add_bias", &[&query, &own]);
    }
    Ok(beside.finish(query, Layout::Merged))
}

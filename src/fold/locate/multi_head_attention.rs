//! `com.microsoft` MultiHeadAttention, and DecoderMaskedMultiHeadAttention, its form for one new token.
//!
//! ```text
//! (RotaryEmbedding) ─ query ─┐  [batch, seq, heads · head_dim], or query, key and value packed in one
//! (RotaryEmbedding) ─ key ───┼ MultiHeadAttention ─ output [batch, seq, heads · head_dim] ─ o_proj
//! value, bias ───────────────┤
//! (masks, past) ─────────────┘
//! ```
//! The operator adds the bias of the three projections itself: the query is the input and the first part of `bias`. Both come
//! together once more beside it:
//! ```text
//! bias ─ Slice ─┐
//! query ─────── Add ─► query                             query [batch, seq, heads, 3, head_dim] ─ Gather 0 ─ Transpose ─►
//! ```
//! The scale is inside and does not touch the query.

use super::beside::{Beside, MICROSOFT, last_dim, rank, shown};
use super::{Layout, QuerySource, Site, rotary, stopped, unrotated};
use crate::adapter::Query;
use crate::fold::Result;
use crate::onnx::{Index, Node, NodeDef};

const SHAPE: &str = "multi_head_attention";
const HELP: &str = "the node does not follow the operator's specification: look at how the graph was made";
/// How many parts are packed: query, key and value.
const PARTS: i64 = 3;

pub(super) fn is_anchor(node: &Node) -> bool {
    node.is(MICROSOFT, "MultiHeadAttention") || is_masked(node)
}

fn is_masked(node: &Node) -> bool {
    node.is(MICROSOFT, "DecoderMaskedMultiHeadAttention")
}

pub(super) fn locate(index: &Index, node: &Node) -> Option<Result<Site>> {
    is_anchor(node).then(|| site(index, node))
}

fn is_packed(node: &Node) -> bool {
    node.input(1).is_none() && node.input(2).is_none()
}

fn bias(node: &Node) -> Option<&str> {
    node.input(if is_masked(node) { 10 } else { 3 })
}

fn site(index: &Index, node: &Node) -> Result<Site> {
    let (Some(query), Some(output)) = (node.input(0), node.output(0)) else {
        return Err(stopped(node, "it has no query or no output", HELP));
    };
    let Some(heads) = node.attribute("num_heads").and_then(|a| a.as_int()).filter(|heads| *heads > 0) else {
        return Err(stopped(node, "it has no num_heads", HELP));
    };
    let wanted = if is_packed(node) && !is_masked(node) { 5 } else { 3 };
    if let Some(found) = rank(index, query).filter(|rank| *rank != wanted) {
        return Err(stopped(node, format!("its query has {found} dimensions, where {wanted} are expected"), HELP));
    }
    let site = Site {
        readers: index.consumers(output).to_vec(),
        num_heads: Some(heads),
        width: last_dim(index, query).filter(|_| !is_packed(node)),
        ..Site::new(SHAPE, node, (query, Layout::Merged), (output, Layout::Merged))
    };
    // what is packed, or biased inside, is not scaled apart
    if is_packed(node) || bias(node).is_some() { Ok(site) } else { site.unscaled(index, node) }
}

/// The query with its bias. A graph that rotates does so before the operator, with the bias added there.
pub(super) fn query(index: &Index, node: &Node, site: &Site, wanted: Query) -> Result<QuerySource> {
    let is_own = is_packed(node) || bias(node).is_some();
    if !is_own {
        return match wanted {
            Query::PostRope => Ok(shown(&site.query, Layout::Merged)),
            Query::PreRope => rotary::before(index, site),
        };
    }
    if wanted == Query::PreRope && !unrotated::is_unturned(index, &site.query) {
        let part = rotary::first_part(index, &site.query).filter(|_| bias(node).is_none());
        if let Some(query) = part {
            return rotary::before(index, &Site { query: query.to_owned(), ..site.clone() });
        }
        let reason = "the query is packed, or gets its bias inside, behind nodes that may have rotated it";
        return Err(stopped(node, reason, "train with query = post_rope"));
    }
    let Some(heads) = site.num_heads else { return Err(stopped(node, "it has no num_heads", HELP)) };
    let mut beside = Beside::new(site);
    if !is_packed(node) {
        let query = with_bias(&mut beside, index, node, site);
        return Ok(beside.finish(query, Layout::Merged));
    }
    let mut query = if is_masked(node) {
        beside.split_heads(&site.query, heads.saturating_mul(PARTS), heads)
    } else {
        let first = beside.integer("Gather/index", 0);
        let gather = |name| NodeDef::new("Gather", name).attr_int("axis", 3);
        let query = beside.node_with("Gather", &[&site.query, &first], gather);
        beside.heads_first(&query)
    };
    if let Some(bias) = bias(node) {
        let shape = beside.list("Reshape_bias/shape", &[heads.saturating_mul(PARTS), 1, -1]);
        let split = beside.node("Reshape", "Reshape_bias", &[bias, &shape]);
        let own = beside.first("Slice_bias", &split, 0, heads);
        query = beside.node("Add", "Add_bias", &[&query, &own]);
    }
    Ok(beside.finish(query, Layout::HeadsFirst))
}

/// `query + bias[..hidden]`. A width that the graph tells makes a constant of the bias' part.
fn with_bias(beside: &mut Beside, index: &Index, node: &Node, site: &Site) -> String {
    let Some(bias) = bias(node) else { return site.query.clone() };
    let own = match last_dim(index, &site.query) {
        Some(width) => beside.first("Slice_bias", bias, 0, width),
        None => {
            let width = beside.size("hidden", &site.query, 2);
            let zero = beside.list("Slice_bias/starts", &[0]);
            beside.slice("Slice_bias", bias, 0, &zero, &width)
        }
    };
    beside.node("Add", "Add_bias", &[&site.query, &own])
}

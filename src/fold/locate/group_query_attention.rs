//! `com.microsoft` GroupQueryAttention whose query is rotated before it, or not at all.
//!
//! ```text
//! (RotaryEmbedding) ─ query ─┐
//! (RotaryEmbedding) ─ key ───┼ GroupQueryAttention(do_rotary = 0) ─ output ─ o_proj
//! value ─────────────────────┤
//! past, lengths, (bias) ─────┘
//! ```
//!
//! Soft cap and window are attributes of the operator and do not touch the query.
//! Query and output are `[batch, seq, heads · head_dim]`.

use super::{Layout, Site, stopped};
use crate::fold::Result;
use crate::onnx::{Index, Node};

const SHAPE: &str = "group_query_attention";
const DOMAIN: &str = "com.microsoft";
const HELP: &str = "export the base model with `prefold export --dialect ort`, which rotates before the operator";

pub(super) fn locate(index: &Index, node: &Node) -> Option<Result<Site>> {
    node.is(DOMAIN, "GroupQueryAttention").then(|| site(index, node))
}

fn site(index: &Index, node: &Node) -> Result<Site> {
    let integer = |name: &str| node.attribute(name).and_then(|a| a.as_int());
    if integer("do_rotary").unwrap_or(0) != 0 {
        return Err(stopped(node, "the operator rotates the query inside (do_rotary = 1)", HELP));
    }
    let (Some(query), Some(_key), Some(output)) = (node.input(0), node.input(1), node.output(0)) else {
        return Err(stopped(node, "query, key and value are packed into one tensor", HELP));
    };
    Ok(Site {
        readers: index.consumers(output).to_vec(),
        num_heads: integer("num_heads"),
        ..Site::new(SHAPE, node, (query, Layout::Merged), (output, Layout::Merged))
    })
}

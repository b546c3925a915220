//! Operators of attention that an adapter cannot be folded around: each is named, so that nobody looks for the block in vain.
//!
//! ```text
//! … ─ PackedAttention | PagedAttention | QAttention | SparseAttention | LinearAttention | … ─ o_proj
//! ```

use super::beside::MICROSOFT;
use super::{Site, stopped};
use crate::fold::Result;
use crate::onnx::{Index, Node};

const HELP: &str = "export the model again with GroupQueryAttention, MultiHeadAttention or ai.onnx Attention";

pub(super) fn locate(_: &Index, node: &Node) -> Option<Result<Site>> {
    let is_one = node.domain() == MICROSOFT && node.op_type().ends_with("Attention");
    is_one.then(|| {
        Err(stopped(node, format!("how {} of {MICROSOFT} lays out its query is not known", node.op_type()), HELP))
    })
}

//! The query of a fused operator before a rotation that the graph shows.
//!
//! ```text
//! x ─ RotaryEmbedding ─ (Reshape | Transpose)* ─ query          of ai.onnx or com.microsoft
//!
//! x ─┬ Slice ─ (any rotation that is known) ─┐
//!    └ Slice ─────────────────────────────── Concat ─ query     where a part of each head turns
//!
//! any product ─ (bias | norm | view | …)* ─ query                where nothing turns it
//! ```
//! A rotation of standard operators is [`unrotated`](super::unrotated)'s. `scale` and `is_packed_batching` of the operator say how
//! its tables and rows are read, not what its input is.

use super::beside::{Beside, shown};
use super::{Layout, QuerySource, Site, unrotated};
use crate::fold::Result;
use crate::onnx::{Index, Node};

/// Nodes between a rotation and the operator, or a projection and the operator.
const MAX_STEPS: usize = 12;

/// How heads lie in a tensor on the way: a layout of a site, or `[batch, seq, heads, head_dim]`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum View {
    HeadsFirst,
    SeqFirst,
    Merged,
}

/// The query of the site before its rotation. One that comes straight from its projection is its own.
///
/// # Errors
/// When the rotation is of a kind that is not known.
pub(super) fn before(index: &Index, site: &Site) -> Result<QuerySource> {
    let (tensor, view) = without_views(index, &site.query, site.query_layout);
    if let Some(input) = index.producer(tensor).and_then(|node| rotated_input(index, site, node)) {
        return Ok(laid_out(site, &input, view));
    }
    if unrotated::is_unturned(index, &site.query) {
        return Ok(shown(&site.query, site.query_layout));
    }
    unrotated::unrotated(index, site)
}

/// Where a tensor of this view serves as query; heads are put first where they are neither first nor merged.
fn laid_out(site: &Site, tensor: &str, view: View) -> QuerySource {
    match view {
        View::HeadsFirst => shown(tensor, Layout::HeadsFirst),
        View::Merged => shown(tensor, Layout::Merged),
        View::SeqFirst => {
            let mut beside = Beside::new(site);
            let tensor = beside.heads_first(tensor);
            beside.finish(tensor, Layout::HeadsFirst)
        }
    }
}

/// The tensor behind transpositions and reshapes that only move heads, and how they lie there.
fn without_views<'a>(index: &Index<'a>, query: &'a str, layout: Layout) -> (&'a str, View) {
    let mut tensor = query;
    let mut view = if layout == Layout::HeadsFirst { View::HeadsFirst } else { View::Merged };
    for _ in 0..MAX_STEPS {
        let Some(node) = index.producer(tensor) else { break };
        let behind = match (node.op_type(), view) {
            ("Transpose", View::HeadsFirst) if swaps_heads(node) => View::SeqFirst,
            ("Transpose", View::SeqFirst) if swaps_heads(node) => View::HeadsFirst,
            ("Reshape", View::SeqFirst) => View::Merged,
            ("Reshape", View::Merged) => View::SeqFirst,
            ("Identity", view) => view,
            _ => break,
        };
        let Some(input) = node.input(0) else { break };
        (tensor, view) = (input, behind);
    }
    (tensor, view)
}

fn swaps_heads(node: &Node) -> bool {
    node.attribute("perm").and_then(|a| a.as_ints()) == Some(&[0, 2, 1, 3])
}

/// What a rotation turns, wholly by an operator or in part by anything that is known.
fn rotated_input(index: &Index, site: &Site, node: &Node) -> Option<String> {
    if node.op_type() == "RotaryEmbedding" {
        return node.input(0).map(str::to_owned);
    }
    if !node.is("", "Concat") {
        return None;
    }
    let [turned, kept] = node.inputs() else { return None };
    let part = |tensor: &str| {
        let node = index.producer(tensor)?;
        matches!(node.op_type(), "Slice" | "Split").then(|| node.input(0))?
    };
    let before = unrotated::unrotated(index, &Site { query: turned.clone(), ..site.clone() }).ok()?;
    let before = Some(before.tensor).filter(|_| before.nodes.is_empty())?;
    part(&before).filter(|whole| part(kept) == Some(whole)).map(str::to_owned)
}

/// The query of a Concat of query, keys and values along their columns.
pub(super) fn first_part<'g>(index: &Index<'g>, packed: &str) -> Option<&'g str> {
    let node = index.producer(packed).filter(|node| node.is("", "Concat"))?;
    let columns = node.attribute("axis").and_then(|axis| axis.as_int()).is_some_and(|axis| axis == 2 || axis == -1);
    match node.inputs() {
        [query, _, _] if columns => Some(query),
        _ => None,
    }
}

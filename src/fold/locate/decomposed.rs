//! Softmax attention of standard operators.
//!
//! ```text
//! query ─ (Mul scale) ─ (Reshape) ─┐
//!                                  ├ MatMul ─ (Reshape | Mul | Div | Tanh | Add mask | Cast)* ─ Softmax
//! keysᵀ ───────────────────────────┘                                                               │
//!                                                                                      (Reshape | Cast)*
//!                                                                                                  │
//! values ──────────────────────────────────────────────────────────────────────────────────── MatMul
//!                                                                                                  │
//!                                    o_proj ─ Reshape ─ Transpose(0, 2, 1, 3) ─ output ─ (Reshape | Cast)*
//! ```
//!
//! `Mul` and `Div` by one number are the scale, and with `Tanh` between them the soft cap. What made the query does not matter:
//! a norm, a rotation of all or part of it, or none.
//!
//! Query and output are `[batch, heads, seq, head_dim]`.

use super::{Layout, Site, is_scalar, stopped};
use crate::fold::Result;
use crate::onnx::{Index, Node};

const SHAPE: &str = "decomposed";
const HELP: &str = "this shape of attention is not known yet; export the base model with `prefold export` instead";
/// Nodes on one way through a block: far more than any exporter writes, and an end to every walk.
const MAX_STEPS: usize = 16;

pub(super) fn locate(index: &Index, softmax: &Node) -> Option<Result<Site>> {
    if !softmax.is("", "Softmax") {
        return None;
    }
    let scores = softmax.input(0).and_then(|scores| score_product(index, scores))?;
    Some(site(index, softmax, scores))
}

fn site(index: &Index, softmax: &Node, scores: &Node) -> Result<Site> {
    let Some(query) = scores.input(0).map(|left| unscaled_query(index, left)) else {
        return Err(stopped(softmax, format!("`{}` has no left operand", scores.name()), HELP));
    };
    let Some(weights) = softmax.output(0) else {
        return Err(stopped(softmax, "the softmax has no output", HELP));
    };
    let (output, transpose) = attention_output(index, softmax, weights)?;
    let merged = transpose.output(0).and_then(|t| only_reader(index, t)).filter(|n| n.is("", "Reshape"));
    if merged.is_none() {
        let reason = format!("after `{}` no Reshape merges the heads", transpose.name());
        return Err(stopped(softmax, reason, HELP));
    }
    Ok(Site {
        layer: 0,
        shape: SHAPE,
        anchor: softmax.name().to_owned(),
        query: query.to_owned(),
        query_layout: Layout::HeadsFirst,
        output: output.to_owned(),
        output_layout: Layout::HeadsFirst,
        readers: index.consumers(output).to_vec(),
        num_heads: None,
        head_dim: None,
        num_kv_heads: None,
        width: merged.and_then(|node| merged_width(index, node)),
    })
}

/// The last dimension that a constant shape gives to the merged heads.
fn merged_width(index: &Index, reshape: &Node) -> Option<i64> {
    let shape = index.initializer(reshape.input(1)?)?.to_i64s().ok()?;
    shape.last().copied().filter(|width| *width > 0)
}

/// The MatMul that made the scores, behind scaling, masking and reshaping. `None` where this softmax is not attention.
fn score_product<'g>(index: &Index<'g>, scores: &str) -> Option<&'g Node> {
    let mut node = index.producer(scores)?;
    // masks are added on either side, so one operand of each Add leads to the product
    for _ in 0..MAX_STEPS {
        match node.op_type() {
            "MatMul" => return Some(node),
            "Reshape" | "Cast" | "Div" | "Tanh" => node = index.producer(node.input(0)?)?,
            "Mul" => {
                let side = usize::from(node.input(0).is_some_and(|t| is_scalar(index, t)));
                node = index.producer(node.input(side)?)?;
            }
            "Add" => {
                let sides = [node.input(0), node.input(1)];
                return sides.into_iter().flatten().find_map(|side| score_product(index, side));
            }
            _ => return None,
        }
    }
    None
}

/// The query before reshaping and scaling.
fn unscaled_query<'g>(index: &Index<'g>, left: &'g str) -> &'g str {
    let mut tensor = left;
    for _ in 0..MAX_STEPS {
        let Some(node) = index.producer(tensor) else { break };
        let behind = match node.op_type() {
            "Reshape" => node.input(0),
            "Mul" | "Div" if node.input(1).is_some_and(|t| is_scalar(index, t)) => node.input(0),
            "Mul" if node.input(0).is_some_and(|t| is_scalar(index, t)) => node.input(1),
            _ => None,
        };
        match behind {
            Some(behind) => tensor = behind,
            None => break,
        }
    }
    tensor
}

/// The tensor before the transposition that puts the sequence first, and that transposition.
fn attention_output<'g>(index: &Index<'g>, softmax: &Node, weights: &'g str) -> Result<(&'g str, &'g Node)> {
    let mut tensor = weights;
    let mut mixed = false;
    for _ in 0..MAX_STEPS {
        let Some(reader) = only_reader(index, tensor) else {
            let count = index.consumers(tensor).len();
            return Err(stopped(softmax, format!("`{tensor}` has {count} readers, where one leads on"), HELP));
        };
        match reader.op_type() {
            "MatMul" if !mixed && reader.input(0) == Some(tensor) => mixed = true,
            "Reshape" | "Cast" => {}
            "Transpose" if mixed => {
                let order = reader.attribute("perm").and_then(|a| a.as_ints().map(<[i64]>::to_vec));
                if order.as_deref() == Some(&[0, 2, 1, 3]) {
                    return Ok((tensor, reader));
                }
                return Err(stopped(softmax, format!("`{}` transposes by {order:?}", reader.name()), HELP));
            }
            other => {
                let reason = format!("`{}` ({other}) stands between the softmax and the output", reader.name());
                return Err(stopped(softmax, reason, HELP));
            }
        }
        let Some(next) = reader.output(0) else {
            return Err(stopped(softmax, format!("`{}` has no output", reader.name()), HELP));
        };
        tensor = next;
    }
    Err(stopped(softmax, "its output goes through too many nodes", HELP))
}

fn only_reader<'g>(index: &Index<'g>, tensor: &str) -> Option<&'g Node> {
    match index.consumers(tensor) {
        [reader] => index.graph().node(reader.node),
        _ => None,
    }
}

//! `com.microsoft` GroupQueryAttention.
//!
//! ```text
//! query, key, value ────────────┐   each [batch, seq, its heads · head_dim], or all in the first input, packed
//! past, lengths, (bias) ────────┼ GroupQueryAttention ─ output ─ o_proj
//! (cos, sin, position_ids) ─────┤   do_rotary = 1: it turns query and key itself
//! (norm weights of q and k) ────┘   and before that norms each head
//! ```
//! Soft cap, window and sinks do not touch the query. Output is `[batch, seq, heads · head_dim]`. Where the operator has the
//! query inside, it is made once more beside it, over the same tables:
//! ```text
//! query ─ Reshape ─ (Slice of packed) ─ Transpose ─ (norm) ─ RotaryEmbedding ─► [batch, heads, seq, head_dim]
//! cos, sin, positions ───────────────────────────────────────────┘
//! ```
//! Positions are the operator's: `lengths + 1 - seq + 0, 1, …` of each row, from zero on in a prompt; with `position_ids` those, but
//! in a prompt counted on from the first element of the first row alone.

use super::beside::{Beside, MICROSOFT, last_dim, shown};
use super::{Layout, QuerySource, Site, rotary, stopped, unrotated};
use crate::adapter::Query;
use crate::fold::Result;
use crate::onnx::{DataType, Index, Model, Node, NodeDef, TensorDef};

const SHAPE: &str = "group_query_attention";
const HELP: &str = "the node does not follow the operator's specification: look at how the graph was made";
const LENGTHS: usize = 5;
const TOTAL: usize = 6;
const COS: usize = 7;
const SIN: usize = 8;
const POSITION_IDS: usize = 9;
const Q_NORM: usize = 14;

pub(super) fn is_anchor(node: &Node) -> bool {
    node.is(MICROSOFT, "GroupQueryAttention")
}

pub(super) fn locate(index: &Index, node: &Node) -> Option<Result<Site>> {
    is_anchor(node).then(|| site(index, node))
}

fn integer(node: &Node, name: &str) -> Option<i64> {
    node.attribute(name).and_then(|a| a.as_int())
}

fn is_packed(node: &Node) -> bool {
    node.input(1).is_none() && node.input(2).is_none()
}

fn rotates(node: &Node) -> bool {
    integer(node, "do_rotary").unwrap_or(0) != 0
}

fn site(index: &Index, node: &Node) -> Result<Site> {
    let (Some(query), Some(output)) = (node.input(0), node.output(0)) else {
        return Err(stopped(node, "it has no query or no output", HELP));
    };
    if node.input(1).is_some() != node.input(2).is_some() {
        return Err(stopped(node, "it has one of key and value, where both or, packed, none are given", HELP));
    }
    let (Some(heads), Some(kv_heads)) = (integer(node, "num_heads"), integer(node, "kv_num_heads")) else {
        return Err(stopped(node, "it lacks num_heads or kv_num_heads", HELP));
    };
    if heads <= 0 || kv_heads <= 0 || heads % kv_heads != 0 {
        return Err(stopped(node, format!("{heads} heads cannot share {kv_heads} key-value heads"), HELP));
    }
    if rotates(node) && [LENGTHS, TOTAL, COS, SIN].iter().any(|slot| node.input(*slot).is_none()) {
        let reason =
            "the operator rotates (do_rotary = 1), but has no cos_cache, sin_cache, seqlens_k or total_sequence_length";
        return Err(stopped(node, reason, HELP));
    }
    let groups = if is_packed(node) { heads.saturating_add(kv_heads.saturating_mul(2)) } else { heads };
    let head_dim = last_dim(index, query).filter(|width| width % groups == 0).map(|width| width / groups);
    let site = Site {
        readers: index.consumers(output).to_vec(),
        num_heads: Some(heads),
        head_dim,
        num_kv_heads: Some(kv_heads),
        ..Site::new(SHAPE, node, (query, Layout::Merged), (output, Layout::Merged))
    };
    // what is packed, or biased inside, is not scaled apart
    if is_packed(node) { Ok(site) } else { site.unscaled(index, node) }
}

/// The query that meets the keys inside the operator, or the one before its rotation.
pub(super) fn query(model: &Model, index: &Index, node: &Node, site: &Site, wanted: Query) -> Result<QuerySource> {
    let turned = wanted == Query::PostRope && rotates(node);
    if wanted == Query::PreRope && !rotates(node) {
        if !is_packed(node) && node.input(Q_NORM).is_none() {
            return rotary::before(index, site);
        }
        if !unrotated::is_unturned(index, &site.query) {
            let part = rotary::first_part(index, &site.query).filter(|_| node.input(Q_NORM).is_none());
            if let Some(query) = part {
                return rotary::before(index, &Site { query: query.to_owned(), ..site.clone() });
            }
            let reason = "query, key and value are packed, or normed inside, behind nodes that may have rotated them";
            return Err(stopped(node, reason, "train with query = post_rope"));
        }
    }
    if !is_packed(node) && !turned && node.input(Q_NORM).is_none() {
        return Ok(shown(&site.query, Layout::Merged));
    }
    let (Some(heads), Some(kv_heads)) = (integer(node, "num_heads"), integer(node, "kv_num_heads")) else {
        return Err(stopped(node, "it lacks num_heads or kv_num_heads", HELP));
    };
    let mut beside = Beside::new(site);
    let groups = if is_packed(node) { heads.saturating_add(kv_heads.saturating_mul(2)) } else { heads };
    let mut query = beside.split_heads(&site.query, groups, heads);
    if let Some(weight) = node.input(Q_NORM) {
        query = norm(&mut beside, model, index, node, &query, weight)?;
    }
    if turned {
        query = rotate(&mut beside, index, node, &query, heads)?;
    }
    Ok(beside.finish(query, Layout::HeadsFirst))
}

/// `x / √(mean(x²) + ε) · weight` of each head, in 32-bit floats as the operator's kernels do.
fn norm(beside: &mut Beside, model: &Model, index: &Index, node: &Node, query: &str, weight: &str) -> Result<String> {
    let data_type = index.initializer(weight).map(|w| w.data_type());
    let Some(data_type) = data_type.or_else(|| index.value(weight).and_then(|value| value.elem_type())) else {
        return Err(stopped(node, format!("the type of its q_norm_weight `{weight}` is not known"), HELP));
    };
    let epsilon = node.attribute("qk_norm_epsilon").and_then(|a| a.as_float()).unwrap_or(1e-6);
    let epsilon = beside.tensor(TensorDef::from_f32s(beside.name("epsilon"), &[], &[epsilon]));
    let cast = |beside: &mut Beside, name: &str, x: &str, to: DataType| {
        if data_type == DataType::Float {
            return x.to_owned();
        }
        beside.node_with(name, &[x], |name| NodeDef::new("Cast", name).attr_int("to", to.code().into()))
    };
    let x = cast(beside, "Cast_norm", query, DataType::Float);
    let weight = cast(beside, "Cast_weight", weight, DataType::Float);
    let square = beside.node("Mul", "Mul_square", &[&x, &x]);
    // the axes became an input with opset 18
    let mean = if model.opset("").unwrap_or(0) < 18 {
        beside.node_with("ReduceMean", &[&square], |name| NodeDef::new("ReduceMean", name).attr_ints("axes", &[-1]))
    } else {
        let axes = beside.list("ReduceMean/axes", &[-1]);
        beside.node("ReduceMean", "ReduceMean", &[&square, &axes])
    };
    let sum = beside.node("Add", "Add_epsilon", &[&mean, &epsilon]);
    let root = beside.node("Sqrt", "Sqrt", &[&sum]);
    let normed = beside.node("Div", "Div", &[&x, &root]);
    let scaled = beside.node("Mul", "Mul_weight", &[&normed, &weight]);
    Ok(cast(beside, "Cast_normed", &scaled, data_type))
}

/// The operator's rotation of `[batch, heads, seq, head_dim]`.
fn rotate(beside: &mut Beside, index: &Index, node: &Node, query: &str, heads: i64) -> Result<String> {
    let (Some(cos), Some(sin)) = (node.input(COS), node.input(SIN)) else {
        return Err(stopped(node, "it has no cos_cache or no sin_cache", HELP));
    };
    let positions = positions(beside, node, node.input(POSITION_IDS))?;
    let interleaved = integer(node, "rotary_interleaved").unwrap_or(0);
    let rotary =
        |name: String| NodeDef::new("RotaryEmbedding", name).domain(MICROSOFT).attr_int("interleaved", interleaved);
    if let Some(half) = last_dim(index, cos).or_else(|| last_dim(index, sin)) {
        return Ok(beside.node_with("RotaryEmbedding", &[query, &positions, cos, sin], |name| {
            rotary(name).attr_int("num_heads", heads).attr_int("rotary_embedding_dim", half.saturating_mul(2))
        }));
    }
    // how much of a head turns is only known when the graph runs
    let half = beside.size("rotary_half", cos, 1);
    let (zero, two) = (beside.list("rotary_zero", &[0]), beside.list("rotary_two", &[2]));
    let turning = beside.node("Mul", "rotary_width", &[&half, &two]);
    let end = beside.list("rotary_end", &[i64::MAX]);
    let turned = beside.slice("Slice_turned", query, 3, &zero, &turning);
    let kept = beside.slice("Slice_kept", query, 3, &turning, &end);
    let turned = beside.node_with("RotaryEmbedding", &[&turned, &positions, cos, sin], rotary);
    Ok(beside.node_with("Concat", &[&turned, &kept], |name| NodeDef::new("Concat", name).attr_int("axis", 3)))
}

/// The column of each query among the keys, `[batch, seq]`: a query sees those up to its own.
///
/// # Errors
/// When the operator is not told the lengths of its rows.
pub(in crate::fold) fn columns(node: &Node, site: &Site) -> Result<QuerySource> {
    let mut beside = Beside::new(site);
    let columns = positions(&mut beside, node, None)?;
    Ok(beside.finish(columns, Layout::Merged))
}

/// `[batch, seq]` positions, by the operator's rule. Layers that read the same lengths share them.
fn positions(beside: &mut Beside, node: &Node, given: Option<&str>) -> Result<String> {
    let (Some(query), Some(lengths), Some(total)) = (node.input(0), node.input(LENGTHS), node.input(TOTAL)) else {
        return Err(stopped(node, "it has no seqlens_k or no total_sequence_length", HELP));
    };
    let prefix = match given {
        Some(given) => format!("positions({given},{total})"),
        None => format!("positions({lengths})"),
    };
    Ok(beside.under(&prefix, |beside| {
        let (zero, one) = (beside.integer("zero", 0), beside.integer("one", 1));
        let shape = beside.node("Shape", "Shape", &[query]);
        let seq = beside.node("Gather", "Gather_seq", &[&shape, &one]);
        let steps = beside.node("Range", "Range", &[&zero, &seq, &one]);
        let integers = |name: String| NodeDef::new("Cast", name).attr_int("to", DataType::Int64.code().into());
        let Some(given) = given else {
            let lengths = beside.node_with("Cast", &[lengths], integers);
            let rows = beside.list("rows", &[-1, 1]);
            let lengths = beside.node("Reshape", "Reshape", &[&lengths, &rows]);
            let past = beside.node("Sub", "Sub_seq", &[&lengths, &seq]);
            let past = beside.node("Add", "Add_one", &[&past, &one]);
            let past = beside.node("Max", "Max", &[&past, &zero]);
            return beside.node("Add", "Add", &[&past, &steps]);
        };
        let total = beside.node_with("Cast", &[total], integers);
        let is_prompt = beside.node("Equal", "Equal", &[&total, &seq]);
        let flat = beside.list("flat", &[-1]);
        let flat = beside.node("Reshape", "Reshape", &[given, &flat]);
        let first = beside.node("Gather", "Gather_first", &[&flat, &zero]);
        let prompt = beside.node("Add", "Add", &[&first, &steps]);
        beside.node("Where", "Where", &[&is_prompt, &prompt, given])
    }))
}

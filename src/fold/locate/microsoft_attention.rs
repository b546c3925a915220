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
//!
//! With `do_rotary` the operator turns it, half by half, over frequencies of base 10,000. ONNX Runtime has that on GPUs only; its
//! kernel is followed: a prompt counts from zero, and what comes after a past stands where the past ends, all tokens of it alike.
//! ```text
//! past ─ Shape ─ Gather 3 ─ positions ─ Mul frequencies ─ Cos | Sin ─┐
//! query ────────────────────────────────────────────────── RotaryEmbedding ─►
//! ```

use super::beside::{Beside, MICROSOFT, last_dim};
use super::{Layout, QuerySource, Site, stopped};
use crate::adapter::Query;
use crate::fold::Result;
use crate::onnx::{DataType, Index, Node, NodeDef, TensorDef};

const SHAPE: &str = "microsoft_attention";
const HELP: &str = "the node does not follow the operator's specification: look at how the graph was made";

/// Elements of a head that are turned: their frequencies become a constant, whatever a file says of its dimensions.
const MAX_TURNING: i64 = 1 << 16;

const PAST: usize = 4;
const PAST_LENGTH: usize = 6;

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
pub(super) fn query(index: &Index, node: &Node, site: &Site, wanted: Query) -> Result<QuerySource> {
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
    if wanted == Query::PostRope && integer(node, "do_rotary").unwrap_or(0) != 0 {
        query = rotate(&mut beside, index, node, site, &query)?;
    }
    Ok(beside.finish(query, Layout::Merged))
}

/// The operator's rotation of `[batch, seq, heads · head_dim]`.
fn rotate(beside: &mut Beside, index: &Index, node: &Node, site: &Site, query: &str) -> Result<String> {
    let (Some(heads), Some(head_dim)) = (site.num_heads, site.head_dim) else {
        return Err(stopped(node, "the width of its heads is not known", HELP));
    };
    let turning = integer(node, "rotary_embedding_dim").filter(|width| *width > 0).unwrap_or(head_dim);
    if turning > head_dim || turning % 2 != 0 {
        let reason = format!("rotary_embedding_dim is {turning}, and its heads are {head_dim} wide");
        return Err(stopped(node, reason, HELP));
    }
    if turning > MAX_TURNING {
        let reason = format!("it turns {turning} elements of each head, and at most {MAX_TURNING} are followed");
        return Err(stopped(node, reason, "is the file damaged? its weights say how wide a head is"));
    }
    let data_type = node.input(1).and_then(|weights| float_type(index, weights)).unwrap_or(DataType::Float);
    let (cos, sin) = tables(beside, node, query, turning, data_type);
    let start = beside.list("RotaryEmbedding/start", &[0]);
    Ok(beside.node_with("RotaryEmbedding", &[query, &start, &cos, &sin], |name| {
        let rotary = NodeDef::new("RotaryEmbedding", name).domain(MICROSOFT).attr_int("interleaved", 0);
        rotary.attr_int("num_heads", heads).attr_int("rotary_embedding_dim", turning)
    }))
}

fn float_type(index: &Index, weights: &str) -> Option<DataType> {
    let stored = index.initializer(weights).map(|weights| weights.data_type());
    stored.or_else(|| index.value(weights)?.elem_type())
}

/// Cosines and sines of the new tokens, `[seq, turning / 2]`. Layers that read a past of one length share them.
fn tables(beside: &mut Beside, node: &Node, query: &str, turning: i64, data_type: DataType) -> (String, String) {
    let frequencies: Vec<f32> =
        (0..turning / 2).map(|pair| (10_000_f64.powf(-2.0 * pair as f64 / turning as f64)) as f32).collect();
    let given = node.input(PAST_LENGTH).map(str::to_owned);
    let past = node.input(PAST).map(str::to_owned);
    let of = given.as_deref().or(past.as_deref()).unwrap_or("none").to_owned();
    beside.under(&format!("rotation({of},{turning})"), |beside| {
        let (zero, one, minus) = (beside.integer("zero", 0), beside.integer("one", 1), beside.list("rows", &[-1, 1]));
        let scalar = |beside: &mut Beside, name: &str, x: &str| {
            let flat = beside.list(&format!("{name}/flat"), &[-1]);
            let x = beside.node("Reshape", &format!("{name}/Reshape"), &[x, &flat]);
            let x = beside.node("Gather", name, &[&x, &zero]);
            let integers = |name: String| NodeDef::new("Cast", name).attr_int("to", DataType::Int64.code().into());
            beside.node_with(&format!("{name}/Cast"), &[&x], integers)
        };
        let shape = beside.node("Shape", "Shape", &[query]);
        let seq = beside.node("Gather", "Gather_seq", &[&shape, &one]);
        let steps = beside.node("Range", "Range", &[&zero, &seq, &one]);
        let past = match (&given, &past) {
            (Some(given), _) => scalar(beside, "Gather_past", given),
            (None, Some(past)) => {
                let size = beside.size("past", past, 3);
                scalar(beside, "Gather_past", &size)
            }
            (None, None) => zero.clone(),
        };
        let is_prompt = beside.node("Equal", "Equal_zero", &[&past, &zero]);
        let is_same = beside.node("Equal", "Equal_seq", &[&past, &seq]);
        let counts = beside.node("Or", "Or", &[&is_prompt, &is_same]);
        let positions = beside.node("Where", "Where", &[&counts, &steps, &past]);
        let floats = |name: String| NodeDef::new("Cast", name).attr_int("to", DataType::Float.code().into());
        let positions = beside.node_with("Cast", &[&positions], floats);
        let positions = beside.node("Reshape", "Reshape", &[&positions, &minus]);
        let name = beside.name("frequencies");
        let frequencies = beside.tensor(TensorDef::from_f32s(name, &[1, turning / 2], &frequencies));
        let angles = beside.node("Mul", "Mul", &[&positions, &frequencies]);
        let table = |beside: &mut Beside, op: &str| {
            let table = beside.node(op, op, &[&angles]);
            if data_type == DataType::Float {
                return table;
            }
            let typed = |name: String| NodeDef::new("Cast", name).attr_int("to", data_type.code().into());
            beside.node_with(&format!("Cast_{op}"), &[&table], typed)
        };
        (table(beside, "Cos"), table(beside, "Sin"))
    })
}

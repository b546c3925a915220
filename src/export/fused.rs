//! The `ort` dialect: ONNX Runtime's fused operators.
//!
//! ```text
//!                  ┌ q ─ (RotaryEmbedding) ─┐ query
//! qkv_proj ─ Split ┼ k ─ (RotaryEmbedding) ─┼─ GroupQueryAttention ─► o_proj
//!                  └ v ─────────────────────┤        │
//!                      past, lengths, bias ─┘     present
//!
//! gate_up_proj ─ Split ─ gate, up ─ activation, Mul ─► down_proj
//! ```
//!
//! Linear maps that read one tensor are one product: with one token each product is little work between two waits of ONNX
//! Runtime's threads for each other.
//!
//! By default rotation stands before the attention operator (`do_rotary` = 0), so that the rotated query is a tensor of the graph and
//! positions come from `position_ids`: the operator itself takes them, but of a prompt the first number alone, so that rows
//! padded on the left would be turned by other angles than those that follow. Its tables hold the angles of the pass's own
//! tokens, row by row, so that no position is beyond them. GroupQueryAttention by itself knows only rows that end in
//! padding; here every row counts as full length and padding on either side is hidden by the operator's `attention_bias`.
//! It takes several rows only without a past or one token at a time, and heads whose width is a multiple of 8; where the
//! width is not, attention is written in standard operators, as in the portable dialect.
//!
//! For rows that have padding on the right alone (`right_padding_only`) the operator does all that by itself, from the number of real
//! tokens in each row, the packed product, and tables of all positions:
//!
//! ```text
//! qkv_proj ─────────────────────────────────┬─ GroupQueryAttention ─► o_proj
//! attention_mask ─ ReduceSum ─ Sub 1 ─ Cast ┤        │
//!    past, total, cos and sin of positions ─┘     present
//! ```
//!
//! `SimplifiedLayerNormalization` has no schema under `com.microsoft`, and the one that ONNX Runtime keeps in `ai.onnx` is
//! refused by the official checker. So the graph calls `com.microsoft.SimplifiedLayerNormalization` and defines it as a
//! model-local function, which ONNX Runtime inlines and fuses to its kernel.

use super::attention::Composed;
use super::decoder::{Operators, Projected};
use super::mask::Mask;
use super::norm::{self, NormNode};
use super::rotary::Angles;
use super::writer::GraphWriter;
use super::{Error, OPSET, Result, mlp};
use crate::base::{Activation, DecoderSpec, NormKind, Rotary};
use crate::onnx::{DataType, FunctionDef, NodeDef, TensorDef};

/// The operator set of the fused operators.
pub(super) const DOMAIN: &str = "com.microsoft";

const NORM: &str = "SimplifiedLayerNormalization";

/// What GroupQueryAttention asks of the width of a head.
const HEAD_MULTIPLE: usize = 8;

/// What it asks of the width of a head that it rotates, and of the part of it that is rotated.
const ROTATED_MULTIPLE: usize = 16;

/// The positions of the longest table of angles that is written: a gigabyte of cosines and sines of 64 pairs in float32.
const MOST_POSITIONS: usize = 1 << 21;

/// Whether GroupQueryAttention can rotate the heads of a decoder by itself.
pub(super) fn rotates_inside(spec: &DecoderSpec) -> Result<()> {
    let width = spec.attention.head_dim;
    let refused = |reason: String| Err(Error::RightPadding { reason });
    if !width.is_multiple_of(HEAD_MULTIPLE) {
        return refused(format!("heads are {width} wide, and GroupQueryAttention takes multiples of {HEAD_MULTIPLE}"));
    }
    if !spec.attention.rotary.is_empty() && spec.max_positions > MOST_POSITIONS {
        let (positions, most) = (spec.max_positions, MOST_POSITIONS);
        return refused(format!("the model has {positions} positions, and a table of angles holds at most {most}"));
    }
    let fits = |size: usize| size.is_multiple_of(ROTATED_MULTIPLE);
    match spec.attention.rotary.iter().find(|rotary| !(fits(width) && fits(rotary.dim))) {
        Some(rotary) => refused(format!(
            "{} elements of heads {width} wide are rotated, and GroupQueryAttention rotates multiples of {ROTATED_MULTIPLE}, of such",
            rotary.dim
        )),
        None => Ok(()),
    }
}

/// Fused operators.
#[derive(Debug)]
pub(super) struct Fused {
    attention: Attention,
    /// The epsilon of the function [`NORM`], where the decoder has such a norm.
    norm_epsilon: Option<f64>,
}

#[derive(Debug)]
enum Attention {
    Grouped(Grouped),
    Composed(Composed),
}

impl Fused {
    pub(super) fn new(graph: &mut GraphWriter) -> Result<Self> {
        let spec = graph.spec();
        let norm_epsilon = root_mean_square_epsilon(spec);
        if let Some(epsilon) = norm_epsilon {
            graph.function(norm_function(epsilon as f32));
        }
        let attention = if spec.attention.head_dim.is_multiple_of(HEAD_MULTIPLE) {
            Attention::Grouped(Grouped::new(graph)?)
        } else {
            Attention::Composed(Composed::new(graph)?)
        };
        Ok(Self { attention, norm_epsilon })
    }

    /// Whether the function [`NORM`] and its skip form compute the norm.
    fn is_simplified(&self, node: &NormNode) -> bool {
        let norm = &node.norm;
        norm.kind == NormKind::Rms && !norm.bias && node.one_weight && self.norm_epsilon == Some(norm.epsilon)
    }
}

/// The epsilon of the stream's norm, or else of that of queries and keys.
fn root_mean_square_epsilon(spec: &DecoderSpec) -> Option<f64> {
    let norms = std::iter::once(spec.norm).chain(spec.attention.qk_norm.map(|qk| qk.norm));
    norms.into_iter().find(|norm| norm.kind == NormKind::Rms).map(|norm| norm.epsilon)
}

impl Operators for Fused {
    fn packs(&self) -> bool {
        true
    }

    fn attends_to_packed(&self) -> bool {
        matches!(&self.attention, Attention::Grouped(Grouped { rotation: Rotation::Inside, .. }))
    }

    fn norm(&mut self, graph: &mut GraphWriter, node: &NormNode, x: &str) -> Result<String> {
        if !self.is_simplified(node) {
            return norm::make(graph, node, x);
        }
        let weight = node.weight(graph)?;
        let name = format!("{}/{NORM}", node.name);
        Ok(graph.node_with(NodeDef::new(NORM, name.as_str()).domain(DOMAIN), &name, &[x, &weight]))
    }

    fn add_norm(
        &mut self,
        graph: &mut GraphWriter,
        node: &NormNode,
        stream: &str,
        block: &str,
    ) -> Result<(String, String)> {
        let op = match node.norm.kind {
            NormKind::Rms if self.is_simplified(node) => "SkipSimplifiedLayerNormalization",
            NormKind::Layer if node.one_weight => "SkipLayerNormalization",
            _ => {
                let sum = graph.node("Add", &format!("{}/Add_residual", node.name), &[stream, block]);
                return Ok((norm::make(graph, node, &sum)?, sum));
            }
        };
        let name = format!("{}/{op}", node.name);
        let (normed, sum) = (format!("{name}/output_0"), format!("{name}/output_3"));
        let (weight, bias) = (node.weight(graph)?, node.bias(graph)?);
        graph.add(
            NodeDef::new(op, name)
                .domain(DOMAIN)
                .attr_float("epsilon", node.norm.epsilon as f32)
                .inputs([stream, block, &weight])
                .inputs(bias)
                .outputs([normed.as_str(), "", "", &sum]),
        );
        let width = graph.spec().hidden_size;
        graph.describe(&normed, width);
        graph.describe(&sum, width);
        Ok((normed, sum))
    }

    /// `QuickGelu` with `alpha` 1 is `x · sigmoid(x)`; `FastGelu` is the tanh form.
    fn activation(&mut self, graph: &mut GraphWriter, name: &str, kind: Activation, x: &str) -> Result<String> {
        let op = match kind {
            Activation::Silu => "QuickGelu",
            Activation::Gelu => "Gelu",
            Activation::GeluTanh => "FastGelu",
            Activation::Relu => return mlp::activation(graph, name, kind, x),
        };
        let name = format!("{name}/{op}");
        let node = NodeDef::new(op, name.as_str()).domain(DOMAIN);
        let node = if kind == Activation::Silu { node.attr_float("alpha", 1.0) } else { node };
        let activated = graph.node_with(node, &name, &[x]);
        graph.describe(&activated, graph.spec().mlp.intermediate_size);
        Ok(activated)
    }

    fn attention(&mut self, graph: &mut GraphWriter, layer: usize, projected: &Projected) -> Result<String> {
        match &self.attention {
            Attention::Grouped(grouped) => Ok(grouped.make(graph, layer, projected)),
            Attention::Composed(composed) => composed.make(graph, layer, projected),
        }
    }

    fn vocabulary(&mut self, graph: &mut GraphWriter, hidden: &str, matrix: &str, output: &str) -> Result<()> {
        let node = NodeDef::new("FusedMatMul", "/lm_head/FusedMatMul").domain(DOMAIN).attr_int("transB", 1);
        graph.add(node.inputs([hidden, matrix]).outputs([output]));
        Ok(())
    }
}

/// GroupQueryAttention; tensors that all layers share, by name.
#[derive(Debug)]
struct Grouped {
    /// By rotary embedding.
    angles: Vec<Angles>,
    rotation: Rotation,
    /// Tokens of each row but one, `int32[batch]`.
    lengths: String,
    /// Past and new tokens, `int32[]`.
    total: String,
}

/// Where queries and keys are rotated.
#[derive(Debug)]
enum Rotation {
    /// Before the operator, for padding on either side.
    Before {
        /// The row of [`Angles`] for each token, `int64[batch, sequence]`; empty where nothing is rotated.
        rows: String,
        /// `[batch, 1, sequence, total]`.
        bias: String,
    },
    /// In it, for padding on the right.
    Inside,
}

impl Grouped {
    fn new(graph: &mut GraphWriter) -> Result<Self> {
        let inside = graph.options().right_padding_only;
        let bias = if inside { None } else { Some(padding_bias(graph)?) };
        let tokens = graph.dimension("/model/lengths/total", "attention_mask", 1);
        let total = graph.cast_always("/model/lengths/Cast_total", &tokens, DataType::Int32);
        let rotary = graph.spec().attention.rotary.iter().enumerate();
        let Some(bias) = bias else {
            let lengths = real_lengths(graph);
            let angles = rotary.map(|(index, rotary)| Angles::by_position(graph, index, rotary, (&tokens, &lengths)));
            let angles = angles.collect::<Result<_>>()?;
            return Ok(Self { angles, rotation: Rotation::Inside, lengths, total });
        };
        let lengths = row_lengths(graph, &total);
        let rows = if rotary.len() == 0 { String::new() } else { token_rows(graph) };
        let angles = rotary.map(|(index, rotary)| Angles::by_pair(graph, index, rotary)).collect();
        Ok(Self { angles, rotation: Rotation::Before { rows, bias }, lengths, total })
    }

    fn make(&self, graph: &mut GraphWriter, layer: usize, projected: &Projected) -> String {
        let attention = &graph.spec().attention;
        let at = |op: &str| format!("/model/layers.{layer}/self_attn/{op}");
        let (heads, kv_heads) = (attention.num_heads as i64, attention.num_kv_heads as i64);
        let turned = self.turned(graph, layer);
        let (query, key, inside, rest) = match &self.rotation {
            Rotation::Before { rows, bias } => {
                let mut rotate = |name: &str, x: &str, heads| match turned {
                    Some((rotary, angles)) => rotate(graph, &at(name), (rotary, angles, rows), x, heads),
                    None => x.to_owned(),
                };
                let query = rotate("q_rotary/RotaryEmbedding", &projected.query, heads);
                let key = rotate("k_rotary/RotaryEmbedding", &projected.key, kv_heads);
                (query, key, None, vec!["", "", "", bias]) // rotary caches and positions: rotated already
            }
            Rotation::Inside => {
                let tables = turned.map_or_else(Vec::new, |(_, angles)| vec![angles.cos.as_str(), &angles.sin]);
                (projected.query.clone(), projected.key.clone(), turned, tables)
            }
        };
        let cache = |side: &str, part: &str| format!("{side}.{layer}.{part}");
        let mixed = at("GroupQueryAttention/output_0");
        let mut node = NodeDef::new("GroupQueryAttention", at("GroupQueryAttention"))
            .domain(DOMAIN)
            .attr_int("num_heads", heads)
            .attr_int("kv_num_heads", kv_heads)
            .attr_float("scale", attention.scale as f32)
            .attr_int("do_rotary", i64::from(inside.is_some()));
        if inside.is_some_and(|(rotary, _)| rotary.interleaved) {
            node = node.attr_int("rotary_interleaved", 1);
        }
        if let Some(cap) = attention.softcap {
            node = node.attr_float("softcap", cap as f32);
        }
        if let Some(window) = graph.spec().layers.get(layer).and_then(|layer| layer.window) {
            node = node.attr_int("local_window_size", i64::from(i32::try_from(window).unwrap_or(i32::MAX)));
        }
        graph.add(
            node.inputs([&query, &key, &projected.value])
                .inputs([cache("past_key_values", "key"), cache("past_key_values", "value")])
                .inputs([&self.lengths, &self.total])
                .inputs(rest)
                .outputs([mixed.clone(), cache("present", "key"), cache("present", "value")]),
        );
        graph.describe(&mixed, attention.num_heads * attention.head_dim);
        mixed
    }

    /// How a layer's queries and keys are rotated, and by which angles.
    fn turned<'a>(&'a self, graph: &GraphWriter<'a>, layer: usize) -> Option<(&'a Rotary, &'a Angles)> {
        let spec = graph.spec();
        let index = spec.layers.get(layer).and_then(|layer| layer.rotary)?;
        Some((spec.attention.rotary.get(index)?, self.angles.get(index)?))
    }
}

/// `x` turned before the attention operator, each token by its row of angles.
fn rotate(
    graph: &mut GraphWriter,
    name: &str,
    (rotary, angles, rows): (&Rotary, &Angles, &str),
    x: &str,
    heads: i64,
) -> String {
    let width = graph.spec().attention.head_dim;
    let mut node = NodeDef::new("RotaryEmbedding", name)
        .domain(DOMAIN)
        .attr_int("num_heads", heads)
        .attr_int("interleaved", i64::from(rotary.interleaved));
    if rotary.dim < width {
        node = node.attr_int("rotary_embedding_dim", rotary.dim as i64);
    }
    let rotated = graph.node_with(node, name, &[x, rows, &angles.cos, &angles.sin]);
    graph.describe(&rotated, heads as usize * width);
    rotated
}

/// Hides padding only: the operator is causal by itself. The sequence dimension is written out because the operator does not
/// broadcast it.
fn padding_bias(graph: &mut GraphWriter) -> Result<String> {
    let bias = Mask::padding(graph)?;
    let at = |name: &str| format!("/model/mask/{name}");
    let sequence = graph.dimension(&at("sequence"), "input_ids", 1);
    let sequence = graph.unsqueeze(&at("Unsqueeze_sequence"), &sequence, &[0]);
    let (ones, one) = (graph.integers(&[1, 1]), graph.integers(&[1]));
    let shape = graph.concat(&at("Concat"), 0, &[&ones, &sequence, &one]);
    Ok(graph.node("Expand", &at("Expand"), &[&bias, &shape]))
}

/// Every row counts as full: `total − 1`, once for each row.
fn row_lengths(graph: &mut GraphWriter, total: &str) -> String {
    let at = |name: &str| format!("/model/lengths/{name}");
    let batch = graph.dimension(&at("batch"), "input_ids", 0);
    let batch = graph.unsqueeze(&at("Unsqueeze"), &batch, &[0]);
    let one = NodeDef::new("Constant", at("one"))
        .attr_tensor("value", TensorDef::inline("", DataType::Int32, &[], 1i32.to_le_bytes().to_vec()));
    let one = graph.node_with(one, &at("one"), &[]);
    let last = graph.node("Sub", &at("Sub"), &[total, &one]);
    graph.node("Expand", &at("Expand"), &[&last, &batch])
}

/// The number of real tokens in each row but one, `int32[batch]`.
fn real_lengths(graph: &mut GraphWriter) -> String {
    let at = |name: &str| format!("/model/lengths/{name}");
    let (axis, one) = (graph.integers(&[1]), graph.integer(1));
    let sum = NodeDef::new("ReduceSum", at("ReduceSum")).attr_int("keepdims", 0);
    let real = graph.node_with(sum, &at("ReduceSum"), &["attention_mask", &axis]);
    let last = graph.node("Sub", &at("Sub"), &[&real, &one]);
    graph.cast_always(&at("Cast_last"), &last, DataType::Int32)
}

/// `0..batch · sequence` in the shape of `input_ids`.
fn token_rows(graph: &mut GraphWriter) -> String {
    let at = |name: &str| format!("/model/rotary_emb/{name}");
    let shape = graph.node("Shape", &at("Shape"), &["input_ids"]);
    let count = graph.node("Size", &at("Size"), &["input_ids"]);
    let (zero, one) = (graph.integer(0), graph.integer(1));
    let rows = graph.node("Range", &at("Range"), &[&zero, &count, &one]);
    graph.node("Reshape", &at("Reshape"), &[&rows, &shape])
}
/// `x / sqrt(mean(x²) + epsilon) · scale`, computed in float32, in the pattern that ONNX Runtime fuses.
fn norm_function(epsilon: f32) -> FunctionDef {
    let node =
        |op: &str, inputs: &[&str], output: &str| NodeDef::new(op, "").inputs(inputs.iter().copied()).outputs([output]);
    let float = i64::from(DataType::Float.code());
    FunctionDef::new(DOMAIN, NORM, &[("", OPSET)])
        .inputs(["X", "scale"])
        .outputs(["Y"])
        .node(node("Cast", &["X"], "x").attr_int("to", float))
        .node(node("Constant", &[], "two").attr_float("value_float", 2.0))
        .node(node("Pow", &["x", "two"], "square"))
        .node(node("ReduceMean", &["square"], "mean").attr_ints("axes", &[-1]).attr_int("keepdims", 1))
        .node(node("Constant", &[], "epsilon").attr_float("value_float", epsilon))
        .node(node("Add", &["mean", "epsilon"], "shifted"))
        .node(node("Sqrt", &["shifted"], "root"))
        .node(node("Div", &["x", "root"], "quotient"))
        .node(node("CastLike", &["quotient", "X"], "normed"))
        .node(node("Mul", &["normed", "scale"], "Y"))
}

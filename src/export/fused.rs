//! The `ort` dialect: ONNX Runtime's fused operators.
//!
//! ```text
//! q ─ RotaryEmbedding ─┐ query
//! k ─ RotaryEmbedding ─┼─ GroupQueryAttention ─► o_proj
//! v ───────────────────┤        │
//! past, lengths, bias ─┘     present
//! ```
//!
//! Rotation stands before the attention operator (`do_rotary` = 0), so that the rotated query is a tensor of the graph and
//! positions come from `position_ids`. GroupQueryAttention by itself knows only rows that end in padding; here every row
//! counts as full length and padding on either side is hidden by the operator's `attention_bias`.
//!
//! `SimplifiedLayerNormalization` has no schema under `com.microsoft`, and the one that ONNX Runtime keeps in `ai.onnx` is
//! refused by the official checker. So the graph calls `com.microsoft.SimplifiedLayerNormalization` and defines it as a
//! model-local function, which ONNX Runtime inlines and fuses to its kernel.

use super::decoder::{Operators, Projected, Residual, attention_bias, dimension};
use super::writer::GraphWriter;
use super::{OPSET, Result};
use crate::base::WeightRole;
use crate::onnx::{DataType, FunctionDef, NodeDef, TensorDef};

/// The operator set of the fused operators.
pub(super) const DOMAIN: &str = "com.microsoft";

const NORM: &str = "SimplifiedLayerNormalization";

/// Tensors that all layers share, by name.
#[derive(Debug, Default)]
pub(super) struct Fused {
    /// `[max_positions, head_dim / 2]`.
    cos: String,
    sin: String,
    /// `[batch, 1, sequence, total]`.
    bias: String,
    /// Tokens of each row but one, `int32[batch]`.
    lengths: String,
    /// Past and new tokens, `int32[]`.
    total: String,
}

impl Operators for Fused {
    fn prepare(&mut self, graph: &mut GraphWriter) -> Result<()> {
        graph.function(norm_function(graph.spec().norm.epsilon as f32));
        self.bias = self.padding_bias(graph)?;
        self.total = self.total_length(graph);
        self.lengths = row_lengths(graph, &self.total);
        (self.cos, self.sin) = rotary_caches(graph)?;
        Ok(())
    }

    fn norm(
        &mut self,
        graph: &mut GraphWriter,
        name: &str,
        residual: &mut Residual,
        role: WeightRole,
    ) -> Result<String> {
        let weight = graph.weight(role)?;
        let Some(pending) = residual.pending.take() else {
            let name = format!("{name}/{NORM}");
            let norm = NodeDef::new(NORM, name.as_str()).domain(DOMAIN);
            return Ok(graph.node_with(norm, &name, &[&residual.stream, &weight]));
        };
        let name = format!("{name}/SkipSimplifiedLayerNormalization");
        let (normed, sum) = (format!("{name}/output_0"), format!("{name}/output_3"));
        graph.add(
            NodeDef::new("SkipSimplifiedLayerNormalization", name)
                .domain(DOMAIN)
                .attr_float("epsilon", graph.spec().norm.epsilon as f32)
                .inputs([residual.stream.as_str(), &pending, &weight])
                .outputs([normed.as_str(), "", "", &sum]),
        );
        residual.stream = sum;
        Ok(normed)
    }

    fn attention(&mut self, graph: &mut GraphWriter, layer: usize, projected: &Projected) -> Result<String> {
        let attention = &graph.spec().attention;
        let at = |op: &str| format!("/model/layers.{layer}/self_attn/{op}");
        let (heads, kv_heads) = (attention.num_heads as i64, attention.num_kv_heads as i64);
        let query = self.rotate(graph, &at("q_rotary/RotaryEmbedding"), &projected.query, heads);
        let key = self.rotate(graph, &at("k_rotary/RotaryEmbedding"), &projected.key, kv_heads);
        let cache = |side: &str, part: &str| format!("{side}.{layer}.{part}");
        let mixed = at("GroupQueryAttention/output_0");
        graph.add(
            NodeDef::new("GroupQueryAttention", at("GroupQueryAttention"))
                .domain(DOMAIN)
                .attr_int("num_heads", heads)
                .attr_int("kv_num_heads", kv_heads)
                .attr_float("scale", attention.scale as f32)
                .attr_int("do_rotary", 0)
                .inputs([&query, &key, &projected.value])
                .inputs([cache("past_key_values", "key"), cache("past_key_values", "value")])
                .inputs([&self.lengths, &self.total])
                .inputs(["", "", ""]) // rotary caches and positions: rotated already
                .inputs([&self.bias])
                .outputs([mixed.clone(), cache("present", "key"), cache("present", "value")]),
        );
        Ok(mixed)
    }

    fn head(&mut self, graph: &mut GraphWriter, hidden: &str, weight: &str) -> Result<()> {
        graph.add(
            NodeDef::new("FusedMatMul", "/lm_head/FusedMatMul")
                .domain(DOMAIN)
                .attr_int("transB", 1)
                .inputs([hidden, weight])
                .outputs(["logits"]),
        );
        Ok(())
    }
}

impl Fused {
    fn rotate(&self, graph: &mut GraphWriter, name: &str, x: &str, heads: i64) -> String {
        let node = NodeDef::new("RotaryEmbedding", name).domain(DOMAIN).attr_int("num_heads", heads);
        let node = node.attr_int("interleaved", 0);
        graph.node_with(node, name, &[x, "position_ids", &self.cos, &self.sin])
    }

    /// Hides padding only: the operator is causal by itself. The sequence dimension is written out because the operator
    /// does not broadcast it.
    fn padding_bias(&self, graph: &mut GraphWriter) -> Result<String> {
        let bias = attention_bias(graph, false)?;
        let at = |name: &str| format!("/model/mask/{name}");
        let sequence = dimension(graph, &at("sequence"), "input_ids", 1);
        let axis = graph.integers(&at("as_list"), &[0]);
        let sequence = graph.node("Unsqueeze", &at("Unsqueeze_sequence"), &[&sequence, &axis]);
        let ones = graph.integers(&at("ones"), &[1, 1]);
        let one = graph.integers(&at("one"), &[1]);
        let concat = NodeDef::new("Concat", at("Concat")).attr_int("axis", 0);
        let shape = graph.node_with(concat, &at("Concat"), &[&ones, &sequence, &one]);
        Ok(graph.node("Expand", &at("Expand"), &[&bias, &shape]))
    }

    fn total_length(&self, graph: &mut GraphWriter) -> String {
        let total = dimension(graph, "/model/lengths/total", "attention_mask", 1);
        to_int32(graph, "/model/lengths/Cast_total", &total)
    }
}

/// Every row counts as full: `total − 1`, once for each row.
fn row_lengths(graph: &mut GraphWriter, total: &str) -> String {
    let at = |name: &str| format!("/model/lengths/{name}");
    let batch = dimension(graph, &at("batch"), "input_ids", 0);
    let axis = graph.integers(&at("as_list"), &[0]);
    let batch = graph.node("Unsqueeze", &at("Unsqueeze"), &[&batch, &axis]);
    let one = NodeDef::new("Constant", at("one"))
        .attr_tensor("value", TensorDef::inline("", DataType::Int32, &[], 1i32.to_le_bytes().to_vec()));
    let one = graph.node_with(one, &at("one"), &[]);
    let last = graph.node("Sub", &at("Sub"), &[total, &one]);
    graph.node("Expand", &at("Expand"), &[&last, &batch])
}

fn to_int32(graph: &mut GraphWriter, name: &str, x: &str) -> String {
    graph.node_with(NodeDef::new("Cast", name).attr_int("to", DataType::Int32.code().into()), name, &[x])
}

/// Cosines and sines of every position that the model was trained for.
fn rotary_caches(graph: &mut GraphWriter) -> Result<(String, String)> {
    let spec = graph.spec();
    let positions = u32::try_from(spec.max_positions).unwrap_or(u32::MAX);
    let (cos, sin) = spec.attention.rotary[0].cos_sin(&(0..positions).collect::<Vec<_>>());
    let width = spec.attention.head_dim / 2;
    Ok((
        graph.table("/model/rotary_emb/cos_cache", cos, width)?,
        graph.table("/model/rotary_emb/sin_cache", sin, width)?,
    ))
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

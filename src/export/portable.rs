//! The `portable` dialect: operators of `ai.onnx` 17 alone, shapes written with 0 and −1 so that they hold with symbolic
//! dimensions.
//!
//! ```text
//! q ─ Reshape ─ Transpose ─ rotary ─┬─ Reshape [B, kv, group, S, d] ─┐
//!                                   │                                ├ MatMul ─ Mul scale ─ Add bias ─ Softmax ─┐
//!                                 query    past ─ Concat ─ Unsqueeze, Transpose ─┘                               │
//!                                            k ──────┘                                                           │
//!           o_proj ◄─ Reshape ─ Transpose ─ output ─ Reshape [B, h, S, d] ─ MatMul values [B, kv, 1, T, d] ◄─────┘
//! ```
//!
//! The query heads of one key-value head are a dimension of their own, over which keys and values broadcast: they are not
//! repeated, and no reshape mixes sequence and cache length, which symbolic analysis could not follow.

use super::Result;
use super::decoder::{Operators, Projected, Residual, attention_bias};
use super::writer::GraphWriter;
use crate::base::WeightRole;
use crate::onnx::{DataType, NodeDef};

/// Tensors that all layers share, by name.
#[derive(Debug, Default)]
pub(super) struct Portable {
    /// `[batch, 1, sequence, head_dim / 2]`.
    cos: String,
    sin: String,
    /// `[batch, 1, 1, sequence, total]`.
    bias: String,
    scale: String,
    two: String,
    epsilon: String,
    half: String,
    to_query_heads: String,
    to_kv_heads: String,
    group: String,
    ungroup: String,
    group_axis: String,
    merge: String,
}

impl Operators for Portable {
    fn prepare(&mut self, graph: &mut GraphWriter) -> Result<()> {
        let attention = &graph.spec().attention;
        let (heads, kv_heads) = (attention.num_heads as i64, attention.num_kv_heads as i64);
        let width = attention.head_dim as i64;
        let bias = attention_bias(graph, true)?;
        (self.cos, self.sin) = rotary_angles(graph)?;
        self.scale = graph.number("/model/constants/scale", attention.scale)?;
        self.two = graph.floats("/model/constants/two", &[], &[2.0]);
        self.epsilon = graph.floats("/model/constants/epsilon", &[], &[graph.spec().norm.epsilon as f32]);
        self.half = graph.integers("/model/constants/rotary_halves", &[width / 2, width / 2]);
        self.to_query_heads = graph.integers("/model/constants/query_heads", &[0, 0, heads, width]);
        self.to_kv_heads = graph.integers("/model/constants/kv_heads", &[0, 0, kv_heads, width]);
        self.group = graph.integers("/model/constants/grouped", &[0, kv_heads, heads / kv_heads, -1, width]);
        self.ungroup = graph.integers("/model/constants/ungrouped", &[0, heads, -1, width]);
        self.group_axis = graph.integers("/model/constants/group_axis", &[2]);
        self.bias = graph.node("Unsqueeze", "/model/mask/Unsqueeze_bias", &[&bias, &self.group_axis]);
        self.merge = graph.integers("/model/constants/merged", &[0, 0, heads * width]);
        Ok(())
    }

    /// In float32, whatever the graph's type.
    fn norm(
        &mut self,
        graph: &mut GraphWriter,
        name: &str,
        residual: &mut Residual,
        role: WeightRole,
    ) -> Result<String> {
        if let Some(pending) = residual.pending.take() {
            residual.stream = graph.node("Add", &format!("{name}/Add_residual"), &[&residual.stream, &pending]);
        }
        let at = |op: &str| format!("{name}/{op}");
        let x = cast(graph, &at("Cast_in"), &residual.stream, DataType::Float);
        let square = graph.node("Pow", &at("Pow"), &[&x, &self.two]);
        let mean = NodeDef::new("ReduceMean", at("ReduceMean")).attr_ints("axes", &[-1]).attr_int("keepdims", 1);
        let mean = graph.node_with(mean, &at("ReduceMean"), &[&square]);
        let shifted = graph.node("Add", &at("Add"), &[&mean, &self.epsilon]);
        let root = graph.node("Sqrt", &at("Sqrt"), &[&shifted]);
        let normed = graph.node("Div", &at("Div"), &[&x, &root]);
        let normed = cast(graph, &at("Cast_out"), &normed, graph.data_type());
        let weight = graph.weight(role)?;
        Ok(graph.node("Mul", &at("Mul"), &[&normed, &weight]))
    }

    fn attention(&mut self, graph: &mut GraphWriter, layer: usize, projected: &Projected) -> Result<String> {
        let at = |op: &str| format!("/model/layers.{layer}/self_attn/{op}");
        let query = heads(graph, &at("q"), &projected.query, &self.to_query_heads);
        let query = self.rotate(graph, &at("q_rotary"), &query);
        let key = heads(graph, &at("k"), &projected.key, &self.to_kv_heads);
        let key = self.rotate(graph, &at("k_rotary"), &key);
        let value = heads(graph, &at("v"), &projected.value, &self.to_kv_heads);
        let key = append(graph, &at("Concat_key"), layer, "key", &key);
        let value = append(graph, &at("Concat_value"), layer, "value", &value);

        let grouped = graph.node("Reshape", &at("Reshape_group"), &[&query, &self.group]);
        let key = graph.node("Unsqueeze", &at("Unsqueeze_key"), &[&key, &self.group_axis]);
        let key = transpose(graph, &at("Transpose_key"), &key, &[0, 1, 2, 4, 3]);
        let scores = graph.node("MatMul", &at("MatMul_scores"), &[&grouped, &key]);
        let scores = graph.node("Mul", &at("Mul_scale"), &[&scores, &self.scale]);
        let scores = graph.node("Add", &at("Add_bias"), &[&scores, &self.bias]);
        let softmax = NodeDef::new("Softmax", at("Softmax")).attr_int("axis", -1);
        let weights = graph.node_with(softmax, &at("Softmax"), &[&scores]);
        let value = graph.node("Unsqueeze", &at("Unsqueeze_value"), &[&value, &self.group_axis]);
        let mixed = graph.node("MatMul", &at("MatMul_values"), &[&weights, &value]);
        let mixed = graph.node("Reshape", &at("Reshape_ungroup"), &[&mixed, &self.ungroup]);
        let mixed = transpose(graph, &at("Transpose_mixed"), &mixed, &[0, 2, 1, 3]);
        Ok(graph.node("Reshape", &at("Reshape_merge"), &[&mixed, &self.merge]))
    }

    /// `Gemm` multiplies by the `[vocab, hidden]` matrix as it stands, so that a tied embedding is stored once.
    fn head(&mut self, graph: &mut GraphWriter, hidden: &str, weight: &str) -> Result<()> {
        let (width, vocab) = (graph.spec().hidden_size as i64, graph.spec().vocab_size as i64);
        let rows = graph.integers("/lm_head/rows", &[-1, width]);
        let hidden = graph.node("Reshape", "/lm_head/Reshape_rows", &[hidden, &rows]);
        let gemm = NodeDef::new("Gemm", "/lm_head/Gemm").attr_int("transB", 1);
        let logits = graph.node_with(gemm, "/lm_head/Gemm", &[&hidden, weight]);
        let shape = graph.node("Shape", "/lm_head/Shape", &["input_ids"]);
        let vocab = graph.integers("/lm_head/vocab", &[vocab]);
        let concat = NodeDef::new("Concat", "/lm_head/Concat").attr_int("axis", 0);
        let shape = graph.node_with(concat, "/lm_head/Concat", &[&shape, &vocab]);
        graph.add(NodeDef::new("Reshape", "/lm_head/Reshape_logits").inputs([logits, shape]).outputs(["logits"]));
        Ok(())
    }
}

impl Portable {
    /// Turns pairs `(i, i + head_dim/2)`: `[x₁cos − x₂sin, x₂cos + x₁sin]`.
    fn rotate(&self, graph: &mut GraphWriter, name: &str, x: &str) -> String {
        let at = |op: &str| format!("{name}/{op}");
        let (first, second) = (at("first"), at("second"));
        graph.add(
            NodeDef::new("Split", at("Split"))
                .attr_int("axis", -1)
                .inputs([x, &self.half])
                .outputs([first.as_str(), second.as_str()]),
        );
        let first_cos = graph.node("Mul", &at("Mul_first_cos"), &[&first, &self.cos]);
        let second_sin = graph.node("Mul", &at("Mul_second_sin"), &[&second, &self.sin]);
        let second_cos = graph.node("Mul", &at("Mul_second_cos"), &[&second, &self.cos]);
        let first_sin = graph.node("Mul", &at("Mul_first_sin"), &[&first, &self.sin]);
        let turned_first = graph.node("Sub", &at("Sub"), &[&first_cos, &second_sin]);
        let turned_second = graph.node("Add", &at("Add"), &[&second_cos, &first_sin]);
        let concat = NodeDef::new("Concat", at("Concat")).attr_int("axis", -1);
        graph.node_with(concat, &at("Concat"), &[&turned_first, &turned_second])
    }
}

/// Cosine and sine of position · frequency in float32, as transformers computes them, then in the graph's type.
fn rotary_angles(graph: &mut GraphWriter) -> Result<(String, String)> {
    let at = |name: &str| format!("/model/rotary_emb/{name}");
    let frequencies = &graph.spec().attention.rotary[0].inv_freq;
    let frequencies = graph.floats(&at("inv_freq"), &[frequencies.len() as i64], frequencies);
    let positions = NodeDef::new("Cast", at("Cast_positions")).attr_int("to", DataType::Float.code().into());
    let positions = graph.node_with(positions, &at("Cast_positions"), &["position_ids"]);
    let axes = graph.integers(&at("axes"), &[1, 3]);
    let positions = graph.node("Unsqueeze", &at("Unsqueeze"), &[&positions, &axes]);
    let angles = graph.node("Mul", &at("Mul"), &[&positions, &frequencies]);
    let cos = graph.node("Cos", &at("Cos"), &[&angles]);
    let sin = graph.node("Sin", &at("Sin"), &[&angles]);
    let float = graph.data_type();
    Ok((cast(graph, &at("Cast_cos"), &cos, float), cast(graph, &at("Cast_sin"), &sin, float)))
}

/// A cast, where one is needed: norms and angles are float32 in a graph of any type.
fn cast(graph: &mut GraphWriter, name: &str, x: &str, to: DataType) -> String {
    if graph.data_type() == DataType::Float {
        return x.to_owned();
    }
    graph.node_with(NodeDef::new("Cast", name).attr_int("to", to.code().into()), name, &[x])
}

/// `[batch, sequence, heads · head_dim]` → `[batch, heads, sequence, head_dim]`.
fn heads(graph: &mut GraphWriter, name: &str, x: &str, shape: &str) -> String {
    let split = graph.node("Reshape", &format!("{name}/Reshape"), &[x, shape]);
    transpose(graph, &format!("{name}/Transpose"), &split, &[0, 2, 1, 3])
}

fn transpose(graph: &mut GraphWriter, name: &str, x: &str, permutation: &[i64]) -> String {
    graph.node_with(NodeDef::new("Transpose", name).attr_ints("perm", permutation), name, &[x])
}

/// Past and new keys or values, which are also the cache's next state.
fn append(graph: &mut GraphWriter, name: &str, layer: usize, part: &str, new: &str) -> String {
    let present = format!("present.{layer}.{part}");
    let past = format!("past_key_values.{layer}.{part}");
    let concat = NodeDef::new("Concat", name).attr_int("axis", 2).inputs([past.as_str(), new]);
    graph.add(concat.outputs([present.as_str()]));
    present
}

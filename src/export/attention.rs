//! Attention of standard operators, shapes written with 0 and −1 so that they hold with symbolic dimensions.
//!
//! ```text
//! q ─ Reshape ─ Transpose ─ (rotary) ─┬─ Reshape [B, kv, group, S, d] ─┐
//!                                     │                                ├ MatMul ─ Mul scale ─ (soft cap) ─ Add bias ─ Softmax ─┐
//!                                   query    past ─ Concat ─ Unsqueeze, Transpose ─┘                                            │
//!                                              k ──────┘                                                                        │
//!             o_proj ◄─ Reshape ─ Transpose ─ output ─ Reshape [B, h, S, d] ─ MatMul values [B, kv, 1, T, d] ◄──────────────────┘
//!
//! soft cap: Div cap ─ Tanh ─ Mul cap
//! ```
//!
//! The query heads of one key-value head are a dimension of their own, over which keys and values broadcast: they are not
//! repeated, and no reshape mixes sequence and cache length, which symbolic analysis could not follow.

use std::collections::BTreeMap;

use super::Result;
use super::decoder::Projected;
use super::mask::Mask;
use super::rotary::{Angles, rotate};
use super::writer::GraphWriter;
use crate::onnx::NodeDef;

/// Tensors that all layers share, by name.
#[derive(Debug)]
pub(super) struct Composed {
    /// By rotary embedding.
    angles: Vec<Angles>,
    /// By window, `[batch, 1, 1, sequence, total]`.
    biases: BTreeMap<Option<usize>, String>,
}

/// The axis of the query heads of one key-value head.
const GROUP: [i64; 1] = [2];

impl Composed {
    pub(super) fn new(graph: &mut GraphWriter) -> Result<Self> {
        let spec = graph.spec();
        let mask = Mask::new(graph);
        let mut biases = BTreeMap::new();
        for layer in &spec.layers {
            if !biases.contains_key(&layer.window) {
                let bias = mask.bias(graph, layer.window)?;
                let name = format!("/model/mask/Unsqueeze_bias_{}", biases.len());
                biases.insert(layer.window, graph.unsqueeze(&name, &bias, &GROUP));
            }
        }
        let rotary = spec.attention.rotary.iter().enumerate();
        let angles = rotary.map(|(index, rotary)| Angles::by_element(graph, index, rotary)).collect();
        Ok(Self { angles, biases })
    }

    /// `[batch, sequence, heads · head_dim]`, mixed values.
    pub(super) fn make(&self, graph: &mut GraphWriter, layer: usize, projected: &Projected) -> Result<String> {
        let attention = &graph.spec().attention;
        let at = |op: &str| format!("/model/layers.{layer}/self_attn/{op}");
        let (heads, kv_heads) = (attention.num_heads as i64, attention.num_kv_heads as i64);
        let width = attention.head_dim as i64;
        let query = split(graph, &at("q"), &projected.query, heads, width);
        let query = self.rotate(graph, &at("q_rotary"), layer, query);
        let key = split(graph, &at("k"), &projected.key, kv_heads, width);
        let key = self.rotate(graph, &at("k_rotary"), layer, key);
        let value = split(graph, &at("v"), &projected.value, kv_heads, width);
        let key = append(graph, &at("Concat_key"), layer, "key", &key);
        let value = append(graph, &at("Concat_value"), layer, "value", &value);

        let grouped = [0, kv_heads, heads / kv_heads, -1, width];
        let grouped = graph.reshape(&at("Reshape_group"), &query, &grouped);
        let key = graph.unsqueeze(&at("Unsqueeze_key"), &key, &GROUP);
        let key = graph.transpose(&at("Transpose_key"), &key, &[0, 1, 2, 4, 3]);
        let scores = graph.node("MatMul", &at("MatMul_scores"), &[&grouped, &key]);
        let scale = graph.number(attention.scale)?;
        let mut scores = graph.node("Mul", &at("Mul_scale"), &[&scores, &scale]);
        if let Some(cap) = attention.softcap {
            scores = softcap(graph, &at("softcap"), &scores, cap)?;
        }
        if let Some(bias) = graph.spec().layers.get(layer).and_then(|layer| self.biases.get(&layer.window)) {
            scores = graph.node("Add", &at("Add_bias"), &[&scores, bias]);
        }
        let softmax = NodeDef::new("Softmax", at("Softmax")).attr_int("axis", -1);
        let weights = graph.node_with(softmax, &at("Softmax"), &[&scores]);
        let value = graph.unsqueeze(&at("Unsqueeze_value"), &value, &GROUP);
        let mixed = graph.node("MatMul", &at("MatMul_values"), &[&weights, &value]);
        let mixed = graph.reshape(&at("Reshape_ungroup"), &mixed, &[0, heads, -1, width]);
        let mixed = graph.transpose(&at("Transpose_mixed"), &mixed, &[0, 2, 1, 3]);
        Ok(graph.reshape(&at("Reshape_merge"), &mixed, &[0, 0, heads * width]))
    }

    fn rotate(&self, graph: &mut GraphWriter, name: &str, layer: usize, x: String) -> String {
        let spec = graph.spec();
        let index = spec.layers.get(layer).and_then(|layer| layer.rotary);
        match index.and_then(|index| Some((spec.attention.rotary.get(index)?, self.angles.get(index)?))) {
            Some((rotary, angles)) => rotate(graph, name, rotary, angles, &x),
            None => x,
        }
    }
}

/// `cap · tanh(x / cap)`.
fn softcap(graph: &mut GraphWriter, name: &str, x: &str, cap: f64) -> Result<String> {
    let cap = graph.number(cap)?;
    let quotient = graph.node("Div", &format!("{name}/Div"), &[x, &cap]);
    let tanh = graph.node("Tanh", &format!("{name}/Tanh"), &[&quotient]);
    Ok(graph.node("Mul", &format!("{name}/Mul"), &[&tanh, &cap]))
}

/// `[batch, sequence, heads · head_dim]` → `[batch, heads, sequence, head_dim]`.
fn split(graph: &mut GraphWriter, name: &str, x: &str, heads: i64, width: i64) -> String {
    let split = graph.reshape(&format!("{name}/Reshape"), x, &[0, 0, heads, width]);
    graph.transpose(&format!("{name}/Transpose"), &split, &[0, 2, 1, 3])
}

/// Past and new keys or values, which are also the cache's next state.
fn append(graph: &mut GraphWriter, name: &str, layer: usize, part: &str, new: &str) -> String {
    let present = format!("present.{layer}.{part}");
    let past = format!("past_key_values.{layer}.{part}");
    let concat = NodeDef::new("Concat", name).attr_int("axis", 2).inputs([past.as_str(), new]);
    graph.add(concat.outputs([present.as_str()]));
    present
}

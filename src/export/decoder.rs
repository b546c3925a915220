//! What every dialect's graph has in common: inputs and outputs, embedding, the wiring of a layer.

use super::norm::{self, NormNode};
use super::writer::GraphWriter;
use super::{Result, head, mlp};
use crate::base::{Activation, Linear, NormSite, QkNormOver, WeightRole, Wiring};
use crate::onnx::{DataType, Dim};

/// Symbolic dimensions.
pub(super) const BATCH: &str = "batch_size";
pub(super) const SEQUENCE: &str = "sequence_length";
pub(super) const PAST: &str = "past_sequence_length";
/// Past and new tokens together. An expression, so that shape inference can unify it with the sum.
pub(super) const TOTAL: &str = "past_sequence_length + sequence_length";

/// Queries, keys and values of a layer, `[batch, sequence, heads · head_dim]`, normalised where the model does so, not yet
/// rotated. Where the dialect [attends to the packed product](Operators::attends_to_packed), `query` is that, and the others are empty.
pub(super) struct Projected {
    pub(super) query: String,
    pub(super) key: String,
    pub(super) value: String,
}

/// The operators in which dialects differ.
pub(super) trait Operators {
    /// Whether the linear maps that read one tensor are one product, `self_attn.qkv_proj` and `mlp.gate_up_proj`.
    fn packs(&self) -> bool {
        false
    }

    /// Whether attention takes queries, keys and values as one product.
    fn attends_to_packed(&self) -> bool {
        false
    }

    /// Normalises `x` over its last dimension.
    fn norm(&mut self, graph: &mut GraphWriter, node: &NormNode, x: &str) -> Result<String> {
        norm::make(graph, node, x)
    }

    /// Adds `block` to `stream` and normalises the sum; returns the normalised tensor and the sum.
    fn add_norm(
        &mut self,
        graph: &mut GraphWriter,
        node: &NormNode,
        stream: &str,
        block: &str,
    ) -> Result<(String, String)> {
        let sum = graph.node("Add", &format!("{}/Add_residual", node.name), &[stream, block]);
        Ok((self.norm(graph, node, &sum)?, sum))
    }

    /// The nonlinearity of the MLP.
    fn activation(&mut self, graph: &mut GraphWriter, name: &str, kind: Activation, x: &str) -> Result<String> {
        mlp::activation(graph, name, kind, x)
    }

    /// Rotates, attends with the cache (`past_key_values.N.*` → `present.N.*`), and returns the mixed values,
    /// `[batch, sequence, heads · head_dim]`.
    fn attention(&mut self, graph: &mut GraphWriter, layer: usize, projected: &Projected) -> Result<String>;

    /// `[batch, sequence, width]` times the transposed `[vocab, width]` matrix, as the tensor `output`.
    fn vocabulary(&mut self, graph: &mut GraphWriter, hidden: &str, matrix: &str, output: &str) -> Result<()>;
}

/// The residual stream, `[batch, sequence, hidden]`: what is in it, and what the last block has yet to add, which the next
/// norm may do along the way.
struct Stream {
    sum: String,
    pending: Option<String>,
}

impl Stream {
    /// Adds a block's output under the name of the node that may be needed for it.
    fn add(&mut self, graph: &mut GraphWriter, name: &str, block: String) -> Result<()> {
        let scale = graph.spec().residual_scale;
        let block = if scale == 1.0 {
            block
        } else {
            let scale = graph.number(scale)?;
            graph.node("Mul", &format!("{name}/Mul_residual"), &[&block, &scale])
        };
        self.settle(graph, &format!("{name}/Add_residual"));
        self.pending = Some(block);
        Ok(())
    }

    /// The sum.
    fn settle(&mut self, graph: &mut GraphWriter, name: &str) -> &str {
        if let Some(block) = self.pending.take() {
            self.sum = graph.node("Add", name, &[&self.sum, &block]);
        }
        &self.sum
    }

    /// The sum normalised; the sum itself where there is no norm.
    fn normed(
        &mut self,
        graph: &mut GraphWriter,
        operators: &mut dyn Operators,
        name: &str,
        node: Option<&NormNode>,
    ) -> Result<String> {
        match (node, self.pending.take()) {
            (None, pending) => {
                self.pending = pending;
                Ok(self.settle(graph, name).to_owned())
            }
            (Some(node), None) => operators.norm(graph, node, &self.sum),
            (Some(node), Some(block)) => {
                let (normed, sum) = operators.add_norm(graph, node, &self.sum, &block)?;
                self.sum = sum;
                Ok(normed)
            }
        }
    }
}

/// Writes the whole decoder.
pub(super) fn write(graph: &mut GraphWriter, operators: &mut dyn Operators) -> Result<()> {
    let embedding = graph.weight(WeightRole::Embedding)?;
    let mut stream = Stream { sum: embed(graph, &embedding)?, pending: None };
    for layer in 0..graph.spec().num_layers {
        write_layer(graph, operators, layer, &mut stream)?;
    }
    let last = NormNode::last(graph);
    let hidden = stream.normed(graph, operators, "/model/Add_residual", last.as_ref())?;
    head::make(graph, operators, &hidden, &embedding)
}

/// Inputs and outputs.
pub(super) fn declare(graph: &mut GraphWriter) {
    let (spec, float) = (graph.spec(), graph.data_type());
    let kv = |length: &str| -> [Dim; 4] {
        let (heads, width) = (spec.attention.num_kv_heads as i64, spec.attention.head_dim as i64);
        [BATCH.into(), heads.into(), length.into(), width.into()]
    };
    graph.input("input_ids", DataType::Int64, [BATCH.into(), SEQUENCE.into()]);
    graph.input("attention_mask", DataType::Int64, [BATCH.into(), TOTAL.into()]);
    if graph.options().takes_positions(spec) {
        graph.input("position_ids", DataType::Int64, [BATCH.into(), SEQUENCE.into()]);
    }
    graph.output("logits", float, [BATCH.into(), SEQUENCE.into(), (spec.vocab_size as i64).into()]);
    for layer in 0..spec.num_layers {
        for part in ["key", "value"] {
            graph.input(&format!("past_key_values.{layer}.{part}"), float, kv(PAST));
            graph.output(&format!("present.{layer}.{part}"), float, kv(TOTAL));
        }
    }
}

/// A table of learned positions is written from position 0 on; a position beyond it is the runtime's own error, as a token
/// id beyond the vocabulary is.
fn embed(graph: &mut GraphWriter, table: &str) -> Result<String> {
    let embedding = graph.spec().embedding.clone();
    let at = |name: &str| format!("/model/embed_tokens/{name}");
    let mut x = graph.node("Gather", &at("Gather"), &[table, "input_ids"]);
    if embedding.width.is_some() {
        x = mlp::matmul(graph, "/model/project_in", WeightRole::EmbeddingProjection, &x)?;
    }
    if let Some(scale) = embedding.scale {
        let scale = graph.number(scale)?;
        x = graph.node("Mul", &at("Mul_scale"), &[&x, &scale]);
    }
    if let Some(learned) = embedding.positions {
        let table = graph.weight_from(WeightRole::Positions, learned.offset)?;
        let positions = graph.node("Gather", "/model/embed_positions/Gather", &[&table, "position_ids"]);
        x = graph.node("Add", "/model/embed_positions/Add", &[&x, &positions]);
    }
    Ok(x)
}

fn write_layer(
    graph: &mut GraphWriter,
    operators: &mut dyn Operators,
    layer: usize,
    stream: &mut Stream,
) -> Result<()> {
    let at = |name: &str| format!("/model/layers.{layer}/{name}");
    let (to_attention, to_mlp) = (at("self_attn/Add_input"), at("mlp/Add_input"));
    let norm_at = |graph: &GraphWriter, site| NormNode::of_layer(graph, layer, site);
    let (first, second) = (norm_at(graph, NormSite::Attention), norm_at(graph, NormSite::Mlp));
    match graph.spec().wiring {
        Wiring::PreNorm | Wiring::PostNorm | Wiring::SandwichNorm => {
            let x = stream.normed(graph, operators, &to_attention, first.as_ref())?;
            let mixed = attention(graph, operators, layer, &x)?;
            let mixed = output_norm(graph, operators, layer, NormSite::AttentionOutput, mixed)?;
            stream.add(graph, &at("self_attn"), mixed)?;
            let x = stream.normed(graph, operators, &to_mlp, second.as_ref())?;
            let fed = mlp::make(graph, operators, layer, &x)?;
            let fed = output_norm(graph, operators, layer, NormSite::MlpOutput, fed)?;
            stream.add(graph, &at("mlp"), fed)
        }
        Wiring::SumNorm => {
            let mixed = attention(graph, operators, layer, &stream.sum)?;
            stream.add(graph, &at("self_attn"), mixed)?;
            stream.sum = stream.normed(graph, operators, &to_mlp, first.as_ref())?;
            let fed = mlp::make(graph, operators, layer, &stream.sum)?;
            stream.add(graph, &at("mlp"), fed)?;
            stream.sum = stream.normed(graph, operators, &at("Add_output"), second.as_ref())?;
            Ok(())
        }
        Wiring::Parallel | Wiring::ParallelSharedNorm => {
            let x = stream.normed(graph, operators, &to_attention, first.as_ref())?;
            let mixed = attention(graph, operators, layer, &x)?;
            let x = match &second {
                Some(norm) => operators.norm(graph, norm, &stream.sum)?,
                None => x,
            };
            let fed = mlp::make(graph, operators, layer, &x)?;
            stream.add(graph, &at("self_attn"), mixed)?;
            stream.add(graph, &at("mlp"), fed)
        }
    }
}

fn output_norm(
    graph: &mut GraphWriter,
    operators: &mut dyn Operators,
    layer: usize,
    site: NormSite,
    x: String,
) -> Result<String> {
    match NormNode::of_layer(graph, layer, site) {
        Some(node) => operators.norm(graph, &node, &x),
        None => Ok(x),
    }
}

fn attention(graph: &mut GraphWriter, operators: &mut dyn Operators, layer: usize, x: &str) -> Result<String> {
    let maps = ("self_attn.qkv_proj", [Linear::Query, Linear::Key, Linear::Value]);
    let projected = if operators.attends_to_packed() && graph.spec().attention.qk_norm.is_none() {
        let query = mlp::packed(graph, layer, maps, x)?;
        Projected { query, key: String::new(), value: String::new() }
    } else {
        let [query, key, value] = mlp::linears(graph, operators, layer, maps, x)?;
        let (heads, kv_heads) = (graph.spec().attention.num_heads, graph.spec().attention.num_kv_heads);
        let query = qk_norm(graph, operators, layer, (NormSite::Query, heads), query)?;
        let key = qk_norm(graph, operators, layer, (NormSite::Key, kv_heads), key)?;
        Projected { query, key, value }
    };
    let mixed = operators.attention(graph, layer, &projected)?;
    mlp::linear(graph, layer, Linear::AttentionOutput, &mixed)
}

/// Queries or keys normalised where the model does so:
/// ```text
/// x ─ Reshape [B, S, heads, head_dim] ─ norm ─ Reshape [B, S, heads · head_dim]
/// ```
/// without reshaping where the norm is over the whole projection.
fn qk_norm(
    graph: &mut GraphWriter,
    operators: &mut dyn Operators,
    layer: usize,
    (site, heads): (NormSite, usize),
    x: String,
) -> Result<String> {
    let attention = &graph.spec().attention;
    let (Some(node), Some(qk)) = (NormNode::of_layer(graph, layer, site), attention.qk_norm) else { return Ok(x) };
    if qk.over == QkNormOver::Projection {
        return operators.norm(graph, &node, &x);
    }
    let (heads, width) = (heads as i64, attention.head_dim as i64);
    let split = graph.reshape(&format!("{}/Reshape_split", node.name), &x, &[0, 0, heads, width]);
    let normed = operators.norm(graph, &node, &split)?;
    Ok(graph.reshape(&format!("{}/Reshape_merge", node.name), &normed, &[0, 0, heads * width]))
}

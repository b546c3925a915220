//! Norms of standard operators.

use super::Result;
use super::writer::GraphWriter;
use crate::base::{Norm, NormKind, NormSite, QkNormOver, WeightRole};
use crate::onnx::{DataType, NodeDef};

/// A norm to be written.
pub(super) struct NormNode {
    /// Of its nodes.
    pub(super) name: String,
    pub(super) norm: Norm,
    /// Whether the weight has one dimension, as the norm operators ask for.
    pub(super) one_weight: bool,
    weight: WeightRole,
    bias: WeightRole,
}

impl NormNode {
    /// A norm of a layer; none where the layer does not normalise there.
    pub(super) fn of_layer(graph: &GraphWriter, layer: usize, site: NormSite) -> Option<Self> {
        let spec = graph.spec();
        let (_, norm) = spec.norms().into_iter().find(|(known, _)| *known == site)?;
        let own = spec.attention.qk_norm.is_some_and(|qk| qk.over == QkNormOver::HeadOwnWeight);
        let one_weight = !(own && matches!(site, NormSite::Query | NormSite::Key));
        let weight = WeightRole::Norm(layer, site);
        let name = format!("/model/layers.{layer}/{}", module(&weight.name(), layer));
        Some(Self { name, norm, one_weight, weight, bias: WeightRole::NormBias(layer, site) })
    }

    /// The norm after the last layer.
    pub(super) fn last(graph: &GraphWriter) -> Option<Self> {
        let spec = graph.spec();
        let (weight, bias) = (WeightRole::FinalNorm, WeightRole::FinalNormBias);
        spec.final_norm.then(|| Self { name: "/model/norm".into(), norm: spec.norm, one_weight: true, weight, bias })
    }

    /// The weight, its offset added.
    pub(super) fn weight(&self, graph: &mut GraphWriter) -> Result<String> {
        graph.shifted_weight(self.weight, self.norm.weight_offset)
    }

    pub(super) fn bias(&self, graph: &mut GraphWriter) -> Result<Option<String>> {
        self.norm.bias.then(|| graph.weight(self.bias)).transpose()
    }
}

/// `model.layers.3.self_attn.q_norm.weight` → `self_attn/q_norm`.
fn module(weight: &str, layer: usize) -> String {
    let module = weight.strip_prefix(&format!("model.layers.{layer}.")).unwrap_or(weight);
    module.strip_suffix(".weight").unwrap_or(module).replace('.', "/")
}

/// Over the last dimension, in float32 whatever the graph's type.
pub(super) fn make(graph: &mut GraphWriter, node: &NormNode, x: &str) -> Result<String> {
    if node.norm.kind == NormKind::Layer && node.one_weight { layer(graph, node, x) } else { composed(graph, node, x) }
}

/// The operator of opset 17; it computes in float32 (`stash_type` = 1).
fn layer(graph: &mut GraphWriter, node: &NormNode, x: &str) -> Result<String> {
    let name = format!("{}/LayerNormalization", node.name);
    let norm = NodeDef::new("LayerNormalization", name.as_str())
        .attr_int("axis", -1)
        .attr_float("epsilon", node.norm.epsilon as f32);
    let (weight, bias) = (node.weight(graph)?, node.bias(graph)?);
    let inputs = [Some(x), Some(weight.as_str()), bias.as_deref()];
    Ok(graph.node_with(norm, &name, &inputs.into_iter().flatten().collect::<Vec<_>>()))
}

/// ```text
/// x ─ (Cast) ─ (Sub mean) ─┬─ Pow 2 ─ ReduceMean ─ Add epsilon ─ Sqrt ─┐
///                          └────────────────────────────────────────── Div ─ (Cast) ─ Mul weight ─ (Add bias)
/// ```
fn composed(graph: &mut GraphWriter, node: &NormNode, x: &str) -> Result<String> {
    let at = |op: &str| format!("{}/{op}", node.name);
    let mean = |graph: &mut GraphWriter, op: &str, x: &str| {
        let mean = NodeDef::new("ReduceMean", at(op)).attr_ints("axes", &[-1]).attr_int("keepdims", 1);
        graph.node_with(mean, &at(op), &[x])
    };
    let mut x = graph.cast(&at("Cast_in"), x, DataType::Float);
    if node.norm.kind == NormKind::Layer {
        let centre = mean(graph, "ReduceMean_centre", &x);
        x = graph.node("Sub", &at("Sub"), &[&x, &centre]);
    }
    let (two, epsilon) = (graph.float(2.0), graph.float(node.norm.epsilon as f32));
    let square = graph.node("Pow", &at("Pow"), &[&x, &two]);
    let variance = mean(graph, "ReduceMean", &square);
    let shifted = graph.node("Add", &at("Add"), &[&variance, &epsilon]);
    let root = graph.node("Sqrt", &at("Sqrt"), &[&shifted]);
    let normed = graph.node("Div", &at("Div"), &[&x, &root]);
    let float = graph.data_type();
    let normed = graph.cast(&at("Cast_out"), &normed, float);
    let weight = node.weight(graph)?;
    let scaled = graph.node("Mul", &at("Mul"), &[&normed, &weight]);
    Ok(match node.bias(graph)? {
        Some(bias) => graph.node("Add", &at("Add_bias"), &[&scaled, &bias]),
        None => scaled,
    })
}

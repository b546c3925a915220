//! What every dialect's graph has in common: inputs and outputs, embedding, projections, MLP, output projection.

use super::Result;
use super::writer::GraphWriter;
use crate::base::{Activation, Linear, NormSite, WeightRole};
use crate::onnx::{DataType, Dim, NodeDef};

/// Symbolic dimensions.
pub(super) const BATCH: &str = "batch_size";
pub(super) const SEQUENCE: &str = "sequence_length";
pub(super) const PAST: &str = "past_sequence_length";
/// Past and new tokens together. An expression, so that shape inference can unify it with the sum.
pub(super) const TOTAL: &str = "past_sequence_length + sequence_length";

/// The residual stream between blocks: what is in it, and what the last block has yet to add.
pub(super) struct Residual {
    /// The stream, `[batch, sequence, hidden]`.
    pub(super) stream: String,
    /// A block's output that is not added yet.
    pub(super) pending: Option<String>,
}

/// Projected queries, keys and values of a layer, `[batch, sequence, heads · head_dim]`, not yet rotated.
pub(super) struct Projected {
    pub(super) query: String,
    pub(super) key: String,
    pub(super) value: String,
}

/// The operators in which dialects differ.
pub(super) trait Operators {
    /// Adds what all layers share: masks, rotary angles.
    fn prepare(&mut self, graph: &mut GraphWriter) -> Result<()>;

    /// Adds what is pending to the stream and normalises it; returns the normalised tensor.
    fn norm(
        &mut self,
        graph: &mut GraphWriter,
        name: &str,
        residual: &mut Residual,
        role: WeightRole,
    ) -> Result<String>;

    /// Rotates, attends with the cache (`past_key_values.N.*` → `present.N.*`), and returns the mixed values,
    /// `[batch, sequence, heads · head_dim]`.
    fn attention(&mut self, graph: &mut GraphWriter, layer: usize, projected: &Projected) -> Result<String>;

    /// Logits of normalised hidden states, as the output named `logits`.
    fn head(&mut self, graph: &mut GraphWriter, hidden: &str, weight: &str) -> Result<()>;
}

/// Writes the whole decoder.
pub(super) fn write(graph: &mut GraphWriter, mut operators: impl Operators) -> Result<()> {
    let spec = graph.spec();
    declare(graph);
    operators.prepare(graph)?;
    let embedding = graph.weight(WeightRole::Embedding)?;
    let stream = graph.node("Gather", "/model/embed_tokens/Gather", &[&embedding, "input_ids"]);
    let mut residual = Residual { stream, pending: None };
    for layer in 0..spec.num_layers {
        let at = |name: &str| format!("/model/layers.{layer}/{name}");
        let role = WeightRole::Norm(layer, NormSite::Attention);
        let normed = operators.norm(graph, &at("input_layernorm"), &mut residual, role)?;
        let projected = Projected {
            query: linear(graph, layer, Linear::Query, &normed)?,
            key: linear(graph, layer, Linear::Key, &normed)?,
            value: linear(graph, layer, Linear::Value, &normed)?,
        };
        let mixed = operators.attention(graph, layer, &projected)?;
        residual.pending = Some(linear(graph, layer, Linear::AttentionOutput, &mixed)?);
        let role = WeightRole::Norm(layer, NormSite::Mlp);
        let normed = operators.norm(graph, &at("post_attention_layernorm"), &mut residual, role)?;
        residual.pending = Some(mlp(graph, layer, &normed)?);
    }
    let hidden = operators.norm(graph, "/model/norm", &mut residual, WeightRole::FinalNorm)?;
    let head = if spec.head.tied { embedding } else { graph.weight(WeightRole::Head)? };
    operators.head(graph, &hidden, &head)
}

fn declare(graph: &mut GraphWriter) {
    let (spec, float) = (graph.spec(), graph.data_type());
    let kv = |length: &str| -> [Dim; 4] {
        let (heads, width) = (spec.attention.num_kv_heads as i64, spec.attention.head_dim as i64);
        [BATCH.into(), heads.into(), length.into(), width.into()]
    };
    graph.input("input_ids", DataType::Int64, [BATCH.into(), SEQUENCE.into()]);
    graph.input("attention_mask", DataType::Int64, [BATCH.into(), TOTAL.into()]);
    graph.input("position_ids", DataType::Int64, [BATCH.into(), SEQUENCE.into()]);
    graph.output("logits", float, [BATCH.into(), SEQUENCE.into(), (spec.vocab_size as i64).into()]);
    for layer in 0..spec.num_layers {
        for part in ["key", "value"] {
            graph.input(&format!("past_key_values.{layer}.{part}"), float, kv(PAST));
            graph.output(&format!("present.{layer}.{part}"), float, kv(TOTAL));
        }
    }
}

fn linear(graph: &mut GraphWriter, layer: usize, linear: Linear, x: &str) -> Result<String> {
    let name = format!("/model/layers.{layer}/{}", linear.module().replace('.', "/"));
    let weight = graph.transposed_weight(WeightRole::Weight(layer, linear))?;
    let product = graph.node("MatMul", &format!("{name}/MatMul"), &[x, &weight]);
    if !graph.spec().has_bias(linear) {
        return Ok(product);
    }
    let bias = graph.weight(WeightRole::Bias(layer, linear))?;
    Ok(graph.node("Add", &format!("{name}/Add"), &[&product, &bias]))
}

fn mlp(graph: &mut GraphWriter, layer: usize, x: &str) -> Result<String> {
    let at = |name: &str| format!("/model/layers.{layer}/mlp/{name}");
    let gate = linear(graph, layer, Linear::Gate, x)?;
    let up = linear(graph, layer, Linear::Up, x)?;
    let gate = activation(graph, &at("act_fn"), graph.spec().mlp.activation, &gate)?;
    let product = graph.node("Mul", &at("Mul"), &[&gate, &up]);
    linear(graph, layer, Linear::Down, &product)
}

/// Composed from operators of opset 17: `Gelu` came with opset 20.
fn activation(graph: &mut GraphWriter, name: &str, activation: Activation, x: &str) -> Result<String> {
    let at = |op: &str| format!("{name}/{op}");
    let product = |graph: &mut GraphWriter, op: &str, a: &str, b: &str| graph.node("Mul", &at(op), &[a, b]);
    Ok(match activation {
        Activation::Relu => graph.node("Relu", &at("Relu"), &[x]),
        Activation::Silu => {
            let sigmoid = graph.node("Sigmoid", &at("Sigmoid"), &[x]);
            product(graph, "Mul", x, &sigmoid)
        }
        Activation::Gelu => {
            let root_half = graph.number(&at("root_half"), std::f64::consts::FRAC_1_SQRT_2)?;
            let scaled = product(graph, "Mul_scale", x, &root_half);
            let erf = graph.node("Erf", &at("Erf"), &[&scaled]);
            half_of_one_plus(graph, name, x, &erf)?
        }
        Activation::GeluTanh => {
            let (cubic, root) = (graph.number(&at("cubic"), 0.044_715)?, (2.0 / std::f64::consts::PI).sqrt());
            let root = graph.number(&at("root_two_over_pi"), root)?;
            let square = product(graph, "Mul_square", x, x);
            let cube = product(graph, "Mul_cube", &square, x);
            let cube = product(graph, "Mul_cubic", &cube, &cubic);
            let sum = graph.node("Add", &at("Add_cubic"), &[x, &cube]);
            let scaled = product(graph, "Mul_scale", &sum, &root);
            let tanh = graph.node("Tanh", &at("Tanh"), &[&scaled]);
            half_of_one_plus(graph, name, x, &tanh)?
        }
    })
}

/// `x · 0.5 · (1 + y)`.
fn half_of_one_plus(graph: &mut GraphWriter, name: &str, x: &str, y: &str) -> Result<String> {
    let at = |op: &str| format!("{name}/{op}");
    let (one, half) = (graph.number(&at("one"), 1.0)?, graph.number(&at("half"), 0.5)?);
    let sum = graph.node("Add", &at("Add"), &[y, &one]);
    let product = graph.node("Mul", &at("Mul"), &[x, &sum]);
    Ok(graph.node("Mul", &at("Mul_half"), &[&product, &half]))
}

/// Key positions `0..total` and query positions `past..total`, compared: `[1, 1, sequence, total]`, true where the key
/// is not in the query's future; and the mask's own `[batch, 1, 1, total]`. Returns the bias that hides the rest,
/// `[batch, 1, sequence, total]`.
pub(super) fn attention_bias(graph: &mut GraphWriter, causal: bool) -> Result<String> {
    let at = |name: &str| format!("/model/mask/{name}");
    let float = graph.data_type();
    // half of float16's range, so that a sum with a score stays finite; its exponential is zero all the same
    let lowest = if float == DataType::Float16 { -32752.0 } else { f64::from(f32::MIN) };
    let (zero, lowest) = (graph.number(&at("zero"), 0.0)?, graph.number(&at("lowest"), lowest)?);
    let padding_axes = graph.integers(&at("padding_axes"), &[1, 2]);
    let real = NodeDef::new("Cast", at("Cast_real")).attr_int("to", DataType::Bool.code().into());
    let real = graph.node_with(real, &at("Cast_real"), &["attention_mask"]);
    let mut visible = graph.node("Unsqueeze", &at("Unsqueeze_real"), &[&real, &padding_axes]);
    if causal {
        let query = query_index(graph, &at)?;
        let length = dimension(graph, &at("total"), "attention_mask", 1);
        let keys = range(graph, &at("keys"), None, &length);
        let causal = graph.node("LessOrEqual", &at("LessOrEqual"), &[&keys, &query]);
        visible = graph.node("And", &at("And"), &[&visible, &causal]);
    }
    let bias = graph.node("Where", &at("Where"), &[&visible, &zero, &lowest]);
    Ok(bias)
}

/// `past..total` as a column, `[sequence, 1]`.
fn query_index(graph: &mut GraphWriter, at: &impl Fn(&str) -> String) -> Result<String> {
    let past = dimension(graph, &at("past"), "past_key_values.0.key", 2);
    let total = dimension(graph, &at("end"), "attention_mask", 1);
    let range = range(graph, &at("queries"), Some(&past), &total);
    let axis = graph.integers(&at("column"), &[1]);
    Ok(graph.node("Unsqueeze", &at("Unsqueeze_queries"), &[&range, &axis]))
}

/// One dimension of a tensor as a scalar.
pub(super) fn dimension(graph: &mut GraphWriter, name: &str, tensor: &str, axis: i64) -> String {
    let shape = graph.node("Shape", &format!("{name}/Shape"), &[tensor]);
    let index = graph.integer(&format!("{name}/axis"), axis);
    let gather = NodeDef::new("Gather", format!("{name}/Gather")).attr_int("axis", 0);
    graph.node_with(gather, &format!("{name}/Gather"), &[&shape, &index])
}

fn range(graph: &mut GraphWriter, name: &str, start: Option<&str>, end: &str) -> String {
    let start = match start {
        Some(start) => start.to_owned(),
        None => graph.integer(&format!("{name}/start"), 0),
    };
    let step = graph.integer(&format!("{name}/step"), 1);
    graph.node("Range", &format!("{name}/Range"), &[&start, end, &step])
}

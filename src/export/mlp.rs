//! Linear maps and the feed-forward block.

use super::Result;
use super::decoder::Operators;
use super::writer::GraphWriter;
use crate::base::{Activation, Linear, WeightRole};
use crate::onnx::NodeDef;

/// `x · Wᵀ`, and the bias where there is one.
pub(super) fn linear(graph: &mut GraphWriter, layer: usize, linear: Linear, x: &str) -> Result<String> {
    let name = format!("/model/layers.{layer}/{}", linear.module().replace('.', "/"));
    let product = matmul(graph, &name, WeightRole::Weight(layer, linear), x)?;
    if !graph.spec().has_bias(linear) {
        return Ok(product);
    }
    let bias = graph.weight(WeightRole::Bias(layer, linear))?;
    Ok(graph.node("Add", &format!("{name}/Add"), &[&product, &bias]))
}

/// `x · Wᵀ` of an `[out, in]` matrix.
pub(super) fn matmul(graph: &mut GraphWriter, name: &str, role: WeightRole, x: &str) -> Result<String> {
    let weight = graph.transposed_weight(role)?;
    Ok(graph.node("MatMul", &format!("{name}/MatMul"), &[x, &weight]))
}

/// Maps of the same input, and the name of the module that is all of them.
pub(super) type Maps<const N: usize> = (&'static str, [Linear; N]);

/// Several maps of the same input, each by itself or, where the dialect packs them, as one product:
/// ```text
/// x ─ MatMul [Wᵀ | Wᵀ | …] ─ (Add) ─ Split ─► the products
/// ```
pub(super) fn linears<const N: usize>(
    graph: &mut GraphWriter,
    operators: &dyn Operators,
    layer: usize,
    (module, maps): Maps<N>,
    x: &str,
) -> Result<[String; N]> {
    let mut products = maps.map(|_| String::new());
    if !operators.packs() {
        for (product, map) in products.iter_mut().zip(maps) {
            *product = linear(graph, layer, map, x)?;
        }
        return Ok(products);
    }
    let packed = packed(graph, layer, (module, maps), x)?;
    let widths = maps.map(|map| graph.spec().linear_shape(map)[0] as i64);
    let widths = graph.integers(&widths);
    for (product, map) in products.iter_mut().zip(maps) {
        *product = format!("/model/layers.{layer}/{}/output_0", map.module().replace('.', "/"));
    }
    let name = format!("/model/layers.{layer}/{}/Split", module.replace('.', "/"));
    let split = NodeDef::new("Split", name).attr_int("axis", -1);
    graph.add(split.inputs([&packed, &widths]).outputs(products.iter().map(String::as_str)));
    Ok(products)
}

/// Several maps of the same input as one product, behind each other in its last dimension.
pub(super) fn packed<const N: usize>(
    graph: &mut GraphWriter,
    layer: usize,
    (module, maps): Maps<N>,
    x: &str,
) -> Result<String> {
    let name = format!("/model/layers.{layer}/{}", module.replace('.', "/"));
    let stem = format!("model.layers.{layer}.{module}");
    let weight = graph.packed_transposed_weight(&stem, &maps.map(|map| WeightRole::Weight(layer, map)))?;
    let product = graph.node("MatMul", &format!("{name}/MatMul"), &[x, &weight]);
    if !maps.iter().any(|map| graph.spec().has_bias(*map)) {
        return Ok(product);
    }
    let bias = graph.packed_weight(&format!("{stem}.bias"), &maps.map(|map| WeightRole::Bias(layer, map)))?;
    Ok(graph.node("Add", &format!("{name}/Add"), &[&product, &bias]))
}

pub(super) fn make(graph: &mut GraphWriter, operators: &mut dyn Operators, layer: usize, x: &str) -> Result<String> {
    let at = |name: &str| format!("/model/layers.{layer}/mlp/{name}");
    let mlp = &graph.spec().mlp;
    let inner = if mlp.gated {
        let maps = ("mlp.gate_up_proj", [Linear::Gate, Linear::Up]);
        let [gate, up] = linears(graph, operators, layer, maps, x)?;
        let gate = operators.activation(graph, &at("act_fn"), mlp.activation, &gate)?;
        graph.node("Mul", &at("Mul"), &[&gate, &up])
    } else {
        let up = linear(graph, layer, Linear::Up, x)?;
        operators.activation(graph, &at("act_fn"), mlp.activation, &up)?
    };
    linear(graph, layer, Linear::Down, &inner)
}

/// Composed from operators of opset 17: `Gelu` came with opset 20.
pub(super) fn activation(graph: &mut GraphWriter, name: &str, activation: Activation, x: &str) -> Result<String> {
    let at = |op: &str| format!("{name}/{op}");
    let product = |graph: &mut GraphWriter, op: &str, a: &str, b: &str| graph.node("Mul", &at(op), &[a, b]);
    Ok(match activation {
        Activation::Relu => graph.node("Relu", &at("Relu"), &[x]),
        Activation::Silu => {
            let sigmoid = graph.node("Sigmoid", &at("Sigmoid"), &[x]);
            product(graph, "Mul", x, &sigmoid)
        }
        Activation::Gelu => {
            let root_half = graph.number(std::f64::consts::FRAC_1_SQRT_2)?;
            let scaled = product(graph, "Mul_scale", x, &root_half);
            let erf = graph.node("Erf", &at("Erf"), &[&scaled]);
            half_of_one_plus(graph, name, x, &erf)?
        }
        Activation::GeluTanh => {
            let cubic = graph.number(0.044_715)?;
            let root = graph.number((2.0 / std::f64::consts::PI).sqrt())?;
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
    let (one, half) = (graph.number(1.0)?, graph.number(0.5)?);
    let sum = graph.node("Add", &at("Add"), &[y, &one]);
    let product = graph.node("Mul", &at("Mul"), &[x, &sum]);
    Ok(graph.node("Mul", &at("Mul_half"), &[&product, &half]))
}

//! One linear map of constant weights, in the operators that exporters and quantisers write it with.
//!
//! ```text
//! x ─ MatMul W | MatMul (Transpose | Cast | DequantizeLinear)* W | Gemm W b | FusedMatMul W | MatMulNBits ─ product
//! x ─ QuantizeLinear ─ DequantizeLinear ─ MatMul (DequantizeLinear W) ─ (QuantizeLinear ─ DequantizeLinear) ─ product
//! x ─ DynamicQuantizeLinear ─ MatMulInteger W ─ Cast ─ Mul scale ─ product
//! x ─ DynamicQuantizeMatMul W ─ product
//! x ─ QuantizeLinear ─ QLinearMatMul W ─ DequantizeLinear ─ product
//! ```
//! Other products with constant weights are [`unreadable`], and say why.

use serde::Serialize;

use crate::fold::locate::shape;
use crate::onnx::{Index, Node, NodeId, TensorInfo, Use};

const MICROSOFT: &str = "com.microsoft";
/// Nodes between a weight and the product that reads it.
const MAX_WRAPS: usize = 8;

/// How a weight is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightStorage {
    /// As floats, one tensor of two dimensions.
    Float,
    /// As integers with scales.
    Quantized,
}

/// A linear map in the graph.
#[derive(Clone, Debug, Serialize)]
pub struct LinearNode {
    /// The node that multiplies.
    #[serde(skip)]
    pub id: NodeId,
    /// Its name, or that of its output where it has none.
    pub name: String,
    /// Its operator.
    pub op_type: String,
    /// The initializer.
    pub weight: String,
    /// Whether that is `[out, in]`.
    pub transposed: bool,
    /// How it is kept.
    pub storage: WeightStorage,
    /// The node and slot that read the initializer.
    #[serde(skip)]
    pub weight_use: Use,
    /// A bias inside the node, so that the product holds it.
    pub bias: Option<String>,
    /// What the node multiplies its product by: that of a branch beside it must be multiplied by too.
    pub scale: f32,
    /// The float tensor that is multiplied.
    pub input: String,
    /// The float product.
    pub product: String,
    /// What reads the product.
    #[serde(skip)]
    pub readers: Vec<Use>,
    /// Outputs of the map; all parts together where it is packed.
    pub width: Option<usize>,
}

/// What a node multiplies, as far as it is a product with constant weights.
struct Parts<'g> {
    weight_slot: usize,
    transposed: bool,
    bias: Option<&'g str>,
    scale: f32,
    width: Option<usize>,
    quantized: bool,
}

/// The linear map that a node computes; `None` where it does not, or not with constant weights.
pub(super) fn linear<'g>(index: &Index<'g>, node: &'g Node) -> Option<LinearNode> {
    let parts = parts(index, node)?;
    let Constant { name, tensor: weight, read_at: weight_use, flips, wrapped } =
        constant(index, node, parts.weight_slot)?;
    let storage = if parts.quantized || wrapped { WeightStorage::Quantized } else { WeightStorage::Float };
    let transposed = parts.transposed != flips;
    let width = parts.width.or_else(|| {
        let [rows, columns] = *weight.dims() else { return None };
        usize::try_from(if transposed { rows } else { columns }).ok()
    });
    // a weight of two dimensions, or blocks of a quantiser
    (weight.dims().len() == 2 || parts.width.is_some()).then_some(())?;
    let (input, product) = (float_input(index, node)?, float_product(index, node)?);
    Some(LinearNode {
        id: node.id(),
        name: if node.name().is_empty() { product.to_owned() } else { node.name().to_owned() },
        op_type: node.op_type().to_owned(),
        weight: name.to_owned(),
        transposed,
        storage,
        weight_use,
        bias: parts.bias.filter(|bias| !bias.is_empty()).map(str::to_owned),
        scale: parts.scale,
        input: input.to_owned(),
        readers: index.consumers(product).to_vec(),
        product: product.to_owned(),
        width,
    })
}

/// A product with constant weights that is none of these maps.
#[derive(Clone, Debug)]
pub(super) struct Unreadable {
    /// Why.
    pub(super) reason: String,
    /// What it multiplies.
    pub(super) input: String,
}

/// What hinders a product with constant weights from being a linear map; `None` where a node is no such product.
pub(super) fn unreadable(index: &Index, node: &Node) -> Option<Unreadable> {
    let is_weight = |slot: usize| node.input(slot).is_some_and(|input| shape::is_weight(index, input));
    let slot = if node.op_type() == "QLinearMatMul" { 3 } else { 1 };
    if !shape::is_product(node) || !(is_weight(0) || is_weight(slot)) {
        return None;
    }
    let number = |name: &str| node.attribute(name).and_then(|a| a.as_float()).unwrap_or(1.0);
    let flag = |name: &str| node.attribute(name).and_then(|a| a.as_int()).unwrap_or(0) != 0;
    let why = match node.op_type() {
        "FusedGemm" => "an activation is inside it".to_owned(),
        "QLinearMatMul" | "QGemm" | "MatMulInteger" | "MatMulIntegerToFloat" => {
            "what it reads or makes is not turned from or into floats beside it".to_owned()
        }
        _ if is_weight(0) => "its weights stand on the left".to_owned(),
        _ if number("beta") != 1.0 => format!("it scales its bias (beta = {})", number("beta")),
        _ if flag("transA") => "it transposes its input (transA = 1)".to_owned(),
        _ => "its weights are not one matrix".to_owned(),
    };
    let name = if node.name().is_empty() { node.output(0).unwrap_or_default() } else { node.name() };
    let reason = format!("`{name}` ({}) stands in its place: {why}", node.op_type());
    let input = node.input(usize::from(is_weight(0)))?;
    Some(Unreadable { reason, input: input.to_owned() })
}

fn parts<'g>(index: &Index, node: &'g Node) -> Option<Parts<'g>> {
    let integer = |name: &str| node.attribute(name).and_then(|a| a.as_int()).unwrap_or(0);
    let number = |name: &str| node.attribute(name).and_then(|a| a.as_float()).unwrap_or(1.0);
    let plain = Parts { weight_slot: 1, transposed: false, bias: None, scale: 1.0, width: None, quantized: false };
    match (node.domain(), node.op_type()) {
        ("", "MatMul") => Some(plain),
        ("", "Gemm") if integer("transA") == 0 && number("beta") == 1.0 => {
            Some(Parts { transposed: integer("transB") != 0, bias: node.input(2), scale: number("alpha"), ..plain })
        }
        (MICROSOFT, "FusedMatMul") if integer("transA") == 0 => {
            Some(Parts { transposed: integer("transB") != 0, scale: number("alpha"), ..plain })
        }
        (MICROSOFT, "MatMulNBits") => {
            let width = usize::try_from(integer("N")).ok()?;
            Some(Parts { transposed: true, bias: node.input(5), width: Some(width), quantized: true, ..plain })
        }
        ("", "QLinearMatMul") => {
            let behind = index.producer(node.input(0)?)?;
            behind.is("", "QuantizeLinear").then_some(Parts { weight_slot: 3, quantized: true, ..plain })
        }
        (MICROSOFT, "DynamicQuantizeMatMul") => Some(Parts { bias: node.input(4), quantized: true, ..plain }),
        ("", "MatMulInteger") => {
            let behind = index.producer(node.input(0)?)?;
            behind.is("", "DynamicQuantizeLinear").then_some(Parts { quantized: true, ..plain })
        }
        _ => None,
    }
}

/// A constant behind a node's input.
struct Constant<'g> {
    name: &'g str,
    tensor: &'g TensorInfo,
    read_at: Use,
    /// Whether it is transposed on the way.
    flips: bool,
    /// Whether it is dequantised.
    wrapped: bool,
}

fn constant<'g>(index: &Index<'g>, node: &'g Node, slot: usize) -> Option<Constant<'g>> {
    let mut name = node.input(slot)?;
    let mut read_at = Use { node: node.id(), slot };
    let (mut flips, mut wrapped) = (false, false);
    for _ in 0..MAX_WRAPS {
        if let Some(tensor) = shape::constant(index, name) {
            return Some(Constant { name, tensor, read_at, flips, wrapped });
        }
        let wrap = index.producer(name)?;
        match wrap.op_type() {
            "Transpose" => {
                let order = wrap.attribute("perm").and_then(|a| a.as_ints());
                order.is_none_or(|order| order == [1, 0]).then_some(())?;
                flips = !flips;
            }
            "DequantizeLinear" | "QuantizeLinear" => wrapped = true,
            "Cast" | "Identity" => {}
            _ => return None,
        }
        read_at = Use { node: wrap.id(), slot: 0 };
        name = wrap.input(0)?;
    }
    None
}

/// The input before it was quantised.
fn float_input<'g>(index: &Index<'g>, node: &'g Node) -> Option<&'g str> {
    let input = node.input(0)?;
    let Some(behind) = index.producer(input) else { return Some(input) };
    match behind.op_type() {
        "DynamicQuantizeLinear" => behind.input(0),
        "QuantizeLinear" if node.op_type() == "QLinearMatMul" => behind.input(0),
        "DequantizeLinear" => match index.producer(behind.input(0)?) {
            Some(quantize) if quantize.op_type() == "QuantizeLinear" => quantize.input(0),
            _ => Some(input),
        },
        _ => Some(input),
    }
}

/// The product after it was made a float again.
fn float_product<'g>(index: &Index<'g>, node: &'g Node) -> Option<&'g str> {
    let only = |tensor: &str| match index.consumers(tensor) {
        [reader] => index.graph().node(reader.node),
        _ => None,
    };
    let mut product = node.output(0)?;
    if node.op_type() == "MatMulInteger" {
        let cast = only(product).filter(|node| node.op_type() == "Cast")?;
        product = only(cast.output(0)?).filter(|node| node.op_type() == "Mul")?.output(0)?;
    }
    if node.op_type() == "QLinearMatMul" {
        return only(product).filter(|node| node.op_type() == "DequantizeLinear")?.output(0);
    }
    let Some(quantize) = only(product).filter(|node| node.op_type() == "QuantizeLinear") else { return Some(product) };
    let dequantize = only(quantize.output(0)?).filter(|node| node.op_type() == "DequantizeLinear");
    Some(dequantize.and_then(|node| node.output(0)).unwrap_or(product))
}

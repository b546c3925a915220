//! The float type of a tensor in a graph, declared or followed from what made it.

use std::collections::HashSet;

use crate::onnx::{AttributeValue, DataType, Index, Node};

/// Tensors looked at before giving up: an attention block and the norm and projections before it are far smaller.
const MAX_TENSORS: usize = 512;

/// The float type of a tensor; none where nothing around it says.
///
/// Standard operators compute in the type of their inputs. `Cast` and `DequantizeLinear` say theirs, MatMulNBits that of its
/// activations; what is found first on the way back decides.
pub(super) fn float_type(index: &Index, tensor: &str) -> Option<DataType> {
    let mut seen = HashSet::new();
    let mut pending = std::collections::VecDeque::from([tensor]);
    while let Some(tensor) = pending.pop_front() {
        if seen.len() >= MAX_TENSORS || !seen.insert(tensor) {
            continue;
        }
        if let Some(found) = said(index, tensor) {
            return Some(found);
        }
        let Some(node) = index.producer(tensor) else { continue };
        match of_node(index, node) {
            Following::Type(found) => return Some(found),
            Following::Inputs(range) => {
                pending.extend(node.inputs().get(range).into_iter().flatten().map(String::as_str));
            }
        }
    }
    None
}

enum Following {
    Type(DataType),
    Inputs(std::ops::Range<usize>),
}

/// What a declaration or a constant says.
fn said(index: &Index, tensor: &str) -> Option<DataType> {
    let declared = index.value(tensor).and_then(|value| value.elem_type());
    declared.or_else(|| index.initializer(tensor).map(|i| i.data_type())).filter(|t| is_float(*t))
}

fn of_node(index: &Index, node: &Node) -> Following {
    let all = 0..node.inputs().len();
    let first = Following::Inputs(0..node.inputs().len().min(1));
    match node.op_type() {
        "Cast" => match node.attribute("to").and_then(|a| a.as_int()).map(|to| DataType::from_code(to as i32)) {
            Some(to) if is_float(to) => Following::Type(to),
            _ => first,
        },
        "Constant" => match node.attribute("value").map(|a| a.value()) {
            Some(AttributeValue::Tensor(tensor)) if is_float(tensor.data_type()) => Following::Type(tensor.data_type()),
            _ if node.attribute("value_float").is_some() => Following::Type(DataType::Float),
            _ => Following::Inputs(0..0),
        },
        "DequantizeLinear" => {
            let scale = node.input(1).and_then(|scale| said(index, scale));
            scale.map_or(Following::Inputs(1..2), Following::Type)
        }
        "Where" => Following::Inputs(1..node.inputs().len().min(3).max(1)),
        // their second input is a weight of another type, a shape, or an index
        "MatMulNBits"
        | "Reshape"
        | "Transpose"
        | "Slice"
        | "Split"
        | "Gather"
        | "GatherBlockQuantized"
        | "Unsqueeze"
        | "Squeeze"
        | "Expand"
        | "Pad"
        | "Tile"
        | "GroupQueryAttention"
        | "MultiHeadAttention"
        | "Identity" => first,
        _ => Following::Inputs(all),
    }
}

pub(super) fn is_float(data_type: DataType) -> bool {
    matches!(data_type, DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double)
}

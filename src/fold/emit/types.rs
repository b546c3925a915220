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
        "Where" => Following::Inputs(1..node.inputs().len().clamp(1, 3)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{ModelBuilder, NodeDef, TensorDef, ValueDef};

    /// Tokens become activations of `scale_type` by a quantised table, and pass a product with packed weights, a reshape and a
    /// selection without any declared type in between.
    fn model(scale_type: DataType, cast: Option<DataType>) -> crate::onnx::Model {
        let mut builder = ModelBuilder::new("g", 8);
        let node = |op: &str, inputs: &[&str], output: &str| {
            NodeDef::new(op, output).inputs(inputs.iter().copied()).outputs([output])
        };
        builder.opset("", 17).opset("com.microsoft", 1);
        builder.input(ValueDef::new("ids", DataType::Int64, ["batch".into()]));
        builder.output(ValueDef::new("out", DataType::Float, ["batch".into(), 4.into()]));
        builder.initializer(TensorDef::inline("table", DataType::Uint8, &[2, 4], vec![0; 8]));
        builder.initializer(TensorDef::inline("packed", DataType::Uint8, &[4, 1, 2], vec![0; 8]));
        builder.initializer(TensorDef::from_i64s("shape", &[2], &[-1, 4]));
        builder.initializer(TensorDef::inline("mask", DataType::Bool, &[1], vec![1]));
        let width = scale_type.bits().unwrap() as usize / 8;
        builder.initializer(TensorDef::inline("scale", scale_type, &[], vec![0; width]));
        builder.node(node("DequantizeLinear", &["table", "scale"], "floats"));
        builder.node(node("Gather", &["floats", "ids"], "x"));
        builder.node(node("MatMulNBits", &["x", "packed", "scale"], "product").domain("com.microsoft"));
        builder.node(node("Reshape", &["product", "shape"], "flat"));
        builder.node(node("Where", &["mask", "flat", "x"], "query"));
        let cast = cast.unwrap_or(DataType::Float);
        builder.node(node("Cast", &["query"], "wide").attr_int("to", cast.code().into()));
        builder.node(node("Neg", &["wide"], "out"));
        builder.build().unwrap()
    }

    #[test]
    fn types_are_followed_through_quantised_weights() {
        for scale_type in [DataType::Float, DataType::Float16, DataType::Bfloat16] {
            let model = model(scale_type, None);
            let index = Index::new(model.graph());
            for tensor in ["floats", "x", "product", "flat", "query"] {
                assert_eq!(float_type(&index, tensor), Some(scale_type), "{tensor}");
            }
            assert_eq!(float_type(&index, "wide"), Some(DataType::Float));
            assert_eq!(float_type(&index, "nothing"), None);
        }
        let model = model(DataType::Float, Some(DataType::Float16));
        assert_eq!(float_type(&Index::new(model.graph()), "wide"), Some(DataType::Float16));
    }
}

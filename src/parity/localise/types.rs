//! Element types of the tensors of a graph, as far as they can be told.

use std::collections::{BTreeSet, HashMap};

use crate::onnx::{AttributeValue, DataType, Graph, Node};

/// The element types of all tensors of a graph's main level that inputs, constants and operators tell. What a node makes of
/// unknown inputs is unknown.
pub(super) fn element_types(graph: &Graph) -> HashMap<&str, DataType> {
    let mut types: HashMap<&str, DataType> = HashMap::new();
    let values = graph.inputs().iter().chain(graph.outputs()).chain(graph.value_info());
    types.extend(values.filter_map(|value| Some((value.name(), value.elem_type()?))));
    types.extend(graph.initializers().iter().map(|tensor| (tensor.name(), tensor.data_type())));
    for node in graph.nodes() {
        for (slot, output) in node.outputs().iter().enumerate().filter(|(_, output)| !output.is_empty()) {
            if let Some(found) = made(node, slot, &types) {
                // what the operator says counts more than what an exporter declared
                types.insert(output, found);
            }
        }
    }
    types.retain(|_, found| *found != DataType::Undefined);
    types
}

const FLOATS: [DataType; 4] = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];

/// The tensors of floating-point numbers that nodes of a graph's main level make.
pub(super) fn floats(graph: &Graph) -> BTreeSet<String> {
    let types = element_types(graph);
    let made = graph.nodes().iter().flat_map(|node| node.outputs()).filter(|output| !output.is_empty());
    let is_float = |output: &&String| types.get(output.as_str()).is_some_and(|found| FLOATS.contains(found));
    made.filter(is_float).cloned().collect()
}

fn made(node: &Node, slot: usize, types: &HashMap<&str, DataType>) -> Option<DataType> {
    let of = |slot: usize| types.get(node.input(slot)?).copied();
    let attribute = |name: &str| node.attribute(name);
    let code = |name: &str| i32::try_from(attribute(name)?.as_int()?).ok().map(DataType::from_code);
    let tensor = |name: &str| attribute(name)?.as_tensor().map(|tensor| tensor.data_type());
    match node.op_type() {
        "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" => Some(DataType::Int64),
        "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "And" | "Or" | "Xor" | "Not" | "IsNaN"
        | "IsInf" => Some(DataType::Bool),
        "Cast" => code("to"),
        "CastLike" | "Where" => of(1),
        "Constant" => match attribute("value").map(|a| a.value()) {
            Some(AttributeValue::Tensor(tensor)) => Some(tensor.data_type()),
            _ if attribute("value_float").is_some() || attribute("value_floats").is_some() => Some(DataType::Float),
            _ if attribute("value_int").is_some() || attribute("value_ints").is_some() => Some(DataType::Int64),
            _ => None,
        },
        "ConstantOfShape" => Some(tensor("value").unwrap_or(DataType::Float)),
        "TopK" if slot == 1 => Some(DataType::Int64),
        "DynamicQuantizeLinear" => Some(if slot == 1 { DataType::Float } else { DataType::Uint8 }),
        "MatMulInteger" | "ConvInteger" => Some(DataType::Int32),
        "DequantizeLinear" => of(1),
        "QuantizeLinear" => of(2).or(Some(DataType::Uint8)),
        "Dropout" if slot == 1 => Some(DataType::Bool),
        "LayerNormalization" | "SimplifiedLayerNormalization" if slot > 0 => Some(DataType::Float),
        "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" if slot == 1 || slot == 2 => {
            Some(DataType::Float)
        }
        "GatherBlockQuantized" => of(2),
        "If" | "Loop" | "Scan" => None,
        _ => of(0),
    }
}

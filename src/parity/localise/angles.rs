//! Rotary angles of half precision, which are wrong by whole radians far into a text: position times frequency has ten bits or seven.

use super::place::Place;
use super::segment::Segment;
use super::types::element_types;
use crate::onnx::{DataType, Model};

/// Says that nodes before a rotated query, or the keys, take sines or cosines of angles of half precision. What else is made from them may
/// still be within its budget.
pub(super) fn of_half(graph: &Model, tensor: &str, place: Place) -> Option<String> {
    if !matches!(place, Place::Query | Place::Keys) {
        return None;
    }
    let types = element_types(graph.graph());
    let before = Segment::between(graph, tensor, &[]);
    let nodes = before.nodes.iter().filter_map(|id| graph.graph().node(*id));
    let mut angles = nodes.filter(|node| node.is("", "Cos") || node.is("", "Sin")).filter_map(|node| node.input(0));
    let name = angles.find_map(|angle| match types.get(angle) {
        Some(DataType::Float16) => Some("float16"),
        Some(DataType::Bfloat16) => Some("bfloat16"),
        _ => None,
    })?;
    Some(format!("computes the angles of its rotation in {name}, the model in float32"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{ModelBuilder, NodeDef, ValueDef};

    #[test]
    fn angles_of_half_precision_are_recognised_before_a_query() {
        let graph = |dtype| {
            let mut builder = ModelBuilder::new("g", 8);
            builder.opset("", 17).input(ValueDef::new("angles", dtype, [2.into()]));
            builder.output(ValueDef::new("query", dtype, [2.into()]));
            builder.node(NodeDef::new("Cos", "cos").inputs(["angles"]).outputs(["query"]));
            builder.build().unwrap()
        };
        let said = |dtype, place| {
            let graph = graph(dtype);
            of_half(&graph, "query", place)
        };
        assert!(said(DataType::Float16, Place::Query).is_some_and(|text| text.contains("in float16")));
        assert!(said(DataType::Bfloat16, Place::Keys).is_some_and(|text| text.contains("in bfloat16")));
        assert_eq!(said(DataType::Float, Place::Query), None);
        assert_eq!(said(DataType::Float16, Place::Attention), None);
    }
}

//! Some nodes of a model as a model of their own.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use super::def::ValueDef;
use super::index::captures;
use super::proto::{graph, model};
use super::wire::Encoder;
use super::{Graph, Model, NodeId, Result, TensorDef, check_any_order};

/// A model of these nodes of a model's main graph, each as the bytes that it was, with the operator sets and local functions of the
/// model. `inputs` are fed, though the model may compute them or have them as constants; `outputs` are given. Other constants that
/// the nodes read stand in the new file, also those that lie in data files of `folder`: these alone are read.
///
/// # Errors
/// When a node reads what is neither made, nor constant, nor an input; or a constant cannot be read.
pub fn cut(
    whole: &Model,
    folder: &Path,
    nodes: &BTreeSet<NodeId>,
    inputs: &[ValueDef],
    outputs: &[ValueDef],
) -> Result<Model> {
    let source = whole.graph();
    let fed: HashSet<&str> = inputs.iter().map(ValueDef::name).collect();
    let chosen = || source.nodes().iter().filter(|node| nodes.contains(&node.id()));
    let read: HashSet<&str> =
        chosen().flat_map(|node| node.inputs().iter().map(String::as_str).chain(captures(node))).collect();
    let wanted = |name: &str| read.contains(name) && !fed.contains(name);

    let mut encoder = Encoder::default();
    let fields = source.fields().iter().filter(|field| field.number == graph::NODE);
    for (field, _) in fields.zip(source.nodes()).filter(|(_, node)| nodes.contains(&node.id())) {
        encoder.raw(field);
    }
    encoder.string(graph::NAME, source.name());
    for tensor in source.initializers().iter().filter(|tensor| wanted(tensor.name())) {
        let data = tensor.data_in(folder)?;
        let inline = TensorDef::inline(tensor.name(), tensor.data_type(), tensor.dims(), data.bytes().to_vec());
        encoder.message(graph::INITIALIZER, &inline.encode()?);
    }
    let sparse = source.fields().iter().filter(|field| field.number == graph::SPARSE_INITIALIZER);
    for (field, _) in sparse.zip(source.sparse_initializers()).filter(|(_, tensor)| wanted(tensor.values.name())) {
        encoder.raw(field);
    }
    inputs.iter().for_each(|value| encoder.message(graph::INPUT, &value.encode()));
    outputs.iter().for_each(|value| encoder.message(graph::OUTPUT, &value.encode()));

    let mut file = Encoder::default();
    for field in whole.fields() {
        match field.number {
            model::GRAPH => file.message(model::GRAPH, &encoder),
            model::IR_VERSION
            | model::PRODUCER_NAME
            | model::PRODUCER_VERSION
            | model::OPSET_IMPORT
            | model::FUNCTIONS => file.raw(field),
            _ => {}
        }
    }
    let cut = Model::from_bytes(file.into_bytes())?;
    check_any_order(&cut)?;
    Ok(cut)
}

/// The model without some nodes of its main graph, which nothing may read any more. Constants stay.
///
/// # Errors
/// When something reads what such a node made.
pub fn without(model: &Model, nodes: &BTreeSet<NodeId>) -> Result<Model> {
    let mut all = model.graph().nodes().iter();
    let mut fields = model.graph().fields().to_vec();
    fields.retain(|field| field.number != graph::NODE || all.next().is_none_or(|node| !nodes.contains(&node.id())));
    let rest = model.rebuilt(model.fields().to_vec(), Some(Graph::from_fields(fields, 0)?))?;
    check_any_order(&rest)?;
    Ok(rest)
}

#[cfg(test)]
mod tests {
    use super::super::{DataType, ModelBuilder, NodeDef};
    use super::*;

    #[test]
    fn a_cut_holds_what_its_nodes_read_and_nothing_else() {
        let value = |name: &str| ValueDef::new(name, DataType::Float, [2.into()]);
        let node =
            |op: &str, inputs: [&str; 2], output: &str| NodeDef::new(op, output).inputs(inputs).outputs([output]);
        let mut builder = ModelBuilder::new("g", 8);
        builder.opset("", 17).input(value("x")).output(value("y"));
        for name in ["a", "b", "c"] {
            builder.initializer(TensorDef::from_f32s(name, &[2], &[1.0, 2.0]));
        }
        builder.node(node("Add", ["x", "a"], "h")).node(node("Mul", ["h", "b"], "k")).node(node(
            "Sub",
            ["k", "c"],
            "y",
        ));
        let whole = builder.build().unwrap();
        let middle = BTreeSet::from([whole.graph().nodes()[1].id()]);
        let folder = Path::new(".");
        let cut_out = cut(&whole, folder, &middle, &[value("h")], &[value("k")]).unwrap();
        let constants: Vec<_> = cut_out.graph().initializers().iter().map(|tensor| tensor.name()).collect();
        assert_eq!((constants, cut_out.graph().nodes().len(), cut_out.opset("")), (vec!["b"], 1, Some(17)));
        assert!(cut(&whole, folder, &middle, &[], &[value("k")]).is_err(), "nothing makes `h`");
        let last = BTreeSet::from([whole.graph().nodes()[2].id()]);
        assert!(without(&whole, &last).is_err(), "it makes the output");
        // a constant may be fed
        let fed = cut(&whole, folder, &middle, &[value("h"), value("b")], &[value("k")]).unwrap();
        assert!(fed.graph().initializers().is_empty());
    }
}

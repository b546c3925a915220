//! The model that a run through a branch computes: the branch stands in the place of its `If`.
//!
//! ```text
//! condition ─ If ┬─ then_branch: … ─ a ─┐
//!                └─ else_branch: … ─ b ─┴─► y      becomes      … ─ a ─ Identity ─► y
//! ```

use super::def::NodeDef;
use super::proto::graph;
use super::wire::{Encoder, Field};
use super::{Error, Graph, Model, Node, NodeId, Result, check_any_order};

/// The model in which the graph that `inside` is in, and every one around it, is part of the main graph. Names stay; what an `If` calls
/// otherwise than its branch is copied. The model itself where the node is of its main graph.
///
/// # Errors
/// When there is no such node, it is nested in something else than an `If`, or a name of the branch is one of the graph around it.
pub fn inlined(model: &Model, inside: NodeId) -> Result<Model> {
    if model.graph().node(inside).is_some() {
        return Ok(model.clone());
    }
    if !model.graph().numbers().contains(&inside.index()) {
        return Err(Error::NoNode { index: inside.index(), nodes: model.graph().numbers().len() });
    }
    let graph = Graph::from_fields(fields(model.graph(), inside)?, 0)?;
    let inlined = model.rebuilt(model.fields().to_vec(), Some(graph))?;
    check_any_order(&inlined)?;
    Ok(inlined)
}

/// The fields of a graph with the branch that `inside` is in.
fn fields(graph: &Graph, inside: NodeId) -> Result<Vec<Field>> {
    let (mut all, mut values) = (Vec::with_capacity(graph.fields().len()), Vec::new());
    let mut nodes = graph.nodes().iter();
    for field in graph.fields() {
        let node = if field.number == graph::NODE { nodes.next() } else { None };
        let holds = |branch: &&Graph| branch.numbers().contains(&inside.index());
        match node.and_then(|node| Some((node, node.subgraphs().find(holds)?))) {
            Some((node, branch)) => all.extend(taken(node, branch, inside, &mut values)?),
            None => all.push(field.clone()),
        }
    }
    all.extend(values);
    Ok(all)
}

/// The nodes of a branch in the place of its `If`; its constants and types are put to `values`.
fn taken(node: &Node, branch: &Graph, inside: NodeId, values: &mut Vec<Field>) -> Result<Vec<Field>> {
    if !node.is("", "If") {
        return Err(Error::NotGivenOut { tensor: branch.name().to_owned(), node: node.label() });
    }
    let mut nodes = Vec::new();
    for field in fields(branch, inside)? {
        match field.number {
            graph::NODE => nodes.push(field),
            graph::INITIALIZER | graph::SPARSE_INITIALIZER | graph::VALUE_INFO => values.push(field),
            _ => {}
        }
    }
    let outputs = node.outputs().iter().zip(branch.outputs());
    for (outside, own) in outputs.filter(|(outside, own)| !outside.is_empty() && *outside != own.name()) {
        let copy = NodeDef::new("Identity", format!("{outside}/taken")).inputs([own.name()]).outputs([outside]);
        let mut encoder = Encoder::default();
        encoder.message(graph::NODE, &copy.encode()?);
        nodes.push(Field::of(graph::MESSAGE, encoder)?);
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{identity_branch, if_node, raw_model};
    use super::*;

    #[test]
    fn a_branch_takes_the_place_of_its_if() {
        let branch = identity_branch("h", "inner");
        let producer = NodeDef::new("Neg", "a").inputs(["x"]).outputs(["h"]).encode().unwrap();
        let model = Model::from_bytes(raw_model(&[producer, if_node(&branch, "x", "y")], &["x"], &["y"])).unwrap();
        let main = inlined(&model, NodeId(1)).unwrap();
        assert_eq!(main.to_bytes(), model.to_bytes());
        let taken = inlined(&model, NodeId(2)).unwrap();
        let nodes: Vec<_> = taken.graph().nodes().iter().map(|node| (node.op_type(), node.output(0))).collect();
        assert_eq!(nodes, [("Neg", Some("h")), ("Identity", Some("inner")), ("Identity", Some("y"))]);
        assert_eq!(Model::from_bytes(taken.to_bytes()).unwrap().to_bytes(), taken.to_bytes());
        assert!(matches!(inlined(&model, NodeId(9)), Err(Error::NoNode { index: 9, nodes: 3 })));
        // what leaves the branch by its own name is not copied
        let same = identity_branch("h", "y");
        let producer = NodeDef::new("Neg", "a").inputs(["x"]).outputs(["h"]).encode().unwrap();
        let model = Model::from_bytes(raw_model(&[producer, if_node(&same, "x", "y")], &["x"], &["y"])).unwrap();
        assert_eq!(inlined(&model, NodeId(2)).unwrap().graph().nodes().len(), 2);
    }
}

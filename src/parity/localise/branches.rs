//! A graph as its runs take it: where its layers are in the branches of an `If`, one graph for each, with the branch in its place.
//!
//! A merged decoder holds all layers twice, once for a prompt and once for what follows it. A call takes one of them, and gives the
//! tensors of the other as empty ones ([`Patch::give_out`]).

use std::collections::{BTreeMap, BTreeSet};

use super::types::element_types;
use crate::onnx::{Graph, Model, Node, NodeDef, NodeId, Patch, ValueDef, inlined};
use crate::parity::Result;
use crate::runtime::NamedValues;

/// What a run may take.
pub(super) struct Branches {
    /// The graph as it is written.
    pub(super) whole: Model,
    /// One, the whole, where its layers are in no branch.
    pub(super) taken: Vec<Branch>,
}

/// A way through a graph.
pub(super) struct Branch {
    /// Its name, as `node.attribute`; empty where there is one way.
    pub(super) scope: String,
    /// The graph with the branch in the place of its `If`.
    pub(super) graph: Model,
    /// By tensor, the node of the whole graph that makes it.
    makers: BTreeMap<String, NodeId>,
}

impl Branches {
    /// # Errors
    /// When a branch cannot stand in the place of its `If`.
    pub(super) fn of(whole: &Model) -> Result<Self> {
        let mut ways = Vec::new();
        find(whole.graph(), "", &mut ways);
        let taken = ways.into_iter().map(|(scope, inside)| Branch::new(whole, scope, inside));
        let mut taken = taken.collect::<Result<Vec<_>>>()?;
        if taken.is_empty() {
            taken.push(Branch { scope: String::new(), graph: whole.clone(), makers: makers(whole.graph(), None) });
        }
        Ok(Self { whole: whole.clone(), taken })
    }

    /// Adds tensors, by branch, to what the graph gives out: the new graph, and what is given where.
    ///
    /// # Errors
    /// When the graph cannot be edited.
    pub(super) fn give_out(&self, tensors: &[BTreeSet<String>]) -> Result<(Model, GivenOut)> {
        let (mut patch, mut given) = (Patch::new("give tensors out"), GivenOut::default());
        let outputs: BTreeSet<&str> = self.whole.graph().outputs().iter().map(|output| output.name()).collect();
        for (branch, tensors) in self.taken.iter().zip(tensors) {
            let types = element_types(branch.graph.graph());
            let mut names = BTreeMap::new();
            for tensor in tensors.iter().filter(|tensor| !outputs.contains(tensor.as_str())) {
                let (Some(found), Some(maker)) = (types.get(tensor.as_str()), branch.makers.get(tensor)) else {
                    given.left_out.push(tensor.clone());
                    continue;
                };
                let name = patch.give_out(&self.whole, *maker, ValueDef::of_any_rank(tensor.as_str(), *found))?;
                names.insert(name, tensor.clone());
            }
            given.names.push(names);
        }
        Ok((patch.apply(&self.whole)?, given))
    }
}

impl Branch {
    fn new(whole: &Model, scope: String, inside: NodeId) -> Result<Self> {
        Ok(Self { scope, graph: inlined(whole, inside)?, makers: makers(whole.graph(), Some(inside)) })
    }

    /// Puts a node before what reads a tensor in the graph as it is written; at the end where nothing does.
    pub(super) fn put(&self, patch: &mut Patch, before: Option<&Node>, node: NodeDef) {
        match before.and_then(|node| node.output(0)).and_then(|made| self.makers.get(made)) {
            Some(id) => patch.insert_before(*id, node),
            None => patch.append_node(node),
        };
    }
}

/// By tensor, the node that makes it in a graph and in those nested in it on the way to `inside`; the outermost of one name.
fn makers(graph: &Graph, inside: Option<NodeId>) -> BTreeMap<String, NodeId> {
    let mut found = BTreeMap::new();
    let mut next = Some(graph);
    while let Some(graph) = next {
        for node in graph.nodes() {
            let made = node.outputs().iter().filter(|output| !output.is_empty());
            made.for_each(|output| _ = found.entry(output.clone()).or_insert(node.id()));
        }
        let holds = |graph: &&Graph| inside.is_some_and(|inside| graph.numbers().contains(&inside.index()));
        next = graph.nodes().iter().flat_map(Node::subgraphs).find(holds);
    }
    found
}

/// The innermost branches that hold linear maps, each by a node that is in it. None where maps are in several nodes' branches, of which a
/// run would take one each.
fn find(graph: &Graph, scope: &str, ways: &mut Vec<(String, NodeId)>) {
    let branching = |node: &&Node| node.is("", "If") && node.subgraphs().any(has_maps);
    let mut branching = graph.nodes().iter().filter(branching);
    let (Some(node), None) = (branching.next(), branching.next()) else {
        if let Some(first) = graph.nodes().first().filter(|_| !scope.is_empty()) {
            ways.push((scope.to_owned(), first.id()));
        }
        return;
    };
    let outer = if scope.is_empty() { String::new() } else { format!("{scope}/") };
    let name = if node.name().is_empty() { node.op_type() } else { node.name() };
    for attribute in node.attributes() {
        attribute.graphs().iter().for_each(|graph| find(graph, &format!("{outer}{name}.{}", attribute.name()), ways));
    }
}

fn has_maps(graph: &Graph) -> bool {
    let is_map = |node: &Node| ["MatMul", "Gemm"].iter().any(|map| node.op_type().contains(map));
    graph.nodes().iter().any(|node| is_map(node) || node.subgraphs().any(has_maps))
}

/// What is given out of a graph.
#[derive(Default)]
pub(super) struct GivenOut {
    /// By branch: tensors by the names that they have outside.
    names: Vec<BTreeMap<String, String>>,
    /// Tensors of no known type.
    pub(super) left_out: Vec<String>,
}

impl GivenOut {
    /// The branch that a call took, and its outputs by the names that they have in it.
    pub(super) fn within(&self, outputs: NamedValues) -> (usize, NamedValues) {
        // what is made around a branch is there whichever is taken
        let is_taken = |names: &BTreeMap<String, String>| {
            let inside = names.iter().filter(|(name, tensor)| name != tensor);
            { inside }.filter_map(|(name, _)| outputs.get(name)).any(|value| !value.shape().contains(&0))
        };
        let is_given = |names: &BTreeMap<String, String>| names.keys().any(|name| outputs.get(name).is_some());
        let branch = self.names.iter().position(is_taken).or_else(|| self.names.iter().position(is_given)).unwrap_or(0);
        let names = self.names.get(branch);
        let others: BTreeSet<&String> = self.names.iter().flat_map(BTreeMap::keys).collect();
        let own = outputs.into_iter().filter_map(|(name, value)| match names.and_then(|names| names.get(&name)) {
            Some(inside) => Some((inside.clone(), value)),
            None => (!others.contains(&name)).then_some((name, value)),
        });
        (branch, own.collect())
    }
}

//! Who makes a tensor, and who reads it.

use std::collections::{HashMap, HashSet};

use super::{Graph, Node, NodeId, TensorInfo, ValueInfo};

/// A place where a tensor is read: an input slot of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// The node.
    pub node: NodeId,
    /// The position among its inputs.
    pub slot: usize,
}

/// The def-use index of one graph. Graphs nested in it appear only through what they read from it; the index of a nested
/// graph, made [`within`](Self::within) that of the graph around it, sees the names around it too.
#[derive(Clone, Debug)]
pub struct Index<'g> {
    graph: &'g Graph,
    outer: Option<&'g Index<'g>>,
    producers: HashMap<&'g str, Use>,
    consumers: HashMap<&'g str, Vec<Use>>,
    captures: HashMap<&'g str, Vec<NodeId>>,
    initializers: HashMap<&'g str, &'g TensorInfo>,
    inputs: HashMap<&'g str, &'g ValueInfo>,
    outputs: HashMap<&'g str, &'g ValueInfo>,
    value_info: HashMap<&'g str, &'g ValueInfo>,
}

impl<'g> Index<'g> {
    /// Reads a graph once.
    pub fn new(graph: &'g Graph) -> Self {
        Self::read(graph, None)
    }

    /// Reads a graph that is nested in the one of `outer`.
    pub fn within(graph: &'g Graph, outer: &'g Index<'g>) -> Self {
        Self::read(graph, Some(outer))
    }

    fn read(graph: &'g Graph, outer: Option<&'g Index<'g>>) -> Self {
        let mut index = Self {
            graph,
            outer,
            producers: HashMap::with_capacity(graph.nodes().len()),
            consumers: HashMap::with_capacity(graph.nodes().len()),
            captures: HashMap::new(),
            initializers: graph.initializers().iter().map(|tensor| (tensor.name(), tensor)).collect(),
            inputs: by_name(graph.inputs()),
            outputs: by_name(graph.outputs()),
            value_info: by_name(graph.value_info()),
        };
        for node in graph.nodes() {
            for (slot, name) in named(node.outputs()) {
                index.producers.insert(name, Use { node: node.id(), slot });
            }
            for (slot, name) in named(node.inputs()) {
                index.consumers.entry(name).or_default().push(Use { node: node.id(), slot });
            }
            for name in captures(node) {
                index.captures.entry(name).or_default().push(node.id());
            }
        }
        index
    }

    /// The graph that is indexed.
    pub fn graph(&self) -> &'g Graph {
        self.graph
    }

    /// The index in which a name is defined: this one, or that of a graph around it.
    fn defining(&self, tensor: &str) -> &Self {
        let mut index = self;
        while let Some(outer) = index.outer.filter(|_| !index.defines(tensor)) {
            index = outer;
        }
        index
    }

    fn defines(&self, tensor: &str) -> bool {
        let constant = self.initializers.contains_key(tensor) || self.inputs.contains_key(tensor);
        constant || self.producers.contains_key(tensor)
    }

    /// The node that makes a tensor; none for inputs and initializers.
    pub fn producer(&self, tensor: &str) -> Option<&'g Node> {
        let index = self.defining(tensor);
        index.graph.node(index.producers.get(tensor)?.node)
    }

    /// The node that makes a tensor, and the position among its outputs.
    pub fn producer_slot(&self, tensor: &str) -> Option<Use> {
        self.defining(tensor).producers.get(tensor).copied()
    }

    /// The input slots of this graph that read a tensor, in graph order.
    pub fn consumers(&self, tensor: &str) -> &[Use] {
        self.consumers.get(tensor).map_or(&[], Vec::as_slice)
    }

    /// The nodes whose nested graphs read a tensor of this graph: uses that no input slot shows.
    pub fn captured_by(&self, tensor: &str) -> &[NodeId] {
        self.captures.get(tensor).map_or(&[], Vec::as_slice)
    }

    /// The constant of this name.
    pub fn initializer(&self, tensor: &str) -> Option<&'g TensorInfo> {
        self.defining(tensor).initializers.get(tensor).copied()
    }

    /// The graph input of this name.
    pub fn input(&self, tensor: &str) -> Option<&'g ValueInfo> {
        self.defining(tensor).inputs.get(tensor).copied()
    }

    /// The graph output of this name.
    pub fn output(&self, tensor: &str) -> Option<&'g ValueInfo> {
        self.outputs.get(tensor).copied()
    }

    /// The declared type of a tensor: of an input, an output, or a value in between.
    pub fn value(&self, tensor: &str) -> Option<&'g ValueInfo> {
        let index = self.defining(tensor);
        let between = || index.outputs.get(tensor).or_else(|| index.value_info.get(tensor)).copied();
        index.inputs.get(tensor).copied().or_else(between)
    }
}

fn by_name(values: &[ValueInfo]) -> HashMap<&str, &ValueInfo> {
    values.iter().map(|value| (value.name(), value)).collect()
}

/// The names that are not left out, with their slots.
fn named(names: &[String]) -> impl Iterator<Item = (usize, &str)> {
    names.iter().map(String::as_str).enumerate().filter(|(_, name)| !name.is_empty())
}

/// The names that the graphs nested in a node read from around it, each once, in reading order.
pub(crate) fn captures(node: &Node) -> Vec<&str> {
    let mut seen = HashSet::new();
    let free = node.subgraphs().flat_map(free_names);
    free.filter(|name| seen.insert(*name)).collect()
}

/// The names that a nested graph reads and does not define.
fn free_names(graph: &Graph) -> Vec<&str> {
    let values = graph.inputs().iter().map(ValueInfo::name);
    let constants = graph.initializers().iter().chain(graph.sparse_initializers().iter().map(|sparse| &sparse.values));
    let made = graph.nodes().iter().flat_map(|node| named(node.outputs())).map(|(_, name)| name);
    let defined: HashSet<&str> = values.chain(constants.map(TensorInfo::name)).chain(made).collect();
    let mut free = Vec::new();
    for node in graph.nodes() {
        free.extend(named(node.inputs()).map(|(_, name)| name));
        free.extend(captures(node));
    }
    free.extend(graph.outputs().iter().map(ValueInfo::name));
    free.retain(|name| !defined.contains(name));
    free
}

#[cfg(test)]
mod tests {
    use super::super::tests::{identity_branch, if_node, raw_model};
    use super::super::{DataType, Model, ModelBuilder, NodeDef, TensorDef, ValueDef};
    use super::*;

    fn names(index: &Index<'_>, uses: &[Use]) -> Vec<(String, usize)> {
        uses.iter().map(|used| (index.graph().node(used.node).unwrap().name().to_owned(), used.slot)).collect()
    }

    #[test]
    fn says_who_makes_and_who_reads() {
        let mut builder = ModelBuilder::new("g", 8);
        builder.opset("", 17).initializer(TensorDef::from_f32s("w", &[2], &[1.0, 2.0]));
        builder.input(ValueDef::new("x", DataType::Float, [2.into()]));
        builder.output(ValueDef::new("y", DataType::Float, [2.into()]));
        builder.node(NodeDef::new("Add", "add").inputs(["x", "w"]).outputs(["h"]));
        builder.node(NodeDef::new("Mul", "square").inputs(["h", "h"]).outputs(["y"]));
        let model = builder.build().unwrap();
        let index = Index::new(model.graph());
        assert_eq!(index.producer("h").unwrap().name(), "add");
        assert!(index.producer("x").is_none() && index.producer("w").is_none());
        assert_eq!(names(&index, index.consumers("h")), [("square".into(), 0), ("square".into(), 1)]);
        assert_eq!(names(&index, index.consumers("w")), [("add".into(), 1)]);
        assert!(index.consumers("y").is_empty());
        assert_eq!(index.initializer("w").unwrap().dims(), [2]);
        assert!(index.input("x").is_some() && index.output("y").is_some() && index.value("h").is_none());
    }

    #[test]
    fn what_a_branch_reads_from_around_it_is_a_capture() {
        let branch = identity_branch("h", "inner");
        let producer = NodeDef::new("Neg", "a").inputs(["x"]).outputs(["h"]).encode().unwrap();
        let bytes = raw_model(&[producer, if_node(&branch, "x", "y")], &["x"], &["y"]);
        let model = Model::from_bytes(bytes).unwrap();
        let index = Index::new(model.graph());
        assert_eq!(index.captured_by("h"), [NodeId(1)]);
        assert!(index.captured_by("inner").is_empty() && index.consumers("h").is_empty());
        let nested = Index::within(model.graph().nodes()[1].subgraphs().next().unwrap(), &index);
        assert_eq!(nested.producer("h").unwrap().name(), "a");
        assert_eq!(nested.producer("inner").unwrap().op_type(), "Identity");
        assert!(nested.input("x").is_some() && index.producer("inner").is_none());
        assert_eq!(nested.consumers("h"), [Use { node: NodeId(2), slot: 0 }]);
    }
}

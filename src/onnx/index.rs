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

/// The def-use index of one graph; the graphs nested in it appear only through what they read from it.
#[derive(Clone, Debug)]
pub struct Index<'g> {
    graph: &'g Graph,
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
        let mut index = Self {
            graph,
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

    /// The node that makes a tensor; none for inputs and initializers.
    pub fn producer(&self, tensor: &str) -> Option<&'g Node> {
        self.graph.node(self.producers.get(tensor)?.node)
    }

    /// The node that makes a tensor, and the position among its outputs.
    pub fn producer_slot(&self, tensor: &str) -> Option<Use> {
        self.producers.get(tensor).copied()
    }

    /// The input slots that read a tensor, in graph order.
    pub fn consumers(&self, tensor: &str) -> &[Use] {
        self.consumers.get(tensor).map_or(&[], Vec::as_slice)
    }

    /// The nodes whose nested graphs read a tensor of this graph: uses that no input slot shows.
    pub fn captured_by(&self, tensor: &str) -> &[NodeId] {
        self.captures.get(tensor).map_or(&[], Vec::as_slice)
    }

    /// The constant of this name.
    pub fn initializer(&self, tensor: &str) -> Option<&'g TensorInfo> {
        self.initializers.get(tensor).copied()
    }

    /// The graph input of this name.
    pub fn input(&self, tensor: &str) -> Option<&'g ValueInfo> {
        self.inputs.get(tensor).copied()
    }

    /// The graph output of this name.
    pub fn output(&self, tensor: &str) -> Option<&'g ValueInfo> {
        self.outputs.get(tensor).copied()
    }

    /// The declared type of a tensor: of an input, an output, or a value in between.
    pub fn value(&self, tensor: &str) -> Option<&'g ValueInfo> {
        self.input(tensor).or_else(|| self.output(tensor)).or_else(|| self.value_info.get(tensor).copied())
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

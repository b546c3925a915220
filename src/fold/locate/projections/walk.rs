//! Walks along the data flow that end at linear maps.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::linear::{LinearNode, Unreadable, linear, unreadable};
use crate::onnx::{Index, Node, NodeId, ValueInfo};

const MICROSOFT: &str = "com.microsoft";
/// Nodes on one way between two linear maps, and steps of one walk: far more than any exporter writes, and an end to every
/// walk.
const MAX_DEPTH: usize = 256;
const MAX_STEPS: usize = 100_000;

/// A node on a way, the input it is entered by and the output it is left by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) node: NodeId,
    pub(super) output: usize,
}

/// A linear map that a walk ended at.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    pub(super) linear: NodeId,
    /// From the map to where the walk began.
    pub(super) path: Vec<Step>,
    /// Whether an activation function is on the way.
    pub(super) activated: bool,
}

/// A graph and its linear maps.
pub(super) struct Walk<'g> {
    pub(super) index: &'g Index<'g>,
    pub(super) linears: BTreeMap<NodeId, LinearNode>,
    /// Products with weights that are no such map, and why. Walks end at them too.
    pub(super) unreadable: BTreeMap<NodeId, Unreadable>,
}

impl<'g> Walk<'g> {
    pub(super) fn new(index: &'g Index<'g>) -> Self {
        let nodes = || index.graph().nodes().iter();
        let linears: BTreeMap<_, _> = nodes().filter_map(|node| Some((node.id(), linear(index, node)?))).collect();
        let others = nodes().filter(|node| !linears.contains_key(&node.id()));
        let unreadable = others.filter_map(|node| Some((node.id(), unreadable(index, node)?))).collect();
        Self { index, linears, unreadable }
    }

    /// Whether a walk ends at a node: it multiplies with weights.
    fn is_map(&self, node: &Node) -> bool {
        self.linears.contains_key(&node.id()) || self.unreadable.contains_key(&node.id())
    }

    /// The graph's own copy of a tensor's name.
    pub(super) fn own(&self, name: &str) -> Option<&'g str> {
        let made = self.index.producer_slot(name).and_then(|at| self.index.graph().node(at.node)?.output(at.slot));
        made.or_else(|| self.index.input(name).map(ValueInfo::name))
    }

    /// The linear maps that a tensor is made from, without going through one, and without what `known` holds.
    pub(super) fn leaves(&self, from: &'g str, known: &HashSet<&'g str>) -> Vec<Leaf> {
        let mut search = Search { walk: self, known, seen: HashSet::new(), path: Vec::new(), leaves: Vec::new() };
        search.visit(from, false, "");
        search.leaves
    }

    /// The linear maps themselves, each once.
    pub(super) fn linears_behind(&self, from: &'g str, known: &HashSet<&'g str>) -> BTreeSet<NodeId> {
        self.leaves(from, known).into_iter().map(|leaf| leaf.linear).collect()
    }

    /// Adds all tensors that a tensor is made from.
    pub(super) fn mark(&self, from: &'g str, known: &mut HashSet<&'g str>) {
        let mut open = vec![from];
        while let Some(tensor) = open.pop() {
            if !tensor.is_empty() && known.insert(tensor) {
                open.extend(self.index.producer(tensor).into_iter().flat_map(|n| n.inputs()).map(String::as_str));
            }
        }
    }

    /// The nearest node behind a tensor that is asked for.
    pub(super) fn nearest(&self, from: &'g str, wanted: impl Fn(&Node) -> bool) -> Option<&'g Node> {
        let mut seen = HashSet::from([from]);
        let mut ring = vec![from];
        for _ in 0..MAX_DEPTH {
            let mut next = Vec::new();
            for tensor in ring {
                let Some(node) = self.index.producer(tensor) else { continue };
                if wanted(node) {
                    return Some(node);
                }
                if !ends(node) && !self.is_map(node) {
                    next.extend(node.inputs().iter().map(String::as_str).filter(|t| !t.is_empty() && seen.insert(t)));
                }
            }
            ring = next;
        }
        None
    }

    /// The nearest linear maps that a tensor is read by.
    pub(super) fn ahead(&self, from: &'g str) -> BTreeSet<NodeId> {
        let mut seen = HashSet::from([from]);
        let mut ring = vec![from];
        for _ in 0..MAX_DEPTH {
            let mut found = BTreeSet::new();
            let mut next = Vec::new();
            for reader in ring.iter().flat_map(|tensor| self.index.consumers(tensor)) {
                let Some(node) = self.index.graph().node(reader.node) else { continue };
                if self.is_map(node) {
                    found.insert(node.id());
                } else if !is_shape(node) {
                    next.extend(node.outputs().iter().map(String::as_str).filter(|t| !t.is_empty() && seen.insert(t)));
                }
            }
            if !found.is_empty() {
                return found;
            }
            ring = next;
        }
        BTreeSet::new()
    }

    /// Whether a node multiplies two tensors of which neither is a weight.
    pub(super) fn mixes(&self, node: &Node) -> bool {
        (node.is("", "MatMul") || node.is(MICROSOFT, "FusedMatMul")) && !self.is_map(node)
    }
}

fn is_shape(node: &Node) -> bool {
    matches!(node.op_type(), "Shape" | "Size")
}

/// Nodes behind which no data of this tensor's own lies.
fn ends(node: &Node) -> bool {
    is_shape(node) || matches!(node.op_type(), "DynamicQuantizeLinear" | "Constant" | "ConstantOfShape" | "Range")
}

fn is_activation(node: &Node) -> bool {
    const KNOWN: [&str; 14] = [
        "Sigmoid",
        "Tanh",
        "Erf",
        "Gelu",
        "FastGelu",
        "BiasGelu",
        "QuickGelu",
        "Relu",
        "Softplus",
        "Elu",
        "HardSigmoid",
        "Mish",
        "HardSwish",
        "Swish",
    ];
    KNOWN.contains(&node.op_type())
}

struct Search<'a, 'g> {
    walk: &'a Walk<'g>,
    known: &'a HashSet<&'g str>,
    /// Tensors met, after an activation or not, and behind which cut.
    seen: HashSet<(&'g str, bool, &'g str)>,
    /// From where the walk began.
    path: Vec<Step>,
    leaves: Vec<Leaf>,
}

impl<'g> Search<'_, 'g> {
    fn visit(&mut self, tensor: &'g str, activated: bool, cut: &'g str) {
        let fresh = !self.known.contains(tensor) && self.seen.insert((tensor, activated, cut));
        if !fresh || self.seen.len() > MAX_STEPS || self.path.len() > MAX_DEPTH {
            return;
        }
        let index = self.walk.index;
        let Some((made, node)) = index.producer_slot(tensor).zip(index.producer(tensor)) else { return };
        if self.walk.is_map(node) {
            let path = self.path.iter().rev().copied().collect();
            self.leaves.push(Leaf { linear: node.id(), path, activated });
            return;
        }
        if ends(node) {
            return;
        }
        let cut = if matches!(node.op_type(), "Split" | "Slice" | "Gather") { tensor } else { cut };
        let activated = activated || is_activation(node);
        self.path.push(Step { node: node.id(), output: made.slot });
        for input in node.inputs().iter().filter(|input| !input.is_empty()) {
            self.visit(input, activated, cut);
        }
        self.path.pop();
    }
}

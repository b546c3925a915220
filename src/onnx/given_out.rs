//! Tensors of nested graphs, given out of the model.
//!
//! ```text
//!                ┌─ then_branch: … ─ tensor ──────────┐
//! condition ─ If ┤                                    ├─► one more output of the If ─► output of the model
//!                └─ else_branch: Constant, empty ─────┘
//! ```
//! A run that does not take the tensor's branch gives an empty tensor of as many dimensions.

use super::def::{NodeDef, TensorDef, ValueDef};
use super::{Error, Graph, Model, Node, NodeId, Result};

/// A tensor that leaves the graph of a node through every `If` around it.
#[derive(Clone, Debug)]
pub(super) struct GivenOut {
    /// The first node of that graph.
    inside: NodeId,
    value: ValueDef,
}

impl GivenOut {
    /// A tensor of the graph that `inside` is in; none where that is the main graph.
    pub(super) fn new(model: &Model, inside: NodeId, value: ValueDef) -> Result<Option<Self>> {
        let (mut graph, mut given) = (model.graph(), Self { inside, value });
        while graph.node(inside).is_none() {
            let Some(node) = graph.nodes().iter().find(|node| given.passes(node)) else {
                return Err(Error::NoNode { index: inside.index(), nodes: model.graph().numbers().len() });
            };
            if !node.is("", "If") {
                return Err(Error::NotGivenOut { tensor: given.value.name().to_owned(), node: node.label() });
            }
            let Some(branch) = node.subgraphs().find(|branch| given.lies_in(branch)) else { break };
            graph = branch;
        }
        given.inside = graph.nodes().first().map_or(inside, Node::id);
        Ok(model.graph().node(inside).is_none().then_some(given))
    }

    fn lies_in(&self, graph: &Graph) -> bool {
        graph.numbers().contains(&self.inside.index())
    }

    /// Whether the tensor leaves through this node.
    pub(super) fn passes(&self, node: &Node) -> bool {
        node.subgraphs().any(|graph| self.lies_in(graph))
    }

    /// What it is called outside of a node.
    pub(super) fn name(&self, node: &Node) -> String {
        format!("{}/out_of_{}_{}", self.value.name(), node.id().index(), self.inside.index())
    }

    /// The output of the model, of which this graph is the main one.
    pub(super) fn output(&self, main: &Graph) -> ValueDef {
        let mut value = self.value.clone();
        if let Some(node) = main.nodes().iter().find(|node| self.passes(node)) {
            *value.name_mut() = self.name(node);
        }
        value
    }

    /// What a branch of `node` gives out in the place of the tensor, and the node that makes it: of a branch that has not the tensor,
    /// or gives it out already.
    pub(super) fn of_branch(&self, node: &Node, branch: &Graph) -> (ValueDef, Option<NodeDef>) {
        let mut value = self.output(branch);
        if self.lies_in(branch) && branch.outputs().iter().all(|output| output.name() != value.name()) {
            return (value, None);
        }
        if self.lies_in(branch) {
            let again = format!("{}/again", self.name(node));
            let copy = NodeDef::new("Identity", again.as_str()).inputs([value.name()]).outputs([again.as_str()]);
            *value.name_mut() = again;
            return (value, Some(copy));
        }
        *value.name_mut() = format!("{}/nothing", self.name(node));
        let dims = vec![0; value.rank().unwrap_or(1)];
        let nothing = TensorDef::inline("", value.data_type(), &dims, Vec::new());
        let constant = NodeDef::new("Constant", value.name()).outputs([value.name()]).attr_tensor("value", nothing);
        (value.with_any_sizes(), Some(constant))
    }
}

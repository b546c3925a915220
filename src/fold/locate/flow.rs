//! The flow of data, nodes after all that they read: what is asked of every node is computed once from its inputs, and a way that
//! forks and joins again a thousand times is no longer than its nodes.

use std::collections::HashSet;

use crate::onnx::{Index, Node, NodeId};

/// Calls `leave` with every node that a node is made from and last with the node itself, each after what it reads, and none
/// that is in `entered` already. In a cycle one node comes before what it reads.
pub(super) fn after_inputs<'g>(
    index: &Index<'g>,
    node: &'g Node,
    entered: &mut HashSet<NodeId>,
    leave: &mut impl FnMut(&'g Node),
) {
    if !entered.insert(node.id()) {
        return;
    }
    let mut open = vec![(node, node.inputs().iter())];
    while let Some((node, inputs)) = open.last_mut() {
        match inputs.next() {
            Some(input) => {
                let behind = index.producer(input).filter(|behind| entered.insert(behind.id()));
                open.extend(behind.map(|behind| (behind, behind.inputs().iter())));
            }
            None => {
                leave(node);
                open.pop();
            }
        }
    }
}

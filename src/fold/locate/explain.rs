//! What was matched of every attention block, or how far the match got and which node stopped it.

use serde::Serialize;

use super::{LOCATORS, Site, decomposed, scope};
use crate::fold::Error;
use crate::onnx::{Index, Model, Node};

/// A node that may be attention, and what was made of it.
#[derive(Clone, Debug, Serialize)]
pub struct Block {
    /// The branch that it is in; empty in the main graph.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub scope: String,
    /// The node's name.
    pub anchor: String,
    /// Its operator.
    pub operator: String,
    /// What was found on the way, in order.
    pub matched: Vec<String>,
    /// The site, where the match is complete.
    pub site: Option<Site>,
    /// What stopped the match.
    pub stopped: Option<String>,
}

/// Every attention block of a model, whether it can carry an adapter or not. A softmax that is none says so.
pub fn explain(model: &Model) -> Vec<Block> {
    let mut blocks = Vec::new();
    let visited = scope::visit(model, &mut |index, scope| {
        blocks.extend(index.graph().nodes().iter().filter_map(|node| block(index, scope, node)));
        Ok(())
    });
    // only what `visit` calls can fail, and that does not
    debug_assert!(visited.is_ok());
    number(model, &mut blocks);
    blocks
}

/// The layers, where the sites are in order.
fn number(model: &Model, blocks: &mut [Block]) {
    let Ok(sites) = super::sites(model) else { return };
    for found in blocks.iter_mut().filter_map(|block| block.site.as_mut()) {
        if let Some(site) = sites.iter().find(|site| site.node == found.node) {
            *found = site.clone();
        }
    }
}

fn block(index: &Index, scope: &str, node: &Node) -> Option<Block> {
    let found = LOCATORS.iter().find_map(|locate| locate(index, node));
    let is_softmax = decomposed::is_anchor(node);
    if found.is_none() && !is_softmax && !node.op_type().contains("Attention") {
        return None;
    }
    let domain = if node.domain().is_empty() { String::new() } else { format!("{}.", node.domain()) };
    let (site, stopped) = match found {
        Some(Ok(site)) => (Some(Site { scope: scope.to_owned(), ..site }), None),
        Some(Err(Error::Site { reason, .. })) => (None, Some(reason)),
        Some(Err(error)) => (None, Some(error.to_string())),
        None if is_softmax => (None, Some("no attention: its input is no product of two computed tensors".to_owned())),
        None => (None, Some("an operator that prefold does not know".to_owned())),
    };
    Some(Block {
        scope: scope.to_owned(),
        anchor: node.name().to_owned(),
        operator: format!("{domain}{}", node.op_type()),
        matched: if is_softmax { decomposed::steps(index, node) } else { Vec::new() },
        site,
        stopped,
    })
}

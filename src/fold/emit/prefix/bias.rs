//! What is added to scores beside masks. Each head may add something of its own, which grows with the distance (ALiBi), or what depends
//! on the tokens: what that would be for the columns of a prefix is not in the graph.

use std::collections::HashSet;

use super::{Block, stopped};
use crate::fold::Result;
use crate::fold::locate::shape;
use crate::onnx::{DataType, Dim, Index, TensorInfo};

/// Nodes of a mask: more than any exporter writes.
const MAX_NODES: usize = 512;

impl Block<'_, '_> {
    /// Refuses what is added to scores if it is no mask.
    pub(super) fn refuse_biases(&self, added: &[&str]) -> Result<()> {
        let heads = self.writer.job.adapter.config().num_heads as i64;
        for tensor in added {
            let what = match bias(self.index, tensor, heads) {
                None => continue,
                Some(Bias::OfHeads) => "each head adds a bias of its own, as ALiBi does",
                Some(Bias::OfTokens) => "a bias is added that is computed from the tokens",
            };
            let reason = format!("{what} (`{tensor}`): what it would be for a prefix is not known");
            return Err(stopped(self.writer.site, reason));
        }
        Ok(())
    }
}

enum Bias {
    OfHeads,
    OfTokens,
}

/// Whether a tensor is made of numbers of which each head has one, or by products with weights.
fn bias(index: &Index, tensor: &str, heads: i64) -> Option<Bias> {
    let declared = index.value(tensor).and_then(|value| value.shape());
    let for_all = heads < 2 || matches!(declared, Some([.., Dim::Value(1), _, _]));
    let (mut open, mut seen) = (vec![tensor], HashSet::new());
    while let Some(tensor) = open.pop() {
        if !seen.insert(tensor.to_owned()) || seen.len() > MAX_NODES {
            continue;
        }
        match (shape::constant(index, tensor), index.producer(tensor)) {
            (Some(constant), _) if !for_all && has_heads(constant, heads) => return Some(Bias::OfHeads),
            (None, Some(node)) if node.op_type() == "Shape" => {}
            (None, Some(node)) if shape::is_product(node) => return Some(Bias::OfTokens),
            (None, Some(node)) => open.extend(node.inputs().iter().map(String::as_str).filter(|name| !name.is_empty())),
            _ => {}
        }
    }
    None
}

/// One number for each head, or one for each and every column.
fn has_heads(constant: &TensorInfo, heads: i64) -> bool {
    let float =
        matches!(constant.data_type(), DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double);
    let wide: Vec<i64> = constant.dims().iter().copied().filter(|dim| *dim != 1).collect();
    float && wide.first() == Some(&heads) && wide.len() <= 2
}

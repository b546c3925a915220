//! The query of a site before its rotation.
//!
//! ```text
//! x ─ RotaryEmbedding ─ query
//!
//! x ─┬─────────────────────────── Mul cos ─┐        x ─ Split ─┬ Mul … Sub ─┐
//!    └─ (Split | Slice | Neg | Concat | …)* ─ Mul sin ─ Add ─ query         └ Mul … Add ─ Concat ─ query
//! ```

use std::collections::BTreeSet;

use super::{Layout, Site, stopped};
use crate::fold::Result;
use crate::onnx::{Index, Model, Node};

const HELP: &str = "export the base model with `prefold export`, or train with query = post_rope";
/// Nodes on the way of a pair's exchange.
const MAX_STEPS: usize = 8;

/// The unrotated query and its layout. In a graph that prefold exported, a query that nothing rotates is its own.
///
/// # Errors
/// When the rotation is of a kind that is not known.
pub(super) fn unrotated(model: &Model, site: &Site) -> Result<(String, Layout)> {
    let index = Index::new(model.graph());
    let Some(node) = index.producer(&site.query) else { return Ok((site.query.clone(), site.query_layout)) };
    let found = match node.op_type() {
        "RotaryEmbedding" => node.input(0).map(str::to_owned),
        "Add" => by_element(&index, node),
        "Concat" => by_half(&index, node),
        _ => None,
    };
    match found {
        Some(found) => Ok((found, site.query_layout)),
        None if model.metadata("prefold.dialect").is_some() && !is_turned(&index, &site.query) => {
            Ok((site.query.clone(), site.query_layout))
        }
        None => Err(stopped(node, "the query before its rotation was not found", HELP)),
    }
}

/// `x · cos + exchanged(x) · sin`.
fn by_element(index: &Index, add: &Node) -> Option<String> {
    let mul = |slot| index.producer(add.input(slot)?).filter(|node| node.is("", "Mul"));
    let (left, right) = (mul(0)?, mul(1)?);
    let pairs = [(left, right), (right, left)];
    pairs.into_iter().find_map(|(plain, exchanged)| {
        plain.inputs().iter().find(|x| exchanged.inputs().iter().any(|e| leads_to(index, e, x))).cloned()
    })
}

/// Whether the exchange of a pair's elements leads from `tensor` back to `x`.
fn leads_to(index: &Index, tensor: &str, x: &str) -> bool {
    let mut tensor = tensor;
    for _ in 0..MAX_STEPS {
        let Some(node) = index.producer(tensor) else { return false };
        match (node.op_type(), node.input(0)) {
            (
                "Concat" | "Gather" | "Neg" | "Reshape" | "Slice" | "Split" | "Squeeze" | "Transpose" | "Unsqueeze",
                Some(behind),
            ) => tensor = behind,
            _ => return false,
        }
        if tensor == x {
            return true;
        }
    }
    false
}

/// Halves that are turned by themselves and joined: all of them come from one Split.
fn by_half(index: &Index, concat: &Node) -> Option<String> {
    let mut sources = BTreeSet::new();
    let mut open: Vec<&str> = concat.inputs().iter().map(String::as_str).collect();
    for _ in 0..4 * MAX_STEPS {
        let Some(node) = open.pop().and_then(|tensor| index.producer(tensor)) else { continue };
        match node.op_type() {
            "Add" | "Sub" | "Mul" => open.extend(node.inputs().iter().map(String::as_str)),
            "Split" => sources.extend(node.input(0)),
            _ => {}
        }
    }
    let mut sources = sources.into_iter();
    sources.next().filter(|_| sources.next().is_none()).map(str::to_owned)
}

/// Whether a cosine goes into the tensor within a few nodes.
fn is_turned(index: &Index, tensor: &str) -> bool {
    let mut open = vec![(tensor, 0)];
    while let Some((tensor, depth)) = open.pop() {
        let Some(node) = index.producer(tensor).filter(|_| depth < 6) else { continue };
        if node.is("", "Cos") {
            return true;
        }
        open.extend(node.inputs().iter().map(|input| (input.as_str(), depth + 1)));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::testing::shared;
    use crate::fold::locate;
    use crate::onnx::{DataType, ModelBuilder, NodeDef, ValueDef};

    /// transformers' `x · cos + rotate_half(x) · sin`, as torch's exporter writes it.
    #[test]
    fn the_query_before_an_exported_rotation_is_found() {
        let Some(path) = shared("graphs/torch_script17_eager/llama_gqa/model.onnx") else { return };
        let model = Model::open(&path).unwrap();
        let index = Index::new(model.graph());
        for site in locate::sites(&model).unwrap() {
            assert_eq!(index.producer(&site.query).unwrap().op_type(), "Add");
            let (found, layout) = unrotated(&model, &site).unwrap();
            assert_eq!(index.producer(&found).unwrap().op_type(), "Transpose");
            assert_eq!(layout, Layout::HeadsFirst);
        }
    }

    #[test]
    fn an_unknown_rotation_is_an_error_that_names_its_node() {
        let mut builder = ModelBuilder::new("g", 8);
        builder.opset("", 17).input(ValueDef::new("x", DataType::Float, [2.into()]));
        builder.output(ValueDef::new("query", DataType::Float, [2.into()]));
        builder.node(NodeDef::new("Sin", "turn").inputs(["x"]).outputs(["query"]));
        let site = Site {
            layer: 0,
            shape: "decomposed",
            anchor: "softmax".into(),
            query: "query".into(),
            query_layout: Layout::HeadsFirst,
            output: "output".into(),
            output_layout: Layout::HeadsFirst,
            readers: Vec::new(),
            num_heads: None,
            head_dim: None,
            num_kv_heads: None,
            width: None,
        };
        let error = unrotated(&builder.build().unwrap(), &site).unwrap_err().to_string();
        let expected =
            "the attention around node `turn` cannot carry an adapter: the query before its rotation was not found";
        assert_eq!(error, expected);
    }
}

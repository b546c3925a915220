//! The query of a site before its rotation.
//!
//! A rotation multiplies by cosines and sines; before it every way back from the query goes through one tensor, and the nearest
//! such tensor is the query as it was:
//! ```text
//! x ─ RotaryEmbedding ─ query
//!
//! x ─┬─────────────────────────── Mul cos ─┐            x ─ Split ─┬ Mul … Sub ─┐
//!    └─ (Slice | Neg | Concat | …)* ─ Mul sin ─ Add ─ query        └ Mul … Add ─ Concat ─ query
//!
//! x ─┬ Slice ─ any of these ─ Concat ─ query            of part of a head
//!    └ Slice ──────────────────┘
//! ```
//! What lays the rotated tensor out (Transpose, Reshape) is written again behind `x`. A query between which and its
//! projection no cosine stands is its own.

use std::collections::{BTreeMap, BTreeSet};

use super::{QuerySource, Site, shape, stopped};
use crate::fold::Result;
use crate::onnx::{Index, Node, NodeDef};

const HELP: &str = "train with query = post_rope, or export the base model with `prefold export`";
/// Nodes of a rotation: far more than any exporter writes.
const MAX_STEPS: usize = 128;

/// The unrotated query.
///
/// # Errors
/// When the rotation is of a kind that is not known.
pub(super) fn unrotated(index: &Index, site: &Site) -> Result<QuerySource> {
    let own = || QuerySource {
        tensor: site.query.clone(),
        layout: site.query_layout,
        nodes: Vec::new(),
        initializers: Vec::new(),
    };
    let mut layout = Vec::new();
    let mut tensor = site.query.as_str();
    while let Some(node) = index.producer(tensor).filter(|node| layout.len() < MAX_STEPS && lays_out(node)) {
        let Some(behind) = node.input(0) else { break };
        layout.push(node);
        tensor = behind;
    }
    let Some(node) = index.producer(tensor) else { return Ok(own()) };
    match before_rotation(index, tensor) {
        Ok(Some(found)) => rebuilt(site, found, &layout),
        Ok(None) => Ok(own()),
        Err(at) => {
            let at = at.unwrap_or(node);
            let reason =
                format!("its query before the rotation was not found; `{}` ({}) is not known", at.name(), at.op_type());
            Err(stopped(node, reason, HELP))
        }
    }
}

fn lays_out(node: &Node) -> bool {
    matches!(node.op_type(), "Cast" | "Identity" | "Reshape" | "Transpose") && node.domain().is_empty()
}

/// The tensor that every way back from the rotation goes through; none where nothing is rotated, and the node that is not known
/// where something else is.
fn before_rotation<'g>(index: &Index<'g>, rotated: &'g str) -> std::result::Result<Option<&'g str>, Option<&'g Node>> {
    // by the number of their producers: the last one is expanded first
    let mut open: BTreeMap<Option<usize>, BTreeSet<&str>> = BTreeMap::new();
    let place = |tensor: &str| index.producer(tensor).map(|node| node.id().index());
    open.entry(place(rotated)).or_default().insert(rotated);
    let mut turned = false;
    for _ in 0..MAX_STEPS {
        // integers of a quantiser are no query: the floats that they were made from are
        let is_float = |tensor: &str| index.producer(tensor).is_none_or(|node| !node.is("", "QuantizeLinear"));
        if let (true, [only]) = (turned, &open.values().flatten().copied().collect::<Vec<_>>()[..])
            && is_float(only)
        {
            return Ok(Some(only));
        }
        let Some((_, tensors)) = open.pop_last() else { break };
        let Some(node) = tensors.first().and_then(|tensor| index.producer(tensor)) else { break };
        let first = || node.input(0).into_iter().collect::<Vec<_>>();
        let behind: Vec<&str> = match (node.domain(), node.op_type()) {
            (_, "RotaryEmbedding") => {
                turned = true;
                first()
            }
            ("", "Add" | "Sub" | "Mul" | "Concat" | "Neg") => {
                let (angles, values): (Vec<&str>, Vec<&str>) =
                    node.inputs().iter().map(String::as_str).partition(|input| is_angle(index, input));
                // nothing but the exchange of a pair negates a query: tables may be constants
                turned |= node.op_type() == "Neg" || (!angles.is_empty() && node.op_type() == "Mul");
                values.into_iter().filter(|value| !is_constant(index, value)).collect()
            }
            (
                "",
                "Cast" | "DequantizeLinear" | "Gather" | "Identity" | "QuantizeLinear" | "Reshape" | "Slice" | "Split"
                | "Squeeze" | "Transpose" | "Unsqueeze",
            ) => first(),
            // a norm of what was turned
            ("", "LayerNormalization" | "RMSNormalization" | "SimplifiedLayerNormalization") if !turned => first(),
            _ if !turned && !is_turned(index, rotated) => return Ok(None),
            _ => return Err(Some(node)),
        };
        for tensor in behind {
            open.entry(place(tensor)).or_default().insert(tensor);
        }
    }
    if turned || is_turned(index, rotated) { Err(None) } else { Ok(None) }
}

fn is_constant(index: &Index, tensor: &str) -> bool {
    shape::Reader::new(index).constant(tensor)
}

fn is_angle(index: &Index, tensor: &str) -> bool {
    angles(index, tensor).is_some()
}

/// What made the cosines or sines that a tensor holds: the function, or what picks them from a table.
pub(super) fn angles<'g>(index: &Index<'g>, tensor: &str) -> Option<&'g Node> {
    let (mut tensor, mut picked) = (tensor, None);
    // one for the whole way, which a graph asks for at each of its products
    let mut reader = shape::Reader::new(index);
    for _ in 0..MAX_STEPS {
        if picked.is_some() && shape::is_weight(index, tensor) {
            return picked;
        }
        let node = index.producer(tensor)?;
        let behind = match node.op_type() {
            "Cos" | "Sin" => return Some(node),
            "Gather" | "GatherElements" | "GatherND" => {
                picked.get_or_insert(node);
                node.input(0)
            }
            "Cast" | "Concat" | "DequantizeLinear" | "Expand" | "Identity" | "QuantizeLinear" | "Reshape" | "Slice"
            | "Split" | "Squeeze" | "Tile" | "Transpose" | "Unsqueeze" => node.input(0),
            "Mul" | "Neg" => node.inputs().iter().map(String::as_str).find(|input| !reader.constant(input)),
            _ => None,
        };
        tensor = behind?;
    }
    None
}

/// Whether a rotation lies between a tensor and the projection that made it.
fn is_turned(index: &Index, tensor: &str) -> bool {
    let (mut open, mut seen) = (vec![tensor], BTreeSet::new());
    while let Some(tensor) = open.pop() {
        let Some(node) = index.producer(tensor).filter(|node| seen.len() < MAX_STEPS && seen.insert(node.id())) else {
            continue;
        };
        match node.op_type() {
            "RotaryEmbedding" => return true,
            "Mul" if node.inputs().iter().any(|input| is_angle(index, input)) => return true,
            "Shape" => {}
            _ if shape::is_product(node) => {}
            _ => open.extend(node.inputs().iter().map(String::as_str)),
        }
    }
    false
}

/// Whether every way back from a tensor ends at a product, and no rotation lies on it.
pub(super) fn is_unturned(index: &Index, tensor: &str) -> bool {
    let (mut open, mut seen) = (vec![tensor], BTreeSet::new());
    while let Some(tensor) = open.pop() {
        if tensor.is_empty() || shape::is_weight(index, tensor) {
            continue;
        }
        let Some(node) = index.producer(tensor) else { return false };
        if !seen.insert(node.id()) || node.is("", "Shape") || shape::is_product(node) {
            continue;
        }
        let turns = node.op_type() == "RotaryEmbedding"
            || (node.is("", "Mul") && node.inputs().iter().any(|input| is_angle(index, input)));
        if turns || seen.len() > MAX_STEPS {
            return false;
        }
        open.extend(node.inputs().iter().map(String::as_str));
    }
    true
}

/// The unrotated tensor, laid out as the rotated one is. `layout` is in the order from the query back.
fn rebuilt(site: &Site, tensor: &str, layout: &[&Node]) -> Result<QuerySource> {
    let mut tensor = tensor.to_owned();
    let mut nodes = Vec::with_capacity(layout.len());
    // a type that the rotation is computed in is not the query's
    let layout = layout.iter().rev().filter(|node| node.op_type() != "Cast");
    for (count, node) in layout.enumerate() {
        let name = format!("{}/unrotated/{}_{count}", site.prefix(), node.op_type());
        let output = format!("{name}/output_0");
        let inputs = std::iter::once(tensor.as_str()).chain(node.inputs().iter().skip(1).map(String::as_str));
        let mut copy = NodeDef::new(node.op_type(), name.as_str()).inputs(inputs).outputs([output.as_str()]);
        for attribute in node.attributes() {
            copy = match (attribute.as_int(), attribute.as_ints()) {
                (Some(value), _) => copy.attr_int(attribute.name(), value),
                (_, Some(values)) => copy.attr_ints(attribute.name(), values),
                _ => copy,
            };
        }
        nodes.push(copy);
        tensor = output;
    }
    Ok(QuerySource { tensor, layout: site.query_layout, nodes, initializers: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Query;
    use crate::base::testing::shared;
    use crate::fold::{Layout, locate};
    use crate::onnx::{DataType, Model, ModelBuilder, ValueDef};

    /// The producer of each site's unrotated query, by graph.
    #[test]
    fn the_query_before_an_exported_rotation_is_found() {
        let cases = [
            // transformers' `x · cos + rotate_half(x) · sin`, as torch's exporters write it
            ("torch_script17_eager/llama_gqa/model.onnx", "Transpose"),
            ("torch_dynamo18/qwen2/model.onnx", "Transpose"),
            ("optimum_with_past/llama_mha/model.onnx", "Transpose"),
            // of part of a head
            ("optimum_with_past/gpt_neox/model.onnx", "Slice"),
            ("torch_script17_eager/phi3/model.onnx", "Transpose"),
            // after a norm
            ("optimum_with_past/gemma3/model.onnx", "Mul"),
            // RotaryEmbedding
            ("ort_optimizer_with_past/llama_gqa/model.onnx", "Transpose"),
            ("ort_optimizer_with_past/phi3/model.onnx", "Transpose"),
            // none at all
            ("torch_script17_eager/gpt2/model.onnx", "Transpose"),
            ("optimum_with_past/gpt2/model.onnx", "Transpose"),
            ("optimum_merged/llama_gqa/decoder_model_merged.onnx", "Transpose"),
        ];
        for (name, expected) in cases {
            let Some(path) = shared(&format!("graphs/{name}")) else { return };
            let model = Model::open(&path).unwrap();
            for site in locate::sites(&model).unwrap() {
                let source = locate::query(&model, &site, Query::PreRope).unwrap();
                assert_eq!((source.layout, source.nodes.len()), (Layout::HeadsFirst, 0), "{name}");
                assert_eq!(source.tensor == site.query, name.contains("gpt2"), "{name}");
                let producer = locate::scope::of_site(&model, &site, |index| {
                    Ok(index.producer(&source.tensor).unwrap().op_type().to_owned())
                });
                assert_eq!(producer.unwrap(), expected, "{name}");
            }
        }
    }

    fn query_of(nodes: Vec<NodeDef>) -> Result<(String, Vec<String>)> {
        let mut builder = ModelBuilder::new("g", 8);
        let value =
            |name: &str, rank| ValueDef::new(name, DataType::Float, (0..rank).map(|_| crate::onnx::Dim::Unknown));
        builder.opset("", 17).input(value("x", 4)).input(value("angle", 4)).output(value("query", 4));
        builder.node(NodeDef::new("Cos", "cosine").inputs(["angle"]).outputs(["cos"]));
        builder.node(NodeDef::new("Sin", "sine").inputs(["angle"]).outputs(["sin"]));
        builder.node(NodeDef::new("Relu", "made").inputs(["x"]).outputs(["q"]));
        for node in nodes {
            builder.node(node);
        }
        let model = builder.build().unwrap();
        let anchor = model.graph().nodes().last().unwrap();
        let site = Site::new("decomposed", anchor, ("query", Layout::HeadsFirst), ("output", Layout::HeadsFirst));
        let source = unrotated(&Index::new(model.graph()), &site)?;
        Ok((source.tensor, source.nodes.iter().map(|node| node.name().to_owned()).collect()))
    }

    /// Halves that are turned by themselves, in the layout before heads come first.
    #[test]
    fn what_lays_the_rotated_query_out_is_written_again() {
        let node = |op: &str, name: &str, inputs: &[&str], outputs: &[&str]| {
            NodeDef::new(op, name).inputs(inputs.iter().copied()).outputs(outputs.iter().copied())
        };
        let (tensor, nodes) = query_of(vec![
            node("Split", "halves", &["q"], &["a", "b"]).attr_int("axis", -1),
            node("Mul", "1", &["a", "cos"], &["ac"]),
            node("Mul", "2", &["b", "sin"], &["bs"]),
            node("Sub", "3", &["ac", "bs"], &["first"]),
            node("Mul", "4", &["b", "cos"], &["bc"]),
            node("Mul", "5", &["a", "sin"], &["as"]),
            node("Add", "6", &["bc", "as"], &["second"]),
            node("Concat", "7", &["first", "second"], &["turned"]).attr_int("axis", -1),
            node("Transpose", "8", &["turned"], &["query"]).attr_ints("perm", &[0, 2, 1, 3]),
        ])
        .unwrap();
        assert_eq!(nodes, ["/prefold/layers.0/unrotated/Transpose_0"]);
        assert_eq!(tensor, "/prefold/layers.0/unrotated/Transpose_0/output_0");
    }

    #[test]
    fn an_unknown_rotation_is_an_error_that_names_its_node() {
        let node = |op: &str, name: &str, inputs: &[&str], output: &str| {
            NodeDef::new(op, name).inputs(inputs.iter().copied()).outputs([output])
        };
        let error = query_of(vec![
            node("Mul", "turn", &["q", "cos"], "turned"),
            node("Softplus", "strange", &["turned"], "query"),
        ]);
        let expected = "the attention around node `strange` cannot carry an adapter: its query before the rotation was not \
                        found; `strange` (Softplus) is not known";
        assert_eq!(error.unwrap_err().to_string(), expected);
    }
}

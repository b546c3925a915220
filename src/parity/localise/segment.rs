//! The nodes between what agrees and what departs, and what each computes in another runtime from the same inputs.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use super::tapped::Seen;
use super::types::element_types;
use crate::files::TemporaryFolder;
use crate::onnx::{DataType, Dim, Graph, Index, MODEL_NAME, Model, Node, NodeId, ValueDef, cut};
use crate::parity::Result;
use crate::runtime::{self, NamedValues, Session, Value};

/// Nodes of a segment that are looked at one by one; a longer one is named by its ends.
const MOST: usize = 4096;

/// Nodes between tensors.
pub(super) struct Segment {
    /// In the graph's order.
    pub(super) nodes: Vec<NodeId>,
    /// What they read from outside: activations, no constants.
    pub(super) reads: BTreeSet<String>,
    /// What they make.
    pub(super) makes: Vec<String>,
}

impl Segment {
    /// The nodes that `departing` is made by and none of `agreeing` is. What is computed from `departing` and agrees, because it shows
    /// too little of it, does not count.
    pub(super) fn between(model: &Model, departing: &str, agreeing: &[&str]) -> Self {
        let index = Index::new(model.graph());
        let later = made_from(model.graph(), departing);
        let agreeing: Vec<&str> = agreeing
            .iter()
            .filter(|tensor| !later.contains(**tensor))
            .map(|tensor| {
                let node = index.producer(tensor);
                node.and_then(|node| node.input(cached(node, tensor)?)).unwrap_or(tensor)
            })
            .collect();
        let innocent = vindicated(&index, &agreeing);
        let guilty = behind(&index, &[departing], &innocent);
        let nodes: Vec<&Node> =
            model.graph().nodes().iter().filter(|node| guilty.contains(&node.id())).take(MOST).collect();
        Self::of(&index, &nodes)
    }

    /// One node.
    pub(super) fn only(model: &Model, id: NodeId) -> Self {
        let index = Index::new(model.graph());
        let nodes: Vec<&Node> = model.graph().node(id).into_iter().collect();
        Self::of(&index, &nodes)
    }

    fn of(index: &Index, nodes: &[&Node]) -> Self {
        let named = |names: &[String]| names.iter().filter(|name| !name.is_empty()).cloned().collect::<Vec<_>>();
        let makes: Vec<String> = nodes.iter().flat_map(|node| named(node.outputs())).collect();
        let made: HashSet<&str> = makes.iter().map(String::as_str).collect();
        // a default of an input is no constant: another value may be fed
        let constant = |name: &str| index.initializer(name).is_some() && index.input(name).is_none();
        let reads = nodes.iter().flat_map(|node| named(node.inputs()));
        let reads = reads.filter(|name| !made.contains(name.as_str()) && !constant(name)).collect();
        Self { nodes: nodes.iter().map(|node| node.id()).collect(), reads, makes }
    }

    /// Every tensor whose value is needed.
    pub(super) fn tensors(&self) -> BTreeSet<String> {
        self.reads.iter().chain(&self.makes).cloned().collect()
    }

    /// The segment as a model of its own that gives `outputs`, with what it is fed as it was seen. None where something was not seen.
    pub(super) fn model(&self, whole: &Model, folder: &Path, seen: &Seen, outputs: &[String]) -> Option<Cut> {
        let types = element_types(whole.graph());
        let mut feeds = NamedValues::new();
        let mut inputs = Vec::new();
        for name in &self.reads {
            // a default that was not fed is a constant
            let Some(value) = seen.get(name) else {
                let index = Index::new(whole.graph());
                index.initializer(name)?;
                continue;
            };
            inputs.push(declared(name, value));
            feeds.insert(name.as_str(), value.clone());
        }
        let outputs: Vec<ValueDef> = outputs
            .iter()
            .filter_map(|name| match seen.get(name) {
                Some(value) => Some(declared(name, value)),
                None => types.get(name.as_str()).map(|found| ValueDef::of_any_rank(name.as_str(), *found)),
            })
            .collect();
        let nodes = self.nodes.iter().copied().collect();
        let model = cut(whole, folder, &nodes, &inputs, &outputs);
        let model = model.inspect_err(|error| tracing::debug!("a segment cannot be cut out: {error}")).ok()?;
        Some(Cut { model, feeds })
    }
}

/// A segment as a model.
pub(super) struct Cut {
    pub(super) model: Model,
    /// In the order of its inputs.
    pub(super) feeds: NamedValues,
}

fn declared(name: &str, value: &Value) -> ValueDef {
    let dims = value.shape().iter().map(|size| Dim::Value(*size as i64));
    ValueDef::new(name, DataType::from_code(value.dtype().onnx()), dims)
}

/// The nodes that tensors which agree are made by, up to those that took a part of a tensor: other parts may be wrong.
fn vindicated(index: &Index, agreeing: &[&str]) -> HashSet<NodeId> {
    let parts = index.graph().nodes().iter().filter(|node| takes_a_part(index, node));
    let parts: HashSet<NodeId> = parts.map(Node::id).collect();
    let mut found = behind(index, agreeing, &parts);
    // what took one part only is read by them as a whole
    let readers: Vec<&Node> = index.graph().nodes().iter().filter(|node| found.contains(&node.id())).collect();
    let read = readers.iter().flat_map(|node| node.inputs()).map(String::as_str).chain(agreeing.iter().copied());
    let taken = read.filter_map(|tensor| index.producer(tensor)).filter(|node| parts.contains(&node.id()));
    found.extend(taken.filter(|node| node.outputs().len() == 1).map(Node::id).collect::<Vec<_>>());
    found
}

/// Whether a node gives parts of a tensor that is computed.
fn takes_a_part(index: &Index, node: &Node) -> bool {
    let constant = |slot: usize| node.input(slot).is_none_or(|input| index.initializer(input).is_some());
    node.is("", "Split") || node.is("", "Slice") || node.is("", "Gather") && !constant(0) && constant(1)
}

/// The nodes that tensors are made by, without going behind those of `known`.
pub(super) fn behind(index: &Index, tensors: &[&str], known: &HashSet<NodeId>) -> HashSet<NodeId> {
    let mut found = HashSet::new();
    let mut open: Vec<&Node> = tensors.iter().filter_map(|tensor| index.producer(tensor)).collect();
    while let Some(node) = open.pop() {
        if known.contains(&node.id()) || !found.insert(node.id()) {
            continue;
        }
        let captured = node.subgraphs().flat_map(|graph| graph.nodes()).flat_map(|node| node.inputs());
        let before = node.inputs().iter().chain(captured).filter_map(|input| index.producer(input));
        open.extend(before.filter(|node| index.graph().node(node.id()).is_some()));
    }
    found
}

/// The tensors that are computed from one, and itself.
fn made_from<'g>(graph: &'g Graph, tensor: &'g str) -> HashSet<&'g str> {
    let mut found = HashSet::from([tensor]);
    for node in graph.nodes() {
        let reached = node.inputs().iter().enumerate().filter(|(_, input)| found.contains(input.as_str()));
        let reached: Vec<usize> = reached.map(|(slot, _)| slot).collect();
        let is_made = |output: &&str| match cached(node, output) {
            Some(own) => reached.iter().any(|slot| *slot == own || *slot > 2),
            None => !reached.is_empty(),
        };
        let outputs = node.outputs().iter().map(String::as_str).filter(|output| !output.is_empty());
        let outputs: Vec<&str> = outputs.filter(is_made).collect();
        found.extend(outputs);
    }
    found
}

/// The slot of the keys or values that an attention operator puts into this output, a cache: the others of its first three inputs have
/// no part in it.
fn cached(node: &Node, output: &str) -> Option<usize> {
    let attends = match node.domain() {
        "" => node.op_type() == "Attention",
        "com.microsoft" => matches!(node.op_type(), "GroupQueryAttention" | "MultiHeadAttention"),
        _ => false,
    };
    let are_apart = [1, 2].iter().all(|slot| node.input(*slot).is_some_and(|input| !input.is_empty()));
    let slot = [1, 2].into_iter().find(|slot| node.output(*slot) == Some(output));
    slot.filter(|_| attends && are_apart)
}

/// The first node of which a runtime makes something else than was seen, from the same inputs.
pub(super) struct Disagreement {
    pub(super) node: NodeId,
    pub(super) tensor: String,
    pub(super) distance: f64,
    /// What the other runtime makes.
    pub(super) other: Value,
}

/// What another runtime makes of a segment.
pub(super) struct Second {
    /// All that its nodes make.
    pub(super) made: NamedValues,
    /// The first that differs; none where all is equal to the last few bits.
    pub(super) first: Option<Disagreement>,
}

/// Runs a segment in another runtime and compares what each node makes.
///
/// # Errors
/// When the runtime cannot run it.
pub(super) fn second_way(
    cut: &Cut,
    whole: &Model,
    segment: &Segment,
    seen: &Seen,
    relative: f64,
    open: &dyn Fn(&Path) -> runtime::Result<Box<dyn Session>>,
) -> Result<Second> {
    let failed = crate::files::Error::io("create a temporary folder in", std::env::temp_dir());
    let folder = TemporaryFolder::new().map_err(failed)?;
    let path = folder.path().join(MODEL_NAME);
    cut.model.save(&path)?;
    let made = open(&path)?.run(cut.feeds.clone())?;
    let first = first_difference(&made, whole, segment, seen, relative);
    Ok(Second { made, first })
}

fn first_difference(
    made: &NamedValues,
    whole: &Model,
    segment: &Segment,
    seen: &Seen,
    relative: f64,
) -> Option<Disagreement> {
    let nodes = segment.nodes.iter().filter_map(|id| whole.graph().node(*id));
    for (node, output) in nodes.flat_map(|node| node.outputs().iter().map(move |output| (node, output))) {
        let (Some(own), Some(other)) = (seen.get(output), made.get(output)) else { continue };
        if let Some(distance) = too_far(own, other, relative) {
            let (tensor, other) = (output.clone(), other.clone());
            return Some(Disagreement { node: node.id(), tensor, distance, other });
        }
    }
    None
}

/// The distance of two tensors where it is more than a part of their largest element.
fn too_far(own: &Value, other: &Value, relative: f64) -> Option<f64> {
    if own.shape() != other.shape() {
        return Some(f64::MAX);
    }
    if !own.dtype().is_float() {
        let (own, other) = (own.clone().into_i64().ok()?, other.clone().into_i64().ok()?);
        let most = own.iter().zip(&other).map(|(a, b)| a.abs_diff(*b)).max()?;
        return (most > 0).then_some(most as f64);
    }
    let (own, other) = (own.clone().into_f64().ok()?, other.clone().into_f64().ok()?);
    // what both hide, the lowest number or one below it, is equal
    let hidden = |x: f64| x <= f64::from(f32::MIN) * 0.4;
    let (mut most, mut largest) = (0.0f64, 0.0f64);
    for (a, b) in own.iter().zip(&other) {
        if a == b || a.is_nan() && b.is_nan() || hidden(*a) && hidden(*b) {
            continue;
        }
        let distance = (a - b).abs();
        most = most.max(if distance.is_finite() { distance } else { f64::MAX });
    }
    for x in own.iter().filter(|x| x.is_finite() && !hidden(**x)) {
        largest = largest.max(x.abs());
    }
    (most > relative * largest.max(f64::MIN_POSITIVE)).then_some(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{ModelBuilder, NodeDef};

    /// `x` → `table`; `x`, `table` → `query`, `key`; `x` → `value`; attention, whose output is read once more.
    fn graph() -> Model {
        let mut builder = ModelBuilder::new("test", 8);
        builder.opset("", 17).opset("com.microsoft", 1);
        for input in ["x", "past_key", "past_value"] {
            builder.input(ValueDef::new(input, DataType::Float, [Dim::Value(1)]));
        }
        let mut node = |domain: &str, op: &str, inputs: &[&str], outputs: &[&str]| {
            let name = outputs.first().copied().unwrap_or_default();
            let node = NodeDef::new(op, name).domain(domain);
            builder.node(node.inputs(inputs.iter().copied()).outputs(outputs.iter().copied()));
        };
        node("", "Cos", &["x"], &["table"]);
        node("", "Mul", &["x", "table"], &["query"]);
        node("", "Mul", &["x", "table"], &["key"]);
        node("", "Relu", &["x"], &["value"]);
        let read = ["query", "key", "value", "past_key", "past_value"];
        node("com.microsoft", "GroupQueryAttention", &read, &["mixed", "present_key", "present_value"]);
        node("", "Relu", &["mixed"], &["after"]);
        builder.build().unwrap()
    }

    fn between(departing: &str, agreeing: &[&str]) -> Vec<String> {
        Segment::between(&graph(), departing, agreeing).makes
    }

    #[test]
    fn what_comes_after_a_departure_vindicates_nothing_before_it() {
        assert_eq!(between("query", &["x"]), ["table", "query"]);
        assert_eq!(between("query", &["x", "after"]), ["table", "query"]);
        assert_eq!(between("mixed", &["query", "after"])[..2], ["key".to_owned(), "value".into()]);
    }

    #[test]
    fn a_part_that_agrees_says_nothing_of_the_other_parts() {
        let mut builder = ModelBuilder::new("test", 8);
        builder.opset("", 17).input(ValueDef::new("x", DataType::Float, [Dim::Value(2)]));
        let mut node = |op: &str, input: &str, outputs: &[&str]| {
            let node = NodeDef::new(op, outputs[0]).inputs([input]);
            builder.node(node.outputs(outputs.iter().copied()));
        };
        node("Relu", "x", &["packed"]);
        node("Split", "packed", &["query", "value"]);
        node("Cos", "query", &["rotated"]);
        node("Slice", "packed", &["slice"]);
        node("Cos", "slice", &["key"]);
        node("Sin", "slice", &["other"]);
        let model = builder.build().unwrap();
        let between = |departing: &str, agreeing: &[&str]| Segment::between(&model, departing, agreeing).makes;
        assert_eq!(between("value", &["x", "rotated"]), ["packed", "query", "value"]);
        assert_eq!(between("value", &["x", "query"]), ["packed", "query", "value"]);
        // both read all of the slice
        assert_eq!(between("other", &["x", "key"]), ["other"]);
        assert_eq!(between("value", &["packed"]), ["query", "value"]);
    }

    #[test]
    fn a_cache_that_agrees_tells_of_what_was_put_into_it_alone() {
        // the key that agrees was turned by the same table
        assert_eq!(between("query", &["present_key"]), ["query"]);
        assert_eq!(between("query", &["present_value"]), ["table", "query"]);
        assert_eq!(between("key", &["present_key"]), ["table", "key"]);
        let attention = ["mixed", "present_key", "present_value"];
        assert_eq!(between("mixed", &["query", "present_key", "present_value"]), attention);
    }
}

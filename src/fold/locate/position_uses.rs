//! Where positions enter a graph that has no input for them.
//!
//! ```text
//! positions ─ RotaryEmbedding | GroupQueryAttention | Gather of a table
//! positions ─ (Mul | MatMul) with frequencies ─ (Concat | Transpose | …)* ─ Cos | Sin
//! ```
//! What else the graph derives from the same numbers, its causal mask first of all, is not among them.

use super::positions::{self, Origins};
use super::shape;
use super::unrotated::angles;
use crate::onnx::{Index, Node, Use};

const MICROSOFT: &str = "com.microsoft";
/// Nodes between frequencies and cosines.
const MAX_STEPS: usize = 16;

/// The input slots that read positions to turn or to embed by them, each once, with whether they are floats.
pub(in crate::fold) fn position_uses(index: &Index) -> Vec<(Use, bool)> {
    let mut found: Vec<(Use, bool)> = Vec::new();
    let mut origins = Origins::new(index);
    for node in index.graph().nodes() {
        let at = |slot: usize| node.input(slot).map(|_| (Use { node: node.id(), slot }, false));
        let rotates = || node.attribute("do_rotary").and_then(|a| a.as_int()).unwrap_or(0) != 0;
        let mut of_angle =
            |slot: usize| node.input(slot).and_then(|tensor| behind(index, &mut origins, angles(index, tensor)?));
        match (node.domain(), node.op_type()) {
            (MICROSOFT, "RotaryEmbedding") => found.extend(at(1)),
            (MICROSOFT, "GroupQueryAttention") if rotates() => found.extend(at(9)),
            ("", "RotaryEmbedding") => found.extend(at(3).or_else(|| of_angle(1))),
            ("", "Mul") => found.extend((0..2).filter_map(&mut of_angle)),
            ("", "Gather") if positions::table(&mut origins, node).is_some() => found.extend(at(1)),
            _ => {}
        }
    }
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|(reader, _)| seen.insert((reader.node, reader.slot)));
    // a product with frequencies lies in one graph, its cosines perhaps in another
    found.retain(|(reader, _)| index.graph().node(reader.node).is_some());
    found
}

/// Where the positions of cosines, or of rows of a table of them, are read.
fn behind(index: &Index, origins: &mut Origins, made: &Node) -> Option<(Use, bool)> {
    if made.is("", "Gather") {
        let positions = made.input(1).filter(|tensor| !origins.is_tokens(tensor));
        return positions.map(|_| (Use { node: made.id(), slot: 1 }, false));
    }
    let mut tensor = made.input(0)?;
    for _ in 0..MAX_STEPS {
        let node = index.producer(tensor)?;
        let constant = |slot: usize| node.input(slot).is_some_and(|input| is_constant(index, input));
        tensor = match node.op_type() {
            "Mul" | "MatMul" | "FusedMatMul" => match (constant(0), constant(1)) {
                (true, false) => return Some((Use { node: node.id(), slot: 1 }, true)),
                (false, true) => return Some((Use { node: node.id(), slot: 0 }, true)),
                _ => return None,
            },
            "Cast" | "Concat" | "Expand" | "Identity" | "Reshape" | "Slice" | "Squeeze" | "Transpose" | "Unsqueeze" => {
                node.input(0)?
            }
            _ => return None,
        };
    }
    None
}

/// Frequencies, be they repeated for each row.
fn is_constant(index: &Index, tensor: &str) -> bool {
    let mut tensor = tensor;
    for _ in 0..MAX_STEPS {
        if shape::is_weight(index, tensor) {
            return true;
        }
        let Some(node) = index.producer(tensor) else { return false };
        match (node.op_type(), node.input(0)) {
            ("Cast" | "Expand" | "Reshape" | "Transpose" | "Unsqueeze", Some(behind)) => tensor = behind,
            _ => return false,
        }
    }
    false
}

//! Softmax attention of standard operators, as exporters and optimizers write it. The match starts at the Softmax and goes
//! both ways.
//!
//! ```text
//!                    query ─ (Mul | Div scale)* ─┐
//!                                                ├ MatMul ─ (scale | soft cap | mask | Cast | Reshape)* ─ Softmax
//! keys ─ (repeat)* ─ Transpose ─ (Mul | Div)* ───┘                                                           │
//!                                                                            (NaN guard | Cast | Dropout | Reshape)*
//!                                                                                                            │
//! values ─ (repeat)* ───────────────────────────────────────────────────────────────────────────────────  MatMul
//!                                                                                                            │
//!                       o_proj ─ (Reshape)* ─ merged ─ Reshape ─ Transpose ─ output ─ (Cast | Reshape)* ─────┘
//! ```
//!
//! - Either MatMul may be a `FusedMatMul` of `com.microsoft`, whose alpha is a scale and whose transB transposes the keys.
//! - A scale is a number, or computed from numbers and dimensions; it stands on the scores, the query, or with its root on
//!   query and keys. The site's query is the one before any of it. What may be a scale or hide one is refused.
//! - A mask is added, subtracted, or chosen by `Where`; the soft cap is `Tanh` between two scales; a NaN guard is `IsNaN` and
//!   `Where`, both of which read the softmax.
//! - Products of three, four and five dimensions are told apart by their ranks ([`Axes`]).
//!
//! What made the query does not matter: a norm, a rotation of all or part of it, or none.
//!
//! In a graph of a static quantiser `QuantizeLinear ─ DequantizeLinear` stands on any of these edges. The query is the one before
//! them; where the term is added, [`quantized`](super::quantized) says.
//!
//! Query and output are `[batch, heads, seq, head_dim]`, or where the graph only has that, `[batch, seq, heads · head_dim]`. A query
//! that is rounded before its heads are put first is `[batch, seq, heads, head_dim]`; a Transpose beside the graph's own turns it.

use std::collections::BTreeSet;

use super::axes::Axes;
use super::unrotated::unrotated;
use super::{Layout, Site, shape, stopped};
use crate::fold::Result;
use crate::onnx::{Index, Node, Use};

const SHAPE: &str = "decomposed";
const MICROSOFT: &str = "com.microsoft";
pub(super) const HELP: &str = "this shape of attention is not known yet: `prefold inspect --explain` tells how far the \
                               match got; a graph that `prefold export` writes is always known";
const INTEGER_HELP: &str = "quantise with quant_format=QuantFormat.QDQ, or only products with weights";
/// Nodes on one way through a block: far more than any exporter writes, and an end to every walk.
pub(super) const MAX_STEPS: usize = 64;

pub(super) fn locate(index: &Index, softmax: &Node) -> Option<Result<Site>> {
    if !is_anchor(softmax) {
        return None;
    }
    let products = score_products(index, softmax);
    let scores = *products.first()?;
    if let Some(integer) = std::iter::once(softmax).chain(products.iter().copied()).find(|node| is_integer(node)) {
        let reason = format!("it computes in integers: `{}` ({})", integer.name(), integer.op_type());
        return Some(Err(stopped(softmax, reason, INTEGER_HELP)));
    }
    Some(match products.get(1) {
        None => site(index, softmax, scores),
        Some(other) => {
            let reason = format!("its scores are the sum of two products, `{}` and `{}`", scores.name(), other.name());
            Err(stopped(softmax, reason, HELP))
        }
    })
}

/// A softmax, of attention or not.
pub(super) fn is_anchor(node: &Node) -> bool {
    node.is("", "Softmax") || node.is(MICROSOFT, "QLinearSoftmax")
}

/// Operators that read and write 8-bit integers.
fn is_integer(node: &Node) -> bool {
    matches!(node.op_type(), "QLinearMatMul" | "QLinearSoftmax" | "MatMulInteger" | "MatMulIntegerToFloat")
}

/// What a match finds, step by step, as far as it gets.
pub(super) fn steps(index: &Index, softmax: &Node) -> Vec<String> {
    let mut steps = Vec::new();
    let [scores] = score_products(index, softmax)[..] else { return steps };
    steps.push(format!("scores: {}", scores.label()));
    let Ok(axes) = axes(index, softmax, scores) else { return steps };
    let Ok((query, _)) = query(index, softmax, scores, &axes) else { return steps };
    let scale = if scores.input(0) == Some(query.as_str()) { "" } else { ", before its scale or layout" };
    steps.push(format!("query: `{query}`{scale}"));
    let Ok(values) = weighted_values(index, softmax) else { return steps };
    steps.push(format!("weights times values: {}", values.label()));
    let Ok(output) = output(index, softmax, values, axes) else { return steps };
    steps.push(format!("output: `{}`", output.tensor));
    steps
}

/// What the dimensions of the products mean, by how many there are.
fn axes(index: &Index, softmax: &Node, scores: &Node) -> Result<Axes> {
    let rank = [scores.input(0), scores.output(0), softmax.input(0), scores.input(1)];
    let rank = rank.into_iter().flatten().find_map(|tensor| shape::rank(index, tensor));
    rank.and_then(Axes::of_product).ok_or_else(|| {
        let found = rank.map_or("an unknown number of".to_owned(), |rank| rank.to_string());
        stopped(softmax, format!("the product of its scores, `{}`, has {found} dimensions", scores.name()), HELP)
    })
}

fn site(index: &Index, softmax: &Node, scores: &Node) -> Result<Site> {
    let axes = axes(index, softmax, scores)?;
    let (query, query_layout) = query(index, softmax, scores, &axes)?;
    let output = output(index, softmax, weighted_values(index, softmax)?, axes)?;
    let mut site = Site {
        width: output.width,
        readers: readers(index, output.tensor),
        ..Site::new(SHAPE, softmax, (&query, query_layout), (output.tensor, output.layout))
    };
    refuse_scaled_rotation(index, softmax, scores, &site)?;
    (site.num_heads, site.head_dim) = heads(index, &site);
    if let (None, Some(width), Some(dim)) = (site.num_heads, site.width, site.head_dim) {
        site.num_heads = (width % dim == 0).then_some(width / dim);
    }
    Ok(site)
}

/// The products of two computed tensors that the scores of a softmax are made of. None where it is not attention: the softmax
/// of a router or of logits reads a product with weights.
pub(super) fn score_products<'g>(index: &Index<'g>, softmax: &Node) -> Vec<&'g Node> {
    let mut open: Vec<&str> = softmax.input(0).into_iter().collect();
    let (mut seen, mut products) = (BTreeSet::new(), Vec::new());
    while let Some(tensor) = open.pop() {
        let Some(node) = index.producer(tensor).filter(|node| seen.len() < MAX_STEPS && seen.insert(node.id())) else {
            continue;
        };
        let inputs = |slots: &[usize]| slots.iter().filter_map(|&slot| node.input(slot)).collect::<Vec<_>>();
        match node.op_type() {
            "MatMul" | "FusedMatMul" if !inputs(&[0, 1]).iter().any(|side| shape::is_weight(index, side)) => {
                products.push(node);
            }
            "QLinearMatMul" if !inputs(&[0, 3]).iter().any(|side| shape::is_weight(index, side)) => products.push(node),
            "MatMulInteger" | "MatMulIntegerToFloat"
                if !inputs(&[0, 1]).iter().any(|side| shape::is_weight(index, side)) =>
            {
                products.push(node);
            }
            "Cast" | "Clip" | "DequantizeLinear" | "Div" | "Identity" | "QuantizeLinear" | "Reshape" | "Squeeze"
            | "Tanh" | "Unsqueeze" => {
                open.extend(inputs(&[0]));
            }
            "QLinearAdd" | "QLinearMul" => open.extend(inputs(&[0, 3])),
            "Add" | "Sub" | "Mul" | "Max" | "Min" => open.extend(inputs(&[0, 1])),
            "Where" => open.extend(inputs(&[1, 2])),
            // a sink beside the scores
            "Concat" => open.extend(node.inputs().iter().map(String::as_str)),
            _ => {}
        }
    }
    products
}

/// The query before any scale, in a layout that an adapter is written in.
fn query(index: &Index, softmax: &Node, scores: &Node, axes: &Axes) -> Result<(String, Layout)> {
    refuse_transposed(softmax, scores, &["transA", "transBatchA"])?;
    let Some(left) = scores.input(0) else {
        return Err(stopped(softmax, format!("`{}` has no left operand", scores.name()), HELP));
    };
    let Back { found, unknown, .. } = back(index, left, axes.clone());
    if let Some(unknown) = unknown {
        return Err(stopped(softmax, unknown, HELP));
    }
    let known = found.iter().find_map(|(tensor, axes)| Some(((*tensor).to_owned(), axes.layout()?)));
    let turned = found.iter().find(|(_, axes)| axes.is_seq_first());
    known.or(turned.map(|(tensor, _)| ((*tensor).to_owned(), Layout::SeqFirst))).ok_or_else(|| {
        let lies = found.first().map(|(tensor, axes)| format!("its query `{tensor}` lies as {axes}"));
        stopped(softmax, lies.unwrap_or_else(|| "its query was not found".into()), HELP)
    })
}

/// The query of an operator before a scale that the graph applies to it first, as OPT's does; none where there is no scale. In
/// the layout that the operator reads where there is one, else in one that `fits`; where it cannot be told, why.
pub(super) fn before_scale(
    index: &Index,
    query: &str,
    layout: Layout,
    fits: impl Fn(Layout) -> bool,
) -> Option<std::result::Result<(String, Layout), String>> {
    let Back { found, scaled, unknown } = back(index, query, Axes::of_layout(layout));
    if let Some(unknown) = unknown {
        return Some(Err(unknown));
    }
    let known = || found.iter().filter_map(|(tensor, axes)| Some(((*tensor).to_owned(), axes.layout()?)));
    let fitting = known().find(|(_, found)| *found == layout).or_else(|| known().find(|(_, found)| fits(*found)));
    let lies = || found.first().map_or(String::new(), |(tensor, axes)| format!("`{tensor}` lies as {axes}"));
    scaled.then(|| fitting.ok_or_else(|| format!("its query is scaled before it, and behind the scale {}", lies())))
}

/// The way from what a product or an operator reads back through scales, quantisers and layouts.
struct Back<'g> {
    /// What lies between the last of the scales and quantisers, and the end of the way.
    found: Vec<(&'g str, Axes)>,
    /// Whether there was a scale.
    scaled: bool,
    /// What ends the way and may be or hide a scale.
    unknown: Option<String>,
}

fn back<'g>(index: &Index<'g>, query: &'g str, axes: Axes) -> Back<'g> {
    let (mut tensor, mut axes) = (query, axes);
    let mut back = Back { found: vec![(tensor, axes.clone())], scaled: false, unknown: None };
    for _ in 0..MAX_STEPS {
        let Some(node) = index.producer(tensor) else { break };
        if let Some(unscaled) = unscaled(index, node) {
            tensor = unscaled;
            back.found.clear();
            back.scaled = true;
        } else {
            let Some((behind, before)) = laid_out(index, node, &axes) else {
                let hidden = || format!("{} changes its query behind its scale", node.label());
                back.unknown = unknown_scale(index, node).or_else(|| hides_scale(index, node).then(hidden));
                break;
            };
            (tensor, axes) = (behind, before);
            // what it made are integers, and what was made of them is rounded
            if node.is("", "QuantizeLinear") {
                back.found.clear();
            }
        }
        back.found.push((tensor, axes.clone()));
    }
    back
}

/// Why the end of a way may be a scale.
fn unknown_scale(index: &Index, node: &Node) -> Option<String> {
    let is_factor = matches!(node.op_type(), "Mul" | "Div");
    let by = node.inputs().iter().take(2).find(|input| is_factor && shape::is_computed_number(index, input))?;
    Some(format!("{} may scale its query: what `{by}` is was not found out", node.label()))
}

/// Whether a scale stands behind a node that changes every element by itself.
fn hides_scale(index: &Index, node: &Node) -> bool {
    let mut node = node;
    for step in 0..MAX_STEPS {
        let is_scale = unscaled(index, node).is_some() || unknown_scale(index, node).is_some();
        if is_scale {
            return step > 0;
        }
        let behind = match node.op_type() {
            "Abs" | "Add" | "Clip" | "Erf" | "Exp" | "Max" | "Min" | "Neg" | "Pow" | "Relu" | "Sigmoid" | "Sqrt"
            | "Sub" | "Sum" | "Tanh" | "Where" => {
                let mut values = node.inputs().iter().take(MAX_STEPS).filter(|input| !shape::is_uniform(index, input));
                if let (Some(values), None) = (values.next(), values.next()) { Some(values.as_str()) } else { None }
            }
            _ => laid_out(index, node, &Axes::unknown()).map(|(behind, _)| behind),
        };
        let Some(behind) = behind.and_then(|behind| index.producer(behind)) else { return false };
        node = behind;
    }
    false
}

/// What a scale is applied to.
fn unscaled<'g>(index: &Index<'g>, node: &'g Node) -> Option<&'g str> {
    let (left, right) = (node.input(0)?, node.input(1)?);
    match node.op_type() {
        "Mul" | "Div" if shape::is_uniform(index, right) => Some(left),
        "Mul" if shape::is_uniform(index, left) => Some(right),
        _ => None,
    }
}

/// Whether a scale stands between the product of the scores, or what its sides are made of, and the softmax.
fn is_scaled(index: &Index, softmax: &Node, scores: &Node) -> bool {
    let after = softmax.input(0).and_then(|tensor| scaled_on_the_way(index, tensor, scores, &mut BTreeSet::new()));
    let alpha = scores.attribute("alpha").and_then(|alpha| alpha.as_float()).is_some_and(|alpha| alpha != 1.0);
    let side = |slot: usize| scores.input(slot).is_some_and(|side| back(index, side, Axes::unknown()).scaled);
    after == Some(true) || alpha || side(0) || side(1)
}

/// Whether a tensor that is made of a node's product is scaled on the way; none where it is not made of it.
fn scaled_on_the_way<'g>(
    index: &Index<'g>,
    tensor: &'g str,
    product: &Node,
    seen: &mut BTreeSet<&'g str>,
) -> Option<bool> {
    let node = index.producer(tensor).filter(|_| seen.len() < MAX_STEPS && seen.insert(tensor))?;
    if node.id() == product.id() {
        return Some(false);
    }
    let behind = node.inputs().iter().take(MAX_STEPS).find_map(|input| scaled_on_the_way(index, input, product, seen));
    behind.map(|scaled| scaled || unscaled(index, node).is_some())
}

/// An error where the one scale of the scores stands before the rotation of the query: what is rotated is scaled then.
fn refuse_scaled_rotation(index: &Index, softmax: &Node, scores: &Node, site: &Site) -> Result<()> {
    let Ok(source) = unrotated(index, site) else { return Ok(()) };
    let rotates = !source.nodes.is_empty() || source.tensor != site.query;
    if rotates && back(index, &source.tensor, Axes::unknown()).scaled && !is_scaled(index, softmax, scores) {
        return Err(stopped(softmax, "its query is scaled before it is rotated, and nowhere after", HELP));
    }
    Ok(())
}

/// What a node lays out otherwise, and the axes before it.
fn laid_out<'g>(index: &Index<'g>, node: &'g Node, axes: &Axes) -> Option<(&'g str, Axes)> {
    let behind = node.input(0)?;
    let before = match node.op_type() {
        "Cast" | "DequantizeLinear" | "Dropout" | "Identity" | "QuantizeLinear" => axes.clone(),
        // what lies behind may be scaled, wherever its dimensions are
        "Transpose" => {
            let perm = node.attribute("perm").and_then(|perm| perm.as_ints());
            perm.and_then(|perm| axes.before_transpose(perm)).unwrap_or_else(Axes::unknown)
        }
        "Reshape" | "Squeeze" | "Unsqueeze" => {
            shape::rank(index, behind).and_then(|rank| axes.reshaped(rank)).unwrap_or_else(Axes::unknown)
        }
        _ => return None,
    };
    Some((behind, before))
}

/// The product of a softmax with the values.
fn weighted_values<'g>(index: &Index<'g>, softmax: &'g Node) -> Result<&'g Node> {
    let mut open: Vec<&str> = softmax.output(0).into_iter().collect();
    let mut seen = BTreeSet::new();
    let mut products: Vec<&Node> = Vec::new();
    while let Some(tensor) = open.pop() {
        for reader in index.consumers(tensor) {
            let node = index.graph().node(reader.node);
            let Some(node) = node.filter(|node| seen.len() < MAX_STEPS && seen.insert(node.id())) else { continue };
            match node.op_type() {
                "MatMul" | "FusedMatMul" if reader.slot == 0 => products.push(node),
                "Cast" | "DequantizeLinear" | "Dropout" | "Identity" | "Mul" | "IsNaN" | "QuantizeLinear"
                | "Reshape" | "Slice" | "Squeeze" | "Unsqueeze" | "Where" => open.extend(node.output(0)),
                "Shape" => {}
                other => {
                    let reason = format!("`{}` ({other}) stands between the softmax and the values", node.name());
                    return Err(stopped(softmax, reason, HELP));
                }
            }
        }
    }
    match products[..] {
        [product] => {
            refuse_transposed(softmax, product, &["transA", "transBatchA"])?;
            Ok(product)
        }
        [] => Err(stopped(softmax, "no product of its weights with values was found", HELP)),
        [one, other, ..] => {
            let reason = format!("two products read its weights, `{}` and `{}`", one.name(), other.name());
            Err(stopped(softmax, reason, HELP))
        }
    }
}

fn refuse_transposed(softmax: &Node, product: &Node, attributes: &[&str]) -> Result<()> {
    let set = |name: &&&str| product.attribute(name).and_then(|a| a.as_int()).unwrap_or(0) != 0;
    match attributes.iter().find(set) {
        Some(name) => {
            Err(stopped(softmax, format!("`{}` transposes its left operand ({name} = 1)", product.name()), HELP))
        }
        None => Ok(()),
    }
}

struct Output<'g> {
    tensor: &'g str,
    layout: Layout,
    width: Option<i64>,
}

/// From the product with the values to the output projection: the tensor that the term is added to.
fn output<'g>(index: &Index<'g>, softmax: &Node, product: &'g Node, axes: Axes) -> Result<Output<'g>> {
    let stop = |reason: String| stopped(softmax, reason, HELP);
    let Some(mut tensor) = product.output(0) else {
        return Err(stop(format!("`{}` has no output", product.name())));
    };
    let mut axes = axes;
    let mut found: Vec<(&str, Layout)> = Vec::new();
    let mut merged: Option<&Node> = None;
    // behind several readers no tensor is all of the output
    let mut forked = false;
    for _ in 0..MAX_STEPS {
        let is_float = index.producer(tensor).is_none_or(|node| !node.is("", "QuantizeLinear"));
        found.extend(axes.layout().filter(|_| is_float && !forked).map(|layout| (tensor, layout)));
        forked |= readers(index, tensor).len() > 1;
        let Some(node) = laying_out(index, tensor, &axes) else { break };
        let after = laid_out_by(index, node, &axes);
        let Some((after, output)) = after.zip(node.output(0)) else {
            let reason =
                format!("`{}` ({}) turns its output {axes} into what is not known", node.name(), node.op_type());
            return Err(stop(reason));
        };
        match (axes.is_merged(), after.is_merged()) {
            (false, true) => merged = Some(node),
            // heads that are parted again are those of what comes next
            (true, false) => break,
            _ => {}
        }
        (axes, tensor) = (after, output);
    }
    if !axes.is_merged() {
        let readers = readers(index, tensor).len();
        return Err(stop(format!("no Reshape merges its heads: `{tensor}` is {axes} and has {readers} readers")));
    }
    let first = found.iter().find(|(_, layout)| *layout == Layout::HeadsFirst).or(found.first());
    let Some(&(output, layout)) = first else { return Err(stop(format!("its output `{tensor}` is {axes}"))) };
    let by_reshape = merged.and_then(|node| shape::target(index, node)?.last().copied()?).filter(|width| *width > 0);
    Ok(Output { tensor: output, layout, width: by_reshape.or_else(|| projected_width(index, tensor)) })
}

/// The node that lays a tensor out for the output projection: its reader, or where all of several lay it out, the one that
/// merges its heads.
fn laying_out<'g>(index: &Index<'g>, tensor: &str, axes: &Axes) -> Option<&'g Node> {
    let readers = readers(index, tensor);
    let node = |reader: &Use| index.graph().node(reader.node).filter(|node| lays_out(node));
    let nodes: Vec<&Node> = readers.iter().map(node).collect::<Option<_>>()?;
    match nodes[..] {
        [only] => Some(only),
        _ => nodes.into_iter().find(|node| laid_out_by(index, node, axes).is_some_and(|after| after.is_merged())),
    }
}

/// Whether a node only lays out otherwise what it reads, or restores its precision.
pub(super) fn lays_out(node: &Node) -> bool {
    matches!(
        node.op_type(),
        "Cast"
            | "DequantizeLinear"
            | "Dropout"
            | "Flatten"
            | "Identity"
            | "QuantizeLinear"
            | "Reshape"
            | "Squeeze"
            | "Transpose"
            | "Unsqueeze"
    )
}

/// The axes behind such a node.
pub(super) fn laid_out_by(index: &Index, node: &Node, axes: &Axes) -> Option<Axes> {
    match node.op_type() {
        "Transpose" => axes.transposed(node.attribute("perm")?.as_ints()?),
        "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => axes.reshaped(shape::rank(index, node.output(0)?)?),
        _ => Some(axes.clone()),
    }
}

/// What the output projection says of the width of what it reads, behind quantisers.
fn projected_width(index: &Index, merged: &str) -> Option<i64> {
    let mut tensor = merged;
    for _ in 0..MAX_STEPS {
        let [reader] = readers(index, tensor)[..] else { return None };
        let node = index.graph().node(reader.node).filter(|_| reader.slot == 0)?;
        let flag = |name: &str| node.attribute(name).and_then(|a| a.as_int()).unwrap_or(0) != 0;
        match node.op_type() {
            "QuantizeLinear" | "DequantizeLinear" | "DynamicQuantizeLinear" => tensor = node.output(0)?,
            "MatMul" | "MatMulInteger" | "MatMulIntegerToFloat" | "DynamicQuantizeMatMul" => {
                return weight_dims(index, node.input(1)?)?.first().copied();
            }
            "Gemm" | "FusedMatMul" => {
                return weight_dims(index, node.input(1)?)?.get(usize::from(flag("transB"))).copied();
            }
            "MatMulNBits" if node.domain() == MICROSOFT => return node.attribute("K")?.as_int(),
            _ => return None,
        }
    }
    None
}

/// The dimensions of a weight, in floats or in integers.
fn weight_dims<'g>(index: &Index<'g>, tensor: &str) -> Option<&'g [i64]> {
    let integers = || index.producer(tensor).filter(|node| node.is("", "DequantizeLinear"))?.input(0);
    let weight = shape::constant(index, tensor).or_else(|| shape::constant(index, integers()?))?;
    Some(weight.dims())
}

/// Who reads the values of a tensor: a Shape does not.
pub(super) fn readers(index: &Index, tensor: &str) -> Vec<Use> {
    let is_value = |reader: &Use| index.graph().node(reader.node).is_none_or(|node| !node.is("", "Shape"));
    index.consumers(tensor).iter().copied().filter(is_value).collect()
}

/// Query heads and their width, as far as the Reshape that splits them says: the one before the Transpose that puts them
/// first, with nothing between it and the rotation that cuts heads.
fn heads(index: &Index, site: &Site) -> (Option<i64>, Option<i64>) {
    let Ok(source) = unrotated(index, site) else { return (None, None) };
    let mut tensor = source.tensor.as_str();
    for _ in 0..MAX_STEPS {
        let Some(node) = index.producer(tensor).filter(|_| source.nodes.is_empty()) else { break };
        match (node.op_type(), node.input(0)) {
            ("Transpose", Some(split)) => {
                let first = node.attribute("perm").and_then(|p| p.as_ints()) == Some(&[0, 2, 1, 3]);
                let split = index.producer(split).filter(|split| first && split.is("", "Reshape"));
                let target = split.and_then(|split| shape::target(index, split)).unwrap_or_default();
                let [_, _, heads, width] = target[..] else { break };
                let known = |size: Option<i64>| size.filter(|size| *size > 0);
                return (known(heads), known(width));
            }
            (
                "Cast"
                | "DequantizeLinear"
                | "LayerNormalization"
                | "Mul"
                | "QuantizeLinear"
                | "RMSNormalization"
                | "SimplifiedLayerNormalization",
                Some(behind),
            ) => {
                tensor = behind;
            }
            _ => break,
        }
    }
    (None, None)
}

#[cfg(test)]
mod tests;

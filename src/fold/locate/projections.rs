//! The linear maps of every layer, found by data flow: backwards from queries, keys and values through rotation, norm, bias and
//! reshaping to the products that make them; forwards from the attention output to `o_proj`; and backwards from the next layer's
//! input, or the head, to `down_proj`, and from there to the maps that feed it.
//!
//! ```text
//! x ─ norm ─┬─ q_proj ─ … ─ query ─┐
//!           ├─ k_proj ─ … ─ key ───┼ attention ─ … ─ o_proj ─ … ─ norm ─┬─ gate_proj ─ act ─┐
//!           └─ v_proj ─ … ─ value ─┘                                    └─ up_proj ──────── Mul ─ down_proj ─ … ─ next layer
//! ```
//! Several maps may be columns of one product. Names are no evidence: where they tell of a layer or a map, they are compared
//! with what was found.

mod columns;
mod linear;
mod walk;

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

pub use linear::{LinearNode, WeightStorage};
use walk::{Leaf, Walk};

use super::Site;
use crate::adapter::AdapterConfig;
use crate::base::Linear;
use crate::fold::{Error, Result};
use crate::onnx::{Index, Node, NodeId};

const MICROSOFT: &str = "com.microsoft";
const HELP: &str = "this way of writing the map is not known yet; export the base model with `prefold export` instead";

/// A linear map of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct Projection {
    /// The product that it is, or is a part of.
    pub node: LinearNode,
    /// Its columns in the order of its outputs, where the product holds other maps too.
    pub columns: Option<Vec<usize>>,
}

/// What was found, by layer and map; of what was not, the reason.
#[derive(Debug, Default)]
pub struct Projections {
    found: BTreeMap<(usize, Linear), std::result::Result<Projection, String>>,
}

impl Projections {
    /// Looks for the maps of all layers. `sites` are all of the graph, in order.
    pub fn find(index: &Index, sites: &[Site], config: &AdapterConfig) -> Self {
        let walk = Walk::new(index);
        let mut finder = Finder { walk: &walk, config, found: BTreeMap::new(), inputs: BTreeMap::new() };
        for site in sites {
            finder.attention(site);
        }
        finder.feed_forward(sites.len());
        let mut found = finder.found;
        for ((layer, linear), entry) in &mut found {
            if let Some(other) = entry.as_ref().ok().and_then(|p| contradiction(&p.node.name, *layer, *linear)) {
                *entry = Err(format!("data flow leads to a node whose name says {other}"));
            }
        }
        Self { found }
    }

    /// A map of a layer.
    ///
    /// # Errors
    /// When the graph does not show it.
    pub fn get(&self, layer: usize, linear: Linear) -> Result<&Projection> {
        let reason = match self.found.get(&(layer, linear)) {
            Some(Ok(projection)) => return Ok(projection),
            Some(Err(reason)) => reason.as_str(),
            None => "no map at this place",
        };
        let anchor = format!("layers.{layer}.{}", linear.module());
        Err(Error::Site { anchor, reason: reason.to_owned(), help: HELP })
    }

    /// Changes all that were found.
    pub(in crate::fold) fn for_each(&mut self, change: impl FnMut(&mut Projection)) {
        self.found.values_mut().filter_map(|found| found.as_mut().ok()).for_each(change);
    }

    /// All that were found.
    pub fn iter(&self) -> impl Iterator<Item = (usize, Linear, &Projection)> {
        self.found.iter().filter_map(|((layer, linear), found)| Some((*layer, *linear, found.as_ref().ok()?)))
    }
}

/// Queries, keys and values as attention reads them.
enum Operands<'g> {
    Apart([&'g str; 3]),
    /// One tensor of their columns, in this order.
    Packed(&'g str),
}

struct Finder<'w, 'g> {
    walk: &'w Walk<'g>,
    config: &'w AdapterConfig,
    found: BTreeMap<(usize, Linear), std::result::Result<Projection, String>>,
    /// What the queries of a layer are made from.
    inputs: BTreeMap<usize, &'g str>,
}

type Found<T> = std::result::Result<T, String>;

impl<'g> Finder<'_, 'g> {
    fn put(&mut self, layer: usize, linear: Linear, found: Found<Projection>) {
        self.found.insert((layer, linear), found);
    }

    fn width(&self, linear: Linear) -> usize {
        self.config.linear_shape(linear)[0]
    }

    fn attention(&mut self, site: &Site) {
        const PARTS: [Linear; 3] = [Linear::Query, Linear::Key, Linear::Value];
        let own = self.walk.own(&site.output).ok_or("nothing makes the attention output".to_owned());
        let operands = own.clone().and_then(|output| self.operands(output));
        let queries = operands.as_ref().ok().map(|operands| match operands {
            Operands::Apart([query, ..]) => *query,
            Operands::Packed(packed) => *packed,
        });
        let leaf = queries.and_then(|queries| self.only_leaf(queries).ok());
        if let Some(input) = leaf.and_then(|leaf| self.input(leaf.linear)) {
            self.inputs.insert(site.layer, input);
        }
        match operands {
            Err(reason) => PARTS.map(|part| self.put(site.layer, part, Err(reason.clone()))),
            Ok(Operands::Apart(tensors)) => {
                let found = tensors.map(|tensor| self.only_leaf(tensor));
                let mut parts = PARTS.into_iter().zip(found);
                [(); 3].map(|()| {
                    if let Some((part, leaf)) = parts.next() {
                        let projection = leaf.and_then(|leaf| self.projection(&leaf, part));
                        self.put(site.layer, part, projection);
                    }
                })
            }
            Ok(Operands::Packed(tensor)) => {
                let leaf = self.only_leaf(tensor);
                let mut start = 0;
                PARTS.map(|part| {
                    let range = start..start + self.width(part);
                    start = range.end;
                    let whole: usize = PARTS.iter().map(|part| self.width(*part)).sum();
                    let projection = leaf
                        .clone()
                        .and_then(|leaf| self.whole(&leaf, whole))
                        .map(|node| Projection { node, columns: Some(range.collect()) });
                    self.put(site.layer, part, projection);
                })
            }
        };
        let output = own.and_then(|output| {
            let ahead = self.walk.ahead(output);
            let mut ahead = ahead.into_iter();
            match (ahead.next(), ahead.next()) {
                (Some(id), None) => {
                    self.projection(&Leaf { linear: id, path: Vec::new(), activated: false }, Linear::AttentionOutput)
                }
                (None, _) => Err("no linear map reads the attention output".into()),
                _ => Err("several linear maps read the attention output".into()),
            }
        });
        self.put(site.layer, Linear::AttentionOutput, output);
    }

    /// What the attention that makes a tensor reads.
    fn operands(&self, output: &'g str) -> Found<Operands<'g>> {
        let walk = self.walk;
        let core = walk.nearest(output, |node| is_fused(node) || walk.mixes(node));
        let Some(core) = core else { return Err("no attention makes the attention output".into()) };
        if core.is(MICROSOFT, "Attention") {
            return Err(format!("its weights are inside `{}` (com.microsoft Attention)", core.name()));
        }
        let inputs = [0, 1, 2].map(|slot| core.input(slot).filter(|name| !name.is_empty()));
        if is_fused(core) {
            return match inputs {
                [Some(query), Some(key), Some(value)] => Ok(Operands::Apart([query, key, value])),
                [Some(packed), None, None] if core.op_type() == "GroupQueryAttention" => Ok(Operands::Packed(packed)),
                _ => Err(format!("`{}` packs keys and values in a way that is not known", core.name())),
            };
        }
        let [Some(weights), Some(value), _] = inputs else { return Err(format!("`{}` lacks an operand", core.name())) };
        let softmax = walk.nearest(weights, |node| node.is("", "Softmax"));
        let scores =
            softmax.and_then(|node| node.input(0)).and_then(|scores| walk.nearest(scores, |node| walk.mixes(node)));
        let operands = scores.and_then(|node| node.input(0).zip(node.input(1)));
        let Some((query, key)) = operands else { return Err("no product of queries and keys was found".into()) };
        Ok(Operands::Apart([query, key, value]))
    }

    /// The one linear map that a tensor is made by.
    fn only_leaf(&self, tensor: &'g str) -> Found<Leaf> {
        let leaves = self.walk.leaves(tensor, &HashSet::new());
        let Some(first) = leaves.first() else {
            return Err(format!("no linear map of constant weights makes `{tensor}`"));
        };
        if leaves.iter().any(|leaf| leaf.linear != first.linear) {
            return Err(format!("several linear maps make `{tensor}`"));
        }
        Ok(first.clone())
    }

    fn node(&self, leaf: &Leaf) -> Found<LinearNode> {
        let unreadable = || self.walk.unreadable.get(&leaf.linear).map(|found| found.reason.clone());
        let found = self.walk.linears.get(&leaf.linear).cloned();
        found.ok_or_else(|| unreadable().unwrap_or_else(|| "it is no linear map".into()))
    }

    /// A map that makes `width` outputs and no more.
    fn whole(&self, leaf: &Leaf, width: usize) -> Found<LinearNode> {
        let node = self.node(leaf)?;
        match node.width {
            Some(found) if found == width => Ok(node),
            found => Err(format!("`{}` has {} outputs, the adapter's model {width}", node.name, found.unwrap_or(0))),
        }
    }

    fn projection(&self, leaf: &Leaf, linear: Linear) -> Found<Projection> {
        let (node, width) = (self.node(leaf)?, self.width(linear));
        match node.width {
            Some(total) if total > width && !leaf.path.is_empty() => {
                let lead = if node.op_type == "Gemm" { 1 } else { 2 };
                let columns = columns::columns(self.walk.index, &leaf.path, lead, total, width)?;
                Ok(Projection { node, columns: Some(columns) })
            }
            _ => self.whole(leaf, width).map(|node| Projection { node, columns: None }),
        }
    }

    /// What a linear map multiplies.
    fn input(&self, id: NodeId) -> Option<&'g str> {
        let unreadable = || self.walk.unreadable.get(&id).map(|found| &found.input);
        self.walk.own(self.walk.linears.get(&id).map(|linear| &linear.input).or_else(unreadable)?)
    }

    fn feed_forward(&mut self, layers: usize) {
        let mut known = HashSet::new();
        for layer in 0..layers {
            if let Some(input) = self.inputs.get(&layer) {
                self.walk.mark(input, &mut known);
            }
            let down = self.down(layer, layers, &known);
            let fed = down.as_ref().map_err(String::clone).and_then(|leaf| self.fed_by(leaf, &known));
            let down = down.and_then(|leaf| self.projection(&Leaf { path: Vec::new(), ..leaf }, Linear::Down));
            self.put(layer, Linear::Down, down);
            match fed {
                Ok((gate, up)) => {
                    if let Some(gate) = gate {
                        self.put(layer, Linear::Gate, Ok(gate));
                    }
                    self.put(layer, Linear::Up, Ok(up));
                }
                Err(reason) => {
                    [Linear::Gate, Linear::Up].into_iter().for_each(|l| self.put(layer, l, Err(reason.clone())))
                }
            }
        }
    }

    /// The map whose product the next layer, or the head, adds to the stream beside `o_proj`'s.
    fn down(&self, layer: usize, layers: usize, known: &HashSet<&'g str>) -> Found<Leaf> {
        let output = match self.found.get(&(layer, Linear::AttentionOutput)) {
            Some(Ok(projection)) => projection.node.id,
            _ => return Err("its layer's o_proj was not found".into()),
        };
        let mut from = if layer + 1 < layers { self.inputs.get(&(layer + 1)).copied() } else { self.logits() };
        // the head, and for some models a projection before it, come after the last layer
        for _ in 0..3 {
            let Some(tensor) = from else { break };
            let mut behind = self.walk.linears_behind(tensor, known);
            let had_output = behind.remove(&output);
            let mut behind = behind.into_iter();
            match (behind.next(), behind.next()) {
                (Some(id), None) if had_output => return Ok(Leaf { linear: id, path: Vec::new(), activated: false }),
                (Some(id), None) if layer + 1 == layers => from = self.input(id),
                (Some(_), None) => return Err("the next layer does not read its o_proj".into()),
                (None, _) => return Err("no map of an MLP was found behind the layer's output".into()),
                _ => return Err("several maps stand between this layer and the next".into()),
            }
        }
        Err("no way from the logits to the layer's output was found".into())
    }

    fn logits(&self) -> Option<&'g str> {
        let outputs = self.walk.index.graph().outputs();
        let named = outputs.iter().find(|output| output.name() == "logits");
        named.or_else(|| outputs.first()).map(|output| output.name())
    }

    /// Gate and up of the map that reads them.
    fn fed_by(&self, down: &Leaf, known: &HashSet<&'g str>) -> Found<(Option<Projection>, Projection)> {
        let Some(input) = self.input(down.linear) else { return Err("its down_proj has no input".into()) };
        let mut parts: Vec<(Projection, bool)> = Vec::new();
        for leaf in self.walk.leaves(input, known) {
            let part = self.projection(&leaf, Linear::Up)?;
            let same = |(p, _): &&mut (Projection, bool)| p.node.id == part.node.id && p.columns == part.columns;
            match parts.iter_mut().find(same) {
                Some((_, activated)) => *activated |= leaf.activated,
                None => parts.push((part, leaf.activated)),
            }
        }
        let mut parts = parts.into_iter();
        match (parts.next(), parts.next(), parts.next()) {
            (Some((up, _)), None, _) => Ok((None, up)),
            (Some((gate, true)), Some((up, false)), None) | (Some((up, false)), Some((gate, true)), None) => {
                Ok((Some(gate), up))
            }
            (None, ..) => Err("no map feeds its down_proj".into()),
            _ => Err("the maps that feed its down_proj are not one behind an activation and one that is not".into()),
        }
    }
}

fn is_fused(node: &Node) -> bool {
    const KNOWN: [&str; 4] =
        ["MultiHeadAttention", "GroupQueryAttention", "Attention", "DecoderMaskedMultiHeadAttention"];
    node.is("", "Attention") || KNOWN.iter().any(|op| node.is(MICROSOFT, op))
}

/// What a name says where it is not what was found.
fn contradiction(name: &str, layer: usize, linear: Linear) -> Option<String> {
    let mut parts = name.split(['/', '.']);
    let mut says = None;
    while let Some(part) = parts.next() {
        if matches!(part, "layers" | "h") {
            says = parts.next().and_then(|number| number.parse::<usize>().ok()).or(says);
        }
    }
    if let Some(other) = says.filter(|says| *says != layer) {
        return Some(format!("layer {other}"));
    }
    let last = |linear: Linear| linear.module().rsplit('.').next().unwrap_or_default();
    let named = |linear: &Linear| name.split(['/', '.']).any(|part| part == last(*linear));
    Linear::ALL.into_iter().find(named).filter(|named| *named != linear).map(|named| last(named).to_owned())
}

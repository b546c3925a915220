//! Which tensors of a graph are at the places of a decoder, by data flow from its attention sites and linear maps.
//!
//! ```text
//! embedding ─┬─ norm ─ q, k, v_proj ─ rotation ─ attention ─ Add term ─ o_proj ─ Add ─┬─ norm ─ gate, up_proj ─ … ─ down_proj ─ Add ─ next layer
//!            └──────────────────────────────────────────────────────────────────────┘└──────────────────────────────────────────────┘
//! ```
//! The stream is found at the sums: the first sum, on the way from a block's last map, of it and something else that is computed.
//! A fold's own nodes are looked through, so that the base graph's sites are found, and the term is what they add. Where the layers are
//! in branches, each is looked at by itself.

use std::collections::{BTreeSet, HashSet};

use super::branches::{Branch, Branches};
use super::place::{At, Place};
use super::segment::behind;
use crate::adapter::{AdapterConfig, Query};
use crate::base::{DecoderSpec, Linear, Wiring};
use crate::fold::locate::projections::{Projection, Projections};
use crate::fold::{Layout, Site, locate};
use crate::onnx::{Index, Model, Node, NodeDef, NodeId, Patch, without};

/// What the names of a fold's nodes begin with.
const FOLD: &str = "/prefold";
const MICROSOFT: &str = "com.microsoft";
/// Nodes of folds between a tensor of the base graph and what reads it.
const MOST_FOLDED: usize = 256;
/// Nodes between the head and the logits, and between a constant and what reads it.
const MAX_STEPS: usize = 16;

/// A tensor of a graph and the place that it should be.
#[derive(Clone, Debug)]
pub(super) struct Tap {
    /// The branch that it is in.
    pub(super) branch: usize,
    pub(super) at: At,
    pub(super) tensor: String,
    /// Where heads lie; a tensor without heads is merged.
    pub(super) layout: Layout,
    /// The columns of the tensor that are this place, where it holds others too.
    pub(super) columns: Option<Vec<usize>>,
}

impl Tap {
    pub(super) fn new(at: At, tensor: &str, layout: Layout) -> Self {
        Self { branch: 0, at, tensor: tensor.to_owned(), layout, columns: None }
    }

    /// Layer and place for people: a tensor of two graphs is known by its name alone.
    pub(super) fn named(&self) -> (Option<usize>, Place) {
        if self.at.place != Place::Tensor {
            return (self.at.decoder_layer(), self.at.place);
        }
        let layer = layer_of(&self.tensor);
        match (self.tensor.as_str(), self.tensor.rsplit_once('.')) {
            ("logits", _) => (None, Place::Logits),
            (name, Some((_, "key"))) if name.starts_with("present") => (layer, Place::Keys),
            (name, Some((_, "value"))) if name.starts_with("present") => (layer, Place::Values),
            _ => (layer, Place::Tensor),
        }
    }
}

/// The number that follows `layers`, `h`, `layer` or `present` in a name.
fn layer_of(name: &str) -> Option<usize> {
    let mut parts = name.split(['.', '/', '_']);
    while let Some(part) = parts.next() {
        if ["layers", "layer", "h", "present", "block", "blocks"].contains(&part)
            && let Some(Ok(layer)) = parts.clone().next().map(str::parse)
        {
            return Some(layer);
        }
    }
    None
}

/// The tensors that were found, and why others were not.
#[derive(Clone, Debug, Default)]
pub(super) struct Taps {
    pub(super) taps: Vec<Tap>,
    pub(super) notes: Vec<String>,
    /// The branches in which the attention of every layer was recognised.
    pub(super) attention: BTreeSet<usize>,
    /// Places, by branch, that no tensor of the graph holds, where they were looked for by value.
    pub(super) open: Vec<(usize, At)>,
    /// Nodes that make a query that the graph does not hold.
    pub(super) patch: Option<Patch>,
}

impl Taps {
    /// Looks for the places of all layers.
    pub(super) fn find(branches: &Branches, spec: &DecoderSpec) -> Self {
        let mut found = Self::default();
        let mut made = Made { patch: Patch::new("make queries that the graph does not hold"), names: HashSet::new() };
        for (number, branch) in branches.taken.iter().enumerate() {
            let mut own = Self::default();
            if own.within(branch, spec, &mut made) {
                found.attention.insert(number);
            }
            let scope = &branch.scope;
            let noted = |note| if scope.is_empty() { note } else { format!("in the branch `{scope}`, {note}") };
            found.notes.extend(own.notes.into_iter().map(noted));
            found.taps.extend(own.taps.into_iter().map(|tap| Tap { branch: number, ..tap }));
        }
        found.patch = (!made.names.is_empty()).then_some(made.patch);
        found
    }

    /// The places of a branch, and whether the attention of every layer was recognised.
    fn within(&mut self, branch: &Branch, spec: &DecoderSpec, made: &mut Made) -> bool {
        let model = &branch.graph;
        self.ports(model, spec);
        let view = match without_folds(model) {
            Ok(view) => view,
            Err(error) => {
                self.notes.push(format!("the graph without its adapter's nodes cannot be looked at: {error}"));
                return false;
            }
        };
        let sites = match locate::sites(&view) {
            Ok(sites) => sites,
            Err(error) => {
                self.notes.push(format!("its attention was not found, so that its layers are not compared: {error}"));
                return false;
            }
        };
        let (own, nested): (Vec<Site>, Vec<Site>) = sites.into_iter().partition(|site| site.scope.is_empty());
        if !nested.is_empty() {
            self.notes.push("layers are in branches of several nodes, or in loops, and not compared".into());
        } else if own.len() != spec.num_layers {
            let (graph, model) = (own.len(), spec.num_layers);
            self.notes
                .push(format!("it has {graph} attention blocks, the checkpoint {model}: layers are not compared"));
        }
        if own.len() != spec.num_layers {
            return false;
        }
        let index = Index::new(model.graph());
        let finder = Finder { view: &view, view_index: Index::new(view.graph()), index, branch, spec };
        finder.all(&own, made, self);
        true
    }

    fn push(&mut self, layer: usize, place: Place, tensor: &str, layout: Layout) {
        self.taps.push(Tap::new(At::new(layer, place), tensor, layout));
    }

    /// What every decoder graph gives: logits and cache.
    fn ports(&mut self, model: &Model, spec: &DecoderSpec) {
        let outputs = || model.graph().outputs().iter().map(|output| output.name());
        self.push(spec.num_layers, Place::Logits, "logits", Layout::Merged);
        for layer in 0..spec.num_layers {
            for (place, part) in [(Place::Keys, "key"), (Place::Values, "value")] {
                let known = [format!("present.{layer}.{part}"), format!("past_key_values.{layer}.{part}_out")];
                if let Some(name) = outputs().find(|name| known.iter().any(|known| known == name)) {
                    self.push(layer, place, name, Layout::HeadsFirst);
                }
            }
        }
    }
}

/// The model as it was before its folds: readers of a fold's sums read what stood there, and what nothing needs then is gone.
fn without_folds(model: &Model) -> crate::onnx::Result<Model> {
    let mut patch = Patch::new("look through folds");
    let index = Index::new(model.graph());
    for node in model.graph().nodes().iter().filter(|node| !is_fold(node)) {
        for (slot, input) in node.inputs().iter().enumerate() {
            let base = base_of(&index, input);
            if base != input {
                patch.replace_input(node.id(), slot, base);
            }
        }
    }
    let view = patch.apply(model)?;
    let outputs: Vec<&str> = view.graph().outputs().iter().map(|output| output.name()).collect();
    let needed = behind(&Index::new(view.graph()), &outputs, &HashSet::new());
    let rest = view.graph().nodes().iter().map(Node::id).filter(|id| !needed.contains(id)).collect();
    without(&view, &rest)
}

fn is_fold(node: &Node) -> bool {
    node.name().starts_with(FOLD)
}

/// The base graph's tensor that a fold adds to, and perhaps scales; the tensor itself where it is none of a fold's sums.
fn base_of<'g>(index: &Index<'g>, tensor: &'g str) -> &'g str {
    let mut base = tensor;
    for _ in 0..MOST_FOLDED {
        match under(index, base) {
            Some(under) => base = under,
            None => break,
        }
    }
    if made_by_fold(index, base) { tensor } else { base }
}

/// What a fold's sum adds to, or, behind the sum, what it scales or gives its shape back.
fn under<'g>(index: &Index<'g>, tensor: &str) -> Option<&'g str> {
    let node = index.producer(tensor).filter(|node| is_fold(node))?;
    let first = node.input(0)?;
    let is_sum = |tensor: &str| index.producer(tensor).is_some_and(|node| is_fold(node) && node.is("", "Add"));
    match node.op_type() {
        "Add" => {
            let second = node.input(1)?;
            let swapped = made_by_fold(index, first) && !made_by_fold(index, second) && !is_constant(index, second);
            Some(if swapped { second } else { first })
        }
        "Mul" => Some(first).filter(|first| is_sum(first)),
        // LoRA in a bank, of a product of two dimensions
        "Reshape" if ["Reshape_product", "Reshape_flat"].iter().any(|name| node.name().ends_with(name)) => Some(first),
        _ => None,
    }
}

fn made_by_fold(index: &Index, tensor: &str) -> bool {
    index.producer(tensor).is_some_and(is_fold)
}

struct Finder<'m> {
    /// The graph without its folds.
    view: &'m Model,
    view_index: Index<'m>,
    branch: &'m Branch,
    index: Index<'m>,
    spec: &'m DecoderSpec,
}

/// Nodes and constants that make queries, and their names.
struct Made {
    patch: Patch,
    names: HashSet<String>,
}

/// A sum of the stream.
struct Sum {
    /// The tensor of the sum, where there is one.
    sum: Option<String>,
    /// What the block's output is added to.
    other: String,
}

impl Finder<'_> {
    fn all(&self, sites: &[Site], made: &mut Made, found: &mut Taps) {
        let config = AdapterConfig::prefix_plus(self.spec, None);
        let maps = Projections::find(&self.view_index, sites, &config);
        let mut missing = Vec::new();
        for site in sites {
            self.query(site, made, found);
            self.softmax(site, found);
            found.push(site.layer, Place::Attention, &site.output, site.output_layout);
            self.term(site, found);
            for linear in self.spec.linears() {
                match maps.get(site.layer, linear) {
                    Ok(map) => self.map(site.layer, (linear, map), made, found),
                    Err(_) => missing.push(format!("layers.{}.{}", site.layer, linear.module())),
                }
            }
            self.stream(site.layer, &maps, found);
        }
        if let Some(head) = self.head_input().filter(|_| self.spec.embedding.width.is_none()) {
            found.push(self.spec.num_layers, Place::FinalNorm, head, Layout::Merged);
        }
        if !missing.is_empty() {
            found.notes.push(format!("not found in the graph and not compared: {}", missing.join(", ")));
        }
        // the first that names a place counts
        let mut seen = HashSet::new();
        found.taps.retain(|tap| seen.insert(tap.at));
    }

    fn query(&self, site: &Site, made: &mut Made, found: &mut Taps) {
        // the names of new nodes tell branches apart
        let site = &Site { scope: self.branch.scope.clone(), ..site.clone() };
        let source = match locate::query(self.view, site, Query::PostRope) {
            Ok(source) => source,
            Err(error) => {
                found.notes.push(format!("the query of layer {} is not compared: {error}", site.layer));
                return;
            }
        };
        if !source.nodes.is_empty() {
            let (layer, anchor) = (site.layer, &site.anchor);
            found
                .notes
                .push(format!("the query of layer {layer} is inside `{anchor}`: added nodes compute it as that does"));
        }
        let readers = site.readers.iter().filter_map(|reader| self.own(reader.node));
        let first = readers.min_by_key(|node| node.id());
        // sites share what they need
        for node in source.nodes {
            if made.names.insert(node.name().to_owned()) {
                self.branch.put(&mut made.patch, first, node);
            }
        }
        for tensor in source.initializers {
            if made.names.insert(tensor.name().to_owned()) {
                made.patch.add_initializer(tensor);
            }
        }
        found.push(site.layer, Place::Query, &source.tensor, source.layout);
    }

    /// What a softmax reads and gives, where the graph has one of its own.
    fn softmax(&self, site: &Site, found: &mut Taps) {
        let softmax = self.view.graph().node(site.node).filter(|node| node.is("", "Softmax"));
        if let Some((scores, weights)) = softmax.and_then(|node| node.input(0).zip(node.output(0))) {
            found.push(site.layer, Place::Scores, scores, Layout::HeadsFirst);
            found.push(site.layer, Place::Weights, weights, Layout::HeadsFirst);
        }
    }

    /// The fold's part of the sum that is read in the place of the attention output.
    fn term(&self, site: &Site, found: &mut Taps) {
        let terms = self.index.consumers(&site.output).iter().filter_map(|reader| {
            let sum = self.index.graph().node(reader.node).filter(|node| is_fold(node) && node.is("", "Add"))?;
            sum.input(1 - reader.slot.min(1)).filter(|other| made_by_fold(&self.index, other))
        });
        let terms: Vec<&str> = terms.collect();
        if let [term] = terms[..] {
            found.push(site.layer, Place::Term, term, site.output_layout);
        }
    }

    /// Input and product of a linear map.
    fn map(&self, layer: usize, (linear, map): (Linear, &Projection), made: &mut Made, found: &mut Taps) {
        let (before, after) = match linear {
            Linear::Query => (Some(Place::AttentionInput), Place::QueryProjection),
            Linear::Key => (None, Place::KeyProjection),
            Linear::Value => (None, Place::ValueProjection),
            Linear::AttentionOutput => (Some(Place::OutputInput), Place::OutputProjection),
            Linear::Gate => (None, Place::GateProjection),
            Linear::Up => (Some(Place::MlpInput), Place::UpProjection),
            Linear::Down => (Some(Place::MlpInner), Place::DownProjection),
        };
        if let Some(before) = before {
            found.push(layer, before, self.input(map), Layout::Merged);
        }
        let product = match self.product(linear, map) {
            (product, true) => Some(product.to_owned()),
            (product, false) => self.biased(product, made),
        };
        if let Some(product) = product {
            let columns = map.columns.clone();
            let at = At::new(layer, after);
            found.taps.push(Tap { columns, ..Tap::new(at, &product, Layout::Merged) });
        }
    }

    /// A product with the bias that the operator adds that reads it: a new node makes the sum.
    fn biased(&self, product: &str, made: &mut Made) -> Option<String> {
        let mut readers =
            self.index.consumers(product).iter().filter_map(|reader| self.index.graph().node(reader.node));
        let (reader, bias) = readers.find_map(|node| Some((node, added_bias(node)?)))?;
        if !is_constant(&self.index, bias) {
            return None;
        }
        let (name, sum) = (format!("{FOLD}/biased/{}{product}", self.branch.scope), format!("{product}/biased"));
        if made.names.insert(name.clone()) {
            let node = NodeDef::new("Add", name).inputs([product, bias]).outputs([sum.as_str()]);
            self.branch.put(&mut made.patch, Some(reader), node);
        }
        Some(sum)
    }

    /// The node of the graph that is one of the graph without its folds.
    fn own(&self, id: NodeId) -> Option<&Node> {
        self.index.producer(self.view.graph().node(id)?.output(0)?)
    }

    /// What a map reads in the graph with its folds.
    fn input<'s>(&'s self, map: &'s Projection) -> &'s str {
        let (view, own) = (self.view.graph().node(map.node.id), self.own(map.node.id));
        let direct = view.and_then(|node| node.input(0)).is_some_and(|input| input == map.node.input);
        own.and_then(|node| node.input(0)).filter(|_| direct).unwrap_or(&map.node.input)
    }

    /// A map's product with its bias and with what a fold adds, and whether a bias that the model has was found.
    fn product<'s>(&'s self, linear: Linear, map: &'s Projection) -> (&'s str, bool) {
        let mut product = map.node.product.as_str();
        let mut biased = map.node.bias.is_some() || !self.spec.has_bias(linear);
        for _ in 0..MAX_STEPS {
            let sums = self.index.consumers(product).iter().filter_map(|reader| {
                let node = self.index.graph().node(reader.node)?;
                if is_fold(node) {
                    let is_own = under(&self.index, node.output(0)?) == Some(product);
                    return node.output(0).filter(|_| is_own).map(|sum| (sum, false));
                }
                let other = node.input(1 - reader.slot.min(1)).filter(|_| node.is("", "Add"))?;
                let is_bias = is_constant(&self.index, other) && !biased;
                node.output(0).filter(|_| is_bias).map(|sum| (sum, true))
            });
            match sums.collect::<Vec<_>>()[..] {
                [(sum, bias)] => (product, biased) = (sum, biased || bias),
                _ => break,
            }
        }
        (product, biased)
    }

    /// The residual stream before and after a layer, and after its attention.
    fn stream(&self, layer: usize, maps: &Projections, found: &mut Taps) {
        let last = |linear| {
            let map = maps.get(layer, linear).ok()?;
            self.residual(self.product(linear, map).0)
        };
        let (Some(attention), down) = (last(Linear::AttentionOutput), last(Linear::Down)) else { return };
        let mut put = |place, tensor: Option<&String>| {
            if let Some(tensor) = tensor {
                found.push(layer, place, tensor, Layout::Merged);
            }
        };
        match self.spec.wiring {
            Wiring::PreNorm | Wiring::PostNorm | Wiring::SandwichNorm | Wiring::SumNorm => {
                if layer == 0 {
                    put(Place::Embedding, Some(&attention.other));
                }
                if self.spec.wiring == Wiring::PreNorm {
                    put(Place::AttentionResidual, attention.sum.as_ref());
                }
                match self.spec.wiring {
                    // the stream is normalised, and so what the next layer reads
                    Wiring::SumNorm => {
                        let next = maps.get(layer + 1, Linear::Query).ok().map(|map| self.input(map).to_owned());
                        put(Place::Stream, next.as_ref());
                    }
                    _ => put(Place::Stream, down.as_ref().and_then(|down| down.sum.as_ref())),
                }
            }
            Wiring::Parallel | Wiring::ParallelSharedNorm => {
                let Some(down) = down else { return };
                let (before, after) = if attention.sum == down.sum {
                    // the blocks first, and their sum then
                    let Some(both) = attention.sum.as_deref().and_then(|sum| self.residual(sum)) else { return };
                    (both.other, both.sum)
                } else if Some(&down.other) == attention.sum.as_ref() {
                    (attention.other, down.sum)
                } else if Some(&attention.other) == down.sum.as_ref() {
                    (down.other, attention.sum)
                } else {
                    return;
                };
                if layer == 0 {
                    put(Place::Embedding, Some(&before));
                }
                put(Place::Stream, after.as_ref());
            }
        }
    }

    /// The first sum, on the way from a tensor, with something else that is computed.
    fn residual(&self, from: &str) -> Option<Sum> {
        let graph = self.index.graph();
        let mut reached: HashSet<&str> = HashSet::from([from]);
        for node in graph.nodes() {
            let inside = |slot: usize| node.input(slot).is_some_and(|input| reached.contains(input));
            if !node.inputs().iter().any(|input| reached.contains(input.as_str())) {
                continue;
            }
            let skip = node.domain() == MICROSOFT && node.op_type().starts_with("Skip");
            if (node.is("", "Add") || skip) && inside(0) != inside(1) {
                let other = node.input(usize::from(inside(0)));
                if let Some(other) = other.filter(|other| !is_constant(&self.index, other)) {
                    let sum = node.output(if skip { 3 } else { 0 });
                    return Some(Sum { sum: sum.map(str::to_owned), other: other.to_owned() });
                }
            }
            reached.extend(node.outputs().iter().map(String::as_str).filter(|output| !output.is_empty()));
        }
        None
    }

    /// What the product of the head reads.
    fn head_input(&self) -> Option<&str> {
        let mut tensor = "logits";
        for _ in 0..MAX_STEPS {
            let node = self.index.producer(tensor)?;
            let product = matches!(node.op_type(), "MatMul" | "Gemm" | "FusedMatMul" | "MatMulNBits");
            let computed = || node.inputs().iter().map(String::as_str).find(|input| !is_constant(&self.index, input));
            tensor = match node.op_type() {
                _ if product => return node.input(0).map(|input| self.before_reshape(input)),
                "Reshape" | "Cast" | "Tanh" | "Identity" => node.input(0)?,
                "Add" | "Mul" | "Div" => computed()?,
                _ => return None,
            };
        }
        None
    }

    fn before_reshape<'s>(&'s self, tensor: &'s str) -> &'s str {
        let reshape = self.index.producer(tensor).filter(|node| node.is("", "Reshape"));
        reshape.and_then(|node| node.input(0)).unwrap_or(tensor)
    }
}

/// The bias that an operator adds to what it reads first.
fn added_bias(node: &Node) -> Option<&str> {
    match node.op_type() {
        _ if node.domain() != MICROSOFT => None,
        "BiasGelu" | "FastGelu" => node.input(1),
        "SkipLayerNormalization" => node.input(4),
        "SkipSimplifiedLayerNormalization" => node.input(3),
        _ => None,
    }
}

/// Whether a tensor is a constant behind nodes that only lay it out or change its type.
fn is_constant(index: &Index, tensor: &str) -> bool {
    let mut tensor = tensor;
    for _ in 0..MAX_STEPS {
        if index.initializer(tensor).is_some() {
            return true;
        }
        let Some(node) = index.producer(tensor) else { return false };
        match (node.op_type(), node.input(0)) {
            ("Constant", _) => return true,
            ("Cast" | "DequantizeLinear" | "Identity" | "Reshape" | "Transpose" | "Unsqueeze", Some(behind)) => {
                tensor = behind;
            }
            _ => return false,
        }
    }
    false
}

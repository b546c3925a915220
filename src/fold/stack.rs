//! The sites and linear maps of a graph that carries adapters already.
//!
//! A fold only puts nodes between others and lets readers read a sum, so that the base graph's nodes are still there in their
//! order. What is asked for is found in the base graph, and followed to where its readers read now: what another fold adds there
//! is added to the sum of those before.

use std::collections::{BTreeMap, HashMap};

use super::locate::projections::{Projection, Projections};
use super::locate::scope;
use super::{Record, Result, Site, locate, record};
use crate::adapter::AdapterConfig;
use crate::fold::Error;
use crate::onnx::{Graph, Index, Model, Node, NodeId, Use};

/// The attention sites of a graph, folded or not.
///
/// # Errors
/// When the base graph has none that an adapter fits, or a folded graph is not as its fold left it.
pub fn sites(model: &Model) -> Result<Vec<Site>> {
    let Some(base) = Base::of(model)? else { return locate::sites(model) };
    let folded = nodes(model.graph());
    locate::sites(&base.model)?.into_iter().map(|site| base.site(&folded, site)).collect()
}

/// The graph before all folds; none where nothing was folded.
///
/// # Errors
/// When a folded graph is not as its fold left it.
pub fn base(model: &Model) -> Result<Option<Model>> {
    if Record::all(model)?.is_empty() {
        return Ok(None);
    }
    let (mut base, _) = record::last(model)?;
    while !Record::all(&base)?.is_empty() {
        base = record::last(&base)?.0;
    }
    Ok(Some(base))
}

/// The linear maps of a graph, folded or not, for the main graph and each branch that has sites, by what the names of
/// its new nodes begin with.
///
/// # Errors
/// As [`sites`].
pub(super) fn linear_maps(model: &Model, config: &AdapterConfig) -> Result<Vec<(String, Projections)>> {
    let base = Base::of(model)?;
    let found_in = base.as_ref().map_or(model, |base| &base.model);
    let sites = locate::sites(found_in)?;
    let folded = nodes(model.graph());
    let mut found = Vec::new();
    scope::visit(found_in, &mut |index, _| {
        let own: Vec<Site> = sites.iter().filter(|s| index.graph().node(s.node).is_some()).cloned().collect();
        let Some(first) = own.first() else { return Ok(()) };
        let mut maps = Projections::find(index, &own, config);
        if let Some(base) = &base {
            maps.for_each(|map| base.linear_map(index, &folded, map));
        }
        found.push((first.root(), maps));
        Ok(())
    })?;
    Ok(found)
}

/// The graph before all folds, and where its nodes are in the folded one.
struct Base {
    model: Model,
    places: HashMap<NodeId, NodeId>,
}

impl Base {
    /// None where nothing was folded.
    fn of(folded: &Model) -> Result<Option<Self>> {
        let Some(model) = base(folded)? else { return Ok(None) };
        let mut places = HashMap::new();
        let found = place(model.graph(), folded.graph(), &mut places);
        found.ok_or_else(|| Error::Unfold { why: "its nodes are not those of its base graph".into() })?;
        Ok(Some(Self { model, places }))
    }

    fn readers(&self, readers: &[Use]) -> Option<Vec<Use>> {
        readers.iter().map(|reader| Some(Use { node: *self.places.get(&reader.node)?, slot: reader.slot })).collect()
    }

    /// What the readers of a tensor of the base graph read now, and all that read it: nodes of earlier folds too, a term that makes
    /// its query from a product, or a branch beside the map that reads an attention output.
    fn tensor(&self, folded: &[Nodes], tensor: &str, readers: &[Use]) -> (String, Vec<Use>) {
        let readers = self.readers(readers).unwrap_or_default();
        match now(folded, &readers) {
            Some(now) => {
                let all = consumers(folded, &readers, &now);
                (now, all)
            }
            None => (tensor.to_owned(), readers),
        }
    }

    fn site(&self, folded: &[Nodes], mut site: Site) -> Result<Site> {
        let readers_of_query = scope::of_site(&self.model, &site, |index| Ok(index.consumers(&site.query).to_vec()))?;
        if let Some(query) = self.readers(&readers_of_query).and_then(|readers| now(folded, &readers)) {
            site.query = query;
        }
        (site.output, site.readers) = self.tensor(folded, &site.output, &site.readers);
        site.node = self.places.get(&site.node).copied().unwrap_or(site.node);
        Ok(site)
    }

    fn linear_map(&self, index: &Index, folded: &[Nodes], map: &mut Projection) {
        let node = &mut map.node;
        let input = self.readers(index.consumers(&node.input)).and_then(|readers| now(folded, &readers));
        node.input = input.unwrap_or_else(|| node.input.clone());
        (node.product, node.readers) = self.tensor(folded, &node.product, &node.readers);
        let place = |id: NodeId| self.places.get(&id).copied().unwrap_or(id);
        (node.id, node.weight_use.node) = (place(node.id), place(node.weight_use.node));
        // another weight, where one was merged
        let reader = folded.iter().find_map(|nodes| nodes.get(&node.weight_use.node));
        if let Some(weight) = reader.and_then(|reader| reader.input(node.weight_use.slot)) {
            weight.clone_into(&mut node.weight);
        }
    }
}

/// Where each node of a base graph is in the folded one, those of nested graphs too. None where one is missing.
fn place(base: &Graph, folded: &Graph, places: &mut HashMap<NodeId, NodeId>) -> Option<()> {
    let mut rest = folded.nodes().iter();
    let same = |a: &Node, b: &Node| a.name() == b.name() && a.op_type() == b.op_type() && a.outputs() == b.outputs();
    for node in base.nodes() {
        let now = rest.find(|candidate| same(node, candidate))?;
        places.insert(node.id(), now.id());
        for (before, after) in node.subgraphs().zip(now.subgraphs()) {
            place(before, after, places)?;
        }
    }
    Some(())
}

type Nodes<'m> = BTreeMap<NodeId, &'m Node>;

/// The nodes of a graph and of those nested in it, each graph's one after the other.
fn nodes(graph: &Graph) -> Vec<Nodes<'_>> {
    let mut found = Vec::new();
    graph.visit(&mut |graph| found.push(graph.nodes().iter().map(|node| (node.id(), node)).collect()));
    found
}

/// The nodes of the graph that readers are in.
fn around<'n, 'm>(folded: &'n [Nodes<'m>], readers: &[Use]) -> Option<&'n Nodes<'m>> {
    let first = readers.first()?;
    folded.iter().find(|nodes| nodes.contains_key(&first.node))
}

/// All that read a tensor in the graph that these are in.
fn consumers(folded: &[Nodes], readers: &[Use], tensor: &str) -> Vec<Use> {
    let nodes = around(folded, readers).into_iter().flatten();
    let slots =
        nodes.flat_map(|(id, node)| node.inputs().iter().enumerate().map(move |(slot, input)| (*id, slot, input)));
    slots.filter(|(_, _, input)| *input == tensor).map(|(node, slot, _)| Use { node, slot }).collect()
}

/// The tensor that all of these read.
fn now(folded: &[Nodes], readers: &[Use]) -> Option<String> {
    let nodes = around(folded, readers)?;
    let mut tensors = readers.iter().map(|reader| nodes.get(&reader.node)?.input(reader.slot));
    let first = tensors.next()??;
    tensors.all(|tensor| tensor == Some(first)).then(|| first.to_owned())
}

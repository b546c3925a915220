//! Which decoder layer a site is of: the number of sites before it in the flow of data, checked against the names of the cache.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{Site, flow};
use crate::fold::{Error, Result};
use crate::onnx::{Index, Node, NodeId};

/// Layers of the deepest graph that is folded: what is written at a site takes time that grows with its graph.
const MAX_LAYERS: usize = 1024;

/// Gives the sites of one graph their layers, and sorts them.
pub(super) fn number_layers(index: &Index, sites: &mut [Site]) -> Result<()> {
    let Some(first) = sites.first() else { return Ok(()) };
    let scope = first.scope.clone();
    if sites.len() > MAX_LAYERS {
        let reason = format!("there are {} attention blocks, and at most {MAX_LAYERS} are folded", sites.len());
        return Err(Error::Layers { reason, place: place(&scope) });
    }
    let outputs: BTreeSet<&str> = sites.iter().map(|site| site.output.as_str()).collect();
    let behind = behind(index, &outputs);
    let of =
        |site: &Site| index.producer(&site.output).and_then(|node| behind.get(&node.id()).copied()).unwrap_or_default();
    let layers: Vec<usize> = sites.iter().map(|site| of(site).sites.saturating_sub(1)).collect();
    let caches: Vec<Option<usize>> = sites.iter().map(|site| of(site).cache).collect();
    let mut owners: BTreeMap<usize, &str> = BTreeMap::new();
    for (site, layer) in sites.iter().zip(&layers) {
        if let Some(other) = owners.insert(*layer, &site.anchor) {
            let reason = format!(
                "`{other}` and `{}` are both the attention of layer {layer}: neither reads the other",
                site.anchor
            );
            return Err(Error::Layers { reason, place: place(&scope) });
        }
    }
    for ((site, layer), cache) in sites.iter().zip(&layers).zip(&caches) {
        // a layer may share the cache of one before it
        if let Some(cache) = cache.filter(|cache| cache > layer) {
            let reason = format!(
                "`{}` is number {layer} in the flow of data and reads the cache of layer {cache}: the attention of layer {layer} \
                 was not found",
                site.anchor
            );
            return Err(Error::Layers { reason, place: place(&scope) });
        }
    }
    if caches.iter().any(Option::is_some) {
        let named = index.graph().inputs().iter().filter_map(|input| cache_layer(input.name())).max();
        if let Some(missing) = named.and_then(|last| (0..=last).find(|layer| !owners.contains_key(layer))) {
            let reason = format!("layer {missing} has a cache, and its attention was not found");
            return Err(Error::Layers { reason, place: place(&scope) });
        }
    }
    for (site, layer) in sites.iter_mut().zip(layers) {
        site.layer = layer;
    }
    sites.sort_by_key(|site| site.layer);
    Ok(())
}

/// Branches hold the same layers.
pub(super) fn same_layers(sites: &[Site]) -> Result<()> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for site in sites {
        *counts.entry(&site.scope).or_default() += 1;
    }
    let mut counts = counts.into_iter();
    let Some((first, count)) = counts.next() else { return Ok(()) };
    match { counts }.find(|(_, other)| *other != count) {
        Some((scope, other)) => {
            let reason = format!("there are {other} attention blocks, but {count} {}", place(first));
            Err(Error::Layers { reason, place: place(scope) })
        }
        None => Ok(()),
    }
}

fn place(scope: &str) -> String {
    if scope.is_empty() { "in the main graph".to_owned() } else { format!("in branch `{scope}`") }
}

/// What lies behind a node.
#[derive(Clone, Copy, Default)]
struct Behind {
    /// The most sites on one way that ends with it.
    sites: usize,
    /// The highest layer of the caches that it reads, not through a site and not only their lengths.
    cache: Option<usize>,
}

/// What lies behind each node of a graph; nodes may stand in any order.
fn behind(index: &Index, outputs: &BTreeSet<&str>) -> HashMap<NodeId, Behind> {
    let mut known: HashMap<NodeId, Behind> = HashMap::with_capacity(index.graph().nodes().len());
    let mut entered = HashSet::new();
    for last in index.graph().nodes() {
        flow::after_inputs(index, last, &mut entered, &mut |node| {
            let found = of_inputs(index, outputs, &known, node);
            known.insert(node.id(), found);
        });
    }
    known
}

fn of_inputs(index: &Index, outputs: &BTreeSet<&str>, known: &HashMap<NodeId, Behind>, node: &Node) -> Behind {
    let mut all = Behind::default();
    for input in node.inputs() {
        let behind = match index.producer(input) {
            Some(producer) => known.get(&producer.id()).copied().unwrap_or_default(),
            None => Behind { sites: 0, cache: index.input(input).and_then(|_| cache_layer(input)) },
        };
        all.sites = all.sites.max(behind.sites);
        if !node.is("", "Shape") && !outputs.contains(input.as_str()) {
            all.cache = all.cache.max(behind.cache);
        }
    }
    let is_site = node.outputs().iter().any(|output| outputs.contains(output.as_str()));
    Behind { sites: all.sites + usize::from(is_site), ..all }
}

/// The layer in the name of a cache: `past_key_values.3.key`, `past_3`, `cache.3.value`.
fn cache_layer(name: &str) -> Option<usize> {
    let from = ["past", "cache"].iter().find_map(|word| name.find(word))?;
    let digits = name.get(from..)?.split(|c: char| !c.is_ascii_digit()).find(|part| !part.is_empty())?;
    digits.parse().ok()
}

//! Which decoder layer a site is of: the number of sites before it in the flow of data, checked against the names of the cache.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::Site;
use crate::fold::{Error, Result};
use crate::onnx::{Index, Node, NodeId};

/// Gives the sites of one graph their layers, and sorts them.
pub(super) fn number_layers(index: &Index, sites: &mut [Site]) -> Result<()> {
    let Some(first) = sites.first() else { return Ok(()) };
    let scope = first.scope.clone();
    let outputs: BTreeSet<&str> = sites.iter().map(|site| site.output.as_str()).collect();
    let depths = depths(index, &outputs);
    let depth = |site: &Site| index.producer(&site.output).and_then(|node| depths.get(&node.id()).copied());
    let layers: Vec<usize> = sites.iter().map(|site| depth(site).unwrap_or(1).saturating_sub(1)).collect();
    let caches: Vec<BTreeSet<usize>> = sites.iter().map(|site| caches(index, site, &outputs)).collect();
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
    for ((site, layer), caches) in sites.iter().zip(&layers).zip(&caches) {
        // a layer may share the cache of one before it
        if let Some(cache) = caches.iter().find(|cache| *cache > layer) {
            let reason = format!(
                "`{}` is number {layer} in the flow of data and reads the cache of layer {cache}: the attention of layer {layer} \
                 was not found",
                site.anchor
            );
            return Err(Error::Layers { reason, place: place(&scope) });
        }
    }
    if caches.iter().any(|caches| !caches.is_empty()) {
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

/// For each node, the most sites on one way that ends with it; nodes may stand in any order.
fn depths(index: &Index, outputs: &BTreeSet<&str>) -> HashMap<NodeId, usize> {
    let mut depths: HashMap<NodeId, usize> = HashMap::with_capacity(index.graph().nodes().len());
    let mut entered: BTreeSet<NodeId> = BTreeSet::new();
    let own = |tensor: &str| index.producer(tensor).filter(|node| index.graph().node(node.id()).is_some());
    for last in index.graph().nodes() {
        let mut open: Vec<&Node> = vec![last];
        while let Some(&node) = open.last() {
            entered.insert(node.id());
            let before = || node.inputs().iter().filter_map(|input| own(input));
            // what was entered and has no depth yet is on the way to this node: a cycle
            if let Some(next) = before().find(|node| !entered.contains(&node.id())) {
                open.push(next);
                continue;
            }
            let most = before().filter_map(|node| depths.get(&node.id())).max().copied().unwrap_or(0);
            let is_site = node.outputs().iter().any(|output| outputs.contains(output.as_str()));
            depths.entry(node.id()).or_insert(most + usize::from(is_site));
            open.pop();
        }
    }
    depths
}

/// Layers of the caches that a site reads, not through another site and not only their lengths.
fn caches(index: &Index, site: &Site, outputs: &BTreeSet<&str>) -> BTreeSet<usize> {
    let (mut layers, mut seen) = (BTreeSet::new(), BTreeSet::new());
    let mut open = vec![site.output.as_str()];
    while let Some(tensor) = open.pop() {
        let Some(node) = index.producer(tensor) else {
            layers.extend(index.input(tensor).and_then(|_| cache_layer(tensor)));
            continue;
        };
        if node.is("", "Shape") || !seen.insert(node.id()) {
            continue;
        }
        let inputs = node.inputs().iter().map(String::as_str);
        open.extend(inputs.filter(|input| !input.is_empty() && !outputs.contains(input)));
    }
    layers
}

/// The layer in the name of a cache: `past_key_values.3.key`, `past_3`, `cache.3.value`.
fn cache_layer(name: &str) -> Option<usize> {
    let from = ["past", "cache"].iter().find_map(|word| name.find(word))?;
    let digits = name.get(from..)?.split(|c: char| !c.is_ascii_digit()).find(|part| !part.is_empty())?;
    digits.parse().ok()
}

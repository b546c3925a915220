//! The graphs of a model: the main one, and those nested in its nodes, each with the names around it.

use super::Site;
use crate::fold::Result;
use crate::onnx::{Graph, Index, Model};

/// Calls `see` with the index and the name of every graph, outer ones first. The main graph's name is empty; a branch is named
/// after its node and attribute.
pub(in crate::fold) fn visit(model: &Model, see: &mut impl FnMut(&Index, &str) -> Result<()>) -> Result<()> {
    visit_graph(&Index::new(model.graph()), "", see)
}

fn visit_graph(index: &Index, scope: &str, see: &mut impl FnMut(&Index, &str) -> Result<()>) -> Result<()> {
    see(index, scope)?;
    for (nested, name) in nested(index.graph(), scope) {
        visit_graph(&Index::within(nested, index), &name, see)?;
    }
    Ok(())
}

/// The graphs nested in one, with their names.
fn nested<'g>(graph: &'g Graph, scope: &str) -> Vec<(&'g Graph, String)> {
    let mut found = Vec::new();
    for node in graph.nodes() {
        let name = if node.name().is_empty() { node.op_type() } else { node.name() };
        for attribute in node.attributes() {
            for nested in attribute.graphs() {
                let outer = if scope.is_empty() { String::new() } else { format!("{scope}/") };
                found.push((nested, format!("{outer}{name}.{}", attribute.name())));
            }
        }
    }
    found
}

/// Calls `see` with the index of the graph that a site is in.
pub(in crate::fold) fn of_site<T>(model: &Model, site: &Site, see: impl FnOnce(&Index) -> Result<T>) -> Result<T> {
    // node numbers tell graphs apart that have one name
    let holds = |graph: &Graph| graph.node(site.node).is_some();
    find(&Index::new(model.graph()), &holds, see)
}

fn find<T>(index: &Index, holds: &dyn Fn(&Graph) -> bool, see: impl FnOnce(&Index) -> Result<T>) -> Result<T> {
    let leads = |nested: &&Graph| {
        holds(nested) || nested.nodes().iter().flat_map(|n| n.subgraphs()).any(|g| anywhere(g, holds))
    };
    if holds(index.graph()) {
        return see(index);
    }
    let next = index.graph().nodes().iter().flat_map(|node| node.subgraphs()).find(leads);
    match next {
        Some(nested) => find(&Index::within(nested, index), holds, see),
        None => see(index),
    }
}

fn anywhere(graph: &Graph, holds: &dyn Fn(&Graph) -> bool) -> bool {
    holds(graph) || graph.nodes().iter().flat_map(|node| node.subgraphs()).any(|nested| anywhere(nested, holds))
}

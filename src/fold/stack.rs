//! The sites of a graph that carries adapters already.
//!
//! A fold only puts nodes between others and lets readers read a sum, so that the base graph's nodes are still there in their
//! order. Sites are found in the base graph, and each is followed to where its readers read now: what another fold adds there is
//! added to the sum of those before.

use super::{Error, Record, Result, Site, locate, record};
use crate::onnx::{Index, Model, Node, NodeId, Use};

/// The attention sites of a graph, folded or not.
///
/// # Errors
/// When the base graph has none that an adapter fits, or a folded graph is not as its fold left it.
pub fn sites(model: &Model) -> Result<Vec<Site>> {
    if Record::all(model)?.is_empty() {
        return locate::sites(model);
    }
    let (mut base, _) = record::last(model)?;
    while !Record::all(&base)?.is_empty() {
        base = record::last(&base)?.0;
    }
    let places = places(&base, model)?;
    let before = Index::new(base.graph());
    let follow = |mut site: Site| {
        let readers: Option<Vec<Use>> = site
            .readers
            .iter()
            .map(|reader| Some(Use { node: *places.get(reader.node.index())?, slot: reader.slot }))
            .collect();
        site.readers = readers.unwrap_or_default();
        site.output = now(model, &site.readers).unwrap_or(site.output);
        let readers = before.consumers(&site.query).iter();
        let readers: Option<Vec<Use>> =
            readers.map(|reader| Some(Use { node: *places.get(reader.node.index())?, slot: reader.slot })).collect();
        if let Some(query) = readers.and_then(|readers| now(model, &readers)) {
            site.query = query;
        }
        site
    };
    Ok(locate::sites(&base)?.into_iter().map(follow).collect())
}

/// Where each node of the base graph is in the folded one.
fn places(base: &Model, folded: &Model) -> Result<Vec<NodeId>> {
    let mut rest = folded.graph().nodes().iter();
    let same = |a: &Node, b: &Node| a.name() == b.name() && a.op_type() == b.op_type() && a.outputs() == b.outputs();
    let place = |node: &Node| rest.find(|candidate| same(node, candidate)).map(Node::id);
    let places: Option<Vec<NodeId>> = base.graph().nodes().iter().map(place).collect();
    places.ok_or_else(|| Error::Unfold { why: "its nodes are not those of its base graph".into() })
}

/// The tensor that all of these read.
fn now(model: &Model, readers: &[Use]) -> Option<String> {
    let mut tensors = readers.iter().map(|reader| model.graph().node(reader.node)?.input(reader.slot));
    let first = tensors.next()??;
    tensors.all(|tensor| tensor == Some(first)).then(|| first.to_owned())
}

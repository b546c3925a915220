//! The tokens' positions follow the prefix.
//!
//! They are counted on where the graph takes them in: its input, or else where it turns or embeds by what it counted. An operator
//! that counts for itself goes on as it does, for the scores among tokens depend on differences alone; the query that meets the
//! prefix is turned further.

use std::collections::BTreeMap;

use super::{Length, first, types};
use crate::fold::emit::Job;
use crate::fold::locate::{self, Positions, position_uses, scope, shape};
use crate::fold::{Error, Result};
use crate::onnx::{DataType, Dim, Graph, Index, Node, NodeDef, Use};

const MICROSOFT: &str = "com.microsoft";
const INPUT: &str = "position_ids";

/// Tensors of positions, by what they were before.
#[derive(Default)]
pub(super) struct Shift(BTreeMap<String, String>);

impl Shift {
    pub(super) fn rename(&self, name: &mut String) {
        if let Some(shifted) = self.0.get(name) {
            name.clone_from(shifted);
        }
    }
}

pub(super) fn shift(job: &mut Job, length: &Length) -> Result<Shift> {
    let model = job.model;
    let index = Index::new(model.graph());
    let mut shift = Shift::default();
    if let Some(input) = index.input(INPUT) {
        let mut readers = Vec::new();
        model.graph().visit(&mut |graph: &Graph| {
            for node in graph.nodes() {
                let slots = node.inputs().iter().enumerate().filter(|(_, name)| *name == INPUT);
                readers.extend(slots.map(|(slot, _)| Use { node: node.id(), slot }));
            }
        });
        if !readers.is_empty() {
            let number = length.number(job, input.elem_type().unwrap_or(DataType::Int64));
            let shifted = first(job, NodeDef::new("Add", "/prefold/positions/Add"), &[INPUT, &number]);
            for reader in readers {
                job.patch.replace_input(reader.node, reader.slot, shifted.as_str());
            }
            shift.0.insert(INPUT.into(), shifted);
            return Ok(shift);
        }
    }
    let mut found = Vec::new();
    scope::visit(model, &mut |index, scope| {
        for (reader, is_float) in position_uses(index) {
            let Some(tensor) = index.graph().node(reader.node).and_then(|node| node.input(reader.slot)) else {
                continue;
            };
            let declared = || index.value(tensor).and_then(|value| value.elem_type());
            let data_type = match is_float {
                true => types::float_type(index, tensor).unwrap_or(DataType::Float),
                false => declared().unwrap_or(DataType::Int64),
            };
            found.push((scope.to_owned(), reader, tensor.to_owned(), data_type, rows(index, tensor)));
        }
        Ok(())
    })?;
    let missing = |what: &str| Error::NotFolded {
        what: what.into(),
        help: "export the base model with `prefold export`, or in a form that has the input position_ids",
    };
    let counted = locate::exactness(model).positions;
    if found.is_empty() && !matches!(counted, Positions::Absent | Positions::Operator) {
        return Err(missing("prefix tuning in a graph of which it is not known where it counts positions"));
    }
    if length.is_bank && found.iter().any(|(_, _, _, _, rows)| rows.is_none()) {
        return Err(missing(
            "prefix tuning as a bank in a graph that counts positions by itself, the same for every row",
        ));
    }
    // the first reader of a tensor comes first
    found.sort_by_key(|(_, reader, _, _, _)| reader.node);
    let mut written: BTreeMap<(String, String), String> = BTreeMap::new();
    for (count, (scope, reader, tensor, data_type, rows)) in found.into_iter().enumerate() {
        let mut number = length.number(job, data_type);
        if let Some(rows) = rows.filter(|rows| length.is_bank && rows.len() > 2) {
            let rank = rows.len();
            let shape = job.constants.integers(&mut job.patch, &format!("prefold/prefix_rows_{rank}"), &rows);
            let reshape = NodeDef::new("Reshape", format!("/prefold/prefix/Reshape_{rank}_{data_type}"));
            number = first(job, reshape, &[&number, &shape]);
        }
        let shifted = written.entry((scope, tensor.clone())).or_insert_with(|| {
            let name = format!("/prefold/positions/Add_{count}");
            let output = format!("{name}/output_0");
            let node = NodeDef::new("Add", name).inputs([tensor.as_str(), &number]).outputs([output.as_str()]);
            job.patch.insert_before(reader.node, node);
            output
        });
        job.patch.replace_input(reader.node, reader.slot, shifted.as_str());
        shift.0.insert(tensor, shifted.clone());
    }
    Ok(shift)
}

/// A number for each row of the batch in the shape in which it is added to positions, `[batch, …, seq]`; none where these have not
/// a row for each, or may not have one.
fn rows(index: &Index, positions: &str) -> Option<Vec<i64>> {
    let declared = index.value(positions).and_then(|value| value.shape()).and_then(<[Dim]>::first);
    let rank = shape::rank(index, positions).filter(|rank| (2..=3).contains(rank))?;
    let once = matches!(declared, Some(Dim::Value(1)));
    (!once).then(|| std::iter::once(-1).chain(std::iter::repeat_n(1, rank - 1)).collect())
}

/// The node among those of a rebuilt query that turns it by positions which the operator counts for itself. A table that is computed
/// from positions is moved on with them; one that is computed otherwise may depend on the length of the text, and end with it.
pub(super) fn turned_inside(index: &Index, node: &Node, nodes: &[NodeDef]) -> Result<Option<usize>> {
    let rotates = node.attribute("do_rotary").and_then(|a| a.as_int()).unwrap_or(0) != 0;
    let counts = node.is(MICROSOFT, "GroupQueryAttention") && rotates && node.input(9).is_none();
    let Some(table) = node.input(7).filter(|_| counts) else { return Ok(None) };
    if locate::is_from_positions(index, table) {
        return Ok(None);
    }
    if !shape::is_weight(index, table) {
        return Err(Error::NotFolded {
            what: format!("prefix tuning where `{}` rotates by a table that the graph computes", node.name()),
            help: "export the base model with `prefold export`, without --right-padding-only",
        });
    }
    Ok(nodes.iter().position(|node| node.op_type() == "RotaryEmbedding"))
}

/// The nodes of a query and, from its rotation on, those of the same query as far on as the prefix is long.
pub(super) fn turned_further(
    job: &mut Job,
    length: &Length,
    mut nodes: Vec<NodeDef>,
    turned: usize,
    tensor: &str,
) -> Result<(Vec<NodeDef>, String)> {
    let Some(positions) = nodes.get(turned).and_then(|node| node.inputs_read().get(1)).cloned() else {
        return Ok((nodes, tensor.to_owned()));
    };
    let number = length.number(job, DataType::Int64);
    let further = format!("{positions}_after_prefix");
    let name = format!("{}/Add_prefix", positions.trim_end_matches("/output_0"));
    let add = NodeDef::new("Add", name).inputs([positions.as_str(), &number]).outputs([further.as_str()]);
    let mut again: Vec<NodeDef> = nodes.iter().skip(turned).cloned().collect();
    let made: Vec<String> =
        again.iter().flat_map(|node| node.outputs_made().iter().cloned().chain([node.name().to_owned()])).collect();
    let rename = |name: &mut String| {
        if *name == positions {
            name.clone_from(&further);
        } else if made.contains(name) {
            name.push_str("_prefix");
        }
    };
    again.iter_mut().for_each(|node| node.each_name(rename));
    nodes.push(add);
    nodes.extend(again);
    Ok((nodes, format!("{tensor}_prefix")))
}

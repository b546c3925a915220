//! The sliding window in a mask of standard operators.
//!
//! ```text
//! keys ──────────────────┐                 queries ─ Sub keys ─┐
//! queries ─ Sub window ─ Greater ─► seen              window ─ Less ─► seen
//! ```
//! and what says the same with the other comparisons, with an Add, or of what is not seen. Older models keep a table of which key
//! each query sees, `[…, positions, positions]`.

use std::collections::BTreeSet;
use std::path::Path;

use crate::fold::locate::shape;
use crate::onnx::{DataType, Index, Node, TensorInfo};

/// Nodes of a mask: more than any exporter writes.
const MAX_NODES: usize = 512;

/// How many keys a query sees by the masks that these tensors are made of; the narrowest, where there are several. `folder` is that of
/// the graph's data files.
pub(super) fn find<'g>(index: &Index<'g>, tensors: Vec<&'g str>, folder: &Path) -> Option<i64> {
    let (mut open, mut seen, mut found) = (tensors, BTreeSet::new(), None);
    while let Some(tensor) = open.pop() {
        if let Some(table) = shape::constant(index, tensor) {
            found = found.into_iter().chain(of_table(table, folder)).min();
            continue;
        }
        let Some(node) = index.producer(tensor).filter(|node| seen.len() < MAX_NODES && seen.insert(node.id())) else {
            continue;
        };
        match node.op_type() {
            "MatMul" | "FusedMatMul" | "Gemm" | "Shape" => continue,
            "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" => {
                let width = of_comparison(index, node).filter(|width| *width > 1);
                found = found.into_iter().chain(width).min();
            }
            _ => {}
        }
        open.extend(node.inputs().iter().map(String::as_str).filter(|input| !input.is_empty()));
    }
    found
}

fn of_comparison(index: &Index, node: &Node) -> Option<i64> {
    let (left, right) = (side(index, node.input(0)?), side(index, node.input(1)?));
    // as left - right ≷ bound
    let bound = match (left, right) {
        (Side::Counts(left), Side::Counts(right)) => right - left,
        (Side::Difference, Side::Number(number)) => number,
        (Side::Number(number), Side::Difference) => -number,
        _ => return None,
    };
    // a query is `bound` columns or more ahead of its keys, or keys that much behind it
    Some(match (node.op_type(), bound < 0) {
        ("Greater", true) | ("Less", false) | ("LessOrEqual", true) | ("GreaterOrEqual", false) => bound.abs(),
        _ => bound.abs() + 1,
    })
}

/// The keys that the last query of a table sees; none where that is all of them, or it is no such table.
fn of_table(table: &TensorInfo, folder: &Path) -> Option<i64> {
    let [outer @ .., rows, columns] = table.dims() else { return None };
    let size = usize::try_from(*columns).ok().filter(|size| rows == columns && *size > 1)?;
    if outer.iter().any(|dim| *dim != 1) {
        return None;
    }
    let width = match table.data_type() {
        DataType::Bool | DataType::Uint8 => 1,
        DataType::Float => 4,
        _ => return None,
    };
    let data = table.data_in(folder).ok()?;
    let bytes = data.bytes();
    let last = bytes.get(bytes.len().checked_sub(size.checked_mul(width)?)?..)?;
    // what the last query has of its own key it has of all that it sees
    let own = last.chunks(width).next_back()?;
    let seen = last.chunks(width).rev().take_while(|value| *value == own).count();
    let hidden = last.chunks(width).rev().skip(seen).all(|value| value != own);
    (seen < size && hidden).then(|| i64::try_from(seen).ok())?
}

enum Side {
    /// Columns, and what is added to them.
    Counts(i64),
    /// Columns less columns.
    Difference,
    Number(i64),
}

fn side(index: &Index, tensor: &str) -> Side {
    if let Some(number) = integer(index, tensor) {
        return Side::Number(number);
    }
    let node = match index.producer(tensor) {
        Some(node) if matches!(node.op_type(), "Sub" | "Add") => node,
        _ => return Side::Counts(0),
    };
    let of = |slot: usize| node.input(slot).and_then(|input| integer(index, input));
    match (node.op_type(), of(0), of(1)) {
        ("Sub", None, Some(number)) => Side::Counts(-number),
        ("Add", None, Some(number)) | ("Add", Some(number), None) => Side::Counts(number),
        ("Sub", None, None) => Side::Difference,
        _ => Side::Counts(0),
    }
}

/// One integer that is a constant.
fn integer(index: &Index, tensor: &str) -> Option<i64> {
    let constant = shape::constant(index, tensor)?;
    let one = constant.dims().iter().product::<i64>() == 1;
    let whole = matches!(constant.data_type(), DataType::Int64 | DataType::Int32);
    if one && whole { constant.to_i64s().ok()?.first().copied() } else { None }
}

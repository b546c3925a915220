//! The tensors that two graphs have in common: those of one name, and else those that hold the same in the first call.
//!
//! A tool that optimises, converts or quantises a graph keeps most names; one that exports anew keeps none. What holds the same
//! numbers in the first call is the same tensor in all of them, so that a fault that only later calls show is found too.

use std::collections::HashSet;

use ndarray::{Array2, Array3};

use super::branches::Branches;
use super::by_value::NEAR;
use super::place::{At, Place};
use super::reference::Trace;
use super::tapped::Seen;
use super::taps::{Tap, Taps};
use super::types::floats;
use crate::fold::Layout;
use crate::onnx::Model;
use crate::parity::Budget;
use crate::runtime::Value;

/// Fewer elements may be equal by accident.
const LEAST: usize = 16;
/// What a mask hides is below this.
const HIDDEN: f64 = -1e30;

/// Batch and columns of a call.
#[derive(Clone, Copy)]
struct Tokens {
    batch: usize,
    columns: usize,
}

/// A graph's tensors in the first call, in the order of its nodes.
struct Tensors<'a> {
    all: Vec<Known<'a>>,
}

struct Known<'a> {
    name: &'a str,
    shape: &'a [usize],
    values: Vec<f64>,
}

/// The tensors of `graph` that `other` has too, each a place of its own in the order of the data, and what `other` computes there. Each branch
/// is looked at in the first call that takes it.
pub(super) fn counterparts(
    (graph, seen): (&Branches, &[Seen]),
    (other, other_seen): (&Branches, &[Seen]),
    masks: &[&Array2<i64>],
    budget: &Budget,
) -> (Taps, Vec<Trace>) {
    let mut taps = Taps::default();
    let mut traces = vec![Trace::new(); other_seen.len()];
    let mut by_name = 0usize;
    for (branch, taken) in graph.taken.iter().enumerate() {
        let calls = || seen.iter().zip(other_seen).zip(masks).filter(|((seen, _), _)| seen.branch == branch);
        let Some(((first, other_first), mask)) = calls().next() else { continue };
        let of_other = other_first.branch;
        let Some(other_taken) = other.taken.get(of_other) else { continue };
        let (own, others) = (Tensors::of(&taken.graph, first), Tensors::of(&other_taken.graph, other_first));
        for (order, (tensor, counterpart)) in pairs(&own, &others, budget).iter().enumerate() {
            let Some(layout) = layout(tensor.shape, Tokens::of(mask)) else { continue };
            let at = At::new(order, Place::Tensor);
            for (call, (other, mask)) in other_seen.iter().zip(masks).enumerate() {
                let is_taken = seen.get(call).is_some_and(|seen| seen.branch == branch) && other.branch == of_other;
                let value = other.get(counterpart.name).filter(|_| is_taken);
                let array = value.and_then(|value| unfolded(value, layout, Tokens::of(mask)));
                if let (Some(array), Some(trace)) = (array, traces.get_mut(call)) {
                    trace.insert(at, array);
                }
            }
            by_name += usize::from(tensor.name == counterpart.name);
            taps.taps.push(Tap { branch, ..Tap::new(at, tensor.name, layout) });
        }
    }
    let by_value = taps.taps.len().saturating_sub(by_name);
    taps.notes.push(format!(
        "compared with the other graph at {by_name} tensors of the same name and {by_value} that hold the same"
    ));
    (taps, traces)
}

/// Each tensor with its counterpart, in the order of the first graph's nodes.
fn pairs<'a, 'b>(own: &'a Tensors<'b>, other: &'a Tensors<'b>, budget: &Budget) -> Vec<(&'a Known<'b>, &'a Known<'b>)> {
    let mut found: Vec<Option<&Known>> = Vec::new();
    for tensor in &own.all {
        let fits = |known: &&Known| known.values.len() == tensor.values.len();
        let named = other.all.iter().find(|known| known.name == tensor.name).filter(fits);
        let equal = || {
            let long = other.all.iter().filter(fits).filter(|known| known.values.len() >= LEAST);
            { long }.find(|known| near(&tensor.values, &known.values, budget.factor * budget.relative_floor))
        };
        found.push(named.or_else(equal));
    }
    let mut taken: HashSet<&str> = found.iter().flatten().map(|known| known.name).collect();
    let mut all = Vec::new();
    for (tensor, counterpart) in own.all.iter().zip(found) {
        let wrong = || {
            let free = other.all.iter().filter(|known| !taken.contains(known.name) && known.shape == tensor.shape);
            let free = free.filter(|known| known.values.len() >= LEAST);
            { free }.find(|known| near(&tensor.values, &known.values, NEAR))
        };
        if let Some(counterpart) = counterpart.or_else(wrong) {
            taken.insert(counterpart.name);
            all.push((tensor, counterpart));
        }
    }
    all
}

/// Whether no element is further away than a part of the largest; what is hidden in both is equal.
fn near(own: &[f64], other: &[f64], part: f64) -> bool {
    let hidden = |x: f64| x.is_nan() || x < HIDDEN;
    let largest = other.iter().filter(|x| !hidden(**x)).fold(0.0f64, |largest, x| largest.max(x.abs()));
    // zeros and ones are equal everywhere
    let varied = other.iter().any(|x| *x != 0.0 && *x != 1.0 && !hidden(*x));
    varied && own.iter().zip(other).all(|(a, b)| hidden(*a) && hidden(*b) || (a - b).abs() <= part * largest)
}

impl<'a> Tensors<'a> {
    fn of(graph: &'a Model, seen: &'a Seen) -> Self {
        let floats = floats(graph.graph());
        let outputs = graph.graph().nodes().iter().flat_map(|node| node.outputs());
        let known = outputs.filter(|output| floats.contains(*output)).filter_map(|name| {
            let value = seen.get(name)?;
            let values = value.clone().into_f64().ok()?.iter().copied().collect();
            Some(Known { name: name.as_str(), shape: value.shape(), values })
        });
        Self { all: known.collect() }
    }
}

impl Tokens {
    fn of(mask: &Array2<i64>) -> Self {
        Self { batch: mask.nrows(), columns: mask.ncols() }
    }
}

/// Where the columns of a call are in a tensor; none where they are nowhere, so that padding cannot be told from tokens.
fn layout(shape: &[usize], tokens: Tokens) -> Option<Layout> {
    let Tokens { batch, columns } = tokens;
    match shape {
        [rows, seq, _, ..] if (*rows, *seq) == (batch, columns) => Some(Layout::Merged),
        [rows, .., seq, _] if shape.len() > 2 && (*rows, *seq) == (batch, columns) => Some(Layout::HeadsFirst),
        [rows, _] if *rows == batch * columns => Some(Layout::Merged),
        _ => None,
    }
}

/// `[batch, columns, width]`; what a mask hides is left open.
fn unfolded(value: &Value, layout: Layout, tokens: Tokens) -> Option<Array3<f64>> {
    let shape = value.shape().to_vec();
    let all = value.clone().into_f64().ok()?;
    let open = |x: f64| if x < HIDDEN { f64::NAN } else { x };
    let flat: Vec<f64> = all.iter().map(|x| open(*x)).collect();
    let columns = match (layout, &shape[..]) {
        (Layout::HeadsFirst, [.., columns, _]) => *columns,
        (Layout::Merged | Layout::SeqFirst, [_, columns, _, ..]) => *columns,
        (Layout::Merged, [rows, _]) => rows.checked_div(tokens.batch)?,
        _ => return None,
    };
    let width = flat.len().checked_div(tokens.batch.checked_mul(columns)?)?;
    // merged rows are one head
    let inner = if layout == Layout::HeadsFirst { *shape.last()? } else { width };
    let heads = width.checked_div(inner)?;
    Some(Array3::from_shape_fn((tokens.batch, columns, width), |(row, column, at)| {
        let (head, at) = (at / inner, at % inner);
        flat.get(((row * heads + head) * columns + column) * inner + at).copied().unwrap_or(f64::NAN)
    }))
}

//! Places that data flow does not find, by what the tensors of a graph hold.
//!
//! Where attention is of a shape that is not recognised, or was broken, no layer can be followed from its sites. Each tensor of the
//! graph is then compared with what candle has at each place: one that is equal is that place, one that is near may be it and wrong.

use std::collections::HashSet;

use super::compare::{Calls, Gap};
use super::place::Place;
use super::taps::{Tap, Taps};
use crate::fold::Layout;
use crate::onnx::Model;
use crate::parity::Budget;

/// A tensor is near a place when no element is further away than this part of the largest.
pub(super) const NEAR: f64 = 0.1;

/// The same places with those of a branch that were found by value in the first call that took it.
pub(super) fn by_value(mut taps: Taps, (graph, branch): (&Model, usize), calls: &Calls<'_>, budget: &Budget) -> Taps {
    let Some(call) = calls.seen.iter().position(|seen| seen.branch == branch) else { return taps };
    let Some((reference, seen)) = calls.reference.get(call).zip(calls.seen.get(call)) else { return taps };
    let own = || taps.taps.iter().filter(|tap| tap.branch == branch);
    let known: HashSet<_> = own().map(|tap| tap.at).collect();
    let mut taken: HashSet<String> = own().map(|tap| tap.tensor.clone()).collect();
    let outputs: Vec<&String> = graph.graph().nodes().iter().flat_map(|node| node.outputs()).collect();
    let mut open = Vec::new();
    let gaps = |at, taken: &HashSet<String>| -> Vec<Gap> {
        let layouts = [Layout::Merged, Layout::HeadsFirst];
        let tap = |tensor: &String, layout| Tap { branch, ..Tap::new(at, tensor, layout) };
        let free = outputs.iter().filter(|tensor| !taken.contains(**tensor));
        let values = free.filter_map(|tensor| Some((*tensor, seen.get(tensor)?)));
        let values = values.flat_map(|(tensor, value)| layouts.map(|layout| (tap(tensor, layout), value)));
        values.filter_map(|(tap, value)| calls.gap_of(call, &tap, value, budget)).collect()
    };
    for at in reference.keys().filter(|at| !known.contains(at)) {
        match gaps(*at, &HashSet::new()).into_iter().find(|gap| gap.ratio() <= 1.0) {
            Some(gap) => {
                taken.insert(gap.tap.tensor.clone());
                taps.taps.push(gap.tap);
            }
            None => open.push(*at),
        }
    }
    let found = reference.len().saturating_sub(known.len()).saturating_sub(open.len());
    for at in open {
        let nearest = gaps(at, &taken).into_iter().min_by(|a, b| a.ratio().total_cmp(&b.ratio()));
        if let Some(gap) = nearest.filter(|gap| gap.distance <= NEAR * gap.allowed / budget.relative_floor) {
            taken.insert(gap.tap.tensor.clone());
            taps.taps.push(gap.tap);
        } else if !matches!(at.place, Place::Scores | Place::Weights) {
            // an operator has scores and weights and shows none
            taps.open.push((branch, at));
        }
    }
    taps.notes.push(format!("{found} places were found by what the graph's tensors hold"));
    taps
}

//! How far the tensors of a run are from the reference's, place by place.

use ndarray::Array2;

use super::layout::View;
use super::place::{At, Place};
use super::reference::Trace;
use super::tapped::Seen;
use super::taps::Tap;
use crate::parity::Budget;
use crate::runtime::Value;

/// A place in a call.
#[derive(Clone, Debug)]
pub(super) struct Gap {
    pub(super) call: usize,
    pub(super) tap: Tap,
    /// The largest absolute distance; [`f64::MAX`] for what is no number.
    pub(super) distance: f64,
    /// How far it may be.
    pub(super) allowed: f64,
    /// Where the distance is: row and column of the batch, padding and earlier calls included.
    pub(super) row: usize,
    pub(super) column: usize,
    /// The largest distance at each real position, by row, then column.
    pub(super) errors: Vec<f64>,
}

impl Gap {
    /// The distance in units of what is allowed.
    pub(super) fn ratio(&self) -> f64 {
        self.distance / self.allowed.max(f64::MIN_POSITIVE)
    }
}

/// How much larger than all before it a ratio is that no rounding explains.
const JUMP: f64 = 3.0;

/// The first departure among gaps in the order of the data, and the largest ratio before it.
///
/// Rounding grows slowly: a runtime that accumulates a long dot product in order can pass the budget of an inner place, which no
/// later rounding forgives, long before what is wrong. So a departure is the first gap above its budget that is also several times
/// what all before it are; where none is, the first above its budget.
pub(super) fn departure(gaps: &[Gap]) -> Option<(&Gap, f64)> {
    let mut before = 0.0f64;
    let mut first = None;
    for gap in gaps {
        let ratio = gap.ratio();
        if ratio > 1.0 {
            if ratio >= JUMP * before {
                return Some((gap, before));
            }
            first = first.or(Some((gap, before)));
        }
        before = before.max(ratio);
    }
    first
}

/// The calls of a case in three ways.
pub(super) struct Calls<'a> {
    /// The mask of each call, `[batch, seq]`.
    pub(super) masks: Vec<&'a Array2<i64>>,
    pub(super) reference: &'a [Trace],
    /// candle in the graph's precision.
    pub(super) own: &'a [Trace],
    pub(super) seen: &'a [Seen],
}

impl Calls<'_> {
    /// All places that can be compared, in the order of calls and of the data in each.
    pub(super) fn gaps(&self, taps: &[Tap], budget: &Budget) -> Vec<Gap> {
        let mut taps: Vec<&Tap> = taps.iter().collect();
        taps.sort_by_key(|tap| tap.at);
        let calls = 0..self.masks.len();
        calls.flat_map(|call| taps.iter().filter_map(move |tap| self.gap(call, tap, budget))).collect()
    }

    fn gap(&self, call: usize, tap: &Tap, budget: &Budget) -> Option<Gap> {
        let seen = self.seen.get(call).filter(|seen| seen.branch == tap.branch)?;
        self.gap_of(call, tap, seen.get(&tap.tensor)?, budget)
    }

    /// How far a value is from what a place should hold in a call.
    pub(super) fn gap_of(&self, call: usize, tap: &Tap, value: &Value, budget: &Budget) -> Option<Gap> {
        let expected = self.reference.get(call)?.get(&tap.at)?;
        let own = self.own.get(call)?.get(&tap.at)?;
        let value = value.clone();
        let shape = value.shape().to_vec();
        let cache = matches!(tap.at.place, Place::Keys | Place::Values);
        let view = View::new(tap, &shape, expected.dim())?;
        let (rows, columns, width) = expected.dim();
        if view.held < columns && !cache {
            return None;
        }
        let found = value.into_f64().ok()?;
        let found = found.as_standard_layout();
        let found = found.as_slice()?;
        let before: usize = self.masks.iter().take(call).map(|mask| mask.ncols()).sum();
        let (mut gap, mut largest, mut own_distance) = (0.0f64, 0.0f64, 0.0f64);
        let (mut worst, mut errors) = ((0, 0), Vec::new());
        for row in 0..rows {
            for column in (0..columns).filter(|column| self.is_real(call, row, *column, columns)) {
                let mut error = 0.0f64;
                for at in 0..width {
                    let reference = expected.get([row, column, at]).copied().unwrap_or(f64::NAN);
                    // what a mask hides, or a place leaves open
                    if reference.is_nan() {
                        continue;
                    }
                    // a column that a cache lacks counts as zeros
                    let run = view.index(row, column, at).map_or(Some(0.0), |index| found.get(index).copied())?;
                    error = error.max(finite((run - reference).abs()));
                    largest = largest.max(reference.abs());
                    let own = own.get([row, column, at]).copied().unwrap_or(f64::NAN);
                    own_distance = own_distance.max(finite((own - reference).abs()));
                }
                if error > gap {
                    (gap, worst) = (error, (row, column));
                }
                errors.push(error);
            }
        }
        let start = if columns > self.masks.get(call)?.ncols() || cache { 0 } else { before };
        let allowed = budget.allowance(Some(own_distance), largest).allowed;
        let (row, column) = (worst.0, worst.1 + start);
        Some(Gap { call, tap: tap.clone(), distance: gap, allowed, row, column, errors })
    }

    /// Whether a column is a token's; `columns` are those of the call, or all so far.
    fn is_real(&self, call: usize, row: usize, column: usize, columns: usize) -> bool {
        let own = self.masks.get(call).map_or(0, |mask| mask.ncols());
        let mut column = column;
        if columns == own {
            return self.masks.get(call).and_then(|mask| mask.get([row, column])) == Some(&1);
        }
        for mask in &self.masks {
            if column < mask.ncols() {
                return mask.get([row, column]) == Some(&1);
            }
            column -= mask.ncols();
        }
        false
    }

    /// What the tensor of a place should hold, in its own layout and type: the reference where tokens are real, and its own
    /// elements elsewhere.
    pub(super) fn expected(&self, gap: &Gap) -> Option<Value> {
        let reference = self.reference.get(gap.call)?.get(&gap.tap.at)?;
        let value = self.seen.get(gap.call)?.get(&gap.tap.tensor)?.clone();
        let view = View::new(&gap.tap, value.shape(), reference.dim())?;
        let dtype = value.dtype();
        let mut array = value.into_f64().ok()?.as_standard_layout().into_owned();
        let elements = array.as_slice_mut()?;
        let columns = reference.dim().1;
        for ((row, column, at), wanted) in reference.indexed_iter() {
            let place = view.index(row, column, at).filter(|_| self.is_real(gap.call, row, column, columns));
            if let Some(element) = place.and_then(|place| elements.get_mut(place)).filter(|_| !wanted.is_nan()) {
                *element = *wanted;
            }
        }
        Some(rounded(array, dtype))
    }
}

fn rounded(array: ndarray::ArrayD<f64>, dtype: crate::runtime::DType) -> Value {
    use crate::runtime::DType;
    match dtype {
        DType::F16 => array.mapv(half::f16::from_f64).into(),
        DType::Bf16 => array.mapv(half::bf16::from_f64).into(),
        DType::F64 => array.into(),
        _ => array.mapv(|x| x as f32).into(),
    }
}

fn finite(distance: f64) -> f64 {
    if distance.is_finite() { distance } else { f64::MAX }
}

/// Places by layer that show how an error grows: the residual stream.
pub(super) fn is_stream(at: At) -> bool {
    matches!(at.place, Place::Stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fold::Layout;

    fn found(ratios: &[f64]) -> Option<(usize, f64)> {
        let tap = Tap::new(At::new(0, Place::Stream), "x", Layout::Merged);
        let gap = |(call, ratio): (usize, &f64)| Gap {
            call,
            tap: tap.clone(),
            distance: *ratio,
            allowed: 1.0,
            row: 0,
            column: 0,
            errors: Vec::new(),
        };
        let gaps: Vec<Gap> = ratios.iter().enumerate().map(gap).collect();
        departure(&gaps).map(|(gap, before)| (gap.call, before))
    }

    #[test]
    fn a_jump_departs_and_drift_does_not() {
        assert_eq!(found(&[0.1, 0.5, 0.9]), None);
        assert_eq!(found(&[0.0, 1.5, 900.0]), Some((1, 0.0)));
        assert_eq!(found(&[0.6, 1.1, 1.7, 80.0, 900.0]), Some((3, 1.7)));
        // nothing but drift: where it passes the budget
        assert_eq!(found(&[0.6, 1.1, 1.7, 2.5]), Some((1, 0.6)));
    }
}

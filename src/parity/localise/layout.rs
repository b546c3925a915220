//! Where an element of a place is in a tensor of a graph.

use crate::fold::Layout;
use crate::parity::localise::taps::Tap;

/// A tensor as `[batch, columns, width]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'t> {
    tap: &'t Tap,
    /// Columns of the tensor: as many as are asked for, or more, of which the last ones are meant.
    pub(super) held: usize,
    asked: usize,
    /// Width of a head; of a row where heads are merged.
    inner: usize,
    /// Heads of a row; one where they are merged.
    heads: usize,
}

impl<'t> View<'t> {
    /// None where the tensor cannot hold `batch · columns` rows of `width`.
    pub(super) fn new(tap: &'t Tap, shape: &[usize], (batch, asked, width): (usize, usize, usize)) -> Option<Self> {
        let all: usize = shape.iter().product();
        let (held, inner, heads) = match (tap.layout, shape) {
            (Layout::HeadsFirst, [.., held, inner]) => {
                (*held, *inner, all.checked_div(batch.checked_mul(held * inner)?)?)
            }
            (Layout::HeadsFirst, _) => return None,
            (Layout::Merged | Layout::SeqFirst, shape) => {
                let held = if let [_, held, _, ..] = shape { *held } else { shape.first()?.checked_div(batch)? };
                (held, all.checked_div(batch.checked_mul(held)?)?, 1)
            }
        };
        let wide = match &tap.columns {
            Some(columns) => columns.len() == width && columns.iter().all(|column| *column < inner),
            None => heads * inner == width,
        };
        (wide && batch * held * heads * inner == all).then_some(Self { tap, held, asked, inner, heads })
    }

    /// The flat, row-major index of an element; none where the tensor holds fewer columns.
    pub(super) fn index(&self, row: usize, column: usize, at: usize) -> Option<usize> {
        let column = (column + self.held).checked_sub(self.asked)?;
        if self.tap.layout == Layout::HeadsFirst {
            let (head, at) = (at / self.inner, at % self.inner);
            return Some(((row * self.heads + head) * self.held + column) * self.inner + at);
        }
        let at = match &self.tap.columns {
            Some(columns) => *columns.get(at)?,
            None => at,
        };
        Some((row * self.held + column) * self.inner + at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parity::localise::place::{At, Place};

    fn tap(layout: Layout, columns: Option<Vec<usize>>) -> Tap {
        Tap { columns, ..Tap::new(At::new(0, Place::Query), "x", layout) }
    }

    #[test]
    fn elements_are_found_in_every_layout() {
        // two rows, three columns, heads of two
        let heads_first = tap(Layout::HeadsFirst, None);
        let view = View::new(&heads_first, &[2, 4, 3, 2], (2, 3, 8)).unwrap();
        assert_eq!(view.index(1, 2, 5), Some(((4 + 2) * 3 + 2) * 2 + 1));
        let grouped = View::new(&heads_first, &[2, 2, 2, 3, 2], (2, 3, 8)).unwrap();
        assert_eq!(grouped.index(1, 2, 5), view.index(1, 2, 5));
        let merged = tap(Layout::Merged, None);
        let view = View::new(&merged, &[2, 3, 8], (2, 3, 8)).unwrap();
        assert_eq!(view.index(1, 2, 5), Some((3 + 2) * 8 + 5));
        let flat = View::new(&merged, &[6, 8], (2, 3, 8)).unwrap();
        assert_eq!(flat.index(1, 2, 5), view.index(1, 2, 5));
        // all columns so far, of which the last are meant; and fewer than are asked for
        assert_eq!(View::new(&merged, &[2, 5, 8], (2, 3, 8)).unwrap().index(0, 0, 0), Some(16));
        assert_eq!(View::new(&merged, &[2, 1, 8], (2, 3, 8)).unwrap().index(0, 0, 0), None);
        let part = tap(Layout::Merged, Some(vec![8, 9]));
        assert_eq!(View::new(&part, &[2, 3, 12], (2, 3, 2)).unwrap().index(0, 1, 1), Some(12 + 9));
        assert!(View::new(&merged, &[2, 3, 7], (2, 3, 8)).is_none());
    }
}

//! What the dimensions of a tensor mean, followed through Transpose and Reshape.

use std::fmt;

use super::Layout;

/// One dimension, or several that are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axis {
    Batch,
    Seq,
    /// Query heads.
    Heads,
    /// Key-value heads, and the query heads of each.
    KvHeads,
    Group,
    Dim,
    BatchHeads,
    /// Heads times the width of a head.
    Width,
    /// Batch times sequence.
    Rows,
}

use Axis::{Batch, BatchHeads, Dim, Group, Heads, KvHeads, Rows, Seq, Width};

/// The meaning of each dimension of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Axes(Vec<Axis>);

impl Axes {
    /// Those of a query that meets keys in a product, or of what weights made of values.
    pub(super) fn of_product(rank: usize) -> Option<Self> {
        let axes: &[Axis] = match rank {
            3 => &[BatchHeads, Seq, Dim],
            4 => &[Batch, Heads, Seq, Dim],
            5 => &[Batch, KvHeads, Group, Seq, Dim],
            _ => return None,
        };
        Some(Self(axes.to_vec()))
    }

    /// Those of a tensor of a site.
    pub(super) fn of_layout(layout: Layout) -> Self {
        Self(match layout {
            Layout::HeadsFirst => vec![Batch, Heads, Seq, Dim],
            Layout::SeqFirst => vec![Batch, Seq, Heads, Dim],
            Layout::Merged => vec![Batch, Seq, Width],
        })
    }

    /// Those of a tensor that is laid out in a way that the graph does not tell.
    pub(super) fn unknown() -> Self {
        Self(Vec::new())
    }

    fn is_unknown(&self) -> bool {
        self.0.is_empty()
    }

    /// The layout that an adapter is written in, if it is one.
    pub(super) fn layout(&self) -> Option<Layout> {
        match self.0[..] {
            [Batch, Heads, Seq, Dim] => Some(Layout::HeadsFirst),
            [Batch, Seq, Width] => Some(Layout::Merged),
            _ => None,
        }
    }

    /// Whether only the heads of a token stand in the place of the tokens.
    pub(super) fn is_seq_first(&self) -> bool {
        matches!(self.0[..], [Batch, Seq, Heads, Dim])
    }

    /// Whether the heads of a token lie beside each other, as the output projection reads them.
    pub(super) fn is_merged(&self) -> bool {
        matches!(self.0[..], [Batch, Seq, Width] | [Rows, Width])
    }

    pub(super) fn transposed(&self, perm: &[i64]) -> Option<Self> {
        let axes = perm.iter().map(|&from| self.0.get(usize::try_from(from).ok()?).copied());
        axes.collect::<Option<_>>().filter(|_| perm.len() == self.0.len()).map(Self)
    }

    /// The axes that `perm` makes these of.
    pub(super) fn before_transpose(&self, perm: &[i64]) -> Option<Self> {
        if self.is_unknown() {
            return Some(self.clone());
        }
        let mut before = vec![None; self.0.len()];
        for (axis, &from) in self.0.iter().zip(perm) {
            *before.get_mut(usize::try_from(from).ok()?)? = Some(*axis);
        }
        before.into_iter().collect::<Option<_>>().filter(|_| perm.len() == self.0.len()).map(Self)
    }

    /// After a Reshape to `rank` dimensions, or before one from `rank`: the order of the elements stays, so that only
    /// neighbours are joined or parted.
    pub(super) fn reshaped(&self, rank: usize) -> Option<Self> {
        let axes: &[Axis] = match (&self.0[..], rank) {
            ([BatchHeads, Seq, Dim] | [Batch, KvHeads, Group, Seq, Dim], 4) => &[Batch, Heads, Seq, Dim],
            ([Batch, Heads, Seq, Dim] | [Batch, KvHeads, Group, Seq, Dim], 3) => &[BatchHeads, Seq, Dim],
            ([Batch, Heads, Seq, Dim] | [BatchHeads, Seq, Dim], 5) => &[Batch, KvHeads, Group, Seq, Dim],
            ([Batch, Seq, Heads, Dim] | [Batch, Seq, KvHeads, Group, Dim] | [Rows, Width], 3) => &[Batch, Seq, Width],
            ([Batch, Seq, Heads, Dim] | [Batch, Seq, KvHeads, Group, Dim] | [Batch, Seq, Width], 2) => &[Rows, Width],
            ([Batch, Seq, Width] | [Batch, Seq, KvHeads, Group, Dim] | [Rows, Width], 4) => &[Batch, Seq, Heads, Dim],
            (same, _) if same.len() == rank && rank > 3 => same,
            ([Batch, Seq, Width], 3) => &[Batch, Seq, Width],
            _ => return None,
        };
        Some(Self(axes.to_vec()))
    }
}

impl fmt::Display for Axes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |axis: &Axis| match axis {
            Batch => "batch",
            Seq => "seq",
            Heads => "heads",
            KvHeads => "kv_heads",
            Group => "group",
            Dim => "head_dim",
            BatchHeads => "batch · heads",
            Width => "heads · head_dim",
            Rows => "batch · seq",
        };
        if self.is_unknown() {
            return f.write_str("[dimensions that the graph does not tell]");
        }
        write!(f, "[{}]", self.0.iter().map(name).collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_followed_forth_and_back() {
        let flat = Axes::of_product(3).unwrap();
        let batched = flat.reshaped(4).unwrap();
        assert_eq!(batched.layout(), Some(Layout::HeadsFirst));
        let by_token = batched.transposed(&[0, 2, 1, 3]).unwrap();
        assert_eq!(by_token.before_transpose(&[0, 2, 1, 3]), Some(batched.clone()));
        assert_eq!(by_token.reshaped(3).unwrap().layout(), Some(Layout::Merged));
        assert!(by_token.reshaped(2).unwrap().is_merged());
        let grouped = Axes::of_product(5).unwrap().transposed(&[0, 3, 1, 2, 4]).unwrap();
        assert!(grouped.reshaped(3).unwrap().is_merged());
        // other orders are not taken for merged heads
        let swapped = batched.transposed(&[1, 2, 0, 3]).unwrap();
        assert_eq!((swapped.reshaped(3), swapped.layout()), (None, None));
        assert!(!batched.reshaped(3).unwrap().is_merged());
        assert_eq!(swapped.to_string(), "[heads, seq, batch, head_dim]");
        assert_eq!(flat.reshaped(3), None);
        assert_eq!(batched.transposed(&[0, 2, 1]), None);
        assert_eq!(batched.before_transpose(&[0, 9, 1, 3]), None);
    }
}

//! Token sequences of different lengths as one rectangle.

use super::Example;

/// The label of a position without loss, in the Hugging Face convention.
pub const IGNORED: i64 = -100;

/// A padded batch; every field has `batch × seq` values, row by row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids; padding is the pad id.
    pub input_ids: Vec<i64>,
    /// 1 at tokens, 0 at padding.
    pub attention_mask: Vec<i64>,
    /// Counted from the mask: `max(cumsum(mask) - 1, 0)`. In packed rows they begin at 0 with every example, and padding
    /// has 0.
    pub position_ids: Vec<i64>,
    /// The token itself where it is learnt, [`IGNORED`] elsewhere: in the positions of `input_ids`; whoever computes the
    /// loss shifts by one. The first token of an example has no label, so that no example is predicted from another.
    pub labels: Vec<i64>,
    /// Of packed rows, the example that a position belongs to, counted from 1 in every row; 0 at padding. A position attends
    /// to its own example only.
    pub segments: Option<Vec<u32>>,
    /// Rows.
    pub batch: usize,
    /// Columns.
    pub seq: usize,
}

#[derive(Clone, Copy)]
enum Padding {
    Left,
    Right,
}

impl Batch {
    /// Examples in a row each, with what they learn as labels, padded on the right.
    pub fn training(examples: &[&Example], pad: u32) -> Self {
        Self::pad(&examples.iter().map(|example| cells(example).collect()).collect::<Vec<_>>(), pad, Padding::Right)
    }

    /// Rows of several examples each, padded on the right.
    pub fn packed(rows: &[Vec<&Example>], pad: u32) -> Self {
        let joined: Vec<Vec<_>> =
            rows.iter().map(|row| row.iter().flat_map(|example| cells(example)).collect()).collect();
        let mut out = Self::pad(&joined, pad, Padding::Right);
        let mut segments = Vec::with_capacity(out.input_ids.len());
        out.position_ids.clear();
        for (row, cells) in rows.iter().zip(&joined) {
            for (segment, example) in (1..).zip(row) {
                segments.extend(std::iter::repeat_n(segment, example.len()));
                out.position_ids.extend(0..example.len() as i64);
            }
            let padding = out.seq - cells.len();
            segments.extend(std::iter::repeat_n(0, padding));
            out.position_ids.extend(std::iter::repeat_n(0, padding));
        }
        Self { segments: Some(segments), ..out }
    }

    /// Prompts without labels, padded on the left, so that generation goes on in one column.
    pub fn prompts(prompts: &[&[u32]], pad: u32) -> Self {
        let row = |prompt: &&[u32]| -> Vec<(u32, i64)> { prompt.iter().map(|&id| (id, IGNORED)).collect() };
        Self::pad(&prompts.iter().map(row).collect::<Vec<_>>(), pad, Padding::Left)
    }

    /// Positions with a label.
    pub fn labelled(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORED).count()
    }

    /// Positions that are not padding.
    pub fn tokens(&self) -> usize {
        self.attention_mask.iter().filter(|&&mask| mask != 0).count()
    }

    fn pad(rows: &[Vec<(u32, i64)>], pad: u32, side: Padding) -> Self {
        let seq = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut out = Self { batch: rows.len(), seq, ..Self::default() };
        for row in rows {
            let padding = seq - row.len();
            if matches!(side, Padding::Left) {
                out.extend(std::iter::repeat_n((pad, IGNORED), padding), 0);
            }
            out.extend(row.iter().copied(), 1);
            if matches!(side, Padding::Right) {
                out.extend(std::iter::repeat_n((pad, IGNORED), padding), 0);
            }
        }
        out.position_ids = positions(&out.attention_mask, seq);
        out
    }

    fn extend(&mut self, cells: impl Iterator<Item = (u32, i64)>, mask: i64) {
        for (id, label) in cells {
            self.input_ids.push(id.into());
            self.labels.push(label);
            self.attention_mask.push(mask);
        }
    }
}

/// An example's tokens and labels.
fn cells(example: &Example) -> impl Iterator<Item = (u32, i64)> {
    let label =
        |(index, (id, learnt)): (usize, (u32, bool))| (id, if learnt && index > 0 { id.into() } else { IGNORED });
    example.tokens().enumerate().map(label)
}

/// `max(cumsum(mask) - 1, 0)` along every row of `seq` columns.
fn positions(mask: &[i64], seq: usize) -> Vec<i64> {
    let mut out = Vec::with_capacity(mask.len());
    for row in mask.chunks(seq.max(1)) {
        let mut seen = 0;
        out.extend(row.iter().map(|mask| {
            seen += mask;
            (seen - 1).max(0)
        }));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(prompt: &[u32], completion: &[u32]) -> Example {
        Example { prompt_ids: prompt.to_vec(), completion_ids: completion.to_vec(), ..Example::default() }
    }

    #[test]
    fn training_rows_are_padded_on_the_right() {
        let (a, b) = (example(&[1, 2], &[3]), example(&[4], &[5, 6, 7]));
        let batch = Batch::training(&[&a, &b], 9);
        assert_eq!((batch.batch, batch.seq), (2, 4));
        assert_eq!(batch.input_ids, [1, 2, 3, 9, 4, 5, 6, 7]);
        assert_eq!(batch.attention_mask, [1, 1, 1, 0, 1, 1, 1, 1]);
        assert_eq!(batch.position_ids, [0, 1, 2, 2, 0, 1, 2, 3]);
        assert_eq!(batch.labels, [-100, -100, 3, -100, -100, 5, 6, 7]);
        assert_eq!((batch.labelled(), batch.tokens()), (4, 7));
    }

    #[test]
    fn packed_rows_begin_anew_with_every_example() {
        let (a, b, c) = (example(&[1, 2], &[3]), example(&[4], &[5]), example(&[6], &[7, 8]));
        let b = Example { prompt_mask: vec![true], ..b };
        let batch = Batch::packed(&[vec![&a, &b], vec![&c]], 9);
        assert_eq!((batch.batch, batch.seq), (2, 5));
        assert_eq!(batch.input_ids, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]);
        assert_eq!(batch.attention_mask, [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
        assert_eq!(batch.position_ids, [0, 1, 2, 0, 1, 0, 1, 2, 0, 0]);
        assert_eq!(batch.labels, [-100, -100, 3, -100, 5, -100, 7, 8, -100, -100]);
        assert_eq!(batch.segments.as_deref(), Some(&[1, 1, 1, 2, 2, 1, 1, 1, 0, 0][..]));
    }

    #[test]
    fn prompts_are_padded_on_the_left() {
        let batch = Batch::prompts(&[&[1], &[2, 3, 4]], 9);
        assert_eq!(batch.input_ids, [9, 9, 1, 2, 3, 4]);
        assert_eq!(batch.attention_mask, [0, 0, 1, 1, 1, 1]);
        assert_eq!(batch.position_ids, [0, 0, 0, 0, 1, 2]);
        assert_eq!(batch.labelled(), 0);
    }

    #[test]
    fn nothing_makes_an_empty_batch() {
        let batch = Batch::prompts(&[], 0);
        assert_eq!((batch.batch, batch.seq, batch.input_ids.len()), (0, 0, 0));
    }
}

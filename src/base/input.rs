//! What a decoder is given: token ids, attention mask, positions.

use super::ops::Visibility;
use super::{Error, Result};

/// Tokens to run, checked for consistency. Positions follow the attention mask, `max(cumsum(mask) − 1, 0)`, unless given.
#[derive(Clone, Debug)]
pub struct Input {
    pub(super) batch: usize,
    pub(super) seq: usize,
    /// `[batch, seq]`.
    pub(super) ids: Vec<u32>,
    /// `[batch, past + seq]`.
    pub(super) mask: Vec<bool>,
    /// `[batch, seq]`.
    pub(super) positions: Vec<u32>,
    /// `[batch, seq]`: tokens see only tokens of their own segment.
    segments: Option<Vec<u32>>,
}

impl Input {
    /// `input_ids` of `[batch, seq]` and `attention_mask` of `[batch, past + seq]`, row by row; `position_ids` of
    /// `[batch, seq]` where they are not to be counted from the mask.
    ///
    /// # Errors
    /// When the lengths do not fit, or an id or a position is negative or too large for 32 bits.
    pub fn new(batch: usize, input_ids: &[i64], attention_mask: &[i64], position_ids: Option<&[i64]>) -> Result<Self> {
        let input = |why: String| Error::Input {
            why,
            help: "input_ids is [batch, seq], attention_mask is [batch, past + seq], position_ids is [batch, seq]",
        };
        if batch == 0 || input_ids.is_empty() || !input_ids.len().is_multiple_of(batch) {
            return Err(input(format!("{} token ids do not make {batch} equal rows", input_ids.len())));
        }
        let seq = input_ids.len() / batch;
        if !attention_mask.len().is_multiple_of(batch) || attention_mask.len() / batch < seq {
            let n = attention_mask.len();
            return Err(input(format!("{n} mask entries do not cover {batch} rows of {seq} tokens or more")));
        }
        let mask: Vec<bool> = attention_mask.iter().map(|m| *m != 0).collect();
        let unsigned = |what: &str, values: &[i64]| {
            let bad = |v: &i64| input(format!("{what} holds {v}"));
            values.iter().map(|v| u32::try_from(*v).map_err(|_| bad(v))).collect::<Result<Vec<u32>>>()
        };
        let positions = match position_ids {
            None => positions_of(&mask, batch, seq),
            Some(given) if given.len() == input_ids.len() => unsigned("position_ids", given)?,
            Some(given) => return Err(input(format!("{} positions for {} tokens", given.len(), input_ids.len()))),
        };
        Ok(Self { batch, seq, ids: unsigned("input_ids", input_ids)?, mask, positions, segments: None })
    }

    /// One row of tokens without padding.
    ///
    /// # Errors
    /// When `ids` is empty.
    pub fn row(ids: &[u32]) -> Result<Self> {
        let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        Self::new(1, &ids, &vec![1; ids.len()], None)
    }

    /// The same tokens as a packing of several texts: a token sees only those of its own segment. `segments` is
    /// `[batch, seq]`; for a pass without a cache.
    ///
    /// # Errors
    /// When there is not one segment for every token, or the mask covers past tokens.
    pub fn with_segments(mut self, segments: Vec<u32>) -> Result<Self> {
        if segments.len() != self.ids.len() || self.total() != self.seq {
            return Err(Error::Input {
                why: format!("{} segments for {} tokens", segments.len(), self.mask.len()),
                help: "segments is [batch, seq], in a pass without past tokens",
            });
        }
        self.segments = Some(segments);
        Ok(self)
    }

    /// Whether rows hold several texts.
    pub(super) fn is_packed(&self) -> bool {
        self.segments.is_some()
    }

    /// `(batch, seq)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.batch, self.seq)
    }

    /// Columns of the mask: past and new tokens.
    pub(super) fn total(&self) -> usize {
        self.mask.len() / self.batch
    }

    /// Which keys the new tokens see: real ones, not in the future, not out of the window, of the same segment. `prefix`
    /// keys that everybody sees come first. A padding query sees what the last real token before it sees.
    pub(super) fn visibility(&self, window: Option<usize>, prefix: usize) -> candle_core::Result<Visibility> {
        let (total, past) = (self.total(), self.total() - self.seq);
        let mut ranges = Vec::with_capacity(self.batch * self.seq);
        let mut hidden = Vec::with_capacity(self.batch * (prefix + total));
        for (row, mask) in self.mask.chunks(total).enumerate() {
            hidden.extend(std::iter::repeat_n(false, prefix).chain(mask.iter().map(|real| !real)));
            let first_real = mask.iter().position(|real| *real).unwrap_or(total);
            let (mut end, mut segment_start) = (0, 0);
            for (query, real) in mask.iter().enumerate() {
                if *real {
                    end = query + 1;
                }
                if query < past {
                    continue;
                }
                let segment = |at: usize| self.segments.as_ref().and_then(|s| s.get(row * self.seq + at));
                if query > past && segment(query - past) != segment(query - past - 1) {
                    segment_start = query;
                }
                let in_window = window.map_or(0, |window| (prefix + query + 1).saturating_sub(window));
                let first = if prefix > 0 { 0 } else { first_real.max(segment_start) };
                let first = first.max(in_window);
                ranges.push(first..(prefix + end).max(first).min(prefix + total));
            }
        }
        Visibility::new(self.batch, prefix + total, ranges, hidden)
    }
}

/// The last `seq` of `max(cumsum(mask) − 1, 0)` for each row.
fn positions_of(mask: &[bool], batch: usize, seq: usize) -> Vec<u32> {
    let total = mask.len() / batch;
    mask.chunks(total)
        .flat_map(|row| {
            let mut seen = 0u32;
            let positions = row.iter().map(move |m| {
                seen += u32::from(*m);
                seen.saturating_sub(1)
            });
            positions.skip(total - seq)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_real_tokens() {
        let input = Input::new(2, &[0, 0, 5, 6, 7, 8, 9, 0], &[0, 0, 1, 1, 1, 1, 1, 0], None).unwrap();
        assert_eq!(input.positions, [0, 0, 0, 1, 0, 1, 2, 2]);
        let step = Input::new(2, &[5, 6], &[0, 1, 1, 1, 1, 1], None).unwrap();
        assert_eq!(step.positions, [1, 2]);
    }

    #[test]
    fn a_token_sees_real_tokens_of_its_past_window_and_segment() {
        let seen = |input: &Input, window, prefix| -> Vec<String> {
            let visibility = input.visibility(window, prefix).unwrap();
            let sees = |query, key| visibility.of(0, query).contains(&key) && !visibility.is_hidden(0, key);
            let row = |query| (0..prefix + 4).map(|key| if sees(query, key) { 'x' } else { '.' }).collect();
            (0..4).map(row).collect()
        };
        let left = Input::new(1, &[0, 5, 6, 7], &[0, 1, 1, 1], None).unwrap();
        assert_eq!(seen(&left, None, 0), ["....", ".x..", ".xx.", ".xxx"]);
        assert_eq!(seen(&left, Some(2), 0), ["....", ".x..", ".xx.", "..xx"]);
        assert_eq!(seen(&left, None, 1), ["x....", "x.x..", "x.xx.", "x.xxx"]);
        let right = Input::new(1, &[5, 6, 7, 0], &[1, 1, 1, 0], None).unwrap();
        assert_eq!(seen(&right, None, 0), ["x...", "xx..", "xxx.", "xxx."]);
        assert_eq!(right.visibility(None, 0).unwrap().of(0, 3), 0..3);
        let packed = Input::new(1, &[4, 5, 6, 7], &[1; 4], Some(&[0, 1, 0, 1])).unwrap();
        let packed = packed.with_segments(vec![1, 1, 2, 2]).unwrap();
        assert_eq!(seen(&packed, None, 0), ["x...", "xx..", "..x.", "..xx"]);
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let messages = [
            Input::new(2, &[1, 2, 3], &[1; 3], None),
            Input::new(1, &[1, 2, 3], &[1; 2], None),
            Input::new(1, &[1, -2], &[1; 2], None),
            Input::new(1, &[1, 2], &[1; 2], Some(&[0])),
            Input::new(0, &[], &[], None),
        ]
        .map(|r| r.unwrap_err().to_string());
        insta::assert_snapshot!(messages.join("\n"), @"
        the model's inputs do not fit: 3 token ids do not make 2 equal rows
        the model's inputs do not fit: 2 mask entries do not cover 1 rows of 3 tokens or more
        the model's inputs do not fit: input_ids holds -2
        the model's inputs do not fit: 1 positions for 2 tokens
        the model's inputs do not fit: 0 token ids do not make 0 equal rows
        ");
    }
}

//! What became of the records.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Layout;
use super::place::Place;
use super::truncation::{Cut, DropReason, Truncation};

/// What became of the records.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What the records looked like.
    pub layout: Layout,
    /// How many there were.
    pub records: usize,
    /// Examples that they became: two of each preference record, otherwise one of each that was not dropped.
    pub examples: usize,
    /// Tokens that are learnt.
    pub labelled: usize,
    /// What was cut.
    pub truncated: Truncated,
    /// What was not used, and why.
    pub dropped: Vec<Dropped>,
    /// Distinct labels.
    pub classes: usize,
    /// Tokens in the prompts, after truncation.
    pub prompt: Lengths,
    /// Tokens in the completions.
    pub completion: Lengths,
    /// Tokens in prompts and completions together.
    pub sequence: Lengths,
    /// The rows that examples share.
    pub packing: Option<Packed>,
    /// The longest sequence allowed, in tokens.
    pub max_seq_len: usize,
}

/// Records that were too long, and were cut.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Truncated {
    /// The side that was cut.
    pub side: Truncation,
    /// How many records were.
    pub records: usize,
    /// What they lost.
    #[serde(flatten)]
    pub lost: Cut,
}

/// Records that are not used.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Dropped {
    /// Why.
    pub reason: DropReason,
    /// How many.
    pub records: usize,
    /// Where the first of them stand.
    pub first: Vec<String>,
}

/// Rows that hold several examples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Packed {
    /// How many.
    pub rows: usize,
    /// The part of their positions that holds tokens.
    pub filled: f64,
}

/// Token counts of a set of sequences.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Lengths {
    /// The shortest.
    pub min: usize,
    /// At least half of them are at most this long.
    pub p50: usize,
    /// At least 90 % are at most this long.
    pub p90: usize,
    /// At least 99 % are at most this long.
    pub p99: usize,
    /// The longest.
    pub max: usize,
    /// All together.
    pub total: usize,
    /// On average.
    pub mean: f64,
}

impl Lengths {
    /// Of sequences with these lengths.
    pub(super) fn of(lengths: impl Iterator<Item = usize>) -> Self {
        let mut lengths: Vec<usize> = lengths.collect();
        lengths.sort_unstable();
        let total = lengths.iter().sum();
        // the nearest rank: the smallest value that so many do not exceed
        let rank = |percent: usize| (lengths.len() * percent).div_ceil(100).saturating_sub(1);
        let percentile = |percent: usize| lengths.get(rank(percent)).copied().unwrap_or(0);
        Self {
            min: lengths.first().copied().unwrap_or(0),
            p50: percentile(50),
            p90: percentile(90),
            p99: percentile(99),
            max: lengths.last().copied().unwrap_or(0),
            total,
            mean: total as f64 / lengths.len().max(1) as f64,
        }
    }
}

/// Places that a report names of a kind of dropped records.
const FIRST: usize = 3;

/// Counts dropped records by their reason.
#[derive(Default)]
pub(super) struct Drops(BTreeMap<DropReason, Dropped>);

impl Drops {
    pub(super) fn add(&mut self, reason: DropReason, place: &Place) {
        let dropped = self.0.entry(reason).or_insert(Dropped { reason, records: 0, first: Vec::new() });
        dropped.records += 1;
        if dropped.first.len() < FIRST {
            dropped.first.push(place.to_string());
        }
    }

    pub(super) fn into_vec(self) -> Vec<Dropped> {
        self.0.into_values().collect()
    }
}

impl Dropped {
    /// `3 dropped: nothing to learn in them (data.jsonl:7, …)`
    pub fn text(&self) -> String {
        let more = if self.records > self.first.len() { ", …" } else { "" };
        format!("{} dropped: {} ({}{more})", self.records, self.reason.text(), self.first.join(", "))
    }
}

impl Report {
    /// Records that are not used.
    pub fn num_dropped(&self) -> usize {
        self.dropped.iter().map(|dropped| dropped.records).sum()
    }

    /// What was cut and what was dropped, one sentence each; nothing where every record is used whole.
    pub fn notes(&self) -> Vec<String> {
        let Truncated { side, records, lost } = self.truncated;
        let mut notes = Vec::new();
        if records > 0 {
            let what = match side {
                _ if self.layout == Layout::Text => "their end",
                Truncation::Right => "the end of their completion",
                Truncation::Left | Truncation::Drop => "the beginning of their prompt",
            };
            notes.push(format!(
                "{records} of {} records lost {what} at {} tokens: {} tokens in all, {} of them with a label",
                self.records, self.max_seq_len, lost.tokens, lost.labels
            ));
        }
        notes.extend(self.dropped.iter().map(|dropped| format!("of {} records, {}", self.records, dropped.text())));
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// numpy.percentile(…, method="inverted_cdf") of the same numbers.
    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let lengths = Lengths::of((1..=200).rev());
        assert_eq!((lengths.min, lengths.p50, lengths.p90, lengths.p99, lengths.max), (1, 100, 180, 198, 200));
        assert_eq!((lengths.total, lengths.mean), (20_100, 100.5));
        let few = Lengths::of([7, 3, 5].into_iter());
        assert_eq!((few.p50, few.p90, few.p99), (5, 7, 7));
        assert_eq!(Lengths::of(std::iter::empty()), Lengths::default());
    }
}

//! Orders that a seed decides.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;
use serde::{Deserialize, Serialize};

/// What a random order is for, so that the same seed gives unrelated orders.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// The order of the groups in one epoch.
    Epoch(u64),
    /// The order of the batches in one epoch, where they are of groups of similar length.
    Batches(u64),
    /// Which records to use.
    Sample,
    /// Which records to hold out.
    Holdout,
}

impl Purpose {
    fn stream(self) -> u128 {
        match self {
            Self::Epoch(epoch) => epoch.into(),
            Self::Sample => 1 << 64,
            Self::Holdout => 2 << 64,
            Self::Batches(epoch) => (3 << 64) + u128::from(epoch),
        }
    }
}

/// The numbers below `count` in random order.
///
/// Fisher–Yates by hand on PCG64, whose output its paper fixes: an order must never change with a library's version,
/// or a resumed run would see other batches.
pub(super) fn permutation(count: usize, seed: u64, purpose: Purpose) -> Vec<usize> {
    let mut generator = Pcg64::new(seed.into(), purpose.stream());
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        order.swap(last, below(&mut generator, last as u64 + 1) as usize);
    }
    order
}

/// A number below `bound`, without the bias of a plain remainder.
fn below(generator: &mut Pcg64, bound: u64) -> u64 {
    let unbiased = u64::MAX - u64::MAX % bound;
    loop {
        let drawn = generator.next_u64();
        if drawn < unbiased {
            return drawn % bound;
        }
    }
}

/// A place in the sequence of batches; stored in a checkpoint, it is where training goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes through the data that are complete.
    pub epoch: u64,
    /// Groups of the present pass that were given out.
    pub index: usize,
}

/// Cuts every epoch's own random order into batches.
///
/// What it orders are a data set's groups: examples, pairs or packed rows.
#[derive(Clone, Debug)]
pub struct Sampler {
    groups: usize,
    batch_size: usize,
    seed: u64,
    /// The groups' lengths, where batches are of groups of similar length.
    lengths: Option<Vec<usize>>,
    /// The present epoch and its order.
    order: Option<(u64, Vec<usize>)>,
}

/// Batches' worth of groups that are sorted by length together: enough to find similar ones, few enough that every epoch
/// has other batches.
const SORTED_BATCHES: usize = 50;

impl Sampler {
    /// Batches of `batch_size` out of `groups`; the last batch of an epoch may be smaller.
    pub fn new(groups: usize, batch_size: usize, seed: u64) -> Self {
        Self { groups, batch_size: batch_size.max(1), seed, lengths: None, order: None }
    }

    /// Batches of groups of similar length, so that little is padding: stretches of the random order are sorted by length and
    /// cut into batches, which come in random order.
    pub fn group_by_length(self, lengths: Vec<usize>) -> Self {
        Self { lengths: Some(lengths), order: None, ..self }
    }

    /// Batches in an epoch.
    pub fn batches(&self) -> usize {
        self.groups.div_ceil(self.batch_size)
    }

    /// The groups of the batch at the cursor, which moves past it. Empty only where there are no groups.
    pub fn next(&mut self, cursor: &mut Cursor) -> Vec<usize> {
        if cursor.index >= self.groups {
            *cursor = Cursor { epoch: cursor.epoch.saturating_add(1), index: 0 };
        }
        let order = match self.order.take() {
            Some((epoch, order)) if epoch == cursor.epoch => order,
            _ => self.order_of(cursor.epoch),
        };
        let batch: Vec<usize> = order.iter().skip(cursor.index).take(self.batch_size).copied().collect();
        self.order = Some((cursor.epoch, order));
        cursor.index += batch.len();
        batch
    }

    fn order_of(&self, epoch: u64) -> Vec<usize> {
        let mut order = permutation(self.groups, self.seed, Purpose::Epoch(epoch));
        let Some(lengths) = &self.lengths else { return order };
        let stretch = self.batch_size.saturating_mul(SORTED_BATCHES);
        for stretch in order.chunks_mut(stretch) {
            stretch.sort_by_key(|&group| std::cmp::Reverse(lengths.get(group)));
        }
        // a smaller batch can only come last
        let whole = self.groups / self.batch_size;
        let batches: Vec<&[usize]> = order.chunks(self.batch_size).collect();
        let shuffled = permutation(whole, self.seed, Purpose::Batches(epoch)).into_iter().chain(whole..batches.len());
        shuffled.filter_map(|batch| batches.get(batch)).flat_map(|batch| batch.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The orders that the algorithm gives in another language. A change here breaks the resumption of every checkpoint.
    #[test]
    fn the_order_never_changes() {
        assert_eq!(permutation(10, 42, Purpose::Epoch(0)), [7, 9, 6, 2, 1, 3, 5, 8, 4, 0]);
        assert_eq!(permutation(10, 42, Purpose::Sample), [6, 8, 1, 9, 3, 7, 5, 4, 0, 2]);
    }

    /// The first outputs of `pcg64` seeded with 42 and stream 54, from the demonstration output of the PCG C library.
    #[test]
    fn the_generator_is_pcg64() {
        let mut generator = Pcg64::new(42, 54);
        let expected = [0x86b1_da1d_7206_2b68_u64, 0x1304_aa46_c985_3d39, 0xa367_0e9e_0dd5_0358];
        assert_eq!(expected.map(|_| generator.next_u64()), expected);
    }

    #[test]
    fn every_epoch_sees_every_example_once_in_its_own_order() {
        let mut sampler = Sampler::new(10, 4, 3);
        let mut cursor = Cursor::default();
        let mut epoch = || -> Vec<Vec<usize>> { (0..sampler.batches()).map(|_| sampler.next(&mut cursor)).collect() };
        let (first, second) = (epoch(), epoch());
        assert_eq!(first.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
        assert_ne!(first, second);
        for order in [first, second] {
            let mut order = order.concat();
            order.sort();
            assert_eq!(order, (0..10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_stored_cursor_goes_on_where_it_stopped() {
        let mut cursor = Cursor::default();
        let mut sampler = Sampler::new(7, 2, 9);
        let whole: Vec<_> = (0..12).map(|_| sampler.next(&mut cursor)).collect();
        for stop in 0..12 {
            let mut cursor = Cursor::default();
            let mut sampler = Sampler::new(7, 2, 9);
            let mut parts: Vec<_> = (0..stop).map(|_| sampler.next(&mut cursor)).collect();
            let stored = serde_json::to_string(&cursor).unwrap();
            let mut cursor: Cursor = serde_json::from_str(&stored).unwrap();
            let mut sampler = Sampler::new(7, 2, 9);
            parts.extend((stop..12).map(|_| sampler.next(&mut cursor)));
            assert_eq!(parts, whole);
        }
    }

    fn by_length(count: usize) -> (Sampler, Vec<usize>) {
        let lengths: Vec<usize> = (0..count).map(|i| (i * 7919) % 101).collect();
        (Sampler::new(count, 4, 5).group_by_length(lengths.clone()), lengths)
    }

    #[test]
    fn length_grouped_batches_pad_little_and_see_everything() {
        let (mut sampler, lengths) = by_length(403);
        let padding = |batch: &Vec<usize>| {
            let longest = batch.iter().map(|&i| lengths[i]).max().unwrap();
            batch.iter().map(|&i| longest - lengths[i]).sum::<usize>()
        };
        let epoch = |sampler: &mut Sampler, cursor: &mut Cursor| -> Vec<Vec<usize>> {
            (0..sampler.batches()).map(|_| sampler.next(cursor)).collect()
        };
        let mut cursor = Cursor::default();
        let (first, second) = (epoch(&mut sampler, &mut cursor), epoch(&mut sampler, &mut cursor));
        assert_ne!(first, second);
        let random = epoch(&mut Sampler::new(403, 4, 5), &mut Cursor::default());
        for batches in [&first, &second] {
            let mut all = batches.concat();
            all.sort();
            assert_eq!(all, (0..403).collect::<Vec<_>>());
            assert_eq!(batches.last().unwrap().len(), 3);
            let sum = |batches: &[Vec<usize>]| batches.iter().map(padding).sum::<usize>();
            assert!(sum(batches) * 10 < sum(&random), "{} {}", sum(batches), sum(&random));
        }
        let longest = |batch: &Vec<usize>| batch.iter().map(|&i| lengths[i]).max();
        assert!(!first.iter().map(longest).is_sorted_by(|a, b| a >= b), "the long ones do not come first");
    }

    #[test]
    fn a_stored_cursor_goes_on_in_length_grouped_batches() {
        let mut cursor = Cursor::default();
        let mut sampler = by_length(23).0;
        let whole: Vec<_> = (0..15).map(|_| sampler.next(&mut cursor)).collect();
        let mut cursor = Cursor::default();
        for expected in &whole {
            // a new process at every step
            assert_eq!(&by_length(23).0.next(&mut cursor), expected);
        }
    }

    #[test]
    fn seeds_epochs_and_purposes_are_independent() {
        let orders = [
            permutation(20, 1, Purpose::Epoch(0)),
            permutation(20, 1, Purpose::Epoch(1)),
            permutation(20, 2, Purpose::Epoch(0)),
            permutation(20, 1, Purpose::Sample),
            permutation(20, 1, Purpose::Holdout),
            permutation(20, 1, Purpose::Batches(0)),
        ];
        let distinct: std::collections::HashSet<_> = orders.iter().collect();
        assert_eq!(distinct.len(), orders.len());
        assert!(Sampler::new(0, 4, 1).next(&mut Cursor::default()).is_empty());
    }
}

//! Orders that a seed decides.

use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;
use serde::{Deserialize, Serialize};

/// What a random order is for, so that the same seed gives unrelated orders.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// The order of the examples in one epoch.
    Epoch(u64),
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
    /// Examples of the present pass that were given out.
    pub index: usize,
}

/// Cuts every epoch's own random order into batches.
#[derive(Clone, Debug)]
pub struct Sampler {
    examples: usize,
    batch_size: usize,
    seed: u64,
    /// The present epoch and its order.
    order: Option<(u64, Vec<usize>)>,
}

impl Sampler {
    /// Batches of `batch_size` out of `examples`; the last batch of an epoch may be smaller.
    pub fn new(examples: usize, batch_size: usize, seed: u64) -> Self {
        Self { examples, batch_size: batch_size.max(1), seed, order: None }
    }

    /// Batches in an epoch.
    pub fn batches(&self) -> usize {
        self.examples.div_ceil(self.batch_size)
    }

    /// The examples of the batch at the cursor, which moves past it. Empty only where there are no examples.
    pub fn next(&mut self, cursor: &mut Cursor) -> Vec<usize> {
        if cursor.index >= self.examples {
            *cursor = Cursor { epoch: cursor.epoch.saturating_add(1), index: 0 };
        }
        let Self { examples, seed, batch_size, .. } = *self;
        let order = match &mut self.order {
            Some((epoch, order)) if *epoch == cursor.epoch => order,
            stale => {
                let order = permutation(examples, seed, Purpose::Epoch(cursor.epoch));
                &mut stale.insert((cursor.epoch, order)).1
            }
        };
        let batch: Vec<usize> = order.iter().skip(cursor.index).take(batch_size).copied().collect();
        cursor.index += batch.len();
        batch
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

    #[test]
    fn seeds_epochs_and_purposes_are_independent() {
        let orders = [
            permutation(20, 1, Purpose::Epoch(0)),
            permutation(20, 1, Purpose::Epoch(1)),
            permutation(20, 2, Purpose::Epoch(0)),
            permutation(20, 1, Purpose::Sample),
            permutation(20, 1, Purpose::Holdout),
        ];
        let distinct: std::collections::HashSet<_> = orders.iter().collect();
        assert_eq!(distinct.len(), orders.len());
        assert!(Sampler::new(0, 4, 1).next(&mut Cursor::default()).is_empty());
    }
}

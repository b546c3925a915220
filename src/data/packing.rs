//! Short examples together in one row.

use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Which sequences of these lengths share a row of `capacity` tokens: best fit, the longest first. A row's sequences are in
/// order, and the rows in the order of their first sequence. No sequence is cut; one that is longer than a row gets its own.
pub(super) fn pack(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<(usize, usize)> = lengths.iter().copied().enumerate().collect();
    longest_first.sort_by_key(|(_, length)| Reverse(*length));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // rows that are not full, by the room in them
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (sequence, length) in longest_first {
        let tightest = open.range(length.max(1)..).next().map(|(&room, _)| room);
        let taken = tightest.and_then(|room| {
            let same_room = open.get_mut(&room)?;
            let row = same_room.pop();
            if same_room.is_empty() {
                open.remove(&room);
            }
            Some((row?, room))
        });
        let (row, room) = taken.unwrap_or_else(|| {
            rows.push(Vec::new());
            (rows.len() - 1, capacity)
        });
        rows[row].push(sequence);
        let left = room.saturating_sub(length);
        if left > 0 {
            open.entry(left).or_default().push(row);
        }
    }
    for row in &mut rows {
        row.sort_unstable();
    }
    rows.sort_unstable();
    rows
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_are_filled_from_the_longest() {
        assert_eq!(pack(&[3, 5, 2, 4, 6], 8), [vec![0, 1], vec![2, 4], vec![3]]);
        assert_eq!(pack(&[9, 1], 8), [vec![0], vec![1]]);
        assert!(pack(&[], 8).is_empty());
    }

    proptest! {
        #[test]
        fn every_sequence_is_in_one_row_that_holds_it(lengths in proptest::collection::vec(1_usize..40, 0..60)) {
            let rows = pack(&lengths, 40);
            let filled = |row: &Vec<usize>| row.iter().map(|&sequence| lengths[sequence]).sum::<usize>();
            prop_assert!(rows.iter().all(|row| !row.is_empty() && filled(row) <= 40));
            let mut all = rows.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            // any two rows together are fuller than one may be
            let mut fills: Vec<usize> = rows.iter().map(filled).collect();
            fills.sort_unstable();
            prop_assert!(fills.windows(2).take(1).all(|two| two[0] + two[1] > 40));
        }
    }
}

//! Agreement of greedy continuations.

use ndarray::Array2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::figures::top1;

/// The tokens that the reference and a run pick, prefill first and then one for each cached step, each after the
/// reference's own tokens before it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Greedy {
    /// Whether all tokens are equal, but for ties.
    pub agrees: bool,
    /// By row, the reference's tokens.
    pub reference: Vec<Vec<usize>>,
    /// By row, the run's tokens.
    pub run: Vec<Vec<usize>>,
    /// Where they differ.
    pub differences: Vec<GreedyDifference>,
}

/// A token that differs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GreedyDifference {
    /// Row of the batch.
    pub row: usize,
    /// 0 for the prompt's next token, then the cached steps.
    pub step: usize,
    /// The reference's token.
    pub reference: usize,
    /// The run's token.
    pub run: usize,
    /// How far apart the reference's logits of the two are.
    pub gap: f64,
    /// Whether the gap is within the budget, which makes it a tie and no disagreement.
    pub tie: bool,
}

impl Greedy {
    /// Says anew which differences are ties, by what is allowed at each row of the logits.
    pub(super) fn judge_ties(&mut self, picks: &[Vec<usize>], allowed: &[f64]) {
        for difference in &mut self.differences {
            let spot = picks.get(difference.step).and_then(|spots| spots.get(difference.row));
            let allowed = spot.and_then(|spot| allowed.get(*spot));
            difference.tie = allowed.is_some_and(|allowed| difference.gap <= *allowed);
        }
        self.agrees = self.differences.iter().all(|difference| difference.tie);
    }

    /// Compares the picks, indices of rows of the logits by step and batch row, of two `[spots, vocab]`.
    pub(super) fn of(reference: &Array2<f64>, run: &Array2<f64>, picks: &[Vec<usize>], allowed: f64) -> Self {
        let batch = picks.first().map_or(0, Vec::len);
        let mut greedy =
            Self { agrees: true, reference: vec![vec![]; batch], run: vec![vec![]; batch], differences: vec![] };
        for (step, spots) in picks.iter().enumerate() {
            let tokens = greedy.reference.iter_mut().zip(&mut greedy.run);
            for (row, (spot, (of_reference, of_run))) in spots.iter().zip(tokens).enumerate() {
                let logits = reference.row(*spot);
                let (expected, found) = (top1(logits), top1(run.row(*spot)));
                of_reference.push(expected);
                of_run.push(found);
                if expected != found {
                    let gap = logits[expected] - logits[found];
                    let tie = gap <= allowed;
                    greedy.agrees &= tie;
                    greedy.differences.push(GreedyDifference { row, step, reference: expected, run: found, gap, tie });
                }
            }
        }
        greedy
    }
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;

    #[test]
    fn a_difference_within_the_budget_is_a_tie() {
        let reference = arr2(&[[9.0, 0.0, 0.0], [0.0, 1.0, 0.75], [3.0, 0.0, 2.0]]);
        let run = arr2(&[[0.0, 9.0, 0.0], [0.0, 0.9, 0.95], [3.0, 0.0, 2.0]]);
        let picks = [vec![1], vec![2]];
        let tie = Greedy::of(&reference, &run, &picks, 0.25);
        let difference = GreedyDifference { row: 0, step: 0, reference: 1, run: 2, gap: 0.25, tie: true };
        assert_eq!((tie.agrees, &tie.differences), (true, &vec![difference]));
        assert_eq!((tie.reference, tie.run), (vec![vec![1, 0]], vec![vec![2, 0]]));
        let mut apart = Greedy::of(&reference, &run, &picks, 0.2);
        assert_eq!((apart.agrees, apart.differences[0].tie), (false, false));
        for (allowed, agrees) in [([0.25, 0.2, 0.25], false), ([0.2, 0.25, 0.2], true)] {
            apart.judge_ties(&picks, &allowed);
            assert_eq!((apart.agrees, apart.differences[0].tie), (agrees, agrees));
        }
    }
}

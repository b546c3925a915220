//! When a run ends: the best adapter so far, patience, a loss that explodes.

use serde::{Deserialize, Serialize};

use super::{BestBy, Evaluation, TrainConfig};

/// What a run remembers of its figures; a part of its checkpoints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// The held-out part before the first step.
    pub(super) before: Option<Evaluation>,
    /// The best evaluation so far.
    pub(super) best: Option<Best>,
    /// Evaluations in a row that were not better.
    pub(super) stale: usize,
    /// The course of the loss.
    pub(super) loss: LossWatch,
}

/// The best adapter of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps after which it was found.
    pub step: usize,
    /// The held-out figure that it was best in.
    pub value: f64,
}

impl Progress {
    /// Takes in an evaluation; says whether it is the best so far.
    pub(super) fn note(&mut self, config: &TrainConfig, step: usize, evaluation: &Evaluation) -> bool {
        let Some(by) = config.watched() else { return false };
        let (value, is_better): (f64, fn(f64, f64, f64) -> bool) = match by {
            BestBy::Loss => (evaluation.loss, |new, old, delta| new < old - delta),
            BestBy::Accuracy => (evaluation.accuracy, |new, old, delta| new > old + delta),
        };
        if self.best.is_none_or(|best| is_better(value, best.value, config.min_delta)) {
            self.best = Some(Best { step, value });
            self.stale = 0;
            return true;
        }
        self.stale += 1;
        false
    }

    /// Whether patience has run out.
    pub(super) fn is_exhausted(&self, config: &TrainConfig) -> bool {
        config.patience.is_some_and(|patience| self.stale >= patience)
    }
}

/// Watches for a loss that has left all sense without becoming infinite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct LossWatch {
    smoothed: Option<f64>,
    lowest: Option<f64>,
}

/// Weight of the past in the smoothed loss.
const INERTIA: f64 = 0.8;

impl LossWatch {
    /// Takes in the loss of a step; gives the smoothed loss when it has exploded: when it is above three times its lowest
    /// value and above twice `ignorance`, the loss of a model that knows nothing, `ln(vocab_size)` nats a token.
    pub(super) fn exploded(&mut self, loss: f64, ignorance: f64) -> Option<f64> {
        let smoothed = self.smoothed.map_or(loss, |past| INERTIA * past + (1.0 - INERTIA) * loss);
        let lowest = self.lowest.map_or(smoothed, |lowest| lowest.min(smoothed));
        (self.smoothed, self.lowest) = (Some(smoothed), Some(lowest));
        (smoothed > 3.0 * lowest && smoothed > 2.0 * ignorance).then_some(smoothed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(loss: f64, accuracy: f64) -> Evaluation {
        Evaluation { loss, accuracy, ..Evaluation::default() }
    }

    #[test]
    fn patience_counts_evaluations_without_gain() {
        let config = TrainConfig { patience: Some(2), min_delta: 0.1, eval_every: 1, ..TrainConfig::default() };
        let mut progress = Progress::default();
        let noted: Vec<(bool, bool)> = [1.0, 0.95, 0.8, 0.75, 0.9]
            .iter()
            .enumerate()
            .map(|(step, loss)| (progress.note(&config, step, &evaluation(*loss, 0.0)), progress.is_exhausted(&config)))
            .collect();
        assert_eq!(noted, [(true, false), (false, false), (true, false), (false, false), (false, true)]);
        assert_eq!(progress.best, Some(Best { step: 2, value: 0.8 }));
    }

    #[test]
    fn accuracy_is_best_when_high() {
        let config = TrainConfig { best_by: Some(BestBy::Accuracy), eval_every: 1, ..TrainConfig::default() };
        let mut progress = Progress::default();
        let noted = [0.5, 0.5, 0.6, 0.4].map(|accuracy| progress.note(&config, 1, &evaluation(0.0, accuracy)));
        assert_eq!(noted, [true, false, true, false]);
        assert!(!progress.is_exhausted(&config), "nobody asked for patience");
        let mut unwatched = Progress::default();
        assert!(!unwatched.note(&TrainConfig::default(), 1, &evaluation(0.0, 1.0)) && unwatched.best.is_none());
    }

    #[test]
    fn a_loss_explodes_when_it_is_worse_than_ignorance() {
        let ignorance = 512f64.ln();
        let run = |losses: &[f64]| {
            let mut watch = LossWatch::default();
            losses.iter().position(|loss| watch.exploded(*loss, ignorance).is_some())
        };
        assert_eq!(run(&[5.0, 3.0, 2.0, 9.0, 2.0, 1.0]), None, "one bad batch");
        assert_eq!(run(&[30.0, 31.0, 29.0, 35.0]), None, "bad from the start, and no worse");
        // smoothed 3.00, 2.80, 6.24, 12.99: above 3 · 2.80 and 2 · 6.24
        assert_eq!(run(&[3.0, 2.0, 20.0, 40.0, 80.0]), Some(3));
    }
}

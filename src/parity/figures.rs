//! The distance between two sets of logits.

use ndarray::{Array2, ArrayView1};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A position of a case whose token is real.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Spot {
    /// Row of the batch.
    pub row: usize,
    /// Column of the batch, padding and cached steps included.
    pub column: usize,
}

/// A logit that is NaN or infinite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NonFinite {
    /// Where it is.
    pub spot: Spot,
    /// Whose logit it is.
    pub token: usize,
    /// `NaN`, `inf` or `-inf`.
    pub value: String,
}

impl std::fmt::Display for NonFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { spot: Spot { row, column }, token, value } = self;
        write!(f, "the logit {value} for token {token} at row {row}, column {column}")
    }
}

/// The largest single distance.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Worst {
    /// Where it is.
    pub spot: Spot,
    /// Whose logit it is.
    pub token: usize,
    /// The reference's logit.
    pub reference: f64,
    /// The run's logit.
    pub run: f64,
}

/// How far a run's logits are from the reference's, over all real positions of a case.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Figures {
    /// `e(run)`: the largest absolute distance, and so the absolute tolerance that would just pass.
    pub max_abs: f64,
    /// The mean absolute distance.
    pub mean_abs: f64,
    /// `max_abs` as a part of the reference's largest absolute logit; none where all of those are zero.
    pub max_relative: Option<f64>,
    /// Part of the positions whose largest logit is the same token's.
    pub top1_agreement: f64,
    /// Mean Kullback-Leibler divergence of the run from the reference, in nats.
    pub kl_mean: f64,
    /// The largest such divergence of one position.
    pub kl_max: f64,
    /// Where `max_abs` is.
    pub worst: Worst,
}

/// The largest absolute value; zero of none.
pub(super) fn largest_abs(logits: &Array2<f64>) -> f64 {
    logits.iter().fold(0.0, |largest, logit| logit.abs().max(largest))
}

/// The first logit that is not finite.
pub(super) fn first_non_finite(logits: &Array2<f64>, spots: &[Spot]) -> Option<NonFinite> {
    logits.outer_iter().zip(spots).find_map(|(row, spot)| {
        let (token, value) = row.iter().enumerate().find(|(_, logit)| !logit.is_finite())?;
        Some(NonFinite { spot: *spot, token, value: value.to_string() })
    })
}

/// The token of the largest logit; the first of equals, as every greedy decoder picks it.
pub(super) fn top1(logits: ArrayView1<'_, f64>) -> usize {
    let best = logits.iter().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map_or(0, |(token, _)| token)
}

impl Figures {
    /// The figures of finite logits, `[spots, vocab]` both; none where there are no logits.
    pub(super) fn of(reference: &Array2<f64>, run: &Array2<f64>, spots: &[Spot]) -> Option<Self> {
        let mut worst: Option<Worst> = None;
        let (mut max_abs, mut sum_abs, mut same, mut kl_sum, mut kl_max) = (0.0, 0.0, 0usize, 0.0, 0.0f64);
        for ((reference, run), spot) in reference.outer_iter().zip(run.outer_iter()).zip(spots) {
            for (token, (reference, run)) in reference.iter().zip(run).enumerate() {
                let distance = (run - reference).abs();
                sum_abs += distance;
                if worst.is_none() || distance > max_abs {
                    max_abs = distance;
                    worst = Some(Worst { spot: *spot, token, reference: *reference, run: *run });
                }
            }
            same += usize::from(top1(reference) == top1(run));
            let divergence = kl_divergence(reference, run);
            kl_sum += divergence;
            kl_max = kl_max.max(divergence);
        }
        let largest = largest_abs(reference);
        let positions = spots.len() as f64;
        worst.map(|worst| Self {
            max_abs,
            mean_abs: sum_abs / reference.len() as f64,
            max_relative: (largest > 0.0).then(|| max_abs / largest),
            top1_agreement: same as f64 / positions,
            kl_mean: kl_sum / positions,
            kl_max,
            worst,
        })
    }
}

/// `Σ p · (ln p − ln q)` in nats, with p and q the distributions of the reference's and the run's logits.
fn kl_divergence(reference: ArrayView1<'_, f64>, run: ArrayView1<'_, f64>) -> f64 {
    let (of_reference, of_run) = (log_sum_exp(reference), log_sum_exp(run));
    let terms = reference.iter().zip(run).map(|(reference, run)| {
        let log_p = reference - of_reference;
        log_p.exp() * (log_p - (run - of_run))
    });
    // Never negative, but for rounding.
    terms.sum::<f64>().max(0.0)
}

fn log_sum_exp(logits: ArrayView1<'_, f64>) -> f64 {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;

    const SPOTS: [Spot; 2] = [Spot { row: 0, column: 3 }, Spot { row: 1, column: 0 }];

    /// By hand: p = (1/2, 1/2), q = (1/4, 3/4), so that KL(p‖q) = ½ ln 2 + ½ ln ⅔ = ½ ln 4/3; logits are those of p and q
    /// up to a constant.
    #[test]
    fn divergence_is_that_of_the_distributions() {
        let reference = ndarray::arr1(&[7.0, 7.0]);
        let run = ndarray::arr1(&[-3.0, -3.0 + 3f64.ln()]);
        let found = kl_divergence(reference.view(), run.view());
        assert!((found - 0.5 * (4f64 / 3.0).ln()).abs() < 1e-15, "{found}");
        assert_eq!(kl_divergence(reference.view(), reference.view()), 0.0);
    }

    /// numpy, float64: `p = softmax([1, 2, 3]); q = softmax([1.5, 2, 2]); (p * (log(p) - log(q))).sum()`.
    #[test]
    fn divergence_is_that_of_another_implementation() {
        let found = kl_divergence(ndarray::arr1(&[1.0, 2.0, 3.0]).view(), ndarray::arr1(&[1.5, 2.0, 2.0]).view());
        assert!((found - 0.1706397926922848).abs() < 1e-14, "{found}");
    }

    /// Logits of a thousand overflow `exp`; the figures must not.
    #[test]
    fn large_logits_do_not_overflow() {
        let found = kl_divergence(ndarray::arr1(&[1e3, 0.0]).view(), ndarray::arr1(&[1e3 - 1.0, 0.0]).view());
        assert!(found.is_finite() && found < 1e-300, "{found}");
    }

    #[test]
    fn figures_by_hand() {
        let reference = arr2(&[[1.0, 2.0, -4.0], [0.0, 0.5, 0.25]]);
        let run = arr2(&[[1.0, 2.5, -4.0], [1.0, 0.5, 0.25]]);
        let found = Figures::of(&reference, &run, &SPOTS).unwrap();
        assert_eq!(found.max_abs, 1.0);
        assert_eq!(found.mean_abs, 1.5 / 6.0);
        assert_eq!(found.max_relative, Some(0.25));
        assert_eq!(found.top1_agreement, 0.5);
        assert_eq!(found.worst, Worst { spot: SPOTS[1], token: 0, reference: 0.0, run: 1.0 });
        assert!(found.kl_max > found.kl_mean && found.kl_mean > 0.0);
    }

    #[test]
    fn equal_logits_have_no_distance() {
        let logits = arr2(&[[0.0, 0.0], [0.0, 0.0]]);
        let found = Figures::of(&logits, &logits, &SPOTS).unwrap();
        assert_eq!((found.max_abs, found.max_relative, found.top1_agreement, found.kl_max), (0.0, None, 1.0, 0.0));
        assert_eq!(Figures::of(&Array2::zeros((0, 2)), &Array2::zeros((0, 2)), &[]), None);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let logits = arr2(&[[0.0, 1.0], [2.0, f64::NEG_INFINITY]]);
        let found = first_non_finite(&logits, &SPOTS).unwrap();
        assert_eq!(found.to_string(), "the logit -inf for token 1 at row 1, column 0");
        let logits = arr2(&[[f64::NAN, 1.0], [2.0, f64::INFINITY]]);
        assert_eq!(first_non_finite(&logits, &SPOTS).unwrap().value, "NaN");
        assert_eq!(first_non_finite(&arr2(&[[1.0]]), &SPOTS), None);
    }

    #[test]
    fn the_first_of_equals_is_greedy() {
        assert_eq!(top1(ndarray::arr1(&[1.0, 3.0, 3.0]).view()), 1);
    }
}

//! The distance between two sets of logits.

use ndarray::{Array2, ArrayView1};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::runtime::Value;

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
    /// The mean absolute distance as a part of the reference's mean absolute logit; none where all of those are zero.
    pub mean_relative: Option<f64>,
    /// The tolerance that would just pass where `|run − reference| ≤ atol + rtol·|reference|` is asked of every logit with
    /// `atol = rtol`.
    pub tolerance: f64,
    /// Cosine of the angle between all logits of the two; none where either are all zero.
    pub cosine: Option<f64>,
    /// Part of the positions whose largest logit is the same token's.
    pub top1_agreement: f64,
    /// Mean part of the reference's five most likely tokens that are among the run's five.
    pub top5_agreement: f64,
    /// Mean Kullback-Leibler divergence of the run from the reference, in nats.
    pub kl_mean: f64,
    /// The largest such divergence of one position.
    pub kl_max: f64,
    /// Perplexity of the case's own tokens; none where no position has a next one.
    pub perplexity: Option<Perplexity>,
    /// Where `max_abs` is.
    pub worst: Worst,
}

/// Perplexity of a case's tokens, each after those before it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Perplexity {
    /// The reference's.
    pub reference: f64,
    /// The run's.
    pub run: f64,
    /// `|run − reference|` as a part of the reference's.
    pub difference: f64,
}

/// How far one output tensor is from another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TensorFigures {
    /// The output.
    pub name: String,
    /// The largest absolute distance; none where the tensors cannot be compared.
    pub max_abs: Option<f64>,
    /// The mean absolute distance.
    pub mean_abs: Option<f64>,
    /// `max_abs` as a part of the largest absolute element.
    pub max_relative: Option<f64>,
    /// The mean absolute distance as a part of the mean absolute element.
    pub mean_relative: Option<f64>,
    /// Cosine of the angle between the two.
    pub cosine: Option<f64>,
    /// Why they cannot be compared.
    pub failure: Option<String>,
}

/// Sums over the elements of two tensors.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: f64,
    max_abs: f64,
    distance: f64,
    largest: f64,
    absolute: f64,
    tolerance: f64,
    product: f64,
    reference: f64,
    run: f64,
}

impl Sums {
    fn add(&mut self, reference: f64, run: f64) {
        let distance = (run - reference).abs();
        self.count += 1.0;
        self.max_abs = self.max_abs.max(distance);
        self.distance += distance;
        self.largest = self.largest.max(reference.abs());
        self.absolute += reference.abs();
        self.tolerance = self.tolerance.max(distance / (1.0 + reference.abs()));
        self.product += reference * run;
        self.reference += reference * reference;
        self.run += run * run;
    }

    fn max_relative(&self) -> Option<f64> {
        (self.largest > 0.0).then(|| self.max_abs / self.largest)
    }

    fn mean_relative(&self) -> Option<f64> {
        (self.absolute > 0.0).then(|| self.distance / self.absolute)
    }

    fn cosine(&self) -> Option<f64> {
        let sizes = (self.reference * self.run).sqrt();
        (sizes > 0.0).then(|| (self.product / sizes).clamp(-1.0, 1.0))
    }
}

impl TensorFigures {
    /// The figures of two tensors, `reference` being the one to agree with.
    pub(super) fn of(name: &str, reference: &Value, run: Option<&Value>) -> Self {
        let compared = run.ok_or_else(|| "the graph has no such output".to_owned()).and_then(|run| {
            if reference.shape() != run.shape() {
                return Err(format!("the shapes are {:?} and {:?}", reference.shape(), run.shape()));
            }
            let wide = |value: &Value| {
                let exact = value.clone().into_f64();
                exact.or_else(|_| value.clone().into_i64().map(|array| array.mapv(|x| x as f64)))
            };
            let (reference, run) = (wide(reference), wide(run));
            let (Ok(reference), Ok(run)) = (reference, run) else { return Err("the elements are no numbers".into()) };
            let mut sums = Sums::default();
            for (reference, run) in reference.iter().zip(&run) {
                if !(reference.is_finite() && run.is_finite()) && reference.to_bits() != run.to_bits() {
                    return Err(format!("an element is {run} where the other graph gives {reference}"));
                }
                if reference.is_finite() {
                    sums.add(*reference, *run);
                }
            }
            Ok(sums)
        });
        let sums = compared.as_ref().ok();
        Self {
            name: name.into(),
            max_abs: sums.map(|sums| sums.max_abs),
            mean_abs: sums.map(|sums| sums.distance / sums.count.max(1.0)),
            max_relative: sums.and_then(Sums::max_relative),
            mean_relative: sums.and_then(Sums::mean_relative),
            cosine: sums.and_then(Sums::cosine),
            failure: compared.as_ref().err().cloned(),
        }
    }
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

/// How many of the most likely tokens are compared.
const TOP: usize = 5;

impl Figures {
    /// The figures of finite logits, `[spots, vocab]` both; none where there are no logits. `next` is the token that follows
    /// each spot, where one does.
    pub(super) fn of(
        reference: &Array2<f64>,
        run: &Array2<f64>,
        spots: &[Spot],
        next: &[Option<usize>],
    ) -> Option<Self> {
        let mut worst: Option<Worst> = None;
        let mut sums = Sums::default();
        let (mut same, mut shared, mut kl_sum, mut kl_max) = (0usize, 0.0, 0.0, 0.0f64);
        let (mut tokens, mut nll) = (0usize, (0.0, 0.0));
        let followed = next.iter().copied().chain(std::iter::repeat(None));
        for (((reference, run), spot), next) in reference.outer_iter().zip(run.outer_iter()).zip(spots).zip(followed) {
            for (token, (reference, run)) in reference.iter().zip(run).enumerate() {
                if worst.is_none() || (run - reference).abs() > sums.max_abs {
                    worst = Some(Worst { spot: *spot, token, reference: *reference, run: *run });
                }
                sums.add(*reference, *run);
            }
            same += usize::from(top1(reference) == top1(run));
            shared += top_shared(reference, run);
            let divergence = kl_divergence(reference, run);
            kl_sum += divergence;
            kl_max = kl_max.max(divergence);
            let logits = next.and_then(|token| Some((reference.get(token)?, run.get(token)?)));
            if let Some((of_reference, of_run)) = logits {
                tokens += 1;
                nll.0 += log_sum_exp(reference) - of_reference;
                nll.1 += log_sum_exp(run) - of_run;
            }
        }
        let positions = spots.len() as f64;
        worst.map(|worst| Self {
            max_abs: sums.max_abs,
            mean_abs: sums.distance / sums.count,
            max_relative: sums.max_relative(),
            mean_relative: sums.mean_relative(),
            tolerance: sums.tolerance,
            cosine: sums.cosine(),
            top1_agreement: same as f64 / positions,
            top5_agreement: shared / positions,
            kl_mean: kl_sum / positions,
            kl_max,
            perplexity: Perplexity::of(nll, tokens),
            worst,
        })
    }
}

impl Perplexity {
    fn of((reference, run): (f64, f64), tokens: usize) -> Option<Self> {
        let [reference, run] = [reference, run].map(|nll| (nll / tokens as f64).exp());
        let difference = (run - reference).abs() / reference;
        (tokens > 0 && difference.is_finite()).then_some(Self { reference, run, difference })
    }
}

/// The largest absolute distance at each spot.
pub(super) fn by_spot(reference: &Array2<f64>, run: &Array2<f64>) -> Vec<f64> {
    let rows = reference.outer_iter().zip(run.outer_iter());
    rows.map(|(a, b)| a.iter().zip(b).fold(0.0, |worst: f64, (a, b)| worst.max((a - b).abs()))).collect()
}

/// The part of one's most likely tokens that are among the other's.
fn top_shared(reference: ArrayView1<'_, f64>, run: ArrayView1<'_, f64>) -> f64 {
    let top = |logits: ArrayView1<'_, f64>| {
        let mut best: Vec<(usize, f64)> = Vec::with_capacity(TOP + 1);
        for (token, logit) in logits.iter().enumerate() {
            let at = best.partition_point(|(_, better)| better >= logit);
            if at < TOP {
                best.insert(at, (token, *logit));
                best.truncate(TOP);
            }
        }
        best.into_iter().map(|(token, _)| token).collect::<Vec<_>>()
    };
    let (of_reference, of_run) = (top(reference), top(run));
    let shared = of_reference.iter().filter(|token| of_run.contains(token)).count();
    shared as f64 / of_reference.len().max(1) as f64
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
        let found = Figures::of(&reference, &run, &SPOTS, &[]).unwrap();
        assert_eq!(found.max_abs, 1.0);
        assert_eq!(found.mean_abs, 1.5 / 6.0);
        assert_eq!(found.max_relative, Some(0.25));
        assert_eq!(found.top1_agreement, 0.5);
        assert_eq!(found.worst, Worst { spot: SPOTS[1], token: 0, reference: 0.0, run: 1.0 });
        assert!(found.kl_max > found.kl_mean && found.kl_mean > 0.0);
    }

    /// numpy, float64, on `a` and `b` below: `(abs(b-a)/(1+abs(a))).max()`, `abs(b-a).sum()/abs(a).sum()`,
    /// `(a*b).sum()/sqrt((a*a).sum()*(b*b).sum())`; perplexity `exp(-log_softmax(x)[[0,1],[1,6]].mean())`.
    #[test]
    fn figures_are_those_of_another_implementation() {
        let a = arr2(&[[1.0, 2.0, -4.0, 0.5, 3.0, -1.0, 0.25], [0.0, 0.5, 0.25, -2.0, 1.5, 6.0, -0.75]]);
        let b = arr2(&[[1.5, 2.0, -4.0, 0.5, 2.0, -1.0, 0.25], [0.0, 0.5, 0.25, 1.0, 1.5, 5.0, 0.75]]);
        let found = Figures::of(&a, &b, &SPOTS, &[Some(1), Some(6)]).unwrap();
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-13, "{found} {expected}");
        near(found.tolerance, 1.0);
        near(found.mean_relative.unwrap(), 7.0 / 22.75);
        near(found.cosine.unwrap(), 0.9053783375052319);
        near(found.top1_agreement, 0.5);
        near(found.top5_agreement, 0.8);
        let perplexity = found.perplexity.unwrap();
        near(perplexity.reference, 62.92903592546476);
        near(perplexity.run, 15.27566477358344);
        near(perplexity.difference, (15.27566477358344f64 - 62.92903592546476).abs() / 62.92903592546476);
        assert_eq!(by_spot(&a, &b), [1.0, 3.0]);
    }

    #[test]
    fn tensors_are_compared_by_name_shape_and_value() {
        let value = |x: [f32; 2]| Value::from(ndarray::arr1(&x).into_dyn());
        let found = TensorFigures::of("k", &value([3.0, 4.0]), Some(&value([3.0, 5.0])));
        assert_eq!((found.max_abs, found.mean_abs, found.max_relative), (Some(1.0), Some(0.5), Some(0.25)));
        assert!((found.cosine.unwrap() - 29.0 / (5.0 * 34f64.sqrt())).abs() < 1e-15);
        let infinite = TensorFigures::of("k", &value([3.0, f32::INFINITY]), Some(&value([3.0, f32::INFINITY])));
        assert_eq!(infinite.max_abs, Some(0.0));
        for (run, why) in [
            (None, "no such output"),
            (Some(value([3.0, f32::NAN])), "is NaN where"),
            (Some(ndarray::arr1(&[1f32]).into_dyn().into()), "the shapes are [2] and [1]"),
        ] {
            let found = TensorFigures::of("k", &value([3.0, 4.0]), run.as_ref());
            assert!(found.max_abs.is_none() && found.failure.unwrap().contains(why), "{why}");
        }
    }

    #[test]
    fn equal_logits_have_no_distance() {
        let logits = arr2(&[[0.0, 0.0], [0.0, 0.0]]);
        let found = Figures::of(&logits, &logits, &SPOTS, &[]).unwrap();
        assert_eq!((found.max_abs, found.max_relative, found.top1_agreement, found.kl_max), (0.0, None, 1.0, 0.0));
        assert_eq!(Figures::of(&Array2::zeros((0, 2)), &Array2::zeros((0, 2)), &[], &[]), None);
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

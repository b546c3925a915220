//! How a quantised graph is judged: by numbers that the user states.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, Figures, Result};

/// Bounds on what a quantised graph may lose. One that is none is not asked for; where any is stated, they take the place of the
/// error budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Thresholds {
    /// The largest mean Kullback-Leibler divergence of a case, in nats.
    pub max_kl: Option<f64>,
    /// The least part of a case's positions whose most likely token is the reference's.
    pub min_top1: Option<f64>,
    /// The largest difference of perplexity in a case, as a part of the reference's.
    pub max_ppl_diff: Option<f64>,
}

impl Thresholds {
    /// Whether none is stated.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The thresholds, if they make sense.
    ///
    /// # Errors
    /// When one is negative or not finite, or an agreement above 1.
    pub fn checked(self) -> Result<Self> {
        let given = [
            ("max_kl", self.max_kl, f64::MAX),
            ("min_top1", self.min_top1, 1.0),
            ("max_ppl_diff", self.max_ppl_diff, f64::MAX),
        ];
        for (option, value, most) in given {
            if let Some(value) = value.filter(|value| !(0.0..=most).contains(value)) {
                let why =
                    format!("is {value}; it should be 0 or more{}", if most == 1.0 { ", and at most 1" } else { "" });
                return Err(Error::Option { option, why });
            }
        }
        Ok(self)
    }

    /// What is wrong with the figures, if anything is.
    pub fn failure(&self, figures: &Figures) -> Option<String> {
        let (kl, top1) = (figures.kl_mean, figures.top1_agreement);
        if let Some(most) = self.max_kl.filter(|most| kl > *most) {
            return Some(format!("the mean divergence is {kl:.3e} nats, {most:.3e} is allowed"));
        }
        if let Some(least) = self.min_top1.filter(|least| top1 < *least) {
            return Some(format!("{top1:.4} of the most likely tokens are the reference's, {least:.4} is asked for"));
        }
        let most = self.max_ppl_diff?;
        let Some(perplexity) = figures.perplexity else {
            return None; // a single token has no perplexity
        };
        (perplexity.difference > most).then(|| {
            format!(
                "the perplexity is {:.4} and the reference's {:.4}, {:.3e} of it apart; {most:.3e} is allowed",
                perplexity.run, perplexity.reference, perplexity.difference
            )
        })
    }

    /// The thresholds that all of these figures would just pass.
    pub fn just_passing<'a>(figures: impl Iterator<Item = &'a Figures>) -> Self {
        let none = Self::default();
        figures.fold(none, |found, figures| Self {
            max_kl: Some(found.max_kl.unwrap_or(0.0).max(figures.kl_mean)),
            min_top1: Some(found.min_top1.unwrap_or(1.0).min(figures.top1_agreement)),
            max_ppl_diff: match (found.max_ppl_diff, figures.perplexity) {
                (before, None) => before,
                (before, Some(perplexity)) => Some(before.unwrap_or(0.0).max(perplexity.difference)),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;
    use crate::parity::Spot;

    #[test]
    fn each_threshold_is_asked_for_by_itself_and_the_just_passing_ones_pass() {
        let spots = [Spot { row: 0, column: 0 }, Spot { row: 0, column: 1 }];
        let reference = arr2(&[[1.0, 2.0, 0.0], [0.0, 3.0, 1.0]]);
        let run = arr2(&[[2.0, 1.0, 0.0], [0.0, 2.5, 1.0]]);
        let figures = Figures::of(&reference, &run, &spots, &[Some(1), None]).unwrap();
        let just = Thresholds::just_passing([figures].iter());
        assert_eq!(just.failure(&figures), None);
        assert_eq!(just.min_top1, Some(0.5));
        let strict = [
            (Thresholds { max_kl: just.max_kl.map(|x| 0.999 * x), ..just }, "mean divergence"),
            (Thresholds { min_top1: Some(0.6), ..just }, "0.5000 of the most likely tokens"),
            (Thresholds { max_ppl_diff: just.max_ppl_diff.map(|x| 0.999 * x), ..just }, "the perplexity is"),
        ];
        for (thresholds, say) in strict {
            assert!(thresholds.failure(&figures).unwrap().contains(say), "{say}");
        }
        assert_eq!(Thresholds::default().failure(&figures), None);
    }

    #[test]
    fn senseless_thresholds_are_refused() {
        let bad = [
            Thresholds { max_kl: Some(-1.0), ..Default::default() },
            Thresholds { min_top1: Some(1.5), ..Default::default() },
            Thresholds { max_ppl_diff: Some(f64::NAN), ..Default::default() },
        ];
        assert!(bad.into_iter().all(|thresholds| matches!(thresholds.checked(), Err(Error::Option { .. }))));
    }
}

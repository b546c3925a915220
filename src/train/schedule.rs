//! The learning rate of each step: linear warm-up, then half a cosine down, a line down, or as it is.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// Half a cosine down.
    #[default]
    Cosine,
    /// A line down.
    Linear,
    /// As it is.
    Constant,
}

impl std::str::FromStr for LrScheduler {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cosine" => Ok(Self::Cosine),
            "linear" => Ok(Self::Linear),
            "constant" => Ok(Self::Constant),
            other => Err(format!("`{other}` is none of cosine, linear, constant")),
        }
    }
}

/// A schedule over a known number of optimizer steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Schedule {
    /// What follows the warm-up.
    pub kind: LrScheduler,
    /// The highest rate, reached at the end of the warm-up.
    pub peak: f64,
    /// Steps of linear warm-up from zero.
    pub warmup_steps: usize,
    /// All steps.
    pub total_steps: usize,
    /// The rate after the last step, as a fraction of the peak.
    pub final_fraction: f64,
}

impl Schedule {
    /// The rate of step `step`, counted from 0. The first step already moves, and the first step after the warm-up has
    /// the peak: transformers' schedules with warm-up of the same names but for its first step of rate zero.
    pub fn rate(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / decay_steps as f64).min(1.0);
        let part = match self.kind {
            LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            LrScheduler::Linear => 1.0 - progress,
            LrScheduler::Constant => return self.peak,
        };
        self.peak * (self.final_fraction + (1.0 - self.final_fraction) * part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_and_follows_half_a_cosine() {
        let kind = LrScheduler::Cosine;
        let schedule = Schedule { kind, peak: 2.0, warmup_steps: 4, total_steps: 12, final_fraction: 0.0 };
        let expected = [0.5, 1.0, 1.5, 2.0, 2.0];
        for (step, rate) in expected.into_iter().enumerate() {
            assert!((schedule.rate(step) - rate).abs() < 1e-12);
        }
        assert!((schedule.rate(8) - 1.0).abs() < 1e-12);
        assert!(schedule.rate(12).abs() < 1e-12 && schedule.rate(99).abs() < 1e-12);
        let linear = Schedule { kind: LrScheduler::Linear, final_fraction: 0.5, ..schedule };
        let expected = [(3, 2.0), (4, 2.0), (6, 1.75), (8, 1.5), (12, 1.0), (99, 1.0)];
        assert!(expected.into_iter().all(|(step, rate)| (linear.rate(step) - rate).abs() < 1e-12));
        let constant = Schedule { kind: LrScheduler::Constant, ..schedule };
        assert_eq!([0, 3, 4, 11].map(|step| constant.rate(step)), [0.5, 2.0, 2.0, 2.0]);
    }
}

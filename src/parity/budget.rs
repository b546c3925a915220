//! How far a run may be from the reference.

use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, Result};

/// The error budget. With `e(x)` the largest absolute distance of a run's logits from the reference's, a run passes when
/// `e(run) ≤ max(factor · e(candle), floor)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Budget {
    /// How many times candle's own distance, at the graph's precision, a run may be away.
    pub factor: f64,
    /// The floor as a part of the reference's largest absolute logit.
    pub relative_floor: f64,
}

/// What the budget comes to in one case.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Allowance {
    /// `factor · e(candle)`; none when candle's own run is not finite.
    pub from_candle: Option<f64>,
    /// The floor in logits.
    pub floor: f64,
    /// The larger of the two.
    pub allowed: f64,
}

impl Budget {
    /// Multiple of candle's own distance that a faithful graph stays within: another order of summation and fused
    /// operators, not another function.
    pub const FACTOR: f64 = 4.0;

    /// The default budget at a graph's precision: factor 4 and a floor of `roundings · ε`, with ε the gap between 1 and
    /// the next number.
    ///
    /// | precision | ε | roundings | floor, part of the largest logit |
    /// |---|---|---|---|
    /// | f64 | 2⁻⁵² | 64 | 1.4e-14 |
    /// | f32 | 2⁻²³ | 64 | 7.6e-6 |
    /// | f16 | 2⁻¹⁰ | 8 | 7.8e-3 |
    /// | bf16 | 2⁻⁷ | 8 | 6.3e-2 |
    ///
    /// Rounding errors of either sign grow like the square root of their number: the residual stream of a 30-layer model
    /// is rounded about 64 times, which makes 8; dot products that accumulate in the precision itself, in blocks of about
    /// as many terms, make another factor of 8. Half-precision products accumulate in float32, and leave the first alone.
    /// The floor only matters where candle's own distance is small by luck.
    ///
    /// # Errors
    /// When the precision is not a floating-point type that a decoder computes in.
    pub fn of(precision: DType) -> Result<Self> {
        let (bits, roundings) = match precision {
            DType::F64 => (52, 64.0),
            DType::F32 => (23, 64.0),
            DType::F16 => (10, 8.0),
            DType::BF16 => (7, 8.0),
            other => {
                let why = format!("is {}, for which there is no error budget", other.as_str());
                return Err(Error::Option { option: "precision", why });
            }
        };
        Ok(Self { factor: Self::FACTOR, relative_floor: roundings * 0.5f64.powi(bits) })
    }

    /// The budget, if its numbers make sense.
    ///
    /// # Errors
    /// When a number is negative or not finite.
    pub fn checked(self) -> Result<Self> {
        for (option, value) in [("factor", self.factor), ("relative_floor", self.relative_floor)] {
            if !value.is_finite() || value < 0.0 {
                return Err(Error::Option { option, why: format!("is {value}; it should be 0 or a positive number") });
            }
        }
        Ok(self)
    }

    /// The allowance where candle is `candle` away from a reference whose largest absolute logit is `largest`.
    pub fn allowance(&self, candle: Option<f64>, largest: f64) -> Allowance {
        let from_candle = candle.map(|distance| self.factor * distance);
        let floor = self.relative_floor * largest;
        Allowance { from_candle, floor, allowed: from_candle.map_or(floor, |from_candle| from_candle.max(floor)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_of_factor_and_floor_counts() {
        let budget = Budget { factor: 4.0, relative_floor: 0.001 };
        let found = budget.allowance(Some(0.5), 100.0);
        assert_eq!(found, Allowance { from_candle: Some(2.0), floor: 0.1, allowed: 2.0 });
        let found = budget.allowance(Some(0.01), 100.0);
        assert_eq!(found, Allowance { from_candle: Some(0.04), floor: 0.1, allowed: 0.1 });
        let found = budget.allowance(None, 100.0);
        assert_eq!(found, Allowance { from_candle: None, floor: 0.1, allowed: 0.1 });
    }

    #[test]
    fn floors_follow_the_precision() {
        let floor = |dtype| Budget::of(dtype).unwrap().relative_floor;
        assert_eq!(floor(DType::F32), 64.0 * f64::from(f32::EPSILON));
        assert_eq!(floor(DType::F64), 64.0 * f64::EPSILON);
        assert_eq!(floor(DType::F16), 8.0 * half::f16::EPSILON.to_f64());
        assert_eq!(floor(DType::BF16), 8.0 * half::bf16::EPSILON.to_f64());
        assert!(matches!(Budget::of(DType::U8), Err(Error::Option { option: "precision", .. })));
    }

    #[test]
    fn senseless_numbers_are_refused() {
        for bad in [-1.0, f64::NAN, f64::INFINITY] {
            let budget = Budget { factor: bad, relative_floor: 0.0 };
            assert!(matches!(budget.checked(), Err(Error::Option { option: "factor", .. })));
            let budget = Budget { factor: 4.0, relative_floor: bad };
            assert!(matches!(budget.checked(), Err(Error::Option { option: "relative_floor", .. })));
        }
        assert!(Budget { factor: 0.0, relative_floor: 0.0 }.checked().is_ok());
    }
}

//! How far a run may be from the reference.

use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, Result};
use crate::base::DecoderSpec;

/// The error budget. With `e(x)` the largest absolute distance of a run's logits from the reference's, a run passes when
/// `e(run) ≤ max(factor · e(candle), floor)`. A run of float32 that does not, and is no more than √K times further away, passes too when
/// at each position it is within the same bound, or within `factor` times the distance there of candle with its products summed in order.
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
    /// The larger of these.
    pub allowed: f64,
}

impl Budget {
    /// Multiple of candle's own distance that a faithful graph stays within: another order of summation and fused
    /// operators, not another function.
    pub const FACTOR: f64 = 4.0;

    /// The default budget for a decoder whose graph computes in `precision`: factor 4 and a floor of `r·u`, with `u` the unit
    /// roundoff and `r` the larger of `128` and `√(2L·K)`; `L` is the number of the decoder's layers and `K` that of the terms
    /// of its longest dot product.
    ///
    /// | precision | u | r | floor at 30 layers and 1,536 terms, part of the largest logit |
    /// |---|---|---|---|
    /// | f64 | 2⁻⁵³ | max(128, √(2L·K)) | 3.4e-14 |
    /// | f32 | 2⁻²⁴ | max(128, √(2L·K)) | 1.8e-5 |
    /// | f16 | 2⁻¹¹ | max(16, √(2L·4)) | 7.8e-3 |
    /// | bf16 | 2⁻⁸ | max(16, √(2L·4)) | 6.3e-2 |
    ///
    /// Rounding errors of either sign grow like the square root of their number. The residual stream is rounded `2L` times;
    /// what is added to it is a dot product, which a runtime may accumulate in order and so round `K` times (tract does, to
    /// the bit; candle and ONNX Runtime sum blocks, which candle's own distance therefore does not show). Half-precision
    /// products accumulate in float32; an input, the product and an elementwise operation or two are rounded. In a small
    /// model it is not the sums that matter but exponentials, roots and quotients, each within a few units of its own kind:
    /// hence the least `r`. The floor matters where candle's own distance is small by its order of summation or by luck.
    ///
    /// # Errors
    /// When the precision is not a floating-point type that a decoder computes in.
    pub fn of(precision: DType, spec: &DecoderSpec) -> Result<Self> {
        Self::for_depth(precision, spec.num_layers, spec.longest_dot_product())
    }

    /// The same for a number of layers and the terms of the longest dot product.
    pub(super) fn for_depth(precision: DType, layers: usize, longest: usize) -> Result<Self> {
        let (bits, terms, least) = match precision {
            DType::F64 => (53, longest, 128.0f64),
            DType::F32 => (24, longest, 128.0),
            DType::F16 => (11, 4, 16.0),
            DType::BF16 => (8, 4, 16.0),
            other => {
                let why = format!("is {}, for which there is no error budget", other.as_str());
                return Err(Error::Option { option: "precision", why });
            }
        };
        let roundings = 2.0 * layers as f64 * terms as f64;
        Ok(Self { factor: Self::FACTOR, relative_floor: least.max(roundings.sqrt()) * 0.5f64.powi(bits) })
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
        let allowed = from_candle.map_or(floor, |from_candle| from_candle.max(floor));
        Allowance { from_candle, floor, allowed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parity::testing;

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
    fn floors_follow_the_precision_and_the_depth() {
        let mut spec = testing::tiny_spec();
        (spec.num_layers, spec.mlp.intermediate_size) = (18, 10_000);
        let floor = |dtype| Budget::of(dtype, &spec).unwrap().relative_floor;
        assert_eq!(floor(DType::F32), 300.0 * f64::from(f32::EPSILON));
        assert_eq!(floor(DType::F64), 300.0 * f64::EPSILON);
        assert_eq!(floor(DType::F16), 8.0 * half::f16::EPSILON.to_f64());
        assert_eq!(floor(DType::BF16), 8.0 * half::bf16::EPSILON.to_f64());
        let small = Budget::of(DType::F32, &testing::tiny_spec()).unwrap().relative_floor;
        assert_eq!(small, 64.0 * f64::from(f32::EPSILON));
        assert!(matches!(Budget::of(DType::U8, &spec), Err(Error::Option { option: "precision", .. })));
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

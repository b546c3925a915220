//! Rotary position embedding.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::composed::{self, is_composed};
use super::real::Real;
use super::rows::{RowKernel, last_dim, run_rows};

/// Turns pairs of `x`, `[batch, seq, heads, head_dim]`, by angles with the given cosines and sines, `[batch, seq, dim/2]`:
/// elements `2i` and `2i + 1` where `interleaved`, else `i` and `i + dim/2`. The elements after the first `dim` stay.
///
/// # Errors
/// When the shapes do not fit.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, interleaved: bool) -> Result<Tensor> {
    #[cfg(any(test, feature = "cuda"))]
    if crate::base::cuda::takes(x) {
        return crate::base::cuda::rope(x, cos, sin, interleaved);
    }
    if is_composed(x) {
        return composed::rope(x, cos, sin, interleaved);
    }
    x.contiguous()?.apply_op1(Rope { cos: cos.contiguous()?, sin: sin.contiguous()?, interleaved, inverse: false })
}

struct Rope {
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    /// Turn back: the backward of a rotation.
    inverse: bool,
}

/// Turns the pairs of one head, or turns them back.
#[inline(always)]
pub(super) fn turn<T: Real>(head: &mut [T], cos: &[T], sin: &[T], interleaved: bool, inverse: bool) {
    let sign = if inverse { -T::one() } else { T::one() };
    let angles = cos.iter().zip(sin);
    let turned = |first: T, second: T, c: T, s: T| (first * c - second * s, second * c + first * s);
    if interleaved {
        for (pair, (c, s)) in head.chunks_exact_mut(2).zip(angles) {
            (pair[0], pair[1]) = turned(pair[0], pair[1], *c, *s * sign);
        }
    } else {
        let (first, rest) = head.split_at_mut(cos.len());
        for ((first, second), (c, s)) in first.iter_mut().zip(rest).zip(angles) {
            (*first, *second) = turned(*first, *second, *c, *s * sign);
        }
    }
}

impl RowKernel for Rope {
    fn compute<T: Real>(&self, inputs: &[&[T]], constants: &[&[T]], shape: &Shape) -> Vec<T> {
        let (x, cos, sin, width) = (inputs[0], constants[0], constants[1], last_dim(shape));
        let half = last_dim(self.cos.shape());
        let heads = shape.dims().get(2).copied().unwrap_or(1);
        let mut y = x.to_vec();
        y.par_chunks_mut(width).enumerate().for_each(|(row, y)| {
            let at = row / heads * half;
            turn(y, &cos[at..at + half], &sin[at..at + half], self.interleaved, self.inverse);
        });
        y
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, seq, _, width) = layout.shape().dims4()?;
        let half = self.cos.dim(2)?;
        if self.cos.dims() != [batch, seq, half] || self.sin.dims() != self.cos.dims() || half == 0 || 2 * half > width
        {
            candle_core::bail!("rope: angles {:?} do not fit input {:?}", self.cos.dims(), layout.dims());
        }
        run_rows(self, &[(x, layout)], &[&self.cos, &self.sin])
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Self {
            cos: self.cos.clone(),
            sin: self.sin.clone(),
            interleaved: self.interleaved,
            inverse: !self.inverse,
        };
        grad.contiguous()?.apply_op1_no_bwd(&back).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, numbers};
    use super::*;

    #[test]
    fn rope_gradient_is_exact() {
        let angles = numbers(&[2, 3, 4], 1.0);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        for interleaved in [false, true] {
            for width in [8, 12] {
                check_gradient(&numbers(&[2, 3, 2, width], 0.0), |x| rope(x, &cos, &sin, interleaved));
            }
        }
    }

    #[test]
    fn pairs_turn_and_the_rest_stays() {
        let x = numbers(&[1, 1, 1, 6], 0.0);
        let quarter = |value: f64| Tensor::new(&[[[value, value]]], &candle_core::Device::Cpu).unwrap();
        let turned = |interleaved| {
            rope(&x, &quarter(0.0), &quarter(1.0), interleaved)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
        };
        let v: Vec<f64> = x.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(turned(false), [-v[2], -v[3], v[0], v[1], v[4], v[5]]);
        assert_eq!(turned(true), [-v[1], v[0], -v[3], v[2], v[4], v[5]]);
    }
}

//! The feature map of Prefix-Tuning+'s default.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::composed::is_composed;
use super::real::{Real, vectorised};
use super::rows::{RowKernel, run_rows};

/// `x` where positive, else `exp(x) − 1`. A transposed view of `[batch, seq, heads, width]` stays one.
///
/// # Errors
/// When candle fails.
pub fn elu(x: &Tensor) -> Result<Tensor> {
    #[cfg(any(test, feature = "cuda"))]
    if crate::base::cuda::takes(x) {
        return if x.is_contiguous() || x.rank() != 4 {
            crate::base::cuda::elu(x)
        } else {
            crate::base::cuda::elu(&x.transpose(1, 2)?)?.transpose(1, 2)
        };
    }
    if is_composed(x) {
        return x.elu(1.0);
    }
    if !x.is_contiguous() && x.rank() == 4 {
        return x.transpose(1, 2)?.contiguous()?.apply_op1(Elu)?.transpose(1, 2);
    }
    x.contiguous()?.apply_op1(Elu)
}

/// Elements that a task works on.
const CHUNK: usize = 1 << 13;

#[inline(always)]
pub(super) fn elu_of<T: Real>(x: T) -> T {
    if x > T::zero() { x } else { x.fast_exp() - T::one() }
}

/// The slope at `x`.
#[inline(always)]
pub(super) fn elu_slope<T: Real>(x: T) -> T {
    if x > T::zero() { T::one() } else { x.fast_exp() }
}

struct Elu;

impl RowKernel for Elu {
    fn compute<T: Real>(&self, inputs: &[&[T]], _: &[&[T]], _: &Shape) -> Vec<T> {
        let mut y = inputs[0].to_vec();
        y.par_chunks_mut(CHUNK).for_each(|y| {
            vectorised(
                #[inline(always)]
                || y.iter_mut().for_each(|x| *x = elu_of(*x)),
            );
        });
        y
    }
}

impl CustomOp1 for Elu {
    fn name(&self) -> &'static str {
        "elu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        run_rows(self, &[(x, layout)], &[])
    }

    fn bwd(&self, _x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        y.apply_op2_no_bwd(&grad.contiguous()?, &EluGrad).map(Some)
    }
}

/// The slope by the value: 1 where it is positive, else `y + 1`.
struct EluGrad;

impl RowKernel for EluGrad {
    fn compute<T: Real>(&self, inputs: &[&[T]], _: &[&[T]], _: &Shape) -> Vec<T> {
        let mut dx = inputs[1].to_vec();
        dx.par_chunks_mut(CHUNK).zip(inputs[0].par_chunks(CHUNK)).for_each(|(dx, y)| {
            vectorised(
                #[inline(always)]
                || {
                    for (d, y) in dx.iter_mut().zip(y) {
                        *d = *d * if *y > T::zero() { T::one() } else { *y + T::one() };
                    }
                },
            );
        });
        dx
    }
}

impl CustomOp2 for EluGrad {
    fn name(&self) -> &'static str {
        "elu-grad"
    }

    fn cpu_fwd(&self, y: &CpuStorage, ly: &Layout, g: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        run_rows(self, &[(y, ly), (g, lg)], &[])
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;

    #[test]
    fn it_is_candle_s_with_an_exact_gradient_also_of_a_view() {
        let x = (numbers(&[2, 3, 4, 5], 0.5) * 3.0).unwrap();
        for x in [x.clone(), x.transpose(1, 2).unwrap()] {
            assert!(max_difference(&elu(&x).unwrap(), &x.contiguous().unwrap().elu(1.0).unwrap()) < 1e-15);
            let narrow = elu(&x.to_dtype(DType::F32).unwrap()).unwrap().to_dtype(DType::F64).unwrap();
            assert!(max_difference(&narrow, &x.contiguous().unwrap().elu(1.0).unwrap()) < 3e-7);
            check_gradient(&x, elu);
        }
    }
}

//! Dropout.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::composed::is_composed;
use super::real::Real;
use super::rows::{RowKernel, run_rows};

/// `x` with a part `rate` of its elements zero and the others divided by `1 − rate`; which ones follows from `seed`, so that
/// nothing is kept for the backward pass.
///
/// # Errors
/// When candle fails.
pub fn dropout(x: &Tensor, rate: f64, seed: u64) -> Result<Tensor> {
    if is_composed(x) {
        // the same numbers stay as on the CPU
        let keep = Dropout { rate, seed }.compute::<f64>(&[&vec![1.0; x.elem_count()]], &[], x.shape());
        return x * Tensor::from_vec(keep, x.shape(), x.device())?.to_dtype(x.dtype())?;
    }
    x.contiguous()?.apply_op1(Dropout { rate, seed })
}

#[derive(Clone, Copy)]
struct Dropout {
    rate: f64,
    seed: u64,
}

impl RowKernel for Dropout {
    fn compute<T: Real>(&self, inputs: &[&[T]], _: &[&[T]], _: &Shape) -> Vec<T> {
        let mut random = Pcg64Mcg::seed_from_u64(self.seed);
        let factor = T::of((1.0 - self.rate).recip());
        let mut keep = |x: &T| if random.random_bool(self.rate) { T::zero() } else { *x * factor };
        inputs[0].iter().map(&mut keep).collect()
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        run_rows(self, &[(x, layout)], &[])
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1_no_bwd(self).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, numbers};
    use super::*;

    #[test]
    fn its_gradient_is_exact() {
        check_gradient(&numbers(&[2, 3, 5], 0.5), |x| dropout(x, 0.4, 9));
    }
}

//! Softmax over masked scores.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::rows::{Real, RowKernel, last_dim, run_rows};

/// `softmax(scale · scores + bias)` over the last dimension, with `cap · tanh(scale · scores / cap)` in the place of the
/// scaled scores where there is a soft cap; `scores` of `[batch, heads, seq, total]`, `bias` of `[batch, 1, seq, total]`, not
/// trained.
///
/// # Errors
/// When the shapes do not fit.
pub fn masked_softmax(scores: &Tensor, bias: Option<&Tensor>, scale: f64, cap: Option<f64>) -> Result<Tensor> {
    let bias = bias.map(Tensor::contiguous).transpose()?;
    scores.contiguous()?.apply_op1(MaskedSoftmax { bias, scale, cap })
}

/// `cap · tanh(x / cap)`.
///
/// # Errors
/// When candle fails.
pub fn softcap(x: &Tensor, cap: f64) -> Result<Tensor> {
    (x / cap)?.tanh()? * cap
}

struct MaskedSoftmax {
    bias: Option<Tensor>,
    scale: f64,
    cap: Option<f64>,
}

impl RowKernel for MaskedSoftmax {
    fn compute<T: Real>(&self, inputs: &[&[T]], constants: &[&[T]], shape: &Shape) -> Vec<T> {
        let (scores, width, scale) = (inputs[0], last_dim(shape), T::of(self.scale));
        // row r of [batch, heads, seq] reads row (batch, seq) of the bias
        let (heads, seq) = match shape.dims() {
            [_, heads, seq, _] => (*heads, *seq),
            _ => (1, 1),
        };
        let bias_row = |row: usize| {
            constants.first().map(|bias| {
                let at = (row / (heads * seq) * seq + row % seq) * width;
                &bias[at..at + width]
            })
        };
        let mut p = vec![T::zero(); scores.len()];
        p.par_chunks_mut(width).zip(scores.par_chunks(width)).enumerate().for_each(|(row, (p, scores))| {
            for (p, s) in p.iter_mut().zip(scores) {
                *p = *s * scale;
            }
            if let Some(cap) = self.cap.map(T::of) {
                p.iter_mut().for_each(|p| *p = cap * (*p / cap).tanh());
            }
            if let Some(bias) = bias_row(row) {
                p.iter_mut().zip(bias).for_each(|(p, b)| *p = *p + *b);
            }
            let max = p.iter().copied().fold(T::neg_infinity(), T::max);
            let mut sum = T::zero();
            for p in p.iter_mut() {
                *p = (*p - max).exp();
                sum = sum + *p;
            }
            let inverse = sum.recip();
            for p in p.iter_mut() {
                *p = *p * inverse;
            }
        });
        p
    }
}

impl CustomOp1 for MaskedSoftmax {
    fn name(&self) -> &'static str {
        "masked-softmax"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(bias) = &self.bias {
            let (batch, _, seq, total) = layout.shape().dims4()?;
            if bias.dims() != [batch, 1, seq, total] {
                candle_core::bail!("masked-softmax: bias {:?} does not fit scores {:?}", bias.dims(), layout.dims());
            }
        }
        let constants: Vec<&Tensor> = self.bias.iter().collect();
        run_rows(self, &[(scores, layout)], &constants)
    }

    fn bwd(&self, scores: &Tensor, p: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let capped = p.apply_op2_no_bwd(&grad.contiguous()?, &MaskedSoftmaxGrad { scale: self.scale })?;
        let Some(cap) = self.cap else { return Ok(Some(capped)) };
        let slope = (scores * (self.scale / cap))?.tanh()?.sqr()?.affine(-1.0, 1.0)?;
        (capped * slope).map(Some)
    }
}

/// `dscores = scale · p · (grad − Σ grad·p)`.
struct MaskedSoftmaxGrad {
    scale: f64,
}

impl RowKernel for MaskedSoftmaxGrad {
    fn compute<T: Real>(&self, inputs: &[&[T]], _: &[&[T]], shape: &Shape) -> Vec<T> {
        let (p, grad, width, scale) = (inputs[0], inputs[1], last_dim(shape), T::of(self.scale));
        let mut ds = vec![T::zero(); p.len()];
        ds.par_chunks_mut(width).zip(p.par_chunks(width)).zip(grad.par_chunks(width)).for_each(|((ds, p), grad)| {
            let dot: T = p.iter().zip(grad).map(|(p, g)| *p * *g).sum();
            for ((ds, p), g) in ds.iter_mut().zip(p).zip(grad) {
                *ds = scale * *p * (*g - dot);
            }
        });
        ds
    }
}

impl CustomOp2 for MaskedSoftmaxGrad {
    fn name(&self) -> &'static str {
        "masked-softmax-grad"
    }

    fn cpu_fwd(&self, p: &CpuStorage, lp: &Layout, g: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        run_rows(self, &[(p, lp), (g, lg)], &[])
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device};

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;

    #[test]
    fn softmax_gradient_is_exact_and_masked_scores_get_none() {
        let mut bias = vec![0f64; 2 * 3 * 4];
        bias[3] = f64::from(f32::MIN);
        bias[7] = f64::from(f32::MIN);
        let bias = Tensor::from_vec(bias, (2, 1, 3, 4), &Device::Cpu).unwrap();
        check_gradient(&numbers(&[2, 5, 3, 4], 0.0), |x| masked_softmax(x, Some(&bias), 0.7, None));
        check_gradient(&numbers(&[2, 5, 3, 4], 0.0), |x| masked_softmax(x, None, 1.3, None));
        check_gradient(&numbers(&[2, 5, 3, 4], 0.0), |x| masked_softmax(x, Some(&bias), 1.3, Some(0.8)));
        let p = masked_softmax(&numbers(&[2, 5, 3, 4], 0.0), Some(&bias), 0.7, None).unwrap();
        assert_eq!(p.get(0).unwrap().get(4).unwrap().get(0).unwrap().to_vec1::<f64>().unwrap()[3], 0.0);
        let sums = p.sum(D::Minus1).unwrap();
        assert!(max_difference(&sums, &sums.ones_like().unwrap()) < 1e-14);
    }
}

//! Root-mean-square and layer normalisation.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::composed::{self, is_composed};
use super::held::{Held, is_held, numbers, tensor};
use super::inner_map::{Rows, column_sums};
use super::real::{Real, sum, sum_pairs, vectorised};
use super::rows::{RowKernel, last_dim, run_rows};
use super::trained::Trained;
use crate::base::{Norm, NormKind};

/// The weights of a normalisation.
#[derive(Clone, Debug)]
pub struct NormWeights {
    /// Its kind.
    pub norm: Norm,
    /// `[width]`; of several rows, they serve the rows of what is normalised in turn.
    pub weight: Tensor,
    /// As the weight.
    pub bias: Option<Tensor>,
}

impl NormWeights {
    /// Normalises `x` over its last dimension; see [`NormKind`].
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, norm) = (&self.weight, &self.norm);
        if x.dim(D::Minus1)? != weight.dim(D::Minus1)? {
            candle_core::bail!("norm: input {:?} does not fit weight {:?}", x.dims(), weight.dims());
        }
        #[cfg(any(test, feature = "cuda"))]
        if crate::base::cuda::takes_norm(x, self) {
            return crate::base::cuda::norm(x, self);
        }
        let is_trained = self.tensors().any(Tensor::track_op);
        if is_trained && self.is_held() && x.dtype() == weight.dtype() {
            let trained = Trained::of(self.tensors())?;
            if let Some(token) = trained.token().cloned() {
                return x.contiguous()?.apply_op2(&token, TrainedNorm { norm: self.clone(), trained });
            }
        }
        let y = if is_trained || is_composed(x) {
            composed::norm(x, self)?
        } else {
            x.contiguous()?.apply_op1(RowNorm { weight: weight.contiguous()?, norm: *norm })?
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// Its tensors.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [Some(&self.weight), self.bias.as_ref()].into_iter().flatten()
    }

    /// Whether an operation can take it as a part of itself: float weights on the CPU.
    pub fn is_held(&self) -> bool {
        self.tensors().all(is_held)
    }

    /// Normalised rows.
    pub(super) fn rows<T: Real + WithDType>(&self, x: &[T]) -> Result<Vec<T>> {
        let weight = Held::of(&self.weight)?;
        let mut y = normed(x, weight.numbers()?, self.weight.dim(D::Minus1)?.max(1), &self.norm);
        if let Some(bias) = &self.bias {
            let held = Held::of(bias)?;
            let bias: &[T] = held.numbers()?;
            y.par_chunks_mut(bias.len().max(1)).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += *b));
        }
        Ok(y)
    }

    /// The gradient of the rows that were normalised.
    pub(super) fn rows_gradient<T: Real + WithDType>(&self, x: &[T], grad: &[T]) -> Result<Vec<T>> {
        let weight = Held::of(&self.weight)?;
        Ok(norm_gradient(x, grad, weight.numbers()?, self.weight.dim(D::Minus1)?.max(1), &self.norm))
    }
}

impl NormWeights {
    /// Leaves the gradients of what is trained, given that of the normalised rows of `x`.
    pub(super) fn leave_gradients<T: Real + WithDType>(&self, x: &[T], grad: &[T], trained: &Trained) -> Result<()> {
        let width = self.weight.dim(D::Minus1)?.max(1);
        if self.weight.track_op() {
            let mut sums = vec![T::zero(); self.weight.elem_count()];
            let count = sums.len();
            for (row, (x, grad)) in x.chunks_exact(width).zip(grad.chunks_exact(width)).enumerate() {
                let sums = &mut sums[row * width % count..][..width];
                vectorised(
                    #[inline(always)]
                    || {
                        let (mean, r) = moments(x, &self.norm);
                        for ((sum, x), g) in sums.iter_mut().zip(x).zip(grad) {
                            *sum += (*x - mean) * r * *g;
                        }
                    },
                );
            }
            trained.leave(&self.weight, sums)?;
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.track_op()) {
            let count = bias.elem_count().max(1);
            let rows = Rows::dense(grad, count);
            trained.leave(bias, column_sums(rows, grad.len() / count, count, T::one()))?;
        }
        Ok(())
    }
}

/// A norm of which something is trained.
struct TrainedNorm {
    norm: NormWeights,
    trained: Trained,
}

impl CustomOp2 for TrainedNorm {
    fn name(&self) -> &'static str {
        "trained-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = match x {
            CpuStorage::F32(_) => CpuStorage::F32(self.norm.rows(numbers(x, layout)?)?),
            CpuStorage::F64(_) => CpuStorage::F64(self.norm.rows(numbers(x, layout)?)?),
            _ => candle_core::bail!("norm: the input is neither float32 nor float64"),
        };
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        fn of<T: Real + WithDType>(op: &TrainedNorm, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
            let (held, grad) = (Held::of(x)?, Held::of(grad)?);
            let (x_rows, grad): (&[T], &[T]) = (held.numbers()?, grad.numbers()?);
            op.norm.leave_gradients(x_rows, grad, &op.trained)?;
            tensor(op.norm.rows_gradient(x_rows, grad)?, x.shape())
        }
        let grad = grad.contiguous()?;
        let dx = match x.dtype() {
            DType::F64 => of::<f64>(self, x, &grad)?,
            _ => of::<f32>(self, x, &grad)?,
        };
        Ok((Some(dx), self.trained.no_gradient()?))
    }
}

struct RowNorm {
    weight: Tensor,
    norm: Norm,
}

/// What a row is shifted and scaled by.
#[inline(always)]
fn moments<T: Real>(x: &[T], norm: &Norm) -> (T, T) {
    let count = T::of(x.len() as f64);
    let mean = match norm.kind {
        NormKind::Rms => T::zero(),
        NormKind::Layer => sum(x, |v| v) / count,
    };
    let variance = sum(x, |v| (v - mean) * (v - mean)) / count;
    (mean, (variance + T::of(norm.epsilon)).sqrt().recip())
}

/// The weights of a row of `x`.
fn weights_of<T>(weight: &[T], row: usize, width: usize) -> &[T] {
    let start = row * width % weight.len().max(1);
    &weight[start..start + width]
}

fn normed<T: Real>(x: &[T], weight: &[T], width: usize, norm: &Norm) -> Vec<T> {
    let offset = T::of(norm.weight_offset);
    let mut y = vec![T::zero(); x.len()];
    y.par_chunks_mut(width).zip(x.par_chunks(width)).enumerate().for_each(|(row, (y, x))| {
        vectorised(
            #[inline(always)]
            || {
                let (mean, r) = moments(x, norm);
                for ((y, x), w) in y.iter_mut().zip(x).zip(weights_of(weight, row, width)) {
                    *y = (*x - mean) * r * (*w + offset);
                }
            },
        );
    });
    y
}

impl RowKernel for RowNorm {
    fn compute<T: Real>(&self, inputs: &[&[T]], constants: &[&[T]], shape: &Shape) -> Vec<T> {
        normed(inputs[0], constants[0], last_dim(shape), &self.norm)
    }
}

impl CustomOp1 for RowNorm {
    fn name(&self) -> &'static str {
        "row-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        run_rows(self, &[(x, layout)], &[&self.weight])
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let backward = RowNormGrad { weight: self.weight.clone(), norm: self.norm };
        x.apply_op2_no_bwd(&grad.contiguous()?, &backward).map(Some)
    }
}

/// With `x̂` the normalised row, `r` its factor and `g = grad · weight`: `dx = r · (g − mean(g) − x̂ · mean(g·x̂))`, without
/// `mean(g)` where the mean is not taken off.
fn norm_gradient<T: Real>(x: &[T], grad: &[T], weight: &[T], width: usize, norm: &Norm) -> Vec<T> {
    let (offset, count) = (T::of(norm.weight_offset), T::of(width as f64));
    let mut dx = vec![T::zero(); x.len()];
    let rows = dx.par_chunks_mut(width).zip(x.par_chunks(width)).zip(grad.par_chunks(width));
    rows.enumerate().for_each(|(row, ((dx, x), grad))| {
        let weight = weights_of(weight, row, width);
        vectorised(
            #[inline(always)]
            || {
                let (mean, r) = moments(x, norm);
                for ((dx, g), w) in dx.iter_mut().zip(grad).zip(weight) {
                    *dx = *g * (*w + offset);
                }
                let shift = match norm.kind {
                    NormKind::Rms => T::zero(),
                    NormKind::Layer => sum(dx, |g| g) / count,
                };
                let shrink = r * r * sum_pairs(dx, x, |g, x| g * (x - mean)) / count;
                for (dx, x) in dx.iter_mut().zip(x) {
                    *dx = r * (*dx - shift - (*x - mean) * shrink);
                }
            },
        );
    });
    dx
}

struct RowNormGrad {
    weight: Tensor,
    norm: Norm,
}

impl RowKernel for RowNormGrad {
    fn compute<T: Real>(&self, inputs: &[&[T]], constants: &[&[T]], shape: &Shape) -> Vec<T> {
        norm_gradient(inputs[0], inputs[1], constants[0], last_dim(shape), &self.norm)
    }
}

impl CustomOp2 for RowNormGrad {
    fn name(&self) -> &'static str {
        "row-norm-grad"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, g: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        run_rows(self, &[(x, lx), (g, lg)], &[&self.weight])
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Var};

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;

    const KINDS: [Norm; 3] = [
        Norm { kind: NormKind::Rms, epsilon: 1e-5, weight_offset: 0.0, bias: false },
        Norm { kind: NormKind::Rms, epsilon: 1e-5, weight_offset: 1.0, bias: false },
        Norm { kind: NormKind::Layer, epsilon: 1e-5, weight_offset: 0.0, bias: true },
    ];

    #[test]
    fn gradients_are_exact_and_both_forms_agree() {
        for kind in &KINDS {
            for rows in [&[6][..], &[3, 6]] {
                let (weight, bias) = (numbers(rows, 1.0), numbers(rows, 2.0));
                let x = numbers(&[2, 3, 6], 0.0);
                let with = |weight: &Tensor, bias: Option<&Tensor>| NormWeights {
                    norm: *kind,
                    weight: weight.clone(),
                    bias: bias.cloned(),
                };
                check_gradient(&x, |x| with(&weight, Some(&bias)).forward(x));
                check_gradient(&weight, |weight| with(weight, Some(&bias)).forward(&x));
                check_gradient(&bias, |bias| with(&weight, Some(bias)).forward(&x));
                let trainable = Var::from_tensor(&weight).unwrap();
                check_gradient(&x, |x| with(trainable.as_tensor(), Some(&bias)).forward(x));
                let trained = with(trainable.as_tensor(), Some(&bias)).forward(&x).unwrap();
                assert!(max_difference(&with(&weight, Some(&bias)).forward(&x).unwrap(), &trained) < 1e-14);
            }
        }
    }

    #[test]
    fn half_types_are_computed_in_float32_and_rounded_once() {
        let (x, weight) = (numbers(&[3, 8], 0.0), numbers(&[8], 1.0));
        for dtype in [DType::F16, DType::BF16] {
            let (x, weight) = (x.to_dtype(dtype).unwrap(), weight.to_dtype(dtype).unwrap());
            let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
            let norm = |x: &Tensor, weight: &Tensor| {
                NormWeights { norm: KINDS[1], weight: weight.clone(), bias: None }.forward(x).unwrap()
            };
            let half = norm(&x, &weight);
            let full = norm(&wide(&x), &wide(&weight)).to_dtype(dtype).unwrap();
            assert_eq!(wide(&half).to_vec2::<f32>().unwrap(), wide(&full).to_vec2::<f32>().unwrap());
        }
    }
}

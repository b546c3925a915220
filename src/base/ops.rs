//! Operations of the decoder with a backward of their own.
//!
//! candle's `backward` computes the gradient of both sides of every matrix product and composes norms, rotary and
//! softmax from elementwise steps. A frozen base needs only the gradient of the activations, so each operation here
//! takes its weights as constants and returns that alone, in one pass over the rows. Where a weight is being trained
//! ([`Tensor::track_op`]), the composed form is used instead.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Layout, Result, Shape, Storage, Tensor};
use half::{bf16, f16};
use num_traits::Float;
use rayon::prelude::*;

/// `x · weightᵀ + bias` with `x` of `[…, in]` and `weight` of `[out, in]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = if weight.track_op() {
        let (rows, width) = flat(x)?;
        let mut dims = x.dims().to_vec();
        let out = weight.dim(0)?;
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        x.reshape((rows, width))?.matmul(&weight.t()?)?.reshape(dims)?
    } else {
        x.contiguous()?.apply_op1(FrozenLinear { weight: weight.clone() })?
    };
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// `x / sqrt(mean(x²) + epsilon) · weight` over the last dimension.
///
/// # Errors
/// When the shapes do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    if weight.track_op() {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        return x.broadcast_div(&(mean_square + epsilon)?.sqrt()?)?.broadcast_mul(weight);
    }
    x.contiguous()?.apply_op1(RmsNorm { weight: weight.clone(), epsilon })
}

/// `softmax(scale · scores + bias)` over the last dimension; `scores` of `[batch, heads, seq, total]`, `bias` of
/// `[batch, 1, seq, total]`, not trained.
///
/// # Errors
/// When the shapes do not fit.
pub fn masked_softmax(scores: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    let bias = bias.map(Tensor::contiguous).transpose()?;
    scores.contiguous()?.apply_op1(MaskedSoftmax { bias, scale })
}

/// Turns pairs `(i, i + head_dim/2)` of `x`, `[batch, heads, seq, head_dim]`, by angles with the given cosines and sines,
/// `[batch, seq, head_dim/2]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Rope { cos: cos.contiguous()?, sin: sin.contiguous()?, inverse: false })
}

/// The elements of `x` as rows: (number of rows, width).
fn flat(x: &Tensor) -> Result<(usize, usize)> {
    let width = x.dim(D::Minus1)?;
    Ok((x.elem_count().checked_div(width).unwrap_or(0), width))
}

struct FrozenLinear {
    weight: Tensor,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (weight, weight_layout) = self.weight.storage_and_layout();
        let Storage::Cpu(weight) = &*weight else { candle_core::bail!("frozen-linear: the weight is not on the CPU") };
        let (out, width) = self.weight.dims2()?;
        let mut dims = layout.dims().to_vec();
        let Some(last) = dims.last_mut() else { candle_core::bail!("frozen-linear: the input has no dimension") };
        if *last != width {
            candle_core::bail!("frozen-linear: input {:?} does not fit weight [{out}, {width}]", layout.dims());
        }
        *last = out;
        let rows = layout.shape().elem_count() / width.max(1);
        let x_layout = Layout::contiguous_with_offset((rows, width), layout.start_offset());
        let y = x.matmul(weight, (1, rows, out, width), &x_layout, &weight_layout.transpose(0, 1)?)?;
        Ok((y, dims.into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, out) = flat(grad)?;
        Ok(Some(grad.reshape((rows, out))?.matmul(&self.weight)?.reshape(x.shape())?))
    }
}

/// A float type that the row operations compute in.
trait Real: Float + Send + Sync + std::iter::Sum {
    fn of(x: f64) -> Self;
}

impl Real for f32 {
    fn of(x: f64) -> Self {
        x as Self
    }
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
}

/// A contiguous CPU tensor as numbers to compute with; half types are widened to float32.
enum Numbers<'a> {
    F32(Cow<'a, [f32]>),
    F64(&'a [f64]),
}

impl<'a> Numbers<'a> {
    fn of(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a row operation was given a strided tensor")
        };
        Ok(match storage {
            CpuStorage::F32(v) => Self::F32(Cow::Borrowed(&v[start..end])),
            CpuStorage::F64(v) => Self::F64(&v[start..end]),
            CpuStorage::F16(v) => Self::F32(v[start..end].iter().map(|x| x.to_f32()).collect()),
            CpuStorage::BF16(v) => Self::F32(v[start..end].iter().map(|x| x.to_f32()).collect()),
            other => candle_core::bail!("a row operation was given {:?}", other.dtype()),
        })
    }

    fn f32(&self) -> Result<&[f32]> {
        match self {
            Self::F32(v) => Ok(v),
            Self::F64(_) => candle_core::bail!("a row operation was given float32 and float64 together"),
        }
    }

    fn f64(&self) -> Result<&[f64]> {
        match self {
            Self::F64(v) => Ok(v),
            Self::F32(_) => candle_core::bail!("a row operation was given float32 and float64 together"),
        }
    }
}

/// Computed numbers as a tensor of `dtype`.
fn narrow(values: Vec<f32>, dtype: DType) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F32 => CpuStorage::F32(values),
        DType::F16 => CpuStorage::F16(values.into_iter().map(f16::from_f32).collect()),
        DType::BF16 => CpuStorage::BF16(values.into_iter().map(bf16::from_f32).collect()),
        other => candle_core::bail!("a row operation cannot produce {other:?}"),
    })
}

/// A function from rows to rows of the same width, with up to two inputs and two constants.
trait RowKernel {
    /// `inputs` and `constants` are contiguous; returns as many numbers as the first input has.
    fn compute<T: Real>(&self, inputs: &[&[T]], constants: &[&[T]], shape: &Shape) -> Vec<T>;
}

fn run_rows<K: RowKernel>(
    kernel: &K,
    inputs: &[(&CpuStorage, &Layout)],
    constants: &[&Tensor],
) -> Result<(CpuStorage, Shape)> {
    let Some((first, layout)) = inputs.first() else { candle_core::bail!("a row operation needs an input") };
    let shape = layout.shape().clone();
    let inputs = inputs.iter().map(|(s, l)| Numbers::of(s, l)).collect::<Result<Vec<_>>>()?;
    let guards: Vec<_> = constants.iter().map(|t| t.storage_and_layout()).collect();
    let constants = guards
        .iter()
        .map(|(storage, layout)| match &**storage {
            Storage::Cpu(s) => Numbers::of(s, layout),
            _ => candle_core::bail!("a row operation's constant is not on the CPU"),
        })
        .collect::<Result<Vec<_>>>()?;
    let storage = match first {
        CpuStorage::F64(_) => {
            let inputs = inputs.iter().map(Numbers::f64).collect::<Result<Vec<_>>>()?;
            let constants = constants.iter().map(Numbers::f64).collect::<Result<Vec<_>>>()?;
            CpuStorage::F64(kernel.compute(&inputs, &constants, &shape))
        }
        _ => {
            let inputs = inputs.iter().map(Numbers::f32).collect::<Result<Vec<_>>>()?;
            let constants = constants.iter().map(Numbers::f32).collect::<Result<Vec<_>>>()?;
            narrow(kernel.compute(&inputs, &constants, &shape), first.dtype())?
        }
    };
    Ok((storage, shape))
}

fn last_dim(shape: &Shape) -> usize {
    shape.dims().last().copied().unwrap_or(1).max(1)
}

struct RmsNorm {
    weight: Tensor,
    epsilon: f64,
}

impl RowKernel for RmsNorm {
    fn compute<T: Real>(&self, inputs: &[&[T]], constants: &[&[T]], shape: &Shape) -> Vec<T> {
        let (x, weight, width) = (inputs[0], constants[0], last_dim(shape));
        let mut y = vec![T::zero(); x.len()];
        y.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(y, x)| {
            let r = inverse_rms(x, self.epsilon);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = *x * r * *w;
            }
        });
        y
    }
}

fn inverse_rms<T: Real>(x: &[T], epsilon: f64) -> T {
    let mean_square = x.iter().map(|v| *v * *v).sum::<T>() / T::of(x.len() as f64);
    (mean_square + T::of(epsilon)).sqrt().recip()
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        run_rows(self, &[(x, layout)], &[&self.weight])
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let backward = RmsNormGrad { weight: self.weight.clone(), epsilon: self.epsilon };
        x.apply_op2_no_bwd(&grad.contiguous()?, &backward).map(Some)
    }
}

/// With r = 1/rms(x) and g = grad · weight: `dx = r·g − x · r³ · mean(g·x)`.
struct RmsNormGrad {
    weight: Tensor,
    epsilon: f64,
}

impl RowKernel for RmsNormGrad {
    fn compute<T: Real>(&self, inputs: &[&[T]], constants: &[&[T]], shape: &Shape) -> Vec<T> {
        let (x, grad, weight, width) = (inputs[0], inputs[1], constants[0], last_dim(shape));
        let mut dx = vec![T::zero(); x.len()];
        dx.par_chunks_mut(width).zip(x.par_chunks(width)).zip(grad.par_chunks(width)).for_each(|((dx, x), grad)| {
            let r = inverse_rms(x, self.epsilon);
            let dot: T = x.iter().zip(grad).zip(weight).map(|((x, g), w)| *x * *g * *w).sum();
            let shrink = r * r * r * dot / T::of(width as f64);
            for (((dx, x), g), w) in dx.iter_mut().zip(x).zip(grad).zip(weight) {
                *dx = r * *g * *w - *x * shrink;
            }
        });
        dx
    }
}

impl CustomOp2 for RmsNormGrad {
    fn name(&self) -> &'static str {
        "rms-norm-grad"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, g: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        run_rows(self, &[(x, lx), (g, lg)], &[&self.weight])
    }
}

struct MaskedSoftmax {
    bias: Option<Tensor>,
    scale: f64,
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
            match bias_row(row) {
                Some(bias) => {
                    for ((p, s), b) in p.iter_mut().zip(scores).zip(bias) {
                        *p = *s * scale + *b;
                    }
                }
                None => {
                    for (p, s) in p.iter_mut().zip(scores) {
                        *p = *s * scale;
                    }
                }
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

    fn bwd(&self, _scores: &Tensor, p: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        p.apply_op2_no_bwd(&grad.contiguous()?, &MaskedSoftmaxGrad { scale: self.scale }).map(Some)
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

struct Rope {
    cos: Tensor,
    sin: Tensor,
    /// Turn back: the backward of a rotation.
    inverse: bool,
}

impl RowKernel for Rope {
    fn compute<T: Real>(&self, inputs: &[&[T]], constants: &[&[T]], shape: &Shape) -> Vec<T> {
        let (x, cos, sin, width) = (inputs[0], constants[0], constants[1], last_dim(shape));
        let half = width / 2;
        let (heads, seq) = match shape.dims() {
            [_, heads, seq, _] => (*heads, *seq),
            _ => (1, 1),
        };
        let sign = if self.inverse { -T::one() } else { T::one() };
        let mut y = vec![T::zero(); x.len()];
        y.par_chunks_mut(width).zip(x.par_chunks(width)).enumerate().for_each(|(row, (y, x))| {
            let at = (row / (heads * seq) * seq + row % seq) * half;
            let (first, second) = x.split_at(half);
            let (y_first, y_second) = y.split_at_mut(half);
            for i in 0..half {
                let (c, s) = (cos[at + i], sin[at + i] * sign);
                y_first[i] = first[i] * c - second[i] * s;
                y_second[i] = second[i] * c + first[i] * s;
            }
        });
        y
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, _, seq, width) = layout.shape().dims4()?;
        if self.cos.dims() != [batch, seq, width / 2] || self.sin.dims() != self.cos.dims() {
            candle_core::bail!("rope: angles {:?} do not fit input {:?}", self.cos.dims(), layout.dims());
        }
        run_rows(self, &[(x, layout)], &[&self.cos, &self.sin])
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Self { cos: self.cos.clone(), sin: self.sin.clone(), inverse: !self.inverse };
        grad.contiguous()?.apply_op1_no_bwd(&back).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Deterministic numbers in about [-1, 1].
    fn numbers(shape: &[usize], seed: f64) -> Tensor {
        let n: usize = shape.iter().product();
        let values: Vec<f64> = (0..n).map(|i| (seed + i as f64 * 1.618_033).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// The gradient of Σ f(x)·c against central differences in float64.
    fn check_gradient(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) {
        let var = Var::from_tensor(x).unwrap();
        let y = f(var.as_tensor()).unwrap();
        let c = numbers(y.dims(), 0.3);
        let loss = |y: &Tensor| (y * &c).unwrap().sum_all().unwrap();
        let grads = loss(&y).backward().unwrap();
        let analytic: Vec<f64> = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let values: Vec<f64> = x.flatten_all().unwrap().to_vec1().unwrap();
        let step = 1e-6;
        for (i, found) in analytic.iter().enumerate() {
            let at = |delta: f64| {
                let mut moved = values.clone();
                moved[i] += delta;
                let x = Tensor::from_vec(moved, x.dims(), &Device::Cpu).unwrap();
                loss(&f(&x).unwrap()).to_scalar::<f64>().unwrap()
            };
            let expected = (at(step) - at(-step)) / (2.0 * step);
            assert!((found - expected).abs() < 1e-8 * (1.0 + expected.abs()), "element {i}: {found} vs {expected}");
        }
    }

    fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn linear_gradient_is_exact_and_leaves_the_weight_out() {
        let (weight, bias) = (numbers(&[5, 4], 1.0), numbers(&[5], 2.0));
        check_gradient(&numbers(&[2, 3, 4], 0.0), |x| linear(x, &weight, Some(&bias)));
        let (x, weight) = (Var::from_tensor(&numbers(&[3, 4], 0.0)).unwrap(), numbers(&[5, 4], 1.0));
        let grads = linear(x.as_tensor(), &weight, None).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&weight).is_none());
    }

    #[test]
    fn linear_equals_the_trainable_form() {
        let (x, weight) = (numbers(&[2, 3, 4], 0.0), numbers(&[5, 4], 1.0));
        let trainable = Var::from_tensor(&weight).unwrap();
        let difference =
            max_difference(&linear(&x, &weight, None).unwrap(), &linear(&x, trainable.as_tensor(), None).unwrap());
        assert!(difference < 1e-14);
    }

    #[test]
    fn rms_norm_gradient_is_exact() {
        let weight = numbers(&[6], 1.0);
        check_gradient(&numbers(&[2, 3, 6], 0.0), |x| rms_norm(x, &weight, 1e-5));
        let trainable = Var::from_tensor(&weight).unwrap();
        let x = numbers(&[2, 3, 6], 0.0);
        let difference =
            max_difference(&rms_norm(&x, &weight, 1e-5).unwrap(), &rms_norm(&x, trainable.as_tensor(), 1e-5).unwrap());
        assert!(difference < 1e-14);
    }

    #[test]
    fn softmax_gradient_is_exact_and_masked_scores_get_none() {
        let mut bias = vec![0f64; 2 * 3 * 4];
        bias[3] = f64::from(f32::MIN);
        bias[7] = f64::from(f32::MIN);
        let bias = Tensor::from_vec(bias, (2, 1, 3, 4), &Device::Cpu).unwrap();
        check_gradient(&numbers(&[2, 5, 3, 4], 0.0), |x| masked_softmax(x, Some(&bias), 0.7));
        check_gradient(&numbers(&[2, 5, 3, 4], 0.0), |x| masked_softmax(x, None, 1.3));
        let p = masked_softmax(&numbers(&[2, 5, 3, 4], 0.0), Some(&bias), 0.7).unwrap();
        assert_eq!(p.get(0).unwrap().get(4).unwrap().get(0).unwrap().to_vec1::<f64>().unwrap()[3], 0.0);
        let sums = p.sum(D::Minus1).unwrap();
        assert!(max_difference(&sums, &sums.ones_like().unwrap()) < 1e-14);
    }

    #[test]
    fn rope_gradient_is_exact() {
        let angles = numbers(&[2, 3, 4], 1.0);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        check_gradient(&numbers(&[2, 5, 3, 8], 0.0), |x| rope(x, &cos, &sin));
    }

    #[test]
    fn half_types_are_computed_in_float32_and_rounded_once() {
        let (x, weight) = (numbers(&[3, 8], 0.0), numbers(&[8], 1.0));
        for dtype in [DType::F16, DType::BF16] {
            let (x, weight) = (x.to_dtype(dtype).unwrap(), weight.to_dtype(dtype).unwrap());
            let half = rms_norm(&x, &weight, 1e-5).unwrap();
            let wide = rms_norm(&x.to_dtype(DType::F32).unwrap(), &weight.to_dtype(DType::F32).unwrap(), 1e-5).unwrap();
            let (half, wide) = (half.to_dtype(DType::F32).unwrap(), wide.to_dtype(dtype).unwrap());
            let wide = wide.to_dtype(DType::F32).unwrap();
            assert_eq!(half.to_vec2::<f32>().unwrap(), wide.to_vec2::<f32>().unwrap());
        }
    }
}

//! One matrix for each head.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::composed::is_composed;
use super::elu::{elu, elu_of, elu_slope};
use super::held::{Held, numbers, tensor};
use super::matmul::{Matrix, Target, Threads, multiply};
use super::real::{Real, vectorised};

/// What a row goes through before its matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Nothing.
    Identity,
    /// `x` where positive, else `exp(x) − 1`.
    Elu,
}

/// `φ(x[b, h, s, :]) · m[h]`: `x` of `[batch, heads, seq, in]`, `m` of `[heads, in, out]`, both trainable. Returns `[batch, heads,
/// seq, out]`, a view of `[batch, seq, heads, out]`; an `x` whose heads of a position lie side by side is not copied, and its
/// features are not kept.
///
/// # Errors
/// When the shapes do not fit.
pub fn head_linear(x: &Tensor, m: &Tensor, feature: Feature) -> Result<Tensor> {
    #[cfg(any(test, feature = "cuda"))]
    if crate::base::cuda::takes_heads(x, m) {
        return crate::base::cuda::head_linear(x, m, feature);
    }
    if is_composed(x) {
        let features = if feature == Feature::Elu { elu(x)? } else { x.clone() };
        let ((batch, heads, seq, width), out) = (x.dims4()?, m.dim(2)?);
        let rows = features.transpose(0, 1)?.reshape((heads, batch * seq, width))?;
        return rows.matmul(&m.contiguous()?)?.reshape((heads, batch, seq, out))?.transpose(0, 1);
    }
    let rows = x.transpose(1, 2)?;
    let rows = if row_stride(rows.layout()).is_some() { rows } else { rows.contiguous()? };
    if matches!(x.dtype(), DType::F16 | DType::BF16) {
        let (rows, m) = (rows.to_dtype(DType::F32)?, m.to_dtype(DType::F32)?.contiguous()?);
        return rows.apply_op2(&m, HeadLinear { feature })?.to_dtype(x.dtype())?.transpose(1, 2);
    }
    rows.apply_op2(&m.contiguous()?, HeadLinear { feature })?.transpose(1, 2)
}

/// How far apart the positions of `[batch, seq, heads, width]` are, where all else is dense.
fn row_stride(layout: &Layout) -> Option<usize> {
    let (batch, seq, heads, width) = layout.shape().dims4().ok()?;
    let [batch_stride, row, head, one] = *<&[usize; 4]>::try_from(layout.stride()).ok()?;
    // the stride of a dimension of one means nothing
    let row = if seq == 1 { heads * width } else { row };
    let row = if seq == 1 && batch > 1 { batch_stride } else { row };
    let is_dense = (width == 1 || one == 1) && (heads == 1 || head == width) && row >= heads * width;
    (is_dense && (batch == 1 || batch_stride == seq * row)).then_some(row)
}

/// From `[batch, seq, heads, in]` and `[heads, in, out]` to `[batch, seq, heads, out]`.
struct HeadLinear {
    feature: Feature,
}

/// Rows that a task works on.
const BLOCK: usize = 128;

#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    heads: usize,
    width: usize,
    out: usize,
}

impl Sizes {
    fn of(x: &Shape, m: &Shape) -> Result<Self> {
        let ((batch, seq, heads, width), (m_heads, m_width, out)) = (x.dims4()?, m.dims3()?);
        if (heads, width) != (m_heads, m_width) || heads * width * out == 0 {
            candle_core::bail!("head-linear: input {x:?} does not fit matrices {m:?}");
        }
        Ok(Self { rows: batch * seq, heads, width, out })
    }
}

/// Rows of all heads, which begin `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    data: &'a [T],
    stride: usize,
}

impl<'a, T: Real> Rows<'a, T> {
    fn new(data: &'a [T], layout: &Layout) -> Result<Self> {
        match (row_stride(layout), data.get(layout.start_offset()..)) {
            (Some(stride), Some(data)) => Ok(Self { data, stride }),
            _ => candle_core::bail!("head-linear: rows of {:?} are not dense", layout.shape()),
        }
    }

    fn row(&self, row: usize, width: usize) -> &'a [T] {
        &self.data[row * self.stride..][..width]
    }

    /// Features of some rows, dense.
    fn features(&self, rows: std::ops::Range<usize>, width: usize, feature: Feature) -> Vec<T> {
        let mut out = Vec::with_capacity(rows.len() * width);
        rows.for_each(|row| out.extend_from_slice(self.row(row, width)));
        if feature == Feature::Elu {
            vectorised(
                #[inline(always)]
                || out.iter_mut().for_each(|x| *x = elu_of(*x)),
            );
        }
        out
    }
}

fn apply<T: Real>(x: Rows<T>, m: &[T], sizes: Sizes, feature: Feature) -> Vec<T> {
    let Sizes { rows, heads, width, out } = sizes;
    let mut y = vec![T::zero(); rows * heads * out];
    y.par_chunks_mut(BLOCK * heads * out).enumerate().for_each(|(block, y)| {
        let count = y.len() / (heads * out);
        let features = x.features(block * BLOCK..block * BLOCK + count, heads * width, feature);
        for head in 0..heads {
            let matrix = Matrix::new(&m[head * width * out..][..width * out], width, out);
            let x = Matrix::strided(&features[head * width..], count, width, heads * width);
            multiply(Target::strided(&mut y[head * out..], heads * out), false, T::one(), x, matrix, Threads::One);
        }
    });
    y
}

/// `dx[r, h, :] = φ'(x[r, h, :]) · (grad[r, h, :] · m[h]ᵀ)`.
fn input_gradient<T: Real>(x: Rows<T>, m: &[T], grad: &[T], sizes: Sizes, feature: Feature) -> Vec<T> {
    let Sizes { rows, heads, width, out } = sizes;
    let mut dx = vec![T::zero(); rows * heads * width];
    let blocks = dx.par_chunks_mut(BLOCK * heads * width).zip(grad.par_chunks(BLOCK * heads * out));
    blocks.enumerate().for_each(|(block, (dx, grad))| {
        let count = dx.len() / (heads * width);
        for head in 0..heads {
            let matrix = Matrix::new(&m[head * width * out..][..width * out], width, out).t();
            let grad = Matrix::strided(&grad[head * out..], count, out, heads * out);
            let dx = Target::strided(&mut dx[head * width..], heads * width);
            multiply(dx, false, T::one(), grad, matrix, Threads::One);
        }
        if feature == Feature::Elu {
            for (row, dx) in dx.chunks_exact_mut(heads * width).enumerate() {
                let x = x.row(block * BLOCK + row, heads * width);
                vectorised(
                    #[inline(always)]
                    || dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = *dx * elu_slope(*x)),
                );
            }
        }
    });
    dx
}

/// `dm[h] = Σ_r φ(x[r, h, :]) ⊗ grad[r, h, :]`.
fn matrix_gradient<T: Real>(x: Rows<T>, grad: &[T], sizes: Sizes, feature: Feature) -> Vec<T> {
    let Sizes { rows, heads, width, out } = sizes;
    let mut dm = vec![T::zero(); heads * width * out];
    dm.par_chunks_mut(width * out).enumerate().for_each(|(head, dm)| {
        let x = Rows { data: &x.data[head * width..], stride: x.stride };
        for start in (0..rows).step_by(BLOCK) {
            let count = BLOCK.min(rows - start);
            let features = x.features(start..start + count, width, feature);
            let features = Matrix::new(&features, count, width);
            let grad = Matrix::strided(&grad[(start * heads + head) * out..], count, out, heads * out);
            multiply(Target::strided(dm, out), true, T::one(), features.t(), grad, Threads::One);
        }
    });
    dm
}

impl HeadLinear {
    fn gradients<T: Real + WithDType>(&self, x: &Tensor, m: &Tensor, grad: &Tensor) -> Result<[Tensor; 2]> {
        let sizes = Sizes::of(x.shape(), m.shape())?;
        let (storage, layout) = x.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else { candle_core::bail!("head-linear: not on the CPU") };
        let (held_m, held_grad) = (Held::of(m)?, Held::of(grad)?);
        let grad: &[T] = held_grad.numbers()?;
        let rows = Rows::new(T::cpu_storage_as_slice(storage)?, layout)?;
        let dx = input_gradient(rows, held_m.numbers()?, grad, sizes, self.feature);
        let dm = matrix_gradient(rows, grad, sizes, self.feature);
        Ok([tensor(dx, x.shape())?, tensor(dm, m.shape())?])
    }
}

impl CustomOp2 for HeadLinear {
    fn name(&self) -> &'static str {
        "head-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, m: &CpuStorage, lm: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = Sizes::of(lx.shape(), lm.shape())?;
        let y = match (x, m) {
            (CpuStorage::F32(x), CpuStorage::F32(_)) => {
                CpuStorage::F32(apply(Rows::new(x, lx)?, numbers(m, lm)?, sizes, self.feature))
            }
            (CpuStorage::F64(x), CpuStorage::F64(_)) => {
                CpuStorage::F64(apply(Rows::new(x, lx)?, numbers(m, lm)?, sizes, self.feature))
            }
            _ => candle_core::bail!("head-linear: inputs are neither both float32 nor both float64"),
        };
        let (batch, seq, heads, _) = lx.shape().dims4()?;
        Ok((y, (batch, seq, heads, sizes.out).into()))
    }

    fn bwd(&self, x: &Tensor, m: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let [dx, dm] = match x.dtype() {
            DType::F64 => self.gradients::<f64>(x, m, &grad)?,
            _ => self.gradients::<f32>(x, m, &grad)?,
        };
        Ok((Some(dx), Some(dm)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;

    #[test]
    fn it_is_a_product_for_each_head_with_exact_gradients() {
        for seq in [3, BLOCK + 5] {
            // three heads of five, so that rows are apart
            let packed = (numbers(&[2, seq, 5, 4], 0.0) * 2.0).unwrap();
            let x = packed.narrow(2, 1, 3).unwrap().transpose(1, 2).unwrap();
            let m = numbers(&[3, 4, 2], 1.0);
            let one = x.narrow(2, 1, 1).unwrap();
            let of_one = head_linear(&one, &m, Feature::Identity).unwrap();
            let of_all = head_linear(&x, &m, Feature::Identity).unwrap().narrow(2, 1, 1).unwrap();
            assert_eq!(max_difference(&of_one, &of_all), 0.0);
            for (feature, features) in
                [(Feature::Identity, x.contiguous()), (Feature::Elu, x.contiguous().unwrap().elu(1.0))]
            {
                let matrices = m.unsqueeze(0).unwrap().expand((2, 3, 4, 2)).unwrap().contiguous().unwrap();
                let expected = features.unwrap().matmul(&matrices).unwrap();
                assert!(max_difference(&head_linear(&x, &m, feature).unwrap(), &expected) < 1e-14);
            }
        }
        let (packed, m) = (numbers(&[2, 4, 4, 4], 0.0), numbers(&[3, 4, 2], 1.0));
        let view = |packed: &Tensor| packed.narrow(2, 1, 3)?.transpose(1, 2);
        for feature in [Feature::Identity, Feature::Elu] {
            check_gradient(&packed, |packed| head_linear(&view(packed)?, &m, feature));
            check_gradient(&m, |m| head_linear(&view(&packed)?, m, feature));
        }
    }
}

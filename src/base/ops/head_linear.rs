//! One matrix for each head.

use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType};
use rayon::prelude::*;

use super::matmul::{Matrix, Target, Threads, multiply};
use super::real::Real;

/// `x[b, h, s, :] · m[h]`: `x` of `[batch, heads, seq, in]`, `m` of `[heads, in, out]`, both trainable. Returns `[batch, heads, seq,
/// out]`, a view of `[batch, seq, heads, out]`; an `x` that is such a view is not copied.
///
/// # Errors
/// When the shapes do not fit.
pub fn head_linear(x: &Tensor, m: &Tensor) -> Result<Tensor> {
    let rows = x.transpose(1, 2)?.contiguous()?;
    if matches!(x.dtype(), DType::F16 | DType::BF16) {
        let y = rows.to_dtype(DType::F32)?.apply_op2(&m.to_dtype(DType::F32)?.contiguous()?, HeadLinear)?;
        return y.to_dtype(x.dtype())?.transpose(1, 2);
    }
    rows.apply_op2(&m.contiguous()?, HeadLinear)?.transpose(1, 2)
}

/// From `[batch, seq, heads, in]` and `[heads, in, out]` to `[batch, seq, heads, out]`.
struct HeadLinear;

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
        if (heads, width) != (m_heads, m_width) {
            candle_core::bail!("head-linear: input {x:?} does not fit matrices {m:?}");
        }
        Ok(Self { rows: batch * seq, heads, width, out })
    }
}

/// `y[r, h, :] = x[r, h, :] · m[h]`, or with each `m[h]` transposed.
fn apply<T: Real>(x: &[T], m: &[T], sizes: Sizes, transposed: bool) -> Vec<T> {
    let Sizes { rows, heads, width, out } = sizes;
    let (from, to) = if transposed { (out, width) } else { (width, out) };
    let mut y = vec![T::zero(); rows * heads * to];
    let blocks = y.par_chunks_mut((BLOCK * heads * to).max(1)).zip(x.par_chunks((BLOCK * heads * from).max(1)));
    blocks.for_each(|(y, x)| {
        let rows = y.len() / (heads * to).max(1);
        for head in 0..heads {
            let matrix = Matrix::new(&m[head * width * out..][..width * out], width, out);
            let matrix = if transposed { matrix.t() } else { matrix };
            let x = Matrix::strided(&x[head * from..], rows, from, heads * from);
            multiply(Target::strided(&mut y[head * to..], heads * to), false, T::one(), x, matrix, Threads::One);
        }
    });
    y
}

/// `dm[h] = Σ_r x[r, h, :] ⊗ grad[r, h, :]`.
fn outer<T: Real>(x: &[T], grad: &[T], sizes: Sizes) -> Vec<T> {
    let Sizes { rows, heads, width, out } = sizes;
    let mut dm = vec![T::zero(); heads * width * out];
    dm.par_chunks_mut((width * out).max(1)).enumerate().for_each(|(head, dm)| {
        let x = Matrix::strided(&x[head * width..], rows, width, heads * width);
        let grad = Matrix::strided(&grad[head * out..], rows, out, heads * out);
        multiply(Target::strided(dm, out), false, T::one(), x.t(), grad, Threads::One);
    });
    dm
}

impl CustomOp2 for HeadLinear {
    fn name(&self) -> &'static str {
        "head-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, m: &CpuStorage, lm: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = Sizes::of(lx.shape(), lm.shape())?;
        let (at, of) = (lx.start_offset(), lm.start_offset());
        let y = match (x, m) {
            (CpuStorage::F32(x), CpuStorage::F32(m)) => CpuStorage::F32(apply(&x[at..], &m[of..], sizes, false)),
            (CpuStorage::F64(x), CpuStorage::F64(m)) => CpuStorage::F64(apply(&x[at..], &m[of..], sizes, false)),
            _ => candle_core::bail!("head-linear: inputs are neither both float32 nor both float64"),
        };
        let (batch, seq, heads, _) = lx.shape().dims4()?;
        Ok((y, (batch, seq, heads, sizes.out).into()))
    }

    fn bwd(&self, x: &Tensor, m: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        fn of<T: Real + WithDType>(tensors: [&Tensor; 3], sizes: Sizes) -> Result<[Vec<T>; 2]> {
            let guards = tensors.map(|tensor| tensor.storage_and_layout());
            let mut slices = Vec::with_capacity(3);
            for (storage, layout) in &guards {
                let Storage::Cpu(storage) = &**storage else { candle_core::bail!("head-linear: not on the CPU") };
                let (start, end) = (layout.start_offset(), layout.start_offset() + layout.shape().elem_count());
                slices.push(&T::cpu_storage_as_slice(storage)?[start..end]);
            }
            Ok([apply(slices[2], slices[1], sizes, true), outer(slices[0], slices[2], sizes)])
        }
        let sizes = Sizes::of(x.shape(), m.shape())?;
        let grad = grad.contiguous()?;
        let tensors = [x, m, &grad];
        let (dx, dm) = match x.dtype() {
            DType::F64 => {
                let [dx, dm] = of::<f64>(tensors, sizes)?;
                (Tensor::from_vec(dx, x.shape(), &Device::Cpu)?, Tensor::from_vec(dm, m.shape(), &Device::Cpu)?)
            }
            _ => {
                let [dx, dm] = of::<f32>(tensors, sizes)?;
                (Tensor::from_vec(dx, x.shape(), &Device::Cpu)?, Tensor::from_vec(dm, m.shape(), &Device::Cpu)?)
            }
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
            let (x, m) = (numbers(&[2, seq, 3, 4], 0.0).transpose(1, 2).unwrap(), numbers(&[3, 4, 2], 1.0));
            let expected = x
                .contiguous()
                .unwrap()
                .matmul(&m.unsqueeze(0).unwrap().expand((2, 3, 4, 2)).unwrap().contiguous().unwrap());
            assert!(max_difference(&head_linear(&x, &m).unwrap(), &expected.unwrap()) < 1e-14);
        }
        let (x, m) = (numbers(&[2, 3, 4, 4], 0.0), numbers(&[3, 4, 2], 1.0));
        check_gradient(&x, |x| head_linear(x, &m));
        check_gradient(&m, |m| head_linear(&x, m));
    }
}

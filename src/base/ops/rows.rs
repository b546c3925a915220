//! Functions from rows to rows, on the CPU, in float32 or float64.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor};
use half::{bf16, f16};

use super::real::Real;

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
pub(super) trait RowKernel {
    /// `inputs` and `constants` are contiguous; returns as many numbers as the first input has.
    fn compute<T: Real>(&self, inputs: &[&[T]], constants: &[&[T]], shape: &Shape) -> Vec<T>;
}

pub(super) fn run_rows<K: RowKernel>(
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

pub(super) fn last_dim(shape: &Shape) -> usize {
    shape.dims().last().copied().unwrap_or(1).max(1)
}

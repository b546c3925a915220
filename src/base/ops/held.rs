//! The numbers of CPU tensors as slices.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType};

use super::composed::is_composed;

/// A contiguous CPU tensor, held for reading.
pub(super) struct Held<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: Range<usize>,
}

impl<'a> Held<'a> {
    pub(super) fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let range = dense(layout)?;
        Ok(Self { storage: Box::new(storage), range })
    }

    pub(super) fn numbers<T: WithDType>(&self) -> Result<&[T]> {
        let Storage::Cpu(storage) = &**self.storage else { candle_core::bail!("a tensor is not on the CPU") };
        Ok(&T::cpu_storage_as_slice(storage)?[self.range.clone()])
    }
}

/// The numbers of an operation's contiguous input.
pub(super) fn numbers<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    Ok(&T::cpu_storage_as_slice(storage)?[dense(layout)?])
}

fn dense(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => candle_core::bail!("a tensor of {:?} is not contiguous", layout.shape()),
    }
}

/// A new CPU tensor.
pub(super) fn tensor<T: WithDType>(values: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// Whether operations can read a weight where it is: on the CPU, contiguous, and of a type that they compute in.
pub(super) fn is_held(weight: &Tensor) -> bool {
    #[cfg(test)]
    if crate::base::cuda::takes(weight) {
        return false;
    }
    !is_composed(weight) && weight.is_contiguous() && matches!(weight.dtype(), DType::F32 | DType::F64)
}

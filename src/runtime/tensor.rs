//! A tensor wherever it lies: in host memory, or still in the runtime that made it.

use std::sync::Arc;

use super::process::HeldTensor;
use super::value::{DType, Value};
use super::{Result, ort_session, tract_session};

/// A tensor that a session takes or gives. One that a session gave stays in that runtime's memory until it is read, so
/// that a key-value cache goes from one step to the next without a copy.
#[derive(Debug)]
pub struct Tensor(Storage);

#[derive(Debug)]
enum Storage {
    Host(Value),
    Ort(Arc<ort::value::DynValue>),
    Tract(tract_onnx::prelude::TValue),
    /// In another process.
    Held(HeldTensor),
}

impl Tensor {
    pub(super) fn ort(value: ort::value::DynValue) -> Self {
        Self(Storage::Ort(Arc::new(value)))
    }

    pub(super) fn tract(value: tract_onnx::prelude::TValue) -> Self {
        Self(Storage::Tract(value))
    }

    pub(super) fn held(tensor: HeldTensor) -> Self {
        Self(Storage::Held(tensor))
    }

    /// The tensor that another process holds, or this one itself.
    pub(super) fn into_held(self) -> std::result::Result<HeldTensor, Self> {
        match self.0 {
            Storage::Held(tensor) => Ok(tensor),
            other => Err(Self(other)),
        }
    }

    /// The same tensor for another run, without a copy of what lies in the runtime of this process. None for what another process
    /// holds, which is given away.
    pub fn again(&self) -> Option<Self> {
        Some(Self(match &self.0 {
            Storage::Host(value) => Storage::Host(value.clone()),
            Storage::Ort(value) => Storage::Ort(value.clone()),
            Storage::Tract(value) => Storage::Tract(value.clone()),
            Storage::Held(_) => return None,
        }))
    }

    /// The element type.
    ///
    /// # Errors
    /// When the runtime made something that prefold does not read: strings, sequences, quantised elements.
    pub fn dtype(&self) -> Result<DType> {
        match &self.0 {
            Storage::Host(value) => Ok(value.dtype()),
            Storage::Ort(value) => ort_session::dtype(value.dtype()),
            Storage::Tract(value) => tract_session::dtype(value.datum_type()),
            Storage::Held(tensor) => Ok(tensor.dtype()),
        }
    }

    /// The dimensions.
    pub fn shape(&self) -> Vec<usize> {
        match &self.0 {
            Storage::Host(value) => value.shape().into(),
            Storage::Ort(value) => ort_session::shape(value.dtype()),
            Storage::Tract(value) => value.shape().into(),
            Storage::Held(tensor) => tensor.shape().into(),
        }
    }

    /// The tensor in host memory; copies what lies in a runtime.
    ///
    /// # Errors
    /// When the runtime made something that prefold does not read.
    pub fn into_value(self) -> Result<Value> {
        match self.0 {
            Storage::Host(value) => Ok(value),
            Storage::Ort(value) => ort_session::to_value(&value),
            Storage::Tract(value) => tract_session::to_value(&value),
            Storage::Held(tensor) => tensor.fetch(),
        }
    }

    pub(super) fn into_ort(self) -> Result<Arc<ort::value::DynValue>> {
        match self.0 {
            Storage::Ort(value) => Ok(value),
            other => ort_session::from_value(Self(other).into_value()?).map(Arc::new),
        }
    }

    pub(super) fn into_tract(self) -> Result<tract_onnx::prelude::TValue> {
        match self.0 {
            Storage::Tract(value) => Ok(value),
            other => tract_session::from_value(Self(other).into_value()?),
        }
    }
}

impl From<Value> for Tensor {
    fn from(value: Value) -> Self {
        Self(Storage::Host(value))
    }
}

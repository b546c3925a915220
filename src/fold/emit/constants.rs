//! Constants of an emission: the adapter's tensors in the graph's type, inline or in a data file of their own.

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::{DType, Tensor};

use crate::adapter::Adapter;
use crate::fold::{Error, Result};
use crate::onnx::{DataType, ExternalWriter, Patch, TensorDef};

/// Adapter tensors together larger than this go into a data file of their own.
const INLINE_LIMIT: usize = 64 << 20;
const DATA_NAME: &str = "adapter.onnx.data";
/// Tensors of fewer elements stay inline.
const SMALL: usize = 256;

pub(super) struct Constants {
    data_type: DataType,
    external: Option<ExternalWriter>,
    /// Shared constants that the patch holds already.
    added: BTreeSet<String>,
}

impl Constants {
    pub(super) fn new(adapter: &Adapter, data_type: DataType, folder: &Path) -> Result<Self> {
        let is_large = adapter.num_parameters() > INLINE_LIMIT / 4;
        let external = is_large.then(|| ExternalWriter::create(folder, DATA_NAME)).transpose()?;
        Ok(Self { data_type, external, added: BTreeSet::new() })
    }

    /// A tensor in the graph's type; branches that hold one layer share it.
    pub(super) fn add(&mut self, patch: &mut Patch, name: &str, tensor: &Tensor) -> Result<String> {
        if !self.added.insert(name.to_owned()) {
            return Ok(name.to_owned());
        }
        let bytes = bytes_of(tensor, self.data_type).map_err(Error::Convert)?;
        let dims: Vec<i64> = tensor.dims().iter().map(|d| *d as i64).collect();
        patch.add_initializer(match &mut self.external {
            Some(external) if tensor.elem_count() > SMALL => {
                external.write(name, self.data_type, &dims, |out| out.write_all(&bytes))?
            }
            _ => TensorDef::inline(name, self.data_type, &dims, bytes),
        });
        Ok(name.to_owned())
    }

    /// A number in the graph's type; the same name is added once.
    pub(super) fn number(&mut self, patch: &mut Patch, name: &str, value: f64) -> Result<String> {
        let number = Tensor::new(value, &candle_core::Device::Cpu).map_err(Error::Convert)?;
        self.add(patch, name, &number)
    }

    /// A list of integers; the same name is added once.
    pub(super) fn integers(&mut self, patch: &mut Patch, name: &str, values: &[i64]) -> String {
        if self.added.insert(name.to_owned()) {
            patch.add_initializer(TensorDef::from_i64s(name, &[values.len() as i64], values));
        }
        name.to_owned()
    }

    pub(super) fn finish(self) -> Result<()> {
        if let Some(external) = self.external {
            external.finish()?;
        }
        Ok(())
    }
}

/// Little-endian bytes of a tensor, rounded to `data_type`.
fn bytes_of(tensor: &Tensor, data_type: DataType) -> candle_core::Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match data_type {
        DataType::Double => flat.to_dtype(DType::F64)?.to_vec1::<f64>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DataType::Float16 => {
            flat.to_dtype(DType::F16)?.to_vec1::<half::f16>()?.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        DataType::Bfloat16 => {
            flat.to_dtype(DType::BF16)?.to_vec1::<half::bf16>()?.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        _ => flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
    })
}

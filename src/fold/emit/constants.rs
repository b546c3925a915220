//! What an emission gives nodes to read: the adapter's tensors in the graph's type, and numbers that every adapter shares.
//!
//! A method asks for a tensor by name and value and reads what comes back. How the tensor stands in the graph is decided
//! here and in [`emission`](super::emission), never by a method.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Tensor};

use super::emission::{ADAPTER_IDS, Emission, bank_name};
use crate::fold::{Error, Result};
use crate::onnx::{DataType, NodeDef, NodeId, Patch, TensorDef};

/// A tensor of an adapter as its graph takes it: what is constant for one adapter, computed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) data_type: DataType,
    pub(crate) dims: Vec<i64>,
    /// Little-endian, row-major.
    pub(crate) bytes: Vec<u8>,
    /// The value of every element where no adapter is active, with which the graph is the base graph.
    pub(crate) off: f64,
}

pub(super) struct Constants {
    /// The type of what is added next.
    data_type: DataType,
    /// The type of the first.
    first: DataType,
    emission: Emission,
    parameters: Vec<Parameter>,
    /// Shared constants that the patch holds already.
    added: BTreeSet<String>,
}

impl Constants {
    pub(super) fn new(data_type: DataType, emission: Emission) -> Self {
        Self { data_type, first: data_type, emission, parameters: Vec::new(), added: BTreeSet::new() }
    }

    /// The type that the nodes written next compute in.
    pub(super) fn set_type(&mut self, data_type: DataType) {
        self.data_type = data_type;
    }

    pub(super) fn emission(&self) -> Emission {
        self.emission
    }

    pub(super) fn data_type(&self) -> DataType {
        self.data_type
    }

    /// A tensor of the adapter in the graph's type, and the name to read it by. Where no adapter is active it is zero.
    ///
    /// In a bank it has one more dimension, the rows of the batch, before all others: nodes must take `[batch, …]` wherever
    /// they take `[…]`, by broadcasting over activations that begin with the batch. A vector is given as `[1, n]`.
    pub(super) fn add(&mut self, patch: &mut Patch, name: &str, tensor: &Tensor) -> Result<String> {
        self.add_off(patch, name, tensor, 0.0)
    }

    /// As [`add`](Self::add), with another value where no adapter is active: one for a factor.
    pub(super) fn add_off(&mut self, patch: &mut Patch, name: &str, tensor: &Tensor, off: f64) -> Result<String> {
        let row = format!("{name}/row");
        let is_bank = self.emission == Emission::Bank;
        if self.parameters.iter().all(|parameter| parameter.name != name) {
            let mut dims: Vec<i64> = tensor.dims().iter().map(|d| *d as i64).collect();
            if is_bank {
                while dims.len() < 2 {
                    dims.insert(0, 1);
                }
                let gather = NodeDef::new("Gather", format!("/{}/Gather", name.replace('.', "/"))).attr_int("axis", 0);
                let gather = gather.inputs([bank_name(name), ADAPTER_IDS.to_owned()]).outputs([row.as_str()]);
                patch.insert_before(NodeId(0), gather);
            }
            let data_type = self.data_type;
            let bytes = rounded(name, tensor, data_type)?;
            self.parameters.push(Parameter { name: name.to_owned(), data_type, dims, bytes, off });
        }
        Ok(if is_bank { row } else { name.to_owned() })
    }

    /// A number in the graph's type, the same for every adapter; the same name is added once.
    pub(super) fn number(&mut self, patch: &mut Patch, name: &str, value: f64) -> Result<String> {
        let name = if self.data_type == self.first { name.to_owned() } else { format!("{name}_{}", self.data_type) };
        if self.added.insert(name.clone()) {
            let number = Tensor::new(value, &Device::Cpu).map_err(Error::Convert)?;
            let bytes = bytes_of(&number, self.data_type).map_err(Error::Convert)?;
            patch.add_initializer(TensorDef::inline(name.as_str(), self.data_type, &[], bytes));
        }
        Ok(name)
    }

    /// Whether a node or constant of this name was not written before; it counts as written from now on.
    pub(super) fn is_new(&mut self, name: &str) -> bool {
        self.added.insert(name.to_owned())
    }

    /// A list of integers; the same name is added once.
    pub(super) fn integers(&mut self, patch: &mut Patch, name: &str, values: &[i64]) -> String {
        if self.added.insert(name.to_owned()) {
            patch.add_initializer(TensorDef::from_i64s(name, &[values.len() as i64], values));
        }
        name.to_owned()
    }

    /// One integer; the same name is added once.
    pub(super) fn integer(&mut self, patch: &mut Patch, name: &str, value: i64) -> String {
        if self.added.insert(name.to_owned()) {
            patch.add_initializer(TensorDef::from_i64s(name, &[], &[value]));
        }
        name.to_owned()
    }

    pub(super) fn into_parameters(self) -> Vec<Parameter> {
        self.parameters
    }
}

/// Little-endian bytes of an adapter's tensor, rounded to `data_type`.
///
/// # Errors
/// When a value is too large for that type.
pub(super) fn rounded(name: &str, tensor: &Tensor, data_type: DataType) -> Result<Vec<u8>> {
    let most = match data_type {
        DataType::Float16 => f64::from(half::f16::MAX),
        DataType::Bfloat16 => f64::from(half::bf16::MAX),
        DataType::Double => f64::MAX,
        _ => f64::from(f32::MAX),
    };
    let largest = || match tensor.elem_count() {
        0 => Ok(0.0),
        _ => tensor.flatten_all()?.abs()?.max(0)?.to_dtype(DType::F64)?.to_scalar::<f64>(),
    };
    let value = largest().map_err(Error::Convert)?;
    if value > most {
        return Err(Error::TooLarge { tensor: name.to_owned(), value, data_type: data_type.to_string(), most });
    }
    bytes_of(tensor, data_type).map_err(Error::Convert)
}

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

/// `count` elements of one value.
pub(super) fn filled(data_type: DataType, count: usize, value: f64) -> Result<Vec<u8>> {
    if value == 0.0 {
        let bits = data_type.bits().unwrap_or(32) as usize;
        return Ok(vec![0; count.saturating_mul(bits / 8)]);
    }
    Tensor::full(value, count, &Device::Cpu).and_then(|t| bytes_of(&t, data_type)).map_err(Error::Convert)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_beyond_the_graph_s_type_is_an_error() {
        let tensor = |values: &[f64]| Tensor::new(values, &Device::Cpu).unwrap();
        let largest = tensor(&[65_504.0, -65_504.0]);
        assert_eq!(rounded("M", &largest, DataType::Float16).unwrap(), [0xff, 0x7b, 0xff, 0xfb]);
        let error = rounded("M", &tensor(&[1.0, -7e4]), DataType::Float16).unwrap_err().to_string();
        assert_eq!(error, "`M` has a value of 7.000e4, and float16, in which the graph computes, ends at 6.550e4");
        assert!(rounded("M", &tensor(&[-7e4]), DataType::Bfloat16).is_ok());
        assert!(rounded("M", &tensor(&[1e39]), DataType::Float).is_err());
        assert!(rounded("M", &tensor(&[]), DataType::Float16).unwrap().is_empty());
    }
}

//! How the tensors of an adapter stand in a graph.
//!
//! | emission | tensor `prefold.layers.0.M` is | read as |
//! |---|---|---|
//! | `baked` | an initializer | itself |
//! | `slot` | a graph input whose default, an initializer of its name, is the off value | itself |
//! | `bank` | `prefold.layers.0.M.bank`, an initializer `[adapters + 1, …]`; row 0 is the off value | `Gather` by `adapter_ids[batch]` |
//!
//! The off value is zero, one for factors: with it a graph computes the base model, bit for bit.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::constants::{Parameter, filled};
use crate::fold::{Error, Result};
use crate::onnx::{DataType, Dim, ExternalWriter, Model, Patch, TensorDef, ValueDef, external_files};

/// How an adapter stands in a graph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Emission {
    /// Its tensors are constants of the graph.
    #[default]
    Baked,
    /// Its tensors are graph inputs that default to the base model; values come from an `.onnx_adapter` file.
    Slot,
    /// Several adapters, stacked; the input `adapter_ids[batch]` picks one for each row of the batch, 0 the base model.
    Bank,
}

impl Emission {
    const ALL: [Self; 3] = [Self::Baked, Self::Slot, Self::Bank];

    /// Its name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baked => "baked",
            Self::Slot => "slot",
            Self::Bank => "bank",
        }
    }
}

impl std::fmt::Display for Emission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Emission {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|emission| emission.name() == text);
        found.ok_or_else(|| "it is baked, slot or bank".to_owned())
    }
}

/// The graph input of a bank, `int64[batch]`.
pub const ADAPTER_IDS: &str = "adapter_ids";

/// Tensors together larger than this go into a data file of their own.
pub(super) const INLINE_LIMIT: usize = 64 << 20;
/// Tensors of fewer elements stay inline.
const SMALL: usize = 256;
/// The oldest format version in which an initializer may be the default of an input.
const SLOT_IR_VERSION: i64 = 4;

/// The initializer that holds a tensor of all adapters.
pub(crate) fn bank_name(parameter: &str) -> String {
    format!("{parameter}.bank")
}

/// Puts the parameters of adapters, given in the same order for each, into an edit. A data file, where it takes one, goes to
/// `folder` under a name that `model` does not use.
///
/// # Errors
/// When adapters do not fit into one bank, the graph cannot take inputs with a default, or the file cannot be written.
pub(super) fn emit(
    patch: &mut Patch,
    model: &Model,
    emission: Emission,
    adapters: &[Vec<Parameter>],
    folder: &Path,
) -> Result<()> {
    match emission {
        Emission::Baked => {
            let parameters = adapters.first().cloned().unwrap_or_default();
            write(patch, model, parameters.into_iter(), folder, false)
        }
        Emission::Slot => {
            if model.ir_version() < SLOT_IR_VERSION {
                return Err(Error::OldFormat { found: model.ir_version(), needed: SLOT_IR_VERSION });
            }
            let parameters = padded(adapters)?.first().cloned().unwrap_or_default();
            for parameter in &parameters {
                let dims = parameter.dims.iter().map(|dim| Dim::Value(*dim));
                patch.add_input(ValueDef::new(&parameter.name, parameter.data_type, dims));
            }
            let off = parameters.into_iter().map(off).collect::<Result<Vec<_>>>()?;
            write(patch, model, off.into_iter(), folder, false)
        }
        Emission::Bank => {
            patch.add_input(ValueDef::new(ADAPTER_IDS, DataType::Int64, [batch_dim(model)]));
            write(patch, model, stacked(adapters)?.into_iter(), folder, false)
        }
    }
}

/// The tensors of a bank of these adapters in the place of those that are there.
///
/// # Errors
/// As [`emit`].
pub(crate) fn restack(patch: &mut Patch, model: &Model, adapters: &[Vec<Parameter>], folder: &Path) -> Result<()> {
    write(patch, model, stacked(adapters)?.into_iter(), folder, true)
}

/// The name of the batch dimension of the tokens.
fn batch_dim(model: &Model) -> Dim {
    let ids = model.graph().inputs().iter().find(|input| input.name() == "input_ids");
    match ids.and_then(|ids| ids.shape()).and_then(<[Dim]>::first) {
        Some(dim @ (Dim::Param(_) | Dim::Value(_))) => dim.clone(),
        _ => "batch".into(),
    }
}

/// A parameter that is off.
fn off(parameter: Parameter) -> Result<Parameter> {
    let count = parameter.dims.iter().product::<i64>() as usize;
    Ok(Parameter { bytes: filled(parameter.data_type, count, parameter.off)?, ..parameter })
}

/// The parameters of every adapter, those of a smaller rank filled up with zeros.
///
/// # Errors
/// When adapters have other tensors, or tensors that differ in more than their sizes.
pub(crate) fn padded(adapters: &[Vec<Parameter>]) -> Result<Vec<Vec<Parameter>>> {
    let Some((first, others)) = adapters.split_first() else { return Ok(Vec::new()) };
    for other in others {
        let same = |(a, b): (&Parameter, &Parameter)| {
            a.name == b.name && a.data_type == b.data_type && a.dims.len() == b.dims.len()
        };
        if other.len() != first.len() || !first.iter().zip(other).all(same) {
            let names = |p: &[Parameter]| p.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
            let (a, b) = (names(first), names(other));
            let lacks = a.iter().find(|name| !b.contains(name)).or_else(|| b.iter().find(|name| !a.contains(name)));
            let what = lacks.map_or("a tensor's type".to_owned(), |name| format!("the tensor `{name}`"));
            return Err(Error::AdaptersDiffer { what });
        }
    }
    let sizes = |index: usize| -> Vec<i64> {
        let dims = adapters.iter().filter_map(|adapter| adapter.get(index)).map(|parameter| parameter.dims.clone());
        dims.reduce(|a, b| a.into_iter().zip(b).map(|(a, b)| a.max(b)).collect()).unwrap_or_default()
    };
    let wanted: Vec<Vec<i64>> = (0..first.len()).map(sizes).collect();
    let fill = |adapter: &Vec<Parameter>| {
        adapter.iter().zip(&wanted).map(|(parameter, dims)| enlarged(parameter, dims)).collect()
    };
    Ok(adapters.iter().map(fill).collect())
}

/// A parameter in the corner of a larger one of zeros.
pub(crate) fn enlarged(parameter: &Parameter, dims: &[i64]) -> Parameter {
    if parameter.dims == dims {
        return parameter.clone();
    }
    let width = parameter.data_type.bits().unwrap_or(32) as usize / 8;
    let count: usize = dims.iter().map(|dim| *dim as usize).product();
    let mut bytes = vec![0; count * width];
    let inner = |dims: &[i64]| dims.last().map_or(1, |dim| (*dim).max(1) as usize);
    for (row, values) in parameter.bytes.chunks(inner(&parameter.dims) * width).enumerate() {
        let (mut rest, mut at, mut stride) = (row, 0, inner(dims));
        for (small, large) in parameter.dims.iter().zip(dims).rev().skip(1) {
            let small = (*small).max(1) as usize;
            at += rest % small * stride;
            rest /= small;
            stride *= *large as usize;
        }
        if let Some(place) = bytes.get_mut(at * width..at * width + values.len()) {
            place.copy_from_slice(values);
        }
    }
    Parameter { dims: dims.to_vec(), bytes, ..parameter.clone() }
}

/// `[adapters + 1, …]`, row 0 off.
fn stacked(adapters: &[Vec<Parameter>]) -> Result<Vec<Parameter>> {
    let adapters = padded(adapters)?;
    let Some(first) = adapters.first() else { return Ok(Vec::new()) };
    let bank = |(index, parameter): (usize, &Parameter)| {
        let mut bytes = off(parameter.clone())?.bytes;
        for adapter in &adapters {
            bytes.extend(adapter.get(index).into_iter().flat_map(|p| &p.bytes));
        }
        let dims = [&[adapters.len() as i64 + 1], parameter.dims.as_slice()].concat();
        Ok(Parameter { name: bank_name(&parameter.name), dims, bytes, ..parameter.clone() })
    };
    first.iter().enumerate().map(bank).collect()
}

/// Initializers of the parameters, inline or in a data file of their own.
fn write(
    patch: &mut Patch,
    model: &Model,
    parameters: impl ExactSizeIterator<Item = Parameter> + Clone,
    folder: &Path,
    replace: bool,
) -> Result<()> {
    let is_large = parameters.clone().map(|parameter| parameter.bytes.len()).sum::<usize>() > INLINE_LIMIT;
    let mut external = is_large.then(|| ExternalWriter::create(folder, &data_name(model)?)).transpose()?;
    for Parameter { name, data_type, dims, bytes, .. } in parameters {
        let tensor = match &mut external {
            Some(external) if dims.iter().product::<i64>() > SMALL as i64 => {
                external.write(&name, data_type, &dims, |out| out.write_all(&bytes))?
            }
            _ => TensorDef::inline(name, data_type, &dims, bytes),
        };
        if replace {
            patch.replace_initializer(tensor)
        } else {
            patch.add_initializer(tensor)
        };
    }
    if let Some(external) = external {
        external.finish()?;
    }
    Ok(())
}

/// A data file that the model does not refer to.
pub(super) fn data_name(model: &Model) -> crate::onnx::Result<String> {
    let taken = external_files(model)?;
    let free = (1u32..).map(|count| match count {
        1 => "adapter.onnx.data".to_owned(),
        _ => format!("adapter.{count}.onnx.data"),
    });
    Ok({ free }.find(|name| !taken.contains(name)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter(name: &str, dims: &[i64], values: &[f32]) -> Parameter {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Parameter { name: name.into(), data_type: DataType::Float, dims: dims.into(), bytes, off: 0.0 }
    }

    fn values(parameter: &Parameter) -> Vec<f32> {
        parameter.bytes.as_chunks::<4>().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
    }

    /// A smaller rank lies in the corner of the larger, where zeros add nothing to the product.
    #[test]
    fn a_bank_holds_adapters_of_several_ranks() {
        let small = [parameter("A", &[3, 1], &[1.0, 2.0, 3.0]), parameter("B", &[2, 1, 2], &[4.0, 5.0, 6.0, 7.0])];
        let large = [
            parameter("A", &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            parameter("B", &[2, 2, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),
        ];
        let bank = stacked(&[small.to_vec(), large.to_vec()]).unwrap();
        assert_eq!((bank[0].name.as_str(), bank[0].dims.as_slice()), ("A.bank", &[3, 3, 2][..]));
        assert_eq!(values(&bank[0])[..12], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0]);
        assert_eq!(values(&bank[1])[8..16], [4.0, 5.0, 0.0, 0.0, 6.0, 7.0, 0.0, 0.0]);
        assert_eq!(values(&bank[1])[16..], values(&large[1]));
    }

    #[test]
    fn a_factor_is_off_at_one() {
        let half =
            Parameter { data_type: DataType::Float16, bytes: vec![0; 4], off: 1.0, ..parameter("m", &[1, 2], &[]) };
        assert_eq!(stacked(&[vec![half]]).unwrap()[0].bytes, [0, 0x3c, 0, 0x3c, 0, 0, 0, 0]);
    }

    #[test]
    fn adapters_of_other_tensors_are_named() {
        let one = vec![parameter("A", &[1], &[1.0]), parameter("B", &[1], &[1.0])];
        let error = padded(&[one.clone(), vec![parameter("A", &[1], &[1.0])]]).unwrap_err();
        assert!(error.to_string().contains("the tensor `B`"), "{error}");
        let error = padded(&[one, vec![parameter("A", &[1], &[1.0]), parameter("C", &[1], &[1.0])]]).unwrap_err();
        assert!(error.to_string().contains("the tensor `B`"), "{error}");
    }
}

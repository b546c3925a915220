//! Tensors as a model stores them.

use std::borrow::Cow;
use std::path::Path;

use half::{bf16, f16};

use super::external::ExternalRef;
use super::proto::{entry, sparse, tensor};
use super::wire::{Field, Fields};
use super::{Bytes, DataType, Error, Result};

/// Where a tensor's values are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In the model, as little-endian bytes.
    Raw(Bytes),
    /// In the model, in one of the typed fields (`float_data`, `int64_data`, …).
    Typed,
    /// In a file beside the model.
    External(ExternalRef),
}

/// A constant tensor of a model: an initializer or an attribute. Its values are read on demand.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    name: String,
    dims: Vec<i64>,
    data_type: DataType,
    storage: Storage,
    body: Bytes,
}

impl TensorInfo {
    pub(crate) fn parse(body: &Bytes) -> Result<Self> {
        let mut name = String::new();
        let mut dims = Vec::new();
        let mut code = 0;
        let mut raw = None;
        let mut entries = Vec::new();
        let mut external = false;
        for field in Fields::new(tensor::MESSAGE, body) {
            let field = field?;
            match field.number {
                tensor::NAME => name = field.string()?,
                tensor::DIMS => field.ints(&mut dims)?,
                tensor::DATA_TYPE => code = enum_code(&field)?,
                tensor::RAW_DATA => raw = Some(field.bytes()?.clone()),
                tensor::EXTERNAL_DATA => entries.push(parse_entry(field.bytes()?)?),
                tensor::DATA_LOCATION => external = field.int()? == tensor::LOCATION_EXTERNAL,
                _ => {}
            }
        }
        let storage = match raw {
            _ if external => Storage::External(ExternalRef::from_entries(&name, &entries)?),
            Some(raw) => Storage::Raw(raw),
            None => Storage::Typed,
        };
        Ok(Self { name, dims, data_type: DataType::from_code(code), storage, body: body.clone() })
    }

    /// The tensor's name; empty for the tensor of an attribute.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The dimensions; none of them for a scalar.
    pub fn dims(&self) -> &[i64] {
        &self.dims
    }

    /// The element type.
    pub fn data_type(&self) -> DataType {
        self.data_type
    }

    /// Where the values are.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The file beside the model that holds the values, if they are in one.
    pub fn external(&self) -> Option<&ExternalRef> {
        match &self.storage {
            Storage::External(external) => Some(external),
            Storage::Raw(_) | Storage::Typed => None,
        }
    }

    /// Bytes that the values take; none when the type has no fixed size or the dimensions make no sense.
    pub fn byte_len(&self) -> Option<u64> {
        self.data_type.byte_len(&self.dims)
    }

    /// The values, which must be in the model itself.
    ///
    /// # Errors
    /// When they lie in another file ([`data_in`](Self::data_in) reads those), or have not the size that type and
    /// dimensions say.
    pub fn data(&self) -> Result<TensorData<'_>> {
        let bytes = match &self.storage {
            Storage::Raw(raw) => Cow::Borrowed(&**raw),
            Storage::Typed => Cow::Owned(self.typed_bytes()?),
            Storage::External(external) => {
                let location = external.location.clone();
                return Err(Error::IsExternal { tensor: self.name.clone(), location });
            }
        };
        self.checked(bytes)
    }

    /// The values, wherever they are; `folder` is the model's.
    ///
    /// # Errors
    /// When a data file is missing, too short, or outside of `folder`; and as for [`data`](Self::data).
    pub fn data_in(&self, folder: &Path) -> Result<TensorData<'_>> {
        let Storage::External(external) = &self.storage else { return self.data() };
        let length = self.byte_len().ok_or_else(|| self.size_error(0))?;
        self.checked(Cow::Owned(external.read(&self.name, length, folder)?))
    }

    /// Integers of any width, in the model itself.
    ///
    /// # Errors
    /// As [`data`](Self::data) and [`TensorData::to_i64s`].
    pub fn to_i64s(&self) -> Result<Vec<i64>> {
        self.data()?.to_i64s()
    }

    /// Floats of any width, in the model itself.
    ///
    /// # Errors
    /// As [`data`](Self::data) and [`TensorData::to_f32s`].
    pub fn to_f32s(&self) -> Result<Vec<f32>> {
        self.data()?.to_f32s()
    }

    fn checked<'a>(&'a self, bytes: Cow<'a, [u8]>) -> Result<TensorData<'a>> {
        if self.byte_len() != Some(bytes.len() as u64) {
            return Err(self.size_error(bytes.len() as u64));
        }
        Ok(TensorData { tensor: self, bytes })
    }

    fn size_error(&self, found: u64) -> Error {
        Error::TensorSize {
            tensor: self.name.clone(),
            data_type: self.data_type,
            dims: self.dims.clone(),
            found,
            expected: self.byte_len(),
        }
    }

    /// The typed fields as the little-endian bytes that `raw_data` would hold. Types of up to 32 bits, floats excepted,
    /// share `int32_data`; `uint64_data` also holds `uint32`.
    fn typed_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut integers = Vec::new();
        for field in Fields::new(tensor::MESSAGE, &self.body) {
            let field = field?;
            match field.number {
                tensor::FLOAT_DATA => field.fixed32s(&mut bytes)?,
                tensor::DOUBLE_DATA => field.fixed64s(&mut bytes)?,
                tensor::INT32_DATA | tensor::INT64_DATA | tensor::UINT64_DATA => field.ints(&mut integers)?,
                _ => {}
            }
        }
        // Two's complement: the low bytes of a sign-extended integer are the narrower integer.
        let width = self.data_type.bits().unwrap_or(0).div_ceil(8).min(8) as usize;
        for integer in integers {
            bytes.extend(integer.to_le_bytes().iter().take(width));
        }
        Ok(bytes)
    }
}

/// The values of a tensor, of the size that its type and dimensions say.
#[derive(Clone, Debug)]
pub struct TensorData<'a> {
    tensor: &'a TensorInfo,
    bytes: Cow<'a, [u8]>,
}

impl TensorData<'_> {
    /// Little-endian bytes, row-major.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Integers and booleans as 64-bit integers.
    ///
    /// # Errors
    /// When the tensor is not of an integer type of whole bytes, or a value does not fit.
    pub fn to_i64s(&self) -> Result<Vec<i64>> {
        Ok(match self.tensor.data_type {
            DataType::Bool | DataType::Uint8 => self.map(|b: [u8; 1]| u8::from_le_bytes(b).into()),
            DataType::Int8 => self.map(|b| i8::from_le_bytes(b).into()),
            DataType::Uint16 => self.map(|b| u16::from_le_bytes(b).into()),
            DataType::Int16 => self.map(|b| i16::from_le_bytes(b).into()),
            DataType::Uint32 => self.map(|b| u32::from_le_bytes(b).into()),
            DataType::Int32 => self.map(|b| i32::from_le_bytes(b).into()),
            DataType::Int64 => self.map(i64::from_le_bytes),
            DataType::Uint64 => {
                let values = self.map(|b| i64::try_from(u64::from_le_bytes(b)).ok()).into_iter();
                values.collect::<Option<_>>().ok_or_else(|| self.type_error("64-bit signed integers"))?
            }
            _ => return Err(self.type_error("integers")),
        })
    }

    /// Floats of 16, 32 or 64 bits as 32-bit floats (doubles are rounded).
    ///
    /// # Errors
    /// When the tensor is not of one of these types.
    pub fn to_f32s(&self) -> Result<Vec<f32>> {
        Ok(match self.tensor.data_type {
            DataType::Float => self.map(f32::from_le_bytes),
            DataType::Float16 => self.map(|b| f16::from_le_bytes(b).to_f32()),
            DataType::Bfloat16 => self.map(|b| bf16::from_le_bytes(b).to_f32()),
            DataType::Double => self.map(|b| f64::from_le_bytes(b) as f32),
            _ => return Err(self.type_error("floats")),
        })
    }

    fn map<const N: usize, T>(&self, value: impl Fn([u8; N]) -> T) -> Vec<T> {
        self.bytes.as_chunks::<N>().0.iter().map(|&chunk| value(chunk)).collect()
    }

    fn type_error(&self, wanted: &'static str) -> Error {
        Error::ValueType { tensor: self.tensor.name.clone(), found: self.tensor.data_type, wanted }
    }
}

/// A sparse tensor: values and the positions they stand at.
#[derive(Clone, Debug)]
pub struct SparseTensor {
    /// The non-zero values; its name is the sparse tensor's.
    pub values: TensorInfo,
    /// Their positions.
    pub indices: TensorInfo,
    /// Dimensions of the dense tensor.
    pub dims: Vec<i64>,
}

impl SparseTensor {
    pub(crate) fn parse(body: &Bytes) -> Result<Self> {
        let mut values = Bytes::from(Vec::new());
        let mut indices = values.clone();
        let mut dims = Vec::new();
        for field in Fields::new(sparse::MESSAGE, body) {
            let field = field?;
            match field.number {
                sparse::VALUES => values = field.bytes()?.clone(),
                sparse::INDICES => indices = field.bytes()?.clone(),
                sparse::DIMS => field.ints(&mut dims)?,
                _ => {}
            }
        }
        Ok(Self { values: TensorInfo::parse(&values)?, indices: TensorInfo::parse(&indices)?, dims })
    }
}

/// A 32-bit enum; protobuf keeps the low bits of what does not fit.
pub(crate) fn enum_code(field: &Field) -> Result<i32> {
    Ok(field.int()? as i32)
}

/// A `StringStringEntryProto`.
pub(crate) fn parse_entry(body: &Bytes) -> Result<(String, String)> {
    let (mut key, mut value) = (String::new(), String::new());
    for field in Fields::new(entry::MESSAGE, body) {
        let field = field?;
        match field.number {
            entry::KEY => key = field.string()?,
            entry::VALUE => value = field.string()?,
            _ => {}
        }
    }
    Ok((key, value))
}

#[cfg(test)]
mod tests {
    use super::super::wire::Encoder;
    use super::*;

    fn tensor_of(data_type: DataType, dims: &[i64], fill: impl FnOnce(&mut Encoder)) -> TensorInfo {
        let mut encoder = Encoder::default();
        for &dim in dims {
            encoder.int(tensor::DIMS, dim);
        }
        encoder.int(tensor::DATA_TYPE, data_type.code().into());
        encoder.string(tensor::NAME, "t");
        fill(&mut encoder);
        TensorInfo::parse(&encoder.into_bytes().into()).unwrap()
    }

    #[test]
    fn typed_fields_and_raw_bytes_read_alike() {
        let typed =
            tensor_of(DataType::Int8, &[3], |e| [-1, 2, -128].iter().for_each(|&i| e.int(tensor::INT32_DATA, i)));
        let raw = tensor_of(DataType::Int8, &[3], |e| e.bytes(tensor::RAW_DATA, &[0xff, 2, 0x80]));
        assert_eq!(typed.to_i64s().unwrap(), [-1, 2, -128]);
        assert_eq!(raw.to_i64s().unwrap(), [-1, 2, -128]);
        assert_eq!((typed.storage(), typed.data().unwrap().bytes()), (&Storage::Typed, raw.data().unwrap().bytes()));

        let floats =
            tensor_of(DataType::Float, &[2], |e| [0.5, -3.0].iter().for_each(|&f| e.float(tensor::FLOAT_DATA, f)));
        assert_eq!(floats.to_f32s().unwrap(), [0.5, -3.0]);
        // 0x3c00 is 1.0 in binary16, 0x3f80 in bfloat16; the typed field holds the bits.
        let halves = tensor_of(DataType::Float16, &[], |e| e.int(tensor::INT32_DATA, 0x3c00));
        let brains = tensor_of(DataType::Bfloat16, &[], |e| e.bytes(tensor::RAW_DATA, &[0x80, 0x3f]));
        assert_eq!((halves.to_f32s().unwrap(), brains.to_f32s().unwrap()), (vec![1.0], vec![1.0]));
    }

    #[test]
    fn size_and_type_are_checked() {
        let short = tensor_of(DataType::Float, &[2], |e| e.bytes(tensor::RAW_DATA, &[0; 4]));
        assert!(matches!(short.to_f32s(), Err(Error::TensorSize { found: 4, expected: Some(8), .. })));
        let negative = tensor_of(DataType::Float, &[-1], |e| e.bytes(tensor::RAW_DATA, &[0; 4]));
        assert!(matches!(negative.to_f32s(), Err(Error::TensorSize { expected: None, .. })));
        let text = tensor_of(DataType::Float, &[1], |e| e.bytes(tensor::RAW_DATA, &[0; 4]));
        assert!(matches!(text.to_i64s(), Err(Error::ValueType { .. })));
        let large = tensor_of(DataType::Uint64, &[1], |e| e.bytes(tensor::RAW_DATA, &[0xff; 8]));
        assert!(matches!(large.to_i64s(), Err(Error::ValueType { .. })));
    }
}

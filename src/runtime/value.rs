//! Tensors in host memory, by element type, and named sets of them.

use std::path::Path;

use half::{bf16, f16};
use ndarray::ArrayD;

use super::{Error, Result};
use crate::files::MappedFile;

macro_rules! values {
    ($($(#[$doc:meta])* $variant:ident $type:ty, $name:literal, $onnx:literal, $safetensors:ident;)*) => {
        /// An element type.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum DType { $($(#[$doc])* $variant,)* }

        /// A tensor in host memory, row-major.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Value { $($(#[$doc])* $variant(ArrayD<$type>),)* }

        impl DType {
            const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The type's short name: `f32`, `i64`, ….
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The type's number in ONNX's `TensorProto.DataType`.
            pub fn onnx(self) -> i32 {
                match self { $(Self::$variant => $onnx,)* }
            }

            fn safetensors(self) -> safetensors::Dtype {
                match self { $(Self::$variant => safetensors::Dtype::$safetensors,)* }
            }
        }

        impl Value {
            /// The element type.
            pub fn dtype(&self) -> DType {
                match self { $(Self::$variant(_) => DType::$variant,)* }
            }

            /// The dimensions.
            pub fn shape(&self) -> &[usize] {
                match self { $(Self::$variant(array) => array.shape(),)* }
            }

            /// A tensor without elements or with all of them zero.
            ///
            /// # Errors
            /// When the shape holds more elements than memory can address.
            pub fn zeros(dtype: DType, shape: &[usize]) -> Result<Self> {
                checked_len(shape)?;
                Ok(match dtype {
                    $(DType::$variant => Self::$variant(ArrayD::from_elem(shape, <$type>::default())),)*
                })
            }

            pub(super) fn from_le_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Self> {
                match dtype {
                    $(DType::$variant => {
                        let data = bytes.chunks_exact(size_of::<$type>()).map(<$type>::read_le).collect();
                        Ok(Self::$variant(ArrayD::from_shape_vec(shape, data).map_err(shape_error)?))
                    })*
                }
            }

            /// The elements as little-endian bytes, row-major.
            pub fn to_le_bytes(&self) -> Vec<u8> {
                let mut bytes = Vec::new();
                match self {
                    $(Self::$variant(array) => array.iter().for_each(|element| element.append_le(&mut bytes)),)*
                }
                bytes
            }
        }

        $(impl From<ArrayD<$type>> for Value {
            fn from(array: ArrayD<$type>) -> Self {
                Self::$variant(array)
            }
        })*
    };
}

values! {
    /// 64-bit float.
    F64 f64, "f64", 11, F64;
    /// 32-bit float.
    F32 f32, "f32", 1, F32;
    /// IEEE half precision.
    F16 f16, "f16", 10, F16;
    /// bfloat16.
    Bf16 bf16, "bf16", 16, BF16;
    /// 64-bit signed integer.
    I64 i64, "i64", 7, I64;
    /// 32-bit signed integer.
    I32 i32, "i32", 6, I32;
    /// 8-bit signed integer.
    I8 i8, "i8", 3, I8;
    /// 8-bit unsigned integer.
    U8 u8, "u8", 2, U8;
    /// Truth value.
    Bool bool, "bool", 9, BOOL;
}

/// Reading and writing one element in safetensors' byte order.
trait LittleEndian: Sized {
    fn read_le(bytes: &[u8]) -> Self;
    fn append_le(&self, to: &mut Vec<u8>);
}

macro_rules! little_endian {
    ($($type:ty),*) => {$(
        impl LittleEndian for $type {
            fn read_le(bytes: &[u8]) -> Self {
                // The callers' chunks have exactly this size; anything else reads as zero.
                Self::from_le_bytes(bytes.try_into().unwrap_or_default())
            }
            fn append_le(&self, to: &mut Vec<u8>) {
                to.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}

little_endian!(f64, f32, f16, bf16, i64, i32, i8, u8);

impl LittleEndian for bool {
    fn read_le(bytes: &[u8]) -> Self {
        bytes.iter().any(|byte| *byte != 0)
    }

    fn append_le(&self, to: &mut Vec<u8>) {
        to.push(u8::from(*self));
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl DType {
    /// The type with a number of ONNX's `TensorProto.DataType`, if it is one that prefold feeds to a runtime.
    pub fn from_onnx(number: i32) -> Option<Self> {
        Self::ALL.iter().copied().find(|dtype| dtype.onnx() == number)
    }

    /// Whether it is a floating-point type.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::Bf16)
    }
}

impl Value {
    /// The elements as f32, which for f64 rounds.
    ///
    /// # Errors
    /// When the elements are not floating-point numbers.
    pub fn into_f32(self) -> Result<ArrayD<f32>> {
        match self {
            Self::F32(array) => Ok(array),
            Self::F64(array) => Ok(array.mapv(|x| x as f32)),
            Self::F16(array) => Ok(array.mapv(f16::to_f32)),
            Self::Bf16(array) => Ok(array.mapv(bf16::to_f32)),
            other => Err(Error::NotFloat { dtype: other.dtype() }),
        }
    }

    /// The elements as f64, exactly.
    ///
    /// # Errors
    /// When the elements are not floating-point numbers.
    pub fn into_f64(self) -> Result<ArrayD<f64>> {
        match self {
            Self::F64(array) => Ok(array),
            other => Ok(other.into_f32()?.mapv(f64::from)),
        }
    }

    /// Integer elements as i64.
    ///
    /// # Errors
    /// When the elements are not integers.
    pub fn into_i64(self) -> Result<ArrayD<i64>> {
        match self {
            Self::I64(array) => Ok(array),
            Self::I32(array) => Ok(array.mapv(i64::from)),
            Self::I8(array) => Ok(array.mapv(i64::from)),
            Self::U8(array) => Ok(array.mapv(i64::from)),
            Self::Bool(array) => Ok(array.mapv(i64::from)),
            other => Err(Error::NotInteger { dtype: other.dtype() }),
        }
    }
}

fn checked_len(shape: &[usize]) -> Result<usize> {
    let len = shape.iter().try_fold(1usize, |len, dim| len.checked_mul(*dim));
    // Elements take at most 8 bytes, and an allocation at most isize::MAX of them.
    len.filter(|len| *len <= isize::MAX as usize / 8)
        .ok_or_else(|| Error::Shape { reason: format!("{shape:?} has too many elements") })
}

fn shape_error(error: ndarray::ShapeError) -> Error {
    Error::Shape { reason: error.to_string() }
}

/// Tensors by name, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NamedValues(Vec<(String, Value)>);

impl NamedValues {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a tensor under a name, at the end or in the place of the one that had the name.
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        let (name, value) = (name.into(), value.into());
        match self.0.iter_mut().find(|(existing, _)| *existing == name) {
            Some((_, slot)) => *slot = value,
            None => self.0.push((name, value)),
        }
    }

    /// The same set with one more tensor.
    pub fn with(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.insert(name, value);
        self
    }

    /// The tensor of a name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(existing, _)| existing == name).map(|(_, value)| value)
    }

    /// Takes the tensor of a name out.
    ///
    /// # Errors
    /// When there is none; the names that there are are listed.
    pub fn take(&mut self, name: &str) -> Result<Value> {
        match self.0.iter().position(|(existing, _)| existing == name) {
            Some(index) => Ok(self.0.remove(index).1),
            None => Err(Error::NoValue { name: name.into(), present: self.names().map(Into::into).collect() }),
        }
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// The tensors with their names, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads every tensor of a safetensors file, in the file's order.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, or holds an element type that no runtime takes.
    pub fn load(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let failed = |reason: String| Error::Safetensors { action: "read", path: path.into(), reason };
        let (_, metadata) =
            safetensors::SafeTensors::read_metadata(file.bytes()).map_err(|error| failed(error.to_string()))?;
        let tensors = safetensors::SafeTensors::deserialize(file.bytes()).map_err(|error| failed(error.to_string()))?;
        let mut values = Self::new();
        for name in metadata.offset_keys() {
            let view = tensors.tensor(&name).map_err(|error| failed(error.to_string()))?;
            let dtype = DType::ALL.iter().copied().find(|dtype| dtype.safetensors() == view.dtype());
            let dtype = dtype.ok_or_else(|| failed(format!("{name} has elements of type {:?}", view.dtype())))?;
            values.insert(name, Value::from_le_bytes(dtype, view.shape(), view.data())?);
        }
        Ok(values)
    }

    /// Writes the tensors as a safetensors file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = |error: safetensors::SafeTensorError| Error::Safetensors {
            action: "write",
            path: path.into(),
            reason: error.to_string(),
        };
        let bytes: Vec<Vec<u8>> = self.0.iter().map(|(_, value)| value.to_le_bytes()).collect();
        let views = self.0.iter().zip(&bytes).map(|((name, value), bytes)| {
            let view = safetensors::tensor::TensorView::new(value.dtype().safetensors(), value.shape().into(), bytes);
            Ok((name.as_str(), view.map_err(failed)?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        safetensors::serialize_to_file(views, None, path).map_err(failed)
    }
}

impl IntoIterator for NamedValues {
    type Item = (String, Value);
    type IntoIter = std::vec::IntoIter<(String, Value)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl FromIterator<(String, Value)> for NamedValues {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(values: I) -> Self {
        let mut named = Self::new();
        for (name, value) in values {
            named.insert(name, value);
        }
        named
    }
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;

    #[test]
    fn every_type_survives_a_safetensors_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("all.safetensors");
        let mut values = NamedValues::new();
        values.insert("bool", arr2(&[[true, false]]).into_dyn());
        values.insert("f16", arr2(&[[f16::from_f32(1.5)], [f16::NEG_INFINITY]]).into_dyn());
        values.insert("bf16", arr2(&[[bf16::from_f32(-2.0)]]).into_dyn());
        values.insert("f32", arr2(&[[1.5f32, -0.0, f32::MAX]]).into_dyn());
        values.insert("f64", ndarray::arr0(std::f64::consts::PI).into_dyn());
        values.insert("i64", arr2(&[[i64::MIN, 7]]).into_dyn());
        values.insert("i32", arr2(&[[-3i32]]).into_dyn());
        values.insert("i8", arr2(&[[-128i8]]).into_dyn());
        values.insert("u8", arr2(&[[255u8]]).into_dyn());
        values.insert("empty", Value::zeros(DType::F32, &[1, 2, 0, 16]).unwrap());
        values.save(&path).unwrap();
        let read = NamedValues::load(&path).unwrap();
        assert_eq!(read.len(), values.len());
        for (name, value) in values.iter() {
            assert_eq!(read.get(name), Some(value), "{name}");
        }
    }

    #[test]
    fn a_damaged_safetensors_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.safetensors");
        NamedValues::new().with("x", arr2(&[[1f32, 2.0]]).into_dyn()).save(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, 7, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(matches!(NamedValues::load(&path), Err(Error::Safetensors { .. })), "{len} bytes");
        }
        assert!(matches!(NamedValues::load(folder.path()), Err(Error::Files(_))));
    }

    #[test]
    fn a_transposed_tensor_is_written_row_major() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let transposed = arr2(&[[1i64, 2], [3, 4]]).reversed_axes().into_dyn();
        NamedValues::new().with("t", transposed).save(&path).unwrap();
        let read = NamedValues::load(&path).unwrap().take("t").unwrap().into_i64().unwrap();
        assert_eq!(read, arr2(&[[1i64, 3], [2, 4]]).into_dyn());
    }

    #[test]
    fn conversions_refuse_the_wrong_kind() {
        let float = Value::zeros(DType::F16, &[1]).unwrap();
        let integer = Value::zeros(DType::I32, &[1]).unwrap();
        assert!(float.clone().into_f64().is_ok() && integer.clone().into_i64().is_ok());
        assert!(matches!(float.into_i64(), Err(Error::NotInteger { .. })));
        assert!(matches!(integer.into_f32(), Err(Error::NotFloat { .. })));
        assert!(matches!(Value::zeros(DType::F32, &[usize::MAX, 2]), Err(Error::Shape { .. })));
    }

    #[test]
    fn a_missing_name_lists_those_present() {
        let error = NamedValues::new().with("a", Value::zeros(DType::F32, &[]).unwrap()).take("b").unwrap_err();
        assert_eq!(error.to_string(), "there is no tensor `b`, only: a");
    }
}

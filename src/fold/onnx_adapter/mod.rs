//! `.onnx_adapter` files: values for inputs of a graph, in the format of ONNX Runtime's adapter API, which binds them at a run.
//!
//! A flatbuffer with the identifier `TORT`:
//! ```text
//! table Parameter { name: string; dims: [int64]; data_type: int32 (TensorProto.DataType); raw_data: [ubyte] (aligned 8); }
//! table Adapter { format_version: int32; adapter_version: int32; model_version: int32; parameters: [Parameter]; }
//! ```

mod flatbuffer;

use std::path::Path;

use super::{Error, Result};
use crate::files::{self, MappedFile};
use crate::onnx::DataType;

/// The extension of such files.
pub const ADAPTER_EXTENSION: &str = "onnx_adapter";

/// The only version of the format that there is.
const FORMAT_VERSION: i32 = 1;

/// What an `.onnx_adapter` file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterFile {
    /// The version of the adapter, as its maker counts.
    pub adapter_version: i32,
    /// The version of the model that it is for, as its maker counts.
    pub model_version: i32,
    /// The values, in file order.
    pub parameters: Vec<AdapterParameter>,
}

/// A value for one input of a graph.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterParameter {
    /// The input's name.
    pub name: String,
    /// The type of the elements.
    pub data_type: DataType,
    /// The shape.
    pub dims: Vec<i64>,
    /// Little-endian bytes, row-major.
    pub bytes: Vec<u8>,
}

impl AdapterFile {
    /// Reads a file. Nothing in it is trusted.
    ///
    /// # Errors
    /// When it cannot be read, is not such a file, or a value has not the size of its type and shape.
    pub fn open(path: &Path) -> Result<Self> {
        let map = MappedFile::open(path)?;
        Self::from_bytes(map.bytes()).map_err(|why| Error::AdapterFile { path: path.into(), why })
    }

    /// As [`open`](Self::open), from memory.
    ///
    /// # Errors
    /// The reason as text.
    pub fn from_bytes(bytes: &[u8]) -> std::result::Result<Self, String> {
        let (format, file) = flatbuffer::read(bytes)?;
        if format != FORMAT_VERSION {
            return Err(format!("it is of version {format} of the format, and {FORMAT_VERSION} is the one known"));
        }
        let mut names = std::collections::HashSet::new();
        for AdapterParameter { name, data_type, dims, bytes } in &file.parameters {
            if !names.insert(name) {
                return Err(format!("it gives `{name}` two values"));
            }
            let (found, expected) = (bytes.len() as u64, data_type.byte_len(dims));
            if expected != Some(found) {
                return Err(format!("`{name}` has {found} bytes, which is no {data_type} of shape {dims:?}"));
            }
        }
        Ok(file)
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        flatbuffer::write(FORMAT_VERSION, self)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.to_bytes()).map_err(files::Error::io("write", path))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> AdapterFile {
        let parameter = |name: &str, data_type: DataType, dims: &[i64], bytes: Vec<u8>| AdapterParameter {
            name: name.into(),
            data_type,
            dims: dims.into(),
            bytes,
        };
        AdapterFile {
            adapter_version: 3,
            model_version: 7,
            parameters: vec![
                parameter("p", DataType::Float, &[2, 3], (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect()),
                parameter("ein längerer Name", DataType::Float16, &[3], vec![0, 0, 0, 0x3c, 0, 0x40]),
                parameter("empty", DataType::Bfloat16, &[0, 4], vec![]),
                parameter("scalar", DataType::Double, &[], 1.5f64.to_le_bytes().into()),
            ],
        }
    }

    #[test]
    fn what_is_written_is_read_and_aligned() {
        let file = sample();
        let bytes = file.to_bytes();
        assert_eq!(&bytes[4..8], b"TORT");
        assert_eq!(AdapterFile::from_bytes(&bytes).unwrap(), file);
        for parameter in file.parameters.iter().filter(|p| p.bytes.len() > 7) {
            let at = bytes.windows(parameter.bytes.len()).position(|window| window == parameter.bytes).unwrap();
            assert_eq!(at % 8, 0, "{}", parameter.name);
        }
    }

    /// Written by `onnxruntime.AdapterFormat.export_adapter` of ONNX Runtime 1.31: p = [[0, 1, 2], [3, 4, 5]] in float32,
    /// q = [0, 1, 2] in float16, adapter version 3, model version 7.
    #[test]
    fn a_file_of_onnx_runtime_is_read() {
        let file = AdapterFile::from_bytes(include_bytes!("../../../fixtures/onnx_adapter/onnxruntime.onnx_adapter"));
        let mut file = file.unwrap();
        file.parameters.sort_by(|a, b| a.name.cmp(&b.name));
        let [p, q] = &file.parameters[..] else { panic!("{file:?}") };
        assert_eq!((file.adapter_version, file.model_version), (3, 7));
        assert_eq!((p.name.as_str(), p.data_type, p.dims.as_slice()), ("p", DataType::Float, &[2, 3][..]));
        assert_eq!((q.name.as_str(), q.data_type, q.dims.as_slice()), ("q", DataType::Float16, &[3][..]));
        assert_eq!(p.bytes, (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<_>>());
        assert_eq!(q.bytes, [0, 0, 0, 0x3c, 0, 0x40]);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let refused = |change: fn(&mut AdapterFile)| {
            let mut file = sample();
            change(&mut file);
            AdapterFile::from_bytes(&file.to_bytes()).unwrap_err()
        };
        let errors = [
            refused(|file| file.parameters[0].dims = vec![2, 4]),
            refused(|file| file.parameters[0].dims = vec![-2, -3]),
            refused(|file| file.parameters[0].dims = vec![i64::MAX, i64::MAX]),
            refused(|file| file.parameters[1].name = "p".into()),
            refused(|file| file.parameters[3].data_type = DataType::String),
            refused(|file| file.parameters[3].data_type = DataType::Other(-5)),
            AdapterFile::from_bytes(&flatbuffer::write(2, &sample())).unwrap_err(),
            AdapterFile::from_bytes(b"not a flatbuffer at all").unwrap_err(),
            AdapterFile::from_bytes(b"").unwrap_err(),
        ];
        insta::assert_snapshot!(errors.join("\n"), @"
        `p` has 24 bytes, which is no float of shape [2, 4]
        `p` has 24 bytes, which is no float of shape [-2, -3]
        `p` has 24 bytes, which is no float of shape [9223372036854775807, 9223372036854775807]
        it gives `p` two values
        `scalar` has 8 bytes, which is no string of shape []
        `scalar` has 8 bytes, which is no type#-5 of shape []
        it is of version 2 of the format, and 1 is the one known
        it does not begin as such a file does (identifier TORT)
        it does not begin as such a file does (identifier TORT)
        ");
    }

    proptest! {
        /// Cut, flipped or overwritten anywhere: an error or another file, and no panic.
        #[test]
        fn hostile_files_are_refused(at in 0usize..400, value in any::<u8>(), cut in 0usize..400) {
            let mut bytes = sample().to_bytes();
            let cut = cut.min(bytes.len());
            let _ = AdapterFile::from_bytes(&bytes[..cut]);
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = AdapterFile::from_bytes(&bytes);
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 8..200)) {
            bytes[4..8].copy_from_slice(b"TORT");
            let _ = AdapterFile::from_bytes(&bytes);
        }
    }
}

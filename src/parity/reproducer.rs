//! A few nodes of a graph with what they are fed and what they should give, in the layout of `onnx`'s backend tests:
//! ```text
//! model.onnx
//! test_data_set_0/input_0.pb, input_1.pb, …, output_0.pb, …
//! ```

use std::path::Path;

use super::Result;
use crate::files::Error as FileError;
use crate::onnx::{DataType, MODEL_NAME, Model, TensorDef};
use crate::runtime::{NamedValues, Value};

/// The folder of inputs and outputs.
const DATA_SET: &str = "test_data_set_0";

/// Writes a reproducer into `folder`, which is made. Inputs are in the order of the model's, as the outputs that should come are.
///
/// # Errors
/// When a file cannot be written.
pub(super) fn write(folder: &Path, model: &Model, feeds: &NamedValues, outputs: &NamedValues) -> Result<()> {
    let data = folder.join(DATA_SET);
    if data.exists() {
        std::fs::remove_dir_all(&data).map_err(FileError::io("remove", &data))?;
    }
    std::fs::create_dir_all(&data).map_err(FileError::io("create folder", &data))?;
    model.save(&folder.join(MODEL_NAME))?;
    for (kind, values) in [("input", feeds), ("output", outputs)] {
        for (number, (name, value)) in values.iter().enumerate() {
            let path = data.join(format!("{kind}_{number}.pb"));
            std::fs::write(&path, tensor(name, value).to_bytes()?).map_err(FileError::io("write", &path))?;
        }
    }
    Ok(())
}

fn tensor(name: &str, value: &Value) -> TensorDef {
    let dims: Vec<i64> = value.shape().iter().map(|size| *size as i64).collect();
    TensorDef::inline(name, DataType::from_code(value.dtype().onnx()), &dims, value.to_le_bytes())
}

//! Models that outgrow one protobuf file: their tensors move to a data file beside it.
//!
//! Protobuf counts lengths in signed 32-bit numbers. A model that an edit makes larger is saved with its large initializers
//! as external data; everything else of it keeps its bytes.

use std::io::Write;
use std::path::Path;

use super::def::encode_entry;
use super::external::ExternalWriter;
use super::model::{Model, stage};
use super::proto::{graph, tensor};
use super::wire::{Encoder, Field, Fields};
use super::{Error, ExternalRef, Graph, Result, Storage, TensorInfo, external_files};
use crate::files;

/// Initializers of fewer bytes stay in the model, as the `onnx` package's own threshold wants.
const SMALL: u64 = 1024;

/// The model with its large initializers in a data file beside `path`, which is written; what it takes then is at most
/// `limit` bytes.
pub(super) fn externalize(model: &Model, path: &Path, limit: u64) -> Result<Model> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = free_name(model, path)?;
    let staged = stage(folder).map_err(files::Error::io("create a file in", folder))?;
    let target = folder.join(&name);
    let mut writer = ExternalWriter::into_file(staged.as_file(), &target, &name)?;
    let mut initializers = model.graph().initializers().iter();
    let mut fields = Vec::with_capacity(model.graph().fields().len());
    for field in model.graph().fields() {
        let existing = if field.number == graph::INITIALIZER { initializers.next() } else { None };
        fields.push(match existing.filter(|tensor| moves(tensor)) {
            Some(tensor) => moved(field, tensor, &mut writer)?,
            None => field.clone(),
        });
    }
    writer.finish()?;
    let smaller = model.rebuilt(model.fields().to_vec(), Some(Graph::from_fields(fields, 0)?))?;
    match smaller.encoded_len() {
        bytes if bytes > limit => Err(Error::TooLarge { bytes }),
        _ => {
            staged.persist(&target).map_err(|error| files::Error::io("write", &target)(error.error))?;
            Ok(smaller)
        }
    }
}

fn moves(tensor: &TensorInfo) -> bool {
    !matches!(tensor.storage(), Storage::External(_)) && tensor.byte_len().is_some_and(|bytes| bytes >= SMALL)
}

/// The tensor's field without its values, which go to the data file.
fn moved(field: &Field, tensor: &TensorInfo, writer: &mut ExternalWriter) -> Result<Field> {
    let written = {
        let data = tensor.data()?;
        let put = |out: &mut dyn Write| out.write_all(data.bytes());
        writer.place(tensor.name(), tensor.data_type(), tensor.dims(), put)?
    };
    let mut encoder = Encoder::default();
    for part in Fields::new(tensor::MESSAGE, field.bytes()?) {
        let part = part?;
        let is_value = [
            tensor::RAW_DATA,
            tensor::FLOAT_DATA,
            tensor::INT32_DATA,
            tensor::INT64_DATA,
            tensor::DOUBLE_DATA,
            tensor::UINT64_DATA,
            tensor::EXTERNAL_DATA,
            tensor::DATA_LOCATION,
        ]
        .contains(&part.number);
        if !is_value {
            encoder.raw(&part);
        }
    }
    encode_external(&written, &mut encoder);
    let mut wrapped = Encoder::default();
    wrapped.message(graph::INITIALIZER, &encoder);
    Field::of(graph::MESSAGE, wrapped)
}

fn encode_external(external: &ExternalRef, encoder: &mut Encoder) {
    for (key, value) in external.entries() {
        encoder.message(tensor::EXTERNAL_DATA, &encode_entry(key, &value));
    }
    encoder.int(tensor::DATA_LOCATION, tensor::LOCATION_EXTERNAL);
}

/// `model.onnx.data`, or with a number where the folder or the model has such a file already.
fn free_name(model: &Model, path: &Path) -> Result<String> {
    let used = external_files(model)?;
    let file = path.file_name().map_or_else(|| "model.onnx".into(), |name| name.to_string_lossy());
    let names = (0u32..).map(|number| match number {
        0 => format!("{file}.data"),
        _ => format!("{file}.{number}.data"),
    });
    let is_free = |name: &String| !used.contains(name) && path.with_file_name(name).symlink_metadata().is_err();
    Ok({ names }.find(is_free).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{reference_check, small_model};
    use super::super::{DataType, ModelBuilder, NodeDef, Patch, TensorDef, ValueDef};
    use super::*;

    /// `y = x + a + b`, of which `a` is raw bytes with a doc string, and `b` is a typed field.
    fn model() -> Model {
        let values: Vec<f32> = (0..512).map(|i| i as f32).collect();
        let mut builder = ModelBuilder::new("large", 8);
        builder.opset("", 17).input(ValueDef::new("x", DataType::Float, [512.into()]));
        builder.output(ValueDef::new("y", DataType::Float, [512.into()]));
        builder.initializer(TensorDef::from_f32s("a", &[512], &values));
        builder.initializer(TensorDef::from_f32s("s", &[1], &[3.0]));
        builder.node(NodeDef::new("Add", "add").inputs(["x", "a"]).outputs(["h"]));
        builder.node(NodeDef::new("Mul", "scale").inputs(["h", "s"]).outputs(["i"]));
        builder.node(NodeDef::new("Add", "again").inputs(["i", "b"]).outputs(["y"]));
        let mut typed = Encoder::default();
        typed.int(tensor::DIMS, 512);
        typed.int(tensor::DATA_TYPE, DataType::Float.code().into());
        values.iter().for_each(|value| typed.float(tensor::FLOAT_DATA, *value));
        typed.string(tensor::NAME, "b");
        typed.string(12, "kept");
        let bytes = typed.into_bytes();
        let named = TensorDef::from_f32s("b", &[512], &values);
        let built = builder.initializer(named).build().unwrap();
        // the same tensor, typed
        let mut fields = built.graph().fields().to_vec();
        let last = fields.iter().rposition(|field| field.number == graph::INITIALIZER).unwrap();
        let mut wrapped = Encoder::default();
        wrapped.bytes(graph::INITIALIZER, &bytes);
        fields[last] = Field::of(graph::MESSAGE, wrapped).unwrap();
        built.rebuilt(built.fields().to_vec(), Some(Graph::from_fields(fields, 0).unwrap())).unwrap()
    }

    #[test]
    fn what_does_not_fit_moves_to_a_data_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        std::fs::write(folder.path().join("model.onnx.data"), "of another model").unwrap();
        let model = model();
        model.save_within(&path, 2000).unwrap();
        reference_check(&path);
        let saved = Model::open(&path).unwrap();
        assert_eq!(external_files(&saved).unwrap().into_iter().collect::<Vec<_>>(), ["model.onnx.1.data"]);
        for (before, after) in model.graph().initializers().iter().zip(saved.graph().initializers()) {
            let values = after.data_in(folder.path()).unwrap();
            assert_eq!(before.data().unwrap().bytes(), values.bytes(), "{}", before.name());
            assert_eq!(after.external().is_some(), before.name() != "s");
        }
        assert!(saved.to_bytes().windows(4).any(|window| window == b"kept"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn what_cannot_move_is_an_error_that_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let found = small_model().save_within(&folder.path().join("model.onnx"), 100);
        assert!(matches!(found, Err(Error::InFile { source, .. }) if matches!(*source, Error::TooLarge { .. })));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    /// A model that fits is one file with the bytes that it is.
    #[test]
    fn what_fits_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        let model = Patch::new("nothing").apply(&model()).unwrap();
        model.save_within(&path, model.encoded_len()).unwrap();
        assert!(std::fs::read(&path).unwrap() == model.to_bytes());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

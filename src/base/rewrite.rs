//! A Hugging Face folder written again with other weights.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::{Dtype, View};

use super::checkpoint::Weights;
use super::safetensors::{Entry, Shards};
use super::weights::Part;
use super::{Checkpoint, Error, Result, WeightRole};
use crate::files;

/// Files of weights, in this form or others, which the new folder does not take over.
const WEIGHTS: [&str; 9] = ["safetensors", "bin", "pt", "pth", "gguf", "onnx", "data", "h5", "msgpack"];

/// What a tensor of a file holds: the weight, and for a stacked one which of its parts.
type Held = (WeightRole, Option<usize>);

/// A tensor on its way into a file.
enum Written<'a> {
    Kept(&'a Entry, &'a [u8]),
    Changed(Tensor),
}

impl View for Written<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Kept(entry, _) => entry.dtype,
            Self::Changed(tensor) => View::dtype(&tensor),
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Kept(entry, _) => &entry.shape,
            Self::Changed(tensor) => tensor.dims(),
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Kept(_, bytes) => Cow::Borrowed(bytes),
            Self::Changed(tensor) => tensor.data(),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Kept(_, bytes) => bytes.len(),
            Self::Changed(tensor) => tensor.data_len(),
        }
    }
}

/// What a weight is written as; none for what it is.
pub type Change<'a, E> = dyn Fn(WeightRole, &Tensor) -> std::result::Result<Option<Tensor>, E> + 'a;

impl Checkpoint {
    /// Writes the folder's files into another one, with the weights that `change` gives in the place of the file's: under
    /// the same names, in the same shards and data types. What `change` is given, and gives, has the shape that the spec
    /// says; for nothing the weight stays as it is. Configuration and tokenizer are copied.
    ///
    /// # Errors
    /// When the checkpoint is a GGUF file, a file cannot be read or written, and those of `change`.
    pub fn write_with<E: From<Error>>(&self, folder: &Path, change: &Change<'_, E>) -> std::result::Result<(), E> {
        let Weights::Folder(shards) = &self.weights else {
            let why = "a GGUF file is not written again".to_owned();
            return Err(Error::NotACheckpoint { path: self.path().into(), why }.into());
        };
        let held = self.held();
        for (file, path) in shards.paths().enumerate() {
            let mut tensors = Vec::new();
            for (name, entry, bytes) in shards.of_file(file) {
                let whole = self.changed(shards, name, held.get(name).map_or(&[], Vec::as_slice), change)?;
                tensors.push((name, whole.map_or(Written::Kept(entry, bytes), Written::Changed)));
            }
            let name = path.file_name().unwrap_or_default();
            write_shard(shards, file, tensors, &folder.join(name))?;
            shards.forget(file);
        }
        Ok(copy_others(self.path(), folder)?)
    }

    /// By the name of a tensor in the files, the weights in it.
    fn held(&self) -> BTreeMap<String, Vec<Held>> {
        let spec = self.spec();
        let mut held: BTreeMap<String, Vec<Held>> = BTreeMap::new();
        let roles = spec.weights().into_iter().map(|weight| (weight.role, weight.role, weight.shape));
        // a tied head may be in the file as well
        let embedding = spec.weight_shape(WeightRole::Embedding);
        let tied = spec.head.tied.then_some((WeightRole::Head, WeightRole::Embedding, embedding));
        for (kept_as, role, shape) in roles.chain(tied) {
            let source = self.names.source(kept_as);
            let stacked = matches!(source.part, Part::Stacked { .. });
            for (index, (name, _)) in source.tensors(&shape).into_iter().enumerate() {
                held.entry(self.stored(name)).or_default().push((role, stacked.then_some(index)));
            }
        }
        held
    }

    /// A tensor of the files with the changed weights in it; none where nothing changes.
    fn changed<E: From<Error>>(
        &self,
        shards: &Shards,
        name: &str,
        held: &[Held],
        change: &Change<'_, E>,
    ) -> std::result::Result<Option<Tensor>, E> {
        let action = Error::candle("writing a weight");
        let mut whole: Option<Tensor> = None;
        for (role, index) in held {
            let Some(weight) = change(*role, &self.weight(*role)?)? else { continue };
            let stored = match &whole {
                Some(tensor) => tensor.clone(),
                None => shards.tensor(name, &Device::Cpu).ok_or_else(|| self.missing(name))??,
            };
            let weight = weight.to_dtype(stored.dtype()).map_err(&action)?;
            let source = self.names.source(*role);
            let put = match index {
                Some(index) => weight.get(*index),
                None => source.put(&stored, &weight),
            };
            whole = Some(put.map_err(&action)?);
        }
        Ok(whole)
    }
}

fn write_shard(shards: &Shards, file: usize, tensors: Vec<(&str, Written)>, path: &Path) -> Result<()> {
    let failed = |why: String| Error::Safetensors { path: path.into(), why };
    let metadata = shards.metadata(file).map_err(|error| failed(error.to_string()))?;
    safetensors::serialize_to_file(tensors, metadata, path).map_err(|error| failed(error.to_string()))
}

fn copy_others(from: &Path, to: &Path) -> Result<()> {
    let entries = std::fs::read_dir(from).map_err(files::Error::io("list", from))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_weights = path.extension().is_some_and(|e| WEIGHTS.iter().any(|known| e.eq_ignore_ascii_case(known)));
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
        // an index of files that are left out would point nowhere
        let is_other_index = name.ends_with(".index.json") && !name.starts_with("model.safetensors");
        if path.is_file() && !is_weights && !is_other_index && name != files::MANIFEST_NAME {
            std::fs::copy(&path, to.join(&name)).map_err(files::Error::io("copy", &path))?;
        }
    }
    Ok(())
}

//! One or many mapped `*.safetensors` files as one table of tensors.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;

use super::{Error, Result};
use crate::files::{self, MappedFile};

/// Mapped shards.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
pub(super) struct Entry {
    file: usize,
    pub(super) dtype: safetensors::Dtype,
    pub(super) shape: Vec<usize>,
    start: usize,
    end: usize,
}

impl Shards {
    /// Opens the shards of a Hugging Face folder: those of `model.safetensors.index.json` where there is one, else
    /// `model.safetensors`, else every `*.safetensors` in it.
    pub(super) fn open_folder(folder: &Path) -> Result<Self> {
        let index = folder.join("model.safetensors.index.json");
        let single = folder.join("model.safetensors");
        let paths = match (index.is_file(), single.is_file()) {
            (true, _) => shards_of_index(folder, &index)?,
            (false, true) => vec![single],
            (false, false) => safetensors_in(folder)?,
        };
        if paths.is_empty() {
            let why = match pickle_in(folder)? {
                Some(name) => format!(
                    "its weights are in {name}, a pickle, which can run code when it is read; save them as safetensors: in Python, \
                     AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
                ),
                None => "it holds no *.safetensors file".into(),
            };
            return Err(Error::NotACheckpoint { path: folder.into(), why });
        }
        Self::open_files(&paths)
    }

    fn open_files(paths: &[PathBuf]) -> Result<Self> {
        let mut shards = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths {
            shards.add(path)?;
        }
        Ok(shards)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let map = MappedFile::open(path)?;
        let bytes = map.bytes();
        let parsed = SafeTensors::deserialize(bytes)
            .map_err(|e| Error::Safetensors { path: path.into(), why: e.to_string() })?;
        for (name, view) in parsed.iter() {
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            let entry = Entry {
                file: self.files.len(),
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                start,
                end: start + view.data().len(),
            };
            self.tensors.insert(name.to_owned(), entry);
        }
        self.files.push(map);
        Ok(())
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(MappedFile::path)
    }

    /// The tensors of a file with their bytes.
    pub(super) fn of_file(&self, file: usize) -> impl Iterator<Item = (&str, &Entry, &[u8])> {
        let of_file = self.tensors.iter().filter(move |(_, entry)| entry.file == file);
        of_file.map(|(name, entry)| (name.as_str(), entry, &self.files[entry.file].bytes()[entry.start..entry.end]))
    }

    /// What a file says of itself.
    pub(super) fn metadata(
        &self,
        file: usize,
    ) -> std::result::Result<Option<HashMap<String, String>>, safetensors::SafeTensorError> {
        let Some(file) = self.files.get(file) else { return Ok(None) };
        Ok(SafeTensors::read_metadata(file.bytes())?.1.metadata().clone())
    }

    /// Lets go of a file's pages.
    pub(super) fn forget(&self, file: usize) {
        if let Some(file) = self.files.get(file) {
            file.forget(0..file.bytes().len());
        }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|e| e.shape.as_slice())
    }

    pub(super) fn dtype(&self, name: &str) -> Option<Result<DType>> {
        self.tensors.get(name).map(|e| self.dtype_of(name, e))
    }

    fn dtype_of(&self, name: &str, entry: &Entry) -> Result<DType> {
        match entry.dtype {
            safetensors::Dtype::F64 => Ok(DType::F64),
            safetensors::Dtype::F32 => Ok(DType::F32),
            safetensors::Dtype::F16 => Ok(DType::F16),
            safetensors::Dtype::BF16 => Ok(DType::BF16),
            other => Err(Error::Dtype {
                path: self.files[entry.file].path().into(),
                name: name.into(),
                found: format!("{other:?}"),
            }),
        }
    }

    /// A copy of a tensor in the file's dtype.
    pub(super) fn tensor(&self, name: &str, device: &Device) -> Option<Result<Tensor>> {
        self.tensors.get(name).map(|entry| {
            let dtype = self.dtype_of(name, entry)?;
            let file = &self.files[entry.file];
            let bytes = &file.bytes()[entry.start..entry.end];
            let tensor = Tensor::from_raw_buffer(bytes, dtype, &entry.shape, device);
            file.forget(entry.start..entry.end);
            tensor.map_err(Error::candle("reading a tensor"))
        })
    }
}

/// The distinct shards that an index names. A shard's name is a plain file name: an index cannot reach out of its folder.
fn shards_of_index(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let parsed: Index = files::read_json(index, "a safetensors index")?;
    let mut names: Vec<String> = parsed.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    if let Some(bad) = names.iter().find(|n| Path::new(n).file_name().is_none_or(|f| f != n.as_str())) {
        return Err(Error::NotACheckpoint { path: index.into(), why: format!("its shard `{bad}` is not a file name") });
    }
    if let Some(absent) = names.iter().find(|name| !folder.join(name).is_file()) {
        return Err(Error::NotACheckpoint { path: index.into(), why: format!("its shard `{absent}` is not there") });
    }
    Ok(names.iter().map(|n| folder.join(n)).collect())
}

fn safetensors_in(folder: &Path) -> Result<Vec<PathBuf>> {
    files_in(folder, |path| path.extension().is_some_and(|e| e == "safetensors"))
}

/// The first file of weights as PyTorch pickles them.
fn pickle_in(folder: &Path) -> Result<Option<String>> {
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let is_pickle = |name: &str| {
        [("pytorch_model", ".bin"), ("consolidated", ".pth")]
            .iter()
            .any(|(start, end)| name.starts_with(start) && name.ends_with(end))
    };
    let pickles = files_in(folder, |path| name(path).is_some_and(|name| is_pickle(&name)))?;
    Ok(pickles.first().and_then(|path| name(path)))
}

fn files_in(folder: &Path, takes: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(files::Error::io("list", folder))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|path| takes(path)).collect();
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_pickled_weights_is_told_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = || Shards::open_folder(folder.path()).unwrap_err().to_string();
        assert!(error().contains("it holds no *.safetensors file"), "{}", error());
        for name in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"] {
            std::fs::write(folder.path().join(name), [0x80, 2]).unwrap();
            assert!(error().contains(name) && error().contains("save_pretrained"), "{}", error());
            std::fs::remove_file(folder.path().join(name)).unwrap();
        }
    }
}

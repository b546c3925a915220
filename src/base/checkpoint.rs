//! A checkpoint as users have it: a Hugging Face folder or a GGUF file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::gguf::Gguf;
use super::safetensors::Shards;
use super::{DecoderSpec, Error, Result, Tokenizer, WeightNames, WeightRole, family};
use crate::files;

/// An opened checkpoint. Weights stay in the mapped file until they are asked for.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    spec: DecoderSpec,
    /// Where the files keep the weights: the family's names, but in a GGUF file.
    pub(super) names: WeightNames,
    config: Value,
    pub(super) weights: Weights,
    /// By prefold's name, weights in the place of the file's.
    replaced: BTreeMap<String, Tensor>,
}

#[derive(Debug)]
pub(super) enum Weights {
    Folder(Shards),
    Gguf(Gguf),
}

impl Checkpoint {
    /// Opens a Hugging Face folder (`config.json`, `*.safetensors`) or a `.gguf` file, and checks that every weight of
    /// the configuration is there in its shape. A path to a folder's `config.json` names the folder.
    ///
    /// # Errors
    /// When the path holds no checkpoint, a file is damaged, the family is unknown, or a weight is missing or misshapen.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Self::open_folder(path);
        }
        if path.file_name().is_some_and(|n| n == "config.json")
            && let Some(folder) = path.parent()
        {
            return Self::open_folder(folder);
        }
        let gguf = Gguf::open(path)?;
        let config = gguf.config_json()?;
        Self::checked(path, config, Weights::Gguf(gguf), path)
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        let config_path = folder.join("config.json");
        if !config_path.is_file() {
            return Err(Error::NotACheckpoint { path: folder.into(), why: "it holds no config.json".into() });
        }
        let config: Value = files::read_json(&config_path, "a model configuration")?;
        let mut checkpoint =
            Self::checked(folder, config, Weights::Folder(Shards::open_folder(folder)?), &config_path)?;
        checkpoint.path = folder.into();
        Ok(checkpoint)
    }

    fn checked(path: &Path, config: Value, weights: Weights, config_path: &Path) -> Result<Self> {
        let spec = family::spec_from_config(config_path, &config)?;
        let names = match &weights {
            Weights::Folder(_) => spec.names.clone(),
            Weights::Gguf(gguf) => gguf.weight_names(&spec),
        };
        let checkpoint = Self { path: path.into(), spec, names, config, weights, replaced: BTreeMap::new() };
        for weight in checkpoint.spec.weights() {
            for (name, expected) in checkpoint.names.source(weight.role).tensors(&weight.shape) {
                let found = checkpoint.shape(&checkpoint.stored(name.clone()))?;
                if found != expected {
                    return Err(Error::Shape { path: checkpoint.path.clone(), name, found, expected });
                }
            }
        }
        Ok(checkpoint)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the model is.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// The `config.json`, or what stands for it in a GGUF file.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The files that hold the weights.
    pub fn weight_files(&self) -> Vec<PathBuf> {
        match &self.weights {
            Weights::Folder(shards) => shards.paths().map(Path::to_path_buf).collect(),
            Weights::Gguf(gguf) => vec![gguf.path().into()],
        }
    }

    /// Names of all tensors in the files, prefold's names in a GGUF file.
    pub fn names(&self) -> Vec<String> {
        match &self.weights {
            Weights::Folder(shards) => shards.names().map(str::to_owned).collect(),
            Weights::Gguf(gguf) => gguf.names().map(str::to_owned).collect(),
        }
    }

    /// The shape of a tensor.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match &self.weights {
            Weights::Folder(shards) => shards.shape(name).map(<[usize]>::to_vec).ok_or_else(|| self.missing(name)),
            Weights::Gguf(gguf) => gguf.shape(name),
        }
    }

    /// The data type that the weights are best computed in: the file's own, float32 for a GGUF file.
    ///
    /// # Errors
    /// When the embedding's data type is not a float that prefold reads.
    pub fn dtype(&self) -> Result<DType> {
        match &self.weights {
            Weights::Folder(shards) => {
                let name = self.stored(self.names.source(WeightRole::Embedding).name);
                shards.dtype(&name).ok_or_else(|| self.missing(&name))?
            }
            Weights::Gguf(_) => Ok(DType::F32),
        }
    }

    /// A tensor on the CPU in the file's dtype; float32 from a GGUF file.
    ///
    /// # Errors
    /// When there is no such tensor or it cannot be read.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        match &self.weights {
            Weights::Folder(shards) => shards.tensor(name, &Device::Cpu).ok_or_else(|| self.missing(name))?,
            Weights::Gguf(gguf) => gguf.tensor(name),
        }
    }

    /// A weight on the CPU in the file's dtype; float32 from a GGUF file.
    ///
    /// # Errors
    /// When a tensor that holds it is missing or cannot be read.
    pub fn weight(&self, role: WeightRole) -> Result<Tensor> {
        if let Some(replaced) = self.replaced.get(&role.name()) {
            return Ok(replaced.clone());
        }
        let (source, shape) = (self.names.source(role), self.spec.weight_shape(role));
        let tensors = source.tensors(&shape).into_iter().map(|(name, _)| self.tensor(&self.stored(name)));
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        source.part_of(&tensors, &shape).map_err(Error::candle("reading a weight"))
    }

    /// The checkpoint with other weights in the place of its own, by prefold's names ([`WeightRole::name`]). Their shapes
    /// are those that the spec says.
    #[must_use]
    pub fn with_weights(mut self, weights: BTreeMap<String, Tensor>) -> Self {
        self.replaced = weights;
        self
    }

    /// The tokenizer and chat template that travel with the weights.
    ///
    /// # Errors
    /// When there is none, or it does not parse.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.weights {
            Weights::Folder(_) => Tokenizer::from_folder(&self.path),
            Weights::Gguf(gguf) => Tokenizer::from_gguf(gguf),
        }
    }

    /// A name for manifests: the folder's or file's own name.
    pub fn display_name(&self) -> String {
        self.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The name under which the checkpoint has a tensor.
    pub(super) fn stored(&self, name: String) -> String {
        let is_there = |name: &str| match &self.weights {
            Weights::Folder(shards) => shards.shape(name).is_some(),
            Weights::Gguf(gguf) => gguf.contains(name),
        };
        if is_there(&name) {
            return name;
        }
        let other = self.names.alternatives(&name).find(|name| is_there(name));
        other.unwrap_or(name)
    }

    pub(super) fn missing(&self, name: &str) -> Error {
        Error::TensorMissing { path: self.path.clone(), name: name.into() }
    }
}

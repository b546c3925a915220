//! What is trained: one file per method, the adapter's file format, and PEFT's.
//!
//! An adapter is a configuration and named tensors. It acts on a decoder through a [`SiteHook`] and
//! knows neither ONNX nor training. A method is an [`AdapterMethod`]; one that adds a term at the attention sites says it
//! as a [`Term`], which candle runs and `fold` writes.

mod config;
mod error;
mod folder;
mod full;
mod lora;
mod merge;
mod method;
mod options;
pub mod peft;
mod prefix;
mod prefix_plus;
mod prompt;
pub mod term;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};

pub use config::{AdapterConfig, FORMAT_VERSION, Method};
pub use error::{Error, Result};
pub use folder::{CONFIG_NAME, WEIGHTS_NAME};
pub use full::Full;
pub use lora::{Lora, LoraMap, Target, module_name};
pub use method::{AdapterMethod, Base, Start, TensorSpec, Tensors};
pub use options::{AdapterOptions, MethodName};
pub use prefix::{Prefix, PrefixInit};
pub use prefix_plus::{FeatureMap, Gate, Init, PrefixPlus, Query, Sharing};
pub use term::Term;

use crate::base::{Checkpoint, Decoder, DecoderSpec, SiteHook};

/// An adapter: what it is, and its tensors by name.
#[derive(Clone, Debug)]
pub struct Adapter {
    config: AdapterConfig,
    tensors: Tensors,
}

impl Adapter {
    /// An adapter of the given tensors.
    ///
    /// # Errors
    /// When the configuration contradicts itself, or a tensor is missing, unknown, misshapen or not finite.
    pub fn new(config: AdapterConfig, tensors: Tensors) -> Result<Self> {
        config.check()?;
        check_tensors(&config, &tensors)?;
        Ok(Self { config, tensors })
    }

    /// An adapter whose tensors are all zero, float32 on the CPU. Where [`zeros_are_the_base`](Self::zeros_are_the_base) it
    /// changes nothing.
    ///
    /// # Errors
    /// When the configuration contradicts itself, or the method trains the base model's own weights.
    pub fn zeros(config: AdapterConfig) -> Result<Self> {
        config.check()?;
        let Some(specs) = config.method.as_method().tensors(&config) else {
            let why = format!("is {}", config.method.name());
            return Err(Error::Config { field: "method", why, help: "a model of zeros is no model" });
        };
        let tensors = specs
            .into_iter()
            .map(|(name, spec)| {
                let zeros =
                    Tensor::zeros(spec.shape, DType::F32, &Device::Cpu).map_err(Error::candle("making an adapter"))?;
                Ok((name, zeros))
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, tensors })
    }

    /// What the adapter is.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Its tensors by name.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// Number of trained parameters.
    pub fn num_parameters(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    /// Whether an adapter of this kind with tensors of zeros, folded into a graph, is the base graph bit for bit.
    pub fn zeros_are_the_base(&self) -> bool {
        self.config.method.as_method().zeros_are_the_base()
    }

    /// The same adapter with trainable tensors on `device`: float32, whatever the model computes in, unless `dtype` says
    /// otherwise.
    ///
    /// # Errors
    /// When a tensor cannot be copied.
    pub fn trainable(&self, dtype: DType, device: &Device) -> Result<(Self, BTreeMap<String, Var>)> {
        self.clone().into_trainable(dtype, device)
    }

    /// [`trainable`](Self::trainable) that gives up each tensor as its variable is made, so that not all of them exist twice.
    /// Variables of a trainable adapter of the right type are taken as they are, by both.
    ///
    /// # Errors
    /// When a tensor cannot be copied.
    pub fn into_trainable(self, dtype: DType, device: &Device) -> Result<(Self, BTreeMap<String, Var>)> {
        let mut vars = BTreeMap::new();
        for (name, tensor) in self.tensors {
            let var = tensor.to_dtype(dtype).and_then(|t| t.to_device(device)).and_then(|t| Var::from_tensor(&t));
            vars.insert(name, var.map_err(Error::candle("making an adapter trainable"))?);
        }
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        Ok((Self { config: self.config, tensors }, vars))
    }

    /// The same tensors without gradients: what is done to those of [`trainable`](Self::trainable) is seen here.
    #[must_use]
    pub fn detached(&self) -> Self {
        let tensors = self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.detach())).collect();
        Self { config: self.config.clone(), tensors }
    }

    /// Whether the adapter belongs to a model.
    ///
    /// # Errors
    /// Names what differs.
    pub fn check_fits(&self, spec: &DecoderSpec) -> Result<()> {
        self.config.check_fits(spec)?;
        self.config.method.as_method().check_fits(&self.config, &self.tensors, spec)
    }

    /// What the adapter does in a decoder. Weights of full fine-tuning do not act here but in the decoder's own place:
    /// [`overlay`](Self::overlay) before it is loaded, [`decoder`](Self::decoder) in training.
    ///
    /// # Errors
    /// When the adapter was made for another model, or a tensor cannot be moved to `device`.
    pub fn hook(&self, spec: &DecoderSpec, device: &Device) -> Result<Box<dyn SiteHook>> {
        self.check_fits(spec)?;
        let moved =
            |tensor: &Tensor| tensor.to_device(device).map_err(Error::candle("moving an adapter to the device"));
        let tensors = self.tensors.iter().map(|(name, tensor)| Ok((name.clone(), moved(tensor)?)));
        self.config.method.as_method().hook(&self.config, &tensors.collect::<Result<_>>()?)
    }

    /// The base weights that the adapter replaces, by prefold's names of them: all of them for full fine-tuning.
    pub fn base_weights(&self) -> Option<&Tensors> {
        matches!(self.config.method, Method::Full(_)).then_some(&self.tensors)
    }

    /// The checkpoint with the weights that the adapter replaces.
    ///
    /// # Errors
    /// When the adapter was made for another model.
    pub fn overlay(&self, checkpoint: Checkpoint) -> Result<Checkpoint> {
        self.check_fits(checkpoint.spec())?;
        Ok(match self.base_weights() {
            Some(weights) => checkpoint.with_weights(weights.clone()),
            None => checkpoint,
        })
    }

    /// The decoder that the adapter's own tensors make, which receive gradients where they are trainable; none where the
    /// adapter acts on the base model's.
    ///
    /// # Errors
    /// When a tensor is missing, or `dtype`, in which the base model computes, is not the type of the tensors.
    pub fn decoder(&self, spec: &DecoderSpec, dtype: DType) -> Result<Option<Decoder>> {
        let Method::Full(full) = &self.config.method else { return Ok(None) };
        self.check_fits(spec)?;
        if let Some(found) = self.tensors.values().map(Tensor::dtype).find(|found| *found != dtype) {
            let why =
                format!("is full, whose weights are trained in {}, with dtype {}", found.as_str(), dtype.as_str());
            return Err(Error::Config { field: "method", why, help: "train with dtype = f32" });
        }
        full.decoder(&self.tensors, spec).map(Some)
    }
}

/// Names and shapes of the tensors that a configuration asks for; none of full fine-tuning, which are the base model's.
pub fn shapes(config: &AdapterConfig) -> BTreeMap<String, Vec<usize>> {
    let specs = config.method.as_method().tensors(config).into_iter().flatten();
    specs.map(|(name, spec)| (name, spec.shape)).collect()
}

fn check_tensors(config: &AdapterConfig, tensors: &Tensors) -> Result<()> {
    if let Some(specs) = config.method.as_method().tensors(config) {
        for (name, spec) in &specs {
            let Some(tensor) = tensors.get(name) else {
                return Err(Error::MissingTensor { name: name.clone(), shape: spec.shape.clone() });
            };
            if tensor.dims() != spec.shape {
                let (found, expected) = (tensor.dims().to_vec(), spec.shape.clone());
                return Err(Error::Shape { name: name.clone(), found, expected });
            }
        }
        if let Some(name) = tensors.keys().find(|name| !specs.contains_key(*name)) {
            return Err(Error::UnknownTensor { name: name.clone() });
        }
    }
    for (name, tensor) in tensors {
        if !tensor.dtype().is_float() {
            return Err(Error::NotFloats { name: name.clone(), data_type: tensor.dtype().as_str() });
        }
        let is_finite = || match tensor.dtype() {
            DType::F32 => Ok(tensor.flatten_all()?.to_vec1::<f32>()?.iter().all(|x| x.is_finite())),
            _ => Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?.iter().all(|x| x.is_finite())),
        };
        if !is_finite().map_err(Error::candle("reading an adapter"))? {
            return Err(Error::NotFinite { name: name.clone() });
        }
    }
    Ok(())
}

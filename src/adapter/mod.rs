//! What is trained: one file per method, the adapter's file format, and its feature maps.
//!
//! An adapter is a configuration and named tensors. It acts on a decoder through the decoder's attention
//! [`Site`](crate::base::Site)s and knows neither ONNX nor training.

mod config;
mod error;
mod folder;
mod prefix_plus;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};

pub use config::{AdapterConfig, FORMAT_VERSION, FeatureMap, Gate, Method, Query, Sharing};
pub use error::{Error, Result};
pub use folder::{CONFIG_NAME, WEIGHTS_NAME};
pub use prefix_plus::PrefixPlus;

use crate::base::{DecoderSpec, SiteHook};

/// An adapter: what it is, and its tensors by name.
#[derive(Clone, Debug)]
pub struct Adapter {
    config: AdapterConfig,
    tensors: BTreeMap<String, Tensor>,
}

impl Adapter {
    /// An adapter of the given tensors.
    ///
    /// # Errors
    /// When the configuration contradicts itself, or a tensor is missing, unknown, misshapen or not finite.
    pub fn new(config: AdapterConfig, tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        config.check()?;
        check_tensors(&config, &tensors)?;
        Ok(Self { config, tensors })
    }

    /// The adapter at the start of training, where it changes nothing: float32 on the CPU.
    ///
    /// # Errors
    /// When the configuration contradicts itself.
    pub fn zeros(config: AdapterConfig) -> Result<Self> {
        config.check()?;
        let tensors = shapes(&config)
            .into_iter()
            .map(|(name, shape)| {
                let zeros =
                    Tensor::zeros(shape, DType::F32, &Device::Cpu).map_err(Error::candle("making an adapter"))?;
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
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// Number of trained parameters.
    pub fn num_parameters(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    /// The same adapter with trainable tensors on `device`: float32, whatever the model computes in, unless `dtype` says
    /// otherwise.
    ///
    /// # Errors
    /// When a tensor cannot be copied.
    pub fn trainable(&self, dtype: DType, device: &Device) -> Result<(Self, BTreeMap<String, Var>)> {
        let mut vars = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let var = tensor.to_dtype(dtype).and_then(|t| t.to_device(device)).and_then(|t| Var::from_tensor(&t));
            vars.insert(name.clone(), var.map_err(Error::candle("making an adapter trainable"))?);
        }
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        Ok((Self { config: self.config.clone(), tensors }, vars))
    }

    /// What the adapter does at the sites of a decoder.
    ///
    /// # Errors
    /// When the adapter was made for another model, or a tensor cannot be moved to `device`.
    pub fn hook(&self, spec: &DecoderSpec, device: &Device) -> Result<Box<dyn SiteHook>> {
        self.config.check_fits(spec)?;
        match self.config.method {
            Method::PrefixPlus => Ok(Box::new(PrefixPlus::new(&self.config, &self.tensors, device)?)),
        }
    }
}

/// Names and shapes of the tensors that a configuration asks for.
pub fn shapes(config: &AdapterConfig) -> BTreeMap<String, Vec<usize>> {
    match config.method {
        Method::PrefixPlus => prefix_plus::shapes(config),
    }
}

fn check_tensors(config: &AdapterConfig, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let shapes = shapes(config);
    for (name, shape) in &shapes {
        let Some(tensor) = tensors.get(name) else {
            return Err(Error::MissingTensor { name: name.clone(), shape: shape.clone() });
        };
        if tensor.dims() != shape {
            let (found, expected) = (tensor.dims().to_vec(), shape.clone());
            return Err(Error::Shape { name: name.clone(), found, expected });
        }
        let finite = tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all()?.to_vec1::<f64>());
        if !finite.map_err(Error::candle("reading an adapter"))?.iter().all(|x| x.is_finite()) {
            return Err(Error::NotFinite { name: name.clone() });
        }
    }
    match tensors.keys().find(|name| !shapes.contains_key(*name)) {
        Some(name) => Err(Error::UnknownTensor { name: name.clone() }),
        None => Ok(()),
    }
}

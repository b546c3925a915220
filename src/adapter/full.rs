//! Full fine-tuning: every weight of the base model is trained.
//!
//! The adapter's tensors are the weights under prefold's names, `model.layers.0.self_attn.q_proj.weight`, in float32. They
//! act in the place of the checkpoint's ([`Adapter::overlay`](super::Adapter::overlay)), not through a hook.

use std::collections::BTreeMap;

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::method::{Base, TensorSpec, Tensors};
use super::{AdapterConfig, AdapterMethod, Error, Result};
use crate::base::{Decoder, DecoderSpec, NoHook, SiteHook};

/// Full fine-tuning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Full {}

impl Full {
    /// A decoder of the tensors, which receive gradients where they are trainable.
    pub(super) fn decoder(self, tensors: &Tensors, spec: &DecoderSpec) -> Result<Decoder> {
        let weight = |weight: &crate::base::WeightShape| match tensors.get(&weight.name) {
            Some(tensor) => Ok(tensor.clone()),
            None => Err(crate::base::Error::TensorMissing { path: "the adapter".into(), name: weight.name.clone() }),
        };
        Ok(Decoder::from_weights(spec, weight)?)
    }
}

impl AdapterMethod for Full {
    fn check(&self, config: &AdapterConfig) -> Result<()> {
        match &config.layers {
            Some(_) => Err(Error::Config {
                field: "layers",
                why: "is given with method = full".into(),
                help: "full fine-tuning trains every weight; use lora for a subset of layers",
            }),
            None => Ok(()),
        }
    }

    fn tensors(&self, _config: &AdapterConfig) -> Option<BTreeMap<String, TensorSpec>> {
        None
    }

    fn start(&self, _config: &AdapterConfig, base: &Base, tensors: &mut Tensors) -> Result<()> {
        for weight in base.checkpoint.spec().weights() {
            tensors.insert(
                weight.name,
                base.weight(weight.role)?.contiguous().map_err(Error::candle("reading a weight"))?,
            );
        }
        Ok(())
    }

    fn check_fits(&self, _config: &AdapterConfig, tensors: &Tensors, spec: &DecoderSpec) -> Result<()> {
        let weights = spec.weights();
        for weight in &weights {
            match tensors.get(&weight.name).map(Tensor::dims) {
                Some(found) if found == weight.shape => {}
                Some(found) => {
                    let (found, expected) = (found.to_vec(), weight.shape.clone());
                    return Err(Error::Shape { name: weight.name.clone(), found, expected });
                }
                None => return Err(Error::MissingTensor { name: weight.name.clone(), shape: weight.shape.clone() }),
            }
        }
        match tensors.keys().find(|name| !weights.iter().any(|weight| weight.name == **name)) {
            Some(name) => Err(Error::UnknownTensor { name: name.clone() }),
            None => Ok(()),
        }
    }

    fn hook(&self, _config: &AdapterConfig, _tensors: &Tensors) -> Result<Box<dyn SiteHook>> {
        Ok(Box::new(NoHook))
    }

    fn zeros_are_the_base(&self) -> bool {
        false
    }
}

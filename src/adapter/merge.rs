//! An adapter that changes linear maps, as the weights of a model without one.

use candle_core::{DType, Tensor};

use super::{Adapter, Error, Method, Result};
use crate::base::WeightRole;

impl Adapter {
    /// Whether the method can become part of the weights: LoRA with its variants, and full fine-tuning.
    ///
    /// # Errors
    /// Says what to do where it cannot.
    pub fn check_mergeable(&self) -> Result<()> {
        match self.config().method {
            Method::Lora(_) | Method::Full(_) => Ok(()),
            Method::PrefixPlus(_) | Method::Prefix(_) => Err(Error::NotMerged { method: self.config().method.name() }),
        }
    }

    /// What stands in the place of a base weight, in float32; none where the adapter does not change it. Of LoRA
    /// `W + s · B A`, with `dora` its rows scaled to their trained magnitudes.
    ///
    /// # Errors
    /// When the method changes no weights, or a tensor is missing.
    pub fn merged_weight(&self, role: WeightRole, weight: &Tensor) -> Result<Option<Tensor>> {
        self.check_mergeable()?;
        let action = Error::candle("merging a weight");
        if let Some(weights) = self.base_weights() {
            return Ok(weights.get(&role.name()).cloned());
        }
        let (Method::Lora(lora), WeightRole::Weight(layer, linear)) = (&self.config().method, role) else {
            return Ok(None);
        };
        if !lora.sites(self.config()).contains(&(layer, linear)) {
            return Ok(None);
        }
        let map = lora.map(self.tensors(), layer, linear)?.to_dtype(DType::F32).map_err(&action)?;
        map.merged(weight).map(Some).map_err(&action)
    }
}

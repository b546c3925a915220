//! Prefix-Tuning+ (arXiv 2506.13674; PrefixMemory-Tuning from its third version on), Eq. 7:
//! `o_i = softmax_attention(q_i, K, V) + φ(q_i)ᵀ · M_h`.
//!
//! `layers.{i}.M`, `[num_heads, head_dim (in, contracted with φ(q)), head_dim (out)]`, one matrix per query head also
//! where key-value heads are shared, zero at the start.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::{AdapterConfig, Error, FeatureMap, Result};
use crate::base::ops::{elu, head_linear};
use crate::base::{Site, SiteHook};

/// Names and shapes of the method's tensors.
pub(super) fn shapes(config: &AdapterConfig) -> BTreeMap<String, Vec<usize>> {
    let shape = vec![config.num_heads, config.head_dim, config.head_dim];
    config.adapted_layers().into_iter().map(|layer| (name(layer), shape.clone())).collect()
}

fn name(layer: usize) -> String {
    format!("layers.{layer}.M")
}

/// The method at work on a decoder.
#[derive(Debug)]
pub struct PrefixPlus {
    feature_map: FeatureMap,
    /// By layer, `[num_heads, head_dim, head_dim]`; none where the layer is not adapted.
    memories: Vec<Option<Tensor>>,
}

impl PrefixPlus {
    /// Takes the tensors of an adapter whose shapes have been checked.
    ///
    /// # Errors
    /// When a tensor cannot be moved to `device`.
    pub(super) fn new(config: &AdapterConfig, tensors: &BTreeMap<String, Tensor>, device: &Device) -> Result<Self> {
        let memories = (0..config.num_layers)
            .map(|layer| tensors.get(&name(layer)).map(|t| t.to_device(device)).transpose())
            .collect::<candle_core::Result<_>>()
            .map_err(Error::candle("moving an adapter to the device"))?;
        Ok(Self { feature_map: config.feature_map, memories })
    }

    /// The tensor that φ(q) of a layer meets, `[num_heads, head_dim, head_dim]`.
    pub fn memory(&self, layer: usize) -> Option<&Tensor> {
        self.memories.get(layer).and_then(Option::as_ref)
    }
}

impl SiteHook for PrefixPlus {
    fn changes_mlp(&self, _layer: usize) -> bool {
        false
    }

    fn term(&self, site: &Site) -> candle_core::Result<Option<Tensor>> {
        let Some(memory) = self.memory(site.layer) else { return Ok(None) };
        let memory = memory.to_dtype(site.query.dtype())?;
        let features = match self.feature_map {
            FeatureMap::Elu => elu(site.query)?,
        };
        head_linear(&features, &memory).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the formula, written out in loops.
    #[test]
    fn term_is_the_formula() {
        let (batch, heads, seq, width) = (2, 3, 4, 2);
        let numbers = |n: usize, seed: f64| (0..n).map(|i| (seed + i as f64 * 1.7).sin()).collect::<Vec<f64>>();
        let (q, m) = (numbers(batch * heads * seq * width, 0.1), numbers(heads * width * width, 0.5));
        let query = Tensor::from_vec(q.clone(), (batch, heads, seq, width), &Device::Cpu).unwrap();
        let memory = Tensor::from_vec(m.clone(), (heads, width, width), &Device::Cpu).unwrap();
        let hook = PrefixPlus { feature_map: FeatureMap::Elu, memories: vec![Some(memory)] };
        let term = hook
            .term(&Site { layer: 0, query: &query, unrotated: &query, key: &query, value: &query })
            .unwrap()
            .unwrap();
        let found: Vec<f64> = term.flatten_all().unwrap().to_vec1().unwrap();
        let elu = |x: f64| if x > 0.0 { x } else { x.exp() - 1.0 };
        for (i, found) in found.iter().enumerate() {
            let (row, out) = (i / width, i % width);
            let head = row / seq % heads;
            let expected: f64 = (0..width).map(|j| elu(q[row * width + j]) * m[(head * width + j) * width + out]).sum();
            assert!((found - expected).abs() < 1e-14);
        }
        assert!(
            hook.term(&Site { layer: 1, query: &query, unrotated: &query, key: &query, value: &query })
                .unwrap()
                .is_none()
        );
    }
}

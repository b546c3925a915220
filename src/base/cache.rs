//! Keys and values of the positions already seen.

use candle_core::Tensor;

use super::{Error, Result};

/// Per layer, rotated keys and values of `[batch, kv_heads, past, head_dim]`.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    layers: Vec<Option<(Tensor, Tensor)>>,
}

impl KvCache {
    /// An empty cache.
    pub fn new(num_layers: usize) -> Self {
        Self { layers: vec![None; num_layers] }
    }

    /// Number of positions held.
    pub fn len(&self) -> usize {
        self.layers.first().and_then(Option::as_ref).and_then(|(k, _)| k.dim(2).ok()).unwrap_or(0)
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The keys and values of a layer, `[batch, kv_heads, past, head_dim]`; none before the first pass.
    pub fn layer(&self, layer: usize) -> Option<&(Tensor, Tensor)> {
        self.layers.get(layer).and_then(Option::as_ref)
    }

    /// The same past for each of `rows` rows; this cache holds one.
    ///
    /// # Errors
    /// When this cache holds several rows.
    pub fn repeat(&self, rows: usize) -> Result<Self> {
        let repeat = |tensor: &Tensor| {
            let (_, heads, past, width) = tensor.dims4()?;
            tensor.expand((rows, heads, past, width))?.contiguous()
        };
        let layer = |layer: &Option<(Tensor, Tensor)>| {
            layer.as_ref().map(|(keys, values)| Ok((repeat(keys)?, repeat(values)?))).transpose()
        };
        let layers = self.layers.iter().map(layer).collect::<candle_core::Result<_>>();
        Ok(Self { layers: layers.map_err(Error::candle("repeating the key-value cache"))? })
    }

    /// Appends new keys and values of a layer and returns all.
    pub(super) fn extend(&mut self, layer: usize, keys: Tensor, values: Tensor) -> Result<(Tensor, Tensor)> {
        let action = Error::candle("extending the key-value cache");
        let Some(slot) = self.layers.get_mut(layer) else {
            return Err(Error::Input {
                why: format!("the key-value cache has no layer {layer}"),
                help: "make the cache with the model's number of layers",
            });
        };
        let (keys, values) = match slot.take() {
            None => (keys, values),
            Some((k, v)) => {
                (Tensor::cat(&[&k, &keys], 2).map_err(&action)?, Tensor::cat(&[&v, &values], 2).map_err(&action)?)
            }
        };
        *slot = Some((keys.clone(), values.clone()));
        Ok((keys, values))
    }
}

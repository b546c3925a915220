//! What a prompt leaves behind in a decoder: its keys and values.

use std::cell::RefCell;

use candle_core::{DType, Device, Tensor};

use super::{Error, Result};
use crate::base::{Decoder, Input, Linear, Site, SiteHook};

/// A layer's keys and values of a prompt, float32 on the CPU, `[num_kv_heads, tokens, head_dim]`.
#[derive(Clone, Debug)]
pub(super) struct Captured {
    /// After the rotation.
    pub(super) key: Tensor,
    /// Before the rotation.
    pub(super) unrotated_key: Tensor,
    pub(super) value: Tensor,
}

/// Runs a prompt and gives what every layer computed.
pub(super) fn capture(decoder: &Decoder, prompt: &[u32]) -> Result<Vec<Captured>> {
    let recorder = Recorder::default();
    decoder.hidden_states(&Input::row(prompt)?, None, &recorder)?;
    Ok(recorder.layers.into_inner())
}

#[derive(Default)]
struct Recorder {
    layers: RefCell<Vec<Captured>>,
}

impl SiteHook for Recorder {
    fn changes(&self, _layer: usize, _linear: Linear) -> bool {
        false
    }

    fn term(&self, site: &Site) -> candle_core::Result<Option<Tensor>> {
        let row = |x: &Tensor| x.get(0)?.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous();
        let Some(unrotated_key) = site.unrotated_key else {
            candle_core::bail!("the keys before rotation are not shown")
        };
        let captured = Captured { key: row(site.key)?, unrotated_key: row(unrotated_key)?, value: row(site.value)? };
        self.layers.borrow_mut().push(captured);
        Ok(None)
    }
}

impl Captured {
    /// Number of prompt tokens.
    pub(super) fn tokens(&self) -> Result<usize> {
        self.key.dim(1).map_err(Error::candle("reading a prompt's keys"))
    }
}

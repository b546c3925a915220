//! Where something from outside acts in a decoder.

use candle_core::{DType, Result, Tensor};

use super::Linear;
use super::ops::LowRank;

/// An attention site: the place where a context-based adapter acts.
#[derive(Debug)]
pub struct Site<'a> {
    /// Which layer.
    pub layer: usize,
    /// The query that meets the keys: normalised and rotated, not yet scaled, `[batch, num_heads, seq, head_dim]`.
    pub query: &'a Tensor,
    /// The same before the rotation, where the hook [sees](SiteHook::sees_unrotated) it.
    pub unrotated: Option<&'a Tensor>,
    /// The keys of the new tokens, rotated, `[batch, num_kv_heads, seq, head_dim]`.
    pub key: &'a Tensor,
    /// The same before the rotation, where the hook sees it.
    pub unrotated_key: Option<&'a Tensor>,
    /// The values of the new tokens, `[batch, num_kv_heads, seq, head_dim]`.
    pub value: &'a Tensor,
}

/// A linear map that has been applied.
#[derive(Debug)]
pub struct LinearMap<'a> {
    /// Which layer.
    pub layer: usize,
    /// Which of its maps.
    pub linear: Linear,
    /// `[batch, seq, in]`.
    pub input: &'a Tensor,
    /// The frozen matrix, `[out, in]`.
    pub weight: &'a Tensor,
    /// The frozen bias, `[out]`.
    pub bias: Option<&'a Tensor>,
    /// What the base model computes, bias included, `[batch, seq, out]`.
    pub output: &'a Tensor,
}

/// What acts on a decoder. Everything is optional: a hook that returns nothing is the base model.
pub trait SiteHook {
    /// The term that is added to the attention output before the output projection, `[batch, num_heads, seq, head_dim]`;
    /// none where the hook does not act.
    ///
    /// # Errors
    /// When the term cannot be computed.
    fn term(&self, _site: &Site) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// What a linear map gives in the place of its own output, `[batch, seq, out]`; none where the hook does not act.
    ///
    /// # Errors
    /// When it cannot be computed.
    fn linear(&self, _map: &LinearMap) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Whether [`linear`](Self::linear) acts on a linear map. A hook that says no lets the decoder run the map together
    /// with what stands beside it.
    fn changes(&self, _layer: usize, _linear: Linear) -> bool {
        true
    }

    /// What [`linear`](Self::linear) adds to a map, as a product in the type of the model, where that is all it does in the
    /// pass at hand: the decoder may then compute it together with the map.
    ///
    /// # Errors
    /// When the type cannot be changed.
    fn low_rank(&self, _layer: usize, _linear: Linear, _dtype: DType) -> Result<Option<LowRank>> {
        Ok(None)
    }

    /// Whether [`term`](Self::term) reads queries or keys before their rotation.
    fn sees_unrotated(&self, _layer: usize) -> bool {
        true
    }

    /// The residual stream before a layer, and after the last one, `[batch, seq, hidden_size]`: to look at, in a pass that
    /// gives [`hidden_states`](super::Decoder::hidden_states).
    ///
    /// # Errors
    /// When it cannot be read.
    fn stream(&self, _layer: usize, _x: &Tensor) -> Result<()> {
        Ok(())
    }

    /// A pass of training begins: what is random in it follows from this number. A hook that is never told so computes as
    /// in use.
    fn begin_pass(&self, _number: u64) {}

    /// Keys and values that every query of a layer sees before those of the tokens, `[num_kv_heads, prefix_length,
    /// head_dim]` each.
    ///
    /// # Errors
    /// When they cannot be computed.
    fn prefix(&self, _layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        Ok(None)
    }

    /// How many positions [`prefix`](Self::prefix) takes in every layer; the tokens' positions follow them.
    fn prefix_length(&self) -> usize {
        0
    }
}

/// The base model itself.
#[derive(Clone, Copy, Debug)]
pub struct NoHook;

impl SiteHook for NoHook {
    fn changes(&self, _layer: usize, _linear: Linear) -> bool {
        false
    }

    fn sees_unrotated(&self, _layer: usize) -> bool {
        false
    }
}

//! The candle interpreter of a [`DecoderSpec`].

use candle_core::{DType, Device, Module, Tensor};

use super::ops::{linear, masked_softmax, rms_norm, rope};
use super::{Activation, Checkpoint, DecoderSpec, Error, KvCache, Linear, Result, WeightRole, WeightShape};

/// An attention site: the place where an adapter acts.
#[derive(Debug)]
pub struct Site<'a> {
    /// Which layer.
    pub layer: usize,
    /// The query that meets the keys: rotated, not yet scaled, `[batch, num_heads, seq, head_dim]`.
    pub query: &'a Tensor,
}

/// What acts at the attention sites of a decoder.
pub trait SiteHook {
    /// The term that is added to the attention output before the output projection, `[batch, num_heads, seq, head_dim]`;
    /// none where the hook does not act.
    ///
    /// # Errors
    /// When the term cannot be computed.
    fn term(&self, site: &Site) -> candle_core::Result<Option<Tensor>>;
}

/// The base model itself: no term anywhere.
#[derive(Clone, Copy, Debug)]
pub struct NoHook;

impl SiteHook for NoHook {
    fn term(&self, _: &Site) -> candle_core::Result<Option<Tensor>> {
        Ok(None)
    }
}

/// Tokens to run, checked for consistency. Positions follow the attention mask, `max(cumsum(mask) − 1, 0)`, unless given.
#[derive(Clone, Debug)]
pub struct Input {
    batch: usize,
    seq: usize,
    /// `[batch, seq]`.
    ids: Vec<u32>,
    /// `[batch, past + seq]`.
    mask: Vec<bool>,
    /// `[batch, seq]`.
    positions: Vec<u32>,
}

impl Input {
    /// `input_ids` of `[batch, seq]` and `attention_mask` of `[batch, past + seq]`, row by row; `position_ids` of
    /// `[batch, seq]` where they are not to be counted from the mask.
    ///
    /// # Errors
    /// When the lengths do not fit, or an id or a position is negative or too large for 32 bits.
    pub fn new(batch: usize, input_ids: &[i64], attention_mask: &[i64], position_ids: Option<&[i64]>) -> Result<Self> {
        let input = |why: String| Error::Input {
            why,
            help: "input_ids is [batch, seq], attention_mask is [batch, past + seq], position_ids is [batch, seq]",
        };
        if batch == 0 || input_ids.is_empty() || !input_ids.len().is_multiple_of(batch) {
            return Err(input(format!("{} token ids do not make {batch} equal rows", input_ids.len())));
        }
        let seq = input_ids.len() / batch;
        if !attention_mask.len().is_multiple_of(batch) || attention_mask.len() / batch < seq {
            let n = attention_mask.len();
            return Err(input(format!("{n} mask entries do not cover {batch} rows of {seq} tokens or more")));
        }
        let mask: Vec<bool> = attention_mask.iter().map(|m| *m != 0).collect();
        let unsigned = |what: &str, values: &[i64]| {
            let bad = |v: &i64| input(format!("{what} holds {v}"));
            values.iter().map(|v| u32::try_from(*v).map_err(|_| bad(v))).collect::<Result<Vec<u32>>>()
        };
        let positions = match position_ids {
            None => positions_of(&mask, batch, seq),
            Some(given) if given.len() == input_ids.len() => unsigned("position_ids", given)?,
            Some(given) => return Err(input(format!("{} positions for {} tokens", given.len(), input_ids.len()))),
        };
        Ok(Self { batch, seq, ids: unsigned("input_ids", input_ids)?, mask, positions })
    }

    /// One row of tokens without padding.
    ///
    /// # Errors
    /// When `ids` is empty.
    pub fn row(ids: &[u32]) -> Result<Self> {
        let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
        Self::new(1, &ids, &vec![1; ids.len()], None)
    }

    /// `(batch, seq)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.batch, self.seq)
    }

    /// Columns of the mask: past and new tokens.
    fn total(&self) -> usize {
        self.mask.len() / self.batch
    }
}

/// The last `seq` of `max(cumsum(mask) − 1, 0)` for each row.
fn positions_of(mask: &[bool], batch: usize, seq: usize) -> Vec<u32> {
    let total = mask.len() / batch;
    mask.chunks(total)
        .flat_map(|row| {
            let mut seen = 0u32;
            let positions = row.iter().map(move |m| {
                seen += u32::from(*m);
                seen.saturating_sub(1)
            });
            positions.skip(total - seq)
        })
        .collect()
}

/// A decoder whose weights are in memory.
#[derive(Debug)]
pub struct Decoder {
    spec: DecoderSpec,
    device: Device,
    dtype: DType,
    embedding: Tensor,
    layers: Vec<Layer>,
    final_norm: Tensor,
    head: Tensor,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Tensor,
    mlp_norm: Tensor,
    query: Affine,
    key: Affine,
    value: Affine,
    output: Affine,
    gate: Affine,
    up: Affine,
    down: Affine,
}

#[derive(Debug)]
struct Affine {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Affine {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        linear(x, &self.weight, self.bias.as_ref())
    }
}

/// What all layers of one pass share.
struct Pass {
    /// `[batch, seq, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    /// Added to the scores, `[batch, 1, seq, total]`; none where every key is visible.
    bias: Option<Tensor>,
}

impl Decoder {
    /// Loads a checkpoint's weights as `dtype` on `device`.
    ///
    /// # Errors
    /// When a tensor cannot be read or converted.
    pub fn load(checkpoint: &Checkpoint, dtype: DType, device: &Device) -> Result<Self> {
        Self::from_weights(checkpoint.spec(), |weight| {
            let tensor = checkpoint.tensor(&weight.name)?;
            tensor.to_dtype(dtype).and_then(|t| t.to_device(device)).map_err(Error::candle("loading a weight"))
        })
    }

    /// Builds a decoder from whatever `weight` gives; trainable tensors receive gradients.
    ///
    /// # Errors
    /// Those of `weight`.
    pub fn from_weights(spec: &DecoderSpec, weight: impl Fn(&WeightShape) -> Result<Tensor>) -> Result<Self> {
        let get = |role| weight(&WeightShape { role, name: spec.weight_name(role), shape: spec.weight_shape(role) });
        let affine = |layer, linear| {
            let weight = get(WeightRole::Weight(layer, linear))?;
            let bias = spec.has_bias(linear).then(|| get(WeightRole::Bias(layer, linear))).transpose()?;
            Ok::<_, Error>(Affine { weight, bias })
        };
        let embedding = get(WeightRole::Embedding)?;
        let layers = (0..spec.num_layers)
            .map(|layer| {
                Ok(Layer {
                    attention_norm: get(WeightRole::AttentionNorm(layer))?,
                    mlp_norm: get(WeightRole::MlpNorm(layer))?,
                    query: affine(layer, Linear::Query)?,
                    key: affine(layer, Linear::Key)?,
                    value: affine(layer, Linear::Value)?,
                    output: affine(layer, Linear::AttentionOutput)?,
                    gate: affine(layer, Linear::Gate)?,
                    up: affine(layer, Linear::Up)?,
                    down: affine(layer, Linear::Down)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            spec: spec.clone(),
            device: embedding.device().clone(),
            dtype: embedding.dtype(),
            layers,
            final_norm: get(WeightRole::FinalNorm)?,
            head: if spec.tied_embeddings { embedding.clone() } else { get(WeightRole::Head)? },
            embedding,
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type that the decoder computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The residual stream after the final norm, `[batch, seq, hidden_size]`. With a cache, the input's mask covers past
    /// and new tokens, and the cache grows by the new ones.
    ///
    /// # Errors
    /// When a token id is not in the vocabulary, the mask does not fit the cache, or the hook fails.
    pub fn hidden_states(&self, input: &Input, cache: Option<&mut KvCache>, hook: &dyn SiteHook) -> Result<Tensor> {
        self.check(input, cache.as_deref())?;
        let mut cache = cache;
        let action = Error::candle("running the decoder");
        let pass = self.pass(input).map_err(&action)?;
        let ids = Tensor::from_slice(&input.ids, input.ids.len(), &self.device).map_err(&action)?;
        let mut x = self
            .embedding
            .index_select(&ids, 0)
            .and_then(|x| x.reshape((input.batch, input.seq, self.spec.hidden_size)))
            .map_err(&action)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, self.spec.norm.epsilon).map_err(&action)?;
            let attended = self.attention(index, layer, &normed, &pass, cache.as_deref_mut(), hook)?;
            x = (x + attended).map_err(&action)?;
            x = self.mlp(layer, &x).and_then(|y| x + y).map_err(&action)?;
        }
        rms_norm(&x, &self.final_norm, self.spec.norm.epsilon).map_err(&action)
    }

    /// Logits of hidden states: `[…, hidden_size]` → `[…, vocab_size]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        linear(hidden, &self.head, None).map_err(Error::candle("computing logits"))
    }

    /// Logits of every position, `[batch, seq, vocab_size]`.
    ///
    /// # Errors
    /// Those of [`hidden_states`](Self::hidden_states).
    pub fn forward(&self, input: &Input, cache: Option<&mut KvCache>, hook: &dyn SiteHook) -> Result<Tensor> {
        self.logits(&self.hidden_states(input, cache, hook)?)
    }

    fn check(&self, input: &Input, cache: Option<&KvCache>) -> Result<()> {
        if let Some(id) = input.ids.iter().find(|id| **id as usize >= self.spec.vocab_size) {
            return Err(Error::Input {
                why: format!("token id {id} is not below the vocabulary size {}", self.spec.vocab_size),
                help: "use the tokenizer that belongs to the model",
            });
        }
        let past = cache.map_or(0, KvCache::len);
        if input.total() != past + input.seq {
            return Err(Error::Input {
                why: format!(
                    "the attention mask has {} columns for {past} past and {} new tokens",
                    input.total(),
                    input.seq
                ),
                help: "the mask covers past and new tokens",
            });
        }
        Ok(())
    }

    fn pass(&self, input: &Input) -> candle_core::Result<Pass> {
        let (cos, sin) = self.spec.attention.rotary.cos_sin(input.positions.iter().copied());
        let shape = (input.batch, input.seq, self.spec.attention.head_dim / 2);
        let tensor = |values: Vec<f64>| Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(self.dtype);
        Ok(Pass {
            cos: tensor(cos)?.to_device(&self.device)?,
            sin: tensor(sin)?.to_device(&self.device)?,
            bias: self.attention_bias(input)?,
        })
    }

    /// Zero where a query may see a key, the dtype's lowest number where it may not: causal, and never padding.
    fn attention_bias(&self, input: &Input) -> candle_core::Result<Option<Tensor>> {
        let (batch, seq, total) = (input.batch, input.seq, input.total());
        if seq == 1 && input.mask.iter().all(|m| *m) {
            return Ok(None);
        }
        let lowest = match self.dtype {
            DType::F16 => half::f16::MIN.to_f32(),
            DType::BF16 => half::bf16::MIN.to_f32(), // the lowest float32 would round to minus infinity
            _ => f32::MIN,
        };
        let mut bias = Vec::with_capacity(batch * seq * total);
        for row in input.mask.chunks(total) {
            for query in total - seq..total {
                bias.extend(row.iter().enumerate().map(|(key, m)| if *m && key <= query { 0.0 } else { lowest }));
            }
        }
        let bias = Tensor::from_vec(bias, (batch, 1, seq, total), &Device::Cpu)?;
        bias.to_dtype(self.dtype)?.to_device(&self.device).map(Some)
    }

    fn attention(
        &self,
        index: usize,
        layer: &Layer,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut KvCache>,
        hook: &dyn SiteHook,
    ) -> Result<Tensor> {
        let action = Error::candle("computing attention");
        let attention = &self.spec.attention;
        let (heads, kv_heads) = (attention.num_heads, attention.num_kv_heads);
        let query = self.heads(&layer.query, x, heads).and_then(|q| rope(&q, &pass.cos, &pass.sin)).map_err(&action)?;
        let key = self.heads(&layer.key, x, kv_heads).and_then(|k| rope(&k, &pass.cos, &pass.sin)).map_err(&action)?;
        let value = self.heads(&layer.value, x, kv_heads).and_then(|v| v.contiguous()).map_err(&action)?;
        let (key, value) = match cache {
            Some(cache) => cache.extend(index, key, value)?,
            None => (key, value),
        };
        let mixed = self.mix(&query, &key, &value, pass.bias.as_ref()).map_err(&action)?;
        let site = Site { layer: index, query: &query };
        let mixed = match hook.term(&site).map_err(Error::candle("computing the adapter's term"))? {
            Some(term) => (mixed + term).map_err(&action)?,
            None => mixed,
        };
        let (batch, _, seq, _) = query.dims4().map_err(&action)?;
        mixed
            .transpose(1, 2)
            .and_then(|y| y.reshape((batch, seq, heads * attention.head_dim)))
            .and_then(|y| layer.output.forward(&y))
            .map_err(&action)
    }

    /// A projection split into heads, `[batch, heads, seq, head_dim]`.
    fn heads(&self, projection: &Affine, x: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
        let (batch, seq, _) = x.dims3()?;
        projection.forward(x)?.reshape((batch, seq, heads, self.spec.attention.head_dim))?.transpose(1, 2)
    }

    /// Softmax attention. The query heads of one key-value head are stacked along the sequence, so that keys and values
    /// need no copies: `[batch, kv_heads, group · seq, head_dim]`.
    fn mix(&self, query: &Tensor, key: &Tensor, value: &Tensor, bias: Option<&Tensor>) -> candle_core::Result<Tensor> {
        let (batch, heads, seq, width) = query.dims4()?;
        let (_, kv_heads, total, _) = key.dims4()?;
        let stacked = (batch, kv_heads, heads / kv_heads * seq, width);
        let scores = query.reshape(stacked)?.matmul(&key.transpose(2, 3)?)?;
        let weights = masked_softmax(&scores.reshape((batch, heads, seq, total))?, bias, self.spec.attention.scale)?;
        let weights = weights.reshape((batch, kv_heads, heads / kv_heads * seq, total))?;
        weights.matmul(value)?.reshape((batch, heads, seq, width))
    }

    fn mlp(&self, layer: &Layer, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = rms_norm(x, &layer.mlp_norm, self.spec.norm.epsilon)?;
        let activation = match self.spec.mlp.activation {
            Activation::Silu => candle_nn::Activation::Silu,
            Activation::Gelu => candle_nn::Activation::Gelu,
            Activation::GeluTanh => candle_nn::Activation::GeluPytorchTanh,
            Activation::Relu => candle_nn::Activation::Relu,
        };
        let gate = activation.forward(&layer.gate.forward(&x)?)?;
        layer.down.forward(&(gate * layer.up.forward(&x)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_real_tokens() {
        let input = Input::new(2, &[0, 0, 5, 6, 7, 8, 9, 0], &[0, 0, 1, 1, 1, 1, 1, 0], None).unwrap();
        assert_eq!(input.positions, [0, 0, 0, 1, 0, 1, 2, 2]);
        let step = Input::new(2, &[5, 6], &[0, 1, 1, 1, 1, 1], None).unwrap();
        assert_eq!(step.positions, [1, 2]);
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let messages = [
            Input::new(2, &[1, 2, 3], &[1; 3], None),
            Input::new(1, &[1, 2, 3], &[1; 2], None),
            Input::new(1, &[1, -2], &[1; 2], None),
            Input::new(1, &[1, 2], &[1; 2], Some(&[0])),
            Input::new(0, &[], &[], None),
        ]
        .map(|r| r.unwrap_err().to_string());
        insta::assert_snapshot!(messages.join("\n"), @"
        the model's inputs do not fit: 3 token ids do not make 2 equal rows
        the model's inputs do not fit: 2 mask entries do not cover 1 rows of 3 tokens or more
        the model's inputs do not fit: input_ids holds -2
        the model's inputs do not fit: 1 positions for 2 tokens
        the model's inputs do not fit: 0 token ids do not make 0 equal rows
        ");
    }
}

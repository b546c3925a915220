//! The candle interpreter of a [`DecoderSpec`].

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::fused::{FusedLayer, Weights, fuse};
use super::hook::{LinearMap, Site, SiteHook};
use super::ops::{
    InnerMap, LabelLoss, LogitMap, LowRank, NormWeights, Rotation, Visibility, attention, attention_packed, label_loss,
    lookup, rope,
};
use super::{
    Checkpoint, DecoderSpec, Error, Input, KvCache, Linear, Norm, NormSite, QkNormOver, Result, WeightRole,
    WeightShape, Wiring, ops,
};

/// A decoder whose weights are in memory.
#[derive(Debug)]
pub struct Decoder {
    spec: DecoderSpec,
    device: Device,
    dtype: DType,
    embedding: Tensor,
    embedding_projection: Option<Tensor>,
    positions: Option<Tensor>,
    layers: Vec<Layer>,
    final_norm: Option<NormWeights>,
    head_projection: Option<Tensor>,
    head: LogitMap,
}

#[derive(Debug)]
struct Layer {
    weights: Weights,
    /// Pieces that can run as one operation each.
    fused: FusedLayer,
}

/// A linear map's weights.
#[derive(Clone, Debug)]
pub(super) struct Affine {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
}

impl Affine {
    pub(super) fn map(&self) -> InnerMap {
        InnerMap::new(&self.weight, self.bias.as_ref())
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::linear(x, &self.weight, self.bias.as_ref())
    }
}

/// What all layers of one pass share.
pub(super) struct Pass<'a> {
    /// By rotary embedding, cosines and sines of `[batch, seq, dim / 2]`.
    angles: Vec<(Tensor, Tensor)>,
    /// By window and number of trained keys.
    visibilities: BTreeMap<(Option<usize>, usize), Arc<Visibility>>,
    pub(super) hook: &'a dyn SiteHook,
}

impl Decoder {
    /// Loads a checkpoint's weights as `dtype` on `device`.
    ///
    /// # Errors
    /// When a tensor cannot be read or converted.
    pub fn load(checkpoint: &Checkpoint, dtype: DType, device: &Device) -> Result<Self> {
        Self::from_weights(checkpoint.spec(), |weight| {
            let tensor = checkpoint.weight(weight.role)?;
            tensor.to_dtype(dtype).and_then(|t| t.to_device(device)).map_err(Error::candle("loading a weight"))
        })
    }

    /// Builds a decoder from whatever `weight` gives; trainable tensors receive gradients.
    ///
    /// # Errors
    /// Those of `weight`.
    pub fn from_weights(spec: &DecoderSpec, weight: impl Fn(&WeightShape) -> Result<Tensor>) -> Result<Self> {
        let get = |role: WeightRole| weight(&WeightShape { role, name: role.name(), shape: spec.weight_shape(role) });
        let norm = |norm: Norm, weight, bias| {
            let bias = norm.bias.then(|| get(bias)).transpose()?;
            Ok::<_, Error>(NormWeights { norm, weight: get(weight)?, bias })
        };
        let affine = |layer, linear| {
            let weight = get(WeightRole::Weight(layer, linear))?;
            let bias = spec.has_bias(linear).then(|| get(WeightRole::Bias(layer, linear))).transpose()?;
            Ok::<_, Error>((linear, Affine { weight, bias }))
        };
        let embedding = get(WeightRole::Embedding)?;
        let norms = spec.norms();
        let layers = (0..spec.num_layers)
            .map(|layer| {
                let norms = norms.iter().map(|(site, kind)| {
                    let (weight, bias) = (WeightRole::Norm(layer, *site), WeightRole::NormBias(layer, *site));
                    Ok((*site, norm(*kind, weight, bias)?))
                });
                let norms = norms.collect::<Result<_>>()?;
                let linears = spec.linears().map(|linear| affine(layer, linear)).collect::<Result<_>>()?;
                let mut weights = Weights { norms, linears };
                let fused = fuse(spec, &mut weights).map_err(Error::candle("joining a layer's weights"))?;
                Ok(Layer { weights, fused })
            })
            .collect::<Result<_>>()?;
        let projected = |role| spec.embedding.width.map(|_| get(role)).transpose();
        let final_norm = || norm(spec.norm, WeightRole::FinalNorm, WeightRole::FinalNormBias);
        let head = if spec.head.tied { embedding.clone() } else { get(WeightRole::Head)? };
        Ok(Self {
            spec: spec.clone(),
            device: embedding.device().clone(),
            dtype: embedding.dtype(),
            embedding,
            embedding_projection: projected(WeightRole::EmbeddingProjection)?,
            positions: spec.embedding.positions.map(|_| get(WeightRole::Positions)).transpose()?,
            layers,
            final_norm: spec.final_norm.then(final_norm).transpose()?,
            head_projection: projected(WeightRole::HeadProjection)?,
            head: LogitMap {
                weight: head,
                bias: spec.head.bias.then(|| get(WeightRole::HeadBias)).transpose()?,
                scale: spec.head.scale,
                softcap: spec.head.softcap,
            },
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
        self.check(input, cache.as_deref(), hook)?;
        let mut cache = cache;
        let action = Error::candle("running the decoder");
        let pass = self.pass(input, hook).map_err(&action)?;
        let mut x = self.embed(input, hook).map_err(&action)?;
        for index in 0..self.layers.len() {
            hook.stream(index, &x).map_err(&action)?;
            x = self.layer(index, &x, &pass, cache.as_deref_mut())?;
        }
        hook.stream(self.layers.len(), &x).map_err(&action)?;
        self.finish(x)
    }

    /// What follows the last layer.
    pub(super) fn finish(&self, x: Tensor) -> Result<Tensor> {
        match &self.final_norm {
            Some(norm) => norm.forward(&x).map_err(Error::candle("running the decoder")),
            None => Ok(x),
        }
    }

    /// Whether gradients of what comes before the first layer are asked for.
    pub fn trains_embedding(&self) -> bool {
        let tables = [Some(&self.embedding), self.embedding_projection.as_ref(), self.positions.as_ref()];
        tables.into_iter().flatten().any(Tensor::track_op)
    }

    /// Logits of hidden states: `[…, hidden_size]` → `[…, vocab_size]`.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.head_input(hidden).and_then(|hidden| self.head.logits(&hidden));
        logits.map_err(Error::candle("computing logits"))
    }

    /// Negative log-likelihood of one label for each row of hidden states, `[rows, hidden_size]`, in nats.
    ///
    /// # Errors
    /// When the shape does not fit, or a label is not in the vocabulary.
    pub fn label_loss(&self, hidden: &Tensor, labels: &[u32]) -> Result<LabelLoss> {
        let loss = self.head_input(hidden).and_then(|hidden| label_loss(&hidden, &self.head, labels));
        loss.map_err(Error::candle("computing the loss"))
    }

    fn head_input(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        match &self.head_projection {
            Some(projection) => ops::linear(hidden, projection, None),
            None => Ok(hidden.clone()),
        }
    }

    /// Logits of every position, `[batch, seq, vocab_size]`.
    ///
    /// # Errors
    /// Those of [`hidden_states`](Self::hidden_states).
    pub fn forward(&self, input: &Input, cache: Option<&mut KvCache>, hook: &dyn SiteHook) -> Result<Tensor> {
        self.logits(&self.hidden_states(input, cache, hook)?)
    }

    pub(super) fn check(&self, input: &Input, cache: Option<&KvCache>, hook: &dyn SiteHook) -> Result<()> {
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
        if input.is_packed() && hook.prefix_length() > 0 {
            return Err(Error::Input {
                why: "rows of several texts meet trained keys, which are not a part of any one text's range".into(),
                help: "switch `packing` off for prefix tuning",
            });
        }
        if let Some(table) = self.spec.embedding.positions {
            let rows = table.rows.saturating_sub(table.offset + hook.prefix_length());
            if let Some(position) = input.positions.iter().find(|position| **position as usize >= rows) {
                return Err(Error::Input {
                    why: format!("position {position} is beyond the {rows} positions that the model has learned"),
                    help: "use a shorter sequence",
                });
            }
        }
        Ok(())
    }

    pub(super) fn embed(&self, input: &Input, hook: &dyn SiteHook) -> candle_core::Result<Tensor> {
        let spec = &self.spec;
        let mut x = lookup(&self.embedding, &input.ids)?;
        if let Some(projection) = &self.embedding_projection {
            x = ops::linear(&x, projection, None)?;
        }
        if let Some(scale) = spec.embedding.scale {
            x = (x * scale)?;
        }
        if let (Some(table), Some(learned)) = (&self.positions, spec.embedding.positions) {
            let shift = (learned.offset + hook.prefix_length()) as u32;
            let positions: Vec<u32> = input.positions.iter().map(|position| position + shift).collect();
            x = (x + lookup(table, &positions)?)?;
        }
        x.reshape((input.batch, input.seq, spec.hidden_size))
    }

    pub(super) fn pass<'a>(&self, input: &Input, hook: &'a dyn SiteHook) -> candle_core::Result<Pass<'a>> {
        let shift = hook.prefix_length() as u32;
        let positions: Vec<u32> = input.positions.iter().map(|position| position + shift).collect();
        let angles = self.spec.attention.rotary.iter().map(|rotary| {
            let (cos, sin) = rotary.cos_sin(&positions);
            let shape = (input.batch, input.seq, rotary.dim / 2);
            let tensor = |values: Vec<f64>| {
                Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(self.dtype)?.to_device(&self.device)
            };
            Ok((tensor(cos)?, tensor(sin)?))
        });
        let angles = angles.collect::<candle_core::Result<_>>()?;
        let mut visibilities = BTreeMap::new();
        for layer in &self.spec.layers {
            for prefix in [0, hook.prefix_length()] {
                if let Entry::Vacant(entry) = visibilities.entry((layer.window, prefix)) {
                    entry.insert(Arc::new(input.visibility(layer.window, prefix)?));
                }
            }
        }
        Ok(Pass { angles, visibilities, hook })
    }

    pub(super) fn layer(&self, index: usize, x: &Tensor, pass: &Pass, cache: Option<&mut KvCache>) -> Result<Tensor> {
        let Some(layer) = self.layers.get(index) else {
            let why = format!("there is no layer {index} of {}", self.layers.len());
            return Err(Error::Input { why, help: "layers count from 0" });
        };
        let action = Error::candle("running a layer");
        let norm = |site, x: &Tensor| match layer.weights.norms.get(&site) {
            Some(norm) => norm.forward(x).map_err(&action),
            None => Ok(x.clone()),
        };
        let add = |x: &Tensor, block: Tensor| {
            scaled(block, self.spec.residual_scale).and_then(|block| x + block).map_err(&action)
        };
        let mlp = |x: &Tensor| self.mlp(index, layer, x, pass).map_err(&action);
        match self.spec.wiring {
            Wiring::PreNorm => {
                let mixed = self.mix(index, layer, x, Some(NormSite::Attention), pass, cache)?;
                let beside = self.beside(index, [Linear::AttentionOutput], pass.hook).map_err(&action)?;
                let x = match layer.fused.output.as_ref().zip(beside) {
                    Some((output, [low_rank])) => {
                        let output = output.clone().with(low_rank);
                        output.forward(&mixed.attention, mixed.term.as_ref(), x).map_err(&action)?
                    }
                    None => add(x, self.output(index, layer, mixed, pass)?)?,
                };
                match layer.fused.mlp.as_ref().zip(self.beside(index, MLP, pass.hook).map_err(&action)?) {
                    Some(((mlp, Some(block)), beside)) => {
                        mlp.clone().with(beside).forward_block(&x, block).map_err(&action)
                    }
                    _ => add(&x, mlp(&norm(NormSite::Mlp, &x)?)?),
                }
            }
            Wiring::PostNorm | Wiring::SandwichNorm => {
                let mixed = self.attention(index, layer, &norm(NormSite::Attention, x)?, pass, cache)?;
                let x = add(x, norm(NormSite::AttentionOutput, &mixed)?)?;
                let mixed = mlp(&norm(NormSite::Mlp, &x)?)?;
                add(&x, norm(NormSite::MlpOutput, &mixed)?)
            }
            Wiring::SumNorm => {
                let mixed = self.attention(index, layer, x, pass, cache)?;
                let x = norm(NormSite::Attention, &add(x, mixed)?)?;
                norm(NormSite::Mlp, &add(&x, mlp(&x)?)?)
            }
            Wiring::Parallel | Wiring::ParallelSharedNorm => {
                let normed = norm(NormSite::Attention, x)?;
                let mixed = self.attention(index, layer, &normed, pass, cache)?;
                let fed = if self.spec.wiring == Wiring::Parallel { norm(NormSite::Mlp, x)? } else { normed };
                add(&add(x, mixed)?, mlp(&fed)?)
            }
        }
    }

    /// The low-rank products beside some maps of a layer, where the hook does no more to these; none where it does.
    fn beside<const N: usize>(
        &self,
        index: usize,
        linears: [Linear; N],
        hook: &dyn SiteHook,
    ) -> candle_core::Result<Option<[Option<LowRank>; N]>> {
        let mut found = [const { None }; N];
        for (found, linear) in found.iter_mut().zip(linears) {
            if hook.changes(index, linear) {
                *found = hook.low_rank(index, linear, self.dtype)?;
                if found.is_none() {
                    return Ok(None);
                }
            }
        }
        Ok(Some(found))
    }

    fn linear(
        &self,
        index: usize,
        layer: &Layer,
        linear: Linear,
        x: &Tensor,
        hook: &dyn SiteHook,
    ) -> candle_core::Result<Tensor> {
        let Some(affine) = layer.weights.linears.get(&linear) else {
            candle_core::bail!("layer {index} has no {}", linear.module())
        };
        if let Some([low_rank @ Some(_)]) = self.beside(index, [linear], hook)? {
            let map = affine.map().with(0, low_rank);
            if map.is_held() && x.dtype() == self.dtype {
                return map.forward(x);
            }
        }
        let output = affine.forward(x)?;
        let (weight, bias) = (&affine.weight, affine.bias.as_ref());
        let map = LinearMap { layer: index, linear, input: x, weight, bias, output: &output };
        Ok(hook.linear(&map)?.unwrap_or(output))
    }

    /// Attention and its output map, of an input that is normalised already where the layer does so.
    fn attention(
        &self,
        index: usize,
        layer: &Layer,
        x: &Tensor,
        pass: &Pass,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let mixed = self.mix(index, layer, x, None, pass, cache)?;
        self.output(index, layer, mixed, pass)
    }

    /// The output map of attention.
    fn output(&self, index: usize, layer: &Layer, mixed: Mixed, pass: &Pass) -> Result<Tensor> {
        let action = Error::candle("computing attention");
        let sum = match mixed.term {
            Some(term) => (mixed.attention + term).map_err(&action)?,
            None => mixed.attention,
        };
        sum.flatten_from(2)
            .and_then(|sum| self.linear(index, layer, Linear::AttentionOutput, &sum, pass.hook))
            .map_err(&action)
    }

    /// Attention before its output map, and the hook's term; `norm` says what normalises `x` first.
    fn mix(
        &self,
        index: usize,
        layer: &Layer,
        x: &Tensor,
        norm: Option<NormSite>,
        pass: &Pass,
        cache: Option<&mut KvCache>,
    ) -> Result<Mixed> {
        let action = Error::candle("computing attention");
        let spec = self.spec.layers.get(index).copied();
        let window = spec.and_then(|spec| spec.window);
        let rotation = spec.and_then(|spec| spec.rotary).and_then(|rotary| {
            let (cos, sin) = pass.angles.get(rotary)?.clone();
            Some(Rotation { cos, sin, interleaved: self.spec.attention.rotary.get(rotary)?.interleaved })
        });
        let (scale, cap) = (self.spec.attention.scale, self.spec.attention.softcap);
        let projections = [Linear::Query, Linear::Key, Linear::Value];
        let beside = self.beside(index, projections, pass.hook).map_err(&action)?;
        let fused = layer.fused.qkv.as_ref().filter(|_| norm.is_some() && !pass.hook.sees_unrotated(index));
        let (heads, packed) = match fused.zip(beside) {
            Some((qkv, beside)) => {
                let mut qkv = qkv.clone();
                let mut first = 0;
                for (linear, low_rank) in projections.into_iter().zip(beside) {
                    qkv = qkv.with(first, low_rank).map_err(&action)?;
                    first += self.spec.linear_shape(linear)[0];
                }
                let qkv = qkv.forward(x, rotation).map_err(&action)?;
                (self.split(&qkv).map_err(&action)?, Some(qkv))
            }
            None => {
                let normed = match norm.and_then(|site| layer.weights.norms.get(&site)) {
                    Some(norm) => norm.forward(x).map_err(&action)?,
                    None => x.clone(),
                };
                (self.project(index, layer, &normed, rotation, pass.hook).map_err(&action)?, None)
            }
        };
        let past = cache.is_some();
        let (all_keys, all_values) = match cache {
            Some(cache) => cache.extend(index, heads.key.clone(), heads.value.clone())?,
            None => (heads.key.clone(), heads.value.clone()),
        };
        let (all_keys, all_values, prefix) = prepend(pass.hook, index, all_keys, all_values).map_err(&action)?;
        let visibility = pass.visibilities.get(&(window, prefix)).ok_or_else(|| Error::Input {
            why: format!("the hook gives layer {index} {prefix} keys, not {}", pass.hook.prefix_length()),
            help: "every layer has as many trained keys as the hook says, or none",
        })?;
        let attention = match packed.filter(|_| !past && prefix == 0) {
            Some(qkv) => attention_packed(&qkv, self.spec.attention.num_kv_heads, visibility, scale, cap),
            None => attention(&heads.query, &all_keys, &all_values, visibility, scale, cap).and_then(|y| view(&y)),
        };
        let site = Site {
            layer: index,
            query: &heads.query,
            unrotated: heads.unrotated.as_ref().map(|(query, _)| query),
            key: &heads.key,
            unrotated_key: heads.unrotated.as_ref().map(|(_, key)| key),
            value: &heads.value,
        };
        let term = pass.hook.term(&site).map_err(Error::candle("computing the adapter's term"))?;
        let term = term.map(|term| view(&term)?.contiguous()).transpose().map_err(&action)?;
        Ok(Mixed { attention: attention.map_err(&action)?, term })
    }

    /// Views of `[batch, seq, num_heads + 2 · num_kv_heads, head_dim]`.
    fn split(&self, qkv: &Tensor) -> candle_core::Result<Heads> {
        let (heads, kv_heads) = (self.spec.attention.num_heads, self.spec.attention.num_kv_heads);
        let part = |start, count| view(&qkv.narrow(2, start, count)?);
        Ok(Heads {
            query: part(0, heads)?,
            key: part(heads, kv_heads)?,
            value: part(heads + kv_heads, kv_heads)?,
            unrotated: None,
        })
    }

    /// The projections one by one.
    fn project(
        &self,
        index: usize,
        layer: &Layer,
        x: &Tensor,
        rotation: Option<Rotation>,
        hook: &dyn SiteHook,
    ) -> candle_core::Result<Heads> {
        let project = |linear| self.heads(index, layer, linear, x, hook);
        let rotate = |x: &Tensor| match &rotation {
            Some(Rotation { cos, sin, interleaved }) => rope(x, cos, sin, *interleaved),
            None => Ok(x.clone()),
        };
        let (query, key) = (project(Linear::Query)?, project(Linear::Key)?);
        Ok(Heads {
            query: view(&rotate(&query)?)?,
            key: view(&rotate(&key)?)?,
            value: view(&project(Linear::Value)?)?,
            unrotated: Some((view(&query)?, view(&key)?)),
        })
    }

    /// A projection split into heads and normalised where the model does so, `[batch, seq, heads, head_dim]`.
    fn heads(
        &self,
        index: usize,
        layer: &Layer,
        linear: Linear,
        x: &Tensor,
        hook: &dyn SiteHook,
    ) -> candle_core::Result<Tensor> {
        let (batch, seq, _) = x.dims3()?;
        let attention = &self.spec.attention;
        let (heads, site) = match linear {
            Linear::Query => (attention.num_heads, Some(NormSite::Query)),
            Linear::Key => (attention.num_kv_heads, Some(NormSite::Key)),
            _ => (attention.num_kv_heads, None),
        };
        let norm = site.and_then(|site| layer.weights.norms.get(&site));
        let whole = attention.qk_norm.is_some_and(|qk| qk.over == QkNormOver::Projection);
        let mut y = self.linear(index, layer, linear, x, hook)?;
        if let Some(norm) = norm.filter(|_| whole) {
            y = norm.forward(&y)?;
        }
        y = y.reshape((batch, seq, heads, attention.head_dim))?;
        if let Some(norm) = norm.filter(|_| !whole) {
            y = norm.forward(&y)?;
        }
        Ok(y)
    }

    fn mlp(&self, index: usize, layer: &Layer, x: &Tensor, pass: &Pass) -> candle_core::Result<Tensor> {
        if let Some(((mlp, _), beside)) = layer.fused.mlp.as_ref().zip(self.beside(index, MLP, pass.hook)?) {
            return mlp.clone().with(beside).forward(x);
        }
        let linear = |linear, x: &Tensor| self.linear(index, layer, linear, x, pass.hook);
        let activation = self.spec.mlp.activation;
        let inner = if self.spec.mlp.gated {
            ops::gated(activation, &linear(Linear::Gate, x)?, &linear(Linear::Up, x)?)?
        } else {
            activation.forward(&linear(Linear::Up, x)?)?
        };
        linear(Linear::Down, &inner)
    }
}

/// Attention of a layer before its output map, and what a hook adds to it, `[batch, seq, num_heads, head_dim]` each.
struct Mixed {
    attention: Tensor,
    term: Option<Tensor>,
}

/// `[batch, heads, seq, head_dim]` each; query and key rotated.
struct Heads {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    /// Query and key before their rotation.
    unrotated: Option<(Tensor, Tensor)>,
}

/// Between `[batch, seq, heads, width]` and `[batch, heads, seq, width]`.
fn view(x: &Tensor) -> candle_core::Result<Tensor> {
    x.transpose(1, 2)
}

/// The maps of a gated block.
const MLP: [Linear; 3] = [Linear::Gate, Linear::Up, Linear::Down];

/// The hook's trained keys and values before those of the tokens, and how many there are.
fn prepend(
    hook: &dyn SiteHook,
    layer: usize,
    keys: Tensor,
    values: Tensor,
) -> candle_core::Result<(Tensor, Tensor, usize)> {
    let Some((prefix_keys, prefix_values)) = hook.prefix(layer)? else { return Ok((keys, values, 0)) };
    let (batch, length) = (keys.dim(0)?, prefix_keys.dim(1)?);
    let join = |prefix: Tensor, own: Tensor| {
        let (heads, _, width) = prefix.dims3()?;
        let prefix = prefix.to_dtype(own.dtype())?.unsqueeze(0)?;
        let prefix = prefix.expand((batch, heads, length, width))?.contiguous()?;
        Tensor::cat(&[&prefix, &own], 2)
    };
    Ok((join(prefix_keys, keys)?, join(prefix_values, values)?, length))
}

fn scaled(x: Tensor, factor: f64) -> candle_core::Result<Tensor> {
    if factor == 1.0 { Ok(x) } else { x * factor }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hook of two trained keys in every layer.
    struct TwoKeys;

    impl SiteHook for TwoKeys {
        fn prefix_length(&self) -> usize {
            2
        }
    }

    #[test]
    fn packed_rows_and_trained_keys_are_refused_together() {
        let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/demo/model");
        let decoder = Decoder::load(&Checkpoint::open(&model).unwrap(), DType::F32, &Device::Cpu).unwrap();
        let input = || Input::new(1, &[5, 6, 7, 8], &[1; 4], Some(&[0, 1, 0, 1])).unwrap();
        let packed = input().with_segments(vec![1, 1, 2, 2]).unwrap();
        let error = decoder.hidden_states(&packed, None, &TwoKeys).unwrap_err().to_string();
        assert!(error.contains("rows of several texts meet trained keys"), "{error}");
        decoder.hidden_states(&input(), None, &TwoKeys).unwrap();
    }
}

//! LoRA (arXiv 2106.09685) of a layer's linear maps, `y = W x + b + s · B A x`, with `s = alpha / rank`, or
//! `alpha / √rank` with `rslora` (arXiv 2312.03732).
//!
//! With `dora` (arXiv 2402.09353) the columns of the sum are scaled to a trained magnitude,
//! `y = (W x + s · B A x) · m / ‖W + s · B A‖ + b`, the norm taken over each output's row. As the paper's section 4.3
//! proposes and PEFT does, no gradient goes through the norm. All that is added to the frozen map's output then sees the
//! input that dropout leaves, the part of `W x` too, as in PEFT.
//!
//! | tensor | shape | start |
//! |---|---|---|
//! | `layers.{i}.{module}.lora_A` | `[rank, in]` | uniform within `±1/√in` |
//! | `layers.{i}.{module}.lora_B` | `[out, rank]` | zero |
//! | `layers.{i}.{module}.magnitude` | `[out]` | `‖W‖`, with `dora` |

use std::cell::{Cell, OnceCell};
use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::method::{Base, Start, TensorSpec, Tensors};
use super::term::row_norms;
use super::{AdapterConfig, AdapterMethod, Error, Result};
use crate::base::ops::{LowRank, dropout, linear as apply};
use crate::base::{DecoderSpec, Linear, LinearMap, SiteHook, WeightRole};

/// LoRA (arXiv 2106.09685) and its variants rsLoRA and DoRA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Lora {
    /// Rows of A.
    pub rank: usize,
    /// The term is multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Multiplied by `alpha / √rank` instead (rsLoRA).
    pub rslora: bool,
    /// Whether magnitudes are trained too (DoRA).
    pub dora: bool,
    /// The part of A's inputs that a training step leaves out at random; the others are scaled up. With `dora`, of W's inputs
    /// too in what is added to its output. Nothing is left out in use.
    pub dropout: f64,
    /// The linear maps that are adapted; all where not given.
    pub targets: Option<Vec<Target>>,
    /// Ranks of single maps, by `layers.0.self_attn.q_proj` or an end of that.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of single maps.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// The adapted maps one by one, `layers.0.self_attn.q_proj`, where `layers` and `targets` cannot say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules: Option<Vec<String>>,
}

/// A linear map by transformers' name of it in a Llama.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// Attention output.
    OProj,
    /// The MLP's gate.
    GateProj,
    /// Into the MLP.
    UpProj,
    /// Out of the MLP.
    DownProj,
}

impl From<Target> for Linear {
    fn from(target: Target) -> Self {
        match target {
            Target::QProj => Self::Query,
            Target::KProj => Self::Key,
            Target::VProj => Self::Value,
            Target::OProj => Self::AttentionOutput,
            Target::GateProj => Self::Gate,
            Target::UpProj => Self::Up,
            Target::DownProj => Self::Down,
        }
    }
}

impl From<Linear> for Target {
    fn from(linear: Linear) -> Self {
        match linear {
            Linear::Query => Self::QProj,
            Linear::Key => Self::KProj,
            Linear::Value => Self::VProj,
            Linear::AttentionOutput => Self::OProj,
            Linear::Gate => Self::GateProj,
            Linear::Up => Self::UpProj,
            Linear::Down => Self::DownProj,
        }
    }
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            rslora: false,
            dora: false,
            dropout: 0.0,
            targets: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            modules: None,
        }
    }
}

/// Prefold's name of a layer's map: `layers.0.self_attn.q_proj`.
pub fn module_name(layer: usize, linear: Linear) -> String {
    format!("layers.{layer}.{}", linear.module())
}

/// The entry of the longest pattern that a module's name is or ends with.
fn lookup<T: Copy>(patterns: &BTreeMap<String, T>, module: &str) -> Option<T> {
    let fits = |pattern: &str| module.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    patterns.iter().filter(|(pattern, _)| fits(pattern)).max_by_key(|(pattern, _)| pattern.len()).map(|(_, v)| *v)
}

impl Lora {
    /// The adapted maps in the order of layers and use.
    pub fn sites(&self, config: &AdapterConfig) -> Vec<(usize, Linear)> {
        let is_target = |linear: Linear| self.targets.as_ref().is_none_or(|t| t.contains(&linear.into()));
        let is_named =
            |layer, linear| self.modules.as_ref().is_none_or(|modules| modules.contains(&module_name(layer, linear)));
        let layers = config.adapted_layers();
        let pairs = layers.iter().flat_map(|layer| Linear::ALL.map(|linear| (*layer, linear)));
        pairs.filter(|(layer, linear)| is_target(*linear) && is_named(*layer, *linear)).collect()
    }

    /// The rank of a map.
    pub fn rank_of(&self, module: &str) -> usize {
        lookup(&self.rank_pattern, module).unwrap_or(self.rank)
    }

    /// The alpha of a map.
    pub fn alpha_of(&self, module: &str) -> f64 {
        lookup(&self.alpha_pattern, module).unwrap_or(self.alpha)
    }

    /// The factor on `B A` of a map.
    pub fn scale_of(&self, module: &str) -> f64 {
        let rank = self.rank_of(module) as f64;
        self.alpha_of(module) / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The tensors of a map.
    ///
    /// # Errors
    /// When one is missing.
    pub fn map(&self, tensors: &Tensors, layer: usize, linear: Linear) -> Result<LoraMap> {
        let module = module_name(layer, linear);
        let get = |part: &str| {
            let name = format!("{module}.{part}");
            tensors.get(&name).cloned().ok_or(Error::MissingTensor { name, shape: Vec::new() })
        };
        let magnitude = self.dora.then(|| get("magnitude")).transpose()?;
        let scale = self.scale_of(&module);
        Ok(LoraMap { a: get("lora_A")?, b: get("lora_B")?, magnitude, scale, ratio: OnceCell::new() })
    }
}

impl AdapterMethod for Lora {
    fn check(&self, config: &AdapterConfig) -> Result<()> {
        let fail = |field, why: String, help| Err(Error::Config { field, why, help });
        let ranks = self.rank_pattern.values().chain([&self.rank]);
        if let Some(rank) = { ranks }.find(|rank| **rank == 0 || **rank > 1 << 16) {
            return fail("rank", format!("is {rank}"), "it is 1 to 65536");
        }
        let alphas = self.alpha_pattern.values().chain([&self.alpha]);
        if let Some(alpha) = { alphas }.find(|alpha| !alpha.is_finite()) {
            return fail("alpha", format!("is {alpha}"), "it is a finite number");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return fail("dropout", format!("is {}", self.dropout), "it is at least 0 and below 1");
        }
        for (field, value) in [("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)] {
            if value.is_none_or(|value| value == 0 || value > 1 << 24) {
                return fail(field, "is missing or no width".into(), "lora needs the width of the base model");
            }
        }
        let known = |module: &&String| {
            let named = |layer| Linear::ALL.map(|linear| module_name(layer, linear)).contains(*module);
            !config.adapted_layers().into_iter().any(named)
        };
        if let Some(module) = self.modules.iter().flatten().find(known) {
            return fail("modules", format!("names `{module}`"), "a name is like layers.0.self_attn.q_proj");
        }
        if self.sites(config).is_empty() {
            return fail("targets", "leaves nothing to adapt".into(), "name at least one linear map");
        }
        Ok(())
    }

    fn tensors(&self, config: &AdapterConfig) -> Option<BTreeMap<String, TensorSpec>> {
        let mut tensors = BTreeMap::new();
        for (layer, linear) in self.sites(config) {
            let module = module_name(layer, linear);
            let (rank, [out, width]) = (self.rank_of(&module), config.linear_shape(linear));
            let bound = (width as f64).sqrt().recip();
            tensors.insert(format!("{module}.lora_A"), TensorSpec::new([rank, width], Start::Uniform(bound)));
            tensors.insert(format!("{module}.lora_B"), TensorSpec::zeros([out, rank]));
            if self.dora {
                tensors.insert(format!("{module}.magnitude"), TensorSpec::new([out], Start::Constant(1.0)));
            }
        }
        Some(tensors)
    }

    fn start(&self, config: &AdapterConfig, base: &Base, tensors: &mut Tensors) -> Result<()> {
        for (layer, linear) in self.sites(config).into_iter().filter(|_| self.dora) {
            let norms = row_norms(&base.weight(WeightRole::Weight(layer, linear))?);
            let norms = norms.map_err(Error::candle("measuring a weight"))?;
            tensors.insert(format!("{}.magnitude", module_name(layer, linear)), norms);
        }
        Ok(())
    }

    fn check_options(&self, config: &AdapterConfig, spec: &DecoderSpec) -> Result<()> {
        for (layer, linear) in self.sites(config) {
            if !spec.linears().any(|known| known == linear) {
                return Err(Error::Config {
                    field: "targets",
                    why: format!("names `{}`, which the model does not have", module_name(layer, linear)),
                    help: "name maps of the model, or leave `targets` out for all",
                });
            }
        }
        Ok(())
    }

    fn hook(&self, config: &AdapterConfig, tensors: &Tensors) -> Result<Box<dyn SiteHook>> {
        let maps = self
            .sites(config)
            .into_iter()
            .map(|(layer, linear)| Ok(((layer, linear), self.map(tensors, layer, linear)?)));
        Ok(Box::new(LoraHook { maps: maps.collect::<Result<_>>()?, dropout: self.dropout, pass: Cell::new(None) }))
    }

    /// A sum with zero changes nothing, but a runtime may compute a product that is read by a sum in another way than one
    /// that is not: tract does in float16.
    fn zeros_are_the_base(&self) -> bool {
        false
    }
}

/// The tensors of one adapted map.
#[derive(Debug)]
pub struct LoraMap {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// `[out]`.
    pub magnitude: Option<Tensor>,
    /// The factor on `B A`.
    pub scale: f64,
    /// `m / ‖W + s · B A‖` where nothing of it is trained.
    ratio: OnceCell<Tensor>,
}

impl LoraMap {
    /// `‖W + s · B A‖` over each row of the `[out, in]` matrix, in the adapter's type, without gradient.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn norms(&self, weight: &Tensor) -> candle_core::Result<Tensor> {
        let product = (self.b.detach().matmul(&self.a.detach())? * self.scale)?;
        row_norms(&(weight.detach().to_dtype(product.dtype())? + product)?)
    }

    /// The same tensors in another type.
    ///
    /// # Errors
    /// When candle fails.
    pub fn to_dtype(&self, dtype: DType) -> candle_core::Result<Self> {
        let to = |x: &Tensor| x.to_dtype(dtype);
        let magnitude = self.magnitude.as_ref().map(to).transpose()?;
        Ok(Self { a: to(&self.a)?, b: to(&self.b)?, magnitude, scale: self.scale, ratio: OnceCell::new() })
    }

    fn ratio(&self, magnitude: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        if let Some(ratio) = self.ratio.get() {
            return Ok(ratio.clone());
        }
        let ratio = (magnitude / self.norms(weight)?)?;
        if !magnitude.track_op() && self.ratio.set(ratio.clone()).is_err() {
            candle_core::bail!("the ratio was set while it was computed");
        }
        Ok(ratio)
    }

    /// `W + s · B A` in the adapter's type, its rows scaled to their magnitudes where these are trained.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn merged(&self, weight: &Tensor) -> candle_core::Result<Tensor> {
        let sum = (weight.to_dtype(self.b.dtype())? + (self.b.matmul(&self.a)? * self.scale)?)?;
        match &self.magnitude {
            Some(magnitude) => sum.broadcast_mul(&(magnitude / row_norms(&sum)?)?.unsqueeze(1)?),
            None => Ok(sum),
        }
    }

    /// `kept` is what dropout leaves of the input.
    fn output(&self, map: &LinearMap, kept: Option<&Tensor>) -> candle_core::Result<Tensor> {
        let dtype = map.input.dtype();
        let to = |x: &Tensor| if x.dtype() == dtype { Ok(x.clone()) } else { x.to_dtype(dtype) };
        let inner = (apply(kept.unwrap_or(map.input), &to(&self.a)?, None)? * self.scale)?;
        let delta = apply(&inner, &to(&self.b)?, None)?;
        let Some(magnitude) = &self.magnitude else { return map.output + delta };
        let ratio = to(&self.ratio(magnitude, map.weight)?)?;
        if let Some(kept) = kept {
            let moved = apply(kept, map.weight, None)?.broadcast_mul(&(&ratio - 1.0)?)?;
            return (map.output + moved)? + delta.broadcast_mul(&ratio)?;
        }
        let plain = match map.bias {
            Some(bias) => map.output.broadcast_sub(bias)?,
            None => map.output.clone(),
        };
        let scaled = (plain + delta)?.broadcast_mul(&ratio)?;
        match map.bias {
            Some(bias) => scaled.broadcast_add(bias),
            None => Ok(scaled),
        }
    }
}

/// The method at work on a decoder.
struct LoraHook {
    maps: BTreeMap<(usize, Linear), LoraMap>,
    dropout: f64,
    /// The pass of training at hand, if one is.
    pass: Cell<Option<u64>>,
}

impl LoraHook {
    /// The input with a part of it left out. What is left out follows from the pass and the map, so that a layer that is
    /// computed again leaves out the same.
    fn drop_out(&self, map: &LinearMap) -> candle_core::Result<Option<Tensor>> {
        let Some(pass) = self.pass.get().filter(|_| self.dropout > 0.0) else { return Ok(None) };
        let site = (map.layer * Linear::ALL.len() + map.linear as usize) as u64;
        dropout(map.input, self.dropout, pass ^ site.wrapping_mul(0x9e37_79b9_7f4a_7c15)).map(Some)
    }
}

impl SiteHook for LoraHook {
    fn changes(&self, layer: usize, linear: Linear) -> bool {
        self.maps.contains_key(&(layer, linear))
    }

    fn sees_unrotated(&self, _layer: usize) -> bool {
        false
    }

    fn linear(&self, map: &LinearMap) -> candle_core::Result<Option<Tensor>> {
        let Some(lora) = self.maps.get(&(map.layer, map.linear)) else { return Ok(None) };
        lora.output(map, self.drop_out(map)?.as_ref()).map(Some)
    }

    fn low_rank(&self, layer: usize, linear: Linear, dtype: DType) -> candle_core::Result<Option<LowRank>> {
        let drops_out = self.dropout > 0.0 && self.pass.get().is_some();
        let map = self.maps.get(&(layer, linear)).filter(|map| map.magnitude.is_none() && !drops_out);
        map.map(|map| Ok(LowRank { a: map.a.to_dtype(dtype)?, b: map.b.to_dtype(dtype)?, scale: map.scale }))
            .transpose()
    }

    fn begin_pass(&self, number: u64) {
        self.pass.set(Some(number));
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Output and gradients of one map in PEFT's training, with the same part of the input left out.
    #[test]
    fn dropout_with_magnitudes_is_peft_s() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/peft/dora_dropout.safetensors");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let [a, b, magnitude] = ["a", "b", "magnitude"].map(|name| Var::from_tensor(&tensors[name]).unwrap());
        let lora = LoraMap {
            a: a.as_tensor().clone(),
            b: b.as_tensor().clone(),
            magnitude: Some(magnitude.as_tensor().clone()),
            scale: 1.5,
            ratio: OnceCell::new(),
        };
        let (input, weight, bias) = (&tensors["x"], &tensors["weight"], Some(&tensors["bias"]));
        let output = apply(input, weight, bias).unwrap();
        let map = LinearMap { layer: 0, linear: Linear::Query, input, weight, bias, output: &output };
        let y = lora.output(&map, Some(&tensors["kept"])).unwrap();
        let close = |found: &Tensor, expected: &Tensor, what: &str| {
            let distance = (found - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(distance < 1e-12, "{what}: {distance:e}");
        };
        close(&y, &tensors["y"], "output");
        let plain = lora.output(&map, None).unwrap();
        assert!((plain - &y).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap() > 0.1);
        let count = y.elem_count();
        let factors = (0..count).map(|i| -1.0 + 2.0 * i as f64 / (count - 1) as f64).collect();
        let factors = Tensor::from_vec(factors, y.shape(), &Device::Cpu).unwrap();
        let store = (y * factors).unwrap().sum_all().unwrap().backward().unwrap();
        for (name, var) in [("a", &a), ("b", &b), ("magnitude", &magnitude)] {
            close(store.get(var).unwrap(), &tensors[&format!("grad.{name}")], name);
        }
    }
}

//! A small model, and a session that runs it with candle in the place of a graph and can be told to be wrong.

pub(super) use crate::base::testing::shared;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor as CandleTensor};
use ndarray::{Array2, ArrayD};
use rand::{RngExt, SeedableRng};

use super::{Budget, Candidate, Case, CaseOptions, Check, Model, Reference, generated_prompts, standard_cases};
use crate::adapter::{Adapter, AdapterConfig};
use crate::base::{Decoder, DecoderSpec, Input, NoHook, SiteHook, WeightShape, family};
use crate::runtime::{self, Dim, NamedValues, Port, RuntimeInfo, Session, Tensor, library};

pub(super) fn tiny_spec() -> DecoderSpec {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0,
        "intermediate_size": 24, "hidden_act": "silu", "tie_word_embeddings": true,
    });
    family::spec_from_config(std::path::Path::new("config.json"), &config).unwrap()
}

/// A decoder with weights of about the size of a trained one's.
pub(super) fn tiny_decoder(dtype: DType) -> Decoder {
    Decoder::from_weights(&tiny_spec(), |weight| tiny_weight(weight, dtype)).unwrap()
}

pub(super) fn tiny_weight(weight: &WeightShape, dtype: DType) -> crate::base::Result<CandleTensor> {
    let scale = if weight.shape.len() == 1 { 1.0 } else { 0.4 };
    noise(&weight.name, &weight.shape, scale).to_dtype(dtype).map_err(crate::base::Error::candle("making a weight"))
}

/// Numbers between `-scale` and `scale`, the same for the same name.
fn noise(name: &str, shape: &[usize], scale: f64) -> CandleTensor {
    let seed = name.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(257).wrapping_add(byte.into()));
    let mut random = rand_pcg::Pcg64Mcg::seed_from_u64(seed);
    let values = (0..shape.iter().product::<usize>()).map(|_| scale * random.random_range(-1.0..1.0));
    CandleTensor::from_vec(values.collect::<Vec<f64>>(), shape, &Device::Cpu).unwrap()
}

/// A weight with its first element moved by `by`.
pub(super) fn perturbed(weight: CandleTensor, by: f64) -> CandleTensor {
    let mut moved = vec![0.0; weight.elem_count()];
    moved[0] = by;
    let moved = CandleTensor::from_vec(moved, weight.shape(), &Device::Cpu).unwrap();
    (&weight + moved.to_dtype(weight.dtype()).unwrap()).unwrap()
}

/// The ONNX Runtime library of this machine, or none with a message.
pub(super) fn ort_library() -> Option<PathBuf> {
    let found =
        crate::files::cache_folder().map_err(runtime::Error::from).and_then(|cache| library::find(None, &cache));
    found.inspect_err(|error| eprintln!("skipped: {error}; `prefold runtime install` gets it")).ok()
}

pub(super) fn cases(spec: &DecoderSpec) -> Vec<Case> {
    let options = CaseOptions { seed: 7, lengths: vec![12, 5, 8], steps: 4 };
    standard_cases(&generated_prompts(spec, &options), options.steps).unwrap()
}

/// A small adapter, and large enough to see.
pub(super) fn tiny_adapter(scale: f64) -> Adapter {
    let spec = tiny_spec();
    let config = serde_json::json!({
        "method": "prefix_plus", "num_layers": spec.num_layers,
        "num_heads": spec.attention.num_heads, "head_dim": spec.attention.head_dim,
    });
    let config: AdapterConfig = serde_json::from_value(config).unwrap();
    let mut tensors = std::collections::BTreeMap::new();
    for (name, shape) in crate::adapter::shapes(&config) {
        tensors.insert(name.clone(), noise(&name, &shape, scale));
    }
    Adapter::new(config, tensors).unwrap()
}

/// A decoder with at most an adapter.
pub(super) struct Candle {
    pub(super) decoder: Decoder,
    hook: Box<dyn SiteHook>,
}

impl Candle {
    pub(super) fn new(decoder: Decoder, adapter: Option<&Adapter>) -> Self {
        let hook = match adapter {
            Some(adapter) => adapter.hook(decoder.spec(), &Device::Cpu).unwrap(),
            None => Box::new(NoHook),
        };
        Self { decoder, hook }
    }

    pub(super) fn model(&self) -> Model<'_> {
        Model { decoder: &self.decoder, hook: &*self.hook }
    }
}

/// The check of a model by float64, float32 for candle's own run; `weights` makes both.
pub(super) fn check(weights: impl Fn(DType) -> Decoder, adapter: Option<&Adapter>) -> Check {
    let reference = Candle::new(weights(DType::F64), adapter);
    let reference = Reference::compute(reference.model(), cases(reference.decoder.spec())).unwrap();
    let model = Candle::new(weights(DType::F32), adapter);
    Check::new(reference, model.model(), Budget::of(DType::F32, model.decoder.spec()).unwrap()).unwrap()
}

/// A candidate that gives `session`.
pub(super) fn candidate(session: impl Session + 'static) -> Candidate<'static> {
    Candidate { name: "test".into(), open: Box::new(|| Ok(Box::new(session))) }
}

/// What is done to mask and positions before the decoder sees them.
pub(super) type Distort = fn(&mut Array2<i64>, &mut Array2<i64>);

pub(super) const FAITHFUL: Distort = |_, _| {};
pub(super) const SHIFTED: Distort = |_, positions| *positions += 1;
pub(super) const UNMASKED: Distort = |mask, _| mask.fill(1);
pub(super) const BY_COLUMN: Distort =
    |_, positions| positions.indexed_iter_mut().for_each(|((_, column), position)| *position = column as i64);

/// A decoder without a cache, run by candle.
pub(super) struct CandleSession {
    decoder: Decoder,
    adapter: Option<Adapter>,
    distort: Distort,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl CandleSession {
    pub(super) fn new(decoder: Decoder, adapter: Option<&Adapter>, distort: Distort) -> Self {
        let named = |name: &str| Dim::Named(name.into());
        let port = |name: &str, dtype, dims| Port { name: name.into(), dtype, dims };
        let index = |name| port(name, runtime::DType::I64, vec![named("batch"), named("sequence")]);
        let vocab = Dim::Fixed(decoder.spec().vocab_size);
        let inputs = ["input_ids", "attention_mask", "position_ids"].map(index).into();
        let logits = port("logits", runtime::DType::F32, vec![named("batch"), named("sequence"), vocab]);
        Self { decoder, adapter: adapter.cloned(), distort, inputs, outputs: vec![logits] }
    }
}

impl Session for CandleSession {
    fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    fn info(&self) -> RuntimeInfo {
        RuntimeInfo {
            runtime: "candle".into(),
            version: "test".into(),
            device: "cpu".into(),
            optimization: "none".into(),
            library: None,
        }
    }

    fn run_tensors(&mut self, feeds: Vec<(String, Tensor)>) -> runtime::Result<Vec<(String, Tensor)>> {
        let feeds = feeds.into_iter().map(|(name, tensor)| Ok((name, tensor.into_value()?)));
        let mut feeds = feeds.collect::<runtime::Result<NamedValues>>()?;
        let mut take = |name: &str| -> Array2<i64> {
            feeds.take(name).unwrap().into_i64().unwrap().into_dimensionality().unwrap()
        };
        let (ids, mut mask, mut positions) = (take("input_ids"), take("attention_mask"), take("position_ids"));
        (self.distort)(&mut mask, &mut positions);
        let flat = |array: &Array2<i64>| array.iter().copied().collect::<Vec<_>>();
        let input = Input::new(ids.nrows(), &flat(&ids), &flat(&mask), Some(&flat(&positions))).unwrap();
        let hook = self.adapter.as_ref().map(|adapter| adapter.hook(self.decoder.spec(), &Device::Cpu).unwrap());
        let hook = hook.as_deref().unwrap_or(&NoHook);
        let logits = self.decoder.forward(&input, None, hook).unwrap().to_dtype(DType::F32).unwrap();
        let values = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let logits = ArrayD::from_shape_vec(logits.dims(), values).unwrap();
        Ok(vec![("logits".into(), runtime::Value::from(logits).into())])
    }
}

/// A session whose outputs are changed.
pub(super) struct Tampered<S, F> {
    pub(super) inner: S,
    pub(super) change: F,
}

impl<S: Session, F: FnMut(&str, &mut ArrayD<f32>) + Send> Session for Tampered<S, F> {
    fn activate(&mut self, models: &[usize]) -> runtime::Result<()> {
        self.inner.activate(models)
    }

    fn inputs(&self) -> &[Port] {
        self.inner.inputs()
    }

    fn outputs(&self) -> &[Port] {
        self.inner.outputs()
    }

    fn info(&self) -> RuntimeInfo {
        self.inner.info()
    }

    fn run_tensors(&mut self, feeds: Vec<(String, Tensor)>) -> runtime::Result<Vec<(String, Tensor)>> {
        let outputs = self.inner.run_tensors(feeds)?;
        let outputs = outputs.into_iter().map(|(name, tensor)| {
            let mut array = tensor.into_value()?.into_f32()?;
            (self.change)(&name, &mut array);
            Ok((name, runtime::Value::from(array).into()))
        });
        outputs.collect()
    }
}

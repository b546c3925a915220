//! A small model, and a session that runs it with candle in the place of a graph and can be told to be wrong.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor as CandleTensor};
use ndarray::{Array2, ArrayD};

use super::{Case, CaseOptions, generated_prompts, standard_cases};
use crate::base::{Activation, Attention, Decoder, DecoderSpec, Input, Mlp, Norm, Rotary, SiteHook};
use crate::runtime::{self, Dim, NamedValues, Port, RuntimeInfo, Session, Tensor};

pub(super) fn tiny_spec() -> DecoderSpec {
    DecoderSpec {
        family: "llama".into(),
        vocab_size: 40,
        hidden_size: 16,
        num_layers: 2,
        max_positions: 64,
        norm: Norm { epsilon: 1e-5 },
        attention: Attention {
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 4,
            scale: 0.5,
            rotary: Rotary { inv_freq: vec![1.0, 0.01] },
            bias: false,
        },
        mlp: Mlp { intermediate_size: 24, activation: Activation::Silu, bias: false },
        tied_embeddings: true,
    }
}

/// A decoder with weights of about the size of a trained one's.
pub(super) fn tiny_decoder(dtype: DType) -> Decoder {
    Decoder::from_weights(&tiny_spec(), |weight| {
        let seed = weight.name.bytes().fold(0.0, |seed, byte| seed * 1.3 % 7.0 + f64::from(byte));
        let scale = if weight.shape.len() == 1 { 1.0 } else { 0.4 };
        let count = weight.shape.iter().product::<usize>();
        let values: Vec<f64> = (0..count).map(|i| scale * (seed + 12.9898 * i as f64).sin()).collect();
        let tensor = CandleTensor::from_vec(values, weight.shape.clone(), &Device::Cpu);
        tensor.and_then(|tensor| tensor.to_dtype(dtype)).map_err(crate::base::Error::candle("making a weight"))
    })
    .unwrap()
}

pub(super) fn cases(spec: &DecoderSpec) -> Vec<Case> {
    let options = CaseOptions { seed: 7, lengths: vec![12, 5, 8], steps: 4 };
    standard_cases(&generated_prompts(spec, &options), options.steps).unwrap()
}

/// A file of the shared folder beside the repository, or none with a message.
pub(super) fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    if !path.exists() {
        eprintln!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}

/// A decoder without a cache, run by candle.
pub(super) struct CandleSession<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) hook: &'a (dyn SiteHook + Sync),
    /// Added to all positions.
    pub(super) shift: i64,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl<'a> CandleSession<'a> {
    pub(super) fn new(decoder: &'a Decoder, hook: &'a (dyn SiteHook + Sync), shift: i64) -> Self {
        let named = |name: &str| Dim::Named(name.into());
        let port = |name: &str, dtype, dims| Port { name: name.into(), dtype, dims };
        let index = |name| port(name, runtime::DType::I64, vec![named("batch"), named("sequence")]);
        let vocab = Dim::Fixed(decoder.spec().vocab_size);
        let inputs = ["input_ids", "attention_mask", "position_ids"].map(index).into();
        let logits = port("logits", runtime::DType::F32, vec![named("batch"), named("sequence"), vocab]);
        Self { decoder, hook, shift, inputs, outputs: vec![logits] }
    }
}

impl Session for CandleSession<'_> {
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
        let (ids, mask) = (take("input_ids"), take("attention_mask"));
        let positions = take("position_ids") + self.shift;
        let flat = |array: &Array2<i64>| array.iter().copied().collect::<Vec<_>>();
        let input = Input::new(ids.nrows(), &flat(&ids), &flat(&mask), Some(&flat(&positions))).unwrap();
        let logits = self.decoder.forward(&input, None, self.hook).unwrap().to_dtype(DType::F32).unwrap();
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

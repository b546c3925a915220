//! What a method of adaptation says of itself. A new one is one file that implements [`AdapterMethod`], and its line in
//! [`Method`](super::Method).

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::term::TermHook;
use super::{AdapterConfig, Error, Result, Term};
use crate::base::{Checkpoint, Decoder, DecoderSpec, SiteHook, WeightRole};

/// An adapter's tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// A tensor that a method trains.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Its shape.
    pub shape: Vec<usize>,
    /// How it starts.
    pub start: Start,
}

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Start {
    /// Every element the same.
    Constant(f64),
    /// The identity in the last two dimensions.
    Identity,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform between minus and plus this bound.
    Uniform(f64),
}

impl TensorSpec {
    /// A tensor that starts at zero.
    pub fn zeros(shape: impl Into<Vec<usize>>) -> Self {
        Self::new(shape, Start::Constant(0.0))
    }

    /// A tensor of a shape and a start.
    pub fn new(shape: impl Into<Vec<usize>>, start: Start) -> Self {
        Self { shape: shape.into(), start }
    }

    /// The tensor at its start: float32 on the CPU. What is random follows from `seed` and `name` alone.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn tensor(&self, name: &str, seed: u64) -> Result<Tensor> {
        let digest = crate::files::sha256_bytes(name.as_bytes());
        let named = digest.bytes().take(16).fold(0u64, |hash, byte| (hash << 4) ^ u64::from(byte));
        let mut random = Pcg64Mcg::seed_from_u64(seed ^ named);
        let count = self.shape.iter().product::<usize>();
        let values: Vec<f32> = match self.start {
            Start::Constant(value) => vec![value as f32; count],
            Start::Identity => {
                let columns = self.shape.last().copied().unwrap_or(1).max(1);
                let rows = self.shape.iter().rev().nth(1).copied().unwrap_or(1).max(1);
                (0..count).map(|i| f32::from(u8::from(i / columns % rows == i % columns))).collect()
            }
            Start::Normal(deviation) => (0..count).map(|_| (deviation * normal(&mut random)) as f32).collect(),
            Start::Uniform(bound) => (0..count).map(|_| (bound * random.random_range(-1.0..1.0)) as f32).collect(),
        };
        Tensor::from_vec(values, self.shape.as_slice(), &Device::Cpu).map_err(Error::candle("making an adapter"))
    }
}

/// A standard normal number (Box and Muller).
fn normal(random: &mut Pcg64Mcg) -> f64 {
    let radius = (-2.0 * (1.0 - random.random_range(0.0..1.0f64)).ln()).sqrt();
    radius * (std::f64::consts::TAU * random.random_range(0.0..1.0f64)).cos()
}

/// The base model that training starts from.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    /// Its files.
    pub checkpoint: &'a Checkpoint,
    /// It at work.
    pub decoder: &'a Decoder,
    /// The tokens of the prompt that the adapter starts from.
    pub prompt: Option<&'a [u32]>,
}

impl Base<'_> {
    /// A weight in float32.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn weight(&self, role: WeightRole) -> Result<Tensor> {
        let weight = self.checkpoint.weight(role)?;
        weight.to_dtype(DType::F32).map_err(Error::candle("converting a weight"))
    }

    /// The prompt's tokens.
    ///
    /// # Errors
    /// When there is none.
    pub fn prompt(&self) -> Result<&[u32]> {
        match self.prompt {
            Some(prompt) if !prompt.is_empty() => Ok(prompt),
            _ => Err(Error::Config {
                field: "init",
                why: "is prompt, but no prompt is given".into(),
                help: "set `prompt` to the text to start from, or `init` to something else",
            }),
        }
    }
}

/// A method: its tensors, their start, and what it does in a decoder.
pub trait AdapterMethod {
    /// Whether the options are ones that this version computes.
    ///
    /// # Errors
    /// Names the field that is not.
    fn check(&self, config: &AdapterConfig) -> Result<()>;

    /// The tensors that the configuration asks for; none where they are those of the base model itself.
    fn tensors(&self, config: &AdapterConfig) -> Option<BTreeMap<String, TensorSpec>>;

    /// Gives tensors the starts that depend on the base model.
    ///
    /// # Errors
    /// When the base model cannot be read or run.
    fn start(&self, _config: &AdapterConfig, _base: &Base, _tensors: &mut Tensors) -> Result<()> {
        Ok(())
    }

    /// Whether the options belong to a model beyond what [`AdapterConfig::check_fits`] compares.
    ///
    /// # Errors
    /// Names what differs.
    fn check_options(&self, _config: &AdapterConfig, _spec: &DecoderSpec) -> Result<()> {
        Ok(())
    }

    /// Whether the tensors belong to a model beyond what [`AdapterConfig::check_fits`] compares.
    ///
    /// # Errors
    /// Names what differs.
    fn check_fits(&self, config: &AdapterConfig, _tensors: &Tensors, spec: &DecoderSpec) -> Result<()> {
        self.check_options(config, spec)
    }

    /// What the method adds to the attention output of a layer; none where it does not act so. A method that says it here
    /// needs neither a hook of its own nor an emission.
    fn term(&self, _config: &AdapterConfig, _layer: usize) -> Option<Term> {
        None
    }

    /// The method at work on a decoder; `tensors` are on its device.
    ///
    /// # Errors
    /// When a tensor cannot be used.
    fn hook(&self, config: &AdapterConfig, tensors: &Tensors) -> Result<Box<dyn SiteHook>> {
        let terms = (0..config.num_layers).map(|layer| self.term(config, layer)).collect();
        Ok(Box::new(TermHook::new(terms, config.num_heads, tensors.clone())))
    }

    /// Whether an adapter of zeros, folded into a graph, is the base graph bit for bit in every runtime.
    fn zeros_are_the_base(&self) -> bool {
        true
    }
}

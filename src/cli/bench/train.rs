//! `prefold bench train`

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::Args;
use miette::{IntoDiagnostic, Result};
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use super::super::device::DeviceArgs;
use super::super::memory::peak_resident;
use super::super::{Context, usage};
use super::median;
use crate::adapter::{Adapter, AdapterConfig, AdapterOptions, MethodName};
use crate::base::{
    Checkpoint, Decoder, DecoderSpec, WeightRole, WeightShape, describe, device_memory, family, reset_peak_memory,
};
use crate::data::{Batch, IGNORED};
use crate::files;
use crate::train::{
    AdamW, AdamWConfig, BatchGradients, ComputeType, Models, Sft, batch_gradients, clip_gradients, prepare_memory,
};

/// Measure a training step: forward, loss, backward, clipping, AdamW
///
/// Token ids are random; the labelled positions are the last of each row.
#[derive(Args, Debug)]
pub(super) struct BenchTrain {
    /// Hugging Face folder, .gguf file, or the name of a fetched model; of a folder without weights, or its config.json,
    /// random weights
    #[arg(long)]
    model: String,
    /// What is trained: prefix_plus, prefix, lora or full, with their default options
    #[arg(long, default_value = "prefix_plus")]
    method: MethodName,
    /// Rows of a batch
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 128)]
    seq: usize,
    /// Part of the positions that carry a label
    #[arg(long, default_value_t = 1.0)]
    labelled: f64,
    /// Measured steps
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Steps before these
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Type of the frozen model: f64, f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    dtype: ComputeType,
    /// Keep only the inputs of layers and compute the rest again in the backward pass
    #[arg(long)]
    checkpoint_activations: bool,
    /// Keep the optimizer's moments in a temporary file
    #[arg(long)]
    offload_optimizer: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    method: MethodName,
    dtype: String,
    device: String,
    parameters: usize,
    trained_parameters: usize,
    batch: usize,
    seq: usize,
    labelled_tokens: usize,
    checkpoint_activations: bool,
    offload_optimizer: bool,
    /// Wall time of each step in seconds.
    seconds: Vec<f64>,
    median_seconds: f64,
    tokens_per_second: f64,
    /// Floating-point operations that a Prefix-Tuning+ step cannot do without: two for each product of a matrix product.
    operations: f64,
    operations_per_second: f64,
    /// The same for one matrix product of the head's shape, measured here.
    matmul_operations_per_second: f64,
    /// The step's time if it did these operations at the rate of that product, over its real time.
    efficiency: f64,
    /// The most that tensors took on a GPU, else the highest resident memory of the process, in bytes, where it is known.
    peak_memory: Option<u64>,
    loss: f64,
}

impl BenchTrain {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        let largest = 1 << 20;
        for (option, value) in [("--batch", self.batch), ("--seq", self.seq), ("--steps", self.steps)] {
            if value == 0 || value > largest {
                return Err(usage(format!("{option} is {value}"), format!("give a number from 1 to {largest}")));
            }
        }
        if self.seq < 2 || !(self.labelled > 0.0 && self.labelled <= 1.0) {
            return Err(usage(
                "no position would carry a label",
                "use --seq 2 or more and --labelled above 0, at most 1",
            ));
        }
        let report = self.measure(context)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report).into_diagnostic()?);
            return Ok(ExitCode::SUCCESS);
        }
        let memory = report.peak_memory.map_or_else(|| "unknown".into(), |bytes| format!("{} MiB", bytes >> 20));
        println!("step          {:.1} ms (median of {})", report.median_seconds * 1e3, self.steps);
        println!("tokens/s      {:.0}", report.tokens_per_second);
        println!(
            "operations    {:.1} GFLOP, {:.0} GFLOP/s",
            report.operations / 1e9,
            report.operations_per_second / 1e9
        );
        println!(
            "matmul alone  {:.0} GFLOP/s: the step is at {:.0} % of it",
            report.matmul_operations_per_second / 1e9,
            report.efficiency * 100.0
        );
        println!("peak memory   {memory}");
        Ok(ExitCode::SUCCESS)
    }

    fn measure(&self, context: &Context) -> Result<Report> {
        let (decoder, adapter, name) = self.start(context)?;
        let (adapter, vars) = adapter.into_trainable(DType::F32, decoder.device())?;
        let own = adapter.decoder(decoder.spec(), decoder.dtype())?;
        let decoder = own.unwrap_or(decoder);
        let spec = decoder.spec();
        let hook = adapter.hook(spec, decoder.device())?;
        let batch = self.batch(spec);
        let config = AdamWConfig::default();
        let mut optimizer = match self.offload_optimizer {
            true => AdamW::offloaded(config, vars, &std::env::temp_dir())?,
            false => AdamW::new(config, vars).into_diagnostic()?,
        };
        let mut seconds = Vec::new();
        let mut loss = f64::NAN;
        let device = decoder.device().clone();
        reset_peak_memory(&device);
        for step in 0..self.warmup + self.steps {
            let started = Instant::now();
            let of = BatchGradients {
                models: Models::frozen(&decoder),
                hook: &*hook,
                vars: optimizer.vars(),
                objective: &Sft,
                checkpoint_activations: self.checkpoint_activations,
            };
            let mut gradients = BTreeMap::new();
            let factor = 1.0 / batch.labelled() as f64;
            let found = batch_gradients(&of, &batch, factor, &mut gradients)?.value().into_diagnostic()? * factor;
            clip_gradients(&mut gradients, Some(1.0)).into_diagnostic()?;
            optimizer.step(gradients, 1e-4).into_diagnostic()?;
            device.synchronize().into_diagnostic()?;
            loss = found;
            if step >= self.warmup {
                seconds.push(started.elapsed().as_secs_f64());
            }
        }
        let peak_memory = device_memory(&device).map(|memory| memory.peak).or_else(peak_resident);
        let labelled_tokens = batch.labelled();
        let median_seconds = median(&seconds);
        let tokens = (self.batch * self.seq) as f64;
        let operations = operations(spec, self.batch, self.seq, labelled_tokens);
        let matmul = matmul_rate(spec, (decoder.dtype(), &device), labelled_tokens)?;
        Ok(Report {
            model: name,
            method: self.method,
            dtype: decoder.dtype().as_str().into(),
            device: describe(&device),
            parameters: spec.num_parameters(),
            trained_parameters: adapter.num_parameters(),
            batch: self.batch,
            seq: self.seq,
            labelled_tokens,
            checkpoint_activations: self.checkpoint_activations,
            offload_optimizer: self.offload_optimizer,
            median_seconds,
            tokens_per_second: tokens / median_seconds,
            operations,
            operations_per_second: operations / median_seconds,
            matmul_operations_per_second: matmul,
            efficiency: operations / matmul / median_seconds,
            seconds,
            peak_memory,
            loss,
        })
    }

    /// The frozen model, the adapter at the start, and the model's name.
    fn start(&self, context: &Context) -> Result<(Decoder, Adapter, String)> {
        let path = Path::new(&self.model);
        let config = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        let holds_weights = path.is_dir() && Checkpoint::open(path).is_ok();
        let options = AdapterOptions { method: self.method, ..AdapterOptions::default() };
        let device = self.device.open()?;
        if config.is_file() && config.extension().is_some_and(|e| e == "json") && !holds_weights {
            let spec = family::spec_from_config(&config, &files::read_json(&config, "a model configuration")?)?;
            let adapter = options.config(&spec, None)?;
            prepare_memory(adapter.num_parameters(&spec));
            let (decoder, adapter) = self.random(&spec, adapter, &device).into_diagnostic()??;
            return Ok((decoder, adapter, self.model.clone()));
        }
        let checkpoint = context.checkpoint(&self.model)?;
        prepare_memory(options.config(checkpoint.spec(), None)?.num_parameters(checkpoint.spec()));
        let decoder = Decoder::load(&checkpoint, self.dtype.dtype(), &device)?;
        let adapter = options.start(&checkpoint, &decoder, 0)?;
        Ok((decoder, adapter, checkpoint.display_name()))
    }

    /// A model of random weights, made where it is: normal with standard deviation 0.02, norms of one.
    fn random(
        &self,
        spec: &DecoderSpec,
        adapter: AdapterConfig,
        device: &Device,
    ) -> candle_core::Result<Result<(Decoder, Adapter)>> {
        let is_full = self.method == MethodName::Full;
        let mut weights = BTreeMap::new();
        for WeightShape { role, name, shape } in spec.weights() {
            let weight = match role {
                WeightRole::Norm(..) | WeightRole::FinalNorm => Tensor::ones(shape, DType::F32, device)?,
                _ => Tensor::randn(0f32, 0.02, shape, device)?,
            };
            weights.insert(name, weight.to_dtype(self.dtype.dtype())?);
        }
        let weight = |weight: &WeightShape| match weights.get(&weight.name) {
            Some(weight) => Ok(weight.clone()),
            None => Err(crate::base::Error::candle("making random weights")(candle_core::Error::msg(&weight.name))),
        };
        let adapted = || -> Result<(Decoder, Adapter)> {
            let decoder = Decoder::from_weights(spec, weight)?;
            let adapter = match is_full {
                true => Adapter::new(adapter, weights.clone())?,
                false => Adapter::without_base(adapter, 0)?,
            };
            Ok((decoder, adapter))
        };
        Ok(adapted())
    }

    fn batch(&self, spec: &DecoderSpec) -> Batch {
        let mut random = rand_pcg::Pcg64Mcg::seed_from_u64(0);
        let tokens = self.batch * self.seq;
        let input_ids: Vec<i64> = (0..tokens).map(|_| random.random_range(0..spec.vocab_size as i64)).collect();
        let first = self.seq - ((self.labelled * self.seq as f64).round() as usize).clamp(1, self.seq - 1);
        let label = |(at, id): (usize, &i64)| if at % self.seq < first { IGNORED } else { *id };
        Batch {
            labels: input_ids.iter().enumerate().map(label).collect(),
            input_ids,
            attention_mask: vec![1; tokens],
            position_ids: (0..tokens).map(|at| (at % self.seq) as i64).collect(),
            segments: None,
            batch: self.batch,
            seq: self.seq,
        }
    }
}

/// Two operations for each product: every linear map forward and for the gradient of its input (frozen weights need no
/// other), causal attention at half of its square, forward and twice that backward, the head at labelled positions, and
/// Prefix-Tuning+'s product forward and for both of its gradients.
fn operations(spec: &DecoderSpec, batch: usize, seq: usize, labelled: usize) -> f64 {
    let (tokens, layers) = ((batch * seq) as f64, spec.num_layers as f64);
    let linears: f64 = spec.linears().map(|linear| spec.linear_shape(linear).iter().product::<usize>() as f64).sum();
    let attention = &spec.attention;
    let queries = attention.query_width() as f64;
    let linears = 2.0 * 2.0 * linears * tokens * layers;
    let mixing = 3.0 * 2.0 * 2.0 * queries * (seq as f64 + 1.0) / 2.0 * tokens * layers;
    let adapter = 3.0 * 2.0 * queries * attention.head_dim as f64 * tokens * layers;
    let head = 2.0 * 2.0 * (spec.vocab_size * spec.embedding_width()) as f64 * labelled as f64;
    linears + mixing + adapter + head
}

/// Operations per second of the head's matrix product, the best of a few.
fn matmul_rate(spec: &DecoderSpec, (dtype, device): (DType, &Device), rows: usize) -> Result<f64> {
    let most = if device.is_cpu() { (1024, 32_768) } else { (8192, 131_072) };
    let (rows, columns) = (rows.clamp(64, most.0), spec.vocab_size.min(most.1));
    let width = spec.hidden_size;
    let product = || -> candle_core::Result<f64> {
        let a = Tensor::randn(0f32, 1.0, (rows, width), device)?.to_dtype(dtype)?;
        let b = Tensor::randn(0f32, 1.0, (columns, width), device)?.to_dtype(dtype)?;
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            device.synchronize()?;
            let started = Instant::now();
            a.matmul(&b.t()?)?;
            device.synchronize()?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        Ok(2.0 * (rows * width * columns) as f64 / best)
    };
    product().into_diagnostic()
}

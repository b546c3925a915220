//! A decoder as an ONNX graph with a key-value cache: the ONNX interpreter of a
//! [`DecoderSpec`].
//!
//! ```text
//! input_ids       [batch, sequence]          ─┐
//! attention_mask  [batch, past + sequence]    ├─► graph ─► logits       [batch, sequence, vocab]
//! position_ids    [batch, sequence]           │            present.N.*  [batch, kv_heads, past + sequence, head_dim]
//! past_key_values.N.key|value                ─┘
//!                 [batch, kv_heads, past, head_dim]
//! ```
//!
//! `decoder.rs` wires what all dialects share. `norm.rs`, `rotary.rs`, `mask.rs`, `attention.rs`, `mlp.rs` and `head.rs` each
//! write one part in standard operators; a dialect, `portable.rs` or `fused.rs`, takes these or its own. Weights are streamed
//! from the mapped checkpoint, one at a time. Knows no training and no adapter.

mod attention;
mod decoder;
mod error;
mod fused;
mod genai;
mod head;
mod mask;
mod mlp;
mod norm;
mod portable;
mod rotary;
mod writer;

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use error::{Error, Result};
pub use genai::GENAI_NAME;

use crate::base::{self, Checkpoint, DecoderSpec, WeightShape};
use crate::files::{FileFact, Manifest};
use crate::onnx::{DataType, MODEL_NAME, Model, ModelBuilder};

/// File name of the external data.
pub const DATA_NAME: &str = "model.onnx.data";

/// Under which keys a graph's metadata tell how it was exported.
const DIALECT_KEY: &str = "prefold.dialect";
const PADDING_KEY: &str = "prefold.padding";
const RIGHT: &str = "right";

const IR_VERSION: i64 = 8;
const OPSET: i64 = 17;

/// Which operators the graph is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dialect {
    /// Standard operators of opset 17 only: runs in every ONNX runtime, with symbolic dimensions in tract.
    #[default]
    Portable,
    /// Fused operators of `com.microsoft`: GroupQueryAttention, RotaryEmbedding, the norms' skip forms, the forms of GELU. For
    /// ONNX Runtime, which takes several rows only from an empty cache or one token at a time.
    Ort,
}

impl std::str::FromStr for Dialect {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "portable" => Ok(Self::Portable),
            "ort" => Ok(Self::Ort),
            other => Err(format!("`{other}` is neither portable nor ort")),
        }
    }
}

impl std::fmt::Display for Dialect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Ort => "ort",
        })
    }
}

/// The type of weights, activations and cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// float32.
    #[default]
    F32,
    /// float16; rotary angles and norms are computed in float32.
    F16,
    /// bfloat16, for GPUs: runtimes have few such operators on CPUs. Rotary angles and norms are computed in float32.
    Bf16,
}

impl Precision {
    /// ONNX's name of the type.
    pub fn data_type(self) -> DataType {
        match self {
            Self::F32 => DataType::Float,
            Self::F16 => DataType::Float16,
            Self::Bf16 => DataType::Bfloat16,
        }
    }

    /// candle's name of the type.
    pub fn dtype(self) -> candle_core::DType {
        match self {
            Self::F32 => candle_core::DType::F32,
            Self::F16 => candle_core::DType::F16,
            Self::Bf16 => candle_core::DType::BF16,
        }
    }
}

impl std::str::FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            other => Err(format!("`{other}` is none of f32, f16, bf16")),
        }
    }
}

/// How to export.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ExportOptions {
    /// Which operators.
    pub dialect: Dialect,
    /// Which type.
    pub precision: Precision,
    /// Weights go into `model.onnx.data` where all of them together have more bytes than this.
    pub external_data_threshold: u64,
    /// In the `ort` dialect: rows end in padding or have none. Then the attention operator rotates and counts positions by itself, as
    /// in the graphs of onnxruntime-genai's builder, and `position_ids` is no input.
    #[serde(default)]
    pub right_padding_only: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            dialect: Dialect::Portable,
            precision: Precision::F32,
            external_data_threshold: 64 << 20,
            right_padding_only: false,
        }
    }
}

/// Whether a graph says that it was exported for rows that end in padding or have none.
pub fn is_right_padding_only(model: &Model) -> bool {
    model.metadata(PADDING_KEY) == Some(RIGHT)
}

/// The dialect that a graph says it was exported in, or that it says something else; none where prefold did not export it.
pub fn dialect_of(model: &Model) -> Option<std::result::Result<Dialect, String>> {
    model.metadata(DIALECT_KEY).map(str::parse)
}

impl ExportOptions {
    /// Whether positions are an input: not where the attention operator counts them, unless the model embeds them.
    fn takes_positions(&self, spec: &DecoderSpec) -> bool {
        !self.right_padding_only || spec.embedding.positions.is_some()
    }
}

/// Writes `model.onnx`, its data, `config.json`, `genai_config.json`, the tokenizer where the checkpoint has one, and the manifest
/// into a folder that exists.
///
/// # Errors
/// When a weight cannot be read or a file cannot be written.
pub fn export(checkpoint: &Checkpoint, options: &ExportOptions, folder: &Path) -> Result<PathBuf> {
    let path = export_weights(checkpoint.spec(), |weight| checkpoint.weight(weight.role), options, folder)?;
    write_companions(checkpoint, options, folder)?;
    write_manifest(checkpoint, options, folder)?;
    Ok(path)
}

/// Writes `model.onnx` and its data alone, with whatever `weight` gives: tensors of the asked shape on the CPU, in any float
/// type.
///
/// # Errors
/// Those of `weight`; when a tensor has another shape, a file cannot be written, or the decoder does not allow what the options ask for.
pub fn export_weights(
    spec: &DecoderSpec,
    weight: impl Fn(&WeightShape) -> base::Result<Tensor>,
    options: &ExportOptions,
    folder: &Path,
) -> Result<PathBuf> {
    if options.right_padding_only {
        padded_on_the_right(spec, options.dialect)?;
    }
    let mut graph = writer::GraphWriter::new(spec, &weight, options, folder)?;
    decoder::declare(&mut graph);
    match options.dialect {
        Dialect::Portable => {
            let mut operators = portable::Portable::new(&mut graph)?;
            decoder::write(&mut graph, &mut operators)?;
        }
        Dialect::Ort => {
            let mut operators = fused::Fused::new(&mut graph)?;
            decoder::write(&mut graph, &mut operators)?;
        }
    }
    let path = folder.join(MODEL_NAME);
    graph.finish()?.save(&path)?;
    Ok(path)
}

/// Whether a graph can leave padding and positions to its attention operator.
fn padded_on_the_right(spec: &DecoderSpec, dialect: Dialect) -> Result<()> {
    match dialect {
        Dialect::Portable => {
            let reason = "the portable dialect has no operator that counts the tokens of a row";
            Err(Error::RightPadding { reason: reason.into() })
        }
        Dialect::Ort => fused::rotates_inside(spec),
    }
}

fn new_builder(options: &ExportOptions) -> ModelBuilder {
    let mut builder = ModelBuilder::new("decoder", IR_VERSION);
    builder.producer("prefold", env!("CARGO_PKG_VERSION")).opset("", OPSET);
    builder.metadata(DIALECT_KEY, &options.dialect.to_string());
    if options.dialect == Dialect::Ort {
        builder.opset(fused::DOMAIN, 1);
    }
    if options.right_padding_only {
        builder.metadata(PADDING_KEY, RIGHT);
    }
    builder
}

fn write_companions(checkpoint: &Checkpoint, options: &ExportOptions, folder: &Path) -> Result<()> {
    crate::files::write_json(&folder.join("config.json"), "a model configuration", checkpoint.config())?;
    let tokenizer = checkpoint.tokenizer();
    match &tokenizer {
        Ok(tokenizer) => tokenizer.save(folder)?,
        Err(error) => tracing::warn!("the graph goes without a tokenizer: {error}"),
    }
    let config = genai::config(checkpoint.spec(), options, tokenizer.as_ref().ok(), checkpoint.config());
    Ok(crate::files::write_json(&folder.join(GENAI_NAME), "a configuration of onnxruntime-genai", &config)?)
}

fn write_manifest(checkpoint: &Checkpoint, options: &ExportOptions, folder: &Path) -> Result<()> {
    let options = serde_json::to_value(options).unwrap_or_default();
    let mut manifest = Manifest::new("export", options);
    for file in checkpoint.weight_files() {
        manifest = manifest.input("weights", &file)?;
    }
    manifest = manifest.output("graph", &folder.join(MODEL_NAME))?;
    let data = folder.join(DATA_NAME);
    if data.exists() {
        manifest.outputs.push(FileFact::of("external_data", &data)?);
    }
    manifest.facts = serde_json::json!({ "base_model": checkpoint.display_name(), "parameters": checkpoint.spec().num_parameters() });
    Ok(manifest.write(folder)?)
}

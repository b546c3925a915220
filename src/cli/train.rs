//! `prefold train`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::Device;
use clap::Args;
use figment::Figment;
use figment::providers::{Format as _, Serialized, Toml};
use miette::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::progress::TrainingBar;
use super::{Context, keep_apart, style, usage};
use crate::adapter::{Adapter, AdapterOptions, CONFIG_NAME, MethodName, WEIGHTS_NAME};
use crate::base::{Checkpoint, Decoder, Tokenizer};
use crate::data::{self, ChatUse, Dataset, Format, FormatOptions, Holdout, LabelText, Records};
use crate::files::Manifest;
use crate::train::{ComputeType, Outcome, RunFolder, TrainConfig, Trainer};

/// Train an adapter: Prefix-Tuning+, prefix tuning, LoRA, or the whole model
///
/// Options come from the defaults, then from --config, then from the command line.
#[derive(Args, Debug)]
pub(super) struct Train {
    /// A TOML file of options: see schemas/train.schema.json
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Hugging Face folder, .gguf file, or the name of a fetched model
    #[arg(long)]
    model: Option<String>,
    /// JSONL records: {"text","label"}, {"prompt","completion"} or {"messages"}
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// JSONL records to evaluate on
    #[arg(long, value_name = "FILE", conflicts_with = "holdout")]
    eval: Option<PathBuf>,
    /// Records of --data to keep apart for evaluation: a count or a fraction
    #[arg(long, value_name = "N|FRACTION")]
    holdout: Option<String>,
    /// Folder of the run: the adapter, metrics.jsonl, checkpoints
    #[arg(long)]
    out: Option<PathBuf>,
    /// Go on from the newest checkpoint in --out
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Replace the run in --out
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    data_options: DataArgs,
    #[command(flatten)]
    training: TrainingArgs,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Data")]
struct DataArgs {
    /// Longest example in tokens; a longer prompt loses its beginning
    #[arg(long)]
    max_seq_len: Option<usize>,
    /// At most so many training records
    #[arg(long)]
    limit: Option<usize>,
    /// At most so many training records of each label
    #[arg(long)]
    per_class: Option<usize>,
    /// At most so many evaluation records
    #[arg(long)]
    eval_limit: Option<usize>,
    /// Prompt of a {"text","label"} record, a Jinja template over `text`
    #[arg(long)]
    template: Option<String>,
    /// System prompt
    #[arg(long)]
    system: Option<String>,
    /// Do not use the model's chat template
    #[arg(long)]
    no_chat: bool,
    /// Learn labels as they are written, underscores included
    #[arg(long)]
    verbatim_labels: bool,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Training")]
struct TrainingArgs {
    /// Highest learning rate
    #[arg(long, value_parser = finite)]
    learning_rate: Option<f64>,
    /// Passes over the data
    #[arg(long)]
    epochs: Option<usize>,
    /// Optimizer steps, in place of --epochs
    #[arg(long)]
    max_steps: Option<usize>,
    /// Sequences in a forward pass
    #[arg(long)]
    batch_size: Option<usize>,
    /// Forward passes in an optimizer step
    #[arg(long)]
    gradient_accumulation: Option<usize>,
    /// L2 norm above which gradients are scaled down; 0 for never
    #[arg(long, value_parser = finite)]
    max_grad_norm: Option<f64>,
    /// Part of the steps in which the rate rises
    #[arg(long, value_parser = finite)]
    warmup_fraction: Option<f64>,
    /// Decoupled weight decay
    #[arg(long, value_parser = finite)]
    weight_decay: Option<f64>,
    /// Orders the data
    #[arg(long)]
    seed: Option<u64>,
    /// Steps between evaluations; 0 for one at the end
    #[arg(long)]
    eval_every: Option<usize>,
    /// Steps between checkpoints; 0 for none
    #[arg(long)]
    save_every: Option<usize>,
    /// Type of the frozen model: f64, f32, bf16 or f16
    #[arg(long)]
    dtype: Option<ComputeType>,
    /// What to train: prefix_plus, prefix, lora or full [default: prefix_plus]; their options are in --config
    #[arg(long)]
    method: Option<MethodName>,
    /// Layers to adapt, comma-separated [default: all]
    #[arg(long, value_delimiter = ',')]
    layers: Option<Vec<usize>>,
}

/// A training run, as a file describes it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Hugging Face folder, .gguf file, or the name of a fetched model.
    pub model: Option<String>,
    /// Folder of the run.
    pub out: Option<PathBuf>,
    /// What to train on.
    pub data: DataConfig,
    /// How to train.
    pub train: TrainConfig,
    /// What to train.
    pub adapter: AdapterOptions,
}

/// What to train on.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// JSONL records to train on.
    pub train: Option<PathBuf>,
    /// JSONL records to evaluate on.
    pub eval: Option<PathBuf>,
    /// In place of `eval`: records of `train` to keep apart, a count or a fraction, as text.
    pub holdout: Option<String>,
    /// Longest example in tokens.
    pub max_seq_len: usize,
    /// At most so many training records.
    pub limit: Option<usize>,
    /// At most so many training records of each label.
    pub per_class: Option<usize>,
    /// At most so many evaluation records.
    pub eval_limit: Option<usize>,
    /// How records become prompts and completions.
    pub format: FormatOptions,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: None,
            eval: None,
            holdout: None,
            max_seq_len: 512,
            limit: None,
            per_class: None,
            eval_limit: None,
            format: FormatOptions::default(),
        }
    }
}

impl Train {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        let config = self.resolve()?;
        let done = train(context, &config, self.resume, self.overwrite)?;
        println!("{} ({} steps, loss {:.3})", done.out.display(), done.outcome.steps, done.outcome.loss);
        if let Some(line) = done.before_and_after() {
            println!("{line}");
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Defaults, then the file, then the command line.
    fn resolve(&self) -> Result<RunConfig> {
        let mut figment = Figment::from(Serialized::defaults(RunConfig::default()));
        if let Some(path) = &self.config {
            if !path.is_file() {
                return Err(usage(format!("there is no configuration {}", path.display()), "check --config"));
            }
            figment = figment.merge(Toml::file_exact(path));
        }
        let figment = figment.merge(Serialized::globals(self.given()));
        let config: figment::Result<RunConfig> = figment.extract();
        let mut config = config.map_err(|error| {
            let file = self.config.as_deref().map_or("the command line".into(), |path| path.display().to_string());
            usage(format!("{file}: `{}`: {}", error.path.join("."), error.kind), "see schemas/train.schema.json")
        })?;
        // of two options for one thing, the command line's wins over the file's
        if self.holdout.is_some() {
            config.data.eval = None;
        }
        if self.eval.is_some() {
            config.data.holdout = None;
        }
        if self.training.epochs.is_some() && self.training.max_steps.is_none() {
            config.train.max_steps = None;
        }
        Ok(config)
    }

    /// What the command line says, and nothing else.
    fn given(&self) -> Value {
        let (data, training) = (&self.data_options, &self.training);
        let format = given([
            ("template", json!(data.template)),
            ("system", json!(data.system)),
            ("chat", if data.no_chat { json!(ChatUse::Never) } else { Value::Null }),
            ("labels", if data.verbatim_labels { json!(LabelText::Verbatim) } else { Value::Null }),
        ]);
        let data = given([
            ("train", json!(self.data)),
            ("eval", json!(self.eval)),
            ("holdout", json!(self.holdout)),
            ("max_seq_len", json!(data.max_seq_len)),
            ("limit", json!(data.limit)),
            ("per_class", json!(data.per_class)),
            ("eval_limit", json!(data.eval_limit)),
            ("format", format),
        ]);
        let train = given([
            ("learning_rate", json!(training.learning_rate)),
            ("epochs", json!(training.epochs)),
            ("max_steps", json!(training.max_steps)),
            ("batch_size", json!(training.batch_size)),
            ("gradient_accumulation", json!(training.gradient_accumulation)),
            ("max_grad_norm", json!(training.max_grad_norm)),
            ("warmup_fraction", json!(training.warmup_fraction)),
            ("adamw", given([("weight_decay", json!(training.weight_decay))])),
            ("seed", json!(training.seed)),
            ("eval_every", json!(training.eval_every)),
            ("save_every", json!(training.save_every)),
            ("dtype", json!(training.dtype)),
        ]);
        let adapter = given([("method", json!(training.method)), ("layers", json!(training.layers))]);
        given([
            ("model", json!(self.model)),
            ("out", json!(self.out)),
            ("data", data),
            ("train", train),
            ("adapter", adapter),
        ])
    }
}

fn finite(text: &str) -> std::result::Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if number.is_finite() { Ok(number) } else { Err("must be finite".into()) }
}

/// An object of the entries that are not null.
fn given<const N: usize>(entries: [(&str, Value); N]) -> Value {
    let entries = entries.into_iter().filter(|(_, value)| !value.is_null());
    Value::Object(entries.map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>())
}

/// A finished run.
pub(super) struct Trained {
    pub(super) out: PathBuf,
    pub(super) outcome: Outcome,
}

impl Trained {
    /// Accuracy and loss on the held-out part, before and after.
    pub(super) fn before_and_after(&self) -> Option<String> {
        let after = self.outcome.after?;
        let of = |value: fn(&crate::train::Evaluation) -> String| match &self.outcome.before {
            Some(before) => format!("{} → {}", value(before), value(&after)),
            None => value(&after),
        };
        let (accuracy, loss) = (of(|e| style::percent(e.accuracy)), of(|e| format!("{:.3}", e.loss)));
        Some(format!("held-out accuracy {accuracy}, loss {loss} ({} examples)", after.examples))
    }
}

/// Runs a training from a resolved configuration.
pub(super) fn train(context: &Context, config: &RunConfig, resume: bool, overwrite: bool) -> Result<Trained> {
    let (Some(model), Some(data), Some(out)) = (&config.model, &config.data.train, &config.out) else {
        return Err(usage("--model, --data and --out are needed", "give them on the command line or in --config"));
    };
    config.train.check()?;
    let inputs = [Some(Path::new(model)), Some(data.as_path()), config.data.eval.as_deref()];
    keep_apart(out, &inputs.into_iter().flatten().collect::<Vec<_>>())?;
    let checkpoint = context.checkpoint(model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let (training, held_out) = datasets(&checkpoint, &tokenizer, config, data)?;
    let decoder = Decoder::load(&checkpoint, config.train.dtype.dtype(), &Device::Cpu)?;
    let adapter = config.adapter.start(&checkpoint, &decoder, config.train.seed)?;
    let folder = if resume { RunFolder::resume(out)? } else { RunFolder::create(out, overwrite)? };
    let outcome = run(context, config, &decoder, &adapter, &training, held_out.as_ref(), &folder).and_then(|outcome| {
        folder.finish(&outcome.adapter)?;
        write_manifest(&checkpoint, config, data, out, &outcome)?;
        Ok(outcome)
    });
    if outcome.is_err() {
        folder.discard_without_checkpoint();
    }
    Ok(Trained { out: out.clone(), outcome: outcome? })
}

fn run(
    context: &Context,
    config: &RunConfig,
    decoder: &Decoder,
    adapter: &Adapter,
    training: &Dataset,
    held_out: Option<&Dataset>,
    folder: &RunFolder,
) -> Result<Outcome> {
    let trainer = Trainer::new(decoder, adapter, config.train.clone(), training, held_out, folder)?;
    if !context.global.quiet {
        let (trained, all) = (adapter.num_parameters(), decoder.spec().num_parameters());
        eprintln!(
            "training {} of {} parameters ({:.2} %) on {} examples, {} steps",
            style::count(trained),
            style::count(all),
            100.0 * trained as f64 / all as f64,
            training.len(),
            trainer.total_steps(),
        );
    }
    let mut bar = TrainingBar::new(trainer.total_steps(), trainer.start_step(), context.global.quiet);
    let outcome = trainer.run(&mut bar);
    bar.finish();
    Ok(outcome?)
}

/// The training and held-out examples; what was shortened or dropped is said.
fn datasets(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    config: &RunConfig,
    path: &Path,
) -> Result<(Dataset, Option<Dataset>)> {
    let (options, seed) = (&config.data, config.train.seed);
    let format = Format::new(tokenizer, checkpoint.spec().vocab_size, options.format.clone())?;
    let records = data::read_jsonl(path)?;
    let (mut records, mut held_out) = match (&options.eval, &options.holdout) {
        (Some(path), _) => (records, Some(data::read_jsonl(path)?)),
        (None, Some(text)) => {
            let holdout: Holdout =
                text.parse().map_err(|e| usage(format!("--holdout: {e}"), "a count or a fraction"))?;
            let (records, held_out) = records.hold_out(holdout, seed)?;
            (records, Some(held_out))
        }
        (None, None) => (records, None),
    };
    if let Some(n) = options.per_class {
        records = records.per_class(n, seed)?;
    }
    if let Some(n) = options.limit {
        records = records.limit(n, seed);
    }
    if let Some(n) = options.eval_limit {
        held_out = held_out.map(|records| records.limit(n, seed));
    }
    let limit = options.max_seq_len.min(checkpoint.spec().max_positions);
    let build = |records: &Records| -> Result<Dataset> {
        let dataset = Dataset::build(records, &format, limit)?;
        let report = dataset.report();
        if report.truncated + report.dropped > 0 {
            tracing::warn!(
                "{}: of {} records, {} lost the beginning of their prompt and {} were dropped at {limit} tokens",
                records.path().display(),
                report.records,
                report.truncated,
                report.dropped,
            );
        }
        Ok(dataset)
    };
    Ok((build(&records)?, held_out.as_ref().map(build).transpose()?))
}

fn write_manifest(
    checkpoint: &Checkpoint,
    config: &RunConfig,
    data: &Path,
    out: &Path,
    outcome: &Outcome,
) -> Result<()> {
    let mut manifest = Manifest::new("train", json!(config)).input("data", data)?;
    if let Some(eval) = &config.data.eval {
        manifest = manifest.input("eval", eval)?;
    }
    for file in checkpoint.weight_files() {
        manifest = manifest.input("weights", &file)?;
    }
    manifest = manifest.output("adapter_config", &out.join(CONFIG_NAME))?.output("adapter", &out.join(WEIGHTS_NAME))?;
    manifest.facts = json!({ "steps": outcome.steps, "loss": outcome.loss, "held_out_before": outcome.before, "held_out_after": outcome.after });
    Ok(manifest.write(out)?)
}

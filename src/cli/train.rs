//! `prefold train`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::{DType, Device};
use clap::Args;
use miette::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::data::DataArgs;
use super::device::{self, with_memory_help};
use super::interrupt::Interrupt;
use super::memory::peak_resident;
use super::options::{self, Layer};
use super::plan::Plan;
use super::progress::TrainingBar;
use super::{Context, command_line, keep_apart, style, usage};
use crate::adapter::{Adapter, AdapterConfig, AdapterOptions, CONFIG_NAME, MethodName, WEIGHTS_NAME};
use crate::base::{Checkpoint, Decoder, DeviceChoice, Tokenizer, describe, device_memory};
use crate::data::{DataConfig, Dataset, Format, Paths};
use crate::files::Manifest;
use crate::train::{
    BestBy, ComputeType, Ended, EvalBy, Fingerprint, Group, Inputs, Launch, LrScheduler, ObjectiveKind, Outcome,
    REPORT_NAME, RunFolder, TrainConfig, Trainer, check_data, check_method, prepare_memory,
};

/// Train an adapter: Prefix-Tuning+, prefix tuning, LoRA, or the whole model
///
/// Options come from the defaults, then from --config, then from each --set, then from the other options.
///
/// Ctrl-C ends the run after the step at hand with a checkpoint and the command to go on (exit code 130); a second one ends
/// it at once.
///
/// Started several times by torchrun --no-python, mpirun or srun, the processes share one run: each takes its part of every
/// step, and gradients are added over TCP; the first of them evaluates and writes.
#[derive(Args, Debug)]
pub(super) struct Train {
    /// A TOML or YAML file of options: see schemas/train.schema.json
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// An option by its key in such a file, like train.adamw.beta2=0.95; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Open the model and the data, check everything, print what would be done, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print what --dry-run finds as JSON
    #[arg(long, requires = "dry_run")]
    json: bool,
    /// Hugging Face folder, .gguf file, or the name of a fetched model
    #[arg(long)]
    model: Option<String>,
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
#[command(next_help_heading = "Training")]
struct TrainingArgs {
    /// What is minimised: sft, dpo or simpo
    #[arg(long)]
    objective: Option<ObjectiveKind>,
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
    /// Forward passes in an optimizer step, in each process where there are several
    #[arg(long)]
    gradient_accumulation: Option<usize>,
    /// L2 norm above which gradients are scaled down; 0 for never
    #[arg(long, value_parser = finite)]
    max_grad_norm: Option<f64>,
    /// Part of the steps in which the rate rises
    #[arg(long, value_parser = finite)]
    warmup_fraction: Option<f64>,
    /// Steps in which the rate rises, in place of --warmup-fraction
    #[arg(long)]
    warmup_steps: Option<usize>,
    /// How the rate goes on after that: cosine, linear or constant
    #[arg(long)]
    lr_scheduler: Option<LrScheduler>,
    /// Decoupled weight decay
    #[arg(long, value_parser = finite)]
    weight_decay: Option<f64>,
    /// Orders the data
    #[arg(long)]
    seed: Option<u64>,
    /// Steps between evaluations; 0 for one at the end
    #[arg(long)]
    eval_every: Option<usize>,
    /// How held-out classes are predicted: text or likelihood
    #[arg(long)]
    eval_by: Option<EvalBy>,
    /// Steps between checkpoints; 0 for none
    #[arg(long)]
    save_every: Option<usize>,
    /// Keep so many checkpoints, the newest
    #[arg(long)]
    save_limit: Option<usize>,
    /// Keep the checkpoint with the best held-out loss or accuracy in best/
    #[arg(long)]
    best_by: Option<BestBy>,
    /// End with the best adapter, not the last
    #[arg(long)]
    load_best_at_end: bool,
    /// Stop after so many evaluations that are no better
    #[arg(long)]
    patience: Option<usize>,
    /// Write TensorBoard event files
    #[arg(long)]
    tensorboard: bool,
    /// Keep only the inputs of layers for the backward pass: less memory, more time
    #[arg(long)]
    checkpoint_activations: bool,
    /// Keep the optimizer's moments in a file of the run folder: less memory, more time
    #[arg(long)]
    offload_optimizer: bool,
    /// Type of the frozen model: f64, f32, bf16 or f16
    #[arg(long)]
    dtype: Option<ComputeType>,
    /// Where it is computed: auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Round the factors of float32 matrix products to TF32 on a GPU: faster, three decimal digits
    #[arg(long)]
    tf32: bool,
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

impl Train {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        let config = self.resolve()?;
        if self.dry_run {
            return self.print_plan(context, &config);
        }
        let done = train(context, &config, self.resume, self.overwrite, Some(&Interrupt::listen()?))?;
        let (out, outcome) = (done.out.display(), &done.outcome);
        match outcome.ended {
            Ended::Stopped if !done.leads => return Ok(ExitCode::from(done.exit_code)),
            _ if !done.leads => return Ok(ExitCode::SUCCESS),
            Ended::Stopped => {
                eprintln!("stopped after step {}; go on with\n  {}", outcome.steps, resume_command());
                return Ok(ExitCode::from(done.exit_code));
            }
            Ended::Exhausted => println!("{out} (stopped early at step {}, loss {:.3})", outcome.steps, outcome.loss),
            Ended::Completed => println!("{out} ({} steps, loss {:.3})", outcome.steps, outcome.loss),
        }
        for line in [done.before_and_after(), done.best(&config), done.memory()].into_iter().flatten() {
            println!("{line}");
        }
        println!("curves in {}", done.out.join(REPORT_NAME).display());
        Ok(ExitCode::SUCCESS)
    }

    fn print_plan(&self, context: &Context, config: &RunConfig) -> Result<ExitCode> {
        let prepared = prepare(context, config)?;
        let processes = Launch::from_env()?.map_or(1, |launch| launch.world_size);
        let plan = Plan::of(config, &prepared, processes);
        if self.json {
            println!("{:#}", json!({ "plan": plan, "options": config }));
        } else {
            plan.print(config)?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Defaults, then the file, then `--set`, then the command line.
    fn resolve(&self) -> Result<RunConfig> {
        layered(self.config.as_deref(), &self.set, self.given())
    }

    /// What the command line says, and nothing else.
    fn given(&self) -> Value {
        let training = &self.training;
        let train = given([
            ("learning_rate", json!(training.learning_rate)),
            ("epochs", json!(training.epochs)),
            ("max_steps", json!(training.max_steps)),
            ("batch_size", json!(training.batch_size)),
            ("gradient_accumulation", json!(training.gradient_accumulation)),
            ("max_grad_norm", json!(training.max_grad_norm)),
            ("warmup_fraction", json!(training.warmup_fraction)),
            ("warmup_steps", json!(training.warmup_steps)),
            ("lr_scheduler", json!(training.lr_scheduler)),
            ("adamw", given([("weight_decay", json!(training.weight_decay))])),
            ("seed", json!(training.seed)),
            ("objective", json!(training.objective)),
            ("eval_every", json!(training.eval_every)),
            ("eval_by", json!(training.eval_by)),
            ("save_every", json!(training.save_every)),
            ("save_limit", json!(training.save_limit)),
            ("best_by", json!(training.best_by)),
            ("load_best_at_end", if training.load_best_at_end { json!(true) } else { Value::Null }),
            ("patience", json!(training.patience)),
            ("tensorboard", if training.tensorboard { json!(true) } else { Value::Null }),
            ("checkpoint_activations", if training.checkpoint_activations { json!(true) } else { Value::Null }),
            ("offload_optimizer", if training.offload_optimizer { json!(true) } else { Value::Null }),
            ("dtype", json!(training.dtype)),
            ("device", json!(training.device)),
            ("tf32", if training.tf32 { json!(true) } else { Value::Null }),
        ]);
        let adapter = given([("method", json!(training.method)), ("layers", json!(training.layers))]);
        given([
            ("model", json!(self.model)),
            ("out", json!(self.out)),
            ("data", self.data_options.given()),
            ("train", train),
            ("adapter", adapter),
        ])
    }
}

/// Of two options for one thing, the one in the higher layer counts.
pub(super) const REPLACED: [(&str, &str); 4] = [
    ("data.holdout", "data.eval"),
    ("data.eval", "data.holdout"),
    ("train.epochs", "train.max_steps"),
    ("train.warmup_fraction", "train.warmup_steps"),
];

/// This command line with `--resume`.
fn resume_command() -> String {
    let given = command_line();
    let kept: Vec<&str> = given.split(' ').filter(|word| *word != "--overwrite").collect();
    let more = if kept.contains(&"--resume") { "" } else { " --resume" };
    kept.join(" ") + more
}

fn finite(text: &str) -> std::result::Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if number.is_finite() { Ok(number) } else { Err("must be finite".into()) }
}

/// Defaults, then a file, then what is given besides.
pub(super) fn resolve(file: Option<&Path>, given: Value) -> Result<RunConfig> {
    layered(file, &[], given)
}

/// Defaults, then a file, then single options, then what is given besides.
fn layered(file: Option<&Path>, set: &[String], given: Value) -> Result<RunConfig> {
    let layers = file.map(Layer::file).into_iter().chain(set.iter().map(|text| Layer::set(text)));
    let layers = layers.chain([Ok(Layer::command_line(given))]);
    options::resolve(layers.collect::<Result<_>>()?, &REPLACED)
}

/// An object of the entries that are not null.
pub(super) fn given<const N: usize>(entries: [(&str, Value); N]) -> Value {
    let entries = entries.into_iter().filter(|(_, value)| !value.is_null());
    Value::Object(entries.map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>())
}

/// A run that has ended.
pub(super) struct Trained {
    pub(super) out: PathBuf,
    pub(super) outcome: Outcome,
    /// Of this process where the run was stopped.
    exit_code: u8,
    /// Estimated and measured.
    memory: (u64, Option<u64>),
    /// Whether this process is the one that evaluates, writes and speaks.
    leads: bool,
}

impl Trained {
    /// Accuracy and loss on the held-out part, before and after.
    pub(super) fn before_and_after(&self) -> Option<String> {
        let after = self.outcome.after.as_ref()?;
        let of = |value: fn(&crate::train::Evaluation) -> String| match &self.outcome.before {
            Some(before) => format!("{} → {}", value(before), value(after)),
            None => value(after),
        };
        let (accuracy, loss) = (of(|e| style::percent(e.accuracy)), of(|e| format!("{:.3}", e.loss)));
        Some(format!("held-out accuracy {accuracy}, loss {loss} ({} examples)", after.examples))
    }

    fn best(&self, config: &RunConfig) -> Option<String> {
        let best = self.outcome.best?;
        let (by, value) = match config.train.watched()? {
            BestBy::Loss => ("loss", format!("{:.3}", best.value)),
            BestBy::Accuracy => ("accuracy", style::percent(best.value)),
        };
        let kept = if config.train.load_best_at_end { "this is the adapter" } else { "kept in best/" };
        Some(format!("best held-out {by} {value} at step {}; {kept}", best.step))
    }

    fn memory(&self) -> Option<String> {
        let (estimated, peak) = (style::bytes(self.memory.0), style::bytes(self.memory.1?));
        Some(format!("peak memory {peak}, estimated {estimated}"))
    }
}

/// What a run is known by before its weights are read.
pub(super) struct Prepared {
    pub(super) checkpoint: Checkpoint,
    pub(super) adapter: AdapterConfig,
    pub(super) training: Dataset,
    pub(super) held_out: Option<Dataset>,
}

/// Opens and checks everything that a configuration names.
fn prepare(context: &Context, config: &RunConfig) -> Result<Prepared> {
    let (Some(model), Some(data), Some(out)) = (&config.model, &config.data.train, &config.out) else {
        return Err(usage("--model, --data and --out are needed", "give them on the command line or in --config"));
    };
    config.train.check()?;
    let inputs = [Some(data), config.data.eval.as_ref()].into_iter().flatten().flat_map(Paths::as_slice);
    keep_apart(out, &inputs.map(PathBuf::as_path).chain([Path::new(model)]).collect::<Vec<_>>())?;
    let checkpoint = context.checkpoint(model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let (training, held_out) = datasets(&checkpoint, &tokenizer, config)?;
    check_data(&config.train, &training, held_out.as_ref())?;
    let (adapter, _) = config.adapter.resolve(&checkpoint)?;
    check_method(&config.train, &adapter, checkpoint.spec(), &training, held_out.as_ref())?;
    Ok(Prepared { checkpoint, adapter, training, held_out })
}

/// The base model and the adapter at its start.
fn load(checkpoint: &Checkpoint, config: &RunConfig, device: &Device) -> Result<(Decoder, Adapter)> {
    let decoder = Decoder::load(checkpoint, config.train.dtype.dtype(), device)?;
    let adapter = config.adapter.start(checkpoint, &decoder, config.train.seed)?;
    // weights that are trained themselves are not held twice: the run trains these
    let adapter = match adapter.base_weights() {
        Some(_) => adapter.into_trainable(DType::F32, device)?.0,
        None => adapter,
    };
    if config.train.objective == ObjectiveKind::Dpo {
        // it is what the trained model is compared with
        return Ok((decoder, adapter));
    }
    let own = adapter.decoder(checkpoint.spec(), decoder.dtype())?;
    Ok((own.unwrap_or(decoder), adapter))
}

/// Runs a training from a resolved configuration.
pub(super) fn train(
    context: &Context,
    config: &RunConfig,
    resume: bool,
    overwrite: bool,
    interrupt: Option<&Interrupt>,
) -> Result<Trained> {
    // first, so that all hear of it at once when one of them fails
    let launch = Launch::from_env()?;
    let group = launch.as_ref().map(Group::join).transpose()?;
    let device = device::open(config.train.device, config.train.tf32, launch.map_or(0, |launch| launch.local_rank))?;
    let prepared = prepare(context, config)?;
    let Some(out) = &config.out else { return Err(usage("--out is needed", "the folder of the run")) };
    let plan = Plan::of(config, &prepared, group.as_ref().map_or(1, Group::world_size));
    let leads = group.as_ref().is_none_or(|group| group.rank() == 0);
    if !resume && leads {
        RunFolder::check(out, overwrite)?;
    }
    if !context.global.quiet && leads {
        eprintln!("{}", plan.headline());
        if !device.is_cpu() {
            eprintln!("on {}", describe(&device));
        }
    }
    // before an earlier run is removed: weights may be damaged
    let help = || plan.what_fits(config, &prepared, device_memory(&device));
    prepare_memory(prepared.adapter.num_parameters(prepared.checkpoint.spec()));
    let model = load(&prepared.checkpoint, config, &device).map_err(|error| with_memory_help(error, help))?;
    let folder = match (leads, resume) {
        (false, _) => RunFolder::follow(out),
        (true, false) => RunFolder::create(out, overwrite)?,
        (true, true) => RunFolder::resume(out)?,
    };
    let outcome = run(context, config, &prepared, &model, &folder, group.as_ref(), interrupt).and_then(|outcome| {
        if outcome.ended == Ended::Stopped || !leads {
            return Ok(outcome);
        }
        folder.finish(&outcome.adapter)?;
        write_manifest(&prepared.checkpoint, config, out, &outcome)?;
        Ok(outcome)
    });
    if outcome.is_err() {
        folder.discard_without_checkpoint();
    }
    let outcome = outcome.map_err(|error| with_memory_help(error, help))?;
    Ok(Trained {
        out: out.clone(),
        outcome,
        exit_code: interrupt.map_or(0, Interrupt::exit_code),
        memory: (plan.memory().peak, device_memory(&device).map(|memory| memory.peak).or_else(peak_resident)),
        leads,
    })
}

fn run(
    context: &Context,
    config: &RunConfig,
    prepared: &Prepared,
    (decoder, adapter): &(Decoder, Adapter),
    folder: &RunFolder,
    group: Option<&Group>,
    interrupt: Option<&Interrupt>,
) -> Result<Outcome> {
    let trainer = Trainer::new(Inputs {
        decoder,
        base: Fingerprint::of(&prepared.checkpoint)?,
        adapter,
        config: config.train.clone(),
        train: &prepared.training,
        held_out: prepared.held_out.as_ref(),
        folder,
        group,
    })?;
    let leads = group.is_none_or(|group| group.rank() == 0);
    let (total, start) = (trainer.total_steps(), trainer.start_step());
    let mut bar = TrainingBar::new(total, start, context.global.quiet || !leads, interrupt.cloned());
    let outcome = trainer.run(&mut bar);
    bar.finish();
    Ok(outcome?)
}

/// The training and held-out examples; what was shortened or dropped is said.
fn datasets(checkpoint: &Checkpoint, tokenizer: &Tokenizer, config: &RunConfig) -> Result<(Dataset, Option<Dataset>)> {
    let spec = checkpoint.spec();
    let format = Format::new(tokenizer, spec.vocab_size, config.data.format.clone())?;
    let (train, held_out) = config.data.load(&format, config.train.seed, spec.max_positions)?;
    for (name, dataset) in [("training data", Some(&train)), ("held-out data", held_out.as_ref())] {
        for note in dataset.into_iter().flat_map(|dataset| dataset.report().notes()) {
            tracing::warn!("{name}: {note}");
        }
    }
    Ok((train, held_out))
}

fn write_manifest(checkpoint: &Checkpoint, config: &RunConfig, out: &Path, outcome: &Outcome) -> Result<()> {
    let mut manifest = Manifest::new("train", json!(config));
    let (train, eval) = config.data.files()?;
    for (role, files) in [("data", train), ("eval", eval)] {
        for file in files {
            manifest = manifest.input(role, &file)?;
        }
    }
    for file in checkpoint.weight_files() {
        manifest = manifest.input("weights", &file)?;
    }
    manifest = manifest.output("adapter_config", &out.join(CONFIG_NAME))?.output("adapter", &out.join(WEIGHTS_NAME))?;
    manifest.facts = json!({
        "steps": outcome.steps,
        "loss": outcome.loss,
        "held_out_before": outcome.before,
        "held_out_after": outcome.after,
        "best": outcome.best,
        "ended": outcome.ended,
        "peak_resident_bytes": peak_resident(),
    });
    Ok(manifest.write(out)?)
}

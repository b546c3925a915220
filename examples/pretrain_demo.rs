//! Makes what `prefold demo` starts from: a small language model, pretrained here from random weights, and a task that
//! it was not pretrained for.
//!
//! ```text
//! RAYON_NUM_THREADS=1 cargo run --release --example pretrain_demo -- --out fixtures/demo
//! cargo run --release --example pretrain_demo -- --out fixtures/demo --check
//! ```
//!
//! The second command only trains adapters on what is there, and fails where one does not learn the task.
//!
//! The grammar (`fixtures/demo/grammar.json`) writes messages to a shop. The model reads such messages, each with one line
//! after it: a reply (`reply:`, `answer:`), the subject (`subject:`, `about:`, `summary:`), or a word of the message
//! (`city: Lyon`). The task is to route a message to one of eight desks, on a line that the model has never read
//! (`label: returns`). The last quarter of every topic's phrasings and of every slot's values is held out: test messages
//! consist of them, training messages of the rest. The pretraining has read all phrasings and values, but no test message.
//!
//! The same seed and thread count give the same bytes on the same machine. A model this small trains fastest on one thread.
#![allow(clippy::print_stdout)]

use std::collections::{BTreeMap, HashSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use clap::Parser;
use prefold::adapter::{Adapter, AdapterConfig};
use prefold::base::{
    Checkpoint, Decoder, DecoderSpec, Input, Linear, NoHook, Tokenizer, WeightRole, WeightShape, family,
};
use prefold::data::{Batch, Cursor, DataConfig, Example, Format, FormatOptions, Record, Sampler};
use prefold::files::{self, StagedFolder};
use prefold::train::{
    AdamW, AdamWConfig, Fingerprint, Inputs, LrScheduler, RunFolder, Schedule, Silent, TrainConfig, Trainer,
    batch_input, clip_gradients, completion_loss,
};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;
use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, TokenizerBuilder};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const GRAMMAR: &str = include_str!("../fixtures/demo/grammar.json");
/// Names of the line that answers.
const REPLY: [&str; 2] = ["reply", "answer"];
/// Names of the line that says what the message is about.
const SUBJECT: [&str; 3] = ["subject", "about", "summary"];
const SPECIAL: [&str; 3] = ["<s>", "</s>", "<pad>"];
const VOCABULARY: usize = 512;
const DOCUMENTS: usize = 40_000;
const STEPS: usize = 1600;

const BATCH: usize = 32;
/// Documents that are sorted by length together, so that a batch has little padding.
const POOL: usize = 16 * BATCH;
const PEAK_RATE: f64 = 4e-3;
const MAX_GRAD_NORM: f64 = 1.0;
const TRAIN_PER_LABEL: usize = 60;
const TEST_PER_LABEL: usize = 30;

const CHECKED_SEEDS: u64 = 3;
/// Bounds on the part of the test messages that are routed right before and after training an adapter.
const MAX_BEFORE: f64 = 0.02;
const MIN_AFTER: f64 = 0.85;

/// Pretrains the demo's model and writes its task.
#[derive(Parser)]
struct Options {
    /// Folder that receives `model/`, `train.jsonl` and `test.jsonl`.
    #[arg(long, default_value = "fixtures/demo")]
    out: PathBuf,
    /// Decides the documents, the initial weights and their order.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only check that an adapter learns the task that is in the folder.
    #[arg(long)]
    check: bool,
}

fn main() -> Result<()> {
    let Options { out, seed, check } = Options::parse();
    if !check {
        make(&out, seed)?;
    }
    check_task(&out)
}

fn make(out: &Path, seed: u64) -> Result<()> {
    let started = Instant::now();
    let grammar: Grammar = serde_json::from_str(GRAMMAR)?;
    let mut dice = Dice::new(seed, 2);
    let train = grammar.task(Part::Seen, TRAIN_PER_LABEL, &mut dice);
    let test = grammar.task(Part::HeldOut, TEST_PER_LABEL, &mut dice);

    let reserved: HashSet<&str> = test.iter().map(|(text, _)| text.as_str()).collect();
    let mut dice = Dice::new(seed, 0);
    let documents: Vec<String> = (0..DOCUMENTS).map(|_| grammar.document(&reserved, &mut dice)).collect();
    println!("{} documents, {} distinct", documents.len(), documents.iter().collect::<HashSet<_>>().len());
    let staged = StagedFolder::new(&out.join("model"), true)?;
    write_tokenizer(&documents, staged.path())?;
    let tokenizer = Tokenizer::from_folder(staged.path())?;
    let config = config(&tokenizer);
    let path = staged.path().join("config.json");
    files::write_json(&path, "a model configuration", &config)?;
    let spec = family::spec_from_config(&path, &config)?;
    println!("{} parameters", spec.num_parameters());

    let weights = initial_weights(&spec, &mut Dice::new(seed, 1))?;
    pretrain(&spec, &weights, &documents, &tokenizer, seed)?;
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(weights.iter().map(|(name, var)| (name, var.as_tensor())), Some(metadata))?;
    std::fs::write(staged.path().join("model.safetensors"), &bytes)?;
    let model = staged.commit()?;
    write_records(&out.join("train.jsonl"), &train)?;
    write_records(&out.join("test.jsonl"), &test)?;

    show(&model, &test, &mut dice)?;
    println!("---\nmodel.safetensors has sha256 {}", files::sha256_bytes(&bytes));
    println!("made in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// How messages are written.
#[derive(Deserialize)]
struct Grammar {
    /// What a message may begin with.
    openings: Vec<String>,
    /// What it may end with.
    closings: Vec<String>,
    /// What may stand for `{name}`.
    slots: BTreeMap<String, Vec<String>>,
    topics: Vec<Topic>,
}

/// One concern of a customer.
#[derive(Deserialize)]
struct Topic {
    /// The desk that looks after it; several topics share one.
    label: String,
    /// The topic in a few words.
    subject: String,
    replies: Vec<String>,
    phrasings: Vec<String>,
}

/// Phrasings and slot values come in two parts: the last quarter of each list is held out.
#[derive(Clone, Copy)]
enum Part {
    Seen,
    HeldOut,
    Both,
}

impl Part {
    fn of<T>(self, values: &[T]) -> &[T] {
        let (seen, held_out) = values.split_at(values.len() - values.len() / 4);
        match self {
            Self::Seen => seen,
            Self::HeldOut => held_out,
            Self::Both => values,
        }
    }
}

/// A message, and what its slots were filled with.
struct Message<'a> {
    text: String,
    filled: Vec<(&'a str, &'a str)>,
}

impl Grammar {
    /// A message whose phrasing and slot values are of one part.
    fn message<'a>(&'a self, topic: &'a Topic, part: Part, dice: &mut Dice) -> Message<'a> {
        let phrasing = dice.pick(part.of(&topic.phrasings));
        let used = self.slots.iter().filter(|(name, _)| phrasing.contains(&slot(name)));
        let filled: Vec<_> = used.map(|(name, values)| (name.as_str(), dice.pick(part.of(values)).as_str())).collect();
        let (opening, closing) = (dice.pick(&self.openings), dice.pick(&self.closings));
        let body = fill(phrasing, &filled);
        let body = if opening.ends_with(", ") { body } else { capitalised(&body) };
        Message { text: format!("{opening}{body}{closing}"), filled }
    }

    /// A message that is none of `reserved`, and the line after it: a reply, the subject, or one of its slots.
    fn document(&self, reserved: &HashSet<&str>, dice: &mut Dice) -> String {
        let topic = dice.pick(&self.topics);
        let Message { text, filled } = loop {
            let message = self.message(topic, Part::Both, dice);
            if !reserved.contains(message.text.as_str()) {
                break message;
            }
        };
        let line = match dice.below(10) {
            0..4 => format!("{}: {}", dice.pick(&REPLY), topic.reply(&filled, dice)),
            4..6 if !filled.is_empty() => {
                let (name, value) = dice.pick(&filled);
                format!("{name}: {value}")
            }
            _ => format!("{}: {}", dice.pick(&SUBJECT), topic.subject),
        };
        format!("{text}\n{line}")
    }

    /// `per_label` different messages of every label with that label, one label after another.
    fn task(&self, part: Part, per_label: usize, dice: &mut Dice) -> Vec<(String, &str)> {
        let mut by_label: BTreeMap<&str, Vec<&Topic>> = BTreeMap::new();
        for topic in &self.topics {
            by_label.entry(&topic.label).or_default().push(topic);
        }
        let (mut written, mut records) = (HashSet::new(), Vec::new());
        for (label, topics) in by_label {
            let wanted = records.len() + per_label;
            while records.len() < wanted {
                let text = self.message(topics[records.len() % topics.len()], part, dice).text;
                if written.insert(text.clone()) {
                    records.push((text, label));
                }
            }
        }
        records
    }
}

impl Topic {
    /// A reply whose slots the message has filled.
    fn reply(&self, filled: &[(&str, &str)], dice: &mut Dice) -> String {
        let replies = self.replies.iter().map(|reply| fill(reply, filled));
        let answerable: Vec<String> = replies.filter(|reply| !reply.contains('{')).collect();
        dice.pick(&answerable).clone()
    }
}

fn slot(name: &str) -> String {
    format!("{{{name}}}")
}

fn fill(template: &str, filled: &[(&str, &str)]) -> String {
    filled.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&slot(name), value))
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map(|first| first.to_uppercase().chain(characters).collect()).unwrap_or_default()
}

/// Random numbers that a seed decides, whatever the version of a library.
struct Dice(Pcg64);

impl Dice {
    fn new(seed: u64, stream: u128) -> Self {
        Self(Pcg64::new(seed.into(), stream))
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.0.next_u64() % bound as u64) as usize
    }

    fn pick<'a, T>(&mut self, values: &'a [T]) -> &'a T {
        &values[self.below(values.len())]
    }

    /// Of the standard normal distribution, by Box and Muller's transform.
    fn normal(&mut self) -> f64 {
        let mut uniform = || (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let (radius, angle) = (1.0 - uniform(), uniform());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }
}

/// Byte-level BPE that begins a text with `<s>`. There is no chat template: the model continues text and knows no turns.
fn write_tokenizer(documents: &[String], folder: &Path) -> Result<()> {
    let special = SPECIAL.map(|token| AddedToken::from(token, true));
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)))
        .with_post_processor(Some(
            TemplateProcessing::builder().try_single("<s> $A")?.special_tokens(vec![("<s>", 0)]).build()?,
        ))
        .with_decoder(Some(ByteLevel::default()))
        .build()?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special.to_vec())
        .show_progress(false)
        .build();
    tokenizer.train(&mut trainer, documents.iter())?.save(folder.join("tokenizer.json"), true)?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": false,
        "model_max_length": 256,
    });
    Ok(files::write_json(&folder.join("tokenizer_config.json"), "a tokenizer's configuration", &config)?)
}

fn config(tokenizer: &Tokenizer) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size(),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "bos_token_id": tokenizer.bos(),
        "eos_token_id": tokenizer.eos(),
        "pad_token_id": tokenizer.pad(),
        "torch_dtype": "float32",
    })
}

/// Norms of one, everything else normal; what is added to the residual stream begins smaller by the number of additions
/// (as GPT-2 does).
fn initial_weights(spec: &DecoderSpec, dice: &mut Dice) -> Result<BTreeMap<String, Var>> {
    let residual = 1.0 / (2.0 * spec.num_layers as f64).sqrt();
    let mut variable = |WeightShape { role, name, shape }: WeightShape| {
        let scale = match role {
            WeightRole::Norm(..) | WeightRole::FinalNorm => None,
            WeightRole::Weight(_, Linear::AttentionOutput | Linear::Down) => Some(0.06 * residual),
            _ => Some(0.06),
        };
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| scale.map_or(1.0, |s| (s * dice.normal()) as f32)).collect();
        Ok((name, Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)?))
    };
    spec.weights().into_iter().map(&mut variable).collect()
}

/// Every document as a text that is learnt whole, its end too.
fn examples(documents: &[String], tokenizer: &Tokenizer) -> Result<Vec<Example>> {
    let format = Format::new(tokenizer, tokenizer.vocab_size(), FormatOptions::default())?;
    let record = |text: &String| Record::Completion { prompt: String::new(), completion: text.clone(), system: None };
    let examples: prefold::data::Result<Vec<_>> = documents.iter().map(|text| format.examples(&record(text))).collect();
    Ok(examples?.concat())
}

fn pretrain(
    spec: &DecoderSpec,
    weights: &BTreeMap<String, Var>,
    documents: &[String],
    tokenizer: &Tokenizer,
    seed: u64,
) -> Result<()> {
    let examples = examples(documents, tokenizer)?;
    let pad = tokenizer.pad().unwrap_or_default();
    let decoder = Decoder::from_weights(spec, |weight| Ok(weights[&weight.name].as_tensor().clone()))?;
    let config = AdamWConfig { beta2: 0.98, weight_decay: 0.1, ..AdamWConfig::default() };
    let mut optimizer = AdamW::new(config, weights.clone())?;
    let kind = LrScheduler::Cosine;
    let schedule =
        Schedule { kind, peak: PEAK_RATE, warmup_steps: STEPS / 20, total_steps: STEPS, final_fraction: 0.02 };
    let mut sampler = Sampler::new(examples.len(), POOL, seed);
    let (mut cursor, mut pool) = (Cursor::default(), Vec::new());
    let (mut loss, mut tokens, started) = (0.0, 0, Instant::now());
    for step in 0..STEPS {
        if pool.is_empty() {
            let mut order = sampler.next(&mut cursor);
            order.sort_by_key(|at| examples[*at].completion_ids.len());
            pool = order.chunks(BATCH).map(<[usize]>::to_vec).collect();
        }
        let batch = pool.pop().unwrap_or_default();
        let batch = Batch::training(&batch.iter().map(|at| &examples[*at]).collect::<Vec<_>>(), pad);
        let found = completion_loss(&decoder, &NoHook, &batch_input(&batch)?, &batch.labels)?;
        let mean = (&found.sum / found.tokens() as f64)?;
        let store = mean.backward()?;
        let gradient = |(name, var): (&String, &Var)| Some((name.clone(), store.get(var)?.clone()));
        let mut gradients: BTreeMap<String, Tensor> = weights.iter().filter_map(gradient).collect();
        clip_gradients(&mut gradients, Some(MAX_GRAD_NORM))?;
        optimizer.step(gradients, schedule.rate(step))?;
        loss += found.sum.to_scalar::<f64>()?;
        tokens += found.tokens();
        if (step + 1).is_multiple_of(50) {
            let seconds = started.elapsed().as_secs_f64();
            println!("step {:>5}  loss {:.4}  {seconds:.0} s", step + 1, loss / tokens as f64);
            (loss, tokens) = (0.0, 0);
        }
    }
    Ok(())
}

fn write_records(path: &Path, records: &[(String, &str)]) -> Result<()> {
    let lines = records.iter().map(|(text, label)| format!("{}\n", json!({"text": text, "label": label})));
    Ok(std::fs::write(path, lines.collect::<String>())?)
}

/// Trains an adapter for each of a few seeds and says how many test messages are routed right before and after.
fn check_task(folder: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(&folder.join("model"))?;
    let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu)?;
    let tokenizer = checkpoint.tokenizer()?;
    let format = Format::new(&tokenizer, decoder.spec().vocab_size, FormatOptions::default())?;
    let max_seq_len = decoder.spec().max_positions;
    let dataset = |name: &str| {
        let config = DataConfig { train: Some(folder.join(name).into()), max_seq_len, ..DataConfig::default() };
        config.load(&format, 0, max_seq_len).map(|(dataset, _)| dataset)
    };
    let (train, test) = (dataset("train.jsonl")?, dataset("test.jsonl")?);
    let start = Adapter::zeros(AdapterConfig::prefix_plus(decoder.spec(), Some(checkpoint.display_name())))?;
    for seed in 0..CHECKED_SEEDS {
        let started = Instant::now();
        let config = TrainConfig { learning_rate: 1e-2, epochs: 10, seed, save_every: 0, ..TrainConfig::default() };
        let scratch = tempfile::tempdir()?;
        let run = RunFolder::create(scratch.path(), false)?;
        let base = Fingerprint::of(&checkpoint)?;
        let held_out = Some(&test);
        let inputs = Inputs {
            decoder: &decoder,
            base,
            adapter: &start,
            config,
            train: &train,
            held_out,
            folder: &run,
            group: None,
        };
        let outcome = Trainer::new(inputs)?.run(&mut Silent)?;
        let (Some(before), Some(after)) = (outcome.before, outcome.after) else {
            return Err("nothing measured".into());
        };
        println!(
            "seed {seed}: {:.1} % of {} test messages routed right, {:.1} % after {} steps on {} messages ({:.0} s)",
            100.0 * before.accuracy,
            after.examples,
            100.0 * after.accuracy,
            outcome.steps,
            train.len(),
            started.elapsed().as_secs_f64()
        );
        if before.accuracy > MAX_BEFORE || after.accuracy < MIN_AFTER {
            return Err(format!("expected at most {MAX_BEFORE} before and at least {MIN_AFTER} after").into());
        }
    }
    Ok(())
}

/// Shows what the written model says to a few messages.
fn show(model: &Path, records: &[(String, &str)], dice: &mut Dice) -> Result<()> {
    let checkpoint = Checkpoint::open(model)?;
    let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu)?;
    let tokenizer = checkpoint.tokenizer()?;
    for field in ["reply", "about", "label"] {
        let prompt = format!("{}\n{field}:", dice.pick(records).0);
        let mut ids = tokenizer.encode(&prompt, true)?;
        while ids.len() < decoder.spec().max_positions && !ids.last().is_some_and(|id| tokenizer.is_eos(*id)) {
            let hidden = decoder.hidden_states(&Input::row(&ids)?, None, &NoHook)?;
            let logits = decoder.logits(&hidden.narrow(1, ids.len() - 1, 1)?)?;
            ids.push(logits.flatten_all()?.argmax(0)?.to_scalar::<u32>()?);
        }
        println!("---\n{}", tokenizer.decode(&ids, true)?);
    }
    Ok(())
}

//! `prefold demo`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use miette::Result;

use super::Context;
use super::export::ExportArgs;
use super::generate::greedy;
use super::train::{RunConfig, Trained, train};
use super::verify::{Engine, VerifyArgs, compile, open_session, summary, table};
use crate::adapter::{Adapter, WEIGHTS_NAME};
use crate::base::{Checkpoint, Decoder, NoHook, Tokenizer, fetch};
use crate::data::{Format, Record};
use crate::files::{self, StagedFolder};
use crate::onnx::MODEL_NAME;
use crate::runtime::{GraphDecoder, library};

/// Train, fold and prove, on a small model that comes with prefold
///
/// With --model smollm2 the same on a real model, and with --data on real data.
#[derive(Args, Debug)]
pub(super) struct Demo {
    /// Folder to write
    #[arg(long, default_value = "prefold-demo")]
    out: PathBuf,
    /// Another model than the built-in one: smollm2, or whatever --model takes elsewhere
    #[arg(long)]
    model: Option<String>,
    /// Records for --model, JSONL of {"text","label"} [default: the built-in task's]
    #[arg(long, requires = "model", value_name = "FILE")]
    data: Option<PathBuf>,
}

/// The built-in model and task: `fixtures/demo`, made by `examples/pretrain_demo.rs`.
const FIXTURE: [(&str, &[u8]); 6] = [
    ("model/config.json", include_bytes!("../../fixtures/demo/model/config.json")),
    ("model/model.safetensors", include_bytes!("../../fixtures/demo/model/model.safetensors")),
    ("model/tokenizer.json", include_bytes!("../../fixtures/demo/model/tokenizer.json")),
    ("model/tokenizer_config.json", include_bytes!("../../fixtures/demo/model/tokenizer_config.json")),
    ("data/train.jsonl", include_bytes!("../../fixtures/demo/train.jsonl")),
    ("data/test.jsonl", include_bytes!("../../fixtures/demo/test.jsonl")),
];

/// The part of --data that is not trained on.
const HELD_OUT: &str = "0.2";

/// A file that only this command writes: a folder with it may be replaced.
const MARK: &str = "demo.txt";

impl Demo {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        let started = Instant::now();
        let own = self.out.join(MARK).is_file();
        let staged = if own { StagedFolder::over(&self.out)? } else { StagedFolder::new(&self.out, false)? };
        let root = staged.path();
        let note = "Written by `prefold demo`, which replaces this folder when it runs again.\n";
        std::fs::write(root.join(MARK), note).map_err(files::Error::io("write", root))?;
        let mut config = match &self.model {
            Some(model) => real_task(context, model, self.data.as_deref(), root)?,
            None => built_in_task(root)?,
        };
        config.out = Some(root.join("adapter"));

        println!("1. Train a Prefix-Tuning+ adapter\n");
        let trained = train(context, &config, false, false, None)?;
        println!("{}\n", trained.before_and_after().unwrap_or_default());

        println!(
            "2. Write the model as ONNX, fold the adapter in, and prove that the graph computes what was trained\n"
        );
        ensure_onnx_runtime(context);
        let checkpoint = context.checkpoint(config.model.as_deref().unwrap_or_default())?;
        let graph = root.join("graph");
        std::fs::create_dir(&graph).map_err(files::Error::io("create folder", &graph))?;
        let path = root.join("adapter");
        let adapter = Adapter::open(&path)?;
        let export = ExportArgs::default();
        let report = compile(
            context,
            &checkpoint,
            (&adapter, &path),
            &graph,
            &export,
            &VerifyArgs::default(),
            crate::fold::Emission::Baked,
        )?;
        println!("{}\n{}\n", table(&report), summary(&report));

        println!("3. The same prompt, before and after\n");
        show_answers(context, &config, &checkpoint, &graph)?;

        let out = staged.commit()?;
        show_files(&out, &trained);
        println!("\n{:.0} s in all", started.elapsed().as_secs_f64());
        Ok(if report.verdict.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Unpacks the built-in model and task.
fn built_in_task(root: &Path) -> Result<RunConfig> {
    for (name, bytes) in FIXTURE {
        let path = root.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(files::Error::io("create folder", parent))?;
        }
        std::fs::write(&path, bytes).map_err(files::Error::io("write", &path))?;
    }
    let mut config = RunConfig { model: Some(root.join("model").display().to_string()), ..RunConfig::default() };
    config.data.train = Some(root.join("data/train.jsonl").into());
    config.data.eval = Some(root.join("data/test.jsonl").into());
    config.train.learning_rate = 1e-2;
    config.train.epochs = 8;
    config.train.batch_size = 16;
    config.train.save_every = 0;
    Ok(config)
}

/// A few records of each label, and as many others to measure on as a minute allows.
fn real_task(context: &Context, model: &str, data: Option<&Path>, root: &Path) -> Result<RunConfig> {
    if fetch::KNOWN_MODELS.iter().any(|known| known.name == model) {
        fetch::fetch(model, &context.cache)?;
    }
    let built_in = built_in_task(root)?;
    let mut config = RunConfig { model: Some(model.to_owned()), data: built_in.data, ..RunConfig::default() };
    config.data.per_class = Some(16);
    if let Some(data) = data {
        config.data.train = Some(data.to_path_buf().into());
        config.data.eval = None;
        config.data.holdout = Some(HELD_OUT.into());
        config.data.per_class = Some(4);
    }
    config.data.eval_limit = Some(154);
    config.train.epochs = 4;
    config.train.save_every = 50;
    Ok(config)
}

/// ONNX Runtime where it can be had; the proof in tract does not need it.
fn ensure_onnx_runtime(context: &Context) {
    if library::find(context.ort_lib(), &context.cache).is_ok() {
        return;
    }
    eprintln!("installing ONNX Runtime {} with pip …", library::PINNED_VERSION);
    if let Err(error) = library::install(&context.cache, false, None) {
        eprintln!("ONNX Runtime could not be installed, so tract alone is asked: {error}");
    }
}

/// The first held-out text, answered by the base model in candle and by the folded graph in a runtime.
fn show_answers(context: &Context, config: &RunConfig, checkpoint: &Checkpoint, graph: &Path) -> Result<()> {
    let tokenizer = checkpoint.tokenizer()?;
    let format = Format::new(&tokenizer, checkpoint.spec().vocab_size, config.data.format.clone())?;
    let (_, Some(records)) = config.data.records(config.train.seed)? else { return Ok(()) };
    let Some(Record::Classification { text, label }) = records.entries().first().map(|e| &e.record) else {
        return Ok(());
    };
    let prompt = format.classification_prompt(text)?;
    let device = config.train.device.open(0)?;
    let decoder = Decoder::load(checkpoint, config.train.dtype.dtype(), &device)?;
    let before = greedy(&decoder, &NoHook, &prompt, 12, &tokenizer, &mut |_| Ok(()))?;
    let after = answer(context, graph, &tokenizer, &prompt)?;
    let show = |ids: &[u32]| Ok::<_, crate::base::Error>(tokenizer.decode(ids, true)?.trim().replace('\n', " "));
    println!("   text    {text}");
    println!("   label   {}", format.label_text(label));
    println!("   before  {}", show(&before)?);
    println!("   after   {}\n", show(&after)?);
    Ok(())
}

fn answer(context: &Context, graph: &Path, tokenizer: &Tokenizer, prompt: &[u32]) -> Result<Vec<u32>> {
    let has_ort = library::find(context.ort_lib(), &context.cache).is_ok();
    let engine = if has_ort { Engine::Ort } else { Engine::Tract };
    let mut decoder = GraphDecoder::new(open_session(context, engine, &graph.join(MODEL_NAME))?)?;
    let wide = |ids: &[u32]| ids.iter().map(|id| i64::from(*id)).collect::<Vec<i64>>();
    let rows = decoder.generate(&[wide(prompt)], 12, &wide(tokenizer.eos_ids()), &mut |_, _| {})?;
    Ok(rows.into_iter().flatten().filter_map(|id| u32::try_from(id).ok()).collect())
}

fn show_files(out: &Path, trained: &Trained) {
    println!("Files");
    println!(
        "   adapter       {} ({} parameters)",
        out.join("adapter").join(WEIGHTS_NAME).display(),
        trained.outcome.adapter.num_parameters()
    );
    println!("   graph         {}", out.join("graph").join(MODEL_NAME).display());
    println!("   parity report {}", out.join("graph/parity.json").display());
    println!("   metrics       {}", out.join("adapter").join(crate::train::METRICS_NAME).display());
}

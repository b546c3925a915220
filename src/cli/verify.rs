//! `prefold verify`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use miette::Result;

use super::export::ExportArgs;
use super::{Context, command_line, existing_graph, style, usage};
use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME};
use crate::base::{Checkpoint, Decoder, NoHook, SiteHook};
use crate::export::{Dialect, ExportOptions, Precision, export};
use crate::files::{FileFact, Manifest};
use crate::fold::fold_folder;
use crate::onnx::{DataType, MODEL_NAME, Model as Graph, external_files};
use crate::parity::{
    Budget, Candidate, CaseOptions, Check, Facts, Model, NoOpPair, Reference, Report, Verdict, generated_prompts,
    standard_cases,
};
use crate::runtime::{self, OrtOptions, OrtSession, Session, TractOptions, TractSession, library};
use crate::train::ComputeType;

/// Compare a graph with the candle model it was made from
///
/// Exit code 0: parity; 1: no parity, or it could not be told.
#[derive(Args, Debug)]
pub(super) struct Verify {
    /// The graph: its folder or its .onnx file
    #[arg(long)]
    graph: PathBuf,
    /// The checkpoint: Hugging Face folder, .gguf file, or the name of a fetched model
    #[arg(long)]
    model: String,
    /// The adapter that was folded in; none for a base graph
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// The graph before the fold, for the zero-adapter check [default: exported again where prefold wrote the graph]
    #[arg(long)]
    base_graph: Option<PathBuf>,
    /// Where to write the report
    #[arg(long, default_value = "parity.json")]
    out: PathBuf,
    #[command(flatten)]
    options: VerifyArgs,
}

/// How to verify.
#[derive(Args, Clone, Debug)]
pub(super) struct VerifyArgs {
    /// Runtimes [default: tract, and ONNX Runtime where it is found; for a graph with fused operators ONNX Runtime only]
    #[arg(long, value_delimiter = ',', value_enum)]
    runtime: Vec<Engine>,
    /// Type of the reference: f64, or f32 for a model that does not fit
    #[arg(long, default_value = "f64")]
    reference: ComputeType,
    /// Prompts to check, beside random ones: text that the model's tokenizer reads; may be repeated
    #[arg(long = "prompt")]
    prompts: Vec<String>,
    /// Chooses the random prompts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Cached steps after each prompt
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// How many times candle's own distance from the reference a runtime's may be
    #[arg(long)]
    factor: Option<f64>,
}

/// A runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Engine {
    /// ONNX Runtime on the CPU.
    Ort,
    /// tract, embedded.
    Tract,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::Ort => "onnxruntime",
            Self::Tract => "tract",
        }
    }
}

/// Opens a graph in a runtime.
pub(super) fn open_session(context: &Context, engine: Engine, graph: &Path) -> runtime::Result<Box<dyn Session>> {
    Ok(match engine {
        Engine::Ort => {
            let library = library::find(context.ort_lib(), &context.cache)?;
            Box::new(OrtSession::open(&library, graph, OrtOptions::default())?)
        }
        Engine::Tract => Box::new(TractSession::open(graph, TractOptions::default())?),
    })
}

impl Verify {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        let (checkpoint, adapter) = context.checkpoint_with(&self.model, self.adapter.as_deref())?;
        let subject = Subject {
            checkpoint: &checkpoint,
            graph: existing_graph(&self.graph)?,
            adapter: adapter.as_ref().zip(self.adapter.as_deref()),
            base_graph: self.base_graph.as_deref().map(existing_graph).transpose()?,
        };
        let report = verify(context, &subject, &self.options)?;
        println!("{}", table(&report));
        println!("{}, {}", summary(&report), self.out.display());
        write_report(&report, &self.out)?;
        Ok(if report.verdict == Verdict::Pass { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// What is compared.
pub(super) struct Subject<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) graph: PathBuf,
    /// The adapter and where it is from.
    pub(super) adapter: Option<(&'a Adapter, &'a Path)>,
    pub(super) base_graph: Option<PathBuf>,
}

/// Compares a graph with its model in every runtime.
pub(super) fn verify(context: &Context, subject: &Subject, options: &VerifyArgs) -> Result<Report> {
    if matches!(options.reference, ComputeType::Bf16 | ComputeType::F16) {
        return Err(usage(
            "--reference is less precise than the graph",
            "give f64, or f32 for a model that does not fit",
        ));
    }
    let graph = Graph::open(&subject.graph)?;
    let precision = precision_of(&graph);
    let adapter = subject.adapter.map(|(adapter, _)| adapter);
    let engines = engines(context, &graph, &options.runtime);
    let mut check = prepare(subject.checkpoint, adapter, precision, options)?;
    for engine in &engines {
        let path = subject.graph.clone();
        let open = Box::new(move || open_session(context, *engine, &path));
        check.run(Candidate { name: engine.name().into(), open });
    }
    if adapter.is_some_and(Adapter::zeros_are_the_base) {
        no_op(context, subject, &graph, &engines, &mut check)?;
    }
    Ok(check.report(Facts { inputs: facts(subject)?, command: command_line() })?)
}

/// The reference's logits and candle's own distance; no model stays in memory.
fn prepare(
    checkpoint: &Checkpoint,
    adapter: Option<&Adapter>,
    precision: DType,
    options: &VerifyArgs,
) -> Result<Check> {
    let hook = adapter.map(|a| a.hook(checkpoint.spec(), &Device::Cpu)).transpose()?;
    let hook: &dyn SiteHook = hook.as_deref().unwrap_or(&NoHook);
    let cases = CaseOptions { seed: options.seed, steps: options.steps, ..CaseOptions::default() };
    let mut prompts = generated_prompts(checkpoint.spec(), &cases);
    if !options.prompts.is_empty() {
        let tokenizer = checkpoint.tokenizer()?;
        for prompt in &options.prompts {
            let ids = tokenizer.encode(prompt, true)?;
            tokenizer.check_vocabulary(prompt, &ids, checkpoint.spec().vocab_size)?;
            prompts.push(ids);
        }
    }
    let reference = {
        let decoder = Decoder::load(checkpoint, options.reference.dtype(), &Device::Cpu)?;
        Reference::compute(Model { decoder: &decoder, hook }, standard_cases(&prompts, options.steps)?)?
    };
    let mut budget = Budget::of(precision, checkpoint.spec())?;
    if let Some(factor) = options.factor {
        budget.factor = factor;
    }
    let decoder = Decoder::load(checkpoint, precision, &Device::Cpu)?;
    Ok(Check::new(reference, Model { decoder: &decoder, hook }, budget)?)
}

/// The type that a graph computes in.
fn precision_of(graph: &Graph) -> DType {
    match graph.graph().outputs().first().and_then(|o| o.elem_type()) {
        Some(DataType::Float16) => DType::F16,
        Some(DataType::Bfloat16) => DType::BF16,
        Some(DataType::Double) => DType::F64,
        _ => DType::F32,
    }
}

/// The runtimes asked for, or those that are at hand and know the graph's operators.
fn engines(context: &Context, graph: &Graph, asked: &[Engine]) -> Vec<Engine> {
    if !asked.is_empty() {
        return asked.to_vec();
    }
    let has_ort = library::find(context.ort_lib(), &context.cache).is_ok();
    let is_fused = graph.opset("com.microsoft").is_some();
    match (is_fused, has_ort) {
        (true, _) => vec![Engine::Ort],
        (false, true) => vec![Engine::Tract, Engine::Ort],
        (false, false) => {
            tracing::warn!(
                "no ONNX Runtime library was found, so tract alone is asked; `prefold runtime install` gets one"
            );
            vec![Engine::Tract]
        }
    }
}

/// Folds an adapter of zeros into the base graph and compares bit for bit.
fn no_op(context: &Context, subject: &Subject, graph: &Graph, engines: &[Engine], check: &mut Check) -> Result<()> {
    let Some((adapter, _)) = subject.adapter else { return Ok(()) };
    let scratch =
        tempfile::tempdir().map_err(crate::files::Error::io("create a temporary folder in", std::env::temp_dir()))?;
    let base = match (&subject.base_graph, graph.metadata("prefold.dialect")) {
        (Some(base), _) => base.clone(),
        (None, Some(dialect)) => {
            let dialect: Dialect =
                dialect.parse().map_err(|e| usage(format!("the graph's metadata is damaged: {e}"), "fold it again"))?;
            let precision = if precision_of(graph) == DType::F16 { Precision::F16 } else { Precision::F32 };
            let folder = scratch.path().join("base");
            std::fs::create_dir(&folder).map_err(crate::files::Error::io("create folder", &folder))?;
            let options = ExportOptions { dialect, precision, ..ExportOptions::default() };
            export(subject.checkpoint, &options, &folder)?
        }
        (None, None) => {
            tracing::warn!("the zero-adapter check is left out: give --base-graph, the graph before the fold");
            return Ok(());
        }
    };
    let zeros = scratch.path().join("zeros");
    let folded = scratch.path().join("folded");
    for folder in [&zeros, &folded] {
        std::fs::create_dir(folder).map_err(crate::files::Error::io("create folder", folder))?;
    }
    Adapter::zeros(adapter.config().clone())?.save(&zeros)?;
    fold_folder(&base, &zeros, &folded)?;
    for engine in engines {
        let (base, folded) = (base.clone(), folded.join(MODEL_NAME));
        check.no_op(NoOpPair {
            name: engine.name().into(),
            base: Box::new(move || open_session(context, *engine, &base)),
            folded: Box::new(move || open_session(context, *engine, &folded)),
        });
    }
    Ok(())
}

fn facts(subject: &Subject) -> Result<Vec<FileFact>> {
    let mut facts = vec![FileFact::of("graph", &subject.graph)?];
    let folder = subject.graph.parent().unwrap_or(Path::new("."));
    for name in external_files(&Graph::open(&subject.graph)?)? {
        facts.push(FileFact::of("external_data", &folder.join(name))?);
    }
    for file in subject.checkpoint.weight_files() {
        facts.push(FileFact::of("weights", &file)?);
    }
    match subject.adapter {
        Some((_, folder)) if folder.is_dir() => {
            facts.push(FileFact::of("adapter_config", &folder.join(CONFIG_NAME))?);
            facts.push(FileFact::of("adapter", &folder.join(WEIGHTS_NAME))?);
        }
        Some((_, file)) => facts.push(FileFact::of("adapter", file)?),
        None => {}
    }
    Ok(facts)
}

pub(super) fn write_report(report: &Report, path: &Path) -> Result<()> {
    let json = report.to_json()? + "\n";
    std::fs::write(path, json).map_err(crate::files::Error::io("write", path))?;
    Ok(())
}

/// One line for each runtime and case.
pub(super) fn table(report: &Report) -> comfy_table::Table {
    let mut table = style::table(&["runtime", "case", "distance", "allowed", "greedy", "verdict"]);
    let number = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.2e}"));
    for row in report.rows() {
        let greedy = row.greedy.map_or("", |g| if g.agrees { "same" } else { "differs" });
        let verdict = match (row.verdict.passed(), row.failure) {
            (true, _) => "pass".to_owned(),
            (false, Some(why)) => format!("FAIL: {why}"),
            (false, None) => "FAIL".to_owned(),
        };
        table.add_row([row.run, row.case, &number(row.distance), &number(row.allowed), greedy, &verdict]);
    }
    table
}

/// The verdict in one line.
pub(super) fn summary(report: &Report) -> String {
    let rows = report.rows();
    let passed = rows.iter().filter(|row| row.verdict.passed()).count();
    let verdict = if report.verdict.passed() { "parity" } else { "NO PARITY" };
    format!("{verdict}: {passed} of {} checks passed", rows.len())
}

/// How `compile` and `demo` verify what they exported.
impl Default for VerifyArgs {
    fn default() -> Self {
        Self { runtime: Vec::new(), reference: ComputeType::F64, prompts: Vec::new(), seed: 0, steps: 8, factor: None }
    }
}

/// Exports into a temporary folder, folds into `folder`, which exists, and verifies; writes the report and a manifest that
/// names checkpoint and adapter.
pub(super) fn compile(
    context: &Context,
    checkpoint: &Checkpoint,
    (adapter, path): (&Adapter, &Path),
    folder: &Path,
    export_args: &ExportArgs,
    verify_args: &VerifyArgs,
) -> Result<Report> {
    let base = tempfile::tempdir_in(folder.parent().unwrap_or(folder))
        .map_err(crate::files::Error::io("create a folder beside", folder))?;
    // weights that the adapter replaced are the checkpoint's, and nothing is left to fold
    let replaced = adapter.base_weights().is_some();
    export(checkpoint, &export_args.options(), if replaced { folder } else { base.path() })?;
    let folded = if replaced { None } else { Some(fold_folder(base.path(), path, folder)?) };
    let subject = Subject {
        checkpoint,
        graph: folder.join(MODEL_NAME),
        adapter: Some((adapter, path)),
        base_graph: folded.is_some().then(|| base.path().join(MODEL_NAME)),
    };
    let report = verify(context, &subject, verify_args)?;
    write_report(&report, &folder.join("parity.json"))?;
    let options =
        serde_json::json!({ "export": export_args.options(), "emission": folded.as_ref().map(|f| f.emission) });
    let mut manifest = Manifest::new("compile", options).output("graph", &folder.join(MODEL_NAME))?;
    manifest.inputs =
        report.inputs.iter().filter(|f| f.role != "graph" && f.role != "external_data").cloned().collect();
    manifest.outputs.extend(report.inputs.iter().filter(|f| f.role == "external_data").cloned());
    manifest.facts =
        serde_json::json!({ "base_model": checkpoint.display_name(), "sites": folded.as_ref().map(|f| &f.sites) });
    manifest.write(folder)?;
    Ok(report)
}

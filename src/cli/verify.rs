//! `prefold verify`

mod localise;
mod manifest;
mod output;
mod runtimes;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use miette::Result;
use ndarray::Array2;

use self::localise::{Judged, LocaliseArgs, localise};
use self::output::OutputArgs;
pub(super) use self::output::{summary, table, write_report};
use self::runtimes::{Chosen, LevelArg, ProviderArg, chosen};
use super::export::ExportArgs;
use super::{Context, command_line, existing_graph, usage};
use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME};
use crate::base::{Checkpoint, Decoder, NoHook, SiteHook};
use crate::export::{Dialect, ExportOptions, Precision, export};
use crate::files::{FileFact, Manifest};
use crate::fold::{ADAPTER_IDS, Carry, Emission, FoldOptions, Record, fold_adapters, name_of, slot_values};
use crate::onnx::{DataType, Graph as OnnxGraph, MODEL_NAME, Model as Graph, external_files};
use crate::parity::{
    self, Budget, Candidate, Case, CaseOptions, Check, Facts, Model, NoOpPair, Open, Other, Reference, ReferenceStore,
    Report, Thresholds, Verdict, generated_prompts, length_cases, named_cases, select_cases, standard_cases,
};
use crate::runtime::{self, Given, OrtOptions, OrtSession, Session, TractOptions, TractSession, WithGiven, library};
use crate::train::ComputeType;

/// The exit code of what could not be told.
const COULD_NOT_TELL: u8 = 2;
/// The longest prompt that is checked at the context limit unasked, in logits.
const LOGITS_UNASKED: usize = 1 << 20;

/// Compare a graph with the candle model it was made from, or should have been
///
/// The graph may be anybody's. Each runtime runs in a process of its own. Exit code 0: parity; 1: no parity; 2: it could not be told
/// (bad input, a runtime that is missing, a quantised graph without thresholds).
#[derive(Args, Debug)]
pub(super) struct Verify {
    /// The graph: its folder or its .onnx file
    #[arg(long, required_unless_present = "manifest")]
    graph: Option<PathBuf>,
    /// The checkpoint: Hugging Face folder, .gguf file, or the name of a fetched model
    #[arg(long, required_unless_present = "manifest")]
    model: Option<String>,
    /// The adapter that was folded in; none for a base graph
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// The graph before the fold: it is judged against the checkpoint first, and the zero-adapter check starts from it
    /// [default: exported again where prefold wrote the graph, for the zero-adapter check alone]
    #[arg(long)]
    base_graph: Option<PathBuf>,
    /// Compare with this graph too, output by output
    #[arg(long, value_name = "GRAPH")]
    against: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
    /// Run the checks of this TOML file, several at a time, each in a process of its own
    #[arg(long, conflicts_with_all = ["graph", "model"])]
    manifest: Option<PathBuf>,
    /// Checks of --manifest at a time
    #[arg(long, default_value_t = 2, requires = "manifest")]
    jobs: usize,
    /// Memory that the running checks of --manifest may need together, by estimate: 8GB, 500MB
    #[arg(long, default_value = "8GB", requires = "manifest")]
    memory: String,
    #[command(flatten)]
    options: VerifyArgs,
}

/// How to verify.
#[derive(Args, Clone, Debug)]
pub(super) struct VerifyArgs {
    /// Runtimes [default: tract, and ONNX Runtime where it is found; for a graph with operators of com.microsoft ONNX Runtime
    /// only]
    #[arg(long, value_delimiter = ',', value_enum)]
    runtime: Vec<Engine>,
    /// Optimisation levels of ONNX Runtime, each a run [default: all]
    #[arg(long, value_delimiter = ',', value_enum)]
    ort_level: Vec<LevelArg>,
    /// Execution providers of ONNX Runtime, each a run [default: cpu]
    #[arg(long, value_delimiter = ',', value_enum)]
    provider: Vec<ProviderArg>,
    /// Let a GPU round float32 products to TF32
    #[arg(long)]
    allow_tf32: bool,
    /// Let nodes that the provider does not take run on the CPU
    #[arg(long)]
    allow_cpu_fallback: bool,
    /// Seconds that a runtime may take to load a graph, or for one run, before its process is ended
    #[arg(long, default_value_t = 300.0)]
    timeout: f64,
    /// Type of the reference: f64, or f32 for a model that does not fit
    #[arg(long, default_value = "f64")]
    reference: ComputeType,
    /// Prompts to check, beside random ones: text that the model's tokenizer reads; may be repeated
    #[arg(long = "prompt")]
    prompts: Vec<String>,
    /// A file of prompts: a text file with one in each line, or .jsonl with strings or objects with `prompt` or `text`
    #[arg(long = "prompts", value_name = "FILE")]
    prompts_file: Option<PathBuf>,
    /// Only the cases of these names; may be repeated
    #[arg(long = "case", value_name = "NAME", value_delimiter = ',')]
    cases: Vec<String>,
    /// Also random rows of these lengths; `max` is the model's context limit [default: max, for a small model]
    #[arg(long, value_delimiter = ',')]
    lengths: Vec<String>,
    /// Chooses the random prompts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Cached steps after each prompt
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// How many times candle's own distance from the reference a runtime's may be
    #[arg(long)]
    factor: Option<f64>,
    /// Judge by the mean Kullback-Leibler divergence of each case, in nats, instead of by the budget: for quantised graphs
    #[arg(long, value_name = "NATS")]
    max_kl: Option<f64>,
    /// Judge by the part of positions whose most likely token is the reference's
    #[arg(long, value_name = "PART")]
    min_top1: Option<f64>,
    /// Judge by the difference of perplexity, as a part of the reference's
    #[arg(long, value_name = "PART")]
    max_ppl_diff: Option<f64>,
    /// Compute the reference again, and keep it nowhere
    #[arg(long)]
    no_cache: bool,
    /// How much the kept references may take together
    #[arg(long, default_value = "4GB", value_name = "BYTES")]
    cache_size: String,
    #[command(flatten)]
    localise: LocaliseArgs,
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
    open_given(context, engine, graph, Vec::new())
}

/// Opens a graph in a runtime, with inputs that are given with every run.
pub(super) fn open_given(
    context: &Context,
    engine: Engine,
    graph: &Path,
    given: Vec<(String, Given)>,
) -> runtime::Result<Box<dyn Session>> {
    let session: Box<dyn Session> = match engine {
        Engine::Ort => {
            let library = library::find(context.ort_lib(), &context.cache)?;
            Box::new(OrtSession::open(&library, graph, OrtOptions::default())?)
        }
        Engine::Tract => {
            let fed: Vec<String> = given.iter().map(|(name, _)| name.clone()).collect();
            Box::new(TractSession::open_fed(graph, &fed, TractOptions::default())?)
        }
    };
    if given.is_empty() { Ok(session) } else { Ok(Box::new(WithGiven::new(session, given)?)) }
}

/// What the inputs that folds added are given so that an adapter is active, or none: values of the slots of the last fold that has
/// some, and the adapter's row of every bank that knows its name.
fn given_for(graph: &Graph, folder: &Path, adapter: Option<(&Adapter, &Path)>) -> Result<Vec<(String, Given)>> {
    let folds = Record::all(graph)?;
    let mut given = Vec::new();
    for fold in folds.iter().filter(|fold| fold.emission == Emission::Bank) {
        let row = adapter.and_then(|(_, path)| fold.adapters.iter().position(|name| *name == name_of(path)));
        let only = (adapter.is_some() && folds.len() == 1 && fold.adapters.len() == 1).then_some(0);
        let row = row.or(only).map_or(0, |row| row as i64 + 1);
        if row == 0 && adapter.is_some() && folds.len() == 1 {
            let help = format!("its adapters are {}; name the folder so", fold.adapters.join(", "));
            return Err(usage("the graph's bank does not know the adapter by the name of its folder", help));
        }
        given.push((fold.input_name(ADAPTER_IDS), Given::EveryRow(row)));
    }
    if let Some((adapter, _)) = adapter
        && folds.iter().any(|fold| fold.emission == Emission::Slot)
    {
        for value in slot_values(graph, folder, adapter)?.parameters {
            let tensor = Given::from_le_bytes(value.data_type.code(), &value.dims, &value.bytes)?;
            given.push((value.name, tensor));
        }
    }
    Ok(given)
}

impl Verify {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        let told = match &self.manifest {
            Some(manifest) => self.manifest(context, manifest),
            None => self.one(context),
        };
        // An error is something that could not be told: 1 is kept for a graph that was judged.
        let verdict = told.unwrap_or_else(|error| {
            eprintln!("{error:?}");
            Verdict::Unknown
        });
        Ok(match verdict {
            Verdict::Pass => ExitCode::SUCCESS,
            Verdict::Fail => ExitCode::FAILURE,
            Verdict::Unknown => ExitCode::from(COULD_NOT_TELL),
        })
    }

    fn one(&self, context: &Context) -> Result<Verdict> {
        let (Some(graph), Some(model)) = (&self.graph, &self.model) else {
            return Err(usage("--graph and --model are needed", "or give --manifest"));
        };
        let baseline = self.output.baseline()?;
        let (checkpoint, adapter) = context.checkpoint_with(model, self.adapter.as_deref())?;
        let subject = Subject {
            checkpoint: &checkpoint,
            graph: existing_graph(graph)?,
            adapter: adapter.as_ref().zip(self.adapter.as_deref()),
            base_graph: self.base_graph.as_deref().map(existing_graph).transpose()?,
            judge_base: true,
            against: self.against.as_deref().map(existing_graph).transpose()?,
        };
        let mut options = self.options.clone();
        let beside = || self.output.out.with_extension("reproducer");
        options.localise.reproducer.get_or_insert_with(beside);
        let mut report = verify(context, &subject, &options)?;
        if let Some(baseline) = baseline {
            report.compare_to(&baseline, self.output.baseline_slack, subject.kind());
        }
        println!("{}", table(&report));
        self.output.write(&report, &subject.graph)?;
        println!("{}, {}", summary(&report), self.output.out.display());
        Ok(report.verdict)
    }
}

/// What is compared.
pub(super) struct Subject<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) graph: PathBuf,
    /// The adapter and where it is from.
    pub(super) adapter: Option<(&'a Adapter, &'a Path)>,
    pub(super) base_graph: Option<PathBuf>,
    /// Whether the base graph is judged too, against the checkpoint without the adapter.
    pub(super) judge_base: bool,
    /// Another graph to compare with.
    pub(super) against: Option<PathBuf>,
}

impl Subject<'_> {
    fn kind(&self) -> parity::Subject {
        if self.adapter.is_some() { parity::Subject::Folded } else { parity::Subject::Base }
    }
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
    let facts = facts(subject)?;
    let chosen = chosen(context, &graph, options)?;
    let adapter = subject.adapter.map(|(adapter, _)| adapter);
    let given = given_for(&graph, subject.graph.parent().unwrap_or(Path::new(".")), subject.adapter)?;
    let mut check = judged(prepare(context, subject.checkpoint, adapter, &graph, options, &facts)?, &graph, options)?;
    if let (Some(base), true, Some(_)) = (&subject.base_graph, subject.judge_base, adapter) {
        let file = Graph::open(base)?;
        let mut of_base = judged(prepare(context, subject.checkpoint, None, &file, options, &facts)?, &file, options)?;
        for chosen in &chosen {
            of_base.run(Candidate { name: chosen.name.clone(), open: chosen.open(base) });
        }
        let judged = Judged { file: base, graph: &file, adapter: None, given: &[] };
        localise(context, &mut of_base, subject.checkpoint, &judged, &chosen, options);
        check = check.with_base(of_base);
    }
    for chosen in &chosen {
        check.run(Candidate { name: chosen.name.clone(), open: chosen.open_given(&subject.graph, given.clone()) });
    }
    let judged = Judged { file: &subject.graph, graph: &graph, adapter, given: &given };
    localise(context, &mut check, subject.checkpoint, &judged, &chosen, options);
    for (chosen, other) in chosen.iter().flat_map(|chosen| subject.against.iter().map(move |other| (chosen, other))) {
        check.against(Other {
            name: chosen.name.clone(),
            graph: chosen.open_given(&subject.graph, given.clone()),
            other: chosen.open(other),
        });
    }
    if adapter.is_some_and(Adapter::zeros_are_the_base) {
        no_op(subject, &graph, &chosen, &mut check)?;
    }
    Ok(check.report(Facts { inputs: facts, command: command_line(), subject: subject.kind() })?)
}

/// The check by thresholds where they are stated, without judgement where they should be.
fn judged(check: Check, graph: &Graph, options: &VerifyArgs) -> Result<Check> {
    let thresholds =
        Thresholds { max_kl: options.max_kl, min_top1: options.min_top1, max_ppl_diff: options.max_ppl_diff };
    Ok(match (thresholds.is_empty(), is_quantised(graph.graph())) {
        (false, _) => check.by_thresholds(thresholds)?,
        (true, true) => check.without_judgement(),
        (true, false) => check,
    })
}

/// Whether weights or activations are integers. Their rounding is no error of the graph, and the budget says nothing about it.
fn is_quantised(graph: &OnnxGraph) -> bool {
    const NAMES: [&str; 4] = ["DequantizeLinear", "MatMulInteger", "DynamicQuantizeLinear", "MatMulNBits"];
    let is_one = |op: &str| {
        NAMES.contains(&op)
            || op.starts_with("QLinear")
            || op.starts_with("QAttention")
            || op == "DynamicQuantizeMatMul"
    };
    graph.nodes().iter().any(|node| is_one(node.op_type()) || node.subgraphs().any(is_quantised))
}

/// The reference's logits and candle's own distance, computed or kept from before; no model stays in memory.
fn prepare(
    context: &Context,
    checkpoint: &Checkpoint,
    adapter: Option<&Adapter>,
    graph: &Graph,
    options: &VerifyArgs,
    facts: &[FileFact],
) -> Result<Check> {
    let spec = checkpoint.spec();
    let precision = precision_of(graph);
    let cases = cases(checkpoint, options)?;
    let mut budget = Budget::of(precision, spec)?;
    if let Some(factor) = options.factor {
        budget.factor = factor;
    }
    let store = ReferenceStore::new(context.cache.join("references"), output::bytes(&options.cache_size)?);
    let is_input = |fact: &&FileFact| fact.role == "weights" || adapter.is_some() && fact.role.starts_with("adapter");
    let hashes = facts.iter().filter(is_input).map(|fact| fact.sha256.clone());
    let numbers = format!("{} {} {spec:?}", options.reference.dtype().as_str(), precision.as_str());
    let key = ReferenceStore::key(&hashes.chain([numbers]).collect::<Vec<_>>(), &cases);
    let kept =
        if options.no_cache { None } else { store.load(&key, cases.clone(), options.reference.dtype().as_str(), spec) };
    let (reference, own) = match kept {
        Some(kept) => kept,
        None => {
            let (reference, own) = compute(checkpoint, adapter, precision, options, cases)?;
            if !options.no_cache
                && let Err(error) = store.save(&key, &reference, &own)
            {
                tracing::warn!("the reference is not kept for the next time: {error}");
            }
            (reference, own)
        }
    };
    Ok(Check::with_logits(reference, &own, precision.as_str(), budget)?)
}

fn compute(
    checkpoint: &Checkpoint,
    adapter: Option<&Adapter>,
    precision: DType,
    options: &VerifyArgs,
    cases: Vec<Case>,
) -> Result<(Reference, Vec<Array2<f64>>)> {
    let hook = adapter.map(|a| a.hook(checkpoint.spec(), &Device::Cpu)).transpose()?;
    let hook: &dyn SiteHook = hook.as_deref().unwrap_or(&NoHook);
    let reference = {
        let decoder = Decoder::load(checkpoint, options.reference.dtype(), &Device::Cpu)?;
        Reference::compute(Model { decoder: &decoder, hook }, cases)?
    };
    let decoder = Decoder::load(checkpoint, precision, &Device::Cpu)?;
    let own = reference.replay(Model { decoder: &decoder, hook })?;
    Ok((reference, own))
}

/// The cases that the options ask for.
fn cases(checkpoint: &Checkpoint, options: &VerifyArgs) -> Result<Vec<Case>> {
    let spec = checkpoint.spec();
    let random = CaseOptions { seed: options.seed, steps: options.steps, ..CaseOptions::default() };
    let mut prompts = generated_prompts(spec, &random);
    let mut texts = options.prompts.clone();
    if let Some(path) = &options.prompts_file {
        texts.extend(read_prompts(path)?);
    }
    if !texts.is_empty() {
        let tokenizer = checkpoint.tokenizer()?;
        for prompt in &texts {
            let ids = tokenizer.encode(prompt, true)?;
            tokenizer.check_vocabulary(prompt, &ids, spec.vocab_size)?;
            prompts.push(ids);
        }
    }
    let mut lengths = Vec::new();
    for length in &options.lengths {
        lengths.push(match (length.as_str(), length.parse()) {
            ("max", _) => spec.max_positions,
            (_, Ok(length)) => length,
            _ => return Err(usage(format!("--lengths: `{length}` is no length"), "give numbers of tokens, or max")),
        });
    }
    if lengths.is_empty() && spec.max_positions.saturating_mul(spec.vocab_size) <= LOGITS_UNASKED {
        lengths.push(spec.max_positions);
    }
    let mut all = standard_cases(&prompts, options.steps)?;
    all.extend(length_cases(spec, &lengths, options.seed)?);
    let named = named_cases(&prompts, options.steps)?;
    all.extend(named.into_iter().filter(|case| options.cases.iter().any(|name| name == case.name())));
    Ok(select_cases(all, &options.cases)?)
}

fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let text = String::from_utf8(crate::files::read(path)?)
        .map_err(|e| usage(format!("{} is not UTF-8: {e}", path.display()), "save it as UTF-8"))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    if path.extension().is_none_or(|extension| extension != "jsonl") {
        return Ok(lines.map(|(_, line)| line.to_owned()).collect());
    }
    let prompt = |(number, line): (usize, &str)| {
        let value: Option<serde_json::Value> = serde_json::from_str(line).ok();
        let value = value.as_ref().map(|value| value.get("prompt").or(value.get("text")).unwrap_or(value));
        value.and_then(|value| value.as_str()).map(ToOwned::to_owned).ok_or_else(|| {
            let place = format!("{}:{}", path.display(), number.saturating_add(1));
            usage(format!("{place} holds no prompt"), "write a JSON string, or an object with `prompt` or `text`")
        })
    };
    lines.map(prompt).collect()
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

/// Compares the base graph bit for bit with the graph whose adapter is off, where it can be, and else with the base graph that an
/// adapter of zeros is folded into.
fn no_op(subject: &Subject, graph: &Graph, chosen: &[Chosen], check: &mut Check) -> Result<()> {
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
    let folds = Record::all(graph)?;
    let (folded, given) = if let [fold] = &folds[..]
        && fold.emission != Emission::Baked
    {
        (subject.graph.clone(), given_for(graph, Path::new("."), None)?)
    } else {
        let zeros = scratch.path().join("zeros");
        let folded = scratch.path().join("folded");
        for folder in [&zeros, &folded] {
            std::fs::create_dir(folder).map_err(crate::files::Error::io("create folder", folder))?;
        }
        Adapter::zeros(adapter.config().clone())?.save(&zeros)?;
        let options = FoldOptions { carry: Carry::Link, ..FoldOptions::default() };
        fold_adapters(&base, &[(name_of(&zeros), zeros)], options, &folded)?;
        (folded.join(MODEL_NAME), Vec::new())
    };
    for chosen in chosen {
        let name = chosen.name.clone();
        check.no_op(NoOpPair { name, base: chosen.open(&base), folded: chosen.open_given(&folded, given.clone()) });
    }
    Ok(())
}

fn facts(subject: &Subject) -> Result<Vec<FileFact>> {
    let mut facts = vec![FileFact::of("graph", &subject.graph)?];
    let folder = subject.graph.parent().unwrap_or(Path::new("."));
    for name in external_files(&Graph::open(&subject.graph)?)? {
        facts.push(FileFact::of("external_data", &folder.join(name))?);
    }
    for (role, graph) in [("base_graph", &subject.base_graph), ("other_graph", &subject.against)] {
        if let Some(graph) = graph {
            facts.push(FileFact::of(role, graph)?);
        }
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

/// How `compile` and `demo` verify what they exported.
impl Default for VerifyArgs {
    fn default() -> Self {
        Self {
            runtime: Vec::new(),
            ort_level: Vec::new(),
            provider: Vec::new(),
            allow_tf32: false,
            allow_cpu_fallback: false,
            timeout: 300.0,
            reference: ComputeType::F64,
            prompts: Vec::new(),
            prompts_file: None,
            cases: Vec::new(),
            lengths: Vec::new(),
            seed: 0,
            steps: 8,
            factor: None,
            max_kl: None,
            min_top1: None,
            max_ppl_diff: None,
            no_cache: false,
            cache_size: "4GB".into(),
            localise: LocaliseArgs::default(),
        }
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
    emission: Emission,
) -> Result<Report> {
    let base = tempfile::tempdir_in(folder.parent().unwrap_or(folder))
        .map_err(crate::files::Error::io("create a folder beside", folder))?;
    // weights that the adapter replaced are the checkpoint's, and nothing is left to fold
    let replaced = adapter.base_weights().is_some();
    export(checkpoint, &export_args.options(), if replaced { folder } else { base.path() })?;
    // the links are the only ones left once the temporary folder is gone
    let folded = if replaced { None } else { Some(fold_compiled(base.path(), path, emission, folder)?) };
    let subject = Subject {
        checkpoint,
        graph: folder.join(MODEL_NAME),
        adapter: Some((adapter, path)),
        base_graph: folded.is_some().then(|| base.path().join(MODEL_NAME)),
        judge_base: false,
        against: None,
    };
    let report = verify(context, &subject, verify_args)?;
    write_report(&report, &folder.join("parity.json"))?;
    let options =
        serde_json::json!({ "export": export_args.options(), "emission": folded.as_ref().map(|f| f.emission) });
    let mut manifest = Manifest::new("compile", options).output("graph", &folder.join(MODEL_NAME))?;
    manifest.inputs =
        report.inputs.iter().filter(|f| !f.role.ends_with("graph") && f.role != "external_data").cloned().collect();
    manifest.outputs.extend(report.inputs.iter().filter(|f| f.role == "external_data").cloned());
    manifest.facts =
        serde_json::json!({ "base_model": checkpoint.display_name(), "sites": folded.as_ref().map(|f| &f.sites) });
    manifest.write(folder)?;
    Ok(report)
}

fn fold_compiled(base: &Path, adapter: &Path, emission: Emission, folder: &Path) -> Result<crate::fold::Folded> {
    let options = FoldOptions { emission, carry: Carry::Link, ..FoldOptions::default() };
    Ok(fold_adapters(base, &[(name_of(adapter), adapter.to_path_buf())], options, folder)?)
}

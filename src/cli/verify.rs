//! `prefold verify`

mod beside;
mod cases;
mod lineup;
mod localise;
mod manifest;
mod no_op;
mod output;
mod reference;
mod runtimes;
mod subject;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use miette::Result;
use ndarray::Array2;

use self::beside::beside;
use self::cases::{cases, length_unasked};
use self::lineup::Lineup;
use self::localise::{Judged, LocaliseArgs, localise, localise_against};
use self::no_op::no_op;
use self::output::OutputArgs;
pub(super) use self::output::{summary, table, write_report};
use self::reference::{explain, judged, precision_of, prepare, reconsider};
use self::runtimes::{Chosen, LevelArg, ProviderArg, chosen};
use self::subject::{Adapted, Subject, facts};
use super::export::ExportArgs;
use super::{Context, command_line, existing_graph, named_adapter, usage};
use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME};
use crate::base::{Checkpoint, Decoder, DeviceChoice};
use crate::export::{ExportOptions, Precision, dialect_of, export, is_right_padding_only};
use crate::files::{FileFact, Manifest, TemporaryFolder};
use crate::fold::{
    ADAPTER_IDS, Carry, Emission, FoldOptions, Record, fold_adapters, name_of, slot_values, unfold_folder,
};
use crate::onnx::{DataType, Graph as OnnxGraph, MODEL_NAME, Model as Graph, external_files};
use crate::parity::{
    self, Budget, Candidate, Case, CaseOptions, Check, Facts, Model, NoOpPair, Open, Other, Padding, Reference,
    ReferenceStore, Report, Thresholds, Verdict, adapter_cases, generated_prompts, length_cases, named_cases,
    select_cases, standard_cases,
};
use crate::runtime::{
    self, Given, OrtOptions, OrtSession, Provider, Session, TractOptions, TractSession, WithGiven, library,
};
use crate::train::ComputeType;

/// The exit code of what could not be told.
const COULD_NOT_TELL: u8 = 2;
/// A model is checked at its context limit unasked where that takes this many logits at most.
const LOGITS_UNASKED: usize = 1 << 20;
/// And at a length of this many logits and tokens where it takes more: what goes wrong beyond the usual prompts is often seen there.
const LONG_LOGITS: usize = 1 << 23;
const LONG_TOKENS: usize = 256;

/// Compare a graph with the candle model it was made from, or should have been, or with another graph
///
/// The graph may be anybody's. Each runtime runs in a process of its own. Exit code 0: parity; 1: no parity; 2: it could not be told
/// (bad input, a runtime that is missing, a quantised graph without thresholds).
#[derive(Args, Debug)]
pub(super) struct Verify {
    /// The graph: its folder or its .onnx file
    #[arg(long, required_unless_present = "manifest")]
    graph: Option<PathBuf>,
    /// The checkpoint: Hugging Face folder, .gguf file, or the name of a fetched model. Without one the graph is compared with that of
    /// --against alone
    #[arg(long, required_unless_present_any = ["manifest", "against"])]
    model: Option<String>,
    /// The adapter that was folded in: its folder, or NAME=FOLDER; none for a base graph. Repeated for a bank, for adapters that
    /// are swapped in slots, and for a stack: each is checked alone, and in a bank all in one batch
    #[arg(long, value_name = "FOLDER", requires = "model")]
    adapter: Vec<String>,
    /// The graph before the fold: it is judged against the checkpoint first, and the zero-adapter check starts from it
    /// [default: exported again where prefold wrote the graph, for the zero-adapter check alone]
    #[arg(long, requires = "model")]
    base_graph: Option<PathBuf>,
    /// Compare with this graph too, output by output; without --model it is the reference, run as it is written
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
    /// The runtime of a reference that is a graph [default: ONNX Runtime with nothing fused where it is found, else tract]
    #[arg(long, value_enum)]
    reference_runtime: Option<Engine>,
    /// Where the reference is computed: auto, cpu, cuda or cuda:N; auto takes the CPU where the model does not fit a GPU
    #[arg(long, default_value_t)]
    device: DeviceChoice,
    /// Prompts to check, beside random ones: text that the model's tokenizer reads; may be repeated
    #[arg(long = "prompt")]
    prompts: Vec<String>,
    /// A file of prompts: a text file with one in each line, or .jsonl with strings or objects with `prompt` or `text`
    #[arg(long = "prompts", value_name = "FILE")]
    prompts_file: Option<PathBuf>,
    /// Only the cases of these names; may be repeated
    #[arg(long = "case", value_name = "NAME", value_delimiter = ',')]
    cases: Vec<String>,
    /// Also random rows of these lengths; `max` is the model's context limit [default: max for a small model, else as long as is quick]
    #[arg(long, value_delimiter = ',')]
    lengths: Vec<String>,
    /// Only cases with padding on this side, beside those without: for graphs whose attention takes rows that end in padding; a
    /// graph that was exported with --right-padding-only is checked on the right by default
    #[arg(long, value_delimiter = ',', value_enum, value_name = "SIDE")]
    padding: Vec<Side>,
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

/// A side of padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Side {
    /// Before the prompt.
    Left,
    /// After it.
    Right,
}

impl Side {
    fn padding(self) -> Padding {
        match self {
            Self::Left => Padding::Left,
            Self::Right => Padding::Right,
        }
    }
}

/// A runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Engine {
    /// ONNX Runtime on the CPU.
    Ort,
    /// ONNX Runtime on a GPU by its CUDA provider: no TF32, nothing on the CPU.
    OrtCuda,
    /// tract, embedded.
    Tract,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::Ort | Self::OrtCuda => "onnxruntime",
            Self::Tract => "tract",
        }
    }
}

/// Opens a graph in a runtime.
pub(super) fn open_session(context: &Context, engine: Engine, graph: &Path) -> runtime::Result<Box<dyn Session>> {
    open_given(context, engine, graph, Vec::new(), OrtOptions::default())
}

/// Opens a graph in a runtime, with inputs that are given with every run; `options` are ONNX Runtime's, but for the provider.
pub(super) fn open_given(
    context: &Context,
    engine: Engine,
    graph: &Path,
    given: Vec<(String, Given)>,
    options: OrtOptions,
) -> runtime::Result<Box<dyn Session>> {
    let session: Box<dyn Session> = match engine {
        Engine::Ort | Engine::OrtCuda => {
            let provider = if engine == Engine::OrtCuda { Provider::Cuda } else { Provider::Cpu };
            let library = library::find_with(context.ort_lib(), &context.cache, provider)?;
            Box::new(OrtSession::open(&library, graph, OrtOptions { provider, ..options })?)
        }
        Engine::Tract => {
            let fed: Vec<String> = given.iter().map(|(name, _)| name.clone()).collect();
            Box::new(TractSession::open_fed(graph, &fed, TractOptions::default())?)
        }
    };
    if given.is_empty() { Ok(session) } else { Ok(Box::new(WithGiven::new(session, given)?)) }
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
        let Some(graph) = &self.graph else {
            return Err(usage("--graph is needed", "or give --manifest"));
        };
        let graph = existing_graph(graph)?;
        let against = self.against.as_deref().map(existing_graph).transpose()?;
        let mut options = self.options.clone();
        let beside_it = || self.output.out.with_extension("reproducer");
        options.localise.reproducer.get_or_insert_with(beside_it);
        let baseline = self.output.baseline()?;
        let report = match (&self.model, &against) {
            (Some(model), _) => self.with_model(context, model, (&graph, against), &options)?,
            (None, Some(other)) => (beside(context, &graph, other, &options)?, parity::Subject::Beside),
            (None, None) => return Err(usage("--model is needed", "or give --against, or --manifest")),
        };
        let (mut report, kind) = report;
        if let Some(baseline) = baseline {
            report.compare_to(&baseline, self.output.baseline_slack, kind);
        }
        println!("{}", table(&report));
        self.output.write(&report, &graph)?;
        println!("{}, {}", summary(&report), self.output.out.display());
        Ok(report.verdict)
    }

    fn with_model(
        &self,
        context: &Context,
        model: &str,
        (graph, against): (&Path, Option<PathBuf>),
        options: &VerifyArgs,
    ) -> Result<(Report, parity::Subject)> {
        let mut checkpoint = context.checkpoint(model)?;
        let mut adapters = Vec::new();
        for (name, path) in self.adapter.iter().map(|text| named_adapter(text)) {
            let adapter = Adapter::open_for(&path, checkpoint.spec())?;
            checkpoint = adapter.overlay(checkpoint)?;
            adapters.push(Adapted { name, path, adapter });
        }
        let subject = Subject {
            checkpoint: &checkpoint,
            graph: graph.to_owned(),
            adapters,
            base_graph: self.base_graph.as_deref().map(existing_graph).transpose()?,
            judge_base: true,
            against,
        };
        Ok((verify(context, &subject, options)?, subject.kind()))
    }
}

/// The folder that a graph's external data is in.
fn folder_of(graph: &Path) -> &Path {
    graph.parent().unwrap_or(Path::new("."))
}

/// The options, with padding on the right alone where nobody said which and the graph says that it is for no other.
fn with_padding_of(graph: &Graph, options: &VerifyArgs) -> VerifyArgs {
    let mut options = options.clone();
    if options.padding.is_empty() && is_right_padding_only(graph) {
        tracing::warn!("padding on the left is not checked: the graph was exported with --right-padding-only");
        options.padding = vec![Side::Right];
    }
    options
}

/// Compares a graph with its model in every runtime.
fn verify(context: &Context, subject: &Subject, options: &VerifyArgs) -> Result<Report> {
    if matches!(options.reference, ComputeType::Bf16 | ComputeType::F16) {
        return Err(usage(
            "--reference is less precise than the graph",
            "give f64, or f32 for a model that does not fit",
        ));
    }
    let graph = Graph::open(&subject.graph)?;
    let options = &with_padding_of(&graph, options);
    let facts = facts(subject)?;
    let chosen = chosen(context, &graph, options)?;
    let lineup = Lineup::of(&graph, folder_of(&subject.graph), &subject.adapters)?;
    let (checkpoint, models) = (subject.checkpoint, (&lineup, &subject.adapters[..]));
    let mut check = judged(prepare(context, checkpoint, models, &graph, options, &facts)?, &graph, options)?;
    if let (Some(base), true, false) = (&subject.base_graph, subject.judge_base, subject.adapters.is_empty()) {
        let file = Graph::open(base)?;
        let models = (&Lineup::base(), &[][..]);
        let mut of_base = judged(prepare(context, checkpoint, models, &file, options, &facts)?, &file, options)?;
        for chosen in &chosen {
            of_base.run(Candidate { name: chosen.name.clone(), open: chosen.open(base) });
        }
        reconsider(&mut of_base, checkpoint, models, &file)?;
        explain(&mut of_base, checkpoint, models, options)?;
        let judged = Judged { file: base, graph: &file, adapters: &[], lineup: &Lineup::base() };
        localise(context, &mut of_base, checkpoint, &judged, &chosen, options);
        check = check.with_base(of_base);
    }
    for chosen in &chosen {
        check.run(Candidate { name: chosen.name.clone(), open: chosen.open_given(&subject.graph, &lineup.given) });
    }
    reconsider(&mut check, checkpoint, models, &graph)?;
    explain(&mut check, checkpoint, models, options)?;
    let judged = Judged { file: &subject.graph, graph: &graph, adapters: &subject.adapters, lineup: &lineup };
    localise(context, &mut check, checkpoint, &judged, &chosen, options);
    if let Some(other) = &subject.against {
        let other_file = Graph::open(other)?;
        let of_other = Lineup::of(&other_file, folder_of(other), &subject.adapters)?;
        if of_other.names != lineup.names {
            let names = [&lineup, &of_other].map(|lineup| lineup.names.join(", "));
            let help = "give the --adapter that both have active";
            let what = format!("the graph switches between {}, the other graph between {}", names[0], names[1]);
            return Err(usage(what, help));
        }
        for chosen in &chosen {
            check.against(Other {
                name: chosen.name.clone(),
                graph: chosen.open_given(&subject.graph, &lineup.given),
                other: chosen.open_given(other, &of_other.given),
            });
        }
        localise_against(context, &mut check, &judged, (other, &other_file, &of_other), &chosen, options);
    }
    if subject.adapters.first().is_some_and(|first| first.adapter.zeros_are_the_base()) {
        no_op(subject, &graph, &lineup, &chosen, &mut check)?;
    }
    let (command, models) = (command_line(), lineup.names);
    Ok(check.report(Facts { inputs: facts, command, models, subject: subject.kind() })?)
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
            reference_runtime: None,
            device: DeviceChoice::Auto,
            prompts: Vec::new(),
            prompts_file: None,
            cases: Vec::new(),
            lengths: Vec::new(),
            padding: Vec::new(),
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
    let base = TemporaryFolder::within(folder.parent().unwrap_or(folder), ".base")
        .map_err(crate::files::Error::io("create a folder beside", folder))?;
    // weights that the adapter replaced are the checkpoint's, and nothing is left to fold
    let replaced = adapter.base_weights().is_some();
    export(checkpoint, &export_args.options(), if replaced { folder } else { base.path() })?;
    // the links are the only ones left once the temporary folder is gone
    let folded = if replaced { None } else { Some(fold_compiled(base.path(), path, emission, folder)?) };
    let subject = Subject {
        checkpoint,
        graph: folder.join(MODEL_NAME),
        adapters: vec![Adapted { name: name_of(path), path: path.into(), adapter: adapter.clone() }],
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

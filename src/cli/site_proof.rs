//! The proof of a fold's sites: the graph is run, and what was found goes into the manifest.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use miette::{IntoDiagnostic, Result, miette};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::Context;
use super::verify::{Engine, open_given};
use crate::adapter::{Adapter, AdapterConfig, Query};
use crate::base::{Checkpoint, Decoder};
use crate::files::{MANIFEST_NAME, Manifest, TemporaryFolder, read_json};
use crate::fold::{self, ADAPTER_IDS, Emission, Layout, Over, Record, Site, graph_file, locate};
use crate::onnx::{DataType, Dim, MODEL_NAME, Model, Patch, ValueDef, external_files};
use crate::parity::{CapturedQuery, Difference, Probe, QueryDistance};
use crate::runtime::{Given, Optimization, OrtOptions, RuntimeInfo, Session};

/// How the sites are proved.
#[derive(Args, Clone, Debug)]
pub(super) struct ProofArgs {
    /// Run the graph to prove its sites: a zero adapter changes no bit, and the queries are the checkpoint's. `auto` does so
    /// for graphs of up to 1 GiB, and of any size with --checkpoint
    #[arg(long, value_enum, default_value_t = Proof::Auto)]
    proof: Proof,
    /// The checkpoint that the graph was made of, whose queries the graph's should be
    #[arg(long)]
    checkpoint: Option<String>,
}

/// When the graph is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Proof {
    Auto,
    Always,
    Never,
}

/// A graph larger than this is run only when it is asked for.
const LARGE: u64 = 1 << 30;

/// The largest distance of a query, in its largest elements.
fn tolerance(model: &Model) -> Option<f64> {
    let quantized = |op: &str| {
        matches!(
            op,
            "DequantizeLinear"
                | "MatMulInteger"
                | "MatMulIntegerToFloat"
                | "MatMulNBits"
                | "DynamicQuantizeMatMul"
                | "QLinearMatMul"
        )
    };
    let mut tolerance = Some(1e-4);
    for tensor in model.graph().initializers() {
        if matches!(tensor.data_type(), DataType::Float16 | DataType::Bfloat16) {
            tolerance = Some(5e-2);
        }
    }
    tolerance.filter(|_| !model.graph().nodes().iter().any(|node| quantized(node.op_type())))
}

/// What roundings of a half type may be of an output's largest element: a runtime that has no kernel for it computes in float32, and
/// where a chain of such nodes begins and ends depends on their neighbours, so that one more node moves a rounding.
fn rounding(model: &Model) -> f64 {
    let types = model.graph().initializers().iter().map(|tensor| tensor.data_type());
    let steps = types.filter_map(|data_type| match data_type {
        DataType::Float16 => Some(f64::from(half::f16::EPSILON)),
        DataType::Bfloat16 => Some(f64::from(half::bf16::EPSILON)),
        _ => None,
    });
    4.0 * steps.fold(0.0, f64::max)
}

/// What is known of the sites of a fold.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct SiteProof {
    /// Whether the graph was run, and the sites are where they should be.
    verdict: ProofVerdict,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    /// The runtime that ran it.
    #[serde(skip_serializing_if = "Option::is_none")]
    runtime: Option<RuntimeInfo>,
    /// What an adapter of zeros changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    zero_adapter: Option<String>,
    /// How far the sites' queries are from the checkpoint's.
    #[serde(skip_serializing_if = "Option::is_none")]
    queries: Option<Vec<QueryDistance>>,
    /// The largest distance of one, by its largest element; none in a quantised graph, where they are not judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    query_tolerance: Option<f64>,
}

/// Whether the sites of a fold are proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProofVerdict {
    /// They are.
    Proved,
    /// The graph was not run: too large, or not wanted.
    NotRun,
    /// No runtime at hand ran the graph.
    NotProved,
}

/// The facts in the manifest of `prefold fold`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct FoldFacts {
    #[serde(flatten)]
    found: fold::Facts,
    site_proof: SiteProof,
}

impl SiteProof {
    fn without(verdict: ProofVerdict, why: impl Into<String>) -> Self {
        let why = Some(why.into());
        Self { verdict, why, runtime: None, zero_adapter: None, queries: None, query_tolerance: None }
    }

    /// Why the sites are not proved, where they are not.
    pub(super) fn missing(&self) -> Option<&str> {
        self.why.as_deref().filter(|_| self.verdict != ProofVerdict::Proved)
    }

    /// Whether the proof was tried in vain.
    pub(super) fn failed(&self) -> bool {
        self.verdict == ProofVerdict::NotProved
    }
}

impl ProofArgs {
    /// Proves the sites of the graph that was folded into `folder`, and adds what was found to the manifest there.
    pub(super) fn run(&self, context: &Context, graph: &Path, adapter: &Path, folder: &Path) -> Result<SiteProof> {
        let graph = graph_file(graph);
        let proof = self.prove(context, &graph, adapter)?;
        let path = folder.join(MANIFEST_NAME);
        let mut manifest: Manifest = read_json(&path, "a prefold manifest")?;
        if let Value::Object(facts) = &mut manifest.facts {
            facts.insert("site_proof".into(), json!(proof));
        }
        manifest.write(folder)?;
        Ok(proof)
    }

    fn prove(&self, context: &Context, graph: &Path, adapter: &Path) -> Result<SiteProof> {
        let not_run = |why: &str| Ok(SiteProof::without(ProofVerdict::NotRun, why));
        let model = Model::open(graph)?;
        let parent = graph.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let sizes = external_files(&model)?.into_iter().filter_map(|name| std::fs::metadata(parent.join(name)).ok());
        let bytes = model.encoded_len() + sizes.map(|data| data.len()).sum::<u64>();
        match self.proof {
            Proof::Never => return not_run("--proof never"),
            Proof::Auto if bytes > LARGE && self.checkpoint.is_none() => {
                return not_run("the graph is larger than 1 GiB; --proof always runs it nevertheless");
            }
            _ => {}
        }
        let checkpoint = self.checkpoint.as_ref().map(|name| context.checkpoint(name)).transpose()?;
        let adapter = match &checkpoint {
            Some(checkpoint) => Adapter::open_for(adapter, checkpoint.spec())?,
            None => fold::open_adapter(graph, adapter)?,
        };
        let mut failures = Vec::new();
        for engine in [Engine::Ort, Engine::Tract] {
            let subject = Subject { context, engine, graph, parent, model: &model, adapter: &adapter };
            let (zero, runtime) = match subject.zero_adapter() {
                Ok(found) => found,
                // a library that was named is not passed over
                Err(error) if engine == Engine::Ort && context.ort_lib().is_some() && is_library(&error) => {
                    return Err(error);
                }
                Err(error) => {
                    failures.push(error.to_string());
                    continue;
                }
            };
            match &zero {
                Zero::Changes(output) => {
                    return Err(miette!(
                        code = "prefold::fold::proof",
                        help = "where the graph gives the same for the same inputs, this is a fault of prefold: report it \
                                with the graph; --proof never folds nevertheless",
                        "the sites are not where they should be: with an adapter of zeros `{output}` is not the base graph's"
                    ));
                }
                // tract has not every operator of a term
                Zero::Fails(why) if engine == Engine::Tract => {
                    failures.push(why.clone());
                    continue;
                }
                Zero::Fails(why) => {
                    return Err(miette!(
                        code = "prefold::fold::proof",
                        help = "is the adapter one of this graph's base model? --proof never folds nevertheless",
                        "ONNX Runtime runs the graph, but not with an adapter of zeros in it: {why}"
                    ));
                }
                Zero::Fuses(_) => tracing::warn!("with an adapter of zeros {}", zero.in_words()),
                Zero::Nothing | Zero::Rounds(_) | Zero::NotJudged => {}
            }
            // queries behind an adapter are not the checkpoint's
            let bare = checkpoint.as_ref().filter(|_| model.metadata(fold::MARK).is_none());
            let queries = bare.map(|checkpoint| subject.queries(checkpoint)).transpose()?;
            return Ok(SiteProof {
                verdict: ProofVerdict::Proved,
                why: None,
                runtime: Some(runtime),
                zero_adapter: Some(zero.in_words()),
                query_tolerance: queries.as_ref().and_then(|_| tolerance(&model)),
                queries,
            });
        }
        Ok(SiteProof::without(ProofVerdict::NotProved, failures.join("; ")))
    }
}

/// Whether it is the runtime's library that failed, and not the graph.
fn is_library(error: &miette::Report) -> bool {
    use crate::runtime::Error;
    matches!(error.downcast_ref::<Error>(), Some(Error::Library { .. } | Error::NoLibrary { .. }))
}

/// What an adapter of zeros does.
enum Zero {
    /// No bit of any output is another.
    Nothing,
    /// Outputs are rounded otherwise, in a half type: by this much of their largest elements.
    Rounds(f64),
    /// Node by node no bit is another, but the runtime fuses other nodes and rounds to other integers: outputs move by this much of
    /// their largest elements.
    Fuses(f64),
    /// This output is another.
    Changes(String),
    /// The runtime runs the base graph, but not the one with zeros.
    Fails(String),
    /// Zeros of this method are not the base model.
    NotJudged,
}

impl Zero {
    fn in_words(&self) -> String {
        match self {
            Self::Nothing => "no bit changed".into(),
            Self::Rounds(by) => {
                format!("half precision was rounded otherwise, by at most {by:.1e} of the largest element")
            }
            Self::Fuses(by) => format!(
                "no bit changed node by node; the runtime fuses other nodes, which moves an output by {by:.1e} of the largest element"
            ),
            Self::Changes(_) => "an output changed".into(),
            Self::Fails(_) => "the graph does not run".into(),
            Self::NotJudged => "not judged: zeros of this method are not the base model".into(),
        }
    }
}

struct Subject<'a> {
    context: &'a Context,
    engine: Engine,
    graph: &'a Path,
    /// The folder of the graph.
    parent: &'a Path,
    model: &'a Model,
    adapter: &'a Adapter,
}

impl Subject<'_> {
    /// Compares the graph with itself and an adapter of zeros.
    fn zero_adapter(&self) -> Result<(Zero, RuntimeInfo)> {
        let mut base = self.open(self.graph, Optimization::default())?;
        let config = self.adapter.config();
        if !self.adapter.zeros_are_the_base() {
            return Ok((Zero::NotJudged, base.info()));
        }
        let folder = TemporaryFolder::new().into_diagnostic()?;
        let zeros = self.with_zeros(config, folder.path())?;
        let found = match self.difference(base.as_mut(), &zeros, Optimization::default())? {
            Ok(None) => Zero::Nothing,
            Ok(Some(found)) if found.distance < rounding(self.model) => Zero::Rounds(found.distance),
            Ok(Some(found)) if self.is_the_base_unfused(&zeros)? => Zero::Fuses(found.distance),
            Ok(Some(found)) => Zero::Changes(found.output),
            Err(error) => Zero::Fails(error.to_string()),
        };
        Ok((found, base.info()))
    }

    /// Where another graph's outputs differ from those of `base`; inside, an error of the other graph's.
    fn difference(
        &self,
        base: &mut dyn Session,
        other: &Path,
        optimization: Optimization,
    ) -> Result<Result<Option<Difference>>> {
        let head_dim = self.adapter.config().head_dim;
        let probe = Probe::new(base.inputs(), base.outputs());
        let expected = probe.run(base, head_dim)?;
        let other = self.open(other, optimization);
        Ok(other.and_then(|mut other| Ok(probe.first_difference(&expected, other.as_mut(), head_dim)?)))
    }

    /// Whether a graph that rounds to integers gives, with zeros, every bit of the base graph's where the runtime runs the nodes as
    /// they are written. A runtime that joins the two quantisations around a projection into one integer operator no longer does
    /// so with a sum between them, and rounds otherwise.
    fn is_the_base_unfused(&self, zeros: &Path) -> Result<bool> {
        let quantises = self.model.graph().nodes().iter().any(|node| node.is("", "QuantizeLinear"));
        if self.engine != Engine::Ort || !quantises {
            return Ok(false);
        }
        let mut base = self.open(self.graph, Optimization::Off)?;
        Ok(self.difference(base.as_mut(), zeros, Optimization::Off)?.is_ok_and(|found| found.is_none()))
    }

    /// The graph with an adapter of zeros, over those that it carries.
    fn with_zeros(&self, config: &AdapterConfig, folder: &Path) -> Result<PathBuf> {
        let zeros = Adapter::zeros(config.clone())?;
        let zeros = [fold::NamedAdapter { name: "zeros".into(), adapter: zeros }];
        let over = if self.model.metadata(fold::MARK).is_some() { Over::Stack } else { Over::Refuse };
        let options = fold::FoldOptions { over, ..fold::FoldOptions::default() };
        let (edited, _) = fold::fold_over_any(self.model, self.parent, &zeros, options, folder)?;
        self.save(&edited, folder)
    }

    /// Opens a graph; the banks that it has are switched off.
    fn open(&self, graph: &Path, optimization: Optimization) -> Result<Box<dyn Session>> {
        let banks = Record::all(self.model)?.into_iter().filter(|fold| fold.emission == Emission::Bank);
        let given = banks.map(|fold| (fold.input_name(ADAPTER_IDS), Given::EveryRow(0))).collect();
        let options = OrtOptions { optimization, ..OrtOptions::default() };
        Ok(open_given(self.context, self.engine, graph, given, options)?)
    }

    /// How far the sites' queries are from the checkpoint's.
    fn queries(&self, checkpoint: &Checkpoint) -> Result<Vec<QueryDistance>> {
        let sites = fold::sites(self.model)?;
        let mut patch = Patch::new("give the queries out");
        let mut made = HashSet::new();
        let queries =
            sites.iter().map(|site| self.give_out(site, &mut patch, &mut made)).collect::<Result<Vec<_>>>()?;
        let folder = TemporaryFolder::new().into_diagnostic()?;
        let graph = self.save(&patch.apply(self.model)?, folder.path())?;
        let mut graph = self.open(&graph, Optimization::default())?;
        let decoder = Decoder::load(checkpoint, DType::F32, &Device::Cpu)?;
        let probe = Probe::new(graph.inputs(), graph.outputs());
        let distances = probe.query_distances(graph.as_mut(), &queries, &decoder)?;
        let Some(tolerance) = tolerance(self.model) else { return Ok(distances) };
        match distances.iter().find(|found| found.distance > tolerance * found.largest.max(1.0)) {
            None => Ok(distances),
            Some(found) => Err(miette!(
                code = "prefold::fold::proof",
                help = "is it the checkpoint that the graph was made of? `prefold inspect --explain` shows the sites",
                "layer {}{}: the query that the graph shows is {:.1e} from the checkpoint's, whose largest element is {:.1e}",
                found.layer,
                if found.scope.is_empty() { String::new() } else { format!(" in `{}`", found.scope) },
                found.distance,
                found.largest
            )),
        }
    }

    /// Adds a site's query to the outputs. `made` has the names of what sites share.
    fn give_out(&self, site: &Site, patch: &mut Patch, made: &mut HashSet<String>) -> Result<CapturedQuery> {
        let source = locate::query(self.model, site, Query::PostRope)?;
        let first = site.readers.iter().map(|reader| reader.node).min_by_key(|node| node.index());
        for node in source.nodes {
            if !made.insert(node.name().to_owned()) {
                continue;
            }
            match first {
                Some(first) => patch.insert_before(first, node),
                None => patch.append_node(node),
            };
        }
        for tensor in source.initializers {
            if made.insert(tensor.name().to_owned()) {
                patch.add_initializer(tensor);
            }
        }
        let merged = source.layout == Layout::Merged;
        let dims = std::iter::repeat_n(Dim::Unknown, if merged { 3 } else { 4 });
        let data_type = fold::query_type(self.model, site)?.or_else(|| self.output_type()).unwrap_or(DataType::Float);
        let output = patch.give_out(self.model, site.node, ValueDef::new(source.tensor, data_type, dims))?;
        Ok(CapturedQuery { layer: site.layer, scope: site.scope.clone(), output, merged })
    }

    /// The type of the logits.
    fn output_type(&self) -> Option<DataType> {
        self.model.graph().outputs().first().and_then(|value| value.elem_type())
    }

    /// Saves an edited graph in `folder`, where the data of the one that it was made of is linked to.
    fn save(&self, model: &Model, folder: &Path) -> Result<PathBuf> {
        for name in external_files(self.model)? {
            let (from, to) = (self.parent.join(&name), folder.join(&name));
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent).into_diagnostic()?;
            }
            if std::fs::hard_link(&from, &to).is_err() {
                std::fs::copy(&from, &to).into_diagnostic()?;
            }
        }
        let path = folder.join(MODEL_NAME);
        model.save(&path)?;
        Ok(path)
    }
}

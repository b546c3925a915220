//! The proof of a fold's sites: the graph is run, and what was found goes into the manifest.

use std::path::Path;

use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use miette::{IntoDiagnostic, Result, miette};
use serde_json::{Value, json};

use super::Context;
use super::verify::{Engine, open_session};
use crate::adapter::{Adapter, Query};
use crate::base::{Checkpoint, Decoder};
use crate::files::{MANIFEST_NAME, Manifest, read_json};
use crate::fold::{self, Layout, Site, graph_file, locate};
use crate::onnx::{DataType, Dim, MODEL_NAME, Model, Patch, ValueDef, external_files};
use crate::parity::{CapturedQuery, Probe, QueryDistance};
use crate::runtime::Session;

/// How the sites are proved.
#[derive(Args, Clone, Debug)]
pub(super) struct ProofArgs {
    /// Run the graph to prove its sites: a zero adapter changes no bit, and the queries are the checkpoint's. `auto` does so
    /// for graphs of up to 1 GiB
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
    let quantized =
        |op: &str| matches!(op, "DequantizeLinear" | "MatMulInteger" | "MatMulNBits" | "DynamicQuantizeMatMul");
    let mut tolerance = Some(1e-4);
    for tensor in model.graph().initializers() {
        if matches!(tensor.data_type(), DataType::Float16 | DataType::Bfloat16) {
            tolerance = Some(5e-2);
        }
    }
    tolerance.filter(|_| !model.graph().nodes().iter().any(|node| quantized(node.op_type())))
}

impl ProofArgs {
    /// Proves the sites of the graph that was folded into `folder`, and adds what was found to the manifest there.
    pub(super) fn run(&self, context: &Context, graph: &Path, adapter: &Path, folder: &Path) -> Result<()> {
        let graph = graph_file(graph);
        let found = self.prove(context, &graph, adapter)?;
        if let (Some(why), true) = (found.get("why"), self.proof != Proof::Never) {
            tracing::warn!("the sites were not proved: {why}");
        }
        let path = folder.join(MANIFEST_NAME);
        let mut manifest: Manifest = read_json(&path, "a prefold manifest")?;
        if let Value::Object(facts) = &mut manifest.facts {
            facts.insert("site_proof".into(), found);
        }
        Ok(manifest.write(folder)?)
    }

    fn prove(&self, context: &Context, graph: &Path, adapter: &Path) -> Result<Value> {
        let not_run = |why: String| Ok(json!({ "run": false, "why": why }));
        let model = Model::open(graph)?;
        let parent = graph.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let sizes = external_files(&model)?.into_iter().filter_map(|name| std::fs::metadata(parent.join(name)).ok());
        let bytes = model.encoded_len() + sizes.map(|data| data.len()).sum::<u64>();
        match self.proof {
            Proof::Never => return not_run("--proof never".into()),
            Proof::Auto if bytes > LARGE && self.checkpoint.is_none() => {
                return not_run("the graph is large: --proof always".into());
            }
            _ => {}
        }
        if model.metadata(fold::MARK).is_some() {
            return not_run("the graph carries an adapter already".into());
        }
        let checkpoint = self.checkpoint.as_ref().map(|name| context.checkpoint(name)).transpose()?;
        let adapter = match &checkpoint {
            Some(checkpoint) => Adapter::open_for(adapter, checkpoint.spec())?,
            None => match Adapter::open(adapter) {
                Ok(adapter) => adapter,
                // PEFT's names are those of a model
                Err(error) => return not_run(format!("{error}; give --checkpoint")),
            },
        };
        let mut failures = Vec::new();
        for engine in [Engine::Ort, Engine::Tract] {
            let mut base = match open_session(context, engine, graph) {
                Ok(base) => base,
                Err(error) => {
                    failures.push(error.to_string());
                    continue;
                }
            };
            let subject = Subject { context, engine, graph, model: &model, adapter: &adapter };
            let zero = match subject.zero_adapter(base.as_mut()) {
                Ok(zero) => zero,
                Err(error) => {
                    failures.push(error.to_string());
                    continue;
                }
            };
            if let Some(Some(output)) = &zero {
                return Err(miette!(
                    code = "prefold::fold::proof",
                    help = "this is a fault of prefold: report it with the graph",
                    "the sites are not where they should be: with an adapter of zeros `{output}` is not the base graph's"
                ));
            }
            let queries = checkpoint.as_ref().map(|checkpoint| subject.queries(checkpoint)).transpose()?;
            return Ok(json!({
                "run": true,
                "runtime": base.info(),
                "zero_adapter": zero.map_or("not judged: zeros of this method are not the base model", |_| "no bit changed"),
                "queries": queries,
                "query_tolerance": tolerance(&model),
            }));
        }
        not_run(failures.join("; "))
    }
}

struct Subject<'a> {
    context: &'a Context,
    engine: Engine,
    graph: &'a Path,
    model: &'a Model,
    adapter: &'a Adapter,
}

impl Subject<'_> {
    /// The first output that an adapter of zeros changes; nothing where zeros say nothing.
    fn zero_adapter(&self, base: &mut dyn Session) -> Result<Option<Option<String>>> {
        if !self.adapter.zeros_are_the_base() {
            return Ok(None);
        }
        let zeros = Adapter::zeros(self.adapter.config().clone())?;
        let folder = tempfile::tempdir().into_diagnostic()?;
        let source = self.graph.parent().unwrap_or(Path::new("."));
        let zeros = [fold::NamedAdapter { name: "zeros".into(), adapter: zeros }];
        let (edited, _) = fold::fold(self.model, source, &zeros, fold::FoldOptions::default(), folder.path())?;
        let mut zero = self.session(&edited, folder.path())?;
        let probe = Probe::new(base.outputs());
        Ok(Some(probe.first_difference(base, zero.as_mut(), self.adapter.config().head_dim)?))
    }

    /// How far the sites' queries are from the checkpoint's.
    fn queries(&self, checkpoint: &Checkpoint) -> Result<Vec<QueryDistance>> {
        let sites = locate::sites(self.model)?;
        let mut patch = Patch::new("give the queries out");
        // a nested graph cannot give anything out
        let queries = sites.iter().filter(|site| site.scope.is_empty());
        let queries = queries.map(|site| self.give_out(site, &mut patch)).collect::<Result<Vec<_>>>()?;
        if queries.is_empty() {
            return Ok(Vec::new());
        }
        let folder = tempfile::tempdir().into_diagnostic()?;
        let mut graph = self.session(&patch.apply(self.model)?, folder.path())?;
        let decoder = Decoder::load(checkpoint, DType::F32, &Device::Cpu)?;
        let probe = Probe::new(graph.outputs());
        let distances = probe.query_distances(graph.as_mut(), &queries, &decoder)?;
        let Some(tolerance) = tolerance(self.model) else { return Ok(distances) };
        match distances.iter().find(|found| found.distance > tolerance * found.largest.max(1.0)) {
            None => Ok(distances),
            Some(found) => Err(miette!(
                code = "prefold::fold::proof",
                help = "is it the checkpoint that the graph was made of? `prefold inspect --explain` shows the sites",
                "layer {}: the query that the graph shows is {:.1e} from the checkpoint's, whose largest element is {:.1e}",
                found.layer,
                found.distance,
                found.largest
            )),
        }
    }

    fn give_out(&self, site: &Site, patch: &mut Patch) -> Result<CapturedQuery> {
        let source = locate::query(self.model, site, Query::PostRope)?;
        let first = site.readers.iter().map(|reader| reader.node).min_by_key(|node| node.index());
        for node in source.nodes {
            match first {
                Some(first) => patch.insert_before(first, node),
                None => patch.append_node(node),
            };
        }
        for tensor in source.initializers {
            patch.add_initializer(tensor);
        }
        let rank = if source.layout == Layout::Merged { 3 } else { 4 };
        let dims = std::iter::repeat_n(Dim::Unknown, rank);
        patch.add_output(ValueDef::new(source.tensor.as_str(), self.float_type(site), dims));
        Ok(CapturedQuery { layer: site.layer, output: source.tensor, merged: source.layout == Layout::Merged })
    }

    /// The type of the cache, or of the logits: that of a query.
    fn float_type(&self, site: &Site) -> DataType {
        let graph = self.model.graph();
        let declared = graph.value_info().iter().find(|value| value.name() == site.query);
        let cache = graph.inputs().iter().find(|value| value.name().starts_with("past_key_values."));
        let found = declared.or(cache).or(graph.outputs().first()).and_then(|value| value.elem_type());
        found.unwrap_or(DataType::Float)
    }

    /// Opens an edited graph in `folder`, where the data of the one that it was made of is linked to.
    fn session(&self, model: &Model, folder: &Path) -> Result<Box<dyn Session>> {
        let source = self.graph.parent().unwrap_or(Path::new("."));
        for name in external_files(self.model)? {
            let (from, to) = (source.join(&name), folder.join(&name));
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent).into_diagnostic()?;
            }
            if std::fs::hard_link(&from, &to).is_err() {
                std::fs::copy(&from, &to).into_diagnostic()?;
            }
        }
        let path = folder.join(MODEL_NAME);
        model.save(&path)?;
        Ok(open_session(self.context, self.engine, &path)?)
    }
}

//! Graphs of other exporters, folded and run in ONNX Runtime on the oracles' inputs.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use ndarray::{ArrayD, Axis, IxDyn, Slice};
use prefold::adapter::{Adapter, Query};
use prefold::fold::{Exactness, Layout, Site, fold_folder, locate};
use prefold::onnx::{DataType, Dim, Model, NodeDef, Patch, TensorDef, TensorInfo, ValueDef};
use prefold::runtime::{self, DType, NamedValues, OrtOptions, OrtSession, Session, Value, library};

use crate::oracles::Case;
use crate::support::{fixture, shared};

/// The largest distance in float32.
const CLOSE: f32 = 1e-4;

/// Graphs whose attention is one operator, by the beginning of their place: `fused` has their tests.
const FUSED: [&str; 4] = ["genai_fp32/", "genai_int4/", "hf_onnx_ortfused/", "torch_dynamo23/"];

/// Every graph at hand: its name, its file, and its family's oracle.
pub fn graphs() -> Vec<(String, PathBuf, PathBuf)> {
    let Some(root) = shared("graphs") else { return Vec::new() };
    let mut found = Vec::new();
    let entries = |path: &Path| std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    for family in entries(&root).iter().filter(|path| path.is_dir()).flat_map(|exporter| entries(exporter)) {
        let name = family.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let oracle = shared(&format!("oracles/{}", family.file_name().unwrap().to_str().unwrap())).unwrap();
        let files = entries(&family).into_iter().filter(|path| path.extension().is_some_and(|e| e == "onnx"));
        found.extend(files.map(|file| (name.clone(), file, oracle.clone())));
    }
    found.sort();
    assert!(found.len() >= 30, "{found:?}");
    found
}

pub fn session(library: &Path, graph: &Path) -> OrtSession {
    let options = OrtOptions { threads: Some(1), ..OrtOptions::default() };
    OrtSession::open(library, graph, options).unwrap()
}

/// What a graph is fed for a case: `position_ids` counted from the mask, and an empty cache. `branch`: what a merged decoder is
/// told of its cache.
pub fn feeds(session: &dyn Session, case: &Case, head_dim: usize, branch: bool) -> NamedValues {
    let seq = case.ids.len() / case.batch;
    let tokens = |values: &[i64]| ArrayD::from_shape_vec(IxDyn(&[case.batch, seq]), values.to_vec()).unwrap();
    let rows = case.mask.chunks(seq).flat_map(|row| {
        row.iter().scan(0, |sum, mask| {
            *sum += mask;
            Some((*sum - 1).max(0))
        })
    });
    let positions: Vec<i64> = rows.collect();
    let mut feeds = NamedValues::new();
    for port in session.inputs() {
        let value: Value = match port.name.as_str() {
            "input_ids" => tokens(&case.ids).into(),
            "attention_mask" => tokens(&case.mask).into(),
            "position_ids" => tokens(&positions).into(),
            "use_cache_branch" => ArrayD::from_elem(IxDyn(&[1]), branch).into(),
            _ => {
                let fixed = |at: usize, or: usize| match port.dims[at] {
                    runtime::Dim::Fixed(size) => size,
                    _ => or,
                };
                assert!(port.name.starts_with("past_key_values."), "{port}");
                Value::zeros(port.dtype, &[case.batch, fixed(1, 0), 0, fixed(3, head_dim)]).unwrap()
            }
        };
        let narrow = port.dtype == DType::I32 && value.dtype() == DType::I64;
        feeds.insert(&port.name, if narrow { value.into_i64().unwrap().mapv(|v| v as i32).into() } else { value });
    }
    feeds
}

pub fn logits(mut outputs: NamedValues) -> Tensor {
    let logits = outputs.take("logits").unwrap().into_f32().unwrap();
    let shape = logits.shape().to_vec();
    Tensor::from_vec(logits.into_iter().collect(), shape, &Device::Cpu).unwrap()
}

/// The first tokens in one run, the others one by one from the cache, for graphs that have one.
pub fn in_steps(session: &mut dyn Session, case: &Case, head_dim: usize) -> Option<Tensor> {
    session.inputs().iter().find(|port| port.name.starts_with("past_key_values."))?;
    let (all, seq) = (feeds(session, case, head_dim, false), case.ids.len() / case.batch);
    let first = 5;
    let mut cache: Vec<(String, Value)> =
        all.iter().filter(|(n, _)| n.starts_with("past")).map(|(n, v)| (n.into(), v.clone())).collect();
    let mut rows = Vec::new();
    for (from, to) in std::iter::once((0, first)).chain((first..seq).map(|at| (at, at + 1))) {
        let mut step = NamedValues::new();
        for (name, value) in all.iter().filter(|(name, _)| !name.starts_with("past")) {
            let cut = |array: ArrayD<i64>, from: usize| {
                array.slice_axis(Axis(1), Slice::from(from..to)).as_standard_layout().into_owned()
            };
            let value: Value = match name {
                "use_cache_branch" => ArrayD::from_elem(IxDyn(&[1]), from > 0).into(),
                "attention_mask" => cut(value.clone().into_i64().unwrap(), 0).into(),
                _ => cut(value.clone().into_i64().unwrap(), from).into(),
            };
            step.insert(name, value);
        }
        cache.into_iter().for_each(|(name, value)| step.insert(name, value));
        let outputs = session.run(step).unwrap();
        let present = outputs
            .iter()
            .filter_map(|(n, v)| Some((format!("past_key_values.{}", n.strip_prefix("present.")?), v.clone())));
        cache = present.collect();
        rows.push(logits(outputs));
    }
    Some(Tensor::cat(&rows, 1).unwrap())
}

/// The base graph with the queries as outputs and a term for each site as an input, that is added where the fold adds its own.
fn opened(model: &Model, sites: &[Site], data_type: DataType) -> (Model, Vec<String>) {
    let mut patch = Patch::new("open the sites");
    let mut queries = Vec::new();
    let any = || (0..4).map(|_| Dim::Unknown);
    for (number, site) in sites.iter().enumerate() {
        let source = locate::query(model, site, Query::PostRope).unwrap();
        let first = site.readers.iter().map(|reader| reader.node).min_by_key(|node| node.index()).unwrap();
        source.nodes.into_iter().for_each(|node| _ = patch.insert_before(first, node));
        source.initializers.into_iter().for_each(|tensor| _ = patch.add_initializer(tensor));
        assert_eq!(source.layout, Layout::HeadsFirst);
        let (term, sum) = (format!("term.{number}"), format!("sum.{number}"));
        let mut laid_out = term.clone();
        if site.output_layout == Layout::Merged {
            let (turned, shape) = (format!("turned.{number}"), format!("merged_shape.{number}"));
            laid_out = format!("merged.{number}");
            let transpose = NodeDef::new("Transpose", format!("/test/{turned}")).attr_ints("perm", &[0, 2, 1, 3]);
            patch.insert_before(first, transpose.inputs([&term]).outputs([&turned]));
            let reshape = NodeDef::new("Reshape", format!("/test/{laid_out}")).inputs([&turned, &shape]);
            patch.insert_before(first, reshape.outputs([&laid_out]));
            patch.add_initializer(TensorDef::from_i64s(shape, &[3], &[0, 0, -1]));
        }
        patch.insert_before(
            first,
            NodeDef::new("Sum", format!("/test/{sum}")).inputs([&site.output, &laid_out]).outputs([&sum]),
        );
        site.readers.iter().for_each(|reader| _ = patch.replace_input(reader.node, reader.slot, sum.as_str()));
        patch.add_input(ValueDef::new(term, data_type, any()));
        patch.add_output(ValueDef::new(source.tensor.as_str(), data_type, any()));
        queries.push(source.tensor);
    }
    (patch.apply(model).unwrap(), queries)
}

/// Logits of a base graph to which `elu(q) · M` is added by hand: a run for each layer shows the query that the next term needs.
fn by_hand(library: &Path, file: &Path, sites: &[Site], adapter: &Adapter, case: &Case) -> Tensor {
    let model = Model::open(file).unwrap();
    let data_type = if is_half(&model) { DataType::Float16 } else { DataType::Float };
    let (model, queries) = opened(&model, sites, data_type);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    model.save(&path).unwrap();
    let mut session = session(library, &path);
    let (heads, head_dim) = (adapter.config().num_heads, adapter.config().head_dim);
    let base = feeds_of_ports(&session, case, head_dim);
    let seq = case.ids.len() / case.batch;
    let typed = |values: ArrayD<f32>| -> Value {
        if data_type == DataType::Float16 { values.mapv(half::f16::from_f32).into() } else { values.into() }
    };
    let mut terms = vec![ArrayD::zeros(IxDyn(&[case.batch, heads, seq, head_dim])); sites.len()];
    for layer in 0..=sites.len() {
        let mut feeds = base.clone();
        terms.iter().enumerate().for_each(|(number, term)| feeds.insert(format!("term.{number}"), typed(term.clone())));
        let mut outputs = session.run(feeds).unwrap();
        let Some(query) = queries.get(layer) else { return logits(outputs) };
        let query = outputs.take(query).unwrap().into_f32().unwrap();
        let m = adapter.tensors()[&format!("layers.{layer}.M")].to_vec3::<f32>().unwrap();
        terms[layer] = ArrayD::from_shape_fn(query.raw_dim(), |at| {
            let elu = |x: f64| if x > 0.0 { x } else { x.exp_m1() };
            let of = |k: usize| elu(query[[at[0], at[1], at[2], k]].into()) * f64::from(m[at[1]][k][at[3]]);
            (0..head_dim).map(of).sum::<f64>() as f32
        });
    }
    panic!("not asked for")
}

/// Whether attention computes in float16: its cache tells.
pub fn is_half(model: &Model) -> bool {
    let half = |tensor: &TensorInfo| tensor.data_type() == DataType::Float16;
    model.graph().inputs().iter().any(|input| input.elem_type() == Some(DataType::Float16))
        || model.graph().initializers().iter().any(half)
}

fn feeds_of_ports(session: &OrtSession, case: &Case, head_dim: usize) -> NamedValues {
    struct WithoutTerms(Vec<runtime::Port>);
    impl Session for WithoutTerms {
        fn inputs(&self) -> &[runtime::Port] {
            &self.0
        }
        fn outputs(&self) -> &[runtime::Port] {
            &[]
        }
        fn info(&self) -> runtime::RuntimeInfo {
            panic!("not asked for")
        }
        fn run_tensors(
            &mut self,
            _: Vec<(String, runtime::Tensor)>,
        ) -> runtime::Result<Vec<(String, runtime::Tensor)>> {
            panic!("not asked for")
        }
    }
    let ports = session.inputs().iter().filter(|port| !port.name.starts_with("term.")).cloned();
    feeds(&WithoutTerms(ports.collect()), case, head_dim, false)
}

fn check(library: &Path, name: &str, file: &Path, oracle: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let adapter_file = oracle.join("adapter.safetensors");
    let adapter = Adapter::open(&adapter_file).unwrap();
    let folded = fold_folder(file, &adapter_file, folder.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
    let head_dim = adapter.config().head_dim;
    assert!(folded.sites.iter().all(|site| site.num_heads.is_none_or(|h| h == adapter.config().num_heads as i64)));
    let (mut base, mut graph) = (session(library, file), session(library, &folder.path().join("model.onnx")));
    let half = is_half(&Model::open(file).unwrap());
    for case in Case::all(oracle) {
        let branches: &[bool] = if name.starts_with("optimum_merged") { &[false, true] } else { &[false] };
        for branch in branches {
            let input = feeds(&base, &case, head_dim, *branch);
            let of_base = case.distance(&logits(base.run(input.clone()).unwrap()), "base_logits");
            let adapted = logits(graph.run(input).unwrap());
            let trained = case.name != "left" || folded.exactness.holds_left_padded();
            if of_base < CLOSE && trained {
                let distance = case.distance(&adapted, "adapted_logits");
                eprintln!("{name} {} {branch}: base {of_base:.1e}, adapted {distance:.1e}", case.name);
                assert!(distance < CLOSE, "{name} {}: {distance:.1e}", case.name);
                if let Some(steps) = in_steps(&mut graph, &case, head_dim) {
                    let distance = case.distance(&steps, "adapted_logits");
                    assert!(distance < CLOSE, "{name} {} step by step: {distance:.1e}", case.name);
                }
            } else {
                let reference = by_hand(library, file, &folded.sites, &adapter, &case);
                let mut by_hand = Case::load(oracle, case.name);
                by_hand.tensors.insert(format!("{}_by_hand", case.name), reference);
                let distance = by_hand.distance(&adapted, "by_hand");
                eprintln!("{name} {}: base {of_base:.1e}, adapted {distance:.1e} from the term by hand", case.name);
                // float16 rounds the term as it rounds everything else: by as much as the base graph is off
                assert!(distance < if half { 2.0 * of_base } else { CLOSE }, "{name} {}: {distance:.1e}", case.name);
            }
        }
    }
}

/// Graphs as tools leave them that came after an exporter (`fixtures/graphs/tools.py`): a query that is scaled before its operator,
/// an output that is laid out twice, products that are scaled, quantisers on every edge.
#[test]
fn graphs_of_other_tools_compute_the_adapter_s_logits() {
    let Ok(library) = library::find(None, &prefold::files::cache_folder().unwrap()) else {
        eprintln!("skipped: no ONNX Runtime here (prefold runtime install)");
        return;
    };
    for (name, graph, oracle) in of_tools() {
        check(&library, &name, &graph.join("model.onnx"), &oracle);
    }
}

/// Their names, folders, and oracles.
pub fn of_tools() -> Vec<(String, PathBuf, PathBuf)> {
    let found = [
        ("dynamo23", "opt"),
        ("onnxsim", "gpt_neox_serial"),
        ("ort_extended", "granite"),
        ("ort_extended", "opt"),
        ("qdq", "llama_tied"),
    ];
    let of = |(tool, family): (&str, &str)| {
        let name = format!("{tool}/{family}");
        (name.clone(), fixture(&format!("graphs/{name}")), fixture(&format!("oracles/{family}")))
    };
    found.map(of).to_vec()
}

#[test]
fn graphs_of_every_exporter_compute_the_adapter_s_logits() {
    let Ok(library) = library::find(None, &prefold::files::cache_folder().unwrap()) else {
        eprintln!("skipped: no ONNX Runtime here (prefold runtime install)");
        return;
    };
    let decomposed = |(name, _, _): &(String, PathBuf, PathBuf)| !FUSED.iter().any(|fused| name.starts_with(fused));
    for (name, file, oracle) in graphs().iter().filter(|graph| decomposed(graph)) {
        check(&library, name, file, oracle);
    }
}

/// Graphs without `position_ids` count columns, and say so.
#[test]
fn a_fold_says_for_which_inputs_it_is_exact() {
    let exactness = |name: &str| -> Option<Exactness> {
        Some(locate::exactness(&Model::open(&shared(&format!("graphs/{name}"))?).unwrap()))
    };
    let cases = [
        ("optimum_with_past/llama_gqa/model.onnx", true, "counted from the mask"),
        ("optimum_with_past/gemma3/model.onnx", false, "counts positions by column"),
        ("optimum_merged/llama_gqa/decoder_model_merged.onnx", true, "counted from the mask"),
        ("torch_dynamo18/gpt2/model.onnx", true, "counted from the mask"),
        ("ort_optimizer_with_past/phi3/model.onnx", true, "counted from the mask"),
        ("torch_dynamo23/llama_gqa/model.onnx", true, "counted from the mask"),
        ("genai_fp32/llama_gqa/model.onnx", false, "the attention operator counts positions by column"),
    ];
    for (name, left, text) in cases {
        let Some(found) = exactness(name) else { return };
        assert_eq!(found.holds_left_padded(), left, "{name}: {found:?}");
        assert!(found.exact_for.contains(text), "{name}: {found:?}");
    }
}

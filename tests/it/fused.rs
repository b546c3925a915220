//! Graphs of other exporters whose attention is one operator: folded, run in ONNX Runtime, and compared with PyTorch.
//!
//! Where the base graph itself computes the model, the folded one has to compute the adapted model. These graphs assume rows
//! that are padded on the right, or not at all, so each row counts by itself.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use ndarray::{Array2, Array3, ArrayD, Axis, s};
use prefold::adapter::{Adapter, Method, Query};
use prefold::base::{Checkpoint, Decoder, Input};
use prefold::fold::{fold_folder, locate};
use prefold::onnx::{DataType, Dim, Index, Model, NodeDef, Patch, ValueDef};
use prefold::runtime::{GraphDecoder, NamedValues, OrtOptions, OrtSession, Session, library};

use crate::oracles::Case;
use crate::support::{fixture, shared};

const TOLERANCE: f32 = 1e-4;

/// How tokens are fed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Feed {
    AtOnce,
    /// Five at once, then one by one with the cache.
    Steps,
}

pub fn runtime() -> Option<PathBuf> {
    let found = library::find(None, &prefold::files::cache_folder().unwrap()).ok();
    if found.is_none() {
        eprintln!("skipped: no ONNX Runtime here (prefold runtime install)");
    }
    found
}

/// Logits of a case, `[batch, seq, vocab]`.
fn logits(library: &Path, graph: &Path, head_dim: usize, case: &Case, feed: Feed) -> Array3<f32> {
    let options = OrtOptions { threads: Some(1), ..OrtOptions::default() };
    let session = OrtSession::open(library, graph, options).unwrap();
    let mut decoder = GraphDecoder::with_head_dim(session, head_dim).unwrap();
    let seq = case.ids.len() / case.batch;
    let ids = Array2::from_shape_vec((case.batch, seq), case.ids.clone()).unwrap();
    let mask = Array2::from_shape_vec((case.batch, seq), case.mask.clone()).unwrap();
    let first = if feed == Feed::Steps { 5 } else { seq };
    let part = |array: &Array2<i64>, from: usize, to: usize| array.slice(s![.., from..to]).to_owned();
    let mut parts = vec![decoder.prefill(&part(&ids, 0, first), &part(&mask, 0, first)).unwrap()];
    for at in first..seq {
        parts.push(decoder.extend(&part(&ids, at, at + 1), &part(&mask, at, at + 1), None).unwrap());
    }
    let views: Vec<_> = parts.iter().map(|p| p.view()).collect();
    ndarray::concatenate(Axis(1), &views).unwrap()
}

/// Largest difference of each row of the batch, where its mask is 1.
pub fn row_distances(case: &Case, found: &Array3<f32>, expected: &Array3<f32>) -> Vec<f32> {
    let seq = case.ids.len() / case.batch;
    let of_row = |row: usize| {
        let columns = (0..seq).filter(|column| case.mask[row * seq + column] == 1);
        let differences = columns.flat_map(|column| {
            let (f, e) = (found.slice(s![row, column, ..]), expected.slice(s![row, column, ..]));
            (&f - &e).mapv(f32::abs).to_vec()
        });
        differences.fold(0.0, |most: f32, x| if x.is_nan() { f32::INFINITY } else { most.max(x) })
    };
    (0..case.batch).map(of_row).collect()
}

fn array(tensor: &candle_core::Tensor) -> Array3<f32> {
    let shape = tensor.dims3().unwrap();
    let values = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    Array3::from_shape_vec(shape, values).unwrap()
}

fn stored(case: &Case, name: &str) -> Array3<f32> {
    array(&case.tensors[&format!("{}_{name}", case.name)])
}

/// Folds and compares; returns how many rows of each case were within the base graph's reach, as `single left right`.
fn fold_and_compare(graph: &str, feed: Feed, query: Query) -> Option<String> {
    let (library, path) = (runtime()?, shared(&format!("graphs/{graph}/model.onnx"))?);
    let oracle = shared(&format!("oracles/{}", graph.split('/').next_back().unwrap()))?;
    let scratch = tempfile::tempdir().unwrap();
    let (folded, adapted) = (scratch.path().join("folded"), scratch.path().join("adapter"));
    std::fs::create_dir(&folded).unwrap();
    std::fs::create_dir(&adapted).unwrap();
    let given = Adapter::open(&oracle.join("adapter.safetensors")).unwrap();
    let mut config = given.config().clone();
    let Method::PrefixPlus(method) = &mut config.method else { panic!("{graph}: another method") };
    method.query = query;
    let adapter = Adapter::new(config, given.tensors().clone()).unwrap();
    adapter.save(&adapted).unwrap();
    let head_dim = adapter.config().head_dim;
    let report = fold_folder(&path, &adapted, &folded).unwrap_or_else(|error| panic!("{graph}: {error}"));
    assert_eq!(report.sites.len(), adapter.config().num_layers, "{graph}");
    let checkpoint = Checkpoint::open(&oracle).unwrap();
    let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let hook = adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap();
    let mut reached = Vec::new();
    // the operator refuses a row of which no token has come
    for case in Case::all(&oracle).into_iter().filter(|case| feed == Feed::AtOnce || case.name != "left") {
        let base = logits(&library, &path, head_dim, &case, feed);
        let found = logits(&library, &folded.join("model.onnx"), head_dim, &case, feed);
        let expected = match query {
            Query::PostRope => stored(&case, "adapted_logits"),
            // PyTorch's are of the rotated query
            Query::PreRope => {
                let input = Input::new(case.batch, &case.ids, &case.mask, None).unwrap();
                array(&decoder.forward(&input, None, hook.as_ref()).unwrap())
            }
        };
        let base = row_distances(&case, &base, &stored(&case, "base_logits"));
        let moved = row_distances(&case, &expected, &stored(&case, "base_logits"));
        let adapted = row_distances(&case, &found, &expected);
        eprintln!("{graph} {feed:?} {query:?} {}: base {base:?} adapted {adapted:?}", case.name);
        assert!(moved.iter().all(|moved| *moved > 0.1), "{graph}: the adapter says nothing");
        let within: Vec<_> = base.iter().zip(&adapted).filter(|(base, _)| **base < TOLERANCE).collect();
        reached.push(within.len().to_string());
        assert!(within.iter().all(|(_, adapted)| **adapted < TOLERANCE), "{graph} {feed:?} {query:?} {}", case.name);
    }
    Some(reached.join(" "))
}

fn expect(graphs: &[(&str, &str)], feed: Feed, query: Query) {
    for (graph, expected) in graphs {
        if let Some(reached) = fold_and_compare(graph, feed, query) {
            assert_eq!(reached, *expected, "{graph} {feed:?} {query:?}");
        }
    }
}

/// The operator counts a row's positions from its start, so that the padded row of `left` is another function in these graphs.
const GENAI: [(&str, &str); 3] =
    [("genai_fp32/llama_gqa", "1 1 2"), ("genai_fp32/phi3", "1 1 2"), ("genai_fp32/qwen2", "1 1 2")];

#[test]
fn graphs_of_the_genai_builder_carry_an_adapter() {
    expect(&GENAI, Feed::AtOnce, Query::PostRope);
    expect(&GENAI.map(|(graph, _)| (graph, "1 2")), Feed::Steps, Query::PostRope);
}

#[test]
fn graphs_of_the_genai_builder_carry_an_adapter_of_the_unrotated_query() {
    expect(&GENAI, Feed::AtOnce, Query::PreRope);
    expect(&GENAI.map(|(graph, _)| (graph, "1 2")), Feed::Steps, Query::PreRope);
}

/// In half precision the builder rotates before the operator and repeats keys and values for MultiHeadAttention. What rounding
/// does to the adapted logits is what it does to the base graph's.
#[test]
fn multi_head_attention_in_half_precision_carries_an_adapter() {
    let (Some(library), Some(oracle)) = (runtime(), shared("oracles/llama_gqa")) else { return };
    let graph = fixture("graphs/genai_fp16/llama_gqa/model.onnx");
    let scratch = tempfile::tempdir().unwrap();
    let folded = fold_folder(&graph, &oracle.join("adapter.safetensors"), scratch.path()).unwrap();
    assert!(folded.sites.iter().all(|site| site.shape == "multi_head_attention"));
    // at once: with a past, ONNX Runtime finds the declared shapes of the base graph's repeated keys to be wrong
    for case in Case::all(&oracle) {
        let base = logits(&library, &graph, 16, &case, Feed::AtOnce);
        let found = logits(&library, &scratch.path().join("model.onnx"), 16, &case, Feed::AtOnce);
        let base = row_distances(&case, &base, &stored(&case, "base_logits"));
        let adapted = row_distances(&case, &found, &stored(&case, "adapted_logits"));
        eprintln!("half {}: base {base:?} adapted {adapted:?}", case.name);
        let most = base.iter().fold(0.0, |most: f32, x| most.max(*x));
        assert!(most < 0.02 && adapted.iter().all(|distance| *distance < 2.0 * most), "{}", case.name);
    }
}

/// Every layer turns its query by the same positions: they are counted once.
#[test]
fn layers_share_their_positions() {
    let graph = (shared("graphs/genai_fp32/llama_gqa/model.onnx"), shared("oracles/llama_gqa/adapter.safetensors"));
    let (Some(graph), Some(adapter)) = graph else { return };
    let scratch = tempfile::tempdir().unwrap();
    fold_folder(&graph, &adapter, scratch.path()).unwrap();
    let model = Model::open(scratch.path()).unwrap();
    let count = |prefix: &str| model.graph().nodes().iter().filter(|node| node.name().starts_with(prefix)).count();
    assert_eq!(count("/prefold.1/positions("), 9);
    assert_eq!((count("/prefold.1/layers.0/query/"), count("/prefold.1/layers.1/query/")), (4, 4));
}

/// Positions of these graphs are the first row's, where the operator rotates.
const FUSED: [(&str, &str); 4] = [
    ("hf_onnx_ortfused/gpt2", "1 2 2"),
    ("hf_onnx_ortfused/llama_gqa", "1 1 1"),
    ("hf_onnx_ortfused/phi3", "1 1 1"),
    ("hf_onnx_ortfused/qwen2", "1 1 1"),
];

#[test]
fn graphs_that_transformers_fused_carry_an_adapter() {
    expect(&FUSED, Feed::AtOnce, Query::PostRope);
    expect(&FUSED, Feed::AtOnce, Query::PreRope);
}

const DYNAMO: [(&str, &str); 8] = [
    ("torch_dynamo23/gemma3", "1 2 2"),
    ("torch_dynamo23/gpt2", "1 2 2"),
    ("torch_dynamo23/gpt_neox", "1 2 2"),
    ("torch_dynamo23/llama_gqa", "1 2 2"),
    ("torch_dynamo23/llama_mha", "1 2 2"),
    ("torch_dynamo23/mistral", "1 2 2"),
    ("torch_dynamo23/phi3", "1 2 2"),
    ("torch_dynamo23/qwen2", "1 2 2"),
];

#[test]
fn graphs_with_the_standard_attention_operator_carry_an_adapter() {
    expect(&DYNAMO, Feed::AtOnce, Query::PostRope);
    expect(&DYNAMO, Feed::AtOnce, Query::PreRope);
}

/// Logits of a graph of the genai builder with an adapter, by other means: each layer's packed projection is read from the
/// graph, its query turned and multiplied here, and the term fed to the next run.
fn by_injection(library: &Path, graph: &Path, adapter: &Adapter, case: &Case) -> Array3<f32> {
    let model = Model::open(graph).unwrap();
    let index = Index::new(model.graph());
    let sites = locate::sites(&model).unwrap();
    let unknown = || [Dim::Unknown, Dim::Unknown, Dim::Unknown];
    let mut patch = Patch::new("open the sites");
    for site in &sites {
        let (fed, sum) = (format!("term.{}", site.layer), format!("sum.{}", site.layer));
        patch.add_output(ValueDef::new(site.query.as_str(), DataType::Float, unknown()));
        patch.add_input(ValueDef::new(fed.as_str(), DataType::Float, unknown()));
        let add = NodeDef::new("Add", sum.as_str()).inputs([site.output.as_str(), &fed]).outputs([sum.as_str()]);
        patch.insert_before(site.readers[0].node, add);
        for reader in &site.readers {
            patch.replace_input(reader.node, reader.slot, sum.as_str());
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    let folder = graph.parent().unwrap();
    std::fs::copy(folder.join("model.onnx.data"), scratch.path().join("model.onnx.data")).unwrap();
    patch.apply(&model).unwrap().save(&scratch.path().join("model.onnx")).unwrap();
    let options = OrtOptions { threads: Some(1), ..OrtOptions::default() };
    let mut session = OrtSession::open(library, &scratch.path().join("model.onnx"), options).unwrap();

    let (heads, dim) = (adapter.config().num_heads, adapter.config().head_dim);
    let (seq, half) = (case.ids.len() / case.batch, dim / 2);
    let table = |name: &str| index.initializer(name).unwrap().data_in(folder).unwrap().to_f32s().unwrap();
    let (cos, sin) = (table("cos_cache"), table("sin_cache"));
    let integers = |values: &[i64]| ArrayD::from_shape_vec(vec![case.batch, seq], values.to_vec()).unwrap();
    let mut feeds =
        NamedValues::new().with("input_ids", integers(&case.ids)).with("attention_mask", integers(&case.mask));
    for port in session.inputs().iter().filter(|port| port.name.starts_with("past")) {
        let prefold::runtime::Dim::Fixed(kv_heads) = port.dims[1] else { panic!("{port}") };
        feeds.insert(&port.name, ArrayD::<f32>::zeros(vec![case.batch, kv_heads, 0, dim]));
    }
    for site in &sites {
        feeds.insert(format!("term.{}", site.layer), ArrayD::<f32>::zeros(vec![case.batch, seq, heads * dim]));
    }
    for site in &sites {
        let packed = session.run(feeds.clone()).unwrap().take(&site.query).unwrap().into_f32().unwrap();
        let matrix = &adapter.tensors()[&format!("layers.{}.M", site.layer)];
        let matrix = array(matrix);
        let mut term = ArrayD::<f32>::zeros(vec![case.batch, seq, heads * dim]);
        for (row, at, head) in places(case.batch, seq, heads) {
            let x = |i: usize| packed[[row, at, head * dim + i]];
            let turned = |i: usize| {
                let (c, s) = (cos[at * half + i % half], sin[at * half + i % half]);
                if i < half { x(i) * c - x(i + half) * s } else { x(i) * c + x(i - half) * s }
            };
            for i in 0..dim {
                let q = turned(i);
                let phi = if q > 0.0 { q } else { q.exp_m1() };
                for o in 0..dim {
                    term[[row, at, head * dim + o]] += phi * matrix[[head, i, o]];
                }
            }
        }
        feeds.insert(format!("term.{}", site.layer), term);
    }
    let logits = session.run(feeds).unwrap().take("logits").unwrap().into_f32().unwrap();
    logits.into_dimensionality().unwrap()
}

fn places(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| (i, j, k))))
}

/// The weights are integers, the attention computes in floats: what the adapter adds is what was computed by other means.
#[test]
fn a_graph_with_int4_weights_carries_the_same_term() {
    for graph in ["genai_fp32/llama_gqa", "genai_int4/llama_gqa"] {
        let paths = (runtime(), shared(&format!("graphs/{graph}/model.onnx")), shared("oracles/llama_gqa"));
        let (Some(library), Some(path), Some(oracle)) = paths else { return };
        let scratch = tempfile::tempdir().unwrap();
        let adapter = oracle.join("adapter.safetensors");
        fold_folder(&path, &adapter, scratch.path()).unwrap();
        let adapter = Adapter::open(&adapter).unwrap();
        for case in Case::all(&oracle) {
            let expected = by_injection(&library, &path, &adapter, &case);
            let found = logits(&library, &scratch.path().join("model.onnx"), 16, &case, Feed::AtOnce);
            let base = logits(&library, &path, 16, &case, Feed::AtOnce);
            let distances = row_distances(&case, &found, &expected);
            eprintln!("{graph} {}: {distances:?}", case.name);
            assert!(row_distances(&case, &base, &expected).iter().all(|moved| *moved > 0.1));
            assert!(distances.iter().all(|distance| *distance < TOLERANCE), "{graph} {}: {distances:?}", case.name);
        }
    }
}

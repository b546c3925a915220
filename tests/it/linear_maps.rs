//! Linear maps found in anybody's graph, and LoRA beside them: against candle's adapted logits, and in quantised graphs against the
//! same branch put in by names (`fixtures/quantized/make.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use ndarray::Array2;
use prefold::adapter::{Adapter, AdapterConfig, Lora, Method, Start, TensorSpec};
use prefold::base::{Checkpoint, Decoder, DecoderSpec, Input, NoHook, SiteHook};
use prefold::fold::locate::projections::{Projections, WeightStorage};
use prefold::fold::{fold_folder, locate};
use prefold::onnx::{Index, Model};
use prefold::runtime::{GraphDecoder, Optimization, OrtOptions, OrtSession, library};

use crate::support::{fixture, shared};

fn lora(spec: &DecoderSpec, dora: bool, scale: f64) -> Adapter {
    let lora = Lora { rank: 3, dora, ..Lora::default() };
    let targets = spec.linears().map(Into::into).collect();
    let config = AdapterConfig::new(Method::Lora(Lora { targets: Some(targets), ..lora }), spec, None);
    let tensors = config.method.as_method().tensors(&config).unwrap().into_iter().map(|(name, spec)| {
        let start = spec.tensor(&name, 1).unwrap();
        let noise = TensorSpec::new(spec.shape, Start::Normal(scale)).tensor(&format!("{name} moved"), 1).unwrap();
        (name, (start + noise).unwrap())
    });
    let tensors = tensors.collect();
    Adapter::new(config, tensors).unwrap()
}

/// Every graph of other exporters whose sites are found, with its oracle.
fn graphs() -> Vec<(String, PathBuf, PathBuf)> {
    // an activation inside a product hides what a branch would be added to
    let mut tools = crate::foreign::of_tools();
    tools.retain(|(name, ..)| name != "ort_extended/opt");
    let (Some(graphs), Some(oracles)) = (shared("graphs"), shared("oracles")) else { return tools };
    let folders = |path: &Path| std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    let all = folders(&graphs).into_iter().flat_map(|exporter| folders(&exporter));
    let mut found: Vec<_> = all
        .filter(|graph| graph.join("model.onnx").is_file() && locate::sites(&Model::open(graph).unwrap()).is_ok())
        .map(|graph| (graph.display().to_string(), graph.clone(), oracles.join(graph.file_name().unwrap())))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no site is found in any graph");
    found.extend(tools);
    found
}

#[test]
fn every_map_of_foreign_graphs_is_found_by_data_flow() {
    let graphs = graphs();
    let mut families = Vec::new();
    for (name, graph, oracle) in graphs {
        let checkpoint = Checkpoint::open(&oracle).unwrap();
        let spec = checkpoint.spec();
        let model = Model::open(&graph).unwrap();
        let adapter = lora(spec, false, 0.1);
        let found = Projections::find(&Index::new(model.graph()), &locate::sites(&model).unwrap(), adapter.config());
        let index = Index::new(model.graph());
        for layer in 0..spec.num_layers {
            for linear in spec.linears() {
                let map = found.get(layer, linear).unwrap_or_else(|e| panic!("{name}: {e}"));
                if map.node.storage != WeightStorage::Float {
                    continue;
                }
                // the values are evidence: they are the checkpoint's
                let weight = index.initializer(&map.node.weight).unwrap();
                let [rows, columns] = weight.dims() else { panic!("{name}: {:?}", weight.dims()) };
                let values = weight.data_in(&graph).unwrap().to_f32s().unwrap();
                let at = |out: usize, x: usize| match map.node.transposed {
                    true => values[out * *columns as usize + x],
                    false => values[x * *columns as usize + out],
                };
                assert!(*rows > 0);
                let role = prefold::base::WeightRole::Weight(layer, linear);
                let expected = checkpoint.weight(role).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
                for (output, row) in expected.iter().enumerate() {
                    let column = map.columns.as_ref().map_or(output, |columns| columns[output]);
                    for (x, value) in row.iter().enumerate() {
                        assert!((at(column, x) - value).abs() < 1e-3, "{name}: {layer} {linear:?} [{output}, {x}]");
                    }
                }
            }
        }
        families.push(oracle.file_name().unwrap().to_owned());
    }
    families.sort();
    families.dedup();
    eprintln!("{families:?}");
}

type Logits = Vec<f64>;

fn prefill(
    decoder: &mut GraphDecoder<Box<dyn prefold::runtime::Session>>,
    ids: &Array2<i64>,
    mask: &Array2<i64>,
) -> Logits {
    decoder.reset();
    decoder.prefill(ids, mask).unwrap().into_iter().map(f64::from).collect()
}

fn ort(graph: &Path, head_dim: usize) -> Option<GraphDecoder<Box<dyn prefold::runtime::Session>>> {
    open(graph, head_dim, Optimization::All)
}

fn open(
    graph: &Path,
    head_dim: usize,
    optimization: Optimization,
) -> Option<GraphDecoder<Box<dyn prefold::runtime::Session>>> {
    let Ok(library) = library::find(None, &prefold::files::cache_folder().unwrap()) else {
        eprintln!("skipped: no ONNX Runtime here (prefold runtime install)");
        return None;
    };
    let options = OrtOptions { threads: Some(1), optimization, ..OrtOptions::default() };
    let session = OrtSession::open(&library, &graph.join("model.onnx"), options).unwrap();
    let session = Box::new(session) as Box<dyn prefold::runtime::Session>;
    Some(GraphDecoder::with_head_dim(session, head_dim).unwrap())
}

/// Largest difference where the mask is 1.
fn distance(found: &[f64], expected: &[f64], mask: &Array2<i64>) -> f64 {
    assert_eq!(found.len(), expected.len());
    let vocab = found.len() / mask.len();
    let rows = found.chunks(vocab).zip(expected.chunks(vocab)).zip(mask.iter()).filter(|(_, m)| **m == 1);
    rows.flat_map(|((f, e), _)| f.iter().zip(e).map(|(f, e)| (f - e).abs())).fold(0.0, f64::max)
}

fn candle(decoder: &Decoder, hook: &dyn SiteHook, ids: &Array2<i64>, mask: &Array2<i64>) -> Logits {
    let flat = |x: &Array2<i64>| x.iter().copied().collect::<Vec<_>>();
    let input = Input::new(ids.nrows(), &flat(ids), &flat(mask), None).unwrap();
    decoder.forward(&input, None, hook).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
}

#[test]
fn lora_in_foreign_graphs_is_candle_s() {
    let ids = Array2::from_shape_fn((2, 7), |(row, column)| ((row * 31 + column * 17 + 3) % 36) as i64);
    let mut right = Array2::<i64>::ones((2, 7));
    (right[[1, 5]], right[[1, 6]]) = (0, 0);
    let mut left = Array2::<i64>::ones((2, 7));
    (left[[1, 0]], left[[1, 1]]) = (0, 0);
    for (name, graph, oracle) in graphs() {
        let checkpoint = Checkpoint::open(&oracle).unwrap();
        let head_dim = checkpoint.spec().attention.head_dim;
        let Some(mut base) = ort(&graph, head_dim) else { return };
        let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
        for dora in [false, true] {
            let scratch = tempfile::tempdir().unwrap();
            let (own, out) = (scratch.path().join("adapter"), scratch.path().join("folded"));
            std::fs::create_dir(&own).unwrap();
            std::fs::create_dir(&out).unwrap();
            let adapter = lora(checkpoint.spec(), dora, 0.1);
            adapter.save(&own).unwrap();
            match fold_folder(&graph, &own, &out) {
                // the norms of DoRA are those of a float weight
                Err(error) if dora && error.to_string().contains("which is quantised") => continue,
                folded => drop(folded.unwrap_or_else(|error| panic!("{name}: {error}"))),
            }
            let mut folded = ort(&out, head_dim).unwrap();
            let hook = adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap();
            for (padding, mask) in [("right", &right), ("left", &left)] {
                let plain = distance(&prefill(&mut base, &ids, mask), &candle(&decoder, &NoHook, &ids, mask), mask);
                let expected = candle(&decoder, &*hook, &ids, mask);
                let found = prefill(&mut folded, &ids, mask);
                let adapted = distance(&found, &expected, mask);
                let effect = distance(&found, &candle(&decoder, &NoHook, &ids, mask), mask);
                eprintln!("{name} dora {dora} {padding}: base {plain:.1e}, adapted {adapted:.1e}, effect {effect:.1e}");
                assert!(effect > 0.1, "{name}");
                assert!(plain > 1e-4 || adapted < 1e-4, "{name} {padding}: {adapted:.1e}");
            }
        }
    }
}

fn io(folder: &Path) -> BTreeMap<String, Tensor> {
    candle_core::safetensors::load(folder.join("io.safetensors"), &Device::Cpu).unwrap().into_iter().collect()
}

#[test]
fn lora_beside_quantised_products_is_what_names_say() {
    for name in ["int4", "int8_dynamic", "int8_qdq"] {
        let graph = fixture("quantized").join(name);
        let io = io(&graph);
        let integers =
            |name: &str| Array2::from_shape_vec((2, 9), io[name].flatten_all().unwrap().to_vec1().unwrap()).unwrap();
        let (ids, mask) = (integers("input_ids"), integers("attention_mask"));
        let stored =
            |name: &str| -> Logits { io[name].to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap() };
        // as written, as the recipe ran it: an optimiser may round int8 activations elsewhere
        let head_dim = Checkpoint::open(&fixture("oracles/llama_bias")).unwrap().spec().attention.head_dim;
        let Some(mut base) = open(&graph, head_dim, Optimization::Off) else { return };
        let plain = prefill(&mut base, &ids, &mask);
        assert!(distance(&plain, &stored("logits"), &mask) < 1e-4, "{name}");
        for adapter in ["lora", "rslora"] {
            let scratch = tempfile::tempdir().unwrap();
            fold_folder(&graph, &fixture("peft").join(adapter), scratch.path()).unwrap();
            let found = prefill(&mut open(scratch.path(), head_dim, Optimization::Off).unwrap(), &ids, &mask);
            let adapted = distance(&found, &stored(&format!("logits.{adapter}")), &mask);
            let effect = distance(&found, &plain, &mask);
            eprintln!("{name} {adapter}: {adapted:.1e}, effect {effect:.1e}");
            assert!(adapted < 1e-4 && effect > 1.0, "{name} {adapter}: {adapted:.1e}");
        }
    }
}

/// ONNX Runtime puts OPT's ReLU into its product.
#[test]
fn a_map_with_an_activation_inside_is_named() {
    let checkpoint = Checkpoint::open(&fixture("oracles/opt")).unwrap();
    let model = Model::open(&fixture("graphs/ort_extended/opt/model.onnx")).unwrap();
    let adapter = lora(checkpoint.spec(), false, 0.1);
    let index = Index::new(model.graph());
    let found = Projections::find(&index, &locate::sites(&model).unwrap(), adapter.config());
    for layer in 0..checkpoint.spec().num_layers {
        for linear in checkpoint.spec().linears() {
            let map = found.get(layer, linear).map_err(|error| error.to_string());
            if linear != prefold::base::Linear::Up {
                map.unwrap();
                continue;
            }
            let error = map.unwrap_err();
            assert!(error.contains("(FusedGemm) stands in its place: an activation is inside it"), "{error}");
        }
    }
}

/// With B = 0 the branch adds zeros: no logit moves, float or quantised.
#[test]
fn a_zero_lora_changes_no_logit() {
    let quantized = ["int4", "int8_dynamic", "int8_qdq"].map(|name| fixture("quantized").join(name));
    let oracle = fixture("oracles/llama_bias");
    let foreign = graphs().into_iter().map(|(_, graph, oracle)| (graph, oracle));
    for (graph, oracle) in quantized.map(|graph| (graph, oracle.clone())).into_iter().chain(foreign) {
        let checkpoint = Checkpoint::open(&oracle).unwrap();
        let head_dim = checkpoint.spec().attention.head_dim;
        let Some(mut base) = ort(&graph, head_dim) else { return };
        let adapter = lora(checkpoint.spec(), false, 0.0);
        let tensors = adapter.tensors().iter().map(|(name, t)| match name.ends_with("lora_B") {
            true => (name.clone(), t.zeros_like().unwrap()),
            false => (name.clone(), t.clone()),
        });
        let zero = Adapter::new(adapter.config().clone(), tensors.collect()).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let (own, out) = (scratch.path().join("adapter"), scratch.path().join("folded"));
        std::fs::create_dir(&own).unwrap();
        std::fs::create_dir(&out).unwrap();
        zero.save(&own).unwrap();
        fold_folder(&graph, &own, &out).unwrap();
        let ids = Array2::from_shape_fn((2, 7), |(row, column)| ((row * 5 + column * 7 + 3) % 36) as i64);
        let mask = Array2::<i64>::ones((2, 7));
        let (before, after) =
            (prefill(&mut base, &ids, &mask), prefill(&mut ort(&out, head_dim).unwrap(), &ids, &mask));
        assert!(before == after, "{}: {:.1e}", graph.display(), distance(&after, &before, &mask));
    }
}

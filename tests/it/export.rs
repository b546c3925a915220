//! Every option of a decoder and every family as a graph in both dialects, with an adapter folded in, against candle in float64.

mod options;

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use prefold::adapter::{self, Adapter, AdapterConfig};
use prefold::base::{
    Checkpoint, Decoder, DecoderSpec, Input, LearnedPositions, LongContext, NoHook, Rotary, WeightRole, WeightShape,
};
use prefold::export::{Dialect, ExportOptions, Precision, export_weights};
use prefold::fold::fold_folder;
use prefold::onnx::Model;
use prefold::parity::{
    self, Budget, Candidate, CaseOptions, Check, Facts, NoOpPair, Open, Padding, Reference, generated_prompts,
    standard_cases,
};
use prefold::runtime::{
    GraphDecoder, NamedValues, Optimization, OrtOptions, OrtSession, TractOptions, TractSession, library,
};
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

use self::options::{COMBINATIONS, Change, OPTIONS, spec};
use crate::oracles::every_family;

type Opener = fn(&Path) -> Open<'_>;

type Weights<'a> = dyn Fn(&WeightShape) -> prefold::base::Result<Tensor> + 'a;

/// A weight of about the size of a trained one's, the same for the same name.
fn weight(spec: &DecoderSpec, weight: &WeightShape) -> Tensor {
    let norms = spec.norms();
    let norm = match weight.role {
        WeightRole::Norm(_, site) => norms.iter().find(|(known, _)| *known == site).map(|(_, norm)| *norm),
        WeightRole::FinalNorm => Some(spec.norm),
        _ => None,
    };
    let noise = (noise(&weight.name, &weight.shape) * 0.5).unwrap();
    norm.map_or(noise.clone(), |norm| (noise + (1.0 - norm.weight_offset)).unwrap())
}

/// Numbers between −1 and 1 in float64.
fn noise(name: &str, shape: &[usize]) -> Tensor {
    let seed = name.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(257).wrapping_add(byte.into()));
    let mut random = rand_pcg::Pcg64Mcg::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| random.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn decoder(spec: &DecoderSpec, weights: &Weights<'_>, dtype: DType) -> Decoder {
    Decoder::from_weights(spec, |shape| Ok(weights(shape)?.to_dtype(dtype).unwrap())).unwrap()
}

fn adapter(spec: &DecoderSpec, scale: f64) -> Adapter {
    let config = AdapterConfig::prefix_plus(spec, None);
    let tensors = adapter::shapes(&config).into_iter().map(|(name, shape)| {
        let tensor = (noise(&name, &shape) * scale).unwrap().to_dtype(DType::F32).unwrap();
        (name, tensor)
    });
    let tensors = tensors.collect();
    Adapter::new(config, tensors).unwrap()
}

/// The graph as it is and with adapters of two scales, in folders of these names.
fn graphs(spec: &DecoderSpec, weights: &Weights<'_>, options: &ExportOptions, folder: &Path) {
    let base = folder.join("base");
    std::fs::create_dir_all(&base).unwrap();
    export_weights(spec, weights, options, &base).unwrap();
    for (name, scale) in [("zero", 0.0), ("adapted", 0.3)] {
        let (trained, folded) = (folder.join(format!("{name}_adapter")), folder.join(name));
        std::fs::create_dir(&trained).unwrap();
        std::fs::create_dir(&folded).unwrap();
        adapter(spec, scale).save(&trained).unwrap();
        let facts = fold_folder(&base, &trained, &folded).unwrap();
        assert_eq!(facts.sites.len(), spec.num_layers);
        let either = !options.right_padding_only;
        assert_eq!(facts.exactness.holds_left_padded(), either, "{options:?}: {:?}", facts.exactness);
    }
}

/// ONNX Runtime without optimisation, which leaves nothing that a zero adapter could disturb.
const AS_WRITTEN: &str = "onnxruntime, as written";

/// How a graph can be opened here: tract for the portable dialect, ONNX Runtime with and without optimisation.
fn runtimes(dialect: Dialect) -> Vec<(&'static str, Opener)> {
    fn ort(graph: &Path, optimization: Optimization) -> Open<'_> {
        let options = OrtOptions { optimization, threads: Some(1), ..OrtOptions::default() };
        let library = library::find(None, &prefold::files::cache_folder().unwrap()).unwrap();
        Box::new(move || Ok(Box::new(OrtSession::open(&library, graph, options)?)))
    }
    let mut runtimes: Vec<(&'static str, Opener)> = Vec::new();
    if dialect == Dialect::Portable {
        runtimes.push(("tract", |graph| {
            Box::new(move || Ok(Box::new(TractSession::open(graph, TractOptions::default())?)))
        }));
    }
    if library::find(None, &prefold::files::cache_folder().unwrap()).is_ok() {
        runtimes.push(("onnxruntime, optimized", |graph| ort(graph, Optimization::All)));
        runtimes.push((AS_WRITTEN, |graph| ort(graph, Optimization::Off)));
    } else {
        eprintln!("skipped: no ONNX Runtime here (prefold runtime install)");
    }
    runtimes
}

/// What is wrong with the graphs of a decoder in both dialects; nothing where all is well.
fn failures(spec: &DecoderSpec, weights: &Weights<'_>, precision: Precision) -> Vec<String> {
    let ways =
        [Dialect::Portable, Dialect::Ort].map(|dialect| ExportOptions { dialect, precision, ..Default::default() });
    failures_of(spec, weights, &ways)
}

/// The same where rows end in padding or have none.
fn right_failures(spec: &DecoderSpec, weights: &Weights<'_>, precision: Precision) -> Vec<String> {
    let way = ExportOptions { dialect: Dialect::Ort, precision, right_padding_only: true, ..Default::default() };
    failures_of(spec, weights, &[way])
}

/// What is wrong with the graphs that are exported in some ways of one precision and padding.
fn failures_of(spec: &DecoderSpec, weights: &Weights<'_>, ways: &[ExportOptions]) -> Vec<String> {
    let ExportOptions { precision, right_padding_only, .. } = ways[0];
    let adapter = adapter(spec, 0.3);
    let hook = adapter.hook(spec, &Device::Cpu).unwrap();
    let options = CaseOptions { seed: 7, lengths: vec![12, 5, 8], steps: 4 };
    let mut cases = standard_cases(&generated_prompts(spec, &options), options.steps).unwrap();
    cases.retain(|case| !right_padding_only || case.padding() != Some(Padding::Left));
    let exact = decoder(spec, weights, DType::F64);
    let reference = Reference::compute(parity::Model { decoder: &exact, hook: &*hook }, cases).unwrap();
    let model = decoder(spec, weights, precision.dtype());
    let budget = Budget::of(precision.dtype(), spec).unwrap();
    let mut check = Check::new(reference, parity::Model { decoder: &model, hook: &*hook }, budget).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for way in ways {
        let dialect = way.dialect;
        let folder = folder.path().join(dialect.to_string());
        graphs(spec, weights, way, &folder);
        let graph = |name: &str| folder.join(name).join("model.onnx");
        let (base, zero, adapted) = (graph("base"), graph("zero"), graph("adapted"));
        for (runtime, open) in runtimes(dialect) {
            let name = format!("{dialect}, {runtime}");
            check.run(Candidate { name: name.clone(), open: open(&adapted) });
            if runtime != AS_WRITTEN {
                check.no_op(NoOpPair { name, base: open(&base), folded: open(&zero) });
            }
        }
    }
    let report = check.report(Facts { command: "cargo test".into(), ..Facts::default() }).unwrap();
    let rows = report.rows().into_iter().filter_map(|row| Some(format!("{}, {}: {}", row.run, row.case, row.failure?)));
    let tract = report.runs.iter().filter_map(|run| run.runtime.as_ref()).filter(|info| info.runtime == "tract");
    rows.chain(tract.map(|info| info.optimization.clone()).filter(|plan| !plan.contains("symbolic"))).collect()
}

/// Runs all subjects and fails with everything that is wrong with any.
fn check<T: Sync>(subjects: &[T], failures: impl Fn(&T) -> (String, Vec<String>) + Sync) {
    let all: Vec<String> = subjects
        .par_iter()
        .flat_map_iter(|subject| {
            let (name, failures) = failures(subject);
            eprintln!("{name}: {} failures", failures.len());
            failures.into_iter().map(move |failure| format!("{name}: {failure}"))
        })
        .collect();
    assert!(all.is_empty(), "{}", all.join("\n"));
}

fn option_failures((name, change): &(&str, Change), precision: Precision) -> (String, Vec<String>) {
    let spec = spec(*change);
    (name.to_string(), failures(&spec, &|shape| Ok(weight(&spec, shape)), precision))
}

#[test]
fn every_option_is_exported_folded_and_computes_what_candle_computes() {
    check(OPTIONS, |option| option_failures(option, Precision::F32));
}

/// A model without one thing that its description says gives other logits: the cases above see it.
#[test]
fn nothing_that_an_option_says_is_without_effect() {
    let without: &[(&str, Change)] = &[
        ("window", |s| s.layers.iter_mut().for_each(|layer| layer.window = None)),
        ("soft cap of scores", |s| s.attention.softcap = None),
        ("soft cap of logits", |s| s.head.softcap = None),
        ("scale of logits", |s| s.head.scale = 1.0),
        ("scale of scores", |s| s.attention.scale = 1.0),
        ("scale of the embedding", |s| s.embedding.scale = None),
        ("residual scale", |s| s.residual_scale = 1.0),
        ("length-dependent frequencies", |s| {
            s.attention.rotary.iter_mut().for_each(|rotary| rotary.long = LongContext::Same);
        }),
        ("attention factor", |s| s.attention.rotary.iter_mut().for_each(|rotary| rotary.attention_factor = 1.0)),
        ("interleaving", |s| s.attention.rotary.iter_mut().for_each(|rotary| rotary.interleaved = false)),
        ("rotation", |s| s.layers.iter_mut().for_each(|layer| layer.rotary = None)),
        ("query-key norm", |s| s.attention.qk_norm = None),
        ("biases of queries, keys and values", |s| s.attention.qkv_bias = false),
        ("bias of the output projection", |s| s.attention.output_bias = false),
        ("biases of the MLP", |s| s.mlp.bias = false),
        ("bias of the head", |s| s.head.bias = false),
        ("bias of norms", |s| s.norm.bias = false),
        ("final norm", |s| s.final_norm = false),
        ("learned positions", |s| s.embedding.positions = None),
    ];
    let logits = |option: &DecoderSpec, spec: &DecoderSpec| {
        let ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8];
        let decoder = decoder(spec, &|shape| Ok(weight(option, shape)), DType::F64);
        let logits = decoder.forward(&Input::row(&ids).unwrap(), None, &NoHook).unwrap();
        logits.flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    for (name, change) in OPTIONS.iter().chain(COMBINATIONS) {
        let spec = spec(*change);
        let whole = logits(&spec, &spec);
        for (what, remove) in without {
            let mut less = spec.clone();
            remove(&mut less);
            if less != spec {
                let distance = logits(&spec, &less).iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(distance > 1e-3, "{name}: without {what} the logits move by {distance:.1e}");
            }
        }
    }
}

/// A decoder with heads four times as wide: GroupQueryAttention rotates multiples of 16.
fn wide(change: Change) -> DecoderSpec {
    let widen = |frequencies: &mut Vec<f32>| {
        *frequencies = frequencies.iter().flat_map(|f| [1.0, 0.9, 0.8, 0.7].map(|factor| f * factor)).collect();
    };
    let mut spec = spec(change);
    spec.attention.head_dim *= 4;
    for rotary in &mut spec.attention.rotary {
        rotary.dim *= 4;
        widen(&mut rotary.inv_freq);
        if let LongContext::Switched { inv_freq, .. } = &mut rotary.long {
            widen(inv_freq);
        }
    }
    spec
}

fn is_rotated_inside(spec: &DecoderSpec) -> bool {
    let fits = |size: usize| size.is_multiple_of(16);
    spec.attention.head_dim.is_multiple_of(8)
        && spec.attention.rotary.iter().all(|rotary| fits(rotary.dim) && fits(spec.attention.head_dim))
}

#[test]
fn for_padding_on_the_right_alone_the_operator_rotates_and_counts() {
    for (options, precision) in [(OPTIONS, Precision::F32), (COMBINATIONS, Precision::F16)] {
        let options: Vec<_> = options.iter().filter(|(_, change)| is_rotated_inside(&wide(*change))).collect();
        check(&options, |(name, change)| {
            let spec = wide(*change);
            (name.to_string(), right_failures(&spec, &|shape| Ok(weight(&spec, shape)), precision))
        });
    }
    let mut families = 0;
    for folder in every_family() {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let spec = checkpoint.spec();
        if is_rotated_inside(spec) {
            let failures = right_failures(spec, &|shape| checkpoint.weight(shape.role), Precision::F32);
            assert!(failures.is_empty(), "{}: {}", folder.display(), failures.join("\n"));
            families += 1;
        }
    }
    assert!(families >= 3, "{families}");
}

/// The operator leaves no hole where a row's padding was: each row is as it would be alone.
#[test]
fn rows_padded_on_the_right_are_continued_as_each_alone() {
    let Ok(library) = library::find(None, &prefold::files::cache_folder().unwrap()) else {
        return eprintln!("skipped: no ONNX Runtime here (prefold runtime install)");
    };
    let spec = wide(|_| {});
    let weights = |shape: &WeightShape| Ok(weight(&spec, shape));
    let folder = tempfile::tempdir().unwrap();
    let options = ExportOptions { dialect: Dialect::Ort, right_padding_only: true, ..ExportOptions::default() };
    graphs(&spec, &weights, &options, folder.path());
    let graph = folder.path().join("adapted/model.onnx");
    let session = OrtSession::open(&library, &graph, OrtOptions { threads: Some(1), ..Default::default() }).unwrap();
    let mut graph = GraphDecoder::new(session).unwrap();
    let (adapter, decoder) = (adapter(&spec, 0.3), decoder(&spec, &weights, DType::F64));
    let hook = adapter.hook(&spec, &Device::Cpu).unwrap();
    let mut rows = [vec![3u32, 1, 4, 1, 5], vec![9, 2]];
    let (ids, mask) = ([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]], [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]);
    graph.prefill(&ndarray::arr2(&ids), &ndarray::arr2(&mask)).unwrap();
    for next in [[6u32, 5], [3, 5], [8, 9]] {
        let found = graph.step(&next.map(i64::from)).unwrap();
        for ((row, token), found) in rows.iter_mut().zip(next).zip(found.rows()) {
            row.push(token);
            let logits = decoder.forward(&Input::row(row).unwrap(), None, &*hook).unwrap();
            let logits = logits.squeeze(0).unwrap().to_vec2::<f64>().unwrap().pop().unwrap();
            let distance = found.iter().zip(logits).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(distance < 1e-4, "{row:?}: {distance:.1e}");
        }
    }
}

#[test]
fn what_the_operator_cannot_count_or_rotate_is_refused() {
    let refused = |spec: &DecoderSpec, dialect| {
        let options = ExportOptions { dialect, right_padding_only: true, ..ExportOptions::default() };
        let folder = tempfile::tempdir().unwrap();
        let weights = |shape: &WeightShape| Ok(weight(spec, shape));
        let error = export_weights(spec, weights, &options, folder.path()).unwrap_err().to_string();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        error
    };
    let error = refused(&wide(|_| {}), Dialect::Portable);
    assert!(error.ends_with("the portable dialect has no operator that counts the tokens of a row"), "{error}");
    let error = refused(&spec(|_| {}), Dialect::Ort);
    assert!(error.contains("8 elements of heads 8 wide are rotated"), "{error}");
    let error = refused(&wide(|s| s.max_positions = usize::MAX), Dialect::Ort);
    assert!(error.contains("positions, and a table of angles holds at most 2097152"), "{error}");
    let error = refused(&spec(|s| s.attention.head_dim = 12), Dialect::Ort);
    assert!(error.contains("heads are 12 wide, and GroupQueryAttention takes multiples of 8"), "{error}");
}

#[test]
fn float16_graphs_hold_what_candle_holds_in_float16() {
    check(COMBINATIONS, |option| option_failures(option, Precision::F16));
}

#[test]
fn every_family_is_exported_folded_and_computes_what_candle_computes() {
    check(&every_family(), |folder| {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let failures = failures(checkpoint.spec(), &|shape| checkpoint.weight(shape.role), Precision::F32);
        (folder.file_name().unwrap().to_string_lossy().into_owned(), failures)
    });
}
/// Positions of 70,000 and more: no table ends before them.
#[test]
fn positions_far_beyond_the_trained_ones_are_rotated_as_in_candle() {
    let spec = spec(|s| {
        s.attention.rotary[0].long = LongContext::Ntk { original: 64, theta: 100.0, factor: 2.0 };
        let interleaved =
            Rotary { interleaved: true, inv_freq: vec![0.9, 0.5, 0.2, 0.1], ..s.attention.rotary[0].clone() };
        s.attention.rotary.push(Rotary { long: LongContext::Same, ..interleaved });
        s.layers[1].rotary = Some(1);
    });
    let weights = |shape: &WeightShape| Ok(weight(&spec, shape));
    let (ids, mask, positions) = ([3, 1, 4, 1, 5], [1; 5], [0, 63, 64, 1_000, 70_001]);
    let adapter = adapter(&spec, 0.3);
    let hook = adapter.hook(&spec, &Device::Cpu).unwrap();
    let logits = |dtype| {
        let input = Input::new(1, &ids, &mask, Some(&positions)).unwrap();
        let logits = decoder(&spec, &weights, dtype).forward(&input, None, &*hook).unwrap();
        logits.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
    };
    let (reference, single) = (logits(DType::F64), logits(DType::F32));
    let distance = |found: &[f64]| found.iter().zip(&reference).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let largest = reference.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let allowed = Budget::of(DType::F32, &spec).unwrap().allowance(Some(distance(&single)), largest).allowed;
    for dialect in [Dialect::Portable, Dialect::Ort] {
        let folder = tempfile::tempdir().unwrap();
        graphs(&spec, &weights, &ExportOptions { dialect, ..Default::default() }, folder.path());
        let graph = folder.path().join("adapted/model.onnx");
        for (name, open) in runtimes(dialect) {
            let mut session = open(&graph)().unwrap();
            let found = session.run(feeds(&spec, &ids, &positions)).unwrap().take("logits").unwrap();
            let found: Vec<f64> = found.into_f64().unwrap().into_iter().collect();
            let distance = distance(&found);
            eprintln!("{dialect} {name}: {distance:.2e} of {allowed:.2e}");
            assert!(distance <= allowed, "{dialect} {name}");
        }
    }
}

/// A row of a learned table that is not there is an error, never another row.
#[test]
fn positions_beyond_a_learned_table_are_refused_by_the_runtime() {
    let spec = spec(|s| {
        s.embedding.positions = Some(LearnedPositions { rows: 12, offset: 2 });
        s.layers.iter_mut().for_each(|layer| layer.rotary = None);
        s.attention.rotary.clear();
    });
    let weights = |shape: &WeightShape| Ok(weight(&spec, shape));
    for dialect in [Dialect::Portable, Dialect::Ort] {
        let folder = tempfile::tempdir().unwrap();
        graphs(&spec, &weights, &ExportOptions { dialect, ..Default::default() }, folder.path());
        for (name, open) in runtimes(dialect) {
            let mut session = open(&folder.path().join("base/model.onnx"))().unwrap();
            session.run(feeds(&spec, &[3, 1], &[8, 9])).unwrap();
            let error = session.run(feeds(&spec, &[3, 1], &[9, 10])).unwrap_err();
            eprintln!("{dialect} {name}: {error}");
        }
    }
}

/// Tokens without a past.
fn feeds(spec: &DecoderSpec, ids: &[i64], positions: &[i64]) -> NamedValues {
    let row = |values: &[i64]| ndarray::Array2::from_shape_vec((1, values.len()), values.to_vec()).unwrap().into_dyn();
    let past = [1, spec.attention.num_kv_heads, 0, spec.attention.head_dim];
    let empty = || ndarray::Array4::<f32>::zeros(past).into_dyn();
    let tokens = NamedValues::new().with("input_ids", row(ids)).with("attention_mask", row(&vec![1; ids.len()]));
    (0..spec.num_layers).fold(tokens.with("position_ids", row(positions)), |feeds, layer| {
        let name = |part| format!("past_key_values.{layer}.{part}");
        feeds.with(name("key"), empty()).with(name("value"), empty())
    })
}

#[test]
fn a_weight_of_another_shape_is_refused() {
    let spec = spec(|_| {});
    let folder = tempfile::tempdir().unwrap();
    let transposed = |shape: &WeightShape| Ok(weight(&spec, shape).t().unwrap());
    let error = export_weights(&spec, transposed, &ExportOptions::default(), folder.path()).unwrap_err();
    assert_eq!(error.to_string(), "`model.embed_tokens.weight` has shape [16, 40] where the decoder needs [40, 16]");
}

/// Quantisers infer types first, and know operators of ONNX alone. The head's product is left out: no weight comes after it.
#[test]
fn the_ort_dialect_tells_the_types_that_only_a_runtime_knows() {
    for folder in every_family() {
        let (checkpoint, out) = (Checkpoint::open(&folder).unwrap(), tempfile::tempdir().unwrap());
        let options = ExportOptions { dialect: Dialect::Ort, ..ExportOptions::default() };
        export_weights(checkpoint.spec(), |weight| checkpoint.weight(weight.role), &options, out.path()).unwrap();
        let model = Model::open(out.path()).unwrap();
        let graph = model.graph();
        let told: BTreeSet<&str> = graph.value_info().iter().chain(graph.outputs()).map(|value| value.name()).collect();
        let known = ["SimplifiedLayerNormalization", "FusedMatMul"];
        let fused =
            graph.nodes().iter().filter(|node| node.domain() == "com.microsoft" && !known.contains(&node.op_type()));
        for output in fused.flat_map(|node| node.outputs()).filter(|output| !output.is_empty()) {
            assert!(told.contains(output.as_str()), "{}: {output}", folder.display());
        }
    }
}

//! The proof of a fold's sites: what holds is said in the manifest, a wrong site is caught, and what cannot be proved says so.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType as CandleType, Device, Tensor};
use prefold::base::Checkpoint;
use prefold::export::{ExportOptions, export};
use prefold::onnx::{DataType, Dim, Model, ModelBuilder, NodeDef, NodeId, Patch, TensorDef, ValueDef};
use serde_json::{Value, json};

use crate::command_line::failure;
use crate::fused::runtime;
use crate::support::{arg, fixture, prefold, prefold_ok, shared};

const LAYERS: usize = 2;

fn model() -> PathBuf {
    fixture("oracles/llama_bias")
}

/// The exported graph of a tiny model, as `base/model.onnx`.
fn exported(folder: &Path, options: &ExportOptions) -> PathBuf {
    let base = folder.join("base");
    std::fs::create_dir(&base).unwrap();
    export(&Checkpoint::open(&model()).unwrap(), options, &base).unwrap()
}

fn facts(folder: &Path) -> Value {
    let manifest = std::fs::read(folder.join("prefold.json")).unwrap();
    serde_json::from_slice::<Value>(&manifest).unwrap()["facts"].clone()
}

/// `facts` of a fold are what their schema says.
fn check_schema(facts: &Value) {
    let (_, schema) = prefold::cli::schemas().into_iter().find(|(name, _)| name.starts_with("fold_facts")).unwrap();
    let validator = jsonschema::validator_for(schema.as_value()).unwrap();
    validator.validate(facts).unwrap_or_else(|error| panic!("{error}: {facts}"));
    for field in ["sites", "exactness", "external_data", "adapters", "slots", "site_proof"] {
        let mut lacking = facts.clone();
        lacking.as_object_mut().unwrap().remove(field);
        assert!(!validator.is_valid(&lacking), "{field} is required");
    }
}

fn fold(graph: &str, more: &[&str]) -> Vec<String> {
    let adapter = fixture("oracles/llama_bias/adapter.safetensors");
    let args = ["fold", "--graph", graph, "--adapter", arg(&adapter), "--overwrite"];
    args.iter().chain(more).map(|arg| (*arg).to_owned()).collect()
}

fn folded(folder: &Path, graph: &str, more: &[&str]) -> String {
    let args = fold(graph, more);
    prefold_ok(folder, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn refused(folder: &Path, graph: &str, more: &[&str]) -> String {
    let args = fold(graph, more);
    failure(folder, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn sites_are_proved_and_the_manifest_says_by_what() {
    let folder = tempfile::tempdir().unwrap();
    exported(folder.path(), &ExportOptions::default());
    let told = folded(folder.path(), "base", &["--out", "out", "--checkpoint", arg(&model())]);
    assert!(!told.contains("not proved"), "{told}");
    let found = facts(&folder.path().join("out"));
    check_schema(&found);
    let proof = &found["site_proof"];
    assert_eq!((&proof["verdict"], &proof["zero_adapter"]), (&json!("proved"), &json!("no bit changed")), "{proof}");
    let queries = proof["queries"].as_array().unwrap();
    assert_eq!(queries.len(), LAYERS);
    for query in queries {
        let (distance, largest) = (query["distance"].as_f64().unwrap(), query["largest"].as_f64().unwrap());
        assert!(largest > 0.1 && distance < 1e-5, "{query}");
    }
    // over an adapter there are no queries of the checkpoint's, but zeros change nothing there either
    folded(folder.path(), "out", &["--out", "twice", "--stack", "--checkpoint", arg(&model())]);
    let twice = facts(&folder.path().join("twice"));
    check_schema(&twice);
    assert_eq!(twice["site_proof"]["verdict"], "proved");
    assert_eq!(twice["site_proof"]["queries"], Value::Null);
    // so it is where a bank has to be told its rows
    folded(folder.path(), "base", &["--out", "bank", "--emission", "bank"]);
    folded(folder.path(), "bank", &["--out", "over_bank", "--stack"]);
    assert_eq!(facts(&folder.path().join("over_bank"))["site_proof"]["zero_adapter"], "no bit changed");
}

#[test]
fn a_runtime_that_was_named_is_not_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    exported(folder.path(), &ExportOptions::default());
    let told = refused(folder.path(), "base", &["--out", "out", "--ort-lib", "no_such_library.so"]);
    assert!(told.contains("no_such_library.so"), "{told}");
    assert!(!folder.path().join("out").exists());
}

#[test]
fn overwrite_replaces_what_prefold_wrote_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    exported(folder.path(), &ExportOptions::default());
    let home = folder.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("thesis.txt"), "years of work").unwrap();
    let told = refused(folder.path(), "base", &["--out", "home"]);
    assert!(told.contains("it holds `thesis.txt`, and prefold did not write it"), "{told}");
    assert_eq!(std::fs::read_to_string(home.join("thesis.txt")).unwrap(), "years of work");
    std::fs::remove_file(home.join("thesis.txt")).unwrap();
    for _ in 0..2 {
        folded(folder.path(), "base", &["--out", "home"]);
    }
}

/// ONNX Runtime on the CPU computes float16 in float32 where it has no kernel, and one more node moves the place where it rounds.
/// That is told, and is no fault of the sites.
#[test]
fn a_rounding_of_half_precision_that_moves_is_no_wrong_site() {
    if runtime().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (graph, adapter) = (fixture("graphs/genai_int4_half/llama_bias"), fixture("oracles/llama_head_dim"));
    let adapter = adapter.join("adapter.safetensors");
    prefold_ok(folder.path(), &["fold", "--graph", arg(&graph), "--adapter", arg(&adapter), "--out", "out"]);
    let found = facts(&folder.path().join("out"));
    check_schema(&found);
    let proof = &found["site_proof"];
    assert_eq!(proof["verdict"], "proved", "{proof}");
    let told = proof["zero_adapter"].as_str().unwrap();
    // a runtime that has the kernels moves none
    assert!(told.starts_with("half precision was rounded otherwise, by at most") || told == "no bit changed", "{told}");
}

/// Both branches of a merged decoder, the one for a prompt and the one for what follows it.
#[test]
fn the_queries_of_both_branches_are_the_model_s() {
    let (graph, oracle) = ("graphs/optimum_merged/llama_gqa/decoder_model_merged.onnx", "oracles/llama_gqa");
    let (Some(graph), Some(oracle), Some(_)) = (shared(graph), shared(oracle), runtime()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let adapter = oracle.join("adapter.safetensors");
    let args = ["fold", "--graph", arg(&graph), "--adapter", arg(&adapter), "--out", "out"];
    prefold_ok(folder.path(), &[args.as_slice(), &["--checkpoint", arg(&oracle)]].concat());
    let found = facts(&folder.path().join("out"));
    check_schema(&found);
    let queries = found["site_proof"]["queries"].as_array().unwrap();
    let places: Vec<(&str, u64)> =
        queries.iter().map(|query| (query["scope"].as_str().unwrap(), query["layer"].as_u64().unwrap())).collect();
    let branches = ["optimum::if.else_branch", "optimum::if.then_branch"];
    assert_eq!(places, branches.iter().flat_map(|branch| [(*branch, 0), (*branch, 1)]).collect::<Vec<_>>());
    for query in queries {
        let (distance, largest) = (query["distance"].as_f64().unwrap(), query["largest"].as_f64().unwrap());
        assert!(largest > 0.1 && distance < 1e-5, "{query}");
    }
}

#[test]
fn inspect_shows_what_is_folded() {
    let folder = tempfile::tempdir().unwrap();
    exported(folder.path(), &ExportOptions::default());
    folded(folder.path(), "base", &["--out", "one"]);
    folded(folder.path(), "one", &["--out", "two", "--stack", "--emission", "slot"]);
    let inspect = |graph: &str| -> Value {
        serde_json::from_str(&prefold_ok(folder.path(), &["inspect", graph, "--json", "--explain"])).unwrap()
    };
    let (base, two) = (inspect("base"), inspect("two"));
    assert_eq!(base["folds"], Value::Null);
    let fold = |number: usize, emission: &str| json!({"fold": number, "emission": emission, "method": "prefix_plus", "adapters": ["adapter"], "layers": [0, 1]});
    assert_eq!(two["folds"], json!([fold(1, "baked"), fold(2, "slot")]));
    let slots: Vec<&str> = two["slots"].as_array().unwrap().iter().map(|slot| slot["name"].as_str().unwrap()).collect();
    assert_eq!(slots, ["prefold.2.layers.0.M", "prefold.2.layers.1.M"]);
    for (layer, site) in two["sites"].as_array().unwrap().iter().enumerate() {
        let before = &base["sites"][layer];
        assert_eq!((&site["query"], &site["anchor"]), (&before["query"], &before["anchor"]));
        assert_eq!(site["output"], format!("/prefold.2/layers.{layer}/Add/output_0"));
    }
    // blocks are those of the base graph; the way back is not printed
    assert_eq!(two["attention"], base["attention"]);
    assert!(!two["metadata"].to_string().contains("prefold.fold"), "{}", two["metadata"]);
}

/// Queries twice as large and keys half as large leave the base model as it is, up to rounding: its logits say nothing of it.
fn doubled(folder: &Path) {
    let path = exported(folder, &ExportOptions::default());
    let model = Model::open(&path).unwrap();
    let mut patch = Patch::new("double the queries");
    for (map, factor) in [("q_proj", 2.0), ("k_proj", 0.5)] {
        let constant = TensorDef::from_f32s(map, &[], &[factor]);
        patch.add_initializer(constant);
        for layer in 0..LAYERS {
            let of_map = |name: &str| name.contains(&format!("layers.{layer}/")) && name.contains(map);
            let last = model.graph().nodes().iter().rfind(|node| of_map(node.name())).unwrap();
            let product = last.output(0).unwrap();
            let readers: Vec<(NodeId, usize)> = model
                .graph()
                .nodes()
                .iter()
                .flat_map(|node| node.inputs().iter().enumerate().map(move |(slot, input)| (node.id(), slot, input)))
                .filter(|(_, _, input)| *input == product)
                .map(|(node, slot, _)| (node, slot))
                .collect();
            let scaled = format!("scaled.{layer}.{map}");
            let node = NodeDef::new("Mul", scaled.as_str()).inputs([product, map]).outputs([scaled.as_str()]);
            patch.insert_before(readers[0].0, node);
            readers.iter().for_each(|(node, slot)| _ = patch.replace_input(*node, *slot, scaled.as_str()));
        }
    }
    patch.apply(&model).unwrap().save(&path).unwrap();
}

#[test]
fn a_query_that_is_not_the_model_s_is_caught() {
    let folder = tempfile::tempdir().unwrap();
    doubled(folder.path());
    // without a checkpoint nobody can know
    folded(folder.path(), "base", &["--out", "out"]);
    let error = refused(folder.path(), "base", &["--out", "other", "--checkpoint", arg(&model())]);
    assert!(error.contains("layer 0: the query that the graph shows is"), "{error}");
    assert!(error.contains("from the checkpoint's") && !folder.path().join("other").exists(), "{error}");
}

/// A graph with one more output, which a node makes from the logits.
fn with_output(folder: &Path, node: NodeDef) {
    let path = exported(folder, &ExportOptions::default());
    let model = Model::open(&path).unwrap();
    let mut patch = Patch::new("one more output");
    patch.require_opset("example", 1);
    patch.append_node(node.inputs(["logits"]).outputs(["more"]));
    patch.add_output(ValueDef::new("more", DataType::Float, [Dim::Unknown, Dim::Unknown, Dim::Unknown]));
    patch.apply(&model).unwrap().save(&path).unwrap();
}

#[test]
fn an_output_that_zeros_change_is_caught() {
    if runtime().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    with_output(folder.path(), NodeDef::new("RandomNormalLike", "noise"));
    let error = refused(folder.path(), "base", &["--out", "out"]);
    assert!(error.contains("with an adapter of zeros `more` is not the base"), "{error}");
    assert!(!folder.path().join("out").exists());
}

/// One layer of one head of four, of which nothing in the graph tells.
fn untold(path: &Path) {
    let dims = |rank: usize| (0..rank).map(|_| Dim::Unknown);
    let mut builder = ModelBuilder::new("g", 8);
    builder.opset("", 17).input(ValueDef::new("input_ids", DataType::Int64, dims(2)));
    builder.output(ValueDef::new("logits", DataType::Float, dims(3)));
    let rows: Vec<f32> = (0..400).map(|at| (at as f32 * 0.7).sin()).collect();
    builder.initializer(TensorDef::from_f32s("embeddings", &[100, 4], &rows));
    builder.initializer(TensorDef::from_f32s("w", &[4, 4], &rows[..16]));
    builder.initializer(TensorDef::from_i64s("one", &[1], &[1]));
    builder.initializer(TensorDef::from_i64s("rest", &[3], &[0, 0, -1]));
    let nodes: [(&str, &[&str], &str); 10] = [
        ("Gather", &["embeddings", "input_ids"], "x"),
        ("Unsqueeze", &["x", "one"], "q"),
        ("Transpose", &["q"], "k"),
        ("MatMul", &["q", "k"], "scores"),
        ("Softmax", &["scores"], "p"),
        ("MatMul", &["p", "q"], "o"),
        ("Transpose", &["o"], "t"),
        ("Reshape", &["t", "rest"], "m"),
        ("Identity", &["w"], "projection"),
        ("MatMul", &["m", "projection"], "logits"),
    ];
    for (op, inputs, output) in nodes {
        let node = NodeDef::new(op, output).inputs(inputs.iter().copied()).outputs([output]);
        builder.node(match output {
            "k" => node.attr_ints("perm", &[0, 1, 3, 2]),
            "t" => node.attr_ints("perm", &[0, 2, 1, 3]),
            _ => node,
        });
    }
    builder.build().unwrap().save(path).unwrap();
}

/// What runs without an adapter and not with zeros is not written: the adapter is of another model.
#[test]
fn a_graph_that_zeros_break_is_not_folded() {
    if runtime().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    untold(&folder.path().join("model.onnx"));
    let refuses = |heads: usize, head_dim: usize| {
        let m = Tensor::ones((heads, head_dim, head_dim), CandleType::F32, &Device::Cpu).unwrap();
        let adapter = folder.path().join(format!("{heads}_{head_dim}.safetensors"));
        candle_core::safetensors::save(&HashMap::from([("layers.0.M", m)]), &adapter).unwrap();
        let args = ["fold", "--graph", "model.onnx", "--adapter", arg(&adapter), "--out", "out"];
        let error = failure(folder.path(), &args);
        assert!(!folder.path().join("out").exists());
        error
    };
    // the first does not load, the second does not run
    for error in [refuses(1, 6), refuses(2, 4)] {
        assert!(error.contains("ONNX Runtime runs the graph, but not with an adapter of zeros in it: "), "{error}");
        assert!(error.contains("is the adapter one of this graph's base model?"), "{error}");
    }
}

#[test]
fn a_graph_that_no_runtime_loads_is_folded_and_not_proved() {
    let folder = tempfile::tempdir().unwrap();
    with_output(folder.path(), NodeDef::new("Strange", "strange").domain("example"));
    let args = fold("base", &["--out", "out"]);
    let output = prefold(folder.path(), &args.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("sites not proved: ") && told.contains("Strange"), "{told}");
    let found = facts(&folder.path().join("out"));
    check_schema(&found);
    assert_eq!(found["site_proof"]["verdict"], "not_proved");
    assert!(folder.path().join("out/model.onnx").is_file());
    // who does not ask is told, and no more
    let told = folded(folder.path(), "base", &["--out", "out", "--proof", "never"]);
    assert!(told.contains("sites not proved: --proof never"), "{told}");
    assert_eq!(facts(&folder.path().join("out"))["site_proof"]["verdict"], "not_run");
}

#[test]
fn a_large_graph_is_not_run_unless_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = exported(folder.path(), &ExportOptions { external_data_threshold: 0, ..ExportOptions::default() });
    // a hole
    let data = path.with_file_name("model.onnx.data");
    std::fs::File::options().write(true).open(data).unwrap().set_len((1 << 30) + 1).unwrap();
    let told = folded(folder.path(), "base", &["--out", "out", "--link"]);
    assert!(told.contains("sites not proved: the graph is larger than 1 GiB; --proof always"), "{told}");
    let found = facts(&folder.path().join("out"));
    check_schema(&found);
    assert_eq!(found["site_proof"]["verdict"], "not_run");
}

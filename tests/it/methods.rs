//! Every method and option: trained by the command, folded, and proved in the runtimes at hand.

use std::path::Path;

use prefold::adapter::{Adapter, AdapterConfig, Start, TensorSpec};
use prefold::base::Checkpoint;
use prefold::runtime::library;
use serde_json::{Value, json};

use crate::support::{arg, fixture, prefold, prefold_ok};

/// An adapter whose tensors are large enough to see, in a folder.
pub fn adapter(model: &Path, fields: &Value, folder: &Path) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let mut config = serde_json::to_value(AdapterConfig::prefix_plus(checkpoint.spec(), None)).unwrap();
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let config: AdapterConfig = serde_json::from_value(config).unwrap();
    let tensors = config.method.as_method().tensors(&config).unwrap().into_iter().map(|(name, spec)| {
        let start = spec.tensor(&name, 1).unwrap();
        let noise = TensorSpec::new(spec.shape, Start::Normal(0.3)).tensor(&format!("{name} moved"), 1).unwrap();
        (name, (start + noise).unwrap())
    });
    std::fs::create_dir(folder).unwrap();
    Adapter::new(config.clone(), tensors.collect()).unwrap().save(folder).unwrap();
}

/// Dialects and precisions that the runtimes at hand can show.
fn targets() -> Vec<(&'static str, &'static str)> {
    let all = [("portable", "f32"), ("portable", "f16"), ("ort", "f32"), ("ort", "f16")];
    let has_ort = library::find(None, &prefold::files::cache_folder().unwrap()).is_ok();
    if !has_ort {
        eprintln!("skipped: no ONNX Runtime here (prefold runtime install)");
    }
    all.into_iter().filter(|(dialect, _)| has_ort || *dialect == "portable").collect()
}

/// Compiles for every target, and finds the graph to be the adapted model and not the base model.
fn prove(scratch: &Path, model: &Path, name: &str, targets: &[(&str, &str)]) {
    for (dialect, precision) in targets {
        let out = format!("{name}-{dialect}-{precision}");
        let args = ["compile", "--model", arg(model), "--adapter", name, "--out", &out];
        let output =
            prefold(scratch, &[args.as_slice(), &["--dialect", dialect, "--precision", precision, "--keep"]].concat());
        let report = std::fs::read(scratch.join(&out).join("parity.json"));
        let report = report.unwrap_or_else(|_| panic!("{out}: {}", String::from_utf8_lossy(&output.stderr)));
        let report: Value = serde_json::from_slice(&report).unwrap();
        assert_eq!(report["verdict"], "pass", "{out}: {}", String::from_utf8_lossy(&output.stdout));
        assert!(output.status.success());
        let runtimes: Vec<_> = report["runs"].as_array().unwrap().iter().map(|run| &run["name"]).collect();
        assert_eq!(runtimes.contains(&&json!("tract")), *dialect == "portable", "{out}: {runtimes:?}");
    }
    let base = ["verify", "--model", arg(model), "--graph", &format!("{name}-portable-f32"), "--out", "base.json"];
    let output = prefold(scratch, &base);
    assert_eq!(output.status.code(), Some(1), "{name}: without the adapter the graph is another function");
}

fn fold(cases: &[(&str, Value)], targets: &[(&str, &str)]) {
    let scratch = tempfile::tempdir().unwrap();
    let model = fixture("oracles/llama_bias");
    for (name, fields) in cases {
        adapter(&model, fields, &scratch.path().join(name));
        prove(scratch.path(), &model, name, targets);
    }
}

#[test]
fn every_feature_map_is_folded_exactly() {
    let maps = ["elu", "elu_plus_one", "gelu", "relu", "silu", "softplus", "identity", "mlp"];
    fold(&maps.map(|map| (map, json!({"feature_map": map}))), &targets());
}

#[test]
fn every_option_of_prefix_plus_is_folded_exactly() {
    fold(
        &[
            ("pre_rope", json!({"query": "pre_rope"})),
            ("kv_group", json!({"sharing": "kv_group", "gate": "head"})),
            ("layer", json!({"sharing": "layer", "gate": "scalar", "layers": [1]})),
            ("rank", json!({"rank": 2, "normalizer": true})),
            (
                "all",
                json!({"feature_map": "mlp", "query": "pre_rope", "sharing": "kv_group", "gate": "head", "normalizer": true,
                   "init": "prompt"}),
            ),
        ],
        &targets(),
    );
}

#[test]
fn lora_and_its_variants_are_folded_exactly() {
    fold(
        &[
            ("lora", json!({"method": "lora", "rank": 3})),
            (
                "rslora",
                json!({"method": "lora", "rank": 4, "rslora": true, "targets": ["v_proj", "down_proj"], "layers": [1]}),
            ),
            ("dora", json!({"method": "lora", "rank": 2, "dora": true})),
        ],
        &targets(),
    );
}

#[test]
fn prefix_tuning_is_folded_exactly() {
    fold(
        &[
            ("prefix", json!({"method": "prefix", "num_virtual_tokens": 5, "init": "random"})),
            ("one_layer", json!({"method": "prefix", "num_virtual_tokens": 2, "init": "random", "layers": [1]})),
            ("projection", json!({"method": "prefix", "num_virtual_tokens": 3, "init": "random", "projection": true})),
        ],
        &targets(),
    );
}

/// Trains on the demo's task, and returns the losses.
fn train(scratch: &Path, name: &str, toml: &str, steps: &str, more: &[&str]) -> Vec<f64> {
    std::fs::write(scratch.join("run.toml"), toml).unwrap();
    let (model, data) = (fixture("demo/model"), fixture("demo/train.jsonl"));
    let args =
        ["--quiet", "train", "--config", "run.toml", "--model", arg(&model), "--data", arg(&data), "--out", name];
    let args = [args.as_slice(), &["--limit", "16", "--batch-size", "8", "--max-steps", steps], more].concat();
    prefold_ok(scratch, &args);
    let text = std::fs::read_to_string(scratch.join(name).join("metrics.jsonl")).unwrap();
    text.lines().filter_map(|l| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64()).collect()
}

#[test]
fn every_method_learns() {
    let scratch = tempfile::tempdir().unwrap();
    let cases = [
        (
            "plus",
            "[adapter.prefix_plus]\nrank = 4\ngate = \"head\"\nquery = \"pre_rope\"\n",
            &["--learning-rate", "1e-2"][..],
        ),
        (
            "prompted",
            "[adapter]\nprompt = \"label: billing\"\n[adapter.prefix_plus]\ninit = \"prompt\"\n",
            &["--learning-rate", "1e-2"],
        ),
        ("prefix", "[adapter.prefix]\nnum_virtual_tokens = 4\n", &["--method", "prefix", "--learning-rate", "3e-1"]),
        (
            "from_prompt",
            "[adapter]\nmethod = \"prefix\"\nprompt = \"label: billing\"\n[adapter.prefix]\ninit = \"prompt\"\n",
            &["--learning-rate", "1e-1"],
        ),
        ("lora", "[adapter.lora]\nrank = 4\n", &["--method", "lora", "--learning-rate", "1e-2"]),
        ("dora", "[adapter.lora]\nrank = 2\ndora = true\n", &["--method", "lora", "--learning-rate", "1e-2"]),
        ("full", "[adapter]\nmethod = \"full\"\n", &["--learning-rate", "3e-3"]),
    ];
    for (name, toml, more) in cases {
        let losses = train(scratch.path(), name, toml, "12", more);
        assert!(losses[11] < 0.9 * losses[0], "{name}: {} → {}", losses[0], losses[11]);
        let printed = prefold_ok(scratch.path(), &["inspect", name]);
        assert!(printed.contains("method: "), "{printed}");
    }
    let dora: AdapterConfig =
        serde_json::from_slice(&std::fs::read(scratch.path().join("dora/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(dora.method.name(), "lora");
    // the weights of full fine-tuning are those of the exported graph
    prove(scratch.path(), &fixture("demo/model"), "full", &targets());
}

#[test]
fn full_fine_tuning_in_another_type_and_a_prompt_that_nothing_reads_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("demo/model"), fixture("demo/train.jsonl"));
    let refused = |toml: &str, more: &[&str]| {
        std::fs::write(scratch.path().join("run.toml"), toml).unwrap();
        let args = ["train", "--config", "run.toml", "--model", arg(&model), "--data", arg(&data), "--out", "run"];
        let output = prefold(scratch.path(), &[args.as_slice(), more].concat());
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let error = refused("[adapter]\nmethod = \"full\"\n", &["--dtype", "bf16"]);
    assert!(error.contains("`dtype` must be f32 with method = full"), "{error}");
    let error = refused("[adapter]\nprompt = \"hello\"\n", &[]);
    assert!(error.contains("`prompt` is given, but nothing starts from it"), "{error}");
    let error = refused("[adapter.prefix]\ninit = \"prompt\"\n", &["--method", "prefix"]);
    assert!(error.contains("`init` is prompt, but no prompt is given"), "{error}");
    let error = refused("[adapter.lora]\nrnak = 3\n", &[]);
    assert!(error.contains("rnak"), "{error}");
}

#[test]
fn what_cannot_be_folded_is_said() {
    let scratch = tempfile::tempdir().unwrap();
    let model = fixture("demo/model");
    train(scratch.path(), "full", "[adapter]\nmethod = \"full\"\n", "1", &[]);
    prefold_ok(scratch.path(), &["export", "--model", arg(&model), "--out", "graph"]);
    let output = prefold(scratch.path(), &["fold", "--graph", "graph", "--adapter", "full", "--out", "folded"]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("not yet folded: full fine-tuning"), "{error}");
    assert!(!scratch.path().join("folded").exists());
}

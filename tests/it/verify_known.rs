//! Regressions of other tools that reached their users: `prefold verify` catches each, and says what it is.

use std::path::{Path, PathBuf};

use prefold::onnx::{Model, NodeDef, Patch};
use serde_json::{Value, json};

use crate::methods::adapter;
use crate::support::{arg, fixture, prefold, prefold_ok};
use crate::verify::ort_library;

/// The exit code, the report's finding, and the report.
fn verified(folder: &Path, args: &[&str]) -> (i32, Value, Value) {
    let output = prefold(folder, &[&["verify"], args].concat());
    let report: Value = serde_json::from_slice(&std::fs::read(folder.join("parity.json")).unwrap()).unwrap();
    (output.status.code().unwrap(), report["finding"].clone(), report)
}

/// A checkpoint with another configuration: what an exporter sees that knows nothing of what was there.
fn without(model: &Path, fields: &[&str], folder: &Path) -> PathBuf {
    std::fs::create_dir(folder).unwrap();
    for file in ["model.safetensors", "config.json"] {
        std::fs::copy(model.join(file), folder.join(file)).unwrap();
    }
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    fields.iter().for_each(|field| config[field] = Value::Null);
    std::fs::write(path, config.to_string()).unwrap();
    folder.to_owned()
}

/// optimum's gemma2 drops the soft caps, onnxruntime-genai's builder mistral's window.
#[test]
fn exporters_that_drop_a_soft_cap_or_a_window() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    for (family, dropped, cause) in [
        ("gemma2", &["attn_logit_softcapping"][..], "leaves out the soft cap of 3 on the scores"),
        ("gemma2", &["final_logit_softcapping"], "leaves out the soft cap of 4 on the logits"),
        ("gemma2", &["attn_logit_softcapping", "final_logit_softcapping"], "on the scores and the soft cap of 4"),
        ("mistral", &["sliding_window"], "leaves out the sliding window of 6 tokens"),
    ] {
        let name = format!("{family}-{}", dropped.join("-"));
        let model = fixture(&format!("oracles/{family}"));
        let (other, graph) = (without(&model, dropped, &at.join(&name)), format!("{name}-graph"));
        prefold_ok(at, &["export", "--model", arg(&other), "--out", &graph]);
        let (code, finding, _) = verified(at, &["--graph", &graph, "--model", arg(&model), "--runtime", "tract"]);
        assert_eq!((code, &finding["kind"]), (1, &json!("unfaithful_base")), "{name}: {finding}");
        assert!(finding["cause"].as_str().is_some_and(|found| found.contains(cause)), "{name}: {finding}");

        // A fold into such a graph is right, and the graph wrong all the same.
        adapter(&model, &json!({}), &at.join(format!("{name}-adapter")));
        let (adapter, folded) = (format!("{name}-adapter"), format!("{name}-folded"));
        prefold_ok(at, &["fold", "--graph", &graph, "--adapter", &adapter, "--out", &folded]);
        let args = ["--graph", &folded, "--base-graph", &graph, "--model", arg(&model), "--adapter", &adapter];
        let (code, finding, _) = verified(at, &[args.as_slice(), &["--runtime", "tract"]].concat());
        assert_eq!((code, &finding["kind"]), (1, &json!("unfaithful_base")), "{name}: {finding}");
        let text = finding["text"].as_str().unwrap();
        assert!(text.contains("the base graph is unfaithful") && text.contains("the fold is right"), "{name}: {text}");
    }
}

/// The operator `Attention` aligns its causal mask at the upper left when queries are fewer than keys and it is told of no
/// past; some of its kernels at the lower right. An exporter that joins the cache itself and means the other corner gets another
/// function, which the prefill does not show. Here the mask of a graph is moved to that corner.
#[test]
fn causal_alignment_where_queries_are_fewer_than_keys() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let model = fixture("oracles/llama_bias");
    prefold_ok(at, &["export", "--model", arg(&model), "--out", "graph"]);
    let path = at.join("graph/model.onnx");
    let graph = Model::open(&path).unwrap();
    let named = |name: &str| graph.graph().nodes().iter().find(|node| node.name() == name).unwrap();
    let (queries, keys) = (named("/model/mask/Range_queries"), named("/model/mask/Range_keys"));
    // past..total becomes 0..total - past
    let (past, total) = (queries.input(0).unwrap(), queries.input(1).unwrap());
    let mut patch = Patch::new("align at the upper left");
    patch.insert_before(queries.id(), NodeDef::new("Sub", "/test/Sub").inputs([total, past]).outputs(["/test/new"]));
    patch.replace_input(queries.id(), 0, keys.input(0).unwrap()).replace_input(queries.id(), 1, "/test/new");
    patch.apply(&graph).unwrap().save(&path).unwrap();
    let runtimes = if ort_library().is_some() { "tract,ort" } else { "tract" };
    let (code, finding, report) = verified(at, &["--graph", "graph", "--model", arg(&model), "--runtime", runtimes]);
    assert_eq!((code, &finding["kind"]), (1, &json!("cache_only")), "{finding}");
    for run in report["runs"].as_array().unwrap() {
        for case in run["cases"].as_array().unwrap() {
            let name = case["case"].as_str().unwrap();
            let cached = name.starts_with("cached_") || name.starts_with("chunked_");
            assert_eq!(case["verdict"], if cached { "fail" } else { "pass" }, "{} {name}", run["name"]);
        }
    }
}

//! Regressions of other tools that reached their users: `prefold verify` catches each, and says what it is.

use std::path::{Path, PathBuf};

use prefold::adapter::Query;
use prefold::fold::locate;
use prefold::onnx::{Model, NodeDef, Patch, TensorDef};
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
/// past (the operator's text; ONNX Runtime on the CPU). An exporter that joins the cache itself and means the lower right gets
/// another function, which the prefill does not show.
#[test]
fn causal_alignment_of_attention_where_queries_are_fewer_than_keys() {
    if ort_library().is_none() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let model = fixture("oracles/llama_bias");
    prefold_ok(at, &["export", "--model", arg(&model), "--out", "graph"]);
    let path = at.join("graph/model.onnx");
    let graph = Model::open(&path).unwrap();
    let spec = prefold::base::Checkpoint::open(&model).unwrap().spec().clone();
    let (heads, size) = (spec.attention.num_heads as i64, spec.attention.head_dim as i64);
    let mut patch = Patch::new("attention as one operator");
    patch.require_opset("", 23);
    patch.add_initializer(TensorDef::from_i64s("test.heads", &[4], &[0, heads, -1, size]));
    let sites = locate::sites(&graph).unwrap();
    assert_eq!(sites.len(), spec.num_layers);
    for site in &sites {
        let query = locate::query(&graph, site, Query::PostRope).unwrap();
        assert!(query.nodes.is_empty() && query.initializers.is_empty(), "the portable dialect shows its queries");
        let name = |what: &str| format!("/test/{}/{what}", site.layer);
        let (four, new, shape, out) = (name("q"), name("new"), name("shape"), name("out"));
        let cache = |what: &str| format!("present.{}.{what}", site.layer);
        let attention = NodeDef::new("Attention", name("Attention"))
            .inputs([four.clone(), cache("key"), cache("value")])
            .outputs([&new])
            .attr_int("is_causal", 1)
            .attr_float("scale", spec.attention.scale as f32);
        let first = site.readers.iter().map(|reader| reader.node).min_by_key(|node| node.index()).unwrap();
        for node in [
            NodeDef::new("Reshape", name("Reshape")).inputs([query.tensor.as_str(), "test.heads"]).outputs([&four]),
            attention,
            NodeDef::new("Shape", name("Shape")).inputs([&site.output]).outputs([&shape]),
            NodeDef::new("Reshape", name("Reshape_out")).inputs([&new, &shape]).outputs([&out]),
        ] {
            patch.insert_before(first, node);
        }
        site.readers.iter().for_each(|reader| _ = patch.replace_input(reader.node, reader.slot, out.as_str()));
    }
    patch.apply(&graph).unwrap().save(&path).unwrap();
    let args = ["--graph", "graph", "--model", arg(&model), "--runtime", "ort", "--ort-level", "off,all"];
    let cases = ["--case", "single_row,one_token,cached_decode,chunked_prefill"];
    let (code, finding, report) = verified(at, &[args.as_slice(), &cases].concat());
    assert_eq!((code, &finding["kind"]), (1, &json!("cache_only")), "{finding}");
    for run in report["runs"].as_array().unwrap() {
        let verdicts: Vec<_> = run["cases"].as_array().unwrap().iter().map(|case| &case["verdict"]).collect();
        assert_eq!(verdicts, ["pass", "pass", "fail", "fail"], "{}", run["name"]);
    }
}

//! `prefold bench graph`: graphs beside each other.

use crate::command_line::failure;
use crate::support::{arg, fixture, prefold_ok};

#[test]
fn graphs_are_measured_beside_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let oracle = fixture("oracles/llama_bias");
    prefold_ok(folder.path(), &["export", "--model", arg(&oracle), "--out", "base"]);
    let adapter = oracle.join("adapter.safetensors");
    prefold_ok(folder.path(), &["fold", "--graph", "base", "--adapter", arg(&adapter), "--out", "folded"]);
    let command = ["bench", "graph", "base", "folded/model.onnx", "--runtime", "tract", "--rounds", "2"];
    let shape = ["--batch", "2", "--prompt-length", "5", "--decode-steps", "3", "--json"];
    let report = prefold_ok(folder.path(), &[&command[..], &shape[..]].concat());
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["runtime"]["runtime"], "tract");
    let graphs = report["graphs"].as_array().unwrap();
    assert_eq!(graphs.len(), 2);
    for graph in graphs {
        let seconds: Vec<f64> =
            graph["decode_seconds"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
        assert_eq!((seconds.len(), graph["prefill_seconds"].as_array().unwrap().len()), (2, 2));
        // the upper of two rounds; two rows of three steps each
        let rate = 6.0 / seconds[0].max(seconds[1]);
        assert!((graph["decode_tokens_per_second"].as_f64().unwrap() - rate).abs() < 1e-9 * rate);
    }
    assert_eq!((&graphs[0]["prefill_ratio"], &graphs[0]["decode_ratio"]), (&1.0.into(), &1.0.into()));

    // slots are filled from a file that is named behind the graph, a bank by numbers
    let fold = ["fold", "--graph", "base", "--adapter", arg(&adapter)];
    prefold_ok(folder.path(), &[&fold[..], &["--out", "slots", "--emission", "slot"]].concat());
    prefold_ok(folder.path(), &[&fold[..], &["--out", "bank", "--emission", "bank"]].concat());
    let command = ["bench", "graph", "base", "slots=slots/adapter.onnx_adapter", "bank", "--input", "adapter_ids=1,0"];
    let report = prefold_ok(
        folder.path(),
        &[&command[..], &["--runtime", "tract", "--rounds", "1", "--loads", "2"], &shape[..]].concat(),
    );
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    for graph in report["graphs"].as_array().unwrap() {
        for seconds in ["load_seconds", "prefill_seconds", "decode_seconds"] {
            assert_eq!(graph[seconds].as_array().unwrap().len(), 2, "{seconds}");
        }
    }
    let inputs = |graph: usize| report["graphs"][graph]["inputs"].clone();
    assert_eq!(inputs(0), serde_json::json!([]));
    assert_eq!(inputs(1), serde_json::json!(["prefold.layers.0.M", "prefold.layers.1.M"]));
    assert_eq!(inputs(2), serde_json::json!(["adapter_ids"]));
    let error = failure(folder.path(), &["bench", "graph", "base=slots/adapter.onnx_adapter", "--runtime", "tract"]);
    assert!(error.contains("it has no input `prefold.layers.0.M`"), "{error}");

    let command = ["bench", "graph", "base", "folded", "--runtime", "tract"];
    let error = failure(folder.path(), &[&command[..], &["--input", "adapter_ids=0"]].concat());
    assert!(error.contains("no graph has an input `adapter_ids`"), "{error}");
    let error = failure(folder.path(), &["bench", "graph", "base", "--batch", "0"]);
    assert!(error.contains("--batch is 0"), "{error}");
    let error = failure(folder.path(), &["bench", "graph", "base", "--loads", "0"]);
    assert!(error.contains("--loads is 0"), "{error}");
}

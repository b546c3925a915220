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
        // the upper of two turns; two rows of three steps each
        let rate = 6.0 / seconds[0].max(seconds[1]);
        assert!((graph["decode_tokens_per_second"].as_f64().unwrap() - rate).abs() < 1e-9 * rate);
    }
    assert_eq!((&graphs[0]["prefill_ratio"], &graphs[0]["decode_ratio"]), (&1.0.into(), &1.0.into()));

    let error = failure(folder.path(), &[&command[..], &["--input", "adapter_ids=0"]].concat());
    assert!(error.contains("no graph has an input `adapter_ids`"), "{error}");
    let error = failure(folder.path(), &["bench", "graph", "base", "--batch", "0"]);
    assert!(error.contains("--batch is 0"), "{error}");
}

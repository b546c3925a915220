//! `prefold verify` on graphs that switch between adapters: banks, slots, stacks.

use std::path::Path;

use prefold::adapter::Adapter;
use serde_json::{Value, json};

use crate::methods::adapter;
use crate::support::{arg, fixture, prefold, prefold_ok};
use crate::verify::ort_library;

const MODEL: &str = "oracles/llama_bias";

/// The base graph and adapters `a`, `b`, and `c`, which are all different.
fn bench(dialect: &str) -> tempfile::TempDir {
    let scratch = tempfile::tempdir().unwrap();
    let model = fixture(MODEL);
    prefold_ok(scratch.path(), &["export", "--model", arg(&model), "--dialect", dialect, "--out", "base"]);
    for (name, factor) in [("a", 1.0), ("b", -0.7), ("c", 0.4)] {
        let folder = scratch.path().join(name);
        adapter(&model, &json!({}), &folder);
        let made = Adapter::open(&folder).unwrap();
        let scaled = made.tensors().iter().map(|(name, tensor)| (name.clone(), (tensor * factor).unwrap()));
        Adapter::new(made.config().clone(), scaled.collect()).unwrap().save(&folder).unwrap();
    }
    scratch
}

fn verified(folder: &Path, graph: &str, more: &[&str]) -> (i32, Value, String) {
    let _ = std::fs::remove_file(folder.join("parity.json"));
    let model = fixture(MODEL);
    let args = ["verify", "--graph", graph, "--model", arg(&model), "--steps", "3"];
    let output = prefold(folder, &[args.as_slice(), more].concat());
    let report = std::fs::read(folder.join("parity.json")).ok();
    let report = report.map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap());
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), report, text)
}

fn names(report: &Value) -> Vec<&str> {
    report["cases"].as_array().unwrap().iter().map(|case| case["name"].as_str().unwrap()).collect()
}

fn failed(report: &Value) -> Vec<&str> {
    let cases = report["runs"][0]["cases"].as_array().unwrap().iter();
    cases.filter(|case| case["verdict"] == "fail").map(|case| case["case"].as_str().unwrap()).collect()
}

#[test]
fn each_row_of_a_bank_is_judged_by_its_own_adapter() {
    for dialect in ["portable", "ort"] {
        if dialect == "ort" && ort_library().is_none() {
            continue;
        }
        let scratch = bench(dialect);
        let at = scratch.path();
        let all = ["--adapter", "a", "--adapter", "b", "--adapter", "c"];
        prefold_ok(at, &[&["fold", "--graph", "base", "--emission", "bank", "--out", "bank"], &all[..]].concat());
        let (code, report, text) = verified(at, "bank", &all);
        assert_eq!((code, &report["verdict"]), (0, &json!("pass")), "{dialect}: {text}");
        assert_eq!(report["models"], json!(["a", "b", "c", "base"]));
        let mixed = ["adapter_b", "adapter_c", "adapter_base", "adapter_a_again", "mixed_adapters"];
        assert!(mixed.iter().all(|name| names(&report).contains(name)), "{:?}", names(&report));
        let case = report["cases"].as_array().unwrap().iter().find(|case| case["name"] == "mixed_adapters").unwrap();
        assert_eq!((&case["models"], &case["padding"]), (&json!([0, 1, 2, 3]), &json!("left")));

        // Another adapter under a row's name is found where it acts, and only there.
        let wrong = ["--adapter", "a", "--adapter", "b=c", "--adapter", "c"];
        let (code, report, _) = verified(at, "bank", &wrong);
        assert_eq!((code, failed(&report)), (1, vec!["adapter_b", "mixed_adapters", "mixed_adapters_right_padding"]));
        let (code, _, text) = verified(at, "bank", &["--adapter", "a", "--adapter", "d=c"]);
        assert!(code == 2 && text.contains("does not know the adapter `d`") && text.contains("a, b, c"), "{text}");
    }
}

#[test]
fn slots_are_off_on_and_swapped_in_one_session() {
    let scratch = bench("portable");
    let at = scratch.path();
    prefold_ok(at, &["fold", "--graph", "base", "--emission", "slot", "--adapter", "a", "--out", "slot"]);
    // any adapter goes into a slot, whatever it was folded with
    let (code, report, text) = verified(at, "slot", &["--adapter", "b", "--adapter", "c"]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(report["models"], json!(["b", "c", "base"]));
    assert!(names(&report).ends_with(&["adapter_c", "adapter_base", "adapter_b_again"]), "{:?}", names(&report));
    assert!(report["no_op"].as_array().unwrap().iter().all(|pair| pair["verdict"] == "pass"));
}

/// A baked adapter below slots: every model is a sum, and the baked one is always in it.
#[test]
fn stacked_adapters_are_summed() {
    let scratch = bench("portable");
    let at = scratch.path();
    prefold_ok(
        at,
        &["fold", "--graph", "base", "--emission", "bank", "--adapter", "a", "--adapter", "b", "--out", "one"],
    );
    prefold_ok(at, &["fold", "--graph", "one", "--adapter", "c", "--stack", "--out", "two"]);
    let all = ["--adapter", "a", "--adapter", "b", "--adapter", "c", "--runtime", "tract"];
    let (code, report, text) = verified(at, "two", &all);
    assert_eq!(code, 0, "{text}");
    assert_eq!(report["models"], json!(["c+a", "c+b", "c"]));
    // without the baked one the graph is another function
    let (code, ..) = verified(at, "two", &["--adapter", "a", "--adapter", "b", "--runtime", "tract"]);
    assert_eq!(code, 1);
}

/// The graph before the fold is in the file: the zero-adapter check needs no other.
#[test]
fn a_graph_of_others_is_checked_from_its_own_way_back() {
    let Some(graph) = crate::support::shared("graphs/optimum_with_past/llama_gqa") else { return };
    if ort_library().is_none() {
        return;
    }
    let model = crate::support::shared("oracles/llama_gqa").unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let adapter = model.join("adapter.safetensors");
    prefold_ok(scratch.path(), &["fold", "--graph", arg(&graph), "--adapter", arg(&adapter), "--out", "folded"]);
    let args = ["verify", "--graph", "folded", "--model", arg(&model), "--adapter", arg(&adapter), "--runtime", "ort"];
    prefold_ok(scratch.path(), &args);
    let report: Value = serde_json::from_slice(&std::fs::read(scratch.path().join("parity.json")).unwrap()).unwrap();
    assert_eq!(report["no_op"][0]["verdict"], "pass");
}

//! `prefold verify --against` without a checkpoint: two graphs judged by each other, and where they part.

use std::path::Path;

use prefold::onnx::Model;
use serde_json::Value;

use crate::mutants::graph::{insert, node, op, weight};
use crate::support::{arg, fixture, prefold, prefold_ok, shared};
use crate::verify::ort_library;
use prefold::onnx::TensorDef;

const DOWN: &str = "model.layers.1.mlp.down_proj.MatMul.weight";

/// The exit code and the report.
fn beside(folder: &Path, args: &[&str]) -> (i32, Value, String) {
    let _ = std::fs::remove_file(folder.join("parity.json"));
    let output = prefold(folder, &[&["verify", "--steps", "3"], args].concat());
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let report = std::fs::read(folder.join("parity.json")).ok();
    let report = report.map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap());
    (output.status.code().unwrap(), report, text)
}

/// The graph of `llama_bias`, and a copy that `change` broke.
fn pair(folder: &Path, dialect: &str, change: impl Fn(&Model) -> Model) {
    let model = fixture("oracles/llama_bias");
    prefold_ok(folder, &["export", "--model", arg(&model), "--dialect", dialect, "--out", "whole"]);
    std::fs::create_dir(folder.join("other")).unwrap();
    let whole = Model::open(&folder.join("whole/model.onnx")).unwrap();
    change(&whole).save(&folder.join("other/model.onnx")).unwrap();
}

/// No runtime but tract, which is embedded: the reference runs there too.
const TRACT: [&str; 4] = ["--runtime", "tract", "--reference-runtime", "tract"];

#[test]
fn a_graph_is_itself_and_the_report_says_what_it_was_judged_by() {
    let scratch = tempfile::tempdir().unwrap();
    pair(scratch.path(), "portable", Model::clone);
    let (code, report, text) =
        beside(scratch.path(), &[&["--graph", "other", "--against", "whole"], &TRACT[..]].concat());
    assert_eq!((code, &report["finding"]["kind"]), (0, &"parity".into()), "{text}");
    assert!(report["finding"]["text"].as_str().unwrap().contains("the other graph"), "{}", report["finding"]);
    let environment = &report["environment"];
    assert_eq!(environment["against_a_graph"], true);
    let source = environment["source"].as_str().unwrap();
    assert!(source.contains("model.onnx in tract") && source.contains("no checkpoint was read"), "{source}");
    assert!(text.contains(source), "the terminal says it too: {text}");
    let roles: Vec<_> = report["inputs"].as_array().unwrap().iter().map(|input| input["role"].clone()).collect();
    assert_eq!(roles, ["graph", "other_graph"]);
    // standard cases: the graph's own configuration tells how long a row may be
    assert!(report["cases"].as_array().unwrap().iter().any(|case| case["name"] == "length_128"));
}

/// The place is named by the tensor's name, its layer and its node, in one file as in the other.
#[test]
fn the_first_tensor_that_parts_is_named() {
    for (what, change, wanted) in [
        (
            "a weight",
            (|model: &Model| weight(model, DOWN, |_, values| values.iter().map(|x| x * 1.01).collect()))
                as fn(&Model) -> Model,
            "/model/layers.1/mlp/down_proj/MatMul",
        ),
        (
            "the scale of a layer's scores",
            |model| {
                let other = TensorDef::from_f32s("mutant/scale", &[], &[0.3]);
                insert(model, "/model/layers.1/self_attn/Mul_scale", 1, vec![other], vec![], "mutant/scale")
            },
            "/model/layers.1/self_attn/Mul_scale",
        ),
        (
            "the last norm",
            |model| {
                let name = "/model/norm/Mul";
                let more = TensorDef::from_f32s("mutant/more", &[], &[1.001]);
                let input = node(model, name).input(0).unwrap();
                insert(
                    model,
                    name,
                    0,
                    vec![more],
                    vec![op("Mul", "mutant/moved", &[input, "mutant/more"])],
                    "mutant/moved",
                )
            },
            "/model/norm/Mul",
        ),
    ] {
        let scratch = tempfile::tempdir().unwrap();
        pair(scratch.path(), "portable", change);
        let args =
            [&["--graph", "other", "--against", "whole", "--case", "single_row,cached_decode"], &TRACT[..]].concat();
        let (code, report, text) = beside(scratch.path(), &args);
        assert_eq!((code, &report["finding"]["kind"]), (1, &"no_parity".into()), "{what}: {text}");
        let departure = &report["runs"][0]["departure"];
        let node = departure["node"].as_str().unwrap_or_default();
        assert!(node.contains(wanted), "{what}: {departure:#}");
        let layer = wanted.contains("layers.1").then_some(1).map_or(Value::Null, Value::from);
        assert_eq!((&departure["layer"], &departure["place"]), (&layer, &"tensor".into()), "{what}: {departure:#}");
        let reproducer = departure["reproducer"].as_str().unwrap();
        assert!(scratch.path().join(reproducer).join("model.onnx").exists(), "{what}: {departure:#}");
        assert!(text.contains(wanted), "{what}: {text}");

        // the same beside a checkpoint that the first graph is faithful to
        let model = fixture("oracles/llama_bias");
        let args =
            ["--graph", "whole", "--against", "other", "--model", arg(&model), "--runtime", "tract", "--no-cache"];
        let (code, report, text) = beside(scratch.path(), &[&args[..], &["--case", "single_row"]].concat());
        assert_eq!((code, &report["runs"][0]["verdict"]), (1, &"pass".into()), "{what}: {text}");
        let departure = &report["against"][0]["departure"];
        assert!(departure["node"].as_str().unwrap_or_default().contains(wanted), "{what}: {departure:#}");
        assert!(text.contains("departs from the other graph"), "{what}: {text}");
    }
}

/// Another exporter's names are others: tensors are found by what they hold.
#[test]
fn graphs_without_a_name_in_common_are_compared_by_what_they_hold() {
    if ort_library().is_none() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    pair(at, "ort", |model| weight(model, DOWN, |_, values| values.iter().map(|x| x * 1.01).collect()));
    let model = fixture("oracles/llama_bias");
    prefold_ok(at, &["export", "--model", arg(&model), "--out", "portable"]);
    let (code, _, text) = beside(at, &["--graph", "whole", "--against", "portable", "--runtime", "ort"]);
    assert_eq!(code, 0, "two dialects are one function: {text}");
    let (code, report, text) = beside(at, &["--graph", "other", "--against", "portable", "--runtime", "ort"]);
    assert_eq!(code, 1, "{text}");
    let departure = &report["runs"][0]["departure"];
    assert_eq!(departure["layer"], 1, "{departure:#}");
    assert!(departure["nodes"].to_string().contains("layers.1/mlp/down_proj"), "{departure:#}");
}

#[test]
fn graphs_of_exporters_and_what_tools_made_of_them() {
    if ort_library().is_none() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let cases = ["--case", "single_row,left_padding,cached_decode"];
    for (graph, other, more, code) in [
        ("ort_optimizer_with_past/llama_gqa", "optimum_with_past/llama_gqa", vec![], 0),
        ("torch_dynamo23/gpt2", "optimum_with_past/gpt2", vec![], 0),
        ("optimum_fp16/llama_gqa", "optimum_with_past/llama_gqa", vec![], 0),
        ("optimum_with_past/llama_mha", "optimum_with_past/llama_gqa", vec![], 1),
        // quantised: nobody knows without thresholds
        ("genai_int4/llama_gqa", "genai_fp32/llama_gqa", vec!["--padding", "right"], 2),
        ("genai_int4/llama_gqa", "genai_fp32/llama_gqa", vec!["--padding", "right", "--max-kl", "10"], 0),
        ("genai_int4/llama_gqa", "genai_fp32/llama_gqa", vec!["--padding", "right", "--max-kl", "1e-9"], 1),
    ] {
        let (Some(graph), Some(other)) = (shared(&format!("graphs/{graph}")), shared(&format!("graphs/{other}")))
        else {
            return;
        };
        let chosen: &[&str] = if more.is_empty() { &cases } else { &["--case", "single_row,cached_decode"] };
        let args = ["--graph", arg(&graph), "--against", arg(&other), "--runtime", "ort"];
        let (found, report, text) = beside(scratch.path(), &[&args[..], &more, chosen].concat());
        assert_eq!(found, code, "{} beside {}: {text}", graph.display(), other.display());
        assert_eq!(report["environment"]["against_a_graph"], true);
    }
}

#[test]
fn what_two_graphs_cannot_be_asked_is_said() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    pair(at, "portable", Model::clone);
    for (args, say) in [
        (vec!["--graph", "whole"], "--model"),
        (vec!["--graph", "whole", "--against", "nowhere"], "there is no graph nowhere"),
        (vec!["--graph", "whole", "--against", "other", "--adapter", "a"], "--model"),
        (vec!["--graph", "whole", "--against", "other", "--prompt", "hello", "--runtime", "tract"], "tokenizer"),
    ] {
        let (code, report, text) = beside(at, &args);
        assert!(code == 2 && report == Value::Null && text.contains(say), "{args:?}: {code} {text}");
    }
}

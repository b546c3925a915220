//! Graphs of other exporters: places are found in them too.

use prefold::onnx::Model;

use super::graph::weight;
use super::{Dialect, dialects};
use crate::support::{arg, prefold, shared};

const GRAPHS: [&str; 12] = [
    "genai_fp32/llama_gqa",
    "hf_onnx_ortfused/qwen2",
    "optimum_merged/llama_gqa",
    "optimum_with_past/gemma3",
    "optimum_with_past/gpt2",
    "optimum_with_past/gpt_neox",
    "optimum_with_past/mistral",
    "ort_optimizer_with_past/phi3",
    "torch_dynamo18/phi3",
    "torch_dynamo23/llama_mha",
    "torch_dynamo23/qwen2",
    "torch_script17_eager/gpt2",
];

/// A base graph is the adapted model up to the first layer's sum of attention output and term.
#[test]
fn the_first_place_without_its_adapter_is_named() {
    if !dialects().contains(&Dialect::Ort) {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    for name in GRAPHS {
        let family = name.split('/').next_back().unwrap();
        let (Some(graph), Some(model)) = (shared(&format!("graphs/{name}")), shared(&format!("oracles/{family}")))
        else {
            return;
        };
        let adapter = model.join("adapter.safetensors");
        let file = std::fs::read_dir(&graph).unwrap().map(|entry| entry.unwrap().path());
        let file = { file }.find(|path| path.extension().is_some_and(|extension| extension == "onnx")).unwrap();
        let args = ["verify", "--graph", arg(&file), "--model", arg(&model), "--adapter", arg(&adapter), "--no-cache"];
        let more = ["--runtime", "ort", "--case", "single_row,cached_decode", "--steps", "2", "--out", "parity.json"];
        let output = prefold(scratch.path(), &[args.as_slice(), &more].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{name}: {text}");
        let report: serde_json::Value =
            serde_json::from_slice(&std::fs::read(scratch.path().join("parity.json")).unwrap()).unwrap();
        let departure = &report["runs"][0]["departure"];
        let found = (&departure["layer"], &departure["place"], &departure["fault"]);
        assert_eq!(found, (&0.into(), &"output_input".into(), &"graph".into()), "{name}: {departure:#} {text}");
    }
}

/// ONNX Runtime's optimiser moves biases into the operator that follows: products are compared with them all the same.
#[test]
fn a_weight_whose_bias_another_operator_adds_is_placed() {
    if !dialects().contains(&Dialect::Ort) {
        return;
    }
    let (Some(graph), Some(model)) = (shared("graphs/ort_optimizer_with_past/gpt2"), shared("oracles/gpt2")) else {
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let mut files = std::fs::read_dir(&graph).unwrap().map(|entry| entry.unwrap().path());
    let file = files.find(|path| path.extension().is_some_and(|extension| extension == "onnx")).unwrap();
    let whole = Model::open(&file).unwrap();
    for (layer, map, place) in
        [(0, "c_fc", "up_projection"), (1, "c_fc", "up_projection"), (1, "c_proj", "down_projection")]
    {
        let name = format!("transformer.h.{layer}.mlp.{map}.weight");
        let mutant = weight(&whole, &name, |_, values| values.iter().map(|x| x * 1.01).collect());
        mutant.save(&scratch.path().join("mutant.onnx")).unwrap();
        let args = ["verify", "--graph", "mutant.onnx", "--model", arg(&model), "--runtime", "ort", "--no-cache"];
        let more = ["--case", "single_row", "--out", "parity.json"];
        let output = prefold(scratch.path(), &[args.as_slice(), &more].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{name}: {text}");
        let report: serde_json::Value =
            serde_json::from_slice(&std::fs::read(scratch.path().join("parity.json")).unwrap()).unwrap();
        let departure = &report["runs"][0]["departure"];
        assert_eq!((&departure["layer"], &departure["place"]), (&layer.into(), &place.into()), "{departure:#}");
        assert_eq!(departure["fault"], "graph", "{departure:#}");
    }
}

/// optimum's float16 graph multiplies positions and frequencies in float16, which a long row shows.
#[test]
fn angles_of_half_precision_are_a_recognised_cause() {
    if !dialects().contains(&Dialect::Ort) {
        return;
    }
    let (Some(graph), Some(model)) = (shared("graphs/optimum_fp16/llama_gqa"), shared("oracles/llama_gqa")) else {
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let args = ["verify", "--graph", arg(&graph), "--model", arg(&model), "--runtime", "ort", "--no-cache"];
    let output =
        prefold(scratch.path(), &[args.as_slice(), &["--case", "length_256", "--out", "parity.json"]].concat());
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(scratch.path().join("parity.json")).unwrap()).unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let cause = "computes the angles of its rotation in float16, the model in float32";
    assert_eq!(report["finding"]["cause"], cause, "{:#} {text}", report["runs"][0]["departure"]);
}

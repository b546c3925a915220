//! Graphs of other exporters: places are found in them too.

use super::{Dialect, dialects};
use crate::support::{arg, prefold, shared};

const GRAPHS: [&str; 11] = [
    "genai_fp32/llama_gqa",
    "hf_onnx_ortfused/qwen2",
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

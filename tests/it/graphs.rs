//! Exported and folded graphs, run in tract and ONNX Runtime, against PyTorch's logits.

use std::path::Path;

use candle_core::Device;
use ndarray::Array2;
use prefold::base::Checkpoint;
use prefold::export::{Dialect, ExportOptions, GENAI_NAME, export};
use prefold::fold::fold_folder;
use prefold::onnx::Model;
use prefold::runtime::{GraphDecoder, OrtOptions, OrtSession, Session, TractOptions, TractSession, library};

use crate::oracles::{Case, every_family};
use crate::support::fixture;

/// Every runtime at hand that can run a dialect.
fn sessions(graph: &Path, dialect: Dialect) -> Vec<Box<dyn Session>> {
    let mut sessions: Vec<Box<dyn Session>> = Vec::new();
    if dialect == Dialect::Portable {
        let tract = TractSession::open(&graph.join("model.onnx"), TractOptions::default()).unwrap();
        assert!(tract.info().optimization.contains("symbolic"), "{}", tract.info().optimization);
        sessions.push(Box::new(tract));
    }
    match library::find(None, &prefold::files::cache_folder().unwrap()) {
        Ok(library) => {
            let options = OrtOptions { threads: Some(1), ..OrtOptions::default() };
            sessions.push(Box::new(OrtSession::open(&library, &graph.join("model.onnx"), options).unwrap()));
        }
        Err(_) => eprintln!("skipped: no ONNX Runtime here (prefold runtime install)"),
    }
    sessions
}

fn check(graph: &Path, oracle: &Path, dialect: Dialect, stored: &str) {
    for session in sessions(graph, dialect) {
        let info = session.info();
        let mut decoder = GraphDecoder::new(session).unwrap();
        for case in Case::all(oracle) {
            let seq = case.ids.len() / case.batch;
            let ids = Array2::from_shape_vec((case.batch, seq), case.ids.clone()).unwrap();
            let mask = Array2::from_shape_vec((case.batch, seq), case.mask.clone()).unwrap();
            decoder.reset();
            let logits = decoder.prefill(&ids, &mask).unwrap();
            let (shape, values) = (logits.dim(), logits.into_iter().collect::<Vec<f32>>());
            let logits = candle_core::Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            let distance = case.distance(&logits, stored);
            eprintln!("{} {} {dialect} {} {stored}: {distance:.2e}", info.runtime, info.optimization, case.name);
            assert!(distance < 1e-4);
        }
    }
}

fn export_fold_and_check(oracle: &Path, dialect: Dialect) {
    let folder = tempfile::tempdir().unwrap();
    let (base, folded) = (folder.path().join("base"), folder.path().join("folded"));
    std::fs::create_dir(&base).unwrap();
    std::fs::create_dir(&folded).unwrap();
    let checkpoint = Checkpoint::open(oracle).unwrap();
    export(&checkpoint, &ExportOptions { dialect, ..ExportOptions::default() }, &base).unwrap();
    check(&base, oracle, dialect, "base_logits");
    fold_folder(&base, &oracle.join("adapter.safetensors"), &folded).unwrap();
    check(&folded, oracle, dialect, "adapted_logits");
}

#[test]
fn portable_graphs_compute_pytorch_s_logits() {
    every_family().iter().for_each(|oracle| export_fold_and_check(oracle, Dialect::Portable));
}

#[test]
fn fused_graphs_compute_pytorch_s_logits() {
    every_family().iter().for_each(|oracle| export_fold_and_check(oracle, Dialect::Ort));
}

/// onnxruntime-genai finds the graph's inputs and outputs by the names of the configuration that lies beside it.
#[test]
fn an_exported_graph_is_described_for_onnxruntime_genai() {
    described_for_genai("oracles/llama_bias", &ExportOptions::default());
    described_for_genai("oracles/gpt2", &ExportOptions { dialect: Dialect::Ort, ..ExportOptions::default() });
    let right = ExportOptions { dialect: Dialect::Ort, right_padding_only: true, ..ExportOptions::default() };
    described_for_genai("oracles/llama_head_dim", &right);
    described_for_genai("oracles/gpt2", &right);
}

/// The operator knows how much of a buffer is filled, and positions are an input only where they are embedded.
fn described_for_genai(oracle: &str, options: &ExportOptions) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&fixture(oracle)).unwrap();
    let path = export(&checkpoint, options, folder.path()).unwrap();
    let text = std::fs::read(folder.path().join(GENAI_NAME)).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let model = Model::open(&path).unwrap();
    let decoder = &config["model"]["decoder"];
    assert_eq!(decoder["filename"], "model.onnx");
    let layers = usize::try_from(decoder["num_hidden_layers"].as_u64().unwrap()).unwrap();
    for (ports, values) in [("inputs", model.graph().inputs()), ("outputs", model.graph().outputs())] {
        let mut names: Vec<String> = Vec::new();
        for name in decoder[ports].as_object().unwrap().values().map(|name| name.as_str().unwrap()) {
            match name.contains("%d") {
                true => names.extend((0..layers).map(|layer| name.replace("%d", &layer.to_string()))),
                false => names.push(name.to_owned()),
            }
        }
        let mut own: Vec<String> = values.iter().map(|value| value.name().to_owned()).collect();
        names.sort_unstable();
        own.sort_unstable();
        assert_eq!(names, own);
    }
    let spec = checkpoint.spec();
    assert_eq!(decoder["head_size"], spec.attention.head_dim);
    assert_eq!(decoder["num_key_value_heads"], spec.attention.num_kv_heads);
    assert_eq!(config["model"]["vocab_size"], spec.vocab_size);
    assert_eq!(config["search"]["past_present_share_buffer"], options.right_padding_only);
    let takes_positions = decoder["inputs"]["position_ids"].is_string();
    assert_eq!(takes_positions, !options.right_padding_only || oracle == "oracles/gpt2");
    for token in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        assert!(!config["model"][token].is_null(), "{token}: {config}");
    }
}

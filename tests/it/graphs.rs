//! Exported and folded graphs, run in tract and ONNX Runtime, against PyTorch's logits.

use std::path::Path;

use candle_core::Device;
use ndarray::Array2;
use prefold::base::Checkpoint;
use prefold::export::{Dialect, ExportOptions, export};
use prefold::fold::fold_folder;
use prefold::runtime::{GraphDecoder, OrtOptions, OrtSession, Session, TractOptions, TractSession, library};

use crate::oracles::{Case, every_family};

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

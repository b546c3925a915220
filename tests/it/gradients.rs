//! `prefold forward --grad` against PyTorch's gradients and losses.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use crate::oracles::Case;
use crate::support::{arg, prefold_ok, shared};

fn flat(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference as a part of the largest entry.
fn relative(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (flat(found), flat(expected));
    let largest = expected.iter().fold(0.0f64, |m, e| m.max(e.abs()));
    let difference = found.iter().zip(&expected).fold(0.0f64, |m, (f, e)| m.max((f - e).abs()));
    difference / largest
}

fn check(family: &str) {
    let Some(oracle) = shared(&format!("oracles/{family}")) else { return };
    let folder = tempfile::tempdir().unwrap();
    let case = Case::load(&oracle, "left");
    let inputs: HashMap<String, Tensor> = ["input_ids", "attention_mask", "position_ids", "labels"]
        .map(|name| (name.to_owned(), case.tensors[&format!("left_{name}")].clone()))
        .into();
    candle_core::safetensors::save(&inputs, folder.path().join("in.safetensors")).unwrap();
    let adapter = oracle.join("adapter.safetensors");
    let meta: serde_json::Value =
        serde_json::from_slice(&std::fs::read(oracle.join("meta.json")).unwrap()).unwrap();
    let loss_expected = meta["grad"]["loss"].as_f64().unwrap();
    let expected = candle_core::safetensors::load(oracle.join("grads.safetensors"), &Device::Cpu).unwrap();
    for dtype in ["f32", "f64"] {
        let args = ["forward", "--model", arg(&oracle), "--adapter", arg(&adapter), "--inputs", "in.safetensors"];
        let args = [args.as_slice(), &["--out", "out.safetensors", "--grad", "--dtype", dtype]].concat();
        prefold_ok(folder.path(), &args);
        let found = candle_core::safetensors::load(folder.path().join("out.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(found["logits"].dtype(), DType::F32);
        assert!(case.distance(&found["logits"], "adapted_logits") < 1e-4);
        let loss = flat(&found["loss"])[0];
        assert!((loss - loss_expected).abs() < 1e-5, "{loss} vs {loss_expected}");
        for (name, expected) in &expected {
            let distance = relative(&found[&format!("grad.{name}")], expected);
            eprintln!("{family} {dtype} {name}: {distance:.1e}");
            assert!(distance < 1e-5);
        }
    }
}

#[test]
fn llama_mha() {
    check("llama_mha");
}

#[test]
fn llama_gqa() {
    check("llama_gqa");
}

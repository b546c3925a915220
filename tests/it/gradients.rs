//! `prefold forward --grad` against PyTorch's gradients and losses.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};

use crate::oracles::{Case, every_family};
use crate::support::{arg, prefold_ok};

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

/// Loss and gradients of one case, from either layout of oracle.
fn expected(oracle: &std::path::Path, case: &Case) -> (f64, HashMap<String, Tensor>) {
    if let Some(loss) = case.tensors.get(&format!("{}_loss", case.name)) {
        let prefix = format!("{}_grad.", case.name);
        let named = |(name, t): (&String, &Tensor)| Some((name.strip_prefix(&prefix)?.to_owned(), t.clone()));
        return (flat(loss)[0], case.tensors.iter().filter_map(named).collect());
    }
    let meta = std::fs::read(oracle.join("meta.json")).unwrap();
    let meta: serde_json::Value = serde_json::from_slice(&meta).unwrap();
    let gradients = candle_core::safetensors::load(oracle.join("grads.safetensors"), &Device::Cpu).unwrap();
    (meta["grad"]["loss"].as_f64().unwrap(), gradients)
}

fn check(oracle: &std::path::Path) {
    let cases = Case::all(oracle)
        .into_iter()
        .filter(|case| case.name == "left" || case.tensors.contains_key(&format!("{}_loss", case.name)));
    cases.for_each(|case| check_case(oracle, &case));
}

fn check_case(oracle: &std::path::Path, case: &Case) {
    let folder = tempfile::tempdir().unwrap();
    let inputs: HashMap<String, Tensor> = ["input_ids", "attention_mask", "labels"]
        .map(|name| (name.to_owned(), case.tensors[&format!("{}_{name}", case.name)].clone()))
        .into();
    candle_core::safetensors::save(&inputs, folder.path().join("in.safetensors")).unwrap();
    let adapter = oracle.join("adapter.safetensors");
    let (loss_expected, gradients) = expected(oracle, case);
    assert!(!gradients.is_empty());
    for dtype in ["f32", "f64"] {
        let args = ["forward", "--model", arg(oracle), "--adapter", arg(&adapter), "--inputs", "in.safetensors"];
        let args = [args.as_slice(), &["--out", "out.safetensors", "--grad", "--dtype", dtype]].concat();
        prefold_ok(folder.path(), &args);
        let found = candle_core::safetensors::load(folder.path().join("out.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(found["logits"].dtype(), DType::F32);
        assert!(case.distance(&found["logits"], "adapted_logits") < 1e-4);
        let loss = flat(&found["loss"])[0];
        assert!((loss - loss_expected).abs() < 1e-5, "{loss} vs {loss_expected}");
        for (name, expected) in &gradients {
            let distance = relative(&found[&format!("grad.{name}")], expected);
            let oracle = oracle.file_name().unwrap().to_string_lossy();
            eprintln!("{oracle} {} {dtype} {name}: {distance:.1e}", case.name);
            assert!(distance < 1e-5);
        }
    }
}

#[test]
fn losses_and_gradients_are_pytorch_s() {
    every_family().iter().for_each(|oracle| check(oracle));
}

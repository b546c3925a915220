//! `prefold forward --grad` against PyTorch's gradients and losses.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use prefold::adapter::Adapter;
use prefold::base::ops::Composed;
use prefold::base::{Checkpoint, Decoder};
use prefold::train::{BatchGradients, Models, Sft, batch_gradients};

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

/// The cases that gradients are stored of.
fn judged(oracle: &std::path::Path) -> impl Iterator<Item = Case> {
    let has_loss = |case: &Case| case.name == "left" || case.tensors.contains_key(&format!("{}_loss", case.name));
    Case::all(oracle).into_iter().filter(has_loss)
}

fn check(oracle: &std::path::Path) {
    judged(oracle).for_each(|case| check_case(oracle, &case));
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

/// As a training step takes them, composed as on a device without kernels of prefold's own, of a whole pass and of one that
/// keeps only the inputs of layers.
#[test]
fn composed_gradients_are_pytorch_s() {
    let _composed = Composed::on_this_thread();
    for oracle in every_family() {
        let checkpoint = Checkpoint::open(&oracle).unwrap();
        let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu).unwrap();
        let adapter = Adapter::open(&oracle.join("adapter.safetensors")).unwrap();
        let (adapter, vars) = adapter.trainable(DType::F32, &Device::Cpu).unwrap();
        let hook = adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap();
        for case in judged(&oracle) {
            let (_, expected) = expected(&oracle, &case);
            let batch = case.batch();
            // nothing predicts the first token of a row
            let learnt = batch.labels.iter().enumerate().filter(|(at, label)| **label != -100 && at % batch.seq != 0);
            let factor = 1.0 / learnt.count() as f64;
            for checkpoint_activations in [false, true] {
                let (models, hook, vars, objective) = (Models::frozen(&decoder), &*hook, &vars, &Sft);
                let of = BatchGradients { models, hook, vars, objective, checkpoint_activations };
                let mut gradients = BTreeMap::new();
                batch_gradients(&of, &batch, factor, &mut gradients).unwrap();
                for (name, expected) in &expected {
                    let distance = relative(&gradients[name], expected);
                    assert!(distance < 1e-5, "{} {} {name}: {distance:.1e}", oracle.display(), case.name);
                }
            }
        }
    }
}

#[test]
fn losses_and_gradients_are_pytorch_s() {
    every_family().iter().for_each(|oracle| check(oracle));
}

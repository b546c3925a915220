//! The objectives against PyTorch (`fixtures/objectives/make.py`), and through a decoder against finite differences.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use serde::Deserialize;

use super::preference::{Sequences, negative_log_sigmoid, pairs, sum_by_row};
use super::sft::{Labelled, labelled};
use super::*;
use crate::adapter::Adapter;
use crate::base::Checkpoint;
use crate::base::ops::{LabelLoss, logits_loss};

#[derive(Deserialize)]
struct Fixture {
    shape: [usize; 3],
    labels: Vec<i64>,
    policy: Vec<f64>,
    reference: Vec<f64>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    objective: ObjectiveKind,
    options: serde_json::Map<String, serde_json::Value>,
    loss: f64,
    figures: std::collections::BTreeMap<String, f64>,
    gradient: Vec<f64>,
}

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

impl Fixture {
    fn load() -> Self {
        serde_json::from_slice(&std::fs::read(fixtures("objectives/objectives.json")).unwrap()).unwrap()
    }

    /// The logits that predict a label, out of those of every position.
    fn labelled(&self, logits: &Tensor) -> Labelled {
        let [rows, seq, vocab] = self.shape;
        let (positions, targets) = labelled((rows, seq), &self.labels, vocab).unwrap();
        let index = Tensor::new(positions.as_slice(), &Device::Cpu).unwrap();
        let logits = logits.index_select(&index, 0).unwrap();
        let LabelLoss { nll, predicted } = logits_loss(&logits, &targets).unwrap();
        Labelled { nll, predicted, targets, rows: positions.iter().map(|at| *at as usize / seq).collect() }
    }

    fn logits(&self, values: &[f64], dtype: DType) -> Var {
        let [rows, seq, vocab] = self.shape;
        let logits = Tensor::from_slice(values, (rows * seq, vocab), &Device::Cpu).unwrap();
        Var::from_tensor(&logits.to_dtype(dtype).unwrap()).unwrap()
    }

    fn sequences(&self, logits: &Tensor) -> Sequences {
        sum_by_row(&self.labelled(logits), self.shape[0]).unwrap()
    }

    fn loss(&self, case: &Case, policy: &Tensor) -> BatchLoss {
        let options = |names: &[&str]| {
            let kept = case.options.iter().filter(|(name, _)| names.contains(&name.as_str()));
            serde_json::Value::Object(kept.map(|(k, v)| (k.clone(), v.clone())).collect())
        };
        match case.objective {
            ObjectiveKind::Sft => {
                let Labelled { nll, targets, .. } = self.labelled(policy);
                BatchLoss { sum: nll.sum_all().unwrap(), units: targets.len(), figures: Vec::new() }
            }
            ObjectiveKind::Dpo => {
                let dpo = dpo::Dpo(serde_json::from_value(options(&["beta", "label_smoothing"])).unwrap());
                let fixed = if case.options.contains_key("same") { &self.policy } else { &self.reference };
                let fixed = self.sequences(self.logits(fixed, policy.dtype()).as_tensor()).values;
                let policy = self.sequences(policy);
                let ratio = |row: usize| policy.values[row] - fixed[row];
                pairs(&policy, |row| dpo.pair(ratio(row), ratio(row + 1))).unwrap()
            }
            ObjectiveKind::Simpo => {
                let simpo = simpo::Simpo(serde_json::from_value(options(&["beta", "gamma"])).unwrap());
                let policy = self.sequences(policy);
                let row = |row: usize| (policy.values[row], policy.tokens[row]);
                pairs(&policy, |at| simpo.pair(row(at), row(at + 1))).unwrap()
            }
        }
    }
}

fn close(found: f64, expected: f64, tolerance: f64) -> bool {
    (found - expected).abs() <= tolerance * expected.abs().max(1.0)
}

#[test]
fn losses_gradients_and_figures_are_pytorch_s() {
    let fixture = Fixture::load();
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
        for case in &fixture.cases {
            let what = format!("{} {:?} {dtype:?}", case.objective.name(), case.options);
            let policy = fixture.logits(&fixture.policy, dtype);
            let found = fixture.loss(case, policy.as_tensor());
            assert!(close(found.value().unwrap(), case.loss, tolerance), "{what}: {}", found.value().unwrap());
            assert_eq!(found.figures.len(), case.figures.len(), "{what}");
            for (name, value) in &found.figures {
                assert!(close(*value, case.figures[*name], tolerance), "{what}: {name} is {value}");
            }
            let store = found.sum.backward().unwrap();
            let gradient = store.get(&policy).unwrap().to_dtype(DType::F64).unwrap();
            let gradient: Vec<f64> = gradient.flatten_all().unwrap().to_vec1().unwrap();
            for (at, (found, expected)) in gradient.iter().zip(&case.gradient).enumerate() {
                assert!(close(*found, *expected, tolerance), "{what}: gradient {at} is {found}, not {expected}");
            }
        }
    }
}

#[test]
fn the_sigmoid_is_stable_at_both_ends() {
    assert_eq!(negative_log_sigmoid(-1e4), (1e4, -1.0));
    assert_eq!(negative_log_sigmoid(1e4), (0.0, -0.0));
    assert_eq!(negative_log_sigmoid(0.0), (2f64.ln(), -0.5));
    let (value, slope) = negative_log_sigmoid(40.0);
    assert!((value / (-40f64).exp() - 1.0).abs() < 1e-12 && (slope / -(-40f64).exp() - 1.0).abs() < 1e-12);
}

#[test]
fn rows_without_labels_and_odd_rows_are_errors() {
    let nll = || Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let labelled = |rows: &[usize]| Labelled {
        nll: nll(),
        predicted: Tensor::zeros(3, DType::U32, &Device::Cpu).unwrap(),
        targets: vec![0; 3],
        rows: rows.to_vec(),
    };
    let error = sum_by_row(&labelled(&[0, 0, 2]), 3).err().unwrap().to_string();
    assert!(error.ends_with("row 1 of the batch carries no label"), "{error}");
    let odd = sum_by_row(&labelled(&[0, 1, 2]), 3).unwrap();
    let error = pairs(&odd, |_| dpo::Dpo(DpoConfig::default()).pair(0.0, 0.0)).err().unwrap().to_string();
    assert!(error.ends_with("3 rows are no pairs of chosen and rejected"), "{error}");
}

/// Two pairs, padded on the right.
fn batch() -> Batch {
    let rows: [(&[i64], usize); 4] =
        [(&[1, 9, 4, 7, 2], 2), (&[1, 9, 4, 3], 3), (&[1, 5, 8], 1), (&[1, 5, 6, 6, 2], 2)];
    let (seq, mut batch) = (5, Vec::new());
    for (ids, prompt) in rows {
        let pad = |values: Vec<i64>, with| values.into_iter().chain(std::iter::repeat(with)).take(seq).collect();
        let labels = ids.iter().enumerate().map(|(at, id)| if at < prompt { -100 } else { *id }).collect();
        let mask = vec![1; ids.len()];
        let positions = (0..ids.len() as i64).collect();
        batch.push([pad(ids.to_vec(), 0), pad(mask, 0), pad(positions, ids.len() as i64 - 1), pad(labels, -100)]);
    }
    let column = |at: usize| batch.iter().flat_map(|row: &[Vec<i64>; 4]| row[at].clone()).collect();
    Batch {
        input_ids: column(0),
        attention_mask: column(1),
        position_ids: column(2),
        labels: column(3),
        segments: None,
        batch: 4,
        seq,
    }
}

#[test]
fn gradients_through_the_decoder_are_finite_differences() {
    let folder = fixtures("oracles/llama_tied");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
    let adapter = Adapter::open(&folder.join("adapter.safetensors")).unwrap();
    let config = TrainConfig::default();
    for kind in [ObjectiveKind::Sft, ObjectiveKind::Dpo, ObjectiveKind::Simpo] {
        let objective = kind.objective(&config);
        let (trained, vars) = adapter.trainable(DType::F64, &Device::Cpu).unwrap();
        let hook = trained.hook(decoder.spec(), &Device::Cpu).unwrap();
        let loss = || {
            let hidden = decoder.hidden_states(&batch_input(&batch()).unwrap(), None, hook.as_ref()).unwrap();
            objective.loss(Models::frozen(&decoder), &hidden, &batch()).unwrap()
        };
        let store = loss().sum.backward().unwrap();
        let (name, var) = vars.iter().next().unwrap();
        let gradient: Vec<f64> = store.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let start: Vec<f64> = var.as_tensor().copy().unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let largest = gradient.iter().fold(0f64, |most, g| most.max(g.abs()));
        assert!(largest > 1e-6, "{kind:?}: {name} gets a gradient");
        let at_shift = |at: usize, shift: f64| {
            let mut values = start.clone();
            values[at] += shift;
            var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
            loss().value().unwrap()
        };
        for at in (0..start.len()).step_by(start.len() / 7 + 1) {
            let step = 1e-5;
            let slope = (at_shift(at, step) - at_shift(at, -step)) / (2.0 * step);
            let distance = (slope - gradient[at]).abs() / largest;
            assert!(distance < 1e-6, "{kind:?} {name}[{at}]: {} vs {slope}", gradient[at]);
        }
    }
}

#[test]
fn an_adapter_of_zeros_has_no_dpo_reward() {
    let checkpoint = Checkpoint::open(&fixtures("oracles/llama_tied")).unwrap();
    let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let zeros = Adapter::zeros(crate::adapter::AdapterConfig::prefix_plus(decoder.spec(), None)).unwrap();
    let hook = zeros.hook(decoder.spec(), &Device::Cpu).unwrap();
    let objective = ObjectiveKind::Dpo.objective(&TrainConfig::default());
    let hidden = decoder.hidden_states(&batch_input(&batch()).unwrap(), None, hook.as_ref()).unwrap();
    let found = objective.loss(Models::frozen(&decoder), &hidden, &batch()).unwrap();
    assert_eq!(found.units, 2);
    assert_eq!(found.value().unwrap(), 2.0 * 2f64.ln());
    assert!(found.figures.iter().all(|(_, value)| *value == 0.0), "{:?}", found.figures);
}

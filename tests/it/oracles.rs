//! Logits and gradients against PyTorch's, on tiny models with random weights.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use prefold::adapter::Adapter;
use prefold::base::{Checkpoint, Decoder, Input, NoHook, SiteHook};

use crate::support::shared;

/// One case of an oracle's `io.safetensors`.
pub struct Case {
    pub batch: usize,
    pub ids: Vec<i64>,
    pub mask: Vec<i64>,
    pub tensors: HashMap<String, Tensor>,
    name: &'static str,
}

impl Case {
    pub fn load(folder: &Path, name: &'static str) -> Self {
        let tensors = candle_core::safetensors::load(folder.join("io.safetensors"), &Device::Cpu).unwrap();
        let integers = |field: &str| tensors[&format!("{name}_{field}")].flatten_all().unwrap().to_vec1().unwrap();
        let batch = tensors[&format!("{name}_input_ids")].dim(0).unwrap();
        Self { batch, ids: integers("input_ids"), mask: integers("attention_mask"), tensors, name }
    }

    fn input(&self) -> Input {
        Input::new(self.batch, &self.ids, &self.mask, None).unwrap()
    }

    /// Largest difference to the stored logits where the mask is 1.
    pub fn distance(&self, logits: &Tensor, stored: &str) -> f32 {
        let vocab = logits.dim(2).unwrap();
        let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (found, expected) = (flat(logits), flat(&self.tensors[&format!("{}_{stored}", self.name)]));
        found
            .chunks(vocab)
            .zip(expected.chunks(vocab))
            .zip(&self.mask)
            .filter(|(_, m)| **m == 1)
            .flat_map(|((f, e), _)| f.iter().zip(e).map(|(f, e)| (f - e).abs()))
            .fold(0.0, f32::max)
    }
}

fn check_logits(family: &str) {
    let Some(folder) = shared(&format!("oracles/{family}")) else { return };
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let adapter = Adapter::open(&folder.join("adapter.safetensors")).unwrap();
    let hook = adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap();
    for dtype in [DType::F32, DType::F64] {
        let decoder = Decoder::load(&checkpoint, dtype, &Device::Cpu).unwrap();
        for name in ["single", "left", "right"] {
            let case = Case::load(&folder, name);
            for (hook, stored) in [(&NoHook as &dyn SiteHook, "base_logits"), (hook.as_ref(), "adapted_logits")] {
                let logits = decoder.forward(&case.input(), None, hook).unwrap();
                let distance = case.distance(&logits, stored);
                eprintln!("{family} {name} {stored} {dtype:?}: {distance:.2e}");
                assert!(distance < 1e-4);
            }
        }
    }
}

#[test]
fn llama_mha_logits() {
    check_logits("llama_mha");
}

#[test]
fn llama_gqa_logits() {
    check_logits("llama_gqa");
}

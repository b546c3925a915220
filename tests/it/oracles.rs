//! Logits and gradients against PyTorch's, on tiny models with random weights.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use prefold::adapter::Adapter;
use prefold::base::ops::Composed;
use prefold::base::{Checkpoint, Decoder, Input, KvCache, LongContext, NoHook, SiteHook};
use prefold::data::Batch;

use crate::support::{fixture, shared};

/// The folders of all oracles at hand, of every family.
pub fn every_family() -> Vec<std::path::PathBuf> {
    let mut ours: Vec<_> = std::fs::read_dir(fixture("oracles")).unwrap().map(|entry| entry.unwrap().path()).collect();
    ours.retain(|path| path.join("io.safetensors").is_file());
    ours.sort();
    let workshop = ["llama_mha", "llama_gqa", "mistral", "qwen2", "gpt2", "gpt_neox", "phi3", "gemma3"];
    ours.into_iter().chain(workshop.iter().filter_map(|name| shared(&format!("oracles/{name}")))).collect()
}

/// One case of an oracle's `io.safetensors`.
pub struct Case {
    pub batch: usize,
    pub ids: Vec<i64>,
    pub mask: Vec<i64>,
    pub tensors: HashMap<String, Tensor>,
    pub name: &'static str,
}

impl Case {
    /// The cases of an oracle.
    pub fn all(folder: &Path) -> Vec<Self> {
        let tensors = candle_core::safetensors::load(folder.join("io.safetensors"), &Device::Cpu).unwrap();
        let names = ["single", "left", "right"].into_iter();
        names
            .filter(|name| tensors.contains_key(&format!("{name}_input_ids")))
            .map(|name| Self::load(folder, name))
            .collect()
    }

    pub fn load(folder: &Path, name: &'static str) -> Self {
        let tensors = candle_core::safetensors::load(folder.join("io.safetensors"), &Device::Cpu).unwrap();
        let integers = |field: &str| tensors[&format!("{name}_{field}")].flatten_all().unwrap().to_vec1().unwrap();
        let batch = tensors[&format!("{name}_input_ids")].dim(0).unwrap();
        Self { batch, ids: integers("input_ids"), mask: integers("attention_mask"), tensors, name }
    }

    fn input(&self) -> Input {
        Input::new(self.batch, &self.ids, &self.mask, None).unwrap()
    }

    /// The case as a batch of training.
    pub fn batch(&self) -> Batch {
        let (batch, seq) = (self.batch, self.ids.len() / self.batch);
        let positions = self.mask.chunks(seq).flat_map(|row| {
            row.iter().scan(0, |seen, real| {
                *seen += real;
                Some((*seen - 1).max(0))
            })
        });
        let labels = self.tensors[&format!("{}_labels", self.name)].flatten_all().unwrap().to_vec1().unwrap();
        Batch {
            input_ids: self.ids.clone(),
            attention_mask: self.mask.clone(),
            position_ids: positions.collect(),
            labels,
            segments: None,
            batch,
            seq,
        }
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
            .fold(0.0, |most: f32, x| if x.is_nan() { f32::INFINITY } else { most.max(x) })
    }
}

#[test]
fn logits_are_pytorch_s() {
    check_logits();
}

/// The twin on the CPU of what a GPU computes without kernels of its own.
#[test]
fn composed_logits_are_pytorch_s() {
    let _composed = Composed::on_this_thread();
    check_logits();
}

fn check_logits() {
    for folder in every_family() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let adapter = Adapter::open(&folder.join("adapter.safetensors")).unwrap();
        let hook = adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::F64] {
            let decoder = Decoder::load(&checkpoint, dtype, &Device::Cpu).unwrap();
            for case in Case::all(&folder) {
                for (hook, stored) in [(&NoHook as &dyn SiteHook, "base_logits"), (hook.as_ref(), "adapted_logits")] {
                    let logits = decoder.forward(&case.input(), None, hook).unwrap();
                    let distance = case.distance(&logits, stored);
                    eprintln!("{name} {} {stored} {dtype:?}: {distance:.2e}", case.name);
                    assert!(distance < 1e-4);
                }
            }
        }
    }
}

/// Token by token, with keys and values of the tokens before from the cache. Where frequencies depend on the length, they
/// are those of the last token for all keys in a full pass, but for the cached ones those of their own time: there, only
/// lengths on one side of the switch compare.
#[test]
fn decoding_token_by_token_is_the_full_pass() {
    for folder in every_family() {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let spec = checkpoint.spec();
        let adapter = Adapter::open(&folder.join("adapter.safetensors")).unwrap();
        let hook = adapter.hook(spec, &Device::Cpu).unwrap();
        let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
        let switched = spec.attention.rotary.iter().any(|rotary| rotary.long != LongContext::Same);
        for case in Case::all(&folder).iter().filter(|case| !switched || case.name == "single") {
            let full = decoder.forward(&case.input(), None, hook.as_ref()).unwrap();
            let (seq, mut cache) = (case.ids.len() / case.batch, KvCache::new(spec.num_layers));
            let columns = |values: &[i64], range: std::ops::Range<usize>| -> Vec<i64> {
                values.chunks(seq).flat_map(|row| row[range.clone()].to_vec()).collect()
            };
            // a first pass over several tokens, then one at a time
            for (from, to) in std::iter::once((0, 5)).chain((5..seq).map(|at| (at, at + 1))) {
                let (ids, mask) = (columns(&case.ids, from..to), columns(&case.mask, 0..to));
                let input = Input::new(case.batch, &ids, &mask, None).unwrap();
                let step = decoder.forward(&input, Some(&mut cache), hook.as_ref()).unwrap();
                let difference = (step - full.narrow(1, from, to - from).unwrap()).unwrap().abs().unwrap();
                let seen = Tensor::new(columns(&case.mask, from..to), &Device::Cpu).unwrap();
                let seen = seen.reshape((case.batch, to - from, 1)).unwrap().to_dtype(DType::F64).unwrap();
                let most = difference.broadcast_mul(&seen).unwrap().flatten_all().unwrap().max(0).unwrap();
                let most: f64 = most.to_scalar().unwrap();
                assert!(most < 1e-11, "{} {} tokens {from}..{to}: {most:e}", folder.display(), case.name);
            }
        }
    }
}

/// A row of a batch may begin with padding whose queries see no key at all.
#[test]
fn half_types_stay_finite_under_padding() {
    for folder in every_family() {
        let checkpoint = Checkpoint::open(&folder).unwrap();
        for dtype in [DType::F16, DType::BF16] {
            let decoder = Decoder::load(&checkpoint, dtype, &Device::Cpu).unwrap();
            for case in Case::all(&folder) {
                let logits = decoder.forward(&case.input(), None, &NoHook).unwrap();
                let distance = case.distance(&logits, "base_logits");
                eprintln!("{} {} {dtype:?}: {distance:.2e}", folder.display(), case.name);
                assert!(distance < if dtype == DType::F16 { 0.05 } else { 0.5 });
            }
        }
    }
}

/// The files that llama.cpp's converter makes of tiny models of each architecture.
#[test]
fn gguf_files_are_the_models_that_they_were_made_of() {
    let folder = fixture("oracles/gguf");
    let mut names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert_eq!(names.len(), 18);
    for folder in names {
        let checkpoint = Checkpoint::open(&folder.join("model.gguf")).unwrap();
        let case = Case::load(&folder, "single");
        for dtype in [DType::F32, DType::F64] {
            let decoder = Decoder::load(&checkpoint, dtype, &Device::Cpu).unwrap();
            let distance = case.distance(&decoder.forward(&case.input(), None, &NoHook).unwrap(), "base_logits");
            eprintln!("{} {dtype:?}: {distance:.2e}", folder.file_name().unwrap().to_string_lossy());
            assert!(distance < 1e-4);
        }
    }
}

/// Checkpoints of one model are found under several beginnings of names.
#[test]
fn weights_are_found_under_the_names_that_checkpoints_use() {
    let renamed: [(&str, &[(&str, &str)]); 4] = [
        ("gpt2", &[("transformer.", "")]),
        ("gpt_neox", &[("lm_head.", "embed_out.")]),
        ("opt", &[("model.", "")]),
        ("gemma3", &[("model.language_model.", "language_model.model.")]),
    ];
    for (name, beginnings) in renamed {
        let oracle = fixture("oracles").join(name);
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(oracle.join("config.json"), folder.path().join("config.json")).unwrap();
        let model = candle_core::safetensors::load(oracle.join("model.safetensors"), &Device::Cpu).unwrap();
        for swapped in [false, true] {
            let rename = |name: &str| {
                let both = beginnings.iter().map(|(one, other)| if swapped { (one, other) } else { (other, one) });
                let found = both
                    .filter(|(from, _)| !from.is_empty())
                    .find_map(|(from, to)| name.strip_prefix(from).map(|rest| format!("{to}{rest}")));
                found.unwrap_or_else(|| name.to_owned())
            };
            let tensors: HashMap<String, Tensor> = model.iter().map(|(n, t)| (rename(n), t.clone())).collect();
            candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu).unwrap();
            let case = Case::load(&oracle, "right");
            let logits = decoder.forward(&case.input(), None, &NoHook).unwrap();
            assert!(case.distance(&logits, "base_logits") < 1e-4);
        }
    }
}

//! Pretrained models: stories260K, and SmolLM2-135M-Instruct out of its GGUF file, against logits and greedy
//! continuations of transformers.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use prefold::base::{Checkpoint, Decoder, Input, KvCache, NoHook};
use serde_json::Value;

use crate::support::shared;

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn last_logits(decoder: &Decoder, new: &[u32], cache: &mut KvCache) -> Vec<f32> {
    let new: Vec<i64> = new.iter().map(|id| i64::from(*id)).collect();
    let input = Input::new(1, &new, &vec![1; cache.len() + new.len()], None).unwrap();
    let hidden = decoder.hidden_states(&input, Some(cache), &NoHook).unwrap();
    let last = hidden.narrow(1, new.len() - 1, 1).unwrap();
    decoder.logits(&last).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

/// Greedy continuation of as many tokens as expected.
fn check_greedy(decoder: &Decoder, prompt: &[u32], expected: &[u32]) -> Vec<f32> {
    let mut cache = KvCache::new(decoder.spec().num_layers);
    let first = last_logits(decoder, prompt, &mut cache);
    let mut found = vec![argmax(&first)];
    while found.len() < expected.len() {
        found.push(argmax(&last_logits(decoder, &found[found.len() - 1..], &mut cache)));
    }
    assert_eq!(found, expected);
    first
}

#[test]
fn stories260k_is_what_it_was_in_pytorch() {
    let Some(folder) = shared("models/stories260k") else { return };
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let reference: Value = serde_json::from_slice(&std::fs::read(folder.join("reference.json")).unwrap()).unwrap();
    for case in reference["cases"].as_array().unwrap() {
        let prompt = ids(&case["input_ids"]);
        assert_eq!(tokenizer.encode(case["prompt"].as_str().unwrap(), true).unwrap(), prompt);
        let expected = ids(&case["greedy_ids"]);
        let logits = check_greedy(&decoder, &prompt, &expected);
        for (found, expected) in logits.iter().zip(case["last_logits_first8"].as_array().unwrap()) {
            assert!((f64::from(*found) - expected.as_f64().unwrap()).abs() < 1e-4);
        }
        for pair in case["last_logits_top5"].as_array().unwrap() {
            let (token, expected) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            assert!((f64::from(logits[token]) - expected).abs() < 1e-4);
        }
        let input = Input::row(&prompt).unwrap();
        let nll = mean_nll(&decoder.forward(&input, None, &NoHook).unwrap(), &prompt);
        assert!((nll - case["mean_nll"].as_f64().unwrap()).abs() < 1e-4);
    }
}

/// Mean negative log-likelihood of a row's tokens but the first.
fn mean_nll(logits: &Tensor, ids: &[u32]) -> f64 {
    let rows = logits.get(0).unwrap().to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let losses = rows.iter().zip(&ids[1..]).map(|(row, id)| {
        let max = row.iter().copied().fold(f64::MIN, f64::max);
        max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln() - row[*id as usize]
    });
    losses.sum::<f64>() / (ids.len() - 1) as f64
}

fn smollm2() -> Option<(PathBuf, PathBuf)> {
    let reference = shared("models/smollm2-reference.json")?;
    let cache = prefold::files::cache_folder().unwrap();
    match prefold::base::fetch::resolve_model("smollm2", &cache) {
        Ok(path) => Some((path, reference)),
        Err(_) => {
            eprintln!("skipped: smollm2 is not in the cache (prefold fetch smollm2)");
            None
        }
    }
}

fn smollm2_last_logits(reference: &Path, case: usize) -> Vec<f32> {
    let path = reference.with_extension("safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    tensors[&format!("case{case}.logits_last_f64")].to_vec1().unwrap()
}

#[test]
fn smollm2_from_gguf_is_what_it_was_in_transformers() {
    let Some((path, reference_path)) = smollm2() else { return };
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let reference: Value = serde_json::from_slice(&std::fs::read(&reference_path).unwrap()).unwrap();
    for text in reference["tokens"].as_array().unwrap() {
        assert_eq!(tokenizer.encode(text["text"].as_str().unwrap(), false).unwrap(), ids(&text["ids"]));
    }
    for (index, case) in reference["cases"].as_array().unwrap().iter().enumerate() {
        let prompt = ids(&case["input_ids"]);
        let logits = check_greedy(&decoder, &prompt, &ids(&case["greedy_32"]));
        let expected = smollm2_last_logits(&reference_path, index);
        let distance = logits.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
        eprintln!("case {index}: last-token logits within {distance:.1e} of float64");
        assert!(distance < 1e-3);
    }
}

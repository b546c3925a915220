//! `prefold adapter merge`: the merged model computes what base model and adapter do.

use std::path::Path;

use candle_core::{DType, Device};
use prefold::adapter::Adapter;
use prefold::base::{Checkpoint, Decoder, Input, NoHook};
use serde_json::{Value, json};

use crate::methods::adapter;
use crate::support::{arg, fixture, prefold, prefold_ok};

const IDS: [i64; 6] = [3, 17, 5, 9, 2, 11];

fn logits(model: &Path, with: Option<&Path>) -> Vec<f32> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let adapter = with.map(|path| Adapter::open_for(path, checkpoint.spec()).unwrap());
    let checkpoint = match &adapter {
        Some(adapter) => adapter.overlay(checkpoint).unwrap(),
        None => checkpoint,
    };
    let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu).unwrap();
    let hook = adapter.map(|adapter| adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap());
    let input = Input::new(1, &IDS, &[1; IDS.len()], None).unwrap();
    let logits = decoder.forward(&input, None, hook.as_deref().unwrap_or(&NoHook)).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let largest = a.iter().fold(1e-3f32, |largest, x| largest.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// Merges in every family, whose checkpoints keep weights whole, fused, interleaved, transposed and tied.
#[test]
fn a_merged_model_of_every_family_is_base_and_adapter() {
    let scratch = tempfile::tempdir().unwrap();
    let oracles = std::fs::read_dir(fixture("oracles")).unwrap().flatten().map(|entry| entry.path());
    let models: Vec<_> = oracles.filter(|path| path.join("config.json").is_file()).collect();
    assert!(models.len() > 25, "{models:?}");
    for (number, model) in models.iter().enumerate() {
        let name = format!("a{number}");
        let fields = json!({"method": "lora", "rank": 2, "alpha": 1.0, "dora": number % 2 == 1, "targets": null});
        let fields = match Checkpoint::open(model).unwrap().spec().mlp.gated {
            true => fields,
            false => {
                let mut fields = fields;
                fields["targets"] = json!(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]);
                fields
            }
        };
        adapter(model, &fields, &scratch.path().join(&name));
        let out = format!("m{number}");
        prefold_ok(scratch.path(), &["adapter", "merge", "--model", arg(model), "--adapter", &name, "--out", &out]);
        let (base, adapted) = (logits(model, None), logits(model, Some(&scratch.path().join(&name))));
        let merged = logits(&scratch.path().join(&out), None);
        assert!(distance(&adapted, &base) > 1e-3, "{}: the adapter does something", model.display());
        assert!(distance(&adapted, &merged) < 2e-5, "{}: {}", model.display(), distance(&adapted, &merged));
        let config = |folder: &Path| std::fs::read(folder.join("config.json")).unwrap();
        assert_eq!(config(model), config(&scratch.path().join(&out)));
    }
}

/// Half types stay, shards stay, what the adapter does not change keeps its bytes, and a trained model is merged too.
#[test]
fn a_merged_model_keeps_names_shards_and_types() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let demo = fixture("demo/model");
    let tensors = candle_core::safetensors::load(demo.join("model.safetensors"), &Device::Cpu).unwrap();
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    std::fs::create_dir(at.join("base")).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(demo.join(file), at.join("base").join(file)).unwrap();
    }
    let mut map = serde_json::Map::new();
    for (shard, names) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", shard + 1);
        let half = |name: &&String| ((*name).clone(), tensors[*name].to_dtype(DType::BF16).unwrap());
        let half: std::collections::HashMap<_, _> = names.iter().map(half).collect();
        candle_core::safetensors::save(&half, at.join("base").join(&file)).unwrap();
        map.extend(names.iter().map(|name| ((*name).clone(), json!(file))));
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(at.join("base/model.safetensors.index.json"), index).unwrap();
    adapter(&at.join("base"), &json!({"method": "lora", "rank": 2, "targets": ["v_proj"]}), &at.join("a"));
    prefold_ok(at, &["adapter", "merge", "--model", "base", "--adapter", "a", "--out", "merged"]);
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        let load = |folder: &str| candle_core::safetensors::load(at.join(folder).join(shard), &Device::Cpu).unwrap();
        let (base, merged) = (load("base"), load("merged"));
        assert_eq!(base.len(), merged.len());
        for (name, tensor) in &base {
            let values = |t: &candle_core::Tensor| {
                t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            assert_eq!(merged[name].dtype(), DType::BF16);
            assert_eq!(values(tensor) == values(&merged[name]), !name.contains("v_proj"), "{name}");
        }
    }
    for file in ["tokenizer.json", "model.safetensors.index.json"] {
        let bytes = |folder: &str| std::fs::read(at.join(folder).join(file)).unwrap();
        assert_eq!(bytes("base"), bytes("merged"));
    }
    let data = fixture("demo/train.jsonl");
    let args = ["-q", "train", "--model", arg(&demo), "--data", arg(&data), "--out", "full", "--method", "full"];
    prefold_ok(at, &[args.as_slice(), &["--max-steps", "2", "--learning-rate", "1e-2"]].concat());
    prefold_ok(at, &["adapter", "merge", "--model", arg(&demo), "--adapter", "full", "--out", "trained"]);
    let trained = logits(&at.join("trained"), None);
    assert_eq!(distance(&logits(&demo, Some(&at.join("full"))), &trained), 0.0);
    assert!(distance(&logits(&demo, None), &trained) > 1e-3);
}

#[test]
fn what_cannot_be_merged_is_said() {
    let scratch = tempfile::tempdir().unwrap();
    let model = fixture("demo/model");
    let fields: Value = json!({});
    adapter(&model, &fields, &scratch.path().join("a"));
    let output =
        prefold(scratch.path(), &["adapter", "merge", "--model", arg(&model), "--adapter", "a", "--out", "merged"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("prefix_plus cannot be merged"), "{error}");
    assert!(!scratch.path().join("merged").exists());
}

//! The same model as other files: other dtypes, shards, GGUF.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use prefold::base::{Checkpoint, Decoder, Input, NoHook};
use serde_json::{Value, json};

use crate::support::fixture;

fn logits(path: &Path, dtype: DType) -> Vec<f32> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let decoder = Decoder::load(&checkpoint, dtype, &Device::Cpu).unwrap();
    let input = Input::row(&[1, 17, 42, 99, 300, 7]).unwrap();
    let logits = decoder.forward(&input, None, &NoHook).unwrap();
    logits.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn weights() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture("demo/model/model.safetensors"), &Device::Cpu).unwrap()
}

fn config() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("demo/model/config.json")).unwrap()).unwrap()
}

fn write_config(folder: &Path) {
    std::fs::write(folder.join("config.json"), config().to_string()).unwrap();
}

#[test]
fn weights_may_be_of_any_float_type() {
    let whole = logits(&fixture("demo/model"), DType::F64);
    let scale = whole.iter().fold(0f32, |m, x| m.max(x.abs()));
    for (dtype, within) in [(DType::F64, 1e-6), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        let folder = tempfile::tempdir().unwrap();
        write_config(folder.path());
        let weights = weights().into_iter().map(|(n, t)| (n, t.to_dtype(dtype).unwrap())).collect();
        candle_core::safetensors::save(&weights, folder.path().join("model.safetensors")).unwrap();
        assert_eq!(Checkpoint::open(folder.path()).unwrap().dtype().unwrap(), dtype);
        for compute in [DType::F64, dtype] {
            let found = distance(&whole, &logits(folder.path(), compute)) / scale;
            assert!(found < within, "{dtype:?} computed in {compute:?}: {found}");
        }
    }
}

#[test]
fn weights_may_be_in_shards() {
    let folder = tempfile::tempdir().unwrap();
    write_config(folder.path());
    let mut shards: [HashMap<String, Tensor>; 2] = Default::default();
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in weights().into_iter().enumerate() {
        map.insert(name.clone(), json!(format!("model-{}.safetensors", i % 2)));
        shards[i % 2].insert(name, tensor);
    }
    for (i, shard) in shards.iter().enumerate() {
        candle_core::safetensors::save(shard, folder.path().join(format!("model-{i}.safetensors"))).unwrap();
    }
    let index = json!({ "weight_map": map });
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    assert_eq!(logits(&fixture("demo/model"), DType::F32), logits(folder.path(), DType::F32));

    std::fs::remove_file(folder.path().join("model-1.safetensors")).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("model-1.safetensors"), "{error}");
    let hostile = index.to_string().replace("model-1", "../model-1");
    std::fs::write(folder.path().join("model.safetensors.index.json"), hostile).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("is not a file name"), "{error}");
}

/// llama.cpp's names, and its order of rotary rows: pairs side by side where transformers keeps halves.
fn to_gguf(name: &str, tensor: &Tensor, config: &Value) -> (String, Tensor) {
    let name = match name {
        "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
        "model.norm.weight" => "output_norm.weight".to_owned(),
        _ => {
            let (layer, module) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
            let module = match module.strip_suffix(".weight").unwrap() {
                "input_layernorm" => "attn_norm",
                "post_attention_layernorm" => "ffn_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                other => panic!("{other}"),
            };
            format!("blk.{layer}.{module}.weight")
        }
    };
    let heads = match name.rsplit('.').nth(1).unwrap() {
        "attn_q" => config["num_attention_heads"].as_u64().unwrap() as usize,
        "attn_k" => config["num_key_value_heads"].as_u64().unwrap() as usize,
        _ => return (name, tensor.clone()),
    };
    let (rows, width) = tensor.dims2().unwrap();
    let halves = tensor.reshape((heads, 2, rows / heads / 2, width)).unwrap();
    (name, halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, width)).unwrap())
}

#[test]
fn a_gguf_file_computes_what_its_folder_computes() {
    let (folder, config) = (tempfile::tempdir().unwrap(), config());
    let path = folder.path().join("model.gguf");
    let number = |field: &str| gguf_file::Value::U32(config[field].as_u64().unwrap() as u32);
    let float = |x: f64| gguf_file::Value::F32(x as f32);
    let metadata = [
        ("general.architecture", gguf_file::Value::String("llama".into())),
        ("llama.block_count", number("num_hidden_layers")),
        ("llama.context_length", number("max_position_embeddings")),
        ("llama.embedding_length", number("hidden_size")),
        ("llama.feed_forward_length", number("intermediate_size")),
        ("llama.attention.head_count", number("num_attention_heads")),
        ("llama.attention.head_count_kv", number("num_key_value_heads")),
        ("llama.vocab_size", number("vocab_size")),
        ("llama.attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"].as_f64().unwrap())),
        ("llama.rope.freq_base", float(config["rope_theta"].as_f64().unwrap_or(10_000.0))),
    ];
    let metadata: Vec<(&str, &gguf_file::Value)> = metadata.iter().map(|(k, v)| (*k, v)).collect();
    let tensors: Vec<(String, QTensor)> = weights()
        .iter()
        .map(|(name, tensor)| {
            let (name, tensor) = to_gguf(name, tensor, &config);
            (name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
        })
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut file = std::fs::File::create(&path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    drop(file);
    assert_eq!(logits(&fixture("demo/model"), DType::F32), logits(&path, DType::F32));
}

//! PEFT's folders, against the logits that PEFT computes with them (`fixtures/peft/make.py`).

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use prefold::adapter::{Adapter, AdapterConfig, Lora, Method, peft};
use prefold::base::{Checkpoint, Decoder, DecoderSpec, Input, Linear, Part, SiteHook, WeightShape, family};

use crate::support::{arg, fixture, prefold, prefold_ok};

const LLAMA: [&str; 6] = ["lora", "rslora", "layers", "dora", "prefix", "prefix_projection"];

fn folder(name: &str) -> PathBuf {
    fixture("peft").join(name)
}

fn io(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder(name).join("io.safetensors"), &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference to PEFT's logits where the mask is 1.
fn distance(decoder: &Decoder, hook: &dyn SiteHook, io: &HashMap<String, Tensor>) -> f64 {
    let integers = |name: &str| io[name].flatten_all().unwrap().to_vec1::<i64>().unwrap();
    let (batch, _) = io["input_ids"].dims2().unwrap();
    let mask = integers("attention_mask");
    let input = Input::new(batch, &integers("input_ids"), &mask, None).unwrap();
    let logits = decoder.forward(&input, None, hook).unwrap();
    let vocab = logits.dim(2).unwrap();
    let (found, expected) = (flat(&logits), flat(&io["logits"]));
    let rows = found.chunks(vocab).zip(expected.chunks(vocab)).zip(mask).filter(|(_, m)| *m == 1);
    rows.flat_map(|((f, e), _)| f.iter().zip(e).map(|(f, e)| (f - e).abs())).fold(0.0, f64::max)
}

fn llama() -> (Checkpoint, Decoder) {
    let checkpoint = Checkpoint::open(&fixture("oracles/llama_bias")).unwrap();
    let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
    (checkpoint, decoder)
}

/// A Phi-3 without long context is a Llama whose projections are fused.
fn phi3() -> (DecoderSpec, Decoder) {
    let path = folder("phi3/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["model_type"] = "llama".into();
    let mut spec = family::spec_from_config(&path, &config).unwrap();
    let rows = |start, count, of| Part::Rows { start, count, of };
    let (qkv, gate_up) = ("model.layers.{}.self_attn.qkv_proj", "model.layers.{}.mlp.gate_up_proj");
    spec.names = std::mem::take(&mut spec.names)
        .with_linear(Linear::Query, qkv, rows(0, 32, 64), false)
        .with_linear(Linear::Key, qkv, rows(32, 16, 64), false)
        .with_linear(Linear::Value, qkv, rows(48, 16, 64), false)
        .with_linear(Linear::Gate, gate_up, rows(0, 48, 96), false)
        .with_linear(Linear::Up, gate_up, rows(48, 48, 96), false);
    let tensors = candle_core::safetensors::load(folder("phi3/model.safetensors"), &Device::Cpu).unwrap();
    let decoder = Decoder::from_weights(&spec, |weight: &WeightShape| {
        let source = spec.names.source(weight.role);
        let whole = tensors[&source.name].to_dtype(DType::F64).unwrap();
        Ok(source.part_of(&[whole], &weight.shape).unwrap().contiguous().unwrap())
    });
    let decoder = decoder.unwrap();
    (spec, decoder)
}

/// Reads, compares, writes, reads again, compares again.
fn check(name: &str, spec: &DecoderSpec, decoder: &Decoder) {
    let io = io(name);
    let read = |path: &Path| {
        let adapter = Adapter::open_for(path, spec).unwrap();
        let distance = distance(decoder, &*adapter.hook(spec, &Device::Cpu).unwrap(), &io);
        eprintln!("{name}: {distance:.1e}");
        assert!(distance < 1e-5, "{name}: {distance:.1e}");
        adapter
    };
    let adapter = read(&folder(name));
    assert!(distance(decoder, &prefold::base::NoHook, &io) > 0.1, "{name} does something");
    let (own, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    adapter.save(own.path()).unwrap();
    peft::write(&read(own.path()), spec, theirs.path()).unwrap();
    read(theirs.path());
}

#[test]
fn folders_of_peft_give_peft_s_logits() {
    let (checkpoint, decoder) = llama();
    for name in LLAMA {
        check(name, checkpoint.spec(), &decoder);
    }
}

#[test]
fn fused_modules_become_their_parts_and_whole_again() {
    let (spec, decoder) = phi3();
    for name in ["fused", "fused_dora"] {
        check(name, &spec, &decoder);
        let tensors = |path: &Path| {
            let path = path.join("adapter_model.safetensors");
            candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect::<BTreeMap<_, _>>()
        };
        let written = tempfile::tempdir().unwrap();
        peft::write(&Adapter::open_for(&folder(name), &spec).unwrap(), &spec, written.path()).unwrap();
        let (before, after) = (tensors(&folder(name)), tensors(written.path()));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (key, tensor) in before {
            assert_eq!(flat(&tensor), flat(&after[&key]), "{key}");
        }
    }
}

#[test]
fn fused_modules_of_gpt2_and_gpt_neox_are_read_and_written() {
    for name in ["gpt2", "gpt_neox"] {
        let checkpoint = Checkpoint::open(&fixture("oracles").join(name)).unwrap();
        let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
        check(name, checkpoint.spec(), &decoder);
    }
}

/// The text part of a model that sees images: PEFT's modules are deeper, and some belong to the other part.
#[test]
fn modules_inside_of_a_larger_model_are_read_and_written() {
    let checkpoint = Checkpoint::open(&fixture("oracles/gemma3")).unwrap();
    let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
    let spec = checkpoint.spec();
    check("gemma3", spec, &decoder);
    let written = tempfile::tempdir().unwrap();
    let adapter = Adapter::open_for(&folder("gemma3"), spec).unwrap();
    peft::write(&adapter, spec, written.path()).unwrap();
    let read = |path: &Path| {
        let tensors = candle_core::safetensors::load(path.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
        tensors.into_keys().filter(|name| !name.contains("vision_tower")).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(read(&folder("gemma3")), read(written.path()));
    let config = std::fs::read_to_string(written.path().join("adapter_config.json")).unwrap();
    assert!(config.contains("\"model.language_model.layers.0.self_attn.q_proj\""), "not of the images' part: {config}");
}

/// PEFT knows transformers' modules, whatever a GGUF file calls its tensors.
#[test]
fn modules_are_transformers_s_for_a_gguf_file_too() {
    let modules = [
        ("gpt2", "transformer.h.0.attn.c_attn"),
        ("gptneox", "gpt_neox.layers.0.mlp.dense_4h_to_h"),
        ("phi2", "model.layers.0.self_attn.dense"),
        ("phi3", "model.layers.0.mlp.gate_up_proj"),
    ];
    for (name, module) in modules {
        let checkpoint = Checkpoint::open(&fixture("oracles/gguf").join(name).join("model.gguf")).unwrap();
        let spec = checkpoint.spec();
        let mut config = AdapterConfig::prefix_plus(spec, None);
        let targets = Some(spec.linears().map(Into::into).collect());
        config.method = Method::Lora(Lora { rank: 2, targets, ..Lora::default() });
        let written = tempfile::tempdir().unwrap();
        peft::write(&Adapter::zeros(config).unwrap(), spec, written.path()).unwrap();
        let path = written.path().join("adapter_model.safetensors");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let name_of = format!("base_model.model.{module}.lora_A.weight");
        assert!(tensors.contains_key(&name_of), "{name}: {:?}", tensors.keys().min());
        Adapter::open_for(written.path(), spec).unwrap();
    }
}

/// After training, the parts of a fused module have grown apart: PEFT's folder holds them in a greater rank.
#[test]
fn parts_that_grew_apart_are_one_module_of_greater_rank() {
    let (spec, decoder) = phi3();
    let adapter = Adapter::open_for(&folder("fused"), &spec).unwrap();
    let tensors = adapter.tensors().iter().map(|(name, tensor)| {
        let factor = if name.contains("k_proj.lora_A") || name.contains("up_proj.lora_A") { -0.5 } else { 1.0 };
        (name.clone(), (tensor * factor).unwrap())
    });
    let adapter = Adapter::new(adapter.config().clone(), tensors.collect()).unwrap();
    let io = io("fused");
    let logits = |adapter: &Adapter| {
        let input = Input::row(&[3, 14, 15, 9, 2, 6]).unwrap();
        flat(&decoder.forward(&input, None, &*adapter.hook(&spec, &Device::Cpu).unwrap()).unwrap())
    };
    assert!(distance(&decoder, &*adapter.hook(&spec, &Device::Cpu).unwrap(), &io) > 0.1, "it is another function");
    let written = tempfile::tempdir().unwrap();
    peft::write(&adapter, &spec, written.path()).unwrap();
    let again = Adapter::open_for(written.path(), &spec).unwrap();
    assert_eq!(again.tensors()["layers.0.self_attn.q_proj.lora_A"].dims(), [12, 32]);
    let difference = logits(&adapter).iter().zip(logits(&again)).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
    assert!(difference < 1e-12, "{difference:e}");
}

#[test]
fn gradients_of_dora_are_peft_s() {
    let scratch = tempfile::tempdir().unwrap();
    let (model, dora) = (fixture("oracles/llama_bias"), folder("dora"));
    let inputs = dora.join("io.safetensors");
    let args = ["forward", "--model", arg(&model), "--adapter", arg(&dora), "--inputs", arg(&inputs)];
    let args = [args.as_slice(), &["--out", "out.safetensors", "--grad", "--dtype", "f64"]].concat();
    prefold_ok(scratch.path(), &args);
    let found = candle_core::safetensors::load(scratch.path().join("out.safetensors"), &Device::Cpu).unwrap();
    let expected = io("dora");
    assert!((flat(&found["loss"])[0] - flat(&expected["loss"])[0]).abs() < 1e-6);
    let mut compared = 0;
    for (name, expected) in expected.iter().filter_map(|(name, t)| Some((name.strip_prefix("grad.")?, t))) {
        let own = name.strip_prefix("base_model.model.model.").unwrap().replace("lora_magnitude_vector", "magnitude");
        let (found, expected) = (flat(&found[&format!("grad.{own}")]), flat(expected));
        let largest = expected.iter().fold(0.0f64, |m, e| m.max(e.abs()));
        let difference = found.iter().zip(&expected).fold(0.0f64, |m, (f, e)| m.max((f - e).abs()));
        assert!(difference < 1e-5 * largest, "{name}: {difference:.1e} of {largest:.1e}");
        compared += 1;
    }
    assert_eq!(compared, 2 * 7 * 3);
}

/// A copy of a folder with some fields of its configuration changed.
fn changed(name: &str, fields: serde_json::Value) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let config = std::fs::read(folder(name).join("adapter_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    std::fs::write(copy.path().join("adapter_config.json"), config.to_string()).unwrap();
    std::fs::copy(folder(name).join("adapter_model.safetensors"), copy.path().join("adapter_model.safetensors"))
        .unwrap();
    copy
}

#[test]
fn what_changes_the_function_is_refused_and_the_rest_is_not() {
    use serde_json::json;
    let (checkpoint, decoder) = llama();
    let open = |name: &str, fields| Adapter::open_for(changed(name, fields).path(), checkpoint.spec());
    let messages = [
        ("lora", json!({"peft_type": "IA3"})),
        ("lora", json!({"bias": "all"})),
        ("lora", json!({"lora_bias": true})),
        ("lora", json!({"modules_to_save": ["lm_head"]})),
        ("lora", json!({"init_lora_weights": "pissa"})),
        ("lora", json!({"layer_replication": [[0, 1], [0, 2]]})),
        ("lora", json!({"r": 5})),
        ("lora", json!({"r": "four"})),
        ("lora", json!({"target_modules": ["q_proj"]})),
        ("lora", json!({"target_modules": "("})),
        ("lora", json!({"layers_to_transform": [1]})),
        ("lora", json!({"use_dora": true})),
        ("prefix", json!({"num_virtual_tokens": 4})),
        ("prefix", json!({"token_dim": 32})),
    ]
    .map(|(name, fields)| open(name, fields).unwrap_err().to_string());
    let messages: Vec<_> = messages.iter().map(|m| m.split_once("is a PEFT adapter, ").unwrap().1).collect();
    insta::assert_snapshot!(messages.join("\n"), @"
    but its type is IA3
    but `bias` is all: it changes biases
    but `lora_bias` trains a bias of B, which prefold does not compute
    but `modules_to_save` replaces whole modules, which prefold does not compute
    but `init_lora_weights` is pissa, which may have changed the base weights
    but `layer_replication` repeats layers, which prefold does not compute
    but `model.layers.0.mlp.down_proj.lora_A` has shape [4, 48], the model and configuration ask for [5, 48]
    but `r` is not a count
    but it has tensors of `model.layers.0.mlp.down_proj`, which its configuration does not target
    but `target_modules` is not an expression: Parsing error at position 7: Opening parenthesis without closing parenthesis
    but it has tensors of `model.layers.0.mlp.down_proj`, which its configuration does not target
    but `model.layers.0.mlp.down_proj` has no lora_magnitude_vector
    but `prompt_embeddings` has shape [5, 64], its configuration asks for [4, 64]
    but `token_dim` is 32, the model's is 16
    ");

    let harmless =
        json!({"lora_dropout": 0.1, "init_lora_weights": "gaussian", "a_field_of_tomorrow": 3, "megatron_core": "x"});
    let adapter = open("lora", harmless).unwrap();
    assert!(distance(&decoder, &*adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap(), &io("lora")) < 1e-5);
}

#[test]
fn the_command_converts_and_says_what_peft_has_no_form_for() {
    let scratch = tempfile::tempdir().unwrap();
    let model = fixture("oracles/llama_bias");
    let convert = |adapter: &str, to: &str, out: &str| {
        prefold(
            scratch.path(),
            &["adapter", "convert", "--adapter", adapter, "--model", arg(&model), "--to", to, "--out", out],
        )
    };
    assert!(convert(arg(&folder("rslora")), "prefold", "own").status.success());
    assert!(convert("own", "peft", "theirs").status.success());
    let printed = prefold_ok(scratch.path(), &["inspect", "own"]);
    assert!(printed.contains("method: lora") && printed.contains("layers.1.mlp.up_proj.lora_A [4, 32]"), "{printed}");
    let printed = prefold_ok(scratch.path(), &["inspect", "theirs"]);
    assert!(printed.contains("method: LORA") && printed.contains("use_rslora: true"), "{printed}");

    let output = convert(arg(&model.join("adapter.safetensors")), "peft", "none");
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("PEFT has no form for this adapter: its method is prefix_plus"), "{error}");
    assert!(!scratch.path().join("none").exists());
}

//! The memory estimate: what it reads, and how near it is to the measured peak. A program of its own: beside other tests, which want
//! the same cores, a peak is higher by a third.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use std::io::{Seek, SeekFrom, Write};
use std::process::Command;

use serde_json::{Value, json};

#[path = "it/support.rs"]
#[allow(dead_code)]
mod support;

use support::{arg, fixture, prefold_ok};

/// The plan of a model of 27 GB is made from its headers: the file is a hole after them.
#[test]
fn a_dry_run_reads_no_weights() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("large");
    std::fs::create_dir(&folder).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("demo/model").join(file), folder.join(file)).unwrap();
    }
    let (hidden, inner, layers, vocab) = (4096u64, 11008u64, 32u64, 32000u64);
    let config = json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "hidden_act": "silu", "tie_word_embeddings": false,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut shapes =
        vec![("model.embed_tokens".to_owned(), vec![vocab, hidden]), ("lm_head".to_owned(), vec![vocab, hidden])];
    shapes.push(("model.norm".to_owned(), vec![hidden]));
    for layer in 0..layers {
        let mut add = |name: &str, shape: &[u64]| shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(&format!("self_attn.{name}"), &[hidden, hidden]);
        }
        add("mlp.gate_proj", &[inner, hidden]);
        add("mlp.up_proj", &[inner, hidden]);
        add("mlp.down_proj", &[hidden, inner]);
        add("input_layernorm", &[hidden]);
        add("post_attention_layernorm", &[hidden]);
    }
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in shapes {
        let bytes = shape.iter().product::<u64>() * 4;
        header.insert(
            format!("{name}.weight"),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [at, at + bytes]}),
        );
        at += bytes;
    }
    let header = Value::Object(header).to_string();
    let mut file = std::fs::File::create(folder.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    if file.set_len(8 + header.len() as u64 + at).is_err() {
        eprintln!("skipped: the file system knows no holes");
        return;
    }
    let data = fixture("demo/train.jsonl");
    let args =
        ["train", "--model", "large", "--data", arg(&data), "--out", "run", "--dry-run", "--json", "--method", "lora"];
    let plan: Value = serde_json::from_str(&prefold_ok(scratch.path(), &args)).unwrap();
    let memory = &plan["plan"]["memory"];
    assert_eq!(memory["weights"], at, "float32, as the file has them");
    assert!(memory["process"].as_u64().unwrap() < 1 << 28, "{memory}");
    assert!(!scratch.path().join("run").exists());
}

/// Estimate and measured peak of the same process differ by less than a quarter, although the program itself is a third of
/// it here. On one thread: which of several takes a block from which heap differs from run to run.
#[test]
#[cfg(target_os = "linux")]
fn estimates_are_near_the_measured_peak() {
    let scratch = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("demo/model"), fixture("demo/train.jsonl"));
    for method in ["prefix_plus", "lora", "prefix", "full"] {
        for saving in [None, Some("--checkpoint-activations"), Some("--offload-optimizer")] {
            let args = ["train", "--model", arg(&model), "--data", arg(&data), "--out", "run", "--batch-size", "96"];
            let mut args = [args.as_slice(), &["--method", method, "--max-steps", "3", "--save-every", "0"]].concat();
            args.extend(saving);
            let plan = prefold_ok(scratch.path(), &[args.as_slice(), &["--dry-run", "--json"]].concat());
            let plan: Value = serde_json::from_str(&plan).unwrap();
            let estimate = plan["plan"]["memory"]["peak"].as_u64().unwrap() as f64;
            let mut run = Command::new(env!("CARGO_BIN_EXE_prefold"));
            run.current_dir(scratch.path()).env("RAYON_NUM_THREADS", "1").args(&args).arg("--overwrite");
            let output = run.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let manifest: Value =
                serde_json::from_slice(&std::fs::read(scratch.path().join("run/prefold.json")).unwrap()).unwrap();
            let measured = manifest["facts"]["peak_resident_bytes"].as_u64().unwrap() as f64;
            let ratio = estimate / measured;
            assert!((0.75..1.33).contains(&ratio), "{method}, {saving:?}: {estimate} estimated, {measured} measured");
        }
    }
}

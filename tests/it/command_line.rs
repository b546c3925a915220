//! What a user sees when something is wrong: one clear error, a non-zero exit, nothing left behind, the input untouched.

use std::path::Path;

use crate::support::{arg, fixture, prefold, prefold_ok};

/// The error text of a command that must fail with exit code 1, without paths of this machine.
pub fn failure(folder: &Path, args: &[&str]) -> String {
    failure_with(1, folder, args)
}

fn failure_with(code: i32, folder: &Path, args: &[&str]) -> String {
    let output = prefold(folder, args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    assert!(!error.contains("panicked"), "{error}");
    let folder = folder.display().to_string();
    let error = error.replace(&folder, "FOLDER").replace(&fixture("").display().to_string(), "FIXTURES/");
    error.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn write(folder: &Path, name: &str, content: &str) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

/// A copy of the demo's model to damage.
fn copy_model(folder: &Path) {
    std::fs::create_dir(folder.join("model")).unwrap();
    for entry in std::fs::read_dir(fixture("demo/model")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join("model").join(entry.file_name())).unwrap();
    }
}

#[test]
fn checkpoints_that_do_not_open() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let export = |model: &str| failure(at, &["export", "--model", model, "--out", "out"]);
    let mut errors = vec![export("nowhere")];
    write(at, "empty/readme", "");
    errors.push(export("./empty"));
    write(at, "unknown/config.json", r#"{"model_type": "mamba"}"#);
    std::fs::copy(fixture("demo/model/model.safetensors"), at.join("unknown/model.safetensors")).unwrap();
    errors.push(export("./unknown"));
    write(at, "broken.gguf", "GGUF");
    errors.push(export("./broken.gguf"));
    copy_model(at);
    let weights = at.join("model/model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    errors.push(export("./model"));
    std::fs::write(&weights, &whole).unwrap();
    let config = std::fs::read_to_string(at.join("model/config.json")).unwrap();
    write(at, "model/config.json", &config.replace("\"hidden_size\": 96", "\"hidden_size\": 192"));
    errors.push(export("./model"));
    write(at, "model/config.json", "{");
    errors.push(export("./model"));
    insta::assert_snapshot!(errors.join("\n\n"), @"
    prefold::fetch::unknown × there is no model `nowhere` help: known names: smollm2 (SmolLM2-135M-Instruct, Q4_1 GGUF, 98 MB); or a path to a Hugging Face folder or a .gguf file, or hf:OWNER/NAME[@REVISION]

    prefold::base::not_a_checkpoint × ./empty is not a checkpoint: it holds no config.json help: a checkpoint is a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a .gguf file

    prefold::base::family × ./unknown/config.json: model_type `mamba` is not a family that prefold knows help: known families: llama, mistral, qwen2, qwen3, gpt2, gpt_neox, phi, phi3, gemma2, gemma3, gemma3_text, smollm3, granite, olmo2, stablelm, opt, cohere

    prefold::base::gguf × ./broken.gguf is not a readable GGUF file: it ends inside the version: 4 bytes are announced │ at offset 4, 0 are left help: the file is damaged, truncated or no GGUF file: fetch it again

    prefold::base::safetensors × ./model/model.safetensors is not a whole safetensors file: incomplete metadata, file not fully │ covered help: it is truncated or damaged; fetch or write it again

    prefold::base::shape × ./model: tensor `model.embed_tokens.weight` has shape [512, 96], the configuration asks for │ [512, 192] help: config.json and the weights do not belong together

    prefold::files::json × cannot parse ./model/config.json as a model configuration: EOF while parsing an object at line │ 1 column 1 help: the file is damaged, or was written by another tool or version
    ");
    assert_eq!(names(at), ["broken.gguf", "empty", "model", "unknown"], "nothing was left behind");
}

#[test]
fn records_that_cannot_be_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = fixture("demo/model");
    let train = |data: &str| {
        write(at, "data.jsonl", data);
        failure(at, &["-q", "train", "--model", arg(&model), "--data", "data.jsonl", "--out", "out"])
    };
    let good = "{\"text\": \"a\", \"label\": \"b\"}\n";
    let errors = [
        train(""),
        train("not json"),
        train(&format!("{good}{{\"text\": \"a\"}}\n")),
        train(&format!("{good}{{\"prompt\": \"a\", \"completion\": \"b\"}}\n")),
        failure(at, &["-q", "train", "--model", arg(&model), "--data", "nowhere.jsonl", "--out", "out"]),
        failure(at, &["-q", "train", "--model", arg(&model), "--out", "out"]),
        {
            write(at, "data.jsonl", good);
            write(at, "run.toml", "[train]\nlearning_rat = 1.0\n");
            failure(
                at,
                &["train", "--config", "run.toml", "--model", arg(&model), "--data", "data.jsonl", "--out", "out"],
            )
        },
        failure(at, &["-q", "train", "--model", arg(&model), "--data", "data.jsonl", "--out", "out", "--epochs", "0"]),
        failure(at, &["-q", "train", "--model", arg(&model), "--data", "data.jsonl", "--out", "out", "--resume"]),
    ];
    insta::assert_snapshot!(errors.join("\n\n"), @r#"
    prefold::data::empty × data.jsonl holds no records help: a record is one of {"text", "label"}, {"prompt", "completion"}, {"text"}, {"instruction", "input", "output"}, {"messages": [{"role", "content"}, …]}, {"conversations": [{"from", "value"}, …]} or {"prompt", "chosen", "rejected"}

    prefold::data::json × data.jsonl:1: not JSON: expected ident at column 2 help: every record is one JSON object: {"text", "label"}, {"prompt", "completion"}, {"text"}, {"instruction", "input", "output"}, {"messages": [{"role", "content"}, …]}, {"conversations": [{"from", "value"}, …]} or {"prompt", "chosen", "rejected"}

    prefold::data::field × data.jsonl:2: the field `label` is missing help: a record of the layout `classification` is {"text": "…", "label": "…"}

    prefold::data::mixed × data.jsonl:2: this is a completion record, but the file began with classification records help: keep one layout in a data set; this one's is {"text": "…", "label": "…"}

    prefold::files::io × cannot read nowhere.jsonl: No such file or directory (os error 2) help: check the path

    × --model, --data and --out are needed help: give them on the command line or in --config

    × run.toml: there is no option `train.learning_rat` help: did you mean `train.learning_rate`?

    prefold::train::config × training option `epochs` is 0, but must be at least 1 and below 2³¹ help: see `prefold train --help`

    prefold::train::nothing_to_resume × out holds no run to resume help: start without --resume
    "#);
    assert_eq!(names(at), ["data.jsonl", "run.toml"], "nothing was left behind");
}

#[test]
fn adapters_and_graphs_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = fixture("demo/model");
    prefold_ok(at, &["export", "--model", arg(&model), "--out", "base"]);
    let before = std::fs::read(at.join("base/model.onnx")).unwrap();
    let config = |layers: usize, heads: usize, width: usize| {
        format!(r#"{{"method": "prefix_plus", "num_layers": {layers}, "num_heads": {heads}, "head_dim": {width}}}"#)
    };
    let adapter = |name: &str, config: &str, layers: usize, shape: (usize, usize, usize)| {
        write(at, &format!("{name}/adapter_config.json"), config);
        let zeros = candle_core::Tensor::zeros(shape, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let tensors = (0..layers).map(|i| (format!("layers.{i}.M"), zeros.clone())).collect();
        candle_core::safetensors::save(&tensors, at.join(name).join("adapter_model.safetensors")).unwrap();
    };
    adapter("deep", &config(9, 6, 16), 9, (6, 16, 16));
    adapter("lies", &config(4, 6, 16), 4, (6, 8, 8));
    adapter("short", &config(4, 6, 16), 3, (6, 16, 16));
    adapter("newer", &config(4, 6, 16).replace('{', r#"{"format_version": 2, "#), 4, (6, 16, 16));
    adapter("other", &config(4, 6, 16).replace("prefix_plus", "magic"), 4, (6, 16, 16));
    adapter("narrow", &config(4, 6, 8), 4, (6, 8, 8));
    adapter("few", &config(4, 3, 16), 4, (3, 16, 16));
    adapter("fits", &config(4, 6, 16), 4, (6, 16, 16));
    let fold =
        |graph: &str, adapter: &str| failure(at, &["fold", "--graph", graph, "--adapter", adapter, "--out", "out"]);
    let mut errors =
        ["nowhere", "deep", "narrow", "few", "lies", "short", "newer", "other"].map(|name| fold("base", name)).to_vec();
    errors.push(fold("nowhere", "fits"));
    write(at, "text.onnx", "this is no graph");
    errors.push(fold("text.onnx", "fits"));
    write(at, "cut/model.onnx", "");
    std::fs::write(at.join("cut/model.onnx"), &before[..before.len() / 2]).unwrap();
    errors.push(fold("cut", "fits"));
    prefold_ok(at, &["fold", "--graph", "base", "--adapter", "fits", "--out", "folded"]);
    errors.push(fold("folded", "fits"));
    errors.push(failure(at, &["fold", "--graph", "base", "--adapter", "fits", "--out", "folded"]));
    errors.push(failure(at, &["generate", "--model", arg(&model), "--adapter", "deep", "--prompt", "x"]));
    let onto = ["fold", "--graph", "base", "--adapter", "fits", "--out", "base", "--overwrite"];
    errors.push(failure(at, &onto));
    insta::assert_snapshot!(errors.join("\n\n"), @"
    prefold::adapter::not_an_adapter × nowhere is not an adapter: it holds no adapter_config.json help: an adapter is a folder with adapter_config.json and adapter_model.safetensors

    prefold::fold::site_count × the graph has 4 attention sites, but the adapter was made for 9 layers help: fold an adapter of the same base model

    prefold::fold::shape × layer 0 of the graph has head_dim 16, the adapter was made for 8 help: fold an adapter of the same base model

    prefold::fold::shape × layer 0 of the graph has num_heads 6, the adapter was made for 3 help: fold an adapter of the same base model

    prefold::adapter::shape × the adapter's tensor `layers.0.M` has shape [6, 8, 8], its configuration asks for [6, 16, 16] help: adapter_config.json and adapter_model.safetensors do not belong together

    prefold::adapter::missing_tensor × the adapter has no tensor `layers.3.M` of shape [6, 16, 16] help: adapter_config.json and adapter_model.safetensors do not belong together

    prefold::adapter::config × adapter_config.json: `format_version` is 2, this prefold knows up to 1 help: use the prefold that wrote the adapter, or a newer one

    prefold::files::json × cannot parse other/adapter_config.json as an adapter's configuration: unknown variant `magic`, │ expected one of `prefix_plus`, `prefix`, `lora`, `full` at line 1 column 68 help: the file is damaged, or was written by another tool or version

    × there is no graph nowhere help: name a folder that holds model.onnx, or an .onnx file

    prefold::onnx::not_protobuf × text.onnx: not an ONNX model: at byte 1, in ModelProto, a field has a wire type that does not │ exist help: the file is damaged or not an ONNX model (a Git LFS pointer or a web page saved in its place looks like this); fetch or export it again

    prefold::onnx::truncated × cut/model.onnx: truncated: ModelProto at byte 22 lacks at least 911151 bytes help: the file is cut off or damaged; fetch or export it again

    prefold::fold::already_folded × the graph carries an adapter already (fits) help: pass --stack to add to it, --replace to put the new one in its place, or fold into the base graph

    prefold::files::exists × the output folded already exists help: choose another --out, or pass --overwrite to replace it

    prefold::adapter::other_model × the adapter was made for another model: num_layers is 9 in the adapter and 4 in the model help: use the base model that the adapter was trained for

    × the output base would replace the input base help: choose another --out
    ");
    assert_eq!(before, std::fs::read(at.join("base/model.onnx")).unwrap(), "the input is untouched");
    assert!(!at.join("out").exists());
}

#[test]
fn inputs_that_cannot_be_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = fixture("demo/model");
    let forward = |ids: &[i64], more: &[&str]| {
        let ids = candle_core::Tensor::from_slice(ids, (1, ids.len()), &candle_core::Device::Cpu).unwrap();
        let inputs = std::collections::HashMap::from([("input_ids".to_owned(), ids)]);
        candle_core::safetensors::save(&inputs, at.join("in.safetensors")).unwrap();
        let args = ["forward", "--model", arg(&model), "--inputs", "in.safetensors", "--out", "out.safetensors"];
        failure(at, &[args.as_slice(), more].concat())
    };
    let errors = [
        forward(&[1, 2, 999_999], &[]),
        forward(&[1, -2], &[]),
        {
            write(at, "no.safetensors", "{}");
            failure(at, &["forward", "--model", arg(&model), "--inputs", "no.safetensors", "--out", "out.safetensors"])
        },
        failure(at, &["generate", "--graph", "nowhere", "--prompt", "x"]),
        failure(at, &["inspect", "nowhere"]),
        failure(at, &["fetch", "gpt5"]),
    ];
    insta::assert_snapshot!(errors.join("\n\n"), @"
    prefold::base::input × the model's inputs do not fit: token id 999999 is not below the vocabulary size 512 help: use the tokenizer that belongs to the model

    prefold::base::input × the model's inputs do not fit: input_ids holds -2 help: input_ids is [batch, seq], attention_mask is [batch, past + seq], position_ids is [batch, seq]

    × no.safetensors: header too small help: it should hold integer tensors input_ids, attention_mask and optionally position_ids and labels

    × there is no graph nowhere help: name a folder that holds model.onnx, or an .onnx file

    prefold::fetch::unknown × there is no model `nowhere` help: known names: smollm2 (SmolLM2-135M-Instruct, Q4_1 GGUF, 98 MB); or a path to a Hugging Face folder or a .gguf file, or hf:OWNER/NAME[@REVISION]

    prefold::fetch::unknown × there is no model `gpt5` help: known names: smollm2 (SmolLM2-135M-Instruct, Q4_1 GGUF, 98 MB); or a path to a Hugging Face folder or a .gguf file, or hf:OWNER/NAME[@REVISION]
    ");
    assert!(!at.join("out.safetensors").exists());
}

/// A write that runs out of space: a device that is always full stands for the disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("demo/model");
    let verify = ["verify", "--model", arg(&model), "--graph", "base", "--runtime", "tract", "--out", "/dev/full"];
    prefold_ok(folder.path(), &["export", "--model", arg(&model), "--out", "base"]);
    let error = failure_with(2, folder.path(), &verify);
    assert!(error.contains("No space left on device") && error.contains("free some space"), "{error}");
}

/// Ctrl-C, and what ends a job, in the middle of a command: the process ends by the signal, and its hidden folder is gone.
#[cfg(unix)]
#[test]
fn a_signal_leaves_nothing_behind() {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    for (signal, number) in [("-INT", 2), ("-TERM", 15)] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_prefold"));
        command.current_dir(folder.path()).args(["--quiet", "demo", "--out", "out"]).env("NO_COLOR", "1");
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while names(folder.path()).is_empty() {
            assert!(child.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(5));
        }
        let begun = names(folder.path());
        assert!(begun[0].starts_with(".prefold-") && begun[0].ends_with(".partial"), "{begun:?}");
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.signal(), Some(number), "{output:?}");
        assert_eq!((names(folder.path()), output.stderr), (Vec::new(), Vec::new()), "{signal}");
    }
}

/// Integers are no adapter, whatever they would be read as.
#[test]
fn an_adapter_of_integers_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tensor = candle_core::Tensor::zeros((4, 16, 16), candle_core::DType::I64, &candle_core::Device::Cpu).unwrap();
    let tensors = std::collections::HashMap::from([("layers.0.M", tensor)]);
    candle_core::safetensors::save(&tensors, folder.path().join("a.safetensors")).unwrap();
    let error = failure(folder.path(), &["inspect", "a.safetensors"]);
    assert!(error.contains("`layers.0.M` holds i64, where floats are expected"), "{error}");
}

//! `prefold data preview`, and training from files of other layouts.

use std::path::Path;

use candle_core::{DType, Device};
use prefold::base::{Checkpoint, Decoder, NoHook};
use prefold::data::{DataConfig, Format};
use prefold::train::{batch_input, completion_loss};
use serde_json::Value;

use crate::support::{arg, fixture, prefold, prefold_ok};

fn write(folder: &Path, name: &str, content: &str) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

#[test]
fn a_preview_shows_masks_lengths_and_what_was_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("demo/model"), fixture("demo/train.jsonl"));
    let args = ["data", "preview", "--model", arg(&model), "--data", arg(&data), "--holdout", "80"];
    let text = prefold_ok(folder.path(), &[args.as_slice(), &["--max-seq-len", "24"]].concat());
    for part in [
        "Training data\n400 classification records",
        "lost the beginning of their prompt at 24 tokens",
        "Held-out data",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.contains("\n  given  ") && text.contains("\n  learnt ") && !text.contains('\u{1b}'), "{text}");

    let json = prefold_ok(folder.path(), &[args.as_slice(), &["--json", "-n", "1"]].concat());
    let json: Value = serde_json::from_str(&json).unwrap();
    let tokens = json["train"]["examples"][0]["tokens"].as_array().unwrap();
    let text = |learnt: bool| -> String {
        tokens.iter().filter(|t| t["learnt"] == learnt).map(|t| t["text"].as_str().unwrap()).collect()
    };
    let label = json["train"]["examples"][0]["label"].as_str().unwrap().replace('_', " ");
    assert_eq!(text(true), format!(" {label}</s>"));
    assert!(text(false).starts_with("<s>") && text(false).ends_with("\nlabel:"));
    assert_eq!(json["train"]["report"]["examples"], 400);
    assert_eq!(json["held_out"]["labels"].as_object().unwrap().len(), 8);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is written");
}

#[test]
fn a_table_with_other_names_trains_like_its_jsonl() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let lines = std::fs::read_to_string(fixture("demo/train.jsonl")).unwrap();
    let rows = lines.lines().take(16).map(|line| {
        let record: Value = serde_json::from_str(line).unwrap();
        let quoted = |field: &str| format!("\"{}\"", record[field].as_str().unwrap().replace('"', "\"\""));
        format!("{},{}\n", quoted("label"), quoted("text"))
    });
    let rows: Vec<String> = rows.collect();
    write(at, "shards/train-0.csv", &format!("intent,message\n{}", rows[..10].concat()));
    write(at, "shards/train-1.csv", &format!("intent,message\n{}", rows[10..].concat()));
    write(at, "lines.jsonl", &lines.lines().take(16).collect::<Vec<_>>().join("\n"));
    let model = fixture("demo/model");
    let train = |more: &[&str]| {
        let args = ["-q", "train", "--model", arg(&model), "--max-steps", "2", "--save-every", "0"];
        prefold_ok(at, &[args.as_slice(), more].concat())
    };
    let names = ["--field", "text=message", "--field", "label=intent"];
    train(&[["--data", "shards", "--out", "a", "--group-by-length"].as_slice(), &names].concat());
    train(&["--data", "lines.jsonl", "--out", "b", "--group-by-length"]);
    let bytes = |run: &str| std::fs::read(at.join(run).join("adapter_model.safetensors")).unwrap();
    assert_eq!(bytes("a"), bytes("b"));
    let manifest: Value = serde_json::from_slice(&std::fs::read(at.join("a/prefold.json")).unwrap()).unwrap();
    let inputs = manifest["inputs"].as_array().unwrap().iter();
    let data: Vec<&str> = inputs.filter(|i| i["role"] == "data").map(|i| i["name"].as_str().unwrap()).collect();
    assert_eq!(data, ["train-0.csv", "train-1.csv"]);
}

/// The examples of a packed row do not see each other: the loss is that of the examples in rows of their own.
#[test]
fn a_packed_row_has_the_loss_of_its_examples() {
    let checkpoint = Checkpoint::open(&fixture("demo/model")).unwrap();
    let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let loss = |packing: bool| {
        let train = Some(fixture("demo/test.jsonl").into());
        let config = DataConfig { train, packing, limit: Some(24), max_seq_len: 96, ..DataConfig::default() };
        let format = Format::new(&tokenizer, decoder.spec().vocab_size, config.format.clone()).unwrap();
        let (dataset, _) = config.load(&format, 0, 256).unwrap();
        assert_eq!(dataset.len() < 24, packing);
        let batch = dataset.batch(&(0..dataset.len()).collect::<Vec<_>>());
        let input = batch_input(&batch).unwrap();
        let found = completion_loss(&decoder, &NoHook, &input, &batch.labels).unwrap();
        (found.tokens(), found.sum.to_scalar::<f64>().unwrap())
    };
    let ((packed_tokens, packed), (tokens, apart)) = (loss(true), loss(false));
    assert_eq!(packed_tokens, tokens);
    assert!((packed - apart).abs() < 1e-9 * apart, "{packed} {apart}");
}

#[test]
fn a_packed_run_trains() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = (fixture("demo/model"), fixture("demo/train.jsonl"));
    let args = ["-q", "train", "--model", arg(&model), "--data", arg(&data), "--out", "run", "--packing"];
    let more =
        ["--max-seq-len", "96", "--limit", "32", "--batch-size", "2", "--max-steps", "12", "--learning-rate", "1e-2"];
    prefold_ok(folder.path(), &[args.as_slice(), &more].concat());
    let text = std::fs::read_to_string(folder.path().join("run/metrics.jsonl")).unwrap();
    let losses: Vec<f64> =
        text.lines().filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64()).collect();
    assert!(losses[11] < 0.9 * losses[0], "{losses:?}");
}

#[test]
fn wrong_options_of_the_data_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = fixture("demo/model");
    write(at, "d.jsonl", "{\"prompt\": \"p\", \"chosen\": \"a\", \"rejected\": \"b\"}\n");
    write(at, "t.jsonl", "{\"text\": \"a text\"}\n");
    let preview = |more: &[&str]| {
        let output = prefold(at, &[["data", "preview", "--model", arg(&model)].as_slice(), more].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!error.contains("panicked"), "{error}");
        let error = error.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
        (output.status.code(), error)
    };
    let (code, error) = preview(&["--data", "d.jsonl", "--field", "promt=q"]);
    assert!(code == Some(2) && error.contains("did you mean `prompt`?"), "{error}");
    let (code, error) = preview(&["--data", "d.jsonl", "--layout", "mesages"]);
    assert!(code == Some(2) && error.contains("did you mean `messages`?"), "{error}");
    let errors = [
        preview(&["--data", "d.jsonl", "--packing"]),
        preview(&["--data", "d.jsonl", "--eval", "t.jsonl"]),
        preview(&["--data", "t.jsonl", "d.jsonl"]),
        preview(&["--data", "t.jsonl", "--holdout", "x"]),
        preview(&["--data", "t.jsonl", "--layout", "messages"]),
        preview(&[]),
    ]
    .map(|(code, error)| {
        assert_eq!(code, Some(1), "{error}");
        error
    });
    insta::assert_snapshot!(errors.join("\n\n"), @r#"
    prefold::data::option × data option `packing` cannot be used with preference records help: switch it off: a pair's rows stay apart

    prefold::data::option × data option `eval` holds text records, but those to train on are preference records help: pairs are evaluated as they are trained, and so is everything else

    prefold::data::mixed × d.jsonl:1: this is a preference record, but the file began with text records help: keep one layout in a data set; this one's is {"text": "…"}

    prefold::data::option × data option `holdout` is wrong: `x` is neither a count nor a fraction between 0 and 1 help: give a count or a fraction, as in "200" or "0.1"

    prefold::data::mixed × t.jsonl:1: this is a text record, but the options ask for messages records help: keep one layout in a data set; this one's is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

    × --model and --data are needed help: give them on the command line or in --config
    "#);
}

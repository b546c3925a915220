//! A run that is killed, stopped, damaged or diverging; its checkpoints, its best adapter, its event files.

use std::hash::{BuildHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{arg, fixture, prefold, prefold_ok};

const STEPS: usize = 24;

/// A run on the demo's model with a held-out part, in `out`.
fn run<'a>(paths: &'a [PathBuf; 3], out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let [model, data, eval] = paths;
    let inputs = ["--quiet", "train", "--model", arg(model), "--data", arg(data), "--eval", arg(eval), "--out", out];
    let size = ["--limit", "48", "--batch-size", "4", "--eval-limit", "8", "--learning-rate", "5e-3"];
    [inputs.as_slice(), &size, more].concat()
}

fn paths() -> [PathBuf; 3] {
    ["demo/model", "demo/train.jsonl", "demo/test.jsonl"].map(fixture)
}

fn adapter(run: &Path) -> Vec<Vec<u8>> {
    ["adapter_model.safetensors", "adapter_config.json"].map(|name| std::fs::read(run.join(name)).unwrap()).into()
}

fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The metrics without the time that a step took.
fn timeless(run: &Path) -> Vec<Value> {
    let mut lines = metrics(run);
    for line in &mut lines {
        line.as_object_mut().unwrap().remove("seconds");
    }
    lines
}

fn checkpoints(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn start(folder: &Path, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prefold"));
    command.current_dir(folder).args(args).env("NO_COLOR", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until the run has logged `lines` lines, or has ended.
fn wait_for_lines(run: &Path, lines: usize, child: &mut Child) {
    let started = Instant::now();
    while metrics(run).len() < lines && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(300), "the run does not get on");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A number below `bound` that differs from run to run.
fn random(bound: u64) -> u64 {
    std::collections::hash_map::RandomState::new().build_hasher().finish() % bound
}

fn error_of(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!error.contains("panicked"), "{error}");
    error.lines().map(|line| line.trim().trim_start_matches(['│', '×']).trim()).collect::<Vec<_>>().join(" ")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_run_killed_at_any_moment_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let paths = paths();
    let steps = STEPS.to_string();
    let control = ["--max-steps", &steps, "--save-every", "1", "--save-limit", "2", "--eval-every", "3"];
    let control =
        [control.as_slice(), &["--load-best-at-end", "--patience", "9", "--gradient-accumulation", "2"]].concat();
    prefold_ok(folder.path(), &run(&paths, "whole", &control));
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let mut kills = 0;
    while !killed.join("adapter_config.json").exists() {
        let resume: &[&str] = if kills == 0 { &[] } else { &["--resume"] };
        // where the moments are is no matter
        let offload: &[&str] = if kills % 2 == 0 { &[] } else { &["--offload-optimizer"] };
        let mut child = start(folder.path(), &[run(&paths, "killed", &control).as_slice(), resume, offload].concat());
        if kills < 6 {
            let lines = metrics(&killed).len().max(1) + random(5) as usize;
            wait_for_lines(&killed, lines, &mut child);
            std::thread::sleep(Duration::from_micros(random(40_000)));
            child.kill().unwrap();
            kills += 1;
            eprintln!("killed after {} lines", metrics(&killed).len());
        }
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() || output.status.code().is_none(), "{}", error_of(&output));
    }
    assert_eq!(adapter(&whole), adapter(&killed));
    assert_eq!(timeless(&whole), timeless(&killed));
    assert_eq!(checkpoints(&killed), ["step-000022", "step-000023"], "and nothing half written");
    let names: Vec<String> =
        std::fs::read_dir(&killed).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert!(names.iter().all(|name| !name.starts_with('.')), "{names:?}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let paths = paths();
    let control = ["--max-steps", "400", "--save-every", "0"];
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let out = format!("run{signal}");
        let mut child = start(folder.path(), &run(&paths, &out, &control));
        wait_for_lines(&folder.path().join(&out), 3, &mut child);
        // twice, as a program does that is in the terminal's group and hands signals on
        let id = child.id().to_string();
        let sent = Command::new("kill").args([signal, &id, &id]).status().unwrap();
        assert!(sent.success());
        let output = child.wait_with_output().unwrap();
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(code), "{error}");
        let checkpoint = checkpoints(&folder.path().join(&out)).pop().unwrap();
        let step: usize = checkpoint.trim_start_matches("step-").parse().unwrap();
        assert!(error.contains(&format!("stopped after step {step}; go on with")), "{error}");
        assert!(error.contains("--resume"), "{error}");
        assert!(folder.path().join(&out).join("report.html").exists());
        assert!(!folder.path().join(&out).join("adapter_config.json").exists(), "no adapter that is not finished");
        let last = metrics(&folder.path().join(&out)).pop().unwrap();
        assert_eq!(last["step"].as_u64(), Some(step as u64), "no step without its checkpoint");
    }
}

#[test]
fn damaged_checkpoints_are_passed_over_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let paths = paths();
    let control = ["--max-steps", "9", "--save-every", "3"];
    let resume = ["--max-steps", "9", "--save-every", "3", "--resume"];
    prefold_ok(at, &run(&paths, "whole", &control));
    let expected = adapter(&at.join("whole"));
    assert_eq!(checkpoints(&at.join("whole")), ["step-000003", "step-000006"]);
    let flip = |path: PathBuf| {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() - 5;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    let cut = |path: PathBuf| {
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    type Damage<'a> = (&'a str, &'a str, Box<dyn Fn(&Path) + 'a>);
    let damages: [Damage; 6] = [
        ("lacks-state", "state.json: No such file", Box::new(|c| std::fs::remove_file(c.join("state.json")).unwrap())),
        ("cut-state", "state.json is not JSON", Box::new(|c| cut(c.join("state.json")))),
        ("lacks-moments", "No such file", Box::new(|c| std::fs::remove_file(c.join("optimizer.safetensors")).unwrap())),
        (
            "cut-moments",
            "optimizer.safetensors is not what was written",
            Box::new(|c| cut(c.join("optimizer.safetensors"))),
        ),
        (
            "flipped",
            "adapter_model.safetensors is not what was written",
            Box::new(|c| flip(c.join("adapter_model.safetensors"))),
        ),
        (
            "empty",
            "state.json",
            Box::new(|c| {
                std::fs::remove_dir_all(c).unwrap();
                std::fs::create_dir(c).unwrap();
            }),
        ),
    ];
    for (name, reason, damage) in &damages {
        copy(&at.join("whole"), &at.join(name));
        damage(&at.join(name).join("checkpoints/step-000006"));
        let output = prefold(at, &run(&paths, name, &resume));
        let error = error_of(&output);
        assert!(output.status.success(), "{name}: {error}");
        assert!(error.contains("step-000006 is damaged") && error.contains(reason), "{name}: {error}");
        assert!(error.contains("going on from") && error.contains("step-000003"), "{name}: {error}");
        assert_eq!(adapter(&at.join(name)), expected, "{name}");
    }
    // nothing whole is left
    copy(&at.join("whole"), &at.join("none"));
    for step in checkpoints(&at.join("none")) {
        cut(at.join("none/checkpoints").join(step).join("optimizer.safetensors"));
    }
    let refused = |name: &str, args: &[&str]| {
        let before = (metrics(&at.join(name)), adapter(&at.join(name)));
        let output = prefold(at, args);
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert_eq!(before, (metrics(&at.join(name)), adapter(&at.join(name))), "{name}: nothing written is lost");
        error_of(&output)
    };
    let error = refused("none", &run(&paths, "none", &resume));
    assert!(error.contains("step-000006 is damaged") && error.contains("remove this folder"), "{error}");
    // another layout
    copy(&at.join("whole"), &at.join("newer"));
    let state = at.join("newer/checkpoints/step-000006/state.json");
    let text = std::fs::read_to_string(&state).unwrap().replacen("\"version\": 2", "\"version\": 99", 1);
    std::fs::write(&state, text).unwrap();
    let error = refused("newer", &run(&paths, "newer", &resume));
    assert!(error.contains("has layout 99, this prefold reads 2"), "{error}");
    // another base model
    let mut other = paths.clone();
    other[0] = at.join("model");
    copy(&paths[0], &other[0]);
    flip(other[0].join("model.safetensors"));
    let error = refused("whole", &run(&other, "whole", &resume));
    assert!(error.contains("the base model differs: model.safetensors holds other weights"), "{error}");
    // other data
    let error = refused("whole", &[run(&paths, "whole", &resume).as_slice(), &["--max-seq-len", "20"]].concat());
    assert!(error.contains("the training data (or its tokenisation) differs"), "{error}");
}

#[test]
fn the_best_adapter_is_kept_and_patience_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let paths = paths();
    // far too high a rate: the held-out loss soon gets worse
    let control =
        ["--max-steps", "60", "--eval-every", "2", "--patience", "2", "--save-every", "2", "--save-limit", "1"];
    let control = [control.as_slice(), &["--load-best-at-end"]].concat();
    let mut args = run(&paths, "run", &control);
    let rate = args.iter().position(|a| *a == "5e-3").unwrap();
    args[rate] = "0.3";
    let printed = prefold_ok(folder.path(), &args);
    let run = folder.path().join("run");
    let losses: Vec<(u64, f64)> = metrics(&run)
        .iter()
        .filter_map(|line| Some((line["step"].as_u64()?, line["held_out"]["loss"].as_f64()?)))
        .filter(|(step, _)| *step > 0)
        .collect();
    let (best, lowest) = losses.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let last = losses.last().unwrap().0;
    assert_eq!(last, best + 4, "two evaluations without gain, two steps apart: {losses:?}");
    assert!(last < 60, "{losses:?}");
    assert!(printed.contains(&format!("stopped early at step {last}")), "{printed}");
    assert!(printed.contains(&format!("best held-out loss {lowest:.3} at step {best}")), "{printed}");
    assert_eq!(adapter(&run), adapter(&run.join("best")), "the best adapter is the run's");
    assert_eq!(checkpoints(&run).len(), 1);
    let manifest: Value = serde_json::from_slice(&std::fs::read(run.join("prefold.json")).unwrap()).unwrap();
    assert_eq!(manifest["facts"]["ended"], "exhausted");
    assert_eq!(manifest["facts"]["best"]["step"], best);
}

#[test]
fn options_that_need_held_out_records_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let [model, data, _] = paths();
    let args = ["train", "--model", arg(&model), "--data", arg(&data), "--out", "run"];
    for (more, expected) in [
        (["--patience", "2", "--eval-every", "5"], "training option `patience` needs records to evaluate on"),
        (["--patience", "2", "--eval-every", "0"], "training option `patience` needs `eval_every`, which is 0"),
        (["--objective", "dpo", "--eval-every", "0"], "objective `dpo` needs pairs of chosen and rejected"),
        (["--save-limit", "0", "--eval-every", "0"], "training option `save_limit` is 0, but must be at least 1"),
    ] {
        let output = prefold(folder.path(), &[args.as_slice(), &more].concat());
        assert_eq!(output.status.code(), Some(1));
        let error = error_of(&output);
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was left behind");
}

#[test]
fn a_dry_run_says_what_would_be_done_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let paths = paths();
    let config = folder.path().join("run.yaml");
    std::fs::write(&config, "train:\n  epochs: 2\n  warmup_fraction: 0.25\nadapter:\n  layers: [1, 3]\n").unwrap();
    let more = ["--config", arg(&config), "--set", "train.batch_size=100", "--dry-run"];
    let args = run(&paths, "out", &more);
    let printed = prefold_ok(folder.path(), &args);
    for part in ["443.2 k parameters", "3.1 k trained parameters", "48 examples", "held out", "[train.adamw]"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    let json: Value =
        serde_json::from_str(&prefold_ok(folder.path(), &[args.as_slice(), &["--json"]].concat())).unwrap();
    let plan = &json["plan"];
    // --batch-size 4 on the command line lies over --set
    assert_eq!((plan["steps"].as_u64(), plan["warmup_steps"].as_u64()), (Some(24), Some(6)));
    assert_eq!((plan["examples"].as_u64(), plan["held_out"].as_u64()), (Some(48), Some(8)));
    assert_eq!((plan["parameters"].as_u64(), plan["trained"].as_u64()), (Some(443_232), Some(2 * 6 * 16 * 16)));
    assert_eq!(plan["workload"]["rows"], 4);
    assert_eq!(plan["memory"]["weights"], 443_232 * 4);
    assert_eq!(json["options"]["adapter"]["layers"], serde_json::json!([1, 3]));
    let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["run.yaml"], "nothing was written");
    // the printed options are a configuration that gives the same plan
    let options = &printed[printed.find("model = ").unwrap()..];
    std::fs::write(folder.path().join("again.toml"), options).unwrap();
    let again = prefold_ok(folder.path(), &["train", "--config", "again.toml", "--dry-run", "--json"]);
    // what the process holds already differs from one to the next
    let without_process = |mut plan: Value| {
        plan["plan"]["memory"]["process"] = Value::Null;
        plan["plan"]["memory"]["peak"] = Value::Null;
        plan
    };
    assert_eq!(without_process(serde_json::from_str(&again).unwrap()), without_process(json));
}

#[test]
fn classes_are_predicted_by_likelihood() {
    let folder = tempfile::tempdir().unwrap();
    let paths = paths();
    let more = ["--max-steps", "12", "--eval-by", "likelihood", "--eval-every", "6"];
    prefold_ok(folder.path(), &run(&paths, "run", &more));
    let run = folder.path().join("run");
    let evaluation: Value = serde_json::from_slice(&std::fs::read(run.join("evaluation.json")).unwrap()).unwrap();
    assert_eq!(evaluation["step"], 12);
    let classification = &evaluation["classification"];
    assert_eq!(classification["eval_by"], "likelihood");
    for scores in [classification, &classification["normalized"]] {
        let cells = scores["confusion"].as_array().unwrap();
        let count = |cells: Vec<&Value>| cells.iter().map(|cell| cell["count"].as_u64().unwrap()).sum::<u64>();
        assert_eq!(count(cells.iter().collect()), 8);
        assert!(cells.iter().all(|cell| cell["predicted"].is_string()), "likelihood always chooses a class");
        let right = count(cells.iter().filter(|cell| cell["truth"] == cell["predicted"]).collect());
        assert_eq!(scores["accuracy"].as_f64(), Some(right as f64 / 8.0));
    }
    assert_eq!(evaluation["accuracy"], classification["accuracy"]);
    let held_out = metrics(&run).into_iter().rfind(|line| line["held_out"].is_object()).unwrap();
    assert_eq!(held_out["held_out"]["macro_f1"], classification["macro_f1"]);
    assert_eq!(held_out["held_out"]["accuracy_normalized"], classification["normalized"]["accuracy"]);
}

/// Scalars of an event file by tag: `(step, value)`. Reads the records without the writer's code.
fn events(path: &Path) -> Vec<(String, u64, f32)> {
    let bytes = std::fs::read(path).unwrap();
    let (mut at, mut found) = (0, Vec::new());
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let event = fields(&bytes[at + 12..at + 12 + length]);
        at += length + 16;
        let step = event.iter().find(|(number, _)| *number == 2).map_or(0, |(_, value)| varint(value).0);
        for (_, summary) in event.iter().filter(|(number, _)| *number == 5) {
            for (_, value) in fields(summary) {
                let value = fields(&value);
                let of = |number: u64| value.iter().find(|(n, _)| *n == number).unwrap().1.clone();
                let number = f32::from_le_bytes(of(2).try_into().unwrap());
                found.push((String::from_utf8(of(1)).unwrap(), step, number));
            }
        }
    }
    found
}

fn varint(bytes: &[u8]) -> (u64, usize) {
    let length = bytes.iter().position(|byte| byte & 128 == 0).unwrap() + 1;
    (bytes[..length].iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 127)), length)
}

/// The fields of a protobuf message with the bytes of their values.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (key, used) = varint(bytes);
        bytes = &bytes[used..];
        let (skip, length) = match key & 7 {
            0 => (0, varint(bytes).1),
            1 => (0, 8),
            5 => (0, 4),
            2 => {
                let (length, used) = varint(bytes);
                (used, length as usize)
            }
            other => panic!("wire type {other}"),
        };
        found.push((key >> 3, bytes[skip..skip + length].to_vec()));
        bytes = &bytes[skip + length..];
    }
    found
}

/// Prints what TensorBoard reads of a folder as JSON.
const TENSORBOARD: &str = "
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0})
found.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in found.Scalars(tag)] for tag in found.Tags()['scalars']}))
";

#[test]
fn tensorboard_reads_the_event_files_of_a_resumed_run() {
    let folder = tempfile::tempdir().unwrap();
    let paths = paths();
    let control = ["--max-steps", "8", "--save-every", "3", "--eval-every", "4", "--tensorboard"];
    prefold_ok(folder.path(), &run(&paths, "run", &control));
    let run_folder = folder.path().join("run");
    std::fs::remove_file(run_folder.join("adapter_config.json")).unwrap();
    prefold_ok(folder.path(), &run(&paths, "run", &[control.as_slice(), &["--resume"]].concat()));
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(run_folder.join("tensorboard")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 2);
    let lines = metrics(&run_folder);
    let losses: Vec<(u64, f32)> =
        lines.iter().filter_map(|l| Some((l["step"].as_u64()?, l["loss"].as_f64()? as f32))).collect();
    let of = |file: &Path, tag: &str| -> Vec<(u64, f32)> {
        events(file).into_iter().filter(|(t, ..)| t == tag).map(|(_, step, value)| (step, value)).collect()
    };
    assert_eq!(of(&files[0], "train/loss"), losses);
    assert_eq!(of(&files[1], "train/loss"), losses[6..], "the resumed run begins after step 6");
    assert_eq!(of(&files[0], "eval/loss").iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 4, 8]);

    let python = std::env::var("PREFOLD_PYTHON").unwrap_or_else(|_| "python3".into());
    let output = Command::new(&python).args(["-c", TENSORBOARD, arg(&run_folder.join("tensorboard"))]).output();
    let Some(output) = output.ok().filter(|output| output.status.success()) else {
        eprintln!("skipped TensorBoard's own reader: {python} has no package tensorboard");
        return;
    };
    let read: Value = serde_json::from_slice(&output.stdout).unwrap();
    let read = |tag: &str| -> Vec<(u64, f32)> {
        let points = read[tag].as_array().unwrap().iter();
        points.map(|p| (p[0].as_u64().unwrap(), p[1].as_f64().unwrap() as f32)).collect()
    };
    assert_eq!(read("train/loss"), losses, "no step twice: the older file's steps 7 and 8 are dropped");
    assert_eq!(read("eval/accuracy").len(), 3);
    assert_eq!(read("train/learning_rate").len(), 8);
}

/// Pairs of a right and a wrong label for the demo's messages.
fn write_preferences(path: &Path, from: &str, count: usize) {
    let text = std::fs::read_to_string(fixture(from)).unwrap();
    let records: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let other = |label: &Value| if label == "billing" { "account" } else { "billing" };
    let line = |record: &Value| {
        let prompt = format!("{}\nlabel:", record["text"].as_str().unwrap());
        let chosen = format!(" {}", record["label"].as_str().unwrap().replace('_', " "));
        let rejected = format!(" {}", other(&record["label"]));
        format!("{}\n", serde_json::json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    };
    let every = records.len() / count;
    std::fs::write(path, records.iter().step_by(every).take(count).map(line).collect::<String>()).unwrap();
}

#[test]
fn preferences_are_learnt_and_a_stopped_run_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_preferences(&at.join("train.jsonl"), "demo/train.jsonl", 32);
    write_preferences(&at.join("test.jsonl"), "demo/test.jsonl", 12);
    let model = fixture("demo/model");
    let args = |out, objective, steps| {
        let inputs = ["--quiet", "train", "--model", arg(&model), "--data", "train.jsonl", "--eval", "test.jsonl"];
        let options = ["--out", out, "--objective", objective, "--max-steps", steps, "--batch-size", "8"];
        [inputs.as_slice(), &options, &["--learning-rate", "1e-2", "--save-every", "5"]].concat()
    };
    for objective in ["dpo", "simpo"] {
        prefold_ok(at, &args(objective, objective, "16"));
        let lines = metrics(&at.join(objective));
        let steps: Vec<&Value> = lines.iter().filter(|line| line["loss"].is_number()).collect();
        let of = |line: &Value, name: &str| line[name].as_f64().unwrap();
        let (first, last) = (steps[0], steps[15]);
        if objective == "dpo" {
            assert!((of(first, "loss") - 2f64.ln()).abs() < 1e-6, "the adapter starts as the reference");
            assert_eq!(of(first, "rewards/margins"), 0.0);
        }
        assert!(of(last, "loss") < 0.8 * of(first, "loss"), "{objective}: {first} → {last}");
        assert!(of(last, "rewards/margins") > of(first, "rewards/margins"), "{objective}");
        let margin = of(last, "rewards/chosen") - of(last, "rewards/rejected");
        assert!((margin - of(last, "rewards/margins")).abs() < 1e-9);
        let evaluations: Vec<&Value> = lines.iter().map(|l| &l["held_out"]).filter(|e| e.is_object()).collect();
        let [before, after] = evaluations[..] else { panic!("{evaluations:?}") };
        assert_eq!((after["examples"].as_u64(), &after["accuracy"]), (Some(12), &after["rewards/accuracies"]));
        assert!(of(after, "loss") < of(before, "loss"), "{objective}: {before} → {after}");
    }
    // the same run that was cut after step 10
    copy(&at.join("dpo"), &at.join("cut"));
    std::fs::remove_dir_all(at.join("cut/checkpoints/step-000015")).unwrap();
    prefold_ok(at, &[args("cut", "dpo", "16").as_slice(), &["--resume"]].concat());
    assert_eq!(adapter(&at.join("dpo")), adapter(&at.join("cut")));
    assert_eq!(timeless(&at.join("dpo")), timeless(&at.join("cut")));
    // the reference of a model that is trained itself is the model before
    let full = |out| {
        let mut args = args(out, "dpo", "8");
        args.extend(["--method", "full", "--set", "train.learning_rate=1e-3"]);
        args.retain(|arg| !["--learning-rate", "1e-2"].contains(arg));
        args
    };
    prefold_ok(at, &full("full"));
    let lines = metrics(&at.join("full"));
    let steps: Vec<&Value> = lines.iter().filter(|line| line["loss"].is_number()).collect();
    let of = |line: &Value, name: &str| line[name].as_f64().unwrap();
    assert_eq!(of(steps[0], "rewards/margins"), 0.0, "it starts as the reference");
    assert!(of(steps[7], "loss") < 0.8 * of(steps[0], "loss"), "{} → {}", steps[0], steps[7]);
    copy(&at.join("full"), &at.join("full-cut"));
    prefold_ok(at, &[full("full-cut").as_slice(), &["--resume"]].concat());
    assert_eq!(adapter(&at.join("full")), adapter(&at.join("full-cut")));
    assert_eq!(timeless(&at.join("full")), timeless(&at.join("full-cut")));
    // constants matter, and so does the kind of the records
    let output =
        prefold(at, &[args("cut", "dpo", "16").as_slice(), &["--resume", "--set", "train.dpo.beta=0.5"]].concat());
    assert!(error_of(&output).contains("option `dpo` differs"), "{}", error_of(&output));
    let output = prefold(at, &args("sft", "sft", "16"));
    assert!(error_of(&output).contains("objective `sft` needs completions"), "{}", error_of(&output));
}

/// What LoRA's dropout leaves out follows from the seed and the step, so that a resumed run ends in the same bytes.
#[test]
fn dropout_resumes_to_the_same_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    let (paths, at) = (paths(), scratch.path());
    let options = ["--method", "lora", "--set", "adapter.lora.dropout=0.5", "--max-steps", "6", "--save-every", "3"];
    let more = [options.as_slice(), &["--gradient-accumulation", "2"]].concat();
    prefold_ok(at, &run(&paths, "whole", &more));
    copy(&at.join("whole"), &at.join("resumed"));
    std::fs::remove_file(at.join("resumed/adapter_model.safetensors")).unwrap();
    prefold_ok(at, &run(&paths, "resumed", &[more.as_slice(), &["--resume"]].concat()));
    assert_eq!(adapter(&at.join("whole")), adapter(&at.join("resumed")));
    let config: Value = serde_json::from_slice(&adapter(&at.join("whole"))[1]).unwrap();
    assert_eq!(config["dropout"], 0.5);
    let without: Vec<&str> = more.iter().map(|option| option.trim_end_matches("0.5")).collect();
    let without: Vec<&str> =
        without.iter().map(|o| if o.ends_with("dropout=") { "adapter.lora.dropout=0" } else { o }).collect();
    prefold_ok(at, &run(&paths, "without", &without));
    assert_ne!(adapter(&at.join("whole"))[0], adapter(&at.join("without"))[0]);
}

/// A run that is killed before its first step is still one: it can be replaced, and resumed from the start. A model that
/// cannot be read does not cost the run that was to be replaced.
#[test]
fn a_run_is_known_by_its_folder_from_the_start() {
    let scratch = tempfile::tempdir().unwrap();
    let (paths, at) = (paths(), scratch.path());
    let options = ["--max-steps", "2", "--save-every", "0"];
    let early = at.join("early");
    let mut child = start(at, &run(&paths, "early", &["--max-steps", "500", "--tensorboard"]));
    let started = Instant::now();
    while !early.exists() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if early.join("metrics.jsonl").exists() {
        prefold_ok(at, &run(&paths, "early", &[options.as_slice(), &["--resume"]].concat()));
    }
    prefold_ok(at, &run(&paths, "early", &[options.as_slice(), &["--overwrite"]].concat()));

    let [model, data, eval] = paths;
    copy(&model, &at.join("damaged"));
    let weights = at.join("damaged/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    // the last tensor's values: a model of NaN, which an adapter of its own weights refuses
    let length = bytes.len();
    bytes[length - 4096..].fill(0xff);
    std::fs::write(&weights, bytes).unwrap();
    let kept = adapter(&early);
    let damaged = [at.join("damaged"), data, eval];
    let output = prefold(at, &run(&damaged, "early", &["--overwrite", "--method", "full", "--max-steps", "1"]));
    assert!(!output.status.success(), "{}", error_of(&output));
    assert_eq!(adapter(&early), kept);
}

/// A state that does not belong to its folder is damage, not a run that is complete.
#[test]
fn a_checkpoint_of_another_step_is_damaged() {
    let scratch = tempfile::tempdir().unwrap();
    let (paths, at) = (paths(), scratch.path());
    let options = ["--max-steps", "4", "--save-every", "2"];
    prefold_ok(at, &run(&paths, "out", &options));
    let state = at.join("out/checkpoints/step-000002/state.json");
    let text = std::fs::read_to_string(&state).unwrap().replace("\"step\": 2,", "\"step\": 900,");
    assert!(text.contains("900"), "{text}");
    std::fs::write(&state, text).unwrap();
    let error = error_of(&prefold(at, &run(&paths, "out", &[options.as_slice(), &["--resume"]].concat())));
    assert!(error.contains("its state is of step 900, its name says 2"), "{error}");
}

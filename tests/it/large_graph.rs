//! A graph with 13 GB of external data is folded in seconds and with little memory.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use prefold::base::Checkpoint;
use prefold::export::{ExportOptions, export};
use prefold::onnx::{DataType, ExternalRef, Model, Patch, TensorDef};

use crate::support::{arg, fixture};

const GIB: u64 = 1 << 30;

/// Runs prefold; its time, and its peak resident memory in bytes where the system tells.
fn measured(folder: &Path, args: &[&str]) -> (Duration, Option<u64>) {
    let started = Instant::now();
    let mut command = Command::new(env!("CARGO_BIN_EXE_prefold"));
    let mut child = command.current_dir(folder).args(args).stdout(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = None;
    loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak = peak.max(line.and_then(|line| line.trim_end_matches("kB").trim().parse::<u64>().ok()));
        if let Some(exit) = child.try_wait().unwrap() {
            assert!(exit.success(), "{args:?}");
            return (started.elapsed(), peak.map(|kib| kib << 10));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The exported graph of a tiny model with 13 GiB beside it: a file for each of five tensors, and one that eight share.
/// The files are one hole each.
fn large_graph(folder: &Path) {
    let checkpoint = Checkpoint::open(&fixture("oracles/llama_bias")).unwrap();
    let path =
        export(&checkpoint, &ExportOptions { external_data_threshold: 0, ..ExportOptions::default() }, folder).unwrap();
    std::fs::create_dir(folder.join("weights")).unwrap();
    let mut patch = Patch::new("add weights that nothing reads");
    let mut add = |name: String, location: String, offset: u64| {
        let external = ExternalRef { location, offset, length: Some(GIB) };
        patch.add_initializer(TensorDef::external(name, DataType::Float, &[1 << 14, 1 << 14], external));
    };
    for i in 0..5 {
        let location = format!("weights/{i}.bin");
        File::create(folder.join(&location)).unwrap().set_len(GIB).unwrap();
        add(format!("apart_{i}"), location, 0);
    }
    File::create(folder.join("shared.data")).unwrap().set_len(8 * GIB).unwrap();
    (0..8).for_each(|i| add(format!("together_{i}"), "./shared.data".into(), i * GIB));
    patch.apply(&Model::open(&path).unwrap()).unwrap().save(&path).unwrap();
}

#[cfg(unix)]
#[test]
fn thirteen_gigabytes_are_folded_in_seconds() {
    use std::os::unix::fs::MetadataExt;

    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let probe = File::create(at("probe")).unwrap();
    if probe.set_len(16 * GIB).is_err() || probe.metadata().unwrap().blocks() > 8 << 10 {
        eprintln!("skipped: this file system has no room for 13 GiB and makes no holes");
        return;
    }
    std::fs::create_dir(at("base")).unwrap();
    large_graph(&at("base"));
    let adapter = fixture("oracles/llama_bias/adapter.safetensors");
    for (out, link) in [("copied", None), ("linked", Some("--link"))] {
        let mut args = vec!["fold", "--graph", "base", "--adapter", arg(&adapter), "--out", out];
        args.extend(link);
        let (time, peak) = measured(folder.path(), &args);
        eprintln!("{out}: {:.2} s, {:?} MiB", time.as_secs_f64(), peak.map(|bytes| bytes >> 20));
        assert!(time < Duration::from_secs(3), "{out}: {time:?}");
        assert!(peak.is_none_or(|bytes| bytes < 300_000_000), "{out}: {peak:?} bytes");
        for name in ["weights/0.bin", "weights/4.bin", "shared.data", "model.onnx.data"] {
            let [before, after] = ["base", out].map(|folder| std::fs::metadata(at(folder).join(name)).unwrap());
            assert_eq!(before.len(), after.len());
            assert_eq!(before.ino() == after.ino(), link.is_some(), "{name}");
        }
        let folded = Model::open(&at(out)).unwrap();
        prefold::onnx::data_files(&folded, &at(out)).unwrap();
    }
}

//! No false alarm: faithful graphs of every family, dialect, padding and several seeds, judged by the budget as it stands.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device};
use prefold::adapter::Adapter;
use prefold::base::{Checkpoint, Decoder, NoHook, SiteHook};
use prefold::export::{Dialect, ExportOptions, export};
use prefold::fold::fold_folder;
use prefold::parity::{
    Budget, Candidate, CaseOptions, Check, Facts, Model, Open, Reference, Verdict, generated_prompts, standard_cases,
};
use prefold::runtime::{OrtOptions, OrtSession, TractOptions, TractSession};
use serde_json::json;

use crate::methods::adapter;
use crate::oracles::every_family;
use crate::verify::ort_library;

/// Seeds of prompts for each graph.
const SEEDS: u64 = 3;
/// What the project promises.
const PROMISED: usize = 200;

/// Judges the graphs of a family. Every run has single rows, batches padded on either side, and steps with the cache.
fn family(folder: &Path, ort: Option<&Path>, runs: &AtomicUsize, alarms: &Mutex<Vec<String>>) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let spec = checkpoint.spec();
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    adapter(folder, &json!({}), &at.join("adapter"));
    let adapter = Adapter::open(&at.join("adapter")).unwrap();
    let hook = adapter.hook(spec, &Device::Cpu).unwrap();
    let dialects: &[Dialect] = if ort.is_some() { &[Dialect::Portable, Dialect::Ort] } else { &[Dialect::Portable] };
    for dialect in dialects {
        let (base, folded) = (at.join(format!("{dialect}-base")), at.join(format!("{dialect}-folded")));
        std::fs::create_dir(&base).unwrap();
        std::fs::create_dir(&folded).unwrap();
        let options = ExportOptions { dialect: *dialect, ..ExportOptions::default() };
        export(&checkpoint, &options, &base).unwrap();
        fold_folder(&base, &at.join("adapter"), &folded).unwrap();
    }
    let [wide, narrow] = [DType::F64, DType::F32].map(|dtype| Decoder::load(&checkpoint, dtype, &Device::Cpu).unwrap());
    for seed in 0..SEEDS {
        // The base graph and the folded one by turns.
        let (kind, hook): (_, &dyn SiteHook) = if seed % 2 == 0 { ("folded", &*hook) } else { ("base", &NoHook) };
        let options = CaseOptions { seed, lengths: vec![14, 5 + seed as usize, 9], steps: 4 };
        let cases = standard_cases(&generated_prompts(spec, &options), options.steps).unwrap();
        let reference = Reference::compute(Model { decoder: &wide, hook }, cases).unwrap();
        let budget = Budget::of(DType::F32, spec).unwrap();
        let mut check = Check::new(reference, Model { decoder: &narrow, hook }, budget).unwrap();
        for dialect in dialects {
            let graph = at.join(format!("{dialect}-{kind}")).join("model.onnx");
            let mut candidates: Vec<(&str, Open)> = Vec::new();
            if let Some(library) = ort {
                let graph = graph.clone();
                let open = move || Ok(Box::new(OrtSession::open(library, &graph, OrtOptions::default())?) as _);
                candidates.push(("onnxruntime", Box::new(open)));
            }
            if *dialect == Dialect::Portable {
                let open = move || Ok(Box::new(TractSession::open(&graph, TractOptions::default())?) as _);
                candidates.push(("tract", Box::new(open)));
            }
            for (runtime, open) in candidates {
                let name = format!("{} {dialect} {kind} seed {seed} {runtime}", spec.family);
                check.run(Candidate { name, open });
                runs.fetch_add(1, Ordering::Relaxed);
            }
        }
        let report = check.report(Facts::default()).unwrap();
        let rows = report.rows().into_iter().filter(|row| row.verdict != Verdict::Pass);
        let rows = rows.map(|row| format!("{}, {}: {}", row.run, row.case, row.failure.unwrap_or_default()));
        alarms.lock().unwrap_or_else(PoisonError::into_inner).extend(rows);
    }
}

#[test]
fn no_false_alarm_in_two_hundred_runs() {
    let ort = ort_library();
    let families = every_family();
    let (runs, alarms) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let todo = Mutex::new(families.iter());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(folder) = todo.lock().unwrap().next() else { return };
                    family(folder, ort.as_deref(), &runs, &alarms);
                }
            });
        }
    });
    let (runs, alarms) = (runs.into_inner(), alarms.into_inner().unwrap());
    eprintln!("{runs} runs over {} families, {} alarms", families.len(), alarms.len());
    assert!(alarms.is_empty(), "{} alarms in {runs} runs:\n{}", alarms.len(), alarms.join("\n"));
    assert!(ort.is_none() || runs >= PROMISED, "{runs} runs are fewer than {PROMISED}");
}

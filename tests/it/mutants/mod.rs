//! Graphs broken on purpose: `verify` catches every one and names the place. What it says is the table of `docs/mutants.md`,
//! which the test writes with `INSTA_UPDATE=always`.

mod adapter;
mod base;
mod foreign;
pub mod graph;
mod merged;
mod reproducer;
mod wiring;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use prefold::base::Checkpoint;
use prefold::export::{self, ExportOptions, export};
use prefold::fold::{Emission, FoldOptions, fold_adapters};
use prefold::onnx::Model;
use prefold::runtime::library;
use serde_json::{Value, json};

use self::merged::{Branch, merged};
use crate::support::{arg, fixture, prefold};

/// The table's file.
const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/mutants.md");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Portable,
    Ort,
}

impl Dialect {
    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Ort => "ort",
        }
    }

    fn runtime(self) -> &'static str {
        match self {
            Self::Portable => "tract",
            Self::Ort => "ort",
        }
    }
}

/// What is broken.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// The graph of `llama_bias` with the adapter `a` folded in.
    Folded,
    /// The same; what it should be is another adapter.
    Other(&'static str),
    /// The adapter in slots.
    Slot,
    /// The adapters `gated` and `a` in a bank.
    Bank,
    /// The graph of `llama_bias` with DoRA beside every map.
    Dora,
    /// The base graph of `gemma2`.
    Gemma2,
    /// As [`Folded`](Self::Folded), in a branch of a merged decoder whose other one is whole; run by ONNX Runtime.
    Merged(Branch),
}

/// A layer, and a place by its name in a report.
type Place = (Option<usize>, &'static str);

pub fn at(layer: usize, place: &'static str) -> Place {
    (Some(layer), place)
}

pub fn outside(place: &'static str) -> Place {
    (None, place)
}

/// A way to break a graph, and where `verify` should say that it is broken.
pub struct Mutant {
    what: &'static str,
    kind: Kind,
    change: fn(&Model, Dialect) -> Model,
    place: Place,
    in_ort: Place,
    only: Option<Dialect>,
    cases: &'static str,
}

/// Cases that show most mutants.
const CASES: &str = "single_row,left_padding,cached_decode";

impl Mutant {
    pub fn new(what: &'static str, kind: Kind, change: fn(&Model, Dialect) -> Model, place: Place) -> Self {
        Self { what, kind, change, place, in_ort: place, only: None, cases: CASES }
    }

    /// Another place in the `ort` dialect, where the tensor that is changed is what the site has.
    pub fn in_ort(self, place: Place) -> Self {
        Self { in_ort: place, ..self }
    }

    pub fn only(self, dialect: Dialect) -> Self {
        Self { only: Some(dialect), ..self }
    }

    /// Another case, where the usual ones do not show it.
    pub fn in_case(self, case: &'static str) -> Self {
        Self { cases: case, ..self }
    }

    fn place(&self, dialect: Dialect) -> Place {
        if dialect == Dialect::Ort { self.in_ort } else { self.place }
    }
}

/// Graphs to break, in one dialect.
struct Bench {
    folder: tempfile::TempDir,
    dialect: Dialect,
}

impl Bench {
    fn new(dialect: Dialect) -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap(), dialect };
        for model in ["llama_bias", "gemma2"] {
            let checkpoint = Checkpoint::open(&bench.model(model)).unwrap();
            let options =
                ExportOptions { dialect: dialect.name().parse::<export::Dialect>().unwrap(), ..Default::default() };
            export(&checkpoint, &options, &bench.made(model)).unwrap();
        }
        let fields = [
            ("a", json!({})),
            ("gated", json!({"gate": "head"})),
            ("elu_plus_one", json!({"feature_map": "elu_plus_one"})),
            ("relu", json!({"feature_map": "relu"})),
            ("dora", json!({"method": "lora", "rank": 2, "dora": true, "targets": null})),
        ];
        for (name, fields) in fields {
            crate::methods::adapter(&bench.model("llama_bias"), &fields, &bench.at(name));
        }
        let folds: [(&str, Emission, &[&str]); 4] = [
            ("baked", Emission::Baked, &["a"]),
            ("slot", Emission::Slot, &["a"]),
            ("bank", Emission::Bank, &["gated", "a"]),
            ("scaled", Emission::Baked, &["dora"]),
        ];
        for (name, emission, names) in folds {
            let adapters: Vec<_> = names.iter().map(|name| ((*name).to_owned(), bench.at(name))).collect();
            let options = FoldOptions { emission, ..FoldOptions::default() };
            fold_adapters(&bench.at("llama_bias"), &adapters, options, &bench.made(name)).unwrap();
        }
        bench
    }

    fn model(&self, name: &str) -> PathBuf {
        fixture(&format!("oracles/{name}"))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn made(&self, name: &str) -> PathBuf {
        std::fs::create_dir_all(self.at(name)).unwrap();
        self.at(name)
    }

    /// The whole graph that a mutant is made of, with the model and the adapter that it should be.
    fn whole(&self, kind: Kind) -> (&'static str, &'static str, Option<&'static str>) {
        match kind {
            Kind::Folded | Kind::Merged(_) => ("baked", "llama_bias", Some("a")),
            Kind::Other(adapter) => ("baked", "llama_bias", Some(adapter)),
            Kind::Slot => ("slot", "llama_bias", Some("a")),
            Kind::Bank => ("bank", "llama_bias", Some("a")),
            Kind::Dora => ("scaled", "llama_bias", Some("dora")),
            Kind::Gemma2 => ("gemma2", "gemma2", None),
        }
    }

    /// Breaks a graph and verifies it: the exit code and the report.
    fn verify(
        &self,
        number: usize,
        (kind, cases): (Kind, &str),
        change: fn(&Model, Dialect) -> Model,
    ) -> (i32, Value, String) {
        let (graph, model, adapter) = self.whole(kind);
        let folder = self.made(&format!("mutant_{number}"));
        let whole = Model::open(&self.at(graph)).unwrap();
        let changed = change(&whole, self.dialect);
        let (changed, runtime) = match kind {
            Kind::Merged(Branch::Prompt) => (merged(&changed, &whole), "ort"),
            Kind::Merged(Branch::Next) => (merged(&whole, &changed), "ort"),
            _ => (changed, self.dialect.runtime()),
        };
        changed.save(&folder.join("model.onnx")).unwrap();
        let checkpoint = self.model(model);
        let mut args =
            vec!["verify", "--graph", arg(&folder), "--model", arg(&checkpoint), "--steps", "2", "--no-cache"];
        args.extend(["--case", cases, "--runtime", runtime]);
        args.extend(adapter.iter().flat_map(|adapter| ["--adapter", adapter]));
        let report = format!("{number}.json");
        args.extend(["--out", report.as_str()]);
        let output = prefold(self.folder.path(), &args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let report = std::fs::read(self.at(&report)).unwrap_or_else(|_| panic!("no report: {text}"));
        (output.status.code().unwrap(), serde_json::from_slice(&report).unwrap(), text)
    }
}

fn dialects() -> Vec<Dialect> {
    let has_ort = library::find(None, &prefold::files::cache_folder().unwrap());
    match has_ort {
        Ok(_) => vec![Dialect::Portable, Dialect::Ort],
        Err(error) => {
            eprintln!("skipped: the ort dialect: {error}");
            vec![Dialect::Portable]
        }
    }
}

/// What `verify` says of a mutant: `Err` where it is not what it should be.
fn judged(mutant: &Mutant, bench: &Bench, number: usize) -> Result<String, String> {
    let (code, report, text) = bench.verify(number, (mutant.kind, mutant.cases), mutant.change);
    let departure = &report["runs"][0]["departure"];
    let layer = departure["layer"].as_u64().map(|layer| layer as usize);
    let (wanted_layer, wanted) = mutant.place(bench.dialect);
    let found = (layer, departure["place"].as_str().unwrap_or("none"));
    let what = format!("{} ({})", mutant.what, bench.dialect.name());
    if code != 1 || found != (wanted_layer, wanted) {
        return Err(format!("{what}: exit code {code}, {found:?}, not {:?}\n{text}", (wanted_layer, wanted)));
    }
    let branch = if let Kind::Merged(branch) = mutant.kind { Value::from(branch.scope()) } else { Value::Null };
    if departure["branch"] != branch {
        return Err(format!("{what}: the branch is not {branch}: {departure:#}"));
    }
    if departure["fault"] == "runtime" {
        return Err(format!("{what}: the runtime is blamed: {departure:#}"));
    }
    if !bench.folder.path().join(departure["reproducer"].as_str().unwrap_or("nowhere")).join("model.onnx").exists() {
        return Err(format!("{what}: there is no reproducer: {departure:#}"));
    }
    let layer = layer.map_or(String::new(), |layer| format!("layer {layer}, "));
    let nodes: Vec<&str> = departure["nodes"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let named = |nodes: &[&str]| nodes.join(", ");
    let nodes = match &nodes[..] {
        [first, .., last] if nodes.len() > 4 => format!("{first} … {last} ({} nodes)", nodes.len()),
        few => named(few),
    };
    Ok(format!("| {} | {} | {layer}{} | {nodes} |", mutant.what, bench.dialect.name(), found.1.replace('_', " ")))
}

#[test]
fn every_mutant_is_caught_and_its_place_named() {
    let mutants = adapter::all().into_iter().chain(base::all()).chain(wiring::all());
    let mutants: Vec<Mutant> = mutants.chain(merged::all()).collect();
    let benches: Vec<Bench> = dialects().into_iter().map(Bench::new).collect();
    let jobs: Vec<(usize, &Mutant, &Bench)> = mutants
        .iter()
        .flat_map(|mutant| benches.iter().map(move |bench| (mutant, bench)))
        .filter(|(mutant, bench)| mutant.only.is_none_or(|only| only == bench.dialect))
        .filter(|(mutant, _)| benches.len() == 2 || !matches!(mutant.kind, Kind::Merged(_)))
        .enumerate()
        .map(|(number, (mutant, bench))| (number, mutant, bench))
        .collect();
    let (next, results) = (AtomicUsize::new(0), Mutex::new(vec![None; jobs.len()]));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((number, mutant, bench)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = std::panic::catch_unwind(|| judged(mutant, bench, *number));
                    let result = result.unwrap_or_else(|_| Err(format!("{}: it panicked", mutant.what)));
                    results.lock().unwrap()[*number] = Some(result);
                }
            });
        }
    });
    let results: Vec<_> = results.into_inner().unwrap().into_iter().flatten().collect();
    let wrong: Vec<&String> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        results.len(),
        wrong.iter().map(|w| w.as_str()).collect::<Vec<_>>().join("\n")
    );
    assert_eq!(results.len(), jobs.len());
    if benches.len() == 2 {
        check_table(&results.into_iter().flatten().collect::<Vec<_>>());
    }
}

fn check_table(rows: &[String]) {
    let text = format!(
        "# Mutants\n\n\
         Graphs that are broken on purpose, each in one way, and what `prefold verify` says of them. Every one fails with exit code 1.\n\
         The table is written by the test `mutants::every_mutant_is_caught_and_its_place_named` (with `INSTA_UPDATE=always`), which\n\
         fails when a mutant is not caught, or when another layer or place is named. Nodes are those between the last place that\n\
         agrees with candle and the first that departs; they are in the reproducer.\n\n\
         | what is broken | dialect | where `verify` says it departs | nodes at fault |\n|---|---|---|---|\n{}\n",
        rows.join("\n")
    );
    if std::env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        std::fs::create_dir_all(Path::new(TABLE).parent().unwrap()).unwrap();
        std::fs::write(TABLE, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(TABLE).unwrap_or_default(), text, "run the test with INSTA_UPDATE=always");
}

/// What is not broken passes, with all that is compared at every place.
#[test]
fn a_graph_that_is_not_broken_departs_nowhere() {
    for dialect in dialects() {
        let bench = Bench::new(dialect);
        let mut kinds = vec![Kind::Folded, Kind::Slot, Kind::Bank, Kind::Gemma2];
        if dialects().contains(&Dialect::Ort) {
            kinds.extend([Kind::Merged(Branch::Prompt)]);
        }
        for (number, kind) in kinds.into_iter().enumerate() {
            let (code, report, text) = bench.verify(number, (kind, CASES), |model, _| model.clone());
            assert_eq!((code, &report["runs"][0]["departure"]), (0, &Value::Null), "{kind:?}: {text}");
        }
    }
}

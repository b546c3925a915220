//! Slots, banks, folds over folds, and back out again.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use ndarray::{Array2, Array3, Axis};
use prefold::adapter::{Adapter, AdapterConfig, Tensors};
use prefold::base::{Checkpoint, Decoder, Input};
use prefold::export::{Dialect, ExportOptions, export};
use prefold::fold::{
    AdapterFile, BankEdit, Emission, FoldOptions, NamedAdapter, Over, edit_bank, fold_adapters, unfold_folder,
};
use prefold::onnx::{Model, NodeDef, Patch};
use prefold::runtime::{
    Given, GraphDecoder, OrtOptions, OrtSession, Session, TractOptions, TractSession, Value, WithGiven, library,
};
use serde_json::json;

use crate::methods::adapter;
use crate::oracles::every_family;
use crate::support::{arg, fixture, prefold, prefold_ok, shared};

const TOKENS: [i64; 6] = [3, 14, 15, 9, 26, 5];
const BATCH: usize = 4;

/// A model, its graph in one dialect, and adapters `a`, `b` and `r`, which has a rank and a gate.
struct Bench {
    scratch: tempfile::TempDir,
    checkpoint: Checkpoint,
}

impl Bench {
    fn new(dialect: Dialect) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let model = fixture("oracles/llama_bias");
        let checkpoint = Checkpoint::open(&model).unwrap();
        let bench = Self { scratch, checkpoint };
        export(&bench.checkpoint, &ExportOptions { dialect, ..ExportOptions::default() }, &bench.folder("base"))
            .unwrap();
        for (name, fields) in [("a", json!({})), ("b", json!({})), ("r", json!({"rank": 2, "gate": "head"}))] {
            adapter(&model, &fields, &bench.at(name));
        }
        // the noise of a tensor is that of its name
        let b = bench.adapter("b");
        let moved = b.tensors().iter().map(|(name, tensor)| (name.clone(), (tensor * -0.7).unwrap())).collect();
        Adapter::new(b.config().clone(), moved).unwrap().save(&bench.at("b")).unwrap();
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn folder(&self, name: &str) -> PathBuf {
        std::fs::create_dir_all(self.at(name)).unwrap();
        self.at(name)
    }

    fn adapter(&self, name: &str) -> Adapter {
        Adapter::open(&self.at(name)).unwrap()
    }

    fn fold(&self, graph: &str, adapters: &[&str], emission: Emission, over: Over, out: &str) {
        let adapters: Vec<_> = adapters.iter().map(|name| ((*name).to_owned(), self.at(name))).collect();
        fold_adapters(
            &self.at(graph),
            &adapters,
            FoldOptions { emission, over, ..FoldOptions::default() },
            &self.folder(out),
        )
        .unwrap();
    }

    /// candle's logits of one row, `[seq, vocab]`.
    fn expected(&self, adapter: Option<&Adapter>) -> Array2<f32> {
        let decoder = Decoder::load(&self.checkpoint, DType::F32, &Device::Cpu).unwrap();
        let input = Input::new(1, &TOKENS, &[1; TOKENS.len()], None).unwrap();
        let logits = match adapter {
            Some(adapter) => {
                let hook = adapter.hook(self.checkpoint.spec(), &Device::Cpu).unwrap();
                decoder.forward(&input, None, hook.as_ref()).unwrap()
            }
            None => decoder.forward(&input, None, &prefold::base::NoHook).unwrap(),
        };
        let vocab = logits.dim(2).unwrap();
        let values = logits.flatten_all().unwrap().to_vec1().unwrap();
        Array2::from_shape_vec((TOKENS.len(), vocab), values).unwrap()
    }

    /// A graph in every runtime at hand, with inputs given beforehand.
    fn sessions(&self, graph: &str, given: &[(String, Given)], dialect: Dialect) -> Vec<Box<dyn Session>> {
        let graph = self.at(graph).join("model.onnx");
        let fed: Vec<String> = given.iter().map(|(name, _)| name.clone()).collect();
        let mut sessions: Vec<Box<dyn Session>> = Vec::new();
        if dialect == Dialect::Portable {
            sessions.push(Box::new(TractSession::open_fed(&graph, &fed, TractOptions::default()).unwrap()));
        }
        if let Some(library) = ort_library() {
            sessions.push(Box::new(OrtSession::open(&library, &graph, OrtOptions::default()).unwrap()));
        }
        let given = |session| Box::new(WithGiven::new(session, given.to_vec()).unwrap()) as Box<dyn Session>;
        sessions.into_iter().map(given).collect()
    }
}

fn ort_library() -> Option<PathBuf> {
    let found = library::find(None, &prefold::files::cache_folder().unwrap());
    found.inspect_err(|_| eprintln!("skipped: no ONNX Runtime here (prefold runtime install)")).ok()
}

/// Logits of the tokens in every row of the batch, at once and then the last token from the cache: `[batch, seq, vocab]`.
fn run(session: impl Session) -> Array3<f32> {
    let mut decoder = GraphDecoder::new(session).unwrap();
    let (last, first) = TOKENS.split_last().unwrap();
    let ids = Array2::from_shape_fn((BATCH, first.len()), |(_, column)| first[column]);
    let prefill = decoder.prefill(&ids, &Array2::ones(ids.dim())).unwrap();
    let step = decoder.step(&[*last; BATCH]).unwrap().insert_axis(Axis(1));
    ndarray::concatenate(Axis(1), &[prefill.view(), step.view()]).unwrap()
}

fn close(found: ndarray::ArrayView2<f32>, expected: &Array2<f32>, what: &str) {
    let distance = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    eprintln!("{what}: {distance:.2e}");
    assert!(distance < 1e-4, "{what}: {distance}");
}

fn bits(logits: ndarray::ArrayView2<f32>) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_bank_gives_every_row_its_own_adapter() {
    for dialect in [Dialect::Portable, Dialect::Ort] {
        let bench = Bench::new(dialect);
        bench.fold("base", &["a", "b", "r"], Emission::Bank, Over::Refuse, "bank");
        let ids: Value = ndarray::arr1(&[0i64, 1, 2, 3]).into_dyn().into();
        let given = [("adapter_ids".to_owned(), Given::Value(ids))];
        let base = bench.sessions("base", &[], dialect);
        for (mixed, base) in bench.sessions("bank", &given, dialect).into_iter().zip(base) {
            let name = mixed.info().runtime;
            let (mixed, base) = (run(mixed), run(base));
            assert_eq!(bits(mixed.index_axis(Axis(0), 0)), bits(base.index_axis(Axis(0), 0)), "{name}: row 0");
            for (row, adapter) in ["a", "b", "r"].iter().enumerate() {
                let expected = bench.expected(Some(&bench.adapter(adapter)));
                close(mixed.index_axis(Axis(0), row + 1), &expected, &format!("{name} {dialect} {adapter}"));
            }
        }
    }
}

/// ONNX Runtime's own adapter API: no adapter is the base model, and one file takes another's place between runs.
#[test]
fn adapter_files_are_swapped_in_onnx_runtime() {
    let Some(library) = ort_library() else { return };
    for dialect in [Dialect::Portable, Dialect::Ort] {
        let bench = Bench::new(dialect);
        bench.fold("base", &["a", "b", "r"], Emission::Slot, Over::Refuse, "slot");
        let base = run(OrtSession::open(&library, &bench.at("base/model.onnx"), OrtOptions::default()).unwrap());
        let mut session = OrtSession::open(&library, &bench.at("slot/model.onnx"), OrtOptions::default()).unwrap();
        for active in [None, Some("a"), Some("r"), None, Some("b")] {
            let file = active.map(|name| bench.at(&format!("slot/{name}.onnx_adapter")));
            session.set_adapter(file.as_deref()).unwrap();
            let found = run(&mut session);
            match active {
                None => assert_eq!(bits(found.index_axis(Axis(0), 0)), bits(base.index_axis(Axis(0), 0))),
                Some(name) => {
                    let expected = bench.expected(Some(&bench.adapter(name)));
                    close(found.index_axis(Axis(0), 1), &expected, &format!("{dialect} {name}"));
                }
            }
        }
        let text = bench.at("text.onnx_adapter");
        std::fs::write(&text, "no adapter").unwrap();
        assert!(session.set_adapter(Some(&text)).is_err());
    }
}

/// The terms of two Prefix-Tuning+ adapters of one φ are the term of the sum of their M.
#[test]
fn stacked_adapters_add_up_and_are_taken_off_one_by_one() {
    let bench = Bench::new(Dialect::Portable);
    let (a, b) = (bench.adapter("a"), bench.adapter("b"));
    let sums: Tensors = a.tensors().iter().map(|(name, m)| (name.clone(), (m + &b.tensors()[name]).unwrap())).collect();
    let expected = bench.expected(Some(&Adapter::new(a.config().clone(), sums).unwrap()));
    let read = |name: &str| std::fs::read(bench.at(name).join("model.onnx")).unwrap();
    for (first, second) in [
        (Emission::Baked, Emission::Baked),
        (Emission::Baked, Emission::Bank),
        (Emission::Bank, Emission::Bank),
        (Emission::Slot, Emission::Baked),
        (Emission::Slot, Emission::Slot),
    ] {
        let (one, two) = (format!("{first}_{second}_1"), format!("{first}_{second}_2"));
        bench.fold("base", &["a"], first, Over::Refuse, &one);
        bench.fold(&one, &["b"], second, Over::Stack, &two);
        let mut given = Vec::new();
        for (emission, ids, file, adapter) in [(first, "adapter_ids", &one, "a"), (second, "adapter_ids.2", &two, "b")]
        {
            match emission {
                Emission::Baked => {}
                Emission::Bank => given.push((ids.to_owned(), Given::EveryRow(1))),
                Emission::Slot => {
                    let values = AdapterFile::open(&bench.at(&format!("{file}/{adapter}.onnx_adapter"))).unwrap();
                    given.extend(values.parameters.into_iter().map(|value| {
                        let tensor = Given::from_le_bytes(value.data_type.code(), &value.dims, &value.bytes);
                        (value.name, tensor.unwrap())
                    }));
                }
            }
        }
        for session in bench.sessions(&two, &given, Dialect::Portable) {
            let name = session.info().runtime;
            close(run(session).index_axis(Axis(0), 0), &expected, &format!("{name} {first} {second}"));
        }
        let (once, twice) = (format!("{two}_once"), format!("{two}_twice"));
        unfold_folder(&bench.at(&two), false, &bench.folder(&once)).unwrap();
        assert_eq!(read(&once), read(&one), "{first} {second}");
        assert_eq!(unfold_folder(&bench.at(&two), true, &bench.folder(&twice)).unwrap().folds.len(), 2);
        assert_eq!(read(&twice), read("base"), "{first} {second}");
        let replaced = format!("{two}_replaced");
        bench.fold(&two, &["r"], second, Over::Replace, &replaced);
        bench.fold(&one, &["r"], second, Over::Stack, &format!("{replaced}_directly"));
        assert_eq!(read(&replaced), read(&format!("{replaced}_directly")), "{first} {second}");
    }
}

#[test]
fn adapters_go_into_a_bank_and_out_again() {
    let bench = Bench::new(Dialect::Portable);
    bench.fold("base", &["a", "r"], Emission::Bank, Over::Refuse, "two");
    bench.fold("base", &["a", "r", "b"], Emission::Bank, Over::Refuse, "three");
    let read = |name: &str| std::fs::read(bench.at(name).join("model.onnx")).unwrap();
    let add = BankEdit::Add(vec![NamedAdapter { name: "b".into(), adapter: bench.adapter("b") }]);
    assert_eq!(edit_bank(&bench.at("two"), &add, &bench.folder("added")).unwrap(), ["a", "r", "b"]);
    assert_eq!(bank(&read("added")), bank(&read("three")), "as if folded at once");
    let drop = BankEdit::Drop(vec!["r".into()]);
    assert_eq!(edit_bank(&bench.at("added"), &drop, &bench.folder("dropped")).unwrap(), ["a", "b"]);
    for graph in ["added", "dropped"] {
        let back = format!("{graph}_back");
        unfold_folder(&bench.at(graph), false, &bench.folder(&back)).unwrap();
        assert_eq!(read(&back), read("base"));
    }
    let given = [("adapter_ids".to_owned(), Given::EveryRow(2))];
    for session in bench.sessions("dropped", &given, Dialect::Portable) {
        close(run(session).index_axis(Axis(0), 3), &bench.expected(Some(&bench.adapter("b"))), "b after the drop");
    }
    let again = edit_bank(&bench.at("added"), &add, &bench.folder("again")).unwrap_err().to_string();
    assert_eq!(again, "the adapter name `b` is given twice");
    let unknown = BankEdit::Drop(vec!["zz".into()]);
    let unknown = edit_bank(&bench.at("added"), &unknown, &bench.folder("again")).unwrap_err().to_string();
    assert_eq!(unknown, "the bank has no adapter `zz`");
}

/// Names, shapes and values of a bank's tensors.
fn bank(file: &[u8]) -> Vec<(String, Vec<i64>, Vec<f32>)> {
    let model = Model::from_bytes(file.to_vec()).unwrap();
    let banks = model.graph().initializers().iter().filter(|tensor| tensor.name().ends_with(".bank"));
    banks.map(|t| (t.name().to_owned(), t.dims().to_vec(), t.to_f32s().unwrap())).collect()
}

/// Every family in both dialects, and graphs of other exporters.
#[test]
fn every_graph_comes_back_byte_for_byte() {
    let mut folded = 0;
    let scratch = tempfile::tempdir().unwrap();
    let folder = |name: String| {
        std::fs::create_dir_all(scratch.path().join(&name)).unwrap();
        scratch.path().join(name)
    };
    let mut back = |graph: &Path, oracle: &Path, name: &str| {
        for emission in [Emission::Baked, Emission::Slot, Emission::Bank] {
            let out = folder(format!("{name}_{emission}"));
            let options = FoldOptions { emission, ..FoldOptions::default() };
            let adapters = [("one".to_owned(), oracle.join("adapter.safetensors"))];
            // what is not folded is another test's
            if fold_adapters(graph, &adapters, options, &out).is_err() {
                continue;
            }
            folded += 1;
            let undone = folder(format!("{name}_{emission}_back"));
            unfold_folder(&out, true, &undone).unwrap();
            assert_eq!(
                std::fs::read(undone.join("model.onnx")).unwrap(),
                std::fs::read(prefold::fold::graph_file(graph)).unwrap(),
                "{name} {emission}"
            );
        }
    };
    for oracle in every_family() {
        let name = oracle.file_name().unwrap().to_str().unwrap().to_owned();
        for dialect in [Dialect::Portable, Dialect::Ort] {
            let graph = folder(format!("{name}_{dialect}"));
            let options = ExportOptions { dialect, ..ExportOptions::default() };
            export(&Checkpoint::open(&oracle).unwrap(), &options, &graph).unwrap();
            back(&graph, &oracle, &format!("{name}_{dialect}_folded"));
        }
    }
    for graph in shared("graphs").iter().flat_map(|graphs| std::fs::read_dir(graphs).unwrap().flatten()) {
        let graph = graph.path().join("llama_gqa/model.onnx");
        if let Some(oracle) = shared("oracles/llama_gqa").filter(|_| graph.is_file()) {
            let name = graph.parent().unwrap().parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
            back(&graph, &oracle, &name);
        }
    }
    eprintln!("{folded} folded graphs came back");
    assert!(folded >= 60, "{folded}");
}

#[test]
fn a_graph_that_was_changed_since_is_not_unfolded() {
    let bench = Bench::new(Dialect::Portable);
    bench.fold("base", &["a"], Emission::Slot, Over::Refuse, "slot");
    let file = bench.at("slot/model.onnx");
    let model = Model::open(&file).unwrap();
    let mut patch = Patch::new("as an optimizer would");
    patch.append_node(NodeDef::new("Identity", "more").inputs(["logits"]).outputs(["more"]));
    patch.apply(&model).unwrap().save(&file).unwrap();
    let error = unfold_folder(&bench.at("slot"), false, &bench.folder("back")).unwrap_err().to_string();
    assert!(error.contains("it was changed after the fold"), "{error}");
    let error = unfold_folder(&bench.at("base"), false, &bench.folder("back")).unwrap_err().to_string();
    assert!(error.contains("it carries no adapter that prefold folded"), "{error}");
}

/// Some tools drop metadata. Slots of a second fold would bear the names of the first one's.
#[test]
fn a_graph_that_lost_the_metadata_of_its_fold_is_not_folded_again() {
    let bench = Bench::new(Dialect::Portable);
    bench.fold("base", &["a"], Emission::Slot, Over::Refuse, "slot");
    let file = bench.at("slot/model.onnx");
    let kept = std::fs::read(&file).unwrap();
    // entries of the same length under other names
    let mark = kept.windows(15).position(|bytes| bytes == b"prefold.adapter").unwrap();
    let mut lost = kept.clone();
    lost[mark..mark + 7].copy_from_slice(b"another");
    let record = lost.windows(12).position(|bytes| bytes == b"prefold.fold").unwrap();
    lost[record..record + 7].copy_from_slice(b"another");
    std::fs::write(&file, lost).unwrap();
    let adapters = [("b".to_owned(), bench.at("b"))];
    let error =
        fold_adapters(&file, &adapters, FoldOptions::default(), &bench.folder("again")).unwrap_err().to_string();
    assert!(error.contains("it carries an adapter, and another tool dropped the metadata of it"), "{error}");
}

/// What a fold writes down grows with what it changes, not with the graph.
#[test]
fn the_way_back_is_short() {
    let bench = Bench::new(Dialect::Portable);
    bench.fold("base", &["a"], Emission::Baked, Over::Refuse, "baked");
    let model = Model::open(&bench.at("baked")).unwrap();
    let record = model.metadata("prefold.fold.1").unwrap();
    eprintln!("{} bytes of metadata for {} sites", record.len(), 2);
    assert!(record.len() < 2000, "{record}");
}

#[test]
fn slots_and_banks_compute_every_option_and_are_exactly_off() {
    let scratch = tempfile::tempdir().unwrap();
    let model = fixture("oracles/llama_bias");
    let has_ort = ort_library().is_some();
    let all = json!({"feature_map": "mlp", "query": "pre_rope", "sharing": "kv_group", "gate": "head",
                     "normalizer": true, "init": "prompt"});
    let cases = [
        ("positive", json!({"feature_map": "elu_plus_one", "normalizer": true})),
        ("all", all),
        ("shared", json!({"feature_map": "gelu", "sharing": "layer", "rank": 2, "layers": [1]})),
        ("lora", json!({"method": "lora", "rank": 3, "targets": ["q_proj", "v_proj", "down_proj"]})),
    ];
    for (name, fields) in &cases {
        adapter(&model, fields, &scratch.path().join(name));
        for (dialect, precision) in [("portable", "f32"), ("portable", "f16"), ("ort", "f16")] {
            if dialect == "ort" && !has_ort {
                continue;
            }
            for emission in ["slot", "bank"] {
                let out = format!("{name}_{dialect}_{precision}_{emission}");
                let args = ["compile", "--model", arg(&model), "--adapter", name, "--out", &out, "--dialect", dialect];
                let more = ["--precision", precision, "--emission", emission];
                let printed = prefold_ok(scratch.path(), &[args.as_slice(), &more].concat());
                // a sum between a product and its bias keeps runtimes from fusing both, and so moves last bits
                assert_eq!(printed.contains("zero adapter"), *name != "lora", "{out}: {printed}");
            }
        }
    }
}

/// From the export to the verdict, which leaves out padding that the graph says it is not for.
#[test]
fn graphs_for_padding_on_the_right_alone_are_compiled_and_verified() {
    if ort_library().is_none() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let (at, model) = (scratch.path(), fixture("oracles/llama_head_dim"));
    let cases = [
        ("rotated", json!({})),
        ("unrotated", json!({"query": "pre_rope", "feature_map": "mlp", "gate": "head"})),
        ("lora", json!({"method": "lora", "rank": 3, "targets": ["q_proj", "v_proj", "down_proj"]})),
        ("prefix", json!({"method": "prefix", "num_virtual_tokens": 2, "init": "random"})),
    ];
    for (name, fields) in &cases {
        adapter(&model, fields, &at.join(name));
        for emission in ["baked", "slot", "bank"] {
            let out = format!("{name}_{emission}");
            let args = ["compile", "--model", arg(&model), "--adapter", name, "--out", &out, "--emission", emission];
            let printed = prefold_ok(at, &[&args[..], &["--dialect", "ort", "--right-padding-only"]].concat());
            assert!(printed.contains(" right_padding ") && !printed.contains("left_padding"), "{out}: {printed}");
        }
    }
    let verify = ["verify", "--graph", "rotated_baked", "--model", arg(&model), "--adapter", "rotated"];
    let printed = prefold_ok(at, &verify);
    assert!(printed.contains("zero adapter") && !printed.contains("left_padding"), "{printed}");
    let output = prefold(at, &[&verify[..], &["--padding", "left"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let export = ["export", "--model", arg(&model), "--right-padding-only", "--out", "portable"];
    let error = String::from_utf8(prefold(at, &export).stderr).unwrap();
    assert!(error.contains("the portable dialect has no operator") && error.contains("--dialect ort"), "{error}");
    assert!(!at.join("portable").exists());

    // a table that the graph computes by the length of the text has no rows for a prefix
    let longer = at.join("model");
    std::fs::create_dir(&longer).unwrap();
    std::fs::copy(model.join("model.safetensors"), longer.join("model.safetensors")).unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
    config["rope_parameters"] = json!({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0});
    std::fs::write(longer.join("config.json"), config.to_string()).unwrap();
    prefold_ok(at, &["export", "--model", "model", "--dialect", "ort", "--right-padding-only", "--out", "longer"]);
    prefold_ok(at, &["fold", "--graph", "longer", "--adapter", "rotated", "--out", "longer_rotated"]);
    let output = prefold(at, &["fold", "--graph", "longer", "--adapter", "prefix", "--out", "longer_prefix"]);
    let error = String::from_utf8(output.stderr).unwrap().replace("\n  │ ", " ");
    assert!(!output.status.success() && error.contains("rotates by a table that the graph computes"), "{error}");
}

#[test]
fn values_are_converted_and_checked_against_a_graph() {
    let bench = Bench::new(Dialect::Portable);
    let at = bench.scratch.path();
    let fold = ["fold", "--graph", "base", "--adapter", "first=a", "--out", "slot", "--emission", "slot"];
    let printed = prefold_ok(at, &fold);
    assert!(printed.contains("2 slots") && printed.contains("first.onnx_adapter"), "{printed}");
    let convert = |adapter: &str, graph: &str, out: &str| {
        prefold(
            at,
            &["adapter", "convert", "--adapter", adapter, "--to", "onnx_adapter", "--graph", graph, "--out", out],
        )
    };
    assert!(convert("r", "slot", "converted").status.success());
    let check = |file: &str, graph: &str| prefold(at, &["adapter", "check", file, "--graph", graph]);
    assert!(check("converted/r.onnx_adapter", "slot").status.success());
    assert!(convert("a", "slot", "again").status.success());
    let bytes = |name: &str| std::fs::read(at.join(name)).unwrap();
    assert_eq!(bytes("again/a.onnx_adapter"), bytes("slot/first.onnx_adapter"), "the file that the fold wrote");

    let file = AdapterFile::open(&at.join("slot/first.onnx_adapter")).unwrap();
    assert_eq!(file.parameters[0].name, "prefold.layers.0.M");
    let write = |name: &str, change: &dyn Fn(&mut AdapterFile)| {
        let mut file = file.clone();
        change(&mut file);
        file.save(&at.join(name)).unwrap();
        let output = check(name, "slot");
        assert_eq!(output.status.code(), Some(1), "{name}");
        String::from_utf8(output.stderr).unwrap().split_whitespace().collect::<Vec<_>>().join(" ").replace("│ ", "")
    };
    let error = write("name.onnx_adapter", &|file| file.parameters[0].name = "layers.0.M".into());
    assert!(error.contains("has no input `layers.0.M`"), "{error}");
    let error = write("input.onnx_adapter", &|file| file.parameters[0].name = "attention_mask".into());
    assert!(error.contains("has no default"), "{error}");
    let error = write("less.onnx_adapter", &|file| _ = file.parameters.pop());
    assert!(error.contains("`prefold.layers.1.M` gets no value"), "{error}");
    let error = write("shape.onnx_adapter", &|file| file.parameters[1].dims.swap(0, 1));
    assert!(error.contains("the file's value"), "{error}");
    let error = String::from_utf8(convert("a", "base", "none").stderr).unwrap();
    assert!(error.contains("no slots"), "{error}");
    adapter(&fixture("oracles/llama_bias"), &json!({"feature_map": "relu"}), &bench.at("relu"));
    let error = String::from_utf8(convert("relu", "slot", "none").stderr).unwrap();
    assert!(error.contains("`feature_map` is \"elu\" in the graph and \"relu\" in the"), "{error}");
}

/// A Python that has a module: PREFOLD_PYTHON, or python3.
fn python_with(module: &str) -> Option<String> {
    let python = std::env::var("PREFOLD_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = std::process::Command::new(&python).args(["-c", &format!("import {module}, numpy")]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    eprintln!("skipped: {python} has no {module}; set PREFOLD_PYTHON to one that has");
    None
}

#[test]
fn onnxruntime_genai_s_adapters_take_the_files() {
    let Some(python) = python_with("onnxruntime_genai") else { return };
    for dialect in [Dialect::Portable, Dialect::Ort] {
        let bench = Bench::new(dialect);
        bench.fold("base", &["a"], Emission::Slot, Over::Refuse, "slot");
        let (script, file) = (fixture("onnx_adapter/genai.py"), bench.at("slot/a.onnx_adapter"));
        let args = [arg(&script), arg(&bench.at("slot")), arg(&file), &format!("{TOKENS:?}")].map(str::to_owned);
        let output = std::process::Command::new(&python).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let printed = String::from_utf8(output.stdout).unwrap();
        let lists: Vec<Vec<f32>> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for (found, adapter) in lists.into_iter().zip([None, Some(bench.adapter("a"))]) {
            let expected = bench.expected(adapter.as_ref());
            let last = expected.row(TOKENS.len() - 1).insert_axis(Axis(0)).to_owned();
            let found = Array2::from_shape_vec(last.dim(), found).unwrap();
            close(found.view(), &last, &format!("onnxruntime-genai {dialect}, adapter {}", adapter.is_some()));
        }
    }
}

#[test]
fn python_s_onnx_runtime_reads_the_files_and_its_own_are_read() {
    let Some(python) = python_with("onnxruntime") else { return };
    let bench = Bench::new(Dialect::Ort);
    bench.fold("base", &["a"], Emission::Slot, Over::Refuse, "slot");
    let script = "import sys, onnxruntime as ort\n\
        adapter = ort.AdapterFormat.read_adapter(sys.argv[1])\n\
        parameters = adapter.get_parameters()\n\
        for name, value in sorted(parameters.items()):\n\
        \x20   print(name, list(value.shape()), value.element_type(), float(value.numpy().sum()))\n\
        again = ort.AdapterFormat()\n\
        again.set_adapter_version(adapter.get_adapter_version())\n\
        again.set_model_version(adapter.get_model_version())\n\
        again.set_parameters(parameters)\n\
        again.export_adapter(sys.argv[2])\n";
    let (ours, theirs) = (bench.at("slot/a.onnx_adapter"), bench.at("theirs.onnx_adapter"));
    let output = std::process::Command::new(&python).args(["-c", script, arg(&ours), arg(&theirs)]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("prefold.layers.0.M [4, 8, 8] 1 "), "{printed}");
    let (ours, mut theirs) = (AdapterFile::open(&ours).unwrap(), AdapterFile::open(&theirs).unwrap());
    theirs.parameters.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(ours, theirs);
}

#[test]
fn adapters_of_other_kinds_are_kept_apart() {
    let bench = Bench::new(Dialect::Portable);
    let at = bench.scratch.path();
    let model = fixture("oracles/llama_bias");
    adapter(&model, &json!({"sharing": "layer"}), &bench.at("shared"));
    adapter(&model, &json!({"method": "lora", "rank": 2, "dora": true}), &bench.at("dora"));
    adapter(&model, &json!({"method": "prefix", "num_virtual_tokens": 2, "init": "random"}), &bench.at("prefix"));
    bench.fold("base", &["a"], Emission::Baked, Over::Refuse, "with_a");
    let error = |args: &[&str]| {
        let graph = if args.contains(&"--stack") { "with_a" } else { "base" };
        let args = [&["fold", "--graph", graph, "--out", "out"], args].concat();
        let output = prefold(at, &args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let text = String::from_utf8(output.stderr).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        text.replace("│ ", "")
    };
    let errors = [
        error(&["--adapter", "a", "--adapter", "shared", "--emission", "bank"]),
        error(&["--adapter", "a", "--adapter", "dora", "--emission", "slot"]),
        error(&["--adapter", "a", "--adapter", "b"]),
        error(&["--adapter", "a", "--adapter", "a=b", "--emission", "bank"]),
        error(&["--adapter", "dora", "--emission", "slot", "--lora", "merge"]),
        error(&["--adapter", "prefix", "--lora", "merge"]),
        error(&["--adapter", "prefix", "--stack"]),
    ];
    insta::assert_snapshot!(errors.join("\n\n"), @r#"
    prefold::fold::adapters_differ × `sharing` is "head" in adapter `a` and "layer" in adapter `shared` help: adapters that share a graph's slots or bank have the same configuration up to their rank

    prefold::fold::adapters_differ × `method` is "prefix_plus" in adapter `a` and "lora" in adapter `dora` help: adapters that share a graph's slots or bank have the same configuration up to their rank

    × a graph with baked tensors holds one adapter help: fold with --emission slot or bank

    prefold::fold::name × the adapter name `a` is given twice help: give adapters names: --adapter NAME=FOLDER

    prefold::fold::not_folded × not yet folded: LoRA as a slot, merged into weights help: merged weights are constants: fold with --emission baked, or with --lora side

    prefold::fold::not_folded × not yet folded: prefix, merged into weights help: only LoRA is a change of weights: leave --lora out

    prefold::fold::not_folded × not yet folded: prefix tuning over another adapter, which was trained without it help: fold it into the base graph; other adapters can be folded over it with --stack
    "#);
}

#[test]
fn configurations_of_adapters_round_trip_through_a_folded_graph() {
    let bench = Bench::new(Dialect::Portable);
    bench.fold("base", &["r"], Emission::Slot, Over::Refuse, "slot");
    let model = Model::open(&bench.at("slot")).unwrap();
    let record: serde_json::Value = serde_json::from_str(model.metadata("prefold.fold.1").unwrap()).unwrap();
    let config: AdapterConfig = serde_json::from_value(record["config"].clone()).unwrap();
    assert_eq!(&config, bench.adapter("r").config());
    assert_eq!(record["adapters"], json!(["r"]));
    assert_eq!(model.metadata("prefold.adapter"), Some("r"));
}

/// `prefold forward` says what `adapter_ids` and slots do: the base graph's logits, the adapter's, and which names there are.
#[test]
fn the_active_adapter_of_a_graph_is_chosen_by_name_number_or_file() {
    let bench = Bench::new(Dialect::Portable);
    let at = bench.scratch.path();
    bench.fold("base", &["a", "b"], Emission::Bank, Over::Refuse, "bank");
    bench.fold("base", &["a", "b"], Emission::Slot, Over::Refuse, "slot");
    let ids = candle_core::Tensor::new(&[TOKENS], &Device::Cpu).unwrap();
    let inputs = [("attention_mask".to_owned(), ids.ones_like().unwrap()), ("input_ids".to_owned(), ids)];
    candle_core::safetensors::save(&inputs.into_iter().collect(), at.join("in.safetensors")).unwrap();
    let forward = |graph: &str, more: &[&str]| {
        let args = ["forward", "--graph", graph, "--runtime", "tract", "--inputs", "in.safetensors"];
        prefold(at, &[args.as_slice(), &["--out", "out.safetensors"], more].concat())
    };
    let b = bench.adapter("b");
    let cases: [(&str, &[&str], Option<&Adapter>); 5] = [
        ("bank", &[], None),
        ("bank", &["--adapter-id", "b"], Some(&b)),
        ("bank", &["--adapter-id", "2"], Some(&b)),
        ("slot", &[], None),
        ("slot", &["--onnx-adapter", "slot/b.onnx_adapter"], Some(&b)),
    ];
    for (graph, more, adapter) in cases {
        let output = forward(graph, more);
        assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
        let logits = candle_core::safetensors::load(at.join("out.safetensors"), &Device::Cpu).unwrap();
        let values = logits["logits"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let expected = bench.expected(adapter);
        let found = Array2::from_shape_vec(expected.dim(), values).unwrap();
        close(found.view(), &expected, &format!("{graph} {more:?}"));
    }
    let refused = |graph: &str, more: &[&str]| String::from_utf8(forward(graph, more).stderr).unwrap();
    let error = refused("bank", &["--adapter-id", "3"]);
    assert!(error.contains("no adapter `3`") && error.contains("1 a, 2 b"), "{error}");
    assert!(refused("slot", &["--adapter-id", "1"]).contains("there is no bank to work on"));
    assert!(refused("base", &["--onnx-adapter", "slot/b.onnx_adapter"]).contains("no input `prefold.layers.0.M`"));
}

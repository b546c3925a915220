use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::place::At;
use super::*;
use crate::adapter::Adapter;
use crate::base::{Checkpoint, Decoder, DecoderSpec};
use crate::export::{Dialect, ExportOptions, export};
use crate::fold::{FoldOptions, fold_adapters};
use crate::onnx::{MODEL_NAME, Model as Graph, NodeDef, Patch, TensorDef};
use crate::parity::testing::{Candle, ort_library};
use crate::parity::{Candidate, Case, CaseOptions, Check, Facts, Padding, Reference, generated_prompts};
use crate::runtime::{OrtOptions, OrtSession, TractOptions, TractSession};

/// A model and a graph of it with an adapter folded in.
struct Bench {
    folder: tempfile::TempDir,
    checkpoint: Checkpoint,
    adapter: Adapter,
    graph: Graph,
}

impl Bench {
    fn new(oracle: &Path, dialect: Dialect) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(oracle).unwrap();
        let adapter = oracle.join("adapter.safetensors");
        let [base, folded] = ["base", "folded"].map(|name| {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            folder.path().join(name)
        });
        export(&checkpoint, &ExportOptions { dialect, ..ExportOptions::default() }, &base).unwrap();
        fold_adapters(&base, &[("a".into(), adapter.clone())], FoldOptions::default(), &folded).unwrap();
        let graph = Graph::open(&folded).unwrap();
        Self { folder, checkpoint, adapter: Adapter::open(&adapter).unwrap(), graph }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("folded").join(MODEL_NAME)
    }

    fn candle(&self, dtype: DType) -> Candle {
        Candle::new(Decoder::load(&self.checkpoint, dtype, &Device::Cpu).unwrap(), Some(&self.adapter))
    }

    fn spec(&self) -> &DecoderSpec {
        self.checkpoint.spec()
    }

    /// Two rows with padding on the left, and two steps after them.
    fn cases(&self) -> Vec<Case> {
        let options = CaseOptions { seed: 3, lengths: vec![9, 5], steps: 2 };
        vec![Case::batch("left", &generated_prompts(self.spec(), &options), Padding::Left, 2).unwrap()]
    }
}

fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracles");
    let mut all: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| path.join("adapter.safetensors").is_file() && path.join("model.safetensors").is_file());
    all.sort();
    all
}

fn tract(path: &Path) -> runtime::Result<Box<dyn Session>> {
    Ok(Box::new(TractSession::open(path, TractOptions::default())?))
}

/// Every place of every family is found in both dialects, but for those that a family's graph has not, and agrees.
#[test]
fn a_faithful_graph_agrees_at_every_place() {
    let library = ort_library();
    let mut missing = BTreeSet::new();
    for oracle in fixtures() {
        for dialect in [Dialect::Portable, Dialect::Ort] {
            let ort = |path: &Path| -> runtime::Result<Box<dyn Session>> {
                let library = library.as_deref().unwrap_or(Path::new(""));
                Ok(Box::new(OrtSession::open(library, path, OrtOptions::default())?))
            };
            let open: &dyn Fn(&Path) -> runtime::Result<Box<dyn Session>> = match dialect {
                Dialect::Portable => &tract,
                Dialect::Ort if library.is_none() => continue,
                Dialect::Ort => &ort,
            };
            let name = format!("{} {dialect:?}", oracle.file_name().unwrap().display());
            let bench = Bench::new(&oracle, dialect);
            let (exact, own) = (bench.candle(DType::F64), bench.candle(DType::F32));
            let reference = Reference::compute(exact.model(), bench.cases()).unwrap();
            let script = &reference.cases[0].script;
            let taps = Taps::find(&Branches::of(&bench.graph).unwrap(), bench.spec());
            let graph =
                taps.patch.clone().map_or_else(|| bench.graph.clone(), |patch| patch.apply(&bench.graph).unwrap());
            let tensors = taps.taps.iter().map(|tap| tap.tensor.clone()).collect();
            let tapped = Tapped::new(&bench.file(), &Branches::of(&graph).unwrap(), &[tensors]).unwrap();
            assert!(tapped.given.left_out.is_empty(), "{name}: {:?}", tapped.given.left_out);
            let (_, seen) = tapped.run(open(&tapped.path()).unwrap(), &[], script, Ports::of(bench.spec())).unwrap();
            let [reference, own] = [&exact, &own].map(|model| trace(&[model.model()], script).unwrap());
            let masks = script.calls().0.map(|(_, mask)| mask).collect();
            let calls = Calls { masks, reference: &reference, own: &own, seen: &seen };
            let gaps = calls.gaps(&taps.taps, &Budget::of(DType::F32, bench.spec()).unwrap());
            for gap in &gaps {
                assert!(gap.ratio() <= 1.0, "{name}: {:.2e} of {:.2e} at {:?}", gap.distance, gap.allowed, gap.tap);
            }
            let found: BTreeSet<_> = gaps.iter().filter(|gap| gap.call == 1).map(|gap| gap.tap.at).collect();
            // an operator shows no scores
            let hidden = |at: &At| dialect == Dialect::Ort && matches!(at.place, Place::Scores | Place::Weights);
            for at in reference[1].keys().filter(|at| !found.contains(at) && !hidden(at)) {
                missing.insert(format!("{name}: {:?}", at.place));
            }
        }
    }
    // this model has a projection between its last layer and its head
    let known = [
        "opt_post_norm Ort: FinalNorm",
        "opt_post_norm Ort: Stream",
        "opt_post_norm Portable: FinalNorm",
        "opt_post_norm Portable: Stream",
    ];
    let known: Vec<_> = known.into_iter().filter(|name| library.is_some() || name.contains("Portable")).collect();
    assert_eq!(missing.into_iter().collect::<Vec<_>>(), known);
}

/// What a runtime with a fault does: the nodes of this name compute from a hundredth more than they are given.
fn faulty(name: &'static str, path: &Path) -> runtime::Result<Box<dyn Session>> {
    let model = Graph::open(path).unwrap();
    let mut patch = Patch::new("a fault");
    if let Some(node) = model.graph().nodes().iter().find(|node| node.name() == name) {
        patch.add_initializer(TensorDef::from_f32s("fault", &[], &[1.01]));
        let moved = NodeDef::new("Mul", "moved").inputs([node.input(0).unwrap(), "fault"]).outputs(["moved"]);
        patch.insert_before(node.id(), moved);
        patch.replace_input(node.id(), 0, "moved");
    }
    let wrong = path.with_file_name("wrong.onnx");
    patch.apply(&model).unwrap().save(&wrong).unwrap();
    tract(&wrong)
}

#[test]
fn a_runtime_that_computes_a_node_wrongly_is_told_from_a_wrong_graph() {
    const NODE: &str = "/model/layers.1/mlp/act_fn/Sigmoid";
    let oracle = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracles/llama_bias");
    let bench = Bench::new(&oracle, Dialect::Portable);
    let (exact, own) = (bench.candle(DType::F64), bench.candle(DType::F32));
    let reference = Reference::compute(exact.model(), bench.cases()).unwrap();
    let mut check = Check::new(reference, own.model(), Budget::of(DType::F32, bench.spec()).unwrap()).unwrap();
    let file = bench.file();
    check.run(Candidate { name: "faulty".into(), open: Box::new(|| faulty(NODE, &file)) });
    check.run(Candidate { name: "tract".into(), open: Box::new(|| tract(&file)) });
    let ways = [
        Way { name: "faulty".into(), open: Box::new(|path, _| faulty(NODE, path)) },
        Way { name: "tract".into(), open: Box::new(|path, _| tract(path)) },
    ];
    let what = Localise {
        file: &file,
        graph: &bench.graph,
        given: &[],
        truth: Truth::Model { spec: bench.spec(), reference: &[exact.model()], own: &[own.model()] },
        ways: &ways,
        reproducers: Some(bench.folder.path()),
    };
    check.localise(&what).unwrap();
    let report = check.report(Facts::default()).unwrap();
    assert!(report.finding.text.contains("layer 1, the activation of the MLP"), "{}", report.finding.text);
    let departure = report.runs[0].departure.as_ref().unwrap();
    assert_eq!((departure.layer, departure.place, departure.fault), (Some(1), Place::MlpInner, Fault::Runtime));
    assert_eq!(departure.nodes, [format!("Sigmoid `{NODE}`")]);
    assert!(report.runs[1].departure.is_none());
    assert_eq!(report.runs[0].layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [0, 1]);
    let folder = Path::new(departure.reproducer.as_ref().unwrap());
    let model = Graph::open(folder).unwrap();
    assert_eq!(model.graph().nodes().iter().map(|node| node.name()).collect::<Vec<_>>(), [NODE]);
    let mut names: Vec<_> = std::fs::read_dir(folder.join("test_data_set_0"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["input_0.pb", "output_0.pb"]);
}

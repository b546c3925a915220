//! A second fold over a first: in branches of a merged decoder, beside operators that hide their query, and for linear maps. The sum
//! of two adapters of one kind is one adapter; two kinds commute.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use prefold::adapter::{Adapter, AdapterConfig, Lora, Method, Tensors};
use prefold::base::Checkpoint;
use prefold::fold::{FoldOptions, Over, fold_adapters, sites, unfold_folder};
use prefold::onnx::Model;
use prefold::runtime::Session;

use crate::foreign::{feeds, logits, session};
use crate::fused::runtime;
use crate::oracles::Case;
use crate::support::shared;

/// A graph of the workshop and the folders of its folds.
struct Stack {
    library: PathBuf,
    oracle: PathBuf,
    graph: PathBuf,
    scratch: tempfile::TempDir,
}

impl Stack {
    fn new(graph: &str) -> Option<Self> {
        let (library, graph) = (runtime()?, shared(&format!("graphs/{graph}"))?);
        let oracle = shared("oracles/llama_gqa")?;
        Some(Self { library, oracle, graph, scratch: tempfile::tempdir().unwrap() })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn save(&self, name: &str, adapter: &Adapter) {
        std::fs::create_dir(self.at(name)).unwrap();
        adapter.save(&self.at(name)).unwrap();
    }

    /// Prefix-Tuning+ whose matrices are the oracle's times `factor`.
    fn prefix_plus(&self, name: &str, factor: f64) {
        let own = Adapter::open(&self.oracle.join("adapter.safetensors")).unwrap();
        let scaled = own.tensors().iter().map(|(name, m)| (name.clone(), (m * factor).unwrap())).collect();
        self.save(name, &Adapter::new(own.config().clone(), scaled).unwrap());
    }

    /// LoRA of rank 2 for every map, times `factor`.
    fn lora(&self, name: &str, factor: f64) {
        self.low_rank(name, factor, false);
    }

    fn low_rank(&self, name: &str, factor: f64, dora: bool) {
        let checkpoint = Checkpoint::open(&self.oracle).unwrap();
        let targets = checkpoint.spec().linears().map(Into::into).collect();
        let lora = Lora { rank: 2, alpha: 2.0, dora, targets: Some(targets), ..Lora::default() };
        let config = AdapterConfig::new(Method::Lora(lora), checkpoint.spec(), None);
        let numbers = |shape: &[usize], factor: f64| {
            let count = shape.iter().product::<usize>();
            let values: Vec<f32> =
                (0..count).map(|i| (((i * 7919 + 13) as f64 * 0.618).fract() * 2.0 - 1.0) as f32).collect();
            (Tensor::from_vec(values, shape, &Device::Cpu).unwrap() * factor).unwrap()
        };
        let tensors = config.method.as_method().tensors(&config).unwrap().into_iter();
        let tensors: Tensors = tensors
            .map(|(name, spec)| {
                let factor = if name.ends_with("lora_B") { 0.05 * factor } else { 0.2 };
                (name, numbers(&spec.shape, factor).to_dtype(DType::F32).unwrap())
            })
            .collect();
        self.save(name, &Adapter::new(config, tensors).unwrap());
    }

    fn fold(&self, graph: &Path, adapter: &str, over: Over, out: &str) {
        std::fs::create_dir(self.at(out)).unwrap();
        let options = FoldOptions { over, ..FoldOptions::default() };
        let folded = fold_adapters(graph, &[(adapter.into(), self.at(adapter))], options, &self.at(out));
        folded.unwrap_or_else(|error| panic!("{} over {}: {error}", adapter, graph.display()));
    }

    /// Folds one adapter over another.
    fn both(&self, first: &str, second: &str, out: &str) {
        let below = format!("{out}_below");
        self.fold(&self.graph, first, Over::Refuse, &below);
        self.fold(&self.at(&below), second, Over::Stack, out);
    }

    /// Logits of every case, and of every branch.
    fn logits(&self, graph: &Path) -> Vec<Vec<f32>> {
        let mut session = session(&self.library, graph);
        let head_dim = Checkpoint::open(&self.oracle).unwrap().spec().attention.head_dim;
        let mut found = Vec::new();
        // operators that count positions know padding on the right only
        for case in Case::all(&self.oracle).iter().filter(|case| case.name != "left") {
            for branch in [false, true] {
                let fed = feeds(&session, case, head_dim, branch);
                let logits = logits(session.run(fed).unwrap());
                let vocab = logits.dim(2).unwrap();
                let flat = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let rows = flat.chunks(vocab).zip(&case.mask).filter(|(_, mask)| **mask == 1);
                found.push(rows.flat_map(|(row, _)| row.to_vec()).collect());
            }
        }
        found
    }

    fn same(&self, one: &str, other: &str) {
        let of = |name: &str| self.logits(&self.at(name).join("model.onnx"));
        let (distance, effect) = (apart(&of(one), &of(other)), apart(&of(one), &self.logits(&self.graph)));
        eprintln!("{}: {one} and {other} are {distance:.1e} apart, {effect:.1e} from the base", self.graph.display());
        assert!(distance < 1e-4 && effect > 0.1, "{one}, {other}: {distance:.1e}, {effect:.1e}");
    }
}

fn apart(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |most, x| if x.is_nan() { f32::INFINITY } else { most.max(x) })
}

/// Branches of an `If`; GroupQueryAttention that turns its query itself; standard operators.
const GRAPHS: [&str; 3] = [
    "optimum_merged/llama_gqa/decoder_model_merged.onnx",
    "genai_fp32/llama_gqa/model.onnx",
    "torch_dynamo18/llama_gqa/model.onnx",
];

#[test]
fn adapters_of_one_kind_add_up() {
    for graph in GRAPHS {
        let Some(stack) = Stack::new(graph) else { return };
        for (name, factor) in [("a", 1.0), ("b", -0.4), ("a+b", 0.6)] {
            stack.prefix_plus(name, factor);
        }
        stack.both("a", "b", "stacked");
        stack.fold(&stack.graph, "a+b", Over::Refuse, "at_once");
        stack.same("stacked", "at_once");
        // the sites are those of the base, where their readers read now
        let base = sites(&Model::open(&stack.graph).unwrap()).unwrap();
        let model = Model::open(&stack.at("stacked").join("model.onnx")).unwrap();
        let now = sites(&model).unwrap();
        assert_eq!(now.len(), base.len());
        for (now, base) in now.iter().zip(&base) {
            assert_eq!((now.layer, &now.scope, &now.query), (base.layer, &base.scope, &base.query));
            assert!(now.output != base.output && now.output.starts_with("/prefold.2/"), "{now:?}");
        }
        for (name, factor) in [("x", 1.0), ("y", -0.4), ("x+y", 0.6)] {
            stack.lora(name, factor);
        }
        stack.both("x", "y", "stacked_maps");
        stack.fold(&stack.graph, "x+y", Over::Refuse, "maps_at_once");
        stack.same("stacked_maps", "maps_at_once");
        std::fs::create_dir(stack.at("back")).unwrap();
        unfold_folder(&stack.at("stacked_maps"), true, &stack.at("back")).unwrap();
        assert!(std::fs::read(stack.at("back").join("model.onnx")).unwrap() == std::fs::read(&stack.graph).unwrap());
    }
}

#[test]
fn adapters_of_two_kinds_may_be_folded_in_either_order() {
    for graph in GRAPHS {
        let Some(stack) = Stack::new(graph) else { return };
        stack.prefix_plus("term", 1.0);
        stack.lora("maps", 1.0);
        stack.both("term", "maps", "maps_over_term");
        stack.both("maps", "term", "term_over_maps");
        stack.same("maps_over_term", "term_over_maps");
    }
}

/// DoRA scales a whole map, and so what another adapter adds to it: each order and form would be another function.
#[test]
fn magnitudes_are_not_stacked_with_another_adapter_of_the_same_map() {
    let Some(stack) = Stack::new("torch_dynamo18/llama_gqa/model.onnx") else { return };
    stack.lora("lora", 1.0);
    stack.low_rank("dora", 1.0, true);
    stack.prefix_plus("term", 1.0);
    for (first, second) in [("lora", "dora"), ("dora", "lora"), ("dora", "dora")] {
        let (below, above) = (format!("{first}_{second}_below"), stack.at(&format!("{first}_{second}")));
        stack.fold(&stack.graph, first, Over::Refuse, &below);
        std::fs::create_dir(&above).unwrap();
        let options = FoldOptions { over: Over::Stack, ..FoldOptions::default() };
        let folded = fold_adapters(&stack.at(&below), &[("x".into(), stack.at(second))], options, &above);
        let error = folded.unwrap_err().to_string();
        let expected =
            format!("a second adapter of layers.0.self_attn.q_proj, which `{first}` adapts, where one of them is DoRA");
        assert!(error.contains(&expected), "{error}");
    }
    stack.both("dora", "term", "dora_and_term");
    stack.fold(&stack.at("lora_dora_below"), "dora", Over::Replace, "replaced");
}

//! Kernels in the emulator, and what the CUDA compiler makes of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;

use super::attention::tilings;
use super::check::check;
use super::emulator::Emulated;
use super::launch::Source;
use super::{Row, self_check};
use crate::adapter::Adapter;
use crate::base::ops::{
    GatedMlp, InnerMap, LowRank, MlpBlock, NormWeights, OutputProjection, QkvProjection, Rotation, backward,
};
use crate::base::{Activation, Checkpoint, Decoder, Norm, NormKind};
use crate::data::Batch;
use crate::train::{BatchGradients, Models, Sft, batch_gradients};

fn report(rows: &[Row]) -> String {
    let failed = rows.iter().filter(|row| !row.holds());
    failed.map(|row| format!("{row:?}\n")).collect()
}

/// With the kernels, or without them in a build that has none.
#[test]
fn operations_of_the_cpu_are_what_they_are_in_float64() {
    let rows = self_check(&Device::Cpu).unwrap();
    assert!(rows.len() > 100 && rows.iter().all(Row::holds), "{}", report(&rows));
}

#[test]
fn kernels_are_their_operations_in_value_and_gradient() {
    let Some(_emulated) = Emulated::on_this_thread() else { return };
    let rows = self_check(&Device::Cpu).unwrap();
    if std::env::var_os("PREFOLD_SHOW").is_some() {
        rows.iter().for_each(|row| eprintln!("{row:?}"));
    }
    assert!(rows.len() > 100 && rows.iter().all(Row::holds), "{}", report(&rows));
}

/// The same in the opposite order of a block's threads: what depends on their order differs.
#[test]
fn kernels_do_not_depend_on_the_order_of_threads() {
    let Some(emulated) = Emulated::on_this_thread() else { return };
    let rows = self_check(&Device::Cpu).unwrap();
    emulated.backwards(true);
    assert_eq!(self_check(&Device::Cpu).unwrap(), rows);
}

/// A kernel that is wrong in one place is told from a right one: the check sees it, or the emulator stops.
#[test]
fn kernels_with_a_mistake_are_found() {
    let Some(emulated) = Emulated::on_this_thread() else { return };
    let mistakes = [
        ("RMS", ["sum / width + epsilon", "sum + epsilon"]),
        ("layer norm", ["x = 0;\n    for (int warp = 0", "x *= 1;\n    for (int warp = 1"]),
        ("rotary", ["second[k] = b * c[k] + a * s[k];", "second[k] = b * c[k] - a * s[k];"]),
        ("ReGLU", ["u[i] = d[i] * f.value", "u[i] = d[i] * f.slope"]),
        ("logits loss", ["__syncthreads();\n    if (threadIdx.x != 0) return;", "if (threadIdx.x != 0) return;"]),
        ("attention", ["wait_for_copies();\n        __syncthreads();", "wait_for_copies();"]),
        ("attention", ["        wait_for_copies();\n        __syncthreads();", "        __syncthreads();"]),
        ("attention", ["totals[half] *= shrink;", ""]),
        ("attention", ["column < to[j / 2]", "column <= to[j / 2]"]),
        ("attention", ["(d[i][j] - of->dot[i * 8 + pair + j % 2])", "d[i][j]"]),
        ("attention", ["*slope = 1 - t * t;", "*slope = 1;"]),
        ("attention", ["stage = 1 - stage;", ""]),
        (
            "attention",
            ["matrix % 2 * 8 + row) * STRIDE + matrix / 2 * 8", "matrix / 2 * 8 + row) * STRIDE + matrix % 2 * 8"],
        ),
    ];
    for (name, mistake) in mistakes {
        emulated.mutant(mistake);
        let found = check(&Device::Cpu, &[DType::BF16], |case| case.starts_with(name));
        assert!(!found.is_ok_and(|rows| rows.iter().all(Row::holds)), "{name}: {mistake:?} is not found");
    }
}

/// Decoders of several families, as training on a device runs them.
#[test]
fn gradients_of_decoders_are_pytorch_s() {
    let Some(_emulated) = Emulated::on_this_thread() else { return };
    for family in ["llama_head_dim", "gemma2", "qwen3", "gpt_neox", "phi3_window", "opt", "granite", "cohere"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracles").join(family);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let decoder = Decoder::load(&checkpoint, DType::F32, &Device::Cpu).unwrap();
        let adapter = Adapter::open(&folder.join("adapter.safetensors")).unwrap();
        let (adapter, vars) = adapter.trainable(DType::F32, &Device::Cpu).unwrap();
        let hook = adapter.hook(checkpoint.spec(), &Device::Cpu).unwrap();
        let tensors = candle_core::safetensors::load(folder.join("io.safetensors"), &Device::Cpu).unwrap();
        for case in ["left", "right"].iter().filter(|case| tensors.contains_key(&format!("{case}_loss"))) {
            let of = |name: &str| &tensors[&format!("{case}_{name}")];
            let integers = |name: &str| -> Vec<i64> { of(name).flatten_all().unwrap().to_vec1().unwrap() };
            let (batch, seq) = of("input_ids").dims2().unwrap();
            let attention_mask = integers("attention_mask");
            let positions = attention_mask.chunks(seq).flat_map(|row| {
                row.iter().scan(0, |seen, real| {
                    *seen += real;
                    Some((*seen - 1).max(0))
                })
            });
            let batch = Batch {
                position_ids: positions.collect(),
                input_ids: integers("input_ids"),
                labels: integers("labels"),
                attention_mask,
                segments: None,
                batch,
                seq,
            };
            let learnt = batch.labels.iter().enumerate().filter(|(at, label)| **label != -100 && at % seq != 0);
            let factor = 1.0 / learnt.count() as f64;
            let (models, hook, vars, objective) = (Models::frozen(&decoder), &*hook, &vars, &Sft);
            let of = BatchGradients { models, hook, vars, objective, checkpoint_activations: true };
            let mut gradients = BTreeMap::new();
            batch_gradients(&of, &batch, factor, &mut gradients).unwrap();
            for (name, found) in &gradients {
                let flat = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
                let (found, expected) = (flat(found), flat(&tensors[&format!("{case}_grad.{name}")]));
                let most = |x: Tensor| -> f64 { x.abs().unwrap().max(0).unwrap().to_scalar().unwrap() };
                let error = most((found - &expected).unwrap()) / most(expected);
                assert!(error < 1e-5, "{family} {case} {name}: {error:.1e}");
            }
        }
    }
}

/// Pieces of a layer of which something is trained, against those of the CPU in float64.
#[test]
fn pieces_with_trained_parts_are_those_of_the_cpu() {
    let Some(_emulated) = Emulated::on_this_thread() else { return };
    let norm = Norm { kind: NormKind::Rms, epsilon: 1e-5, weight_offset: 0.0, bias: false };
    // inputs: x, norm, three maps, two low-rank products, a term
    let shapes: [&[usize]; 10] =
        [&[2, 3, 16], &[16], &[24, 16], &[24, 16], &[16, 24], &[2, 16], &[8, 2], &[2, 24], &[16, 2], &[2, 3, 4, 6]];
    let numbers = |shape: &[usize], seed: usize| {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|i| (0.7 + seed as f64 + i as f64 * 1.618_033).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let pieces = |given: &[Tensor], with_products: bool| {
        let map = |at: usize| InnerMap::new(&given[at], None);
        let low = |at: usize| LowRank { a: given[at].clone(), b: given[at + 1].clone(), scale: 0.7 };
        let low = |at: usize| with_products.then(|| low(at));
        let norm = NormWeights { norm, weight: given[1].clone(), bias: None };
        let mlp = GatedMlp { gate: map(2), up: map(3), down: map(4), activation: Activation::Silu };
        let block = MlpBlock { norm: norm.clone(), scale: 0.5 };
        let x = mlp.with([None, None, low(7)]).forward_block(&given[0], &block).unwrap();
        let angles = numbers(&[2, 3, 2], 40).to_dtype(x.dtype()).unwrap();
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let rotation = Some(Rotation { cos, sin, interleaved: false });
        let qkv = QkvProjection { norm, maps: vec![map(2)], rotated_heads: 3, head_dim: 6 };
        let heads = qkv.with(6, low(5)).unwrap().forward(&x, rotation).unwrap();
        let output = OutputProjection { map: map(4), scale: 0.5 }.with(low(7));
        output.forward(&heads, Some(&given[9]), &x).unwrap()
    };
    for (trained, with_products) in
        [(vec![0], false), (vec![0, 9], false), (vec![0, 5, 6, 7, 8, 9], true), (vec![0, 1, 2, 4], true)]
    {
        let run = |dtype: DType| {
            let tensor = |(at, shape): (usize, &&[usize])| numbers(shape, at).to_dtype(dtype).unwrap();
            let mut given: Vec<Tensor> = shapes.iter().enumerate().map(tensor).collect();
            let variables: Vec<Var> = trained.iter().map(|at| Var::from_tensor(&given[*at]).unwrap()).collect();
            trained.iter().zip(&variables).for_each(|(at, variable)| given[*at] = variable.as_tensor().clone());
            let y = pieces(&given, with_products);
            let weights = numbers(y.dims(), 50).to_dtype(dtype).unwrap();
            let store = backward(&(&y * weights).unwrap().sum_all().unwrap()).unwrap();
            let gradients = variables.iter().map(|variable| store.store.get(variable).unwrap().clone());
            let results: Vec<Tensor> = std::iter::once(y.detach()).chain(gradients).collect();
            results.iter().map(|x| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap()).collect::<Vec<_>>()
        };
        for (at, (found, truth)) in run(DType::F32).into_iter().zip(run(DType::F64)).enumerate() {
            let most = |x: Tensor| -> f64 { x.abs().unwrap().max(0).unwrap().to_scalar().unwrap() };
            let error = most((found - &truth).unwrap()) / most(truth);
            assert!(error < 1e-5, "{trained:?}, result {at}: {error:.1e}");
        }
    }
}

/// Sources of every kernel: one for each type, and attention for heads that are used.
fn sources() -> Vec<(Source, DType)> {
    let mut sources = Vec::new();
    for real in [DType::F32, DType::BF16, DType::F16] {
        sources.extend(
            [Source::Norm, Source::Rope, Source::Gate, Source::Loss, Source::Heads].map(|source| (source, real)),
        );
        // both half types are compiled alike
        let attention = tilings(real).filter(|tiling| real != DType::F16 || tiling.width == 128);
        sources.extend(attention.map(|tiling| (Source::Attention(tiling), real)));
    }
    sources
}

/// nvcc from `CUDA_HOME` or the path.
fn nvcc() -> Option<std::path::PathBuf> {
    let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let nvcc = home.filter(|nvcc| nvcc.exists()).unwrap_or_else(|| "nvcc".into());
    Command::new(&nvcc).arg("--version").output().is_ok_and(|found| found.status.success()).then_some(nvcc)
}

#[test]
fn every_kernel_compiles_for_its_devices_and_spills_no_register() {
    let Some(nvcc) = nvcc() else {
        eprintln!("skipped: no nvcc (CUDA_HOME, or in the path)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    sources().par_iter().enumerate().for_each(|(at, (source, real))| {
        let path = folder.path().join(format!("{at}.cu"));
        std::fs::write(&path, source.text(*real).unwrap()).unwrap();
        for architecture in ["sm_80", "sm_90"] {
            let mut command = Command::new(&nvcc);
            command.args([
                "-std=c++17",
                "-cubin",
                "-Werror",
                "all-warnings",
                "-Xptxas",
                "-v",
                "-arch",
                architecture,
                "-o",
            ]);
            let done = command.arg(path.with_extension("cubin")).arg(&path).output().unwrap();
            let log = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "{source:?} {real:?} {architecture}: {log}");
            // heads of 256 fill the registers: a few bytes may not fit
            let limit = if matches!(source, Source::Attention(tiling) if tiling.width == 256) { 16 } else { 0 };
            let spills = log
                .lines()
                .filter_map(|line| line.split(" bytes spill stores").next()?.rsplit(' ').next()?.parse().ok());
            let spills: Vec<usize> = spills.collect();
            assert!(spills.iter().all(|bytes| *bytes <= limit), "{source:?} {real:?} {architecture}: {log}");
            assert_eq!([log.matches("Used ").count(), spills.len()], [source.entries().len(); 2], "{log}");
            if std::env::var_os("PREFOLD_SHOW").is_some() {
                let used = log.lines().filter_map(|line| line.split("Used ").nth(1));
                eprintln!("{source:?} {real:?} {architecture}: {:?}", used.collect::<Vec<_>>());
            }
        }
    });
}

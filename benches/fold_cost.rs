//! What a folded adapter costs: decode steps of the base graph and of the folded graph, run alternately, as ratios.
//!
//! `cargo bench --bench fold_cost [-- MODEL]`, where MODEL is a checkpoint or the name of a fetched one; the demo's model
//! where none is given. Every runtime at hand is measured.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, missing_docs)]

use std::path::Path;
use std::time::Instant;

use prefold::adapter::{Adapter, AdapterConfig};
use prefold::base::Checkpoint;
use prefold::base::fetch::resolve_model;
use prefold::export::{ExportOptions, export};
use prefold::fold::fold_folder;
use prefold::runtime::{GraphDecoder, OrtOptions, OrtSession, Session, TractOptions, TractSession, library};

const PROMPT: usize = 32;
const STEPS: usize = 32;
const ROUNDS: usize = 7;

type Decoder = GraphDecoder<Box<dyn Session>>;

fn main() {
    let argument = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let model = match argument {
        Some(name) => resolve_model(&name, &prefold::files::cache_folder().unwrap()).unwrap_or_else(|e| {
            eprintln!("error: {e}");
            std::process::exit(1);
        }),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/demo/model"),
    };
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| {
        let folder = scratch.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    };
    let checkpoint = Checkpoint::open(&model).unwrap();
    let (base, folded, adapter) = (at("base"), at("folded"), at("adapter"));
    export(&checkpoint, &ExportOptions::default(), &base).unwrap();
    Adapter::zeros(AdapterConfig::prefix_plus(checkpoint.spec(), None)).unwrap().save(&adapter).unwrap();
    fold_folder(&base, &adapter, &folded).unwrap();

    println!("decode of {STEPS} steps after {PROMPT} tokens, median of {ROUNDS} rounds, base and folded alternately");
    for engine in ["tract", "onnxruntime"] {
        let (Some(mut base), Some(mut folded)) = (open(engine, &base), open(engine, &folded)) else {
            println!("{engine}: not here");
            continue;
        };
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..=ROUNDS {
            for (decoder, times) in [&mut base, &mut folded].into_iter().zip(&mut times) {
                let seconds = decode(decoder);
                if round > 0 {
                    times.push(seconds);
                }
            }
        }
        let [base, folded] = times.map(median);
        let rate = |seconds: f64| STEPS as f64 / seconds;
        println!(
            "{engine}: base {:.1} tokens/s, folded {:.1} tokens/s, time ×{:.3}",
            rate(base),
            rate(folded),
            folded / base
        );
    }
}

fn open(engine: &str, folder: &Path) -> Option<Decoder> {
    let graph = folder.join("model.onnx");
    let session: Box<dyn Session> = match engine {
        "tract" => Box::new(TractSession::open(&graph, TractOptions::default()).unwrap()),
        _ => {
            let library = library::find(None, &prefold::files::cache_folder().ok()?).ok()?;
            Box::new(OrtSession::open(&library, &graph, OrtOptions::default()).unwrap())
        }
    };
    Some(GraphDecoder::new(session).unwrap())
}

/// Seconds of the cached steps alone.
fn decode(decoder: &mut Decoder) -> f64 {
    decoder.reset();
    let ids = ndarray::Array2::from_shape_fn((1, PROMPT), |(_, i)| i as i64 + 3);
    decoder.prefill(&ids, &ndarray::Array2::ones((1, PROMPT))).unwrap();
    let started = Instant::now();
    for step in 0..STEPS {
        decoder.step(&[step as i64 + 3]).unwrap();
    }
    started.elapsed().as_secs_f64()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

//! `prefold bench graph`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Instant;

use clap::Args;
use miette::{IntoDiagnostic, Result};
use ndarray::{Array2, ArrayD};
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use super::super::active::slots_of;
use super::super::verify::{Engine, open_given};
use super::super::{Context, existing_graph, style, usage};
use super::median;
use crate::fold::ADAPTER_EXTENSION;
use crate::onnx::Model;
use crate::runtime::{
    self, DType, Dim, Error, Given, GraphDecoder, OrtOptions, Port, RuntimeInfo, Session, Value, WithGiven, library,
};

/// Measure decoder graphs beside each other: prefill and decoding with a cache
///
/// The graphs take turns at the prefill and every four steps, each time another one first, and share their threads, so that what else the
/// machine does meets all of them alike. Ratios are of times to the first graph, the median over the rounds.
///
/// Slots are filled by GRAPH=FILE.onnx_adapter, banks by --input adapter_ids=…; without, slots are off.
#[derive(Args, Debug)]
pub(super) struct BenchGraph {
    /// The graphs: folders that hold model.onnx, or .onnx files; the first is what the others are compared with
    #[arg(required = true, value_name = "GRAPH[=FILE.onnx_adapter]")]
    graphs: Vec<BenchedGraph>,
    /// The runtime
    #[arg(long, value_enum, default_value = "ort")]
    runtime: Engine,
    /// Threads inside one operator of ONNX Runtime [default: one per core]
    #[arg(long)]
    threads: Option<usize>,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 64)]
    prompt_length: usize,
    /// Cached steps after it
    #[arg(long, default_value_t = 32)]
    decode_steps: usize,
    /// Rows of the batch
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Measured rounds after each loading, a prefill and all steps of each graph; one more comes before them
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// How often the graphs are loaded, each time in another order: where its weights come to lie in memory changes the speed
    /// of a graph by some percent
    #[arg(long, default_value_t = 1)]
    loads: usize,
    /// What a further input is fed, in graphs that have it: one number, or as many as it has elements, as
    /// `adapter_ids=0,1,2,3`; may be repeated
    #[arg(long = "input", value_name = "NAME=VALUES")]
    inputs: Vec<ExtraInput>,
    /// Width of a head, for graphs whose cache does not declare it
    #[arg(long)]
    head_dim: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A graph, and the values that its slots are given.
#[derive(Clone, Debug)]
struct BenchedGraph {
    /// As it was named.
    name: PathBuf,
    graph: PathBuf,
    slots: Option<PathBuf>,
}

impl FromStr for BenchedGraph {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let ends = |file: &str| Path::new(file).extension().is_some_and(|ending| ending == ADAPTER_EXTENSION);
        let parts = text.rsplit_once('=').filter(|(_, file)| ends(file) && !Path::new(text).exists());
        let (graph, slots) = parts.map_or((text, None), |(graph, file)| (graph, Some(file.into())));
        Ok(Self { name: text.into(), graph: graph.into(), slots })
    }
}

type Opened = WithGiven<Box<dyn Session>>;

/// An input beside those of every decoder.
#[derive(Clone, Debug)]
struct ExtraInput {
    name: String,
    values: Vec<f64>,
}

impl FromStr for ExtraInput {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (name, values) = text.split_once('=').ok_or("expected NAME=VALUES")?;
        let number = |value: &str| value.trim().parse().map_err(|_| format!("`{value}` is no number"));
        let values = values.split(',').map(number).collect::<std::result::Result<_, _>>()?;
        Ok(Self { name: name.to_owned(), values })
    }
}

impl ExtraInput {
    /// The tensor for a port; sizes that it does not fix are the batch's.
    fn tensor(&self, port: &Port, batch: usize) -> runtime::Result<Value> {
        let size = |dim: &Dim| if let Dim::Fixed(size) = dim { *size } else { batch };
        let shape: Vec<usize> = port.dims.iter().map(size).collect();
        let misfit = |why: &str| Error::Feed { reason: format!("the input {port} {why}, given {:?}", self.values) };
        let elements = shape.iter().try_fold(1usize, |all, size| all.checked_mul(*size));
        let values = match (self.values.as_slice(), elements) {
            (&[value], Some(elements)) if elements <= 1 << 28 => vec![value; elements],
            (values, Some(elements)) if values.len() == elements => values.to_vec(),
            _ => return Err(misfit(&format!("takes one number or those of a tensor {shape:?}"))),
        };
        let array = ArrayD::from_shape_vec(shape, values).map_err(|source| misfit(&source.to_string()))?;
        Ok(match port.dtype {
            DType::F64 => array.into(),
            DType::F32 => array.mapv(|v| v as f32).into(),
            DType::F16 => array.mapv(half::f16::from_f64).into(),
            DType::Bf16 => array.mapv(half::bf16::from_f64).into(),
            DType::I64 => array.mapv(|v| v as i64).into(),
            DType::I32 => array.mapv(|v| v as i32).into(),
            DType::I8 => array.mapv(|v| v as i8).into(),
            DType::U8 => array.mapv(|v| v as u8).into(),
            DType::Bool => array.mapv(|v| v != 0.0).into(),
        })
    }
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    runtime: RuntimeInfo,
    threads: Option<usize>,
    prompt_length: usize,
    decode_steps: usize,
    batch: usize,
    loads: usize,
    graphs: Vec<Measured>,
}

/// One graph's rounds.
#[derive(Debug, Serialize)]
struct Measured {
    graph: PathBuf,
    /// Names of the further inputs that it was fed.
    inputs: Vec<String>,
    /// Seconds of each loading.
    load_seconds: Vec<f64>,
    /// Seconds of each prefill.
    prefill_seconds: Vec<f64>,
    /// Seconds of all cached steps of each round.
    decode_seconds: Vec<f64>,
    median_prefill_ms: f64,
    /// New tokens of all rows in a second.
    decode_tokens_per_second: f64,
    /// Its time over the first graph's, round by round, the median.
    prefill_ratio: f64,
    decode_ratio: f64,
}

impl BenchGraph {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        let numbers = [
            ("--prompt-length", self.prompt_length),
            ("--decode-steps", self.decode_steps),
            ("--batch", self.batch),
            ("--rounds", self.rounds),
            ("--loads", self.loads),
        ];
        let largest = 1 << 20;
        if let Some((option, value)) = numbers.into_iter().find(|(_, value)| !(1..=largest).contains(value)) {
            return Err(usage(format!("{option} is {value}"), format!("give a number from 1 to {largest}")));
        }
        let report = self.measure(context)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report).into_diagnostic()?);
            return Ok(ExitCode::SUCCESS);
        }
        println!("{}", table(&report));
        println!(
            "{} {}, batch {}, {} prompt tokens, {} steps, median of {} rounds{}",
            report.runtime.runtime,
            report.runtime.version,
            self.batch,
            self.prompt_length,
            self.decode_steps,
            self.rounds * self.loads,
            if self.loads > 1 {
                format!(" ({} after each of {} loadings)", self.rounds, self.loads)
            } else {
                String::new()
            }
        );
        Ok(ExitCode::SUCCESS)
    }

    fn measure(&self, context: &Context) -> Result<Report> {
        if self.runtime == Engine::Ort {
            // threads of an idle session would spin in the way of the session whose turn it is
            library::share_threads(&library::find(context.ort_lib(), &context.cache)?, self.threads)?;
        }
        let mut graphs: Vec<Measured> = self.graphs.iter().map(|graph| Measured::new(&graph.name)).collect();
        // the graph that a process loads first decodes slower than the same one loaded after it, so one that does not count is
        // there before all
        let uncounted = self.graphs.first().map(|first| self.open(context, first)).transpose()?;
        for load in 0..self.loads {
            self.load(context, load, &mut graphs)?;
        }
        let first = graphs.first().map(|first| (first.prefill_seconds.clone(), first.decode_seconds.clone()));
        let (prefill, decode) = first.unwrap_or_default();
        graphs.iter_mut().for_each(|graph| graph.summarise(self, &prefill, &decode));
        let runtime = uncounted.as_ref().map(|(session, _)| session.info());
        let runtime = runtime.ok_or_else(|| usage("no graph was given", "name one or more"))?;
        Ok(Report {
            runtime,
            threads: self.threads,
            prompt_length: self.prompt_length,
            decode_steps: self.decode_steps,
            batch: self.batch,
            loads: self.loads,
            graphs,
        })
    }

    /// Loads the graphs, the first of them another one each time, and measures rounds of them.
    fn load(&self, context: &Context, load: usize, graphs: &mut [Measured]) -> Result<()> {
        let mut order: Vec<usize> = (0..graphs.len()).collect();
        order.rotate_left(load % graphs.len());
        let mut decoders = Vec::new();
        for at in order {
            let (Some(graph), Some(measured)) = (self.graphs.get(at), graphs.get_mut(at)) else { continue };
            let started = Instant::now();
            let (session, inputs) = self.open(context, graph)?;
            measured.load_seconds.push(started.elapsed().as_secs_f64());
            measured.inputs = inputs;
            decoders.push(match self.head_dim {
                Some(head_dim) => GraphDecoder::with_head_dim(session, head_dim)?,
                None => GraphDecoder::new(session)?,
            });
        }
        decoders.rotate_right(load % graphs.len());
        let fed: Vec<&String> = graphs.iter().flat_map(|graph| &graph.inputs).collect();
        if let Some(unused) = self.inputs.iter().find(|input| !fed.contains(&&input.name)) {
            return Err(usage(
                format!("no graph has an input `{}`", unused.name),
                "`prefold inspect GRAPH` lists the inputs of a graph",
            ));
        }
        let prompt = self.prompt(&decoders);
        for round in 0..=self.rounds {
            let times = self.round(&mut decoders, &prompt, round)?;
            // the first round of a session is slower
            for (graph, (prefill, decode)) in graphs.iter_mut().zip(times).filter(|_| round > 0) {
                graph.prefill_seconds.push(prefill);
                graph.decode_seconds.push(decode);
            }
        }
        Ok(())
    }

    /// Seconds of a prefill and of the steps after it, for each graph. They take turns every few steps, so that what else the machine
    /// does meets all of them alike; the first step after another graph's is slower, by a percent or two.
    fn round(
        &self,
        decoders: &mut [GraphDecoder<Opened>],
        prompt: &Array2<i64>,
        round: usize,
    ) -> Result<Vec<(f64, f64)>> {
        let mask = Array2::ones(prompt.raw_dim());
        let steps: Vec<usize> = (0..self.decode_steps).collect();
        let mut times = vec![(0.0, 0.0); decoders.len()];
        let mut order: Vec<usize> = (0..decoders.len()).collect();
        order.rotate_left(round % decoders.len());
        for turn in std::iter::once(&[][..]).chain(steps.chunks(STEPS_OF_A_TURN)) {
            for at in &order {
                let (Some(decoder), Some((prefill, decode))) = (decoders.get_mut(*at), times.get_mut(*at)) else {
                    continue;
                };
                if turn.is_empty() {
                    *prefill = timed(|| decoder.prefill(prompt, &mask))?;
                }
                for step in turn {
                    let next = prompt.column(step % self.prompt_length).to_vec();
                    *decode += timed(|| decoder.step(&next))?;
                }
            }
            order.rotate_left(1);
        }
        Ok(times)
    }

    /// A graph that is given what stays the same in every run, and the names of these inputs.
    fn open(&self, context: &Context, graph: &BenchedGraph) -> Result<(Opened, Vec<String>)> {
        let file = existing_graph(&graph.graph)?;
        let slots = match &graph.slots {
            Some(values) => slots_of(&Model::open(&file)?, values)?,
            None => Vec::new(),
        };
        let mut names: Vec<String> = slots.iter().map(|(name, _)| name.clone()).collect();
        let options = OrtOptions { threads: self.threads, ..OrtOptions::default() };
        let session = open_given(context, self.runtime, &file, slots, options)?;
        let mut given = Vec::new();
        for input in &self.inputs {
            if let Some(port) = session.inputs().iter().find(|port| port.name == input.name) {
                names.push(port.name.clone());
                given.push((port.name.clone(), Given::Value(input.tensor(port, self.batch)?)));
            }
        }
        Ok((WithGiven::new(session, given)?, names))
    }

    /// Tokens that every graph has, the same ones every time.
    fn prompt(&self, decoders: &[GraphDecoder<Opened>]) -> Array2<i64> {
        let vocab = decoders.iter().filter_map(|decoder| decoder.ports().vocab_size).min().unwrap_or(256);
        let mut random = rand_pcg::Pcg64Mcg::seed_from_u64(0);
        let last = i64::try_from(vocab).unwrap_or(i64::MAX).max(2);
        Array2::from_shape_fn((self.batch, self.prompt_length), |_| random.random_range(1..last))
    }
}

/// Cached steps of a graph before it is another one's turn.
const STEPS_OF_A_TURN: usize = 4;

/// How many seconds it takes.
fn timed<T>(run: impl FnOnce() -> runtime::Result<T>) -> Result<f64> {
    let started = Instant::now();
    run()?;
    Ok(started.elapsed().as_secs_f64())
}

impl Measured {
    fn new(graph: &Path) -> Self {
        Self {
            graph: graph.to_owned(),
            inputs: Vec::new(),
            load_seconds: Vec::new(),
            prefill_seconds: Vec::new(),
            decode_seconds: Vec::new(),
            median_prefill_ms: f64::NAN,
            decode_tokens_per_second: f64::NAN,
            prefill_ratio: f64::NAN,
            decode_ratio: f64::NAN,
        }
    }

    fn summarise(&mut self, options: &BenchGraph, first_prefill: &[f64], first_decode: &[f64]) {
        let ratio = |own: &[f64], first: &[f64]| median(&own.iter().zip(first).map(|(a, b)| a / b).collect::<Vec<_>>());
        self.median_prefill_ms = median(&self.prefill_seconds) * 1e3;
        self.decode_tokens_per_second = (options.decode_steps * options.batch) as f64 / median(&self.decode_seconds);
        self.prefill_ratio = ratio(&self.prefill_seconds, first_prefill);
        self.decode_ratio = ratio(&self.decode_seconds, first_decode);
    }
}

fn table(report: &Report) -> comfy_table::Table {
    let mut table = style::table(&["graph", "prefill ms", "ratio", "decode tokens/s", "time ratio"]);
    for graph in &report.graphs {
        table.add_row([
            graph.graph.display().to_string(),
            format!("{:.1}", graph.median_prefill_ms),
            format!("{:.3}", graph.prefill_ratio),
            format!("{:.1}", graph.decode_tokens_per_second),
            format!("{:.3}", graph.decode_ratio),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_graph_is_named_with_the_values_of_its_slots() {
        let named = |text: &str| text.parse::<BenchedGraph>().unwrap();
        let both = named("runs/a=b/model.onnx=card.onnx_adapter");
        assert_eq!((both.graph, both.slots), ("runs/a=b/model.onnx".into(), Some("card.onnx_adapter".into())));
        let alone = named("runs/a=b/model.onnx");
        assert_eq!((alone.graph, alone.slots), ("runs/a=b/model.onnx".into(), None));
    }

    #[test]
    fn further_inputs_fill_their_port() {
        let port = |dtype, dims: &[Dim]| Port { name: "adapter_ids".into(), dtype, dims: dims.into() };
        let given = |text: &str| text.parse::<ExtraInput>().unwrap();
        let batch = Dim::Named("batch".into());
        let ids = given("adapter_ids=0,2, 1").tensor(&port(DType::I64, std::slice::from_ref(&batch)), 3).unwrap();
        assert_eq!(ids, Value::I64(ndarray::arr1(&[0, 2, 1]).into_dyn()));
        let zeros = given("adapter_ids=0").tensor(&port(DType::F32, &[batch.clone(), Dim::Fixed(2)]), 2).unwrap();
        assert_eq!(zeros, Value::F32(ArrayD::zeros(vec![2, 2])));
        assert!(given("adapter_ids=0,1").tensor(&port(DType::I64, std::slice::from_ref(&batch)), 3).is_err());
        assert!("adapter_ids".parse::<ExtraInput>().is_err() && "a=b".parse::<ExtraInput>().is_err());
    }
}

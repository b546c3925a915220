//! `prefold inspect`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use miette::{IntoDiagnostic, Result};
use serde_json::{Value, json};

use super::{Context, existing_graph, style};
use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME, peft};
use crate::base::Checkpoint;
use crate::fold::{self, Record, locate};
use crate::onnx::{MODEL_NAME, Model, ValueInfo};

/// Say what a checkpoint, an adapter or a graph is
#[derive(Args, Debug)]
pub(super) struct Inspect {
    /// A checkpoint, the name of a fetched model, an adapter folder, a graph's folder or .onnx file
    path: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Of a graph: what was matched of every attention block, or how far the match got and which node stopped it
    #[arg(long)]
    explain: bool,
}

impl Inspect {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        let facts =
            if self.path.join(CONFIG_NAME).is_file() || self.path.extension().is_some_and(|e| e == "safetensors") {
                adapter(&self.path)?
            } else if self.path.join(MODEL_NAME).is_file() || self.path.extension().is_some_and(|e| e == "onnx") {
                graph(&existing_graph(&self.path)?, self.explain)?
            } else {
                checkpoint(&context.checkpoint(&self.path.to_string_lossy())?)?
            };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&facts).into_diagnostic()?);
        } else {
            print_facts(&facts, 0);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn checkpoint(checkpoint: &Checkpoint) -> Result<Value> {
    let spec = checkpoint.spec();
    let files: Vec<Value> = checkpoint
        .weight_files()
        .iter()
        .map(|path| {
            let bytes = std::fs::metadata(path).map(|m| m.len()).unwrap_or_default();
            json!(format!("{} ({})", path.display(), style::bytes(bytes)))
        })
        .collect();
    let tokenizer = match checkpoint.tokenizer() {
        Ok(t) => {
            json!({ "vocabulary": t.vocab_size(), "chat_template": t.chat_template().is_some(), "eos": t.eos_ids() })
        }
        Err(error) => json!(format!("none: {error}")),
    };
    let attention = &spec.attention;
    Ok(json!({
        "kind": "checkpoint",
        "family": spec.family,
        "parameters": spec.num_parameters(),
        "dtype": checkpoint.dtype()?.as_str(),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "query_heads": attention.num_heads,
        "kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": spec.mlp.intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_positions": spec.max_positions,
        "tied_embeddings": spec.head.tied,
        "tokenizer": tokenizer,
        "files": files,
    }))
}

fn adapter(path: &Path) -> Result<Value> {
    if peft::is_peft(path)? {
        return peft_adapter(path);
    }
    let adapter = Adapter::open(path)?;
    let norm =
        |tensor: &candle_core::Tensor| tensor.sqr()?.sum_all()?.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>();
    let tensors = adapter.tensors().iter().map(|(name, tensor)| {
        let norm = norm(tensor).into_diagnostic()?.sqrt();
        Ok(json!(format!("{name} {:?} {}, norm {norm:.4}", tensor.dims(), tensor.dtype().as_str())))
    });
    Ok(json!({
        "kind": "adapter",
        "method": adapter.config().method.name(),
        "config": adapter.config(),
        "parameters": adapter.num_parameters(),
        "tensors": tensors.collect::<Result<Vec<_>>>()?,
    }))
}

/// A folder of PEFT's, whose modules only its base model explains.
fn peft_adapter(path: &Path) -> Result<Value> {
    let config: Value = crate::files::read_json(&path.join(CONFIG_NAME), "a PEFT configuration")?;
    let tensors =
        candle_core::safetensors::load(path.join(WEIGHTS_NAME), &candle_core::Device::Cpu).into_diagnostic()?;
    let tensors: std::collections::BTreeMap<_, _> = tensors.into_iter().collect();
    let config = config.as_object().cloned().unwrap_or_default();
    Ok(json!({
        "kind": "PEFT adapter",
        "method": config.get("peft_type"),
        "config": config.into_iter().filter(|(_, value)| !value.is_null()).collect::<serde_json::Map<_, _>>(),
        "parameters": tensors.values().map(candle_core::Tensor::elem_count).sum::<usize>(),
        "tensors": tensors.iter().map(|(n, t)| format!("{n} {:?} {}", t.dims(), t.dtype().as_str())).collect::<Vec<_>>(),
    }))
}

fn graph(path: &Path, explain: bool) -> Result<Value> {
    let model = Model::open(path)?;
    let graph = model.graph();
    let mut operators = std::collections::BTreeMap::<String, usize>::new();
    for node in graph.nodes() {
        let domain = if node.domain().is_empty() { String::new() } else { format!("{}.", node.domain()) };
        *operators.entry(format!("{domain}{}", node.op_type())).or_default() += 1;
    }
    let values = |values: &[ValueInfo]| values.iter().map(value).collect::<Vec<_>>();
    let sites = match fold::sites(&model) {
        Ok(sites) => json!(sites),
        Err(error) => json!(format!("none: {error}")),
    };
    // the way back is for programs
    let metadata = model.metadata_props().iter().filter(|(key, _)| !key.starts_with(fold::RECORDS));
    let opsets: Vec<String> = model
        .opsets()
        .iter()
        .map(|o| format!("{} {}", if o.domain.is_empty() { "ai.onnx" } else { &o.domain }, o.version))
        .collect();
    let bytes: u64 = graph.initializers().iter().filter_map(|t| t.byte_len()).sum();
    let mut facts = json!({
        "kind": "graph",
        "producer": model.producer().0,
        "ir_version": model.ir_version(),
        "opsets": opsets,
        "metadata": metadata.map(|(k, v)| format!("{k} = {v}")).collect::<Vec<_>>(),
        "nodes": graph.nodes().len(),
        "initializers": graph.initializers().len(),
        "weights": style::bytes(bytes),
        "inputs": values(graph.inputs()),
        "outputs": values(graph.outputs()),
        "operators": operators,
        "sites": sites,
        "exactness": locate::exactness(&model),
    });
    let Value::Object(entries) = &mut facts else { return Ok(facts) };
    let folds = Record::all(&model)?;
    if !folds.is_empty() {
        entries.insert("folds".into(), folds.iter().map(fold_facts).collect());
        entries.insert("slots".into(), json!(fold::slots(&model)));
    }
    if explain {
        let base = fold::base(&model)?;
        entries.insert("attention".into(), json!(locate::explain(base.as_ref().unwrap_or(&model))));
    }
    Ok(facts)
}

/// One fold of a graph, the first one first.
fn fold_facts(fold: &Record) -> Value {
    json!({
        "fold": fold.number,
        "emission": fold.emission,
        "method": fold.config.method.name(),
        "adapters": fold.adapters,
        "layers": fold.config.adapted_layers(),
    })
}

/// `name: type[dims]`.
fn value(value: &ValueInfo) -> String {
    let data_type = value.elem_type().map_or("?".to_owned(), |t| t.to_string());
    let dims = value.shape().unwrap_or_default().iter().map(|d| d.to_string()).collect::<Vec<_>>().join(", ");
    format!("{}: {data_type}[{dims}]", value.name())
}

/// Keys and values, indented; a list of objects as one line each.
fn print_facts(facts: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    let Value::Object(entries) = facts else { return };
    for (key, value) in entries {
        match value {
            Value::Object(_) => {
                println!("{indent}{key}:");
                print_facts(value, depth + 1);
            }
            Value::Array(items) => {
                println!("{indent}{key}:");
                for item in items {
                    println!("{indent}  {}", line(item));
                }
            }
            _ => println!("{indent}{key}: {}", line(value)),
        }
    }
}

fn line(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Object(entries) => entries
            .iter()
            .filter(|(_, v)| !v.is_null())
            .map(|(k, v)| format!("{k} {}", line(v)))
            .collect::<Vec<_>>()
            .join(", "),
        Value::Array(items) => items.iter().map(line).collect::<Vec<_>>().join(" → "),
        other => other.to_string(),
    }
}

//! `prefold adapter`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use miette::Result;

use super::{Context, existing_graph, keep_apart, usage};
use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME, peft};
use crate::files::{Manifest, StagedFolder};
use crate::fold::{ADAPTER_EXTENSION, AdapterFile, check_adapter_file, name_of, open_adapter, slot_values};
use crate::onnx::Model;

/// Work on adapters
#[derive(Args, Debug)]
pub(super) struct Adapt {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Convert(Convert),
    Check(Check),
    Merge(Merge),
}

/// Say whether an .onnx_adapter file fits a graph, before a runtime does
///
/// Names, types and shapes of its values are compared with the graph's inputs. Exit code 0: it fits.
#[derive(Args, Debug)]
struct Check {
    /// The .onnx_adapter file
    file: PathBuf,
    /// The graph: its folder or its .onnx file
    #[arg(long)]
    graph: PathBuf,
}

/// Write the base model with the adapter in its weights
///
/// Of lora (rsLoRA and DoRA too) and full. The Hugging Face folder is written again: the same names, shards and data types,
/// configuration and tokenizer copied.
#[derive(Args, Debug)]
struct Merge {
    /// The adapter: a folder of prefold's or PEFT's
    #[arg(long)]
    adapter: PathBuf,
    /// Its base model: a Hugging Face folder
    #[arg(long)]
    model: String,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Replace the output folder if it exists and prefold wrote it
    #[arg(long)]
    overwrite: bool,
}

/// Write an adapter in another tool's layout
///
/// PEFT folders hold LoRA (with rsLoRA and DoRA) and prefix tuning. prefold reads them wherever it takes an adapter together with
/// its base model. An .onnx_adapter file holds values for the slots of a graph that `prefold fold --emission slot` made, for ONNX
/// Runtime's adapter API and onnxruntime-genai's Adapters.
#[derive(Args, Debug)]
struct Convert {
    /// The adapter: a folder of prefold's or PEFT's
    #[arg(long)]
    adapter: PathBuf,
    /// Its base model: Hugging Face folder, .gguf file, or the name of a fetched model
    #[arg(long, required_unless_present = "graph")]
    model: Option<String>,
    /// The graph whose slots the values are for, with --to onnx_adapter: its folder or its .onnx file
    #[arg(long, conflicts_with = "model")]
    graph: Option<PathBuf>,
    /// The layout to write
    #[arg(long, value_enum)]
    to: Layout,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Replace the output folder if it exists and prefold wrote it
    #[arg(long)]
    overwrite: bool,
}

/// A layout of adapter folders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// prefold's own.
    Prefold,
    /// That of the Python package peft.
    Peft,
    /// Values for the slots of a graph.
    #[value(name = "onnx_adapter")]
    OnnxAdapter,
}

impl Adapt {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        match self.command {
            Command::Convert(command) => command.run(context),
            Command::Check(command) => command.run(),
            Command::Merge(command) => command.run(context),
        }
    }
}

impl Check {
    fn run(self) -> Result<ExitCode> {
        let file = AdapterFile::open(&self.file)?;
        check_adapter_file(&file, &Model::open(&existing_graph(&self.graph)?)?)?;
        let bytes: usize = file.parameters.iter().map(|parameter| parameter.bytes.len()).sum();
        println!("{} values of {bytes} bytes fit {}", file.parameters.len(), self.graph.display());
        Ok(ExitCode::SUCCESS)
    }
}

impl Convert {
    fn run(self, context: &Context) -> Result<ExitCode> {
        match (self.to, &self.model, &self.graph) {
            (Layout::OnnxAdapter, _, Some(graph)) => self.for_graph(graph),
            (Layout::Prefold | Layout::Peft, Some(model), _) => self.for_model(context, model),
            (Layout::OnnxAdapter, ..) => {
                Err(usage("which graph's slots the values are for is not said", "give --graph"))
            }
            _ => Err(usage("the adapter's base model is not said", "give --model")),
        }
    }

    fn for_graph(&self, graph: &Path) -> Result<ExitCode> {
        keep_apart(&self.out, &[&self.adapter, graph])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let graph = existing_graph(graph)?;
        let adapter = open_adapter(&graph, &self.adapter)?;
        let values = slot_values(&Model::open(&graph)?, graph.parent().unwrap_or(Path::new(".")), &adapter)?;
        let name = format!("{}.{ADAPTER_EXTENSION}", name_of(&self.adapter));
        values.save(&staged.path().join(&name))?;
        let manifest = Manifest::new("adapter convert", serde_json::json!({ "to": "onnx_adapter" }));
        let manifest = with_adapter(manifest, &self.adapter)?.input("graph", &graph)?;
        manifest.output("adapter", &staged.path().join(&name))?.write(staged.path())?;
        println!("{}", staged.commit()?.join(name).display());
        Ok(ExitCode::SUCCESS)
    }

    fn for_model(&self, context: &Context, model: &str) -> Result<ExitCode> {
        keep_apart(&self.out, &[&self.adapter, model.as_ref()])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let checkpoint = context.checkpoint(model)?;
        let adapter = Adapter::open_for(&self.adapter, checkpoint.spec())?;
        let name = if self.to == Layout::Peft {
            peft::write(&adapter, checkpoint.spec(), staged.path())?;
            "peft"
        } else {
            adapter.save(staged.path())?;
            "prefold"
        };
        let manifest =
            with_adapter(Manifest::new("adapter convert", serde_json::json!({ "to": name })), &self.adapter)?;
        let manifest = manifest.output("adapter_config", &staged.path().join(CONFIG_NAME))?;
        manifest.output("adapter", &staged.path().join(WEIGHTS_NAME))?.write(staged.path())?;
        println!("{}", staged.commit()?.display());
        Ok(ExitCode::SUCCESS)
    }
}

impl Merge {
    fn run(self, context: &Context) -> Result<ExitCode> {
        keep_apart(&self.out, &[&self.adapter, self.model.as_ref()])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let checkpoint = context.checkpoint(&self.model)?;
        let adapter = Adapter::open_for(&self.adapter, checkpoint.spec())?;
        adapter.check_mergeable()?;
        checkpoint.write_with(staged.path(), &|role, weight| adapter.merged_weight(role, weight))?;
        let mut manifest = with_adapter(Manifest::new("adapter merge", serde_json::json!({})), &self.adapter)?;
        for file in checkpoint.weight_files() {
            manifest = manifest.input("base", &file)?;
            manifest = manifest.output("weights", &staged.path().join(file.file_name().unwrap_or_default()))?;
        }
        manifest.write(staged.path())?;
        println!("{}", staged.commit()?.display());
        Ok(ExitCode::SUCCESS)
    }
}

fn with_adapter(manifest: Manifest, adapter: &Path) -> Result<Manifest> {
    if !adapter.is_dir() {
        return Ok(manifest.input("adapter", adapter)?);
    }
    let manifest = manifest.input("adapter_config", &adapter.join(CONFIG_NAME))?;
    Ok(manifest.input("adapter", &adapter.join(WEIGHTS_NAME))?)
}

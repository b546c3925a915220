//! `prefold fold`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use miette::Result;

use super::site_proof::ProofArgs;
use super::{Context, existing_graph, keep_apart, named_adapter, usage};
use crate::files::StagedFolder;
use crate::fold::{ADAPTER_EXTENSION, Carry, Emission, FoldOptions, LoraForm, Over, fold_adapters};
use crate::onnx::MODEL_NAME;

/// The exit code of a fold whose sites no runtime could prove.
const NOT_PROVED: u8 = 2;

/// Put an adapter into an ONNX graph
///
/// baked: the adapter's tensors are constants of the graph. slot: they are inputs that default to the base model, and each
/// --adapter becomes an .onnx_adapter file for ONNX Runtime's adapter API. bank: all adapters are in the graph, and its input
/// adapter_ids, one number for each row of the batch, picks one by its place from 1; 0 is the base model. Adapters of one graph
/// have the same configuration up to their rank.
///
/// A graph that carries an adapter already is refused, unless --stack or --replace says what is meant. `prefold unfold` gives
/// the graph before a fold back, byte for byte.
///
/// The graph is run to prove the sites (--proof). Exit code 0: folded; 2: folded, but no runtime at hand could run the graph, so
/// that its sites are not proved; 1: not folded.
#[derive(Args, Debug)]
pub(super) struct Fold {
    /// The graph: its folder or its .onnx file
    #[arg(long)]
    graph: PathBuf,
    /// The adapter: its folder, or NAME=FOLDER; may be repeated for slot and bank
    #[arg(long, required = true)]
    adapter: Vec<String>,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// How the adapter stands in the graph: baked, slot or bank
    #[arg(long, default_value_t)]
    emission: Emission,
    /// Add to the adapter that the graph carries: at each site the terms of both are summed
    #[arg(long, conflicts_with = "replace")]
    stack: bool,
    /// Take the last adapter that was folded off first
    #[arg(long)]
    replace: bool,
    /// How LoRA stands in the graph: side, beside its products, whatever their weights are kept in; or merge, in new float
    /// weights that they read instead, as fast as the base graph
    #[arg(long, value_enum, default_value_t = Lora::Side)]
    lora: Lora,
    /// Hard-link the graph's external data instead of copying it: at once and without space. The `onnx` package refuses
    /// such files, runtimes do not
    #[arg(long)]
    link: bool,
    /// Replace the output folder if it exists and prefold wrote it
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    proof: ProofArgs,
}

/// How LoRA stands in a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Lora {
    Side,
    Merge,
}

impl Fold {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        let adapters: Vec<(String, PathBuf)> = self.adapter.iter().map(|text| named_adapter(text)).collect();
        let inputs: Vec<&Path> =
            std::iter::once(&self.graph).chain(adapters.iter().map(|(_, path)| path)).map(PathBuf::as_path).collect();
        keep_apart(&self.out, &inputs)?;
        if self.emission == Emission::Baked && adapters.len() > 1 {
            return Err(usage("a graph with baked tensors holds one adapter", "fold with --emission slot or bank"));
        }
        let over = match (self.stack, self.replace) {
            (true, _) => Over::Stack,
            (_, true) => Over::Replace,
            _ => Over::Refuse,
        };
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let carry = if self.link { Carry::Link } else { Carry::Copy };
        let lora = match self.lora {
            Lora::Side => LoraForm::Side,
            Lora::Merge => LoraForm::Merge,
        };
        let options = FoldOptions { emission: self.emission, over, carry, lora };
        let folded = fold_adapters(&existing_graph(&self.graph)?, &adapters, options, staged.path())?;
        let first = adapters.first().map(|(_, adapter)| adapter);
        let proof = first.map(|adapter| self.proof.run(context, &self.graph, adapter, staged.path())).transpose()?;
        let out = staged.commit()?;
        let what = match self.emission {
            Emission::Baked => String::new(),
            Emission::Slot => format!(", {} slots", folded.slots.len()),
            Emission::Bank => format!(", adapter_ids 0 is the base, {}", rows(&folded.adapters)),
        };
        println!("{} ({} sites{what})", out.join(MODEL_NAME).display(), folded.sites.len());
        for name in folded.adapters.iter().take(folded.slot_values.len()) {
            println!("{}", out.join(format!("{name}.{ADAPTER_EXTENSION}")).display());
        }
        if !folded.exactness.holds_left_padded() {
            println!("exact for {}", folded.exactness.exact_for);
        }
        if let Some(why) = proof.as_ref().and_then(|proof| proof.missing()) {
            println!("sites not proved: {why}");
        }
        Ok(if proof.is_some_and(|proof| proof.failed()) { ExitCode::from(NOT_PROVED) } else { ExitCode::SUCCESS })
    }
}

/// The rows of a bank in words.
pub(super) fn rows(names: &[String]) -> String {
    let rows = names.iter().enumerate().map(|(row, name)| format!("{} {name}", row + 1));
    rows.collect::<Vec<_>>().join(", ")
}

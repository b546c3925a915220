//! Which adapter of a graph is active in a run.

use std::path::{Path, PathBuf};

use clap::Args;
use miette::Result;

use super::usage;
use crate::fold::{ADAPTER_IDS, AdapterFile, bank_of, check_adapter_file};
use crate::onnx::Model;
use crate::runtime::Given;

/// Which adapter of a graph is active.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Active {
    /// With --graph that has a bank: the adapter's name, or its number in adapter_ids [default: 0, the base model]
    #[arg(long, value_name = "NAME|NUMBER", requires = "graph")]
    adapter_id: Option<String>,
    /// With --graph that has slots: the .onnx_adapter file of their values [default: none, the base model]
    #[arg(long, value_name = "FILE", requires = "graph")]
    onnx_adapter: Option<PathBuf>,
}

impl Active {
    /// What the inputs that a fold added are given.
    pub(super) fn given(&self, graph: &Path) -> Result<Vec<(String, Given)>> {
        let model = Model::open(graph)?;
        let mut given = Vec::new();
        if model.graph().inputs().iter().any(|input| input.name() == ADAPTER_IDS) || self.adapter_id.is_some() {
            let bank = bank_of(&model)?;
            given.push((
                bank.input_name(ADAPTER_IDS),
                Given::EveryRow(row(&bank.adapters, self.adapter_id.as_deref())?),
            ));
        }
        if let Some(path) = &self.onnx_adapter {
            given.extend(slots_of(&model, path)?);
        }
        Ok(given)
    }
}

/// What an `.onnx_adapter` file gives the slots of a graph, which it must fit.
pub(super) fn slots_of(model: &Model, path: &Path) -> Result<Vec<(String, Given)>> {
    let file = AdapterFile::open(path)?;
    check_adapter_file(&file, model)?;
    let given = file.parameters.into_iter().map(|value| {
        let tensor = Given::from_le_bytes(value.data_type.code(), &value.dims, &value.bytes)?;
        Ok((value.name, tensor))
    });
    given.collect()
}

/// The number of an adapter in a bank.
fn row(names: &[String], asked: Option<&str>) -> Result<i64> {
    let Some(asked) = asked else { return Ok(0) };
    let by_name = names.iter().position(|name| name == asked).map(|row| row + 1);
    let by_number = || asked.parse::<usize>().ok().filter(|row| *row <= names.len());
    match by_name.or_else(by_number) {
        Some(row) => Ok(row as i64),
        None => {
            let rows = super::fold::rows(names);
            Err(usage(format!("the bank has no adapter `{asked}`"), format!("it has 0 (base), {rows}")))
        }
    }
}

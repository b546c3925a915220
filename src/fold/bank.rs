//! Adapters into and out of a bank. Only the tensors of the bank and what the graph says of it change: the base graph's bytes and
//! data stay as they are.

use std::path::Path;

use super::emit::{self, Parameter, Place, bank_name};
use super::{
    Carry, Emission, Error, NamedAdapter, Record, Result, carry, folder_of, graph_file, record, scope_names, stack,
};
use crate::files::Manifest;
use crate::onnx::{MODEL_NAME, Model, Patch, TensorInfo};

/// A change of a bank.
#[derive(Clone, Debug)]
pub enum BankEdit {
    /// Adds adapters as new last rows.
    Add(Vec<NamedAdapter>),
    /// Drops the adapters of these names; those behind move up.
    Drop(Vec<String>),
}

/// The fold that made the bank of a graph. Its adapters are the rows from 1.
///
/// # Errors
/// When the graph has no bank.
pub fn bank_of(model: &Model) -> Result<Record> {
    let records = Record::all(model)?;
    match records.last() {
        Some(last) if last.emission == Emission::Bank => Ok(last.clone()),
        Some(_) if records.iter().any(|fold| fold.emission == Emission::Bank) => Err(Error::NoBank {
            why: "another adapter was folded over its bank",
            help: "take that off with `prefold unfold`",
        }),
        _ => Err(Error::NoBank {
            why: "the graph carries none",
            help: "make one: prefold fold --emission bank --adapter a=… --adapter b=…",
        }),
    }
}

/// Changes the bank of a graph and writes `model.onnx`, its data and the manifest into a folder that exists. Returns the
/// names of the rows from 1.
///
/// # Errors
/// When the graph has no bank, an adapter does not fit it, a name is taken or unknown, or a file cannot be written.
pub fn edit_bank(graph: &Path, edit: &BankEdit, folder: &Path) -> Result<Vec<String>> {
    let graph = graph_file(graph);
    let source = folder_of(&graph);
    let (model, files) = carry::open(&graph, source)?;
    let mut fold = bank_of(&model)?;
    let (before, _) = record::last(&model)?;
    let mut rows = rows(&model, source, &fold)?;
    match edit {
        BankEdit::Add(adapters) => {
            let names = fold.adapters.iter().cloned().chain(adapters.iter().map(|adapter| adapter.name.clone()));
            super::check_names(&names.collect::<Vec<_>>())?;
            let sites = stack::sites(&before)?;
            for adapter in adapters {
                super::check_same(("the bank", &fold.config), (&adapter.name, adapter.adapter.config()))?;
                let sites = super::adapted(&sites, &adapter.adapter)?;
                let place = Place { model: &before, source, sites: &sites, merge: None };
                let (_, mut row) = emit::write(place, &adapter.adapter, Emission::Bank)?;
                scope_names(&fold, &mut row);
                rows.push(row);
                fold.adapters.push(adapter.name.clone());
            }
        }
        BankEdit::Drop(names) => {
            for name in names {
                let Some(row) = fold.adapters.iter().position(|found| found == name) else {
                    return Err(Error::NoRow { name: name.clone(), rows: fold.adapters.clone() });
                };
                fold.adapters.remove(row);
                rows.remove(row);
            }
            if rows.is_empty() {
                return Err(Error::NoBank {
                    why: "no adapter would be left",
                    help: "`prefold unfold` gives the base graph",
                });
            }
        }
    }
    let mut patch = Patch::new("change the bank");
    emit::restack(&mut patch, &model, &rows, folder)?;
    patch.set_metadata(record::MARK, &fold.adapters.join(", "));
    let names = fold.adapters.clone();
    let edited = fold.seal(&before, &patch.apply(&model)?)?;
    let target = folder.join(MODEL_NAME);
    edited.save(&target)?;
    let data = carry::carry(&edited, &files, source, folder, Carry::Copy)?;
    let mut manifest = Manifest::new("bank", serde_json::json!({ "rows": names }));
    manifest = manifest.input("graph", &graph)?.output("graph", &target)?;
    manifest.facts = serde_json::json!({ "adapters": names, "external_data": data });
    manifest.write(folder)?;
    Ok(names)
}

/// The values of every adapter of a bank.
fn rows(model: &Model, source: &Path, fold: &Record) -> Result<Vec<Vec<Parameter>>> {
    let prefix = fold.scoped("prefold.").unwrap_or_else(|| "prefold.".into());
    let is_own = |tensor: &&TensorInfo| {
        let own = tensor.name().strip_prefix(&prefix).and_then(|name| name.strip_suffix(&bank_name("")));
        own.is_some_and(|name| fold.number > 1 || !name.starts_with(|c: char| c.is_ascii_digit()))
    };
    let mut rows = vec![Vec::new(); fold.adapters.len()];
    for tensor in model.graph().initializers().iter().filter(is_own) {
        let damaged = || Error::Unfold { why: format!("`{}` does not hold a row for each adapter", tensor.name()) };
        let data = tensor.data_in(source)?;
        let off = data.to_f32s()?.first().copied().map_or(0.0, f64::from);
        let (first, dims) = tensor.dims().split_first().ok_or_else(damaged)?;
        if usize::try_from(*first).ok() != Some(rows.len() + 1) {
            return Err(damaged());
        }
        let width = data.bytes().len() / (rows.len() + 1);
        for (row, bytes) in rows.iter_mut().zip(data.bytes().chunks(width.max(1)).skip(1)) {
            let name = tensor.name().strip_suffix(&bank_name("")).unwrap_or_default().to_owned();
            let (data_type, dims) = (tensor.data_type(), dims.to_vec());
            row.push(Parameter { name, data_type, dims, bytes: bytes.to_vec(), off });
        }
    }
    Ok(rows)
}

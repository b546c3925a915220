//! The slots of a graph: inputs whose default is the base model, and the values that an adapter gives them.

use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

use super::emit::{self, Parameter, Place, enlarged};
use super::onnx_adapter::{AdapterFile, AdapterParameter};
use super::{Emission, Error, Record, Result, record, scope_names, stack};
use crate::adapter::Adapter;
use crate::onnx::{DataType, Dim, Index, Model};

/// A slot of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Slot {
    /// The input's name.
    pub name: String,
    /// Its type, as ONNX names it.
    pub dtype: String,
    /// Its shape.
    pub dims: Vec<i64>,
}

/// The inputs of a graph that have a default, in the graph's order: what an `.onnx_adapter` file may give values to.
pub fn slots(model: &Model) -> Vec<Slot> {
    let index = Index::new(model.graph());
    let inputs = model.graph().inputs().iter();
    let with_default = inputs.filter_map(|input| index.initializer(input.name()));
    with_default
        .map(|default| Slot {
            name: default.name().to_owned(),
            dtype: default.data_type().to_string(),
            dims: default.dims().to_vec(),
        })
        .collect()
}

/// Whether the values of a file go into a graph: every name is one of its inputs, with type and shape of it, and of the slots
/// of a fold either all are given or none.
///
/// # Errors
/// Names the first parameter or slot that does not fit.
pub fn check_adapter_file(file: &AdapterFile, model: &Model) -> Result<()> {
    let index = Index::new(model.graph());
    let misfit = |why: String| Error::Slots { why };
    for parameter in &file.parameters {
        let name = &parameter.name;
        let Some(input) = index.input(name) else {
            return Err(misfit(format!("it has no input `{name}`, which the file gives a value to")));
        };
        if index.initializer(name).is_none() {
            return Err(misfit(format!("its input `{name}` has no default, so that it is not a slot")));
        }
        let declared = input.elem_type().unwrap_or(DataType::Undefined);
        if declared != parameter.data_type {
            return Err(misfit(format!("its slot `{name}` is {declared}, the file's value {}", parameter.data_type)));
        }
        let fits = |shape: &[Dim]| {
            let same = |(dim, size): (&Dim, &i64)| !matches!(dim, Dim::Value(value) if value != size);
            shape.len() == parameter.dims.len() && shape.iter().zip(&parameter.dims).all(same)
        };
        if let Some(shape) = input.shape().filter(|shape| !fits(shape)) {
            let shape: Vec<String> = shape.iter().map(Dim::to_string).collect();
            let (declared, given) = (shape.join(", "), &parameter.dims);
            return Err(misfit(format!("its slot `{name}` is [{declared}], the file's value {given:?}")));
        }
    }
    let given = |name: &str| file.parameters.iter().any(|parameter| parameter.name == name);
    let touched: Vec<usize> = file.parameters.iter().map(|parameter| fold_of(&parameter.name)).collect();
    let missing = slots(model).into_iter().find(|slot| touched.contains(&fold_of(&slot.name)) && !given(&slot.name));
    match missing {
        Some(slot) => Err(misfit(format!("its slot `{}` gets no value, the others do", slot.name))),
        None => Ok(()),
    }
}

/// The fold that a tensor's name is of.
fn fold_of(name: &str) -> usize {
    let number = name.strip_prefix("prefold.").and_then(|rest| rest.split('.').next());
    number.and_then(|number| number.parse().ok()).unwrap_or(1)
}

/// The values that an adapter gives to the slots of a graph whose file is in `source`.
///
/// # Errors
/// When the graph has no slots, the adapter is of another kind than they were made for, or does not fit in.
pub fn slot_values(model: &Model, source: &Path, adapter: &Adapter) -> Result<AdapterFile> {
    let Some(slot) = Record::all(model)?.into_iter().rfind(|fold| fold.emission == Emission::Slot) else {
        return Err(Error::Slots { why: "it has no slots that prefold made".into() });
    };
    super::check_same(("the graph", &slot.config), ("the adapter", adapter.config()))?;
    let mut before = record::last(model)?;
    while before.1.number > slot.number {
        before = record::last(&before.0)?;
    }
    let sites = super::adapted(&stack::sites(&before.0)?, adapter)?;
    let place = Place { model: &before.0, source, sites: &sites, merge: None };
    let (_, mut parameters) = emit::write(place, adapter, Emission::Slot)?;
    scope_names(&slot, &mut parameters);
    let index = Index::new(model.graph());
    for parameter in &mut parameters {
        let wider = index.initializer(&parameter.name).map(|default| default.dims());
        let wider = wider.filter(|dims| {
            dims.len() == parameter.dims.len() && dims.iter().zip(&parameter.dims).all(|(slot, own)| slot >= own)
        });
        if let Some(dims) = wider {
            *parameter = enlarged(parameter, dims);
        }
    }
    let file = file_of(parameters);
    check_adapter_file(&file, model)?;
    Ok(file)
}

/// Parameters as a file holds them.
pub(super) fn file_of(parameters: Vec<Parameter>) -> AdapterFile {
    let parameters = parameters.into_iter().map(|parameter| AdapterParameter {
        name: parameter.name,
        data_type: parameter.data_type,
        dims: parameter.dims,
        bytes: parameter.bytes,
    });
    AdapterFile { adapter_version: 1, model_version: 1, parameters: parameters.collect() }
}

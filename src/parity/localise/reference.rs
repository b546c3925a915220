//! What candle computes at every place of a case.

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_core::{DType, Result as CandleResult, Tensor};
use ndarray::{Array2, Array3, Axis, concatenate};

use super::place::{At, Place};
use super::scores::add_scores;
use crate::base::{Input, KvCache, Linear, LinearMap, Site, SiteHook, Wiring};
use crate::parity::run::Script;
use crate::parity::{Error, Model, Result};

/// The tensors of a call, `[batch, columns, width]`: columns are those of the call, for keys and values all so far.
pub(super) type Trace = BTreeMap<At, Array3<f64>>;

/// Runs a script, each row by its model, and keeps what is at every place, call by call.
///
/// # Errors
/// When candle fails.
pub(super) fn trace(models: &[Model<'_>], script: &Script) -> Result<Vec<Trace>> {
    let mut calls: Vec<Trace> = Vec::new();
    for (number, model) in models.iter().enumerate() {
        let rows = script.models().iter().enumerate().filter(|(_, of_row)| **of_row == number);
        let rows: Vec<usize> = rows.map(|(row, _)| row).collect();
        if rows.len() == script.models().len() {
            return trace_rows(*model, script, &rows);
        }
        if rows.is_empty() {
            continue;
        }
        let traces = trace_rows(*model, script, &rows)?;
        calls.resize(traces.len().max(calls.len()), Trace::new());
        for (call, trace) in calls.iter_mut().zip(traces) {
            for (at, part) in trace {
                let (_, columns, width) = part.dim();
                // a row whose model has no term has a term of zeros
                let all = call.entry(at).or_insert_with(|| Array3::zeros((script.models().len(), columns, width)));
                for (row, part) in rows.iter().zip(part.outer_iter()) {
                    all.index_axis_mut(Axis(0), *row).assign(&part);
                }
            }
        }
    }
    Ok(calls)
}

fn trace_rows(model: Model<'_>, script: &Script, rows: &[usize]) -> Result<Vec<Trace>> {
    let layers = model.decoder.spec().num_layers;
    let mut cache = KvCache::new(layers);
    let mut seen: Option<Array2<i64>> = None;
    let mut calls: Vec<Trace> = Vec::new();
    for (ids, mask) in script.calls().0 {
        let [ids, mask] = [ids, mask].map(|array| array.select(Axis(0), rows));
        let all = match seen.take() {
            None => mask,
            Some(before) => concatenate![Axis(1), before, mask],
        };
        let flat = |array: &Array2<i64>| array.iter().copied().collect::<Vec<_>>();
        let input = Input::new(ids.nrows(), &flat(&ids), &flat(&all), None)?;
        seen = Some(all);
        let keeper = Keeper { model, kept: RefCell::new(BTreeMap::new()) };
        let hidden = model.decoder.hidden_states(&input, Some(&mut cache), &keeper)?;
        let logits = model.decoder.logits(&hidden)?;
        keeper.keep(At::new(layers, Place::FinalNorm), &hidden).map_err(failed)?;
        keeper.keep(At::new(layers, Place::Logits), &logits).map_err(failed)?;
        let mut kept = finished(keeper.kept.into_inner(), calls.last(), model)?;
        if let Some(mask) = seen.as_ref().filter(|_| model.hook.prefix_length() == 0) {
            add_scores(&mut kept, model.decoder.spec(), mask);
        }
        calls.push(kept);
    }
    Ok(calls)
}

/// Adds what follows from what was kept: the cache, the attention output by itself, the stream after attention.
fn finished(mut kept: Trace, before: Option<&Trace>, model: Model<'_>) -> Result<Trace> {
    let spec = model.decoder.spec();
    for layer in 0..spec.num_layers {
        let at = |place| At::new(layer, place);
        for part in [Place::Keys, Place::Values] {
            let (Some(new), Some(old)) = (kept.get(&at(part)), before.and_then(|before| before.get(&at(part)))) else {
                continue;
            };
            let all = concatenate(Axis(1), &[old.view(), new.view()]).map_err(|error| Error::Option {
                option: "cases",
                why: format!("give keys that do not fit together: {error}"),
            })?;
            kept.insert(at(part), all);
        }
        if let Some(sum) = kept.get(&at(Place::OutputInput)) {
            let own = match kept.get(&at(Place::Term)) {
                Some(term) => sum - term,
                None => sum.clone(),
            };
            kept.insert(at(Place::Attention), own);
        }
        let stream = if layer == 0 { At::new(0, Place::Embedding) } else { At::new(layer - 1, Place::Stream) };
        if let (Wiring::PreNorm, Some(x), Some(block)) =
            (spec.wiring, kept.get(&stream), kept.get(&at(Place::OutputProjection)))
        {
            let sum = x + &(block * spec.residual_scale);
            kept.insert(at(Place::AttentionResidual), sum);
        }
    }
    Ok(kept)
}

/// The model's hook, with a copy of all that passes by.
struct Keeper<'a> {
    model: Model<'a>,
    kept: RefCell<Trace>,
}

impl Keeper<'_> {
    /// Keeps `[batch, seq, …]`.
    fn keep(&self, at: At, x: &Tensor) -> CandleResult<()> {
        let (batch, seq) = (x.dim(0)?, x.dim(1)?);
        let width = x.elem_count().checked_div(batch * seq).unwrap_or(0);
        let values = x.to_dtype(DType::F64)?.contiguous()?.flatten_all()?.to_vec1::<f64>()?;
        if let Ok(array) = Array3::from_shape_vec((batch, seq, width), values) {
            self.kept.borrow_mut().insert(at, array);
        }
        Ok(())
    }

    /// Keeps `[batch, heads, seq, head_dim]`.
    fn keep_heads(&self, at: At, x: &Tensor) -> CandleResult<()> {
        self.keep(at, &x.transpose(1, 2)?)
    }
}

impl SiteHook for Keeper<'_> {
    fn term(&self, site: &Site) -> CandleResult<Option<Tensor>> {
        let at = |place| At::new(site.layer, place);
        self.keep_heads(at(Place::Query), site.query)?;
        self.keep_heads(at(Place::Keys), site.key)?;
        self.keep_heads(at(Place::Values), site.value)?;
        let term = self.model.hook.term(site)?;
        if let Some(term) = &term {
            self.keep_heads(at(Place::Term), term)?;
        }
        Ok(term)
    }

    fn linear(&self, map: &LinearMap) -> CandleResult<Option<Tensor>> {
        let changed = self.model.hook.linear(map)?;
        let (before, after) = match map.linear {
            Linear::Query => (Some(Place::AttentionInput), Place::QueryProjection),
            Linear::Key => (None, Place::KeyProjection),
            Linear::Value => (None, Place::ValueProjection),
            Linear::AttentionOutput => (Some(Place::OutputInput), Place::OutputProjection),
            Linear::Gate => (None, Place::GateProjection),
            Linear::Up => (Some(Place::MlpInput), Place::UpProjection),
            Linear::Down => (Some(Place::MlpInner), Place::DownProjection),
        };
        if let Some(before) = before {
            self.keep(At::new(map.layer, before), map.input)?;
        }
        self.keep(At::new(map.layer, after), changed.as_ref().unwrap_or(map.output))?;
        Ok(changed)
    }

    fn stream(&self, layer: usize, x: &Tensor) -> CandleResult<()> {
        let at = if layer == 0 { At::new(0, Place::Embedding) } else { At::new(layer - 1, Place::Stream) };
        self.keep(at, x)
    }

    fn prefix(&self, layer: usize) -> CandleResult<Option<(Tensor, Tensor)>> {
        self.model.hook.prefix(layer)
    }

    fn prefix_length(&self) -> usize {
        self.model.hook.prefix_length()
    }
}

fn failed(source: candle_core::Error) -> Error {
    Error::Candle { action: "reading what the model computes", source }
}

//! The proof of a graph's attention sites: a zero adapter changes no bit, and the queries are the model's.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType as CandleType, Tensor};
use ndarray::{ArrayD, Axis, IxDyn};
use schemars::JsonSchema;
use serde::Serialize;

use super::{Error, Result};
use crate::base::{Decoder, Input, Site, SiteHook};
use crate::runtime::{DType, Dim, Error as RuntimeError, NamedValues, Port, Session, Value, derived_feed, present};

/// The input that tells a prompt from what follows one.
const BRANCH: &str = "use_cache_branch";

/// A site's query in a graph that gives it out.
#[derive(Clone, Debug)]
pub struct CapturedQuery {
    /// The decoder layer.
    pub layer: usize,
    /// The branch that the site is in; empty in the main graph.
    pub scope: String,
    /// The output that holds it; empty where another branch is taken.
    pub output: String,
    /// Whether it is `[batch, seq, heads · head_dim]`, and not `[batch, heads, seq, head_dim]`.
    pub merged: bool,
}

/// How far a site's query is from the model's.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct QueryDistance {
    /// The decoder layer.
    pub layer: usize,
    /// The branch that the site is in; empty in the main graph.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scope: String,
    /// The largest difference.
    pub distance: f64,
    /// The largest element of the model's own query.
    pub largest: f64,
}

/// An output of two graphs that is not the same in every bit.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The first such output.
    pub output: String,
    /// The largest difference in any of them, by the largest element of its output; infinite where they are of another
    /// shape or hold what is no number.
    pub distance: f64,
}

/// The columns of the tokens that a run took, and its outputs.
pub type ProbeRun = (Range<usize>, NamedValues);

/// Rows of tokens, as many of both as a graph takes; all rows but the first end in padding, which every kind of attention knows.
pub struct Probe {
    batch: usize,
    seq: usize,
    /// Columns of padding.
    padding: usize,
    ids: Vec<i64>,
    mask: Vec<i64>,
    positions: Vec<i64>,
}

impl Probe {
    /// Rows and columns, where a graph takes any number.
    const SIZE: [usize; 2] = [2, 12];
    const PADDING: usize = 3;
    /// Rows times columns: a graph that takes more is not run.
    const MOST: usize = 1 << 16;
    /// Tokens, where a graph does not say how many it knows.
    const FEW: usize = 100;

    /// Tokens that a graph with these inputs and outputs takes.
    pub fn new(inputs: &[Port], outputs: &[Port]) -> Self {
        let logits = outputs.iter().find(|port| port.name == "logits").and_then(|port| port.dims.last());
        let vocab = if let Some(Dim::Fixed(size)) = logits { *size } else { Self::FEW };
        let dims = inputs.iter().find(|port| port.name == "input_ids").map_or(&[][..], |port| &port.dims);
        let mut sizes = Self::SIZE;
        for (size, dim) in sizes.iter_mut().zip(dims) {
            if let Dim::Fixed(fixed) = dim {
                *size = *fixed;
            }
        }
        let fits =
            sizes.iter().try_fold(1usize, |product, size| product.checked_mul(*size)).is_some_and(|n| n <= Self::MOST);
        let [batch, seq] = if fits { sizes } else { Self::SIZE };
        let padding = Self::PADDING.min(seq.saturating_sub(1));
        let (row, column) = (|at: usize| at / seq.max(1), |at: usize| at % seq.max(1));
        let real = |at: usize| if row(at) == 0 { seq } else { seq - padding };
        let all = || 0..batch.saturating_mul(seq);
        Self {
            batch,
            seq,
            padding,
            ids: all().map(|at| ((at * 7919 + 13) % vocab.max(1)) as i64).collect(),
            mask: all().map(|at| i64::from(column(at) < real(at))).collect(),
            positions: all().map(|at| column(at).min(real(at).saturating_sub(1)) as i64).collect(),
        }
    }

    /// Runs a decoder graph: once over all columns; or, where it has a branch for what follows a prompt, up to the padding and then over
    /// the rest with the cache of the first run.
    ///
    /// # Errors
    /// When it has an input that is none of a decoder's, or fails.
    pub fn run(&self, graph: &mut dyn Session, head_dim: usize) -> Result<Vec<ProbeRun>> {
        let (end, prompt) = (self.seq, self.seq - self.padding);
        let branches = prompt < end && graph.inputs().iter().any(|port| port.name == BRANCH);
        let starts = if branches { vec![0, prompt] } else { vec![0] };
        let ends = starts.iter().skip(1).copied().chain([end]);
        let calls = starts.iter().zip(ends).map(|(start, end)| *start..end);
        let mut runs: Vec<ProbeRun> = Vec::with_capacity(starts.len());
        for columns in calls {
            let before = runs.last().map(|(_, outputs)| outputs);
            let feeds = self.feeds(&*graph, &columns, before, head_dim)?;
            runs.push((columns, graph.run(feeds)?));
        }
        Ok(runs)
    }

    /// The feeds of a decoder graph: some columns of the tokens, and the cache that the run before gave.
    fn feeds(
        &self,
        graph: &dyn Session,
        columns: &Range<usize>,
        before: Option<&NamedValues>,
        head_dim: usize,
    ) -> Result<NamedValues> {
        let mut feeds = NamedValues::new();
        for port in graph.inputs() {
            let (values, columns) = match port.name.as_str() {
                "input_ids" => (&self.ids, columns.clone()),
                "attention_mask" => (&self.mask, 0..columns.end),
                "position_ids" => (&self.positions, columns.clone()),
                _ => {
                    let derived = derived_feed(port, self.batch, columns.start, columns.len())?;
                    let value = match (derived, before) {
                        (Some(value), _) => value,
                        (None, None) => empty(port, self.batch, head_dim)?,
                        (None, Some(before)) => {
                            let name = &present(graph.outputs(), &port.name)?.name;
                            before.get(name).cloned().ok_or_else(|| refused(port, "the run before gave no cache"))?
                        }
                    };
                    feeds.insert(&port.name, value);
                    continue;
                }
            };
            let array = ArrayD::from_shape_vec(IxDyn(&[self.batch, self.seq]), values.clone());
            let array = array.map_err(|error| refused(port, &error.to_string()))?;
            let array = array.slice_axis(Axis(1), columns.into()).to_owned();
            let value: Value =
                if port.dtype == DType::I32 { array.mapv(|value| value as i32).into() } else { array.into() };
            feeds.insert(&port.name, value);
        }
        Ok(feeds)
    }

    /// Names the first output of a graph that is not in every bit what another's runs gave, with how far all are apart; none where
    /// all are the same.
    ///
    /// # Errors
    /// When the graph has an input that is none of a decoder's, or fails.
    pub fn first_difference(
        &self,
        runs: &[ProbeRun],
        other: &mut dyn Session,
        head_dim: usize,
    ) -> Result<Option<Difference>> {
        let mut first: Option<Difference> = None;
        for ((_, one), (_, two)) in runs.iter().zip(&self.run(other, head_dim)?) {
            for (name, value) in one.iter() {
                if two.get(name).map(bits).transpose()? != Some(bits(value)?) {
                    let distance = two.get(name).map_or(Ok(f64::INFINITY), |other| distance(value, other))?;
                    let found = first.get_or_insert_with(|| Difference { output: name.to_owned(), distance: 0.0 });
                    found.distance = found.distance.max(distance);
                }
            }
        }
        Ok(first)
    }

    /// Compares the queries that a graph gives out with those of the candle model, where tokens are real. What no run reached is left out.
    ///
    /// # Errors
    /// When either fails, or they are of another shape.
    pub fn query_distances(
        &self,
        graph: &mut dyn Session,
        queries: &[CapturedQuery],
        decoder: &Decoder,
    ) -> Result<Vec<QueryDistance>> {
        let capture = Capture::default();
        let input = Input::new(self.batch, &self.ids, &self.mask, None)?;
        decoder.hidden_states(&input, None, &capture)?;
        let attention = &decoder.spec().attention;
        let (heads, head_dim) = (attention.num_heads, attention.head_dim);
        let runs = self.run(graph, head_dim)?;
        let own = capture.0.into_inner();
        let mut distances = Vec::with_capacity(queries.len());
        for query in queries {
            let expected = own.get(&query.layer).map(flat).transpose().map_err(candle)?.unwrap_or_default();
            let mut most =
                QueryDistance { layer: query.layer, scope: query.scope.clone(), distance: 0.0, largest: 0.0 };
            let mut was_run = false;
            for (columns, outputs) in &runs {
                let found = match outputs.get(&query.output) {
                    Some(found) => found.clone().into_f64()?,
                    None => continue,
                };
                // of a branch that was not taken
                if found.is_empty() {
                    continue;
                }
                was_run = true;
                let shape = Shape { heads, head_dim, columns: columns.clone(), merged: query.merged };
                self.compare(&found, &expected, &shape, &mut most)?;
            }
            if was_run {
                distances.push(most);
            }
        }
        Ok(distances)
    }

    /// Adds the distance of a run's query to the largest so far, where tokens are real.
    fn compare(&self, found: &ArrayD<f64>, expected: &[f64], shape: &Shape, most: &mut QueryDistance) -> Result<()> {
        let Shape { heads, head_dim, columns, merged } = shape;
        let (heads, head_dim, seq) = (*heads, *head_dim, columns.len());
        let wanted = vec![self.batch, heads, seq, head_dim];
        if found.len() != wanted.iter().product::<usize>() {
            return Err(Error::Logits { found: found.shape().to_vec(), expected: wanted });
        }
        for (at, found) in found.iter().enumerate() {
            let (row, rest) = (at / (heads * seq * head_dim), at % (heads * seq * head_dim));
            let (head, column) = if *merged {
                (rest / head_dim % heads, rest / (head_dim * heads))
            } else {
                (rest / (head_dim * seq), rest / head_dim % seq)
            };
            let column = columns.start + column;
            let place = ((row * heads + head) * self.seq + column) * head_dim + rest % head_dim;
            let expected = expected.get(place).copied().unwrap_or(f64::NAN);
            if self.mask.get(row * self.seq + column) == Some(&1) {
                // what is no number is no small distance
                let distance = (found - expected).abs();
                most.distance = most.distance.max(if distance.is_nan() { f64::INFINITY } else { distance });
                most.largest = most.largest.max(expected.abs());
            }
        }
        Ok(())
    }
}

/// How a query lies in a run's output.
struct Shape {
    heads: usize,
    head_dim: usize,
    /// The tokens' columns.
    columns: Range<usize>,
    merged: bool,
}

/// Keeps the queries of all sites.
#[derive(Default)]
struct Capture(RefCell<BTreeMap<usize, Tensor>>);

impl SiteHook for Capture {
    fn term(&self, site: &Site) -> candle_core::Result<Option<Tensor>> {
        self.0.borrow_mut().insert(site.layer, site.query.clone());
        Ok(None)
    }
}

fn flat(query: &Tensor) -> candle_core::Result<Vec<f64>> {
    query.to_dtype(CandleType::F64)?.contiguous()?.flatten_all()?.to_vec1()
}

fn candle(source: candle_core::Error) -> Error {
    Error::Candle { action: "reading the queries", source }
}

fn refused(port: &Port, why: &str) -> Error {
    Error::Runtime(RuntimeError::Ports { reason: format!("the input {port} is none that prefold can fill: {why}") })
}

/// A cache without positions.
fn empty(port: &Port, batch: usize, head_dim: usize) -> Result<Value> {
    let [_, Dim::Fixed(heads), _, width] = &port.dims[..] else {
        return Err(refused(port, "a cache is [batch, kv_heads, past, head_dim] with the heads declared"));
    };
    let width = if let Dim::Fixed(width) = width { *width } else { head_dim };
    Ok(Value::zeros(port.dtype, &[batch, *heads, 0, width])?)
}

/// The largest difference by the largest element.
fn distance(one: &Value, two: &Value) -> Result<f64> {
    if one.shape() != two.shape() {
        return Ok(f64::INFINITY);
    }
    let (one, two) = (one.clone().into_f64()?, two.clone().into_f64()?);
    let largest = one.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let most = one.iter().zip(&two).fold(0.0, |most: f64, (x, y)| most.max(((x - y) / largest).abs()));
    let sound = one.iter().chain(&two).all(|x| x.is_finite());
    Ok(if sound { most } else { f64::INFINITY })
}

/// Bit patterns, which tell zeros of either sign apart and no number equal to itself.
fn bits(value: &Value) -> Result<(Vec<usize>, Vec<u64>)> {
    let bits = if value.dtype().is_float() {
        value.clone().into_f64()?.iter().map(|x| x.to_bits()).collect()
    } else {
        value.clone().into_i64()?.iter().map(|x| x.cast_unsigned()).collect()
    };
    Ok((value.shape().to_vec(), bits))
}

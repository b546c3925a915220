//! The proof of a graph's attention sites: a zero adapter changes no bit, and the queries are the model's.

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_core::{DType as CandleType, Tensor};
use ndarray::{ArrayD, IxDyn};
use schemars::JsonSchema;
use serde::Serialize;

use super::{Error, Result};
use crate::base::{Decoder, Input, Site, SiteHook};
use crate::runtime::{DType, Dim, Error as RuntimeError, NamedValues, Port, Session, Value};

/// A site's query in a graph that gives it out.
#[derive(Clone, Debug)]
pub struct CapturedQuery {
    /// The decoder layer.
    pub layer: usize,
    /// The output that holds it.
    pub output: String,
    /// Whether it is `[batch, seq, heads · head_dim]`, and not `[batch, heads, seq, head_dim]`.
    pub merged: bool,
}

/// How far a site's query is from the model's.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct QueryDistance {
    /// The decoder layer.
    pub layer: usize,
    /// The largest difference.
    pub distance: f64,
    /// The largest element of the model's own query.
    pub largest: f64,
}

/// Two rows of tokens; the second one ends in padding, which every kind of attention knows.
pub struct Probe {
    ids: Vec<i64>,
    mask: Vec<i64>,
    positions: Vec<i64>,
}

impl Probe {
    const BATCH: usize = 2;
    const SEQ: usize = 12;
    const PADDING: usize = 3;
    /// Tokens, where a graph does not say how many it knows.
    const FEW: usize = 100;

    /// Tokens that a graph with these outputs knows.
    pub fn new(outputs: &[Port]) -> Self {
        let logits = outputs.iter().find(|port| port.name == "logits").and_then(|port| port.dims.last());
        let vocab = if let Some(Dim::Fixed(size)) = logits { *size } else { Self::FEW };
        let token = |at: usize| ((at * 7919 + 13) % vocab.max(1)) as i64;
        let real = |at: usize| at / Self::SEQ == 0 || at % Self::SEQ < Self::SEQ - Self::PADDING;
        let all = || 0..Self::BATCH * Self::SEQ;
        let last = |at: usize| if at / Self::SEQ == 0 { Self::SEQ } else { Self::SEQ - Self::PADDING } - 1;
        Self {
            ids: all().map(token).collect(),
            mask: all().map(|at| i64::from(real(at))).collect(),
            positions: all().map(|at| (at % Self::SEQ).min(last(at)) as i64).collect(),
        }
    }

    /// The feeds of a decoder graph: the tokens and an empty cache.
    fn feeds(&self, inputs: &[Port], head_dim: usize) -> Result<NamedValues> {
        let mut feeds = NamedValues::new();
        for port in inputs {
            let values = match port.name.as_str() {
                "input_ids" => &self.ids,
                "attention_mask" => &self.mask,
                "position_ids" => &self.positions,
                "use_cache_branch" => {
                    feeds.insert(&port.name, ArrayD::from_elem(IxDyn(&[1]), false));
                    continue;
                }
                _ => {
                    feeds.insert(&port.name, empty(port, head_dim)?);
                    continue;
                }
            };
            let array = ArrayD::from_shape_vec(IxDyn(&[Self::BATCH, Self::SEQ]), values.clone());
            let array = array.map_err(|error| refused(port, &error.to_string()))?;
            let value: Value =
                if port.dtype == DType::I32 { array.mapv(|value| value as i32).into() } else { array.into() };
            feeds.insert(&port.name, value);
        }
        Ok(feeds)
    }

    /// Runs two graphs and names the first output that is not the same in every bit; none where all are.
    ///
    /// # Errors
    /// When one of them has an input that is none of a decoder's, or fails.
    pub fn first_difference(
        &self,
        base: &mut dyn Session,
        other: &mut dyn Session,
        head_dim: usize,
    ) -> Result<Option<String>> {
        let one = base.run(self.feeds(base.inputs(), head_dim)?)?;
        let two = other.run(self.feeds(other.inputs(), head_dim)?)?;
        for (name, value) in one.iter() {
            if two.get(name).map(bits).transpose()? != Some(bits(value)?) {
                return Ok(Some(name.to_owned()));
            }
        }
        Ok(None)
    }

    /// Compares the queries that a graph gives out with those of the candle model, where tokens are real.
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
        let input = Input::new(Self::BATCH, &self.ids, &self.mask, None)?;
        decoder.hidden_states(&input, None, &capture)?;
        let attention = &decoder.spec().attention;
        let (heads, head_dim) = (attention.num_heads, attention.head_dim);
        let mut outputs = graph.run(self.feeds(graph.inputs(), head_dim)?)?;
        let own = capture.0.into_inner();
        let mut distances = Vec::with_capacity(queries.len());
        for query in queries {
            let expected = own.get(&query.layer).map(flat).transpose().map_err(candle)?.unwrap_or_default();
            let found = outputs.take(&query.output)?.into_f64()?;
            if found.len() != expected.len() {
                let expected = vec![Self::BATCH, heads, Self::SEQ, head_dim];
                return Err(Error::Logits { found: found.shape().to_vec(), expected });
            }
            let mut most = QueryDistance { layer: query.layer, distance: 0.0, largest: 0.0 };
            for (at, found) in found.iter().enumerate() {
                let (row, rest) = (at / (heads * Self::SEQ * head_dim), at % (heads * Self::SEQ * head_dim));
                let (head, seq) = if query.merged {
                    (rest / head_dim % heads, rest / (head_dim * heads))
                } else {
                    (rest / (head_dim * Self::SEQ), rest / head_dim % Self::SEQ)
                };
                let place = ((row * heads + head) * Self::SEQ + seq) * head_dim + rest % head_dim;
                let expected = expected.get(place).copied().unwrap_or(f64::NAN);
                if self.mask.get(row * Self::SEQ + seq) == Some(&1) {
                    // what is no number is no small distance
                    let distance = (found - expected).abs();
                    most.distance = most.distance.max(if distance.is_nan() { f64::INFINITY } else { distance });
                    most.largest = most.largest.max(expected.abs());
                }
            }
            distances.push(most);
        }
        Ok(distances)
    }
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
fn empty(port: &Port, head_dim: usize) -> Result<Value> {
    let [_, Dim::Fixed(heads), _, width] = &port.dims[..] else {
        return Err(refused(port, "a cache is [batch, kv_heads, past, head_dim] with the heads declared"));
    };
    let width = if let Dim::Fixed(width) = width { *width } else { head_dim };
    Ok(Value::zeros(port.dtype, &[Probe::BATCH, *heads, 0, width])?)
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

//! The decode loop over a graph: prefill, cached steps, greedy continuation.
//!
//! Positions are counted from the attention mask, `max(cumsum(mask) - 1, 0)`, so that padding on either side leaves a
//! row's own positions as they are.

use ndarray::{Array2, Array3, ArrayD, ArrayView1, Axis, Ix3, concatenate, s};

use super::{DType, Dim, Error, Port, Result, Session, Tensor, Value};

const IDS: &str = "input_ids";
const MASK: &str = "attention_mask";
const POSITIONS: &str = "position_ids";
const LOGITS: &str = "logits";

/// What a decoder graph takes and gives, read from its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecoderPorts {
    /// Whether the graph takes `position_ids`; one that does not counts positions itself.
    pub has_positions: bool,
    /// The cache, a key and a value per layer; empty when the graph has none.
    pub cache: Vec<CachePort>,
    /// Number of tokens, where the logits' last dimension declares it.
    pub vocab_size: Option<usize>,
    index_dtype: DType,
    extras: Vec<Extra>,
}

/// An input that some exporters add, and that follows from the others.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extra {
    port: Port,
    kind: ExtraKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExtraKind {
    /// Whether there is a past: optimum's merged decoders hold two graphs.
    CacheBranch,
    /// How many logits to give; 0 for all.
    LogitsToKeep,
    /// The new columns, counted with padding.
    CachePosition,
    /// Zero for every token.
    TokenTypes,
    PastLength,
    TotalLength,
}

impl Extra {
    fn of(port: &Port) -> Option<Self> {
        let kind = match port.name.as_str() {
            "use_cache_branch" => ExtraKind::CacheBranch,
            "num_logits_to_keep" | "logits_to_keep" => ExtraKind::LogitsToKeep,
            "cache_position" => ExtraKind::CachePosition,
            "token_type_ids" => ExtraKind::TokenTypes,
            "past_sequence_length" => ExtraKind::PastLength,
            "total_sequence_length" => ExtraKind::TotalLength,
            _ => return None,
        };
        Some(Self { port: port.clone(), kind })
    }

    /// What is fed after `past` columns for `new` ones.
    fn feed(&self, batch: usize, past: usize, new: usize) -> Result<Value> {
        let one = vec![1; self.port.dims.len()];
        let total = past.saturating_add(new);
        let (shape, values) = match self.kind {
            ExtraKind::CacheBranch => return Ok(ArrayD::from_elem(one, past > 0).into()),
            ExtraKind::LogitsToKeep => (one, vec![0]),
            ExtraKind::CachePosition => (vec![new], (past..total).collect()),
            ExtraKind::TokenTypes => (vec![batch, new], vec![0; batch.saturating_mul(new)]),
            ExtraKind::PastLength => (one, vec![past]),
            ExtraKind::TotalLength => (one, vec![total]),
        };
        let values = values.into_iter().map(|value| i64::try_from(value).unwrap_or(i64::MAX)).collect();
        let array = ArrayD::from_shape_vec(shape, values)
            .map_err(|error| misfit(format!("{} cannot be fed: {error}", self.port)))?;
        Ok(match self.port.dtype {
            DType::I32 => array.mapv(|value| i32::try_from(value).unwrap_or(i32::MAX)).into(),
            _ => array.into(),
        })
    }
}

/// What is fed to an input that follows from the others, for `new` columns after `past`; none where it is no such input.
///
/// # Errors
/// When its shape is none of that kind of input.
pub(crate) fn derived_feed(port: &Port, batch: usize, past: usize, new: usize) -> Result<Option<Value>> {
    Extra::of(port).map(|extra| extra.feed(batch, past, new)).transpose()
}

/// One tensor of the cache, of shape `[batch, kv_heads, past, head_dim]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachePort {
    /// `past_key_values.N.key` or `.value`.
    pub input: String,
    /// `present.N.key` or `.value`.
    pub output: String,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Element type.
    pub dtype: DType,
}

impl DecoderPorts {
    /// Reads the ports of a session. `head_dim` is for graphs that do not declare the last dimension of their cache.
    ///
    /// # Errors
    /// When a port is missing, has an unexpected type or shape, or an input is none that the decode loop can feed.
    pub fn of(session: &(impl Session + ?Sized), head_dim: Option<usize>) -> Result<Self> {
        let inputs = session.inputs();
        let outputs = session.outputs();
        let index_dtype = index_dtype(find(inputs, "input", IDS)?)?;
        for name in [MASK, POSITIONS] {
            if let Ok(port) = find(inputs, "input", name)
                && port.dtype != index_dtype
            {
                return Err(misfit(format!("{port} has another element type than {IDS}")));
            }
        }
        find(inputs, "input", MASK)?;
        let logits = find(outputs, "output", LOGITS)?;
        if !logits.dtype.is_float() {
            return Err(misfit(format!("{logits} are not floating-point numbers")));
        }
        let vocab_size = match logits.dims.last() {
            Some(Dim::Fixed(size)) => Some(*size),
            _ => None,
        };
        let (mut cache, mut extras) = (Vec::new(), Vec::new());
        for port in inputs {
            if [IDS, MASK, POSITIONS].contains(&port.name.as_str()) {
                continue;
            }
            if let Some(extra) = Extra::of(port) {
                extras.push(extra);
            } else if port.name.starts_with("past") {
                cache.push(cache_port(port, present(outputs, &port.name)?, head_dim)?);
            } else {
                return Err(misfit(format!("the input {port} is none that prefold can fill")));
            }
        }
        let has_positions = inputs.iter().any(|port| port.name == POSITIONS);
        Ok(Self { has_positions, cache, vocab_size, index_dtype, extras })
    }

    /// Number of layers that have a cache.
    pub fn cached_layers(&self) -> usize {
        self.cache.len() / 2
    }
}

fn find<'a>(ports: &'a [Port], kind: &str, name: &str) -> Result<&'a Port> {
    ports.iter().find(|port| port.name == name).ok_or_else(|| {
        let present: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
        misfit(format!("it has no {kind} `{name}`, only {}", present.join(", ")))
    })
}

/// The output that an input of the cache becomes.
///
/// # Errors
/// When there is none.
pub(crate) fn present<'a>(outputs: &'a [Port], input: &str) -> Result<&'a Port> {
    let usual = input.replacen("past_key_values", "present", 1);
    let names = [input.replacen("past", "present", 1), format!("{input}_out"), usual.clone()];
    let found = names.iter().find_map(|name| find(outputs, "output", name).ok());
    found.map_or_else(|| find(outputs, "output", &usual), Ok)
}

fn misfit(reason: String) -> Error {
    Error::Ports { reason }
}

fn index_dtype(port: &Port) -> Result<DType> {
    match port.dtype {
        DType::I64 | DType::I32 => Ok(port.dtype),
        _ => Err(misfit(format!("{port} should be i64 or i32"))),
    }
}

fn cache_port(input: &Port, output: &Port, head_dim: Option<usize>) -> Result<CachePort> {
    let [_, Dim::Fixed(kv_heads), _, size] = input.dims.as_slice() else {
        return Err(misfit(format!("{input} should be [batch, kv_heads, past, head_dim] with the heads declared")));
    };
    let head_dim = match (size, head_dim) {
        (Dim::Fixed(size), _) => *size,
        (_, Some(head_dim)) => head_dim,
        (_, None) => return Err(misfit(format!("{input} does not declare the size of a head"))),
    };
    if input.dtype != output.dtype {
        return Err(misfit(format!("{input} and {output} differ in element type")));
    }
    Ok(CachePort {
        input: input.name.clone(),
        output: output.name.clone(),
        kv_heads: *kv_heads,
        head_dim,
        dtype: input.dtype,
    })
}

/// A decoder graph with the state of a batch being decoded. A graph without a cache works too, by computing the whole
/// sequence again at each step.
pub struct GraphDecoder<S> {
    session: S,
    ports: DecoderPorts,
    /// What has been decoded so far, `[batch, seq]`.
    mask: Option<Array2<i64>>,
    /// The tokens so far, kept only for a graph without a cache.
    ids: Option<Array2<i64>>,
    /// The present keys and values, under their input names, where the runtime left them.
    cache: Vec<(String, Tensor)>,
}

impl<S: Session> GraphDecoder<S> {
    /// Takes a session whose ports are those of a decoder.
    ///
    /// # Errors
    /// When they are not; see [`DecoderPorts::of`].
    pub fn new(session: S) -> Result<Self> {
        let ports = DecoderPorts::of(&session, None)?;
        Ok(Self::with_ports(session, ports))
    }

    /// As [`new`](Self::new), for a graph whose cache may leave the size of a head undeclared.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_head_dim(session: S, head_dim: usize) -> Result<Self> {
        let ports = DecoderPorts::of(&session, Some(head_dim))?;
        Ok(Self::with_ports(session, ports))
    }

    fn with_ports(session: S, ports: DecoderPorts) -> Self {
        Self { session, ports, mask: None, ids: None, cache: Vec::new() }
    }

    /// What the graph takes and gives.
    pub fn ports(&self) -> &DecoderPorts {
        &self.ports
    }

    /// The session, for runs beside the loop.
    pub fn session_mut(&mut self) -> &mut S {
        &mut self.session
    }

    /// Gives the session back.
    pub fn into_session(self) -> S {
        self.session
    }

    /// Forgets the batch.
    pub fn reset(&mut self) {
        self.mask = None;
        self.ids = None;
        self.cache.clear();
    }

    /// How many positions each row has so far, padding included.
    pub fn len(&self) -> usize {
        self.mask.as_ref().map_or(0, Array2::ncols)
    }

    /// Whether nothing has been decoded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Starts a new batch: `ids` and `mask` are `[batch, seq]`, padded on either side where the mask is 0. Gives the
    /// logits, `[batch, seq, vocab]`.
    ///
    /// # Errors
    /// As [`extend`](Self::extend).
    pub fn prefill(&mut self, ids: &Array2<i64>, mask: &Array2<i64>) -> Result<Array3<f32>> {
        self.reset();
        self.extend(ids, mask, None)
    }

    /// Appends one token to every row. Gives its logits, `[batch, vocab]`.
    ///
    /// # Errors
    /// As [`extend`](Self::extend).
    pub fn step(&mut self, next: &[i64]) -> Result<Array2<f32>> {
        let ids = ArrayView1::from(next).insert_axis(Axis(1)).to_owned();
        let logits = self.extend(&ids, &Array2::ones(ids.raw_dim()), None)?;
        Ok(logits.index_axis_move(Axis(1), 0))
    }

    /// Appends `[batch, seq]` tokens to the batch and gives their logits, `[batch, seq, vocab]`. The positions are
    /// counted from the whole mask unless they are given.
    ///
    /// # Errors
    /// When shapes do not fit, a token is not in the vocabulary, or the runtime fails; the batch is forgotten then.
    pub fn extend(
        &mut self,
        ids: &Array2<i64>,
        mask: &Array2<i64>,
        position_ids: Option<&Array2<i64>>,
    ) -> Result<Array3<f32>> {
        let result = self.try_extend(ids, mask, position_ids);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn try_extend(
        &mut self,
        ids: &Array2<i64>,
        mask: &Array2<i64>,
        position_ids: Option<&Array2<i64>>,
    ) -> Result<Array3<f32>> {
        self.check(ids, mask, position_ids)?;
        let new = ids.ncols();
        let all_mask = append(self.mask.take(), mask)?;
        let mut all_positions = positions(&all_mask);
        if let Some(given) = position_ids {
            all_positions.slice_mut(s![.., -signed(new)..]).assign(given);
        }
        let past = if self.ports.cache.is_empty() { 0 } else { all_mask.ncols().saturating_sub(new) };
        let fed = all_mask.ncols().saturating_sub(past);
        let mut feeds = if self.ports.cache.is_empty() {
            let all_ids = append(self.ids.take(), ids)?;
            self.ids = Some(all_ids.clone());
            self.feeds(all_ids, &all_mask, all_positions)
        } else {
            self.feeds(ids.clone(), &all_mask, all_positions.slice(s![.., -signed(new)..]).to_owned())
        };
        let batch = ids.nrows();
        for extra in &self.ports.extras {
            feeds.push((extra.port.name.clone(), extra.feed(batch, past, fed)?.into()));
        }
        let feeds = self.with_cache(feeds, batch)?;
        let outputs = self.session.run_tensors(feeds)?;
        let logits = self.keep_cache(outputs)?;
        self.mask = Some(all_mask);
        last_columns(logits, batch, new)
    }

    fn check(&self, ids: &Array2<i64>, mask: &Array2<i64>, position_ids: Option<&Array2<i64>>) -> Result<()> {
        let refused = |reason: String| Err(Error::Tokens { reason });
        if ids.is_empty() {
            return refused("there are none".into());
        }
        if let Some(other) = [Some(mask), position_ids].into_iter().flatten().find(|other| other.dim() != ids.dim()) {
            return refused(format!("ids are {:?}, mask or positions {:?}", ids.shape(), other.shape()));
        }
        if let Some(known) = self.mask.as_ref().filter(|known| known.nrows() != ids.nrows()) {
            return refused(format!("{} rows were given to a batch of {}", ids.nrows(), known.nrows()));
        }
        if let Some(value) = mask.iter().find(|value| !matches!(value, 0 | 1)) {
            return refused(format!("the mask holds {value}; it should be 0 or 1"));
        }
        if position_ids.is_some() && !self.ports.has_positions {
            return refused(format!("positions were given, and the graph has no input `{POSITIONS}`"));
        }
        if position_ids.is_some() && self.ports.cache.is_empty() && self.mask.is_some() {
            return refused("a graph without a cache takes given positions only for the whole sequence".into());
        }
        let vocab = self.ports.vocab_size.and_then(|size| i64::try_from(size).ok()).unwrap_or(i64::MAX);
        match ids.indexed_iter().find(|(_, id)| !(0..vocab).contains(id)) {
            Some(((row, column), id)) => {
                refused(format!("token {id} at row {row}, position {column} is not in the vocabulary of {vocab}"))
            }
            None => Ok(()),
        }
    }

    fn feeds(&self, ids: Array2<i64>, mask: &Array2<i64>, positions: Array2<i64>) -> Vec<(String, Tensor)> {
        let index = |name: &str, array: Array2<i64>| (name.to_owned(), indices(array, self.ports.index_dtype).into());
        let mut feeds = vec![index(IDS, ids), index(MASK, mask.clone())];
        if self.ports.has_positions {
            feeds.push(index(POSITIONS, positions));
        }
        feeds
    }

    /// Adds the cache to the feeds: what the last run left, or tensors without positions.
    fn with_cache(&mut self, mut feeds: Vec<(String, Tensor)>, batch: usize) -> Result<Vec<(String, Tensor)>> {
        if self.cache.is_empty() {
            for port in &self.ports.cache {
                let empty = Value::zeros(port.dtype, &[batch, port.kv_heads, 0, port.head_dim])?;
                feeds.push((port.input.clone(), empty.into()));
            }
        } else {
            feeds.append(&mut self.cache);
        }
        Ok(feeds)
    }

    /// Keeps the outputs that are the next step's cache, and reads the logits.
    fn keep_cache(&mut self, outputs: Vec<(String, Tensor)>) -> Result<Value> {
        let mut logits = None;
        for (name, tensor) in outputs {
            if name == LOGITS {
                logits = Some(tensor.into_value()?);
            } else if let Some(port) = self.ports.cache.iter().find(|port| port.output == name) {
                self.cache.push((port.input.clone(), tensor));
            }
        }
        logits.ok_or_else(|| misfit(format!("the run gave no `{LOGITS}`")))
    }

    /// Continues prompts greedily, as one batch padded on the left, by at most `max_new` tokens each. A row ends with the
    /// first token that is in `eos`, which is part of the result. `on_token` is called with row and token as they come.
    ///
    /// # Errors
    /// When a prompt is empty, the logits are NaN, or as [`extend`](Self::extend).
    pub fn generate(
        &mut self,
        prompts: &[Vec<i64>],
        max_new: usize,
        eos: &[i64],
        on_token: &mut dyn FnMut(usize, i64),
    ) -> Result<Vec<Vec<i64>>> {
        let (ids, mask) = left_pad(prompts)?;
        let mut rows = vec![Vec::new(); prompts.len()];
        if max_new == 0 {
            return Ok(rows);
        }
        let mut finished = vec![false; prompts.len()];
        let mut logits = last_logits(&self.prefill(&ids, &mask)?, &mask)?;
        for produced in 1.. {
            let next = greedy(&logits)?;
            for (row, ((tokens, finished), token)) in rows.iter_mut().zip(&mut finished).zip(&next).enumerate() {
                if !*finished {
                    tokens.push(*token);
                    on_token(row, *token);
                    *finished = eos.contains(token);
                }
            }
            if produced == max_new || finished.iter().all(|finished| *finished) {
                break;
            }
            // A finished row goes on with whatever comes next: rows do not see each other.
            logits = self.step(&next)?;
        }
        Ok(rows)
    }
}

/// `max(cumsum(mask) - 1, 0)` along each row.
pub fn positions(mask: &Array2<i64>) -> Array2<i64> {
    let mut positions = mask.clone();
    positions.accumulate_axis_inplace(Axis(1), |before, here| *here = here.saturating_add(*before));
    positions.mapv(|count| count.saturating_sub(1).max(0))
}

/// Puts prompts of unequal length into one batch, padded on the left: ids and mask, `[batch, longest]`. The padding's
/// token is 0; the mask keeps it from being seen.
///
/// # Errors
/// When there is no prompt or one of them is empty.
pub fn left_pad(prompts: &[Vec<i64>]) -> Result<(Array2<i64>, Array2<i64>)> {
    if let Some(row) = prompts.iter().position(Vec::is_empty) {
        return Err(Error::Tokens { reason: format!("prompt {row} is empty") });
    }
    let Some(longest) = prompts.iter().map(Vec::len).max() else {
        return Err(Error::Tokens { reason: "there is no prompt".into() });
    };
    let mut ids = Array2::zeros((prompts.len(), longest));
    let mut mask = Array2::zeros((prompts.len(), longest));
    for (row, prompt) in prompts.iter().enumerate() {
        let padding = longest - prompt.len();
        ids.slice_mut(s![row, padding..]).assign(&ArrayView1::from(prompt));
        mask.slice_mut(s![row, padding..]).fill(1);
    }
    Ok((ids, mask))
}

/// The logits of each row's last real token, `[batch, vocab]`, from `[batch, seq, vocab]` and their mask.
///
/// # Errors
/// When a row has no real token, or logits and mask are of different shape.
pub fn last_logits(logits: &Array3<f32>, mask: &Array2<i64>) -> Result<Array2<f32>> {
    let (batch, seq, vocab) = logits.dim();
    if mask.dim() != (batch, seq) {
        return Err(Error::Tokens { reason: format!("logits are {:?}, the mask {:?}", logits.shape(), mask.shape()) });
    }
    let mut last = Array2::zeros((batch, vocab));
    for (row, mut target) in last.outer_iter_mut().enumerate() {
        let position = mask.row(row).iter().rposition(|value| *value != 0);
        let position = position.ok_or_else(|| Error::Tokens { reason: format!("row {row} is all padding") })?;
        target.assign(&logits.slice(s![row, position, ..]));
    }
    Ok(last)
}

/// The token of the largest logit in each row; the first of equals.
fn greedy(logits: &Array2<f32>) -> Result<Vec<i64>> {
    let pick = |(row, logits): (usize, ArrayView1<'_, f32>)| {
        if logits.iter().any(|logit| logit.is_nan()) {
            return Err(Error::NanLogits { row });
        }
        let best = logits.iter().enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
        Ok(best.map_or(0, |(token, _)| token as i64))
    };
    logits.outer_iter().enumerate().map(pick).collect()
}

fn indices(array: Array2<i64>, dtype: DType) -> Value {
    match dtype {
        // Ids are checked against the vocabulary, positions count tokens: both fit.
        DType::I32 => array.mapv(|value| i32::try_from(value).unwrap_or(i32::MAX)).into_dyn().into(),
        _ => array.into_dyn().into(),
    }
}

fn append(before: Option<Array2<i64>>, new: &Array2<i64>) -> Result<Array2<i64>> {
    let Some(before) = before else { return Ok(new.as_standard_layout().into_owned()) };
    let joined = concatenate(Axis(1), &[before.view(), new.view()]);
    let joined = joined.map_err(|error| Error::Tokens { reason: error.to_string() })?;
    // Concatenation along columns may come out column-major; runtimes want rows.
    Ok(joined.as_standard_layout().into_owned())
}

/// A length as a slice index; no array is longer than `isize::MAX`.
fn signed(len: usize) -> isize {
    len as isize
}

fn last_columns(logits: Value, batch: usize, new: usize) -> Result<Array3<f32>> {
    let logits = logits.into_f32()?;
    let found = logits.shape().to_vec();
    let wrong = || misfit(format!("the logits have shape {found:?} for {batch} rows of {new} tokens"));
    let logits = logits.into_dimensionality::<Ix3>().map_err(|_| wrong())?;
    if logits.dim().0 != batch || logits.dim().1 < new {
        return Err(wrong());
    }
    Ok(logits.slice(s![.., -signed(new).., ..]).to_owned())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ndarray::arr2;

    use super::*;
    use crate::runtime::testing::{self, TinyModel, VOCAB, table};
    use crate::runtime::{NamedValues, OrtOptions, OrtSession, TractOptions, TractSession};

    /// Both runtimes, as far as they are there.
    fn sessions(graph: &Path) -> Vec<Box<dyn Session>> {
        let mut sessions: Vec<Box<dyn Session>> =
            vec![Box::new(TractSession::open(graph, TractOptions::default()).unwrap())];
        if let Some(library) = testing::ort_library() {
            sessions.push(Box::new(OrtSession::open(&library, graph, OrtOptions::default()).unwrap()));
        }
        sessions
    }

    fn tiny(cached: bool) -> Vec<GraphDecoder<Box<dyn Session>>> {
        let folder = tempfile::tempdir().unwrap();
        let graph = TinyModel { cached, external: false }.write(folder.path());
        sessions(&graph).into_iter().map(|session| GraphDecoder::new(session).unwrap()).collect()
    }

    #[test]
    fn positions_ignore_padding() {
        let mask = arr2(&[[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]);
        let expected = arr2(&[[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]);
        assert_eq!(positions(&mask), expected);
    }

    #[test]
    fn the_last_logits_are_those_of_the_last_real_token() {
        let logits = Array3::from_shape_fn((2, 3, 1), |(row, column, _)| (10 * row + column) as f32);
        assert_eq!(last_logits(&logits, &arr2(&[[1, 1, 0], [0, 1, 1]])).unwrap(), arr2(&[[1.0], [12.0]]));
        assert!(matches!(last_logits(&logits, &arr2(&[[1, 1, 0], [0, 0, 0]])), Err(Error::Tokens { .. })));
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_refuses_nan() {
        assert_eq!(greedy(&arr2(&[[0.0, 2.0, 2.0], [f32::NEG_INFINITY, -1.0, -2.0]])).unwrap(), [1, 1]);
        assert!(matches!(greedy(&arr2(&[[0.0], [f32::NAN]])), Err(Error::NanLogits { row: 1 })));
    }

    #[test]
    fn ports_are_discovered() {
        for (cached, tensors) in [(true, 2), (false, 0)] {
            for decoder in tiny(cached) {
                let ports = decoder.ports();
                assert_eq!((ports.cache.len(), ports.has_positions), (tensors, false));
                assert_eq!(ports.vocab_size, Some(VOCAB));
                assert!(ports.cache.iter().all(|port| (port.kv_heads, port.head_dim) == (1, 1)));
            }
        }
    }

    #[test]
    fn continues_prompts_with_and_without_a_cache() {
        for cached in [true, false] {
            for mut decoder in tiny(cached) {
                let mut streamed = Vec::new();
                let prompts = [vec![1, 2, 3], vec![2]];
                let rows = decoder.generate(&prompts, 4, &[0], &mut |row, token| streamed.push((row, token))).unwrap();
                assert_eq!(rows, [vec![4, 0], vec![3, 4, 0]]);
                assert_eq!(streamed, [(0, 4), (1, 3), (0, 0), (1, 4), (1, 0)]);
                assert_eq!(decoder.generate(&prompts, 2, &[], &mut |_, _| {}).unwrap(), [vec![4, 0], vec![3, 4]]);
                assert_eq!(decoder.generate(&prompts, 0, &[], &mut |_, _| {}).unwrap(), [vec![], vec![0; 0]]);
            }
        }
    }

    #[test]
    fn the_cache_goes_from_step_to_step() {
        for mut decoder in tiny(true) {
            decoder.prefill(&arr2(&[[1, 2], [4, 4]]), &Array2::ones((2, 2))).unwrap();
            let logits = decoder.step(&[3, 1]).unwrap();
            for token in 0..VOCAB {
                assert_eq!(logits[[0, token]], 6.0 * table(3, token), "1 + 2 + 3");
                assert_eq!(logits[[1, token]], 9.0 * table(1, token), "4 + 4 + 1");
            }
            assert_eq!(decoder.len(), 3);
            decoder.reset();
            assert!(decoder.is_empty());
            let logits = decoder.step(&[3]).unwrap();
            assert_eq!(logits[[0, 4]], 3.0, "nothing of the last batch is left");
        }
    }

    #[test]
    fn tokens_that_do_not_fit_are_refused_and_forget_the_batch() {
        for mut decoder in tiny(true) {
            let mask = Array2::ones((1, 1));
            let mut refused = |ids: Array2<i64>, mask: &Array2<i64>, say: &str| {
                decoder.step(&[1]).unwrap();
                let error = decoder.extend(&ids, mask, None).unwrap_err().to_string();
                assert!(error.contains(say), "{error}");
                assert!(decoder.is_empty());
            };
            refused(arr2(&[[5]]), &mask, "token 5 at row 0, position 0 is not in the vocabulary of 5");
            refused(arr2(&[[-1]]), &mask, "token -1");
            refused(arr2(&[[1, 2]]), &mask, "ids are [1, 2]");
            refused(arr2(&[[1]]), &arr2(&[[2]]), "the mask holds 2");
            refused(arr2(&[[1], [1]]), &Array2::ones((2, 1)), "2 rows were given to a batch of 1");
            refused(Array2::zeros((1, 0)), &Array2::ones((1, 0)), "there are none");
            assert!(matches!(decoder.generate(&[vec![]], 1, &[], &mut |_, _| {}), Err(Error::Tokens { .. })));
            assert!(matches!(decoder.generate(&[], 1, &[], &mut |_, _| {}), Err(Error::Tokens { .. })));
        }
    }

    /// Truth from transformers, float32: `shared/oracles/llama_gqa`.
    struct Oracle(NamedValues);

    impl Oracle {
        fn get(&self, case: &str, name: &str) -> Array2<i64> {
            let value = self.0.get(&format!("{case}_{name}")).unwrap().clone();
            value.into_i64().unwrap().into_dimensionality().unwrap()
        }

        fn check(&self, case: &str, columns: std::ops::Range<usize>, logits: &Array3<f32>, what: &str) {
            let expected = self.0.get(&format!("{case}_base_logits")).unwrap().clone().into_f32().unwrap();
            let expected = expected.slice_move(s![.., columns.clone(), ..]);
            let mask = self.get(case, "attention_mask").slice_move(s![.., columns]);
            assert_eq!(logits.shape(), expected.shape());
            let visible = mask.insert_axis(Axis(2));
            let mut worst = 0f32;
            for ((index, logit), expected) in logits.indexed_iter().zip(&expected) {
                if visible[[index.0, index.1, 0]] == 1 {
                    worst = worst.max((logit - expected).abs());
                }
            }
            eprintln!("{what} {case}: {worst:.2e}");
            assert!(worst < 1e-4, "{what} {case}: {worst}");
        }
    }

    #[test]
    fn an_exported_llama_gives_the_oracles_logits_at_once_and_step_by_step() {
        let (Some(graph), Some(oracle)) = (
            testing::shared("graphs/optimum_with_past/llama_gqa/model.onnx"),
            testing::shared("oracles/llama_gqa/io.safetensors"),
        ) else {
            return;
        };
        let oracle = Oracle(NamedValues::load(&oracle).unwrap());
        for session in sessions(&graph) {
            let name = session.info().runtime;
            let mut decoder = GraphDecoder::new(session).unwrap();
            assert_eq!(decoder.ports().cached_layers(), 2);
            for case in ["single", "left", "right"] {
                let ids = oracle.get(case, "input_ids");
                let mask = oracle.get(case, "attention_mask");
                assert_eq!(positions(&mask), oracle.get(case, "position_ids"));
                let seq = ids.ncols();
                let logits = decoder.prefill(&ids, &mask).unwrap();
                oracle.check(case, 0..seq, &logits, &format!("{name} at once"));

                let given = oracle.get(case, "position_ids");
                decoder.reset();
                let logits = decoder.extend(&ids, &mask, Some(&given)).unwrap();
                oracle.check(case, 0..seq, &logits, &format!("{name} with given positions"));

                let part = |array: &Array2<i64>, range: std::ops::Range<usize>| array.slice(s![.., range]).to_owned();
                let start = seq / 2;
                let logits = decoder.prefill(&part(&ids, 0..start), &part(&mask, 0..start)).unwrap();
                oracle.check(case, 0..start, &logits, &format!("{name} prefill"));
                for at in start..seq {
                    let logits = decoder.extend(&part(&ids, at..at + 1), &part(&mask, at..at + 1), None).unwrap();
                    oracle.check(case, at..at + 1, &logits, &format!("{name} step {at}"));
                }
            }
        }
    }

    #[test]
    fn an_undeclared_head_size_can_be_stated() {
        let (Some(graph), Some(oracle), Some(library)) = (
            testing::shared("graphs/genai_fp32/llama_gqa/model.onnx"),
            testing::shared("oracles/llama_gqa/io.safetensors"),
            testing::ort_library(),
        ) else {
            return;
        };
        let oracle = Oracle(NamedValues::load(&oracle).unwrap());
        let mut session = OrtSession::open(&library, &graph, OrtOptions::default()).unwrap();
        let error = GraphDecoder::new(&mut session).err().unwrap();
        assert!(error.to_string().contains("does not declare the size of a head"), "{error}");
        let mut decoder = GraphDecoder::with_head_dim(session, 16).unwrap();
        let (ids, mask) = (oracle.get("single", "input_ids"), oracle.get("single", "attention_mask"));
        let logits = decoder.prefill(&ids, &mask).unwrap();
        oracle.check("single", 0..ids.ncols(), &logits, "fused");
    }

    /// optimum's merged decoder: two graphs in one, and an input that says which.
    #[test]
    fn a_merged_decoder_gives_the_oracles_logits_with_and_without_its_cache() {
        let (Some(graph), Some(oracle), Some(library)) = (
            testing::shared("graphs/optimum_merged/llama_gqa/decoder_model_merged.onnx"),
            testing::shared("oracles/llama_gqa/io.safetensors"),
            testing::ort_library(),
        ) else {
            return;
        };
        let oracle = Oracle(NamedValues::load(&oracle).unwrap());
        let session = OrtSession::open(&library, &graph, OrtOptions::default()).unwrap();
        let mut decoder = GraphDecoder::new(session).unwrap();
        let (ids, mask) = (oracle.get("left", "input_ids"), oracle.get("left", "attention_mask"));
        let (seq, half) = (ids.ncols(), ids.ncols() / 2);
        let part = |array: &Array2<i64>, from: usize, to: usize| array.slice(s![.., from..to]).to_owned();
        let logits = decoder.prefill(&part(&ids, 0, half), &part(&mask, 0, half)).unwrap();
        oracle.check("left", 0..half, &logits, "merged, without a past");
        let logits = decoder.extend(&part(&ids, half, seq), &part(&mask, half, seq), None).unwrap();
        oracle.check("left", half..seq, &logits, "merged, with a past");
    }

    /// Ports and nothing behind them.
    struct Ports(Vec<Port>, Vec<Port>);

    impl Session for Ports {
        fn inputs(&self) -> &[Port] {
            &self.0
        }

        fn outputs(&self) -> &[Port] {
            &self.1
        }

        fn info(&self) -> crate::runtime::RuntimeInfo {
            panic!("it is not asked")
        }

        fn run_tensors(&mut self, _: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
            panic!("it is not run")
        }
    }

    fn ports(names: &[&str]) -> Ports {
        let port = |name: &&str, dtype| Port { name: (*name).into(), dtype, dims: vec![Dim::Unknown] };
        let inputs = [IDS, MASK].iter().chain(names).map(|name| port(name, DType::I64)).collect();
        Ports(inputs, vec![port(&LOGITS, DType::F32)])
    }

    #[test]
    fn inputs_that_follow_from_others_are_filled() {
        let ports =
            DecoderPorts::of(&ports(&["num_logits_to_keep", "cache_position", "token_type_ids"]), None).unwrap();
        let fed = ports.extras.iter().map(|extra| extra.feed(2, 3, 2).unwrap().into_i64().unwrap());
        let fed: Vec<_> = fed.map(|array| (array.shape().to_vec(), array.into_iter().collect::<Vec<_>>())).collect();
        assert_eq!(fed, [(vec![1], vec![0]), (vec![2], vec![3, 4]), (vec![2, 2], vec![0; 4])]);
    }

    #[test]
    fn a_graph_that_is_no_decoder_is_refused() {
        let error = DecoderPorts::of(&ports(&["encoder_hidden_states"]), None).unwrap_err().to_string();
        assert!(error.contains("encoder_hidden_states"), "{error}");
        let error = DecoderPorts::of(&ports(&["past_key_values.0.key"]), None).unwrap_err().to_string();
        assert!(error.contains("no output `present.0.key`"), "{error}");
    }
}

//! Running a case: what is fed, call by call, and the logits that come out.

use ndarray::{Array2, Array3, Axis, concatenate, s};

use super::cause::Reading;
use super::figures::{Spot, top1};
use super::{Case, Error, Model, Result};
use crate::base::{Input, KvCache};
use crate::runtime::{GraphDecoder, Session, positions};

/// Tokens that are fed at once, after those of earlier calls.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    /// `[batch, seq]`.
    ids: Array2<i64>,
    /// `[batch, seq]`, 1 where a token is real.
    mask: Array2<i64>,
}

/// Something that runs a decoder with its cache.
pub(super) trait Runner {
    /// Forgets what was decoded before, and takes for each row of the next batch the model of this number.
    ///
    /// # Errors
    /// When there is no such model, or the runtime cannot run these models in one batch.
    fn start(&mut self, models: &[usize]) -> Result<()>;

    /// Feeds the next tokens and gives their logits, `[batch, seq, vocab]`. Positions are counted from the mask so far.
    ///
    /// # Errors
    /// When the model or its runtime fails.
    fn extend(&mut self, call: &Call) -> Result<Array3<f64>>;
}

/// All calls of a case, with the reference's greedy tokens written in.
#[derive(Debug, PartialEq)]
pub(super) struct Script {
    calls: Vec<Call>,
    /// Calls that feed the prompts.
    prefill: usize,
    /// The model of each row.
    models: Vec<usize>,
    /// The compared positions, in the order of the recorded logits.
    pub(super) spots: Vec<Spot>,
    /// The token that follows each spot in its row, where one does.
    pub(super) next: Vec<Option<usize>>,
    /// By generated token, by row: the index among `spots` of the position that picks it.
    pub(super) picks: Vec<Vec<usize>>,
}

impl Script {
    /// A script of calls of which the first `prefill` feed the prompts, for the models of these numbers by row.
    pub(super) fn new(calls: Vec<Call>, prefill: usize, models: &[usize]) -> Self {
        let batch = calls.first().map_or(0, |call| call.ids.nrows());
        let mut script =
            Self { calls: vec![], prefill, models: models.into(), spots: vec![], next: vec![], picks: vec![] };
        let mut last: Vec<Option<usize>> = vec![None; batch];
        let mut columns = 0usize;
        for (index, call) in calls.iter().enumerate() {
            for ((row, last), (ids, mask)) in
                last.iter_mut().enumerate().zip(call.ids.outer_iter().zip(call.mask.outer_iter()))
            {
                for (column, id) in ids.iter().enumerate().filter(|(column, _)| mask[*column] != 0) {
                    if let Some(next) = last.and_then(|before| script.next.get_mut(before)) {
                        *next = usize::try_from(*id).ok();
                    }
                    *last = Some(script.spots.len());
                    script.spots.push(Spot { row, column: columns.saturating_add(column) });
                    script.next.push(None);
                }
            }
            columns = columns.saturating_add(call.ids.ncols());
            if index.saturating_add(1) >= prefill {
                script.picks.push(last.iter().map(|last| last.unwrap_or(0)).collect());
            }
        }
        Self { calls, ..script }
    }

    /// The model of each row.
    pub(super) fn models(&self) -> &[usize] {
        &self.models
    }

    /// Ids and masks, `[batch, seq]`, of each call, and how many calls feed the prompts.
    pub(super) fn calls(&self) -> (impl Iterator<Item = (&Array2<i64>, &Array2<i64>)>, usize) {
        (self.calls.iter().map(|call| (&call.ids, &call.mask)), self.prefill)
    }
}

impl Call {
    pub(super) fn new(ids: Array2<i64>, mask: Array2<i64>) -> Self {
        Self { ids, mask }
    }
}

/// The prompts of a case, in the pieces that it asks for.
fn prompts(case: &Case) -> Vec<Call> {
    let pieces = |array: &Array2<i64>| {
        array.axis_chunks_iter(Axis(1), case.chunk()).map(|piece| piece.to_owned()).collect::<Vec<_>>()
    };
    pieces(case.ids()).into_iter().zip(pieces(case.mask())).map(|(ids, mask)| Call { ids, mask }).collect()
}

/// Runs a case greedily. Gives the script that others replay, and the logits of its spots, `[spots, vocab]`.
pub(super) fn record(runner: &mut dyn Runner, case: &Case, vocab: usize) -> Result<(Script, Array2<f64>)> {
    let mut record = Recording::new(vocab, case.ids().nrows());
    runner.start(case.models())?;
    let mut calls = prompts(case);
    let prefill = calls.len();
    for call in &calls {
        record.add(call, &runner.extend(call)?)?;
    }
    for _ in 0..case.steps() {
        let call = record.next_call();
        record.add(&call, &runner.extend(&call)?)?;
        calls.push(call);
    }
    Ok((Script::new(calls, prefill, case.models()), record.into_logits()?))
}

/// Runs a script. Gives the logits of its spots, `[spots, vocab]`.
pub(super) fn replay(runner: &mut dyn Runner, script: &Script, vocab: usize) -> Result<Array2<f64>> {
    let batch = script.calls.first().map_or(0, |call| call.ids.nrows());
    let mut record = Recording::new(vocab, batch);
    runner.start(&script.models)?;
    for call in &script.calls {
        record.add(call, &runner.extend(call)?)?;
    }
    record.into_logits()
}

/// The logits of the real positions seen so far.
struct Recording {
    vocab: usize,
    /// `[spots, vocab]`.
    logits: Vec<f64>,
    /// By row, the token that is greedy at its last spot.
    greedy: Vec<i64>,
}

impl Recording {
    fn new(vocab: usize, batch: usize) -> Self {
        Self { vocab, logits: Vec::new(), greedy: vec![0; batch] }
    }

    fn add(&mut self, call: &Call, logits: &Array3<f64>) -> Result<()> {
        let (batch, seq) = call.ids.dim();
        if logits.dim() != (batch, seq, self.vocab) {
            return Err(Error::Logits { found: logits.shape().into(), expected: vec![batch, seq, self.vocab] });
        }
        let rows = logits.outer_iter().zip(call.mask.outer_iter()).zip(&mut self.greedy);
        for ((logits, mask), greedy) in rows {
            for (logits, _) in logits.outer_iter().zip(mask).filter(|(_, real)| **real != 0) {
                *greedy = top1(logits) as i64;
                self.logits.extend(logits);
            }
        }
        Ok(())
    }

    fn next_call(&self) -> Call {
        let ids = ndarray::ArrayView1::from(&self.greedy).insert_axis(Axis(1)).to_owned();
        Call { mask: Array2::ones(ids.raw_dim()), ids }
    }

    fn into_logits(self) -> Result<Array2<f64>> {
        let (found, vocab) = (self.logits.len(), self.vocab);
        let spots = found.checked_div(vocab).unwrap_or(0);
        Array2::from_shape_vec((spots, vocab), self.logits)
            .map_err(|_| Error::Logits { found: vec![found], expected: vec![spots, vocab] })
    }
}

/// candle models, of which each row of a batch runs one.
pub(super) struct CandleRunner<'a> {
    models: &'a [Model<'a>],
    reading: Reading,
    parts: Vec<Part<'a>>,
}

/// The rows of a batch that one model runs.
struct Part<'a> {
    model: Model<'a>,
    rows: Vec<usize>,
    cache: KvCache,
    mask: Option<Array2<i64>>,
}

impl<'a> CandleRunner<'a> {
    pub(super) fn new(models: &'a [Model<'a>]) -> Self {
        Self { models, reading: Reading::Faithful, parts: Vec::new() }
    }

    /// The same with another way to read the mask.
    pub(super) fn reading(models: &'a [Model<'a>], reading: Reading) -> Self {
        Self { reading, ..Self::new(models) }
    }
}

impl Runner for CandleRunner<'_> {
    fn start(&mut self, models: &[usize]) -> Result<()> {
        self.parts.clear();
        if let Some(number) = models.iter().find(|number| **number >= self.models.len()) {
            return Err(Error::Option { option: "model", why: format!("{number} is not given") });
        }
        for (number, model) in self.models.iter().enumerate() {
            let rows = models.iter().enumerate().filter(|(_, of_row)| **of_row == number);
            let rows: Vec<usize> = rows.map(|(row, _)| row).collect();
            if !rows.is_empty() {
                let cache = KvCache::new(model.decoder.spec().num_layers);
                self.parts.push(Part { model: *model, rows, cache, mask: None });
            }
        }
        Ok(())
    }

    fn extend(&mut self, call: &Call) -> Result<Array3<f64>> {
        if let [part] = &mut self.parts[..] {
            return part.extend(call, self.reading);
        }
        let vocab = self.models.first().map_or(0, |model| model.decoder.spec().vocab_size);
        let mut all = Array3::zeros((call.ids.nrows(), call.ids.ncols(), vocab));
        for part in &mut self.parts {
            let rows = |array: &Array2<i64>| array.select(Axis(0), &part.rows);
            let logits = part.extend(&Call::new(rows(&call.ids), rows(&call.mask)), self.reading)?;
            for (row, logits) in part.rows.iter().zip(logits.outer_iter()) {
                all.index_axis_mut(Axis(0), *row).assign(&logits);
            }
        }
        Ok(all)
    }
}

impl Part<'_> {
    fn extend(&mut self, call: &Call, reading: Reading) -> Result<Array3<f64>> {
        let mask = match self.mask.take() {
            None => call.mask.clone(),
            Some(seen) => concatenate![Axis(1), seen, call.mask],
        };
        let flat = |array: &Array2<i64>| array.iter().copied().collect::<Vec<_>>();
        let (rows, seq) = call.ids.dim();
        let by_column = Array2::ones(mask.raw_dim());
        let counted = positions(if reading.is_by_column() { &by_column } else { &mask });
        let counted = counted.slice_move(s![.., mask.ncols().saturating_sub(seq)..]);
        let shown = if reading.hides_padding() { &mask } else { &by_column };
        let given = (reading != Reading::Faithful).then(|| flat(&counted));
        let input = Input::new(rows, &flat(&call.ids), &flat(shown), given.as_deref())?;
        self.mask = Some(mask);
        let logits = self.model.decoder.forward(&input, Some(&mut self.cache), self.model.hook)?;
        let expected = [call.ids.nrows(), call.ids.ncols(), self.model.decoder.spec().vocab_size];
        let values = logits
            .to_dtype(candle_core::DType::F64)
            .and_then(|logits| logits.flatten_all()?.to_vec1::<f64>())
            .map_err(|source| Error::Candle { action: "reading logits", source })?;
        Array3::from_shape_vec(expected, values)
            .map_err(|_| Error::Logits { found: logits.dims().into(), expected: expected.into() })
    }
}

/// A graph in a runtime.
pub(super) struct GraphRunner<S> {
    decoder: GraphDecoder<S>,
}

impl<S: Session> GraphRunner<S> {
    /// # Errors
    /// When the graph is not a decoder; see [`GraphDecoder::new`].
    pub(super) fn new(session: S, head_dim: Option<usize>) -> Result<Self> {
        let decoder = match head_dim {
            Some(head_dim) => GraphDecoder::with_head_dim(session, head_dim)?,
            None => GraphDecoder::new(session)?,
        };
        Ok(Self { decoder })
    }

    pub(super) fn session_mut(&mut self) -> &mut S {
        self.decoder.session_mut()
    }

    pub(super) fn into_session(self) -> S {
        self.decoder.into_session()
    }
}

impl<S: Session> Runner for GraphRunner<S> {
    fn start(&mut self, models: &[usize]) -> Result<()> {
        self.decoder.reset();
        Ok(self.decoder.session_mut().activate(models)?)
    }

    fn extend(&mut self, call: &Call) -> Result<Array3<f64>> {
        Ok(self.decoder.extend(&call.ids, &call.mask, None)?.mapv(f64::from))
    }
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;
    use crate::parity::Padding;

    /// Five tokens; the greedy next one is always the last one plus one.
    struct Counting {
        fed: Vec<Call>,
    }

    impl Runner for Counting {
        fn start(&mut self, _: &[usize]) -> Result<()> {
            self.fed.clear();
            Ok(())
        }

        fn extend(&mut self, call: &Call) -> Result<Array3<f64>> {
            self.fed.push(call.clone());
            let (batch, seq) = call.ids.dim();
            let logit = |(row, column, token)| f64::from(u8::from((call.ids[[row, column]] + 1) % 5 == token as i64));
            Ok(Array3::from_shape_fn((batch, seq, 5), logit))
        }
    }

    #[test]
    fn a_script_holds_the_greedy_tokens_and_only_real_positions() {
        for (padding, prefill) in
            [(Padding::Left, [(0, 0), (0, 1), (0, 2), (1, 2)]), (Padding::Right, [(0, 0), (0, 1), (0, 2), (1, 0)])]
        {
            let case = Case::batch("c", &[vec![0, 1, 2], vec![4]], padding, 2).unwrap();
            let mut runner = Counting { fed: Vec::new() };
            let (script, logits) = record(&mut runner, &case, 5).unwrap();
            let fed: Vec<_> = script.calls.iter().skip(1).map(|call| call.ids.clone()).collect();
            assert_eq!(fed, [arr2(&[[3], [0]]), arr2(&[[4], [1]])]);
            let spots: Vec<_> = script.spots.iter().map(|spot| (spot.row, spot.column)).collect();
            assert_eq!(spots, [&prefill[..], &[(0, 3), (1, 3), (0, 4), (1, 4)]].concat());
            assert_eq!(script.picks, [[2, 3], [4, 5], [6, 7]]);
            // The prompt 0, 1, 2 goes on with 3 and 4, the prompt 4 with 0 and 1.
            let next = [1, 2, 3, 0, 4, 1].map(Some);
            assert_eq!(script.next, [&next[..], &[None, None]].concat());
            assert_eq!(logits.outer_iter().map(top1).collect::<Vec<_>>(), [1, 2, 3, 0, 4, 1, 0, 2]);

            let mut other = Counting { fed: vec![script.calls[0].clone()] };
            assert_eq!(replay(&mut other, &script, 5).unwrap(), logits);
            assert_eq!(other.fed, script.calls);
        }
    }

    /// Pieces change what is fed at once and nothing else.
    #[test]
    fn a_prompt_in_pieces_has_the_same_spots() {
        let whole = Case::batch("c", &[vec![0, 1, 2, 3, 4], vec![4, 3]], Padding::Left, 2).unwrap();
        let mut runner = Counting { fed: Vec::new() };
        let (at_once, logits) = record(&mut runner, &whole, 5).unwrap();
        let (pieces, of_pieces) = record(&mut runner, &whole.clone().chunked(2), 5).unwrap();
        let widths: Vec<usize> = runner.fed.iter().map(|call| call.ids.ncols()).collect();
        assert_eq!(widths, [2, 2, 1, 1, 1]);
        let by_place = |script: &Script, logits: &Array2<f64>| {
            let next = script.next.iter().zip(logits.outer_iter().map(top1));
            let mut all: Vec<_> =
                script.spots.iter().map(|s| (s.row, s.column)).zip(next.map(|(n, t)| (*n, t))).collect();
            all.sort();
            all
        };
        assert_eq!(by_place(&pieces, &of_pieces), by_place(&at_once, &logits));
        let picked = |script: &Script| {
            let spots = script.picks.iter().flatten().map(|spot| script.spots[*spot]);
            spots.map(|spot| (spot.row, spot.column)).collect::<Vec<_>>()
        };
        assert_eq!(picked(&pieces), picked(&at_once));
    }

    #[test]
    fn logits_of_another_vocabulary_are_refused() {
        let case = Case::row("c", &[1, 2], 0).unwrap();
        let error = record(&mut Counting { fed: Vec::new() }, &case, 6).unwrap_err().to_string();
        assert_eq!(error, "the logits are [1, 2, 5], the tokens and the model's vocabulary ask for [1, 2, 6]");
    }
}

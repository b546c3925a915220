//! Softmax attention that never holds the scores of more than a few queries, with a backward of its own.
//!
//! As in FlashAttention (arXiv 2205.14135), the forward pass keeps the logarithm of each query's softmax denominator, and
//! the backward pass computes the weights again from it. Keys that no query of a block sees are left out, which for causal
//! attention halves the work.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType};
use rayon::prelude::*;

use super::composed::{self, is_composed};
use super::held::{Held, numbers, tensor};
use super::matmul::{Matrix, Target, Threads, multiply};
use super::real::{Real, max, sum_pairs, vectorised};

/// Which keys each query sees: a range, without keys that no query of the row sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visibility {
    /// `[batch, seq]`.
    ranges: Vec<Range<usize>>,
    /// `[batch, total]`; none where every key of every range is seen.
    hidden: Option<Vec<bool>>,
    batch: usize,
    seq: usize,
    total: usize,
}

impl Visibility {
    /// From the range of each of `[batch, seq]` queries, and the hidden ones of `[batch, total]` keys.
    ///
    /// # Errors
    /// When the numbers do not fit each other.
    pub fn new(batch: usize, total: usize, ranges: Vec<Range<usize>>, hidden: Vec<bool>) -> Result<Self> {
        let seq = ranges.len() / batch.max(1);
        if ranges.len() != batch * seq || hidden.len() != batch * total || ranges.iter().any(|range| range.end > total)
        {
            candle_core::bail!("visibility: {} ranges and {} keys for {batch} rows", ranges.len(), hidden.len());
        }
        let in_range = |row: usize, key: usize| ranges[row * seq..][..seq].iter().any(|range| range.contains(&key));
        let is_hole = |(at, hidden): (usize, &bool)| *hidden && in_range(at / total, at % total);
        let has_holes = hidden.iter().enumerate().any(is_hole);
        Ok(Self { ranges, hidden: has_holes.then_some(hidden), batch, seq, total })
    }

    /// The range of keys that a query sees.
    pub fn of(&self, row: usize, query: usize) -> Range<usize> {
        self.ranges[row * self.seq + query].clone()
    }

    /// Whether a key of a query's range is hidden.
    pub fn is_hidden(&self, row: usize, key: usize) -> bool {
        self.hidden.as_ref().is_some_and(|hidden| hidden[row * self.total + key])
    }

    /// Batch, number of queries and number of keys.
    pub fn sizes(&self) -> [usize; 3] {
        [self.batch, self.seq, self.total]
    }

    /// One where a query sees a key, else zero: `[batch, seq, total]`, u8.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn seen(&self, device: &Device) -> Result<Tensor> {
        let mut seen = vec![0u8; self.batch * self.seq * self.total];
        for (at, (range, seen)) in self.ranges.iter().zip(seen.chunks_exact_mut(self.total.max(1))).enumerate() {
            seen.get_mut(range.clone()).into_iter().flatten().for_each(|seen| *seen = 1);
            if let Some(hidden) = &self.hidden {
                let hidden = &hidden[at / self.seq * self.total..][..self.total];
                seen.iter_mut().zip(hidden).filter(|(_, hidden)| **hidden).for_each(|(seen, _)| *seen = 0);
            }
        }
        Tensor::from_vec(seen, (self.batch, self.seq, self.total), device)
    }

    /// The keys that some of the queries see.
    fn range(&self, row: usize, queries: Range<usize>) -> Range<usize> {
        let ranges = self.ranges[row * self.seq..][queries].iter().filter(|range| !range.is_empty());
        let (first, end) = ranges.fold((usize::MAX, 0), |(first, end), r| (first.min(r.start), end.max(r.end)));
        first.min(end)..end
    }
}

/// `softmax(scale · q·kᵀ) · v`, with `cap · tanh(score / cap)` in the place of the scaled score where there is a soft cap.
/// `query` is `[batch, heads, seq, width]`, `key` and `value` are `[batch, kv_heads, total, width]`; each key-value head
/// serves `heads / kv_heads` query heads. Returns `[batch, heads, seq, width]`, a view of `[batch, seq, heads, width]`. A query that
/// sees no key gets zeros. Half types are computed in float32.
///
/// # Errors
/// When the shapes do not fit.
pub fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    visibility: &Arc<Visibility>,
    scale: f64,
    softcap: Option<f64>,
) -> Result<Tensor> {
    #[cfg(any(test, feature = "cuda"))]
    if crate::base::cuda::takes_attention([query, key, value]) {
        return crate::base::cuda::attention([query, key, value], visibility, scale, softcap);
    }
    if is_composed(query) {
        return composed::attention([query, key, value], visibility, scale, softcap);
    }
    if matches!(query.dtype(), DType::F16 | DType::BF16) {
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let mixed = attention(&wide(query)?, &wide(key)?, &wide(value)?, visibility, scale, softcap)?;
        return mixed.to_dtype(query.dtype());
    }
    let op = Attention::new(visibility, scale, softcap);
    let rows_last = |tensor: &Tensor| -> Result<Tensor> {
        if tensor.stride().last() == Some(&1) { Ok(tensor.clone()) } else { tensor.contiguous() }
    };
    let mixed = rows_last(query)?.apply_op3(&rows_last(key)?, &rows_last(value)?, op)?;
    mixed.transpose(1, 2)
}

/// [`attention`] of queries, keys and values that lie beside each other: `qkv` of `[batch, seq, num_heads + 2 · kv_heads, width]`.
/// Returns `[batch, seq, num_heads, width]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn attention_packed(
    qkv: &Tensor,
    kv_heads: usize,
    visibility: &Arc<Visibility>,
    scale: f64,
    softcap: Option<f64>,
) -> Result<Tensor> {
    #[cfg(any(test, feature = "cuda"))]
    if crate::base::cuda::takes_attention([qkv; 3]) {
        return crate::base::cuda::attention_packed(qkv, kv_heads, visibility, scale, softcap);
    }
    if is_composed(qkv) || matches!(qkv.dtype(), DType::F16 | DType::BF16) {
        let heads = qkv.dim(2)?.saturating_sub(2 * kv_heads);
        let part = |start, count| qkv.narrow(2, start, count)?.transpose(1, 2);
        let (query, key) = (part(0, heads)?, part(heads, kv_heads)?);
        let mixed = attention(&query, &key, &part(heads + kv_heads, kv_heads)?, visibility, scale, softcap)?;
        return mixed.transpose(1, 2);
    }
    qkv.contiguous()?.apply_op1(Packed { attention: Attention::new(visibility, scale, softcap), kv_heads })
}

struct Attention {
    visibility: Arc<Visibility>,
    scale: f64,
    softcap: Option<f64>,
    /// `ln Σ exp(score)` of each query, `[batch, heads, seq]`, in float64; set by the forward pass.
    denominators: Mutex<Option<Arc<Vec<f64>>>>,
}

/// Queries that are worked on together.
const BLOCK: usize = 64;

/// A `[batch, heads, length, width]` tensor with dense rows.
#[derive(Clone, Copy)]
struct Heads<'a, T> {
    data: &'a [T],
    strides: [usize; 3],
    width: usize,
}

impl<'a, T> Heads<'a, T> {
    fn new(data: &'a [T], layout: &Layout) -> Result<Self> {
        let (_, _, _, width) = layout.shape().dims4()?;
        match (layout.stride(), data.get(layout.start_offset()..)) {
            ([batch, head, row, 1], Some(data)) => Ok(Self { data, strides: [*batch, *head, *row], width }),
            _ => candle_core::bail!("attention: rows of {:?} are not dense", layout.shape()),
        }
    }

    /// The rows of one head as a matrix.
    fn rows(&self, batch: usize, head: usize, rows: Range<usize>) -> Matrix<'a, T> {
        let [by_batch, by_head, by_row] = self.strides;
        let start = batch * by_batch + head * by_head + rows.start * by_row;
        let data = self.data.get(start..).unwrap_or_default();
        Matrix::strided(data, rows.len(), self.width, by_row)
    }
}

/// Sizes of a call.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    seq: usize,
    total: usize,
    width: usize,
}

impl Sizes {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Query blocks of a sequence.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let seq = self.seq;
        (0..seq).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(seq))
    }
}

impl Attention {
    fn new(visibility: &Arc<Visibility>, scale: f64, softcap: Option<f64>) -> Self {
        Self { visibility: visibility.clone(), scale, softcap, denominators: Mutex::new(None) }
    }

    fn keep(&self, denominators: Vec<f64>) {
        *self.denominators.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(denominators));
    }

    fn kept(&self) -> Result<Arc<Vec<f64>>> {
        let kept = self.denominators.lock().unwrap_or_else(PoisonError::into_inner).clone();
        kept.ok_or_else(|| candle_core::Error::msg("attention: its forward pass has not run"))
    }

    fn sizes(&self, query: &Shape, key: &Shape, value: &Shape) -> Result<Sizes> {
        let ((batch, heads, seq, width), (_, kv_heads, total, _)) = (query.dims4()?, key.dims4()?);
        let seen = &self.visibility;
        let fits = key == value
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads)
            && key.dims() == [batch, kv_heads, total, width]
            && (seen.batch, seen.seq, seen.total) == (batch, seq, total);
        if !fits {
            candle_core::bail!(
                "attention: query {query:?}, key {key:?}, value {value:?}, visibility [{}, {}, {}]",
                seen.batch,
                seen.seq,
                seen.total
            );
        }
        Ok(Sizes { batch, heads, kv_heads, seq, total, width })
    }

    /// Scaled and capped scores of a block of queries, hidden ones minus infinity.
    #[inline(always)]
    fn finish_scores<T: Real>(&self, scores: &mut [T], row: usize, queries: Range<usize>, keys: Range<usize>) {
        let width = keys.len();
        let cap = self.softcap.map(T::of);
        for (scores, query) in scores.chunks_exact_mut(width.max(1)).zip(queries) {
            if let Some(cap) = cap {
                scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
            }
            let seen = &self.visibility.ranges[row * self.visibility.seq + query];
            let first = seen.start.saturating_sub(keys.start).min(width);
            let end = seen.end.saturating_sub(keys.start).clamp(first, width);
            scores[..first].fill(T::neg_infinity());
            scores[end..].fill(T::neg_infinity());
            if let Some(hidden) = &self.visibility.hidden {
                let hidden = &hidden[row * self.visibility.total..][keys.clone()];
                for (s, _) in scores.iter_mut().zip(hidden).filter(|(_, hidden)| **hidden) {
                    *s = T::neg_infinity();
                }
            }
        }
    }

    fn forward<T: Real>(&self, q: Heads<T>, k: Heads<T>, v: Heads<T>, sizes: Sizes) -> (Vec<T>, Vec<f64>) {
        let Sizes { batch, heads, seq, width, .. } = sizes;
        // heads are apart in the output, so each is computed by itself and written to its place afterwards
        let parts: Vec<(Vec<T>, Vec<f64>)> = (0..batch * heads)
            .into_par_iter()
            .map(|task| {
                let (row, head) = (task / heads, task % heads);
                let kv = head / sizes.group();
                let (mut out, mut denominators) = (vec![T::zero(); seq * width], vec![0.0; seq]);
                let mut scores = Vec::new();
                for queries in sizes.blocks() {
                    let keys = self.visibility.range(row, queries.clone());
                    if keys.is_empty() {
                        continue;
                    }
                    self.scores(&mut scores, q.rows(row, head, queries.clone()), k, (row, kv), &queries, &keys);
                    let logs = &mut denominators[queries.clone()];
                    vectorised(
                        #[inline(always)]
                        || softmax_rows(&mut scores, keys.len(), logs),
                    );
                    let out = Target::strided(&mut out[queries.start * width..queries.end * width], width);
                    let weights = Matrix::new(&scores, queries.len(), keys.len());
                    multiply(out, false, T::one(), weights, v.rows(row, kv, keys), Threads::One);
                }
                (out, denominators)
            })
            .collect();
        let mut out = vec![T::zero(); batch * seq * heads * width];
        out.par_chunks_mut(heads * width).enumerate().for_each(|(at, out)| {
            let (row, query) = (at / seq, at % seq);
            for (head, out) in out.chunks_exact_mut(width).enumerate() {
                let (part, _) = &parts[row * heads + head];
                out.copy_from_slice(&part[query * width..][..width]);
            }
        });
        (out, parts.into_iter().flat_map(|(_, denominators)| denominators).collect())
    }

    /// Scores of a block, ready for the softmax.
    fn scores<T: Real>(
        &self,
        scores: &mut Vec<T>,
        queries: Matrix<T>,
        k: Heads<T>,
        (row, kv): (usize, usize),
        block: &Range<usize>,
        keys: &Range<usize>,
    ) {
        scores.clear();
        scores.resize(block.len() * keys.len(), T::zero());
        let keys_of_head = k.rows(row, kv, keys.clone());
        let target = Target::strided(scores, keys.len());
        multiply(target, false, T::of(self.scale), queries, keys_of_head.t(), Threads::One);
        vectorised(
            #[inline(always)]
            || self.finish_scores(scores, row, block.clone(), keys.clone()),
        );
    }

    /// Gradients of query, key and value, dense `[batch, heads, length, width]`.
    fn backward<T: Real>(
        &self,
        [q, k, v, out, grad]: [Heads<T>; 5],
        denominators: &[f64],
        sizes: Sizes,
    ) -> [Vec<T>; 3] {
        let Sizes { batch, heads, kv_heads, seq, total, width } = sizes;
        let group = sizes.group();
        let mut dq = vec![T::zero(); batch * heads * seq * width];
        let mut dk = vec![T::zero(); batch * kv_heads * total * width];
        let mut dv = vec![T::zero(); batch * kv_heads * total * width];
        let tasks = dq.par_chunks_mut(group * seq * width).zip(dk.par_chunks_mut(total * width));
        tasks.zip(dv.par_chunks_mut(total * width)).enumerate().for_each(|(task, ((dq, dk), dv))| {
            let (row, kv) = (task / kv_heads, task % kv_heads);
            let (mut weights, mut ds) = (Vec::new(), Vec::new());
            for (member, dq) in dq.chunks_exact_mut(seq * width).enumerate() {
                let head = kv * group + member;
                let logs = &denominators[(row * heads + head) * seq..][..seq];
                for queries in sizes.blocks() {
                    let keys = self.visibility.range(row, queries.clone());
                    if keys.is_empty() {
                        continue;
                    }
                    let block = q.rows(row, head, queries.clone());
                    let grad = grad.rows(row, head, queries.clone());
                    self.scores(&mut weights, block, k, (row, kv), &queries, &keys);
                    ds.clear();
                    ds.resize(weights.len(), T::zero());
                    let values = v.rows(row, kv, keys.clone());
                    multiply(Target::strided(&mut ds, keys.len()), false, T::one(), grad, values.t(), Threads::One);
                    let dots = row_dots(out.rows(row, head, queries.clone()), grad);
                    let slopes = Slopes { scale: T::of(self.scale), cap: self.softcap.map(T::of) };
                    vectorised(
                        #[inline(always)]
                        || slopes.apply(&mut weights, &mut ds, keys.len(), &logs[queries.clone()], &dots),
                    );
                    let (weights, ds) =
                        (Matrix::new(&weights, queries.len(), keys.len()), Matrix::new(&ds, queries.len(), keys.len()));
                    let span = keys.start * width..keys.end * width;
                    let one = T::one();
                    multiply(Target::strided(&mut dv[span.clone()], width), true, one, weights.t(), grad, Threads::One);
                    multiply(Target::strided(&mut dk[span], width), true, one, ds.t(), block, Threads::One);
                    let dq = Target::strided(&mut dq[queries.start * width..queries.end * width], width);
                    multiply(dq, false, one, ds, k.rows(row, kv, keys), Threads::One);
                }
            }
        });
        [dq, dk, dv]
    }
}

/// Scores to weights, and the logarithm of each row's denominator.
#[inline(always)]
fn softmax_rows<T: Real>(scores: &mut [T], width: usize, logs: &mut [f64]) {
    for (row, log) in scores.chunks_exact_mut(width.max(1)).zip(logs) {
        let largest = max(row);
        if largest == T::neg_infinity() {
            row.fill(T::zero());
            continue;
        }
        row.iter_mut().for_each(|s| *s = (*s - largest).fast_exp());
        let total = sum_pairs(row, row, |e, _| e);
        let inverse = total.recip();
        row.iter_mut().for_each(|e| *e = *e * inverse);
        *log = largest.wide() + total.wide().ln();
    }
}

/// The dot product of each row of two matrices.
fn row_dots<T: Real>(a: Matrix<T>, b: Matrix<T>) -> Vec<T> {
    (0..a.rows())
        .map(|row| {
            vectorised(
                #[inline(always)]
                || sum_pairs(a.row(row), b.row(row), |a, b| a * b),
            )
        })
        .collect()
}

struct Slopes<T> {
    scale: T,
    cap: Option<T>,
}

impl<T: Real> Slopes<T> {
    /// From scores and `grad · vᵀ` to weights `p` and the gradient of `q·kᵀ`, `scale · p · (grad·vᵀ − Σ out·grad)`, times the
    /// cap's slope.
    #[inline(always)]
    fn apply(&self, scores: &mut [T], ds: &mut [T], width: usize, logs: &[f64], dots: &[T]) {
        let rows = scores.chunks_exact_mut(width.max(1)).zip(ds.chunks_exact_mut(width.max(1)));
        for ((scores, ds), (log, dot)) in rows.zip(logs.iter().zip(dots)) {
            if let Some(cap) = self.cap {
                for (s, d) in scores.iter().zip(ds.iter_mut()) {
                    let slope = if s.is_finite() { T::one() - (*s / cap) * (*s / cap) } else { T::zero() };
                    // the dot product belongs to the weights, the slope to the whole
                    *d = (*d - *dot) * slope + *dot;
                }
            }
            let log = T::of(*log);
            for (s, d) in scores.iter_mut().zip(ds) {
                let p = (*s - log).fast_exp();
                *d = self.scale * p * (*d - *dot);
                *s = p;
            }
        }
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes(lq.shape(), lk.shape(), lv.shape())?;
        let (out, denominators) = match (q, k, v) {
            (CpuStorage::F32(q), CpuStorage::F32(k), CpuStorage::F32(v)) => {
                let (out, logs) = self.forward(Heads::new(q, lq)?, Heads::new(k, lk)?, Heads::new(v, lv)?, sizes);
                (CpuStorage::F32(out), logs)
            }
            (CpuStorage::F64(q), CpuStorage::F64(k), CpuStorage::F64(v)) => {
                let (out, logs) = self.forward(Heads::new(q, lq)?, Heads::new(k, lk)?, Heads::new(v, lv)?, sizes);
                (CpuStorage::F64(out), logs)
            }
            _ => candle_core::bail!("attention: inputs are neither all float32 nor all float64"),
        };
        self.keep(denominators);
        Ok((out, (sizes.batch, sizes.seq, sizes.heads, sizes.width).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        fn of<T: Real + WithDType>(op: &Attention, tensors: [&Tensor; 5], logs: &[f64]) -> Result<[Tensor; 3]> {
            let sizes = op.sizes(tensors[0].shape(), tensors[1].shape(), tensors[2].shape())?;
            let guards = tensors.map(|tensor| tensor.storage_and_layout());
            let mut heads = Vec::with_capacity(5);
            for (storage, layout) in &guards {
                let Storage::Cpu(storage) = &**storage else { candle_core::bail!("attention: not on the CPU") };
                heads.push(Heads::new(T::cpu_storage_as_slice(storage)?, layout)?);
            }
            let Ok(heads) = <[Heads<T>; 5]>::try_from(heads) else { candle_core::bail!("attention: five tensors") };
            let [dq, dk, dv] = op.backward(heads, logs, sizes);
            let tensor = |values, of: &Tensor| Tensor::from_vec(values, of.shape(), &Device::Cpu);
            Ok([tensor(dq, tensors[0])?, tensor(dk, tensors[1])?, tensor(dv, tensors[2])?])
        }
        let logs = self.kept()?;
        let (out, grad) = (out.transpose(1, 2)?, grad.contiguous()?.transpose(1, 2)?);
        let tensors = [q, k, v, &out, &grad];
        let [dq, dk, dv] = match q.dtype() {
            DType::F64 => of::<f64>(self, tensors, &logs)?,
            _ => of::<f32>(self, tensors, &logs)?,
        };
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}

struct Packed {
    attention: Attention,
    kv_heads: usize,
}

impl Packed {
    fn sizes(&self, qkv: &Shape) -> Result<Sizes> {
        let (batch, seq, all, width) = qkv.dims4()?;
        let (kv_heads, seen) = (self.kv_heads, &self.attention.visibility);
        let heads = all.saturating_sub(2 * kv_heads);
        let fits = kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads);
        if !fits || (seen.batch, seen.seq, seen.total) != (batch, seq, seq) {
            candle_core::bail!("attention: {qkv:?} of {kv_heads} key heads does not fit the visibility");
        }
        Ok(Sizes { batch, heads, kv_heads, seq, total: seq, width })
    }

    fn forward<T: Real + WithDType>(&self, qkv: &[T], sizes: Sizes) -> Vec<T> {
        let [q, k, v] = sizes.split(qkv);
        let (out, denominators) = self.attention.forward(q, k, v, sizes);
        self.attention.keep(denominators);
        out
    }

    fn backward<T: Real + WithDType>(&self, qkv: &Tensor, out: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let sizes = self.sizes(qkv.shape())?;
        let Sizes { heads, kv_heads, seq, width, .. } = sizes;
        let held = [Held::of(qkv)?, Held::of(out)?, Held::of(grad)?];
        let [q, k, v] = sizes.split(held[0].numbers::<T>()?);
        let of_heads = |data| Heads { data, strides: [seq * heads * width, width, heads * width], width };
        let (out, grad) = (of_heads(held[1].numbers()?), of_heads(held[2].numbers()?));
        let [dq, dk, dv] = self.attention.backward([q, k, v, out, grad], &self.attention.kept()?, sizes);
        let mut all = vec![T::zero(); qkv.elem_count()];
        all.par_chunks_mut(((heads + 2 * kv_heads) * width).max(1)).enumerate().for_each(|(at, row)| {
            let (batch, position) = (at / seq, at % seq);
            let parts = [(&dq, heads), (&dk, kv_heads), (&dv, kv_heads)];
            let sources = parts.into_iter().flat_map(|(part, heads)| (0..heads).map(move |head| (part, heads, head)));
            for (target, (part, heads, head)) in row.chunks_exact_mut(width).zip(sources) {
                let start = ((batch * heads + head) * seq + position) * width;
                target.copy_from_slice(&part[start..start + width]);
            }
        });
        tensor(all, qkv.shape())
    }
}

impl Sizes {
    /// Queries, keys and values of `[batch, seq, heads + 2 · kv_heads, width]`.
    fn split<'a, T>(&self, qkv: &'a [T]) -> [Heads<'a, T>; 3] {
        let row = (self.heads + 2 * self.kv_heads) * self.width;
        [0, self.heads, self.heads + self.kv_heads].map(|head| Heads {
            data: qkv.get(head * self.width..).unwrap_or_default(),
            strides: [self.seq * row, self.width, row],
            width: self.width,
        })
    }
}

impl CustomOp1 for Packed {
    fn name(&self) -> &'static str {
        "attention-packed"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = self.sizes(layout.shape())?;
        let out = match qkv {
            CpuStorage::F32(_) => CpuStorage::F32(self.forward(numbers(qkv, layout)?, sizes)),
            CpuStorage::F64(_) => CpuStorage::F64(self.forward(numbers(qkv, layout)?, sizes)),
            _ => candle_core::bail!("attention: the input is neither float32 nor float64"),
        };
        Ok((out, (sizes.batch, sizes.seq, sizes.heads, sizes.width).into()))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        Ok(Some(match qkv.dtype() {
            DType::F64 => self.backward::<f64>(qkv, out, &grad)?,
            _ => self.backward::<f32>(qkv, out, &grad)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::D;

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;

    type Sees = fn(usize, usize, usize) -> bool;

    const CAUSAL: Sees = |_, query, key| key <= query + 2;

    /// Row 1 has two columns of padding in the middle of its past.
    const HOLES: Sees = |row, query, key| key <= query + 2 && (row == 0 || key == 0 || key > 2);

    /// The queries see what `sees` says in the range from the first key to the last.
    fn visibility(batch: usize, seq: usize, total: usize, sees: Sees) -> Arc<Visibility> {
        let range = |at: usize| {
            let keys = || (0..total).filter(|key| sees(at / seq, at % seq, *key));
            keys().next().unwrap_or(0)..keys().next_back().map_or(0, |last| last + 1)
        };
        let ranges = (0..batch * seq).map(range).collect();
        let hidden = (0..batch * total).map(|at| !sees(at / total, seq, at % total)).collect();
        Arc::new(Visibility::new(batch, total, ranges, hidden).unwrap())
    }

    /// Composed of candle's operations, key-value heads repeated.
    fn composed(q: &Tensor, k: &Tensor, v: &Tensor, seen: &Tensor, scale: f64, cap: Option<f64>) -> Tensor {
        let group = q.dim(1).unwrap() / k.dim(1).unwrap();
        let repeat = |x: &Tensor| {
            let (b, h, t, d) = x.dims4().unwrap();
            let x = x.unsqueeze(2).unwrap().expand((b, h, group, t, d)).unwrap();
            x.reshape((b, h * group, t, d)).unwrap().contiguous().unwrap()
        };
        let (k, v) = (repeat(k), repeat(v));
        let mut scores = (q.contiguous().unwrap().matmul(&k.transpose(2, 3).unwrap()).unwrap() * scale).unwrap();
        if let Some(cap) = cap {
            scores = ((scores / cap).unwrap().tanh().unwrap() * cap).unwrap();
        }
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(seen).unwrap(), D::Minus1).unwrap();
        weights.matmul(&v).unwrap()
    }

    fn bias(seen: Sees, batch: usize, seq: usize, total: usize) -> Tensor {
        let at = |i: usize| if seen(i / (seq * total), i / total % seq, i % total) { 0.0 } else { f64::NEG_INFINITY };
        let values: Vec<f64> = (0..batch * seq * total).map(at).collect();
        Tensor::from_vec(values, (batch, 1, seq, total), &Device::Cpu).unwrap()
    }

    #[test]
    fn it_is_the_composed_form_over_several_blocks() {
        let (batch, heads, kv_heads, width) = (2, 4, 2, 3);
        for (seq, seen) in [(5, CAUSAL), (5, HOLES), (BLOCK + 7, CAUSAL), (BLOCK + 7, HOLES)] {
            let total = seq + 2;
            // a view with heads after the sequence, as the decoder makes it
            let q = numbers(&[batch, seq, heads, width], 0.0).transpose(1, 2).unwrap();
            let k = numbers(&[batch, kv_heads, total, width], 1.0);
            let v = numbers(&[batch, kv_heads, total, width], 2.0);
            let visibility = visibility(batch, seq, total, seen);
            for cap in [None, Some(0.7)] {
                let found = attention(&q, &k, &v, &visibility, 1.3, cap).unwrap();
                let expected = composed(&q, &k, &v, &bias(seen, batch, seq, total), 1.3, cap);
                assert!(max_difference(&found, &expected) < 1e-13);
                let narrow = [&q, &k, &v].map(|t| t.to_dtype(DType::F32).unwrap());
                let narrow = attention(&narrow[0], &narrow[1], &narrow[2], &visibility, 1.3, cap).unwrap();
                assert!(max_difference(&narrow.to_dtype(DType::F64).unwrap(), &expected) < 1e-6);
            }
        }
    }

    #[test]
    fn gradients_are_exact() {
        let (q, k, v) = (numbers(&[2, 4, 3, 2], 0.0), numbers(&[2, 2, 5, 2], 1.0), numbers(&[2, 2, 5, 2], 2.0));
        for seen in [CAUSAL, HOLES] {
            let visibility = visibility(2, 3, 5, seen);
            for cap in [None, Some(0.7)] {
                check_gradient(&q, |q| attention(q, &k, &v, &visibility, 1.3, cap));
                check_gradient(&k, |k| attention(&q, k, &v, &visibility, 1.3, cap));
                check_gradient(&v, |v| attention(&q, &k, v, &visibility, 1.3, cap));
            }
        }
    }

    /// Several blocks of queries, against the composed form's gradients.
    #[test]
    fn gradients_of_blocks_add_up() {
        let seq = BLOCK + 3;
        let visibility = visibility(1, seq, seq, |_, query, key| key <= query);
        let vars = [0.0, 1.0, 2.0].map(|seed| candle_core::Var::from_tensor(&numbers(&[1, 2, seq, 4], seed)).unwrap());
        let [q, k, v] = [&vars[0], &vars[1], &vars[2]].map(|var| var.as_tensor());
        let bias = bias(|_, query, key| key <= query, 1, seq, seq);
        let gradients = |y: Tensor| (y * numbers(&[1, 2, seq, 4], 0.3)).unwrap().sum_all().unwrap().backward().unwrap();
        let found = gradients(attention(q, k, v, &visibility, 0.5, None).unwrap());
        let expected = gradients(composed(q, k, v, &bias, 0.5, None));
        for var in &vars {
            assert!(max_difference(found.get(var).unwrap(), expected.get(var).unwrap()) < 1e-13);
        }
    }

    #[test]
    fn packed_inputs_give_what_separate_ones_give() {
        let (heads, kv_heads, seq) = (4, 2, 5);
        let qkv = numbers(&[2, seq, heads + 2 * kv_heads, 2], 0.0);
        let visibility = visibility(2, seq, seq, |_, query, key| key <= query);
        for cap in [None, Some(0.7)] {
            let part = |start, count| qkv.narrow(2, start, count).unwrap().transpose(1, 2).unwrap();
            let (q, k, v) = (part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads));
            let expected = attention(&q, &k, &v, &visibility, 1.3, cap).unwrap().transpose(1, 2).unwrap();
            let found = attention_packed(&qkv, kv_heads, &visibility, 1.3, cap).unwrap();
            assert_eq!(max_difference(&found, &expected), 0.0);
            check_gradient(&qkv, |qkv| attention_packed(qkv, kv_heads, &visibility, 1.3, cap));
        }
    }

    #[test]
    fn a_query_that_sees_nothing_gets_zeros_and_no_gradient() {
        let visibility = visibility(1, 2, 2, |_, query, key| query >= 1 && key <= query);
        let x = numbers(&[1, 1, 2, 2], 0.0);
        let found = attention(&x, &x, &x, &visibility, 1.0, None).unwrap();
        assert_eq!(found.get(0).unwrap().get(0).unwrap().get(0).unwrap().to_vec1::<f64>().unwrap(), [0.0, 0.0]);
        check_gradient(&x, |q| attention(q, &x, &x, &visibility, 1.0, None));
    }
}

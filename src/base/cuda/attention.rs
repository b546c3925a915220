//! Softmax attention.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::{DType, Device, DeviceLocation, Result, Storage, Tensor};

use super::computed;
use super::launch::{Argument, Call, GRAIN, Source, Tiling, int, is_vector, long, tensor};
use crate::base::ops::Visibility;

/// Rows that a block works on.
const ROWS: usize = 64;

/// Threads of a block.
const THREADS: usize = 128;

/// The widest head.
const WIDEST: usize = 256;

impl Tiling {
    fn of(real: DType, width: usize) -> Self {
        let is_half = real != DType::F32;
        let columns = |until: usize, many, few| if width.next_multiple_of(16) <= until { many } else { few };
        let (forward_keys, query_keys, key_queries) = match is_half {
            true => (columns(128, 64, 32), columns(64, 64, 32), columns(64, 64, 32)),
            false => (columns(64, 32, 16), columns(64, 32, 16), columns(64, 32, 16)),
        };
        let stages = if is_half { 2 } else { 1 };
        Self { width, stages, forward_keys, query_keys, key_queries, parts: columns(128, 1, 2) }
    }

    /// Bytes of shared memory for tiles of `own` rows and of `columns` in stages, with `extra` numbers of 32 bits for each column.
    fn shared(&self, real: DType, own: usize, columns: usize, extra: usize) -> usize {
        let size = real.size_in_bytes();
        let stride = self.width.next_multiple_of(16) + 16 / size;
        let scratch = if real == DType::F32 { ROWS * (columns + 4) * 4 } else { 0 };
        (own + self.stages * 2 * columns) * stride * size + self.stages * columns * extra * 4 + scratch
    }

    fn forward(&self, real: DType) -> usize {
        self.shared(real, ROWS, self.forward_keys, 0)
    }

    fn queries(&self, real: DType) -> usize {
        self.shared(real, 2 * ROWS, self.query_keys, 0)
    }

    fn keys(&self, real: DType) -> usize {
        self.shared(real, 2 * ROWS, self.key_queries, 4)
    }
}

/// Whether there are kernels for it: all of one type, heads of up to 256 numbers, tiles that the device has shared memory for.
pub(crate) fn takes_attention([query, key, value]: [&Tensor; 3]) -> bool {
    let (Ok((_, _, _, width)), real) = (query.dims4(), query.dtype()) else { return false };
    if !super::takes(query) || width == 0 || width > WIDEST || key.dtype() != real || value.dtype() != real {
        return false;
    }
    let tiling = Tiling::of(real, width);
    let needed = tiling.forward(real).max(tiling.queries(real)).max(tiling.keys(real));
    match query.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::device::shared_limit(device).is_ok_and(|limit| needed <= limit),
        // what the largest devices have
        _ => needed <= 227 << 10,
    }
}

/// See [`attention`](crate::base::ops::attention()).
pub(crate) fn attention(
    [query, key, value]: [&Tensor; 3],
    visibility: &Arc<Visibility>,
    scale: f64,
    softcap: Option<f64>,
) -> Result<Tensor> {
    let ((batch, heads, seq, width), (_, kv_heads, total, _)) = (query.dims4()?, key.dims4()?);
    if key.dims() != value.dims()
        || key.dims() != [batch, kv_heads, total, width]
        || kv_heads == 0
        || !heads.is_multiple_of(kv_heads)
        || visibility.sizes() != [batch, seq, total]
    {
        let (query, key, value) = (query.dims(), key.dims(), value.dims());
        candle_core::bail!("attention: query {query:?}, key {key:?}, value {value:?}, {:?}", visibility.sizes());
    }
    let rows_last = |tensor: &Tensor| -> Result<Tensor> {
        if tensor.stride().last() == Some(&1) { Ok(tensor.clone()) } else { tensor.contiguous() }
    };
    let tensors = [rows_last(query)?, rows_last(key)?, rows_last(value)?];
    let [query, key, value] = &tensors;
    let sizes = Sizes { batch, heads, kv_heads, seq, total, width, real: query.dtype() };
    let seen = Seen::of(visibility, query.device())?;
    let of = Attention { sizes, seen, scale: scale as f32, cap: softcap.unwrap_or(0.0) as f32 };
    let (made, logs) = of.forward([query, key, value])?;
    let shape = (batch, seq, heads, width);
    let y = computed::of_three([query, key, value], "attention", made, shape, move |inputs, out, grad| {
        let grad = grad.contiguous()?;
        let dots = of.dots(out, &grad)?;
        let given = [&grad, &logs, &dots];
        let [mut by_query, mut by_key, mut by_value] = [const { None }; 3];
        if inputs[0].track_op() {
            let output = (of.sizes.real, batch * seq * heads * width);
            let [dq] = of.queries(inputs, given, 0, heads * width)?.run([output])?;
            by_query = Some(tensor(dq, shape).transpose(1, 2)?);
        }
        if inputs[1].track_op() || inputs[2].track_op() {
            let outputs = [(Argument::Output(0), 0), (Argument::Output(1), 0)];
            let output = (of.sizes.real, batch * total * kv_heads * width);
            let [dk, dv] = of.keys(inputs, given, outputs, kv_heads * width)?.run([output, output])?;
            let gradient = |storage| tensor(storage, (batch, total, kv_heads, width)).transpose(1, 2);
            (by_key, by_value) = (Some(gradient(dk)?), Some(gradient(dv)?));
        }
        Ok([by_query, by_key, by_value])
    })?;
    y.transpose(1, 2)
}

/// See [`attention_packed`](crate::base::ops::attention_packed()).
pub(crate) fn attention_packed(
    qkv: &Tensor,
    kv_heads: usize,
    visibility: &Arc<Visibility>,
    scale: f64,
    softcap: Option<f64>,
) -> Result<Tensor> {
    let (batch, seq, all, width) = qkv.dims4()?;
    let heads = all.saturating_sub(2 * kv_heads);
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) || visibility.sizes() != [batch, seq, seq] {
        candle_core::bail!("attention: {:?} of {kv_heads} key heads does not fit the visibility", qkv.dims());
    }
    let qkv = qkv.contiguous()?;
    let sizes = Sizes { batch, heads, kv_heads, seq, total: seq, width, real: qkv.dtype() };
    let seen = Seen::of(visibility, qkv.device())?;
    let of = Attention { sizes, seen, scale: scale as f32, cap: softcap.unwrap_or(0.0) as f32 };
    let split = move |qkv: &Tensor| -> Result<[Tensor; 3]> {
        let part = |start, count| qkv.detach().narrow(2, start, count)?.transpose(1, 2);
        Ok([part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?])
    };
    let parts = split(&qkv)?;
    let (made, logs) = of.forward([&parts[0], &parts[1], &parts[2]])?;
    drop(parts);
    computed::of_one(&qkv, "attention", made, (batch, seq, heads, width), move |[qkv], out, grad| {
        let (grad, [q, k, v]) = (grad.contiguous()?, split(qkv)?);
        let dots = of.dots(out, &grad)?;
        let (inputs, given) = ([&q, &k, &v], [&grad, &logs, &dots]);
        let output = (of.sizes.real, batch * seq * all * width);
        let [mut by_qkv] = of.queries(inputs, given, 0, all * width)?.run([output])?;
        let outputs = [heads, heads + kv_heads].map(|first| (Argument::Output(0), first * width));
        of.keys(inputs, given, outputs, all * width)?.run_on(&mut by_qkv)?;
        Ok([Some(tensor(by_qkv, qkv.shape()))])
    })
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    seq: usize,
    total: usize,
    width: usize,
    real: DType,
}

struct Attention {
    sizes: Sizes,
    seen: Seen,
    scale: f32,
    /// Zero for none.
    cap: f32,
}

impl Attention {
    fn call<'a>(&self, entry: &'static str, grid: [usize; 3], shared: usize, arguments: Vec<Argument<'a>>) -> Call<'a> {
        let Sizes { width, real, .. } = self.sizes;
        let source = Source::Attention(Tiling::of(real, width));
        Call { source, real, entry, grid, block: [THREADS, 1], shared, arguments }
    }

    /// What all kernels but one end with.
    fn common<'a>(&'a self, inputs: [&Tensor; 3]) -> Result<Vec<Argument<'a>>> {
        let Sizes { heads, kv_heads, seq, total, width, .. } = self.sizes;
        let mut arguments = vec![Argument::Input(&self.seen.ranges), Argument::Input(&self.seen.tiles)];
        arguments.push(self.seen.hidden.as_ref().into());
        for size in [heads, kv_heads, seq, total] {
            arguments.push(int(size)?);
        }
        arguments.extend(inputs.iter().flat_map(|tensor| &tensor.stride()[..3]).map(|stride| long(*stride)));
        arguments.extend([Argument::F32(self.scale), Argument::F32(self.cap), is_vector(&inputs, &[width]).into()]);
        Ok(arguments)
    }

    /// `[batch, seq, heads, width]`, and the logarithms of the denominators.
    fn forward(&self, inputs: [&Tensor; 3]) -> Result<(Storage, Tensor)> {
        let Sizes { batch, heads, seq, width, real, .. } = self.sizes;
        let mut arguments = inputs.map(Argument::Input).to_vec();
        arguments.extend([Argument::Output(0), Argument::Output(1)]);
        arguments.extend(self.common(inputs)?);
        let shared = Tiling::of(real, width).forward(real);
        let call = self.call("attention_forward", [seq.div_ceil(ROWS), heads, batch], shared, arguments);
        let [out, logs] = call.run([(real, batch * seq * heads * width), (DType::F32, batch * heads * seq)])?;
        Ok((out, tensor(logs, (batch, heads, seq))))
    }

    /// `Σ out · grad` of each query.
    fn dots(&self, out: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let Sizes { batch, heads, seq, .. } = self.sizes;
        let rows = batch * seq * heads;
        let mut arguments = vec![Argument::Input(out), Argument::Input(grad), Argument::Output(0)];
        arguments.extend([int(heads)?, int(seq)?, int(rows)?]);
        let call = self.call("attention_dots", [rows.div_ceil(THREADS / 32), 1, 1], 0, arguments);
        let [dots] = call.run([(DType::F32, rows)])?;
        Ok(tensor(dots, (batch, heads, seq)))
    }

    /// The gradient of the queries, from `start` on in positions of `row` numbers. `given` are the gradient of the result, the
    /// logarithms of the denominators, and [`dots`](Self::dots).
    fn queries<'a>(
        &'a self,
        inputs: [&'a Tensor; 3],
        given: [&'a Tensor; 3],
        start: usize,
        row: usize,
    ) -> Result<Call<'a>> {
        let Sizes { batch, heads, seq, width, real, .. } = self.sizes;
        let mut arguments: Vec<Argument> = inputs.into_iter().chain(given).map(Argument::Input).collect();
        arguments.extend([Argument::Output(0), long(start), long(row)]);
        arguments.extend(self.common(inputs)?);
        let shared = Tiling::of(real, width).queries(real);
        Ok(self.call("attention_queries", [seq.div_ceil(ROWS), heads, batch], shared, arguments))
    }

    /// The gradients of keys and values, each in its output from its start on.
    fn keys<'a>(
        &'a self,
        inputs: [&'a Tensor; 3],
        given: [&'a Tensor; 3],
        [keys, values]: [(Argument<'a>, usize); 2],
        row: usize,
    ) -> Result<Call<'a>> {
        let Sizes { batch, kv_heads, total, width, real, .. } = self.sizes;
        let tiling = Tiling::of(real, width);
        let mut arguments: Vec<Argument> = inputs.into_iter().chain(given).map(Argument::Input).collect();
        arguments.extend([keys.0, values.0, long(keys.1), long(values.1), long(row)]);
        arguments.extend(self.common(inputs)?);
        let grid = [total.div_ceil(ROWS), kv_heads, batch * tiling.parts];
        Ok(self.call("attention_keys", grid, tiling.keys(real), arguments))
    }
}

/// A visibility on a device.
#[derive(Clone)]
struct Seen {
    /// The first and the end of the keys of each query, `[batch, seq, 2]`.
    ranges: Tensor,
    /// For each [`GRAIN`] queries the first and the end of what some see, and of what all see, `[batch, entries, 4]`.
    tiles: Tensor,
    /// `[batch, total]`; none where no key is hidden.
    hidden: Option<Tensor>,
}

/// What was brought to devices and is in use.
static SEEN: Mutex<Vec<(Weak<Visibility>, DeviceLocation, Seen)>> = Mutex::new(Vec::new());

impl Seen {
    /// All layers of a pass share a visibility, which is brought to the device once.
    fn of(visibility: &Arc<Visibility>, device: &Device) -> Result<Self> {
        let mut known = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |of: &Weak<Visibility>| std::ptr::eq(of.as_ptr(), Arc::as_ptr(visibility));
        if let Some((.., seen)) = known.iter().find(|(of, at, _)| is_it(of) && *at == device.location()) {
            return Ok(seen.clone());
        }
        known.retain(|(of, ..)| of.strong_count() > 0);
        let seen = Self::new(visibility, device)?;
        known.push((Arc::downgrade(visibility), device.location(), seen.clone()));
        Ok(seen)
    }

    fn new(visibility: &Visibility, device: &Device) -> Result<Self> {
        let [batch, seq, total] = visibility.sizes();
        let (mut ranges, mut tiles) = (Vec::with_capacity(batch * seq * 2), Vec::new());
        for row in 0..batch {
            for first in (0..seq).step_by(GRAIN) {
                let [mut from, mut to, mut all_from, mut all_to] = [total, 0, 0, total];
                for query in first..(first + GRAIN).min(seq) {
                    let range = visibility.of(row, query);
                    if !range.is_empty() {
                        (from, to) = (from.min(range.start), to.max(range.end));
                    }
                    (all_from, all_to) = (all_from.max(range.start), all_to.min(range.end));
                    ranges.extend([range.start, range.end].map(|key| key as u32));
                }
                tiles.extend([from, to, all_from, all_to].map(|key| key as u32));
            }
        }
        let hidden: Vec<u8> =
            (0..batch * total).map(|at| visibility.is_hidden(at / total, at % total).into()).collect();
        let hidden = hidden.contains(&1).then(|| Tensor::from_vec(hidden, (batch, total), device)).transpose()?;
        let ranges = Tensor::from_vec(ranges, (batch, seq, 2), device)?;
        Ok(Self { ranges, tiles: Tensor::from_vec(tiles, (batch, seq.div_ceil(GRAIN), 4), device)?, hidden })
    }
}

/// Tilings of heads of usual sizes.
#[cfg(test)]
pub(super) fn tilings(real: DType) -> impl Iterator<Item = Tiling> {
    [32, 64, 80, 96, 128, 256].into_iter().map(move |width| Tiling::of(real, width))
}

//! The operations composed of candle's own steps, for devices other than the CPU.
//!
//! They hold more in memory than the operations that they stand for and take more passes over it, but compute the same.

use std::cell::Cell;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, DType, Layout, Result, Shape, Storage, Tensor};

use super::cross_entropy::{LabelLoss, LogitMap};
use super::{NormWeights, Visibility};
use crate::base::NormKind;

thread_local! {
    static FORCED: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, the operations of its thread are composed on the CPU too: what other devices compute, for tests of it.
#[derive(Debug)]
pub struct Composed {
    before: bool,
}

impl Composed {
    /// Composes the operations of this thread.
    pub fn on_this_thread() -> Self {
        Self { before: FORCED.replace(true) }
    }
}

impl Drop for Composed {
    fn drop(&mut self) {
        FORCED.set(self.before);
    }
}

/// Whether operations on CPU tensors are composed as well.
pub(crate) fn is_forced() -> bool {
    FORCED.get()
}

/// Whether an operation on `x` is composed.
pub(super) fn is_composed(x: &Tensor) -> bool {
    !x.device().is_cpu() || is_forced()
}

/// `x` in the type that half types are computed in.
fn wide(x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F64 { Ok(x.clone()) } else { x.to_dtype(DType::F32) }
}

/// Without the bias.
pub(super) fn norm(x: &Tensor, weights: &NormWeights) -> Result<Tensor> {
    let NormWeights { norm, weight, .. } = weights;
    let (rows, weight) = (wide(x)?, wide(weight)?);
    let centred = match norm.kind {
        NormKind::Layer => rows.broadcast_sub(&rows.mean_keepdim(D::Minus1)?)?,
        NormKind::Rms => rows,
    };
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + norm.epsilon)?.sqrt()?)?;
    normed.broadcast_mul(&(weight + norm.weight_offset)?)?.to_dtype(x.dtype())
}

/// See [`rope`](super::rope()).
pub(super) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, interleaved: bool) -> Result<Tensor> {
    let (batch, seq, heads, width) = x.dims4()?;
    let half = cos.dim(D::Minus1)?;
    if cos.dims() != [batch, seq, half] || sin.dims() != cos.dims() || half == 0 || 2 * half > width {
        candle_core::bail!("rope: angles {:?} do not fit input {:?}", cos.dims(), x.dims());
    }
    let (turning, rest) = (wide(&x.narrow(3, 0, 2 * half)?)?, x.narrow(3, 2 * half, width - 2 * half)?);
    let (cos, sin) = (wide(&cos.unsqueeze(2)?)?, wide(&sin.unsqueeze(2)?)?);
    let turned = |first: &Tensor, second: &Tensor| -> Result<[Tensor; 2]> {
        Ok([
            (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
            (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?,
        ])
    };
    let turning = if interleaved {
        let pairs = turning.reshape((batch, seq, heads, half, 2))?;
        let [first, second] = turned(&pairs.narrow(4, 0, 1)?.squeeze(4)?, &pairs.narrow(4, 1, 1)?.squeeze(4)?)?;
        Tensor::stack(&[first, second], 4)?.reshape((batch, seq, heads, 2 * half))?
    } else {
        Tensor::cat(&turned(&turning.narrow(3, 0, half)?, &turning.narrow(3, half, half)?)?, 3)?
    };
    let turning = turning.to_dtype(x.dtype())?;
    if width == 2 * half { Ok(turning) } else { Tensor::cat(&[&turning, &rest], 3) }
}

/// See [`attention`](super::attention()); holds the scores of all queries. Returns `[batch, heads, seq, width]`.
pub(super) fn attention(
    [query, key, value]: [&Tensor; 3],
    visibility: &Visibility,
    scale: f64,
    softcap: Option<f64>,
) -> Result<Tensor> {
    let ((batch, heads, seq, width), (_, kv_heads, total, _)) = (query.dims4()?, key.dims4()?);
    if key.dims() != value.dims()
        || key.dims() != [batch, kv_heads, total, width]
        || !heads.is_multiple_of(kv_heads.max(1))
        || visibility.sizes() != [batch, seq, total]
    {
        let (query, key, value) = (query.dims(), key.dims(), value.dims());
        candle_core::bail!("attention: query {query:?}, key {key:?}, value {value:?}, {:?}", visibility.sizes());
    }
    let group = heads / kv_heads.max(1);
    let rows = wide(query)?.contiguous()?.reshape((batch, kv_heads, group * seq, width))?;
    let (keys, values) = (wide(key)?.contiguous()?, wide(value)?.contiguous()?);
    let scores = (rows.matmul(&keys.t()?)? * scale)?.reshape((batch, kv_heads, group, seq, total))?;
    let scores = match softcap {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let seen = visibility.seen(query.device())?.to_dtype(scores.dtype())?.reshape((batch, 1, 1, seq, total))?;
    // a query without keys has weights of zero, not of nothing through nothing
    let hidden = seen.affine(HIDDEN, -HIDDEN)?;
    let scores = scores.broadcast_add(&hidden)?;
    let largest = scores.detach().max_keepdim(D::Minus1)?;
    let weights = scores.broadcast_sub(&largest)?.exp()?.broadcast_mul(&seen)?;
    let totals = weights.sum_keepdim(D::Minus1)?;
    let none = totals.detach().eq(0.0)?.to_dtype(totals.dtype())?;
    let weights = weights.broadcast_div(&(totals + none)?)?.reshape((batch, kv_heads, group * seq, total))?;
    weights.matmul(&values)?.reshape((batch, heads, seq, width))?.to_dtype(query.dtype())
}

/// Taken off the scores of hidden keys: far below any score, and far from the largest float32.
const HIDDEN: f64 = 1e30;

/// See [`logits_loss`](super::logits_loss()).
pub(super) fn logits_loss(logits: &Tensor, targets: &[u32]) -> Result<LabelLoss> {
    let logits = wide(logits)?;
    let predicted = logits.detach().argmax(1)?;
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let largest = logits.detach().max_keepdim(1)?;
    let totals = logits.broadcast_sub(&largest)?.exp()?.sum(1)?.log()?;
    let nll = ((totals + largest.squeeze(1)?)? - logits.contiguous()?.gather(&targets, 1)?.squeeze(1)?)?;
    Ok(LabelLoss { nll, predicted })
}

/// See [`label_loss`](super::label_loss()): of a map that is not trained. Logits live for some rows at a time, and gradients of
/// the hidden states are taken while they do.
pub(super) fn label_loss(hidden: &Tensor, map: &LogitMap, targets: &[u32]) -> Result<LabelLoss> {
    let (rows, _) = hidden.dims2()?;
    let vocab = map.weight.dim(0)?;
    let chunk = (CHUNK / vocab.max(1)).clamp(1, rows.max(1));
    let (mut losses, mut likeliest, mut slopes) = (Vec::new(), Vec::new(), Vec::new());
    for start in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - start);
        let x = hidden.narrow(0, start, count)?.detach();
        let LabelLoss { nll, predicted } = {
            let targets = targets.get(start..start + count).unwrap_or_default();
            let capped = wide(&map.logits(&x)?)?;
            let loss = logits_loss(&capped, targets)?;
            if hidden.track_op() {
                slopes.push(map.input_gradient(&capped, &loss.nll, targets)?);
            }
            loss
        };
        losses.push(nll);
        likeliest.push(predicted);
    }
    let (nll, predicted) = (Tensor::cat(&losses, 0)?, Tensor::cat(&likeliest, 0)?);
    let nll = match slopes.is_empty() {
        true => nll,
        false => hidden.contiguous()?.apply_op1(Tangent { value: nll, slope: Tensor::cat(&slopes, 0)? })?,
    };
    Ok(LabelLoss { nll, predicted })
}

/// Elements of logits that exist at a time.
const CHUNK: usize = 1 << 27;

impl LogitMap {
    /// The gradient of each row's loss by its hidden state, `[rows, hidden]` in the weight's type, from its capped logits.
    fn input_gradient(&self, logits: &Tensor, nll: &Tensor, targets: &[u32]) -> Result<Tensor> {
        let at = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
        let totals = (nll.unsqueeze(1)? + logits.gather(&at, 1)?)?;
        let ones = Tensor::ones(at.shape(), logits.dtype(), logits.device())?;
        let mut slope = logits.broadcast_sub(&totals)?.exp()?.scatter_add(&at, &ones.neg()?, 1)?;
        if let Some(cap) = self.softcap {
            slope = (slope * (logits / cap)?.sqr()?.affine(-1.0, 1.0)?)?;
        }
        (slope * self.scale)?.to_dtype(self.weight.dtype())?.matmul(&self.weight)
    }
}

/// A value for each row of its input, and its gradient by that row, both made already.
pub(crate) struct Tangent {
    /// `[rows]`.
    pub(crate) value: Tensor,
    /// Like the input.
    pub(crate) slope: Tensor,
}

impl Tangent {
    fn value<S: BackendStorage>(&self, of: impl Fn(&Storage) -> Option<&S>) -> Result<(S, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match of(&storage) {
            Some(storage) => Ok((storage.try_clone(layout)?, self.value.shape().clone())),
            None => candle_core::bail!("tangent: value and input are on different devices"),
        }
    }
}

impl CustomOp1 for Tangent {
    fn name(&self) -> &'static str {
        "tangent"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.value(|storage| if let Storage::Cpu(storage) = storage { Some(storage) } else { None })
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.value(|storage| if let Storage::Cuda(storage) = storage { Some(storage) } else { None })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let slope = wide(&self.slope)?;
        slope.broadcast_mul(&grad.to_dtype(slope.dtype())?.unsqueeze(1)?)?.to_dtype(x.dtype()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Var};

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::super::{Feature, dropout, elu, head_linear, lookup};
    use super::*;
    use crate::base::Norm;

    /// That an operation composed is the operation itself, in value and in the gradient of `x`.
    fn check(x: &Tensor, op: impl Fn(&Tensor) -> Result<Tensor>) {
        let with_gradient = |x: &Tensor| {
            let var = Var::from_tensor(x).unwrap();
            let y = op(var.as_tensor()).unwrap();
            let weights = numbers(y.dims(), 0.7).to_dtype(y.dtype()).unwrap();
            let store = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
            (y.detach(), store.get(&var).unwrap().clone())
        };
        let (value, gradient) = with_gradient(x);
        let (composed, composed_gradient) = {
            let _composed = Composed::on_this_thread();
            check_gradient(x, &op);
            with_gradient(x)
        };
        assert!(max_difference(&value, &composed) < 1e-13);
        assert!(max_difference(&gradient, &composed_gradient) < 1e-13);
    }

    #[test]
    fn norms_and_rotations() {
        let (x, weight) = (numbers(&[2, 3, 2, 8], 0.0), numbers(&[8], 1.0));
        for (kind, weight_offset) in [(NormKind::Rms, 0.0), (NormKind::Rms, 1.0), (NormKind::Layer, 0.0)] {
            let norm = Norm { kind, epsilon: 1e-5, weight_offset, bias: false };
            check(&x, |x| NormWeights { norm, weight: weight.clone(), bias: None }.forward(x));
        }
        let angles = numbers(&[2, 3, 3], 1.0);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        for interleaved in [false, true] {
            check(&x, |x| super::super::rope(x, &cos, &sin, interleaved));
        }
    }

    #[test]
    fn maps_and_features() {
        let x = (numbers(&[2, 3, 4, 4], 0.3) * 2.0).unwrap();
        check(&x, |x| super::super::linear(x, &numbers(&[5, 4], 1.0), None));
        check(&x, elu);
        check(&x, |x| dropout(x, 0.4, 3));
        let m = numbers(&[3, 4, 2], 1.0);
        for feature in [Feature::Identity, Feature::Elu] {
            check(&x, |x| head_linear(x, &m, feature));
            check(&m, |m| head_linear(&x, m, feature));
        }
        check(&numbers(&[5, 3], 0.0), |table| lookup(table, &[4, 0, 4]));
    }

    #[test]
    fn attention_of_groups_windows_padding_and_caps() {
        let (batch, seq, total) = (2, 3, 4);
        // the first query of the second row sees nothing
        let ranges = vec![0..2, 0..3, 1..4, 1..1, 1..3, 2..4];
        let hidden = vec![false, true, false, false, true, false, false, false];
        let seen = Arc::new(Visibility::new(batch, total, ranges, hidden).unwrap());
        let (q, k) = (numbers(&[batch, 4, seq, 5], 0.0), numbers(&[batch, 2, total, 5], 1.0));
        let v = numbers(&[batch, 2, total, 5], 2.0);
        for cap in [None, Some(1.5)] {
            check(&q, |q| super::super::attention(q, &k, &v, &seen, 0.7, cap));
            check(&k, |k| super::super::attention(&q, k, &v, &seen, 0.7, cap));
            check(&v, |v| super::super::attention(&q, &k, v, &seen, 0.7, cap));
        }
        let packed = numbers(&[batch, seq, 4, 5], 0.4);
        let causal = Visibility::new(batch, seq, vec![0..1, 0..2, 0..3, 0..1, 0..2, 0..3], vec![false; 6]).unwrap();
        let causal = Arc::new(causal);
        check(&packed, |qkv| super::super::attention_packed(qkv, 1, &causal, 0.7, None));
    }

    #[test]
    fn losses_of_labels() {
        let (x, targets) = (numbers(&[3, 5], 0.0), [6, 0, 3]);
        for (bias, scale, softcap) in [(None, 1.0, None), (Some(numbers(&[7], 2.0)), 1.5, Some(3.0))] {
            let map = LogitMap { weight: (numbers(&[7, 5], 1.0) * 2.0).unwrap(), bias, scale, softcap };
            check(&x, |x| Ok(super::super::label_loss(x, &map, &targets)?.nll));
            check(&map.logits(&x).unwrap(), |logits| Ok(super::super::logits_loss(logits, &targets)?.nll));
            let trained = |weight: &Tensor| LogitMap { weight: weight.clone(), ..map.clone() };
            check(&map.weight, |weight| Ok(super::super::label_loss(&x, &trained(weight), &targets)?.nll));
        }
    }

    #[test]
    fn half_types_are_computed_in_float32() {
        let _composed = Composed::on_this_thread();
        let (x, weight) = (numbers(&[3, 8], 0.0), numbers(&[8], 1.0));
        let norm = Norm { kind: NormKind::Rms, epsilon: 1e-5, weight_offset: 0.0, bias: false };
        for dtype in [DType::F16, DType::BF16] {
            let normed = |dtype: DType, x: &Tensor| {
                let weight = weight.to_dtype(DType::BF16).unwrap().to_dtype(dtype).unwrap();
                NormWeights { norm, weight, bias: None }.forward(x).unwrap()
            };
            let half = normed(dtype, &x.to_dtype(dtype).unwrap());
            let full = normed(DType::F32, &x.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap());
            let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(wide(&half), wide(&full.to_dtype(dtype).unwrap()));
        }
    }
}

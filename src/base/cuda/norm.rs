//! Root-mean-square and layer normalisation.

use candle_core::{D, Result, Storage, Tensor};

use super::computed;
use super::launch::{Argument, Call, Source, int, is_vector, tensor};
use crate::base::ops::NormWeights;
use crate::base::{Norm, NormKind};

/// Whether there is a kernel for it: nothing of it is trained, and all is of one type.
pub(crate) fn takes_norm(x: &Tensor, weights: &NormWeights) -> bool {
    let tensors = [Some(&weights.weight), weights.bias.as_ref()];
    super::takes(x) && tensors.into_iter().flatten().all(|tensor| !tensor.track_op() && tensor.dtype() == x.dtype())
}

/// See [`NormWeights::forward`].
pub(crate) fn norm(x: &Tensor, weights: &NormWeights) -> Result<Tensor> {
    let x = x.contiguous()?;
    let made = forward(&x, weights)?;
    let weights = weights.clone();
    computed::of_one(&x, "norm", made, x.shape(), move |[x], _, grad| {
        let grad = grad.contiguous()?;
        Ok([Some(tensor(backward(x, &grad, &weights, None)?, x.shape()))])
    })
}

/// The normalised rows of a contiguous `x`.
pub(super) fn forward(x: &Tensor, weights: &NormWeights) -> Result<Storage> {
    let bias = weights.bias.as_ref().map(Tensor::contiguous).transpose()?;
    run(x, &weights.weight.contiguous()?, bias.as_ref(), None, &weights.norm)
}

/// The gradient of a contiguous `x`, given that of the normalised rows, and `more` added to it.
pub(super) fn backward(x: &Tensor, grad: &Tensor, weights: &NormWeights, more: Option<&Tensor>) -> Result<Storage> {
    run(x, &weights.weight.contiguous()?, None, Some((grad, more)), &weights.norm)
}

/// The normalised rows, or the gradient of `x` where that of the rows is given, with what is added to it.
fn run(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    grad: Option<(&Tensor, Option<&Tensor>)>,
    norm: &Norm,
) -> Result<Storage> {
    let width = x.dim(D::Minus1)?;
    let rows = x.elem_count().checked_div(width).unwrap_or(0);
    let mut tensors = vec![x, weight];
    tensors.extend(bias);
    tensors.extend(grad.map(|(grad, _)| grad));
    tensors.extend(grad.and_then(|(_, more)| more));
    let is_vector = is_vector(&tensors, &[width]);
    // a warp for short rows, several rows to a block; a block for long ones
    let chunks = width.div_ceil(16 / x.dtype().size_in_bytes());
    let (block, grid) = match chunks {
        0..=64 => ([32, 4], rows.div_ceil(4)),
        _ => ([chunks.next_multiple_of(32).min(512), 1], rows),
    };
    let mut arguments = vec![Argument::Input(x)];
    match grad {
        Some((grad, more)) => arguments.extend([Argument::Input(grad), Argument::Input(weight), more.into()]),
        None => arguments.extend([Argument::Input(weight), bias.into()]),
    }
    arguments.extend([Argument::Output(0), int(rows)?, int(width)?]);
    arguments.push(int((weight.elem_count() / width.max(1)).max(1))?);
    arguments.push((norm.kind == NormKind::Layer).into());
    arguments.extend([Argument::F64(norm.epsilon), Argument::F64(norm.weight_offset), is_vector.into()]);
    let entry = if grad.is_some() { "norm_backward" } else { "norm_forward" };
    let (source, real) = (Source::Norm, x.dtype());
    let call = Call { source, real, entry, grid: [grid, 1, 1], block, shared: 0, arguments };
    let [y] = call.run([(real, x.elem_count())])?;
    Ok(y)
}

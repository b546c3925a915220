//! Rotary position embedding.

use candle_core::{Result, Storage, Tensor};

use super::computed;
use super::launch::{Argument, Call, Source, grid_of, int, is_vector, long, tensor};

/// See [`rope`](crate::base::ops::rope()).
pub(crate) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, interleaved: bool) -> Result<Tensor> {
    let (batch, seq, _, width) = x.dims4()?;
    let (cos, sin) = (cos.to_dtype(x.dtype())?.contiguous()?, sin.to_dtype(x.dtype())?.contiguous()?);
    let (_, _, half) = cos.dims3()?;
    if cos.dims() != [batch, seq, half] || sin.dims() != cos.dims() || half == 0 || 2 * half > width {
        candle_core::bail!("rope: angles {:?} do not fit input {:?}", cos.dims(), x.dims());
    }
    let x = if x.stride().last() == Some(&1) { x.clone() } else { x.contiguous()? };
    let rotated = x.dim(2)?;
    let made = turn(&x, [&cos, &sin], rotated, interleaved, false)?;
    computed::of_one(&x, "rope", made, x.shape(), move |[x], _, grad| {
        let grad = if grad.stride().last() == Some(&1) { grad.clone() } else { grad.contiguous()? };
        Ok([Some(tensor(turn(&grad, [&cos, &sin], rotated, interleaved, true)?, x.shape()))])
    })
}

/// Turns the first heads of `x`, whose rows are dense, by contiguous angles of its type.
pub(super) fn turn(
    x: &Tensor,
    [cos, sin]: [&Tensor; 2],
    rotated: usize,
    interleaved: bool,
    inverse: bool,
) -> Result<Storage> {
    let ((_, seq, heads, width), half) = (x.dims4()?, cos.dim(2)?);
    let is_vector = is_vector(&[x, cos, sin], &[half, width - 2 * half]);
    let step = if is_vector { 16 / x.dtype().size_in_bytes() } else { 1 };
    let units = x.elem_count() / width * ((width - half) / step);
    let strides = x.stride();
    let arguments = vec![
        Argument::Input(x),
        Argument::Input(cos),
        Argument::Input(sin),
        Argument::Output(0),
        long(units),
        int(seq)?,
        int(heads)?,
        int(rotated)?,
        int(width)?,
        int(half)?,
        long(strides[0]),
        long(strides[1]),
        long(strides[2]),
        interleaved.into(),
        inverse.into(),
        is_vector.into(),
    ];
    let (source, real) = (Source::Rope, x.dtype());
    let call = Call { source, real, entry: "rope", grid: grid_of(units, 256), block: [256, 1], shared: 0, arguments };
    let [y] = call.run([(real, x.elem_count())])?;
    Ok(y)
}

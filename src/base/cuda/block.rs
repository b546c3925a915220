//! The pieces of a layer whose weights are frozen, each as one operation.
//!
//! candle adds the gradient of every operation's input to zeros, and keeps every operation's result: a piece of several steps is
//! one operation here, which keeps what its backward reads and no more. Where something of a piece is trained, its steps are
//! candle's operations.

use candle_core::{D, Result, Storage, Tensor};

use super::launch::tensor;
use super::{computed, gate, norm, rope, takes_norm};
use crate::base::ops::{GatedMlp, InnerMap, MlpBlock, OutputProjection, QkvProjection, Rotation, gated, linear};

/// Whether a map can be in a piece.
pub(crate) fn takes_map(map: &InnerMap) -> bool {
    super::takes(&map.weight) && map.bias.as_ref().is_none_or(|bias| bias.dtype() == map.weight.dtype())
}

/// Whether a map is a matrix and a bias that are frozen, of the type of `x`.
fn is_plain(map: &InnerMap, x: &Tensor) -> bool {
    takes_map(map) && map.weight.dtype() == x.dtype() && map.beside.is_empty() && !map.is_trained()
}

/// `x · weightᵀ` of rows.
fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    rows(x)?.matmul(&weight.t()?)
}

fn rows(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    x.reshape((x.elem_count().checked_div(width).unwrap_or(0), width))
}

fn scaled(x: Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 { Ok(x) } else { x * scale }
}

/// A map as candle's operations.
fn composed(map: &InnerMap, x: &Tensor) -> Result<Tensor> {
    let y = linear(x, &map.weight, map.bias.as_ref())?;
    let (last, width) = (y.rank() - 1, map.weight.dim(0)?);
    map.beside.iter().try_fold(y, |y, (first, low)| {
        let product = (linear(&linear(x, &low.a, None)?, &low.b, None)? * low.scale)?;
        let end = first + low.b.dim(0)?;
        if (*first, end) == (0, width) {
            return y + product;
        }
        let part = |start: usize, end: usize| y.narrow(last, start, end - start);
        let mut parts = vec![(part(*first, end)? + product)?];
        if *first > 0 {
            parts.insert(0, part(0, *first)?);
        }
        if end < width {
            parts.push(part(end, width)?);
        }
        Tensor::cat(&parts, last)
    })
}

/// See [`GatedMlp::forward`] and [`GatedMlp::forward_block`].
pub(crate) fn mlp(x: &Tensor, mlp: &GatedMlp, block: Option<&MlpBlock>) -> Result<Tensor> {
    let maps = [&mlp.gate, &mlp.up, &mlp.down];
    if !maps.iter().all(|map| is_plain(map, x)) || !block.is_none_or(|block| takes_norm(x, &block.norm)) {
        let normed = block.map_or_else(|| Ok(x.clone()), |block| block.norm.forward(x))?;
        let inner = gated(mlp.activation, &composed(&mlp.gate, &normed)?, &composed(&mlp.up, &normed)?)?;
        let y = composed(&mlp.down, &inner)?;
        return match block {
            Some(block) => x + scaled(y, block.scale)?,
            None => Ok(y),
        };
    }
    let x = x.contiguous()?;
    let input = x.detach();
    let scale = block.map_or(1.0, |block| block.scale);
    let normed = match block {
        Some(block) => tensor(norm::forward(&input, &block.norm)?, input.shape()),
        None => input.clone(),
    };
    let (by_gate, by_up) = (product(&normed, &mlp.gate.weight)?, product(&normed, &mlp.up.weight)?);
    drop(normed);
    let inner = tensor(gate::forward(mlp.activation, &by_gate, &by_up)?, by_gate.shape());
    let y = product(&inner, &mlp.down.weight)?;
    drop(inner);
    let made = gate::add_scaled(block.map(|_| &input), &y, None, scale)?;
    let (mlp, norm) = (mlp.clone(), block.map(|block| block.norm.clone()));
    computed::of_one(&x, "gated-mlp", made, input.shape(), move |[x], _, grad| {
        let (x, grad) = (x.detach(), grad.contiguous()?);
        let by_inner = scaled(rows(&grad)?.matmul(&mlp.down.weight)?, scale)?;
        let [of_gate, of_up] = gate::backward(mlp.activation, [&by_gate, &by_up, &by_inner])?;
        drop(by_inner);
        let by_input = (of_gate.matmul(&mlp.gate.weight)? + of_up.matmul(&mlp.up.weight)?)?;
        let dx = match &norm {
            Some(norm) => tensor(norm::backward(&x, &by_input, norm, Some(&grad))?, x.shape()),
            None => by_input.reshape(x.shape())?,
        };
        Ok([Some(dx)])
    })
}

/// Rotation of the first heads of packed ones.
struct Turn {
    /// Contiguous cosines and sines in the type of the heads.
    angles: [Tensor; 2],
    heads: usize,
    interleaved: bool,
}

impl Turn {
    fn run(&self, x: &Tensor, inverse: bool) -> Result<Storage> {
        let [cos, sin] = &self.angles;
        rope::turn(x, [cos, sin], self.heads, self.interleaved, inverse)
    }
}

/// See [`QkvProjection::forward`], which has checked the shapes.
pub(crate) fn qkv(x: &Tensor, projection: &QkvProjection, rotation: Option<&Rotation>) -> Result<Tensor> {
    let (batch, seq, _) = x.dims3()?;
    let QkvProjection { norm, maps, rotated_heads, head_dim } = projection;
    let width: usize = maps.iter().map(|map| map.weight.dim(0)).sum::<Result<usize>>()?;
    let shape = (batch, seq, width / head_dim, *head_dim);
    let turn = rotation.map(|Rotation { cos, sin, interleaved }| {
        let angle = |angle: &Tensor| angle.to_dtype(x.dtype())?.contiguous();
        Ok::<_, candle_core::Error>(Turn {
            angles: [angle(cos)?, angle(sin)?],
            heads: *rotated_heads,
            interleaved: *interleaved,
        })
    });
    let turn = turn.transpose()?;
    if !maps.iter().all(|map| is_plain(map, x)) || !takes_norm(x, norm) {
        let normed = norm.forward(x)?;
        let parts = maps.iter().map(|map| composed(map, &normed)).collect::<Result<Vec<_>>>()?;
        let y = Tensor::cat(&parts, 2)?.reshape(shape)?;
        let Some(turn) = turn else { return Ok(y) };
        return computed::of_one(&y, "rope", turn.run(&y, false)?, shape, move |[y], _, grad| {
            Ok([Some(tensor(turn.run(&grad.contiguous()?, true)?, y.shape()))])
        });
    }
    let x = x.contiguous()?;
    let input = x.detach();
    let normed = tensor(norm::forward(&input, norm)?, input.shape());
    let parts = maps.iter().map(|map| {
        let y = product(&normed, &map.weight)?;
        match &map.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    });
    let parts = parts.collect::<Result<Vec<_>>>()?;
    drop(normed);
    let y = Tensor::cat(&parts, 1)?.reshape(shape)?;
    drop(parts);
    let made = match &turn {
        Some(turn) => turn.run(&y, false)?,
        None => gate::add_scaled(None, &y, None, 1.0)?,
    };
    drop(y);
    let projection = projection.clone();
    computed::of_one(&x, "qkv-projection", made, shape, move |[x], _, grad| {
        let (x, grad) = (x.detach(), grad.contiguous()?);
        let grad = match &turn {
            Some(turn) => tensor(turn.run(&grad, true)?, shape),
            None => grad,
        };
        let grad = grad.reshape((batch * seq, width))?;
        let (mut first, mut sum) = (0, None);
        for map in &projection.maps {
            let out = map.weight.dim(0)?;
            let part = grad.narrow(1, first, out)?.contiguous()?.matmul(&map.weight)?;
            first += out;
            sum = Some(match sum {
                Some(sum) => (part + sum)?,
                None => part,
            });
        }
        let Some(sum) = sum else { candle_core::bail!("qkv-projection: no maps") };
        Ok([Some(tensor(norm::backward(&x, &sum, &projection.norm, None)?, x.shape()))])
    })
}

/// See [`OutputProjection::forward`], which has checked the shapes.
pub(crate) fn output(
    mixed: &Tensor,
    term: Option<&Tensor>,
    residual: &Tensor,
    projection: &OutputProjection,
) -> Result<Tensor> {
    let OutputProjection { map, scale } = projection;
    let (mixed, residual) = (mixed.contiguous()?, residual.contiguous()?);
    if !is_plain(map, &mixed) {
        let sum = term.map_or_else(|| Ok(mixed.clone()), |term| &mixed + term)?;
        return residual + scaled(composed(map, &sum.flatten_from(2)?)?, *scale)?;
    }
    let sum = match term {
        Some(term) => (mixed.detach() + term.detach())?,
        None => mixed.detach(),
    };
    let y = product(&sum.flatten_from(2)?, &map.weight)?;
    drop(sum);
    let made = gate::add_scaled(Some(&residual.detach()), &y, map.bias.as_ref(), *scale)?;
    let (weight, scale, shape, name) = (map.weight.clone(), *scale, residual.shape().clone(), "output-projection");
    let inner = move |mixed: &Tensor, grad: &Tensor| -> Result<Tensor> {
        scaled(rows(&grad.contiguous()?)?.matmul(&weight)?, scale)?.reshape(mixed.shape())
    };
    match term {
        None => computed::of_two([&mixed, &residual], name, made, shape, move |[mixed, _], _, grad| {
            let by_mixed = mixed.track_op().then(|| inner(mixed, grad)).transpose()?;
            Ok([by_mixed, Some(grad.clone())])
        }),
        Some(term) => computed::of_three([&mixed, term, &residual], name, made, shape, move |[mixed, ..], _, grad| {
            let by_sum = inner(mixed, grad)?;
            Ok([Some(by_sum.clone()), Some(by_sum), Some(grad.clone())])
        }),
    }
}

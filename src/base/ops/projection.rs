//! The linear maps around attention with what stands beside them, as one operation each.
//!
//! Neither the normalised input, nor unrotated queries and keys, nor a sum that only the next map reads is kept for the
//! backward pass: it needs the input alone, since the weights are frozen.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::NormWeights;
use super::held::{Held, is_plain, numbers, tensor};
use super::matmul::{Matrix, Target, Threads, multiply};
use super::real::{Real, vectorised};
use super::rope::turn;

/// Queries, keys and values of a layer: `x` normalised, mapped, and queries and keys rotated.
#[derive(Clone, Debug)]
pub struct QkvProjection {
    /// Before the map.
    pub norm: NormWeights,
    /// `[(num_heads + 2 · num_kv_heads) · head_dim, hidden_size]`.
    pub weight: Tensor,
    /// `[(num_heads + 2 · num_kv_heads) · head_dim]`.
    pub bias: Option<Tensor>,
    /// `num_heads + num_kv_heads`: the heads that rotate.
    pub rotated_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// Cosines and sines of `[batch, seq, dim / 2]`; see [`rope`](super::rope()).
#[derive(Clone, Debug)]
pub struct Rotation {
    /// Cosines.
    pub cos: Tensor,
    /// Sines.
    pub sin: Tensor,
    /// Whether pairs are neighbours.
    pub interleaved: bool,
}

impl QkvProjection {
    /// Whether [`forward`](Self::forward) computes it: frozen float weights on the CPU.
    pub fn is_fused(&self) -> bool {
        self.norm.is_plain() && is_plain(&self.weight) && self.bias.as_ref().is_none_or(is_plain)
    }

    /// `[batch, seq, hidden_size]` → `[batch, seq, num_heads + 2 · num_kv_heads, head_dim]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, x: &Tensor, rotation: Option<Rotation>) -> Result<Tensor> {
        let (batch, seq, hidden) = x.dims3()?;
        let (width, weight_in) = self.weight.dims2()?;
        let angles = rotation.as_ref().map(|r| Ok::<_, candle_core::Error>((r.cos.dims3()?, r.sin.dims3()?)));
        let angles_fit = angles.transpose()?.is_none_or(|(cos, sin)| {
            cos == sin && (cos.0, cos.1) == (batch, seq) && 2 * cos.2 <= self.head_dim && cos.2 > 0
        });
        let rotated = self.rotated_heads * self.head_dim;
        if hidden != weight_in || !width.is_multiple_of(self.head_dim.max(1)) || rotated > width || !angles_fit {
            candle_core::bail!("qkv-projection: input {:?}, weight [{width}, {weight_in}]", x.dims());
        }
        x.contiguous()?.apply_op1(Qkv { projection: self.clone(), rotation })
    }
}

struct Qkv {
    projection: QkvProjection,
    rotation: Option<Rotation>,
}

impl Qkv {
    /// Turns the rotated heads of each row, or turns them back.
    fn rotate<T: Real + WithDType>(&self, rows: &mut [T], width: usize, inverse: bool) -> Result<()> {
        let Some(Rotation { cos, sin, interleaved }) = &self.rotation else { return Ok(()) };
        let (held_cos, held_sin, half) = (Held::of(cos)?, Held::of(sin)?, cos.dim(2)?);
        let (cos, sin): (&[T], &[T]) = (held_cos.numbers()?, held_sin.numbers()?);
        let rotated = self.projection.rotated_heads * self.projection.head_dim;
        let angles = cos.par_chunks(half).zip(sin.par_chunks(half));
        rows.par_chunks_mut(width).zip(angles).for_each(|(row, (cos, sin))| {
            vectorised(
                #[inline(always)]
                || {
                    for head in row[..rotated].chunks_exact_mut(self.projection.head_dim) {
                        turn(head, cos, sin, *interleaved, inverse);
                    }
                },
            );
        });
        Ok(())
    }

    fn forward<T: Real + WithDType>(&self, x: &[T]) -> Result<Vec<T>> {
        let (width, hidden) = self.projection.weight.dims2()?;
        let x = self.projection.norm.rows(x)?;
        let weight = Held::of(&self.projection.weight)?;
        let mut y = product(&x, hidden, Matrix::new(weight.numbers()?, width, hidden).t(), width);
        if let Some(bias) = &self.projection.bias {
            add_bias(&mut y, Held::of(bias)?.numbers()?, T::one());
        }
        self.rotate(&mut y, width, false)?;
        Ok(y)
    }

    fn backward<T: Real + WithDType>(&self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (width, hidden) = self.projection.weight.dims2()?;
        let mut turned = Held::of(grad)?.numbers::<T>()?.to_vec();
        self.rotate(&mut turned, width, true)?;
        let weight = Held::of(&self.projection.weight)?;
        let dx = product(&turned, width, Matrix::new(weight.numbers()?, width, hidden), hidden);
        tensor(self.projection.norm.rows_gradient(Held::of(x)?.numbers()?, &dx)?, x.shape())
    }
}

/// `a · b` with `a` of rows of `inner` numbers and `b` of `[inner, columns]`.
fn product<T: Real>(a: &[T], inner: usize, b: Matrix<T>, columns: usize) -> Vec<T> {
    let rows = a.len() / inner.max(1);
    let mut out = vec![T::zero(); rows * columns];
    let a = Matrix::new(a, rows, inner);
    multiply(Target::strided(&mut out, columns), false, T::one(), a, b, Threads::All);
    out
}

fn add_bias<T: Real>(rows: &mut [T], bias: &[T], scale: T) {
    rows.par_chunks_mut(bias.len().max(1)).for_each(|row| {
        row.iter_mut().zip(bias).for_each(|(y, b)| *y += scale * *b);
    });
}

impl CustomOp1 for Qkv {
    fn name(&self) -> &'static str {
        "qkv-projection"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, seq, _) = layout.shape().dims3()?;
        let y = match x {
            CpuStorage::F32(_) => CpuStorage::F32(self.forward(numbers(x, layout)?)?),
            CpuStorage::F64(_) => CpuStorage::F64(self.forward(numbers(x, layout)?)?),
            _ => candle_core::bail!("qkv-projection: the input is neither float32 nor float64"),
        };
        let heads = self.projection.weight.dim(0)? / self.projection.head_dim.max(1);
        Ok((y, (batch, seq, heads, self.projection.head_dim).into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        Ok(Some(match x.dtype() {
            DType::F64 => self.backward::<f64>(x, &grad)?,
            _ => self.backward::<f32>(x, &grad)?,
        }))
    }
}

/// What follows attention: the adapter's term added, the output map, its result scaled and added to the residual stream.
#[derive(Clone, Debug)]
pub struct OutputProjection {
    /// `[hidden_size, num_heads · head_dim]`.
    pub weight: Tensor,
    /// `[hidden_size]`.
    pub bias: Option<Tensor>,
    /// On the map's result.
    pub scale: f64,
}

impl OutputProjection {
    /// Whether [`forward`](Self::forward) computes it: frozen float weights on the CPU.
    pub fn is_fused(&self) -> bool {
        is_plain(&self.weight) && self.bias.as_ref().is_none_or(is_plain)
    }

    /// `residual + scale · ((mixed + term) · weightᵀ + bias)`: `mixed` and `term` of `[batch, seq, heads, head_dim]`, `residual`
    /// of `[batch, seq, hidden_size]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, mixed: &Tensor, term: Option<&Tensor>, residual: &Tensor) -> Result<Tensor> {
        let (batch, seq, heads, width) = mixed.dims4()?;
        let fits = residual.dims() == [batch, seq, self.weight.dim(0)?]
            && heads * width == self.weight.dim(1)?
            && term.is_none_or(|term| term.dims() == mixed.dims());
        if !fits {
            candle_core::bail!("output-projection: {:?} does not fit {:?}", mixed.dims(), self.weight.dims());
        }
        let (mixed, residual) = (mixed.contiguous()?, residual.contiguous()?);
        match term {
            Some(term) => mixed.apply_op3(&term.contiguous()?, &residual, Output(self.clone())),
            None => mixed.apply_op2(&residual, Output(self.clone())),
        }
    }
}

struct Output(OutputProjection);

impl Output {
    fn forward<T: Real + WithDType>(&self, mixed: &[T], term: Option<&[T]>, residual: &[T]) -> Result<Vec<T>> {
        let (hidden, width) = self.0.weight.dims2()?;
        let sum: Option<Vec<T>> =
            term.map(|term| mixed.par_iter().zip(term).with_min_len(CHUNK).map(|(a, b)| *a + *b).collect());
        let (scale, rows) = (T::of(self.0.scale), mixed.len() / width.max(1));
        let mut y = residual.to_vec();
        let weight = Held::of(&self.0.weight)?;
        let weight = Matrix::new(weight.numbers()?, hidden, width).t();
        let mixed = Matrix::new(sum.as_deref().unwrap_or(mixed), rows, width);
        multiply(Target::strided(&mut y, hidden), true, scale, mixed, weight, Threads::All);
        if let Some(bias) = &self.0.bias {
            add_bias(&mut y, Held::of(bias)?.numbers()?, scale);
        }
        Ok(y)
    }

    /// The gradient of `mixed`, which is that of the term too.
    fn backward(&self, mixed: &Tensor, grad: &Tensor) -> Result<Tensor> {
        fn of<T: Real + WithDType>(op: &OutputProjection, mixed: &Tensor, grad: &Tensor) -> Result<Tensor> {
            let (hidden, width) = op.weight.dims2()?;
            let (grad, weight) = (Held::of(grad)?, Held::of(&op.weight)?);
            let grad: &[T] = grad.numbers()?;
            let rows = grad.len() / hidden.max(1);
            let mut out = vec![T::zero(); rows * width];
            let (grad, weight) = (Matrix::new(grad, rows, hidden), Matrix::new(weight.numbers()?, hidden, width));
            multiply(Target::strided(&mut out, width), false, T::of(op.scale), grad, weight, Threads::All);
            tensor(out, mixed.shape())
        }
        let grad = grad.contiguous()?;
        match mixed.dtype() {
            DType::F64 => of::<f64>(&self.0, mixed, &grad),
            _ => of::<f32>(&self.0, mixed, &grad),
        }
    }
}

/// Elements that a task works on.
const CHUNK: usize = 1 << 13;

impl CustomOp2 for Output {
    fn name(&self) -> &'static str {
        "output-projection"
    }

    fn cpu_fwd(&self, mixed: &CpuStorage, l: &Layout, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = match mixed {
            CpuStorage::F32(_) => CpuStorage::F32(self.forward(numbers(mixed, l)?, None, numbers(x, lx)?)?),
            CpuStorage::F64(_) => CpuStorage::F64(self.forward(numbers(mixed, l)?, None, numbers(x, lx)?)?),
            _ => candle_core::bail!("output-projection: the input is neither float32 nor float64"),
        };
        Ok((y, lx.shape().clone()))
    }

    fn bwd(&self, mixed: &Tensor, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(self.backward(mixed, grad)?), Some(grad.clone())))
    }
}

impl CustomOp3 for Output {
    fn name(&self) -> &'static str {
        "output-projection"
    }

    fn cpu_fwd(
        &self,
        mixed: &CpuStorage,
        l: &Layout,
        term: &CpuStorage,
        lt: &Layout,
        x: &CpuStorage,
        lx: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = match mixed {
            CpuStorage::F32(_) => {
                CpuStorage::F32(self.forward(numbers(mixed, l)?, Some(numbers(term, lt)?), numbers(x, lx)?)?)
            }
            CpuStorage::F64(_) => {
                CpuStorage::F64(self.forward(numbers(mixed, l)?, Some(numbers(term, lt)?), numbers(x, lx)?)?)
            }
            _ => candle_core::bail!("output-projection: the input is neither float32 nor float64"),
        };
        Ok((y, lx.shape().clone()))
    }

    fn bwd(
        &self,
        mixed: &Tensor,
        _term: &Tensor,
        _x: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let inner = self.backward(mixed, grad)?;
        Ok((Some(inner.clone()), Some(inner), Some(grad.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::super::{linear, rope};
    use super::*;
    use crate::base::{Norm, NormKind};

    #[test]
    fn queries_keys_and_values_are_the_composed_form_with_an_exact_gradient() {
        let angles = numbers(&[2, 3, 1], 1.0);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let norm = Norm { kind: NormKind::Layer, epsilon: 1e-5, weight_offset: 0.0, bias: true };
        let norm = NormWeights { norm, weight: numbers(&[6], 2.0), bias: Some(numbers(&[6], 3.0)) };
        let (weight, bias) = (numbers(&[16, 6], 4.0), numbers(&[16], 5.0));
        let x = numbers(&[2, 3, 6], 0.0);
        for interleaved in [false, true] {
            let projection = QkvProjection {
                norm: norm.clone(),
                weight: weight.clone(),
                bias: Some(bias.clone()),
                rotated_heads: 3,
                head_dim: 4,
            };
            let rotation = Rotation { cos: cos.clone(), sin: sin.clone(), interleaved };
            let y = linear(&norm.forward(&x).unwrap(), &weight, Some(&bias)).unwrap().reshape((2, 3, 4, 4)).unwrap();
            let turned = rope(&y.narrow(2, 0, 3).unwrap(), &cos, &sin, interleaved).unwrap();
            let expected = Tensor::cat(&[&turned, &y.narrow(2, 3, 1).unwrap()], 2).unwrap();
            let found = projection.forward(&x, Some(rotation.clone())).unwrap();
            assert!(max_difference(&found, &expected) < 1e-13);
            check_gradient(&x, |x| projection.forward(x, Some(rotation.clone())));
        }
    }

    #[test]
    fn the_output_is_the_composed_form_with_exact_gradients() {
        let (mixed, term, residual) =
            (numbers(&[2, 3, 2, 4], 0.0), numbers(&[2, 3, 2, 4], 1.0), numbers(&[2, 3, 6], 2.0));
        let output = OutputProjection { weight: numbers(&[6, 8], 3.0), bias: Some(numbers(&[6], 4.0)), scale: 0.7 };
        for term in [None, Some(&term)] {
            let sum = term.map_or(mixed.clone(), |term| (&mixed + term).unwrap()).reshape((2, 3, 8)).unwrap();
            let mapped = linear(&sum, &output.weight, output.bias.as_ref()).unwrap();
            let expected = (&residual + (mapped * 0.7).unwrap()).unwrap();
            assert!(max_difference(&output.forward(&mixed, term, &residual).unwrap(), &expected) < 1e-13);
            check_gradient(&mixed, |mixed| output.forward(mixed, term, &residual));
            check_gradient(&residual, |residual| output.forward(&mixed, term, residual));
        }
        check_gradient(&term, |term| output.forward(&mixed, Some(term), &residual));
    }
}

//! The gated feed-forward block with frozen weights, its norm and the residual stream, as one operation.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::NormWeights;
use super::held::{Held, is_plain, numbers, tensor};
use super::matmul::{Matrix, Target, Threads, multiply};
use super::real::{Real, vectorised};
use crate::base::Activation;

/// The weights of a gated block without biases.
#[derive(Clone, Debug)]
pub struct GatedMlp {
    /// `[intermediate, hidden]`.
    pub gate: Tensor,
    /// `[intermediate, hidden]`.
    pub up: Tensor,
    /// `[hidden, intermediate]`.
    pub down: Tensor,
    /// On the gate.
    pub activation: Activation,
}

/// A block between norm and residual stream.
#[derive(Clone, Debug)]
pub struct MlpBlock {
    /// Before it.
    pub norm: NormWeights,
    /// On its result.
    pub scale: f64,
}

impl GatedMlp {
    /// Whether it is computed as one operation: frozen float weights on the CPU and an activation that it knows.
    pub fn is_fused(&self) -> bool {
        self.activation != Activation::Gelu && [&self.gate, &self.up, &self.down].into_iter().all(is_plain)
    }

    /// `down(activation(gate(x)) · up(x))`, `[…, hidden]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    /// `x + scale · self(norm(x))`, `[…, hidden]`; the norm's weights are frozen.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward_block(&self, x: &Tensor, block: &MlpBlock) -> Result<Tensor> {
        self.run(x, Some(block.clone()))
    }

    fn run(&self, x: &Tensor, block: Option<MlpBlock>) -> Result<Tensor> {
        let kept = x.track_op().then(|| Mutex::new(None));
        x.contiguous()?.apply_op1(FusedMlp { mlp: self.clone(), block, kept })
    }
}

impl MlpBlock {
    /// Whether [`GatedMlp::forward_block`] takes it.
    pub fn is_fused(&self) -> bool {
        self.norm.is_plain()
    }
}

// activations: the value and the slope

#[inline(always)]
fn silu<T: Real>(x: T) -> (T, T) {
    let one = T::one();
    let s = one / (one + (-x).fast_exp());
    (x * s, s * (one + x * (one - s)))
}

#[inline(always)]
fn relu<T: Real>(x: T) -> (T, T) {
    if x > T::zero() { (x, T::one()) } else { (T::zero(), T::zero()) }
}

#[inline(always)]
fn gelu_tanh<T: Real>(x: T) -> (T, T) {
    let (root, cubic) = (T::of((2.0 / std::f64::consts::PI).sqrt()), T::of(0.044_715));
    let (one, two, half) = (T::one(), T::of(2.0), T::of(0.5));
    let inner = root * (x + cubic * x * x * x);
    let tanh = one - two / ((two * inner).fast_exp() + one);
    let slope = root * (one + T::of(3.0) * cubic * x * x) * (one - tanh * tanh);
    (half * x * (one + tanh), half * (one + tanh) + half * x * slope)
}

/// `inner = activation(gated) · raised`.
fn gate<T: Real>(activation: impl Fn(T) -> (T, T), inner: &mut [T], gated: &[T], raised: &[T]) {
    vectorised(
        #[inline(always)]
        || {
            for ((i, g), u) in inner.iter_mut().zip(gated).zip(raised) {
                *i = activation(*g).0 * *u;
            }
        },
    );
}

/// From outputs of gate and up to their gradients, given that of their product.
fn gate_gradient<T: Real>(activation: impl Fn(T) -> (T, T), gated: &mut [T], raised: &mut [T], inner: &[T]) {
    vectorised(
        #[inline(always)]
        || {
            for ((g, u), d) in gated.iter_mut().zip(raised.iter_mut()).zip(inner) {
                let (value, slope) = activation(*g);
                (*g, *u) = (*d * *u * slope, *d * value);
            }
        },
    );
}

struct FusedMlp {
    mlp: GatedMlp,
    block: Option<MlpBlock>,
    /// Outputs of gate and up, where the backward pass will ask for them.
    kept: Option<Mutex<Option<[CpuStorage; 2]>>>,
}

/// Elements that a task works on.
const CHUNK: usize = 1 << 13;

/// `target = keep · target + scale · (a · b)` with `a` of rows of `inner` numbers and `b` of `[inner, columns]`.
fn product<T: Real>(target: &mut [T], keep: bool, scale: T, a: &[T], b: Matrix<T>, columns: usize) {
    let rows = target.len() / columns.max(1);
    let a = Matrix::new(a, rows, a.len() / rows.max(1));
    multiply(Target::strided(target, columns), keep, scale, a, b, Threads::All);
}

impl FusedMlp {
    fn scale<T: Real>(&self) -> T {
        T::of(self.block.as_ref().map_or(1.0, |block| block.scale))
    }

    fn forward<T: Real + WithDType>(&self, x: &[T]) -> Result<Vec<T>> {
        let (inner_width, width) = self.mlp.gate.dims2()?;
        let normed = self.block.as_ref().map(|block| block.norm.rows(x)).transpose()?;
        let input = normed.as_deref().unwrap_or(x);
        let held = [Held::of(&self.mlp.gate)?, Held::of(&self.mlp.up)?, Held::of(&self.mlp.down)?];
        let gate = Matrix::new(held[0].numbers()?, inner_width, width).t();
        let up = Matrix::new(held[1].numbers()?, inner_width, width).t();
        let down = Matrix::new(held[2].numbers()?, width, inner_width).t();
        let zeros = || vec![T::zero(); x.len() / width.max(1) * inner_width];
        let (mut gated, mut raised) = (zeros(), zeros());
        product(&mut gated, false, T::one(), input, gate, inner_width);
        product(&mut raised, false, T::one(), input, up, inner_width);
        drop(normed);
        let mut out = if self.block.is_some() { x.to_vec() } else { vec![T::zero(); x.len()] };
        let keep = self.block.is_some();
        match &self.kept {
            Some(slot) => {
                let mut inner = zeros();
                let chunks = inner.par_chunks_mut(CHUNK).zip(gated.par_chunks(CHUNK)).zip(raised.par_chunks(CHUNK));
                chunks.for_each(|((inner, gated), raised)| self.gate(inner, gated, raised));
                product(&mut out, keep, self.scale(), &inner, down, width);
                let kept = [T::to_cpu_storage_owned(gated), T::to_cpu_storage_owned(raised)];
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
            }
            None => {
                // a task's numbers are copied first, so that its own chunk can take the products
                gated.par_chunks_mut(CHUNK).zip(raised.par_chunks(CHUNK)).for_each(|(gated, raised)| {
                    let mut copy = [T::zero(); CHUNK];
                    let copy = &mut copy[..gated.len()];
                    copy.copy_from_slice(gated);
                    self.gate(gated, copy, raised);
                });
                product(&mut out, keep, self.scale(), &gated, down, width);
            }
        }
        Ok(out)
    }

    // one loop for each activation, so that each is compiled for vectors

    fn gate<T: Real>(&self, inner: &mut [T], gated: &[T], raised: &[T]) {
        match self.mlp.activation {
            Activation::Silu => gate(silu, inner, gated, raised),
            Activation::Relu => gate(relu, inner, gated, raised),
            Activation::Gelu | Activation::GeluTanh => gate(gelu_tanh, inner, gated, raised),
        }
    }

    fn gate_gradient<T: Real>(&self, gated: &mut [T], raised: &mut [T], inner: &[T]) {
        match self.mlp.activation {
            Activation::Silu => gate_gradient(silu, gated, raised, inner),
            Activation::Relu => gate_gradient(relu, gated, raised, inner),
            Activation::Gelu | Activation::GeluTanh => gate_gradient(gelu_tanh, gated, raised, inner),
        }
    }

    /// The gradient of `x`; takes what the forward pass kept.
    fn backward<T: Real + WithDType>(
        &self,
        x: &Tensor,
        grad: &Tensor,
        mut gated: Vec<T>,
        mut raised: Vec<T>,
    ) -> Result<Tensor> {
        let (inner_width, width) = self.mlp.gate.dims2()?;
        let held = [Held::of(&self.mlp.gate)?, Held::of(&self.mlp.up)?, Held::of(&self.mlp.down)?];
        let gate = Matrix::new(held[0].numbers()?, inner_width, width);
        let up = Matrix::new(held[1].numbers()?, inner_width, width);
        let down = Matrix::new(held[2].numbers()?, width, inner_width);
        let grad = Held::of(grad)?;
        let grad: &[T] = grad.numbers()?;
        let mut inner = vec![T::zero(); gated.len()];
        product(&mut inner, false, self.scale(), grad, down, inner_width);
        let chunks = gated.par_chunks_mut(CHUNK).zip(raised.par_chunks_mut(CHUNK)).zip(inner.par_chunks(CHUNK));
        chunks.for_each(|((gated, raised), inner)| self.gate_gradient(gated, raised, inner));
        drop(inner);
        let mut dx = vec![T::zero(); grad.len()];
        product(&mut dx, false, T::one(), &gated, gate, width);
        product(&mut dx, true, T::one(), &raised, up, width);
        if let Some(block) = &self.block {
            dx = block.norm.rows_gradient(Held::of(x)?.numbers()?, &dx)?;
            dx.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK)).for_each(|(dx, grad)| {
                dx.iter_mut().zip(grad).for_each(|(dx, g)| *dx += *g);
            });
        }
        tensor(dx, x.shape())
    }
}

impl CustomOp1 for FusedMlp {
    fn name(&self) -> &'static str {
        "gated-mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (inner_width, width) = self.mlp.gate.dims2()?;
        let fits = layout.dims().last() == Some(&width)
            && self.mlp.up.dims() == [inner_width, width]
            && self.mlp.down.dims() == [width, inner_width];
        if !fits {
            candle_core::bail!("gated-mlp: input {:?} does not fit weight {:?}", layout.dims(), self.mlp.gate.dims());
        }
        let y = match x {
            CpuStorage::F32(_) => CpuStorage::F32(self.forward(numbers(x, layout)?)?),
            CpuStorage::F64(_) => CpuStorage::F64(self.forward(numbers(x, layout)?)?),
            _ => candle_core::bail!("gated-mlp: the input is neither float32 nor float64"),
        };
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let kept = self.kept.as_ref().and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
        let grad = grad.contiguous()?;
        Ok(Some(match kept {
            Some([CpuStorage::F32(gated), CpuStorage::F32(raised)]) => self.backward(x, &grad, gated, raised)?,
            Some([CpuStorage::F64(gated), CpuStorage::F64(raised)]) => self.backward(x, &grad, gated, raised)?,
            _ => candle_core::bail!("gated-mlp: its forward pass kept nothing"),
        }))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Module;

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;
    use crate::base::{Norm, NormKind};

    #[test]
    fn it_is_the_composed_form_with_an_exact_gradient() {
        let (x, gate, up, down) =
            (numbers(&[2, 3, 4], 0.0), numbers(&[6, 4], 1.0), numbers(&[6, 4], 2.0), numbers(&[4, 6], 3.0));
        let kinds = [
            (Activation::Silu, candle_nn::Activation::Silu),
            (Activation::GeluTanh, candle_nn::Activation::GeluPytorchTanh),
            (Activation::Relu, candle_nn::Activation::Relu),
        ];
        for (activation, composed) in kinds {
            let mlp = GatedMlp { gate: gate.clone(), up: up.clone(), down: down.clone(), activation };
            assert!(mlp.is_fused());
            let linear = |x: &Tensor, weight: &Tensor| super::super::linear(x, weight, None).unwrap();
            let inner = composed.forward(&linear(&x, &gate)).unwrap() * linear(&x, &up);
            let expected = linear(&inner.unwrap(), &down);
            assert!(max_difference(&mlp.forward(&x).unwrap(), &expected) < 1e-14);
            check_gradient(&x, |x| mlp.forward(x));
            let norm = Norm { kind: NormKind::Rms, epsilon: 1e-5, weight_offset: 0.0, bias: false };
            let norm = NormWeights { norm, weight: numbers(&[4], 4.0), bias: None };
            let expected = (&x + (mlp.forward(&norm.forward(&x).unwrap()).unwrap() * 0.7).unwrap()).unwrap();
            let block = MlpBlock { norm, scale: 0.7 };
            assert!(max_difference(&mlp.forward_block(&x, &block).unwrap(), &expected) < 1e-14);
            check_gradient(&x, |x| mlp.forward_block(x, &block));
        }
    }
}

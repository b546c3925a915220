//! The gated feed-forward block with frozen weights, as one operation.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType};
use rayon::prelude::*;

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

impl GatedMlp {
    /// Whether [`forward`](Self::forward) computes it: frozen float weights on the CPU and an activation that it knows.
    pub fn is_fused(&self) -> bool {
        let is_plain = |weight: &Tensor| {
            !weight.track_op()
                && weight.device().is_cpu()
                && weight.is_contiguous()
                && matches!(weight.dtype(), DType::F32 | DType::F64)
        };
        self.activation != Activation::Gelu && [&self.gate, &self.up, &self.down].into_iter().all(is_plain)
    }

    /// `down(activation(gate(x)) · up(x))`, `[…, hidden]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let kept = x.track_op().then(|| Mutex::new(None));
        x.contiguous()?.apply_op1(FusedMlp { mlp: self.clone(), kept })
    }
}

/// An activation's value and slope.
#[inline(always)]
fn activate<T: Real>(activation: Activation, x: T) -> (T, T) {
    let one = T::one();
    match activation {
        Activation::Silu => {
            let s = one / (one + (-x).fast_exp());
            (x * s, s * (one + x * (one - s)))
        }
        Activation::Relu => {
            if x > T::zero() {
                (x, one)
            } else {
                (T::zero(), T::zero())
            }
        }
        Activation::Gelu | Activation::GeluTanh => {
            let (root, cubic) = (T::of((2.0 / std::f64::consts::PI).sqrt()), T::of(0.044_715));
            let (two, half) = (T::of(2.0), T::of(0.5));
            let inner = root * (x + cubic * x * x * x);
            let tanh = one - two / ((two * inner).fast_exp() + one);
            let slope = root * (one + T::of(3.0) * cubic * x * x) * (one - tanh * tanh);
            (half * x * (one + tanh), half * (one + tanh) + half * x * slope)
        }
    }
}

struct FusedMlp {
    mlp: GatedMlp,
    /// Outputs of gate and up, where the backward pass will ask for them.
    kept: Option<Mutex<Option<[CpuStorage; 2]>>>,
}

/// Elements that a task works on.
const CHUNK: usize = 1 << 13;

impl FusedMlp {
    /// Runs `f` on the three weights as matrices.
    fn with_weights<T: Real + WithDType, R>(&self, f: impl FnOnce([Matrix<T>; 3]) -> R) -> Result<R> {
        let tensors = [&self.mlp.gate, &self.mlp.up, &self.mlp.down];
        let guards = tensors.map(|tensor| tensor.storage_and_layout());
        let mut matrices = Vec::with_capacity(3);
        for ((storage, layout), tensor) in guards.iter().zip(tensors) {
            let Storage::Cpu(storage) = &**storage else { candle_core::bail!("gated-mlp: a weight is not on the CPU") };
            let (rows, columns) = tensor.dims2()?;
            let data = T::cpu_storage_as_slice(storage)?.get(layout.start_offset()..).unwrap_or_default();
            matrices.push(Matrix::new(data, rows, columns));
        }
        match <[Matrix<T>; 3]>::try_from(matrices) {
            Ok(matrices) => Ok(f(matrices)),
            Err(_) => candle_core::bail!("gated-mlp: three weights"),
        }
    }

    fn forward<T: Real + WithDType>(&self, x: &[T], rows: usize) -> Result<Vec<T>> {
        let (inner_width, width) = self.mlp.gate.dims2()?;
        let product = |a: Matrix<T>, b: Matrix<T>, columns: usize| {
            let mut out = vec![T::zero(); rows * columns];
            multiply(Target::strided(&mut out, columns), false, T::one(), a, b, Threads::All);
            out
        };
        self.with_weights(|[gate, up, down]| {
            let x = Matrix::new(x, rows, width);
            let (mut gated, raised) = (product(x, gate.t(), inner_width), product(x, up.t(), inner_width));
            let kept = self.kept.is_some().then(|| gated.clone());
            gated.par_chunks_mut(CHUNK).zip(raised.par_chunks(CHUNK)).for_each(|(gated, raised)| {
                vectorised(|| {
                    for (g, u) in gated.iter_mut().zip(raised) {
                        *g = activate(self.mlp.activation, *g).0 * *u;
                    }
                });
            });
            let out = product(Matrix::new(&gated, rows, inner_width), down.t(), width);
            if let (Some(slot), Some(kept)) = (&self.kept, kept) {
                let kept = [T::to_cpu_storage_owned(kept), T::to_cpu_storage_owned(raised)];
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
            }
            out
        })
    }

    fn backward<T: Real + WithDType>(&self, grad: &[T], kept: &[CpuStorage; 2], rows: usize) -> Result<Vec<T>> {
        let (inner_width, width) = self.mlp.gate.dims2()?;
        let mut gated = T::cpu_storage_as_slice(&kept[0])?.to_vec();
        let mut raised = T::cpu_storage_as_slice(&kept[1])?.to_vec();
        self.with_weights(|[gate, up, down]| {
            let mut inner = vec![T::zero(); rows * inner_width];
            let grad = Matrix::new(grad, rows, width);
            multiply(Target::strided(&mut inner, inner_width), false, T::one(), grad, down, Threads::All);
            let chunks = gated.par_chunks_mut(CHUNK).zip(raised.par_chunks_mut(CHUNK)).zip(inner.par_chunks(CHUNK));
            chunks.for_each(|((gated, raised), inner)| {
                vectorised(|| {
                    for ((g, u), d) in gated.iter_mut().zip(raised.iter_mut()).zip(inner) {
                        let (value, slope) = activate(self.mlp.activation, *g);
                        (*g, *u) = (*d * *u * slope, *d * value);
                    }
                });
            });
            let mut dx = vec![T::zero(); rows * width];
            for (keep, inner, weight) in [(false, &gated, gate), (true, &raised, up)] {
                let inner = Matrix::new(inner, rows, inner_width);
                multiply(Target::strided(&mut dx, width), keep, T::one(), inner, weight, Threads::All);
            }
            dx
        })
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
        let rows = layout.shape().elem_count() / width.max(1);
        let (start, end) = (layout.start_offset(), layout.start_offset() + rows * width);
        let y = match x {
            CpuStorage::F32(x) => CpuStorage::F32(self.forward(&x[start..end], rows)?),
            CpuStorage::F64(x) => CpuStorage::F64(self.forward(&x[start..end], rows)?),
            _ => candle_core::bail!("gated-mlp: the input is neither float32 nor float64"),
        };
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let kept = self.kept.as_ref().and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
        let Some(kept) = kept else { candle_core::bail!("gated-mlp: its forward pass kept nothing") };
        let rows = x.elem_count() / x.dim(D::Minus1)?.max(1);
        let grad = grad.contiguous()?;
        let (storage, layout) = grad.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { candle_core::bail!("gated-mlp: the gradient is not on the CPU") };
        let start = layout.start_offset();
        let dx = match storage {
            CpuStorage::F32(grad) => {
                Tensor::from_vec(self.backward(&grad[start..], &kept, rows)?, x.shape(), &Device::Cpu)?
            }
            CpuStorage::F64(grad) => {
                Tensor::from_vec(self.backward(&grad[start..], &kept, rows)?, x.shape(), &Device::Cpu)?
            }
            _ => candle_core::bail!("gated-mlp: the gradient is neither float32 nor float64"),
        };
        Ok(Some(dx))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Module;

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;

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
        }
    }
}

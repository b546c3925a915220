//! The gated feed-forward block, its norm and the residual stream, as one operation.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Module, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::NormWeights;
use super::held::{Held, numbers, tensor};
use super::inner_map::{InnerMap, LowRank, Rows};
use super::real::{Real, vectorised};
use super::trained::Trained;
use crate::base::Activation;

/// The weights of a gated block.
#[derive(Clone, Debug)]
pub struct GatedMlp {
    /// `[intermediate, hidden]`.
    pub gate: InnerMap,
    /// `[intermediate, hidden]`.
    pub up: InnerMap,
    /// `[hidden, intermediate]`.
    pub down: InnerMap,
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
    /// Whether it is computed as one operation: float weights on the CPU and an activation that it knows, or
    /// weights on a device with kernels.
    pub fn is_fused(&self) -> bool {
        #[cfg(any(test, feature = "cuda"))]
        if [&self.gate, &self.up, &self.down].into_iter().all(crate::base::cuda::takes_map) {
            return true;
        }
        self.activation != Activation::Gelu && [&self.gate, &self.up, &self.down].into_iter().all(InnerMap::is_held)
    }

    /// The same with low-rank products beside gate, up and down.
    #[must_use]
    pub fn with(mut self, [gate, up, down]: [Option<LowRank>; 3]) -> Self {
        self.gate = self.gate.with(0, gate);
        self.up = self.up.with(0, up);
        self.down = self.down.with(0, down);
        self
    }

    /// `down(activation(gate(x)) · up(x))`, `[…, hidden]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    /// `x + scale · self(norm(x))`, `[…, hidden]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward_block(&self, x: &Tensor, block: &MlpBlock) -> Result<Tensor> {
        self.run(x, Some(block.clone()))
    }

    fn run(&self, x: &Tensor, block: Option<MlpBlock>) -> Result<Tensor> {
        #[cfg(any(test, feature = "cuda"))]
        if crate::base::cuda::takes(x) {
            return crate::base::cuda::mlp(x, self, block.as_ref());
        }
        let norm = block.as_ref().map(|block| &block.norm);
        let maps = [&self.gate, &self.up, &self.down].into_iter().flat_map(InnerMap::tensors);
        let trained = Trained::of(norm.into_iter().flat_map(NormWeights::tensors).chain(maps))?;
        let token = trained.token().cloned();
        // beside moments of as many numbers as the weights have, two products more cost little
        let is_full = [&self.gate, &self.up, &self.down].iter().any(|map| map.weight.track_op());
        let kept = (!is_full && (x.track_op() || token.is_some())).then(|| Mutex::new(None));
        let (x, op) = (x.contiguous()?, FusedMlp { mlp: self.clone(), block, kept, trained });
        match token {
            Some(token) => x.apply_op2(&token, op),
            None => x.apply_op1(op),
        }
    }
}

impl MlpBlock {
    /// Whether [`GatedMlp::forward_block`] takes it.
    pub fn is_fused(&self) -> bool {
        #[cfg(any(test, feature = "cuda"))]
        if crate::base::cuda::takes(&self.norm.weight) {
            return true;
        }
        self.norm.is_held()
    }
}

/// `activation(gate) · up`, of what the maps of a gated block give.
///
/// # Errors
/// When the shapes do not fit.
pub fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    #[cfg(any(test, feature = "cuda"))]
    if crate::base::cuda::takes(gate) {
        return crate::base::cuda::gated(activation, gate, up);
    }
    activation.forward(gate)? * up
}

impl Activation {
    /// Of every number.
    ///
    /// # Errors
    /// When candle fails.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        let activation = match self {
            Self::Silu => candle_nn::Activation::Silu,
            Self::Gelu => candle_nn::Activation::Gelu,
            Self::GeluTanh => candle_nn::Activation::GeluPytorchTanh,
            Self::Relu => candle_nn::Activation::Relu,
        };
        activation.forward(x)
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
    /// Outputs of gate and up, where the backward pass will ask for them; it computes them again where the matrices are trained.
    kept: Option<Mutex<Option<[CpuStorage; 2]>>>,
    trained: Trained,
}

/// Elements that a task works on.
const CHUNK: usize = 1 << 13;

impl FusedMlp {
    fn scale<T: Real>(&self) -> T {
        T::of(self.block.as_ref().map_or(1.0, |block| block.scale))
    }

    /// Outputs of gate and up.
    fn inner<T: Real + WithDType>(&self, x: &[T]) -> Result<[Vec<T>; 2]> {
        let (width, inner_width) = self.mlp.gate.widths()?;
        let normed = self.block.as_ref().map(|block| block.norm.rows(x)).transpose()?;
        let input = normed.as_deref().unwrap_or(x);
        let mut both = [(); 2].map(|()| vec![T::zero(); x.len() / width.max(1) * inner_width]);
        for (map, target) in [&self.mlp.gate, &self.mlp.up].into_iter().zip(&mut both) {
            map.apply(input, (target, inner_width), false, T::one())?;
        }
        Ok(both)
    }

    fn forward<T: Real + WithDType>(&self, x: &[T]) -> Result<Vec<T>> {
        let (width, _) = self.mlp.gate.widths()?;
        let [mut gated, raised] = self.inner(x)?;
        let mut out = if self.block.is_some() { x.to_vec() } else { vec![T::zero(); x.len()] };
        let keep = self.block.is_some();
        match &self.kept {
            Some(slot) => {
                let mut inner = vec![T::zero(); gated.len()];
                self.gates(&mut inner, &gated, &raised);
                self.mlp.down.apply(&inner, (&mut out, width), keep, self.scale())?;
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
                self.mlp.down.apply(&gated, (&mut out, width), keep, self.scale())?;
            }
        }
        Ok(out)
    }

    /// `inner = activation(gated) · raised`.
    fn gates<T: Real>(&self, inner: &mut [T], gated: &[T], raised: &[T]) {
        let chunks = inner.par_chunks_mut(CHUNK).zip(gated.par_chunks(CHUNK)).zip(raised.par_chunks(CHUNK));
        chunks.for_each(|((inner, gated), raised)| self.gate(inner, gated, raised));
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

    /// The gradient of `x`, where it is asked for.
    fn backward<T: Real + WithDType>(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let GatedMlp { gate, up, down, .. } = &self.mlp;
        let (width, inner_width) = gate.widths()?;
        let (held, grad) = (Held::of(x)?, Held::of(grad)?);
        let (x_rows, grad): (&[T], &[T]) = (held.numbers()?, grad.numbers()?);
        let grad_rows = Rows::dense(grad, width);
        let [mut gated, mut raised] = match &self.kept {
            Some(slot) => {
                let kept = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
                let Some([gated, raised]) = kept else {
                    candle_core::bail!("gated-mlp: its forward pass kept nothing")
                };
                [T::cpu_storage_data(gated)?, T::cpu_storage_data(raised)?]
            }
            None => self.inner(x_rows)?,
        };
        let mut inner = vec![T::zero(); gated.len()];
        if down.is_trained() {
            self.gates(&mut inner, &gated, &raised);
            down.leave_gradients(&inner, grad_rows, self.scale(), &self.trained)?;
        }
        down.input_gradient(&mut inner, false, grad_rows, self.scale())?;
        let chunks = gated.par_chunks_mut(CHUNK).zip(raised.par_chunks_mut(CHUNK)).zip(inner.par_chunks(CHUNK));
        chunks.for_each(|((gated, raised), inner)| self.gate_gradient(gated, raised, inner));
        drop(inner);
        let (gated, raised) = (Rows::dense(&gated, inner_width), Rows::dense(&raised, inner_width));
        if gate.is_trained() || up.is_trained() {
            let normed = self.block.as_ref().map(|block| block.norm.rows(x_rows)).transpose()?;
            let input = normed.as_deref().unwrap_or(x_rows);
            gate.leave_gradients(input, gated, T::one(), &self.trained)?;
            up.leave_gradients(input, raised, T::one(), &self.trained)?;
        }
        let trains_norm = self.block.iter().any(|block| block.norm.tensors().any(Tensor::track_op));
        if !x.track_op() && !trains_norm {
            return Ok(None);
        }
        let mut dx = vec![T::zero(); grad.len()];
        gate.input_gradient(&mut dx, false, gated, T::one())?;
        up.input_gradient(&mut dx, true, raised, T::one())?;
        if let Some(block) = &self.block {
            block.norm.leave_gradients(x_rows, &dx, &self.trained)?;
            dx = block.norm.rows_gradient(x_rows, &dx)?;
            dx.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK)).for_each(|(dx, grad)| {
                dx.iter_mut().zip(grad).for_each(|(dx, g)| *dx += *g);
            });
        }
        tensor(dx, x.shape()).map(Some)
    }

    fn run_forward(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (width, inner_width) = self.mlp.gate.widths()?;
        let fits = layout.dims().last() == Some(&width)
            && self.mlp.up.widths()? == (width, inner_width)
            && self.mlp.down.widths()? == (inner_width, width);
        if !fits {
            let gate = self.mlp.gate.weight.dims();
            candle_core::bail!("gated-mlp: input {:?} does not fit weight {gate:?}", layout.dims());
        }
        let y = match x {
            CpuStorage::F32(_) => CpuStorage::F32(self.forward(numbers(x, layout)?)?),
            CpuStorage::F64(_) => CpuStorage::F64(self.forward(numbers(x, layout)?)?),
            _ => candle_core::bail!("gated-mlp: the input is neither float32 nor float64"),
        };
        Ok((y, layout.shape().clone()))
    }

    fn run_backward(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        match x.dtype() {
            DType::F64 => self.backward::<f64>(x, &grad),
            _ => self.backward::<f32>(x, &grad),
        }
    }
}

impl CustomOp1 for FusedMlp {
    fn name(&self) -> &'static str {
        "gated-mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run_forward(x, layout)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.run_backward(x, grad)
    }
}

impl CustomOp2 for FusedMlp {
    fn name(&self) -> &'static str {
        "gated-mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run_forward(x, layout)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.run_backward(x, grad)?, self.trained.no_gradient()?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Module, Var};

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
            let map = |weight| InnerMap::new(weight, None);
            let mlp = GatedMlp { gate: map(&gate), up: map(&up), down: map(&down), activation };
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

    #[test]
    fn everything_in_it_is_trained_with_exact_gradients() {
        let x = numbers(&[2, 3, 4], 0.0);
        let (gate, up, down) = ([6, 4], [6, 4], [4, 6]);
        let low = |[out, width]: [usize; 2]| [vec![2, width], vec![out, 2]];
        let mut shapes: Vec<Vec<usize>> = vec![vec![4], vec![4], gate.to_vec(), up.to_vec(), down.to_vec()];
        shapes.extend([gate, up, down].into_iter().flat_map(low));
        let tensors: Vec<Tensor> = (1..).zip(&shapes).map(|(seed, shape)| numbers(shape, f64::from(seed))).collect();
        let run = |tensors: &[Tensor], x: &Tensor, is_block: bool| {
            let map = |weight: &Tensor| InnerMap::new(weight, None);
            let low = |at: usize| {
                Some(LowRank { a: tensors[at].clone(), b: tensors[at + 1].clone(), scale: 0.5 + at as f64 / 10.0 })
            };
            let (gate, up, down) = (map(&tensors[2]), map(&tensors[3]), map(&tensors[4]));
            let mlp = GatedMlp { gate, up, down, activation: Activation::Silu }.with([low(5), low(7), low(9)]);
            let norm = Norm { kind: NormKind::Layer, epsilon: 1e-5, weight_offset: 0.0, bias: true };
            let norm = NormWeights { norm, weight: tensors[0].clone(), bias: Some(tensors[1].clone()) };
            if is_block { mlp.forward_block(x, &MlpBlock { norm, scale: 0.7 }) } else { mlp.forward(x) }
        };
        for is_block in [false, true] {
            for at in (if is_block { 0 } else { 2 })..tensors.len() {
                let with = |one: &Tensor| {
                    let mut tensors = tensors.clone();
                    tensors[at] = one.clone();
                    tensors
                };
                check_gradient(&tensors[at], |one| run(&with(one), &x, is_block));
            }
            let all: Vec<Tensor> = tensors.iter().map(|t| Var::from_tensor(t).unwrap().as_tensor().clone()).collect();
            check_gradient(&x, |x| run(&all, x, is_block));
        }
    }
}

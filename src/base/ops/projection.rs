//! The linear maps around attention with what stands beside them, as one operation each.
//!
//! Neither the normalised input, nor unrotated queries and keys, nor a sum that only the next map reads is kept for the
//! backward pass: it needs the input alone, from which what it reads of the others is computed again.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::NormWeights;
use super::held::{Held, numbers, tensor};
use super::inner_map::{InnerMap, LowRank, Rows};
use super::real::{Real, vectorised};
use super::rope::turn;
use super::trained::Trained;

/// Queries, keys and values of a layer: `x` normalised, mapped, and queries and keys rotated.
#[derive(Clone, Debug)]
pub struct QkvProjection {
    /// Before the map.
    pub norm: NormWeights,
    /// Maps whose outputs, side by side, are `(num_heads + 2 · num_kv_heads) · head_dim` wide.
    pub maps: Vec<InnerMap>,
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
    /// Whether [`forward`](Self::forward) computes it: float weights on the CPU, or weights on a device with kernels.
    pub fn is_fused(&self) -> bool {
        #[cfg(any(test, feature = "cuda"))]
        if crate::base::cuda::takes(&self.norm.weight) && self.maps.iter().all(crate::base::cuda::takes_map) {
            return true;
        }
        self.norm.is_held() && self.maps.iter().all(InnerMap::is_held)
    }

    /// The same with a low-rank product beside the outputs from `first` on.
    ///
    /// # Errors
    /// When a map is no matrix.
    pub fn with(mut self, mut first: usize, low_rank: Option<LowRank>) -> Result<Self> {
        for map in &mut self.maps {
            let out = map.weight.dim(0)?;
            if first < out {
                map.beside.extend(low_rank.map(|low_rank| (first, low_rank)));
                break;
            }
            first -= out;
        }
        Ok(self)
    }

    /// Input and output width.
    fn widths(&self) -> Result<(usize, usize)> {
        let maps = self.maps.iter().map(InnerMap::widths).collect::<Result<Vec<_>>>()?;
        match maps.first() {
            Some((hidden, _)) if maps.iter().all(|(width, _)| width == hidden) => {
                Ok((*hidden, maps.iter().map(|(_, out)| out).sum()))
            }
            _ => candle_core::bail!("qkv-projection: maps of {maps:?}"),
        }
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.norm.tensors().chain(self.maps.iter().flat_map(InnerMap::tensors))
    }

    /// `[batch, seq, hidden_size]` → `[batch, seq, num_heads + 2 · num_kv_heads, head_dim]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, x: &Tensor, rotation: Option<Rotation>) -> Result<Tensor> {
        let (batch, seq, hidden) = x.dims3()?;
        let (weight_in, width) = self.widths()?;
        let angles = rotation.as_ref().map(|r| Ok::<_, candle_core::Error>((r.cos.dims3()?, r.sin.dims3()?)));
        let angles_fit = angles.transpose()?.is_none_or(|(cos, sin)| {
            cos == sin && (cos.0, cos.1) == (batch, seq) && 2 * cos.2 <= self.head_dim && cos.2 > 0
        });
        let rotated = self.rotated_heads * self.head_dim;
        if hidden != weight_in || !width.is_multiple_of(self.head_dim.max(1)) || rotated > width || !angles_fit {
            candle_core::bail!("qkv-projection: input {:?}, weight [{width}, {weight_in}]", x.dims());
        }
        #[cfg(any(test, feature = "cuda"))]
        if crate::base::cuda::takes(x) {
            return crate::base::cuda::qkv(x, self, rotation.as_ref());
        }
        let trained = Trained::of(self.tensors())?;
        let token = trained.token().cloned();
        let (x, op) = (x.contiguous()?, Qkv { projection: self.clone(), rotation, trained });
        match token {
            Some(token) => x.apply_op2(&token, op),
            None => x.apply_op1(op),
        }
    }
}

struct Qkv {
    projection: QkvProjection,
    rotation: Option<Rotation>,
    trained: Trained,
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
        let (hidden, width) = self.projection.widths()?;
        let x = self.projection.norm.rows(x)?;
        let mut y = vec![T::zero(); x.len() / hidden.max(1) * width];
        let mut first = 0;
        for map in &self.projection.maps {
            map.apply(&x, (y.get_mut(first..).unwrap_or_default(), width), false, T::one())?;
            first += map.widths()?.1;
        }
        self.rotate(&mut y, width, false)?;
        Ok(y)
    }

    /// The gradient of `x`, where it is asked for.
    fn backward<T: Real + WithDType>(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let QkvProjection { norm, maps, .. } = &self.projection;
        let (_, width) = self.projection.widths()?;
        let held = Held::of(x)?;
        let x_rows = held.numbers::<T>()?;
        let mut turned = Held::of(grad)?.numbers::<T>()?.to_vec();
        self.rotate(&mut turned, width, true)?;
        let is_trained = maps.iter().any(InnerMap::is_trained);
        let normed = is_trained.then(|| norm.rows(x_rows)).transpose()?;
        let asked = x.track_op() || norm.tensors().any(Tensor::track_op);
        let mut dx = vec![T::zero(); if asked { x_rows.len() } else { 0 }];
        let mut first = 0;
        for map in maps {
            let grad = Rows { data: turned.get(first..).unwrap_or_default(), stride: width };
            if let Some(normed) = &normed {
                map.leave_gradients(normed, grad, T::one(), &self.trained)?;
            }
            if asked {
                map.input_gradient(&mut dx, first > 0, grad, T::one())?;
            }
            first += map.widths()?.1;
        }
        if !asked {
            return Ok(None);
        }
        drop((turned, normed));
        norm.leave_gradients(x_rows, &dx, &self.trained)?;
        tensor(norm.rows_gradient(x_rows, &dx)?, x.shape()).map(Some)
    }

    fn run_forward(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, seq, _) = layout.shape().dims3()?;
        let y = match x {
            CpuStorage::F32(_) => CpuStorage::F32(self.forward(numbers(x, layout)?)?),
            CpuStorage::F64(_) => CpuStorage::F64(self.forward(numbers(x, layout)?)?),
            _ => candle_core::bail!("qkv-projection: the input is neither float32 nor float64"),
        };
        let heads = self.projection.widths()?.1 / self.projection.head_dim.max(1);
        Ok((y, (batch, seq, heads, self.projection.head_dim).into()))
    }

    fn run_backward(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        match x.dtype() {
            DType::F64 => self.backward::<f64>(x, &grad),
            _ => self.backward::<f32>(x, &grad),
        }
    }
}

impl CustomOp1 for Qkv {
    fn name(&self) -> &'static str {
        "qkv-projection"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run_forward(x, layout)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.run_backward(x, grad)
    }
}

impl CustomOp2 for Qkv {
    fn name(&self) -> &'static str {
        "qkv-projection"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run_forward(x, layout)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.run_backward(x, grad)?, self.trained.no_gradient()?))
    }
}

/// What follows attention: the adapter's term added, the output map, its result scaled and added to the residual stream.
#[derive(Clone, Debug)]
pub struct OutputProjection {
    /// `[hidden_size, num_heads · head_dim]`.
    pub map: InnerMap,
    /// On the map's result.
    pub scale: f64,
}

impl OutputProjection {
    /// Whether [`forward`](Self::forward) computes it: float weights on the CPU, or weights on a device with kernels.
    pub fn is_fused(&self) -> bool {
        #[cfg(any(test, feature = "cuda"))]
        if crate::base::cuda::takes_map(&self.map) {
            return true;
        }
        self.map.is_held()
    }

    /// The same with a low-rank product beside it.
    #[must_use]
    pub fn with(mut self, low_rank: Option<LowRank>) -> Self {
        self.map = self.map.with(0, low_rank);
        self
    }

    /// `residual + scale · map(mixed + term)`: `mixed` and `term` of `[batch, seq, heads, head_dim]`, `residual` of `[batch, seq,
    /// hidden_size]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, mixed: &Tensor, term: Option<&Tensor>, residual: &Tensor) -> Result<Tensor> {
        let (batch, seq, heads, width) = mixed.dims4()?;
        let (map_in, out) = self.map.widths()?;
        let fits = residual.dims() == [batch, seq, out]
            && heads * width == map_in
            && term.is_none_or(|term| term.dims() == mixed.dims());
        if !fits {
            candle_core::bail!("output-projection: {:?} does not fit {:?}", mixed.dims(), self.map.weight.dims());
        }
        #[cfg(any(test, feature = "cuda"))]
        if crate::base::cuda::takes(mixed) {
            return crate::base::cuda::output(mixed, term, residual, self);
        }
        let trained = Trained::of(self.map.tensors())?;
        let token = trained.token().cloned();
        let (mixed, residual) = (mixed.contiguous()?, residual.contiguous()?);
        let op = |third| Output { projection: self.clone(), trained, third };
        match (term, token) {
            (None, None) => mixed.apply_op2(&residual, op(Third::None)),
            (Some(term), None) => mixed.apply_op3(&residual, &term.contiguous()?, op(Third::Term)),
            (None, Some(token)) => mixed.apply_op3(&residual, &token, op(Third::Token)),
            // a trained map and a term: the sum is kept
            (Some(term), Some(token)) => (mixed + term)?.apply_op3(&residual, &token, op(Third::Token)),
        }
    }
}

/// What the operation has besides `mixed` and the residual stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Third {
    None,
    Term,
    Token,
}

struct Output {
    projection: OutputProjection,
    trained: Trained,
    third: Third,
}

impl Output {
    fn forward<T: Real + WithDType>(&self, mixed: &[T], term: Option<&[T]>, residual: &[T]) -> Result<Vec<T>> {
        let map = &self.projection.map;
        let sum: Option<Vec<T>> =
            term.map(|term| mixed.par_iter().zip(term).with_min_len(CHUNK).map(|(a, b)| *a + *b).collect());
        let mut y = residual.to_vec();
        let (_, hidden) = map.widths()?;
        map.apply(sum.as_deref().unwrap_or(mixed), (&mut y, hidden), true, T::of(self.projection.scale))?;
        Ok(y)
    }

    /// The gradient of `mixed`, which is that of the term too.
    fn backward(&self, mixed: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        fn of<T: Real + WithDType>(op: &Output, mixed: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            let map = &op.projection.map;
            let (_, hidden) = map.widths()?;
            let (grad, scale) = (Held::of(grad)?, T::of(op.projection.scale));
            let grad = Rows::dense(grad.numbers()?, hidden);
            map.leave_gradients(Held::of(mixed)?.numbers()?, grad, scale, &op.trained)?;
            if !mixed.track_op() && op.third != Third::Term {
                return Ok(None);
            }
            let mut out = vec![T::zero(); mixed.elem_count()];
            map.input_gradient(&mut out, false, grad, scale)?;
            tensor(out, mixed.shape()).map(Some)
        }
        let grad = grad.contiguous()?;
        match mixed.dtype() {
            DType::F64 => of::<f64>(self, mixed, &grad),
            _ => of::<f32>(self, mixed, &grad),
        }
    }

    fn run(
        &self,
        (mixed, l): (&CpuStorage, &Layout),
        (x, lx): (&CpuStorage, &Layout),
        term: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        fn of<T: Real + WithDType>(
            op: &Output,
            inputs: [(&CpuStorage, &Layout); 2],
            term: Option<(&CpuStorage, &Layout)>,
        ) -> Result<CpuStorage> {
            let [mixed, x] = inputs;
            let term = term.map(|(term, layout)| numbers(term, layout)).transpose()?;
            op.forward::<T>(numbers(mixed.0, mixed.1)?, term, numbers(x.0, x.1)?).map(T::to_cpu_storage_owned)
        }
        let inputs = [(mixed, l), (x, lx)];
        let y = match mixed {
            CpuStorage::F32(_) => of::<f32>(self, inputs, term)?,
            CpuStorage::F64(_) => of::<f64>(self, inputs, term)?,
            _ => candle_core::bail!("output-projection: the input is neither float32 nor float64"),
        };
        Ok((y, lx.shape().clone()))
    }
}

/// Elements that a task works on.
const CHUNK: usize = 1 << 13;

/// The gradient of the residual stream, where it is asked for.
fn passed(x: &Tensor, grad: &Tensor) -> Option<Tensor> {
    x.track_op().then(|| grad.clone())
}

impl CustomOp2 for Output {
    fn name(&self) -> &'static str {
        "output-projection"
    }

    fn cpu_fwd(&self, mixed: &CpuStorage, l: &Layout, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run((mixed, l), (x, lx), None)
    }

    fn bwd(&self, mixed: &Tensor, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.backward(mixed, grad)?, passed(x, grad)))
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
        x: &CpuStorage,
        lx: &Layout,
        third: &CpuStorage,
        lt: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run((mixed, l), (x, lx), (self.third == Third::Term).then_some((third, lt)))
    }

    fn bwd(
        &self,
        mixed: &Tensor,
        x: &Tensor,
        _third: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let inner = self.backward(mixed, grad)?;
        let third = match self.third {
            Third::Term => inner.clone(),
            _ => self.trained.no_gradient()?,
        };
        Ok((inner.filter(|_| mixed.track_op()), passed(x, grad), third))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

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
            let maps = vec![InnerMap::new(&weight, Some(&bias))];
            let projection = QkvProjection { norm: norm.clone(), maps, rotated_heads: 3, head_dim: 4 };
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
        let (weight, bias) = (numbers(&[6, 8], 3.0), numbers(&[6], 4.0));
        let output = OutputProjection { map: InnerMap::new(&weight, Some(&bias)), scale: 0.7 };
        for term in [None, Some(&term)] {
            let sum = term.map_or(mixed.clone(), |term| (&mixed + term).unwrap()).reshape((2, 3, 8)).unwrap();
            let mapped = linear(&sum, &weight, Some(&bias)).unwrap();
            let expected = (&residual + (mapped * 0.7).unwrap()).unwrap();
            assert!(max_difference(&output.forward(&mixed, term, &residual).unwrap(), &expected) < 1e-13);
            check_gradient(&mixed, |mixed| output.forward(mixed, term, &residual));
            check_gradient(&residual, |residual| output.forward(&mixed, term, residual));
        }
        check_gradient(&term, |term| output.forward(&mixed, Some(term), &residual));
    }

    #[test]
    fn projections_train_their_norm_maps_and_products_with_exact_gradients() {
        let angles = numbers(&[2, 3, 1], 1.0);
        let rotation = Rotation { cos: angles.cos().unwrap(), sin: angles.sin().unwrap(), interleaved: false };
        // norm and its bias; three maps with biases; a product beside the first and one beside the third
        let shapes: [&[usize]; 12] =
            [&[6], &[6], &[8, 6], &[8], &[4, 6], &[4], &[4, 6], &[4], &[2, 6], &[8, 2], &[1, 6], &[4, 1]];
        let tensors: Vec<Tensor> = (1..).zip(shapes).map(|(seed, shape)| numbers(shape, f64::from(seed))).collect();
        let x = numbers(&[2, 3, 6], 0.0);
        let run = |tensors: &[Tensor], x: &Tensor, is_joined: bool| {
            let norm = Norm { kind: NormKind::Rms, epsilon: 1e-5, weight_offset: 0.0, bias: true };
            let norm = NormWeights { norm, weight: tensors[0].clone(), bias: Some(tensors[1].clone()) };
            let map = |at: usize| InnerMap::new(&tensors[at], Some(&tensors[at + 1]));
            let join = |at: [usize; 3]| Tensor::cat(&at.map(|at| &tensors[at]), 0);
            let maps = match is_joined {
                true => vec![InnerMap::new(&join([2, 4, 6])?, Some(&join([3, 5, 7])?))],
                false => vec![map(2), map(4), map(6)],
            };
            let low = |at: usize| Some(LowRank { a: tensors[at].clone(), b: tensors[at + 1].clone(), scale: 0.7 });
            let projection = QkvProjection { norm, maps, rotated_heads: 3, head_dim: 4 };
            projection.with(0, low(8))?.with(12, low(10))?.forward(x, Some(rotation.clone()))
        };
        let found = [true, false].map(|is_joined| run(&tensors, &x, is_joined).unwrap());
        assert!(max_difference(&found[0], &found[1]) < 1e-14);
        for is_joined in [true, false] {
            for at in 0..tensors.len() {
                let with = |one: &Tensor| {
                    let mut tensors = tensors.clone();
                    tensors[at] = one.clone();
                    tensors
                };
                check_gradient(&tensors[at], |one| run(&with(one), &x, is_joined));
            }
            let all: Vec<Tensor> = tensors.iter().map(|t| Var::from_tensor(t).unwrap().as_tensor().clone()).collect();
            check_gradient(&x, |x| run(&all, x, is_joined));
        }
    }

    #[test]
    fn the_output_map_is_trained_with_exact_gradients_with_and_without_a_term() {
        let (mixed, term, residual) =
            (numbers(&[2, 3, 2, 4], 0.0), numbers(&[2, 3, 2, 4], 1.0), numbers(&[2, 3, 6], 2.0));
        let tensors = [numbers(&[6, 8], 3.0), numbers(&[6], 4.0), numbers(&[2, 8], 5.0), numbers(&[6, 2], 6.0)];
        let of = |[weight, bias, a, b]: [Tensor; 4]| {
            let low_rank = LowRank { a, b, scale: 1.3 };
            OutputProjection { map: InnerMap::new(&weight, Some(&bias)), scale: 0.7 }.with(Some(low_rank))
        };
        let all = of(tensors.clone().map(|t| Var::from_tensor(&t).unwrap().as_tensor().clone()));
        for term in [None, Some(&term)] {
            for at in 0..tensors.len() {
                let with = |one: &Tensor| {
                    let mut tensors = tensors.clone();
                    tensors[at] = one.clone();
                    of(tensors)
                };
                check_gradient(&tensors[at], |one| with(one).forward(&mixed, term, &residual));
            }
            check_gradient(&mixed, |mixed| all.forward(mixed, term, &residual));
            check_gradient(&residual, |residual| all.forward(&mixed, term, residual));
        }
        check_gradient(&term, |term| all.forward(&mixed, Some(term), &residual));
    }
}

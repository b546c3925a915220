//! A linear map inside of an operation, and by itself.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::held::{Held, is_held, numbers, tensor};
use super::matmul::{Matrix, Target, Threads, multiply};
use super::real::Real;
use super::trained::Trained;

/// A linear map: `x · weightᵀ + bias`, and low-rank products beside some of its outputs. Each tensor may be trained.
#[derive(Clone, Debug)]
pub struct InnerMap {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// With the first output that each adds to.
    pub beside: Vec<(usize, LowRank)>,
}

/// `scale · B (A x)`, as LoRA adds it to a linear map.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// The factor.
    pub scale: f64,
}

/// Rows whose first elements are `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub(super) data: &'a [T],
    pub(super) stride: usize,
}

impl<'a, T: Real> Rows<'a, T> {
    pub(super) fn dense(data: &'a [T], width: usize) -> Self {
        Self { data, stride: width }
    }

    fn matrix(self, rows: usize, first: usize, width: usize) -> Matrix<'a, T> {
        Matrix::strided(self.data.get(first..).unwrap_or_default(), rows, width, self.stride)
    }
}

impl LowRank {
    fn rank(&self) -> Result<usize> {
        self.a.dim(0)
    }

    /// `A x` of every row.
    fn inner<T: Real + WithDType>(&self, x: &[T]) -> Result<Vec<T>> {
        let (rank, width) = self.a.dims2()?;
        let rows = x.len() / width.max(1);
        let mut inner = vec![T::zero(); rows * rank];
        let a = Held::of(&self.a)?;
        let a = Matrix::new(a.numbers()?, rank, width).t();
        multiply(Target::strided(&mut inner, rank), false, T::one(), Matrix::new(x, rows, width), a, Threads::All);
        Ok(inner)
    }

    /// The gradient of [`inner`](Self::inner), given that of the outputs.
    fn inner_gradient<T: Real + WithDType>(
        &self,
        grad: Rows<T>,
        first: usize,
        rows: usize,
        scale: T,
    ) -> Result<Vec<T>> {
        let (out, rank) = self.b.dims2()?;
        let mut inner = vec![T::zero(); rows * rank];
        let b = Held::of(&self.b)?;
        let b = Matrix::new(b.numbers()?, out, rank);
        let factor = scale * T::of(self.scale);
        multiply(Target::strided(&mut inner, rank), false, factor, grad.matrix(rows, first, out), b, Threads::All);
        Ok(inner)
    }
}

impl InnerMap {
    /// A map of a matrix and a bias.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Self {
        Self { weight: weight.clone(), bias: bias.cloned(), beside: Vec::new() }
    }

    /// The same with a product beside the outputs from `first` on.
    #[must_use]
    pub fn with(mut self, first: usize, low_rank: Option<LowRank>) -> Self {
        self.beside.extend(low_rank.map(|low_rank| (first, low_rank)));
        self
    }

    /// Whether operations compute it: float weights on the CPU.
    pub fn is_held(&self) -> bool {
        is_held(&self.weight) && self.bias.as_ref().is_none_or(is_held)
    }

    /// Its tensors.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let beside = self.beside.iter().flat_map(|(_, low_rank)| [&low_rank.a, &low_rank.b]);
        [Some(&self.weight), self.bias.as_ref()].into_iter().flatten().chain(beside)
    }

    /// Whether the gradient of something of it is computed from its input.
    pub(crate) fn is_trained(&self) -> bool {
        self.tensors().any(Tensor::track_op)
    }

    /// Input and output width.
    pub(super) fn widths(&self) -> Result<(usize, usize)> {
        let (out, width) = self.weight.dims2()?;
        for (first, low_rank) in &self.beside {
            let ((rank, a_in), (b_out, b_rank)) = (low_rank.a.dims2()?, low_rank.b.dims2()?);
            if a_in != width || rank != b_rank || first + b_out > out {
                candle_core::bail!(
                    "a product [{b_out}, {b_rank}] · [{rank}, {a_in}] does not fit beside [{out}, {width}]"
                );
            }
        }
        if self.bias.as_ref().is_some_and(|bias| bias.dims() != [out]) {
            candle_core::bail!("a bias does not fit [{out}, {width}]");
        }
        Ok((width, out))
    }

    /// `target = keep · target + scale · self(x)`; rows of the target begin `stride` apart.
    pub(super) fn apply<T: Real + WithDType>(
        &self,
        x: &[T],
        (target, stride): (&mut [T], usize),
        keep: bool,
        scale: T,
    ) -> Result<()> {
        let (width, out) = self.widths()?;
        let rows = x.len() / width.max(1);
        let weight = Held::of(&self.weight)?;
        let weight = Matrix::new(weight.numbers()?, out, width).t();
        multiply(Target::strided(target, stride), keep, scale, Matrix::new(x, rows, width), weight, Threads::All);
        for (first, low_rank) in &self.beside {
            let (out, rank) = low_rank.b.dims2()?;
            let inner = low_rank.inner(x)?;
            let b = Held::of(&low_rank.b)?;
            let (inner, b) = (Matrix::new(&inner, rows, rank), Matrix::new(b.numbers()?, out, rank).t());
            let target = Target::strided(&mut target[*first..], stride);
            multiply(target, true, scale * T::of(low_rank.scale), inner, b, Threads::All);
        }
        if let Some(bias) = &self.bias {
            let bias = Held::of(bias)?;
            let bias: &[T] = bias.numbers()?;
            target.par_chunks_mut(stride.max(1)).for_each(|row| {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += scale * *b);
            });
        }
        Ok(())
    }

    /// `target = keep · target + ` the gradient of the input.
    pub(super) fn input_gradient<T: Real + WithDType>(
        &self,
        target: &mut [T],
        keep: bool,
        grad: Rows<T>,
        scale: T,
    ) -> Result<()> {
        let (width, out) = self.widths()?;
        let rows = target.len() / width.max(1);
        let weight = Held::of(&self.weight)?;
        let weight = Matrix::new(weight.numbers()?, out, width);
        multiply(Target::strided(target, width), keep, scale, grad.matrix(rows, 0, out), weight, Threads::All);
        for (first, low_rank) in &self.beside {
            let rank = low_rank.rank()?;
            let inner = low_rank.inner_gradient(grad, *first, rows, scale)?;
            let a = Held::of(&low_rank.a)?;
            let (inner, a) = (Matrix::new(&inner, rows, rank), Matrix::new(a.numbers()?, rank, width));
            multiply(Target::strided(target, width), true, T::one(), inner, a, Threads::All);
        }
        Ok(())
    }

    /// Leaves the gradients of what is trained.
    pub(super) fn leave_gradients<T: Real + WithDType>(
        &self,
        x: &[T],
        grad: Rows<T>,
        scale: T,
        trained: &Trained,
    ) -> Result<()> {
        let (width, out) = self.widths()?;
        let rows = x.len() / width.max(1);
        let x_rows = Matrix::new(x, rows, width);
        // the product of rows on the left and rows on the right
        let outer = |left: Matrix<T>, right: Matrix<T>, [height, width]: [usize; 2], scale: T| {
            let mut sum = vec![T::zero(); height * width];
            multiply(Target::strided(&mut sum, width), false, scale, left.t(), right, Threads::All);
            sum
        };
        if self.weight.track_op() {
            trained.leave(&self.weight, outer(grad.matrix(rows, 0, out), x_rows, [out, width], scale))?;
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.track_op()) {
            trained.leave(bias, column_sums(grad, rows, out, scale))?;
        }
        for (first, low_rank) in &self.beside {
            let (out, rank) = low_rank.b.dims2()?;
            if low_rank.b.track_op() {
                let inner = low_rank.inner(x)?;
                let (grad, inner) = (grad.matrix(rows, *first, out), Matrix::new(&inner, rows, rank));
                trained.leave(&low_rank.b, outer(grad, inner, [out, rank], scale * T::of(low_rank.scale)))?;
            }
            if low_rank.a.track_op() {
                let inner = low_rank.inner_gradient(grad, *first, rows, scale)?;
                trained.leave(&low_rank.a, outer(Matrix::new(&inner, rows, rank), x_rows, [rank, width], T::one()))?;
            }
        }
        Ok(())
    }

    /// The map of `x`, `[…, in]` → `[…, out]`, as one operation that keeps only `x`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let trained = Trained::of(self.tensors())?;
        let x = x.contiguous()?;
        let op = |trained| MapOp { map: self.clone(), trained };
        match trained.token().cloned() {
            Some(token) => x.apply_op2(&token, op(trained)),
            None => x.apply_op1(op(trained)),
        }
    }
}

/// `scale · Σ` of the first `width` columns.
pub(super) fn column_sums<T: Real>(grad: Rows<T>, rows: usize, width: usize, scale: T) -> Vec<T> {
    let mut sums = vec![T::zero(); width];
    for row in 0..rows {
        let row = &grad.data[row * grad.stride..][..width];
        sums.iter_mut().zip(row).for_each(|(sum, g)| *sum += scale * *g);
    }
    sums
}

struct MapOp {
    map: InnerMap,
    trained: Trained,
}

impl MapOp {
    fn run(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        fn of<T: Real + WithDType>(map: &InnerMap, x: &[T]) -> Result<CpuStorage> {
            let (width, out) = map.widths()?;
            let mut y = vec![T::zero(); x.len() / width.max(1) * out];
            map.apply(x, (&mut y, out), false, T::one())?;
            Ok(T::to_cpu_storage_owned(y))
        }
        let (width, out) = self.map.widths()?;
        let mut dims = layout.dims().to_vec();
        match dims.last_mut() {
            Some(last) if *last == width => *last = out,
            _ => candle_core::bail!("linear: input {:?} does not fit weight [{out}, {width}]", layout.dims()),
        }
        let y = match x {
            CpuStorage::F32(_) => of::<f32>(&self.map, numbers(x, layout)?)?,
            CpuStorage::F64(_) => of::<f64>(&self.map, numbers(x, layout)?)?,
            _ => candle_core::bail!("linear: the input is neither float32 nor float64"),
        };
        Ok((y, dims.into()))
    }

    fn gradients(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        fn of<T: Real + WithDType>(op: &MapOp, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            let (_, out) = op.map.widths()?;
            let (held, grad) = (Held::of(x)?, Held::of(grad)?);
            let grad = Rows::dense(grad.numbers::<T>()?, out);
            op.map.leave_gradients(held.numbers()?, grad, T::one(), &op.trained)?;
            if !x.track_op() {
                return Ok(None);
            }
            let mut dx = vec![T::zero(); x.elem_count()];
            op.map.input_gradient(&mut dx, false, grad, T::one())?;
            tensor(dx, x.shape()).map(Some)
        }
        let grad = grad.contiguous()?;
        match x.dtype() {
            DType::F64 => of::<f64>(self, x, &grad),
            _ => of::<f32>(self, x, &grad),
        }
    }
}

impl CustomOp1 for MapOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(x, layout)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.gradients(x, grad)
    }
}

impl CustomOp2 for MapOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(x, lx)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.gradients(x, grad)?, self.trained.no_gradient()?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::linear;
    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;

    #[test]
    fn it_is_the_composed_form_with_exact_gradients_of_all_its_tensors() {
        let x = numbers(&[2, 3, 4], 0.0);
        let tensors = [
            numbers(&[6, 4], 1.0),
            numbers(&[6], 2.0),
            numbers(&[2, 4], 3.0),
            numbers(&[3, 2], 4.0),
            numbers(&[1, 4], 5.0),
            numbers(&[2, 1], 6.0),
        ];
        let map = |tensors: &[Tensor; 6]| {
            let [weight, bias, a, b, a2, b2] = tensors.clone();
            InnerMap::new(&weight, Some(&bias))
                .with(1, Some(LowRank { a, b, scale: 0.7 }))
                .with(4, Some(LowRank { a: a2, b: b2, scale: 1.3 }))
        };
        let [weight, bias, a, b, a2, b2] = &tensors;
        let beside = |a, b, scale: f64| (linear(&linear(&x, a, None).unwrap(), b, None).unwrap() * scale).unwrap();
        let zeros = |width| Tensor::zeros((2, 3, width), DType::F64, &candle_core::Device::Cpu).unwrap();
        let sides = Tensor::cat(&[&zeros(1), &beside(a, b, 0.7), &beside(a2, b2, 1.3)], 2).unwrap();
        let expected = (linear(&x, weight, Some(bias)).unwrap() + sides).unwrap();
        assert!(max_difference(&map(&tensors).forward(&x).unwrap(), &expected) < 1e-14);
        check_gradient(&x, |x| map(&tensors).forward(x));
        for at in 0..tensors.len() {
            let with = |one: &Tensor| {
                let mut tensors = tensors.clone();
                tensors[at] = one.clone();
                map(&tensors)
            };
            check_gradient(&tensors[at], |one| with(one).forward(&x));
            check_gradient(&x, |x| with(&tensors[at]).forward(x));
        }
        // the same tensor twice
        let tied = |w: &Tensor| InnerMap::new(w, None).forward(&InnerMap::new(w, None).forward(&x.narrow(2, 0, 4)?)?);
        check_gradient(&numbers(&[4, 4], 7.0), tied);
    }
}

//! Results of kernels as operations that candle can go back through.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor};

/// From inputs, result and the result's gradient to those gradients of the inputs that are asked for.
pub(super) trait Backward<const N: usize>:
    Fn([&Tensor; N], &Tensor, &Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static
{
}

impl<const N: usize, F> Backward<N> for F where
    F: Fn([&Tensor; N], &Tensor, &Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static
{
}

/// A result that exists already, handed to candle when it asks for it.
struct Computed<const N: usize, F> {
    name: &'static str,
    made: Mutex<Option<Storage>>,
    shape: Shape,
    backward: F,
}

impl<const N: usize, F> Computed<N, F> {
    fn new(name: &'static str, made: Storage, shape: impl Into<Shape>, backward: F) -> Self {
        Self { name, made: Mutex::new(Some(made)), shape: shape.into(), backward }
    }

    fn take(&self) -> Option<Storage> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take() {
            Some(Storage::Cpu(storage)) => Ok((storage, self.shape.clone())),
            _ => candle_core::bail!("{}: its result is not on the CPU", self.name),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take() {
            Some(Storage::Cuda(storage)) => Ok((storage, self.shape.clone())),
            _ => candle_core::bail!("{}: its result is not on a CUDA device", self.name),
        }
    }
}

/// A result that depends on `x`.
pub(super) fn of_one(
    x: &Tensor,
    name: &'static str,
    made: Storage,
    shape: impl Into<Shape>,
    backward: impl Backward<1>,
) -> Result<Tensor> {
    x.apply_op1(Computed::<1, _>::new(name, made, shape, backward))
}

/// A result that depends on two tensors.
pub(super) fn of_two(
    [x, y]: [&Tensor; 2],
    name: &'static str,
    made: Storage,
    shape: impl Into<Shape>,
    backward: impl Backward<2>,
) -> Result<Tensor> {
    x.apply_op2(y, Computed::<2, _>::new(name, made, shape, backward))
}

/// A result that depends on three tensors.
pub(super) fn of_three(
    [x, y, z]: [&Tensor; 3],
    name: &'static str,
    made: Storage,
    shape: impl Into<Shape>,
    backward: impl Backward<3>,
) -> Result<Tensor> {
    x.apply_op3(y, z, Computed::<3, _>::new(name, made, shape, backward))
}

impl<F: Backward<1>> CustomOp1 for Computed<1, F> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, x: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [x] = (self.backward)([x], result, grad)?;
        Ok(x)
    }
}

impl<F: Backward<2>> CustomOp2 for Computed<2, F> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, result: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [x, y] = (self.backward)([x, y], result, grad)?;
        Ok((x, y))
    }
}

impl<F: Backward<3>> CustomOp3 for Computed<3, F> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [x, y, z] = (self.backward)([x, y, z], result, grad)?;
        Ok((x, y, z))
    }
}

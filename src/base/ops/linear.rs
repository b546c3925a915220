//! Linear maps.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, Layout, Result, Shape, Storage, Tensor};

use super::inner_map::InnerMap;

/// `x · weightᵀ + bias` with `x` of `[…, in]` and `weight` of `[out, in]`.
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let map = InnerMap::new(weight, bias);
    if map.is_trained() && map.is_held() && x.dtype() == weight.dtype() {
        return map.forward(x);
    }
    let y = if weight.track_op() {
        let (rows, width) = flat(x)?;
        let mut dims = x.dims().to_vec();
        let out = weight.dim(0)?;
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        x.reshape((rows, width))?.matmul(&weight.t()?)?.reshape(dims)?
    } else {
        x.contiguous()?.apply_op1(FrozenLinear { weight: weight.clone() })?
    };
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// The elements of `x` as rows: (number of rows, width).
fn flat(x: &Tensor) -> Result<(usize, usize)> {
    let width = x.dim(D::Minus1)?;
    Ok((x.elem_count().checked_div(width).unwrap_or(0), width))
}

struct FrozenLinear {
    weight: Tensor,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.product(x, layout, |weight| if let Storage::Cpu(weight) = weight { Some(weight) } else { None })
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.product(x, layout, |weight| if let Storage::Cuda(weight) = weight { Some(weight) } else { None })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, out) = flat(grad)?;
        Ok(Some(grad.reshape((rows, out))?.matmul(&self.weight)?.reshape(x.shape())?))
    }
}

impl FrozenLinear {
    /// On the device of `x`; `of` gives the weight there.
    fn product<S: BackendStorage>(
        &self,
        x: &S,
        layout: &Layout,
        of: impl Fn(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)> {
        let (weight, weight_layout) = self.weight.storage_and_layout();
        let Some(weight) = of(&weight) else { candle_core::bail!("frozen-linear: the weight is on another device") };
        let (out, width) = self.weight.dims2()?;
        let mut dims = layout.dims().to_vec();
        let Some(last) = dims.last_mut() else { candle_core::bail!("frozen-linear: the input has no dimension") };
        if *last != width {
            candle_core::bail!("frozen-linear: input {:?} does not fit weight [{out}, {width}]", layout.dims());
        }
        *last = out;
        let rows = layout.shape().elem_count() / width.max(1);
        let x_layout = Layout::contiguous_with_offset((rows, width), layout.start_offset());
        let y = x.matmul(weight, (1, rows, out, width), &x_layout, &weight_layout.transpose(0, 1)?)?;
        Ok((y, dims.into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::super::testing::{check_gradient, max_difference, numbers};
    use super::*;

    #[test]
    fn linear_gradient_is_exact_and_leaves_the_weight_out() {
        let (weight, bias) = (numbers(&[5, 4], 1.0), numbers(&[5], 2.0));
        check_gradient(&numbers(&[2, 3, 4], 0.0), |x| linear(x, &weight, Some(&bias)));
        let (x, weight) = (Var::from_tensor(&numbers(&[3, 4], 0.0)).unwrap(), numbers(&[5, 4], 1.0));
        let grads = linear(x.as_tensor(), &weight, None).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&weight).is_none());
    }

    #[test]
    fn linear_equals_the_trainable_form() {
        let (x, weight) = (numbers(&[2, 3, 4], 0.0), numbers(&[5, 4], 1.0));
        let trainable = Var::from_tensor(&weight).unwrap();
        check_gradient(&weight, |weight| linear(&x, weight, None));
        let difference =
            max_difference(&linear(&x, &weight, None).unwrap(), &linear(&x, trainable.as_tensor(), None).unwrap());
        assert!(difference < 1e-14);
    }
}

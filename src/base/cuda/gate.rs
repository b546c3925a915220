//! Gated activations and ELU.

use candle_core::{D, Result, Storage, Tensor};

use super::computed;
use super::launch::{Argument, Call, Source, grid_of, int, is_vector, long, tensor};
use crate::base::Activation;

/// See [`gated`](crate::base::ops::gated()).
pub(crate) fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() || gate.dtype() != up.dtype() {
        candle_core::bail!("gate: {:?} and {:?} do not fit each other", gate.shape(), up.shape());
    }
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let made = forward(activation, &gate, &up)?;
    computed::of_two([&gate, &up], "gate", made, gate.shape(), move |[gate, up], _, grad| {
        let [by_gate, by_up] = backward(activation, [gate, up, &grad.contiguous()?])?;
        Ok([Some(by_gate), Some(by_up)])
    })
}

/// See [`elu`](crate::base::ops::elu()).
pub(crate) fn elu(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let [made] = run("elu_forward", &[&x], &[])?;
    computed::of_one(&x, "elu", made, x.shape(), |[x], _, grad| {
        let [dx] = run("elu_backward", &[x, &grad.contiguous()?], &[])?;
        Ok([Some(tensor(dx, x.shape()))])
    })
}

/// `x + scale · (y + bias)` of contiguous tensors, without `x` or `bias` where they are not given.
pub(super) fn add_scaled(x: Option<&Tensor>, y: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Storage> {
    let (real, count, width) = (y.dtype(), y.elem_count(), y.dim(D::Minus1)?);
    let starts = [x, Some(y)].into_iter().flatten().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?;
    let arguments = vec![
        x.into(),
        Argument::Input(y),
        bias.into(),
        Argument::Output(0),
        long(count),
        int(width)?,
        Argument::F64(scale),
        is_vector(&starts.iter().collect::<Vec<_>>(), &[]).into(),
    ];
    let (source, entry) = (Source::Gate, "add_scaled");
    let grid = grid_of(count.div_ceil(16 / real.size_in_bytes()), 256);
    let [sum] = Call { source, real, entry, grid, block: [256, 1], shared: 0, arguments }.run([(real, count)])?;
    Ok(sum)
}

/// `activation(gate) · up` of contiguous tensors.
pub(super) fn forward(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Storage> {
    let [made] = run("gate_forward", &[gate, up], &[kind(activation)])?;
    Ok(made)
}

/// The gradients of gate and up, given that of their product; contiguous tensors.
pub(super) fn backward(activation: Activation, [gate, up, grad]: [&Tensor; 3]) -> Result<[Tensor; 2]> {
    let [by_gate, by_up] = run("gate_backward", &[gate, up, grad], &[kind(activation)])?;
    Ok([tensor(by_gate, gate.shape()), tensor(by_up, up.shape())])
}

/// As in `kernels/gate.cu`.
fn kind(activation: Activation) -> Argument<'static> {
    Argument::I32(match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
    })
}

/// From arrays of one length to arrays of that length.
fn run<const N: usize>(entry: &'static str, inputs: &[&Tensor], options: &[Argument]) -> Result<[Storage; N]> {
    let Some(first) = inputs.first() else { candle_core::bail!("{entry}: no input") };
    let (real, count) = (first.dtype(), first.elem_count());
    let mut arguments: Vec<Argument> = inputs.iter().map(|input| Argument::Input(input)).collect();
    arguments.extend((0..N).map(Argument::Output));
    arguments.push(long(count));
    arguments.extend(options);
    // rows may be of any length: only where the arrays begin counts
    let starts: Vec<Tensor> = inputs.iter().map(|input| input.flatten_all()).collect::<Result<_>>()?;
    arguments.push(is_vector(&starts.iter().collect::<Vec<_>>(), &[]).into());
    let grid = grid_of(count.div_ceil(16 / real.size_in_bytes()), 256);
    let call = Call { source: Source::Gate, real, entry, grid, block: [256, 1], shared: 0, arguments };
    call.run([(real, count); N])
}

//! Kernels for CUDA devices.
//!
//! Each stands for an operation of [`base::ops`](crate::base::ops), which calls it where `takes` says so: on a device of compute
//! capability 8.0 or later, in float32, bfloat16 and float16, computed in float32. `kernels/` holds their sources, which the
//! device's owner compiles at the first call (NVRTC). Without the feature `cuda` only [`self_check`] is here, and has the
//! operations of the CPU to check.
//!
//! No GPU is needed to test them: `emulator.rs` runs the same sources and calls on the CPU, a thread of the GPU a fiber.

mod check;

#[cfg(any(test, feature = "cuda"))]
mod attention;
#[cfg(any(test, feature = "cuda"))]
mod block;
#[cfg(any(test, feature = "cuda"))]
mod computed;
#[cfg(feature = "cuda")]
mod device;
#[cfg(test)]
mod emulator;
#[cfg(any(test, feature = "cuda"))]
mod gate;
#[cfg(any(test, feature = "cuda"))]
mod heads;
#[cfg(any(test, feature = "cuda"))]
mod launch;
#[cfg(any(test, feature = "cuda"))]
mod loss;
#[cfg(any(test, feature = "cuda"))]
mod norm;
#[cfg(any(test, feature = "cuda"))]
mod rope;
#[cfg(test)]
mod tests;

pub use check::{Row, self_check};

#[cfg(any(test, feature = "cuda"))]
pub(crate) use {
    attention::{attention, attention_packed, takes_attention},
    block::{mlp, output, qkv, takes_map},
    gate::{elu, gated},
    heads::{head_linear, takes_heads},
    loss::{label_loss, logits_loss},
    norm::{norm, takes_norm},
    rope::rope,
};

/// Whether there are kernels for numbers like those of `x`.
#[cfg(any(test, feature = "cuda"))]
pub(crate) fn takes(x: &candle_core::Tensor) -> bool {
    use candle_core::{DType, Device};
    let is_here = match x.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device::has_kernels(device),
        #[cfg(test)]
        Device::Cpu => emulator::is_active(),
        _ => false,
    };
    is_here && !crate::base::ops::is_forced() && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

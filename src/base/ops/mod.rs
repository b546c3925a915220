//! Operations of the decoder with a backward of their own.
//!
//! candle's `backward` computes the gradient of both sides of every matrix product and composes norms, rotary and
//! softmax from elementwise steps. A frozen base needs only the gradient of the activations, so each operation here
//! takes its weights as constants and returns that alone, in one pass over the rows. Where a weight is being trained
//! ([`Tensor::track_op`](candle_core::Tensor::track_op)), the composed form is used instead.

mod linear;
mod norm;
mod rope;
mod rows;
mod softmax;

pub use linear::linear;
pub use norm::norm;
pub use rope::rope;
pub use softmax::{masked_softmax, softcap};

#[cfg(test)]
mod testing;

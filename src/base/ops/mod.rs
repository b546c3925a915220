//! Operations of the decoder with a backward of their own.
//!
//! candle's `backward` computes the gradient of both sides of every matrix product and composes norms, rotary and
//! softmax from elementwise steps. A frozen base needs only the gradient of the activations, so each operation here
//! takes its weights as constants and returns that alone, in one pass over the rows. What is being trained
//! ([`Tensor::track_op`](candle_core::Tensor::track_op)) is told on the way back (see [`backward`]); half types are composed.
//! On CUDA devices they are kernels ([`cuda`](crate::base::cuda)) where there is one; elsewhere each is composed of candle's own steps
//! (see [`Composed`]).

mod attention;
mod composed;
mod cross_entropy;
mod dropout;
mod elu;
mod head_linear;
mod held;
mod inner_map;
mod linear;
mod lookup;
mod matmul;
mod mlp;
mod norm;
mod projection;
mod real;
mod rope;
mod rows;
mod trained;

pub use attention::{Visibility, attention, attention_packed};
pub use composed::Composed;
#[cfg(any(test, feature = "cuda"))]
pub(crate) use composed::{Tangent, is_forced};
pub use cross_entropy::{LabelLoss, LogitMap, label_loss, logits_loss};
pub use dropout::dropout;
pub use elu::elu;
pub use head_linear::{Feature, head_linear};
pub use inner_map::{InnerMap, LowRank};
pub use linear::linear;
pub use lookup::lookup;
pub use mlp::{GatedMlp, MlpBlock, gated};
pub use norm::NormWeights;
pub use projection::{OutputProjection, QkvProjection, Rotation};
pub use rope::rope;
pub use trained::{Gradients, RowGradient, backward};

#[cfg(test)]
mod testing;

//! A frozen pretrained decoder: opening its checkpoint, saying what it is ([`DecoderSpec`]), running it with candle,
//! and its tokenizer and chat template.
//!
//! Knows nothing of ONNX. What an adapter needs from a decoder is a [`Site`]: the query that meets the keys and the
//! attention output it belongs to, offered to a [`SiteHook`] in every layer.

mod cache;
mod chat;
mod checkpoint;
pub mod cuda;
mod decoder;
mod device;
mod error;
pub mod family;
pub mod fetch;
mod fused;
mod gguf;
mod hook;
mod input;
mod layerwise;
pub mod ops;
mod rewrite;
mod rotary;
mod safetensors;
mod spec;
mod tokenizer;
mod weights;

pub use cache::KvCache;
pub use chat::{ChatTemplate, Message};
pub use checkpoint::Checkpoint;
pub use decoder::Decoder;
#[cfg(feature = "cuda")]
pub use device::cuda_stream;
pub use device::{
    DeviceChoice, DeviceMemory, MatmulPrecision, describe, device_memory, is_out_of_memory, reset_peak_memory,
    set_matmul_precision,
};
pub use error::{Error, Result};
pub use gguf::Gguf;
pub use hook::{LinearMap, NoHook, Site, SiteHook};
pub use input::Input;
pub use layerwise::{Kept, LayerwisePass};
pub use spec::{
    Activation, Attention, DecoderSpec, Embedding, Head, Layer, LearnedPositions, LongContext, Mlp, Norm, NormKind,
    QkNorm, QkNormOver, Rotary, Wiring,
};
pub use tokenizer::{StreamDecoder, Tokenizer};
pub use weights::{Linear, NormSite, Part, Source, WeightNames, WeightRole, WeightShape};

#[cfg(test)]
pub(crate) mod testing;

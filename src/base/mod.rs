//! A frozen pretrained decoder: opening its checkpoint, saying what it is ([`DecoderSpec`]), running it with candle,
//! and its tokenizer and chat template.
//!
//! Knows nothing of ONNX. What an adapter needs from a decoder is a [`Site`]: the query that meets the keys and the
//! attention output it belongs to, offered to a [`SiteHook`] in every layer.

mod cache;
mod chat;
mod checkpoint;
mod decoder;
mod error;
pub mod family;
pub mod fetch;
mod gguf;
pub mod ops;
mod rotary;
mod safetensors;
mod spec;
mod tokenizer;

pub use cache::KvCache;
pub use chat::{ChatTemplate, Message};
pub use checkpoint::Checkpoint;
pub use decoder::{Decoder, Input, NoHook, Site, SiteHook};
pub use error::{Error, Result};
pub use gguf::Gguf;
pub use spec::{Activation, Attention, DecoderSpec, Linear, Mlp, Norm, Rotary, WeightRole, WeightShape};
pub use tokenizer::{StreamDecoder, Tokenizer};

#[cfg(test)]
pub(crate) mod testing;
